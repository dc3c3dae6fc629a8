"""How long a guided step and a whole clip take on this GPU with networks of the published size, beside other ways to run them.

    python tests/speed_gpu.py --out speed       a table, speed.json and speed.png; about ten minutes, most of them torch.compile's

plain     the official code's way: eager, scores of attention in memory, the condition anew in every step, float32
eager     the same networks with torch's fused attention, bfloat16
compiled  that under torch.compile(mode="max-autotune"), which records CUDA graphs
diffusers UNet2DConditionModel of the same size, bfloat16, eager, where that package is installed; without the classifier
ours      fused kernels, the condition and the times once a clip, the whole guided step one CUDA graph, bfloat16

All of them take the same 25 steps of the same sampler; weights are random. A row that ours loses stays.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))           # the stages lie a folder up

import kernels                                                  # noqa: E402
import ldm                                                      # noqa: E402
from plain import plainly                                       # noqa: E402
from speed import random_network                                # noqa: E402

STEPS, CFG, CG = 25, 4.5, 50.0


def networks(dtype, device):
    """U-Net and classifier."""
    return [random_network(cls, config, dtype).to(device) for cls, config in
            ((ldm.UNet, ldm.UNetConfig()), (ldm.Alignment, ldm.AlignmentConfig()))]


def unprepared(unet, classifier):
    """As functions, of which `guided_eps` cannot know that anything could be computed once."""
    return (lambda x, t, context: unet(x, t, context)), SimpleNamespace(grad_log_prob=classifier.grad_log_prob)


def diffusers_unet(device):
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    with torch.device(device):
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(torch.bfloat16).eval()
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    return lambda x, t, context: model(x.bfloat16(), t, context.bfloat16()).sample


def ways(device, chosen):
    """(name, kernels' mode, U-Net, classifier or None, whether to record a graph), made one after the other to share memory."""
    if "plain" in chosen:
        yield "plain float32", "torch", *unprepared(*(plainly(m) for m in networks(torch.float32, device))), False
    if "eager" in chosen:
        yield "eager bfloat16", "torch", *unprepared(*networks(torch.bfloat16, device)), False
    if "compiled" in chosen:
        unet, classifier = networks(torch.bfloat16, device)
        yield "compiled bfloat16", "torch", *unprepared(torch.compile(unet, mode="max-autotune"), classifier), False
    if "diffusers" in chosen and (unet := diffusers_unet(device)):
        yield "diffusers bfloat16", "torch", unet, None, False
    if "ours" in chosen:
        unet, classifier = networks(torch.bfloat16, device)
        unet.fuse(), classifier.model.fuse()
        yield "ours bfloat16", "triton", unet, classifier, True


@torch.no_grad()
def seconds(unet, classifier, recorded, clips, cg, device, runs):
    """Of whole runs of the sampler, after two that warm up."""
    torch.manual_seed(0)
    x, context = torch.randn(clips, 4, 16, 64, device=device), torch.randn(clips, 32, 768, device=device)
    features, times = torch.randn(clips, 32, 512, device=device), ldm.TIMES["dpm"](STEPS)
    eps = ldm.guided_eps(unet, context, torch.zeros_like(context), CFG, classifier, features, cg, times=times)
    eps = ldm.Replayed(eps) if recorded else eps
    taken = []
    for _ in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        ldm.dpm_solver(eps, x, STEPS)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[2:]


def draw(rows, path):
    from matplotlib.figure import Figure
    figure = Figure((9, 4), layout="constrained")
    for axis, guided in zip(figure.subplots(1, 2, sharey=True), (False, True)):
        own = [r for r in rows if r["classifier"] is guided]
        for name in dict.fromkeys(r["way"] for r in own):
            axis.loglog([r["clips"] for r in own if r["way"] == name], [r["ms_per_clip"] for r in own if r["way"] == name], "o-", label=name)
        axis.set(title="with classifier" if guided else "without classifier", xlabel="clips at once", ylabel="ms a clip, 25 steps")
        axis.legend()
    figure.savefig(path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clips", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--ways", nargs="+", default=["plain", "eager", "compiled", "diffusers", "ours"])
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("speed"), help="without its suffix")
    args = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("speed_gpu.py: torch finds no CUDA device; tests/speed.py is the CPU's")
    device, rows = torch.device("cuda"), []
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": kernels.triton and kernels.triton.__version__}
    print(about, "\n\n| way | clips | classifier | ms a step | ms a clip | peak GB |\n|---|---|---|---|---|---|", flush=True)
    for name, mode, unet, classifier, recorded in ways(device, args.ways):
        kernels.choose(mode)
        for clips in args.clips:
            for cg in (0.0, CG)[:1 + (classifier is not None)]:
                torch.cuda.reset_peak_memory_stats()
                try:
                    whole = statistics.median(seconds(unet, classifier, recorded, clips, cg, device, args.runs))
                except torch.OutOfMemoryError:
                    print(f"| {name} | {clips} | {'yes' if cg else 'no'} | out of memory | | |", flush=True)
                    continue
                peak = torch.cuda.max_memory_allocated() / 1e9
                rows.append({"way": name, "clips": clips, "classifier": bool(cg), "ms_per_step": 1e3 * whole / STEPS,
                             "ms_per_clip": 1e3 * whole / clips, "peak_gb": peak})
                print(f"| {name} | {clips} | {'yes' if cg else 'no'} | {1e3 * whole / STEPS:.2f} | {1e3 * whole / clips:.1f} | {peak:.2f} |",
                      flush=True)
                args.out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1))
        del unet, classifier
        torch.cuda.empty_cache()
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
