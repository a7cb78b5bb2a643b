"""LoRA files in every layout, against what they were made from and against what diffusers makes of them."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import CASES

from danceopd.families.lora_files import read_lora
from danceopd.families.pipeline_folder import weight_file
from danceopd.fields.adapters import AdapterBackbone, AdapterModel
from danceopd.fields.lora import Lora
from danceopd.fields.weights import WeightsError, read_safetensors, save_lora
from danceopd.tiny.pipelines import flux_pipeline, z_image_pipeline

RANK, ALPHA = 4, 6.0


def made(family, rank=RANK, alpha=ALPHA) -> Lora:
    backbone = AdapterBackbone(family.loaded.own_network())
    backbone.create("made", rank=rank, alpha=alpha, targets=family.lora_targets, generator=torch.Generator())
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(w.shape, generator=generator) * 0.3 for key, w in backbone.state("made").items()}
    return Lora(rank=rank, alpha=alpha, weights=weights)


def deltas(lora: Lora) -> dict[str, torch.Tensor]:
    pairs = {t: (lora.weights[f"{t}.lora_A.weight"], lora.weights[f"{t}.lora_B.weight"]) for t in lora.targets}
    return {target: lora.alpha / lora.rank * (b @ a) for target, (a, b) in pairs.items()}


def renamed(lora: Lora, *, module=str, a=".lora_A.weight", b=".lora_B.weight", alpha=None) -> dict[str, torch.Tensor]:
    """The LoRA's tensors under other names; ``alpha`` adds such a tensor to each module."""
    tensors = {}
    for target in lora.targets:
        name = module(target)
        tensors[name + a] = lora.weights[f"{target}.lora_A.weight"].contiguous()
        tensors[name + b] = lora.weights[f"{target}.lora_B.weight"].contiguous()
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_names(target):
    return f"transformer.{target}"


def velocity(family, network):
    shape = family.loaded.latent_shape(16, 24)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.behind_the_call(network)(z, torch.tensor([0.8, 0.2]), family.encode(["a circle", "a star"], None))


def ours(family, lora):
    network = family.loaded.own_network()
    backbone = AdapterBackbone(network)
    backbone.add("read", lora)
    shape = family.loaded.latent_shape(16, 24)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    model = AdapterModel(backbone, family.behind_the_call(network), "read")
    with torch.no_grad():
        return model(z, torch.tensor([0.8, 0.2]), family.encode(["a circle", "a star"], None))


def diffusers_own(family, path):
    pipeline = type(family.pipeline)(**family.pipeline.components | {"transformer": family.loaded.own_network()})
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return velocity(family, pipeline.transformer)


@pytest.fixture
def family(case):
    return case.family(case.pipeline())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("layout", ["own", "diffusers", "default", "peft", "peft renamed", "alphas", "kohya suffixes"])
def test_a_lora_is_the_same_in_every_layout(family, path, layout):
    lora = made(family)
    if layout == "own":
        save_lora(lora, path)
    elif layout == "diffusers":
        config = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": [*lora.targets],
        }
        text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        save_file(renamed(lora, module=diffusers_names), path, {"lora_adapter_metadata": text})
    elif layout in ("peft", "peft renamed"):
        path = path.with_name("adapter_model.safetensors") if layout == "peft" else path
        save_file(renamed(lora, module=lambda target: f"base_model.model.{target}"), path)
        path.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    elif layout == "alphas":
        save_file(renamed(lora, module=diffusers_names, alpha=ALPHA), path)
    elif layout == "kohya suffixes":
        names = {"a": ".lora_down.weight", "b": ".lora_up.weight"}
        save_file(renamed(lora, module=diffusers_names, alpha=ALPHA, **names), path)
    else:
        names = {"a": ".lora_A.default.weight", "b": ".lora_B.default.weight"}
        save_file(renamed(lora, **names), path, {"alpha": repr(ALPHA)})
    found = read_lora(path, family.pipeline)
    assert found.rank == RANK
    assert found.alpha == ALPHA
    assert set(found.weights) == set(lora.weights)
    assert all(torch.equal(found.weights[key], weight) for key, weight in lora.weights.items())
    if layout == "diffusers":
        torch.testing.assert_close(ours(family, found), diffusers_own(family, path), rtol=0, atol=1e-5)


def test_without_any_alpha_it_is_the_rank_as_in_diffusers(family, path):
    lora = made(family)
    save_file(renamed(lora, module=diffusers_names), path)
    found = read_lora(path, family.pipeline)
    assert found.alpha == found.rank == RANK
    velocities = ours(family, found)
    torch.testing.assert_close(velocities, diffusers_own(family, path), rtol=0, atol=1e-5)
    assert float((velocities - velocity(family, family.network)).abs().max()) > 1e-3


