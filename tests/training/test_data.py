"""From a recipe's data to a route's draws."""

import pytest
import torch
from PIL import Image

import danceopd as d
from danceopd.data.buckets import Buckets
from danceopd.data.examples import Bucket
from danceopd.data.manifest import read_manifest
from danceopd.families.shapes import ShapesFamily
from danceopd.plan import check
from danceopd.recipe import RecipeError
from danceopd.runs import train
from danceopd.training.assemble import assemble
from danceopd.training.inputs import RouteSamples

CPU = torch.device("cpu")


class Sizes:
    """A family that only counts: a condition is the number of each prompt's letters."""

    def __init__(self):
        self.batches = []

    def samples(self, examples, size=None):
        self.batches.append([example.prompt for example in examples])
        lengths = torch.tensor([[float(len(example.prompt))] for example in examples])
        return d.Samples(condition=lengths, shape=(3, *examples[0].wanted_size))


def test_a_draw_makes_one_batch_a_shape_and_loses_nothing(tmp_path, rng):
    lines = []
    for k in range(12):
        Image.new("RGB", [(64, 64), (96, 48), (48, 96)][k % 3]).save(tmp_path / f"{k}.png")
        lines.append(f'{{"instruction": "edit {k}", "source": "{k}.png"}}')
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest = read_manifest(tmp_path / "m.jsonl", buckets=Buckets((64, 64), 8))
    family = Sizes()
    drawn = RouteSamples(Bucket(manifest, seed=0), family)(12, rng)
    assert {samples.shape for samples in drawn} == {(3, 64, 64), (3, 48, 88), (3, 88, 48)}
    assert [len(samples.condition) for samples in drawn] == [4, 4, 4]
    assert sorted(prompt for batch in family.batches for prompt in batch) == sorted(f"edit {k}" for k in range(12))


def test_a_cache_is_refused_where_there_is_nothing_to_save(tiny):
    with pytest.raises(RecipeError, match="data_cache: family 'shapes' keeps no encodings"):
        assemble(tiny("data_cache=somewhere"), device=CPU)
    assemble(tiny("data_cache=false"), device=CPU)


def test_a_size_for_generated_data_is_refused(tiny):
    with pytest.raises(RecipeError, match=r"routes\.0\.resolution: generated data have a size of their own"):
        assemble(tiny("routes.0.resolution=32"), device=CPU)


def test_generated_data_of_another_kind_than_the_routes_task_is_refused(tiny):
    with pytest.raises(
        RecipeError, match=r"routes\.0\.task: route 't2i' is 'edit', but shapes/t2i holds text to image"
    ):
        assemble(tiny("routes.0.task=edit"), device=CPU)
    with pytest.raises(RecipeError, match=r"routes\.1\.task: route 'edit' is 't2i', but shapes/edit holds edits"):
        assemble(tiny("routes.1.task=t2i"), device=CPU)
    assemble(tiny("routes.0.task=t2i", "routes.1.task=edit"), device=CPU)


def test_a_pack_whose_words_a_family_lacks_is_refused_with_its_line(tiny):
    with pytest.raises(RecipeError, match=r"t2i\.jsonl, line 1: "):
        assemble(tiny("routes.0.data={pack: t2i}"), device=CPU)


def test_every_row_is_tried_where_a_prompt_can_be_refused_with_or_without_a_cache(tiny, tmp_path):
    lines = [f'{{"prompt": "{prompt}"}}' for prompt in ("a red circle", "a blue square", "an otter")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"m\.jsonl, line 3: "):
        assemble(tiny(f"routes.0.data={{manifest: {tmp_path}/m.jsonl}}", "data_cache=false"), device=CPU)


def test_encoders_are_released_before_the_first_update(tiny, monkeypatch):
    order = []
    step = d.DanceOPD.step
    monkeypatch.setattr(ShapesFamily, "release_encoders", lambda self: order.append("released"))
    monkeypatch.setattr(d.DanceOPD, "step", lambda *args, **options: order.append("step") or step(*args, **options))
    check(tiny())
    train(tiny("train.steps=1"))
    assert order == ["released", *["step"] * 4, "released", "step"]  # two small batches of each route in check
