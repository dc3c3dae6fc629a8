"""What the training loops share: flags, data order, optimizer step, log, checkpoints.

in   parsed arguments, a network, its configuration, a data set
out  OUT/last.safetensors   weights (the moving average) with the configuration in the header, what
                            `load` takes; also arguments, commit, SHA-256 of the initial weights,
                            date, seconds, the last validation, and whose the clips were
     OUT/last.state.pt      what --resume needs: raw weights, moving average, optimizer, step, as
                            tensors and numbers
     OUT/previous.state.pt  the one before, in case the last one is damaged
     OUT/log.jsonl          a line every 20 steps: loss terms, learning rate, gradient norm, clips a
                            second, share of the time spent waiting for data, memory; and a line of
                            validation at every save
     OUT/curves.png         the same as a picture
     OUT/mels.png           validation spectrograms, reference above, generated below
     OUT/left_out.csv       the files of --data that are not trained on, and why

    python vae.py --data clips/                        one process
    torchrun --nproc_per_node 8 vae.py --data clips/   eight, on as many GPUs, or on the CPU

Random numbers of a step come from a generator seeded with (--seed, step) and cover the global
batch, of which every process and micro-batch takes its rows. So the number of processes and the
size of micro-batches change no number, and a run that is killed and resumed continues bit for bit.
Files are written atomically and nothing is unpickled (`weights_only=True`).
"""

import argparse
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
from common.checkpoints import Checkpoint, checkpoint_errors, save_model
from common.distributed import all_gather, rank, world
from common.files import UserError, atomic_write, make_folder, sha256, write_bytes
from common.machine import computes_bfloat16, find_device, keep_freed_memory, peak_memory

STATES = ("last.state.pt", "previous.state.pt")
WEIGHTS = "last.safetensors"
LOG_EVERY = 20  # steps


class TrainingError(UserError):
    """A user's mistake or a run that cannot continue: one line with the remedy."""


# --------------------------------------------------------------------------------------------------
# flags that all stages share


def arguments(description: str, recipes: dict):
    """The parser with every flag of all training commands.

    recipes: {preset: {flag: value}}, the values of flags that are not given.
    """
    p = cli.Parser(None, description)
    p.add_argument("--data", type=Path, required=True, help="folder of clips, or a prepared set")
    p.add_argument("--out", type=Path, help="folder of the run; default runs/STAGE")
    p.add_argument(
        "--preset", choices=list(recipes), default="mini", help="network sizes and training recipe"
    )
    p.add_argument("--init", type=Path, help="start from these weights (ours or an official file)")
    p.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="NAME",
        help="freeze parameters whose names start with NAME",
    )
    p.add_argument("--resume", action="store_true", help="continue from OUT/last.state.pt")

    shown = []
    for name, recipe in recipes.items():
        values = ", ".join(f"{flag.replace('_', '-')} {value:g}" for flag, value in recipe.items())
        shown.append(f"{name}: {values}")
    g = p.add_argument_group("optimization; by default as in the preset: " + "; ".join(shown))
    g.add_argument("--steps", type=cli.number(int, 1), help="optimizer steps")
    g.add_argument(
        "--batch", type=cli.number(int, 1), help="clips in one step, of all processes together"
    )
    g.add_argument(
        "--micro-batch",
        type=cli.number(int, 1),
        help="clips in memory at once, of one process; else its share",
    )
    g.add_argument("--lr", type=cli.number(float, 0), help="peak learning rate")
    g.add_argument("--warmup", type=cli.number(int, 0), help="steps of linear warm-up")
    g.add_argument(
        "--grad-clip", type=cli.number(float, 0), help="clip the gradient norm to this; 0: off"
    )
    g.add_argument(
        "--seed", type=cli.number(int, 0), default=0, help="of weights, data order and noise"
    )

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
        help="recompute activations in the backward pass: less memory, a third more time",
    )
    g.add_argument(
        "--workers",
        type=cli.number(int, 0),
        help="data loading processes for each training process; default: 4 with a GPU, else 0",
    )
    g.add_argument(
        "--save-dtype",
        choices=("float16", "float32"),
        default="float32",
        help="of the matrices in OUT/last.safetensors; float16: half the size, loads the same",
    )
    g.add_argument(
        "--save-every",
        type=cli.number(int, 1),
        default=500,
        help="steps between checkpoints, with validation",
    )
    # kept in the header of the weights, for those that are published
    g.add_argument("--note", help=argparse.SUPPRESS)

    cli.renamed(p, "--clip", "--grad-clip", type=cli.number(float, 0))
    half = {"nargs": "?", "const": "float16", "choices": ("float16",)}
    cli.renamed(p, "--half", "--save-dtype", **half)
    return p


