"""What every training loop calls and nobody wants to read four times; the loop itself stays visible in each stage.

in   parsed arguments, a network, its configuration, batches
out  OUT/last.safetensors   weights (the moving average where there is one) with the configuration in the header: what `load` takes
     OUT/last.state.pt      what --resume needs beside it: raw weights, optimizer, step, random state (tensors and numbers only)
     OUT/log.jsonl          one line a report: step, loss terms, learning rate, seconds
     OUT/curves.png         the same as a picture, redrawn at every save

Nothing is half-written (temporary name, then rename) and nothing is unpickled (`weights_only=True`).
"""
import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import CheckpointError, make_folder, save_model, write_whole


class TrainingError(CheckpointError):
    """A user's mistake or a run that cannot go on: one line with the remedy."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the module's docstring as written, and every default."""


# ---------------------------------------------------------------------------------------------------------------------
# the arguments that all stages share

def arguments(description, presets):
    """The parser with every flag that all training commands take; `presets` {name: {steps, batch, lr, warmup}} sets their defaults."""
    p = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    p.add_argument("--data", type=Path, required=True, help="folder of clips, or a prepared set")
    p.add_argument("--out", type=Path, help="where the run writes; default runs/STAGE")
    p.add_argument("--preset", choices=list(presets), default="mini", help="network sizes and training recipe")
    p.add_argument("--init", type=Path, help="start from these weights (ours or an official file)")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.state.pt")
    g = p.add_argument_group("optimization; where not given, the preset's: " + "; ".join(
        f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in recipe.items()) for name, recipe in presets.items()))
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch", type=int, help="clips in one step")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--seed", type=int, default=0, help="weights, data order and noise")
    g = p.add_argument_group("run")
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                   help="autocast of the forward pass; auto: bfloat16 where the hardware has it")
    g.add_argument("--workers", type=int, default=0, help="processes that read data")
    g.add_argument("--half", action="store_true",
                   help="write OUT/last.safetensors with float16 matrices: half the size, loads the same")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return p


def glibc(function, *args):
    with contextlib.suppress(AttributeError, OSError, TypeError):       # another C library
        getattr(ctypes.CDLL(None), function)(*args)


def keep_freed_memory(largest=2**30):
    """glibc returns large blocks to the system on every free and faults them in anew at the next use, which costs a training
    step on a CPU a quarter of its time and more. Blocks above `largest` bytes still go back."""
    glibc("mallopt", -3, largest)                           # M_MMAP_THRESHOLD
    glibc("mallopt", -1, 2 * largest)                       # M_TRIM_THRESHOLD
    glibc("mallopt", -8, 1)                                 # M_ARENA_MAX: autograd's thread reuses what the main one freed


def return_freed_memory():
    """Between two stages of a job, of which the second could not use what the first has left in pieces."""
    glibc("malloc_trim", 0)


