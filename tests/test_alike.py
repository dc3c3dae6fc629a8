"""film/alike.py: from the first hits of a clip to the others."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from clips import make_video
from main_job import run

import evaluate
import finder
import foley
import sample
from common import audio, media, motion
from common.audio import COLUMN, SAMPLE_RATE
from common.onsets import Hit, read_hits
from compat import hub
from film import alike
from sample import Settings

FRAMES = 250
TIMES = [1.0, 2.0, 3.0, 4.2, 5.0, 6.4, 7.6, 8.8]  # of the hits
OTHERS = [1.5, 2.4, 3.6, 4.6, 5.6, 7.0, 8.2, 9.4]  # of what only looks like one


class Blank:
    """A finder to which every frame looks alike."""

    def read_parts(self, parts):
        return np.concatenate([np.full(len(blocks[kept]), -3.0) for blocks, kept in parts])


@pytest.fixture(scope="module")
def parts():
    """Ten seconds of motion: what is hit moves up at the left, something else down at the right."""
    rng = np.random.default_rng(0)
    blocks = np.zeros((FRAMES, 5, 12, 12), np.int8)
    blocks[:, :4] = rng.integers(-1, 2, (FRAMES, 4, 12, 12))
    for times, side, way in ((TIMES, slice(1, 5), -20), (OTHERS, slice(7, 11), 20)):
        for time in times:
            frame = round(time * motion.FPS)
            blocks[frame - 1 : frame + 1, (0, 2), 4:8, side] = way
    return [(torch.from_numpy(blocks), slice(0, FRAMES))]


def columns_of(parts):
    return round(sum(len(blocks[kept]) for blocks, kept in parts) / motion.FPS / COLUMN)


def find(marks, parts, head=None, network=None):
    columns = columns_of(parts)
    head = np.full(columns, -3.0) if head is None else head
    return alike.find_rest(marks, head, network or Blank(), parts, columns)


def are_near(found, wanted):
    times = [hit.time for hit in found]
    return len(times) == len(wanted) == len(audio.match(times, wanted, 0.06))


def test_a_few_marks_tell_hits_from_what_else_moves(parts):
    found = find([Hit(time) for time in TIMES[:4]], parts)
    assert found[:4] == [Hit(time) for time in TIMES[:4]]
    assert are_near(found, TIMES)
    # other marks, other hits
    assert are_near(find([Hit(time) for time in OTHERS[:4]], parts), OTHERS)


def test_up_to_the_last_mark_there_are_no_others(parts):
    # a head that is sure of hits everywhere, as often as hits can be
    head = np.full(columns_of(parts), -3.0)
    head[::8] = 9.0
    marks = [Hit(1.0), Hit(2.0), Hit(3.0)]
    found = find(marks, parts, head)
    assert [hit for hit in found if hit.time <= 3.0 + alike.AFTER] == marks


def test_the_marks_choose_whom_to_ask(parts, monkeypatch):
    """The head counts where it finds the marks, and not where it finds something else."""
    monkeypatch.setattr(alike, "regress", lambda x, *_: np.zeros(x.shape[1] + 1))
    head = np.full(columns_of(parts), -5.0)
    head[[round(time / COLUMN) for time in TIMES]] = 8.0
    marks = [Hit(time) for time in TIMES[:3]]

    class Sure(Blank):
        def read_parts(self, parts):
            odds = super().read_parts(parts)
            odds[[round(time * motion.FPS) for time in OTHERS]] = 8.0
            odds[[round(time * motion.FPS) for time in TIMES]] = 2.0
            return odds

    assert are_near(find(marks, parts, head), TIMES)
    found = find([Hit(time) for time in OTHERS[:3]], parts, head, Sure())
    assert len(audio.match([hit.time for hit in found], OTHERS, 0.06)) == len(OTHERS)


def test_one_material_of_all_marks_is_that_of_the_rest(parts):
    marks = [Hit(time, None, "wood") for time in TIMES[:4]]
    assert {hit.material for hit in find(marks, parts)} == {"wood"}
    guesses = [hit._replace(is_guess=True) for hit in marks]
    assert {hit.material for hit in find(guesses, parts)[4:]} == {None}
    marks[1] = Hit(TIMES[1], None, "metal")
    assert {hit.material for hit in find(marks, parts)[4:]} == {None}


def test_components_are_of_the_minute_of_the_last_mark(parts, monkeypatch):
    whole = alike.motion_components(parts, 5.0)
    assert whole.shape == (FRAMES, alike.COMPONENTS) and whole.dtype == np.float32
    assert np.allclose(whole.mean(0), 0, atol=1e-4) and (np.diff(whole.std(0)) < 1e-4).all()
    # frames that are there for their neighbors' sake do not count; first nothing moves
    blocks = parts[0][0].clone()
    blocks[:110] = 0
    kept = [(0, 110, slice(0, 100)), (90, 210, slice(20, 110)), (190, 250, slice(10, 60))]
    three = [(blocks[first:last], frames) for first, last, frames in kept]
    monkeypatch.setattr(alike, "MINUTE", 100)
    later = alike.motion_components(three, 5.0)
    assert np.allclose(later[100:190].mean(0), 0, atol=1e-4)
    assert (np.diff(later[100:190].std(0)) < 1e-4).all() and later[:100].std(0).max() < 1e-4
    # nothing moves at all, or later: nothing is blown up
    assert alike.motion_components(three, 0.0).std(0).max() < 2
    assert not alike.motion_components([(torch.zeros_like(blocks), slice(0, FRAMES))], 0.0).any()


@pytest.mark.parametrize("rows", [80, 1000])
@pytest.mark.parametrize("level", [-14.0, 0.0, 9.0])
def test_the_regression_is_where_its_gradient_is_zero(level, rows):
    """Also where the networks are sure, from where whole steps of Newton's lead astray."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 3)).astype(np.float32)
    wanted = rng.random(rows) ** 4
    offsets = level + rng.standard_normal(rows)
    weights = torch.tensor(alike.regress(x, wanted, offsets), requires_grad=True)
    odds = torch.tensor(x, dtype=torch.float64) @ weights[:3] + weights[3] + torch.tensor(offsets)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        odds,
        torch.tensor(wanted),
        pos_weight=torch.tensor(finder.ONSET_WEIGHT, dtype=torch.float64),
        reduction="sum",
    )
    prior = alike.DECAY * weights[:3].square().sum() + alike.CONSTANT_DECAY * weights[3] ** 2
    (loss + prior / 2).backward()
    assert weights.grad.abs().max() < 1e-5


