"""Training steps a second of the mini preset, beside the same step in plain PyTorch, and how long a
step waits for data.

    python -m tools.speed_training            7 rounds of 2 steps a column and stage, ten minutes on
                                              two cores

Every column is the stage's own script on the same clips, in a process of its own that runs a few
steps at a time; the processes take turns, so that whatever else the machine does slows all alike.
"plain": float32, networks as in tools/plain.py, maps as (b, c, h, w) in memory, an optimizer that
goes from tensor to tensor, memory handed back to the system. Seconds are each column's median step;
ratios are medians over the rounds; waiting is the share of time that training stood still for data,
with no reader beside it.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import cavp
import ldm
import vae
from common import cli, distributed, machine, training
from tools import plain
from tools.speed import print_head, print_row, ratios, start

ROOT = Path(__file__).resolve().parent.parent
# name: (command, the data it reads, more arguments)
STAGES = {
    "cavp": (cavp.main, "prepared", []),
    "ldm": (ldm.main, "features", ["--vae", ROOT / "weights/mini/ldm.safetensors"]),
    "vae": (vae.main, "prepared", []),
}


def conv_unit(self, x, frames):
    """As in tools/plain.py, with the norm in training."""
    y = self.conv(x.unflatten(0, (-1, frames)).transpose(1, 2))  # (b, c, f, h, w)
    bn = self.bn
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


def plain_adamw(groups, args, **options):
    """Instead of `training.adamw`: from tensor to tensor."""
    # frozen parameters have no gradient
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    return torch.optim.AdamW(groups, args.lr, foreach=False, **options)


def make_plain():
    """This process trains plainly from now on."""
    plain.FORWARD[cavp.ConvUnit] = conv_unit
    distributed.wrap_ddp = plainly
    machine.keep_freed_memory = lambda: None
    training.adamw = plain_adamw


def worker(pipe, stage, is_plain, dtype, home, out):
    """A training that makes as many steps as it is sent, then answers with their seconds, and how
    many of them it waited for data."""
    if is_plain:
        make_plain()
    # report is called once a step: there this process stops and waits
    report = training.TrainingRun.report
    left = 0
    since = None

    def paced(run, **values):
        nonlocal left, since
        report(run, **values)
        left -= 1
        # in the middle of a turn
        if left > 0:
            return
        now = time.perf_counter()
        pipe.send(since and (now - since, run.loader.waited))
        left = pipe.recv()
        if left is None:
            # at once, without a checkpoint
            os._exit(0)
        # the clock starts when this process is let go again
        since = time.perf_counter()
        run.loader.waited = 0.0

    training.TrainingRun.report = paced
    # the stage's own script, with steps that never end
    main, data, more = STAGES[stage]
    args = ["--data", home / data, "--out", out, "--dtype", dtype, "--device", "cpu", *more]
    args += ["--steps", 10**6, "--save-every", 10**6]
    with (
        open(f"{out}.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        main([str(a) for a in args])


def make_data(home, clips):
    """Procedural clips, prepared, and their features by the shipped CAVP."""
    weights = ROOT / "weights/mini/cavp.safetensors"
    extract = ["--data", home / "prepared", "--init", weights, "--extract", home / "features"]
    for args in (
        ["foley.py", home / "clips", "--clips", clips, "--seed", 3],
        ["data.py", "prepare", home / "clips", home / "prepared"],
        ["cavp.py", *extract],
    ):
        command = [sys.executable, *map(str, args)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def measure(stage, columns, home, rounds, steps):
    """-> {column: [(seconds a step, share of waiting), one a round]}"""
    # one process for each column, all on the same data
    pipes = {}
    seconds = {name: [] for name in columns}
    for name, how in columns.items():
        out = home / f"{stage}-{len(pipes)}"
        pipes[name] = start(worker, stage, *how, home, out)
        try:
            pipes[name].recv()  # one step: everything is set up
        except EOFError:
            sys.exit(f"{stage}, {name}: " + Path(f"{out}.txt").read_text())
    for turn in range(rounds + 1):  # the first of them only warms up
        for name, pipe in pipes.items():
            # one column at a time has the machine
            pipe.send(steps)
            taken, waited = pipe.recv()
            if turn:
                seconds[name].append((taken / steps, waited / taken))
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


def main():
    p = cli.Parser("tools.speed_training", __doc__)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=2, help="in a turn")
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    args = p.parse_args()
    columns = {"plain float32": (True, "float32"), "ours float32": (False, "float32")}
    if machine.computes_bfloat16("cpu"):
        columns["ours bfloat16"] = False, "bfloat16"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print_head(columns, "s a step", "waiting for data")
    # the sets are made once and read by all
    with tempfile.TemporaryDirectory() as home:
        make_data(Path(home), args.clips)
        for stage in args.stages:
            rows = measure(stage, columns, Path(home), args.rounds, args.steps)
            times = {name: [taken for taken, _ in row] for name, row in rows.items()}
            middle = (f"{statistics.median(row):.3f}" for row in times.values())
            # waiting is that of our columns
            ours = list(rows)[1:]
            waiting = statistics.median(share for name in ours for _, share in rows[name])
            print_row(stage, *middle, *ratios(times), f"{waiting:.1%}")


if __name__ == "__main__":
    main()