def computes_bfloat16(device):
    """Whether the hardware does: a CPU with AMX or avx512_bf16 is twice as fast in it, others emulate it several times slower."""
    return torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def settle(args, presets, stage):
    """Fill what the user left to the preset and the machine, seed everything; returns the device. Writes to `args`."""
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / stage
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_bfloat16(args.device) else "float32"
    if args.steps < 1 or args.batch < 1:
        raise TrainingError("--steps and --batch must be at least 1")
    keep_freed_memory()
    torch.manual_seed(args.seed)
    return torch.device(args.device)


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def learning_rate(step, args, final=0.0):
    """Linear warm-up to --lr, then a cosine down to `final` times it (1.0: constant, as the published stage 2)."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


# ---------------------------------------------------------------------------------------------------------------------
# data order

class Shuffled(torch.utils.data.Sampler):
    """Endless indices: epoch e is a permutation of the set seeded with (seed, e), given as e * len + i, so that a dataset
    can draw its own randomness from the index alone; starting at batch k costs nothing, which is what --resume needs."""

    def __init__(self, length, batch, seed, start=0):
        self.length, self.batch, self.seed, self.start = length, batch, seed, start

    def __iter__(self):
        position, epoch = self.start * self.batch, -1
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.length, generator=g).tolist()
            yield epoch * self.length + order[position % self.length]
            position += 1


def batches(dataset, args, start=0):
    """Endless iterator of collated batches, the same for any number of workers and after any interruption."""
    if len(dataset) == 0:
        raise TrainingError(f"--data {args.data}: no usable clip")
    # a generator of its own: the loader's draw from the global one would make a resumed run differ from an uninterrupted one
    loader = torch.utils.data.DataLoader(dataset, args.batch, sampler=Shuffled(len(dataset), args.batch, args.seed, start),
                                         generator=torch.Generator().manual_seed(args.seed), num_workers=args.workers,
                                         pin_memory=args.device == "cuda", persistent_workers=args.workers > 0)
    return iter(loader)


# ---------------------------------------------------------------------------------------------------------------------
# a run

class EMA:
    """Moving average of the weights, with a warm-up so that a short run is not an average of noise."""

    def __init__(self, model, decay=0.999):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, new in zip(self.model.state_dict().values(), model.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(new, 1 - decay)
            else:
                mean.copy_(new)


class Run:
    """Progress bar, log, saving and resuming of one training run.

        run = Run(args, model, optimizer, config, ema)
        for step in run:            # from 0, or from where --resume left off; ends at --steps or on Ctrl-C
            ...
            run.report(loss=loss.item(), lr=lr)
        run.save()
    """

    def __init__(self, args, model, optimizer, config, ema=None, export=None):
        # export(model) -> the copy that is written for `load`, where it differs from the network in training
        self.args, self.model, self.optimizer, self.config, self.ema, self.export = args, model, optimizer, config, ema, export
        self.step, self.elapsed, self.interrupted = 0, 0.0, False
        if args.resume:
            self.restore()
        elif (args.out / "last.state.pt").exists():
            raise TrainingError(f"{args.out}: holds a run already; add --resume to go on, or give another --out")
        make_folder(args.out)                               # an unwritable place is noticed before the work, not after
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{args.out}: {parameters / 1e6:.1f} M parameters, {args.device} {args.dtype}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads, steps {self.step}..{args.steps} of {args.batch} clips", flush=True)

    def __iter__(self):
        """Steps; the first Ctrl-C (or SIGTERM) ends the loop after the step under way, so that everything is saved."""
        def stop(*_):
            self.interrupted = True
        old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.args.steps, initial=self.step, desc=self.args.out.name, dynamic_ncols=True)
        self.clock, self.totals = time.monotonic(), {}
        try:
            while self.step < self.args.steps and not self.interrupted:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step % self.args.save_every == 0:
                    self.save()
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)
        if self.interrupted:
            print(f"{self.args.out}: stopped after step {self.step}; go on with --resume", file=sys.stderr)

    def report(self, every=20, **values):
        """Means of `values` over the last `every` steps, on the bar and in log.jsonl; stops a run whose loss is not finite."""
        if not all(math.isfinite(v) for v in values.values()):
            raise TrainingError(f"step {self.step}: the loss is not finite; go on from the last checkpoint with --resume and a lower --lr")
        for k, v in values.items():
            self.totals.setdefault(k, []).append(v)
        if (self.step + 1) % every == 0 or self.step + 1 == self.args.steps or self.interrupted:
            means = {k: sum(v) / len(v) for k, v in self.totals.items()}
            self.totals = {}
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()})
            with open(self.args.out / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": self.step + 1, "seconds": round(self.seconds(), 1), **means}) + "\n")

    def seconds(self):
        return self.elapsed + time.monotonic() - self.clock

    def save(self):
        """Weights for `load`, then the training state."""
        model = self.ema.model if self.ema else self.model
        model = self.export(model) if self.export else model
        # names alone: the folders of whoever trained are nobody's business who loads the file
        args = {k: v.name if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        about = {"step": self.step, "seconds": round(self.seconds(), 1), "torch": torch.__version__, "args": args}
        save_model(self.args.out / "last.safetensors", model, self.config, self.args.half, **about)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "elapsed": self.seconds(), "rng": torch.get_rng_state(),
                 "ema": self.ema.model.state_dict() if self.ema else None, "updates": self.ema.updates if self.ema else 0}
        memory = io.BytesIO()
        torch.save(state, memory)
        write_whole(self.args.out / "last.state.pt", memory.getbuffer())
        draw_curves(self.args.out)

    def restore(self):
        path = self.args.out / "last.state.pt"
        if not path.exists():
            raise TrainingError(f"--resume: {path} is not there; leave --resume out to start, or name the run with --out")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
            self.ema.updates = state["updates"]
        self.step, self.elapsed = state["step"], state["elapsed"]
        torch.set_rng_state(state["rng"])


def draw_curves(out):
    """log.jsonl -> curves.png, one panel a logged value."""
    log = out / "log.jsonl"
    if not log.exists():
        return
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = [k for k in rows[-1] if k not in ("step", "seconds")]
    from matplotlib.figure import Figure                    # only where a picture is drawn: the import takes a second
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        axis.plot([r["step"] for r in rows if name in r], [r[name] for r in rows if name in r])
        axis.set(title=name, xlabel="step")
    part = out / f".curves.{os.getpid()}.part.png"
    with contextlib.suppress(OSError):                      # a picture is not worth losing a run over
        figure.savefig(part)
        os.replace(part, out / "curves.png")
