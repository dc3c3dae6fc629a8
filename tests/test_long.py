"""Long films: windows that agree, a spectrogram decoded where it is read, going on after a kill."""

import gc
import itertools
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from bounds import PATIENCE
from clips import make_video
from main_job import run

import sample
from common import audio, controls, ffmpeg, mux, profiling, watermark
from common.audio import HOP, SAMPLE_RATE
from common.files import UserError
from common.profiling import Profile
from film import encoding, kept, progress, windows
from film.provenance import WeightSums
from sample import Settings

ROOT = Path(sample.__file__).parent
FPS = 15.625
MADE = ["film.foley.mp4", "film.foley.wav", "manifest.jsonl"]
HOP_Z = windows.LATENT_HOP


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Of six windows."""
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", 42, 5, (3, 9, 22), size=16)


def clip_of(starts, latents=()):
    return SimpleNamespace(
        starts=starts, needs=windows.plan_needs(starts), known={}, latents=dict(latents)
    )


def random_latents(starts):
    return {(0, start): torch.randn(4, 16, 64) for start in starts}


# ---- windows that agree --------------------------------------------------------------------------


def test_every_other_window_waits_for_its_neighbors():
    starts = [k * 40 * HOP_Z for k in range(5)]
    needs = windows.plan_needs(starts)
    assert list(needs) == [starts[k] for k in (0, 2, 4, 1, 3)]
    assert [needs[starts[k]] for k in range(5)] == [
        (),
        (starts[0], starts[2]),
        (),
        (starts[2], starts[4]),
        (),
    ]
    # of an even number the last one has no neighbor behind it
    assert windows.plan_needs(starts[:4])[starts[3]] == (starts[2],)
    assert windows.plan_needs([0]) == {0: ()}
    # on no latent columns nobody can know anything
    assert set(windows.plan_needs([0, HOP, 2 * HOP]).values()) == {()}


@pytest.mark.parametrize("seconds", [8.4, 15.6, 22, 30.1, 61])
def test_neighbors_know_the_near_half_of_each_overlap_and_all_agree(seconds):
    starts = sample.plan_windows(round(seconds * SAMPLE_RATE), FPS)
    clip = clip_of(starts, random_latents(starts))
    columns = [start // HOP_Z for start in starts]
    for k, start in enumerate(starts):
        z, is_known = windows.known_latents(clip, 0, start)
        expected = torch.zeros(64, dtype=torch.bool)
        if k % 2:
            expected[: (columns[k - 1] + 64 - columns[k]) // 2] = True
            if k + 1 < len(starts):
                expected[64 - (columns[k] + 64 - columns[k + 1]) // 2 :] = True
        assert torch.equal(is_known, expected)
        # what a neighbor has at the same place
        for j in (k - 1, k + 1):
            if k % 2 and j < len(starts):
                own, theirs = windows.shared_columns(start, starts[j])
                same = (z[..., own] == clip.latents[0, starts[j]][..., theirs]).all(0).all(0)
                assert same.sum() >= (own.stop - own.start) // 2
                clip.latents[0, start] = torch.where(is_known, z, clip.latents[0, start])
    latents = windows.agreed(clip, 0)
    for (a, before), (b, after) in itertools.pairwise(zip(columns, latents, strict=True)):
        assert torch.equal(before[..., b - a :], after[..., : 64 - (b - a)])
    # what was drawn without neighbors is left in the middle, and nothing is changed in place
    for k in range(0, len(starts), 2):
        low = columns[k - 1] + 64 - columns[k] if k else 0
        high = columns[k + 1] - columns[k] if k + 1 < len(starts) else 64
        own = clip.latents[0, starts[k]]
        assert torch.equal(latents[k][..., low:high], own[..., low:high])


def test_what_is_told_to_be_known_comes_before_neighbors():
    starts = [0, 40 * HOP_Z]
    clip = clip_of(starts, {(0, 0): torch.ones(4, 16, 64)})
    mask = torch.zeros(64, dtype=torch.bool)
    mask[4:20] = True
    clip.known[0, starts[1]] = (torch.full((4, 16, 64), 7.0), mask)
    z, is_known = windows.known_latents(clip, 0, starts[1])
    assert is_known[:20].all() and not is_known[20:].any()
    assert (z[..., :4] == 1).all() and (z[..., 4:20] == 7).all()


def test_windows_are_drawn_with_their_neighbors_latents_at_any_batch(models, film):
    """Neighbors' latents stay as they are; batches of one and of all give the same latents."""
    drawn = []
    latents = []
    denoise = sample.denoise

    def watched(batch, *args):
        drawn.append([(candidate, start) for _, candidate, start in batch])
        denoise(batch, *args)
        for clip, candidate, start in batch:
            z, is_known = windows.known_latents(clip, candidate, start)
            assert torch.equal(clip.latents[candidate, start][..., is_known], z[..., is_known])
        latents[-1].update(clip.latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "denoise", watched)
        for batch in (1, 12):
            latents.append({})
            settings = Settings(steps=2, batch=batch, candidates=2)
            sample.generate(film, models, settings=settings, duration=23)
    # windows of one batch never know each other
    assert [len(batch) for batch in drawn] == [1] * 8 + [4, 4]
    one, all_at_once = latents
    assert one.keys() == all_at_once.keys() and len(one) == 8
    for window, z in one.items():
        assert (z - all_at_once[window]).norm() < 1e-3 * z.norm()


