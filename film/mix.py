"""What one file's sound is made of: the generated sound, and under it the clip's own.

in   a `sample.Result`: sound (n,) at 16 kHz, marked and at its level, and what was asked for
out  Sound: blocks (n, channels) at the rate that is written, however long it is

The clip's own sound is read at that rate and in that layout, and marked as the generated one is:
the mark is a gain that changes in time, so that marking both and adding them marks their sum.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import media, watermark
from common.audio import HOP, SAMPLE_RATE
from common.files import scratch_file
from common.resample import BLOCK, blocks_of, downsample, upsample, with_context
from film import level, loudness, redo

STEP = 80  # samples (5 ms) a point of the curve that ducks
ATTACK = 0.04  # seconds before a hit in which the clip's own sound goes down
HOLD = 0.1  # and after it, before it rises
RELEASE = 0.3  # in so many seconds
FAINT = 1e-7  # mean square (-70 dBFS) of what does not count as sound
UNDER = 10**-1.6  # of the mean square of what does: a moment this loud ducks (16 dB below)
# samples at 16 kHz after which the mark's signs repeat, and that it depends on after a sample
PERIOD = watermark.PERIOD * watermark.TILE * HOP
AFTER = 2 * watermark.MARGIN


@dataclass(frozen=True)
class Sound:
    """The sound of one file."""

    blocks: Callable[[], Iterable[np.ndarray]]  # (n, channels), from the beginning at every call
    samples: int  # of a channel
    rate: int
    channels: int
    gain: float  # dB by which the generated sound in it is louder than the model made it
    level: loudness.Level
    has_own: bool = False  # whether the clip's own sound is in it
    exact: redo.Sound | None = None  # the same as a file has it, which is written as it is

    def louder(self, decibels):
        """The same with another constant gain."""
        scale = np.float32(10 ** (decibels / 20))
        return replace(
            self,
            blocks=lambda: (scale * block for block in self.blocks()),
            gain=self.gain + decibels,
            level=self.level.louder(decibels),
            exact=None,
        )


def finished(blocks, result, k, known=None):
    """A Sound of these blocks, with a true peak of at most AIM; the official demo's as it is.

    known: its Level, where it was measured already.
    """
    settings = result.settings
    rate = settings.rate
    sound = Sound(
        blocks,
        len(result.wav) * rate // SAMPLE_RATE,
        rate,
        level.LAYOUTS[settings.layout],
        level.of(result, k).gain,
        known or loudness.measure(blocks(), rate),
    )
    excess = sound.level.true_peak - level.AIM
    official_alone = settings.as_official and settings.keep_audio is None
    return sound if excess <= 0 or official_alone else sound.louder(level.down(-excess))


def foley_blocks(wav, settings):
    """The generated sound (n,) at the rate and in the layout that is written."""
    channels = level.LAYOUTS[settings.layout]
    for block in upsample(blocks_of(wav.numpy()), settings.rate // SAMPLE_RATE):
        yield np.repeat(block, channels, 1)


def foley(result, k):
    """Candidate k alone, as a Sound."""
    known = level.of(result, k).level
    # at another rate filters and peaks are a little other
    if known is not None and result.settings.rate == SAMPLE_RATE:
        known = level.in_layout(known, result.settings)
    else:
        known = None
    return finished(partial(foley_blocks, result.wavs[k], result.settings), result, k, known)


# ---- the clip's own sound ----------------------------------------------------------------------


def read_blocks(path, channels):
    """Blocks (n, channels) of a file of plain float32."""
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.float32, BLOCK * channels)):
            yield block.reshape(-1, channels)


def write_blocks(path, blocks):
    """Blocks of sound as a file of plain float32."""
    with open(path, "wb") as file:
        for block in blocks:
            # not tofile, which counts bytes where the disk is full and does not say so
            file.write(block.astype(np.float32).tobytes())


@dataclass(frozen=True)
class Own:
    """The clip's own sound, in files of plain float32."""

    path: Path  # as it is
    marked: Path  # as it is mixed in: with the watermark, unless nothing has it
    samples: int  # of a channel
    scale: np.float32  # that keeps it in [-1, 1]: decoded lossy sound may exceed it
    channels: int

    def blocks(self):
        """(n, channels), as it is."""
        return (self.scale * block for block in read_blocks(self.path, self.channels))


@contextmanager
def own_sound(result, folder):
    """The clip's Own sound, as long as the result's, in files there; None if it has none."""
    settings = result.settings
    if not media.probe(result.source).has_audio:
        warnings.warn(f"{result.source}: has no sound of its own to mix in", stacklevel=3)
        yield None
        return
    with scratch_file(folder) as path, scratch_file(folder) as with_mark:
        channels = level.LAYOUTS[settings.layout]
        seconds = len(result.wav) / SAMPLE_RATE
        form = settings.rate, channels
        peak = media.spool_audio(result.source, path, result.start, seconds, *form)
        samples = path.stat().st_size // (4 * channels)
        own = Own(path, with_mark, samples, np.float32(1 / max(1.0, peak)), channels)
        # once, as every measurement and every file reads it again
        if settings.keep_audio is not None:
            mark = result.marked
            factor = settings.rate // SAMPLE_RATE
            write_blocks(with_mark, marked(own.blocks(), factor) if mark else own.blocks())
        yield own


