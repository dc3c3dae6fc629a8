"""The scores: onsets of known sounds, one-to-one matching, dealing to wrong videos, the table on a hand-made set."""

import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import foley
import sample
from common import audio, media, watermark
from metrics import judge
from vae import AutoencoderKL


def clicks(times, seconds=4.0):
    """Short decaying bursts at the given times over a faint hiss."""
    rng = np.random.default_rng(0)
    wav = 1e-4 * rng.standard_normal(round(seconds * audio.SAMPLE_RATE))
    burst = 0.5 * rng.standard_normal(1600) * np.exp(-np.arange(1600) / 200)
    for time in times:
        start = round(time * audio.SAMPLE_RATE)
        wav[start : start + 1600] += burst[: len(wav) - start]
    return torch.tensor(wav, dtype=torch.float32)


def onsets_of(wav):
    return audio.detect_onsets(audio.mel(torch.as_tensor(wav)).numpy())


def times_of(video):
    return sorted(
        onset["time"] for onset in json.loads(video.with_suffix(".json").read_text())["onsets"]
    )


@pytest.fixture(scope="module")
def foley_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    foley.make_set(folder, 4, seed=61, size=64, fps=15.625, duration=8.192)
    return folder


def test_onsets_of_clicks_are_found_within_a_column():
    times = [0.3, 0.8013, 1.1, 1.25, 2.9307, 3.5]
    found = onsets_of(clicks(times))
    assert len(found) == len(times) and np.abs(found - times).max() <= audio.COLUMN


def test_steady_noise_tones_and_silence_have_no_onsets():
    t = torch.arange(64000) / audio.SAMPLE_RATE
    noise = torch.randn(64000, generator=torch.Generator().manual_seed(0))
    glide = 0.3 * torch.sin(2 * torch.pi * (300 * t + 200 * t * t))
    for wav in (
        torch.zeros(64000),
        0.1 * noise,
        1e-3 * noise,
        glide,
        0.1 * noise * torch.sin(torch.pi * t / 4),
    ):
        assert len(onsets_of(wav)) == 0


def test_strength_only_counts_rises():
    level = np.full((128, 40), 0.4, np.float32)
    level[:, 20:] = 0.8
    assert np.flatnonzero(audio.onset_strength(level)).tolist() == [20, 21]
    assert not audio.onset_strength(level[:, ::-1]).any()