def beyond_the_paper(parser):
    """The group of flags that the published recipe does not have."""
    return parser.add_argument_group("beyond the paper; by default as in the preset")


def add_stage2_arguments(p):
    """Flags of both trainings on features and latents, the U-Net's and the classifier's."""
    p.add_argument(
        "--lora",
        type=cli.number(int, 0),
        default=0,
        metavar="RANK",
        help="train the conditioner, and adapters of this rank on the matrices of the transformer "
        "blocks, which are merged into the saved weights; 0: train everything",
    )
    p.add_argument(
        "--merge",
        type=cli.number(float, 0, 1),
        help="share of samples joined from two clips (split-and-merge augmentation)",
    )
    g = beyond_the_paper(p)
    g.add_argument(
        "--repeats", type=cli.number(int, 1), help="diffusion times of each encoded clip in a step"
    )
    g.add_argument(
        "--roll",
        type=cli.number(float, 0, 1),
        help="share of samples whose sound and video are rotated in time",
    )
    return g


# --------------------------------------------------------------------------------------------------
# before a run


class AtMost(int):
    """A preset's micro-batch: lowered where it does not divide a process's share of the batch."""


def resolve_defaults(args, recipes: dict, stage: str):
    """Fill in what the user left to the preset and to the machine."""
    # the preset
    for name, value in recipes[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, AtMost(value) if name == "micro_batch" else value)
    args.out = args.out or Path("runs") / stage

    # the machine
    try:
        args.device = find_device(args.device).type
    except ValueError as error:
        raise TrainingError(f"--{error}") from None
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_bfloat16(args.device) else "float32"
    if args.workers is None:
        args.workers = 4 if args.device == "cuda" else 0


def check_batch(args, at_least: int = 1):
    """Divide --batch among the processes, and each one's share into equal micro-batches.

    Raises TrainingError where either does not divide, and for fewer clips than `at_least`.
    """
    if args.batch < at_least:
        raise TrainingError(
            f"--batch {args.batch} has no other clip for the wrong pairs; give at least {at_least}"
        )
    share, rest = divmod(args.batch, world())
    if rest:
        raise TrainingError(
            f"--batch {args.batch} does not divide among {world()} processes; "
            "give a multiple of them"
        )
    # the largest divisor of the share that fits
    wanted = args.micro_batch or share
    largest = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, wanted))
    if not isinstance(wanted, AtMost) and largest < wanted < share:
        raise TrainingError(
            f"--micro-batch {wanted} does not divide the {share} clips of a process; give {largest}"
        )
    args.micro_batch = largest


def check_run_folder(args):
    """A run starts in a folder without one, or continues with --resume. Raises TrainingError."""
    has_run = any((args.out / name).exists() for name in STATES)
    if args.resume and not has_run:
        raise TrainingError(
            f"--resume: {args.out} holds no run; start one without, or name it with --out"
        )
    if has_run and not args.resume:
        raise TrainingError(
            f"{args.out}: holds a run already; add --resume to go on, or give another --out"
        )
    weights = args.out / WEIGHTS
    if args.resume and weights.exists():
        # for the network's configuration; the numbers come from the training state
        args.init = weights


def set_up(args):
    """Allocator and random numbers of this process. -> its device"""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    return torch.device(args.device, torch.cuda.current_device() if args.device == "cuda" else None)


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def freeze(args, model):
    """Freeze the parameters of --freeze, and the norms' statistics of parts that are frozen whole.

    Raises TrainingError for a name that no parameter starts with, and if nothing is left to train.
    """
    for prefix in args.freeze:
        frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            # the first two levels say enough
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise TrainingError(
                f"--freeze {prefix}: no parameter's name starts so; they start with "
                + ", ".join(parts)
            )
        for p in frozen:
            p.requires_grad_(False)

    # eval mode keeps running statistics as they are
    for part in model.modules():
        trained = [p.requires_grad for p in part.parameters()]
        if trained and not any(trained):
            part.eval()
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("--freeze: nothing is left to train; name fewer parts")


