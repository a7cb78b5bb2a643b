"""The world's build and what it left in the package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from danceopd.families.shapes import SOURCES, WEIGHTS
from danceopd.fields.weights import file_hash
from danceopd.world import build
from danceopd.world.network import ShapesTransformer
from danceopd.world.text import TextEncoder


@pytest.mark.parametrize("name", ["base", "edit"])
def test_a_stage_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path, monkeypatch, name):
    monkeypatch.setattr(build, "CHECKPOINT_SECONDS", 0.0)
    (stage,) = build.quick(tuple(stage for stage in build.STAGES if stage.name == name), steps=5)
    stage = replace(stage, replay=0.5, rank=min(stage.rank, 4))
    encoder, start = TextEncoder().requires_grad_(False).eval(), ShapesTransformer().state_dict()
    real, drawn = build.draw_batch, []

    def train(folder, interrupt_at=None):
        def draw(*arguments):
            drawn.append(len(drawn))
            if len(drawn) == interrupt_at:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(build, "draw_batch", draw)
        drawn.clear()
        network = ShapesTransformer()
        network.load_state_dict(start)
        network.requires_grad_(not stage.rank)
        trained = dict(network.named_parameters())
        if stage.rank:
            trained = build.new_lora(network, stage.rank, torch.Generator().manual_seed(0))
        return build.train_stage(
            stage,
            network,
            trained,
            encoder,
            seed=0,
            device=torch.device("cpu"),
            resume_file=folder / "stage.resume",
            report=lambda line: None,
            made_by="this test",
        )

    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, interrupt_at=4)
    resumed = train(tmp_path)
    assert len(drawn) == 2  # updates 4 and 5; the first three came from the file
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_shipped_files_are_small_and_those_that_were_scored():
    files = {f"shapes:{name}": WEIGHTS / f"{name}.safetensors" for name in SOURCES}
    files["text encoder"] = WEIGHTS / "text.safetensors"
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 10e6
    scores = json.loads((Path(__file__).parents[2] / "docs" / "results" / "world.json").read_text())
    assert scores["hashes"] == {name: file_hash(file) for name, file in files.items()}
