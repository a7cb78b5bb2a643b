"""Killed and resumed == never interrupted, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from danceopd.recipe import RecipeError, dump_recipe
from danceopd.runs import train
from danceopd.training.checkpoint import CheckpointFailure, checkpoints, load_checkpoint_state, load_tensors
from danceopd.training.run_folder import RunFolder, RunFolderBusy

COMMAND = [sys.executable, "-W", "ignore", "-c", "from danceopd.cli import main; main()"]


def start(recipe, path, *options):
    path.write_text(dump_recipe(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "train", str(path), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_step(folder, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if folder.metrics_file.exists() and len(folder.metrics_file.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no update {step} within two minutes")


def final(folder):
    path = checkpoints(folder.checkpoints)[-1]
    return load_checkpoint_state(path), {name: load_tensors(path, name) for name in ("student", "ema", "optimizer")}


def strip(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("student", ["lora", "full"])
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path, student):
    extra = ["student.lora=null", "train.learning_rate=1e-4"] if student == "full" else []
    extra += ["train.gradient_accumulation_steps=2", "train.steps=12", "routing.stratified=false"]
    whole = tiny(f"output={tmp_path / 'whole'}", *extra)
    assert finish(start(whole, tmp_path / "whole.yaml"))[0] == 0
    cut = tiny(f"output={tmp_path / 'cut'}", *extra)
    folder = RunFolder(tmp_path / "cut")
    for step in (1, 5, 8):
        process = start(cut, tmp_path / "cut.yaml", "--resume")
        wait_for_step(folder, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = finish(start(cut, tmp_path / "cut.yaml", "--resume"))
    assert code == 0, err
    (state_a, tensors_a), (state_b, tensors_b) = final(RunFolder(tmp_path / "whole")), final(folder)
    assert state_a.model_dump(exclude={"seconds"}) == state_b.model_dump(exclude={"seconds"})
    for name, tensors in tensors_a.items():
        assert tensors.keys() == tensors_b[name].keys()
        assert all(torch.equal(tensors[key], tensors_b[name][key]) for key in tensors), name
    assert strip(RunFolder(tmp_path / "whole").metrics()) == strip(folder.metrics())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_update_save_and_say_so(tiny, tmp_path, number, code):
    recipe = tiny("train.steps=500", "train.checkpointing_steps=400")
    folder = RunFolder(tmp_path / "run")
    process = start(recipe, tmp_path / "r.yaml")
    wait_for_step(folder, 2)
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code
    assert "--resume" in err
    state, _ = final(folder)
    assert state.step == len(folder.metrics()) >= 2


def test_a_second_process_on_a_run_folder_is_refused(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.owned(), pytest.raises(RunFolderBusy, match=f"in use by process {os.getpid()}"):
        train(tiny())


def test_a_finished_or_other_run_is_not_overwritten(tiny, tmp_path):
    train(tiny())
    with pytest.raises(RecipeError, match="already holds a run"):
        train(tiny())
    with pytest.raises(RecipeError, match="differing in query"):
        train(tiny("query.band=mid_noise"), resume=True)
    longer = train(tiny("train.steps=8"), resume=True)
    assert [line["step"] for line in longer.metrics()] == list(range(1, 9))


def test_a_source_that_changed_is_refused_on_resume(tiny):
    folder = train(tiny())
    path = checkpoints(folder.checkpoints)[-1] / "state.json"
    path.write_text(path.read_text().replace(load_checkpoint_state(path.parent).hashes["shapes:edit"], "0" * 64))
    with pytest.raises(CheckpointFailure, match="shapes:edit"):
        train(tiny("train.steps=8"), resume=True)


def test_the_resolved_recipe_is_recorded(tiny):
    folder = train(tiny("train.precision=auto"))
    assert yaml.safe_load(folder.recipe_file.read_text())["train"]["precision"] in ("fp32", "bf16")
