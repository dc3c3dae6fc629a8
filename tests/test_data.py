"""data.py: prepared sets, how they are made, continued, damaged, checked and read."""

import atexit
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import PATIENCE
from clips import clicks, make, one_line, onsets, seen, steady
from safetensors import safe_open
from sets import content, names, splits
from tqdm import tqdm

import cavp
import data
from common import audio, ffmpeg, files, media, rights
from common.checkpoints import save_model
from common.rights import Rights
from tools.speed_data import of_shards

ROOT = Path(__file__).parent.parent


# ---- prepared sets -----------------------------------------------------------------------------

FPS = 15.625  # 1024 samples a frame


def flash_clip(path, moment, seconds=3.0):
    """White for 40 ms and a click, both at `moment`."""
    times = steady(125, seconds)
    levels = [235 if 0 <= time - moment < 0.04 else 30 for time in times[:-1]]
    return make(path, times, levels, wav=clicks(seconds, [moment]), size=(32, 32))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Four good clips, one of them short, and one file for each reason to leave one out."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "sub").mkdir()
    for k, name in enumerate(("c.mp4", "a.mkv", "sub/b.mp4")):
        flash_clip(folder / name, 1.0 + 0.4 * k)
    flash_clip(folder / "short.mp4", 0.3, 0.6)
    make(folder / "mute.mp4", steady(25, 3))
    make(folder / "quiet.mp4", steady(25, 2), wav=0.0009 * clicks(2, [1.0]))
    flash_clip(folder / "blink.mp4", 0.1, 0.3)
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    (folder / "a.foley.mp4").write_bytes((folder / "c.mp4").read_bytes())
    return folder


REASONS = [
    ("blink.mp4", "too short"),
    ("broken.mp4", "undecodable"),
    ("mute.mp4", "no sound track"),
    ("quiet.mp4", "silent"),
]


