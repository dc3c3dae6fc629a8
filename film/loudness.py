"""Loudness and true peak: ITU-R BS.1770-5, with the gates of EBU R 128.

in   blocks of sound, float32 (n, channels), at any rate
out  Level: LUFS and dBTP

Held to the published test signals by tests/test_loudness.py. Memory does not grow with the sound.
NumPy alone, so that the child process that encodes can use it.

A sound counts as the standard says: by the channels that the file has. One channel played by two
speakers is 3 dB louder to the room than its file measures, and the same sound in two channels
measures 3 dB more.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from common.resample import STRETCH, block_interpolator, stretches, with_context

OFFSET = -0.691  # dB: with it a 997 Hz sine at full scale in one channel has -3.01 LUFS
ABSOLUTE_GATE = -70.0  # LUFS: quieter blocks do not count
RELATIVE_GATE = -10.0  # LU below the mean of those that do: quieter ones do not count either
HOPS = 4  # of 100 ms in a block of 400 ms: blocks overlap by 75 %
# weights of L, R, C, Ls, Rs; without LFE
SURROUND = (1.0, 1.0, 1.0, 1.41, 1.41)
# The true peak is the largest of instants at this rate or above. A sine of frequency f between them
# is missed by at most -20 log10 cos(pi f / FINE_RATE) dB: of 16 kHz sound (12 times as many
# instants) by 0.07 dB, where the standard's four times as many would miss 0.69 dB.
FINE_RATE = 192000
PEAK_HALF = 24  # samples on either side that an instant between samples depends on


class Level(NamedTuple):
    """What is measured of a sound; -inf: silence."""

    loudness: float  # integrated, LUFS
    true_peak: float  # dBTP
    energies: np.ndarray  # float64, mean of each block of 400 ms, as the gates see them

    def louder(self, decibels):
        """The Level of the sound after a gain; other blocks may pass the absolute gate then."""
        energies = self.energies * 10 ** (decibels / 10)
        return Level(gated_loudness(energies), self.true_peak + decibels, energies)


# ---- K-weighting -------------------------------------------------------------------------------


def k_weighting(rate):
    """Two biquads as rows of b0 b1 b2 a0 a1 a2: float64 (2, 6).

    The standard tables them for 48 kHz; other rates get those of the same analog filters by the
    bilinear transform, with the same gain where both are flat.
    """

    def denominator(frequency, q, at_rate):
        k = math.tan(math.pi * frequency / at_rate)
        return k, np.array([1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k])

    # the head: a shelf of 4 dB
    q = 0.7071752369554196
    k, a = denominator(1681.974450955533, q, rate)
    high = 10 ** (3.999843853973347 / 20)
    middle = high**0.4996667741545416
    b = [high + middle * k / q + k * k, 2 * (k * k - high), high - middle * k / q + k * k]
    shelf = np.concatenate([b, a]) / a[0]
    # low frequencies; the table's filter has a gain of a0 in its pass band
    low = 38.13547087602444, 0.5003270373238773
    _, a = denominator(*low, rate)
    gain = denominator(*low, 48000)[1][0]
    high_pass = np.concatenate([np.array([1, -2, 1]) * gain, a]) / a[0]
    return np.stack([shelf, high_pass])


@lru_cache
def weighting_response(rate):
    """The K-weighting as an FIR filter: its taps, and their spectrum for blocks of four times that.

    The impulse response is cut off after 85 ms or more, twenty time constants of its slowest pole:
    what is left out is under 1e-6 of it (tests/test_loudness.py).
    """
    taps = 2 ** math.ceil(math.log2(0.085 * rate))
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(4 * taps))
    response = 1.0
    for row in k_weighting(rate):
        response = response * np.polyval(row[2::-1], z) / np.polyval(row[:2:-1], z)
    impulse = np.fft.irfft(response)[:taps]
    return taps, np.fft.rfft(impulse, 4 * taps).astype(np.complex64)


def weighted_energy(piece, rate, core):
    """K-weighted sum of squares in each tenth of a second of the piece's last `core` samples.

    piece: (n, channels), with the samples before that the filter remembers. float64 (tenths,).
    """
    taps, response = weighting_response(rate)
    spectrum = np.fft.rfft(piece, 4 * taps, axis=0) * response[:, None]
    heard = np.fft.irfft(spectrum, 4 * taps, axis=0)[len(piece) - core : len(piece)]
    weights = np.array(SURROUND[: piece.shape[1]])
    power = np.square(heard, dtype=np.float64) @ weights
    return np.add.reduceat(power, np.arange(0, core, rate // 10))


def block_means(energies, samples, rate):
    """Mean energy of each block of 400 ms, from the energies of all tenths of a second of so many
    samples; what is shorter is one block."""
    hop = rate // 10
    tenths = samples // hop
    if tenths < HOPS:
        return np.array([energies.sum() / max(1, samples)])
    sums = np.concatenate([[0.0], np.cumsum(energies[:tenths])])
    return (sums[HOPS:] - sums[:-HOPS]).clip(0) / (HOPS * hop)


def gated_loudness(means):
    """Integrated loudness, LUFS, of the mean energies of blocks: those that pass both gates."""
    gate = 10 ** ((ABSOLUTE_GATE - OFFSET) / 10)
    counted = means[means > gate]
    if len(counted):
        relative = counted.mean() * 10 ** (RELATIVE_GATE / 10)
        counted = means[means > max(gate, relative)]
    if not len(counted):
        return -math.inf
    return OFFSET + 10 * math.log10(counted.mean())


# ---- true peak ---------------------------------------------------------------------------------


@lru_cache
def peak_interpolator(factor):
    """The weights of `factor` instants a sample, for STRETCH samples at once."""
    return block_interpolator(factor, PEAK_HALF, 1.0, 6.0)


def higher_peak(piece, rate, peak):
    """The peak of a piece (n, channels), between its samples too, if it is above `peak`, else that.

    The first PEAK_HALF - 1 samples and the last PEAK_HALF are read and not measured. Around its
    peak a band-limited sound falls no faster than a cosine of half the rate, so that a quarter of a
    sample beside it 0.71 of it are left: of two instants a sample, those under 0.65 of the largest
    have no peak near them.
    """
    for rows in stretches(piece, PEAK_HALF):
        coarse = np.abs(rows @ peak_interpolator(2)).max(1)
        coarse = np.maximum(
            coarse, np.abs(rows[:, STRETCH + PEAK_HALF - 1])
        )  # where the next begins
        near = coarse > 0.65 * max(peak, float(coarse.max()))
        if near.any():
            fine = rows[near] @ peak_interpolator(math.ceil(FINE_RATE / rate))
            peak = max(peak, float(np.abs(fine).max()))
    return peak


# ---- both --------------------------------------------------------------------------------------


def measure(blocks: Iterable[np.ndarray], rate: int) -> Level:
    """Loudness and true peak of a sound that comes in blocks (n, channels), at most 5 channels."""
    taps, _ = weighting_response(rate)
    hop = rate // 10
    size = max(1, (3 * taps - PEAK_HALF) // hop) * hop  # whole tenths that fit beside the taps
    energies = []
    samples = 0
    peak = 0.0
    for piece in with_context(blocks, size, taps - 1, PEAK_HALF):
        core = len(piece) - (taps - 1) - PEAK_HALF
        energies.append(weighted_energy(piece[:-PEAK_HALF], rate, core))
        peak = higher_peak(piece[taps - PEAK_HALF :], rate, peak)
        samples += core
    energies = np.concatenate(energies) if energies else np.zeros(0)
    means = block_means(energies, samples, rate)
    return Level(gated_loudness(means), 20 * math.log10(peak) if peak > 0 else -math.inf, means)
