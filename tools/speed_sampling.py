"""How long sampling a clip takes on this CPU at the published size: both guidances in 25 steps, as
published; the same with --deep-every 2; and guidance distilled in 6 steps, as sample.py samples
with weights that distill.py made.

    python -m tools.speed_sampling            3 rounds, some minutes

Random weights of the published size, one window of 8.192 s, all in turn. The distilled
network is the same one told its scales; what that does to the sound only distilling shows
(docs/acceleration.md).
"""

import os
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace

import torch

from align import Alignment, AlignmentConfig
from common import cli, machine
from diffusion import SAMPLERS, TIMES
from film.arguments import FEW, PAPER
from kernels import fast
from ldm import LATENT_SHAPE, LDM, LDMConfig
from sample import Settings, guided
from tools.speed import processor, random_network


def random_models(dtype):
    """The published networks with random weights, ready to sample by either guidance."""
    config = LDMConfig(scales=(9.0, 100.0, 0.0))
    ldm = random_network(LDM, config, dtype)
    align = random_network(Alignment, AlignmentConfig(), dtype)
    fast.optimise(ldm.unet)
    fast.optimise(align.model)
    return SimpleNamespace(ldm=ldm, align=align)


WAYS = {
    "double": {"guidance": "double", **PAPER},
    "double, every second step deep": {"guidance": "double", **PAPER, "deep_every": 2},
    "distilled": {"guidance": "distilled", **FEW},
}


@torch.no_grad()
def draw(models, how, x, conditions):
    """The seconds that the latents of one clip take."""
    settings = replace(Settings(cfg=4.5, cg=50.0), **how)
    schedule = {} if settings.schedule == "uniform" else {"schedule": settings.schedule}
    begun = time.perf_counter()
    times = TIMES[settings.sampler](settings.steps, **schedule)
    eps = guided(models, conditions, None, settings, times)
    SAMPLERS[settings.sampler](eps, x, settings.steps, **schedule)
    return time.perf_counter() - begun


def main():
    p = cli.Parser("tools.speed_sampling", __doc__)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    machine.keep_freed_memory()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if machine.computes_bfloat16("cpu") else torch.float32
    models = random_models(dtype)
    x = torch.randn(1, *LATENT_SHAPE)
    conditions = torch.nn.functional.normalize(torch.randn(1, 32, 512), dim=2)
    seconds = {name: [] for name in WAYS}
    # in turn, so that the machine's noise falls on all
    for _ in range(args.rounds):
        for name, how in WAYS.items():
            seconds[name].append(draw(models, how, x, conditions))
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{processor()}, {threads}; {str(dtype).removeprefix('torch.')}")
    first = seconds["double"]
    for name, taken in seconds.items():
        times = statistics.median(a / b for a, b in zip(first, taken, strict=True))
        print(f"{name}: {', '.join(f'{s:.1f}' for s in taken)} s, {times:.2f} times as fast")


if __name__ == "__main__":
    main()
