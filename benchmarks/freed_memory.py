"""What keeping freed memory saves on Linux: the same training passes in two fresh processes, with and without.

python benchmarks/freed_memory.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CHILD = """
import sys, time, torch
from danceopd.families.shapes import ShapesFamily
from danceopd.training.assemble import autocast
from danceopd.training.hardware import keep_freed_memory, resolve_precision
if sys.argv[1] == "keep":
    keep_freed_memory()
family = ShapesFamily()
family.network.requires_grad_(True)
z, sigma = torch.randn(64, 3, 32, 32), torch.rand(64)
condition = family.encode(["a red circle and a blue square"] * 64, None)
precision = resolve_precision("auto", torch.device("cpu"))
times = []
for _ in range(25):
    started = time.perf_counter()
    with autocast(torch.device("cpu"), precision):
        loss = family.model(z, sigma, condition).square().mean()
    loss.backward()
    times.append(time.perf_counter() - started)
print(sorted(times[5:])[10])
"""


def main() -> None:
    """Alternate the two, so that a slow spell meets both."""
    times: dict[str, list[float]] = {"keep": [], "return": []}
    for _ in range(4):
        for mode, values in times.items():
            done = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True)
            values.append(float(done.stdout))
    keep, give_back = (statistics.median(times[mode]) for mode in ("keep", "return"))
    print(f"freed memory kept {keep * 1000:.1f} ms, returned {give_back * 1000:.1f} ms: {give_back / keep:.2f} x")


if __name__ == "__main__":
    main()
