"""A run over a diffusers pipeline that was killed goes on as if it had not been, bit for bit."""

from processes import assert_same_run, finish, kill_at, start
from tiny_pipelines import CASES

from danceopd.recipe import load_recipe
from danceopd.training.checkpoint import checkpoints, load_checkpoint_state
from danceopd.training.run_folder import RunFolder
from recipes import write_recipe

OVERRIDES = [
    "train.steps=10",
    "train.checkpointing_steps=2",
    "train.sample_steps=5",
    "train.learning_rate=1e-2",
    "train.ema_decay=0.6",
    "routes.0.prompt_dropout=0.3",
    "routes.1.prompt_dropout=0.5",
]


def test_an_edit_run_killed_and_resumed_from_a_full_cache_equals_uninterrupted(tmp_path):
    """Three prompts and edits in all and four samples an update: their epochs end many times over."""
    path = write_recipe(CASES["kontext"], "flux", tmp_path)
    whole, cut = (load_recipe(path, [*OVERRIDES, f"output={tmp_path / name}"]) for name in ("whole", "cut"))
    code, _, err = finish(start(whole, tmp_path / "whole.yaml"))
    assert code == 0, err
    cached = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").glob("*/*.safetensors")}
    assert cached

    folder = RunFolder(tmp_path / "cut")
    for step in (3, 6):
        kill_at(step, cut, tmp_path / "cut.yaml")
    killed = load_checkpoint_state(checkpoints(folder.checkpoints)[-1])
    assert 0 < killed.step < 10
    assert min(state["epoch"] for state in killed.buckets.values()) >= 2
    code, _, err = finish(start(cut, tmp_path / "cut.yaml", "--resume"))
    assert code == 0, err
    assert_same_run(RunFolder(tmp_path / "whole"), folder)
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").glob("*/*.safetensors")} == cached
