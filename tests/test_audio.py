"""common/audio.py: the mel and its inverse against goldens and the textbook; the vocoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import onsets
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import audio

GOLDEN = Path(__file__).parent / "golden" / "audio.safetensors"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_mel_equals_the_golden():
    golden = load_file(GOLDEN)
    assert relative(audio.mel_basis(), golden["mel_basis_16k"]) < 1e-6
    mel = audio.mel(golden["waveform"])
    assert mel.shape == (128, 512)
    assert relative(mel[:, ::4], golden["mel_every4"]) < 1e-4
    assert (
        relative(mel[:, -3:], golden["mel_last3"]) < 1e-4
    )  # where reflection differs from zero padding


@pytest.mark.parametrize("n", [1, 255, 256, 257, 513, 514, 5000, 131072])
def test_mel_columns(n):
    wav = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n)) * 0.1
    mel = audio.mel(wav)
    assert mel.shape == (2, 3, 128, -(-n // 256)) and mel.min() >= 0 and mel.max() <= 1
    torch.testing.assert_close(mel[1, 2], audio.mel(wav[1, 2]), atol=1e-5, rtol=0)


def test_inverse_filterbank_meets_the_mel():
    mel = audio.mel(load_file(GOLDEN)["waveform"])[None]
    back = audio.mel_basis() @ audio.mel_to_magnitude(mel)
    target = torch.where(mel > 0, 10 ** (5 * mel - 4), 0.0)
    assert relative(back, target) < 0.002  # librosa's solver leaves 0.049 here


@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_tone_keeps_its_pitch(hz):
    tone = 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(65536) / 16000)
    back = audio.vocode(audio.mel(tone))
    assert back.shape == tone.shape
    peak = (
        torch.fft.rfft(back * torch.hann_window(len(back))).abs().argmax().item()
        * 16000
        / len(back)
    )
    assert abs(peak - hz) < max(0.005 * hz, 4)
    assert 0.5 < back.square().mean().sqrt() / tone.square().mean().sqrt() < 1.5


def test_vocoder_closes_the_circle_and_keeps_onsets():
    golden = load_file(GOLDEN)["waveform"]
    mel = audio.mel(golden)
    assert (audio.mel(audio.vocode(mel)) - mel).abs().mean() < 0.03
    times = [0.5, 1.25, 2.0, 3.1]
    noise = torch.randn(1600, generator=torch.Generator().manual_seed(0)) * torch.exp(
        -torch.arange(1600) / 300
    )
    wav = torch.zeros(65536)
    for time in times:
        wav[round(time * 16000) :][:1600] += 0.3 * noise
    back = audio.vocode(audio.mel(wav))
    assert np.abs(onsets(back) - times).max() < 0.016


def test_silence_stays_silence():
    mel = torch.zeros(2, 128, 64)
    mel[1, 40:50, 20:30] = 0.6
    back = audio.vocode(mel)
    assert back[0].abs().max() == 0 and back[1].abs().max() > 0.001
    assert back[1, 40 * 256 :].abs().max() < 1e-6


def test_vocoder_does_not_depend_on_the_batch_but_on_the_seed():
    mel = torch.rand(3, 128, 48, generator=torch.Generator().manual_seed(5)) * 0.7
    alone, together = audio.vocode(mel[2], seed=3), audio.vocode(mel.view(3, 1, 128, 48), seed=3)
    assert together.shape == (3, 1, 48 * 256)
    assert torch.allclose(
        alone, together[2, 0], atol=1e-5
    )  # a third of a 16-bit step: FFT libraries round by batch
    assert not torch.allclose(alone, audio.vocode(mel[2], seed=4), atol=1e-3)
    assert audio.vocode(mel[0], iterations=2, length=5000).shape == (5000,)
    assert audio.vocode(mel[0, :, :1], iterations=2).shape == (256,)


def textbook_random_phases(magnitude, seed):
    turn = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(seed))
    turn *= 2 * torch.pi
    return torch.polar(torch.ones_like(turn), turn)


def textbook_likely_phases(magnitude, seed):
    """As `likely_phases` says it, of all columns at once; magnitude (b, 513, s)."""
    b, bins, s = magnitude.shape
    root = (magnitude.clamp_min(1e-3)[:, 1:] * magnitude.clamp_min(1e-3)[:, :-1]) ** 0.25
    before = torch.cat([root[..., :1], root[..., :-1]], 2)
    after = torch.cat([root[..., 1:], root[..., -1:]], 2)
    # the tangents that the one and the other neighbor tell of
    late = 2**0.5 * after / root - 1
    early = 1 - 2**0.5 * before / root
    tangent = (late + early) / 2
    tangent = torch.where(tangent > 1, late + early - 1, tangent)
    tangent = torch.where(tangent < -1, late + early + 1, tangent)
    drawn = torch.from_numpy(np.random.default_rng(seed).random((s, bins), np.float32)).T.double()
    turn = torch.pi - 2 * tangent.atan() + 0.8 * (2 * drawn[1:] - 1)
    angle = torch.cat([(2 * torch.pi * drawn[:1]).expand(b, 1, s), turn], 1).cumsum(1)
    return torch.exp(1j * angle)


def textbook_griffin_lim(magnitude, iterations, phases):
    """The algorithm as it is written, one whole transform after the other."""
    window = torch.hann_window(1024, dtype=magnitude.dtype)
    samples = magnitude.shape[-1] * 256
    spectrum = magnitude * phases
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        wav = torch.istft(spectrum, 1024, 256, window=window, length=samples)
        consistent = torch.stft(
            wav[:, :-1], 1024, 256, window=window, pad_mode="reflect", return_complex=True
        )
        ahead = consistent + 0.99 * (consistent - previous)
        spectrum = magnitude * ahead / ahead.abs().clamp_min(1e-12)
        previous = consistent
    return torch.istft(spectrum, 1024, 256, window=window, length=samples)


@pytest.mark.parametrize("columns", [3, 4, 256, 257, 520])  # a chunk is 256
@pytest.mark.parametrize(
    "phases, textbook_phases, rounding",
    [
        (audio.random_phases, textbook_random_phases, 1e-5),
        # a phase of the first or last bin, which is a sign, may be a toss
        (audio.likely_phases, textbook_likely_phases, 5e-3),
    ],
)
def test_griffin_lim_in_chunks_is_the_textbook_one(columns, phases, textbook_phases, rounding):
    """In float64; what float32 adds grows with the iterations."""
    magnitude = torch.rand(2, 513, columns, generator=torch.Generator().manual_seed(2))
    magnitude[1, :, 1] = 0

    def griffin_lim(magnitude, iterations):
        return audio.griffin_lim(magnitude, iterations, seed=4, phases=phases)

    start = textbook_phases(magnitude.double(), seed=4)
    exact = textbook_griffin_lim(magnitude.double(), 32, start)
    assert relative(griffin_lim(magnitude.double(), 32), exact) < 1e-9
    exact = textbook_griffin_lim(magnitude.double(), 4, start)
    assert relative(griffin_lim(magnitude, 4), exact) < rounding
    wavs = (
        griffin_lim(magnitude, 32),
        textbook_griffin_lim(magnitude, 32, start.to(torch.complex64)),
    )
    convergence = [(audio.stft(wav).abs() - magnitude).norm() / magnitude.norm() for wav in wavs]
    assert abs(convergence[0] - convergence[1]) < 1e-4


@pytest.mark.parametrize("sample", [8192 - 96, 8192, 8192 + 100, 8192 + 128])
def test_likely_phases_say_where_in_its_column_a_click_is(sample):
    wav = torch.zeros(16384)
    wav[sample] = 1.0
    magnitude = audio.stft(wav[None]).abs()
    back = audio.griffin_lim(magnitude, 0, phases=audio.likely_phases)[0]
    assert abs(back.abs().argmax().item() - sample) <= 32
    # much of the energy within 4 ms, which random phases spread over 80
    share = {}
    for phases in (audio.random_phases, audio.likely_phases):
        energy = audio.griffin_lim(magnitude, 0, phases=phases)[0].square()
        share[phases] = energy[sample - 32 : sample + 32].sum() / energy.sum()
    assert share[audio.likely_phases] > 0.6 > 0.2 > share[audio.random_phases]


def test_hits_are_sharper_than_from_random_phases():
    """28 iterations from likely phases beside 32 from random ones, which take as long."""
    rng = torch.Generator().manual_seed(0)
    wav = 1e-4 * torch.randn(131072, generator=rng)
    hits = range(8000, 120000, 9000)
    for start in hits:
        burst = torch.randn(4000, generator=rng) * torch.exp(-torch.arange(4000) / 500)
        wav[start : start + 4000] += 0.3 * burst
    mel = audio.mel(wav)
    before = []
    errors = []
    for back in (audio.griffin_lim(audio.mel_to_magnitude(mel[None]))[0], audio.vocode(mel)):
        levels = [back[start - 400 : start - 64].square().mean() for start in hits]
        before.append(10 * torch.stack(levels).log10().mean())
        errors.append((audio.mel(back) - mel).abs().mean())
    assert before[1] < before[0] - 0.5  # dB
    assert errors[1] < errors[0]


def test_inverse_filterbank_in_blocks_is_the_whole_one():
    mel = torch.rand(2, 128, 300, generator=torch.Generator().manual_seed(3)) * 0.9
    mel[:, :40, 7] = 0
    basis = audio.mel_basis()
    target = torch.where(mel > 0, 10 ** (5 * mel - 4), 0.0)
    weight = basis.sum(0).clamp_min(1e-9)[:, None]
    whole = basis.T @ (target / basis.sum(1)[:, None]) / weight
    for _ in range(32):
        whole = whole * (basis.T @ (target / (basis @ whole + 1e-12))) / weight
    ours = audio.mel_to_magnitude(mel)
    assert ours.shape == whole.shape == (2, 513, 300)
    assert relative(ours, whole) < 1e-5


class Allocations(TorchDispatchMode):
    """How many new tensors there were of at least `least` bytes."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if torch.is_tensor(t)
        }
        for t in tree_leaves(out):
            if (
                torch.is_tensor(t)
                and t.untyped_storage().nbytes() >= self.least
                and t.untyped_storage().data_ptr() not in known
            ):
                self.count += 1
        return out


@pytest.mark.parametrize(
    "vocoder, shape",
    [(audio.griffin_lim, (1, 513, 1024)), (audio.mel_to_magnitude, (1, 128, 1024))],
)
def test_an_iteration_allocates_no_whole_spectrum(vocoder, shape):
    """Fresh memory of that size, and passes over it, took most of the vocoder's time."""
    counts = []
    for iterations in (1, 5):
        with Allocations(least=513 * 1024 * 4) as allocations:
            vocoder(torch.rand(shape), iterations)
        counts.append(allocations.count)
    assert counts[0] == counts[1]
