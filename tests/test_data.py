"""data.py: mel and its inverse against goldens and by ear's measures; prepared sets, how they are made, broken, read."""

import atexit
import dataclasses
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
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import PATIENCE
from clips import clicks, make, one_line, onsets, seen, steady
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import cavp
import data
from common import audio, ffmpeg, media
from common.checkpoints import save_model

GOLDEN = Path(__file__).parent / "golden" / "audio.safetensors"
ROOT = Path(__file__).parent.parent


# ---- mel and vocoder -----------------------------------------------------------------------------------------------


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


def textbook_griffin_lim(magnitude, iterations, seed):
    """The algorithm as it is written, one whole transform after the other."""
    window = torch.hann_window(1024, dtype=magnitude.dtype)
    samples = magnitude.shape[-1] * 256
    turn = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(seed)) * (
        2 * torch.pi
    )
    spectrum = magnitude * torch.polar(torch.ones_like(turn), turn)
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
def test_griffin_lim_in_chunks_is_the_textbook_one(columns):
    """In float64; what float32 adds grows with the iterations."""
    magnitude = torch.rand(2, 513, columns, generator=torch.Generator().manual_seed(2))
    magnitude[1, :, 1] = 0
    exact = textbook_griffin_lim(magnitude.double(), 32, seed=4)
    assert relative(audio.griffin_lim(magnitude.double(), 32, seed=4), exact) < 1e-9
    assert (
        relative(
            audio.griffin_lim(magnitude, 4, seed=4),
            textbook_griffin_lim(magnitude.double(), 4, seed=4),
        )
        < 1e-5
    )
    ours, theirs = (
        audio.stft(f(magnitude, 32, seed=4)).abs()
        for f in (audio.griffin_lim, textbook_griffin_lim)
    )
    convergence = [(spectrum - magnitude).norm() / magnitude.norm() for spectrum in (ours, theirs)]
    assert abs(convergence[0] - convergence[1]) < 1e-4


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


# ---- prepared sets -------------------------------------------------------------------------------------------------

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


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def names(root):
    opened = data.Set(root)
    return [opened.text(clip, "name") for clip in range(len(opened.index))]


def splits(root):
    opened = data.Set(root)
    return {name: data.SPLITS[k] for name, k in zip(names(root), opened.index["split"])}


