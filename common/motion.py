"""How blocks of the picture move: what `finder.py` finds hits in.

in   frames uint8 (h, w), FPS a second, or a video file
out  int8 (f, 5, h / 8, w / 8); entry i is of the picture on view i / FPS seconds after the start,
     per block of 8 x 8 pixels:

         0, 1  velocity since the picture before, y (down) and x, in pixels a frame, times SPEED
         2, 3  velocity until the picture after, as above
         4     mean absolute difference to the picture before, in gray levels a frame, times LEVEL

Blocks are found again in the picture before and in the one after (block matching by the sum of
absolute differences, full search: Jain and Jain 1981). Where a video has fewer pictures than FPS,
or repeats some, as in a film of 24 turned into one of 30, a picture is held for several frames:
speeds are those between different pictures, divided by the time between them, or each repetition
would look like a stop. Frames of one held picture have the same entry.

Without torch, as `common.media` calls it in a child process (`common.isolation`). A ten-second clip
takes a fifth of a second of one core, decoding aside.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.ffmpeg import pictures

FPS = 25
SIZE = 96  # side in pixels of the frames that `clip_motion` reads
BLOCK = 8  # pixels
REACH = 4  # pixels that a block is looked for in each direction: a picture width a second
# A block moves if its best match leaves this share of the difference that staying leaves, or less,
# and if the difference is smaller by this many gray levels a pixel: flat and noisy blocks stay.
SHARE = 0.8
LEVELS = 2
BATCH = 64  # pictures matched at a time
SAME = 0.3  # mean difference in gray levels below which a picture is the one before, held
LONGEST_HELD = 3  # frames; what stays longer stands still
SPEED = 8  # what a pixel a frame is in the numbers that are returned
LEVEL = 2  # and a gray level


def gray(frames):
    """uint8 (..., 3, h, w) -> luma (ITU-R BS.601), uint8 (..., h, w)."""
    red, green, blue = (frames[..., k, :, :].astype(np.uint16) for k in range(3))
    # whole numbers give the same motion on every machine
    return ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)


def difference(frames, others):
    """Absolute difference of uint8 arrays, without leaving uint8, which is four times as fast."""
    return np.maximum(frames, others) - np.minimum(frames, others)


def block_sums(image):
    """uint8 (n, h, w) -> sums over blocks, uint16 (n, h / BLOCK, w / BLOCK)."""
    n, h, w = image.shape
    rows = np.add.reduce(image.reshape(n, h // BLOCK, BLOCK, w), axis=2, dtype=np.uint16)
    return sum(rows[..., k::BLOCK] for k in range(BLOCK))


def displacement(frames, others):
    """How far each block of a frame has gone in the other one: int8 (n, 2, rows, cols), y and x.

    Both uint8 (n, h, w). Of equal matches the nearest counts, staying first.
    """
    _, h, w = frames.shape
    margin = (REACH, REACH)
    padded = np.pad(others, ((0, 0), margin, margin), "edge")
    steps = range(-REACH, REACH + 1)
    shifts = sorted(itertools.product(steps, steps), key=lambda shift: np.hypot(*shift))
    for y, x in shifts:
        shifted = padded[:, REACH + y : REACH + y + h, REACH + x : REACH + x + w]
        error = block_sums(difference(frames, shifted))
        # the first shift is none: what a match must undercut for its block to move
        if y == x == 0:
            clear = np.maximum(error, LEVELS * BLOCK**2) - LEVELS * BLOCK**2
            best = np.minimum(SHARE * error, clear).astype(np.uint16)
            found = np.zeros((len(error), 2, *error.shape[1:]), np.int8)
        else:
            better = error < best
            best[better] = error[better]
            found[:, 0][better] = y
            found[:, 1][better] = x
    return found


def different(frames: Iterable):
    """Frames uint8 (h, w) -> (frame, for how many it is held), one for each different picture."""
    held = None
    count = 0
    for frame in frames:
        if held is not None and count < LONGEST_HELD and difference(frame, held).mean() < SAME:
            count += 1
            continue
        if held is not None:
            yield held, count
        held = frame
        count = 1
    if held is not None:
        yield held, count


def block_motion(frames: Iterable):
    """Frames uint8 (h, w) at FPS, h and w multiples of BLOCK -> int8 (f, 5, rows, cols)."""
    shown = different(frames)
    counts = []
    before = []  # of each picture but the first
    after = []  # of each but the last
    changes = []
    last = None
    while batch := list(itertools.islice(shown, BATCH)):
        counts += [count for _, count in batch]
        images = np.stack([image for image, _ in batch])
        # the neighbor of this batch's first
        if last is not None:
            images = np.concatenate([last, images])
        last = images[-1:]
        one, next_one = images[:-1], images[1:]
        if len(one):
            after.append(displacement(one, next_one))
            before.append(-displacement(next_one, one))
            changes.append(block_sums(difference(one, next_one)))
    if not counts:
        return np.zeros((0, 5, SIZE // BLOCK, SIZE // BLOCK), np.int8)

    rows, cols = (side // BLOCK for side in last.shape[1:])
    frames_between = np.array(counts[:-1], np.float32)[:, None, None, None]
    motion = np.zeros((len(counts), 5, rows, cols), np.int8)
    if after:
        motion[1:, 0:2] = np.round(SPEED * np.concatenate(before) / frames_between)
        motion[:-1, 2:4] = np.round(SPEED * np.concatenate(after) / frames_between)
        level = LEVEL / BLOCK**2 * np.concatenate(changes) / frames_between[:, 0]
        motion[1:, 4] = np.minimum(level, 127)
    return np.repeat(motion, counts, 0)


def clip_motion(path: Path | str, start: float = 0.0, seconds: float | None = None):
    """`block_motion` of a video, or of `seconds` of it: int8 (ceil(FPS * seconds), 5, 12, 12).

    Entry i belongs to start + i / FPS seconds after the first picture. Raises MediaError.
    """
    images = pictures(path, FPS, SIZE, start, seconds)
    return block_motion(gray(image.transpose(2, 0, 1)) for image in images)