def test_matching_is_one_to_one_and_as_large_as_can_be():
    assert audio.match([1.0, 1.05], [1.02], 0.1) == [(0, 0)]  # two found for one label count once
    assert audio.match([1.0], [1.2], 0.1) == []
    assert len(audio.match([1.0, 1.09], [0.95, 1.0], 0.1)) == 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        found, labelled = (np.sort(rng.uniform(0, 1, 4)) for _ in range(2))
        pairs = audio.match(found, labelled, 0.1)
        assert all(abs(found[i] - labelled[j]) <= 0.1 for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        best = max(
            sum(abs(a - b) <= 0.1 for a, b in zip(found, order))
            for order in itertools.permutations(labelled)
        )
        assert len(pairs) == best


def test_f1_of_counts():
    assert audio.f1(3, 4, 6) == pytest.approx((0.75, 0.5, 0.6))
    assert audio.f1(0, 0, 0) == (0, 0, 0) and audio.f1(0, 0, 5) == (0, 0, 0)


def test_desync_slides_onset_strengths():
    true = np.zeros(400, np.float32)
    true[[30, 111, 180, 333]] = 1, 0.5, 0.8, 0.9
    for shift in (-25, 0, 8):
        assert evaluate.slide(np.roll(true, shift), true) == pytest.approx(shift * audio.COLUMN)
    assert evaluate.slide(np.roll(true, 8)[:350], true) == pytest.approx(
        8 * audio.COLUMN
    )  # a shorter sound
    assert np.isnan(evaluate.slide(np.zeros(400), true)) and np.isnan(
        evaluate.slide(true, np.zeros(400))
    )


def test_nobody_keeps_their_own():
    for count in range(2, 40):
        dealt = evaluate.deal(count)
        assert sorted(dealt) == list(range(count)) and (dealt != np.arange(count)).all()
        assert (dealt == evaluate.deal(count)).all()


def clip(found, labelled, pairs, close, late=0.0, loudness=0.0, **more):
    return {
        "found": found,
        "labelled": labelled,
        "pairs_100": pairs,
        "pairs_50": close,
        "late": late,
        "loudness": loudness,
        "seconds": np.nan,
        "own": labelled,
        "pairs_own": pairs,
        **more,
    }


def test_score_takes_the_papers_figures_once():
    """Features and classes of Melception are drawn again for no interval; its divergence, a number a clip, is."""
    draw = np.random.default_rng(0)
    rows = [
        clip(
            2,
            3,
            2,
            1,
            melception_made=draw.normal(size=20),
            melception_true=draw.normal(size=20),
            melception_classes=draw.dirichlet(np.ones(5)),
            melception_kl=float(k),
        )
        for k in range(12)
    ]
    row, intervals = evaluate.score(rows, rows)
    stack = {name: np.stack([r[name] for r in rows]) for name in evaluate.ONCE}
    assert row["melception_fid"] == pytest.approx(
        judge.frechet(stack["melception_made"], stack["melception_true"])
    )
    assert (
        1 <= row["melception_is"] <= 5
        and row["melception_is_deviation"] > 0
        and row["melception_kl"] == 5.5
    )
    assert [name for name in intervals if "melception" in name] == ["melception_kl"]
    text = {
        line.split()[0]: line
        for line in evaluate.table({"ours": row}, {"ours": intervals}).splitlines()[1:]
    }
    assert (
        f"{row['melception_fid']:.2f}" in text["melception_fid"]
        and "±" not in text["melception_fid"]
        and "±" in text["melception_kl"]
    )


def test_score_pools_onsets_over_clips():
    rows = [
        clip(2, 3, 2, 1, 0.3, -6.0, aligned=True, right=1, hits=2),
        clip(0, 1, 0, 0, np.nan, 4.0, aligned=False, right=0, hits=0),
        clip(1, 0, 0, 0, -0.1, 0.0, aligned=True, right=2, hits=2),
    ]
    row, intervals = evaluate.score(rows, rows)
    assert row["precision_100ms"] == pytest.approx(2 / 3) and row["recall_100ms"] == pytest.approx(
        2 / 4
    )
    assert row["onset_f1_100ms"] == pytest.approx(4 / 7) and row["onset_f1_50ms"] == pytest.approx(
        2 / 7
    )
    assert row["onset_count_error"] == pytest.approx(1) and row["loudness_db"] == pytest.approx(
        10 / 3
    )
    assert row["heard_f1_100ms"] == row["onset_f1_100ms"]
    assert row["desync_ms"] == pytest.approx(200) and row["desync_over_200ms"] == pytest.approx(
        1 / 2
    )
    assert row["align_acc"] == pytest.approx(2 / 3) and row["material_acc"] == pytest.approx(3 / 4)
    assert row["clips"] == 3 and row["seconds"] is None
    assert (
        all(low <= row[name] <= high for name, (low, high) in intervals.items())
        and intervals["onset_f1_100ms"][0] == 0
    )


def test_intervals_cover_as_often_as_they_say():
    """Of 60 sets of 40 clips whose true rate is known, about 95 % of the intervals hold it."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(60):
        rows = [clip(10, 10, k, k) for k in draw.binomial(10, 0.7, 40)]
        low, high = evaluate.score(rows, rows)[1]["onset_f1_100ms"]
        held += low <= 0.7 <= high
    assert 52 <= held <= 60


def test_table_and_json_for_sounds_made_elsewhere(foley_set, tmp_path, capsys):
    """Sounds that click at exactly the labels score near one, those of other videos do not, silence nothing."""
    samples, out = tmp_path / "samples", tmp_path / "out"
    samples.mkdir()
    for video in foley_set.glob("*.mp4"):
        media.write_wav(samples / f"{video.stem}.foley.wav", clicks(times_of(video), 8.192))
    flags = ["--data", str(foley_set), "--samples", str(samples), "--judges", str(tmp_path)]
    evaluate.main([*flags, "--out", str(out)])
    made = json.loads((out / "evaluate.json").read_text())
    rows = made["rows"]
    assert list(rows) == ["ours", "ground_truth", "wrong_video", "silence"]
    assert not any("melception" in column for column in rows["ours"])  # nobody asked for those
    assert rows["ours"]["onset_f1_50ms"] > 0.9 and rows["ground_truth"]["onset_f1_100ms"] > 0.9
    assert rows["wrong_video"]["onset_f1_100ms"] < 0.5 and rows["silence"]["onset_f1_100ms"] == 0
    assert rows["silence"]["desync_ms"] is None and all(row["clips"] == 4 for row in rows.values())
    text = capsys.readouterr().out.splitlines()
    assert text[0].split() == list(rows) and len({len(line) for line in text}) == 1
    best = next(line for line in text if line.startswith("onset_f1_50ms"))
    low, high = made["intervals"]["ours"]["onset_f1_50ms"]
    assert f"{rows['ours']['onset_f1_50ms']:.3f} ±{(high - low) / 2:.3f}" in best
    clips = made["clips"]  # from them the table can be had again
    assert list(clips) == [f"0000{k}.mp4" for k in range(4)] and all(
        list(clip) == list(rows) for clip in clips.values()
    )
    pairs, found, labelled = (
        sum(clip["ours"][k] for clip in clips.values()) for k in ("pairs_50", "found", "labelled")
    )
    assert audio.f1(pairs, found, labelled)[2] == pytest.approx(rows["ours"]["onset_f1_50ms"])
    assert all(
        clip["silence"]["late"] is None and clip["ours"]["seconds"] is None
        for clip in clips.values()
    )
    assert sorted(p.name for p in out.iterdir()) == ["evaluate.json", "evaluate.png"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "evaluate.py",
    ]
    done = subprocess.run(
        [*torchrun, *flags, "--out", str(tmp_path / "two")],
        cwd=Path(evaluate.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "evaluate.json").read_text())["rows"] == rows


def test_videos_without_labels_are_judged_by_their_own_onsets(foley_set, tmp_path):
    video = tmp_path / "a.mp4"
    shutil.copy(foley_set / "00000.mp4", video)
    case = evaluate.read_case(video, evaluate.Judges())
    assert (
        case.hits is None
        and list(case.times) == pytest.approx(list(onsets_of(media.read_audio(video))))
        and case.own == case.times
    )


def test_labels_and_what_is_heard_are_two_things(tmp_path):
    """A label without a sound counts as missed by the labels' figure, not by the one of what is heard in the true sound."""
    foley.make_set(tmp_path, 1, seed=62, size=64, fps=15.625, duration=3.0)
    labels = tmp_path / "00000.json"
    said = json.loads(labels.read_text())
    said["onsets"].append({**said["onsets"][0], "time": 0.02})
    labels.write_text(json.dumps(said))
    case = evaluate.read_case(tmp_path / "00000.mp4", evaluate.Judges())
    assert len(case.times) > len(case.own)
    true = evaluate.measure(media.read_audio(case.video), case, evaluate.Judges())
    row = evaluate.score([true], [true])[0]
    assert row["heard_f1_100ms"] == 1 > row["onset_f1_100ms"]


def test_the_round_trip_goes_through_the_autoencoder(tmp_path):
    """By the shipped one the onsets come back where they were, in clips of one window and of two; by one that decodes to nothing, none."""
    path = Path(evaluate.__file__).parent / "weights" / "mini" / "ldm.safetensors"
    vae, mute = (AutoencoderKL.load(path) for _ in range(2))
    for parameter in mute.decoder.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    for seconds in (4.0, 12.0):
        folder = tmp_path / str(seconds)
        foley.make_set(folder, 1, seed=64, size=64, fps=15.625, duration=seconds)
        case = evaluate.read_case(folder / "00000.mp4", evaluate.Judges())
        made, silent = evaluate.round_trip(case, vae), evaluate.round_trip(case, mute)
        assert len(made) == len(silent) == evaluate.samples_of(case.mel) and len(case.own) > 1
        assert audio.match(onsets_of(made), case.own, 0.05) == [
            (k, k) for k in range(len(case.own))
        ]
        assert not len(onsets_of(silent))
    out = tmp_path / "out"
    foley.make_set(tmp_path / "12.0", 2, seed=64, size=64, fps=15.625, duration=12.0)
    evaluate.main(
        [
            "--data",
            str(tmp_path / "12.0"),
            "--samples",
            str(tmp_path / "12.0"),
            "--judges",
            str(tmp_path),
            "--out",
            str(out),
            "--round-trip",
            str(path),
        ]
    )
    assert (
        json.loads((out / "evaluate.json").read_text())["rows"]["round_trip"]["heard_f1_100ms"]
        > 0.9
    )


def test_a_split_is_that_of_training(foley_set):
    args = types.SimpleNamespace(data=foley_set, split=None, clips=None)
    every = [video.name for video in evaluate.find_clips(args)]
    args.split = "train"
    assert [video.name for video in evaluate.find_clips(args)] == [
        name for name in every if data.split_of(name) == "train"
    ]
    args.split = "val"
    with pytest.raises(media.MediaError, match="of the split val"):
        evaluate.find_clips(args)


def test_sounds_of_another_length_are_judged_over_the_clip(tmp_path):
    """As those of other videos are: what comes after the clip's end does not count, and every judge has its windows, one or two."""
    judges = evaluate.load_judges(Path(evaluate.__file__).parent / "weights" / "mini")
    for seconds in (3.0, 10.0):
        folder = tmp_path / str(seconds)
        foley.make_set(folder, 1, seed=62, size=64, fps=15.625, duration=seconds)
        case = evaluate.read_case(folder / "00000.mp4", judges)
        short, long = (
            evaluate.measure(clicks([0.5, 2.0, 6.0], length).numpy(), case, judges)
            for length in (7.0, 10.0)
        )
        assert short["found"] == long["found"] == (2 if seconds == 3.0 else 3)
        assert short["aligned"] == long["aligned"]
        assert evaluate.measure(media.read_audio(folder / "00000.mp4").numpy(), case, judges)[
            "aligned"
        ]


def test_drawn_sounds_go_to_their_own_video(foley_set, tmp_path, monkeypatch):
    """Without --samples the models are asked once a video, each with a seed of its own; --keep writes the sounds."""
    asked, used = [], []

    def generate(video, models, seed, **settings):
        asked.append((video.name, seed))
        used.append(settings)
        return types.SimpleNamespace(wav=clicks(times_of(video), 8.192))

    monkeypatch.setattr(
        evaluate, "load_models", lambda weights, device: types.SimpleNamespace(name="tiny")
    )
    monkeypatch.setattr(evaluate, "generate", generate)
    flags = [
        "--data",
        str(foley_set),
        "--out",
        str(tmp_path),
        "--clips",
        "3",
        "--seed",
        "5",
        "--keep",
    ]
    evaluate.main([*flags, "--judges", str(tmp_path)])
    assert asked == [("00000.mp4", 5), ("00001.mp4", 6), ("00002.mp4", 7)]
    assert sorted(p.name for p in tmp_path.glob("*.wav")) == [
        f"0000{k}.foley.wav" for k in range(3)
    ]
    written = (
        tmp_path / "00000.foley.wav"
    )  # marked and tagged; the table is of the sound without the mark
    assert (
        media.read_tags(written)["comment"].startswith(f"{watermark.CLAIM} tiny, seed 5")
        and used[0]["mark"] is False
    )
    marked = sample.add_watermark(torch.as_tensor(clicks(times_of(foley_set / "00000.mp4"), 8.192)))
    assert (media.read_audio(written) - marked).abs().max() < 1e-4
    assert (
        json.loads((tmp_path / "evaluate.json").read_text())["rows"]["ours"]["onset_f1_100ms"] > 0.9
    )
    asked.clear()
    evaluate.main(
        [
            "--data",
            str(foley_set),
            "--out",
            str(tmp_path),
            "--clips",
            "2",
            "--ablate",
            "guidance",
            "--judges",
            str(tmp_path),
        ]
    )
    assert [(kept["cfg"], kept["cg"]) for kept in used[-8::2]] == [
        (1.0, 0.0),
        (1.0, None),
        (None, 0.0),
        (None, None),
    ]
    assert list(json.loads((tmp_path / "evaluate.json").read_text())["rows"])[:4] == [
        "none",
        "classifier",
        "classifier_free",
        "both",
    ]


def test_mistakes_are_one_line(foley_set, tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, word in (
        (["--data", str(tmp_path / "none")], "no such folder"),
        (["--data", str(tmp_path / "empty")], "empty"),
        (["--data", str(foley_set), "--samples", str(tmp_path / "empty")], "--samples"),
        (["--data", str(foley_set), "--weights", str(tmp_path / "empty")], "empty"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*flags, "--out", str(tmp_path / "out")])
        assert (
            str(stopped.value).startswith("evaluate.py:")
            and word in str(stopped.value)
            and "\n" not in str(stopped.value)
        )
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--data", str(foley_set), "--clips", "1"])
    assert stopped.value.code == 2
    assert not (tmp_path / "out" / "evaluate.json").exists()