# ---- as a person uses it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    models = tiny.models(columns=4, materials=("wood", "metal"))
    return tiny.save(models, tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 2, flashes=(0.4, 0.8, 1.2, 1.6))


def test_the_command_plays_marks_and_rest(weights, clip, tmp_path, capsys, monkeypatch):
    marks = tmp_path / "marks.txt"
    marks.write_text("0.4\t0.4\twood\n0.8\t0.8\twood\n")
    given = []
    seen = []

    def spy(found, head, network, parts, columns):
        given.append((found, len(head), sum(len(blocks[kept]) for blocks, kept in parts), columns))
        seen.append(parts[0][0])
        return [*found, Hit(1.2, None, "wood")]

    monkeypatch.setattr(alike, "find_rest", spy)
    out = tmp_path / "out"
    line = ("--weights", weights, "--out", out, "--steps", 2, "--onsets", marks, "--write-onsets")
    assert run(capsys, clip, *line, "--find-rest")[0] == 0
    ((found, head, frames, columns),) = given
    assert found == [Hit(0.4, None, "wood"), Hit(0.8, None, "wood")]
    assert (frames, columns) == (50, 125) and head >= columns
    assert [hit.time for hit in read_hits(out / "clip.onsets.txt", ("wood",))] == [0.4, 0.8, 1.2]
    # the manifest knows the flag: without it, it is another sound
    record = json.loads((out / "manifest.jsonl").read_text().splitlines()[-1])
    assert record["settings"]["find_rest"] is True
    status, out, _ = run(capsys, clip, *line, "--find-rest")
    assert status == 0 and "kept" in out[0]
    status, out, _ = run(capsys, clip, *line)
    assert status == 0 and "kept" not in out[0] and len(given) == 1
    # its start is the clip's
    assert run(capsys, clip, *line, "--find-rest", "--start", 0.2)[0] == 0
    assert [round(hit.time, 3) for hit in given[1][0]] == [0.2, 0.6]
    assert torch.equal(seen[1][1:30], seen[0][6:35])


