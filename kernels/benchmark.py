"""What the kernels' benchmarks share: each kernel beside torch's own and torch.compile's, timed
inside CUDA graphs, as they run in sampling.

    python -m kernels.attention | kernels.group_norm | kernels.transformer [--out NAME]     on a GPU

in   sites(batch): the places of the networks at which a kernel is timed
out  microseconds a call; a row is printed as soon as it is known, with --out to NAME.jsonl too, and
     a plot to NAME.png

Called one by one, Python's 30 to 130 us before a launch would be what is timed: at small batches
the kernels take 3 to 10.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kernels
from common import cli, plots


class Site(NamedTuple):
    name: str
    ours: Callable
    reference: Callable
    args: tuple
    nbytes: int  # that have to pass through memory, forward
    flops: int = 0  # of matrix products, forward
    leaves: Any = ()  # inputs whose gradients are wanted; () where there is no backward pass
    backward: float = 1.0  # work of both passes, in forward's


def graph_us(function, calls=20, replays=10):
    """Microseconds of a call: a CUDA graph of so many calls, the median of its replays."""
    # what is compiled or chosen on a first call is, before recording
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    # many calls in one graph: what is timed is the GPU's work, not Python's
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    torch.cuda.synchronize()
    # the median: a clock that changes or another process disturbs few replays
    taken = []
    for _ in range(replays):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after))
    return 1e3 * sorted(taken)[replays // 2] / calls


def device_limits():
    """What this device does at best, to compare rows with: GB/s of a copy of 1 GiB, and TFLOP/s of
    a large product in bfloat16."""
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {
        "copy_gb_s": round(2 * block.numel() / 1e3 / graph_us(block.clone, 2)),
        "matmul_tflops": round(2 * 8192**3 / 1e6 / graph_us(lambda: a @ a, 2)),
    }


def microseconds(function, site, backward):
    """Of the forward pass, or of both."""
    if not backward:
        with torch.no_grad():
            return graph_us(lambda: function(*site.args))
    leaves = [x.requires_grad_() for x in site.leaves]
    dy = torch.ones_like(function(*site.args))
    return graph_us(lambda: torch.autograd.grad(function(*site.args), leaves, dy))


def compiled(reference, mode):
    # what was compiled for one site would be specialized on its shapes
    torch.compiler.reset()
    return torch.compile(reference, mode=mode, dynamic=False)


def timings(site, backward, mode):
    """Ours and eager torch; with a mode, torch.compile."""
    if mode:
        return {"compiled_us": microseconds(compiled(site.reference, mode), site, backward)}
    ours = microseconds(site.ours, site, backward)
    # bytes and products of the passes that ran, for a microsecond
    work = (site.backward if backward else 1) / ours
    return {
        "ours_us": ours,
        "eager_us": microseconds(site.reference, site, backward),
        "gb_s": work * site.nbytes / 1e3,
        "tflops": work * site.flops / 1e6,
    }


def measure(sites, batches, backward, mode):
    """Rows as they become known: ours and eager of all sites first, then `compiled`, for which each
    site takes seconds to minutes."""
    # without a mode, ours alone
    for way in dict.fromkeys((None, mode)):
        for b in batches:
            for site in sites(b):
                if backward and not len(site.leaves):
                    continue
                row = {"name": site.name, "b": b, "backward": backward}
                try:
                    row |= timings(site, backward, way)
                except Exception as error:  # Triton's, Inductor's, the driver's; go on with others
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                yield row


def plot(metadata, rows, path):
    """Times torch's own, at every site."""
    # ours and compiled rows of a site come apart
    merged = {}
    for row in rows:
        merged.setdefault(f"b{row['b']} {row['name']}", {}).update(row)
    ratios = {"eager": {}, "compiled": {}}
    for name, row in merged.items():
        for way, ratio in ratios.items():
            if "ours_us" in row and f"{way}_us" in row:
                ratio[name] = row[f"{way}_us"] / row["ours_us"]
    title = f"{metadata['benchmark']}, {metadata['device']}, bfloat16"
    plots.plot_speedups(path, title, ratios)


def show(row):
    """A line for a person."""
    cells = f"b{row['b']:<4d}{row['name']:34}"
    for key, value in row.items():
        if isinstance(value, float):
            cells += f"  {key} {value:9.2f}"
        elif key == "error":
            cells += f"  {value}"
    print(cells, flush=True)


def run(module, description, sites, argv=None):
    """The command of a kernel's file; sites(batch) gives what to time on the GPU."""
    p = cli.Parser(module, description)
    p.add_argument("--out", type=Path, metavar="NAME", help="write NAME.jsonl and NAME.png too")
    p.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[2, 16, 128],
        help="twice as many as clips, with classifier-free guidance",
    )
    p.add_argument("--backward", action="store_true", help="time both passes, where there are two")
    p.add_argument(
        "--mode", default="max-autotune-no-cudagraphs", help="torch.compile's; none: leave it out"
    )
    args = p.parse_args(argv)
    if not torch.cuda.is_available() or kernels.triton is None:
        sys.exit(f"{module}: there is nothing to time without an NVIDIA GPU and Triton")
    # a kernel that fails must not be timed as torch's own
    kernels.choose("triton")
    metadata = {
        "benchmark": module,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "mode": args.mode,
        **device_limits(),
    }
    print(*(f"{key} {value}" for key, value in metadata.items()), sep="; ", flush=True)
    mode = None if args.mode == "none" else args.mode
    rows = []
    for row in measure(sites, args.batch, args.backward, mode):
        rows.append(row)
        show(row)
        if args.out:
            # written row by row: a run that is cut off leaves what it measured
            with args.out.with_suffix(".jsonl").open("a" if len(rows) > 1 else "w") as lines:
                print(json.dumps(metadata | row), file=lines)
    if args.out:
        plot(metadata, rows, args.out.with_suffix(".png"))