@pytest.fixture(scope="module")
def set_of_four(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    data.prepare(raw, folder, FPS, 32)
    return folder


def command(*args):
    """`python data.py ...`, which must not end in a traceback."""
    done = subprocess.run(
        [sys.executable, "data.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_command_names_what_it_leaves_out_and_workers_change_no_byte(
    raw, set_of_four, tmp_path
):
    done = command("prepare", raw, tmp_path / "3", "--size", 32, "--workers", 3)
    assert done.returncode == 1
    assert "4 clips, 4 of them new" in done.stdout
    summary = done.stderr.splitlines()[-1]
    assert (
        "left out 4 files (1 no sound track, 1 silent, 1 too short, 1 undecodable)" in summary
        and "left_out.csv" in summary
    )
    assert content(tmp_path / "3") == content(set_of_four)
    assert sorted(content(set_of_four)) == [
        ".lock",
        "index.safetensors",
        "left_out.csv",
        "set.json",
        "shard-00000.safetensors",
    ]
    assert names(set_of_four) == ["a.mkv", "c.mp4", "short.mp4", "sub/b.mp4"]
    assert data.Set(set_of_four).left_out() == REASONS


def test_a_set_is_plain_safetensors(set_of_four):
    """With nothing but the library: the form that data.py's docstring gives."""
    metadata = json.loads((set_of_four / "set.json").read_text())
    assert (metadata["format"], metadata["fps"], metadata["size"]) == (4, FPS, 32)
    path = set_of_four / "shard-00000.safetensors"
    assert metadata["shards"] == [{"clips": 4, "sha256": files.sha256(path)}]
    with safe_open(path, "np") as file:
        clips = json.loads(file.metadata()["clips"])
        assert [clip[0] for clip in clips] == ["a.mkv", "c.mp4", "short.mp4", "sub/b.mp4"]
        for k in range(4):
            bounds = file.get_tensor(f"{k}.bounds")
            frames = file.get_tensor(f"{k}.frames")
            sound = file.get_tensor(f"{k}.sound")
            assert (bounds.dtype, frames.dtype, sound.dtype) == (np.int64, np.uint8, np.int16)
            assert bounds[0] == 0 and bounds[-1] == len(frames) and (np.diff(bounds) > 0).all()
            assert frames[:2].tobytes() == frames[bounds[1] :][:2].tobytes() == b"\xff\xd8"
    assert path.stat().st_mode & 0o777 == (set_of_four / "left_out.csv").stat().st_mode & 0o777


def test_a_set_holds_the_frames_and_the_sound_of_its_files(raw, set_of_four):
    """Frames within what JPEG loses, sound within half a step of 16 bits."""
    clips = data.Clips(set_of_four, FPS, 32)
    for k, name in enumerate(names(set_of_four)):
        frames, item = media.read_frames(raw / name, FPS, 32), clips[k]
        assert item["video"].shape == frames.shape and item["name"] == name and "label" not in item
        assert (item["video"].float() - frames.float()).square().mean() < 10  # 38 dB
        wav = media.read_audio(raw / name, duration=media.probe(raw / name).duration)
        assert (
            len(item["wav"]) == len(frames) * 1024 >= len(wav) and not item["wav"][len(wav) :].any()
        )
        assert (item["wav"][: len(wav)] - wav).abs().max() <= 0.5001 / 32767


@pytest.mark.parametrize("size, n", [(64, 5), (50, 3), (224, 2)])
def test_jpegs_are_close_in_every_colour_and_at_every_size(size, n):
    rng = np.random.default_rng(size)
    coarse = rng.integers(0, 255, (n, size // 8 + 1, size // 8 + 1, 3), np.uint8)
    images = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size]  # squares of any colour
    back = data.decode_jpegs(list(data.encode_jpegs(images, size)), size)
    assert back.shape == (n, 3, size, size)
    error = back.astype(float) - images.transpose(0, 3, 1, 2)
    assert np.abs(error.mean((2, 3))).max() < 1.5 and (error**2).mean() < 20


def test_a_picture_that_is_held_is_encoded_once():
    image = np.zeros((16, 16, 3), np.uint8)
    jpegs = list(data.encode_jpegs([image, image, image + 90], 16))
    assert jpegs[0] is jpegs[1] and jpegs[0] != jpegs[2]


def test_frames_go_to_the_encoder_one_by_one(raw):
    """However long a film is, nobody holds it decoded."""
    taken = []
    jpegs = data.encode_jpegs(
        (taken.append(k) or np.full((16, 16, 3), k, np.uint8) for k in range(9)), 16
    )
    for k in range(1, 4):
        next(jpegs)
        assert len(taken) == k
    film = ffmpeg.pictures(raw / "c.mp4", 1000, 16)  # would be three thousand frames
    assert next(film) is next(film)


@pytest.mark.parametrize("limit", [{"SHARD_CLIPS": 2}, {"SHARD_BYTES": 200_000}])
def test_any_stretch_of_an_array_is_what_was_written(tmp_path, monkeypatch, limit):
    """Across the edges of clips and of shards, of which none holds more than it may."""
    for name, value in limit.items():
        monkeypatch.setattr(data, name, value)
    rng = np.random.default_rng(0)
    written = []
    with data.Writer(tmp_path / "set", {"columns": ["a", "sound"], "fps": 1.0}) as writer:
        for k, size in enumerate((0, 3, 40_000, 8192, 16384, 60_000)):
            a = rng.integers(0, 255, (size, 2), np.uint8)
            sound = rng.integers(-9, 9, 2 * size).astype(np.int16)
            written.append({"a": a, "sound": sound})
            writer.add(str(k), "", "train", written[-1])
        writer.finish()
    shards = [shard["clips"] for shard in data.read_metadata(tmp_path / "set")["shards"]]
    assert shards == ([2, 2, 2] if "SHARD_CLIPS" in limit else [2, 1, 2, 1])
    opened = data.Set(tmp_path / "set")
    for clip, columns in enumerate(written):
        for name, column in columns.items():
            assert np.array_equal(opened.column(clip, name), column)
            assert opened.index[name][clip] == len(column)
            for start, count in rng.integers(0, len(column) + 1, (20, 2)).tolist():
                part = opened.column(clip, name, start, start + count)
                assert np.array_equal(part, column[start : start + count])
    assert list(data.check(tmp_path / "set")) == []


def test_names_need_be_neither_text_nor_plain(raw, tmp_path):
    """As far as the file system allows them."""
    bad = [b"\xff\xfe.mp4", "\u00fc \u97f3\U0001f941.mp4".encode(), b"0.frames.mp4", b'a,"b";c.mp4']
    bad += [b"../x"[3:] + b"\n.mp4", b"__metadata__.mp4", b"'{0.sound}'%s.mp4", b"clips.mp4"]
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in bad:
        try:
            (videos / os.fsdecode(name)).write_bytes((raw / "short.mp4").read_bytes())
        except (OSError, UnicodeError):
            bad.remove(name)
    (videos / os.fsdecode(b"\xfd,\n.mp4")).write_bytes(b"\0")
    report = data.prepare(videos, tmp_path / "set", FPS, 32)
    assert report.clips == len(bad) and sorted(names(tmp_path / "set")) == sorted(
        os.fsdecode(name) for name in bad
    )
    assert data.Set(tmp_path / "set").left_out() == [(os.fsdecode(b"\xfd,\n.mp4"), "undecodable")]
    again = data.prepare(videos, tmp_path / "set", FPS, 32)
    assert (again.clips, again.new) == (len(bad), 0)
    assert list(data.check(tmp_path / "set")) == []
    clips = data.Clips(tmp_path / "set", FPS, 32)
    assert all(clips[k]["video"].shape == (10, 3, 32, 32) for k in range(len(bad)))


def test_clips_keep_picture_and_sound_together(set_of_four):
    with pytest.warns(UserWarning, match="1 of 4 clips are shorter than 1.28 s"):
        clips = data.Clips(set_of_four, FPS, 32, frames=20, seed=1)
    assert len(clips) == 3 and clips.left_out == [*REASONS, ("short.mp4", "shorter than 1.28 s")]
    both = 0
    for index in range(12):  # four epochs
        item = clips[index]
        assert item["video"].shape == (20, 3, 32, 32) and item["wav"].shape == (20480,)
        assert torch.equal(item["video"], clips[index]["video"]) and torch.equal(
            item["wav"], clips[index]["wav"]
        )
        light = seen(item["video"])
        if light.max() > 120 and item["wav"].abs().max() > 0.4:
            flash, click = light.argmax() / FPS, onsets(item["wav"])[0]
            assert -1e-3 <= flash - click < 0.041  # the first frame taken within 40 ms of the click
            both += 1
    assert both >= 3 and len({clips[index]["start"] for index in range(12)}) > 4
    whole = data.Clips(set_of_four, FPS, 32)
    for index in range(12):  # a window is that stretch of the whole clip
        item = clips[index]
        clip = next(c for c in map(whole.__getitem__, range(4)) if c["name"] == item["name"])
        first = round(item["start"] * FPS)
        assert torch.equal(item["video"], clip["video"][first : first + 20])
        assert torch.equal(item["wav"], clip["wav"][first * 1024 : (first + 20) * 1024])


def test_a_short_clip_is_padded(set_of_four):
    clips = data.Clips(set_of_four, FPS, 32, frames=20, random_start=False)
    item = next(item for item in map(clips.__getitem__, range(4)) if item["name"] == "short.mp4")
    assert (
        item["start"] == 0
        and item["video"].shape == (20, 3, 32, 32)
        and torch.equal(item["video"][-1], item["video"][9])
    )
    assert item["wav"][12000:].abs().max() == 0 and onsets(item["wav"]) == pytest.approx(
        [0.3], abs=2e-3
    )


def test_clips_in_worker_processes(set_of_four):
    clips = data.Clips(set_of_four, FPS, 32, frames=8, random_start=False)
    # opens the shard and a decoder here, before the workers start
    here = [clips[i]["video"] for i in range(len(clips))]
    for context, workers in (("fork", 2), ("spawn", 1))[sys.platform == "win32" :]:
        loader = torch.utils.data.DataLoader(
            clips, batch_size=1, num_workers=workers, multiprocessing_context=context
        )
        for _ in range(2):
            assert all(torch.equal(a["video"][0], b) for a, b in zip(loader, here, strict=True))
            assert torch.equal(clips[3]["video"], here[3])


# ---- killed, full, extended, damaged -----------------------------------------------------------


def small_shards(raw, out, answer, most, held):
    """Three clips to a shard, no file larger than `most` bytes; answers with the error's line.

    One that is `held` never finishes: it waits to be killed.
    """
    if most:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    # the one that all forks share stays locked if one is killed while it draws its bar
    tqdm.set_lock(threading.RLock())
    data.SHARD_CLIPS = 3
    if held:
        data.Writer.finish = lambda *_, **__: time.sleep(PATIENCE)
    try:
        data.prepare(raw, out, FPS, 32, 2)
        answer.send("")
    except files.UserError as error:
        answer.send(str(error))


def preparing(raw, out, most=None, held=False):
    """-> a process that prepares, and where its answer comes from."""
    context = multiprocessing.get_context("fork")  # it has nothing to import
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=small_shards, args=(raw, out, theirs, most, held))
    process.start()
    atexit.register(process.kill)  # a test that fails must not be waited for
    theirs.close()
    return process, answer


def answered(process, answer):
    said = answer.recv()
    process.join()
    return said


forks = pytest.mark.skipif(
    sys.platform == "win32", reason="no fork, no SIGKILL, no limit on file sizes there"
)


METADATA = {"columns": ["bounds", "frames", "sound"], "fps": FPS, "size": 32, "labels": False}


@pytest.fixture(scope="module")
def nine(raw, tmp_path_factory):
    """Nine good files and a broken one, and the set that an undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("nine")
    (folder / "raw").mkdir()
    for k in range(9):
        (folder / "raw" / f"{k}.mp4").write_bytes(
            (raw / ("c.mp4" if k % 2 else "sub/b.mp4")).read_bytes()
        )
    (folder / "raw" / "3bad.mp4").write_bytes(b"\0" * 100)
    if sys.platform != "win32":
        assert answered(*preparing(folder / "raw", folder / "set")) == ""
        assert len(list((folder / "set").glob("shard-*.safetensors"))) == 3
    return folder


def shards(root):
    """How many shards set.json lists."""
    try:
        return len(json.loads((root / "set.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


@forks
def test_after_sigkill_the_same_command_ends_in_the_same_bytes(nine, tmp_path):
    """Killed with none, one and two shards written, and with what a kill between two steps leaves.

    That is a part of a shard under its temporary name, or a shard that set.json does not list.
    """
    out = tmp_path / "set"
    for count in (0, 1, 2):
        process, _ = preparing(nine / "raw", out, held=True)
        deadline = time.monotonic() + PATIENCE
        while shards(out) < count or not (out / "set.json").exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        with pytest.raises(media.MediaError, match="unfinished"):
            data.Set(out)
        written = shards(out)
        with data.Writer(out, METADATA) as writer:
            assert len(writer.names) == 3 * written
        for number in range(written, 4):
            (out / f"shard-{number:05d}.safetensors").write_bytes(b"rubbish")
        (out / ".0123456789abcdef.part.safetensors").write_bytes(b"rubbish")
    assert answered(*preparing(nine / "raw", out)) == ""
    (out / "shard-00003.safetensors").unlink()
    assert content(out) == content(nine / "set")
    assert names(out) == [f"{k}.mp4" for k in range(9)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_run_keeps_all_its_clips(nine, tmp_path, monkeypatch, error):
    """Also those that do not fill a shard."""
    monkeypatch.setattr(data, "SHARD_CLIPS", 3)
    encode, encoded = data.encode_all, []

    def interrupted(*args):
        for job, result in encode(*args):
            encoded.append(job.name)
            yield job, result
            if len(encoded) == 6:
                raise error

    out = tmp_path / "set"
    monkeypatch.setattr(data, "encode_all", interrupted)
    with pytest.raises(error):
        data.prepare(nine / "raw", out, FPS, 32)
    with pytest.raises(media.MediaError, match="unfinished"):
        data.Set(out)
    data.prepare(nine / "raw", out, FPS, 32)
    # the broken one is the fifth, and is tried again
    assert sorted(encoded) == sorted([f"{k}.mp4" for k in range(9)] + ["3bad.mp4"] * 2)
    if sys.platform != "win32":
        assert content(out) == content(nine / "set")


@forks
@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_the_command_stops_in_one_line_and_goes_on(nine, tmp_path, signal):
    import signal as signals

    for k in range(40):
        (tmp_path / "raw").mkdir(exist_ok=True)
        os.link(nine / "raw" / f"{k % 9}.mp4", tmp_path / "raw" / f"{k:02d}.mp4")
    run = [sys.executable, "data.py", "prepare", tmp_path / "raw", tmp_path / "set", "--size", "32"]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    atexit.register(process.kill)
    while not (tmp_path / "set" / "set.json").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(getattr(signals, signal))
    _, text = process.communicate(timeout=PATIENCE)
    if process.returncode:  # it can be that fast
        assert process.returncode == 128 + getattr(signals, signal) and "Traceback" not in text
        assert f"data.py: {tmp_path / 'set'}: interrupted; run the same command again" in text
    assert command("prepare", tmp_path / "raw", tmp_path / "set", "--size", 32).returncode == 0
    assert command("check", tmp_path / "set").returncode == 0
    assert names(tmp_path / "set") == [f"{k:02d}.mp4" for k in range(40)]


@forks
def test_a_full_disk_stops_with_one_line_and_goes_on(nine, tmp_path):
    """A limit on file size stands for the full disk: the error comes the same way, from a write."""
    out = tmp_path / "set"
    error = answered(*preparing(nine / "raw", out, 50_000))
    assert (
        str(out) in error
        and "cannot be written" in error
        and "same command again" in error
        and "\n" not in error
    )
    assert answered(*preparing(nine / "raw", out)) == ""
    assert content(out) == content(nine / "set")


def test_new_files_are_appended_and_nothing_else_changes(raw, nine, tmp_path):
    videos, out = tmp_path / "raw", tmp_path / "set"
    videos.mkdir()
    for k in (2, 4, 6, 8):
        (videos / f"{k}.mp4").write_bytes((nine / "raw" / f"{k}.mp4").read_bytes())
    (videos / "7.mp4").write_bytes(b"\0" * 100)
    first = data.prepare(videos, out, FPS, 32)
    before, was = content(out), splits(out)
    assert (first.clips, first.new) == (4, 4) and [name for name, *_ in first.left_out] == ["7.mp4"]
    assert set(was.values()) == {"train", "val", "test"}  # four clips give one to each
    again = data.prepare(videos, out, FPS, 32)
    assert (again.clips, again.new) == (4, 0) and content(out) == before
    old = data.Set(out)
    assert old.describe(3)[0] == "8.mp4"
    for k in (0, 1, 7):  # one of them has been repaired
        (videos / f"{k}.mp4").write_bytes((nine / "raw" / f"{k}.mp4").read_bytes())
    more = data.prepare(videos, out, FPS, 32)
    assert (more.clips, more.new, more.left_out) == (7, 3, [])
    assert names(out) == ["2.mp4", "4.mp4", "6.mp4", "8.mp4", "0.mp4", "1.mp4", "7.mp4"]
    assert all(splits(out)[name] == split for name, split in was.items())
    assert content(out)["shard-00000.safetensors"] == before["shard-00000.safetensors"]
    assert shards(out) == 2 and list(data.check(out)) == []
    # whoever has it open goes on
    assert len(old.index["split"]) == 4 and old.column(3, "sound").any()


def test_readers_see_a_set_as_it_was_until_more_is_finished(set_of_four, tmp_path):
    root = shutil.copytree(set_of_four, tmp_path / "set")
    opened = data.Set(root)
    clip = {column: opened.column(0, column) for column in opened.metadata["columns"]}
    with data.Writer(root, METADATA) as writer:
        writer.add("new", "", "val", clip)
    # an interrupted run wrote its shard; another wrote the index, too, and was killed then
    assert shards(root) == 2 and names(root) == names(set_of_four)
    before = (root / "set.json").read_bytes()
    with data.Writer(root, METADATA) as writer:
        assert "new" in writer.names
        writer.finish()
    (root / "set.json").write_bytes(before)
    assert names(root) == names(set_of_four) and list(data.check(root)) == []
    with data.Writer(root, METADATA) as writer:
        writer.finish()
    assert names(root) == [*names(set_of_four), "new"] and list(data.check(root)) == []


@forks
def test_two_processes_do_not_prepare_one_set(nine, tmp_path):
    with data.Writer(tmp_path / "set", METADATA):
        assert "another process" in answered(*preparing(nine / "raw", tmp_path / "set"))


class Deadly(type(Path())):
    """A path that ends the process which unpickles it, as a crash in a decoder would."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_file_that_kills_its_process_is_left_out(nine, tmp_path, monkeypatch):
    jobs, *rest = data.find_jobs(nine / "raw")
    jobs = [
        job._replace(path=Deadly("gone.mp4")) if job.name in ("5.mp4", "6.mp4") else job
        for job in jobs
    ]
    monkeypatch.setattr(data, "find_jobs", lambda *_: (jobs, *rest))
    report = data.prepare(nine / "raw", tmp_path / "set", FPS, 32, 3)
    assert names(tmp_path / "set") == [f"{k}.mp4" for k in (0, 1, 2, 3, 4, 7, 8)]
    assert [name for name, _, found in report.left_out if "died" in found] == ["5.mp4", "6.mp4"]


def readings(clips):
    """The error of each way to read a clip."""
    loader = torch.utils.data.DataLoader(clips, num_workers=1)
    for read in (lambda: clips[0], lambda: next(iter(loader))):
        with pytest.raises(media.MediaError) as caught:
            read()
        yield caught


@pytest.fixture
def copied(set_of_four, tmp_path):
    """-> a function that gives a fresh copy's shard."""
    root = tmp_path / "set"

    def fresh():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(set_of_four, root)
        return root / "shard-00000.safetensors"

    return fresh


def fill(shard, key, byte):
    """Overwrite a shard's array: every byte of it."""
    with open(shard, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(size))[key]["data_offsets"]
        file.seek(8 + size + start)
        file.write(byte * (end - start))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shard: shard.unlink(),
        lambda shard: os.truncate(shard, 2000),
        lambda shard: os.truncate(shard, 20_000),
        lambda shard: os.truncate(shard, 0),
        lambda shard: shard.write_bytes(b"\7" * shard.stat().st_size),
        functools.partial(fill, key="0.frames", byte=b"\0"),
        functools.partial(fill, key="0.bounds", byte=b"\xff"),
        functools.partial(fill, key="0.bounds", byte=b"\x07"),
        functools.partial(fill, key="0.bounds", byte=b"\0"),
    ],
)
def test_what_is_damaged_or_gone_says_so_in_one_line(copied, spoil):
    shard = copied()
    clips = data.Clips(shard.parent, FPS, 32, frames=8, random_start=False)
    spoil(shard)
    for caught in readings(clips):
        one_line(caught, str(shard), "missing or damaged", "prepare it again")
    done = command("check", shard.parent)
    assert (
        done.returncode == 1 and str(shard) in done.stdout and "4 clips, shards: 1" in done.stdout
    )


