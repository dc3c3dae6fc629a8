"""Level, mix, stems, rate, layout and format: what the files hold, and that mistakes are one line.

Sounds here are bursts of noise that nobody generated, in a real `sample.Result`; the last tests run
sample.py with tiny random networks.
"""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from clips import make, make_video, steady
from main_job import run

import evaluate
import sample
from common import audio, ffmpeg, media, watermark
from common.audio import SAMPLE_RATE
from common.onsets import Hit
from common.profiling import Profile
from common.resample import blocks_of, downsample
from film import level, loudness, mix
from film.loudness import measure
from film.outputs import write_outputs
from sample import Settings

SECONDS = 4
HITS = (1.0, 2.5)
FLAGS = {"format": None, "stems": False, "keep_all": False, "keep_tracks": False, "plot": False}
FLAGS |= {"write_onsets": False, "verbose": False, "seed": 0, "signer": None}
TAGS = {"comment": f"{watermark.CLAIM} tiny, seed 0"}


def bursts(peak=0.3, decay=0.05, times=HITS, seconds=SECONDS):
    """Noise up to 7.6 kHz that begins at these seconds and dies away: (n,) at 16 kHz."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((round(3 * seconds * SAMPLE_RATE), 1)).astype("f4")
    noise = torch.from_numpy(downsample(noise, 3)[:, 0].copy())
    wav = torch.zeros(len(noise))
    for time in times:
        at = round(time * SAMPLE_RATE)
        t = torch.arange(len(wav) - at) / SAMPLE_RATE
        wav[at:] += noise[: len(t)] * torch.exp(-t / decay)
    return peak * wav / wav.abs().max()


def result_of(wav, source, mark=True, **settings):
    """A Result as `sample.make_result` makes it of one candidate."""
    settings = Settings(**settings)
    wavs = {0: sample.add_watermark(wav) if mark else wav}
    levels = level.apply(wavs, settings)
    return sample.Result(
        wav=wavs[0],
        wavs=wavs,
        scores=[None],
        best=0,
        spectrogram=audio.mel(wav),
        starts=[0],
        seconds=len(wav) / SAMPLE_RATE,
        source=source,
        start=0.0,
        duration=None,
        profile=Profile(),
        tags=TAGS,
        sound_tags=TAGS,
        marked=mark,
        hits=[Hit(time) for time in HITS],
        settings=settings,
        levels=levels,
    )


def written(result, folder, **flags):
    """All files of a result -> --json's line."""
    return write_outputs(result, folder / "clip.foley", Namespace(**(FLAGS | flags)))


def read(path, rate=SAMPLE_RATE, channels=1):
    return media.read_audio(path, 0.0, None, rate, channels).numpy()


def track(path):
    """(codec, rate, channels) of a file's first sound track."""
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        return stream.codec_context.name, stream.rate, stream.channels