# ---- one spectrogram -----------------------------------------------------------------------------


def test_a_spectrogram_is_the_same_in_parts_and_holds_few_windows():
    starts = sample.plan_windows(180 * SAMPLE_RATE, FPS)
    latents = [torch.rand(4, 16, 64) for _ in starts]
    calls = []

    def decode(z):
        calls.append(len(z))
        return z.flatten(1, 2)[:, None].expand(-1, 2, -1, -1).flatten(1, 2).repeat(1, 1, 8)

    def spectrogram(batch):
        return windows.Spectrogram(latents, starts, 11250, decode, batch)

    whole = spectrogram(1)[:, :]
    assert whole.shape == (128, 11250) and calls == [1] * len(starts)
    calls.clear()
    parts = spectrogram(4)
    pieces = [parts[:, a : a + 700] for a in range(0, 11250, 700)]
    assert torch.equal(torch.cat(pieces, 1), whole)
    # each window once, some at a time, and few are held
    assert sum(calls) == len(starts) and max(calls) > 1 and len(parts.mels) <= windows.KEPT
    assert torch.equal(parts[3:5, 100:90], whole[3:5, :0])


def test_a_diverged_window_is_an_error_that_names_the_clip():
    bad = windows.Spectrogram([torch.zeros(4, 16, 64)], [0], 9, lambda z: z * np.nan, name="a.mp4")
    with pytest.raises(UserError, match="a.mp4: the sampler diverged"):
        bad[:, 0:9]


def test_onsets_and_sound_of_a_spectrogram_are_those_of_its_tensor(monkeypatch):
    monkeypatch.setattr(audio, "SPAN", 256)
    # hits over noise, one of them where spans meet
    mel = 0.3 * torch.rand(128, 1000, generator=torch.Generator().manual_seed(0))
    for k in (40, 130, 256, 300, 511, 640, 900):
        mel[:, k : k + 6] += 0.6

    class Sliced:
        shape = mel.shape

        def __getitem__(self, key):
            return mel[key]

    spans = audio.detect_onsets(Sliced())
    monkeypatch.setattr(audio, "SPAN", 4096)
    assert len(spans) == 8 and np.array_equal(spans, audio.detect_onsets(mel.numpy()))
    short = mel[:, :50]
    assert torch.equal(audio.vocode_long(short, 12_000), audio.limit(audio.vocode(short)[:12_000]))


# ---- memory --------------------------------------------------------------------------------------


def pictures():
    """How many there are in memory."""
    return sum(type(found) is av.VideoFrame for found in gc.get_objects())


def test_pictures_that_were_read_are_freed_without_the_collector(film):
    """They waited for it, 233 and more at a time: 634 MiB of 1920 x 1080."""
    gc.collect()
    before = pictures()  # of other tests, which something may hold
    gc.disable()
    try:
        assert len(ffmpeg.read_frames(film, 5, 16)) == 210
        assert mux.first_frame(film, 20) is not None
        waiting = pictures()
    finally:
        gc.enable()
    assert waiting <= before


def growth(function, short, long):
    """Bytes by which Python's peak is higher for the longer of two inputs."""
    peaks = []
    for given in (short, short, long):  # once more first: what is imported and cached then is there
        tracemalloc.start()
        try:
            function(given)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return peaks[2] - peaks[1]


def test_a_probe_keeps_no_list_of_packets(tmp_path):
    def probed(path):
        return ffmpeg._probe.__wrapped__(path, None)

    short = make_video(tmp_path / "short.mp4", 5, 100, size=16)
    long = make_video(tmp_path / "long.mp4", 50, 100, size=16)
    assert growth(probed, short, long) < 50_000
    assert probed(long).frames == 5000 and probed(long).duration == 50