def test_a_shard_that_shrinks_while_it_is_open_is_an_error(copied):
    shard = copied()
    clips = data.Clips(shard.parent, FPS, 32)
    clips[0]
    os.truncate(shard, 2000)
    for caught in readings(clips):
        one_line(caught, str(shard), "missing or damaged")


def test_check_finds_every_flipped_bit(copied):
    shard = copied()
    assert command("check", shard.parent).stdout.endswith(": 4 clips, shards: 1, faults: 0\n")
    size = shard.stat().st_size
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    for place in (0, 9, header // 2, header + 8, size // 3, size // 2, size - 1):
        content = bytearray(copied().read_bytes())
        content[place] ^= 4
        shard.write_bytes(content)
        assert any(str(shard) in line for line in data.check(shard.parent))
    copied()
    fill(shard, "3.frames", b"\0")
    faults = list(data.check(shard.parent))
    assert len(faults) == 2 and "SHA-256" in faults[0] and "sub/b.mp4 is missing" in faults[1]
    assert all("\n" not in fault and fault.endswith(data.AGAIN) for fault in faults)
    data.Clips(shard.parent, FPS, 32)[0]  # the others are as they were


def test_check_compares_the_index_with_the_shards(copied):
    root = copied().parent
    fill(root / "index.safetensors", "sound", b"\1")
    faults = list(data.check(root))
    assert len(faults) == 4 and all("index.safetensors" in fault for fault in faults)
    data.Writer(root, METADATA).finish()  # it follows from the rest
    assert list(data.check(root)) == []
    os.truncate(root / "index.safetensors", 100)
    with pytest.raises(media.MediaError) as caught:
        data.Set(root)
    one_line(caught, "index.safetensors", "damaged")
    assert command("check", root).returncode == 1


def test_what_cannot_be_continued_says_so_in_one_line(raw, copied):
    os.truncate(copied(), 2000)
    root = copied().parent
    os.truncate(root / "shard-00000.safetensors", 2000)
    with pytest.raises(media.MediaError) as caught:
        data.Writer(root, METADATA)
    one_line(caught, "shard-00000.safetensors", "damaged")
    (root / "set.json").write_text('{"format": 3, "clips": 4, "columns": []}')
    for use in (
        lambda: data.Set(root),
        lambda: data.prepare(raw, root, FPS, 32),
        lambda: list(data.check(root)),
    ):
        with pytest.raises(media.MediaError) as caught:
            use()
        one_line(caught, str(root), "prepared by version 0.1", "prepare it again")
    for text in ("", "[]", "{", '{"format"'):
        (root / "set.json").write_text(text)
        with pytest.raises(media.MediaError) as caught:
            data.Set(root)
        one_line(caught, "set.json", "damaged")


def test_a_set_made_otherwise_names_the_command(raw, set_of_four, tmp_path):
    with pytest.raises(media.MediaError) as caught:
        data.Clips(set_of_four, 4, 32, frames=4)
    one_line(caught, "--fps 4 --size 32")
    with pytest.raises(media.MediaError) as caught:
        data.prepare(raw, set_of_four, 4, 32)
    one_line(caught, "fps 15.625 instead of 4", "another folder")
    with pytest.raises(media.MediaError) as caught:
        data.Clips(raw, FPS, 32)
    one_line(caught, "not a prepared set", "data.py prepare")
    with pytest.raises(media.MediaError) as caught:
        data.Pairs(set_of_four, FPS, 128)
    one_line(caught, "not features", "--extract")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"\0")
    with pytest.raises(media.MediaError) as caught:
        data.prepare(tmp_path / "bad", tmp_path / "none", FPS, 32)
    assert "no usable clip: left out 1 files (1 undecodable)" in str(caught.value)


