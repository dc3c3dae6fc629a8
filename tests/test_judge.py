"""The judge: which excerpts it learns from, that it learns, and distances by their formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_video

import data
import foley
from common import audio, media
from metrics import judge

ROOT = Path(foley.__file__).parent


def hit(time, material):
    return {"time": time, "material": material}


def test_hits_of_which_nobody_could_tell_are_left_out():
    onsets = [
        hit(1.0, "wood"),
        hit(1.2, "glass"),
        hit(2.0, "metal"),
        hit(2.1, "metal"),
        hit(3.0, "wood"),
        hit(3.5, "glass"),
    ]
    assert judge.isolated_hits(onsets) == [
        (75, "glass"),
        (125, "metal"),
        (131, "metal"),
        (188, "wood"),
        (219, "glass"),
    ]


def test_background_excerpts_hold_no_hit():
    onsets = [hit(1.0, "wood"), hit(4.0, "glass")]
    columns = judge.background(onsets, 512, np.random.default_rng(0), 1000)
    assert len(columns) > 300
    for column in columns:
        for onset in onsets:
            at = round(onset["time"] / audio.COLUMN)
            assert not column - judge.BEFORE <= at < column - judge.BEFORE + judge.SPAN


def test_an_excerpt_at_the_ends_is_padded_with_silence():
    mel = torch.arange(1, 41.0).expand(128, 40)
    assert judge.excerpt(mel, 0)[0].tolist() == [0.0] * judge.BEFORE + list(range(1, 29))
    assert judge.excerpt(mel, 38)[0].tolist() == list(range(35, 41)) + [0.0] * 26
    assert judge.excerpt(mel, 100)[0].tolist() == [0.0] * judge.SPAN
    assert judge.excerpt(mel, 20, 2).shape == (128, judge.SPAN + 4)


def test_distances_are_their_formulas():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 6))
    b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1
    # the root of a product, which is not symmetric
    values, vectors = np.linalg.eig(np.cov(a.T) @ np.cov(b.T))
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    spread = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    plain = ((a.mean(0) - b.mean(0)) ** 2).sum() + spread
    assert judge.frechet_distance(a, b) == pytest.approx(plain, rel=1e-9)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)

    p = rng.dirichlet(np.ones(5), 50)
    mean = [sum(row[k] for row in p) / 50 for k in range(5)]
    plain = np.exp(sum(row[k] * np.log(row[k] / mean[k]) for row in p for k in range(5)) / 50)
    assert judge.inception_score(p) == pytest.approx(plain)
    assert judge.inception_score(np.eye(5)) == pytest.approx(5)
    assert judge.kl_divergence(p, p).max() == pytest.approx(0, abs=1e-12)
    assert (judge.kl_divergence(p, p[::-1]) > 0).all()


KINDS = ("click", "hiss", "tone")


def strike(kind, rng):
    """A quarter of a second of one kind, float32. They differ in shape, not in pitch."""
    seconds = np.arange(audio.SAMPLE_RATE // 4) / audio.SAMPLE_RATE
    if kind == "tone":
        wave = np.sin(2 * np.pi * 1000 * seconds)
    else:
        wave = rng.standard_normal(len(seconds))
    decay = 0.002 if kind == "click" else 0.1
    return (0.2 * wave * np.exp(-seconds / decay)).astype(np.float32)


def make_strikes(folder, clips):
    """Clips of 8 s with nine hits each, three of each kind, with their labels."""
    rng = np.random.default_rng(0)
    for number in range(clips):
        wav = 1e-4 * rng.standard_normal(8 * audio.SAMPLE_RATE).astype(np.float32)
        onsets = [
            hit(0.5 + 0.8 * k, str(kind)) for k, kind in enumerate(rng.permutation(3 * [*KINDS]))
        ]
        for onset in onsets:
            wave = strike(onset["material"], rng)
            at = round(onset["time"] * audio.SAMPLE_RATE)
            wav[at : at + len(wave)] += wave
        video = make_video(folder / f"{number:05d}.mp4", 8, fps=5, sound=wav)
        video.with_suffix(".json").write_text(json.dumps({"onsets": onsets}))


def test_it_learns_and_loads(tmp_path):
    """Trained for a moment on few clips it knows their hits; its file says what the classes are."""
    make_strikes(tmp_path / "clips", 6)
    judge.main(
        [
            "--data",
            str(tmp_path / "clips"),
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "200",
            "--batch",
            "16",
            "--lr",
            "2e-3",
            "--warmup",
            "10",
            "--dtype",
            "float32",
        ]
    )
    model = judge.Judge.load(tmp_path / "run" / "last.safetensors")
    assert list(model.config.classes) == [judge.NOTHING, *KINDS]
    right = total = 0
    for video in sorted((tmp_path / "clips").glob("*.mp4")):
        hits = judge.isolated_hits(data.read_onsets(video))
        mel = audio.mel(media.read_audio(video))
        predicted = model.classify(mel, [column for column, _ in hits])
        right += sum(a == b for a, (_, b) in zip(predicted, hits, strict=True))
        total += len(hits)
    print(f"{right} of {total} hits")
    assert total == 54 and right > 0.8 * total
    features, classes = model.embed_clip(mel)
    assert features.shape == (64,) and classes.sum() == pytest.approx(1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 200


def test_clips_with_missing_or_malformed_labels_are_errors(tmp_path):
    foley.make_set(tmp_path, 1, seed=3, size=64, fps=15.625, duration=2.0)
    for text in (
        "[]",
        '{"onsets": [{"material": "wood"}]}',
        '{"onsets": [{"time": "soon"}]}',
        "{",
        '{"onsets": 1}',
    ):
        (tmp_path / "00000.json").write_text(text)
        with pytest.raises(media.MediaError, match="00000.json: not the labels"):
            judge.Excerpts(tmp_path)
    (tmp_path / "00000.json").unlink()
    with pytest.raises(media.MediaError, match="00000.json: no such file"):
        judge.Excerpts(tmp_path)


def test_labels_come_in_the_order_of_time(tmp_path):
    (tmp_path / "a.json").write_text('{"onsets": [{"time": 2.0}, {"time": 0.5}]}')
    assert [onset["time"] for onset in data.read_onsets(tmp_path / "a.mp4")] == [0.5, 2.0]


def test_the_shipped_judge_knows_clips_it_was_not_trained_on(tmp_path):
    foley.make_set(tmp_path, 8, seed=77, size=64, fps=15.625, duration=8.192)
    model = judge.Judge.load(ROOT / "weights" / "mini" / "judge.safetensors")
    right = 0
    total = 0
    for video in sorted(tmp_path.glob("*.mp4")):
        hits = judge.isolated_hits(data.read_onsets(video))
        mel = audio.mel(media.read_audio(video))
        predicted = model.classify(mel, [column for column, _ in hits])
        right += sum(a == b for a, (_, b) in zip(predicted, hits, strict=True))
        total += len(hits)
        assert set(model.classify(torch.zeros(128, 512), [100, 300])) == {judge.NOTHING}
    assert total > 20 and right / total > 0.8
