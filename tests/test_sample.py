"""The main job: windows that cover and never slip, seeds, lengths, files, bad input. Networks are
tiny and random, but of the real classes."""

import ast
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import tiny
import torch
from bounds import PATIENCE
from clips import make_video
from main_job import run

import sample
from align import AlignmentConfig
from common import audio, media, watermark
from common.audio import HOP, SAMPLE_RATE, WINDOW
from common.checkpoints import CheckpointError, save_model
from common.files import UserError
from common.machine import find_device
from common.media import MediaError
from common.profiling import Profile
from compat import hub
from diffusion import log_alpha, sigma
from film import outputs, windows
from ldm import LDM, LDMConfig
from sample import Settings

ROOT = Path(sample.__file__).parent
FPS = 15.625


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Two seconds with sound of their own, a 1 kHz tone."""
    tone = 0.25 * np.sin(2 * np.pi * 1000 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    return make_video(
        tmp_path_factory.mktemp("clip") / "clip.mp4", 2, flashes=(0.4, 1.2), sound=tone
    )


# ------------------------------------------------------------------------------------------------
# windows


@pytest.mark.parametrize("fps", [15.625, 4.0, 12.5, 24.0, 25.0, 30.0])
def test_windows_cover_overlap_and_never_slip(fps):
    frame = Fraction(SAMPLE_RATE) / Fraction(fps)
    lengths = [1, 4800, WINDOW - 1, WINDOW, WINDOW + 1, 20 * SAMPLE_RATE, 600 * SAMPLE_RATE]
    lengths += torch.randint(
        1, 600 * SAMPLE_RATE, (60,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    for samples in lengths:
        starts = sample.plan_windows(samples, fps)
        assert starts[0] == 0 and starts[-1] + WINDOW >= samples
        assert all(
            s % HOP == 0 and (s / frame).denominator == 1 for s in starts
        )  # whole columns, whole features
        assert all(b - a <= WINDOW - SAMPLE_RATE and b > a for a, b in itertools.pairwise(starts))
        assert (
            len(starts) == 1 or starts[-1] < samples - WINDOW + WINDOW // 4
        )  # no window mostly past the end
        if fps == 15.625:
            assert all(s % sample.LATENT_HOP == 0 for s in starts)


def test_frame_rates_that_no_window_fits_are_said():
    with pytest.raises(CheckpointError, match="29.97 frames a second"):
        sample.plan_windows(20 * SAMPLE_RATE, 29.97)


def test_short_clips_take_one_window():
    assert sample.plan_windows(WINDOW, 15.625) == sample.plan_windows(4800, 4.0) == [0]


def test_weights_sum_to_one_inside_their_windows():
    for seconds in (3, 8.5, 9.7, 16.3, 20, 61.7, 300, 3600):
        starts = sample.plan_windows(round(seconds * SAMPLE_RATE), 15.625)
        weights = windows.fade_weights(starts)
        assert weights.shape == (
            len(starts),
            512,
        )  # of an hour no more than of its windows: 1 MB, not 450
        total = torch.zeros(starts[-1] // HOP + 512)
        for row, start in zip(weights, starts, strict=True):
            total[start // HOP :][:512] += row
            assert row.max() == 1
        assert weights.min() >= 0 and torch.allclose(total, torch.ones_like(total))


def test_join_keeps_what_windows_agree_on_and_sums_amplitudes():
    starts = sample.plan_windows(20 * SAMPLE_RATE, 15.625)
    whole = torch.rand(128, starts[-1] // HOP + 512, generator=torch.Generator().manual_seed(0))
    mels = torch.stack([whole[:, s // HOP :][:, :512] for s in starts])

    def join():
        return windows.Spectrogram(mels, starts, whole.shape[1], lambda z: z)[:, :]

    assert torch.allclose(join(), whole, atol=1e-5)
    mels[0] = 0.0  # half-way through the fade the other one's half is left
    middle = (starts[1] + WINDOW) // 2 // HOP
    joined = join()
    there = slice(middle - 1, middle + 1)
    loss = 20 * 5 * (whole - joined)[:, there][whole[:, there] > 0.5]  # dB, well above the floor
    assert loss.min() > 5 and loss.max() < 7


def test_noise_is_shared_where_windows_overlap_and_between_lengths():
    field = sample.noise_field(3, 0, 500)
    assert torch.equal(field[..., :96], sample.noise_field(3, 0, 96))
    for seed, candidate in ((3, 1), (4, 0)):
        assert abs((field * sample.noise_field(seed, candidate, 500)).mean()) < 0.03  # independent
    assert abs(field.std() - 1) < 0.02 and abs(field.mean()) < 0.02


# ------------------------------------------------------------------------------------------------
# time: a model that sounds a click in the very columns whose frame is white


class Seer:
    """Stands for CAVP and LDM alike: one feature a frame, its brightness; a latent of two frames a
    column; a mel with four columns a frame."""

    config = SimpleNamespace(fps=FPS, size=8, frames=128, columns=0, feature_dim=512)
    context = 0

    def encode_clip(self, frames):
        return (frames.float().mean((1, 2, 3)) / 255)[:, None].expand(-1, 16)

    def conditioner(self, v):
        return v

    def null_context(self, frames):
        return torch.zeros(1, frames, 16)

    def unet(self, x, t, context):
        clean = torch.zeros_like(x)
        clean[:, 0, 0], clean[:, 0, 1] = context[:, 0::2, 0], context[:, 1::2, 0]
        shape = (-1, 1, 1, 1)
        return ((x - log_alpha(t).exp().view(shape) * clean) / sigma(t).view(shape)).float()

    def without_materials(self, conditions):
        return None

    def decode(self, z):
        lit = torch.stack([z[:, 0, 0], z[:, 0, 1]], dim=-1).flatten(1) > 0.5  # (b, 128)
        first = torch.cat(
            [lit[:, :1], lit[:, 1:] & ~lit[:, :-1]], dim=1
        )  # a hit where white begins
        mel = torch.zeros(len(z), 128, 512)
        mel[:, :, 0::4] = 0.8 * first[:, None]
        return mel


def test_hits_stay_in_time_for_five_minutes(tmp_path):
    flashes = [1.0 + 2.56 * k for k in range(120)]  # to 305.6 s
    flashes = [round(f * FPS) / FPS for f in flashes]  # on frames of the model
    video = make_video(tmp_path / "long.mp4", 308.0, Fraction(125, 8), flashes, size=16)
    seer = Seer()
    starts = sample.plan_windows(308 * SAMPLE_RATE, FPS)
    features = sample.video_features(
        video, seer, round(starts[-1] * FPS / SAMPLE_RATE) + 128, 308.0
    )
    film = sample.Clip(video, 0.0, None, 308.0, Profile(), starts, features, features)
    settings = Settings(steps=10, cfg=1.0, cg=0.0, sampler="dpm", schedule="uniform")
    # first those that know none of their neighbors, then those between
    while not film.is_done(settings):
        batch = [w for w in film.windows(settings) if film.can_draw(*w[1:])][:8]
        sample.denoise(batch, sample.Models(seer, seer, None), settings)
    assert not film.scores
    latents = windows.agreed(film, 0)
    mel = windows.Spectrogram(latents, starts, starts[-1] // HOP + 512, seer.decode)
    heard = mel[:, :].amax(0) > 0.5
    times = heard.nonzero().flatten() * HOP / SAMPLE_RATE
    assert len(times) == len(flashes)
    assert (times - torch.tensor(flashes)).abs().max() < 0.016


def test_long_sound_is_vocoded_in_spans_without_slip_or_hole(monkeypatch):
    monkeypatch.setattr(audio, "SPAN", 256)
    generator = torch.Generator().manual_seed(0)
    wav = 0.02 * torch.randn(1000 * HOP, generator=generator)
    clicks = [int(k) for k in torch.arange(8000, 250_000, 11_000)]
    for k in clicks:
        wav[k : k + 64] += 0.5
    out = audio.vocode_long(audio.mel(wav), 1000 * HOP - 77)
    assert out.shape == (1000 * HOP - 77,)
    for k in clicks:
        near = out[max(0, k - 4000) : k + 4000].abs()
        assert abs(int(near.argmax()) - min(k, 4000)) < 256
    level = torch.stack(
        [w.square().mean().sqrt() for w in torch.cat([out, torch.zeros(77)]).split(2560)]
    )
    assert level.min() > 0.01  # no hole where spans meet


# ------------------------------------------------------------------------------------------------
# generate


@pytest.mark.parametrize("seconds", [0.32, 8.0, 20.0])
def test_sound_is_exactly_as_long_as_the_picture(models, tmp_path, seconds):
    video = make_video(tmp_path / "clip.mp4", seconds)
    result = sample.generate(video, models, settings=Settings(steps=2))
    assert len(result.wav) == round(seconds * SAMPLE_RATE)
    assert result.mel.shape == (128, math.ceil(seconds * SAMPLE_RATE / HOP))
    assert torch.isfinite(result.wav).all() and 0 < result.wav.abs().max() <= 1


def test_same_seed_same_sound_at_any_batch(models, tmp_path):
    video = make_video(tmp_path / "clip.mp4", 20, flashes=(3, 9, 15))
    one = sample.generate(
        video, models, settings=Settings(seed=5, steps=3, batch=1, candidates=2, keep_all=True)
    )
    all_at_once = sample.generate(
        video, models, settings=Settings(seed=5, steps=3, batch=6, candidates=2, keep_all=True)
    )
    assert len(one.starts) == 3
    for k in range(2):
        assert (one.wavs[k] - all_at_once.wavs[k]).norm() < 1e-2 * one.wavs[k].norm()
    alone = sample.generate(video, models, settings=Settings(seed=5, steps=3, batch=1))
    assert torch.equal(alone.wav, one.wavs[0])  # however many candidates there are
    other = sample.generate(video, models, settings=Settings(seed=6, steps=3, batch=1))
    assert (alone.wav - other.wav).norm() > 0.1 * alone.wav.norm()


def test_windows_of_many_clips_share_batches(models, tmp_path, monkeypatch):
    """Full batches across clips and candidates; order, lengths and sounds are as one by one."""
    lengths = {"a": 2, "b": 20, "c": 3, "e": 1}
    videos = [
        make_video(tmp_path / f"{name}.mp4", s, flashes=(0.5,)) for name, s in lengths.items()
    ]
    videos.insert(3, tmp_path / "missing.mp4")
    settings = Settings(steps=2, candidates=2, batch=4)
    batches = []
    denoise = sample.denoise

    def counted(windows, *args):
        batches.append(len(windows))
        denoise(windows, *args)

    steps = []
    monkeypatch.setattr(sample, "denoise", counted)
    many = list(
        sample.generate_many(
            videos, models, settings=settings, on_step=lambda *numbers: steps.append(numbers)
        )
    )
    assert batches == [4, 4, 4]  # (1 + 3 + 1 + 1) windows, two candidates
    assert steps[-1] == (24, 24) and [done for done, _ in steps] == [4, 8, 12, 16, 20, 24]
    assert [video for video, _ in many] == videos
    assert isinstance(many[3][1], UserError) and "missing.mp4" in str(many[3][1])
    for video, result in many:
        if isinstance(result, UserError):
            continue
        alone = sample.generate(video, models, settings=settings)
        assert len(alone.wav) == lengths[video.stem] * SAMPLE_RATE
        assert (result.mel - alone.mel).norm() < 1e-3 * alone.mel.norm()
        assert np.allclose(result.scores, alone.scores, atol=1e-3)
        assert {"decode", "sampling", "vocoder"} <= result.profile.rows.keys()


def test_a_result_saves_what_it_is_asked_for(models, clip, tmp_path):
    result = sample.generate(clip, models, settings=Settings(steps=1), start=0.5, duration=1.0)
    assert "\n" not in repr(result) + repr(models) and "1.00 s" in repr(result)
    for name in ("a.mp4", "a.wav", "a.mkv"):
        result.save(tmp_path / name)
        assert media.read_tags(tmp_path / name)["comment"].startswith(watermark.CLAIM)
        assert abs(len(media.read_audio(tmp_path / name)) - SAMPLE_RATE) <= 2048
    with pytest.raises(UserError, match="a.txt: we write no sound"):
        result.save(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is the source itself"):
        result.save(clip)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mkv", "a.mp4", "a.wav"]


def test_the_mini_model_is_used_where_none_is_given(clip):
    settings = Settings(steps=1)
    result = sample.generate(clip, settings=settings, duration=0.5)
    given = sample.generate(clip, sample.load_models(), settings=settings, duration=0.5)
    # but for rounding, which may depend on where the weights lie in memory
    assert torch.allclose(result.mel, given.mel, atol=1e-3)
    assert "diff-foley mini" in result.tags["comment"]


def test_the_picture_matters_and_features_do_not_depend_on_spans(models, tmp_path):
    video = make_video(tmp_path / "clip.mp4", 70, 10, flashes=(3, 59.9, 60.3, 65))
    features = sample.video_features(video, models.cavp, 1100, 70.0)
    frames = media.read_frames(video, FPS, 16)
    frames = torch.cat([frames, frames[-1:].expand(1100 - len(frames), -1, -1, -1)])
    assert torch.allclose(features, models.cavp.encode_clip(frames), atol=1e-5)
    assert features.std(0).max() > 1e-3


def test_best_candidate_is_the_highest_score_and_scores_see_the_picture(models, tmp_path):
    a, b = (
        make_video(tmp_path / "a.mp4", 2, flashes=(1.0,)),
        make_video(tmp_path / "b.mp4", 2, flashes=(0.1, 0.5, 1.7)),
    )
    ra = sample.generate(a, models, settings=Settings(steps=2, candidates=3, keep_all=True))
    assert (
        ra.best == int(np.argmax(ra.scores))
        and len(set(ra.scores)) == 3
        and torch.equal(ra.wav, ra.wavs[ra.best])
    )
    assert sample.generate(b, models, settings=Settings(steps=2, candidates=3)).scores != ra.scores


def test_start_and_duration_cut_the_picture(models, clip):
    result = sample.generate(clip, models, settings=Settings(steps=1), start=0.5, duration=1.0)
    assert len(result.wav) == SAMPLE_RATE
    assert (
        len(sample.generate(clip, models, settings=Settings(steps=1), start=1.5).wav)
        == SAMPLE_RATE // 2
    )
    with pytest.raises(MediaError, match="--start 5 is past its end"):
        sample.generate(clip, models, start=5.0)


def test_guidance_scales_are_the_weights_own_unless_given(models, clip):
    own = sample.generate(clip, models, settings=Settings(steps=2))
    scales = {"cfg": models.ldm.config.guidance, "cg": models.align.config.guidance}
    assert torch.equal(
        own.wav, sample.generate(clip, models, settings=Settings(steps=2, **scales)).wav
    )
    for off in ({"cg": 0.0}, {"cfg": 1.0}):
        assert not torch.equal(
            own.wav, sample.generate(clip, models, settings=Settings(steps=2, **off)).wav
        )
    assert (
        sample.parse_arguments(["x.mp4"])[1] == Settings()
        and Settings().cfg is Settings().cg is None
    )
    assert (LDMConfig().guidance, AlignmentConfig().guidance) == (4.5, 50.0)  # the paper's


def test_without_classifier_guidance_must_be_off(models, clip):
    without = sample.Models(models.cavp, models.ldm, None, name="tiny")
    with pytest.raises(CheckpointError, match="give --cg 0 and --candidates 1"):
        sample.generate(clip, without, settings=Settings(steps=1))
    assert sample.generate(clip, without, settings=Settings(steps=1, cg=0.0)).scores == [None]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sampler": "euler"}, 'sampler "euler": not one of dpm, unipc, deis, ddim, plms'),
        ({"guidance": "triple"}, 'guidance "triple": not one of double, distilled'),
        ({"steps": 0}, "steps 0: not a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps 2.5: not a whole number from 1 to 1000"),
        ({"steps": True}, "steps True: not a whole number from 1 to 1000"),
        ({"steps": 1000, "sampler": "ddim"}, "steps 1000: not a whole number from 1 to 999"),
        ({"cfg": "4.5"}, 'cfg "4.5": not a number from 0 up'),
        ({"cfg": math.nan}, "cfg nan: not a number from 0 up"),
        ({"cg": -1}, "cg -1: not a number from 0 up"),
        ({"candidates": 0}, "candidates 0: not a whole number from 1 to 1000"),
        ({"deep_every": 0}, "deep_every 0: not a whole number from 1 to 1000"),
        ({"deep_every": 2, "as_official": True}, "deep-every: not of the official demo"),
        ({"seed": -1}, "seed -1: not a whole number from 0 to "),
        ({"start": -0.5}, "start -0.5: not a number from 0 up"),
        ({"start": None}, "start None: not a number from 0 up"),
        ({"duration": 0}, "duration 0: not a number from 0.001 up"),
        ({"batch": 0}, "batch 0: not a whole number from 1 to 4096"),
    ],
)
def test_wrong_arguments_are_one_line(models, clip, wrong, message):
    with pytest.raises(ValueError) as error:
        where = {k: wrong.pop(k) for k in ("start", "duration") if k in wrong}
        sample.generate(clip, models, settings=Settings(**wrong), **where)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("guidance", ["distilled", "double"])
def test_the_deep_half_is_computed_as_often_as_one_asks(clip, guidance):
    models = sample.load_models("mini", "cpu")
    deep_calls = []
    hook = models.ldm.unet.middle_block.register_forward_hook(lambda *_: deep_calls.append(1))
    mels = []
    for deep_every, calls in ((1, 6), (2, 3), (4, 2)):
        settings = Settings(steps=6, guidance=guidance, deep_every=deep_every, tries=1)
        mels.append(sample.generate(clip, models, settings=settings, mark=False).mel)
        assert len(deep_calls) == calls
        deep_calls.clear()
    hook.remove()
    assert not torch.equal(mels[1], mels[0])


def test_what_is_no_model_or_no_settings_is_one_line(models, clip):
    with pytest.raises(ValueError, match='models "mini": not of the class Models'):
        sample.generate(clip, "mini")
    with pytest.raises(ValueError, match="settings None: not of the class Settings"):
        sample.generate(clip, models, settings=None)


def test_a_diverged_sampler_is_an_error_not_silence(capsys, clip, weights, tmp_path):
    flags = ("--weights", weights, "--out", tmp_path, "--steps", 2, "--cfg", "1e30")
    status, lines, err = run(capsys, clip, *flags)
    assert status == 1 and not lines and len(err) == 1 and "the sampler diverged" in err[0]
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(models, clip):
    plain = sample.generate(clip, models, settings=Settings(steps=2, seed=3, cfg=2.0))
    assert torch.equal(
        sample.generate(
            clip, models, settings=Settings(steps=np.int64(2), seed=np.int32(3), cfg=np.float32(2))
        ).wav,
        plain.wav,
    )


def test_models_are_loaded_where_they_can_run(weights, monkeypatch):
    assert sample.load_models(weights).device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("gpu", "mps", None, 0.5):
        with pytest.raises(ValueError, match=r"^device .*: not one of auto, cpu, cuda$"):
            sample.load_models(weights, device=name)
    with pytest.raises(ValueError, match='dtype "bfloat16": not one of torch.float32'):
        sample.load_models(weights, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match='device "cuda:1": torch finds no such GPU'):
        find_device("cuda:1")


# ------------------------------------------------------------------------------------------------
# the command


def test_command_writes_video_and_wav_and_says_so(capsys, clip, weights, tmp_path):
    out = tmp_path / "new" / "folder"
    flags = ("--out", out, "--weights", weights, "--steps", 2)
    status, lines, err = run(capsys, clip, *flags, "--json", "--profile", "--plot")
    assert status == 0
    line = json.loads(lines[0])
    told = {"input", "output", "wav", "seconds", "windows", "seed", "score", "profile"}
    assert set(line) == told | {"gain", "lufs"}
    assert (
        line["seconds"] == 2.0 and line["windows"] == 1 and line["seed"] == 0 and line["score"] < 0
    )
    assert {p.name for p in out.iterdir()} == {
        "clip.foley.mp4",
        "clip.foley.wav",
        "clip.foley.png",
        "manifest.jsonl",
    }
    stages = [
        "loading",
        "decode",
        "features",
        "sampling",
        "autoencoder",
        "vocoder",
        "writing",
        "plot",
        "total",
    ]
    assert list(line["profile"]) == stages and [e.split()[0] for e in err] == ["stage"] + stages
    parts = sum(line["profile"][s]["seconds"] for s in stages[1:-1])
    assert 0 < parts <= line["profile"]["total"]["seconds"]
    assert all(row["peak_mib"] > 50 for row in line["profile"].values())
    assert abs(media.probe(line["output"]).duration - 2.0) < 0.04
    assert abs(len(media.read_audio(line["output"])) - 2 * SAMPLE_RATE) <= 1024  # an AAC frame
    for name in (line["output"], line["wav"]):
        assert media.read_tags(name)["comment"].startswith(
            "AI-generated sound: diff-foley tiny, seed 0"
        )


def test_plot_marks_annotated_and_generated_onsets(clip, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = shutil.copy(clip, tmp_path / "shown.mp4")
    (tmp_path / "shown.json").write_text(
        json.dumps(
            {"onsets": [{"time": 0.75, "material": "wood"}, {"time": 1.5, "material": "wood"}]}
        )
    )
    wav = torch.zeros(2 * SAMPLE_RATE)
    wav[SAMPLE_RATE : SAMPLE_RATE + 800] = 0.5 * torch.randn(
        800, generator=torch.Generator().manual_seed(0)
    )
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kwargs: (figures.append(figure), save(figure, *args, **kwargs)),
    )
    for start, path in ((0.25, shown), (0.0, clip)):  # the second has no labels beside it
        result = sample.Result(
            wav, {0: wav}, [None], 0, audio.mel(wav), [0], 2.0, path, start, None, Profile(), {}
        )
        outputs.plot(tmp_path / "shown.png", result)
    marks = [
        [list(events.get_positions()) for events in figure.axes[1].collections]
        for figure in figures
    ]
    names = [[label.get_text() for label in figure.axes[1].get_yticklabels()] for figure in figures]
    assert names == [["generated", "annotated"], ["generated"]]
    assert (
        marks[0][1] == [0.5, 1.25] and marks[0][0] == pytest.approx([1.0], abs=0.03) == marks[1][0]
    )


def test_keep_all_writes_every_candidate_with_its_score(capsys, clip, weights, tmp_path):
    status, lines, _ = run(
        capsys,
        clip,
        "--out",
        tmp_path,
        "--weights",
        weights,
        "--steps",
        1,
        "--json",
        "--candidates",
        3,
        "--keep-all",
    )
    line = json.loads(lines[0])
    assert status == 0 and len(line["candidates"]) == 3
    assert line["score"] == max(c["score"] for c in line["candidates"])
    best = max(line["candidates"], key=lambda c: c["score"])
    assert Path(best["wav"]).read_bytes() == Path(line["wav"]).read_bytes()
    assert [Path(c["wav"]).name for c in line["candidates"]] == [
        f"clip.foley.{k}.wav" for k in range(3)
    ]
    assert len({Path(c["wav"]).read_bytes() for c in line["candidates"]}) == 3


def test_page_has_every_input_or_why_not(capsys, clip, weights, tmp_path):
    """What it holds: tests/test_page.py."""
    flags = ("--weights", weights, "--out", tmp_path, "--steps", 1, "--page")
    flags += ("--candidates", 2, "--keep-all", "--start", 0.5)
    status, out, err = run(capsys, tmp_path / "none.mp4", clip, *flags)
    assert status == 1 and err[0].endswith("no such file; check the path")
    assert out[-1].startswith(str(tmp_path / "index.html"))
    page = (tmp_path / "index.html").read_text()
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    failed, made = json.loads(data)["inputs"]
    assert failed == {"name": "none.mp4", "error": err[0].removeprefix("sample.py: ")}
    files = [(sound["file"], sound["offset"]) for sound in made["sounds"]]
    assert files == [("clip.foley.0.wav", 0), ("clip.foley.1.wav", 0), ("clip.mp4", 0.5)]
    assert made["seconds"] == 1.5 and made["name"] == "clip.mp4"
    assert all(0 <= time <= 1.5 for time, *_ in made["hits"])

    # with --json stdout is JSON alone
    _, out, _ = run(capsys, clip, *flags, "--json")
    assert [json.loads(line)["input"] for line in out] == [str(clip)]


def test_every_sound_that_is_written_is_marked(capsys, clip, weights, tmp_path):
    """As drawn, then marked, in all files and with --keep-all; `watermark.py` says what the mark is
    worth."""
    status, lines, _ = run(
        capsys,
        clip,
        "--out",
        tmp_path,
        "--weights",
        weights,
        "--steps",
        1,
        "--json",
        "--candidates",
        2,
        "--keep-all",
        "--lufs",
        "off",
    )
    line, models = json.loads(lines[0]), sample.load_models(str(weights), "cpu")
    settings = Settings(steps=1, candidates=2, keep_all=True, lufs=None)
    drawn = sample.generate(clip, models, settings=settings, mark=False)
    result = sample.generate(clip, models, settings=settings)
    assert result.marked and not drawn.marked and torch.equal(result.wav, result.wavs[result.best])
    assert all(
        torch.equal(result.wavs[k], sample.add_watermark(wav)) for k, wav in drawn.wavs.items()
    )

    def undone(path):
        """A file's sound without the gain that its tag names: true peaks are at most -1 dBTP."""
        gain = re.search(r"gain ([+-][\d.]+) dB", media.read_tags(path)["comment"])
        return media.read_audio(path) / 10 ** (float(gain[1]) / 20 if gain else 0)

    for k, wav in drawn.wavs.items():
        written, marked = (
            undone(line["candidates"][k]["wav"]),
            audio.limit(watermark.mark(wav)),
        )
        assert (written - marked).abs().max() < 1e-4 and (written - wav).abs().max() > 1e-3
    sound, best = (
        undone(line["output"])[: len(drawn.wav)],
        audio.limit(watermark.mark(drawn.wav)),
    )
    assert (sound - best).norm() < 0.9 * (
        sound - drawn.wav
    ).norm()  # of the video only the codec's noise is left