def test_a_plain_folder_is_prepared_once_beside_the_run(raw, tmp_path, capsys, monkeypatch):
    videos, cache = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    (videos / "a.mkv").write_bytes((raw / "a.mkv").read_bytes())
    (videos / "broken.mp4").write_bytes(b"\0" * 100)
    root = data.prepared(videos, FPS, 32, cache)
    assert root.parent == cache and names(root) == ["a.mkv"]
    said = capsys.readouterr().err
    assert str(root) in said and "left out 1 files" in said
    assert data.prepared(root, FPS, 32, cache) == root  # a set is what it is
    before = content(root)
    monkeypatch.chdir(tmp_path)
    assert data.prepared("videos", FPS, 32, cache) == root and content(root) == before
    (videos / "c.mp4").write_bytes((raw / "c.mp4").read_bytes())
    assert names(data.prepared(videos, FPS, 32, cache)) == ["a.mkv", "c.mp4"]
    assert data.prepared(videos, 4, 32, cache) != root
    with pytest.raises(media.MediaError) as caught:
        data.prepared(tmp_path / "missing", FPS, 32, cache)
    one_line(caught, "no such folder")


# ---- splits and labels -------------------------------------------------------------------------


def test_the_split_is_a_function_of_the_name():
    found = [data.split_of(f"{k:05d}.mp4") for k in range(20000)]
    share = {split: found.count(split) / 20000 for split in data.SPLITS}
    assert share["val"] == pytest.approx(0.05, abs=0.005) and share["test"] == pytest.approx(
        0.05, abs=0.005
    )
    assert data.split_of("00000.mp4") == "train" and [
        k for k in range(60) if found[k] != "train"
    ] == [3, 38, 47, 50, 59]
    said = [data.split_of(f"{k:05d}.mp4", "train") for k in range(20000)]
    assert "test" not in said and [s == "val" for s in said] == [s == "val" for s in found]
    assert data.split_of("x", "test") == "test" and data.split_of("x", "val") == "val"


