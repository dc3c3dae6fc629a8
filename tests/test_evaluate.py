"""The scores: onsets of known sounds, one-to-one matching, dealing to wrong videos, the table on a hand-made set."""
import itertools
import json
import types

import numpy as np
import pytest
import torch

import data
import evaluate
import foley


def clicks(times, seconds=4.0):
    """Short decaying bursts at the given times over a faint hiss."""
    rng = np.random.default_rng(0)
    wav = 1e-4 * rng.standard_normal(round(seconds * data.SAMPLE_RATE))
    burst = 0.5 * rng.standard_normal(1600) * np.exp(-np.arange(1600) / 200)
    for time in times:
        start = round(time * data.SAMPLE_RATE)
        wav[start:start + 1600] += burst[:len(wav) - start]
    return torch.tensor(wav, dtype=torch.float32)


@pytest.fixture(scope="module")
def foley_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    foley.make_set(folder, 4, seed=61, size=64, fps=15.625, duration=8.192)
    return folder


def test_onsets_of_clicks_are_found_within_a_column():
    times = [0.3, 0.8013, 1.1, 1.25, 2.9307, 3.5]
    found = evaluate.onsets_of(clicks(times))
    assert len(found) == len(times) and np.abs(found - times).max() <= data.COLUMN


def test_steady_noise_tones_and_silence_have_no_onsets():
    t = torch.arange(64000) / data.SAMPLE_RATE
    noise = torch.randn(64000, generator=torch.Generator().manual_seed(0))
    glide = 0.3 * torch.sin(2 * torch.pi * (300 * t + 200 * t * t))
    for wav in (torch.zeros(64000), 0.1 * noise, 1e-3 * noise, glide, 0.1 * noise * torch.sin(torch.pi * t / 4)):
        assert len(evaluate.onsets_of(wav)) == 0


def test_strength_only_counts_rises():
    level = np.full((128, 40), 0.4, np.float32)
    level[:, 20:] = 0.8
    assert np.flatnonzero(data.onset_strength(level)).tolist() == [20, 21]
    assert not data.onset_strength(level[:, ::-1]).any()


def test_matching_is_one_to_one_and_as_large_as_can_be():
    assert data.match([1.0, 1.05], [1.02], 0.1) == [(0, 0)]     # two found for one label count once
    assert data.match([1.0], [1.2], 0.1) == []
    assert len(data.match([1.0, 1.09], [0.95, 1.0], 0.1)) == 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        found, labelled = (np.sort(rng.uniform(0, 1, 4)) for _ in range(2))
        pairs = data.match(found, labelled, 0.1)
        assert all(abs(found[i] - labelled[j]) <= 0.1 for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        best = max(sum(abs(a - b) <= 0.1 for a, b in zip(found, order)) for order in itertools.permutations(labelled))
        assert len(pairs) == best


def test_f1_of_counts():
    assert data.f1(3, 4, 6) == pytest.approx((0.75, 0.5, 0.6))
    assert data.f1(0, 0, 0) == (0, 0, 0) and data.f1(0, 0, 5) == (0, 0, 0)


def test_desync_is_the_shift_between_the_trains():
    labelled = np.array([0.5, 1.3, 1.7, 3.2])
    for shift in (-0.4, 0.0, 0.12):
        assert evaluate.desync(labelled + shift, labelled) == pytest.approx(shift, abs=0.004)
    assert np.isnan(evaluate.desync([], labelled)) and np.isnan(evaluate.desync(labelled, []))


def test_nobody_keeps_their_own():
    for count in range(2, 40):
        dealt = evaluate.deal(count)
        assert sorted(dealt) == list(range(count)) and (dealt != np.arange(count)).all()
        assert (dealt == evaluate.deal(count)).all()


def test_score_pools_onsets_over_clips():
    labelled = [[1.0, 2.0, 3.0], [1.0], []]
    row = evaluate.score([[1.02, 2.08], [], [0.5]], labelled)
    assert row["precision_100ms"] == pytest.approx(2 / 3) and row["recall_100ms"] == pytest.approx(2 / 4)
    assert row["onset_f1_100ms"] == pytest.approx(4 / 7) and row["onset_f1_50ms"] == pytest.approx(2 / 7)
    assert row["clips"] == 3
    assert evaluate.score([[], [], []], labelled)["desync_ms"] is None


def test_table_and_json_for_sounds_made_elsewhere(foley_set, tmp_path, capsys):
    """Sounds that click at exactly the labels score near one, those of other videos do not, silence nothing."""
    samples, out = tmp_path / "samples", tmp_path / "out"
    samples.mkdir()
    for video in foley_set.glob("*.mp4"):
        data.write_wav(samples / f"{video.stem}.foley.wav", clicks(evaluate.read_labels(video), 8.192))
    assert evaluate.main(["--data", str(foley_set), "--samples", str(samples), "--out", str(out)]) == 0
    rows = json.loads((out / "evaluate.json").read_text())["rows"]
    assert list(rows) == ["ours", "ground_truth", "wrong_video", "silence"]
    assert rows["ours"]["onset_f1_50ms"] > 0.9 and rows["ground_truth"]["onset_f1_100ms"] > 0.9
    assert rows["wrong_video"]["onset_f1_100ms"] < 0.5 and rows["silence"]["onset_f1_100ms"] == 0
    assert rows["silence"]["desync_ms"] is None and all(row["clips"] == 4 for row in rows.values())
    text = capsys.readouterr().out.splitlines()
    assert len(text) == 5 and len({len(line) for line in text}) == 1 and "onset_f1_100ms" in text[0]
    assert f"{rows['ours']['onset_f1_100ms']:.3f}" in text[1]
    assert not [p for p in out.iterdir() if p.name != "evaluate.json"]


def test_drawn_sounds_go_to_their_own_video(foley_set, tmp_path, monkeypatch):
    """Without --samples the models are asked once a video, each with a seed of its own; --keep writes the sounds."""
    asked = []

    def generate(video, models, seed, **settings):
        asked.append((video.name, seed))
        return types.SimpleNamespace(wav=clicks(evaluate.read_labels(video), 8.192))
    monkeypatch.setattr(evaluate, "load_models", lambda weights, device: "models")
    monkeypatch.setattr(evaluate, "generate", generate)
    flags = ["--data", str(foley_set), "--out", str(tmp_path), "--clips", "3", "--seed", "5", "--keep"]
    assert evaluate.main(flags) == 0
    assert asked == [("00000.mp4", 5), ("00001.mp4", 6), ("00002.mp4", 7)]
    assert sorted(p.name for p in tmp_path.glob("*.wav")) == [f"0000{k}.foley.wav" for k in range(3)]
    assert json.loads((tmp_path / "evaluate.json").read_text())["rows"]["ours"]["onset_f1_100ms"] > 0.9


def test_mistakes_are_one_line(foley_set, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for flags, word in ((["--data", str(tmp_path / "none")], "no such folder"),
                        (["--data", str(tmp_path / "empty")], "empty"),
                        (["--data", str(foley_set), "--samples", str(tmp_path / "empty")], "--samples"),
                        (["--data", str(foley_set), "--weights", str(tmp_path / "empty")], "empty")):
        assert evaluate.main([*flags, "--out", str(tmp_path / "out")]) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py:")]
        assert len(errors) == 1 and word in errors[0]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--data", str(foley_set), "--clips", "1"])
    assert stopped.value.code == 2
    assert not (tmp_path / "out" / "evaluate.json").exists()
