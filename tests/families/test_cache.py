"""Encodings on disk: the same as the family's own, made once, and never trusted when they are not whole."""

import shutil
from dataclasses import fields, replace
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import CASES, TOKENS

import danceopd as d
from danceopd.data.examples import Example
from danceopd.families.flux import FluxFamily
from danceopd.fields.field import ModelField
from danceopd.states import concatenate

PROMPTS = ["a red circle", "a small blue square beside a green star", "a red circle"]
EDITING = ("kontext", "omni")


def pictures(count, height=16, width=24):
    return list(torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1)


def examples(case):
    """Three training inputs: two prompts, two sources, three targets."""
    sources = [*pictures(2), pictures(1)[0]] if case.can_edit else [None] * 3
    targets = pictures(3, 24, 16)
    return [Example(prompt=p, source=s, target=t) for p, s, t in zip(PROMPTS, sources, targets, strict=True)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each case's pipeline in a folder, saved once: ``bases(case)``."""
    root = tmp_path_factory.mktemp("bases")

    def base(case):
        name = next(name for name in CASES if CASES[name] is case)
        if not (root / name).exists():
            case.pipeline().save_pretrained(root / name)
        return root / name

    return base


def cached_family(case, base, folder):
    family = case.family(base)
    assert family.use_cache(folder)
    return family


def assert_same(a, b):
    assert type(a) is type(b)
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert (one is None) == (other is None), field.name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), field.name


def counted(family, monkeypatch):
    """The prompts, sources and images that the family itself is asked for, as lists that grow."""
    asked = {"encode_prompts": [], "add_sources": [], "encode_images": []}

    def count(name, position):
        original = getattr(family, name)

        def call(*args, **options):
            asked[name] += list(args[position])
            return original(*args, **options)

        monkeypatch.setattr(family, name, call)

    for name, position in (("encode_prompts", 0), ("add_sources", 1), ("encode_images", 0)):
        count(name, position)
    return asked


def test_cached_is_uncached_exactly_when_made_and_when_found(case, bases, tmp_path):
    family = case.family(bases(case))
    alone = [family.samples([example]) for example in examples(case)]
    empty = family.empty(alone[0].condition, "blurry")
    for _ in range(2):
        cached = cached_family(case, bases(case), tmp_path)
        found = cached.samples(examples(case))
        assert_same(found.condition, concatenate([samples.condition for samples in alone]))
        assert torch.equal(found.target, torch.cat([samples.target for samples in alone]))
        assert found.shape == alone[0].shape
        blank = cached.empty(found.condition, "blurry")
        assert_same(blank, replace(found.condition, **{p: getattr(blank, p) for p in family.text_parts}))
        for part in family.text_parts:
            assert all(torch.equal(row, getattr(empty, part)[0]) for row in getattr(blank, part))


def test_each_prompt_and_image_is_encoded_once_in_all_runs(case, bases, tmp_path, monkeypatch):
    family = case.family(bases(case))
    asked = counted(family, monkeypatch)
    for _ in range(2):
        family.use_cache(tmp_path)
        for _ in range(2):
            condition = family.samples(examples(case)).condition
            family.empty(condition)
    assert sorted(asked["encode_prompts"]) == sorted([*set(PROMPTS), ""])
    assert len(asked["add_sources"]) == (2 if case.can_edit else 0)
    assert len(asked["encode_images"]) == 3


def test_prompts_of_edits_and_of_images_are_kept_apart(bases, tmp_path):
    case = CASES["omni"]  # whose captions differ around a source
    family, cached = case.family(bases(case)), cached_family(case, bases(case), tmp_path)
    for sources in (None, pictures(1)):
        assert_same(cached.encode(["a star"], sources), family.encode(["a star"], sources))


def entries(folder):
    return sorted(folder.glob("*/*.safetensors"))


def damage_by_truncation(path):
    path.write_bytes(path.read_bytes()[:-8])


def damage_by_one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def damage_by_other_content(path):
    save_file({name: part * 2 for name, part in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_one_bit, damage_by_other_content])
def test_a_damaged_entry_is_made_again(bases, tmp_path, damage):
    case = CASES["kontext"]
    first = cached_family(case, bases(case), tmp_path).samples(examples(case))
    before = {path: path.read_bytes() for path in entries(tmp_path)}
    assert len(before) == 2 + 2 + 3
    for path in before:
        damage(path)
    with pytest.warns(UserWarning, match="was damaged and is made again"):
        again = cached_family(case, bases(case), tmp_path).samples(examples(case))
    assert_same(again.condition, first.condition)
    assert torch.equal(again.target, first.target)
    assert {path: path.read_bytes() for path in entries(tmp_path)} == before
    assert len(list(tmp_path.rglob("*"))) == len(before) + len({path.parent for path in before})


