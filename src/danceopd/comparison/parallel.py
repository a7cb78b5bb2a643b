"""Several runs of a suite at a time, each in a process of its own with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import TypeVar

import torch

from danceopd.errors import Interrupted

Item = TypeVar("Item")
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5.0
"""Seconds from one SIGTERM to a run's process to the next."""


def in_parallel(work: Callable[[Item], str], items: Sequence[Item], jobs: int, report: Callable[[str], None]) -> None:
    """``work(item)`` for every item, ``jobs`` at a time, in the items' order; what it returns is reported.

    Small networks do not fill several cores, so that two runs with one thread each are done sooner than two runs in
    turn with two. What is printed by ``work`` is dropped. SIGINT and SIGTERM, and the death of this process, reach the
    runs as SIGTERM, which ends each after its update, saved.

    work: importable by name, as are its arguments (they travel to fresh processes).

    Raises:
        Interrupted: on SIGINT or SIGTERM.
        Exception: the first of ``work``'s; the other runs are ended.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads,))
    with _signals_as_interrupts():
        try:
            for done, future in enumerate(as_completed([pool.submit(work, item) for item in items]), start=1):
                report(f"{future.result()} ({done} of {len(items)})")
        except BaseException:
            for number in _STOPPING:
                signal.signal(number, signal.SIG_IGN)  # a second one must not cut the ending short
            pool.shutdown(wait=False, cancel_futures=True)
            _end_all()
            raise
        pool.shutdown()


def _end_all() -> None:
    while processes := multiprocessing.active_children():
        for process in processes:  # again and again: the first signal ends a run, and the pool has more in its queue
            process.terminate()
        wait([process.sentinel for process in processes], timeout=_PATIENCE)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process; the parent passes it on
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:  # the first may only end an update
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(
            f"{signal.Signals(number).name}: every run was stopped after an update and saved; go on with --resume",
            128 + number,
        )

    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