def test_keep_audio_mixes_the_clips_own_sound(capsys, clip, weights, tmp_path):
    def tone(*flags):
        status, lines, _ = run(
            capsys, clip, "--out", tmp_path, "--weights", weights, "--steps", 1, "--json", *flags
        )
        assert status == 0
        with av.open(json.loads(lines[0])["wav"]) as media:
            wav = np.concatenate([f.to_ndarray().ravel() for f in media.decode(audio=0)]).astype(
                float
            )
        assert len(wav) == 2 * SAMPLE_RATE
        wave = np.exp(-2j * np.pi * 1000 * np.arange(len(wav)) / SAMPLE_RATE)
        return abs((wav * wave).mean()) / 32768 * 2

    without, full, quiet = tone(), tone("--keep-audio"), tone("--keep-audio", "-20")
    assert full > 5 * without and full > 0.1 and quiet < 0.4 * full


def test_two_inputs_of_one_name_are_told_apart(capsys, clip, weights, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy(clip, tmp_path / folder / "clip.mp4")
    out = tmp_path / "out"
    flags = ("--weights", weights, "--steps", 1, "--json")
    status, lines, err = run(capsys, tmp_path / "a", tmp_path / "b", "--out", out, *flags)
    assert status == 1 and len(lines) == 2 and len(err) == 1 and "rename" in err[0]
    assert "output" in json.loads(lines[0]) and "error" in json.loads(lines[1])
    status, lines, err = run(capsys, tmp_path / "a", tmp_path / "a" / "clip.mp4", *flags)
    assert status == 0 and len(lines) == 1  # named twice, done once
    status, lines, err = run(capsys, tmp_path / "a", *flags)
    assert status == 0 and len(lines) == 1  # its own output is no input; kept


def test_another_input_does_not_change_a_sound(capsys, clip, weights, tmp_path):
    other = make_video(tmp_path / "in" / "before.mp4", 1.0)
    sounds = []
    for inputs, out in (([clip], "one"), ([other, clip], "two")):
        assert (
            run(capsys, *inputs, "--out", tmp_path / out, "--weights", weights, "--steps", 2)[0]
            == 0
        )
        sounds.append((tmp_path / out / "clip.foley.wav").read_bytes())
    assert sounds[0] == sounds[1]


# ------------------------------------------------------------------------------------------------
# mistakes


def bad_files(folder):
    folder.mkdir()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no film\n" * 50)
    (folder / "folder").mkdir()
    media.write_wav(folder / "sound.wav", torch.zeros(1600))
    return [
        folder / name for name in ("missing.mp4", "empty.mp4", "text.mp4", "folder", "sound.wav")
    ]


def test_bad_inputs_are_named_and_the_others_done(capsys, clip, weights, tmp_path):
    bad = bad_files(tmp_path / "bad")
    flags = ("--out", tmp_path / "out", "--weights", weights, "--steps", 1, "--json")
    status, lines, err = run(capsys, *bad, clip, *flags)
    assert status == 1 and len(lines) == len(bad) + 1 and len(err) == len(bad)
    for path, line, message in zip(bad, lines[:-1], err, strict=True):
        assert message.startswith(f"sample.py: {path}: ") and ";" in message
        assert set(json.loads(line)) == {"input", "error"}
    assert "output" in json.loads(lines[-1])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "clip.foley.mp4",
        "clip.foley.wav",
        "manifest.jsonl",
    ]


