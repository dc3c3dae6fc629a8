"""Peak memory of a training step of stages 1 and 2: predicted anywhere, measured on a GPU.

    python -m tools.training_memory                    the published size, without a GPU
    python -m tools.training_memory --measure          the same steps run on a GPU, beside it

A step is two micro-batches (so gradients exist while the second one's graph grows) of random data
through the stage's own loss, backward pass, fused AdamW and moving average, with bfloat16 autocast.
A micro-batch of stage 1 counts videos (three clips of 16 frames each at the published size), one of
stage 2 windows. For a prediction the step runs on fake tensors, which have shapes and no values, in
the dtypes of CUDA's autocast: every operation's output counts from when it is made until nothing
holds it. Our kernels allocate what they do on a GPU and are not launched, so attention keeps q, k,
v, its output and a number a row. GiB:

    state        weights, gradients, Adam's two moments, moving average, buffers
    activations  what autograd keeps of one micro-batch's forward pass, weights' bfloat16 copies too
    transient    the rest of the peak: with --recompute one block's own activations, or the weights'
                 bfloat16 copies, which autocast holds until the forward pass ends
    predicted    the peak, all three

Not counted: CUDA's own context, workspaces of cuDNN and cuBLAS, what the allocator rounds up and
cannot use. So a micro-batch "fits" a card if its peak leaves a tenth of it free. Needs Triton.
"""

import contextlib
import functools
import gc
import itertools
import json
import math
import os
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels

kernels.load()  # before the kernels' own files, which look for it

import cavp  # noqa: E402
import ldm  # noqa: E402
from common import audio, cli, distributed, training  # noqa: E402
from kernels import launch  # noqa: E402
from tools.speed import random_network  # noqa: E402

GIB = 2**30
USABLE = 0.9  # of a card, for a step
COLUMNS = (
    "stage",
    "micro-batch",
    "recompute",
    "state",
    "activations",
    "transient",
    "predicted",
    "measured",
    "seconds a step",
)
NETWORKS = {"cavp": cavp.CAVP, "ldm": ldm.LDM}
MODULES = {"cavp": cavp, "ldm": ldm}


# --------------------------------------------------------------------------------------------------
# the step


