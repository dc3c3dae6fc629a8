"""--as-official repeats the published demo: the effect of every difference, theirs as published and
ours as meant.

Networks are tiny and random, in the published proportions: 4 frames a second, 32 of them to a
window, a classifier as wide as the features.
"""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from clips import grey, make, seen, steady
from golden import rule
from main_job import run, shuffled

import align
import diffusion
import ldm
import sample
from cavp import CAVP, CAVPConfig
from common import audio, ffmpeg, media
from common.audio import HOP, SAMPLE_RATE
from common.checkpoints import save_model
from common.media import MediaError
from compat import demo_frames, official
from sample import Settings
from vae import VAEConfig

ROOT = Path(sample.__file__).parent
WINDOW = 511 * HOP  # samples of one window there, 8.176 s
UNET = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (2,), "heads": 2, "groups": 4}


CUT = (
    r"sample\.py: .*film\.mp4: the cut does not begin and end on key frames; "
    r"its picture is encoded anew \(H\.264\)"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "published"
    vae = VAEConfig(width=8, multipliers=(1, 1, 1, 1), blocks=1, groups=4)
    parts = {
        "cavp": CAVP(
            CAVPConfig(
                size=32,
                video_width=4,
                video_blocks=(1, 1, 6, 3),
                audio_widths=(4,) * 6,
                embed_dim=16,
            )
        ),
        "ldm": ldm.LDM(
            ldm.LDMConfig(feature_dim=16, unet=ldm.UNetConfig(**UNET, context_dim=24), vae=vae)
        ),
        "align": align.Alignment(
            align.AlignmentConfig(feature_dim=16, unet=ldm.UNetConfig(**UNET, context_dim=16))
        ),
    }
    for seed, (name, model) in enumerate(parts.items()):
        save_model(folder / f"{name}.safetensors", shuffled(model, seed), asdict(model.config))
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return sample.load_models(weights, "cpu")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """16.6 s at 25 frames a second; the grey of every frame says which it is."""
    return make(tmp_path_factory.mktemp("film") / "film.mp4", steady(25, 16.6))


def recorded(monkeypatch, network):
    """The conditions that `network` is prepared for from now on."""
    shown, prepare = [], network.prepare
    monkeypatch.setattr(
        network, "prepare", lambda context, *rest: shown.append(context) or prepare(context, *rest)
    )
    return shown


# ------------------------------------------------------------------------------------------------
# pitch: the inverse's filterbank


def pitch(wav):
    """Hz of the strongest frequency."""
    return (
        torch.fft.rfft(wav * torch.hann_window(len(wav))).abs().argmax().item()
        * SAMPLE_RATE
        / len(wav)
    )


def test_a_tone_falls_there_and_stays_here():
    mel = audio.mel(0.25 * torch.sin(2 * math.pi * 1000 * torch.arange(audio.WINDOW) / SAMPLE_RATE))
    assert pitch(official.vocode(mel[None])) == pytest.approx(
        1000 * 16000 / 22050, abs=4
    )  # librosa's: 724.4
    assert pitch(audio.vocode(mel)) == pytest.approx(1000, abs=4)


def test_magnitudes_are_librosas():
    golden = rule.recorded("audio")
    magnitude = official.mel_to_magnitude(audio.mel(golden["waveform"])[None])[0]
    rule.close(
        "inverse at 22,050 Hz", magnitude[:, ::32], golden["inverse_magnitude_22k_every32"], 1e-5
    )


# ------------------------------------------------------------------------------------------------
# time: windows end to end


class Seer:
    """Stands for CAVP and LDM: a feature is its frame's brightness, two latent columns hold it, and
    a click sounds where the picture turns white, at the very column that is that moment of a
    window."""

    config = SimpleNamespace(
        fps=4.0,
        size=8,
        frames=32,
        feature_dim=16,
        columns=0,
        guidance=1.0,
        scales=(),
        unet=SimpleNamespace(aligned=0),
    )
    context = 0

    @property
    def vae(self):
        return SimpleNamespace(decode=lambda z: self.decode(z * ldm.LATENT_SCALE)[:, None])

    def encode_clip(self, frames):
        return (frames.float().mean((1, 2, 3)) / 255)[:, None].expand(-1, 16)

    def conditioner(self, features):
        return features

    def null_context(self, frames):
        return torch.zeros(1, frames, 16)

    def unet(self, x, t, context):
        alpha, sigma = (
            f(t).view(-1, 1, 1, 1)
            for f in (lambda t: diffusion.log_alpha(t).exp(), diffusion.sigma)
        )
        clean = context[:, :, 0].repeat_interleave(2, 1)[:, None, None]  # (b, 1, 1, 64)
        return ((x - alpha * clean) / sigma).float()

    def without_materials(self, conditions):
        return None

    def decode(self, z):
        lit = z[:, 0, 0, ::2] > 0.5  # (b, 32)
        lit[:, 1:] &= ~lit[:, :-1]
        mel = torch.zeros(len(z), 128, 512)
        mel[:, :, (torch.arange(32) * SAMPLE_RATE / 4 / HOP).round().long()] = 0.8 * lit[:, None]
        return mel


def clicks(wav):
    """Seconds at which the level rises above a fifth of the peak; a click at a window's end has
    lost half of it."""
    loud = np.flatnonzero(wav.abs() > 0.2 * wav.abs().max())
    return loud[np.diff(loud, prepend=-8000) > 4000] / SAMPLE_RATE


def test_sound_slips_by_176_ms_a_window_there_and_stays_in_time_here(tmp_path):
    flashes = (2, 8, 10, 14, 18)  # each for a frame of 4 a second
    levels = [250 if any(f <= k / 25 < f + 0.25 for f in flashes) else 10 for k in range(500)]
    clip = make(tmp_path / "clip.mp4", steady(25, 20), levels=levels)
    seer, off = Seer(), {"steps": 4, "cfg": 1.0, "cg": 0.0}
    align = SimpleNamespace(
        config=SimpleNamespace(guidance=0.0, unet=SimpleNamespace(context_dim=16))
    )
    theirs = sample.generate(
        clip,
        sample.Models(seer, seer, align),
        settings=Settings(as_official=True, **off),
        duration=20,
    )
    ours = sample.generate(clip, sample.Models(seer, seer, None), settings=Settings(**off))
    assert len(theirs.wav) == 2 * WINDOW == 2 * 130816 and len(ours.wav) == 20 * SAMPLE_RATE
    slipped = [2, 8.176, 10.176, 14.176]  # and the tail is not there
    assert clicks(theirs.wav) == pytest.approx(slipped, abs=0.03)
    assert clicks(ours.wav) == pytest.approx(flashes, abs=0.03)


# ------------------------------------------------------------------------------------------------
# what the networks are shown


def test_classifier_sees_raw_features_of_the_whole_clip_there_and_its_own_of_the_window_here(
    models, film, monkeypatch
):
    shown = recorded(monkeypatch, models.align.model)
    frames = official.read_frames(film, 4, 32, 0, 16.6)
    raw = official.encode(models.cavp, frames)
    assert len(raw) == 66
    sample.generate(film, models, settings=Settings(steps=1, as_official=True), duration=16.6)
    assert len(shown) == 2 and all(
        torch.equal(context, raw[None]) for context in shown
    )  # two windows
    shown.clear()
    sample.generate(film, models, settings=Settings(steps=1, as_official=True))
    assert [context.shape[1] for context in shown] == [33]  # the window's 32 and one more
    shown.clear()
    result = sample.generate(film, models, settings=Settings(steps=1))
    features = sample.video_features(film, models.cavp, result.starts[-1] // 4000 + 32, 16.6)
    own = [models.align.cond_model(features[None, s // 4000 :][:, :32]) for s in result.starts]
    guided = shown[::2]  # every other one is for the score
    assert len(guided) == len(own) == 3 and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(guided, own, strict=True)
    )


def test_no_condition_is_a_zero_embedding_there_and_that_of_zero_features_here(
    models, film, monkeypatch
):
    shown = recorded(monkeypatch, models.ldm.unet)
    sample.generate(
        film, models, settings=Settings(steps=1, candidates=2, keep_all=True, as_official=True)
    )
    sample.generate(film, models, settings=Settings(steps=1), duration=8)
    theirs, ours = shown
    assert (
        theirs.shape == (4, 32, 24)
        and theirs[:2].abs().max() == 0
        and torch.equal(theirs[2], theirs[3])
    )
    assert (
        torch.equal(ours[:1], models.ldm.conditioner(torch.zeros(1, 32, 16)))
        and ours[:1].abs().max() > 0.01
    )
    assert theirs[2].abs().max() > 0.01 and theirs[2].std() > 0.01


@torch.no_grad()
def test_each_of_these_changes_what_the_networks_say(models):
    x, t = rule.normal("x", 1, 4, 16, 64), torch.tensor([500.0])
    whole = torch.nn.functional.normalize(rule.normal("features", 1, 66, 16), dim=-1)
    window = whole[:, 32:64]
    context, null = models.ldm.conditioner(window), models.ldm.null_context(32)

    def eps(null, features, project):  # random networks' gradients are small
        align = models.align if project else official.Unprojected(models.align)
        return diffusion.guided_eps(models.ldm.unet, context, null, 4.5, align, features, 5000.0)(
            x, t
        )

    ours = eps(null, window, True)
    steps = [
        ours,
        eps(torch.zeros_like(context), window, True),
        eps(torch.zeros_like(context), window, False),
        eps(torch.zeros_like(context), whole, False),
    ]
    for name, before, after in zip(
        ("zero embedding", "raw features", "whole clip"), steps, steps[1:], strict=False
    ):
        print(f"{name}: {rule.relative(after, before):.3f}")
        assert rule.relative(after, before) > 0.003


@torch.no_grad()
def test_windows_have_noise_of_their_own_and_a_tail_has_no_window_there(models):
    features, noise = rule.normal("features", 32, 16), rule.normal("noise", 2, 4, 16, 128)
    settings = Settings(steps=2, cfg=4.5, cg=0.0, sampler="dpm")
    mels = official.sample_mels(features.repeat(3, 1)[:95], models, noise, settings)
    alone = [
        official.sample_mels(features, models, part, settings)[:, 0] for part in noise.split(64, 3)
    ]
    assert mels.shape == (2, 2, 128, 512) and torch.allclose(mels, torch.stack(alone, 1), atol=1e-4)
    assert rule.relative(mels[:, 0], mels[:, 1]) > 0.01 and rule.relative(mels[0], mels[1]) > 0.01


# ------------------------------------------------------------------------------------------------
# frames


def through_ffmpeg(path, start, seconds):
    """The frames that `ffmpeg -ss START -t SECONDS -filter:v fps=4` passes on."""
    graph, passed, zero = None, [], start + media.probe(path).start

    def pull():
        try:
            while True:
                passed.append(graph.pull().to_ndarray())
        except (av.error.BlockingIOError, av.error.EOFError):
            pass

    for moment, frame in ffmpeg.frames_from(path, start):
        if start <= moment < start + seconds:
            if graph is None:
                graph = av.filter.Graph()
                source = graph.add_buffer(
                    width=frame.width,
                    height=frame.height,
                    format=frame.format.name,
                    time_base=frame.time_base,
                )
                graph.link_nodes(
                    source, graph.add("fps", "fps=4"), graph.add("buffersink")
                ).configure()
            frame.pts -= round(zero / frame.time_base)
            graph.push(frame)
            pull()
    graph.push(None)
    pull()
    return passed


@pytest.mark.parametrize(
    "fps, start", [(25, 0), (24, 0), (60, 0), (24000 / 1001, 0), (12, 0.3), (10, 5.1)]
)
def test_frames_are_those_of_ffmpegs_filter_there(tmp_path, fps, start):
    clip = make(tmp_path / "clip.mp4", steady(fps, 14))
    frames = [frame.to_ndarray() for frame in demo_frames.at_ticks(clip, 4, start, 33)]
    filtered = through_ffmpeg(clip, start, official.SECONDS)
    assert (
        len(frames)
        == len(filtered)
        == len(official.read_frames(clip, 4, 32, start, official.SECONDS))
        == 33
    )
    assert all(np.array_equal(a, b) for a, b in zip(frames, filtered, strict=True))


def test_unevenly_shown_frames_are_those_of_ffmpegs_filter_too(tmp_path):
    clip = make(tmp_path / "clip.mp4", [0, 0.1, 0.5, 0.55, 1.3, 1.31, 1.35, 4, 4.2, 7.7, 7.8, 9])
    frames = [frame.to_ndarray() for frame in demo_frames.at_ticks(clip, 4, 0, 33)]
    filtered = through_ffmpeg(clip, 0, official.SECONDS)
    assert 32 <= len(frames) <= len(filtered)
    assert all(np.array_equal(a, b) for a, b in zip(frames, filtered, strict=False))


def test_frames_come_up_to_half_a_tick_late_there_and_when_seen_here(film):
    theirs, ours = official.read_frames(film, 4, 32, 0, 8.2), media.read_frames(film, 4, 32, 0, 8.2)
    assert (
        len(theirs) == len(ours) == 33
        and theirs.shape == ours.shape
        and theirs.dtype == ours.dtype == torch.uint8
    )
    ticks = np.arange(33) / 4
    seen_then = [grey(math.floor(t * 25 + 1e-6)) for t in ticks]
    late = [grey(math.ceil((t + 0.125) * 25 - 1e-6) - 1) for t in ticks]
    assert seen(ours) == pytest.approx(seen_then, abs=6) and seen(theirs) == pytest.approx(
        late, abs=6
    )
    assert sum(abs(a - b) > 12 for a, b in zip(seen(theirs), seen(ours), strict=True)) > 28


def test_frames_are_coded_anew_there_and_the_sources_own_here(tmp_path):
    noise = np.random.Generator(np.random.PCG64(0)).integers(
        0, 256, (4, 48, 64, 1), np.uint8
    )  # colour is subsampled

    def detail(image, k):
        image[:] = noise[k % 4]

    clip = make(tmp_path / "clip.mp4", steady(4, 9), draw=detail, options={"qp": "1"})
    scaler = VideoReformatter()
    own = [
        ffmpeg.picture(frame, 32, 32, scaler).transpose(2, 0, 1)
        for frame in demo_frames.at_ticks(clip, 4, 0, 33)
    ]
    own = torch.from_numpy(np.stack(own))
    assert torch.equal(media.read_frames(clip, 4, 32, 0, 8.2), own)
    assert (official.read_frames(clip, 4, 32, 0, 8.2).float() - own.float()).abs().mean() > 1


def test_odd_and_turned_pictures_are_read_there_too(tmp_path):
    def corner(image, k):
        image[: image.shape[0] // 2, : image.shape[1] // 2] = 230

    plain = make(
        tmp_path / "plain.mkv",
        steady(25, 9),
        levels=[30] * 225,
        draw=corner,
        size=(65, 49),
        codec="ffv1",
    )
    turned = tmp_path / "turned.mp4"
    even = make(tmp_path / "even.mp4", steady(25, 9), levels=[30] * 225, draw=corner)
    with av.open(str(even)) as source, av.open(str(turned), "w") as out:
        track = out.add_stream_from_template(source.streams.video[0])
        track.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
    for clip in (plain, turned):
        theirs, ours = (
            official.read_frames(clip, 4, 32, 0, 8.2),
            media.read_frames(clip, 4, 32, 0, 8.2),
        )
        assert len(theirs) == 33 and (theirs.float() - ours.float()).abs().mean() < 3


def test_reading_stops_with_the_window_and_says_where_nothing_begins(tmp_path, film, monkeypatch):
    frames_from, read = ffmpeg.frames_from, []

    def counted(path, start):
        for pair in frames_from(path, start):
            read.append(pair)
            yield pair

    monkeypatch.setattr(demo_frames, "frames_from", counted)
    demo_frames.read_frames(film, 4, 32, 2.0, 8.2)
    assert 8.2 * 25 < len(read) < (2.0 + 8.2) * 25 + 2 < 16.6 * 25
    still = make(tmp_path / "still.mp4", [0, 20])
    assert len(official.read_frames(still, 4, 32, 0, 8.2)) == 33
    with pytest.raises(MediaError, match="no picture begins after 5 s"):
        official.read_frames(still, 4, 32, 5, 8.2)


@torch.no_grad()
def test_features_feel_the_ends_of_40_frames_there_and_only_the_clips_here(models):
    frames = (rule.uniform("clip", 100, 3, 32, 32) * 255).to(torch.uint8)
    assert models.cavp.context == 9
    whole = models.cavp.encode_video(frames[None].float() / 255)[0]
    theirs, ours = official.encode(models.cavp, frames), models.cavp.encode_clip(frames, 40)
    difference = (theirs - whole).norm(dim=-1)
    near = torch.tensor([min(abs(k + 0.5 - edge) for edge in (40, 80)) < 9 for k in range(100)])
    assert difference[[39, 40, 79, 80]].min() > 0.1 and difference[~near].max() < 1e-5
    assert (ours - whole).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------
# samplers and the decoder


def test_ddims_steps_are_the_recorded_ones_there():
    schedule = rule.recorded("schedule")
    for steps in (25, 30, 50):
        assert official.ddim_times(steps) == schedule[f"ddim.timesteps_{steps}"].tolist()


def test_30_ddim_steps_are_31_calls_there_and_30_here(models, film):
    calls = {}
    for there in (True, False):
        calls[there] = []
        sample.generate(
            film,
            models,
            settings=Settings(steps=30, sampler="ddim", as_official=there),
            duration=8,
            on_step=lambda *numbers, said=calls[there]: said.append(numbers),
        )
    assert calls[True] == [(k, 31) for k in range(1, 32)] and calls[False] == [
        (k, 30) for k in range(1, 31)
    ]


def test_without_cfg_the_classifier_is_dropped_by_dpm_there_and_kept_here(models, film):
    def mels(sampler, there):
        drawn = {"steps": 4, "cfg": 1.0, "sampler": sampler, "as_official": there}
        return [
            sample.generate(film, models, settings=Settings(cg=cg, **drawn), duration=8).mel
            for cg in (0.0, 5000.0)
        ]

    without, guided = mels("dpm", True)
    assert torch.equal(without, guided)
    for sampler, there in (("ddim", True), ("dpm", False), ("ddim", False)):
        without, guided = mels(sampler, there)
        assert not torch.allclose(without, guided, atol=1e-4), (sampler, there)


def test_decoded_mels_go_on_as_they_are_there_and_clamped_here(models, film, monkeypatch, tmp_path):
    """A mel above 1 is louder than any it was trained on; too loud a sound is cut off there and
    scaled here."""
    ramp = torch.linspace(-0.5, 1.5, 512).expand(128, -1)
    channels = torch.stack([ramp, torch.zeros(128, 512), torch.ones(128, 512)])
    monkeypatch.setattr(models.ldm.vae, "decode", lambda z: channels.expand(len(z), -1, -1, -1))
    theirs, ours = (
        sample.generate(
            film,
            models,
            settings=Settings(steps=1, as_official=there, lufs=None),
            duration=8,
            mark=False,
        )
        for there in (True, False)
    )
    assert torch.equal(theirs.mel, channels[0]) and torch.equal(
        ours.mel, channels[0, :, :500].clamp(0, 1)
    )
    assert theirs.wav.abs().max() > 3 and ours.wav.abs().max() == pytest.approx(1, abs=1e-3)
    full = []
    for result in (theirs, ours):
        media.write_wav(tmp_path / "x.wav", result.wav)
        full.append((media.read_audio(tmp_path / "x.wav").abs() > 0.999).sum().item())
    assert full[0] > 1000 and full[1] < 10


# ------------------------------------------------------------------------------------------------
# the command


def command(capsys, clip, weights, out, *flags):
    return run(capsys, clip, "--weights", weights, "--out", out, "--steps", 2, "--json", *flags)


def test_command_says_and_writes_what_the_demo_makes(film, weights, tmp_path):
    """In a process of its own, as typed; twice, for a seed is a sound."""
    lines = []
    for out in ("a", "b"):
        typed = [
            "--weights",
            weights,
            "--as-official",
            "--steps",
            "2",
            "--json",
            "--out",
            tmp_path / out,
        ]
        done = subprocess.run(
            [sys.executable, ROOT / "sample.py", film, *typed], capture_output=True, text=True
        )
        assert done.returncode == 0 and re.fullmatch(CUT, done.stderr.strip()), done.stderr
        lines.append(json.loads(done.stdout))
    line = lines[0]
    told = {"input", "output", "wav", "seconds", "windows", "seed", "score", "profile"}
    assert set(line) == told | {"gain", "lufs"} and line["gain"] == 0
    assert (
        line["seconds"] == 8.176
        and line["windows"] == 1
        and line["seed"] == 0
        and line["score"] is None
    )
    assert list(line["profile"]) == [
        "loading",
        "decode",
        "features",
        "sampling",
        "vocoder",
        "writing",
        "total",
    ]
    assert Path(line["wav"]).read_bytes() == Path(lines[1]["wav"]).read_bytes()
    assert (
        len(media.read_audio(line["wav"])) == WINDOW
        and media.read_audio(line["wav"]).abs().max() > 0
    )
    assert media.probe(line["output"]).duration == pytest.approx(
        8.2, abs=0.04
    )  # the demo's first 8.2 s
    for name in (line["output"], line["wav"]):
        assert media.read_tags(name)["comment"].startswith(
            "AI-generated sound: diff-foley published, seed 0"
        )
    drawn = sample.generate(
        film, sample.load_models(str(weights), "cpu"), settings=Settings(steps=2, as_official=True)
    ).wav.clamp(-1, 1)
    assert (
        media.read_audio(line["wav"]) - drawn
    ).abs().max() < 1e-4  # the tag alone: no watermark changes its numbers


def test_candidates_are_drawn_and_not_rated_there(capsys, film, weights, tmp_path):
    flags = ("--as-official", "--candidates", 2, "--seed", 5)
    status, lines, err = command(capsys, film, weights, tmp_path, *flags, "--keep-all")
    line = json.loads(lines[0])
    assert (
        status == 0
        and re.fullmatch(CUT, *err)
        and [c["score"] for c in line["candidates"]] == [None, None]
    )
    first, second = (media.read_audio(c["wav"]) for c in line["candidates"])
    assert torch.equal(media.read_audio(line["wav"]), first) and rule.relative(second, first) > 0.1
    status, lines, _ = command(capsys, film, weights, tmp_path, *flags)
    assert status == 0 and "candidates" not in json.loads(lines[0])
    alone = command(capsys, film, weights, tmp_path / "alone", "--as-official", "--seed", 5)[1]
    assert rule.relative(media.read_audio(json.loads(alone[0])["wav"]), first) < 0.01


def test_a_tail_is_silent_there_and_sounds_here(capsys, film, weights, tmp_path):
    """Of 15 s the demo's one window covers 8.176."""
    sounds = {}
    for there in ("official", "ours"):
        flags = ["--duration", 15] + ["--as-official"] * (there == "official")
        status, lines, _ = command(capsys, film, weights, tmp_path / there, *flags)
        line = json.loads(lines[0])
        assert status == 0 and media.probe(line["output"]).duration == pytest.approx(15, abs=0.04)
        sounds[there] = (
            media.read_audio(line["wav"]),
            media.read_audio(line["output"], duration=15.0),
        )
    assert len(sounds["official"][0]) == WINDOW and len(sounds["ours"][0]) == 15 * SAMPLE_RATE
    tail = slice(WINDOW + 2048, 15 * SAMPLE_RATE - 2048)  # a coder's block smears the edge
    assert (
        sounds["official"][1][tail].abs().max() < 1e-3 < 1e-2 < sounds["ours"][1][tail].abs().max()
    )


def refused(capsys, clip, weights, out, *flags):
    """The one line that --as-official answers with."""
    status, lines, err = command(capsys, clip, weights, out, "--as-official", *flags)
    assert (
        status == 1
        and len(err) == len(lines) == 1
        and err[0] == f"sample.py: {json.loads(lines[0])['error']}"
    )
    assert not out.exists() or not list(out.iterdir())
    return err[0]


def test_what_the_demo_cannot_do_is_refused_in_one_line(capsys, film, weights, tmp_path):
    out = tmp_path / "out"
    short = f"{film}: the official demo crashes under 8 s; leave --as-official out"
    assert short in refused(capsys, film, weights, out, "--duration", 7.8)
    assert short in refused(capsys, film, weights, out, "--start", 9)
    assert "give --sampler dpm or ddim" in refused(capsys, film, weights, out, "--sampler", "plms")
    assert "give others" in refused(capsys, film, weights, out, "--sampler", "ddim", "--steps", 27)
    assert "give --weights official" in refused(capsys, film, "mini", out)
    plms, ddim = (
        ["--sampler", "plms", "--duration", 8],
        ["--sampler", "ddim", "--steps", 27, "--duration", 8],
    )
    for flags in (["--duration", 7.8], plms, ddim):
        status, lines, err = command(capsys, film, weights, tmp_path / "ours", *flags)
        assert (
            status == 0 and re.fullmatch(CUT, *err) and json.loads(lines[0])["seconds"] == flags[-1]
        )