def test_peft_keys_without_their_configuration_are_refused(path):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    lora = made(family)
    tensors = renamed(lora, module=lambda target: f"base_model.model.{target}")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"records no alpha: needed is the adapter_config\.json"):
        read_lora(path, family.pipeline)
    save_file(tensors, path, {"alpha": repr(ALPHA)})
    assert read_lora(path, family.pipeline).alpha == ALPHA


@pytest.mark.parametrize("stabilised", [False, True])
def test_modules_may_differ_in_rank_and_alpha(family, path, stabilised):
    small, large = made(family), made(family, rank=7)
    first = small.targets[0]
    tensors = renamed(small, module=diffusers_names)
    tensors |= {key: w for key, w in renamed(large, module=diffusers_names).items() if f".{first}." in key}
    config = {"r": RANK, "lora_alpha": ALPHA, "rank_pattern": {f"^{first}": 7}, "alpha_pattern": {f"^{first}": 3.0}}
    config |= {"use_rslora": stabilised, "target_modules": [*small.targets]}
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, path, {"lora_adapter_metadata": text})
    found = read_lora(path, family.pipeline)
    assert found.rank == 7
    power = 0.5 if stabilised else 1.0
    needed = deltas(Lora(rank=1, alpha=ALPHA / RANK**power, weights=small.weights))
    needed[first] = deltas(Lora(rank=1, alpha=3.0 / 7**power, weights=large.weights))[first]
    for target, delta in deltas(found).items():
        torch.testing.assert_close(delta, needed[target])
    torch.testing.assert_close(ours(family, found), diffusers_own(family, path), rtol=0, atol=1e-5)


def kohya_z_image(target):
    return "lora_unet_" + target.replace(".", "_")


@pytest.mark.parametrize("name", [kohya_z_image, lambda target: f"diffusion_model.{target}"], ids=["kohya", "comfy"])
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_z_image_reads_what_diffusers_converts(path, name, alpha):
    family = CASES["z_image"].family(z_image_pipeline())
    lora = made(family)
    save_file(renamed(lora, module=name, a=".lora_down.weight", b=".lora_up.weight", alpha=alpha), path)
    found = read_lora(path, family.pipeline)
    needed = deltas(lora if alpha else Lora(rank=RANK, alpha=RANK, weights=lora.weights))
    assert set(deltas(found)) == set(needed)
    for target, delta in deltas(found).items():
        torch.testing.assert_close(delta, needed[target])
    torch.testing.assert_close(ours(family, found), diffusers_own(family, path), rtol=0, atol=1e-5)


