"""What every training loop calls and nobody wants to read four times; the loop itself stays visible in each stage.

in   parsed arguments, a network, its configuration, a data set
out  OUT/last.safetensors   weights (the moving average) with the configuration in the header: what `load` takes; there
                            too arguments (with --note), commit, SHA-256 of the weights it began with, seconds, the last validation
     OUT/last.state.pt      what --resume needs: raw weights, moving average, optimizer, step (tensors and numbers);
                            OUT/previous.state.pt is the one before, for the day that the last one is damaged
     OUT/log.jsonl          a line every 20 steps: loss terms, learning rate, gradient norm, clips a second, share of the
                            time spent waiting for data, memory; and at every save a line of validation
     OUT/curves.png         the same as a picture; OUT/mels.png: validation spectrograms, reference above, generated below
     OUT/left_out.csv       the files of --data that are not trained on, and why

    python vae.py --data clips/                        one process
    torchrun --nproc_per_node 8 vae.py --data clips/   eight, on as many GPUs or, without any, on the CPU

Whatever is drawn at random in a step comes from a generator seeded with (--seed, step) and is drawn for the whole
batch, of which every process and micro-batch takes its rows. So the number of processes and the size of micro-batches
change no number, and a run that is killed and resumed goes on bit for bit. Nothing is half-written (temporary name, then
rename) and nothing is unpickled (`weights_only=True`).
"""

import atexit
import contextlib
import copy
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import cli, plots
from common.checkpoints import checkpoint_errors, save_model
from common.distributed import rank, world
from common.files import UserError, atomic_write, make_folder, sha256, write_bytes
from common.machine import computes_bfloat16, keep_freed_memory, peak_memory

STATES = "last.state.pt", "previous.state.pt"


class TrainingError(UserError):
    """A user's mistake or a run that cannot go on: one line with the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# the arguments that all stages share


def arguments(description, presets):
    """The parser with every flag that all training commands take; `presets` {name: {flag: value}} sets their defaults."""
    p = cli.Parser(None, description)
    p.add_argument("--data", type=Path, required=True, help="folder of clips, or a prepared set")
    p.add_argument("--out", type=Path, help="where the run writes; default runs/STAGE")
    p.add_argument(
        "--preset", choices=list(presets), default="mini", help="network sizes and training recipe"
    )
    p.add_argument("--init", type=Path, help="start from these weights (ours or an official file)")
    p.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="NAME",
        help="keep the parameters fixed whose names, as in the checkpoint, begin so",
    )
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.state.pt")
    g = p.add_argument_group(
        "optimization; where not given, the preset's: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in recipe.items())
            for name, recipe in presets.items()
        )
    )
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch", type=int, help="clips in one step, of all processes together")
    g.add_argument(
        "--micro-batch",
        type=int,
        help="clips in memory at once, of one process; else all of its share",
    )
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument(
        "--clip", type=float, help="longest gradient, longer ones are cut to it; 0: none is"
    )
    g.add_argument("--seed", type=int, default=0, help="weights, data order and noise")
    g = p.add_argument_group("run")
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="autocast of the forward pass; auto: bfloat16 where the hardware has it",
    )
    g.add_argument(
        "--recompute",
        action="store_true",
        help="keep no activations inside the blocks, compute them again: less memory, a third more time",
    )
    g.add_argument(
        "--workers",
        type=int,
        help="processes that read for each that trains; default: 4 beside a GPU, else 0",
    )
    g.add_argument(
        "--half",
        action="store_true",
        help="write OUT/last.safetensors with float16 matrices: half the size, loads the same",
    )
    g.add_argument(
        "--note",
        metavar="TEXT",
        help="kept in the header of the weights with the other arguments: which set --data is, say",
    )
    g.add_argument(
        "--save-every",
        type=int,
        default=500,
        help="steps between checkpoints, each with validation",
    )
    return p


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def learning_rate(step, args, final=0.0):
    """Linear warm-up to --lr, then a cosine down to `final` times it (1.0: constant, as the published stage 2)."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