def recompute(args, model, *blocks: type):
    """With --recompute, blocks of these classes keep only their input for the backward pass."""
    if not args.recompute:
        return
    for part in model.modules():
        if isinstance(part, blocks):
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


# --------------------------------------------------------------------------------------------------
# adapters


class LoRA(nn.Module):
    """A matrix plus a trained one of low rank, zero at first (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.up @ self.down


def add_lora(model, rank: int, *blocks: type):
    """Freeze a model and give every matrix in its blocks of these classes a LoRA to train."""
    model.requires_grad_(False)
    # a list first: registering changes the modules that are iterated over
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
    """-> a copy with the adapters merged into their matrices: the keys and shapes of `load`.

    All other weights are shared with the given model. torch's own remove_parametrizations would
    take the weight from the class, which both share too.
    """
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in [layer for layer in model.modules() if parametrize.is_parametrized(layer)]:
        weight = layer.weight.detach()
        plain = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = plain
        layer.weight = nn.Parameter(weight)
    return model


# --------------------------------------------------------------------------------------------------
# random numbers and data order


def seed_of(*numbers: int):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator(args, step: int):
    """For all random numbers of a step; on the CPU, the same for every device and process."""
    return torch.Generator().manual_seed(seed_of(args.seed, step))


def shuffled(length: int, batch: int, seed: int, first_step: int):
    """Endless indices of this process's share of every batch, from `first_step` on.

    Epoch e is a permutation of the data set seeded with (seed, e). Its indices are e * length + i,
    so that a data set can take its own random numbers from the index alone.
    """
    share = batch // world()  # consecutive rows of the batch, in order of rank
    epoch = -1
    for step in itertools.count(first_step):
        start = step * batch + rank() * share
        for position in range(start, start + share):
            if position // length != epoch:
                epoch = position // length
                rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(length, generator=rng).tolist()
            yield epoch * length + order[position % length]


def train_val_split(reader):
    """reader(split=...) -> training clips, validation clips or None if their split is empty."""
    clips = reader(split="train")
    try:
        return clips, reader(split="val")
    except UserError:
        return clips, None


def ignore_signals(parent_exits, _worker):
    """Workers ignore Ctrl-C and SIGTERM until the parent exits; after that SIGTERM ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if parent_exits.value else None)


class Batches:
    """Endless iterator over this process's micro-batches, the same for any number of workers.

    waited: seconds that training has waited for data.
    """

    def __init__(self, dataset, args, first_step=0):
        self.waited = 0.0
        parent_exits = multiprocessing.RawValue("b", 0)
        # runs before multiprocessing's own handler, which ends the workers
        atexit.register(setattr, parent_exits, "value", 1)
        loader = torch.utils.data.DataLoader(
            dataset,
            args.micro_batch,
            sampler=shuffled(len(dataset), args.batch, args.seed, first_step),
            # a generator of its own: nothing may depend on the global one
            generator=torch.Generator().manual_seed(args.seed),
            num_workers=args.workers,
            worker_init_fn=functools.partial(ignore_signals, parent_exits),
            pin_memory=args.device == "cuda",
            persistent_workers=args.workers > 0,
        )
        self.batches = iter(loader)

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        batch = next(self.batches)
        self.waited += time.monotonic() - start
        return batch


# --------------------------------------------------------------------------------------------------
# a step


class EMA:
    """Exponential moving average of the weights; frozen parameters are shared, not copied.

    The decay warms up, so that the average of a short run is not one of noise.
    """

    def __init__(self, model, decay=0.999):
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        # warm-up
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        means = []
        latest = []
        now = model.state_dict()
        for name, mean in self.model.state_dict().items():
            if not mean.is_floating_point():
                mean.copy_(now[name])  # a counter
            elif mean.data_ptr() != now[name].data_ptr():  # not frozen
                means.append(mean)
                latest.append(now[name])
        get_ema_multi_avg_fn(decay)(means, latest, self.updates)


def adamw(groups: list, args, **options):
    """AdamW, fused into one pass, over the parameters that are not frozen."""
    trained = []
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        if parameters:
            trained.append({**group, "params": parameters})
    return torch.optim.AdamW(trained, args.lr, fused=True, **options)


