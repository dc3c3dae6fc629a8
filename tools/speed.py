"""How fast the published networks run on this CPU, beside a plain PyTorch reading of them.

    python tools/speed.py                     5 rounds, some minutes, 14 GB of memory

"plain" is the official code's way of writing the networks (`plain.py`) with torch's defaults; "memory kept" the same with glibc told to
keep what is freed, as our scripts tell it. Each column is a process of its own, for such settings belong to processes; they take turns, stage by stage, so that whatever else
the machine does falls on all alike. Seconds are each column's best round; ratios are the median over the rounds.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stages lie a folder up

from plain import plainly  # noqa: E402

import cavp  # noqa: E402
import ldm  # noqa: E402
import vae  # noqa: E402
from common import (
    machine,  # noqa: E402
)
from kernels import fast  # noqa: E402

STAGES = {
    "U-Net, batch 2": "unet",
    "decoder, 8.192 s": "decoder",
    "CAVP video, 32 frames": "features",
}


def random_network(cls, config, dtype, device="cpu"):
    """Weights of the size that keeps activations of order one, drawn where they are used: 860 million take 15 seconds on a CPU."""
    with torch.device("meta"):
        model = cls(config)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.is_floating_point():
            p.normal_(0, p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(
                float(name.endswith(("weight", "var")))
            )
            p.data = p.data.to(
                dtype, memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
            )
    return model


def worker(pipe, kind, dtype):
    """Runs the stage that it is told, answers with seconds."""
    torch.manual_seed(0)
    if kind != "plain":
        machine.keep_freed_memory()
    unet = random_network(ldm.UNet, ldm.UNetConfig(), dtype)
    decoder = random_network(vae.AutoencoderKL, vae.VAEConfig(), dtype)
    towers = random_network(cavp.CAVP, cavp.CAVPConfig(), torch.float32)
    x, t, context = torch.randn(2, 4, 16, 64), torch.tensor([500.5, 500.5]), torch.randn(2, 32, 768)
    z, video = torch.randn(1, 4, 16, 64, dtype=dtype), torch.rand(1, 32, 3, 224, 224)
    if kind == "ours":
        towers, video = towers.fold().to(dtype), video.to(dtype)
        context = fast.optimise(unet).prepare(context, t[:1])  # once a clip, as in sampling
    else:
        for model in (unet, decoder, towers):
            plainly(model)
    run = {
        "unet": lambda: unet(x, t, context),
        "decoder": lambda: decoder.decode(z),
        "features": lambda: towers.encode_video(video),
    }
    pipe.send("ready")
    for stage in iter(pipe.recv, None):
        start = time.perf_counter()
        with torch.no_grad():
            run[stage]()
        pipe.send(time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    columns = {
        "plain float32": ("plain", torch.float32),
        "plain, memory kept": ("kept", torch.float32),
        "ours float32": ("ours", torch.float32),
    }
    if machine.computes_bfloat16("cpu"):
        columns["ours bfloat16"] = "ours", torch.bfloat16
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, (kind, dtype) in columns.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, kind, dtype), daemon=True).start()
        theirs.close()  # so that a worker that dies ends us too
        pipes[name].recv()
    seconds = {}
    for _ in range(args.rounds + 1):  # the first of them only warms up
        for stage in STAGES.values():
            for name, pipe in pipes.items():
                pipe.send(stage)
                seconds.setdefault((stage, name), []).append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    print(
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}\n"
    )
    others = list(columns)[1:]
    print(
        "| stage | "
        + " | ".join(
            [f"{name}, s" for name in columns] + [f"{name}: times plain" for name in others]
        )
        + " |"
    )
    print("|---" * (1 + len(columns) + len(others)) + "|")
    for title, stage in STAGES.items():
        rows = {name: seconds[stage, name][1:] for name in columns}
        best = [f"{min(row):.2f}" for row in rows.values()]
        ratios = [
            f"{statistics.median(a / b for a, b in zip(rows['plain float32'], rows[name])):.2f}"
            for name in others
        ]
        print(f"| {title} | " + " | ".join(best + ratios) + " |")


if __name__ == "__main__":
    main()
