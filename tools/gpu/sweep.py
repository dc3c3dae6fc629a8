"""Other sizes of the kernels' blocks at the U-Net's places, timed in CUDA graphs; the shipped one
first. At the end, what belongs into `group_norm.FEWER`, `attention.HALF` and `attention.SPARSE`.

    python -m tools.gpu.sweep --out DIR         DIR/sweep.jsonl, line by line
    python -m tools.gpu.sweep --read FILE       what rows of an earlier run say
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

import kernels
from common import cli
from kernels import attention, group_norm
from kernels.benchmark import graph_us

# what is shipped, put back after each variant
GN_PLAN = group_norm.plan
TABLE = {kind: list(rows) for kind, rows in attention.HALF.items()}
SPARSE = list(attention.SPARSE)
BETTER = 0.98  # of the shipped choice's time: less is noise


def gn_plan(held=None, groups=None, warps=None, stretches=None):
    """group_norm.plan with another limit of what a program holds (a smaller one: two launches over
    many more programs), other groups a program, warps, stretches."""

    def plan(x, channels, all_groups, last, forward):
        # the plan reads its limits from the module: change them for this call
        own = group_norm.HELD, group_norm.STRETCHES, group_norm.TILE, group_norm.FEWER
        if held:
            group_norm.HELD = held
            group_norm.TILE = 4096
        if stretches:
            group_norm.STRETCHES = stretches
        if groups:
            place = x[0, 0].numel(), channels // all_groups
            group_norm.FEWER = {place: groups}
        try:
            launch = GN_PLAN(x, channels, all_groups, last, forward)
        finally:
            group_norm.HELD, group_norm.STRETCHES, group_norm.TILE, group_norm.FEWER = own
        return replace(launch, warps=warps or launch.warps)

    return plan


# group norm: name of a variant, its plan
GN = {
    "shipped": GN_PLAN,
    "one group a program": gn_plan(groups=1),
    "two groups a program": gn_plan(groups=2),
    "4 warps": gn_plan(warps=4),
    "16 warps": gn_plan(warps=16),
    "two launches, 4 stretches": gn_plan(1024, stretches=4),
    "two launches, 8 stretches": gn_plan(1024, stretches=8),
}
# height, width, channels, of which the skip's
GN_SITES = [
    (16, 64, 320, 0),
    (16, 64, 640, 320),
    (16, 64, 960, 320),
    (8, 32, 640, 0),
    (8, 32, 1280, 640),
    (4, 16, 1280, 0),
    (4, 16, 2560, 1280),
]
# (heads, width, queries, keys), table, its row, what to try in it
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

    def drawn(*shape):
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()

    # the shipped plan comes first and is what others are compared with
    for h, w, c, s in GN_SITES:
        x = drawn(b, c - s, h, w).to(memory_format=torch.channels_last)
        skip = drawn(b, s, h, w).to(memory_format=torch.channels_last) if s else None
        one = drawn(c)
        add = None if s else drawn(b, c)
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
        q, k, v = (drawn(b, rows, heads, d) for rows in (n, m, m))
        name = f"attention {n}x{m} of {d}"

        def call(q=q, k=k, v=v):
            return attention.attention(q, k, v)

        yield name, "shipped", restore, call
        for config in configs:

            def put(kind=kind, width=width, config=config):
                restore()
                attention.HALF[kind][width] = config
                attention.SPARSE[width] = None

            yield name, str(config), put, call


def restore():
    group_norm.plan = GN_PLAN
    attention.HALF.update({kind: list(rows) for kind, rows in TABLE.items()})
    attention.SPARSE[:] = SPARSE


def say(rows):
    """At each place and batch the best choice, where it is better than the shipped one."""
    places = {}
    for row in rows:
        if "us" in row:
            places.setdefault((row["name"], row["b"]), {})[row["variant"]] = row["us"]
    fewer = {}
    for (name, b), us in places.items():
        best = min(us, key=us.get)
        if us[best] < BETTER * us["shipped"]:
            print(f"batch {b}, {name}: {best}, {us[best]:.2f} us; shipped {us['shipped']:.2f}")
        one = us.get("one group a program", us["shipped"])
        fewer.setdefault(name, []).append(one < BETTER * us["shipped"])
    for name, wins in fewer.items():
        if name.startswith("group norm") and all(wins):
            channels, size = name.split()[2].split("@")
            h, w = map(int, size.split("x"))
            print(f"group_norm.FEWER: ({h * w}, {int(channels) // 32}): 1")


def measure(batches):
    """A row at a time."""
    for b in batches:
        shipped = {}
        for name, variant, put, call in cases(b, "cuda"):
            row = {"name": name, "b": b, "variant": variant}
            try:
                put()
                out = call().float()
                reference = shipped.setdefault(name, out)
                row["differs"] = float((out - reference).norm() / reference.norm())
                row["us"] = graph_us(call)
            except (
                Exception
            ) as error:  # of the compiler's and the driver's; others are worth having
                row["error"] = f"{type(error).__name__}: {str(error)[:150]}"
            restore()
            yield row


@torch.no_grad()
def main():
    p = cli.Parser("tools.gpu.sweep", __doc__)
    p.add_argument("--out", type=Path, metavar="DIR")
    p.add_argument("--read", type=Path, metavar="FILE")
    p.add_argument("--batch", type=int, nargs="+", default=[2, 16])
    args = p.parse_args()
    if args.read:
        say([json.loads(line) for line in args.read.read_text().splitlines()])
        return
    if args.out is None:
        p.error("give --out DIR, or --read FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    kernels.choose("triton")
    rows = []
    for row in measure(args.batch):
        rows.append(row)
        with open(args.out / "sweep.jsonl", "a") as f:
            print(json.dumps(row), file=f)
        result = row.get("error")
        if result is None:
            result = f"{row['us']:9.2f} us  differs {row['differs']:.1e}"
        print(f"b{row['b']:<4d}{row['name']:34}{row['variant']:28}{result}", flush=True)
    say(rows)


if __name__ == "__main__":
    main()