def marked(blocks, factor):
    """Blocks at `factor` times 16 kHz with the watermark, which changes 400 Hz to 6.4 kHz alone.

    What it changes is found at 16 kHz and added: everything above stays as it is.
    """
    size = watermark.SPAN * factor
    before = PERIOD * factor  # so that the signs begin anew with every piece
    for piece in with_context(blocks, size, before, AFTER * factor):
        low = downsample(np.pad(piece, ((0, -len(piece) % factor), (0, 0))), factor)
        marks = [watermark.mark(torch.from_numpy(c.copy())).numpy() - c for c in low.T]
        change = np.concatenate(list(upsample(blocks_of(np.stack(marks, 1)), factor)))
        yield (piece + change[: len(piece)])[before : len(piece) - AFTER * factor]


# ---- ducking -----------------------------------------------------------------------------------


def duck_curve(wav, hits):
    """How far the clip's own sound is ducked under a sound (n,), 0 to 1, every STEP samples.

    Fully while the sound is heard and at each hit, in seconds; smoothly before and after.
    """
    # moments at which something sounds
    frames = wav[: len(wav) // STEP * STEP].reshape(-1, STEP)
    power = np.append(np.einsum("ij,ij->i", frames, frames) / STEP, 0.0)
    heard = power > FAINT
    sounds = heard & (power > UNDER * power[heard].mean() if heard.any() else heard)
    hits = np.array([round(time * SAMPLE_RATE / STEP) for time in hits], int)
    sounds[hits[(hits >= 0) & (hits < len(sounds))]] = True

    # seconds since the last of them, and until the next
    at = np.arange(len(sounds)) * STEP / SAMPLE_RATE
    since = at - np.maximum.accumulate(np.where(sounds, at, -np.inf))
    until = np.minimum.accumulate(np.where(sounds, at, np.inf)[::-1])[::-1] - at
    # halves of a cosine, so that the gain has no corner
    before = np.clip(until / ATTACK, 0, 1)
    after = np.clip((since - HOLD) / RELEASE, 0, 1)
    return 0.5 + 0.5 * np.cos(np.pi * np.minimum(before, after))


def ducked(blocks, curve, decibels, step):
    """Blocks whose gain follows a curve of `duck_curve`, which has a point every `step` samples."""
    at = 0
    points = np.arange(len(curve)) * step
    for block in blocks:
        amount = np.interp(np.arange(at, at + len(block)), points, curve)
        yield block * (10 ** (decibels * amount / 20)).astype(np.float32)[:, None]
        at += len(block)


# ---- both --------------------------------------------------------------------------------------


def own_blocks(result, own, k):
    """The clip's own sound as it is mixed in under candidate k: louder, marked, ducked."""
    settings = result.settings
    gain = np.float32(10 ** (settings.keep_audio / 20))
    blocks = (gain * block for block in read_blocks(own.marked, own.channels))
    if settings.duck is not None:
        hits = [hit.time - result.start for hit in result.hits]
        curve = duck_curve(result.wavs[k].numpy(), hits)
        blocks = ducked(blocks, curve, settings.duck, STEP * settings.rate // SAMPLE_RATE)
    return blocks


def mix_blocks(result, own, k):
    """Candidate k and the clip's own sound, added."""
    both = foley_blocks(result.wavs[k], result.settings), own_blocks(result, own, k)
    equal = (with_context(blocks, BLOCK, 0, 0) for blocks in both)
    for generated, kept in zip(*equal, strict=True):
        yield generated + kept


def mix(result, own, k):
    """What is written of candidate k: with the clip's own sound if that was asked for."""
    if own is None or result.settings.keep_audio is None:
        return foley(result, k)
    mixed = finished(partial(mix_blocks, result, own, k), result, k)
    return replace(mixed, has_own=True)


# ---- redone ------------------------------------------------------------------------------------


def redone(result, k):
    """Candidate k of a sound of which stretches alone are new, at its own rate and level."""
    sound = result.redo.sounds[k]

    def blocks():
        for at in range(0, len(sound.samples), BLOCK):
            yield (sound.samples[at : at + BLOCK] / sound.full_scale).astype(np.float32)

    form = len(sound.samples), sound.rate, sound.samples.shape[1]
    measured = loudness.measure(blocks(), sound.rate)
    has_own = result.redo.has_own or result.settings.keep_audio is not None
    return Sound(blocks, *form, 0.0, measured, has_own, sound)