def test_the_encoded_sound_of_a_film_is_not_held(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 90 * SAMPLE_RATE).astype(np.float32)

    def peak(seconds):
        noise[: seconds * SAMPLE_RATE].tofile(tmp_path / "sound")
        return encoding.encoded_peak(tmp_path / "sound", tmp_path / "out", ".mp4", SAMPLE_RATE, 1)

    assert growth(peak, 10, 90) < 200_000
    assert (tmp_path / "out").stat().st_size > 800_000


def test_a_head_says_the_same_in_spans(monkeypatch):
    head = controls.Head(16, 4).eval()
    features = torch.randn(300, 16)
    with torch.no_grad():
        whole = head(features[None])[0].numpy()
    monkeypatch.setattr(controls, "HEAD_SPAN", 64)
    spans = controls.read_head(head, features)
    assert spans.shape == whole.shape and np.allclose(spans, whole, atol=1e-5)


def test_marking_and_limiting_in_place_are_the_same():
    wav = 0.9 * torch.randn(2 * watermark.SPAN + 999).clamp(-1, 1)
    apart = sample.add_watermark(wav)
    before = wav.clone()
    assert torch.equal(sample.add_watermark(wav, out=wav), apart) and not torch.equal(wav, before)
    assert wav.abs().max() <= 1


def test_sound_of_a_file_is_read_by_seconds(tmp_path):
    wav = np.random.default_rng(0).uniform(-2, 2, (2500, 2)).astype(np.float32)
    wav.tofile(tmp_path / "sound")
    # of a file as of an array; longer than the sound, and shorter
    for samples in (3000, 2100):
        of_file = list(mux.sound_seconds(tmp_path / "sound", 1000, 2, samples))
        of_array = list(mux.sound_seconds(wav, 1000, 2, samples))
        assert [len(block) for block in of_file] == [1000, 1000, samples - 2000]
        whole = np.concatenate(of_file)
        assert np.array_equal(whole, np.concatenate(of_array))
        assert np.array_equal(whole[:2500], wav[:samples].clip(-1, 1)) and not whole[2500:].any()