def kohya_flux(width=32):
    """A fused query-key-value LoRA and another, of the first double block."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, out in (("img_attn_qkv", 3 * width), ("img_attn_proj", width)):
        tensors[f"lora_unet_double_blocks_0_{name}.lora_down.weight"] = torch.randn(RANK, width, generator=generator)
        tensors[f"lora_unet_double_blocks_0_{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator)
        tensors[f"lora_unet_double_blocks_0_{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def test_flux_reads_what_diffusers_converts(path):
    family = CASES["flux"].family(flux_pipeline())
    tensors = kohya_flux()
    save_file(tensors, path)
    found = read_lora(path, family.pipeline)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = ALPHA / RANK * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    for part, side in zip(whole.chunk(3), "qkv", strict=True):
        torch.testing.assert_close(deltas(found)[f"transformer_blocks.0.attn.to_{side}"], part)
    assert "transformer_blocks.0.attn.to_out.0" in found.targets
    torch.testing.assert_close(ours(family, found), diffusers_own(family, path), rtol=0, atol=1e-5)


def test_an_alpha_that_the_conversion_drops_is_no_silent_change(path):
    name = "lora_unet_final_layer_linear"
    weights = {f"{name}.lora_down.weight": torch.ones(RANK, 32), f"{name}.lora_up.weight": torch.ones(16, RANK)}
    save_file(kohya_flux() | weights | {f"{name}.alpha": torch.tensor(ALPHA)}, path)
    with pytest.raises(WeightsError, match=f"conversion loses '{name}' or its alpha"):
        read_lora(path, flux_pipeline())


def test_a_layout_without_a_converter_is_refused_by_name(path):
    save_file(kohya_flux(), path)
    pipeline = CASES["sd3"].pipeline()
    with pytest.raises(WeightsError, match=r"read for a StableDiffusion3Pipeline: 'lora_unet_double_blocks_0_img_"):
        read_lora(path, pipeline)
    with pytest.raises(WeightsError, match=r"no linear layer of its ZImageTransformer2DModel.*another model"):
        read_lora(path, z_image_pipeline())


def test_a_lora_of_another_model_is_refused(family, case, path):
    other = CASES["z_image" if case is CASES["sd3"] else "sd3"]
    save_file(renamed(made(other.family(other.pipeline())), module=diffusers_names), path)
    with pytest.raises(WeightsError, match="is for another model"):
        read_lora(path, family.pipeline)


def test_files_that_are_no_plain_lora_are_refused(path):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    lora = made(family)
    tensors, first = renamed(lora, module=diffusers_names), f"transformer.{lora.targets[0]}"
    for change, message in (
        ({f"{first}.lora_magnitude_vector": torch.ones(2)}, "not a plain LoRA: found .*magnitude"),
        ({f"{first}.dora_scale": torch.ones(2)}, "not a plain LoRA: found .*dora_scale"),
        ({f"{first}.lora_B.bias": torch.ones(2)}, r"not a plain LoRA: found .*bias', \(2,\)"),
        ({"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, "adapts a text encoder too"),
        ({"lora_te1_x.lora_down.weight": torch.ones(2, 2)}, "adapts a text encoder too"),
        ({f"{first}.alpha": torch.tensor(2.0)}, "alpha and matrices for different modules"),
        ({f"{first.removeprefix('transformer.')}.lora_A.weight": torch.ones(2, 2)}, "has two LoRAs for"),
        ({f"{first}.lora_A.weight": torch.ones(RANK + 1, 16)}, r"no pair A \[r, in\] and B \[out, r\]"),
        ({f"{first}.lora_A.weight": torch.ones(RANK, 16, 1, 1)}, r"no pair A \[r, in\] and B \[out, r\]"),
    ):
        save_file(tensors | change, path)
        with pytest.raises(WeightsError, match=message):
            read_lora(path, family.pipeline)
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{first}.lora_B.weight"}, path)
    with pytest.raises(WeightsError, match="no pair A"):
        read_lora(path, family.pipeline)
    save_file({f"{first}.alpha": torch.tensor(2.0)}, path)
    with pytest.raises(WeightsError, match="holds no pair of matrices"):
        read_lora(path, family.pipeline)


def test_files_that_contradict_themselves_are_refused(path):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    tensors = renamed(made(family), module=diffusers_names)
    alphas = renamed(made(family), module=diffusers_names, alpha=ALPHA)
    for held, config, message in (
        (tensors, {"r": RANK + 1, "lora_alpha": ALPHA}, "records rank 5 for .* and holds rank 4"),
        (alphas, {"r": RANK, "lora_alpha": 2 * ALPHA}, "records alpha twice for .*: 6 and 12"),
        (tensors, {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}, "not a plain LoRA: found use_dora"),
        (tensors, {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": "pissa_niter_4"}, "over a base that its start"),
        (tensors, {"r": RANK, "lora_alpha": 0.0}, "no usable alpha for .*: alpha / rank is 0"),
        (tensors, {"r": RANK, "lora_alpha": math.inf}, "no usable alpha for .*: alpha / rank is inf"),
        (tensors, {"r": RANK}, "no readable adapter configuration.*lora_alpha"),
    ):
        save_file(held, path, {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})})
        with pytest.raises(WeightsError, match=message):
            read_lora(path, family.pipeline)
    save_file(renamed(made(family), module=diffusers_names, alpha=0.0), path)
    with pytest.raises(WeightsError, match="no usable alpha"):
        read_lora(path, family.pipeline)
    save_file(tensors, path, {"alpha": "strong"})
    with pytest.raises(WeightsError, match="no readable adapter configuration"):
        read_lora(path, family.pipeline)
    twice = renamed(made(family), module=kohya_z_image, a=".lora_down.weight", b=".lora_up.weight", alpha=ALPHA)
    save_file(twice, path, {"alpha": repr(ALPHA)})
    with pytest.raises(WeightsError, match="in a layout to be converted"):
        read_lora(path, family.pipeline)


def test_a_module_that_went_missing_is_noticed(path):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    save_lora(made(family), path)
    tensors, metadata = read_safetensors(path)
    lost = min(tensors).rpartition(".lora_")[0]
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(f"{lost}.")}, path, metadata)
    with pytest.raises(WeightsError, match=f"differ in 1, first '{lost}'"):
        family.load_lora(path)


def test_a_folder_means_the_one_lora_in_it(tmp_path, path):
    family = CASES["sd3"].family(CASES["sd3"].pipeline())
    save_lora(made(family), path)
    assert family.load_lora(family.resolve(str(tmp_path))).alpha == ALPHA
    other = tmp_path / "other.safetensors"
    save_lora(made(family), other)
    with pytest.raises(WeightsError, match=r"holds 2 safetensors files \(lora.safetensors, other.safetensors\)"):
        weight_file(tmp_path)
    known = other.rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert weight_file(tmp_path) == known


def test_a_lora_is_read_beside_adapters_that_the_network_has_already(path):
    family = CASES["z_image"].family(z_image_pipeline())
    lora = made(family)
    save_file(renamed(lora, module=kohya_z_image, a=".lora_down.weight", b=".lora_up.weight", alpha=ALPHA), path)
    first = family.load_lora(path)
    backbone = AdapterBackbone(family.network)
    backbone.add("first", first)
    again = family.load_lora(path)
    assert again.targets == first.targets
    backbone.add("again", again)
