"""Where the time and the memory of one output go.

in   `with profile("stage"):` around the work; work for several outputs is shared out among them
out  {stage: {"seconds", "peak_mib"}}
"""

import time
from contextlib import contextmanager

import torch

from common.machine import peak_memory, return_freed_memory


class Profile:
    """Seconds of each stage, and the peak memory so far: the process's, or the GPU's."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.rows = {}

    def add(self, stage, seconds):
        row = self.rows.setdefault(stage, {"seconds": 0.0})
        row["seconds"] += seconds
        row["peak_mib"] = round(peak_memory(self.device) / 2**20, 1)

    def __call__(self, stage):
        return share([self], stage)

    def table(self, total):
        """Every row, and the `total` seconds by the clock, which count what lies between too."""
        self.rows.pop("total", None)
        self.add("total", total)
        return {
            name: row | {"seconds": round(row["seconds"], 3)} for name, row in self.rows.items()
        }


_inner = [0.0]  # of each stage that runs now: seconds of the stages inside it


@contextmanager
def share(profiles, stage):
    """Time a stage and share its seconds evenly; a profile that is listed twice gets two shares.

    A stage inside another one is not counted there.
    """
    start = time.perf_counter()
    _inner.append(0.0)
    try:
        yield
    finally:
        inside = _inner.pop()
    return_freed_memory()
    if profiles[0].device.type == "cuda":
        torch.cuda.synchronize()  # what was only queued belongs to this stage
    elapsed = time.perf_counter() - start
    _inner[-1] += elapsed
    seconds = (elapsed - inside) / len(profiles)
    for profile in profiles:
        profile.add(stage, seconds)
