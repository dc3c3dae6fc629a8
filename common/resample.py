"""Sound a block at a time: neighboring samples beside every block, and other sample rates.

in   blocks of sound, float32 (n, channels), of any lengths
out  blocks of fixed length with the samples around them; the same sound at a multiple of its rate,
     or a stretch of it at any rate

Memory does not grow with the sound. NumPy alone, so that the child process can use it.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

BLOCK = 2**15  # samples
STRETCH = 64  # samples that are interpolated by one row of a product
HALF = 128  # samples on either side that an interpolated one depends on
BETA = 9.0  # of Kaiser's window: mirrored frequencies are 90 dB down
BAND = 0.976  # of half the lower rate; of 16 kHz sound all is kept to 7.6 kHz, where mels end


def blocks_of(wav) -> Iterator[np.ndarray]:
    """Sound (n,) or (n, channels) -> views of it, (at most BLOCK, channels)."""
    wav = wav if wav.ndim == 2 else wav[:, None]
    for at in range(0, len(wav), BLOCK):
        yield wav[at : at + BLOCK]


def with_context(blocks: Iterable[np.ndarray], size: int, before: int, after: int):
    """Blocks (n, channels) -> arrays (before + m + after, channels), m = size but for the last.

    Every array begins `size` samples after the one before it; the sound is silent outside.
    """
    held = None
    for block in blocks:
        if held is None:
            held = np.zeros((before, block.shape[1]), np.float32)
        held = np.concatenate([held, block])
        while len(held) >= before + size + after:
            yield held[: before + size + after]
            held = held[size:]
    if held is None:
        return
    # the rest, and silence behind it
    held = np.concatenate([held, np.zeros((after, held.shape[1]), np.float32)])
    while len(held) > before + after:
        yield held[: before + size + after]
        held = held[size:]


@lru_cache
def interpolator(factor: int, half: int = HALF, band: float = BAND, beta: float = BETA):
    """float32 (2 half, factor): weights of the samples around each of `factor` new instants.

    The instants lie 0, 1/factor, ... of a sample after the half-th of these samples. A windowed
    sinc; the weights of an instant sum to one.
    """
    distance = np.arange(2 * half)[:, None] - (half - 1) - np.arange(factor) / factor
    window = np.i0(beta * np.sqrt(np.clip(1 - (distance / half) ** 2, 0, None)))
    weights = np.sinc(band * distance) * window
    return (weights / weights.sum(0)).astype(np.float32)


@lru_cache
def block_interpolator(factor: int, half: int = HALF, band: float = BAND, beta: float = BETA):
    """float32 (STRETCH + 2 half - 1, STRETCH * factor): the same for a stretch of samples at once.

    One product of matrices interpolates all stretches; most of its zeros cost less than copying
    the neighbors of every sample.
    """
    weights = interpolator(factor, half, band, beta)
    matrix = np.zeros((STRETCH + 2 * half - 1, STRETCH, factor), np.float32)
    for k in range(STRETCH):
        matrix[k : k + 2 * half, k] = weights
    return matrix.reshape(len(matrix), -1)


def windows(samples, size: int, step: int = 1):
    """(n, channels) -> (channels, (n - size) // step + 1, size): stretches of `size` samples."""
    view = np.lib.stride_tricks.sliding_window_view(samples, size, axis=0)[::step]
    return np.ascontiguousarray(view.transpose(1, 0, 2))


def stretches(samples, half: int):
    """(n + 2 half - 1, channels) -> (channels, ceil(n / STRETCH), STRETCH + 2 half - 1).

    The stretches of n samples with their neighbors, silence after the end.
    """
    n = len(samples) - 2 * half + 1
    padded = np.pad(samples, ((0, -n % STRETCH), (0, 0)))
    return windows(padded, STRETCH + 2 * half - 1, STRETCH)


def upsample(blocks: Iterable[np.ndarray], factor: int) -> Iterator[np.ndarray]:
    """Blocks at a rate -> blocks at `factor` times that rate; n samples become factor * n.

    No delay: new sample factor * k is heard with sample k.
    """
    if factor == 1:
        yield from blocks
        return
    matrix = block_interpolator(factor)
    for piece in with_context(blocks, BLOCK, HALF - 1, HALF):
        fine = stretches(piece, HALF) @ matrix  # (channels, stretches, STRETCH * factor)
        n = (len(piece) - 2 * HALF + 1) * factor
        yield fine.reshape(len(fine), -1)[:, :n].T


def resample(wav, first: int, stop: int, up: int, down: int):
    """Sound (n,) -> its samples `first` to `stop` at up / down times its rate, float64.

    By the filter of `upsample`, as if that had made `up` samples of each and every down-th were
    taken. Silent outside of the sound.
    """
    weights = interpolator(up, band=BAND * min(1.0, up / down)).T  # (up, 2 HALF)
    # the samples that these depend on
    low = first * down // up - HALF + 1
    high = (stop - 1) * down // up + HALF + 1
    part = np.asarray(wav[max(0, low) : max(0, high)], np.float64)
    part = np.pad(part, (max(0, -low), high - max(0, low) - len(part)))
    around = np.lib.stride_tricks.sliding_window_view(part, 2 * HALF)
    out = []
    for at in range(first, stop, BLOCK // 8):
        instants = np.arange(at, min(at + BLOCK // 8, stop)) * down
        before = instants // up - low - HALF + 1
        out.append(np.einsum("ij,ij->i", around[before], weights[instants % up]))
    return np.concatenate(out)


@lru_cache
def block_decimator(factor: int):
    """float32 (STRETCH * factor + 2 HALF * factor, STRETCH): the same filter for a lower rate."""
    # its instants in order; the last has no counterpart on the other side
    taps = interpolator(factor)[:, ::-1].reshape(-1)[:-1] / factor
    matrix = np.zeros(((STRETCH - 1) * factor + len(taps), STRETCH), np.float32)
    for k in range(STRETCH):
        matrix[k * factor : k * factor + len(taps), k] = taps
    return matrix


def downsample(samples, factor: int):
    """Sound (factor * n, channels) -> (n, channels) at a rate `factor` times lower, no delay.

    Takes several times the memory of the sound: for one block.
    """
    if factor == 1:
        return samples
    matrix = block_decimator(factor)
    step = STRETCH * factor
    before = HALF * factor - 1
    n = len(samples) // factor
    padded = np.pad(samples, ((before, before + -len(samples) % step), (0, 0)))
    coarse = windows(padded, len(matrix), step) @ matrix  # (channels, stretches, STRETCH)
    return coarse.reshape(len(coarse), -1)[:, :n].T
