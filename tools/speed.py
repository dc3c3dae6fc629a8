"""How fast the published networks run on this CPU, beside plain PyTorch.

    python -m tools.speed                     5 rounds, some minutes, 14 GB of memory

"plain" is the official code's way of writing the networks (tools/plain.py) with torch's defaults;
"memory kept" the same with glibc told to keep what is freed, as our scripts tell it. Each column is
a process of its own, since such settings belong to processes; they take turns, stage by stage, so
that whatever else the machine does slows all alike. Seconds are each column's best round; ratios
are the median over the rounds.
"""

import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import cavp
import ldm
import vae
from common import cli, machine
from kernels import fast
from tools.plain import plainly

# title: name; what a clip's sound takes, from frames to mel
STAGES = {
    "U-Net, batch 2": "unet",
    "decoder, 8.192 s": "decoder",
    "CAVP video, 32 frames": "features",
}


def random_network(cls, config, dtype, device="cpu"):
    """Weights of the size that keeps activations of order one, drawn where they are used: 860
    million take 15 seconds on a CPU."""
    with torch.device("meta"):
        model = cls(config)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if not p.is_floating_point():
            continue
        # matrices keep the variance; norms start as the identity
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        else:
            p.fill_(float(name.endswith(("weight", "var"))))
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
        p.data = p.data.to(dtype, memory_format=layout)
    return model


def worker(pipe, kind, dtype):
    """Runs the stages it is sent and answers with their seconds."""
    torch.manual_seed(0)
    if kind != "plain":
        machine.keep_freed_memory()
    # the published sizes, the towers in float32 until their norms are folded
    unet = random_network(ldm.UNet, ldm.UNetConfig(), dtype)
    decoder = random_network(vae.AutoencoderKL, vae.VAEConfig(), dtype)
    towers = random_network(cavp.CAVP, cavp.CAVPConfig(), torch.float32)
    # one clip: with classifier-free guidance a batch of two
    x = torch.randn(2, 4, 16, 64)
    t = torch.tensor([500.5, 500.5])
    context = torch.randn(2, 32, 768)
    z = torch.randn(1, 4, 16, 64, dtype=dtype)
    video = torch.rand(1, 32, 3, 224, 224)
    if kind == "ours":
        towers = towers.fold().to(dtype)
        video = video.to(dtype)
        context = fast.optimise(unet).prepare(context, t[:1])  # once a clip, as in sampling
    else:
        for model in (unet, decoder, towers):
            plainly(model)
    run = {
        "unet": lambda: unet(x, t, context),
        "decoder": lambda: decoder.decode(z),
        "features": lambda: towers.encode_video(video),
    }
    # until the parent sends None
    pipe.send("ready")
    for stage in iter(pipe.recv, None):
        start = time.perf_counter()
        with torch.no_grad():
            run[stage]()
        pipe.send(time.perf_counter() - start)


def start(target, *args):
    """A process that runs target(pipe, *args), as the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=target, args=(theirs, *args), daemon=True).start()
    theirs.close()  # so that a worker that dies ends us too
    return ours


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(columns, unit, *more):
    """Of a table of columns, the first of them plain; then each other column beside it."""
    head = ["stage", *(f"{name}, {unit}" for name in columns)]
    head += [f"{name}: times plain" for name in list(columns)[1:]]
    print_row(*head, *more)
    print_row(*["---"] * (len(head) + len(more)))


def ratios(seconds):
    """Of the first column to each other one: the median over the rounds."""
    first, *others = seconds.values()
    for other in others:
        pairs = zip(first, other, strict=True)
        yield f"{statistics.median(plain / ours for plain, ours in pairs):.2f}"


def processor():
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    p = cli.Parser("tools.speed", __doc__)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    columns = {
        "plain float32": ("plain", torch.float32),
        "plain, memory kept": ("kept", torch.float32),
        "ours float32": ("ours", torch.float32),
    }
    if machine.computes_bfloat16("cpu"):
        columns["ours bfloat16"] = "ours", torch.bfloat16
    # all workers live at once, so memory must hold every column's networks
    pipes = {}
    for name, how in columns.items():
        pipes[name] = start(worker, *how)
        pipes[name].recv()
    # stage by stage and column by column: the machine's noise falls on all
    seconds = {stage: {name: [] for name in columns} for stage in STAGES.values()}
    for turn in range(args.rounds + 1):  # the first of them only warms up
        for stage, rows in seconds.items():
            for name, pipe in pipes.items():
                pipe.send(stage)
                taken = pipe.recv()
                if turn:
                    rows[name].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{processor()}, {threads}; torch {torch.__version__}\n")
    print_head(columns, "s")
    # the best round of each column, then ratios within rounds
    for title, stage in STAGES.items():
        best = (f"{min(row):.2f}" for row in seconds[stage].values())
        print_row(title, *best, *ratios(seconds[stage]))


if __name__ == "__main__":
    main()
