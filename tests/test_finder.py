"""finder.py: what it sees, what training makes of clips, that it learns, what it finds."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import make, make_video, steady

import data
import finder
import foley
from common import audio, controls, media, motion
from common.checkpoints import CheckpointError, save_model
from common.onsets import Hit
from common.profiling import Profile
from compat import hub
from film import hits
from finder import Clips, Finder, FinderConfig


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Finder(FinderConfig(width=6, hidden=8)).eval().requires_grad_(False)


def blocks_of(seed=0, frames=40):
    """Any block motion that is possible, float32 (frames, 5, 12, 12)."""
    rng = np.random.default_rng(seed)
    blocks = np.zeros((frames, 5, 12, 12), np.float32)
    velocity = rng.integers(-32, 33, (frames + 1, 2, 5, 4))
    blocks[:, 0:2, 2:7, 3:7] = velocity[:-1]
    blocks[:, 2:4, 2:7, 3:7] = velocity[1:]
    blocks[:, 4, 2:7, 3:7] = rng.integers(5, 90, (frames, 5, 4))
    return blocks


def test_a_stop_loses_all_speed_a_bounce_more_and_going_on_none():
    blocks = torch.zeros(1, 4, 5, 12, 12)
    blocks[0, :, 0, 0, 0] = 16.0
    blocks[0, :, 2, 0, 0] = torch.tensor([0.0, -16.0, 16.0, 24.0])
    seen = finder.inputs(blocks)[0, :, :, 0, 0]
    lost = seen[:, 4].expm1()
    speed = seen[:, 5].expm1()
    assert torch.allclose(lost / speed, torch.tensor([1.0, 2.0, 0.0, 0.0]), atol=1e-5)


def test_how_far_and_how_brightly_a_clip_moves_hardly_matters():
    blocks = torch.from_numpy(blocks_of())[None]
    seen = finder.inputs(blocks)
    assert torch.allclose(finder.inputs(0.5 * blocks), seen, atol=0.15)
    assert not finder.inputs(0 * blocks).any()


def test_a_minute_at_a_time_each_with_the_frames_around_it(network, tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", seconds=4.0, flashes=(0.5, 1.1, 2.7))
    whole = network.read(path, 0.0, 4.0)
    blocks = media.clip_motion(path)
    assert whole.shape == (100,) and whole.dtype == np.float32
    assert np.array_equal(whole, network(blocks[None])[0].numpy())
    monkeypatch.setattr(finder, "MINUTE", 40)
    parts = network.read(path, 0.5, 3.0)
    assert parts.shape == (75,)
    low = 40 - finder.REACH
    rest = media.clip_motion(path, 0.5 + low / 25, (75 - low) / 25)
    assert np.array_equal(parts[40:], network(rest[None])[0, finder.REACH :].numpy())


def test_log_odds_depend_on_so_many_frames_and_no_further(network, monkeypatch):
    # without the scale, which is of the whole clip
    monkeypatch.setattr(finder, "inputs", lambda blocks: torch.cat([blocks, blocks[:, :, :2]], 2))
    blocks = torch.from_numpy(blocks_of())[None]
    odds = network(blocks)[0]
    assert finder.REACH > 8 + motion.LONGEST_HELD
    for away, reaches in ((8, True), (9, False)):
        other = blocks.clone()
        other[:, 20 + away] = 0
        # as near as rounding in another order is
        assert torch.allclose(network(other)[0, 20], odds[20], rtol=0, atol=1e-6) != reaches


def test_a_mirror_changes_left_and_right_alone():
    blocks = blocks_of()
    mirrored = finder.mirrored(blocks)
    assert np.array_equal(finder.mirrored(mirrored), blocks)
    assert np.array_equal(mirrored[:, 0], blocks[:, 0, :, ::-1])
    assert np.array_equal(mirrored[:, 1], -blocks[:, 1, :, ::-1])


def test_shrunk_clips_are_a_quarter_as_large_somewhere():
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(20):
        small = finder.shrunk(np.ones((2, 5, 12, 12), np.float32), rng)
        rows, cols = np.nonzero(small[0, 0])
        assert len(rows) == 36 and np.ptp(rows) == np.ptp(cols) == 5
        places.add((rows.min(), cols.min()))
    assert len(places) > 5


def test_a_drift_loses_no_speed_suddenly():
    rng = np.random.default_rng(0)
    drift = finder.smoothed(blocks_of(frames=80), rng)
    assert drift[:, :4].any() and drift.shape == (80, 5, 12, 12)
    # consistent: what comes after a frame came before the next
    assert np.array_equal(drift[1:, 0:2], drift[:-1, 2:4])
    jumps = np.abs(np.diff(drift[10:-10, 2], axis=0)).max()
    assert jumps < 0.35 * np.abs(np.diff(blocks_of(frames=80)[:, 2], axis=0)).max()


def test_a_shaken_camera_moves_all_blocks_alike():
    still = np.zeros((60, 5, 12, 12), np.float32)
    shaken = [finder.shaken(still, np.random.default_rng(seed)) for seed in range(8)]
    assert any(blocks.any() for blocks in shaken)
    for blocks in shaken:
        assert not (blocks - blocks[:, :, :1, :1]).any() and not blocks[:, 4].any()
        assert np.array_equal(blocks[1:, 0:2], blocks[:-1, 2:4])


def test_few_blocks_are_mismatched():
    blocks = np.full((50, 5, 12, 12), 8, np.float32)
    changed = finder.mismatched(blocks, np.random.default_rng(1))
    share = (changed[:, :4] != 8).any(1).mean()
    assert 0 < share < 0.26
    assert np.abs(changed[:, :4]).max() <= motion.SPEED * motion.REACH
    assert np.array_equal(changed[:, 4], blocks[:, 4])


def test_what_lies_in_front_is_seen():
    behind = np.full((3, 5, 12, 12), 8, np.float32)
    front = np.zeros_like(behind)
    front[:, 1, 2, 3] = -16
    front[:, 4, 5, 6] = 60
    both = finder.laid_over(behind, front)
    assert np.array_equal(both[:, :, 2, 3], front[:, :, 2, 3])
    assert np.array_equal(both[:, :, 5, 6], front[:, :, 5, 6])
    both[:, :, [2, 5], [3, 6]] = 8
    assert np.array_equal(both, behind)


def test_the_target_is_a_bump_at_each_onset():
    wanted = finder.target([0.4, 1.0], 5, 30)
    assert wanted.argmax() in (5, 20)
    assert wanted[5] == wanted[20] == 1 and wanted[[4, 6]] == pytest.approx(
        math.exp(-0.5 * (0.04 / finder.WIDTH) ** 2), rel=1e-5
    )
    assert wanted[12] < 1e-6 and not finder.target([], 0, 4).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight procedural clips with their labels, 25 frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    foley.main([str(folder), "--clips", "8", "--rates", "real", "--fps", "25", "--duration", "4"])
    return folder


def test_items_repeat_and_change_with_the_epoch(folder):
    clips = Clips(folder)
    assert len(clips) == 8 and clips.left_out == []
    for index in range(8):
        item = clips[index]
        assert item["blocks"].shape == (finder.SPAN, 5, 12, 12)
        assert item["target"].shape == (finder.SPAN,)
        assert np.array_equal(item["blocks"], Clips.__getitem__(clips, index)["blocks"])
        assert not np.array_equal(item["blocks"], clips[index + 8]["blocks"])
    assert not np.array_equal(Clips(folder, seed=1)[0]["blocks"], clips[0]["blocks"])


def test_processes_beside_each_other_read_the_same(folder, tmp_path):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    for name in ("00000.mp4", "00000.json", "00001.mp4"):
        (inside / name).write_bytes((folder / name).read_bytes())
    make(inside / "silent.mp4", steady(25, 1))
    alone = Clips(tmp_path)
    beside = Clips(tmp_path, workers=2)
    assert beside.onsets == alone.onsets and len(alone) == 2
    assert all(map(np.array_equal, beside.blocks, alone.blocks))
    # by its folder too: others may have the name
    assert [name for name, _ in beside.left_out] == ["deep/er/silent.mp4"]
    assert beside.left_out == alone.left_out and beside.rights == alone.rights


def test_labels_count_and_without_them_the_sound(folder, tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes((folder / "00000.mp4").read_bytes())
    heard = finder.onsets_of(video)
    sound = audio.mel(media.read_audio(video)).numpy()
    assert heard == audio.detect_onsets(sound).tolist() and len(heard) > 2
    (tmp_path / "a.json").write_text(json.dumps({"onsets": [{"time": 1.5}, {"time": 0.25}]}))
    assert finder.onsets_of(video) == [0.25, 1.5]


def test_a_clip_that_cannot_be_read_takes_no_other_down(folder, tmp_path):
    for name in ("00000.mp4", "00000.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    silent = make(tmp_path / "silent.mp4", steady(25, 1))
    clips = Clips(tmp_path)
    assert len(clips) == 1
    assert [name for name, _ in clips.left_out] == [silent.name]
    with pytest.raises(media.MediaError, match="no clip .split: all.; add more.*1 left out.*sound"):
        Clips(silent)
    with pytest.raises(media.MediaError, match="nowhere: no such folder"):
        Clips(tmp_path / "nowhere")


@pytest.mark.parametrize("time", ["NaN", "1e400", "null", '"soon"'])
def test_a_time_that_is_none_is_no_label(tmp_path, time):
    (tmp_path / "a.json").write_text(f'{{"onsets": [{{"time": {time}}}]}}')
    with pytest.raises(media.MediaError, match="a.json: not the labels of foley.py"):
        data.read_onsets(tmp_path / "a.mp4")


def test_clips_left_out_of_validation_are_named(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "split_of", lambda name: "val" if name == "silent.mp4" else "train")
    for name in ("00000.mp4", "00000.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    make(tmp_path / "silent.mp4", steady(25, 1))
    out = tmp_path / "run"
    finder.main(["--data", str(tmp_path), "--out", str(out), "--device", "cpu", "--steps", "1"])
    assert "silent.mp4," in (out / "left_out.csv").read_text()


def test_validation_takes_a_minute_at_a_time(folder, monkeypatch):
    clips = Clips(folder)
    network = Finder(FinderConfig()).eval()
    seen = []
    forward = Finder.forward

    def spy(self, blocks):
        seen.append(blocks.shape[1])
        return forward(self, blocks)

    monkeypatch.setattr(Finder, "forward", spy)
    monkeypatch.setattr(finder, "MINUTE", 40)
    with torch.no_grad():
        finder.validate(network, clips)
    assert max(seen) == 40 and sum(seen) == sum(map(len, clips.blocks))


def test_it_learns_from_sound_alone(folder, tmp_path):
    """Trained on eight clips without labels it finds their hits; a run goes on where it stopped."""
    for video in folder.glob("*.mp4"):
        (tmp_path / video.name).write_bytes(video.read_bytes())
    run = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    finder.main([*run, "--steps", "150", "--save-every", "75"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    trained = Finder.load(tmp_path / "run" / "last.safetensors")
    assert found_f1(trained, folder) > 0.6


def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path):
    def run(name, steps, *extra):
        out = tmp_path / name
        given = ["--data", str(folder), "--out", str(out), "--device", "cpu", "--save-every", "2"]
        finder.main([*given, "--steps", str(steps), *extra])
        return Finder.load(out / "last.safetensors").state_dict()

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, "--resume")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def found_f1(network, folder):
    """F1 within 100 ms of the hits that a finder finds alone in labeled clips."""
    clips = Clips(folder)
    return finder.validate(network, clips)[0]["val_f1"]


def test_the_shipped_finder_finds_hits(tmp_path):
    """On clips that no training has seen."""
    foley.main([str(tmp_path), "--clips", "6", "--seed", "77", "--rates", "real", "--fps", "25"])
    shipped = Finder.load(hub.MINI / "finder.safetensors")
    assert found_f1(shipped, tmp_path) > 0.75
    # and nothing where nothing moves
    odds = shipped(torch.zeros(1, 100, 5, 12, 12))[0].numpy()
    assert controls.find_hits(None, odds, 250) == []


def test_a_folder_of_weights_may_have_its_own(tmp_path):
    for name in ("cavp", "ldm"):
        (tmp_path / f"{name}.safetensors").touch()
    assert hub.find_weights(tmp_path)["finder"] == hub.MINI / "finder.safetensors"
    own = tmp_path / "finder.safetensors"
    own.touch()
    assert hub.find_weights(tmp_path)["finder"] == own


def test_a_link_to_nothing_is_not_the_shipped_finder(tmp_path):
    for name in ("cavp", "ldm"):
        (tmp_path / f"{name}.safetensors").touch()
    own = tmp_path / "finder.safetensors"
    own.symlink_to(tmp_path / "gone.safetensors")
    assert hub.find_weights(tmp_path)["finder"] == own
    with pytest.raises(CheckpointError, match="finder.safetensors"):
        Finder.load(own)


def test_weights_that_are_not_numbers_are_refused(network, tmp_path):
    path = tmp_path / "finder.safetensors"
    broken = Finder(network.config)
    with torch.no_grad():
        broken.last.bias[1] = math.nan
    save_model(path, broken, asdict(network.config))
    with pytest.raises(CheckpointError, match="finder.safetensors: last.bias is not finite"):
        Finder.load(path)


def test_the_finder_of_the_weights_is_asked(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hits, "load_finder", lambda path: asked.append(path) or Still())
    clip = SimpleNamespace(source=tmp_path, start=1.0, seconds=2.0, profile=Profile())
    for paths in ({}, {"finder": tmp_path / "own.safetensors"}):
        models = SimpleNamespace(sums=SimpleNamespace(paths=paths))
        (hit,) = hits.found_hits(clip, models, "flow")
        assert isinstance(hit, Hit) and abs(hit.time - 0.5) < 0.03
    assert asked == [hub.MINI / "finder.safetensors", tmp_path / "own.safetensors"]


class Still:
    """A finder that finds one hit after half a second of what it is to read."""

    def read(self, path, start, seconds):
        assert (start, seconds) == (1.0, 2.0)
        odds = np.full(50, -5.0)
        odds[12:14] = 1.0
        return odds
