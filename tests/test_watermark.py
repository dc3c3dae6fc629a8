"""The watermark: detected after what happens to sound on its way, inaudible; --verify."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sample
from common import audio, media, watermark
from common.audio import SAMPLE_RATE
from tools.watermark_table import coded, filtered, played, resampled, shifted


def hits(seconds, seed):
    """Noises and tones that begin at random and die away, over a hiss 50 dB below."""
    rng = np.random.default_rng(seed)
    n = round(seconds * SAMPLE_RATE)
    wav = 0.001 * rng.standard_normal(n)
    for at in rng.integers(0, n, max(2, round(seconds))):
        t = np.arange(n - at) / SAMPLE_RATE
        tone = sum(np.sin(2 * math.pi * f * t) for f in rng.uniform(200, 5000, 5)) / 5
        wav[at:] += (
            rng.uniform(0.05, 0.3)
            * (tone + 0.3 * rng.standard_normal(n - at))
            * np.exp(-t / rng.uniform(0.05, 0.5))
        )
    return torch.from_numpy(wav.clip(-1, 1)).float()


CHANGES = {
    "nothing": lambda wav: wav,
    "16 bits, 30 dB down": lambda wav: (wav * 0.03 * 32767).round() / 32767,
    "a beginning and an end cut off": lambda wav: wav[5333:-20001],
    "AAC, 64 kbit/s": lambda wav: coded(wav, "aac", "adts", 64000),
    "MP3, 32 kbit/s": lambda wav: coded(wav, "libmp3lame", "mp3", 32000),
    "44.1 kHz and back": lambda wav: resampled(
        resampled(wav, SAMPLE_RATE, 44100), 44100, SAMPLE_RATE
    ),
    "every other phase": lambda wav: -wav,
    "a second of silence inside": lambda wav: torch.cat(
        [wav[:60000], torch.zeros(16384), wav[60000:]]
    ),
    "four seconds of it": lambda wav: wav[30000:94000],
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_mark_survives(change):
    for seed in range(4):
        wav = hits(10, seed)
        assert watermark.confidence(CHANGES[change](watermark.mark(wav))) > watermark.SURE
        assert watermark.confidence(CHANGES[change](wav)) < watermark.SURE


@pytest.mark.parametrize("seconds", [0, 0.0005, 0.3, 3, 40])
def test_it_is_as_long_and_seldom_louder_or_softer_by_more_than_a_decibel(seconds):
    wav = hits(seconds, 7) if seconds else torch.zeros(0)
    marked = watermark.mark(wav)
    assert marked.shape == wav.shape
    if seconds >= 3:
        change = (
            20
            * torch.log10(audio.stft(marked[None]).abs() / audio.stft(wav[None]).abs())[
                0, 26:410
            ].flatten()
        )
        assert (
            0.4 < change.abs().mean() < 1
            and change.abs().quantile(0.9) < 1.5
            and change.mean().abs() < 0.2
        )
        assert marked.abs().max() < 1.13 * wav.abs().max()


def test_nothing_else_changes(monkeypatch):
    wav = hits(40, 8)
    monkeypatch.setattr(watermark, "DEPTH", 0)
    assert (watermark.mark(wav) - wav).abs().max() < 1e-6  # over the seam between two spans too
    monkeypatch.undo()
    assert (
        watermark.mark(torch.zeros(SAMPLE_RATE)).abs().max() == 0
        and watermark.confidence(torch.zeros(SAMPLE_RATE)) < 1e-6
    )


def test_a_long_sound_is_marked_throughout():
    marked = watermark.mark(hits(45, 9))
    assert all(
        watermark.confidence(marked[at : at + 5 * SAMPLE_RATE]) > watermark.SURE
        for at in range(0, 40 * SAMPLE_RATE, 70000)
    )


def test_confidence_is_what_it_says():
    """Of unmarked sounds a twentieth reaches 0.95, and so on: it is 1 - p."""
    matches = [watermark.match(hits(6, 100 + k), search=False) for k in range(300)]
    sure = torch.tensor([found.confidence for found in matches])
    assert 0.01 < (sure > 0.95).float().mean() < 0.1
    assert 0.3 < sure.median() < 0.7
    assert (sure > watermark.SURE).sum() == 0


@pytest.mark.parametrize("speed", [0.8, 0.9, 0.95, 1.1, 1.25])
def test_other_speeds_are_found(speed):
    wav = hits(8, 11)
    found = watermark.match(played(watermark.mark(wav), speed))
    assert found.confidence > watermark.SURE
    assert found.speed == pytest.approx(speed, rel=3e-3) and found.pitch == found.speed
    assert watermark.confidence(played(wav, speed)) < watermark.SURE


def test_other_tempos_and_pitches_are_found():
    marked = watermark.mark(hits(8, 12))
    slower = watermark.match(filtered(marked, ("atempo", "0.9")))
    assert slower.confidence > watermark.SURE and slower.pitch == 1
    assert slower.speed == pytest.approx(0.9, rel=5e-3)
    higher = watermark.match(shifted(marked, 1.12))
    assert higher.confidence > watermark.SURE and higher.speed == 1
    assert higher.pitch == pytest.approx(1.12, rel=0.05)


def test_the_search_is_part_of_the_confidence():
    """Unmarked sounds are no surer for it, and plain playing hardly less."""
    sure = torch.tensor([watermark.confidence(hits(6, 500 + k)) for k in range(20)])
    assert (sure > 0.99).sum() <= 1 and sure.median() < 0.8
    marked = watermark.mark(hits(6, 13))[: 3 * SAMPLE_RATE]
    plain = watermark.match(marked, search=False).confidence
    assert watermark.match(marked).confidence == pytest.approx(plain**2)
    # how many ways are tried, and that they reach as far as is said
    speeds = [speed for speed, _ in watermark.playbacks()]
    assert min(speeds) == pytest.approx(0.8) and max(speeds) == pytest.approx(1.25)


def test_long_sounds_are_searched_in_some_places(monkeypatch):
    """So that an hour takes no longer than two minutes do."""
    seen = list(watermark.spans_of(torch.zeros(40 * watermark.SPAN), most=3))
    assert len(seen) == 3
    assert len(list(watermark.spans_of(torch.zeros(2 * watermark.SPAN), most=3))) == 2


def verify(capsys, *argv):
    status = sample.main(["--verify", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_verifying_an_empty_folder_is_no_success(capsys, tmp_path):
    assert sample.main(["--verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"sample.py: {tmp_path}: no video or sound in this folder\n"


def test_verifying_patterns_and_lists(capsys, tmp_path):
    for name in ("a.foley.wav", "b.wav"):
        media.write_wav(tmp_path / name, hits(2, 10))
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    (tmp_path / "list.txt").write_text("# ours\n*.foley.*\n")
    for given, names in (("*", ["a.foley.wav", "b.wav"]), ("b*", ["b.wav"])):
        status, lines, _ = verify(capsys, tmp_path / given, "--json")
        assert status == 3 and [Path(json.loads(line)["file"]).name for line in lines] == names
    status, lines, _ = verify(capsys, f"@{tmp_path / 'list.txt'}", "--json")
    assert status == 3 and len(lines) == 1 and "a.foley.wav" in lines[0]
    # what fits nothing is one line
    status, lines, err = verify(capsys, tmp_path / "c*", f"@{tmp_path / 'none.txt'}")
    assert status == 1 and not lines and len(err) == 2 and "none.txt: cannot be read" in err[1]


def test_verify_tells_ours_from_others_by_tag_or_by_sound(capsys, tmp_path):
    wav = hits(8, 10)
    ours, bare, tagged, foreign = (
        tmp_path / f"{name}.wav" for name in ("ours", "bare", "tagged", "foreign")
    )
    tags = {"comment": f"{watermark.CLAIM} tiny, seed 0, version {sample.VERSION}"}
    media.write_wav(ours, watermark.mark(wav), tags)
    soundfile.write(bare, watermark.mark(wav).numpy(), SAMPLE_RATE)
    media.write_wav(tagged, wav, tags)
    media.write_wav(foreign, wav)
    verdicts = {}
    for path in (ours, bare, tagged, foreign):
        status, lines, _ = verify(capsys, path, "--json")
        line = json.loads(lines[0])
        assert {"file", "tags", "watermark", "confidence"} < set(line)
        assert line["file"] == str(path) and line["xmp"] == {} and line["speed"] == 1
        verdicts[path.stem] = status, line["tags"], line["watermark"]
    assert verdicts == {
        "ours": (0, True, True),
        "bare": (0, False, True),
        "tagged": (0, True, False),
        "foreign": (3, False, False),
    }
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    status, lines, err = verify(capsys, tmp_path)  # a folder, one of its files broken
    assert status == 1 and len(lines) == 4 and len(err) == 1 and "broken.wav" in err[0]
    assert sum("not known as ours" in line for line in lines) == 1
    assert verify(capsys, tmp_path / "no.wav")[0] == 1
