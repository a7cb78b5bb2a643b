"""Several runs of a suite at a time: the same results, and no process is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_compare import without_seconds
from tiny_suites import TINY, write

from danceopd.comparison.compare import compare, read_comparison
from danceopd.comparison.parallel import in_parallel
from danceopd.comparison.runner import ComparisonError

COMMAND = [sys.executable, "-W", "ignore", "-c", "from danceopd.cli import main; main()"]


def doubled(item):
    if item == 3:
        raise ComparisonError("three")
    return f"{item} on {torch.get_num_threads()}"


def doubled_or_never(item):
    if item == 4:  # until somebody ends it
        time.sleep(60)
    return doubled(item)


def test_each_process_has_its_share_of_the_threads_and_all_is_reported():
    before, lines = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        in_parallel(doubled, [1, 2], 2, lines.append)
    finally:
        torch.set_num_threads(before)
    assert sorted(line.split(" (")[0] for line in lines) == ["1 on 2", "2 on 2"]
    assert lines[-1].endswith("(2 of 2)")


def test_the_first_error_ends_all():
    began = time.monotonic()
    with pytest.raises(ComparisonError, match="three"):
        in_parallel(doubled_or_never, [3, 4], 2, print)
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 50


def killed_run(work, run):
    os.kill(os.getpid(), signal.SIGKILL)  # as a system does that runs out of memory


def test_a_run_that_is_killed_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("danceopd.comparison.runner._finish", killed_run)
    with pytest.raises(ComparisonError, match=r"a run's process was killed.*--resume, perhaps with fewer --jobs"):
        compare(write(tmp_path), out=tmp_path / "out", jobs=2)


def test_two_jobs_find_what_one_finds(tmp_path):
    path = write(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (compare(path, out=tmp_path / f"{jobs}", jobs=jobs) for jobs in (1, 2))
    finally:
        torch.set_num_threads(before)
    assert without_seconds(read_comparison(one)) == without_seconds(read_comparison(two))


def descendants(pid):
    """Processes whose parent is ``pid``, and theirs."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, wave = [], [pid]
    while wave:
        wave = [child for child, parent in parents.items() if parent in wave]
        found += wave
    return found


UPDATES = 400


def saved_every(updates):
    return TINY["recipe"] | {"train": TINY["recipe"]["train"] | {"checkpointing_steps": updates}}


def begin(path, out, ready):
    """``danceopd compare`` in a process of its own, of which ``ready`` holds."""
    command = [*COMMAND, "compare", str(path), "--jobs", "2", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # one for each job
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline, "nothing was saved"
    return process


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGTERM, 2, 143), (signal.SIGKILL, 1, -signal.SIGKILL)])
def test_a_stopped_comparison_leaves_no_process_and_whole_checkpoints(tmp_path, number, times, code):
    methods = {"danceopd": {}, "joint": {"method": "joint"}, "next": {"train.learning_rate": 1e-4}}
    path = write(tmp_path, compute=None, updates=UPDATES, recipe=saved_every(1), methods=methods)
    process = begin(path, tmp_path / "out", lambda: len(list(tmp_path.rglob("checkpoints/step-*/state.json"))) >= 2)
    children = descendants(process.pid)
    assert len(children) >= 2
    for _ in range(times):  # a second one, of who is impatient, must not let the others go on
        process.send_signal(number)
        time.sleep(0.7)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert "--resume" in err
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]
    saved = list(tmp_path.rglob("state.json"))
    assert all((file.parent / "student.safetensors").exists() for file in saved)
    assert not [file for file in saved if file.parent.name == f"step-{UPDATES:06d}"]  # nor was more trained


def unsaved(out):
    """Updates that a run has made beyond its newest checkpoint, at most."""
    behind = [0]
    for metrics in out.rglob("metrics.jsonl"):
        saved = [int(folder.name.split("-")[1]) for folder in metrics.parent.glob("checkpoints/step-*")]
        if saved and max(saved) > 0:
            behind.append(len(metrics.read_text().splitlines()) - max(saved))
    return max(behind)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_comparison_whose_power_was_cut_between_checkpoints_ends_as_an_uninterrupted_one(tmp_path):
    methods, out = {"danceopd": {}, "joint": {"method": "joint"}}, tmp_path / "cut"
    path = write(tmp_path, compute=None, updates=40, recipe=saved_every(12), methods=methods)
    process = begin(path, out, lambda: unsaved(out) >= 3)
    for number in [process.pid, *descendants(process.pid)]:
        os.kill(number, signal.SIGKILL)
    process.communicate(timeout=120)
    assert unsaved(out) >= 3  # nobody had the time to save
    cut = out / "tiny" / "comparison.json"
    assert not cut.exists()
    command = [*COMMAND, "compare", str(path), "--out", str(out), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = compare(path, out=tmp_path / "whole")
    finally:
        torch.set_num_threads(before)
    assert without_seconds(read_comparison(cut)) == without_seconds(read_comparison(whole))
