"""Runs in processes of their own, to be killed, and what they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from danceopd.recipe import Recipe, dump_recipe
from danceopd.training.checkpoint import TrainingState, checkpoints, load_checkpoint_state
from danceopd.training.run_folder import RunFolder

COMMAND = [sys.executable, "-W", "ignore", "-c", "from danceopd.cli import main; main()"]


def start(recipe: Recipe, path: Path, *options: str) -> subprocess.Popen[str]:
    """``danceopd train`` of a recipe, which is written to ``path`` first."""
    path.write_text(dump_recipe(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "train", str(path), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(recipe: Recipe, path: Path, *options: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """``danceopd train`` of a recipe by several processes, with what a launcher tells each of them."""
    path.write_text(dump_recipe(recipe))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "danceopd", "train", str(path), *options],
            env=os.environ
            | {key: str(value) for key, value in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish_all(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each process wrote to stderr."""
    ended = [finish(process) for process in processes]
    return [code for code, _, _ in ended], [err for _, _, err in ended]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_step(folder: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if folder.metrics_file.exists() and len(folder.metrics_file.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no update {step} within two minutes")


def kill_at(step: int, recipe: Recipe, path: Path) -> None:
    """Go on with a run, and kill it once that update is on record.

    Resuming drops the lines after the checkpoint, so the line waited for is a new one.
    """
    process = start(recipe, path, "--resume")
    wait_for_step(RunFolder(Path(recipe.output)), step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def final(folder: RunFolder) -> tuple[TrainingState, dict[str, dict[str, Tensor]]]:
    """The newest checkpoint's state and tensors."""
    path = checkpoints(folder.checkpoints)[-1]
    names = ("student", "ema", "optimizer")
    return load_checkpoint_state(path), {name: load_file(path / f"{name}.safetensors") for name in names}


def strip(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without the clock's."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Two runs that ended in the same state bit for bit, by the same updates."""
    (state_a, tensors_a), (state_b, tensors_b) = final(one), final(other)
    assert state_a.model_dump(exclude={"seconds"}) == state_b.model_dump(exclude={"seconds"})
    for name, tensors in tensors_a.items():
        assert tensors.keys() == tensors_b[name].keys()
        assert all(torch.equal(tensors[key], tensors_b[name][key]) for key in tensors), name
    assert strip(one.metrics()) == strip(other.metrics())
