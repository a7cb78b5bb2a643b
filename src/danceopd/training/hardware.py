"""What this machine is fast at."""

from __future__ import annotations

import ctypes
import sys
import time

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` measured: bf16 where a matrix product under autocast is at least 1.3 times faster than float32.

    The best of many short products by one thread of a CPU, so that other work beside it hardly counts.
    """
    if precision != "auto":
        return precision
    a, b = torch.ones(2048, 256, device=device), torch.ones(256, 256, device=device)

    def seconds(enabled: bool) -> float:
        best = float("inf")
        for _ in range(20):
            _synchronise(device)
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                torch.nn.functional.linear(a, b)
            _synchronise(device)
            best = min(best, time.perf_counter() - started)
        return best

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return "bf16" if seconds(False) > 1.3 * seconds(True) else "fp32"
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks instead of returning them to the kernel; True where that was possible.

    PyTorch's CPU tensors of a few megabytes are otherwise mapped, faulted in and unmapped again at every operation.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        largest = 2**31 - 1
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**30) and libc.mallopt(_M_TRIM_THRESHOLD, largest))
    except (OSError, AttributeError):
        return False


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
