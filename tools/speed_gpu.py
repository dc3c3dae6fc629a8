"""How long a guided step and a clip take on this GPU, networks of the published size, beside other
ways to run them.

    python -m tools.speed_gpu --out speed       a table, speed.jsonl, line by line, and speed.png
    python -m tools.speed_gpu --ways ours torch --clips 1 8     a minute; compiling takes many

ours      fused kernels, condition and times once a clip, the guided step one CUDA graph, bfloat16
torch     the same graph and fused projections with torch's own kernels: what ours alone are worth
eager     the unfused networks call by call, bfloat16: bound by the processor, which launches
          hundreds of kernels a step
plain     the official code's way: that in float32, attention's scores in memory, the condition anew
          in every step
diffusers UNet2DConditionModel of the same size, bfloat16, eager, if that package is installed; no
          classifier
compiled  U-Net and classifier, its gradient too, under torch.compile(mode=--mode, dynamic=False),
          in CUDA graphs of its own, which share their memory: so one after the other, on one stream
both      those two compiled without graphs of their own, inside ours: two streams, and no processor
          between them

They run in this order whatever --ways says: what takes minutes to compile comes last. All take the
same 25 steps of the same sampler; weights are random. A row that ours loses stays.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import align
import diffusion
import kernels
import ldm
from common import cli
from kernels import fast
from tools.plain import plainly
from tools.speed import print_row, random_network

# the demo's settings
STEPS = 25
CFG = 4.5
CG = 50.0
UNET = ldm.UNetConfig()
ALIGN = align.AlignmentConfig()
WAYS = ["ours", "torch", "eager", "plain", "diffusers", "compiled", "both"]


class Way(NamedTuple):
    name: str
    unet: Any
    classifier: Any = None
    kernels: str = "torch"  # for kernels.choose
    graph: bool = False  # the whole guided step as one CUDA graph
    streams: bool = True  # the classifier beside the U-Net


def networks(dtype, device):
    """U-Net and classifier."""
    unet = random_network(ldm.UNet, UNET, dtype, device)
    return unet, random_network(align.Alignment, ALIGN, dtype, device)


def unprepared(unet, classifier):
    """As functions, so that `fast.guided` cannot compute anything once a clip."""
    gradient = SimpleNamespace(grad_log_prob=classifier.grad_log_prob)
    return (lambda x, t, context: unet(x, t, context)), gradient


def ours(name, device, mode):
    # what sample.py runs
    unet, classifier = networks(torch.bfloat16, device)
    fast.optimise(unet)
    fast.optimise(classifier.model)
    return Way(name, unet, classifier, kernels=mode, graph=True)


def diffusers_unet(device):
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    with torch.device(device):
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    return lambda x, t, context: model(x.bfloat16(), t, context.bfloat16()).sample


def compiled(device, **how):
    """dynamic=False: else the second batch size would be compiled for any size, and measured so."""
    unet, classifier = networks(torch.bfloat16, device)
    # the gradient is compiled with the function it is of
    classifier.log_prob = torch.compile(classifier.log_prob, **how)

    def grad_log_prob(*args):
        return classifier.grad_log_prob(*args).clone()  # the U-Net's graph may write where it lies

    return unprepared(torch.compile(unet, **how), SimpleNamespace(grad_log_prob=grad_log_prob))


def ways(device, chosen, mode="max-autotune"):
    """One after the other, to share memory."""
    if "ours" in chosen:
        choice = "triton" if torch.device(device).type == "cuda" else "auto"
        yield ours("ours bfloat16", device, choice)
    if "torch" in chosen:
        yield ours("torch's kernels, same graph", device, "torch")
    if "eager" in chosen:
        yield Way("eager bfloat16", *unprepared(*networks(torch.bfloat16, device)))
    if "plain" in chosen:
        models = map(plainly, networks(torch.float32, device))
        yield Way("plain float32", *unprepared(*models))
    if "diffusers" in chosen and (unet := diffusers_unet(device)):
        yield Way("diffusers bfloat16", unet)
    if "compiled" in chosen:
        yield Way(f"compiled, {mode}", *compiled(device, mode=mode, dynamic=False), streams=False)
    if "both" in chosen:
        models = compiled(device, mode="max-autotune-no-cudagraphs", dynamic=False)
        yield Way("compiled, our graph", *models, graph=True)


def in_turn(function, x, row):
    """`fast.beside` on one stream."""
    result = function(x, row)
    return lambda: result


@contextlib.contextmanager
def streams(two):
    beside = fast.beside
    fast.beside = beside if two else in_turn
    try:
        yield
    finally:
        fast.beside = beside


def step_of(way, context, features, cg):
    """eps(x, t) of the way."""
    times = diffusion.solver_times(STEPS)
    # the same sampler's times for all ways
    null_context = torch.zeros_like(context)
    eps = fast.guided(
        way.unet, context, null_context, CFG, way.classifier, features, cg, times, diffusion.sigma
    )
    if way.graph:
        return eps
    # without the graph: the plain step, its row of the table given on the device
    rows = torch.arange(STEPS, device=context.device)
    return lambda x, t: eps.step(x, rows[eps.times[t[0].item()]][None])


@torch.no_grad()
def seconds(way, clips, cg, device, runs):
    """Of whole runs of the sampler, after two that warm up."""
    torch.manual_seed(0)
    # random conditions: the time does not depend on them
    x = torch.randn(clips, 4, 16, 64, device=device)
    context = torch.randn(clips, 32, UNET.context_dim, device=device)
    features = torch.randn(clips, 32, ALIGN.feature_dim, device=device)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    # whole runs of the sampler between two waits for the device
    eps = step_of(way, context, features, cg)
    taken = []
    with streams(way.streams):
        for _ in range(runs + 2):
            wait()
            start = time.perf_counter()
            diffusion.dpm_solver(eps, x, STEPS)
            wait()
            taken.append(time.perf_counter() - start)
    # where recording failed, plain calls were timed under the graph's name
    if way.graph and x.is_cuda and any(kept.replay is None for kept in eps.kept.values()):
        raise RuntimeError("the step could not be recorded")
    return taken[2:]


def measure(way, clips, cg, device, runs):
    """-> a row, with `error` where there is no time to report."""
    row = {"way": way.name, "clips": clips, "classifier": bool(cg)}
    cuda = torch.device(device).type == "cuda"
    # so that the peak is this row's alone
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        taken = statistics.median(seconds(way, clips, cg, device, runs))
    except Exception as error:  # the other rows are worth having
        reason = str(error).partition("\n")[0][:200]
        return row | {"error": f"{type(error).__name__}: {reason}"}
    return row | {
        "ms_per_step": 1e3 * taken / STEPS,
        "ms_per_clip": 1e3 * taken / clips,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def cells(row):
    """Of the table."""
    first = [row["way"], str(row["clips"]), "yes" if row["classifier"] else "no"]
    if "error" in row:
        return [*first, row["error"], "", ""]
    peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
    return [*first, f"{row['ms_per_step']:.2f}", f"{row['ms_per_clip']:.1f}", peak]


def plot(rows, path):
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    # one panel for each kind of guidance
    panels = {
        "without classifier": [r for r in rows if not r["classifier"] and "error" not in r],
        "with classifier": [r for r in rows if r["classifier"] and "error" not in r],
    }
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, own) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(r["way"] for r in own):
            line = [r for r in own if r["way"] == name]
            clips = [r["clips"] for r in line]
            axis.loglog(clips, [r["ms_per_clip"] for r in line], "o-", label=name)
        axis.set(title=title, xlabel="clips at once", ylabel="ms a clip, 25 steps")
        if own:
            axis.legend()
    figure.savefig(path)


def main():
    p = cli.Parser("tools.speed_gpu", __doc__)
    p.add_argument("--clips", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    p.add_argument(
        "--mode",
        default="max-autotune",
        help="torch.compile's; reduce-overhead compiles in less time",
    )
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("speed"), help="without its suffix")
    args = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools.speed_gpu: torch finds no CUDA device; tools.speed is the CPU's")
    # goes with every row, so that a row means something by itself
    metadata = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "triton": kernels.triton and kernels.triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(metadata, end="\n\n")
    print_row("way", "clips", "classifier", "ms a step", "ms a clip", "peak GB")
    print_row(*["---"] * 6)
    rows = []
    with args.out.with_suffix(".jsonl").open("w") as lines:
        for way in ways("cuda", args.ways, args.mode):
            kernels.choose(way.kernels)
            for clips in args.clips:
                for cg in (0.0, CG) if way.classifier else (0.0,):
                    rows.append(measure(way, clips, cg, "cuda", args.runs))
                    print_row(*cells(rows[-1]))
                    print(json.dumps({**metadata, **rows[-1]}), file=lines, flush=True)
            # the next way has the memory to itself
            del way
            torch.cuda.empty_cache()
    plot(rows, args.out.with_suffix(".png"))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
