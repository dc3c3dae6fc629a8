"""Training steps a second of the mini preset, beside a plain reading of the same step, and how long a step waits for data.

    python tools/speed_training.py            7 rounds of 2 steps a column and stage, ten minutes on two cores

Every column is the stage's own script on the same clips, in a process of its own that is let go for a few steps at a time; the processes
take turns, so that whatever else the machine does falls on all alike. "plain": float32, networks as in `plain.py`, maps as (b, c, h, w) in memory,
an optimizer that goes from tensor to tensor, memory handed back to the system. Seconds are each column's median step; ratios are medians
over the rounds; waiting is the share of time that training stood still for data, with no reader beside it.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the stages lie a folder up

import plain  # noqa: E402

import cavp  # noqa: E402
import ldm  # noqa: E402
import vae  # noqa: E402
from common import (
    distributed,  # noqa: E402
    machine,  # noqa: E402
    training,  # noqa: E402
)

STAGES = {
    "cavp": (cavp.main, "prepared", []),
    "ldm": (ldm.main, "features", ["--vae", ROOT / "weights/mini/ldm.safetensors"]),
    "vae": (vae.main, "prepared", []),
}


def conv_unit(self, x, frames):
    """As in `plain.py`, with the norm at work."""
    y, bn = self.conv(x.unflatten(0, (-1, frames)).transpose(1, 2)), self.bn  # (b, c, f, h, w)
    y = F.batch_norm(
        y, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps
    )
    return y.transpose(1, 2).flatten(0, 1)


def plainly(model, function):
    """Instead of `distributed.wrap_ddp`."""
    model = plain.plainly(model)

    def step(*inputs):
        return function(model, *(x.clone(memory_format=torch.contiguous_format) for x in inputs))

    return step


def read_plainly():
    plain.FORWARD[cavp.ConvUnit] = conv_unit
    distributed.wrap_ddp = plainly
    machine.keep_freed_memory = lambda: None
    training.adamw = lambda groups, args, **options: torch.optim.AdamW(
        [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups],
        args.lr,
        foreach=False,
        **options,
    )


def worker(pipe, stage, is_plain, dtype, home, out):
    """A training that makes as many steps as it is told to, then answers with their seconds and how many of them it waited for data."""
    if is_plain:
        read_plainly()
    report, told, start = training.TrainingRun.report, 0, None

    def paced(run, **values):
        nonlocal told, start
        report(run, **values)
        told -= 1
        if told <= 0:
            now = time.perf_counter()
            pipe.send(start and (now - start, run.loader.waited))
            told = pipe.recv()
            if told is None:
                os._exit(0)
            start, run.loader.waited = time.perf_counter(), 0.0

    training.TrainingRun.report = paced
    sys.stdout = sys.stderr = open(f"{out}.txt", "w")
    main, data, more = STAGES[stage]
    main(
        [
            str(a)
            for a in (
                "--data",
                home / data,
                "--out",
                out,
                "--steps",
                10**6,
                "--save-every",
                10**6,
                "--dtype",
                dtype,
                "--device",
                "cpu",
                *more,
            )
        ]
    )


def make_data(home, clips):
    """Procedural clips, prepared, and their features by the shipped CAVP."""
    for args in (
        ["foley.py", home / "clips", "--clips", clips, "--seed", 3],
        ["data.py", "prepare", home / "clips", home / "prepared"],
        [
            "cavp.py",
            "--data",
            home / "prepared",
            "--init",
            ROOT / "weights/mini/cavp.safetensors",
            "--extract",
            home / "features",
        ],
    ):
        subprocess.run(
            [sys.executable, *map(str, [ROOT / args[0], *args[1:]])],
            check=True,
            capture_output=True,
        )


def measure(stage, columns, home, rounds, steps):
    """-> {column: [(seconds a step, share of waiting), one a round]}"""
    context, pipes, seconds = (
        multiprocessing.get_context("spawn"),
        {},
        {name: [] for name in columns},
    )
    for i, (name, (is_plain, dtype)) in enumerate(columns.items()):
        pipes[name], theirs = context.Pipe()
        context.Process(
            target=worker,
            args=(theirs, stage, is_plain, dtype, home, home / f"{stage}-{i}"),
            daemon=True,
        ).start()
        theirs.close()  # so that a worker that dies ends us too
        try:
            pipes[name].recv()  # one step: everything is there
        except EOFError:
            sys.exit(f"{stage}, {name}: " + (home / f"{stage}-{i}.txt").read_text())
    for turn in range(rounds + 1):  # the first of them only warms up
        for name, pipe in pipes.items():
            pipe.send(steps)
            took, waited = pipe.recv()
            if turn:
                seconds[name].append((took / steps, waited / took))
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=2, help="in a turn")
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    args = p.parse_args()
    columns = {"plain float32": (True, "float32"), "ours float32": (False, "float32")}
    if machine.computes_bfloat16("cpu"):
        columns["ours bfloat16"] = False, "bfloat16"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| stage | "
        + " | ".join(f"{name}, s a step" for name in columns)
        + " | "
        + " | ".join(f"{name}: times plain" for name in list(columns)[1:])
        + " | waiting for data |"
    )
    print("|---" * (2 * len(columns) + 1) + "|", flush=True)
    with tempfile.TemporaryDirectory() as home:
        make_data(Path(home), args.clips)
        for stage in args.stages:
            seen = measure(stage, columns, Path(home), args.rounds, args.steps)
            times = {name: [took for took, _ in rows] for name, rows in seen.items()}
            middle = [f"{statistics.median(rows):.3f}" for rows in times.values()]
            ratios = [
                f"{statistics.median(a / b for a, b in zip(times['plain float32'], times[name])):.2f}"
                for name in list(columns)[1:]
            ]
            waiting = statistics.median(
                share for name in list(columns)[1:] for _, share in seen[name]
            )
            print(f"| {stage} | " + " | ".join(middle + ratios) + f" | {waiting:.1%} |", flush=True)


if __name__ == "__main__":
    main()
