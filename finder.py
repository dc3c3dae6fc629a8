"""Finds hits in how the picture moves: a small network on block motion (common/motion.py).

in   for training: clips with labels, as foley.py makes, or with sound alone, whose onsets then are
     the labels; then block motion int8 (f, 5, 12, 12) at 25 frames a second
out  OUT/last.safetensors; log odds of a hit in each frame

    python finder.py --data clips/               a quarter of an hour on two cores for 3,200 clips

It stands beside the onset head of stage 2 (common/controls.py), which knows the features of stage 1
alone. These were learned on drawn pictures, and recorded ones have other textures and light. Motion
has neither, so what is learned from drawn clips holds better for recorded ones: see
docs/real-footage.md. Up and down are kept apart, since things fall and are struck downwards.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from common import audio, controls, distributed, media, motion, rights, training
from common.checkpoints import load_network

SPAN = 128  # frames of an item in training
MINUTE = 60 * motion.FPS  # frames that are read at once
# frames on each side that the log odds of one depend on: eight of the network's, and those of a
# picture held before them
REACH = 8 + 1 + motion.LONGEST_HELD
WIDTH = 0.035  # seconds, standard deviation of the bump that an onset is in the target
ONSET_WEIGHT = 2.0  # in the loss, of a frame with an onset
# added to the root mean square that a clip is divided by, which is 0 where nothing moves
STILL = 0.02  # pixels a frame
DARK = 0.5  # gray levels a frame

RECIPES = {
    "mini": {
        "steps": 2000,
        "batch": 8,
        "micro_batch": 8,
        "lr": 2e-3,
        "warmup": 50,
        "grad_clip": 1,
    }
}


# --------------------------------------------------------------------------------------------------
# the network


@dataclass(frozen=True)
class FinderConfig:
    width: int = 24
    hidden: int = 48


class Finder(nn.Module):
    """Block motion (b, f, 5, rows, cols) -> log odds of a hit (b, f) float32."""

    def __init__(self, config: FinderConfig):
        super().__init__()
        self.config = config
        width = config.width
        # where it is: a frame for itself
        self.near = nn.Conv2d(7, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 3, padding=1, stride=2)
        # how it goes on in time, each place for itself
        self.before = nn.Conv1d(width, width, 5, padding=2)
        self.after = nn.Conv1d(width, width, 5, padding=2)
        # of all places together
        self.all = nn.Conv1d(2 * width, config.hidden, 5, padding=2)
        self.last = nn.Conv1d(config.hidden, config.hidden, 5, padding=2)
        self.odds = nn.Conv1d(config.hidden, 1, 1)

    def forward(self, blocks):
        b, f = blocks.shape[:2]
        x = inputs(blocks.to(self.odds.weight.dtype))
        x = F.silu(self.near(x.flatten(0, 1)))
        x = F.silu(self.wide(x))  # (b f, width, rows / 2, cols / 2)
        # places into the batch, (b places, width, f)
        places = x.shape[2] * x.shape[3]
        x = x.unflatten(0, (b, f)).flatten(3).permute(0, 3, 2, 1).flatten(0, 1)
        x = x + F.silu(self.before(x))
        x = x + F.silu(self.after(x))
        # mean and maximum over places
        x = x.unflatten(0, (b, places))
        x = torch.cat([x.mean(1), x.amax(1)], 1)
        x = F.silu(self.all(x))
        x = x + F.silu(self.last(x))
        return self.odds(x)[:, 0].float()

    def read(self, path, start: float, seconds: float):
        """Log odds of a hit in a video, float32 (ceil(FPS * seconds),) in numpy.

        Memory does not grow with length; each minute is scaled by its own motion. Raises
        MediaError.
        """
        return self.read_parts(minutes(path, start, seconds))

    @torch.no_grad()
    def read_parts(self, parts):
        """`read` of block motion that `minutes` has yielded."""
        device = self.odds.weight.device
        odds = [self(blocks[None].to(device))[0, kept].cpu().numpy() for blocks, kept in parts]
        return np.concatenate(odds)

    @classmethod
    def load(cls, path, device="cpu"):
        """The network of a file that training wrote, for use; CheckpointError for any other."""
        return load_network(cls, path, FinderConfig(), device).requires_grad_(False)


def minutes(path, start: float, seconds: float):
    """Yields the block motion of a video minute by minute: int8 (f, 5, rows, cols), and a slice.

    The slice selects the minute's own frames; those around it are context that log odds depend on.
    The slices together have ceil(FPS * seconds) frames. Raises MediaError.
    """
    count = math.ceil(motion.FPS * seconds - 1e-6)
    for first in range(0, count, MINUTE):
        low = max(0, first - REACH)
        high = min(count, first + MINUTE + REACH)
        blocks = media.clip_motion(path, start + low / motion.FPS, (high - low) / motion.FPS)
        yield blocks, slice(first - low, first - low + MINUTE)


def inputs(blocks):
    """Block motion (b, f, 5, rows, cols) as float -> (b, f, 7, rows, cols).

    Both velocities, the speed before, the speed that is lost along the way it came (all of it where
    a thing is stopped, more than all where it bounces, none where it goes on) and the difference;
    each relative to the clip's root mean square, on a logarithmic scale: clips differ in how much
    of the picture moves, and how far.
    """
    velocities = blocks[:, :, :4] / motion.SPEED
    before = velocities[:, :, :2]
    after = velocities[:, :, 2:]
    speed = before.norm(dim=2, keepdim=True)
    # of the velocity after it, what still goes the same way
    kept = (before * after).sum(2, keepdim=True) / speed.clamp_min(0.5)
    lost = (speed - kept).clamp_min(0)
    moving = torch.cat([velocities, lost, speed], 2)
    scale = velocities.square().sum(2).mean((1, 2, 3)).sqrt() + STILL
    moving = moving / (4 * scale.view(-1, 1, 1, 1, 1))

    change = blocks[:, :, 4:] / motion.LEVEL
    scale = change.square().mean((1, 2, 3, 4)).sqrt() + DARK
    change = change / (4 * scale.view(-1, 1, 1, 1, 1))
    x = torch.cat([moving, change], 2)
    return x.sign() * x.abs().log1p()


# --------------------------------------------------------------------------------------------------
# what training makes of a clip; all of block motion, float32 (f, 5, rows, cols)


def mirrored(blocks):
    """Left and right exchanged."""
    blocks = blocks[..., ::-1].copy()
    blocks[:, [1, 3]] *= -1
    return blocks


def shrunk(blocks, rng):
    """At half the size, somewhere in a still picture: as if it were farther away."""
    f, channels, rows, cols = blocks.shape
    small = blocks.reshape(f, channels, rows // 2, 2, cols // 2, 2).mean((3, 5))
    top, left = rng.integers((rows // 2 + 1, cols // 2 + 1))
    out = np.zeros_like(blocks)
    out[:, :, top : top + rows // 2, left : left + cols // 2] = small
    return out


def smoothed(blocks, rng):
    """Its motion as a slow drift that never stops suddenly, so that no sound follows; elsewhere."""
    span = 2 * int(rng.integers(4, 13)) + 1
    kernel = np.ones(span, np.float32) / span

    def average(track):
        return np.convolve(track, kernel, "same")

    after = 2.5 * np.apply_along_axis(average, 0, blocks[:, 2:4])
    change = 2 * np.apply_along_axis(average, 0, blocks[:, 4:])
    before = np.concatenate([after[:1], after[:-1]])
    drift = np.concatenate([before, after, change], 1).astype(np.float32)
    return np.roll(drift, tuple(rng.integers(blocks.shape[2:])), (2, 3))


def laid_over(blocks, others):
    """`others` in front of `blocks`, where they move or change."""
    moves = np.abs(others[:, :4]).sum(1, keepdims=True) > 2
    changes = others[:, 4:] > 2 * motion.LEVEL
    return np.where(moves | changes, others, blocks)


def shaken(blocks, rng):
    """As a camera sees it that is moved about."""
    frames = len(blocks)
    kernel = np.ones(9) / 9
    steps = rng.standard_normal((2, frames + 9))
    path = np.stack([np.convolve(track, kernel, "valid") for track in steps], 1)  # (f + 1, 2)
    most = 8 * max(0.0, rng.random() - 0.4)
    camera = np.round(3 * most * path)[..., None, None]
    out = blocks.copy()
    out[:, 0:2] += camera[:-1]
    out[:, 2:4] += camera[1:]
    return out


def mismatched(blocks, rng):
    """With blocks that are not found again, and others that are found in the wrong place."""
    where = (len(blocks), 1, *blocks.shape[2:])
    out = blocks.copy()
    found = rng.random(where) > 0.2 * rng.random()
    out[:, :4] *= found
    wrong = rng.random(where) < 0.06 * rng.random()
    most = motion.SPEED * motion.REACH
    elsewhere = rng.integers(-most, most + 1, out[:, :4].shape)
    out[:, :4] = np.where(wrong, elsewhere, out[:, :4])
    return out


def target(onsets, first: int, frames: int):
    """A bump of height 1 at each onset (seconds): float32 (frames,) from frame `first` on."""
    times = (first + np.arange(frames)) / motion.FPS
    distances = np.abs(times[:, None] - np.asarray(onsets)).min(1, initial=math.inf)
    return np.exp(-0.5 * (distances / WIDTH) ** 2).astype(np.float32)


class Reading(torch.utils.data.Dataset):
    """Item: (block motion int8, onsets in seconds, None), or (None, None, error) if unreadable."""

    def __init__(self, videos):
        self.videos = videos

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        try:
            return media.clip_motion(video).numpy(), onsets_of(video), None
        except media.MediaError as error:
            return None, None, str(error)


class Clips(torch.utils.data.Dataset):
    """{"blocks": (SPAN, 5, 12, 12), "target": (SPAN,)} of a folder of clips, changed at random.

    Labels beside a clip count, else the onsets of its own sound. Items are pure functions of (seed,
    index), where index e * len + i is clip i in epoch e. All clips are held in memory, 18 KB for a
    second.
    split      "train", "val", "test", or None for all clips
    workers    processes that read in parallel; 0: this one
    may_be_empty   as validation's; else MediaError where there is no clip
    """

    def __init__(self, root, seed=0, split: str | None = None, workers=0, may_be_empty=False):
        if not Path(root).exists():
            raise media.MediaError(f"{root}: no such folder; give one with videos")
        self.seed = seed
        self.blocks = []  # int8 of each clip
        self.onsets = []  # seconds
        self.rights = []
        self.left_out = []
        videos = media.find_videos([root])
        if split:
            videos = [video for video in videos if data.split_of(video.name) == split]
        # each worker starts its own child process for FFmpeg
        reading = torch.utils.data.DataLoader(
            Reading(videos), None, num_workers=workers, collate_fn=tuple
        )
        bar = tqdm(reading, "read", len(videos), unit="clip", disable=distributed.rank() > 0)
        for video, (blocks, onsets, fault) in zip(videos, bar, strict=True):
            # a clip that cannot be read takes no other down
            if fault:
                name = video.relative_to(root) if Path(root).is_dir() else video.name
                self.left_out.append((str(name), fault))
                continue
            self.blocks.append(blocks)
            self.onsets.append(onsets)
            self.rights.append(rights.made_by_foley(video) or rights.UNKNOWN)
        if not self.blocks and not may_be_empty:
            said = (
                f"{root}: no clip (split: {split or 'all'}); add more, or make some with foley.py"
            )
            if self.left_out:
                said += f"; {len(self.left_out)} left out, the first: {self.left_out[0][1]}"
            raise media.MediaError(said)

    def __len__(self):
        return len(self.blocks)

    def data_summary(self):
        """As `data.Windows` has it."""
        return rights.summarize(self.rights)

    def cut(self, clip, rng):
        """Blocks and target of SPAN frames from a random place of a clip; still after its end."""
        blocks = self.blocks[clip]
        first = int(rng.integers(max(1, len(blocks) - SPAN + 1)))
        part = blocks[first : first + SPAN].astype(np.float32)
        wanted = target(self.onsets[clip], first, SPAN)
        missing = SPAN - len(part)
        return np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))), wanted

    def __getitem__(self, index):
        # the index counts on from epoch to epoch: see training.Shuffled
        rng = np.random.default_rng([self.seed, index])
        blocks, wanted = self.cut(index % len(self), rng)
        if rng.random() < 0.5:
            blocks = mirrored(blocks)
        if rng.random() < 0.25:
            blocks = shrunk(blocks, rng)
        # a second scene in the picture, with its hits
        if rng.random() < 0.2:
            others, more = self.cut(int(rng.integers(len(self))), rng)
            blocks = laid_over(blocks, shrunk(others, rng))
            wanted = np.maximum(wanted, more)
        # something that moves and is not heard
        if rng.random() < 0.25:
            others, _ = self.cut(int(rng.integers(len(self))), rng)
            blocks = laid_over(blocks, smoothed(others, rng))
        if rng.random() < 0.5:
            blocks = shaken(blocks, rng)
        blocks = mismatched(blocks, rng)
        # speed and contrast
        blocks[:, :4] *= math.exp(0.5 * rng.standard_normal())
        blocks[:, 4] *= math.exp(0.5 * rng.standard_normal())
        return {"blocks": blocks.astype(np.float32), "target": wanted}


def onsets_of(video):
    """Seconds of the onsets that a clip's labels name, or else of its sound."""
    if video.with_suffix(".json").is_file():
        return [float(onset["time"]) for onset in data.read_onsets(video)]
    return audio.detect_onsets(audio.mel(media.read_audio(video)).numpy()).tolist()


