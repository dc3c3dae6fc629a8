"""Onset strength of the picture's motion: a curve that peaks where something is suddenly stopped.

in   frames uint8 (f, 3 or 1, h, w) at FPS a second, or a video file
out  float32 (f,) from 0 to PEAK; entry i belongs to the moment of frame i

The picture's counterpart of the spectral flux (`common.audio.onset_strength`). Blocks of a frame
are found again in the frame before it and in the one after it (block matching by the sum of
absolute differences, full search: Jain and Jain 1981); what counts is the speed that a block loses
along the way it came: all of it where a thing is stopped, more than all where it bounces, none
where it goes on or only starts: the plain change of velocity would peak at starts as well, which no
sound follows. On 24 clips (`python foley.py OUT --clips 24 --fps 25 --seed 3`) the hits that
`common.controls.find_hits` takes from it alone have an F1 of 0.49 within 100 ms (0.48 with a reach
of 6 pixels, in twice the time).

Without torch, as `common.media` calls it in a child process (`common.isolation`). A ten-second clip
takes a third of a second of one core, decoding aside; memory does not grow with length.
"""

import itertools
from pathlib import Path

import numpy as np

from common.ffmpeg import pictures

FPS = 25
SIZE = 96  # side in pixels of the frames that `clip_motion` reads
CELL = 4  # pixels: blocks of 2 x 2 cells overlap by one
REACH = 4  # pixels that a block is looked for in each direction: a picture width a second
# A block moves if its best match leaves this share of the difference that staying leaves, or less,
# and if the difference is smaller by this many gray levels a pixel: flat and noisy blocks stay.
SHARE = 0.8
LEVELS = 2
BATCH = 64  # frames held at a time
STILL = 0.02  # pixels a frame, mean over blocks: slower than that is noise
PEAK = 4.0  # the most that a curve can be, reached where a clip has few hits


def gray(frames):
    """uint8 (f, 3 or 1, h, w) -> luma (ITU-R BS.601), uint8 (f, h, w)."""
    frames = np.asarray(frames)
    if frames.shape[1] == 1:
        return frames[:, 0]
    red, green, blue = (frames[:, channel].astype(np.uint16) for channel in range(3))
    # whole numbers give the same curve on every machine
    return ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)


def block_sums(image):
    """uint8 (f, h, w) -> sums over blocks of 8 x 8 pixels, one every 4, uint16 (f, rows, cols)."""
    f, h, w = image.shape
    rows = np.add.reduce(image.reshape(f, h // CELL, CELL, w), axis=2, dtype=np.uint16)
    cells = sum(rows[..., k::CELL] for k in range(CELL))
    pairs = cells[:, :-1] + cells[:, 1:]
    return pairs[..., :-1] + pairs[..., 1:]


def displacement(frames, others):
    """How far each block of a frame has gone in the other one: float32 (f, rows, cols, 2), y and x.

    Both uint8 (f, h, w). Of equal matches the nearest counts, staying first.
    """
    _, h, w = frames.shape
    margin = (REACH, REACH)
    padded = np.pad(others, ((0, 0), margin, margin), "edge")
    steps = range(-REACH, REACH + 1)
    shifts = sorted(itertools.product(steps, steps), key=lambda shift: np.hypot(*shift))
    for y, x in shifts:
        shifted = padded[:, REACH + y : REACH + y + h, REACH + x : REACH + x + w]
        # |a - b| without leaving uint8, which is four times as fast
        difference = np.maximum(frames, shifted) - np.minimum(frames, shifted)
        error = block_sums(difference)
        # the first shift is none: what a match must undercut for its block to move
        if y == x == 0:
            clear = np.maximum(error, LEVELS * (2 * CELL) ** 2) - LEVELS * (2 * CELL) ** 2
            best = np.minimum(SHARE * error, clear).astype(np.uint16)
            found = np.zeros((*error.shape, 2), np.float32)
        else:
            better = error < best
            best[better] = error[better]
            found[better] = (y, x)
    return found


def lost_speed(frames):
    """uint8 (f, h, w) -> the speed lost at each frame but the first and the last, float32 (f - 2,).

    In pixels a frame; the mean over all blocks, so that each counts the same wherever it is.
    """
    before = -displacement(frames[1:-1], frames[:-2])  # (f - 2, rows, cols, 2)
    after = displacement(frames[1:-1], frames[2:])
    speed = np.hypot(before[..., 0], before[..., 1])
    # of the velocity after it, what still goes the same way
    kept = (before * after).sum(-1) / np.maximum(speed, 1)
    return np.maximum(speed - kept, 0).reshape(len(speed), -1).mean(1)


def curve(batches):
    """Batches of consecutive gray frames, uint8 (n, h, w) -> normalized curve, float32 (f,)."""
    count = 0
    held = None
    parts = [np.zeros(1, np.float32)]
    for batch in batches:
        count += len(batch)
        # two frames from the batch before, which are the neighbors of this one's first
        frames = batch if held is None else np.concatenate([held, batch])
        if len(frames) > 2:
            parts.append(lost_speed(frames))
        held = frames[-2:]
    # neither the first frame nor the last has two neighbors
    strength = np.concatenate([*parts, np.zeros(1, np.float32)])[:count]
    if not count:
        return strength
    # a hit falls between two frames: let both have it
    padded = np.pad(strength, 1)
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    # clips differ in how much of the picture moves, and how far; a clip of few hits has a low
    # percentile, hence the peak
    scale = max(np.percentile(smooth, 95), smooth.max() / PEAK - STILL)
    return (smooth / (scale + STILL)).astype(np.float32)


def motion_onsets(frames):
    """uint8 (f, 3 or 1, h, w) at FPS, h and w multiples of 4 -> float32 (f,), 0 to PEAK.

    Divided by the clip's 95th percentile, so that clips compare; a still clip gives zeros.
    """
    return curve(gray(frames[k : k + BATCH]) for k in range(0, len(frames), BATCH))


def clip_motion(path: Path | str, start: float = 0.0, seconds: float | None = None):
    """`motion_onsets` of a video, or of `seconds` of it: float32 (ceil(FPS * seconds),).

    Entry i belongs to start + i/FPS seconds after the first picture. Raises MediaError.
    """
    images = pictures(path, FPS, SIZE, start, seconds)
    batches = iter(lambda: list(itertools.islice(images, BATCH)), [])
    return curve(gray(np.stack(batch).transpose(0, 3, 1, 2)) for batch in batches)
