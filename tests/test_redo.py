"""Redoing stretches of a sound: what stays the same, what is refused, and what the joints are like.
Networks are tiny and random, but of the real classes; the last test has the shipped ones."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from clips import make_video
from main_job import run

import sample
from common import audio, media, watermark
from common.audio import SAMPLE_RATE, WINDOW
from common.files import UserError
from diffusion import SAMPLERS, fill_in, log_alpha, sigma
from film import redo
from film.redo import FADE_IN, FADE_OUT, Sound
from ldm import LDM, LDMConfig
from sample import Settings
from vae import LATENT_SCALE

ROOT = Path(sample.__file__).parent


def bursts(seconds, rate=SAMPLE_RATE):
    """Noise that dies away ten times a second."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.2 * noise * np.exp(-20 * (t % 0.1))).astype(np.float32)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Three seconds with sound of their own."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return make_video(path, 3, flashes=(0.4, 1.2), sound=bursts(3))


@pytest.fixture
def clip(original, tmp_path):
    return shutil.copy(original, tmp_path / "clip.mp4")


def samples_of(path):
    """-> int32 (n, channels), exactly."""
    return soundfile.read(path, dtype="int32", always_2d=True)[0]


def changed(before, after, rate=SAMPLE_RATE):
    """-> the seconds of the first and the last sample that differ."""
    assert before.shape == after.shape
    where = np.flatnonzero((before != after).any(1))
    return where[0] / rate, where[-1] / rate


# ------------------------------------------------------------------------------------------------
# outside of the stretches nothing changes


