"""A guided step of the published size: ours, and ours with one thing changed at a time, each as a CUDA graph of its own; then what
its time is made of.

    python tools/gpu/step.py --out DIR [--clips 1 8] [--only NAME ...]      DIR/steps.jsonl, line by line, and DIR/profile.txt
    DRY=1 python tools/gpu/step.py --out DIR                                the same on a CPU: small networks, no graphs

Random weights. `cudnn.benchmark` is for a process of its own: the first plan that cuDNN takes for a shape stays.
"""

import argparse
import collections
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusion
import kernels
import ldm
import vae
from kernels import attention, group_norm, packed, transformer

DRY = os.environ.get("DRY") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)
SMALL = ldm.UNetConfig(
    width=64, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=2, context_dim=32, groups=16
)
UNET, ALIGN = (
    (SMALL, ldm.AlignmentConfig(unet=SMALL)) if DRY else (ldm.UNetConfig(), ldm.AlignmentConfig())
)


def network(cls, config, dtype=DTYPE, seed=0):
    """Random weights drawn where they are used: a second on a GPU, fifteen on a CPU."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        m = cls(config)
    schedule = {k: v for k, v in m.named_buffers() if not v.is_meta}
    m = m.to_empty(device=DEVICE).eval().requires_grad_(False)
    for name, p in m.named_parameters():
        p.normal_(0, p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(1.0) if name.endswith(
            "weight"
        ) else p.normal_(0, 0.1)
        p.data = p.data.to(
            dtype, memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
        )
    for k, v in schedule.items():
        m.get_buffer(k).copy_(v)
    return m


@contextlib.contextmanager
def swapped(*triples):
    old = [(m, n, getattr(m, n)) for m, n, _ in triples]
    for m, n, v in triples:
        setattr(m, n, v)
    try:
        yield
    finally:
        for m, n, v in old:
            setattr(m, n, v)


def in_place(x, y, layer):
    """packed.add_product, but the product adds to x itself: addmm would first copy x. Not where a gradient is recorded."""
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return packed.add_product(x, y, layer)
    x.flatten(0, -2).addmm_(y.flatten(0, -2), layer.weight.t())
    return x


def first_bias_into_time(unet):
    """The bias of a block's first convolution goes where the time embedding's is added anyway."""
    for b in unet.modules():
        if isinstance(b, ldm.ResBlock) and b.in_layers["2"].bias is not None:
            b.emb_layers[1].bias += b.in_layers["2"].bias
            b.in_layers["2"].bias = None


def one_by_one_as_product(unet):
    """cuBLAS adds the bias inside the product, cuDNN's convolution leaves it to a launch of its own."""
    for s in unet.modules():
        if isinstance(s, ldm.SpatialTransformer):
            for conv in (s.proj_in, s.proj_out):
                conv.forward = (
                    lambda c: (
                        lambda x: F.linear(
                            x.permute(0, 2, 3, 1), c.weight.flatten(1), c.bias
                        ).permute(0, 3, 1, 2)
                    )
                )(conv)


VARIANTS = {  # name: (changes of the networks, swaps, settings)
    "ours": ((), (), {}),
    "torch's kernels, same graph": ((), (), {"mode": "torch"}),
    "attention: torch's": ((), ((ldm, "attention", attention.attention_ref),), {}),
    "group norm: torch's": ((), ((vae, "group_norm", group_norm.group_norm_ref),), {}),
    "layer norm, geglu: torch's": (
        (),
        (
            (ldm, "add_layer_norm", transformer.add_layer_norm_ref),
            (ldm, "geglu", transformer.geglu_ref),
        ),
        {},
    ),
    "cudnn.benchmark": ((), (), {"benchmark": True}),
    "addmm in place": ((), ((ldm, "add_product", in_place),), {}),
    "first bias into time": ((first_bias_into_time,), (), {}),
    "1x1 as product": ((one_by_one_as_product,), (), {}),
    "all of these": (
        (first_bias_into_time, one_by_one_as_product),
        ((ldm, "add_product", in_place),),
        {"benchmark": True},
    ),
}
VARIANTS["one stream"] = ((), (), {"beside": False})


def plain_beside(function, x, t):
    result = function(x, t)
    return lambda: result