def test_an_output_folder_that_is_a_file(capsys, clip, weights, tmp_path):
    (tmp_path / "out").write_text("x")
    status, lines, err = run(
        capsys, clip, "--out", tmp_path / "out", "--weights", weights, "--steps", 1
    )
    assert status == 1 and not lines and len(err) == 1 and "out: cannot be made" in err[0]


def test_a_failed_write_leaves_nothing(capsys, clip, weights, tmp_path, monkeypatch):
    def full_disk(path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        media, "write_sound", full_disk
    )  # the second file fails after the first was written
    status, _, err = run(
        capsys, clip, "--out", tmp_path / "out", "--weights", weights, "--steps", 1
    )
    assert (
        status == 1
        and len(err) == 1
        and "No space left" in err[0]
        and [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]
    )


def test_official_weights_come_from_the_cache(monkeypatch, capsys, clip, weights, tmp_path):
    """What `compat.hub` returns is used like any folder; what it cannot do is one line."""
    monkeypatch.setattr(hub, "official", lambda: weights)
    assert run(capsys, clip, "--out", tmp_path, "--weights", "official", "--steps", 1)[0] == 0
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    monkeypatch.setenv("DIFF_FOLEY_CACHE", str(tmp_path / "cache"))
    status, lines, err = run(capsys, clip, "--out", tmp_path, "--weights", "official")
    assert status == 1 and not lines and len(err) == 1
    assert (
        "pip install huggingface_hub, or download" in err[0]
        and "give their folder as weights" in err[0]
    )