def test_an_output_is_redone_and_the_rest_stays(capsys, clip, weights, tmp_path):
    args = ("--weights", weights, "--steps", 2, "--cg", 0)
    assert run(capsys, clip, *args)[0] == 0
    folder = clip.parent
    old = (folder / "clip.foley.wav").read_bytes()
    status, out, err = run(capsys, clip, *args, "--redo", "1-1.8", "--seed", 3, "--json")
    assert status == 0 and not err, err
    line = json.loads(out[0])
    assert line["redo"] == {
        "seconds": [[1.0, 1.8]],
        "of": str(folder / "clip.foley.wav"),
        "before": str(folder / "clip.foley.before.wav"),
    }
    assert (folder / "clip.foley.before.wav").read_bytes() == old
    before = samples_of(folder / "clip.foley.before.wav")
    after = samples_of(folder / "clip.foley.wav")
    first, last = changed(before, after)
    assert 1.0 <= first < 1.0 + FADE_IN / SAMPLE_RATE and 1.8 - FADE_OUT / SAMPLE_RATE < last < 1.8
    # new sound, and not a little of it
    inside = slice(SAMPLE_RATE, round(1.8 * SAMPLE_RATE))
    assert np.corrcoef(before[inside, 0], after[inside, 0])[0, 1] < 0.5
    # both files say it, and are still ours
    for name in ("clip.foley.wav", "clip.foley.mp4"):
        comment = media.read_tags(folder / name)["comment"]
        assert comment.startswith(watermark.CLAIM) and ", seed 0," in comment
        assert comment.endswith(", 1-1.8 s redone with seed 3")
    assert run(capsys, "--verify", folder / "clip.foley.wav")[0] == 0
    # the same again is kept; another seed is not, nor are other seconds
    redone = (clip, *args, "--redo", "1-1.8", "--seed", 3)
    status, out, err = run(capsys, *redone, "--json")
    assert status == 0 and not err and json.loads(out[0])["kept"]
    assert run(capsys, *redone)[1][0].endswith("kept (same settings; --overwrite draws it again)")
    assert (samples_of(folder / "clip.foley.wav") == after).all()
    assert not (folder / "clip.foley.before.2.wav").exists()
    # nobody needs the sound before
    (folder / "clip.foley.before.wav").unlink()
    # a later run leaves this work alone, whatever its settings
    status, out, err = run(capsys, clip, *args, "--seed", 5)
    assert status == 0 and not err and "kept (1-1.8 s of it were redone" in out[0]
    assert np.array_equal(samples_of(folder / "clip.foley.wav"), after)

    # the same seed, the same sound; of the output itself, under the same names
    again = tmp_path / "again"
    again.mkdir()
    (again / "clip.foley.wav").write_bytes(old)
    shutil.copy(folder / "clip.foley.mp4", again / "clip.foley.mp4")
    video = again / "clip.foley.mp4"
    status, out, err = run(capsys, video, *args, "--redo", "1-1.8", "--seed", 3)
    assert status == 0 and not err
    assert "redone: 1-1.8 s of" in out[0] and "clip.foley.before.wav" in out[0]
    names = ["clip.foley.before.wav", "clip.foley.mp4", "clip.foley.wav", "manifest.jsonl"]
    assert sorted(path.name for path in again.iterdir()) == names
    assert (again / "clip.foley.wav").read_bytes() == (folder / "clip.foley.wav").read_bytes()
    assert "kept" in run(capsys, video, *args, "--redo", "1-1.8", "--seed", 3)[1][0]
    # what was kept is never overwritten
    assert run(capsys, video, *args, "--redo", "0-0.5,2.5-3", "--seed", 4)[0] == 0
    assert (again / "clip.foley.before.wav").read_bytes() == old
    second = samples_of(again / "clip.foley.before.2.wav")
    first, last = changed(second, samples_of(again / "clip.foley.wav"))
    assert first < 0.01 and last > 2.99
    middle = slice(SAMPLE_RATE // 2, 5 * SAMPLE_RATE // 2)
    assert (second[middle] == samples_of(again / "clip.foley.wav")[middle]).all()


def test_an_output_that_was_redone_in_its_place_is_kept_for_its_video(capsys, clip, weights):
    """With a line on what it was drawn for, and without."""
    args = ("--weights", weights, "--steps", 2, "--cg", 0)
    assert run(capsys, clip, *args)[0] == 0
    video = clip.with_name("clip.foley.mp4")
    for known, seconds in ((True, "1-1.5"), (False, "2-2.5")):
        if not known:
            clip.with_name("manifest.jsonl").unlink()
        status, out, err = run(capsys, video, *args, "--redo", seconds, "--seed", 3)
        assert status == 0 and not err, err
        after = samples_of(clip.with_name("clip.foley.wav"))
        status, out, err = run(capsys, clip, *args)
        assert status == 0 and not err and f"kept ({seconds} s of it were redone" in out[0]
        assert np.array_equal(samples_of(clip.with_name("clip.foley.wav")), after)
        lines = clip.with_name("manifest.jsonl").read_text().splitlines()
        name = clip.name if known else video.name
        assert json.loads(lines[-1])["input"]["path"] == name


@pytest.mark.parametrize(
    "rate, channels, subtype",
    [(16000, 1, "PCM_16"), (48000, 2, "PCM_24"), (48000, 2, "PCM_16"), (44100, 1, "FLOAT")],
)
def test_rate_channels_and_format_stay(models, clip, tmp_path, rate, channels, subtype):
    wav = np.stack([bursts(3, rate), -0.5 * bursts(3, rate)][:channels], 1)
    soundfile.write(tmp_path / "clip.foley.wav", wav, rate, subtype=subtype)
    settings = Settings(steps=2, cg=0, redo=((1.0, 1.5), (2.0, 2.4)))
    result = sample.generate(clip, models, settings=settings)
    result.save(tmp_path / "new.wav")
    info = soundfile.info(tmp_path / "new.wav")
    assert (info.samplerate, info.channels, info.subtype) == (rate, channels, subtype)
    old = soundfile.read(tmp_path / "clip.foley.wav", dtype="float64", always_2d=True)[0]
    new = soundfile.read(tmp_path / "new.wav", dtype="float64", always_2d=True)[0]
    times = np.arange(len(new)) / rate
    inside = ((times >= 1) & (times < 1.5)) | ((times >= 2) & (times < 2.4))
    assert (old[~inside] == new[~inside]).all()
    assert (old[inside] != new[inside]).mean() > 0.9
    # for programs it is mono at 16 kHz
    assert result.wav.shape == (3 * SAMPLE_RATE,) and result.wav.dtype == torch.float32


def test_candidates_differ_in_the_stretch_alone(models, clip, tmp_path):
    soundfile.write(tmp_path / "clip.foley.wav", bursts(3), SAMPLE_RATE)
    settings = Settings(steps=2, cg=0, candidates=2, keep_all=True, redo=((1.0, 1.5),))
    result = sample.generate(clip, models, settings=settings)
    assert len(result.scores) == 2 and result.best == int(np.argmax(result.scores))
    one, two = (result.redo.sounds[k].samples for k in range(2))
    first, last = changed(one, two)
    assert first >= 1.0 and last < 1.5
    assert torch.equal(result.wav, result.wavs[result.best])


# ------------------------------------------------------------------------------------------------
# which sound, and at what level


def test_without_an_output_it_is_the_clips_own_sound(capsys, clip, weights, tmp_path):
    args = ("--weights", weights, "--steps", 2, "--cg", 0, "--redo", "1-1.8", "--json")
    status, out, err = run(capsys, clip, *args, "--out", tmp_path / "out")
    assert status == 0 and not err
    line = json.loads(out[0])
    assert line["redo"] == {"seconds": [[1.0, 1.8]], "of": str(clip), "before": None}
    # in stereo and at 48 kHz, as films have it
    own = media.read_audio(clip, 0, 3, 48000, 2).numpy().clip(-1, 1)
    new, rate = soundfile.read(tmp_path / "out" / "clip.foley.wav")
    assert rate == 48000 and np.abs(own - new)[:48000].max() < 1e-6
    # only the stretch is marked, so the tag is what tells
    comment = media.read_tags(tmp_path / "out" / "clip.foley.mp4")["comment"]
    assert comment.endswith("1-1.8 s alone; the rest is the sound of clip.mp4")
    assert run(capsys, "--verify", tmp_path / "out" / "clip.foley.mp4")[0] == 0


def test_the_sound_that_is_found(clip, tmp_path):
    assert redo.find_sound(clip) == clip
    # a renamed output has its wav beside it
    result = SimpleSound(tmp_path)
    final = result.write("final.mp4", clip)
    assert redo.find_sound(final) == final
    soundfile.write(tmp_path / "final.wav", bursts(3), SAMPLE_RATE)
    assert redo.find_sound(final) == tmp_path / "final.wav"
    # any other clip's wav beside it is something else
    soundfile.write(tmp_path / "clip.wav", bursts(3), SAMPLE_RATE)
    assert redo.find_sound(clip) == clip
    soundfile.write(tmp_path / "clip.foley.wav", bursts(3), SAMPLE_RATE)
    assert redo.find_sound(clip) == tmp_path / "clip.foley.wav"
    (tmp_path / "out").mkdir()
    soundfile.write(tmp_path / "out" / "clip.foley.wav", bursts(3), SAMPLE_RATE)
    assert redo.find_sound(clip, tmp_path / "out") == tmp_path / "out" / "clip.foley.wav"
    silent = make_video(tmp_path / "silent.mp4", 1)
    with pytest.raises(UserError, match=r"no silent\.foley\.wav is there; leave --redo out"):
        redo.find_sound(silent)
    # of --format flac, once that is the newer
    soundfile.write(tmp_path / "clip.foley.flac", bursts(3), SAMPLE_RATE)
    assert redo.find_sound(clip) == tmp_path / "clip.foley.flac"


def test_a_flac_output_is_redone_sample_for_sample(capsys, clip, weights):
    args = (clip, "--weights", weights, "--steps", 2, "--cg", 0, "--format", "flac")
    assert run(capsys, *args)[0] == 0
    status, out, err = run(capsys, *args, "--redo", "1-1.8")
    assert status == 0 and not err and "of " + str(clip.with_name("clip.foley.flac")) in out[0]
    before = samples_of(clip.with_name("clip.foley.before.flac"))
    first, last = changed(before, samples_of(clip.with_name("clip.foley.flac")))
    assert first >= 1.0 and last < 1.8


def test_a_stem_is_not_redone_in_place_of_the_mix(capsys, clip, weights):
    args = (clip, "--weights", weights, "--steps", 2, "--cg", 0)
    assert run(capsys, *args, "--keep-audio", "--stems")[0] == 0
    before = clip.with_name("clip.foley.mp4").read_bytes()
    status, out, err = run(capsys, *args, "--redo", "1-1.8")
    assert status == 1 and not out and len(err) == 1 and "clip.mix.wav over it" in err[0]
    assert clip.with_name("clip.foley.mp4").read_bytes() == before
    # what it says works; the rest is the clip's own still, and the tag says so
    clip.with_name("clip.mix.wav").replace(clip.with_name("clip.foley.wav"))
    assert run(capsys, *args, "--redo", "1-1.8")[0] == 0
    for _ in range(2):
        comment = media.read_tags(clip.with_name("clip.foley.wav"))["comment"]
        assert "compositeWithTrainedAlgorithmicMedia" in comment
        assert run(capsys, *args, "--redo", "2-2.5")[0] == 0


def test_stems_of_an_earlier_run_do_not_keep_its_successor_from_being_redone(capsys, clip, weights):
    args = (clip, "--weights", weights, "--steps", 2, "--cg", 0)
    assert run(capsys, *args, "--keep-audio", "--stems")[0] == 0
    assert run(capsys, *args)[0] == 0 and clip.with_name("clip.mix.wav").exists()
    status, out, err = run(capsys, *args, "--redo", "1-1.8")
    assert status == 0 and not err and "of " + str(clip.with_name("clip.foley.wav")) in out[0]
    # of a run that nobody knows it stays refused
    clip.with_name("manifest.jsonl").unlink()
    status, out, err = run(capsys, *args, "--redo", "0.2-0.8", "--overwrite")
    assert status == 1 and not out and "clip.mix.wav over it" in err[0]


class SimpleSound:
    """Writes videos that are tagged as ours."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, source):
        wav = torch.from_numpy(bursts(3))
        media.write_video(source, wav, self.folder / name, {"comment": f"{watermark.CLAIM} tiny"})
        return self.folder / name


def test_a_gain_of_the_sound_is_undone_and_given_again(models, clip, tmp_path):
    """A sound that was made louder as a whole is redone as before that, and as much louder."""
    levels = {}
    for gain in (0.0, -12.0):
        file = tmp_path / "clip.foley.wav"
        wav = bursts(3) * np.float32(10 ** (gain / 20))
        with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, "FLOAT", format="WAV") as out:
            told = f", gain {gain:+.1f} dB" if gain else ""
            out.comment = f"{watermark.CLAIM} tiny, seed 0{told}"
            out.write(wav)
        settings = Settings(steps=2, cg=0, redo=((1.0, 2.0),))
        result = sample.generate(clip, models, settings=settings)
        assert result.redo.gain == gain
        assert np.allclose(result.redo.wav[: 3 * SAMPLE_RATE].numpy(), bursts(3), atol=1e-4)
        levels[gain] = (
            result.wav[SAMPLE_RATE + FADE_IN : 2 * SAMPLE_RATE - FADE_OUT].square().mean()
        )
        assert ("gain" in result.tags["comment"]) == bool(gain)
    assert 10 * math.log10(levels[0.0] / levels[-12.0]) == pytest.approx(12, abs=1)


def test_the_clips_own_sound_is_mixed_into_the_stretch(models, clip, tmp_path):
    soundfile.write(tmp_path / "clip.foley.wav", np.zeros(3 * SAMPLE_RATE), SAMPLE_RATE)
    settings = Settings(steps=2, cg=0, redo=((1.0, 2.0),))
    new = sample.generate(clip, models, settings=settings, mark=False).wav
    mixed = sample.generate(clip, models, settings=replace(settings, keep_audio=-6), mark=False).wav
    own = media.read_audio(clip, 0, 3) * 10 ** (-6 / 20)
    inner = slice(SAMPLE_RATE + FADE_IN, 2 * SAMPLE_RATE - FADE_OUT)
    loudest = (new + own)[inner].abs().max()
    assert loudest > 1 or torch.allclose(mixed[inner], (new + own)[inner], atol=1e-4)
    assert not mixed[:SAMPLE_RATE].any() and not mixed[2 * SAMPLE_RATE :].any()


# ------------------------------------------------------------------------------------------------
# parts


@pytest.mark.parametrize("fps", [15.625, 4.0, 25.0])
def test_windows_hold_their_stretches_and_what_is_around(fps):
    grid = sample.window_grid(fps)
    for seconds in (2.0, 8.192, 20.0, 100.0):
        samples = round(seconds * SAMPLE_RATE)
        last = sample.plan_windows(samples, fps)[-1]
        for a, b in ((0.0, 0.5), (0.3, 0.9), (0.45, 0.55), (0.0, 1.0), (0.9, 1.0)):
            span = (round(a * samples), round(b * samples))
            starts = redo.place_windows([span], samples, fps, sample.plan_windows, grid)
            assert all(start % grid == 0 for start in starts)
            assert starts[0] >= 0 and starts[-1] <= last
            # context on both sides, but for half a step of the grid
            around = redo.CONTEXT - grid // 2
            assert starts[0] <= max(0, span[0] - around)
            assert starts[-1] + WINDOW >= min(samples, span[1] + around)
            assert all(b - a < WINDOW for a, b in pairwise(starts))
            assert len(starts) == 1 or span[1] - span[0] > WINDOW - 2 * redo.CONTEXT
    # several stretches of one window take one
    starts = redo.place_windows(
        [(80000, 90000), (80001, 90001)], 16000 * 60, fps, sample.plan_windows, grid
    )
    assert len(starts) == 1


def test_latents_outside_are_those_of_the_sound(models, clip, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "clip.foley.wav", bursts(3), SAMPLE_RATE, subtype="FLOAT")
    decoded = []
    decode = LDM.decode
    monkeypatch.setattr(LDM, "decode", lambda self, z: decoded.append(z) or decode(self, z))
    settings = Settings(steps=3, cg=0, redo=((1.0, 1.5),))
    sample.generate(clip, models, settings=settings)
    wav = torch.zeros(WINDOW)
    wav[: 3 * SAMPLE_RATE] = torch.from_numpy(bursts(3))
    with torch.no_grad():
        z = LATENT_SCALE * models.ldm.vae.encode(audio.mel(wav)[None, None])[0]
    # columns of 0.128 s that lie wholly outside of the stretch and begin before the sound's end
    same = (decoded[0] - z).abs().amax((0, 1, 2)) < 1e-3
    middles = 0.128 * torch.arange(64)
    assert same[(middles < 0.87) | ((middles > 1.51) & (middles < 2.99))].all()
    assert not same[(middles > 0.9) & (middles < 1.5)].any() and not same[middles > 3.0].any()


@pytest.mark.parametrize("kind", ["int16", "int32", "float32"])
def test_samples_are_replaced_within_the_fades_alone(kind):
    scale = 1 if kind == "float32" else np.iinfo(kind).max
    old = (np.random.default_rng(0).uniform(-1, 1, (SAMPLE_RATE, 2)) * scale).astype(kind)
    new = torch.full((SAMPLE_RATE,), 2.0)  # too loud: at full scale
    result = Sound(old).replaced(new, 4000, 14000).samples
    assert result.dtype == old.dtype
    assert (result[:4000] == old[:4000]).all() and (result[14000:] == old[14000:]).all()
    # no louder than all that we make
    inner = result[4000 + FADE_IN : 14000 - FADE_OUT].astype(float) / scale
    assert np.ptp(inner) < 1e-4 and -1.3 < 20 * math.log10(inner.mean()) < -1.09
    # of a short stretch a third is new alone
    short = Sound(old).replaced(new, 4000, 4900).samples[4300:4600].astype(float) / scale
    assert np.ptp(short) < 1e-4
    # a stretch at the sound's ends needs no fade there
    assert np.ptp(Sound(old).replaced(new, 0, SAMPLE_RATE).samples / scale) < 1e-4


def test_new_sound_fits_to_the_phases_around_it():
    """A hole in a tone is filled with the tone itself, where its spectrogram says so."""
    t = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.3 * (2 * math.pi * 440 * t).sin()
    a, b = 15000, 17000
    holed = tone.clone()
    holed[a + 670 : b - 670] = 0  # all but the fades of so short a stretch
    filled = redo.fill(holed, audio.mel(tone), a, b)
    assert torch.equal(filled[:a], tone[:a]) and torch.equal(filled[b:], tone[b:])
    similar = torch.corrcoef(torch.stack([filled[a:b], tone[a:b]]))[0, 1]
    assert similar > 0.9
    # which by chance it is not
    alone = audio.vocode(audio.mel(tone))
    assert torch.corrcoef(torch.stack([alone[a:b], tone[a:b]]))[0, 1] < 0.9


def test_the_sampler_fills_in_what_fits_to_what_is_known():
    """Of data on a line, all columns equal, one half tells the other."""
    batch = torch.randn(2, 4, 16, 64)
    z = torch.full_like(batch, 1.5)
    known = torch.arange(64) < 32

    def eps_fn(x, t):
        # the best guess of data whose columns are all the same N(0, 1) number
        alpha = log_alpha(t).exp().to(x)[:, None, None, None]
        noise = sigma(t).to(x)[:, None, None, None]
        mean = x.mean(3, keepdim=True)
        guess = alpha * mean / (alpha**2 + noise**2 / 64)
        return (x - alpha * guess) / noise

    filled = redo.repaint(fill_in(eps_fn, z, known), batch, 25)
    once = SAMPLERS["ddim"](fill_in(eps_fn, z, known), batch, 25)
    errors = [(x - z)[..., 32:].abs().mean() for x in (filled, once)]
    assert errors[0] < 0.7 * errors[1]
    # a window's sound does not depend on the batch it is in
    alone = redo.repaint(fill_in(eps_fn, z[1:], known), batch[1:], 25)
    assert torch.allclose(alone, filled[1:], atol=1e-5)


# ------------------------------------------------------------------------------------------------
# nonsense


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--redo", "9-3"), "--redo 9-3: give the earlier second first"),
        (("--redo", "1-1"), "give the earlier second first"),
        (("--redo", "1-1.01"), "is shorter than 0.1 s"),
        (("--redo", "1-2,1.5-2.5"), "--redo 1-2,1.5-2.5: these overlap"),
        (("--redo", "2.5-3.5"), "--redo 2.5-3.5: goes beyond the end of"),
        (("--redo", "30-31"), "goes beyond the end of"),
        (("--redo", "soon"), "--redo: "),
        (("--redo", ""), "--redo: "),
        (("--redo", "1-2", "--start", "1"), "leave --start and --duration out"),
        (("--redo", "1-2", "--duration", "1"), "leave --start and --duration out"),
        (("--redo", "1-2", "--as-official"), "leave --as-official out"),
        (("--redo", "1-2", "--write-onsets"), "leave --write-onsets out"),
    ],
)
def test_nonsense_is_one_line_before_any_work(capsys, clip, weights, monkeypatch, flags, message):
    monkeypatch.setattr(sample, "load_models", None)
    before = sorted(clip.parent.iterdir())
    status, out, err = run(capsys, clip, "--weights", weights, *flags)
    assert status == 2 and not out and len(err) == 1 and message in err[0], err
    assert sorted(clip.parent.iterdir()) == before


def test_what_cannot_be_redone_is_one_line(capsys, clip, weights, models, tmp_path):
    args = ("--weights", weights, "--redo", "1-2", "--steps", 2)
    for inputs in ((tmp_path,), (clip, clip), (tmp_path / "*.mp4",), ("@list.txt",)):
        status, _, err = run(capsys, *inputs, *args)
        assert status == 2 and len(err) == 1 and "one clip at a time; give one video" in err[0]
    status, _, err = run(capsys, tmp_path / "nowhere.mp4", *args)
    assert status == 1 and len(err) == 1
    # the wav of a part
    soundfile.write(tmp_path / "clip.foley.wav", bursts(2), SAMPLE_RATE)
    status, _, err = run(capsys, clip, *args)
    assert status == 1 and len(err) == 1 and "2.00 s of sound for 3.00 s of picture" in err[0]
    (tmp_path / "clip.foley.wav").write_text("no sound")
    status, _, err = run(capsys, clip, *args)
    assert status == 1 and len(err) == 1 and "clip.foley.wav" in err[0]
    assert (tmp_path / "clip.foley.wav").read_text() == "no sound"


def test_a_programs_nonsense_is_one_line_too(models, clip):
    for bad in (((3.0, 1.0),), ((1.0, math.nan),), (1.0, 2.0), "1-2", ((-1.0, 2.0),)):
        with pytest.raises(ValueError, match="redo") as caught:
            Settings(redo=bad)
        assert "\n" not in str(caught.value)
    settings = Settings(redo=((1.0, 2.0),), steps=2, cg=0)
    with pytest.raises(ValueError, match="leave --start and --duration out"):
        sample.generate(clip, models, settings=settings, start=0.5)
    bare = LDM(LDMConfig(**tiny.TIME, unet=tiny.UNET, vae=models.ldm.config.vae)).eval()
    del bare.vae.encoder
    with pytest.raises(ValueError, match=r"load_models\(encoder=True\)"):
        sample.generate(clip, replace(models, ldm=bare), settings=settings)


# ------------------------------------------------------------------------------------------------
# the shipped model


def flux(wav):
    """Spectral flux (s,) of a sound (n,), a number every 4 ms, of frames of 16 ms."""
    window = torch.hann_window(256)
    spectrum = torch.stft(wav, 256, 64, window=window, return_complex=True).abs()
    return (20 * (spectrum + 1e-4).log10()).diff(dim=1).clamp_min(0).mean(0)


def test_the_joints_of_the_shipped_model_are_no_clicks():
    """The flux near a joint is not above what is usual in the same sound."""
    models = sample.load_models("mini", device="cpu", encoder=True)
    settings = Settings(redo=((1.3, 2.2), (3.1, 4.0), (5.2, 6.3)), steps=10)
    result = sample.generate(ROOT / "demo.mp4", models, settings=settings)
    strength = flux(result.wav)
    near = [
        strength[round(t * 250) - 6 : round(t * 250) + 7].max()
        for t in np.array(settings.redo).flatten()
    ]
    usual = strength.unfold(0, 13, 1).amax(1)
    assert sorted(near)[len(near) // 2] <= usual.quantile(0.9)
    assert max(near) <= 1.2 * usual.max()
