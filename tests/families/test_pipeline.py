"""What all families over a diffusers pipeline share: folders, own networks, images."""

import json
import re
import shutil

import pytest
import torch
from tiny_pipelines import CASES

from danceopd.data.examples import Example
from danceopd.fields.adapters import AdapterBackbone
from danceopd.fields.weights import WeightsError, load_checkpoint


def velocities(family, model=None):
    shape = family.loaded.latent_shape(16, 24)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model or family.model)(z, torch.tensor([0.8, 0.2]), family.encode(["a circle", "a star"], None))


@pytest.fixture
def folder(case, tmp_path):
    case.pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_is_the_pipeline_that_was_saved_in_it(case, folder):
    family = case.family(folder)
    assert torch.equal(velocities(family), velocities(case.family(case.pipeline())))
    assert family.resolve(str(folder)) == folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {name.split("/")[0] for name in family.files} >= {"text_encoder", "vae"}
    assert all(path.is_file() for path in family.files.values())
    assert not any(parameter.requires_grad for part in family.loaded.modules() for parameter in part.parameters())


def test_weights_may_be_in_shards(case, folder):
    family = case.family(folder)
    shutil.rmtree(folder / "transformer")
    family.network.save_pretrained(folder / "transformer", max_shard_size="20KB")
    index = family.resolve(str(folder))
    assert index.name.endswith(".safetensors.index.json")
    sharded = case.family(folder)
    assert sum(name.startswith("transformer/") for name in sharded.files) > 1
    assert torch.equal(velocities(sharded, sharded.load_model(index)), velocities(family))
    next(iter((folder / "transformer").glob("*.safetensors"))).unlink()
    with pytest.raises(WeightsError, match="weight file not found"):
        load_checkpoint(family.load_model().network, index)


def test_own_models_share_nothing_and_leave_adapters_out(case, folder, rng):
    family = case.family(folder)
    before = velocities(family)
    backbone = AdapterBackbone(family.network)
    backbone.create("student", rank=2, alpha=2.0, targets=family.lora_targets, generator=rng)
    for parameter in backbone.parameters("student"):
        parameter.data += 0.1
    backbone.activate("student")
    own = family.load_model()
    assert torch.equal(velocities(family, own), before)
    assert not torch.equal(velocities(family), before)
    for parameter in own.parameters():
        parameter.data.zero_()
    with backbone.use():
        assert torch.equal(velocities(family), before)
    again = family.load_model(family.resolve(str(folder)))
    assert torch.equal(velocities(family, again), before)


def test_folders_that_are_no_whole_pipeline_of_the_family_are_refused(case, folder, tmp_path):
    with pytest.raises(WeightsError, match=r"no model_index\.json in .*hf download"):
        case.family(tmp_path / "absent")
    shutil.move(folder / "vae", tmp_path / "vae")
    with pytest.raises(WeightsError, match=r"names vae, which is not there"):
        case.family(folder)
    shutil.move(tmp_path / "vae", folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"its vae lacks diffusion_pytorch_model\.safetensors, or "):
        case.family(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no transformer weights in"):
        case.family(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "OtherPipeline"}))
    with pytest.raises(WeightsError, match="holds a OtherPipeline; family"):
        case.family(folder)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(WeightsError, match="is not a pipeline's index"):
        case.family(folder)


def test_every_file_that_a_pipeline_needs_is_missed_by_name(case, folder):
    # A chat template may stand in tokenizer_config.json too; without any, encoding a prompt fails by itself.
    needed = [path for path in folder.rglob("*") if path.is_file() and path.name != "chat_template.jinja"]
    assert len(needed) >= 10
    for path in needed:
        aside = path.rename(path.with_suffix(".aside"))
        with pytest.raises(WeightsError, match=re.escape(path.name)) as caught:
            case.family(folder)
        assert path.parent.name in str(caught.value)
        aside.rename(path)
    case.family(folder)


def test_a_pipelines_index_leads_nowhere_else(tmp_path):
    case, folder = CASES["sd3"], tmp_path / "base"
    case.pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"../..": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(WeightsError, match=r"names a part that is no folder beside it: '\.\./\.\.'"):
        case.family(folder)