@pytest.mark.parametrize(
    ("onsets", "message"),
    [
        (
            (),
            "--find-rest: needs the first hits of the clip; give them with --onsets FILE",
        ),
        (("--onsets", "both"), "sample.py: --find-rest: needs the first hits of the clip"),
        (
            ("--onsets", "MARKS"),
            "clip.mp4: --find-rest: needs the first 2 hits or more, .* have 1 in",
        ),
        # of two, one is outside of what is made
        (("--onsets", "TWO", "--start", "0.2"), "the first 2 hits or more, .* have 1 in"),
        (("--onsets", "TWO", "--duration", "0.3"), "the first 2 hits or more, .* have 1 in"),
    ],
)
def test_too_few_marks_are_one_line(onsets, message, weights, clip, tmp_path, capsys, monkeypatch):
    marks = tmp_path / "marks.txt"
    # one twice is one
    marks.write_text("0.4\t0.4\t\n0.4\t0.4\twood\n")
    two = tmp_path / "two.txt"
    two.write_text("0.1\t0.1\t\n0.4\t0.4\t\n")
    monkeypatch.setattr(sample, "video_features", None)  # before any work
    onsets = [{"MARKS": marks, "TWO": two}.get(name, name) for name in onsets]
    args = ("--weights", weights, "--out", tmp_path, "--steps", 2, "--find-rest", *onsets)
    status, _, (line,) = run(capsys, clip, *args)
    assert status and re.search(message, line)


def test_the_shipped_networks_find_the_rest_of_a_clip(tmp_path):
    """On clips that no training has seen, as well as without marks."""
    foley.main([str(tmp_path), "--clips", "6", "--seed", "78", "--rates", "real", "--fps", "25"])
    network = finder.Finder.load(hub.MINI / "finder.safetensors")
    pairs = found = true = 0
    for video in sorted(tmp_path.glob("*.mp4")):
        times = finder.onsets_of(video)
        if len(times) < 8:
            continue
        seconds = media.probe(video).duration
        parts = list(finder.minutes(video, 0.0, seconds))
        marks = [Hit(time) for time in times[:3]]
        columns = round(seconds / COLUMN)
        # without a head: the same log odds twice
        head = np.interp(
            np.arange(columns) * COLUMN,
            np.arange(len(parts[0][0])) / motion.FPS,
            network.read_parts(parts),
        )
        rest = [hit.time for hit in alike.find_rest(marks, head, network, parts, columns)[3:]]
        pairs += len(audio.match(rest, times[3:], 0.1))
        found += len(rest)
        true += len(times) - 3
    assert true > 20 and audio.f1(pairs, found, true)[2] > 0.7


# ---- what it is worth, measured ------------------------------------------------------------------


