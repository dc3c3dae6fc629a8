"""The scores: onsets of known sounds, matching, wrong videos, the table on a hand-made set."""

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
from film.provenance import WeightSums
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


def test_onsets_of_clicks_are_detected_within_a_column():
    times = [0.3, 0.8013, 1.1, 1.25, 2.9307, 3.5]
    predicted = onsets_of(clicks(times))
    assert len(predicted) == len(times)
    assert np.abs(predicted - times).max() <= audio.COLUMN


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
    mel = np.full((128, 40), 0.4, np.float32)
    mel[:, 20:] = 0.8
    assert np.flatnonzero(audio.onset_strength(mel)).tolist() == [20, 21]
    assert not audio.onset_strength(mel[:, ::-1]).any()


def test_matching_is_one_to_one_and_as_large_as_can_be():
    assert audio.match([1.0, 1.05], [1.02], 0.1) == [
        (0, 0)
    ]  # two predictions for one label count once
    assert audio.match([1.0], [1.2], 0.1) == []
    assert len(audio.match([1.0, 1.09], [0.95, 1.0], 0.1)) == 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        predicted, annotated = (np.sort(rng.uniform(0, 1, 4)) for _ in range(2))
        pairs = audio.match(predicted, annotated, 0.1)
        assert all(abs(predicted[i] - annotated[j]) <= 0.1 for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        best = max(
            sum(abs(a - b) <= 0.1 for a, b in zip(predicted, order, strict=True))
            for order in itertools.permutations(annotated)
        )
        assert len(pairs) == best


def test_f1_of_counts():
    assert audio.f1(3, 4, 6) == pytest.approx((0.75, 0.5, 0.6))
    assert audio.f1(0, 0, 0) == (0, 0, 0) and audio.f1(0, 0, 5) == (0, 0, 0)


def test_onset_lag_is_where_onset_strengths_agree_best():
    reference = np.zeros(400, np.float32)
    reference[[30, 111, 180, 333]] = 1, 0.5, 0.8, 0.9
    for shift in (-25, 0, 8):
        lag = evaluate.onset_lag(np.roll(reference, shift), reference)
        assert lag == pytest.approx(shift * audio.COLUMN)
    shorter = np.roll(reference, 8)[:350]
    assert evaluate.onset_lag(shorter, reference) == pytest.approx(8 * audio.COLUMN)
    assert np.isnan(evaluate.onset_lag(np.zeros(400), reference))
    assert np.isnan(evaluate.onset_lag(reference, np.zeros(400)))
    # beyond a second is not searched; of equally good lags the smallest counts
    click = np.zeros(400, np.float32)
    click[100] = 1
    assert abs(evaluate.onset_lag(np.roll(click, 70), click)) <= evaluate.MAX_LAG * audio.COLUMN
    clicks = click + np.roll(click, 4)
    assert evaluate.onset_lag(click, clicks) == 0


def test_nobody_keeps_their_own():
    for count in range(2, 40):
        partners = evaluate.derange(count)
        assert sorted(partners) == list(range(count))
        assert (partners != np.arange(count)).all()
        assert (partners == evaluate.derange(count)).all()


def test_items_are_shared_out_in_order(monkeypatch):
    """Of three processes each gets every third item, and all get all results."""
    items = "abcdefgh"
    parts = [list(items[rank::3]) for rank in range(3)]
    monkeypatch.setattr(evaluate.distributed, "world", lambda: 3)
    monkeypatch.setattr(evaluate.distributed, "rank", lambda: 1)

    def all_gather_object(part):
        assert part == parts[1]
        return parts

    monkeypatch.setattr(evaluate.distributed, "all_gather_object", all_gather_object)
    assert evaluate.share_out(lambda k: items[k], len(items), "test") == list(items)


def stats_of(predicted, annotated, matched, close, lag=0.0, loudness=0.0, **more):
    """What `evaluate.measure` would say of a clip."""
    return {
        "predicted": predicted,
        "annotated": annotated,
        "matched_100ms": matched,
        "matched_50ms": close,
        "ref_onsets": annotated,
        "matched_ref": matched,
        "lag": lag,
        "loudness": loudness,
        "seconds": np.nan,
        "onset_auc": np.nan,
        "predicted_flux": predicted,
        "annotated_flux": annotated,
        "matched_100ms_flux": matched,
        **more,
    }


def test_score_takes_the_papers_figures_once():
    """Melception's features and classes are not resampled for intervals; its divergence is."""
    rng = np.random.default_rng(0)
    measured = []
    for k in range(12):
        paper = {
            "melception_generated": rng.normal(size=20),
            "melception_reference": rng.normal(size=20),
            "melception_classes": rng.dirichlet(np.ones(5)),
            "melception_kl": float(k),
        }
        measured.append(stats_of(2, 3, 2, 1, **paper))
    row, intervals = evaluate.score(measured)
    generated = np.stack([stats["melception_generated"] for stats in measured])
    reference = np.stack([stats["melception_reference"] for stats in measured])
    expected = judge.frechet_distance(generated, reference)
    assert row["melception_fid"] == pytest.approx(expected)
    assert 1 <= row["melception_is"] <= 5
    assert row["melception_is_deviation"] > 0
    assert row["melception_kl"] == 5.5
    assert [name for name in intervals if "melception" in name] == ["melception_kl"]
    # a group may be of one clip, which has no covariance
    assert evaluate.score(measured[:1])[0]["melception_fid"] is None

    table = evaluate.table({"ours": row}, {"ours": intervals})
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert f"{row['melception_fid']:.2f}" in lines["melception_fid"]
    assert "±" not in lines["melception_fid"]
    assert "±" in lines["melception_kl"]


def test_score_pools_onsets_over_clips():
    # as with features of the judge, which hits are counted for
    space = {"features": np.zeros(2), "classes": np.ones(1)}
    space |= {"ref_features": np.zeros(2), "ref_classes": np.ones(1)}
    measured = [
        stats_of(2, 3, 2, 1, 0.3, -6.0, aligned=True, correct=1, hits=2, **space),
        stats_of(0, 1, 0, 0, np.nan, 4.0, aligned=False, correct=0, hits=0, **space),
        stats_of(1, 0, 0, 0, -0.1, 0.0, aligned=True, correct=2, hits=2, **space),
    ]
    row, intervals = evaluate.score(measured)
    expected = {
        "precision_100ms": 2 / 3,
        "recall_100ms": 2 / 4,
        "onset_f1_100ms": 4 / 7,
        "onset_f1_50ms": 2 / 7,
        "heard_f1_100ms": 4 / 7,
        "onset_count_error": 1,
        "loudness_db": 10 / 3,
        "desync_ms": 200,
        "desync_over_200ms": 1 / 2,
        "align_acc": 2 / 3,
        "material_acc": 3 / 4,
        "clips": 3,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["seconds"] is None
    assert all(low <= row[name] <= high for name, (low, high) in intervals.items())
    assert intervals["onset_f1_100ms"][0] == 0


def test_skill_is_the_mean_f1_less_that_of_the_sound_slid():
    """Worked out by hand; the second clip has nothing annotated, and counts for precision alone."""
    slid = [{"slid_matched_100ms": m, "slid_matched_100ms_flux": 0.5 * m} for m in (1, 0, 0.5)]
    measured = [
        stats_of(4, 4, 3, 3, onset_auc=0.9, **slid[0]),
        stats_of(2, 0, 0, 0, **slid[1]),
        stats_of(1, 3, 1, 0, onset_auc=0.5, **slid[2]),
    ]
    row, intervals = evaluate.score(measured)
    expected = {
        "onset_f1_100ms": 8 / 14,
        "mean_f1_100ms": (3 / 4 + 1 / 2) / 2,
        "skill_100ms": (2 / 4 + 1 / 4) / 2,
        "onset_auc": 0.7,
        "onset_f1_100ms_flux": 8 / 14,
        "mean_f1_100ms_flux": (3 / 4 + 1 / 2) / 2,
        "skill_100ms_flux": (5 / 8 + 3 / 8) / 2,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    for name in expected:
        low, high = intervals[name]
        assert low < row[name] < high
    # of clips without onsets all that is a mean over clips has no value
    row, intervals = evaluate.score([measured[1]] * 2)
    assert row["mean_f1_100ms"] is row["skill_100ms"] is row["onset_auc"] is None
    assert not {"mean_f1_100ms", "skill_100ms", "onset_auc"} & set(intervals)


def clip_of(onsets, columns=540):
    """A silent clip of 8.64 s, of which a ninth is 0.96 s, with these annotated onsets."""
    silence = torch.zeros(audio.N_MELS, columns)
    return evaluate.EvalClip(Path("a.mp4"), silence, -60.0, [], onsets, onsets, hits=[])


def test_a_sound_is_slid_by_ninths_of_its_clip():
    clip = clip_of([1.0, 2.92])
    stats = evaluate.onset_stats(np.array([1.0]), np.array([2.92]), clip)
    # by two ninths the first onset comes to lie on the second, by seven the second on the first
    assert stats["matched_100ms"] == stats["matched_100ms_flux"] == 1
    assert stats["slid_matched_100ms"] == stats["slid_matched_100ms_flux"] == 1 / 8
    row = evaluate.score([stats_of(0, 0, 0, 0) | stats])[0]
    assert row["skill_100ms"] == row["skill_100ms_flux"] == pytest.approx(2 / 3 * 7 / 8)
    slid = evaluate.score([evaluate.slid_stats({"slid_onset_auc": 0.4, **stats})])[0]
    assert slid["onset_f1_100ms"] == slid["mean_f1_100ms"] == pytest.approx(2 / 3 / 8)
    assert slid["onset_auc"] == 0.4
    assert slid["skill_100ms"] is slid["desync_ms"] is slid["loudness_db"] is None


def test_regular_hits_have_no_skill():
    """Slid by whole periods they are the same; the metronome hits all and has no skill either."""
    hits = 0.5 + 0.96 * np.arange(9.0)
    stats = evaluate.onset_stats(hits, hits, clip_of([0.5, 2.42, 6.0]))
    assert stats["slid_matched_100ms"] == stats["matched_100ms"] == 2

    clip = clip_of([0.53, 1.01, 2.5, 2.62, 4.44, 7.13])
    stats = evaluate.metronome_stats(clip)
    # 8.64 s of hits every 0.2 s
    assert stats["predicted"] == pytest.approx(5 * 8.64, abs=0.5)
    assert stats["matched_100ms"] == pytest.approx(6, abs=0.5)
    row = evaluate.score([stats])[0]
    assert row["mean_f1_100ms"] == pytest.approx(12 / (43.2 + 6), abs=0.02)
    assert row["skill_100ms"] == pytest.approx(0, abs=0.02)
    assert row["onset_auc"] is row["seconds"] is row["loudness_db"] is row["desync_ms"] is None


def test_onset_auc_compares_near_with_far_columns():
    times = np.arange(200) * audio.COLUMN
    distances = np.abs(times - 1.6)
    near = distances <= 0.06
    far = distances > 0.12
    # what lies between does not count
    strength = np.where(near | far, 0.0, 9.0)
    assert evaluate.onset_auc(strength, [1.6]) == 0.5
    assert evaluate.onset_auc(strength + near, [1.6]) == 1
    assert evaluate.onset_auc(strength + far, [1.6]) == 0
    # a tenth of the far columns stronger
    strength = near.astype(float)
    strength[np.flatnonzero(far)[: far.sum() // 10]] = 2
    above = (far.sum() // 10) / far.sum()
    assert evaluate.onset_auc(strength, [1.6]) == pytest.approx(1 - above)
    # one of the two kinds is missing
    assert np.isnan(evaluate.onset_auc(strength, []))
    assert np.isnan(evaluate.onset_auc(strength, times))


def test_onset_auc_of_sounds():
    """Near 1 for a sound that rises in all columns near an onset, lower for clicks.

    Those are in half of these columns. At other times, and slid, both are at chance.
    """
    times = [0.7, 2.0, 2.9, 4.4, 5.1, 7.7]
    clip = clip_of(times)
    swells = torch.zeros(round(8.64 * audio.SAMPLE_RATE))
    # from 1e-3 to full scale in 0.22 s
    swell = torch.logspace(-3, 0, 3520) * torch.randn(3520)
    for time in times:
        start = round((time - 0.1) * audio.SAMPLE_RATE)
        swells[start : start + 3520] += swell
    stats = evaluate.measure(swells, clip, evaluate.Metrics())
    assert stats["onset_auc"] > 0.95
    at_times = evaluate.measure(clicks(times, 8.64), clip, evaluate.Metrics())
    assert 0.7 < at_times["onset_auc"] < 0.9
    elsewhere = evaluate.measure(clicks([t + 0.3 for t in times], 8.64), clip, evaluate.Metrics())
    for chance in (at_times["slid_onset_auc"], stats["slid_onset_auc"], elsewhere["onset_auc"]):
        assert 0.4 < chance < 0.6
    # silence after a sound that ends early counts
    early = evaluate.measure(clicks(times[:3], 4.0), clip, evaluate.Metrics())
    assert 0.5 < early["onset_auc"] < at_times["onset_auc"]


def test_the_second_detector_is_another(monkeypatch):
    """It detects clicks and no steady sound; its columns are of its onsets alone."""
    times = [0.3, 0.8013, 1.1, 1.25, 2.9307, 3.5]
    predicted = audio.detect_onsets_flux(audio.mel(clicks(times)))
    assert len(predicted) == len(times)
    assert np.abs(predicted - times).max() <= 2 * audio.COLUMN
    noise = torch.randn(64000, generator=torch.Generator().manual_seed(0))
    for wav in (torch.zeros(64000), 0.1 * noise):
        assert not len(audio.detect_onsets_flux(audio.mel(wav)))
    # no second peak within APART columns, of equal ones the first, nor one that is too low
    mel = np.zeros((128, 60), np.float32)
    mel[:, 20:] = 0.25
    mel[:, 22:] = 0.5
    mel[:, 40:] = 0.52
    assert audio.detect_onsets_flux(mel).tolist() == [20 * audio.COLUMN]

    monkeypatch.setattr(evaluate, "detect_onsets_flux", lambda mel: np.array([0.3, 1.1]))
    stats = evaluate.measure(clicks(times), clip_of(times), evaluate.Metrics())
    row = evaluate.score([stats])[0]
    assert row["onset_f1_100ms"] == row["mean_f1_100ms"] == 1
    assert row["onset_f1_100ms_flux"] == row["mean_f1_100ms_flux"] == pytest.approx(4 / 8)


def test_score_without_hits_to_classify_has_no_material_accuracy():
    space = {"features": np.zeros(2), "classes": np.ones(1)}
    space |= {"ref_features": np.zeros(2), "ref_classes": np.ones(1)}
    row, intervals = evaluate.score([stats_of(1, 1, 1, 1, correct=0, hits=0, **space)] * 2)
    assert row["material_acc"] is None
    assert "material_acc" not in intervals


def test_intervals_cover_as_often_as_they_say():
    """Of 60 sets of 40 clips whose true rate is known, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        measured = [stats_of(10, 10, k, k) for k in rng.binomial(10, 0.7, 40)]
        low, high = evaluate.score(measured)[1]["onset_f1_100ms"]
        held += low <= 0.7 <= high
    assert 52 <= held <= 60


def test_table_and_json_for_sounds_of_elsewhere(foley_set, tmp_path, capsys):
    """Sounds that click at the labels score near one, those of other videos do not, silence 0."""
    samples, out = tmp_path / "samples", tmp_path / "out"
    samples.mkdir()
    for video in foley_set.glob("*.mp4"):
        media.write_wav(samples / f"{video.stem}.foley.wav", clicks(times_of(video), 8.192))
    flags = ["--data", str(foley_set), "--samples", str(samples), "--judges", str(tmp_path)]
    evaluate.main([*flags, "--out", str(out)])
    written = json.loads((out / "evaluate.json").read_text())
    rows = written["rows"]
    assert list(rows) == [
        "ours",
        "ground_truth",
        "wrong_video",
        "slid",
        "metronome",
        "silence",
    ]
    assert not any("melception" in column for column in rows["ours"])  # nobody asked for those
    assert rows["ours"]["onset_f1_50ms"] > 0.9 and rows["ground_truth"]["onset_f1_100ms"] > 0.9
    assert rows["wrong_video"]["onset_f1_100ms"] < 0.5 and rows["silence"]["onset_f1_100ms"] == 0
    assert rows["silence"]["desync_ms"] is None and all(row["clips"] == 4 for row in rows.values())
    assert rows["ours"]["skill_100ms"] > 0.5 > 0.2 > abs(rows["metronome"]["skill_100ms"])
    assert rows["slid"]["mean_f1_100ms"] == pytest.approx(
        rows["ours"]["mean_f1_100ms"] - rows["ours"]["skill_100ms"]
    )
    assert rows["ours"]["onset_auc"] > 0.6 > rows["slid"]["onset_auc"] > 0.4
    assert rows["metronome"]["onset_auc"] is rows["slid"]["loudness_db"] is None
    text = capsys.readouterr().out.splitlines()
    assert text[0].split() == list(rows) and len({len(line) for line in text}) == 1
    best = next(line for line in text if line.startswith("onset_f1_50ms"))
    low, high = written["intervals"]["ours"]["onset_f1_50ms"]
    assert f"{rows['ours']['onset_f1_50ms']:.3f} ±{(high - low) / 2:.3f}" in best
    clips = written["clips"]  # from them the table can be had again
    assert list(clips) == [f"0000{k}.mp4" for k in range(4)] and all(
        list(clip) == list(rows) for clip in clips.values()
    )
    counts = [
        sum(clip["ours"][name] for clip in clips.values())
        for name in ("matched_50ms", "predicted", "annotated")
    ]
    assert audio.f1(*counts)[2] == pytest.approx(rows["ours"]["onset_f1_50ms"])
    assert all(
        clip["silence"]["lag"] is None and clip["ours"]["seconds"] is None
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


def test_videos_without_labels_are_annotated_by_their_own_onsets(foley_set, tmp_path):
    video = tmp_path / "a.mp4"
    shutil.copy(foley_set / "00000.mp4", video)
    clip = evaluate.read_clip(video, evaluate.Metrics())
    assert clip.hits == []
    assert clip.onsets == pytest.approx(list(onsets_of(media.read_audio(video))))
    assert clip.ref_onsets == clip.onsets
    flux_onsets = audio.detect_onsets_flux(audio.mel(media.read_audio(video)))
    assert clip.flux_onsets == pytest.approx(list(flux_onsets))


def test_annotations_of_a_file_go_before_labels(foley_set, tmp_path):
    clip = evaluate.read_clip(foley_set / "00000.mp4", evaluate.Metrics(), [0.5, 3.0])
    assert clip.onsets == clip.flux_onsets == [0.5, 3.0]
    assert clip.hits == [] and clip.ref_onsets

    # one clip as labelled, three without onsets
    content = {f"0000{k}": [] for k in range(4)}
    content["00002"] = times_of(foley_set / "00002.mp4")[::-1]
    annotations = tmp_path / "onsets.json"
    annotations.write_text(json.dumps(content))
    flags = ["--data", str(foley_set), "--samples", str(foley_set), "--judges", str(tmp_path)]
    flags += ["--out", str(tmp_path), "--annotations", str(annotations)]
    evaluate.main(flags)
    written = json.loads((tmp_path / "evaluate.json").read_text())
    annotated = [clip["ours"]["annotated"] for clip in written["clips"].values()]
    assert annotated == [0, 0, len(content["00002"]), 0]
    assert written["rows"]["ours"]["mean_f1_100ms"] > 0.9

    del content["00001"]
    for text, word in ((json.dumps(content), "has no 00001"), ('["00000"]', "not a JSON file")):
        annotations.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(flags)
        assert word in str(stopped.value) and "\n" not in str(stopped.value)


def test_groups_have_the_table_of_their_clips_alone(foley_set, tmp_path, capsys):
    samples = tmp_path / "samples"
    samples.mkdir()
    for k, video in enumerate(sorted(foley_set.glob("*.mp4"))):
        # a hit more is missed in each
        wav = clicks(times_of(video)[k:], 8.192)
        media.write_wav(samples / f"{video.stem}.wav", wav)
    flags = ["--samples", str(samples), "--judges", str(tmp_path)]
    # as spreadsheets write it; one clip without a group, one name without a clip
    groups = tmp_path / "groups.csv"
    groups.write_text(
        "name,group,seen\n00002,pair,\n00000,one,\n00001,pair,\nnone,pair,\n", "utf-8-sig"
    )
    whole = [*flags, "--data", str(foley_set), "--groups", str(groups), "--out"]
    evaluate.main([*whole, str(tmp_path / "whole")])
    printed = capsys.readouterr()
    warned = [line for line in printed.err.splitlines() if line.startswith("evaluate.py: ")]
    assert len(warned) == 2 and all(str(groups) in line for line in warned)
    assert "no clip named none;" in warned[0] and "no group for 00003;" in warned[1]

    # the pair alone
    pair = tmp_path / "pair"
    pair.mkdir()
    for name in ("00001", "00002"):
        for suffix in (".mp4", ".json"):
            shutil.copy(foley_set / f"{name}{suffix}", pair)
    evaluate.main([*flags, "--data", str(pair), "--out", str(tmp_path / "alone")])
    written, alone = (
        json.loads((tmp_path / name / "evaluate.json").read_text()) for name in ("whole", "alone")
    )
    assert alone["groups"] == {} and list(written["groups"]) == ["pair", "one"]
    of_pair = written["groups"]["pair"]
    for name, row in alone["rows"].items():
        # each has the sound of the other when alone, of any clip in the whole
        if name != "wrong_video":
            assert of_pair["rows"][name] == pytest.approx(row, nan_ok=True)
            for column, interval in alone["intervals"][name].items():
                assert of_pair["intervals"][name][column] == pytest.approx(interval)
    assert of_pair["rows"]["ours"] != written["rows"]["ours"]
    assert {row["clips"] for row in written["groups"]["one"]["rows"].values()} == {1}

    # printed after the whole
    tables = printed.out.split("\n\n")
    assert [table.splitlines()[0].split("  ")[-1].strip() for table in tables] == [
        "silence",
        "silence [pair]",
        "silence [one]",
    ]
    line = next(line for line in tables[1].splitlines() if line.startswith("skill_100ms "))
    assert f"{of_pair['rows']['ours']['skill_100ms']:.3f} ±" in line


def test_annotated_and_detected_onsets_of_the_reference_are_two_things(tmp_path):
    """A label without a sound is missed in onset_f1, not in heard_f1."""
    foley.make_set(tmp_path, 1, seed=62, size=64, fps=15.625, duration=3.0)
    labels = tmp_path / "00000.json"
    content = json.loads(labels.read_text())
    content["onsets"].append({**content["onsets"][0], "time": 0.02})
    labels.write_text(json.dumps(content))
    clip = evaluate.read_clip(tmp_path / "00000.mp4", evaluate.Metrics())
    assert len(clip.onsets) > len(clip.ref_onsets)
    stats = evaluate.measure(media.read_audio(clip.video), clip, evaluate.Metrics())
    row = evaluate.score([stats])[0]
    assert row["heard_f1_100ms"] == 1 > row["onset_f1_100ms"]


def test_the_round_trip_goes_through_the_autoencoder(tmp_path):
    """By the shipped one onsets come back where they were, in clips of one window and of two.

    By one that decodes to nothing, none.
    """
    path = Path(evaluate.__file__).parent / "weights" / "mini" / "ldm.safetensors"
    vae, mute = (AutoencoderKL.load(path) for _ in range(2))
    for parameter in mute.decoder.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    for seconds in (4.0, 12.0):
        folder = tmp_path / str(seconds)
        foley.make_set(folder, 1, seed=64, size=64, fps=15.625, duration=seconds)
        clip = evaluate.read_clip(folder / "00000.mp4", evaluate.Metrics())
        sound = evaluate.round_trip(clip, vae)
        silent = evaluate.round_trip(clip, mute)
        assert len(sound) == len(silent) == evaluate.samples_of(clip.mel)
        count = len(clip.ref_onsets)
        assert count > 1
        assert audio.match(onsets_of(sound), clip.ref_onsets, 0.05) == [
            (k, k) for k in range(count)
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


def test_sounds_of_another_length_are_measured_over_the_clip(tmp_path):
    """As those of other videos are: what comes after the clip's end does not count.

    And every metric has its windows, one or two.
    """
    metrics = evaluate.load_metrics(Path(evaluate.__file__).parent / "weights" / "mini")
    for seconds in (3.0, 10.0):
        folder = tmp_path / str(seconds)
        foley.make_set(folder, 1, seed=62, size=64, fps=15.625, duration=seconds)
        clip = evaluate.read_clip(folder / "00000.mp4", metrics)
        short, long = (
            evaluate.measure(clicks([0.5, 2.0, 6.0], length), clip, metrics)
            for length in (7.0, 10.0)
        )
        assert short["predicted"] == long["predicted"] == (2 if seconds == 3.0 else 3)
        assert short["aligned"] == long["aligned"]
        assert evaluate.measure(media.read_audio(clip.video), clip, metrics)["aligned"]


def test_generated_sounds_go_to_their_own_video(foley_set, tmp_path, monkeypatch):
    """Without --samples the models are asked once a video, each time with another seed."""
    calls = []

    def generate(video, models, *, settings, mark):
        calls.append((video.name, settings, mark))
        return types.SimpleNamespace(wav=clicks(times_of(video), 8.192))

    models = types.SimpleNamespace(name="tiny", sums=WeightSums())
    monkeypatch.setattr(evaluate, "load_models", lambda weights, device: models)
    monkeypatch.setattr(evaluate, "generate", generate)
    flags = ["--data", str(foley_set), "--out", str(tmp_path), "--judges", str(tmp_path)]
    evaluate.main([*flags, "--clips", "3", "--seed", "5", "--keep"])
    seeds = [(name, settings.seed, mark) for name, settings, mark in calls]
    assert seeds == [("00000.mp4", 5, False), ("00001.mp4", 6, False), ("00002.mp4", 7, False)]

    # --keep writes them marked and tagged; the table is of the sound without the mark
    names = sorted(p.name for p in tmp_path.glob("*.wav"))
    assert names == [f"0000{k}.foley.wav" for k in range(3)]
    kept = tmp_path / "00000.foley.wav"
    assert media.read_tags(kept)["comment"].startswith(f"{watermark.CLAIM} tiny, seed 5")
    marked = sample.add_watermark(clicks(times_of(foley_set / "00000.mp4"), 8.192))
    assert (media.read_audio(kept) - marked).abs().max() < 1e-4
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert written["rows"]["ours"]["onset_f1_100ms"] > 0.9

    # an ablation asks with the settings of each row
    calls.clear()
    evaluate.main([*flags, "--clips", "2", "--ablate", "guidance"])
    scales = [(settings.cfg, settings.cg) for _, settings, _ in calls[::2]]
    assert scales == [(1.0, 0.0), (1.0, None), (None, 0.0), (None, None), (None, None)]
    assert [s.guidance for _, s, _ in calls[::2]] == ["double"] * 4 + [None]
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert list(written["rows"])[:4] == ["none", "classifier", "classifier_free", "both"]


def test_a_listening_test_of_generated_sounds(foley_set, tmp_path, monkeypatch, capsys):
    """What it holds: tests/test_page.py."""

    def generate(video, models, *, settings, mark):
        return types.SimpleNamespace(wav=clicks(times_of(video), 8.192))

    models = types.SimpleNamespace(name="tiny", sums=WeightSums())
    monkeypatch.setattr(evaluate, "load_models", lambda weights, device: models)
    monkeypatch.setattr(evaluate, "generate", generate)
    flags = ["--data", str(foley_set), "--out", str(tmp_path), "--judges", str(tmp_path)]
    flags += ["--clips", "2", "--page"]
    evaluate.main([*flags, "--against", str(foley_set)])
    assert "listen.html" in capsys.readouterr().out
    key = json.loads((tmp_path / "listen-key.json").read_text())["pairs"]
    others = sorted({"a": side["b"], "b": side["a"]}[k] for side in key.values() for k in "ab")
    assert others == ["against"] * 2 + ["ground_truth"] * 2 + ["ours"] * 6 + ["wrong_video"] * 2
    assert (tmp_path / "listen.html").exists() and len(list((tmp_path / "listen").iterdir())) == 14

    # its key is not written over, nor is a sound that lacks found out at the end
    for more, word in (
        ([], "another --out"),
        (["--out", str(tmp_path / "b"), "--against", str(tmp_path)], "leave out --against"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*flags, *more])
        assert word in str(stopped.value)


def test_mistakes_are_one_line(foley_set, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("name,kind\n00000,a\n")
    (tmp_path / "bytes.csv").write_bytes(b"name,group\n\xff,a\n")
    for flags, word in (
        (["--data", str(foley_set), "--groups", str(tmp_path / "none.csv")], "none.csv: cannot"),
        (["--data", str(foley_set), "--groups", str(tmp_path / "bytes.csv")], "bytes.csv: cannot"),
        (["--data", str(foley_set), "--groups", str(tmp_path / "columns.csv")], "`group`"),
        (["--data", str(foley_set), "--annotations", str(tmp_path / "none.json")], "none.json"),
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
    capsys.readouterr()
    for flags in (
        ["--clips", "1"],
        ["--cfg", "-1"],
        ["--sampler", "ddim", "--steps", "1000"],
        ["--device", "tpu"],
        ["--samples", str(tmp_path), "--ablate", "cfg"],
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--data", str(foley_set), *flags])
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("evaluate.py: ") and message.count("\n") == 1
    assert not (tmp_path / "out" / "evaluate.json").exists()
