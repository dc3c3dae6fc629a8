"""tools/vocoders.py: its measures on sounds whose answers are known, and its table."""

import numpy as np
import pytest
import soundfile
import torch

from common import audio
from tools import vocoders

RATE = 16000


def seconds(n):
    return torch.arange(n) / RATE


def noise(n, level, seed=0):
    return level * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def ring(decay, hz=1000.0, n=32000, at=8000):
    """Faint noise, and from sample `at` a mode that falls by `decay` dB a second."""
    time = seconds(n - at)
    mode = 0.3 * torch.sin(2 * torch.pi * hz * time) * 10 ** (-decay * time / 20)
    wav = noise(n, 1e-6)
    wav[at:] += mode
    return wav


def hit(rise, n=32000, at=16000, before=1e-5):
    """Noise of level `before`, and from sample `at` a burst that takes `rise` seconds to its peak.

    A low tone's rectified envelope is the ramp itself, held for 60 ms."""
    ramp = (seconds(n - at) / rise).clamp(max=1.0) * (seconds(n - at) < rise + 0.06)
    wav = noise(n, before)
    wav[at:] += 0.5 * ramp * torch.sin(2 * torch.pi * 2000 * seconds(n - at))
    return wav


def test_a_sound_is_itself():
    wav = ring(60) + hit(0.005, at=24000)
    row = vocoders.measure(wav, wav)
    for name in ("lsd", "short_lsd", "convergence", "mel", "decay", "rise", "pre_echo"):
        assert row[name] == 0, name
    matches, ours, theirs = row["f1"]
    assert matches == ours == theirs == 2


def test_twice_as_loud_is_six_decibels():
    wav = noise(32000, 0.05)
    row = vocoders.measure(2 * wav, wav)
    for name in ("lsd", "short_lsd", "mel"):
        assert row[name] == pytest.approx(20 * np.log10(2), abs=0.05), name
    assert row["convergence"] == pytest.approx(1)


@pytest.mark.parametrize("decay", [30.0, 120.0])
def test_decay_of_a_mode(decay):
    reference = ring(decay)
    modes = vocoders.ringing_modes(reference)
    # of neighboring bins, of which a mode fills three, the middle one
    assert {k for k, _ in modes} == {64}
    spectrum = audio.stft(reference[None])[0]
    slope, deviation = vocoders.fit_decay(vocoders.mode_levels(spectrum, modes[0]))
    assert slope == pytest.approx(-decay, rel=0.02) and deviation < 0.3
    error, rough = vocoders.decays(ring(1.25 * decay), reference)
    assert error == pytest.approx(25, abs=2) and rough < 0.5
    # another mode four hertz off beats with it
    _, rough = vocoders.decays(reference + 0.7 * ring(decay, 1004.0), reference)
    assert rough > 1.5


def test_noise_has_no_modes():
    wav = noise(48000, 1e-3)
    wav[16000:] += noise(32000, 0.1, 1) * 10 ** (-60 * seconds(32000) / 20)
    assert len(audio.detect_onsets(audio.mel(wav).numpy())) == 1
    assert vocoders.ringing_modes(wav) == []


@pytest.mark.parametrize("rise", [0.005, 0.02])
def test_rise_of_a_hit(rise):
    begin, length, peak = vocoders.rise(vocoders.envelope(hit(rise)), 1960, 2120)
    # 80 % of a linear ramp, in half milliseconds, of an envelope that is 2 ms coarse
    assert length == pytest.approx(0.8 * rise * 2000, abs=3)
    assert abs(begin - 2000 - 0.1 * rise * 2000) <= 3
    assert peak == pytest.approx(0.5 / 2**0.5, rel=0.05)
    error, _ = vocoders.attacks(hit(rise + 0.01), hit(rise))
    assert error == pytest.approx(8, abs=1.5)


def test_what_sounds_before_a_hit():
    reference = hit(0.005)
    wav = reference.clone()
    wav[15500:16000] += noise(500, 0.05, 2)
    _, echo = vocoders.attacks(wav, reference)
    # 17 dB below the peak, where the floor is 60 dB below it
    assert echo == pytest.approx(60 - 20 * np.log10(0.3536 / 0.05), abs=1.5)
    # silence before it is no fault
    assert vocoders.attacks(reference, hit(0.005, before=0.005))[1] == 0


@pytest.mark.parametrize("name", vocoders.WAYS)
def test_every_way_gives_the_sound_of_the_mel(name):
    wav = ring(60) + noise(32000, 0.01)
    mel = audio.mel(wav)
    back = vocoders.WAYS[name](mel[None])
    assert back.shape == wav.shape
    limit = 4 if "alone" in name else 2.2
    assert vocoders.mel_distance(back, wav) < limit


@pytest.mark.parametrize("way", [vocoders.accelerated, vocoders.admm, vocoders.joint])
def test_iterations_help(way):
    wav = ring(60) + noise(32000, 0.01)
    mel = audio.mel(wav)[None]
    few, many = (vocoders.spectral_convergence(way(mel, n), wav) for n in (1, 32))
    assert many < 0.8 * few


def test_intervals():
    rng = np.random.default_rng(1)
    first = [{"lsd": x, "f1": (8, 10, 10)} for x in rng.normal(5, 1, 100)]
    other = [{"lsd": row["lsd"] - 0.1, "f1": (9, 10, 10)} for row in first]
    mean, half = vocoders.with_intervals(first)["lsd"]
    # 1.96 standard errors of 0.1
    assert mean == pytest.approx(np.mean([row["lsd"] for row in first])) and 0.14 < half < 0.26
    assert vocoders.with_intervals(first)["f1"] == (pytest.approx(0.8), pytest.approx(0))
    # clip by clip, what clips differ in does not count
    row = vocoders.with_intervals(other, first)
    assert row["lsd"] == (pytest.approx(-0.1), pytest.approx(0, abs=1e-9))
    assert row["f1"][0] == pytest.approx(0.1)


def test_the_table(tmp_path, capsys):
    for k, wav in enumerate((hit(0.005), ring(60), torch.zeros(32000))):
        soundfile.write(tmp_path / f"{k}.wav", wav.numpy(), RATE)
    files = sorted(map(str, tmp_path.glob("*.wav")))
    ways = ["Griffin-Lim, 32", "likely phases alone"]
    vocoders.main([*files, "--ways", *ways])
    lines = capsys.readouterr().out.splitlines()
    # silence is left out
    assert lines[0] == "2 clips"
    rows = [line for line in lines if line.startswith(("| Griffin", "| likely", "| the true"))]
    assert [row.split(" |")[0] for row in rows] == [f"| {way}" for way in ways] + [
        "| the true phases",
        f"| {ways[1]}",
    ]
    with pytest.raises(SystemExit) as stopped:
        vocoders.main([files[2]])
    assert stopped.value.code == 2
