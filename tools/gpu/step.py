"""A guided step of the published size: ours, and ours with one thing changed at a time, each as a
CUDA graph of its own; then what its time is made of.

    python -m tools.gpu.step --out DIR [--clips 1 8] [--only NAME ...]
    DRY=1 python -m tools.gpu.step --out DIR          on a CPU: small networks, no graphs

in   random weights
out  DIR/steps.jsonl, line by line, and DIR/profile.txt

`cudnn.benchmark` is for a process of its own: the first plan that cuDNN takes for a shape stays.
"""

import collections
import contextlib
import gc
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import diffusion
import kernels
import ldm
from align import Alignment, AlignmentConfig
from common import cli
from kernels import attention, fast, group_norm, transformer

DRY = os.environ.get("DRY") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)
# for DRY=1: the same code in seconds on a CPU
SMALL = ldm.UNetConfig(
    width=64, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=2, context_dim=32, groups=16
)
UNET, ALIGN = (SMALL, AlignmentConfig(unet=SMALL)) if DRY else (ldm.UNetConfig(), AlignmentConfig())


def network(cls, config, dtype=DTYPE, seed=0):
    """Random weights drawn where they are used: a second on a GPU, fifteen on a CPU."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        m = cls(config)
    # the noise schedule is no weight: it survives to_empty
    schedule = {k: v for k, v in m.named_buffers() if not v.is_meta}
    m = m.to_empty(device=DEVICE).eval().requires_grad_(False)
    for name, p in m.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        elif name.endswith("weight"):
            p.fill_(1.0)
        else:
            p.normal_(0, 0.1)
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
        p.data = p.data.to(dtype, memory_format=layout)
    for k, v in schedule.items():
        m.get_buffer(k).copy_(v)
    return m


@contextlib.contextmanager
def swapped(others):
    own = {name: getattr(fast, name) for name in others}
    for name, value in others.items():
        setattr(fast, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(fast, name, value)


def in_turn(function, x, row):
    """`fast.beside` on one stream."""
    result = function(x, row)
    return lambda: result


VARIANTS = {  # name: (what stands where in kernels.fast, settings)
    "ours": ({}, {}),
    "torch's kernels, same graph": ({}, {"mode": "torch"}),
    "attention: torch's": ({"attention": attention.attention_ref}, {}),
    "group norm: torch's": ({"group_norm": group_norm.group_norm_ref}, {}),
    "layer norm, geglu: torch's": (
        {"add_layer_norm": transformer.add_layer_norm_ref, "geglu": transformer.geglu_ref},
        {},
    ),
    "one stream": ({"beside": in_turn}, {}),
    "cudnn.benchmark": ({}, {"benchmark": True}),
}
BOTH = "ours", "torch's kernels, same graph"  # measured without the classifier too


def timed(eps, x, times, rounds=5):
    """Median ms of a step over rounds of 25, host's clock around them."""
    # the first round warms up and records the graph
    out = []
    for _ in range(rounds + 1):
        if not DRY:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for t in times:
            z = eps(x, t.expand(len(x)))
        if not DRY:
            torch.cuda.synchronize()
        out.append(1e3 * (time.perf_counter() - start) / len(times))
    return statistics.median(out[1:]), z


@torch.no_grad()
def run(name, clips, cg, emit, reference, keep=None):
    others, settings = VARIANTS[name]
    kernels.choose("auto" if DRY else settings.get("mode", "triton"))
    # settings first: they count when the graph is recorded
    torch.backends.cudnn.benchmark = settings.get("benchmark", False)
    start = time.perf_counter()
    unet, align = network(ldm.UNet, UNET), network(Alignment, ALIGN, seed=1)
    fast.optimise(unet)
    fast.optimise(align.model)
    torch.manual_seed(2)
    x = torch.randn(clips, 4, 16, 64, device=DEVICE)
    context = torch.randn(clips, 32, UNET.context_dim, device=DEVICE)
    features = F.normalize(torch.randn(clips, 32, 512, device=DEVICE), dim=2)
    null_context = torch.zeros_like(context)
    times = diffusion.solver_times(25)
    # the variant stands in kernels.fast while its graph is recorded
    with swapped(others):
        eps = fast.guided(
            unet, context, null_context, 4.5, align, features, cg, times, diffusion.sigma
        )
        ms, z = timed(eps, x, times[: 2 if DRY else 25], 1 if DRY else 5)
        if keep is not None:
            keep(eps, x, times)
    graphs = [kept.replay is not None for kept in unet.recorded.values()]
    # every variant is compared with the first one's numbers
    ref = reference.setdefault((clips, cg > 0), z.float().cpu())
    emit(
        {
            "variant": name,
            "clips": clips,
            "classifier": cg > 0,
            "ms_per_step": round(ms, 4),
            "differs": float((z.float().cpu() - ref).norm() / ref.norm()),
            "graph": DRY or graphs == [True],
            "kernels": kernels.describe(),
            "peak_gb": 0 if DRY else round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "seconds": round(time.perf_counter() - start, 1),
        }
    )
    # before the next variant: 2 GB of weights and the graph's memory
    if not DRY:
        del eps, unet, align
        gc.collect()  # a network and its recorded steps hold each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# (title, words in the names of its kernels), the first match counts