def learning_rate(step: int, args, final=0.0):
    """Linear warm-up to --lr, then a cosine to `final` times it (1.0: constant, as in stage 2)."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def update(args, step: int, optimizer, ema, model, final=0.0):
    """One step of optimizer and average, with --grad-clip. -> gradient norm before clipping"""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args, final)
    # an infinite limit only measures the norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update(model)
    return norm


# --------------------------------------------------------------------------------------------------
# gradient cache


def running_stats(model):
    """Running means and variances of all BatchNorms that are in training."""
    stats = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.training:
            stats += [module.running_mean, module.running_var]
    return stats


def merge_running_stats(after: list, before: list, chunks: int):
    """Running statistics as if one process had seen all chunks, in order of rank; in place.

    Each of R processes has updated the same s_0 = `before` to s_r = `after` by its c = `chunks`
    chunks, with BatchNorm's momentum of 0.1.
    """
    if world() == 1 or not after:
        return
    # s_R = 0.9^(R c) s_0 + sum_r 0.9^(c (R-1-r)) (s_r - 0.9^c s_0)
    keep = 0.9**chunks
    own = torch.cat([a - keep * b for a, b in zip(after, before, strict=True)])
    own = own * keep ** (world() - 1 - rank())
    dist.all_reduce(own)
    updates = own.split([len(b) for b in before])
    for a, b, update in zip(after, before, updates, strict=True):
        a.copy_(keep ** world() * b + update)


def cached_backward(run, network, encode, chunks: list, loss_fn, label_weight=0.0):
    """Gradient of a loss over the features of the global batch, in the memory of one chunk.

    Gradient cache (Gao et al. 2021, arXiv 2101.06983).
    encode(chunk) -> video, audio: features (n, ...); scale: of their products; label_loss: a sum
    over the chunk, weighted by `label_weight`, or None. Its random numbers must repeat when it is
    called again. network: what `encode` runs, as `distributed.wrap_ddp` made it.
    loss_fn(video, audio, scale) -> loss, {name: term to report}. Returns the terms.
    """
    stats = running_stats(run.model)
    stats_before = [s.clone() for s in stats]
    single = len(chunks) == 1  # then its graph is kept, and the third pass uses it

    # 1. features of every chunk, without a graph
    with torch.set_grad_enabled(single):
        cached = [encode(chunk) for chunk in chunks]
    buffers = [b.clone() for b in run.model.buffers()]

    # 2. the loss over the features of all processes, and its gradient with respect to them
    video = all_gather(torch.cat([f.video.detach() for f in cached])).requires_grad_()
    audio = all_gather(torch.cat([f.audio.detach() for f in cached])).requires_grad_()
    scale = cached[0].scale.detach().requires_grad_()
    loss, terms = loss_fn(video, audio, scale)
    grad_video, grad_audio, grad_scale = torch.autograd.grad(loss, (video, audio, scale))

    # 3. every chunk again, with a graph, given its rows of that gradient
    for chunk, rows in run.parts(network, chunks):
        f = cached[0] if single else encode(chunk)
        surrogate = (f.video * grad_video[rows]).sum() + (f.audio * grad_audio[rows]).sum()
        if label_weight:
            surrogate = surrogate + label_weight * f.label_loss
        # processes average their gradients, but each feature is in one of them alone
        surrogate = surrogate * world() + f.scale * grad_scale
        surrogate.backward()
        grad_scale = torch.zeros_like(grad_scale)  # all chunks share the scale: counted once

    # norms have seen every chunk twice, which must count once
    for buffer, value in zip(run.model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    merge_running_stats(stats, stats_before, len(chunks))

    if label_weight:
        label_losses = all_gather(torch.stack([f.label_loss.detach() for f in cached]))
        terms["label"] = label_weight * label_losses.sum()
        terms["loss"] = terms["loss"] + terms["label"]
    return terms


# --------------------------------------------------------------------------------------------------
# a run


def newest_state(out: Path):
    """The last undamaged training state of a run; torch.save's zip archive has checksums.

    Raises TrainingError if there is none.
    """
    unreadable = (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError)
    for path in (out / name for name in STATES):
        if not path.exists():
            continue
        with contextlib.suppress(*unreadable):
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
        f"--resume: no complete {STATES[0]} in {out}; give another --out to start anew"
    )


def commit():
    """Git commit of this code, with "-dirty" if files differ; None without a checkout or git."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(
            ["git", "-C", Path(__file__).parent, *describe], capture_output=True, text=True
        )
        return done.stdout.strip() or None