class Stage:
    """A stage's training as its `train` sets it up, on random data."""

    def __init__(self, model, recipe, recompute, device="cpu", dtype="bfloat16"):
        self.device = torch.device(device)
        flags = {"device": self.device.type, "dtype": dtype, "recompute": recompute}
        self.args = SimpleNamespace(**recipe | flags)
        self.contrastive = isinstance(model, cavp.CAVP)
        model.train().requires_grad_(True)
        if self.contrastive:
            blocks = cavp.Bottleneck3d, cavp.ConvBlock
            function = cavp.embed
        else:
            model.vae.requires_grad_(False)
            blocks = ldm.ResBlock, ldm.SpatialTransformer
            function = ldm.denoising_loss
        self.model = model
        self.optimizer = training.adamw([{"params": model.parameters()}], self.args)
        self.ema = training.EMA(model)
        training.recompute(self.args, model, *blocks)
        self.network = distributed.wrap_ddp(model, function)

    def trained(self):
        """Bytes of the trained weights, which are those of their gradients."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def chunk(self, n):
        """A micro-batch of stage 1, as the reader gives it."""
        config = self.model.config
        size = config.size
        columns = config.frames // config.video_pool * config.audio_pool * cavp.AUDIO_STEP
        rows = n * config.clips
        return cavp.Chunk(
            video=torch.zeros(rows, config.frames, 3, size, size, dtype=torch.uint8),
            mel=torch.rand(rows, audio.N_MELS, columns),
            mirrored=torch.rand(rows) < 0.5,
            gain=torch.ones(rows),
            label=None,
            anchor_weight=None,
            seed=0,
        )

    def features(self, chunk):
        """Stage 1's features of a micro-batch, with a graph."""
        if self.device.type == "cpu":
            # counts as the copy on a GPU
            chunk = chunk._replace(video=chunk.video.clone(), mel=chunk.mel.clone())
        return cavp.encode(self.args, self.network, self.device, chunk)

    def loss(self, n):
        """Stage 2's loss of a micro-batch, as `ldm.train` takes it."""
        config = self.model.config
        mel = torch.rand(n, audio.N_MELS, 8 * ldm.LATENT_SHAPE[2], device=self.device)
        posterior, noise = torch.randn(2, n, *ldm.LATENT_SHAPE, device=self.device)
        t = torch.full((n,), 500, device=self.device)
        features = torch.randn(n, config.frames, config.feature_dim, device=self.device)
        with training.autocast(self.args):
            z = ldm.latents(self.model.vae, mel, posterior)
            return self.network(z, t, noise, features)

    def batches(self, n, count=2):
        """Micro-batches of a step, in the CPU's memory; of stage 2, which are small, their size."""
        return [self.chunk(n) if self.contrastive else n for _ in range(count)]

    def forward(self, batch):
        """The graph of one micro-batch."""
        return self.features(batch) if self.contrastive else self.loss(batch)

    def step(self, batches):
        """Gradients of all micro-batches, then the update."""
        count = len(batches)
        if self.contrastive:
            # the rows of a chunk are counted in videos
            args = SimpleNamespace(micro_batch=len(batches[0].mel) // self.model.config.clips)
            run = SimpleNamespace(args=args, model=self.model, count=count)
            run.parts = functools.partial(training.TrainingRun.parts, run)
            loss_fn = functools.partial(
                cavp.contrast,
                weights=None,
                window_contrast=self.args.window_contrast,
                temporal=self.args.temporal_contrast,
            )
            training.cached_backward(run, self.network, self.features, batches, loss_fn)
        else:
            for n in batches:
                (self.loss(n) / count).backward()
        training.update(self.args, 0, self.optimizer, self.ema, self.model)


# --------------------------------------------------------------------------------------------------
# prediction


class Memory(TorchDispatchMode):
    """Bytes of all storages that operations have made and something still holds."""

    def __init__(self):
        super().__init__()
        self.known = {}  # storage's address: its finalizer
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = weakref.finalize(storage, self.drop, key, storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def drop(self, key, nbytes):
        del self.known[key]
        self.live -= nbytes


def kept_for_backward(model, forward):
    """Bytes that autograd keeps of forward(), each storage once, without the model's own."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        # held, so that no other storage takes its address
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = forward()
    del graph
    return sum(s.nbytes() for address, s in kept.items() if address not in own)


def layer_norm(self, x):
    """`nn.LayerNorm.forward` under CUDA's autocast, in float32."""
    return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


def dropout(x, p, training):
    """`F.dropout` as on a GPU: what is kept is a byte a value."""
    return torch.native_dropout(x, p, training)[0]


def upsample(self, x):
    """`nn.Upsample.forward` under CUDA's autocast, in float32."""
    return F.interpolate(x.float(), scale_factor=self.scale_factor, mode=self.mode)


@contextlib.contextmanager
def as_on_a_gpu(run=lambda *_, **__: None):
    """Tensors of a CPU meet what a GPU's would. run: of our kernels' launches; by default none."""
    swaps = (
        (kernels, "active", lambda *tensors: all(x.dtype in kernels.DTYPES for x in tensors)),
        (kernels, "mode", "triton"),  # errors are raised
        (launch.Launch, "run", run),
        (nn.LayerNorm, "forward", layer_norm),
        (nn.Upsample, "forward", upsample),
        (F, "dropout", dropout),
    )
    with contextlib.ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(mock.patch.object(*swap))
        yield


class Average:
    """In place of `training.EMA`: fake tensors cannot be deepcopied. The update is in place."""

    def __init__(self, model):
        averaged = [p for p in model.parameters() if p.requires_grad]
        self.copies = [x.detach().clone() for x in (*averaged, *model.buffers())]

    def update(self, model):
        pass


@contextlib.contextmanager
def fake_tensors():
    """New tensors have no values."""
    # a cache that would outlive them
    ldm.embedding_frequencies.cache_clear()
    average = mock.patch.object(training, "EMA", Average)
    with average, FakeTensorMode(allow_non_fake_inputs=True):
        yield
    ldm.embedding_frequencies.cache_clear()


def fake_network(name, preset="paper"):
    """In `fake_tensors`, as it lies on a GPU in training."""
    model = NETWORKS[name](MODULES[name].PRESETS[preset])
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


class Prediction:
    """Counts steps of a stage. In another `mode` than that of fake tensors they are real, for
    tests."""

    def __init__(self, name, preset, recompute, mode=fake_tensors, **how):
        self.mode = mode
        self.how = how
        self.memory = Memory()
        self.peaks = {}  # {micro-batch: bytes}
        with as_on_a_gpu(**how), mode(), self.memory:
            model = fake_network(name, preset)
            self.stage = Stage(model, MODULES[name].RECIPES[preset], recompute)
        batches = self.batches(1)
        # the first step makes Adam's moments
        with as_on_a_gpu(**how), mode(), self.memory:
            self.stage.step(batches)
        self.state = self.memory.live + self.stage.trained()

    def batches(self, n):
        """On a GPU they are no part of its memory, so they are not counted."""
        with self.mode():
            return self.stage.batches(n)

    def peak(self, n):
        """Bytes at the peak of a step with micro-batches of n."""
        if n not in self.peaks:
            batches = self.batches(n)
            with as_on_a_gpu(**self.how), self.mode(), self.memory:
                self.memory.peak = self.memory.live
                self.stage.step(batches)
            self.peaks[n] = self.memory.peak
        return self.peaks[n]

    def row(self, n):
        """{column: bytes}"""
        batch = self.batches(n)[0]
        with as_on_a_gpu(**self.how), self.mode():
            activations = kept_for_backward(self.stage.model, lambda: self.stage.forward(batch))
        transient = self.peak(n) - self.state - activations
        return {
            "state": self.state,
            "activations": activations,
            "transient": transient,
            "predicted": self.peak(n),
        }

    def largest(self, limit):
        """The largest micro-batch with a peak within `limit`; 0: none."""
        fits = 0
        fails = math.inf
        self.peak(2)
        guess = 1
        while fails - fits > 1:
            if self.peak(guess) <= limit:
                fits = guess
            else:
                fails = guess
            # peaks grow almost linearly: on the line through the two largest known
            (a, low), (b, high) = sorted(self.peaks.items())[-2:]
            guess = b + int((limit - high) // ((high - low) / (b - a)))
            guess = min(max(guess, fits + 1), fails - 1)
        return fits


@functools.cache
def predict(name, preset, recompute, sizes, cards):
    """-> {micro-batch: row of `Prediction`}, {card: the largest micro-batch that fits}"""
    prediction = Prediction(name, preset, recompute)
    rows = {n: prediction.row(n) for n in sizes}
    return rows, {card: prediction.largest(USABLE * card * GIB) for card in cards}


# --------------------------------------------------------------------------------------------------
# measurement


def measure(name, preset, recompute, sizes, steps=2):
    """Yields {"measured": bytes, "seconds": of a step} for each micro-batch, on a GPU."""
    module = MODULES[name]
    model = random_network(NETWORKS[name], module.PRESETS[preset], torch.float32, "cuda")
    stage = Stage(model, module.RECIPES[preset], recompute, "cuda")
    for n in sizes:
        try:
            batches = stage.batches(n)
            # compiles, and makes Adam's moments
            stage.step(batches)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(steps):
                stage.step(batches)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / steps
            yield {"measured": torch.cuda.max_memory_allocated(), "seconds": seconds}
        except torch.OutOfMemoryError:
            yield {"error": "out of memory"}
        stage.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# the table


def show(row):
    """A line of the table."""
    cells = [row["stage"], row["micro_batch"], "yes" if row["recompute"] else "no"]
    cells += [f"{row[k] / GIB:.2f}" for k in ("state", "activations", "transient", "predicted")]
    measured = f"{row['measured'] / GIB:.2f}" if "measured" in row else "not measured"
    cells.append(row.get("error", measured))
    cells.append(f"{row['seconds']:.3f}" if "seconds" in row else "not measured")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    p = cli.Parser("tools.training_memory", __doc__)
    p.add_argument("--stages", nargs="+", default=list(MODULES), choices=list(MODULES))
    p.add_argument("--preset", default="paper", choices=("paper", "mini"))
    p.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 16])
    p.add_argument(
        "--cards",
        type=int,
        nargs="*",
        default=[24, 80],
        help="GiB of the cards to fill; none: skip",
    )
    p.add_argument("--measure", action="store_true", help="run the steps too, on a GPU")
    p.add_argument("--out", type=Path, metavar="FILE", help="a line of JSON for each row")
    args = p.parse_args()
    if kernels.triton is None:
        p.error("Triton is not installed, whose kernels' memory is counted")
    if args.measure and not torch.cuda.is_available():
        p.error("--measure runs on an NVIDIA GPU, and there is none; leave it out to predict")

    device = torch.cuda.get_device_name() if args.measure else "no GPU"
    print(f"{device}, {kernels.describe()}; preset {args.preset}, bfloat16 autocast; GiB")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    cases = list(itertools.product(args.stages, (True, False)))
    # predictions take processors, measurements the GPU
    processes = (os.cpu_count() or 1) // 2
    spawn = get_context("spawn")
    with ProcessPoolExecutor(min(len(cases), max(1, processes)), spawn) as pool:
        predictions = []
        for name, recompute in cases:
            wanted = name, args.preset, recompute, tuple(args.micro_batches), tuple(args.cards)
            if args.measure or processes > 1:
                predictions.append(pool.submit(predict, *wanted).result)
            else:
                predictions.append(functools.partial(predict, *wanted))
        fits = []
        for (name, recompute), prediction in zip(cases, predictions, strict=True):
            measured = itertools.repeat({})
            if args.measure:
                measured = measure(name, args.preset, recompute, args.micro_batches)
            # the measurement first: meanwhile the prediction is made
            for n, found in zip(args.micro_batches, measured, strict=False):
                row = {"stage": name, "micro_batch": n, "recompute": recompute}
                row |= prediction()[0][n] | found
                show(row)
                if args.out:
                    with args.out.open("a") as lines:
                        print(json.dumps(row), file=lines)
            # the network of this case is freed before the next one's is made
            del measured
            gc.collect()
            fits.append((name, recompute, prediction()[1]))
    for name, recompute, largest in fits:
        for card, n in largest.items():
            how = "with" if recompute else "without"
            print(f"{name} {how} --recompute: at most {n} predicted to fit {card} GiB")


if __name__ == "__main__":
    main()