def test_weights_of_a_variant_alone_are_named(tmp_path):
    case, folder = CASES["sd3"], tmp_path / "base"
    case.pipeline().save_pretrained(folder, variant="fp16")
    with pytest.raises(WeightsError, match=r"needed is .*; found .*\.fp16\..*, a variant: save it without one"):
        case.family(folder)


def test_damaged_files_and_parts_are_named(tmp_path):
    case, folder = CASES["sd3"], tmp_path / "base"
    case.pipeline().save_pretrained(folder)
    for name, damaged, message in (
        ("vae/config.json", b"{", r"vae/config\.json is not valid JSON"),
        ("tokenizer_3/tokenizer.json", b"\xff", r"tokenizer_3/tokenizer\.json is not valid JSON"),
        ("text_encoder_2/model.safetensors", b"short", r"text_encoder_2/model\.safetensors is not a readable safetens"),
        (
            "vae/config.json",
            b'{"_class_name": "AutoencoderKL", "norm_num_groups": 3}',
            "cannot be loaded as a .*: vae: ",
        ),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged)
        with pytest.raises(WeightsError, match=message):
            case.family(folder)
        (folder / name).write_bytes(before)
    vae = case.family(folder).pipeline.vae
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="20KB")
    shard = min((folder / "vae").glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(WeightsError, match=f"weight file not found: .*{shard.name}"):
        case.family(folder)


def test_samplers_that_are_not_euler_are_refused(case):
    pipeline = case.pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, stochastic_sampling=True)
    with pytest.raises(WeightsError, match="stochastic_sampling"):
        case.family(pipeline)
    with pytest.raises(WeightsError, match=r"needs a pipeline of class .*, found Linear"):
        case.family(torch.nn.Linear(1, 1))


def test_images_are_decoded_as_the_pipeline_does_and_encoded_as_the_vaes_mode(case):
    pipeline = case.pipeline()
    family = case.family(pipeline)
    options = {"height": 16, "width": 24, "num_inference_steps": 2} | case.plain
    latents, images = (
        pipeline(prompt="a star", generator=torch.Generator().manual_seed(0), output_type=kind, **options).images
        for kind in ("latent", "pt")
    )
    if latents.ndim == 3:
        latents = pipeline._unpack_latents(latents, 16, 24, pipeline.vae_scale_factor)
    torch.testing.assert_close(family.decode(latents) / 2 + 0.5, images, rtol=0, atol=1e-6)
    picture = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    samples = family.samples([Example(prompt="a star", target=picture)])
    assert samples.target is not None
    plain = samples.target / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    with torch.no_grad():
        torch.testing.assert_close(plain, pipeline.vae.encode(picture[None]).latent_dist.mode())
    assert samples.shape == samples.target.shape[1:] == family.loaded.latent_shape(16, 24)


def test_examples_without_a_picture_have_the_familys_size(case):
    family = case.family(case.pipeline(), size=(24, 16))
    assert family.samples([Example(prompt="a star")]).shape == (4, 12, 8)
    with pytest.raises(ValueError, match="multiples of 4, found 24 x 18"):
        family.samples([Example(prompt="a star", target=torch.zeros(3, 24, 18))])
    sizes = [Example(prompt="a star", target=torch.zeros(3, 24, width)) for width in (16, 20)]
    with pytest.raises(ValueError, match=r"image 1 has shape \(3, 24, 20\)"):
        family.samples(sizes)


def test_a_negative_prompt_is_encoded_once(case, monkeypatch):
    pipeline = case.pipeline()
    family = case.family(pipeline)
    condition = family.encode(["a circle", "a star"], None)
    first = family.empty(condition, "blurry")
    monkeypatch.setattr(type(pipeline), "encode_prompt", None)
    again = family.empty(condition, "blurry")
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    assert first.prompt_embeds.shape == condition.prompt_embeds.shape
    assert torch.equal(first.prompt_embeds[0], first.prompt_embeds[1])
