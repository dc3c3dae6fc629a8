"""How long a guided step and a whole clip take on this GPU, networks of the published size, beside other ways to run them.

    python tools/speed_gpu.py --out speed       a table, speed.jsonl (a line as soon as it is known) and speed.png
    python tools/speed_gpu.py --ways ours torch --clips 1 8         a minute; compiling takes many

ours      fused kernels, condition and times once a clip, the whole guided step one CUDA graph, bfloat16
torch     the same graph, fused projections and all, with torch's own kernels: what the kernels alone are worth
eager     the unfused networks call by call, bfloat16: bound by the processor, which launches hundreds of kernels a step
plain     the official code's way: that in float32, attention's scores in memory, the condition anew in every step
diffusers UNet2DConditionModel of the same size, bfloat16, eager, if that package is installed; no classifier
compiled  U-Net and classifier, its gradient too, under torch.compile(mode=--mode, dynamic=False), in CUDA graphs of its own,
          which share their memory: so one after the other, on one stream
both      those two compiled without graphs of their own, inside ours: two streams, and no processor between them

They run in this order whatever --ways says: what takes minutes to compile comes last. All take the same 25 steps of the same
sampler; weights are random. A row that ours loses stays.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stages lie a folder up

from plain import plainly  # noqa: E402
from speed import random_network  # noqa: E402

import align  # noqa: E402
import diffusion  # noqa: E402
import kernels  # noqa: E402
import ldm  # noqa: E402
from kernels import fast  # noqa: E402

STEPS, CFG, CG = 25, 4.5, 50.0
UNET, ALIGN = ldm.UNetConfig(), align.AlignmentConfig()
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
    return [
        random_network(cls, config, dtype, device)
        for cls, config in ((ldm.UNet, UNET), (align.Alignment, ALIGN))
    ]


def unprepared(unet, classifier):
    """As functions, so that `fast.guided` cannot compute anything once a clip."""
    return (lambda x, t, context: unet(x, t, context)), SimpleNamespace(
        grad_log_prob=classifier.grad_log_prob
    )


def ours(name, device, mode):
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
        model = (
            UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            .to(torch.bfloat16)
            .eval()
        )
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    return lambda x, t, context: model(x.bfloat16(), t, context.bfloat16()).sample


def compiled(device, **how):
    """dynamic=False: else the second batch size would be compiled for any size, and measured as that."""
    unet, classifier = networks(torch.bfloat16, device)
    classifier.log_prob = torch.compile(classifier.log_prob, **how)

    def grad_log_prob(*args):
        return classifier.grad_log_prob(*args).clone()  # the U-Net's graph may write where it lies

    return unprepared(torch.compile(unet, **how), SimpleNamespace(grad_log_prob=grad_log_prob))


def ways(device, chosen, mode="max-autotune"):
    """One after the other, to share memory."""
    if "ours" in chosen:
        yield ours(
            "ours bfloat16", device, "triton" if torch.device(device).type == "cuda" else "auto"
        )
    if "torch" in chosen:
        yield ours("torch's kernels, same graph", device, "torch")
    if "eager" in chosen:
        yield Way("eager bfloat16", *unprepared(*networks(torch.bfloat16, device)))
    if "plain" in chosen:
        yield Way(
            "plain float32", *unprepared(*(plainly(m) for m in networks(torch.float32, device)))
        )
    if "diffusers" in chosen and (unet := diffusers_unet(device)):
        yield Way("diffusers bfloat16", unet)
    if "compiled" in chosen:
        yield Way(f"compiled, {mode}", *compiled(device, mode=mode, dynamic=False), streams=False)
    if "both" in chosen:
        yield Way(
            "compiled, our graph",
            *compiled(device, mode="max-autotune-no-cudagraphs", dynamic=False),
            graph=True,
        )


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
    times = diffusion.dpm_times(STEPS)
    null_context = torch.zeros_like(context)
    eps = fast.guided(
        way.unet, context, null_context, CFG, way.classifier, features, cg, times, diffusion.sigma
    )
    if way.graph:
        return eps
    rows = torch.arange(STEPS, device=context.device)
    return lambda x, t: eps.step(x, rows[eps.times[t[0].item()]][None])


@torch.no_grad()
def seconds(way, clips, cg, device, runs):
    """Of whole runs of the sampler, after two that warm up."""
    torch.manual_seed(0)
    x, context = (
        torch.randn(clips, 4, 16, 64, device=device),
        torch.randn(clips, 32, UNET.context_dim, device=device),
    )
    features = torch.randn(clips, 32, ALIGN.feature_dim, device=device)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    eps = step_of(way, context, features, cg)
    taken = []
    with streams(way.streams):
        for _ in range(runs + 2):
            wait()
            start = time.perf_counter()
            diffusion.dpm_solver(eps, x, STEPS)
            wait()
            taken.append(time.perf_counter() - start)
    if way.graph and x.is_cuda and any(kept.replay is None for kept in eps.kept.values()):
        raise RuntimeError("the step could not be recorded")
    return taken[2:]


def measure(way, clips, cg, device, runs):
    """-> a row, with `error` where there is no time to report."""
    row = {"way": way.name, "clips": clips, "classifier": bool(cg)}
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        whole = statistics.median(seconds(way, clips, cg, device, runs))
    except Exception as error:  # the other rows are worth having
        return row | {
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        }
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return row | {
        "ms_per_step": 1e3 * whole / STEPS,
        "ms_per_clip": 1e3 * whole / clips,
        "peak_gb": peak,
    }


def table_row(row):
    cells = [row["way"], row["clips"], "yes" if row["classifier"] else "no"]
    if "error" in row:
        cells += [row["error"], "", ""]
    else:
        cells += [
            f"{row['ms_per_step']:.2f}",
            f"{row['ms_per_clip']:.1f}",
            "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}",
        ]
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    for axis, guided in zip(figure.subplots(1, 2, sharey=True), (False, True)):
        own = [r for r in rows if r["classifier"] is guided and "error" not in r]
        for name in dict.fromkeys(r["way"] for r in own):
            axis.loglog(
                [r["clips"] for r in own if r["way"] == name],
                [r["ms_per_clip"] for r in own if r["way"] == name],
                "o-",
                label=name,
            )
        axis.set(
            title="with classifier" if guided else "without classifier",
            xlabel="clips at once",
            ylabel="ms a clip, 25 steps",
        )
        if own:
            axis.legend()
    figure.savefig(path)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        sys.exit("speed_gpu.py: torch finds no CUDA device; tools/speed.py is the CPU's")
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "triton": kernels.triton and kernels.triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(
        about,
        "\n\n| way | clips | classifier | ms a step | ms a clip | peak GB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    with args.out.with_suffix(".jsonl").open("w") as lines:
        for way in ways("cuda", args.ways, args.mode):
            kernels.choose(way.kernels)
            for clips in args.clips:
                for cg in (0.0, CG) if way.classifier else (0.0,):
                    rows.append(measure(way, clips, cg, "cuda", args.runs))
                    print(table_row(rows[-1]), flush=True)
                    print(json.dumps({**about, **rows[-1]}), file=lines, flush=True)
            del way
            torch.cuda.empty_cache()
    draw(rows, args.out.with_suffix(".png"))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
