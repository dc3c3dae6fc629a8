"""Loudness and true peak are those of the standards: ITU-R BS.1770-5 and the signals of EBU Tech
3341 that can be made here. Other rates, blocks of any length, silence."""

import math

import numpy as np
import pytest

from common.resample import (
    blocks_of,
    downsample,
    interpolator,
    resample,
    upsample,
    with_context,
)
from film.loudness import PEAK_HALF, k_weighting, measure, weighting_response

RATE = 48000


def sine(hz, seconds, decibels=0.0, rate=RATE, phase=0.0):
    """A sine whose peak has so many dBFS, phase in degrees: float32 (n,)."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * hz * t + np.deg2rad(phase))
    return (10 ** (decibels / 20) * wave).astype(np.float32)


def loudness(wav, rate=RATE):
    return measure(blocks_of(wav), rate).loudness


def steps(*parts):
    """A 1 kHz tone that is the same in two channels, of (seconds, dBFS) one after the other."""
    return np.repeat(np.concatenate([sine(1000, *part) for part in parts])[:, None], 2, 1)


# ---- loudness ----------------------------------------------------------------------------------


def test_the_filters_are_the_tables_at_48_khz():
    """BS.1770-5, Annex 1, tables 1 and 2."""
    shelf, high_pass = k_weighting(48000)
    expected = [1.53512485958697, -2.69169618940638, 1.19839281085285]
    assert np.allclose(shelf, [*expected, 1.0, -1.69065929318241, 0.73248077421585], atol=1e-8)
    expected = [1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621]
    assert np.allclose(high_pass, expected, atol=1e-8)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_full_scale_in_one_channel(rate):
    """A 997 Hz sine at full scale has -3.01 LKFS (Annex 1); the bilinear transform costs 0.05."""
    assert abs(loudness(sine(997, 4, rate=rate), rate) + 3.01) < (0.01 if rate > 16000 else 0.06)


@pytest.mark.parametrize(
    "parts, expected",
    [
        ([(20, -23)], -23),
        ([(20, -33)], -33),
        ([(10, -36), (60, -23), (10, -36)], -23),
        ([(10, -72), (10, -36), (60, -23), (10, -36), (10, -72)], -23),
        ([(20, -26), (20.1, -20), (20, -26)], -23),
    ],
    ids=["1", "2", "3", "4", "5"],
)
def test_tones_of_tech_3341(parts, expected):
    """Cases 1 to 5, of a tolerance of 0.1 LU: level and gates."""
    assert abs(loudness(steps(*parts)) - expected) < 0.1


def test_five_channels_of_tech_3341():
    """Case 6."""
    levels = (-28, -28, -24, -30, -30)
    wav = np.stack([sine(1000, 20, level) for level in levels], 1)
    assert abs(loudness(wav) + 23) < 0.1


def test_channels_count_as_they_are_written():
    tone = sine(1000, 2, -20, 16000)
    both = np.repeat(tone[:, None], 2, 1)
    assert abs(loudness(both, 16000) - loudness(tone, 16000) - 10 * math.log10(2)) < 1e-3


def test_short_and_silent_sounds():
    assert measure([], 16000)[:2] == (-math.inf, -math.inf)
    assert measure(blocks_of(np.zeros(16000, np.float32)), 16000)[:2] == (-math.inf, -math.inf)
    assert loudness(sine(1000, 2, -80, 16000), 16000) == -math.inf  # under the absolute gate
    short = sine(1000, 0.1, -20, 16000)  # shorter than a block: its own mean
    assert abs(loudness(short, 16000) - loudness(sine(1000, 2, -20, 16000), 16000)) < 0.6


def test_the_filter_is_cut_off_where_nothing_is_left():
    """As FIR against the recursive filters themselves, sample by sample."""
    for rate in (16000, 48000):
        taps, response = weighting_response(rate)
        impulse = np.fft.irfft(response)[:taps]
        wave = np.zeros(2 * taps)
        wave[0] = 1.0
        for b0, b1, b2, _, a1, a2 in k_weighting(rate):
            out = np.zeros_like(wave)
            for n in range(len(wave)):
                feed = b0 * wave[n] + b1 * wave[n - 1] * (n > 0) + b2 * wave[n - 2] * (n > 1)
                out[n] = feed - a1 * out[n - 1] * (n > 0) - a2 * out[n - 2] * (n > 1)
            wave = out
        assert np.abs(impulse - wave[:taps]).max() < 1e-6
        assert np.linalg.norm(wave[taps:]) < 1e-6 * np.linalg.norm(wave)


def test_blocks_of_any_length_measure_the_same():
    rng = np.random.default_rng(0)
    wav = (rng.standard_normal((30000, 2)) * np.linspace(0.01, 0.2, 30000)[:, None]).astype("f4")
    whole = measure([wav], 16000)
    cuts = np.sort(rng.integers(0, len(wav), 40))
    pieces = measure([part for part in np.split(wav, cuts) if len(part)], 16000)
    assert np.allclose(whole[:2], pieces[:2], atol=1e-4)


# ---- true peak ---------------------------------------------------------------------------------

EBU = {
    15: (4, 0.5, 0.0, -6.0),
    16: (4, 0.5, 45.0, -6.0),
    17: (6, 0.5, 60.0, -6.0),
    18: (8, 0.5, 67.5, -6.0),
    19: (4, 1.41, 45.0, 3.0),
}


@pytest.mark.parametrize("case", EBU)
@pytest.mark.parametrize("rate", [16000, 48000])
def test_peaks_between_samples_of_tech_3341(case, rate):
    """Cases 15 to 19: a sine of a share of the rate; +0.2 and -0.4 dB are allowed."""
    share, amplitude, phase, expected = EBU[case]
    wav = sine(rate / share, 1, 20 * math.log10(amplitude), rate, phase)
    ends = np.minimum(np.arange(len(wav)), np.arange(len(wav))[::-1])
    wav = wav * np.minimum(1, ends / (0.01 * rate)).astype("f4")  # no click at either end
    assert -0.4 <= measure(blocks_of(wav), rate).true_peak - expected <= 0.2


@pytest.mark.parametrize("offset", range(4))
def test_a_peak_lies_anywhere_between_samples(offset):
    """As in cases 20 to 23: one period at full scale in a tone of half that, made at four times the
    rate and taken at every fourth sample from four beginnings; 0 dBTP, +0.2 and -0.4 dB allowed."""
    fine = 4 * RATE
    tone = 0.5 * np.sin(2 * np.pi * np.arange(fine // 2) / 24)  # a sixth of the rate
    at = 24 * (len(tone) // 48)
    tone[at : at + 16] = np.sin(2 * np.pi * np.arange(16) / 16)  # a quarter of it
    ends = np.minimum(np.arange(len(tone)), np.arange(len(tone))[::-1])
    tone = tone * np.minimum(1, ends / 1920)
    shifted = np.pad(tone, (0, 4))[offset:][: len(tone)].astype("f4")
    low = downsample(shifted[:, None], 4)
    assert -0.4 <= measure(blocks_of(low), RATE).true_peak <= 0.2


def test_what_is_skipped_is_never_the_peak():
    """Against every instant of all samples."""
    rng = np.random.default_rng(1)
    weights = interpolator(12, PEAK_HALF, 1.0, 6.0)
    for _ in range(20):
        wav = rng.standard_normal(3000).astype("f4")
        wav *= rng.random(3000).astype("f4") ** rng.integers(0, 6)
        # with nothing above what sound at 16 kHz has
        low = upsample(blocks_of(downsample(wav[:, None], 3)), 3)
        wav = np.concatenate(list(low))[: 2 * len(wav) // 3, 0]
        padded = np.pad(wav, (PEAK_HALF - 1, PEAK_HALF))
        view = np.lib.stride_tricks.sliding_window_view(padded, 2 * PEAK_HALF)
        peak = 20 * math.log10(np.abs(view @ weights).max())
        assert abs(measure(blocks_of(wav), 16000).true_peak - peak) < 1e-3


# ---- other rates -------------------------------------------------------------------------------


def test_context_comes_with_every_block():
    wav = np.arange(1, 24, dtype=np.float32)[:, None]
    pieces = list(with_context([wav[:5], wav[5:6], wav[6:]], 10, 2, 3))
    assert [len(piece) for piece in pieces] == [15, 15, 8]
    padded = np.pad(wav[:, 0], (2, 3))
    for k, piece in enumerate(pieces):
        assert np.array_equal(piece[:, 0], padded[10 * k :][: len(piece)])


@pytest.mark.parametrize("hz", [50, 1000, 6400, 7500])
def test_tones_keep_time_and_level_at_three_times_the_rate(hz):
    low = sine(hz, 1.3, -6, 16000, 30)
    fine = np.concatenate(list(upsample(blocks_of(np.stack([low, -low], 1)), 3)))
    assert fine.shape == (3 * len(low), 2)
    middle = slice(1000, -1000)  # the sound begins and ends at once
    assert np.abs(fine[:, 0] - sine(hz, 1.3, -6, 48000, 30))[middle].max() < 1e-3
    assert np.array_equal(fine[:, 0], -fine[:, 1])
    assert np.abs(downsample(fine, 3)[:, 0] - low)[middle].max() < 1e-3


@pytest.mark.parametrize("up, down", [(3, 1), (441, 160), (1, 2)])
def test_a_stretch_at_any_rate_is_that_of_the_whole_sound(up, down):
    rate = 16000 * up // down
    low = sine(1000, 1, -6, 16000)
    first, stop = rate // 4, rate // 2
    part = resample(low, first, stop, up, down)
    assert np.abs(part - sine(1000, 1, -6, rate)[first:stop]).max() < 1e-3
    if down == 1:
        fine = np.concatenate(list(upsample(blocks_of(low), up)))[:, 0]
        assert np.abs(resample(low, 0, len(fine), up, down) - fine).max() < 1e-6
    # also where the sound ends, and behind it
    assert np.abs(resample(low, rate - 10, rate + 300, up, down)[-5:]).max() < 1e-3
    # what the lower rate does not hold is gone
    if up < down:
        assert np.abs(resample(sine(5000, 1, 0, 16000), first, stop, up, down)).max() < 1e-4


def test_nothing_is_mirrored():
    """What lies above half the lower rate is gone: 80 dB down."""
    assert np.abs(downsample(sine(9000, 1, 0, 48000)[:, None], 3)[500:-500]).max() < 1e-4
    low = sine(7000, 1, 0, 16000)
    fine = np.concatenate(list(upsample(blocks_of(low), 3)))[:, 0]
    spectrum = np.abs(np.fft.rfft(fine * np.hanning(len(fine))))
    assert spectrum[8200:].max() < 1e-4 * spectrum.max()