def with_changed_weights(base, part, folder):
    shutil.copytree(base, folder)
    path = next((folder / part).glob("*.safetensors"))
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_what_changed_is_not_found(bases, tmp_path, monkeypatch):
    """Encoder weights, their type, a tokenizer, and the settings each make other entries; the transformer does not."""
    case, base = CASES["kontext"], bases(CASES["kontext"])
    shutil.copytree(base, tmp_path / "words")
    path = next((tmp_path / "words" / "tokenizer_2").glob("*.json"))
    path.write_text(path.read_text() + "\n")
    makers = {
        "first": lambda: case.family(base),
        "same": lambda: case.family(base),
        "transformer": lambda: case.family(with_changed_weights(base, "transformer", tmp_path / "a")),
        "text encoder": lambda: case.family(with_changed_weights(base, "text_encoder", tmp_path / "b")),
        "vae": lambda: case.family(with_changed_weights(base, "vae", tmp_path / "c")),
        "tokenizer": lambda: case.family(tmp_path / "words"),
        "type": lambda: case.family(base, dtype=torch.bfloat16),
        "guidance": lambda: case.family(base, embedded_guidance=1.0),
        "length": lambda: FluxFamily(base, max_sequence_length=TOKENS - 1),
    }
    asked = {}
    for name, make in makers.items():
        family = make()
        counts = counted(family, monkeypatch)
        family.use_cache(tmp_path / "cache")
        family.samples(examples(case))
        asked[name] = len(counts["encode_prompts"])
    assert asked == {name: 0 if name in ("same", "transformer") else 2 for name in makers}


def test_a_pipeline_without_files_keeps_nothing(case, tmp_path):
    family = case.family(case.pipeline())
    assert not family.use_cache(tmp_path)
    family.encode(PROMPTS, None)
    assert entries(tmp_path) == []
    with pytest.raises(ValueError, match="no files to know its encoders by"):
        family.encoder_digest()


def test_text_encoders_and_vae_leave_where_the_cache_stands_in_and_conditions_stay(case, bases, tmp_path, monkeypatch):
    """There is one device here: what is asked of the modules tells where they would be."""
    family = case.family(bases(case))
    moved = []
    for name, part in family.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "to", lambda device, name=name: moved.append((name, device)))
    family.to(torch.device("meta"))
    moved.clear()
    family.release_encoders()
    assert moved == []
    family.use_cache(tmp_path)
    family.release_encoders()
    encoders = {name for name, part in family.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {name for name, _ in moved} == encoders - {"transformer"}
    assert {device for _, device in moved} == {torch.device("cpu")}
    assert family.device == torch.device("meta")


@pytest.mark.parametrize("name", EDITING)
def test_prompt_dropout_and_shapes_work_from_a_full_cache_without_any_encoder(name, bases, tmp_path, monkeypatch, rng):
    case = CASES[name]
    family = cached_family(case, bases(case), tmp_path)
    wide, high = ([Example(prompt=PROMPTS[0], source=p) for p in pictures(2, *size)] for size in ((16, 24), (24, 16)))

    def draw(count, generator):
        return [family.samples(wide), family.samples(high)]

    family.empty(draw(4, rng)[0].condition)
    asked = counted(family, monkeypatch)
    field = d.GuidedField(ModelField(family.model), empty=family.empty, guidance_scale=3.0, combine=family.guide)
    route = d.Route("edit", field, draw, prompt_dropout=0.5)
    grid = family.grid(4, shape=(4, 8, 12))
    result = d.DanceOPD(routes=[route], grid=grid).step(family.model, batch_size=4, generator=rng)
    assert result.routes["edit"].samples == 4
    assert asked == {"encode_prompts": [], "add_sources": [], "encode_images": []}


def test_edits_are_refused_where_the_family_cannot(bases, tmp_path):
    case = CASES["sd3"]
    with pytest.raises(ValueError, match="cannot edit, found 1 source images"):
        cached_family(case, bases(case), tmp_path).encode(["make it red"], pictures(1))
    assert entries(tmp_path) == []


def fill(base, folder, start):
    torch.set_num_threads(1)
    family = cached_family(CASES["sd3"], base, folder)
    start.wait(300)
    for number in range(40):
        family.encode([f"prompt {number}"], None)


def test_processes_share_a_folder(bases, tmp_path):
    context = get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=fill, args=(bases(CASES["sd3"]), tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(entries(tmp_path)) == 40
    assert not list(tmp_path.rglob("*.tmp"))