def test_readers_keep_to_their_split(set_of_four, raw, tmp_path):
    of = splits(set_of_four)
    assert sorted(of.values()) == ["test", "train", "train", "val"]
    for split in data.SPLITS:
        clips = data.Clips(set_of_four, FPS, 32, frames=5, split=split)
        assert sorted(clips[k]["name"] for k in range(len(clips))) == sorted(
            name for name in of if of[name] == split
        )
        assert [clips.describe(k)[2] for k in range(len(clips))] == [split] * len(clips)
        assert len(data.Sounds(set_of_four, 5 * 1024, split=split)) == len(clips)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.mkv").write_bytes((raw / "a.mkv").read_bytes())
    data.prepare(tmp_path / "one", tmp_path / "set", FPS, 32)
    with pytest.raises(media.MediaError) as caught:
        data.Clips(tmp_path / "set", FPS, 32, split="val")
    one_line(caught, "no clip of its 1 is for val", "three or more")


def test_vggsounds_csv_names_clips_labels_and_splits(raw, tmp_path):
    videos, table = tmp_path / "videos", tmp_path / "vggsound.csv"
    (videos / "more").mkdir(parents=True)
    times = steady(25, 14)
    make(
        videos / "more" / "-full_id.mp4", times, wav=clicks(14, [4.5, 12.9]), size=(32, 32)
    )  # to be cut
    (videos / "cut0_000030.mp4").write_bytes((raw / "c.mp4").read_bytes())  # cut already
    (videos / "spare.mp4").write_bytes((raw / "c.mp4").read_bytes())
    table.write_text(
        '-full_id,3,"playing drums, loud",test\n-full_id,12,"playing drums, loud",train\n'
        "cut0,30,people sniggering,train\ngone,5,wind noise,test\n\n"
    )
    report = data.prepare(videos, tmp_path / "set", FPS, 32, 1, table)
    assert (report.clips, report.missing) == (3, 1)
    assert report.left_out == [("spare.mp4", "not in the CSV", "no row of it asks for this file")]
    clips = data.Clips(tmp_path / "set", FPS, 32)
    found = {item["name"]: item for item in map(clips.__getitem__, range(3))}
    assert {name: item["label"] for name, item in found.items()} == {
        "cut0_000030.mp4": "people sniggering",
        "more/-full_id_000003.mp4": "playing drums, loud",
        "more/-full_id_000012.mp4": "playing drums, loud",
    }
    assert (
        len(found["more/-full_id_000003.mp4"]["video"]) == 157
        and len(found["more/-full_id_000012.mp4"]["video"]) == 32
    )  # 10 s; 2 s
    assert onsets(found["more/-full_id_000003.mp4"]["wav"]) == pytest.approx([1.5, 9.9], abs=2e-3)
    of = splits(tmp_path / "set")
    assert of["more/-full_id_000003.mp4"] == "test" and {
        of["cut0_000030.mp4"],
        of["more/-full_id_000012.mp4"],
    } == {"train", "val"}
    table.write_text("a,b\n")
    with pytest.raises(media.MediaError) as caught:
        data.prepare(videos, tmp_path / "other", FPS, 32, 1, table)
    one_line(caught, str(table), "line 1")