@pytest.mark.parametrize(
    "width, native, dtype", [(128, True, "bfloat16"), (128, False, "float32"), (8, True, "float32")]
)
def test_wide_networks_are_in_bfloat16_where_the_cpu_computes_in_it(
    monkeypatch, weights, tmp_path, width, native, dtype
):
    wide = replace(tiny.UNET, width=width)
    for name in ("cavp", "align"):
        shutil.copy(weights / f"{name}.safetensors", tmp_path)
    model = LDM(
        LDMConfig(
            **tiny.TIME,
            unet=wide,
            vae=tiny.VAE,
        )
    )
    save_model(tmp_path / "ldm.safetensors", model, asdict(model.config))
    monkeypatch.setattr(sample, "computes_bfloat16", lambda device: native)
    loaded = sample.load_models(tmp_path, "cpu")
    for net in (loaded.cavp, loaded.ldm, loaded.align):
        assert {p.dtype for p in net.parameters()} == {getattr(torch, dtype)}
    assert {
        p.dtype for p in sample.load_models(tmp_path, "cpu", dtype=torch.float32).ldm.parameters()
    } == {torch.float32}


def test_bfloat16_makes_nearly_the_same_sound(clip, weights):
    exact, rounded = (
        sample.generate(clip, sample.load_models(weights, "cpu", dtype), settings=Settings(steps=3))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (
        exact.mel.shape == rounded.mel.shape
        and exact.mel.dtype == rounded.mel.dtype == torch.float32
    )
    difference = (exact.mel - rounded.mel).norm() / exact.mel.norm()
    assert 0 < difference < 0.1


def test_weights_that_lack_a_file(capsys, clip, weights, tmp_path):
    status, _, err = run(capsys, clip, "--weights", tmp_path / "nowhere")
    assert status == 1 and len(err) == 1 and "nowhere" in err[0]
    part = tmp_path / "part"
    shutil.copytree(weights, part)
    (part / "align.safetensors").unlink()
    status, _, err = run(capsys, clip, "--weights", part, "--out", tmp_path, "--steps", 1)
    assert status == 1 and len(err) == 1 and "give --cg 0 and --candidates 1" in err[0]
    shutil.copy(weights / "cavp.safetensors", part / "ldm.safetensors")
    status, _, err = run(capsys, clip, "--weights", part, "--out", tmp_path)
    assert status == 1 and len(err) == 1 and str(part) in err[0]
    (part / "ldm.safetensors").write_bytes(b"nothing")
    status, _, err = run(capsys, clip, "--weights", part, "--out", tmp_path)
    assert status == 1 and len(err) == 1 and "ldm.safetensors" in err[0]
    (part / "ldm.safetensors").unlink()
    status, _, err = run(capsys, clip, "--weights", part, "--out", tmp_path)
    assert status == 1 and len(err) == 1 and "ldm.safetensors" in err[0]
    assert not [p for p in tmp_path.iterdir() if ".foley" in p.name]


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"],
        ["--steps", "many"],
        ["--cfg", "nan"],
        ["--seed", "-1"],
        ["--nonsense"],
        ["--sampler", "euler"],
        ["--sampler", "plms", "--steps", "1000"],
        ["--duration", "0"],
        ["--keep-audio", "loud"],
        [],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys, flags):
    status, lines, err = run(capsys, *(["clip.mp4"] if flags else []), *flags)
    assert (
        status == 2
        and not lines
        and len(err) == 1
        and err[0].startswith("sample.py: ")
        and "--help" in err[0]
    )


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--as-official", "--redo", "1-2"], "--as-official"),
        (["--sampler", "ddim", "--schedule", "karras"], "--sampler ddim and plms"),
        (["--as-official", "--schedule", "karras"], "--as-official"),
        (["--keep-audio", "nan"], "--keep-audio"),
        (["--duck"], "--keep-audio"),
        (["--keep-tracks", "--format", "wav"], "--keep-tracks"),
    ],
)
def test_refusals_name_flags_as_typed(capsys, flags, named):
    status, _, err = run(capsys, "clip.mp4", *flags)
    assert status == 2 and named in err[0] and "_" not in err[0], err