# ---------------------------------------------------------------------------------------------------------------------
# before a run


def add_stage2_arguments(p):
    """Flags of both trainings on features and latents, the U-Net's and the classifier's."""
    p.add_argument(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="train the conditioner and adapters of this rank on the matrices "
        "of the transformer blocks, which are part of the saved weights; 0: train everything",
    )
    p.add_argument(
        "--repeats", type=int, help="noise levels at which each sound of a batch is seen in a step"
    )
    p.add_argument(
        "--merge",
        type=float,
        help="share of samples joined from two clips (split-and-merge augmentation)",
    )
    p.add_argument(
        "--roll",
        type=float,
        help="share of samples whose sound and picture are rotated in time together",
    )


def resolve_defaults(args, recipes, stage):
    """Fill in what the user left to the preset and to the machine."""
    args.asked_micro_batch = args.micro_batch
    for name, value in recipes[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / stage
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_bfloat16(args.device) else "float32"
    if args.workers is None:
        args.workers = 4 if args.device == "cuda" else 0


def check_batch(args):
    """Divide --batch among the processes, and each one's share into micro-batches that fill it."""
    if args.steps < 1 or args.batch < 1:
        raise TrainingError("--steps and --batch must be at least 1")
    share, rest = divmod(args.batch, world())
    if rest:
        raise TrainingError(
            f"--batch {args.batch} does not divide among {world()} processes; give a multiple of them"
        )
    most = args.micro_batch or share
    fits = [n for n in range(1, share + 1) if share % n == 0 and n <= most]
    asked = args.asked_micro_batch
    del args.asked_micro_batch
    if asked and asked not in fits and asked < share:
        raise TrainingError(
            f"--micro-batch {asked} does not divide the {share} clips of a process; give {fits[-1]}"
        )
    args.micro_batch = fits[-1]


def check_run_folder(args):
    """A run is begun in an empty folder, or gone on with where --resume says so."""
    has_run = any((args.out / name).exists() for name in STATES)
    if args.resume and not has_run:
        raise TrainingError(
            f"--resume: {args.out} holds no run; start one without, or name it with --out"
        )
    if has_run and not args.resume:
        raise TrainingError(
            f"{args.out}: holds a run already; add --resume to go on, or give another --out"
        )
    if args.resume and (args.out / "last.safetensors").exists():
        # it says what the network looks like; the numbers come from the training state
        args.init = args.out / "last.safetensors"


def set_up(args):
    """Allocator and random numbers of this process. -> its device"""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    return torch.device(args.device, torch.cuda.current_device() if args.device == "cuda" else None)


def freeze(args, model):
    """Fix the parameters that --freeze names; of parts that are fixed as a whole, the norms' statistics too."""
    for prefix in args.freeze:
        found = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not found:
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise TrainingError(
                f"--freeze {prefix}: no parameter's name begins so; they begin with {', '.join(parts)}"
            )
        for p in found:
            p.requires_grad_(False)
    for part in model.modules():
        own = list(part.parameters())
        if own and not any(p.requires_grad for p in own):
            part.eval()
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("--freeze: nothing is left to train; name fewer parts")


class LoRA(nn.Module):
    """A matrix plus a trained one of low rank, zero at first (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.up @ self.down


def add_lora(model, rank, *blocks):
    """Fixes a model, and every matrix in its blocks of these classes gets a LoRA to train."""
    model.requires_grad_(False)
    layers = [
        layer
        for block in model.modules()
        if isinstance(block, blocks)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))


def merge_lora(model):
    """The model with its adapters as part of their matrices: the keys and shapes that `load` takes. It shares all other weights with the
    given one. torch's own remove_parametrizations would take the weight from the class, which both share too."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in [layer for layer in model.modules() if parametrize.is_parametrized(layer)]:
        weight, plain = layer.weight.detach(), parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = plain
        layer.weight = nn.Parameter(weight)
    return model


def recompute(args, model, *blocks):
    """With --recompute the blocks of these classes keep their input alone for the backward pass."""
    for part in model.modules() if args.recompute else ():
        if isinstance(part, blocks):
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------------
# random numbers and data order


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator(args, step):
    """For all that one step draws, on the CPU: the same for every process, device and micro-batch."""
    return torch.Generator().manual_seed(seed_of(args.seed, step))


class Shuffled(torch.utils.data.Sampler):
    """Endless indices: epoch e is a permutation of the set seeded with (seed, e), given as e * len + i, so that a dataset
    can draw its own randomness from the index alone; starting at batch k costs nothing, which is what --resume needs. Of
    each batch, process `rank` of `world` gets its contiguous share."""

    def __init__(self, length, batch, seed, start=0, rank=0, world=1):
        self.length, self.batch, self.seed, self.start, self.rank, self.world = (
            length,
            batch,
            seed,
            start,
            rank,
            world,
        )

    def __iter__(self):
        share, epoch = self.batch // self.world, -1
        for step in itertools.count(self.start):
            first = step * self.batch + self.rank * share
            for position in range(first, first + share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=g).tolist()
                yield epoch * self.length + order[position % self.length]


def train_val_split(reader):
    """reader(split=...) -> clips to train on, to validate on; None where a set is too small for these."""
    clips = reader(split="train")
    try:
        return clips, reader(split="val")
    except UserError:
        return clips, None


def ignore_signals(ending, _worker):
    """Ctrl-C and SIGTERM are for the process that trains; it needs its readers until the step under way is done. When
    it ends, its SIGTERM is how they end: one that ignored that, too, would be waited for without end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


class Batches:
    """Endless iterator over this process's micro-batches, the same for any number of workers and after any
    interruption; `waited`: the seconds that training stood still for it."""

    def __init__(self, dataset, args, start=0):
        ending = multiprocessing.RawValue("b", 0)
        atexit.register(
            setattr, ending, "value", 1
        )  # runs before multiprocessing's own, which ends the readers
        # a generator of its own: nothing may depend on the global one
        self.waited, self.loader = (
            0.0,
            iter(
                torch.utils.data.DataLoader(
                    dataset,
                    args.micro_batch,
                    sampler=Shuffled(len(dataset), args.batch, args.seed, start, rank(), world()),
                    generator=torch.Generator().manual_seed(args.seed),
                    num_workers=args.workers,
                    worker_init_fn=functools.partial(ignore_signals, ending),
                    pin_memory=args.device == "cuda",
                    persistent_workers=args.workers > 0,
                )
            ),
        )

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        batch = next(self.loader)
        self.waited += time.monotonic() - start
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# a step


class EMA:
    """Moving average of the weights, with a warm-up so that a short run is not an average of noise. What is frozen is shared, not copied."""

    def __init__(self, model, decay=0.999):
        fixed = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model, self.decay, self.updates = (
            copy.deepcopy(model, fixed).eval().requires_grad_(False),
            decay,
            0,
        )

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        pairs = [
            pair
            for pair in zip(self.model.state_dict().values(), model.state_dict().values())
            if pair[0].data_ptr() != pair[1].data_ptr()
        ]
        means, new = zip(*[pair for pair in pairs if pair[0].is_floating_point()])
        get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))(
            means, new, self.updates
        )
        for mean, count in pairs:
            if not mean.is_floating_point():
                mean.copy_(count)


def adamw(groups, args, **options):
    """AdamW over the parameters that are not frozen, in one pass over them where torch has it."""
    groups = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], args.lr, fused=True, **options
    )


def update(args, step, optimizer, ema, model, final=0.0):
    """One step of the optimizer and the average, the gradient cut to --clip; -> the gradient's norm before that."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args, final)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update(model)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# a run


def newest_state(out):
    """The last complete training state of a run: torch.save's zip archive holds a checksum of every part."""
    for name in STATES:
        path = out / name
        if path.exists():
            with contextlib.suppress(
                OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError
            ):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged is None:
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if rank() == 0:
                print(
                    f"{path}: damaged, not used; going on from the checkpoint before it",
                    file=sys.stderr,
                )
    raise TrainingError(
        f"--resume: no whole {STATES[0]} in {out}; give another --out to start anew"
    )


def commit():
    """Of the checkout that this code lies in, "-dirty" behind it where files differ; None without one, or without git."""
    with contextlib.suppress(OSError):
        found = subprocess.run(
            [
                "git",
                "-C",
                Path(__file__).parent,
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
        )
        return found.stdout.strip() or None


def read_log(out):
    """The rows of log.jsonl; a last line that a kill has cut is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (out / "log.jsonl").read_text().splitlines():
            rows.append(json.loads(line))
    return rows


class TrainingRun:
    """Micro-batches, progress, log, validation, saving and resuming of one training run.

        run = Run(args, model, optimizer, config, ema, clips, held_out, validate)
        for step in run:                            # from 0, or where --resume left off; saves as it goes and at the end
            for batch, rows in run.parts(network):  # this process's micro-batches; which rows of the whole batch they are
                loss = network(...)
                (loss / run.count).backward()
                run.add(loss=loss)
            run.report(gradient_norm=update(...))

    held_out: clips that are not trained on, or None; validate(model, held_out) -> {name: number}, [(true, made) mels
    (128, s)], called without gradients on the averaged weights;
    export(model) -> the copy that is written for `load`, where it differs from the network in training.
    """

    def __init__(self, args, model, optimizer, config, ema, clips, held_out, validate, export=None):
        self.args, self.model, self.optimizer, self.config, self.ema = (
            args,
            model,
            optimizer,
            config,
            ema,
        )
        self.held_out, self.validate, self.export = held_out, validate, export
        self.count = args.batch // world() // args.micro_batch  # micro-batches of a step
        self.step, self.elapsed, self.totals, self.terms, self.clips = 0, 0.0, {}, {}, len(clips)
        self.asked = self.interrupted = False
        self.commit = self.started_from = None
        if args.resume:
            self.restore()
        self.saved = self.step
        if rank() == 0:
            self.prepare(clips.left_out)
        self.loader = Batches(clips, args, self.step)

    def prepare(self, left_out):
        """An unwritable place is noticed before the work, not after; what a killed process left is taken away. And what
        is about to happen is said."""
        args, out = self.args, make_folder(self.args.out)
        self.commit = commit()  # now: whoever trains may go on editing
        given = {name: getattr(args, name, None) for name in ("init", "vae")}
        if self.started_from is None:
            self.started_from = {
                name: sha256(path) for name, path in given.items() if path and path.is_file()
            }
        for part in out.glob(".*.part*"):
            part.unlink()
        rows = (
            [row for row in read_log(out) if row["step"] <= self.step] if self.args.resume else []
        )
        write_bytes(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        if left_out:
            table = io.StringIO()
            csv.writer(table).writerows([("name", "reason"), *left_out])
            write_bytes(out / "left_out.csv", table.getvalue().encode())
        count = {
            k: sum(p.numel() for p in self.model.parameters() if p.requires_grad == k) / 1e6
            for k in (True, False)
        }
        print(
            f"{out}: {args.device} {args.dtype}, {world()} process{'es' * (world() > 1)} of {torch.get_num_threads()} "
            f"threads, torch {torch.__version__}; {count[True]:.1f} M parameters"
            + f" and {count[False]:.1f} M fixed" * (count[False] > 0)
            + f"; {self.clips} clips"
            + f" ({len(left_out)} left out, see {out / 'left_out.csv'})" * bool(left_out)
            + (
                f", {len(self.held_out)} to validate on"
                if self.held_out
                else ", none to validate on"
            )
            + f"; steps {self.step} to {args.steps} of {args.batch} clips, {args.micro_batch} at once",
            flush=True,
        )

    def __iter__(self):
        """Steps. The first Ctrl-C or SIGTERM, in any process, ends the loop of all after the step under way, saved."""

        def ask(*_):
            self.asked = True

        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        begun, out, steps, due = self.step, self.args.out, self.args.steps, False
        self.bar = tqdm(
            total=steps, initial=begun, desc=out.name, dynamic_ncols=True, disable=rank() > 0
        )
        self.clock, self.mark = time.monotonic(), (time.monotonic(), begun)
        try:
            while self.step < steps and not self.interrupted:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step - begun == 10 and rank() == 0:
                    pace = (time.monotonic() - self.clock) / 10
                    self.bar.write(
                        f"{out}: {pace:.2f} s a step, {(steps - self.step) * pace / 60:.0f} minutes to go"
                    )
                due = self.step % self.args.save_every == 0 or self.step == steps
                if due or self.interrupted:
                    self.save(due)
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)
        if self.interrupted and rank() == 0:
            print(f"{out}: stopped after step {self.step}; go on with --resume", file=sys.stderr)

    def parts(self, network, source=None):
        """(micro-batch, its rows of the whole batch), from the data set or a list; gradients are exchanged in the last."""
        size = self.args.micro_batch
        for i, batch in zip(range(self.count), source or self.loader):
            first = (rank() * self.count + i) * size
            with (
                network.no_sync()
                if world() > 1 and i < self.count - 1
                else contextlib.nullcontext()
            ):
                yield batch, slice(first, first + size)

    def add(self, **terms):
        """Terms of the loss of one micro-batch; the step's are their means."""
        for k, v in terms.items():
            self.terms[k] = self.terms.get(k, 0) + v.detach().float() / self.count

    def report(self, every=20, **values):
        """Ends a step. Means over the last `every` steps go on the bar and in log.jsonl; a loss or gradient that is not
        finite stops the run before anything is saved. The one exchange between processes also agrees on stopping."""
        values = {**self.terms, **{k: v.detach().float() for k, v in values.items()}}
        device = next(iter(values.values())).device
        numbers = torch.stack([*values.values(), torch.tensor(float(self.asked), device=device)])
        if world() > 1:
            dist.all_reduce(numbers)
        *numbers, asked = (numbers / world()).tolist()
        self.terms, self.interrupted = {}, asked > 0
        if not all(map(math.isfinite, numbers)):
            if self.saved:
                remedy = f"go on from step {self.saved} with --resume and a lower --lr"
            else:
                remedy = "nothing is saved yet; start again with a lower --lr"
            raise TrainingError(
                f"step {self.step + 1}: the loss or its gradient is not finite; {remedy}"
            )
        for k, v in zip(values, numbers):
            self.totals.setdefault(k, []).append(v)
        if (self.step + 1) % every == 0 or self.step + 1 == self.args.steps:
            means = {k: sum(v) / len(v) for k, v in self.totals.items()}
            seconds = time.monotonic() - self.mark[0]
            speed, waiting = (
                (self.step + 1 - self.mark[1]) * self.args.batch / seconds,
                self.loader.waited / seconds,
            )
            self.mark, self.loader.waited, self.totals = (time.monotonic(), self.step + 1), 0.0, {}
            shown = {k: f"{v:.4g}" for k, v in means.items() if k != "gradient_norm"}
            self.bar.set_postfix(shown | {"clips/s": f"{speed:.3g}"})
            self.log(
                self.step + 1,
                **means,
                lr=self.optimizer.param_groups[0]["lr"],
                clips_per_second=speed,
                waiting=waiting,
                memory_gb=peak_memory(self.args.device) / 1e9,
            )

    def log(self, step, **row):
        if rank() > 0:
            return
        try:
            with open(self.args.out / "log.jsonl", "a") as f:
                f.write(
                    json.dumps({"step": step, "seconds": round(self.seconds(), 1), **row}) + "\n"
                )
        except OSError as e:
            reason = f"cannot be written ({e.strerror}); free some space, then --resume"
            raise TrainingError(f"{self.args.out}/log.jsonl: {reason}") from None

    def seconds(self):
        return self.elapsed + time.monotonic() - self.clock

    def save(self, due):
        """Validation, weights for `load`, training state: in this order, so that whatever moment a kill comes at, the
        state that is resumed from is never ahead of the rest. Only at steps where it is due is there validation: the log
        does not tell that a run was interrupted."""
        if rank() > 0:
            return
        out, pairs = self.args.out, []
        if self.held_out and due:
            start = time.monotonic()
            with torch.no_grad():
                numbers, pairs = self.validate(self.ema.model, self.held_out)
            self.log(self.step, **numbers)
            self.mark = (
                self.mark[0] + time.monotonic() - start,
                self.mark[1],
            )  # no part of training's speed
        model = self.export(self.ema.model) if self.export else self.ema.model
        # names alone: the folders of whoever trained are nobody's business who loads the file
        args = {k: v.name if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        metrics = [row for row in read_log(out) if any(name.startswith("val_") for name in row)][
            -1:
        ]
        about = {
            "step": self.step,
            "seconds": round(self.seconds(), 1),
            "torch": torch.__version__,
            "args": args,
            "commit": self.commit,
            "started_from": self.started_from,
            "metrics": metrics[0] if metrics else None,
        }
        save_model(
            out / STATES[0].replace("state.pt", "safetensors"),
            model,
            self.config,
            torch.float16 if self.args.half else torch.float32,
            **about,
        )
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.model.state_dict(),
            "updates": self.ema.updates,
            "step": self.step,
            "elapsed": self.seconds(),
            "totals": self.totals,
            "flags": self.flags(),
            "started_from": self.started_from,
        }
        with atomic_write(out / STATES[0]) as part:
            with open(part, "wb") as f:
                try:
                    torch.save(state, f)
                except RuntimeError as e:  # what torch makes of a disk that is full
                    raise OSError(f"no room, or {str(e).splitlines()[0][:80]}") from None
            if (out / STATES[0]).exists():
                os.replace(out / STATES[0], out / STATES[1])
        self.saved = self.step
        plot(out, pairs)

    def restore(self):
        state = newest_state(self.args.out)
        rank_then, rank_now = (
            int(lora) for lora in (state["flags"].get("lora", 0), getattr(self.args, "lora", 0))
        )
        if rank_then != rank_now:
            has = f"has --lora {rank_then}" if rank_then else "has no --lora"
            raise TrainingError(
                f"--resume: the run in {self.args.out} {has}; give the same command again with --resume"
            )
        with checkpoint_errors(f"{self.args.out}/{STATES[0]}", type(self.model)):
            self.model.load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.ema.updates, self.step = state["updates"], state["step"]
        self.elapsed, self.totals, self.started_from = (
            state["elapsed"],
            state["totals"],
            state.get("started_from"),
        )
        begun = state["flags"]["init"]
        self.args.init = (
            None if begun == "None" else Path(begun)
        )  # `settle` had put the run's own weights there
        noted = state["flags"].get("note", "None")
        self.args.note = self.args.note or (None if noted == "None" else noted)
        for name, value in self.flags().items():
            before = state["flags"].get(name, value)
            if value not in (before, "None") and rank() == 0:
                print(
                    f"{self.args.out}: going on with {name} {value}, until now {before}",
                    file=sys.stderr,
                )

    def flags(self):
        """What a resumed run should not change unnoticed, as text."""
        harmless = ("resume", "out", "data", "workers", "save_every", "half", "recompute")
        return {
            "clips": str(self.clips),
            **{k: str(v) for k, v in vars(self.args).items() if k not in harmless},
        }


def plot(out, pairs):
    """log.jsonl -> curves.png; validation spectrograms -> mels.png, references above."""
    try:
        with atomic_write(out / "curves.png") as part:
            plots.plot_curves(part, read_log(out))
        if pairs:
            with atomic_write(out / "mels.png") as part:
                plots.plot_mels(part, pairs)
    except Exception as error:  # of whatever kind: a picture is not worth losing a run over
        print(f"{out}: pictures not drawn ({error})", file=sys.stderr)