def timed(eps, x, times, rounds=5):
    """Median ms of a step over rounds of 25, host's clock around them."""
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
    changes, swaps, settings = VARIANTS[name]
    kernels.choose("auto" if DRY else settings.get("mode", "triton"))
    torch.backends.cudnn.benchmark = settings.get("benchmark", False)
    start = time.perf_counter()
    unet, align = network(ldm.UNet, UNET), network(ldm.Alignment, ALIGN, seed=1)
    unet.fuse()
    align.model.fuse()
    for change in changes:
        change(unet)
    torch.manual_seed(2)
    x, context = (
        torch.randn(clips, 4, 16, 64, device=DEVICE),
        torch.randn(clips, 32, UNET.context_dim, device=DEVICE),
    )
    features = F.normalize(torch.randn(clips, 32, 512, device=DEVICE), dim=2)
    times = ldm.TIMES["dpm"](25)
    extra = () if settings.get("beside", True) else ((diffusion, "beside", plain_beside),)
    with swapped(*swaps, *extra):
        eps = ldm.guided_eps(
            unet, context, torch.zeros_like(context), 4.5, align, features, cg, times=times
        )
        recorded = eps if DRY else ldm.Replayed(eps)
        ms, z = timed(recorded, x, times.to(DEVICE)[: 2 if DRY else 25], 1 if DRY else 5)
        if keep is not None:
            keep(recorded, x, times.to(DEVICE))
    ref = reference.setdefault((clips, cg > 0), z.float().cpu())
    emit(
        dict(
            variant=name,
            clips=clips,
            classifier=cg > 0,
            ms_per_step=round(ms, 4),
            differs=float((z.float().cpu() - ref).norm() / ref.norm()),
            graph=DRY or bool(recorded.graph),
            kernels=kernels.describe(),
            peak_gb=0 if DRY else round(torch.cuda.max_memory_allocated() / 1e9, 2),
            seconds=round(time.perf_counter() - start, 1),
        )
    )
    if not DRY:
        del eps, recorded, unet, align
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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


def profile(path):
    def keep(recorded, x, times):
        from torch.profiler import ProfilerActivity, profile as trace

        with trace(activities=[ProfilerActivity.CPU] if DRY else [ProfilerActivity.CUDA]) as prof:
            for t in times[:3]:
                recorded(x, t.expand(len(x)))
            if not DRY:
                torch.cuda.synchronize()
        us = lambda e: next(
            (
                getattr(e, a)
                for a in ("self_device_time_total", "device_time_total", "self_cuda_time_total")
                if getattr(e, a, 0)
            ),
            0.0,
        )
        rows = [(e.key, e.count / 3, us(e) / 3) for e in prof.key_averages()]
        rows = sorted((r for r in rows if r[2] > 0 or DRY), key=lambda r: -r[2])
        sums, counts = collections.Counter(), collections.Counter()
        for key, n, us in rows:
            group = next(
                (g[0] for g in GROUPS if any(w.lower() in key.lower() for w in g[1:])), "other"
            )
            sums[group] += us
            counts[group] += n
        with open(path, "a") as f:
            print(
                f"\n{len(x)} clips: one guided step, kernels of both streams; us and launches a step",
                file=f,
            )
            for g, us in sums.most_common():
                print(f"{us:10.1f} {counts[g]:8.1f}  {g}", file=f)
            print(f"{sum(sums.values()):10.1f} {sum(counts.values()):8.1f}  all", file=f)
            for key, n, us in rows[:60]:
                print(f"{us:10.1f} {n:8.1f}  {key[:150]}", file=f)

    return keep


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--clips", type=int, nargs="+", default=[1, 8])
    p.add_argument("--only", nargs="+", default=list(VARIANTS))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def emit(row):
        with open(args.out / "steps.jsonl", "a") as f:
            print(json.dumps(row), file=f)
        print(
            f"{row['ms_per_step']:9.3f} ms a step  {row['clips']:3d} clips  classifier {row['classifier']!s:5}  differs {row['differs']:.1e}  "
            f"graph {row['graph']!s:5} {row['seconds']:5.1f} s  {row['variant']}",
            flush=True,
        )

    reference = {}
    for clips in args.clips:
        for i, name in enumerate(args.only):
            for cg in (
                (50.0, 0.0)
                if name
                in ("ours", "torch's kernels, same graph", "cudnn.benchmark", "all of these")
                else (50.0,)
            ):
                try:
                    run(
                        name,
                        clips,
                        cg,
                        emit,
                        reference,
                        profile(args.out / "profile.txt") if name == "ours" and cg else None,
                    )
                except Exception as error:
                    print(
                        f"step.py: {name}, {clips} clips: {type(error).__name__}: {str(error)[:300]}",
                        flush=True,
                    )
                    if not DRY:
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