def test_no_refusal_names_a_flag_as_the_code_does():
    """--as-official, not as_official: of every error that is raised."""
    flags = {name for name in vars(sample.parse_arguments(["x"])[0]) if "_" in name}
    assert {"as_official", "keep_audio", "write_onsets"} <= flags
    for path in (ROOT / "sample.py", ROOT / "compat" / "official.py", *ROOT.glob("film/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            raised = isinstance(node, ast.Raise) or (
                isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".fail", ".error"))
            )
            for text in ast.walk(node) if raised else ():
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    words = set(re.findall(r"\w+", text.value))
                    assert not words & flags, f"{path.name}:{text.lineno}: {text.value}"


def test_help_and_dashed_names_from_a_shell(clip, weights, tmp_path):
    shutil.copy(clip, tmp_path / "-clip.mp4")
    command = [
        sys.executable,
        ROOT / "sample.py",
        "--weights",
        weights,
        "--steps",
        "1",
        "--",
        "-clip.mp4",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "-clip.foley.mp4").exists() and (tmp_path / "-clip.foley.wav").exists()
    usage = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--help"], capture_output=True, text=True
    )
    assert usage.returncode == 0 and "--candidates" in usage.stdout and not usage.stderr
    assert "(default: ())" not in usage.stdout


# sample.py as a script, saying when its first step begins and taking no second one
HELD = f"""
import runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import diffusion
def held(*_):
    print("sampling", flush=True)
    time.sleep({PATIENCE})
diffusion.SAMPLERS["dpm"] = held
runpy.run_path({str(ROOT / "sample.py")!r}, run_name="__main__")
"""


def test_a_command_leaves_its_imports_out_of_the_search_for_garbage():
    """A library does not: what its user's program has may become garbage."""
    code = """
import gc, os, runpy, sys
import sample
assert gc.isenabled() and gc.get_freeze_count() == 0
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
gc.disable()
sys.argv = ["sample.py", "--help"]
try:
    runpy.run_path("sample.py", run_name="__main__")
except SystemExit:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_says_one_line_and_leaves_nothing(weights, tmp_path):
    make_video(tmp_path / "clip.mp4", 20)
    job = subprocess.Popen(
        [sys.executable, "-c", HELD, "clip.mp4", "--weights", weights],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "sampling\n"
    job.send_signal(2)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 130 and err.splitlines() == [
        "sample.py: stopped; what is finished is kept; the same command goes on"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