def tagged_gain(path):
    found = re.search(r"gain ([+-]\d+\.\d+) dB", media.read_tags(path)["comment"])
    return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four seconds with a 1 kHz tone on the left and a 10 kHz tone on the right."""
    t = np.arange(SECONDS * 48000) / 48000
    wav = np.stack([0.2 * np.sin(2 * np.pi * 1000 * t), 0.1 * np.sin(2 * np.pi * 10000 * t)])
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return make(path, steady(25, SECONDS), wav=wav.astype("f4"), rate=48000, layout="stereo")


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("silent") / "clip.mp4", SECONDS, 10)


# ---- level -------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak, lufs", [(-15, -45), (-42, -33)])
def test_a_gain_that_moves_blocks_through_the_gate_is_measured_again(peak, lufs):
    """A loud second, three that are 16 dB below it, and a long quiet one near -70 LUFS."""
    t = torch.arange(16 * SAMPLE_RATE) / SAMPLE_RATE
    decibels = torch.full_like(t, -33.0)
    decibels[: 4 * SAMPLE_RATE] = -16
    decibels[:SAMPLE_RATE] = 0
    wav = 10 ** ((peak + decibels) / 20) * torch.sin(2 * torch.pi * 1000 * t)
    applied = level.apply_one(wav, Settings(lufs=lufs))
    assert measure(blocks_of(wav.numpy()), SAMPLE_RATE).loudness == pytest.approx(lufs, abs=0.1)
    assert applied.level.loudness == pytest.approx(lufs, abs=0.1)


@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_a_steady_sound_gets_the_loudness_that_is_asked_for(silent, tmp_path, layout):
    steady_noise = 0.05 * torch.randn(64000, generator=torch.Generator().manual_seed(0))
    for lufs in (-23.0, -30.0):
        line = written(result_of(steady_noise, silent, lufs=lufs, layout=layout), tmp_path)
        channels = {"mono": 1, "stereo": 2}[layout]
        wav = read(line["wav"], channels=channels)
        assert abs(measure(blocks_of(wav), SAMPLE_RATE).loudness - lufs) < 0.1
        assert abs(line["lufs"] - lufs) < 0.1


def test_the_gain_is_one_constant_and_in_the_tags(silent, tmp_path):
    wav = 0.02 * torch.randn(64000, generator=torch.Generator().manual_seed(0))
    result = result_of(wav, silent)
    line = written(result, tmp_path)
    assert result.gain > 3 and line["gain"] == pytest.approx(result.gain)
    for path in (line["wav"], line["output"]):
        assert tagged_gain(path) == pytest.approx(result.gain, abs=1e-6)
        assert media.read_tags(path)["comment"].startswith(watermark.CLAIM)
    undone = read(line["wav"]) / 10 ** (result.gain / 20)
    assert np.abs(undone - sample.add_watermark(wav).numpy()).max() < 1e-4


def test_hits_stop_at_the_ceiling_and_say_so(silent, tmp_path, capsys):
    result = result_of(bursts(0.5, 0.02), silent)
    line = written(result, tmp_path, verbose=True)
    found = measure(blocks_of(read(line["wav"])), SAMPLE_RATE)
    assert found.loudness < -24 and -1.2 < found.true_peak <= level.CEILING
    err = capsys.readouterr().err
    assert "LUFS instead of -23: its true peak" in err and len(err.splitlines()) == 1


def test_a_faint_sound_stops_at_the_largest_gain_and_says_so(silent, tmp_path, capsys):
    written(result_of(0.001 * torch.randn(64000), silent), tmp_path, verbose=True)
    err = capsys.readouterr().err
    assert err.endswith("LUFS instead of -23: a gain of +20 dB is the most\n")


def test_silence_and_faint_sounds(silent):
    assert result_of(torch.zeros(16000), silent).gain == 0
    faint = result_of(0.001 * torch.randn(64000), silent)
    assert faint.gain == level.MOST_BOOST
    assert result_of(1e-5 * torch.randn(64000), silent).gain == 0  # below the absolute gate


def test_off_leaves_the_level_of_the_model(silent, tmp_path):
    wav = bursts(0.3)
    result = result_of(wav, silent, lufs=None)
    assert result.gain == 0 and torch.equal(result.wav, sample.add_watermark(wav))
    line = written(result, tmp_path)
    assert "gain" not in media.read_tags(line["wav"])["comment"]
    assert np.abs(read(line["wav"]) - result.wav.numpy()).max() < 1e-4
    # but what is written stays under the ceiling
    line = written(result_of(bursts(1.0), silent, lufs=None), tmp_path)
    assert measure(blocks_of(read(line["wav"])), SAMPLE_RATE).true_peak <= level.CEILING
    assert line["gain"] < 0 and tagged_gain(line["output"]) == pytest.approx(line["gain"])


def test_the_table_measures_the_models_own_level_unless_it_is_asked_for_another(tmp_path):
    command = ["--data", str(tmp_path)]
    assert evaluate.settings_of(evaluate.arguments(command)).lufs is None
    assert evaluate.settings_of(evaluate.arguments([*command, "--lufs", "-23"])).lufs == -23
    with pytest.raises(SystemExit):
        evaluate.arguments([*command, "--lufs", "-23", "--samples", str(tmp_path)])


def test_the_official_demos_sound_is_left_alone(silent, tmp_path):
    wav = bursts(1.0)
    result = result_of(wav, silent, mark=False, as_official=True)
    line = written(result, tmp_path)
    assert torch.equal(result.wav, wav) and line["gain"] == 0
    assert np.abs(read(line["wav"]) - wav.numpy()).max() < 1e-4


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("form", [(16000, "mono"), (48000, "stereo")], ids=["16k", "48k"])
def test_nothing_that_is_played_has_a_true_peak_above_the_ceiling(silent, tmp_path, suffix, form):
    """Square waves and short noise: what codecs overshoot on."""
    rate, layout = form
    square = torch.sign(torch.sin(2 * math.pi * 330 * torch.arange(16000) / 16000))
    for wav in (bursts(0.9, 0.01, seconds=3), torch.cat([square * 0.9, bursts(0.9, 0.3)])):
        line = written(result_of(wav, silent, lufs=-5.0, rate=rate, layout=layout), tmp_path,
                       format=suffix)  # fmt: skip
        with av.open(line["output"]) as file:
            stream = file.streams.audio[0]
            to_float = av.AudioResampler("flt", stream.layout.name, stream.rate)
            parts = [p for frame in file.decode(stream) for p in to_float.resample(frame)]
            wavs = [part.to_ndarray().reshape(-1, stream.channels) for part in parts]
            found = measure(wavs, stream.rate).true_peak
        assert -3 < found <= level.CEILING
        assert tagged_gain(line["output"]) <= tagged_gain(line["wav"])


# ---- rate, layout, format ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix, codec", [("mp4", "aac"), ("mkv", "flac"), ("webm", "opus")])
def test_rate_and_layout_of_tracks_and_sounds(silent, tmp_path, suffix, codec):
    result = result_of(bursts(), silent, rate=48000, layout="stereo")
    line = written(result, tmp_path, format=suffix)
    assert line["output"].endswith(f"clip.foley.{suffix}")
    assert track(line["output"]) == (codec, 48000, 2)
    info = soundfile.info(line["wav"])
    assert (info.samplerate, info.channels, info.subtype) == (48000, 2, "PCM_24")
    assert info.frames == SECONDS * 48000
    wav = read(line["wav"], 48000, 2)
    assert np.array_equal(wav[:, 0], wav[:, 1])
    # the same sound, in time, and marked
    low = read(line["wav"])
    assert np.linalg.norm(low - result.wav.numpy()) < 0.1 * np.linalg.norm(low)
    assert watermark.confidence(torch.from_numpy(low)) > 0.5


@pytest.mark.parametrize("form", ["wav", "flac"])
def test_sound_alone(silent, tmp_path, form):
    line = written(result_of(bursts(), silent), tmp_path, format=form)
    assert line["output"] == line["wav"] == str(tmp_path / f"clip.foley.{form}")
    assert [path.name for path in tmp_path.iterdir()] == [f"clip.foley.{form}"]
    assert media.read_tags(line["wav"])["comment"].startswith(watermark.CLAIM)
    assert soundfile.info(line["wav"]).subtype == "PCM_16"
    assert len(read(line["wav"])) == SECONDS * SAMPLE_RATE


def test_a_picture_that_no_player_expects_there_is_encoded_anew(tmp_path):
    with av.open(str(tmp_path / "a.gif"), "w") as file:
        video = file.add_stream("gif", rate=10, options={})
        video.width, video.height, video.pix_fmt = 32, 32, "rgb8"
        for k in range(10):
            image = np.full((32, 32, 3), 20 * k, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(video.encode(None))
    result = result_of(bursts(times=(0.5,), seconds=1), tmp_path / "a.gif")
    with pytest.warns(UserWarning, match="encoded anew"):
        line = written(result, tmp_path, format="mkv")
    with av.open(line["output"]) as file:
        assert file.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize(
    "layout, expected",
    [
        ("mono", [[1, 1]]),
        ("stereo", [[1, 0], [0, 1]]),
        ("5.1", [[1, 0], [0, 1], [0.71, 0.71], [0, 0], [0.71, 0], [0, 0.71]]),
        ("6.1", [[1, 0], [0, 1], [0.71, 0.71], [0, 0], [0.5, 0.5], [0.71, 0], [0, 0.71]]),
    ],
)
def test_every_channel_stays_on_its_side(layout, expected):
    """ITU-R BS.775; what is heard on neither side is the LFE."""
    layout = av.AudioLayout(layout)
    weights = ffmpeg.stereo_weights(layout)
    assert np.allclose(weights, expected, atol=0.01)
    assert np.allclose(weights.mean(1), ffmpeg.downmix_weights(layout))


def test_a_result_saves_flac(silent, tmp_path):
    result_of(bursts(), silent).save(tmp_path / "a.flac")
    assert track(tmp_path / "a.flac") == ("flac", 16000, 1)


# ---- the clip's own sound ----------------------------------------------------------------------


def tone(wav, hz, rate=48000):
    """Amplitude of a tone in a sound (n,)."""
    wave = np.exp(-2j * np.pi * hz * np.arange(len(wav)) / rate)
    return abs((wav * wave).mean()) * 2


def test_own_sound_keeps_its_sides_and_what_lies_above_8_khz(clip, tmp_path):
    result = result_of(bursts(0.3), clip, keep_audio=-6.0, rate=48000, layout="stereo")
    line = written(result, tmp_path, stems=True)
    own = read(tmp_path / "clip.own.wav", 48000, 2)
    both = read(tmp_path / "clip.mix.wav", 48000, 2)
    alone = read(line["wav"], 48000, 2)
    assert len(own) == len(both) == len(alone) == SECONDS * 48000
    trim = 10 ** ((line["gain"] - result.gain) / 20)
    for side, hz, size in ((0, 1000, 0.2), (1, 10000, 0.1)):
        assert tone(own[:, side], hz) == pytest.approx(size, rel=0.05)
        assert tone(own[:, 1 - side], hz) < 0.02 * size
        # the mark raises and lowers bands around 1 kHz by 1 dB
        assert tone(both[:, side], hz) == pytest.approx(trim * size / 2, rel=0.1)
    # mono is their mean, at the rate that is wanted
    mono = media.read_audio(clip, 0.0, 4.0, 48000, 1).numpy()
    assert np.abs(mono - own.mean(1)).max() < 1e-4


def test_stems_add_up_and_only_ours_are_marked(clip, tmp_path):
    # nothing is scaled here, so that the sum can be seen
    result = result_of(bursts(0.2), clip, keep_audio=0.0, lufs=None)
    line = written(result, tmp_path, stems=True)
    own, both, alone = (
        read(path) for path in (tmp_path / "clip.own.wav", tmp_path / "clip.mix.wav", line["wav"])
    )
    kept = watermark.mark(torch.from_numpy(own)).numpy()
    assert line["gain"] == 0 and np.abs(both - alone - kept).max() < 3e-4
    assert np.abs(own - media.read_audio(clip, 0.0, 4.0).numpy()).max() < 1e-4
    sound = read(line["output"])[: len(both)]
    assert np.linalg.norm(sound - both) < 0.1 * np.linalg.norm(both)  # the codec's noise
    for name, is_ours in (("mix", True), ("own", False), ("foley", True)):
        verdict = watermark.check(tmp_path / f"clip.{name}.wav")
        assert verdict.has_tag == is_ours
        assert verdict.is_ours == is_ours


def test_the_mark_of_own_sound_is_the_mark_of_all(clip, tmp_path):
    """At 48 kHz it is found at 16 kHz, piece by piece, and is what `watermark.mark` adds."""
    rng = np.random.default_rng(0)
    low = rng.standard_normal(20 * SAMPLE_RATE).astype("f4") * 0.1
    assert low.size > watermark.SPAN
    expected = watermark.mark(torch.from_numpy(low)).numpy()
    same = np.concatenate(list(mix.marked(blocks_of(low), 1)))[:, 0]
    assert np.abs(same - expected).max() < 1e-5
    fine = np.concatenate(list(mix.upsample(blocks_of(low), 3)))
    marked = np.concatenate(list(mix.marked(blocks_of(fine), 3)))
    change = mix.downsample(marked - fine, 3)[:, 0] - (expected - low)
    middle = slice(2000, -2000)
    assert np.linalg.norm(change[middle]) < 0.1 * np.linalg.norm((expected - low)[middle])


def test_no_own_sound_is_said_and_the_rest_is_done(silent, tmp_path):
    result = result_of(bursts(), silent, keep_audio=0.0)
    with pytest.warns(UserWarning, match="no sound of its own"):
        line = written(result, tmp_path, stems=True)
    names = ["clip.foley.mp4", "clip.foley.wav", "clip.mix.wav"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert np.array_equal(read(line["wav"]), read(tmp_path / "clip.mix.wav"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_words():
    with pytest.raises(OSError, match="No space left") as caught:
        mix.write_blocks("/dev/full", [np.zeros((100000, 1), "f4")])
    assert caught.value.strerror


def test_a_loud_mix_keeps_to_the_ceiling(tmp_path):
    loud = 0.95 * np.sign(np.sin(2 * np.pi * 200 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE))
    clip = make_video(tmp_path / "loud.mp4", 2, 10, sound=loud)
    result = result_of(bursts(0.9, seconds=2, times=(0.5,)), clip, keep_audio=6.0)
    line = written(result, tmp_path, format="wav")
    assert measure(blocks_of(read(line["wav"])), SAMPLE_RATE).true_peak <= level.CEILING
    assert line["gain"] < result.gain


# ---- ducking -----------------------------------------------------------------------------------


def test_own_sound_goes_down_before_each_hit_and_comes_back(clip, tmp_path):
    quiet = 1e-3 * bursts(0.3, 0.03)  # next to nothing, so that the mix is the own sound
    form = {"lufs": None, "rate": 48000, "layout": "stereo"}
    result = result_of(quiet, clip, keep_audio=0.0, duck=-12.0, **form)
    line = written(result, tmp_path, format="wav")
    wav = read(line["wav"], 48000, 2)[:, 1]  # 10 kHz: where the mark changes nothing

    def at(second):
        return 20 * math.log10(tone(wav[round((second - 0.01) * 48000) :][:960], 10000) / 0.1)

    for hit in HITS:
        assert abs(at(hit - 0.07)) < 0.5
        assert abs(at(hit + 0.01) + 12) < 0.7 and abs(at(hit + 0.05) + 12) < 0.7
        assert abs(at(hit + 0.8)) < 0.5
    # no click: between one millisecond and the next the gain moves by under a decibel
    pieces = wav[: len(wav) // 48 * 48].reshape(-1, 48)
    size = 20 * np.log10(np.sqrt(np.square(pieces).mean(1)))[200:-200]
    assert np.abs(np.diff(size)).max() < 1.0


def test_the_curve_follows_the_sound_where_nobody_named_a_hit():
    curve = mix.duck_curve(bursts(0.3, 0.05).numpy(), [])
    at = {time: curve[round(time * SAMPLE_RATE / mix.STEP)] for time in (0.5, 1.0, 1.05, 1.9, 2.5)}
    assert at[0.5] == 0 and at[1.9] == 0 and at[1.0] == at[1.05] == at[2.5] == 1
    assert np.abs(np.diff(curve)).max() < 0.25
    # silence and a sound without end; hits outside are no mistake
    assert not mix.duck_curve(np.zeros(16000, "f4"), []).any()
    assert mix.duck_curve(np.ones(16000, "f4"), [])[:-1].all()
    assert not mix.duck_curve(np.zeros(16000, "f4"), [-1.0, 2.0]).any()


# ---- the command line --------------------------------------------------------------------------


def test_all_flags_at_once(capsys, clip, weights, tmp_path):
    flags = "--lufs -20 --keep-audio -3 --duck --stems --rate 48000 --layout stereo --format mkv"
    status, lines, err = run(
        capsys, clip, "--out", tmp_path, "--weights", weights, "--steps", 1, "--json",
        "--candidates", 2, "--keep-all", *flags.split(),
    )  # fmt: skip
    assert status == 0 and not err
    line = json.loads(lines[0])
    names = {path.name for path in tmp_path.iterdir()}
    stems = {"clip.foley.wav", "clip.own.wav", "clip.mix.wav"}
    videos = {"clip.foley.mkv", "manifest.jsonl"}
    assert names == stems | videos | {"clip.foley.0.wav", "clip.foley.1.wav"}
    for candidate in line["candidates"]:
        assert tagged_gain(candidate["wav"]) != 0
        found = measure(blocks_of(read(candidate["wav"], 48000, 2)), 48000)
        assert found.true_peak <= level.CEILING
    # again, over its own; but not over somebody else's mix
    arguments = (clip, "--out", tmp_path, "--weights", weights, "--steps", 1, "--stems")
    assert run(capsys, *arguments)[0] == 0
    media.write_sound(tmp_path / "clip.mix.wav", [np.zeros((10, 1), "f4")], 10, 16000, 1)
    status, _, err = run(capsys, *arguments)
    assert status == 1 and len(err) == 1 and "clip.mix.wav: was changed since" in err[0]
    (tmp_path / "manifest.jsonl").unlink()
    status, _, err = run(capsys, *arguments, "--overwrite")
    assert status == 1 and len(err) == 1 and "clip.mix.wav: is there already" in err[0]
    # nor over what is no sound at all
    (tmp_path / "clip.mix.wav").write_text("notes")
    status, _, err = run(capsys, *arguments, "--overwrite")
    assert status == 1 and len(err) == 1 and "clip.mix.wav: is there already" in err[0]


@pytest.mark.parametrize(
    "settings, flags, count",
    [
        # once, when its level was set; stereo measures the same and 3 dB more
        ({}, {}, 1),
        ({"layout": "stereo"}, {}, 1),
        ({"lufs": None}, {}, 1),
        # a mix, or another rate, is another sound
        ({"keep_audio": 0.0}, {}, 2),
        ({"rate": 48000}, {}, 2),
        # a file of each candidate, and the same in the video and the foley
        ({"keep_audio": 0.0}, {"keep_all": True}, 2),
        ({}, {"stems": True, "verbose": True}, 1),
    ],
)
def test_each_sound_is_measured_once(clip, tmp_path, monkeypatch, settings, flags, count):
    calls = []
    real = measure

    def watched(blocks, rate):
        calls.append(rate)
        return real(blocks, rate)

    monkeypatch.setattr(loudness, "measure", watched)
    result = result_of(bursts(), clip, **settings)
    line = written(result, tmp_path, format="mkv", **flags)
    assert len(calls) == count
    # and rightly
    sound = read(line["output"], result.settings.rate, level.LAYOUTS[result.settings.layout])
    found = real(blocks_of(sound), result.settings.rate)
    assert line["lufs"] == pytest.approx(found.loudness, abs=0.02)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lufs 3", "--lufs"),
        ("--lufs -61", "-60 to -5"),
        ("--lufs loud", "--lufs"),
        ("--lufs nan", "--lufs"),
        ("--duck", "--keep-audio"),
        ("--duck -9", "--duck -9"),
        ("--keep-audio --duck 3", "--duck"),
        ("--keep-audio --duck deep", "--duck"),
        ("--rate 44100", "--rate"),
        ("--rate fast", "--rate"),
        ("--layout 5.1", "--layout"),
        ("--format mp3", "--format"),
        ("--format wav --keep-tracks", "--keep-tracks"),
    ],
)
def test_nonsense_is_one_line_before_any_work(capsys, flags, words):
    status, lines, err = run(capsys, "clip.mp4", *flags.split())
    assert status == 2 and not lines and len(err) == 1 and words in err[0], err


@pytest.mark.parametrize(
    "wrong", [{"lufs": 3.0}, {"lufs": "off"}, {"duck": -9.0}, {"rate": 44100}, {"layout": "5.1"}]
)
def test_settings_refuse_it_too(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
        Settings(**wrong)
    assert "\n" not in str(caught.value)