# ---- a set of any size -------------------------------------------------------------------------


def test_opening_and_drawing_cost_the_same_at_any_number_of_clips(
    set_of_four, tmp_path, monkeypatch
):
    source = data.Set(set_of_four)
    clip = {column: source.column(0, column) for column in source.metadata["columns"]}
    with data.Writer(tmp_path / "one", METADATA) as writer:
        for k in range(data.SHARD_CLIPS):
            columns = {column: array.copy() for column, array in clip.items()}
            writer.add(str(k), "", "train", columns)
        writer.finish(needed=())
    opened, open_shard = [], data.open_shard
    monkeypatch.setattr(data, "open_shard", lambda path: opened.append(path) or open_shard(path))
    objects = {}
    for count in (1, 1, 782):  # 256 clips, which warm up, and 200,192
        root = of_shards(tmp_path / "one", tmp_path / f"{count}-{len(objects)}", count)
        gc.collect()
        before = sys.getallocatedblocks()
        clips = data.Clips(root, FPS, 32, frames=5, split="train", seed=3)
        # Python's own objects, not the arrays' one block each
        objects[count] = sys.getallocatedblocks() - before
        assert opened == []
        assert len(clips) == 256 * count and clips.clips.nbytes == 8 * len(clips)
        assert sum(column.nbytes for column in clips.set.index.values()) <= 32 * len(clips)
        assert clips[len(clips) - 1]["video"].shape == (5, 3, 32, 32)
        assert clips.describe(len(clips) - 1)[0] == "255"
        assert len(opened) == 1
        opened.clear()
    # set.json has an entry a shard
    assert objects[782] - objects[1] < 6 * 782
    # however many are read, few are open
    for k in range(0, len(clips), 256):
        clips[k]
    assert len(opened) == 782 and clips.set.shard.cache_info().currsize == data.OPEN_SHARDS


