"""Other sizes of the kernels' blocks at the U-Net's places, timed in CUDA graphs; the shipped one first.

python tools/gpu/sweep.py --out DIR         DIR/sweep.jsonl, line by line
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernels
from kernels import attention, group_norm
from kernels.benchmark import graph_us

GN_PLAN, TABLE = group_norm.plan, {k: list(v) for k, v in attention.HALF.items()}


def gn_plan(held, g=None, warps=None, stretches=None):
    """group_norm.plan with another limit of what a program holds (smaller: two launches over many more programs), groups and warps."""

    def plan(x, channels, groups, last, forward):
        old = group_norm.HELD, group_norm.STRETCHES, group_norm.TILE
        group_norm.HELD, group_norm.STRETCHES = held, stretches or old[1]
        if held < 32768:
            group_norm.TILE = 4096
        try:
            con, blocks, stretch, n, w = GN_PLAN(x, channels, groups, last, forward)
        finally:
            group_norm.HELD, group_norm.STRETCHES, group_norm.TILE = old
        if g and n == 1:  # so many neighbouring groups a program
            d, rows = con["D"], kernels.triton.next_power_of_2(x[0, 0].numel())
            con |= dict(G=g, BLOCK_C=kernels.triton.next_power_of_2(g * d), BLOCK_P=rows)
            con["EVEN"], blocks = x[0, 0].numel() % rows == 0, groups // g
            w = min(16, max(4, rows * con["BLOCK_C"] // 1024))
        return con, blocks, stretch, n, warps or w

    return plan


GN = {
    "shipped": GN_PLAN,
    "one group a program": gn_plan(32768, g=1),
    "one group, 8 warps": gn_plan(32768, g=1, warps=8),
    "8 warps": gn_plan(32768, warps=8),
    "two launches, 4 stretches": gn_plan(1024, stretches=4),
    "two launches, 8 stretches": gn_plan(1024, stretches=8),
    "two launches, 16 stretches": gn_plan(1024, stretches=16),
}
GN_SITES = [
    (16, 64, 320, 0),
    (16, 64, 640, 320),
    (16, 64, 960, 320),
    (8, 32, 640, 0),
    (8, 32, 1280, 640),
    (4, 16, 1280, 0),
    (4, 16, 2560, 1280),
]
ATTENTION = [
    (
        (8, 40, 1024, 1024),
        "forward",
        0,
        [
            (128, 64, 8, 3),
            (64, 64, 4, 3),
            (128, 64, 4, 3),
            (128, 128, 8, 2),
            (128, 128, 8, 3),
            (64, 128, 4, 3),
            (128, 32, 8, 4),
            (64, 64, 4, 4),
        ],
    ),
    (
        (8, 40, 1024, 32),
        "few",
        0,
        [(64, 64, 4, 1), (128, 64, 8, 1), (128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1)],
    ),
    (
        (8, 80, 256, 256),
        "forward",
        1,
        [
            (64, 64, 4, 3),
            (32, 64, 4, 3),
            (64, 32, 4, 3),
            (64, 128, 4, 2),
            (128, 64, 8, 2),
            (64, 64, 8, 3),
        ],
    ),
    (
        (8, 160, 64, 64),
        "few",
        2,
        [(64, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (16, 64, 2, 1), (64, 64, 8, 1)],
    ),
    ((8, 160, 64, 32), "few", 2, [(64, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (16, 64, 2, 1)]),
]


def cases(b, device):
    """(name, variant, how to set it, how to call it)"""
    for h, w, c, s in GN_SITES:
        x, skip = (
            torch.empty(b, n, h, w, device=device, dtype=torch.bfloat16).to(
                memory_format=torch.channels_last
            )
            if n
            else None
            for n in (c - s, s)
        )
        one = torch.empty(c, device=device, dtype=torch.bfloat16)
        add = None if s else torch.empty(b, c, device=device, dtype=torch.bfloat16)
        for t in (x, skip, one, add):
            if t is not None:
                t.normal_()
        for name, plan in GN.items():
            yield (
                f"group norm {c}@{h}x{w} skip {s}",
                name,
                lambda plan=plan: setattr(group_norm, "plan", plan),
                lambda x=x, one=one, add=add, skip=skip: group_norm.group_norm(
                    x, one, one, 32, 1e-5, True, add, skip
                ),
            )
    for (heads, d, n, m), kind, width, configs in ATTENTION:
        q, k, v = (
            torch.empty(b, r, heads, d, device=device, dtype=torch.bfloat16) for r in (n, m, m)
        )
        for t in (q, k, v):
            t.normal_()
        for config in configs:

            def put(kind=kind, width=width, config=config):
                attention.HALF.update({key: list(value) for key, value in TABLE.items()})
                attention.HALF[kind][width] = config

            yield (
                f"attention {n}x{m} of {d}",
                str(config),
                put,
                lambda q=q, k=k, v=v: attention.attention(q, k, v),
            )


def restore():
    group_norm.plan = GN_PLAN
    attention.HALF.update({k: list(v) for k, v in TABLE.items()})


@torch.no_grad()
def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--batch", type=int, nargs="+", default=[2, 16])
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kernels.choose("triton")
    for b in args.batch:
        shipped = {}
        for name, variant, put, call in cases(b, "cuda"):
            row = dict(name=name, b=b, variant=variant)
            try:
                put()
                out = call().float()
                ref = shipped.setdefault(name, out)
                row["differs"], row["us"] = float((out - ref).norm() / ref.norm()), graph_us(call)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:150]}"
            restore()
            with open(args.out / "sweep.jsonl", "a") as f:
                print(json.dumps(row), file=f)
            print(
                f"b{b:<4d}{name:34}{variant:28}"
                + (
                    f"{row['us']:9.2f} us  differs {row['differs']:.1e}"
                    if "us" in row
                    else row["error"]
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