def test_only_what_follows_the_marks_is_measured(tmp_path):
    foley.main([str(tmp_path), "--clips", "1", "--seed", "5", "--rates", "real", "--fps", "25"])
    video = tmp_path / "00000.mp4"
    whole = evaluate.read_clip(video, evaluate.Metrics())
    rest = evaluate.read_clip(video, evaluate.Metrics(), marks=3)
    times = [hit.time for hit in whole.annotated]
    assert len(times) > 5 and whole.skip == 0 and rest.annotated == whole.annotated
    start = rest.skip / SAMPLE_RATE
    assert times[2] + alike.AFTER <= start < times[2] + alike.AFTER + COLUMN
    expected = [time - start for time in times[3:] if time >= start]
    assert np.allclose(rest.onsets, expected)
    assert rest.mel.shape[1] == whole.mel.shape[1] - round(start / COLUMN)
    # a sound begins for it where the marks end
    wav = media.read_audio(video)
    stats = evaluate.measure(wav, rest, evaluate.Metrics())
    alone = evaluate.measure(
        wav[rest.skip :], evaluate.read_clip(video, evaluate.Metrics()), evaluate.Metrics()
    )
    assert stats["predicted"] == alone["predicted"] == len(rest.ref_onsets)
    assert stats["matched_100ms"] >= 0.7 * len(expected) and math.isclose(
        stats["loudness"], 0, abs_tol=1e-6
    )

    # that of a shorter video, as the row wrong_video may have it, is over by then
    stats = evaluate.measure(wav[: rest.skip // 2], rest, evaluate.Metrics())
    assert stats["predicted"] == 0 and stats["annotated"] == len(expected)


def test_the_picture_after_the_marks_is_judged_with_their_sound(tmp_path, monkeypatch):
    foley.main([str(tmp_path), "--clips", "1", "--seed", "5", "--rates", "real", "--fps", "25"])
    seen = []

    def spy(video, cavp, count, seconds, start):
        seen.append((seconds, start))
        return torch.zeros(count, 4)

    monkeypatch.setattr(evaluate, "video_features", spy)
    config = SimpleNamespace(fps=15.625, frames=32)
    metrics = evaluate.Metrics(alignment=SimpleNamespace(config=config))
    clip = evaluate.read_clip(tmp_path / "00000.mp4", metrics, marks=3)
    ((seconds, start),) = seen
    assert start == clip.skip / SAMPLE_RATE > 0
    assert math.isclose(seconds + start, 8.2, abs_tol=0.05)


def test_evaluation_marks_the_first_hits(weights, tmp_path, monkeypatch, capsys):
    clips = tmp_path / "clips"
    foley.main([str(clips), "--clips", "6", "--seed", "5", "--rates", "real", "--fps", "25"])
    asked = []

    def silent(video, models, settings):
        asked.append((video.stem, settings.find_rest, settings.onsets))
        return torch.zeros(8 * SAMPLE_RATE), 0.1

    monkeypatch.setattr(evaluate, "generate_sound", silent)
    args = ["--data", clips, "--weights", weights, "--judges", tmp_path, "--out", tmp_path / "out"]
    groups = tmp_path / "groups.csv"
    names = [f"{k:05d}" for k in range(6)]
    groups.write_text("name,group\n" + "".join(f"{name},{name}\n" for name in names))
    evaluate.main([*map(str, args), "--marks", "3", "--groups", str(groups)])
    marked = {name: onsets for name, is_marked, onsets in asked if is_marked}
    plain = {name for name, is_marked, onsets in asked if not is_marked}
    assert plain == set(marked) and len(marked) >= 2
    for name, onsets in marked.items():
        annotated = [o["time"] for o in json.loads((clips / f"{name}.json").read_text())["onsets"]]
        assert [hit.time for hit in onsets] == sorted(annotated)[:3]
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert {"ours", "marked", "ground_truth", "slid"} <= set(report["rows"])
    # groups are of the clips that are left, each of its own
    assert set(report["groups"]) == set(marked) < set(names)
    for name in marked:
        of_group = report["groups"][name]["rows"]["ground_truth"]["mean_f1_100ms"]
        stats = report["clips"][f"{name}.mp4"]["ground_truth"]
        both = stats["predicted"] + stats["annotated"]
        assert math.isclose(of_group, 2 * stats["matched_100ms"] / both)
    assert report["rows"]["ground_truth"]["mean_f1_100ms"] > 0.7
    said = f"of 6 clips {len(marked)} have a hit"
    assert (said in capsys.readouterr().err) == (len(marked) < 6)
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, args), "--marks", "3", "--onsets", "model"])
    assert "--marks: has rows of its own" in capsys.readouterr().err
    with pytest.raises(
        SystemExit, match="--marks: of 6 clips 0 have a hit, and a second of sound, after 99"
    ):
        evaluate.main([*map(str, args), "--marks", "99"])


def test_settings_need_marks_for_it():
    with pytest.raises(ValueError, match="^find-rest: needs the first hits"):
        Settings(find_rest=True)
    with pytest.raises(ValueError, match="^find_rest"):
        Settings(onsets=(Hit(0.1), Hit(0.5)), find_rest="no")
    assert Settings(onsets=(Hit(0.1), Hit(0.5)), find_rest=True).find_rest