def test_a_stage_inside_another_counts_for_itself(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    profile = Profile()
    with profile("outer"), profile("inner"):
        pass
    # the clock reads 0, 1, 2, 3: two of the outer's three seconds are its own
    assert profile.rows["inner"]["seconds"] == 1 and profile.rows["outer"]["seconds"] == 2


# ---- progress ------------------------------------------------------------------------------------


def test_progress_counts_windows(capsys):
    with progress.show_progress(25, disable=False, mininterval=0, ncols=80) as on_step:
        on_step(30, 100)
        on_step(60, 100)
    err = capsys.readouterr().err
    assert "reading" in err and "windows 2/4 |" in err and "s/window, " in err and "to go" in err


# ---- going on ------------------------------------------------------------------------------------

# sample.py as a script that kills itself, as kill -9 does, after so many batches of windows
KILLED = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import diffusion
left = int(sys.argv.pop(1))
drawn = diffusion.SAMPLERS["dpm"]
def counted(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return drawn(*args)
diffusion.SAMPLERS["dpm"] = counted
runpy.run_path({str(ROOT / "sample.py")!r}, run_name="__main__")
"""


def test_a_killed_run_goes_on_to_the_same_bytes(capsys, film, weights, tmp_path):
    def flags(out):
        return (film, "--out", out, "--weights", weights, "--steps", 2, "--device", "cpu")

    status, _, err = run(capsys, *flags(tmp_path / "whole"))
    assert status == 0 and err == []
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, "4", *map(str, flags(out))]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert killed.returncode == -9, killed.stderr
    assert [p.name for p in out.iterdir()] == [".film.foley.windows"]

    # other settings would not go on from these windows; nothing here draws with them
    steps = []
    many = sample.generate_many(
        [film],
        sample.load_models(weights, "cpu"),
        settings=Settings(steps=2),
        on_step=lambda *numbers: steps.append(numbers),
        keep={film: kept.windows_file(out / "film.foley")},
    )
    with pytest.warns(UserWarning, match="goes on after 4 of 6 windows"):
        ((_, result),) = many
    assert steps == [(k, 4) for k in (1, 2, 3, 4)]

    # all windows are there now: cut one short, as a kill in mid-write does
    file = out / ".film.foley.windows"
    content = file.read_bytes()
    assert len(content) == len(content.split(b"\n", 1)[0]) + 1 + 6 * kept.SIZE
    file.write_bytes(content[:-1000])
    status, lines, err = run(capsys, *flags(out))
    assert status == 0 and len(lines) == 1
    assert err == [
        f"sample.py: {film}: goes on after 5 of 6 windows, which an earlier run has drawn"
    ]
    assert sorted(p.name for p in out.iterdir()) == MADE
    for name in ("film.foley.mp4", "film.foley.wav"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def long_clip(source, count=6):
    return SimpleNamespace(
        source=source,
        start=0.0,
        seconds=40.0,
        starts=[k * 40 * HOP_Z for k in range(count)],
        needs=windows.plan_needs([k * 40 * HOP_Z for k in range(count)]),
        hits=[],
        known={},
        latents={},
        scores={},
        keeper=None,
    )


def test_what_is_kept_is_read_again_only_if_nothing_changed(models, film, tmp_path, recwarn):
    file = tmp_path / "w"
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    named = sample.Models(
        models.cavp, models.ldm, models.align, "cpu", "tiny", WeightSums({"ldm": weights})
    )
    settings = Settings(steps=3)

    def opened(settings=settings, given=named, **changes):
        clip = long_clip(film)
        vars(clip).update(changes)
        kept.go_on(clip, file, given, settings)
        return clip

    first = opened()
    z = torch.randn(4, 16, 64)
    first.keeper.add(0, first.starts[2], torch.tensor(-0.7), z)
    first.keeper.add(0, first.starts[4], None, z * np.nan)  # diverged: not kept
    first.keeper.add(1, first.starts[0], None, 2 * z)
    assert not recwarn.list

    # the same, of one candidate and of two
    again = opened()
    assert list(again.latents) == [(0, first.starts[2])]
    assert torch.equal(again.latents[0, first.starts[2]], z)
    assert torch.equal(again.scores[0, first.starts[2]], torch.tensor(-0.7))
    assert len(opened(Settings(steps=3, candidates=2)).latents) == 2
    # nor does it matter what becomes of the sound
    assert opened(Settings(steps=3, lufs=-30, rate=48000, layout="stereo")).latents
    assert "goes on after 1 of 6 windows" in str(recwarn.list[0].message)
    recwarn.clear()

    # a bit that flipped: what is before it is good
    content = bytearray(file.read_bytes())
    content[-9000] ^= 1
    file.write_bytes(content)
    assert list(opened(Settings(steps=3, candidates=2)).latents) == [(0, first.starts[2])]
    assert "damaged; a part of it is drawn anew" in str(recwarn.list[0].message)
    assert len(file.read_bytes()) == len(content) - kept.SIZE

    # a run with other settings at the same time appends to the file that this one has begun
    opened(Settings(steps=4))
    opened()
    first.keeper.add(0, first.starts[2], None, z)
    other = long_clip(film)
    kept.go_on(other, tmp_path / "other", named, Settings(steps=4))
    other.keeper.path = file
    other.keeper.add(0, first.starts[3], None, z)
    assert list(opened().latents) == [(0, first.starts[2])]

    # short clips, models that are in no files, and clips of which something is known keep nothing
    assert opened(starts=first.starts[:4]).keeper is None
    assert opened(given=models).keeper is None and opened(known={(0, 0): ()}).keeper is None
    assert opened().latents

    # whatever the windows depend on
    changes = (
        {"settings": Settings(steps=4)},
        {"settings": Settings(steps=3, seed=1)},
        {"settings": Settings(steps=3, material=("wood",))},
        {"start": 1.0},
        {"hits": [sample.Hit(1.0)]},
    )
    for change in changes:
        other = opened()
        other.keeper.add(0, first.starts[0], None, z)
        with pytest.warns(UserWarning, match="all 6 windows are drawn anew"):
            assert not opened(**change).latents
        opened()
    opened().keeper.add(0, first.starts[0], None, z)
    weights.write_bytes(b"22")
    assert not opened().latents
    file.write_bytes(b"\x80\x04]nothing of ours")
    assert not opened().latents and opened().keeper


def test_a_full_disk_ends_the_keeping_and_not_the_film(models, film, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    named = sample.Models(
        models.cavp, models.ldm, models.align, "cpu", "tiny", WeightSums({"ldm": weights})
    )
    clip = long_clip(film)
    with pytest.warns(UserWarning, match="cannot be kept in .*nowhere"):
        kept.go_on(clip, tmp_path / "nowhere" / "w", named, Settings())
    assert clip.keeper is None
    kept.go_on(clip, tmp_path / "w", named, Settings())
    clip.keeper.path = tmp_path / "nowhere" / "w"
    with pytest.warns(UserWarning, match="a run that is stopped begins anew"):
        clip.keeper.add(0, 0, None, torch.zeros(4, 16, 64))
    clip.keeper.add(0, 0, None, torch.zeros(4, 16, 64))  # said once
    kept.forget(tmp_path / "w")
    kept.forget(tmp_path / "w")