def describe_data(summary: dict, initial: dict):
    """What the weights' header says of their data.

    summary: of the clips that a run trains on, a data set's `data_summary`; initial: {flag: file}
    of the weights that it starts from. -> the summary, and under "earlier" {flag: the same of that
    file, or None where it has none}
    """
    earlier = {}
    for flag, path in initial.items():
        known = Checkpoint(path).metadata.get("data")
        earlier[flag] = known if isinstance(known, dict) else None
    return {**summary, "earlier": earlier}


def read_log(out: Path):
    """The rows of log.jsonl, without a last line that a kill cut short."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (out / "log.jsonl").read_text().splitlines():
            rows.append(json.loads(line))
    return rows


def plot(out: Path, pairs: list):
    """log.jsonl -> curves.png; [(reference, generated) mels] -> mels.png."""
    try:
        with atomic_write(out / "curves.png") as part:
            plots.plot_curves(part, read_log(out))
        if pairs:
            with atomic_write(out / "mels.png") as part:
                plots.plot_mels(part, pairs)
    except Exception as error:  # any: a picture is not worth losing a run
        print(f"{out}: pictures not drawn ({error})", file=sys.stderr)


class TrainingRun:
    """Micro-batches, progress, log, validation, saving and resuming of one training run.

        run = TrainingRun(args, model, optimizer, config, ema, clips, held_out, validate)
        for step in run:                            # from 0 or the resumed step; saves when due
            for batch, rows in run.parts(network):  # micro-batch, its rows of the global batch
                loss = network(...)
                (loss / run.count).backward()
                run.add(loss=loss)
            run.report(gradient_norm=update(...))

    held_out: validation clips, or None
    validate(model, held_out) -> {name: number}, [(reference, generated) mels (128, s)]; called
        without gradients on the averaged weights
    export(model) -> the model to write for `load`, where it differs from the trained one
    """

    def __init__(self, args, model, optimizer, config, ema, clips, held_out, validate, export=None):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.ema = ema
        self.dataset_size = len(clips)
        self.held_out = held_out
        self.validate = validate
        self.export = export
        self.count = args.batch // world() // args.micro_batch  # micro-batches of a step
        self.step = 0
        self.elapsed = 0.0  # seconds before a resume
        self.terms = {}  # of the step
        self.totals = {}  # {name: values of the steps since the last line of the log}
        self.stop_asked = False  # in this process
        self.stopped = False  # in all of them
        self.commit = None
        self.started_from = None
        self.data = None  # `describe_data`
        if args.resume:
            self.restore()
        self.saved_step = self.step
        if rank() == 0:
            self.prepare_folder(clips.left_out)
            self.record_data(clips.data_summary())
            self.print_summary(clips.left_out)
        self.loader = Batches(clips, args, self.step)

    def prepare_folder(self, left_out):
        """Write what can be written now, so that an unwritable folder fails before the work."""
        args = self.args
        out = make_folder(args.out)
        # what a killed process left
        for part in out.glob(".*.part*"):
            part.unlink()
        # now: the code may be edited while it runs
        self.commit = commit()
        if self.started_from is None:
            given = {name: getattr(args, name, None) for name in ("init", "vae", "align")}
            self.started_from = {
                name: sha256(path) for name, path in given.items() if path and path.is_file()
            }
        # steps after the checkpoint are repeated
        rows = read_log(out) if args.resume else []
        lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
        write_bytes(out / "log.jsonl", "".join(lines).encode())
        if left_out:
            table = io.StringIO()
            csv.writer(table).writerows([("name", "reason"), *left_out])
            write_bytes(out / "left_out.csv", table.getvalue().encode())

    def record_data(self, summary):
        """What the header will say of the data; if a resumed run has other data, of both."""
        if self.data is None:
            given = {name: getattr(self.args, name, None) for name in self.started_from}
            files = {name: path for name, path in given.items() if path and path.is_file()}
            self.data = describe_data(summary, files)
            return
        before = {key: value for key, value in self.data.items() if key != "earlier"}
        earlier = self.data["earlier"]
        if before != summary:
            earlier = {**earlier, f"until step {self.step}": before}
        self.data = {**summary, "earlier": earlier}

    def print_summary(self, left_out):
        args = self.args
        millions = {True: 0.0, False: 0.0}
        for p in self.model.parameters():
            millions[p.requires_grad] += p.numel() / 1e6
        validation = len(self.held_out) if self.held_out else 0
        facts = {
            "device": f"{args.device}, {args.dtype}",
            "processes": f"{world()}, of {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "parameters": f"{millions[True]:.1f} M trained, {millions[False]:.1f} M frozen",
            "clips": f"{self.dataset_size} for training, {validation} for validation",
            "without a license": f"{self.data['without_license']:.1%}",
            "left out": f"{len(left_out)}, see {args.out / 'left_out.csv'}" if left_out else "none",
            "steps": f"{self.step} to {args.steps}",
            "batch": f"{args.batch} clips, {args.micro_batch} at once",
        }
        print(args.out)
        for name, value in facts.items():
            print(f"  {name}: {value}", flush=True)

    def __iter__(self):
        """Steps. Ctrl-C or SIGTERM, in any process, ends all after the current step, saved."""

        # a flag only: the step in progress must not be interrupted
        def ask(*_):
            self.stop_asked = True

        out = self.args.out
        first = self.step
        handlers = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(
            total=self.args.steps,
            initial=first,
            desc=out.name,
            dynamic_ncols=True,
            disable=rank() > 0,
        )
        self.started = time.monotonic()
        self.interval_start = self.started  # of the next line of the log
        self.interval_step = first
        # the loop itself; the body of the caller's `for` runs at `yield`
        try:
            while self.step < self.args.steps and not self.stopped:
                yield self.step
                self.step += 1
                self.bar.update()
                if self.step - first == 10 and rank() == 0:
                    pace = (time.monotonic() - self.started) / 10
                    minutes = (self.args.steps - self.step) * pace / 60
                    self.bar.write(f"{out}: {pace:.2f} s a step, {minutes:.0f} minutes to go")
                due = self.step % self.args.save_every == 0 or self.step == self.args.steps
                if (due or self.stopped) and rank() == 0:
                    self.save(due)
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopped and rank() == 0:
            print(f"{out}: stopped after step {self.step}; go on with --resume", file=sys.stderr)

    def parts(self, network, source=None):
        """(micro-batch, its rows of the global batch), from the data set or a list.

        Processes exchange gradients in the last one only.
        """
        size = self.args.micro_batch
        # `range` first: zip takes no batch from an endless loader after the last number
        for i, batch in zip(range(self.count), source or self.loader, strict=False):
            first = (rank() * self.count + i) * size
            last = i == self.count - 1
            # `no_sync` adds gradients up in this process
            with contextlib.nullcontext() if last or world() == 1 else network.no_sync():
                yield batch, slice(first, first + size)

    def add(self, **terms):
        """Loss terms of one micro-batch; the step's are their means."""
        for k, v in terms.items():
            self.terms[k] = self.terms.get(k, 0) + v.detach().float() / self.count

    def report(self, **values):
        """Ends a step: adds its numbers to the log and the bar.

        Raises TrainingError for a loss or gradient that is not finite, before anything is saved.
        """
        means = self.mean_of_processes(values)
        if not all(map(math.isfinite, means.values())):
            if self.saved_step:
                remedy = f"go on from step {self.saved_step} with --resume and a lower --lr"
            else:
                remedy = "nothing is saved yet; start again with a lower --lr"
            raise TrainingError(
                f"step {self.step + 1}: the loss or its gradient is not finite; {remedy}"
            )
        for k, v in means.items():
            self.totals.setdefault(k, []).append(v)
        if (self.step + 1) % LOG_EVERY == 0 or self.step + 1 == self.args.steps:
            self.log_interval()

    def mean_of_processes(self, values):
        """{name: number} of the step. The same exchange agrees on whether to stop."""
        values = self.terms | {k: v.detach().float() for k, v in values.items()}
        self.terms = {}
        # one tensor for one exchange, and one synchronization with the GPU
        device = next(iter(values.values())).device
        stop_asked = torch.tensor(float(self.stop_asked), device=device)
        numbers = torch.stack([*values.values(), stop_asked])
        if world() > 1:
            dist.all_reduce(numbers)
        *means, stop_asked = (numbers / world()).tolist()
        self.stopped = stop_asked > 0
        return dict(zip(values, means, strict=True))

    def log_interval(self):
        """Mean terms and speed since the last line, to log and bar."""
        step = self.step + 1
        means = {k: sum(v) / len(v) for k, v in self.totals.items()}
        seconds = time.monotonic() - self.interval_start
        speed = (step - self.interval_step) * self.args.batch / seconds
        waiting = self.loader.waited / seconds

        # the next interval
        self.interval_start += seconds
        self.interval_step = step
        self.loader.waited = 0.0
        self.totals = {}

        shown = {k: f"{v:.4g}" for k, v in means.items() if k != "gradient_norm"}
        self.bar.set_postfix(shown | {"clips/s": f"{speed:.3g}"})
        self.log(
            step,
            **means,
            lr=self.optimizer.param_groups[0]["lr"],
            clips_per_second=speed,
            waiting=waiting,
            memory_gb=peak_memory(self.args.device) / 1e9,
        )

    def log(self, step, **row):
        """Append a line to log.jsonl. Raises TrainingError if that fails."""
        if rank() > 0:
            return
        line = json.dumps({"step": step, "seconds": round(self.seconds(), 1), **row})
        try:
            with open(self.args.out / "log.jsonl", "a") as f:
                f.write(line + "\n")
        except OSError as e:
            reason = f"cannot be written ({e.strerror}); free some space, then --resume"
            raise TrainingError(f"{self.args.out}/log.jsonl: {reason}") from None

    def seconds(self):
        """Of the whole run, with those before a resume."""
        return self.elapsed + time.monotonic() - self.started

    def save(self, due):
        """Validation, weights, training state: in this order, so that whenever a kill comes, the
        state to resume from is never ahead of the rest.

        Validation only where a checkpoint is `due`: the log is the same if the run is interrupted.
        """
        pairs = []  # of spectrograms
        if self.held_out and due:
            start = time.monotonic()
            with torch.no_grad():
                numbers, pairs = self.validate(self.ema.model, self.held_out)
            self.log(self.step, **numbers)
            self.interval_start += time.monotonic() - start  # no part of training's speed
        self.write_weights()
        self.write_state()
        self.saved_step = self.step
        plot(self.args.out, pairs)

    def write_weights(self):
        out = self.args.out
        model = self.export(self.ema.model) if self.export else self.ema.model
        # only the names of paths: the folders of whoever trained are private
        args = {k: v.name if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        validations = [row for row in read_log(out) if any(k.startswith("val_") for k in row)]
        metadata = {
            "step": self.step,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(self.seconds(), 1),
            "torch": torch.__version__,
            "args": args,
            "commit": self.commit,
            "started_from": self.started_from,
            "data": self.data,
            "metrics": validations[-1] if validations else None,
        }
        dtype = getattr(torch, self.args.save_dtype)
        save_model(out / WEIGHTS, model, self.config, dtype, **metadata)

    def write_state(self):
        last, previous = (self.args.out / name for name in STATES)
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
            "data": self.data,
        }
        # at every moment one of the two names holds a complete state
        with atomic_write(last) as part:
            with open(part, "wb") as f:
                try:
                    torch.save(state, f)
                except RuntimeError as e:  # what torch makes of a full disk
                    raise OSError(f"no room, or {str(e).splitlines()[0][:80]}") from None
            if last.exists():
                os.replace(last, previous)

    def restore(self):
        """Continue from the newest training state. Raises TrainingError, CheckpointError."""
        args = self.args
        state = newest_state(args.out)
        flags = state["flags"]

        # adapters are parameters of their own: their shapes must agree
        lora = int(flags.get("lora", 0))
        if lora != getattr(args, "lora", 0):
            has = f"has --lora {lora}" if lora else "has no --lora"
            raise TrainingError(
                f"--resume: the run in {args.out} {has}; give the same command again with --resume"
            )
        with checkpoint_errors(f"{args.out}/{STATES[0]}", type(self.model)):
            self.model.load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.ema.updates = state["updates"]
        self.step = state["step"]
        self.elapsed = state["elapsed"]
        self.totals = state["totals"]
        self.started_from = state.get("started_from")
        self.data = state.get("data")

        # `check_run_folder` has put the run's own weights there
        args.init = None if flags["init"] == "None" else Path(flags["init"])
        # once given, a note stays
        if not args.note and flags.get("note", "None") != "None":
            args.note = flags["note"]
        # other changes are allowed, but not silent
        for name, value in self.flags().items():
            before = flags.get(name, value)
            if value not in (before, "None") and rank() == 0:
                print(
                    f"{args.out}: going on with {name} {value}, until now {before}",
                    file=sys.stderr,
                )

    def flags(self):
        """What a resumed run should not change unnoticed, as text."""
        harmless = ("resume", "out", "data", "workers", "save_every", "save_dtype", "recompute")
        flags = {k: str(v) for k, v in vars(self.args).items() if k not in harmless}
        return {"dataset_size": str(self.dataset_size), **flags}