def test_the_command_names_what_it_leaves_out_and_workers_change_no_byte(
    raw, set_of_four, tmp_path
):
    done = subprocess.run(
        [
            sys.executable,
            "data.py",
            "prepare",
            str(raw),
            str(tmp_path / "3"),
            "--size",
            "32",
            "--workers",
            "3",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "4 clips, 4 of them new" in done.stdout
    summary = done.stderr.splitlines()[-1]
    assert (
        "left out 4 files (1 no sound track, 1 silent, 1 too short, 1 undecodable)" in summary
        and "left_out.csv" in summary
    )
    assert content(tmp_path / "3") == content(set_of_four)
    assert sorted(content(set_of_four)) == [
        ".lock",
        "index.bin",
        "left_out.csv",
        "names.bin",
        "set.json",
        "shard-00000.bin",
    ]
    assert names(set_of_four) == ["a.mkv", "c.mp4", "short.mp4", "sub/b.mp4"]
    assert data.Set(set_of_four).left_out() == REASONS


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


def test_any_stretch_of_a_column_is_what_was_written(tmp_path, monkeypatch):
    """Across the edges of the blocks that are checked, of clips and of shards."""
    monkeypatch.setattr(data, "SHARD", 200_000)
    rng, written = np.random.default_rng(0), []
    with data.Writer(tmp_path / "set", {"columns": ["a", "sound"], "fps": 1.0}) as writer:
        for k, size in enumerate((0, 3, 40_000, data.BLOCK // 2, data.BLOCK, 60_000)):
            written.append(
                (rng.integers(0, 255, size, np.uint8), rng.integers(-9, 9, 2 * size).astype("<i2"))
            )
            writer.add(
                str(k),
                "",
                "train",
                dict(zip(("a", "sound"), (column.tobytes() for column in written[-1]))),
            )
        writer.finish()
    made = data.Set(tmp_path / "set")
    assert len(set(made.index["shard"].tolist())) == 2
    for clip, columns in enumerate(written):
        for name, column in zip(("a", "sound"), columns):
            assert np.array_equal(made.column(clip, name, column.dtype), column)
            for start, count in rng.integers(0, len(column) + 9, (20, 2)):
                assert np.array_equal(
                    made.column(clip, name, column.dtype, start, count),
                    column[start : start + count],
                )


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
    here = [
        clips[i]["video"] for i in range(len(clips))
    ]  # opens the shard and a decoder here, before the workers start
    for context, workers in (("fork", 2), ("spawn", 1))[sys.platform == "win32" :]:
        clips[0]  # leaves the files where no worker's last item does
        at = {name: file.tell() for name, file in clips.set.files.items()}
        loader = torch.utils.data.DataLoader(
            clips, batch_size=1, num_workers=workers, multiprocessing_context=context
        )
        assert all(torch.equal(a["video"][0], b) for a, b in zip(loader, here, strict=True))
        assert at == {
            name: file.tell() for name, file in clips.set.files.items()
        }  # each process has files of its own


# ---- killed, full, extended, damaged -------------------------------------------------------------------------------


def small_shards(raw, out, answer, most, held):
    """Three clips to a shard, every clip its own commit, no file larger than `most` bytes; answers with the error's line.
    One that is `held` never finishes: it waits to be killed."""
    if most:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    tqdm.set_lock(
        threading.RLock()
    )  # the one of all forks stays locked if one is killed while it draws its bar
    data.SHARD, data.COMMIT = 250_000, 0.0
    if held:
        data.Writer.finish = lambda *_, **__: time.sleep(PATIENCE)
    try:
        data.prepare(raw, out, FPS, 32, 2)
        answer.send("")
    except media.MediaError as error:
        answer.send(str(error))


def preparing(raw, out, most=None, held=False):
    """-> a process that prepares, and where its answer comes from. Forked, so that it has nothing to import."""
    context = multiprocessing.get_context("fork")
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
        assert len(list((folder / "set").glob("shard-*.bin"))) == 3
    return folder


@forks
def test_after_sigkill_the_same_command_ends_in_the_same_bytes(nine, tmp_path):
    """Killed after one, four and seven clips, with rubbish behind what was committed, as a kill between two writes leaves it."""
    out = tmp_path / "set"
    record = data.entry(["bounds", "frames", "sound"]).itemsize
    for clips in (1, 4, 7):
        process, _ = preparing(nine / "raw", out, held=True)
        deadline = time.monotonic() + PATIENCE
        while (
            not (out / "index.bin").exists() or (out / "index.bin").stat().st_size < clips * record
        ):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        with pytest.raises(media.MediaError, match="unfinished"):
            data.Set(out)
        there = (out / "index.bin").stat().st_size // record
        assert clips <= there <= 9
        for name in ("index.bin", "names.bin", max(p.name for p in out.glob("shard-*.bin"))):
            with open(out / name, "ab") as file:
                file.write(b"rubbish")
    assert answered(*preparing(nine / "raw", out)) == ""
    assert content(out) == content(nine / "set")
    assert names(out) == [f"{k}.mp4" for k in range(9)]


@forks
def test_a_full_disk_stops_with_one_line_and_goes_on(nine, tmp_path):
    """A limit on file size stands for the full disk: the same error arrives by the same way, from a write."""
    out = tmp_path / "set"
    error = answered(*preparing(nine / "raw", out, 150_000))
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
    for k in (0, 1, 7):  # one of them has been repaired
        (videos / f"{k}.mp4").write_bytes((nine / "raw" / f"{k}.mp4").read_bytes())
    more = data.prepare(videos, out, FPS, 32)
    assert (more.clips, more.new, more.left_out) == (7, 3, [])
    assert names(out) == ["2.mp4", "4.mp4", "6.mp4", "8.mp4", "0.mp4", "1.mp4", "7.mp4"]
    assert all(splits(out)[name] == split for name, split in was.items())
    for name in ("index.bin", "names.bin", "shard-00000.bin"):
        assert content(out)[name].startswith(before[name])
    assert len(old.index) == 4 and old.text(3, "name") == "8.mp4"  # whoever has it open goes on


@forks
def test_two_processes_do_not_prepare_one_set(nine, tmp_path):
    about = {"columns": ["bounds", "frames", "sound"], "fps": FPS, "size": 32, "labels": False}
    with data.Writer(tmp_path / "set", about):
        assert "another process" in answered(*preparing(nine / "raw", tmp_path / "set"))


class Deadly:
    """A path that ends the process which unpickles it, as a crash in a decoder would."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_file_that_kills_its_process_is_left_out(nine, tmp_path, monkeypatch):
    jobs, *rest = data.find_jobs(nine / "raw")
    jobs = [job._replace(path=Deadly()) if job.name in ("5.mp4", "6.mp4") else job for job in jobs]
    monkeypatch.setattr(data, "find_jobs", lambda *_: (jobs, *rest))
    report = data.prepare(nine / "raw", tmp_path / "set", FPS, 32, 3)
    assert names(tmp_path / "set") == [f"{k}.mp4" for k in (0, 1, 2, 3, 4, 7, 8)]
    assert [name for name, _, found in report.left_out if "died" in found] == ["5.mp4", "6.mp4"]


def test_what_is_damaged_or_gone_says_so_in_one_line(set_of_four, tmp_path):
    root = tmp_path / "set"

    def fresh():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(set_of_four, root)
        return root / "shard-00000.bin"

    def damage(clips):
        """The message of each way to read the clips."""
        for read in (
            clips.__getitem__,
            lambda k: next(iter(torch.utils.data.DataLoader(clips, num_workers=1))),
        ):
            with pytest.raises(media.MediaError) as caught:
                read(0)
            yield caught

    for spoil, words in (
        (lambda shard: shard.unlink(), "cannot be read"),
        (lambda shard: os.truncate(shard, 2000), "cut off"),
        (lambda shard: shard.write_bytes(b"\7" * shard.stat().st_size), "damaged"),
    ):
        shard = fresh()
        clips = data.Clips(root, FPS, 32, frames=8, random_start=False)
        spoil(shard)
        for caught in damage(clips):
            one_line(caught, str(shard), words)
    whole = data.Set(set_of_four)
    for column, dtype in (
        ("bounds", "<u4"),
        ("frames", np.uint8),
        ("sound", "<i2"),
    ):  # a single bit, anywhere
        first, size = map(int, whole.index[3][column])
        for at in (0, size // 2, size - 1):
            bits = bytearray(fresh().read_bytes())
            bits[first + at] ^= 4
            shard.write_bytes(bits)
            with pytest.raises(media.MediaError) as caught:
                data.Set(root).column(3, column, dtype)
            one_line(caught, str(shard), "sub/b.mp4 is damaged")
            data.Clips(root, FPS, 32)[0]  # the others are as they were
    bits = bytearray(fresh().read_bytes())
    bits[int(whole.index[0]["frames"].sum()) // 2] ^= 4
    shard.write_bytes(bits)
    for caught in damage(data.Clips(root, FPS, 32, frames=40, random_start=False)):
        one_line(caught, str(shard), "a.mkv is damaged")
    os.truncate(fresh(), 2000)
    with pytest.raises(media.MediaError) as caught:
        data.Writer(root, {"columns": ["bounds", "frames", "sound"]})
    one_line(caught, str(root), "damaged, 0 of its first 4 clips")
    fresh()
    os.truncate(root / "index.bin", 100)
    with pytest.raises(media.MediaError) as caught:
        data.Set(root)
    one_line(caught, "index.bin", "cut off")


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


# ---- splits and labels ---------------------------------------------------------------------------------------------


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
        assert [clips.about(k)[2] for k in range(len(clips))] == [split] * len(clips)
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
        '-full_id,3,"playing drums, loud",test\n-full_id,12,"playing drums, loud",train\ncut0,30,people sniggering,train\n'
        "gone,5,wind noise,test\n\n"
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
    one_line(caught, "--csv", "line 1")


# ---- a set of any size ---------------------------------------------------------------------------------------------


def of_many(source, folder, clips):
    """A set whose index says that it has so many clips: those of `source`, again and again."""
    shutil.copytree(source, folder)
    index = np.fromfile(folder / "index.bin", data.entry(data.Set(source).about["columns"]))
    np.resize(index, clips).tofile(folder / "index.bin")
    about = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps({**about, "clips": clips}))
    return folder


def test_opening_and_drawing_cost_the_same_at_any_number_of_clips(
    set_of_four, tmp_path, monkeypatch
):
    stretch, costs = data.Set.stretch, []
    monkeypatch.setattr(
        data.Set, "stretch", lambda *args: costs[-1].append(args[3]) or stretch(*args)
    )
    objects = {}
    for count in (200, 200, 200_000):  # the first only warms up
        root = of_many(set_of_four, tmp_path / f"{count}-{len(costs)}", count)
        gc.collect()
        costs.append([])
        before = sys.getallocatedblocks()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clips = data.Clips(root, FPS, 32, frames=5, split="train", seed=3)
        objects[count] = (
            sys.getallocatedblocks() - before
        )  # Python's own objects, not the arrays' one block
        assert costs[-1] == []  # nothing but the map has been opened
        assert clips.clips.nbytes + clips.short.nbytes == 8 * (clips.set.index["split"] == 0).sum()
        assert len(clips) == count // 2
        assert clips[len(clips) - 1]["video"].shape == (5, 3, 32, 32)
    assert abs(objects[200] - objects[200_000]) < 200
    assert len(costs[1]) == len(costs[2]) and sum(costs[2]) < 120_000


# ---- windows for stage 2 and for the autoencoder --------------------------------------------------------------------

FEATURES = {"columns": ["features", "sound"], "fps": FPS, "width": 512, "network": "made up"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Four extracted clips whose features and sound both say which clip and which frame they belong to."""
    folder = tmp_path_factory.mktemp("features") / "set"
    with data.Writer(folder, FEATURES) as writer:
        for k in range(4):
            frame = np.arange(160) + 200 * k  # (f,)
            columns = {
                "features": frame[:, None].repeat(512, 1).astype("<f2"),
                "sound": frame.astype("<i2").repeat(1024),
            }
            writer.add(
                str(k),
                "",
                "test" if k == 2 else "train",
                {name: column.tobytes() for name, column in columns.items()},
            )
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
        writer.add("a", "", "train", {"features": b"", "sound": ramp.tobytes()})
        writer.finish()
    sounds = data.Sounds(tmp_path / "set", 64 * audio.HOP)
    starts = {int((sounds[k]["wav"][0] * 32767).round()) for k in range(1500)}
    assert starts == set(range(129))  # every one that fits
    for k in range(5):
        columns = (sounds[k]["wav"] * 32767).round().view(-1, audio.HOP)
        assert (columns == columns[:, :1]).all() and (columns[:, 0].diff() == 1).all()


# ---- extraction ----------------------------------------------------------------------------------------------------


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
        features = torch.from_numpy(made.column(k, "features", "<f2").astype(np.float32)).view(
            -1, 16
        )
        item = clips[k]
        assert made.text(k, "name") == item["name"]
        assert (features - model.encode_clip(item["video"])).abs().max() < 1e-3
        assert torch.equal(
            torch.from_numpy(made.column(k, "sound", "<i2").astype(np.float32)) / 32767, item["wav"]
        )
    pair = data.Pairs(tmp_path / "set", FPS, 20)[0]
    assert pair["features"].shape == (20, 16) and pair["wav"].shape == (audio.WINDOW,)


def test_processes_share_an_extraction_and_write_the_same_bytes(set_of_four, tower, tmp_path):
    """Three processes for four clips; then two for the one that a set still lacks."""
    extract(set_of_four, tower, tmp_path / "one")
    counted = tmp_path / "counted.py"
    counted.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(cavp.__file__).parent)!r})\nimport cavp, training\nencode = cavp.CAVP.encode_clip\n"
        "def told(*args, **options):\n    os.write(1, b'encoded by %d, ' % distributed.rank())\n    return encode(*args, **options)\n"
        "cavp.CAVP.encode_clip = told\ncavp.main(sys.argv[1:])\n"
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
    (rest / "set.json").write_text(
        json.dumps(json.loads((rest / "set.json").read_text()) | {"clips": None}, indent=1) + "\n"
    )
    with open(rest / "index.bin", "r+b") as index:
        index.truncate((rest / "index.bin").stat().st_size * 3 // 4)
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