# --------------------------------------------------------------------------------------------------
# training


def validate(model, dataset):
    """Cross-entropy, and F1 within 100 ms, over whole clips as they are."""
    device = model.odds.weight.device
    losses = []
    pairs = 0
    predicted = 0
    annotated = 0
    for blocks, onsets in zip(dataset.blocks, dataset.onsets, strict=True):
        # a minute at a time, as in use: an hour's intermediate results would be gigabytes
        minutes = torch.from_numpy(blocks).split(MINUTE)
        odds = torch.cat([model(minute[None].to(device))[0].cpu() for minute in minutes])
        wanted = torch.from_numpy(target(onsets, 0, len(odds)))
        losses.append(F.binary_cross_entropy_with_logits(odds, wanted).item())
        columns = round(len(odds) / motion.FPS / audio.COLUMN)
        hits = [hit.time for hit in controls.find_hits(None, odds.numpy(), columns)]
        pairs += len(audio.match(hits, onsets, 0.1))
        predicted += len(hits)
        annotated += len(onsets)
    _, _, f1 = audio.f1(pairs, predicted, annotated)
    return {"val_loss": float(np.mean(losses)), "val_f1": f1}, []


def train(args):
    training.resolve_defaults(args, RECIPES, "finder")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)

    clips = Clips(args.data, args.seed, "train", args.workers)
    held_out = Clips(args.data, args.seed, "val", args.workers, may_be_empty=True)
    clips.left_out += held_out.left_out
    if not len(held_out):
        held_out = None

    model = Finder.load(args.init) if args.init else Finder(FinderConfig())
    model = model.requires_grad_(True).train()
    # as resuming lays it out, or the optimizer's moments would not lie as the weights do
    model = model.to(device, memory_format=torch.channels_last)
    training.freeze(args, model)
    optimizer = training.adamw([{"params": model.parameters()}], args, weight_decay=0.01)
    ema = training.EMA(model)
    config = asdict(model.config)
    run = training.TrainingRun(args, model, optimizer, config, ema, clips, held_out, validate)
    network = distributed.wrap_ddp(model, lambda finder, blocks: finder(blocks))
    weight = torch.tensor(ONSET_WEIGHT, device=device)

    for step in run:
        for batch, _rows in run.parts(network):
            with training.autocast(args):
                odds = network(batch["blocks"].to(device))
            wanted = batch["target"].to(device)
            loss = F.binary_cross_entropy_with_logits(odds, wanted, pos_weight=weight)
            (loss / run.count).backward()
            run.add(loss=loss)
        run.report(gradient_norm=training.update(args, step, optimizer, ema, model))


def main(argv=None):
    args = training.arguments(__doc__, RECIPES).parse_args(argv)
    with distributed.report_errors("finder.py"):
        train(args)


if __name__ == "__main__":
    main()