# ---- windows for stage 2 and for the autoencoder -----------------------------------------------

FEATURES = {"columns": ["features", "sound"], "fps": FPS, "width": 512, "network": "made up"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Four extracted clips whose features and sound both say which clip and frame they are of."""
    folder = tmp_path_factory.mktemp("features") / "set"
    with data.Writer(folder, FEATURES) as writer:
        for k in range(4):
            frame = np.arange(160) + 200 * k  # (f,)
            columns = {
                "features": frame[:, None].repeat(512, 1).astype(np.float16),
                "sound": frame.astype(np.int16).repeat(1024),
            }
            writer.add(str(k), "", "test" if k == 2 else "train", columns)
        writer.finish(needed=())
    return folder


def spoken(item):
    """The frame number that the sound of each feature says: its samples must all agree."""
    sound = (item["wav"] * 32767).round().view(-1, 1024)
    assert (sound == sound[:, :1]).all()
    return sound[:, 0]


@pytest.mark.parametrize("kind", [{}, {"merge": 1.0}, {"roll": 1.0}, {"merge": 1.0, "roll": 1.0}])
def test_pairs_keep_sound_and_features_together(extracted, kind):
    pairs = data.Pairs(extracted, FPS, 128, **kind)
    joins, seams = set(), set()
    for index in range(24):
        item = pairs[index]
        assert item["features"].shape == (128, 512) and item["wav"].shape == (audio.WINDOW,)
        frame = item["features"][:, 0]
        assert torch.equal(frame, spoken(item))
        jumps = (frame.diff() != 1).nonzero().flatten().tolist()
        joins.add(len(jumps))
        seams.update(jumps)
    assert max(joins) == {0: 0, 1: 1, 2: 2}[len(kind)] and len(seams) >= 5 * len(kind)


@pytest.mark.parametrize("kind", [{}, {"merge": 1.0}, {"roll": 1.0}, {"merge": 1.0, "roll": 1.0}])
def test_what_can_be_told_stays_with_its_frames(extracted, kind):
    """Every tenth frame of every clip is a hit, as strong as its number says, of the clip's own
    material: cut, merged and rotated, the hits stay at the first mel column of their frames."""
    labels = {
        str(k): [
            {"time": f / FPS, "strength": (f % 7 + 1) / 8, "material": "abcd"[k]}
            for f in range(3, 160, 10)
        ]
        for k in range(4)
    }
    told = {"columns": 4, "materials": ("a", "b", "c", "d"), "labels": labels}
    pairs = data.Pairs(extracted, FPS, 128, **kind, **told)
    for index in range(12):
        item = pairs[index]
        frame = item["features"][:, 0].long()
        clip, number = frame // 200, frame % 200
        expected = torch.zeros(128, 4)
        struck = number % 10 == 3
        expected[struck, 0] = (number[struck] % 7 + 1) / 8
        assert torch.equal(item["hits"].view(128, 4), expected)
        assert torch.equal(item["materials"], clip)
        assert item["stranger"] == 0
    # another clip's features, and everything else the item's own
    strange = data.Pairs(extracted, FPS, 128, **kind, **told, strangers=1.0)
    for index in range(4):
        assert strange[index]["stranger"] == 1
        assert torch.equal(strange[index]["hits"], pairs[index]["hits"])
        assert torch.equal(strange[index]["wav"], pairs[index]["wav"])
    others = [not torch.equal(strange[k]["features"], pairs[k]["features"]) for k in range(12)]
    assert sum(others) > 6


def test_without_labels_hits_are_the_onsets_of_the_sound(tmp_path):
    wav = np.zeros(160 * 1024, np.int16)
    times = [1.0, 2.0, 3.5, 5.0]
    rng = np.random.default_rng(0)
    for onset in times:
        start = round(onset * 16000)
        wav[start : start + 3000] = (
            8000 * rng.standard_normal(3000) * np.exp(-np.arange(3000) / 600)
        )
    with data.Writer(tmp_path / "set", FEATURES) as writer:
        writer.add("a.mp4", "", "train", {"features": np.ones((160, 512), "f2"), "sound": wav})
        writer.finish(needed=())
    pairs = data.Pairs(tmp_path / "set", FPS, 160, columns=4, materials=("a",))
    item = pairs[0]
    columns = item["hits"].nonzero().flatten() * 256 / 16000
    assert len(columns) == 4 and np.abs(columns.numpy() - times).max() < 0.05
    assert (item["hits"][item["hits"] != 0] == -1).all() and (item["materials"] == -1).all()


def test_pairs_are_a_function_of_seed_and_index(extracted):
    a, b = (data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=seed) for seed in (1, 1))
    other = data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=2)
    assert all(torch.equal(a[k]["wav"], b[k]["wav"]) for k in range(12))
    assert any(not torch.equal(a[k]["wav"], other[k]["wav"]) for k in range(12))
    assert not torch.equal(a[0]["wav"], a[4]["wav"])  # the same clip one epoch later


def test_both_halves_of_a_merged_pair_are_of_the_split(extracted):
    for split, clips in (("train", {0, 1, 3}), ("test", {2})):
        pairs = data.Pairs(extracted, FPS, 128, merge=1.0, split=split)
        assert {int(f) // 200 for k in range(30) for f in pairs[k]["features"][:, 0]} == clips


def test_a_pair_longer_than_its_clip_ends_in_silence(extracted):
    item = data.Pairs(extracted, FPS, 180, split="test")[0]
    assert (
        item["features"].shape == (180, 512)
        and (item["features"][160:] == item["features"][159]).all()
    )


def test_pairs_name_the_remedy(extracted, tmp_path):
    with pytest.raises(media.MediaError, match="not a prepared set"):
        data.Pairs(tmp_path, FPS, 128)
    with pytest.raises(media.MediaError, match="15.625"):
        data.Pairs(extracted, 4.0, 32)
    with pytest.raises(media.MediaError, match="not bounds"):
        data.Clips(extracted, FPS, 32)
    with pytest.raises(media.MediaError, match="network made up instead of another"):
        data.Writer(extracted, {**FEATURES, "network": "another"})


def test_sounds_start_on_mel_columns(tmp_path):
    ramp = (np.arange(3 * audio.HOP * 64 + 100) // audio.HOP).astype(
        "<i2"
    )  # each sample says its mel column
    with data.Writer(tmp_path / "set", FEATURES) as writer:
        writer.add("a", "", "train", {"features": np.empty((0, 512), np.float16), "sound": ramp})
        writer.finish()
    sounds = data.Sounds(tmp_path / "set", 64 * audio.HOP)
    starts = {int((sounds[k]["wav"][0] * 32767).round()) for k in range(1500)}
    assert starts == set(range(129))  # every one that fits
    for k in range(5):
        columns = (sounds[k]["wav"] * 32767).round().view(-1, audio.HOP)
        assert (columns == columns[:, :1]).all() and (columns[:, 0].diff() == 1).all()


# ---- extraction --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A small video tower with its weights in a file."""
    torch.manual_seed(0)
    config = cavp.CAVPConfig(
        fps=FPS,
        size=32,
        video_width=4,
        video_blocks=(1,) * 4,
        temporal=(True,) * 5,
        audio_widths=(4,) * 6,
        embed_dim=16,
    )
    path = tmp_path_factory.mktemp("cavp") / "last.safetensors"
    save_model(path, cavp.CAVP(config), dataclasses.asdict(config))
    return path


def extract(clips, tower, out):
    cavp.main(
        [
            "--data",
            str(clips),
            "--init",
            str(tower),
            "--extract",
            str(out),
            "--out",
            str(out.parent / "run"),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    )


def test_extracted_sets_hold_each_clips_features_and_sound(set_of_four, tower, tmp_path):
    extract(set_of_four, tower, tmp_path / "set")
    made, clips, model = (
        data.Set(tmp_path / "set"),
        data.Clips(set_of_four, FPS, 32),
        cavp.CAVP.load(tower),
    )
    assert splits(tmp_path / "set") == splits(set_of_four)
    for k in range(4):
        features = torch.from_numpy(made.column(k, "features").astype(np.float32))
        item = clips[k]
        assert made.describe(k)[0] == item["name"]
        assert (features - model.encode_clip(item["video"])).abs().max() < 1e-3
        assert torch.equal(
            torch.from_numpy(made.column(k, "sound").astype(np.float32)) / 32767, item["wav"]
        )
    pair = data.Pairs(tmp_path / "set", FPS, 20)[0]
    assert pair["features"].shape == (20, 16) and pair["wav"].shape == (audio.WINDOW,)


def test_extracted_sets_know_whose_the_clips_are(set_of_four, tower, tmp_path):
    clips = shutil.copytree(set_of_four, tmp_path / "clips")
    for license in ("CC0", "MIT"):  # at first, and after it was corrected
        known = {"a.mkv": Rights("me", license, "yes")}
        rights.write_table(clips / rights.TABLE, known)
        extract(clips, tower, tmp_path / "set")
        assert data.Set(tmp_path / "set").rights == known
    assert not list(data.check(tmp_path / "set"))


def test_processes_share_an_extraction_and_write_the_same_bytes(set_of_four, tower, tmp_path):
    """Three processes for four clips; then two for the one that a set still lacks."""
    extract(set_of_four, tower, tmp_path / "one")
    counted = tmp_path / "counted.py"
    counted.write_text(
        f"""
import os
import sys

sys.path.insert(0, {str(ROOT)!r})
import cavp
from common import distributed

encode = cavp.CAVP.encode_clip


def counted(*args, **options):
    os.write(1, b"encoded by %d, " % distributed.rank())
    return encode(*args, **options)


cavp.CAVP.encode_clip = counted
cavp.main(sys.argv[1:])
"""
    )

    def together(count, out):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(count),
                counted,
                "--data",
                set_of_four,
                "--init",
                tower,
                "--extract",
                out,
                "--device",
                "cpu",
                "--dtype",
                "float32",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return sorted(re.findall(r"encoded by (\d)", done.stdout))

    assert together(3, tmp_path / "three") == [
        "0",
        "0",
        "1",
        "2",
    ]  # 3: a batch that it does not divide is of no concern
    assert content(tmp_path / "three") == content(tmp_path / "one")
    rest = shutil.copytree(tmp_path / "one", tmp_path / "rest")
    # as an interrupted run leaves it: three clips in an unfinished shard
    shutil.rmtree(rest)
    whole = data.Set(tmp_path / "one")
    with data.Writer(rest, {k: whole.metadata[k] for k in ("columns", *FEATURES)}) as writer:
        for k in range(3):
            writer.add(*whole.describe(k), {c: whole.column(k, c) for c in ("features", "sound")})
    assert together(2, rest) == ["0"] and content(rest) == content(tmp_path / "one")


def test_an_interrupted_extraction_goes_on_to_the_same_bytes(
    set_of_four, tower, tmp_path, monkeypatch
):
    extract(set_of_four, tower, tmp_path / "whole")
    encode, calls = cavp.CAVP.encode_clip, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args, **options)

    monkeypatch.setattr(cavp.CAVP, "encode_clip", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        extract(set_of_four, tower, tmp_path / "set")
    extract(set_of_four, tower, tmp_path / "set")
    assert len(calls) == 5  # two, the interrupted one, and the two that were missing
    assert content(tmp_path / "set") == content(tmp_path / "whole")