GROUPS = (
    ("ours: group norm", "group_norm"),
    ("ours: attention", "attention_"),
    ("ours: layer norm, geglu", "add_layer_norm_kernel", "geglu_kernel"),
    ("convolutions", "fprop", "dgrad", "wgrad", "conv", "implicit", "xmma", "nhwc"),
    ("products", "gemm", "nvjet", "cutlass", "splitk", "splitKreduce"),
    ("copies", "copy", "Memcpy", "Memset", "cat"),
    ("layer norm of torch", "layer_norm"),
    ("elementwise", "elementwise"),
)


def device_time(event):
    """In microseconds; torch's versions name it differently."""
    for name in ("self_device_time_total", "device_time_total", "self_cuda_time_total"):
        if getattr(event, name, 0):
            return getattr(event, name)
    return 0.0


def group_of(kernel):
    """The first of GROUPS with a word of this kernel's name."""
    for name, *words in GROUPS:
        if any(word.lower() in kernel.lower() for word in words):
            return name
    return "other"


def profile(path):
    def keep(recorded, x, times):
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as trace

        with trace(activities=[ProfilerActivity.CPU] if DRY else [ProfilerActivity.CUDA]) as prof:
            for t in times[:3]:
                recorded(x, t.expand(len(x)))
            if not DRY:
                torch.cuda.synchronize()
        rows = [(e.key, e.count / 3, device_time(e) / 3) for e in prof.key_averages()]
        rows = sorted((r for r in rows if r[2] > 0 or DRY), key=lambda r: -r[2])
        # first by group, then the longest kernels by name
        sums = collections.Counter()
        counts = collections.Counter()
        for key, n, us in rows:
            sums[group_of(key)] += us
            counts[group_of(key)] += n
        with open(path, "a") as f:
            title = "one guided step, kernels of both streams; us and launches a step"
            print(f"\n{len(x)} clips: {title}", file=f)
            for g, us in sums.most_common():
                print(f"{us:10.1f} {counts[g]:8.1f}  {g}", file=f)
            print(f"{sum(sums.values()):10.1f} {sum(counts.values()):8.1f}  all", file=f)
            for key, n, us in rows[:60]:
                print(f"{us:10.1f} {n:8.1f}  {key[:150]}", file=f)

    return keep


def main():
    p = cli.Parser("tools.gpu.step", __doc__)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--clips", type=int, nargs="+", default=[1, 8])
    p.add_argument("--only", nargs="+", default=list(VARIANTS))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def emit(row):
        with open(args.out / "steps.jsonl", "a") as f:
            print(json.dumps(row), file=f)
        print(
            f"{row['ms_per_step']:9.3f} ms a step  {row['clips']:3d} clips  "
            f"classifier {row['classifier']!s:5}  differs {row['differs']:.1e}  "
            f"graph {row['graph']!s:5} {row['seconds']:5.1f} s  {row['variant']}",
            flush=True,
        )

    # a variant that fails costs its own row alone
    reference = {}
    for clips in args.clips:
        for name in args.only:
            for cg in (50.0, 0.0) if name in BOTH else (50.0,):
                keep = profile(args.out / "profile.txt") if name == "ours" and cg else None
                try:
                    run(name, clips, cg, emit, reference, keep)
                except Exception as error:  # the other rows are worth having
                    why = f"{type(error).__name__}: {str(error)[:300]}"
                    print(f"step.py: {name}, {clips} clips: {why}", flush=True)
                    if not DRY:
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
