"""data.py: mel and its inverse against goldens and by ear's measures, media of every awkward kind, training clips.

Every clip is made here with PyAV: frame k is one grey, so that what was read says which frame it was.
"""
import json
import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

import data

GOLDEN = Path(__file__).parent / "golden" / "audio.safetensors"
ROOT = Path(__file__).parent.parent
TICK = Fraction(1, 90000)


def grey(k):
    """The level that says "frame k", far enough from its neighbours to survive coding."""
    return 20 + k * 37 % 211


def clicks(seconds, times, rate=16000):
    """Silence with a 2 ms burst at each time."""
    wav = np.zeros(round(seconds * rate), np.float32)
    for time in times:
        at = round(time * rate)
        wav[at:at + rate // 500] = 0.8
    return wav


def onsets(wav):
    """Seconds at which the level rises above half of the peak."""
    loud = np.abs(np.asarray(wav)) > 0.5 * np.abs(np.asarray(wav)).max()
    rise = np.flatnonzero(loud)
    return rise[np.diff(rise, prepend=-8000) > 4000] / 16000


def make(path, times, levels=None, wav=None, rate=16000, size=(64, 48), codec="libx264", sound="aac", late=0.0,
         draw=None, options=None, layout="mono", tags=None, tick=TICK):
    """A video whose frame k is shown from times[k]; the last of `times` is the end. Sound (n,) starts `late`."""
    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=1000, options={"g": "12", **(options or {})})
        video.width, video.height, video.codec_context.time_base = *size, tick
        video.pix_fmt = "yuv420p"
        track = None if wav is None else file.add_stream(sound, rate=rate, layout=layout)
        file.metadata.update(tags or {})
        lengths = {round(a / tick): round(b / tick) - round(a / tick) for a, b in zip(times, times[1:])}

        def mux(packets):
            for packet in packets:
                packet.duration = lengths.get(packet.pts, packet.duration)
                file.mux_one(packet)

        for k, time in enumerate(times[:-1]):
            image = np.full((size[1], size[0], 3), grey(k) if levels is None else levels[k], np.uint8)
            if draw:
                draw(image, k)
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = round(time / tick), tick
            mux(video.encode(frame))
        mux(video.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(np.atleast_2d(wav), format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(late * rate)
            file.mux(track.encode(frame))
            file.mux(track.encode(None))
    return path


def steady(fps, seconds):
    return [k / fps for k in range(round(fps * seconds) + 1)]


def seen(frames):
    """Mean grey of each frame."""
    return frames.float().mean((1, 2, 3)).numpy()


def shown(times, moments):
    """Levels a viewer sees at these moments; the time stamps are whole ticks."""
    stamps = [round(time / TICK) for time in times[:-1]]
    return [grey(int(np.searchsorted(stamps, float(moment / TICK) + 0.5, "right")) - 1) for moment in moments]


def packets(path):
    """(bytes, presentation time, key) of the video packets, times from the first."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        found = [(bytes(p), p.pts * p.time_base, p.is_keyframe) for p in file.demux(stream) if p.dts is not None]
    zero = min(time for _, time, _ in found)
    return [(content, float(time - zero), key) for content, time, key in found]


# ---- mel and vocoder -----------------------------------------------------------------------------------------------

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_mel_equals_the_golden():
    golden = load_file(GOLDEN)
    assert relative(data.mel_basis(), golden["mel_basis_16k"]) < 1e-6
    mel = data.mel(golden["waveform"])
    assert mel.shape == (128, 512)
    assert relative(mel[:, ::4], golden["mel_every4"]) < 1e-4
    assert relative(mel[:, -3:], golden["mel_last3"]) < 1e-4     # where reflection differs from zero padding


@pytest.mark.parametrize("n", [1, 255, 256, 257, 513, 514, 5000, 131072])
def test_mel_columns(n):
    wav = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n)) * 0.1
    mel = data.mel(wav)
    assert mel.shape == (2, 3, 128, -(-n // 256)) and 0 <= mel.min() and mel.max() <= 1
    torch.testing.assert_close(mel[1, 2], data.mel(wav[1, 2]), atol=1e-5, rtol=0)


def test_inverse_filterbank_meets_the_mel():
    mel = data.mel(load_file(GOLDEN)["waveform"])[None]
    back = data.mel_basis() @ data.mel_to_magnitude(mel)
    target = torch.where(mel > 0, 10 ** (5 * mel - 4), 0.0)
    assert relative(back, target) < 0.002                        # librosa's solver leaves 0.049 here


@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_tone_keeps_its_pitch(hz):
    tone = 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(65536) / 16000)
    back = data.vocode(data.mel(tone))
    assert back.shape == tone.shape
    peak = torch.fft.rfft(back * torch.hann_window(len(back))).abs().argmax().item() * 16000 / len(back)
    assert abs(peak - hz) < max(0.005 * hz, 4)
    assert 0.5 < back.square().mean().sqrt() / tone.square().mean().sqrt() < 1.5


def test_vocoder_closes_the_circle_and_keeps_onsets():
    golden = load_file(GOLDEN)["waveform"]
    mel = data.mel(golden)
    assert (data.mel(data.vocode(mel)) - mel).abs().mean() < 0.03
    times = [0.5, 1.25, 2.0, 3.1]
    noise = torch.randn(1600, generator=torch.Generator().manual_seed(0)) * torch.exp(-torch.arange(1600) / 300)
    wav = torch.zeros(65536)
    for time in times:
        wav[round(time * 16000):][:1600] += 0.3 * noise
    back = data.vocode(data.mel(wav))
    assert np.abs(onsets(back) - times).max() < 0.016


def test_silence_stays_silence():
    mel = torch.zeros(2, 128, 64)
    mel[1, 40:50, 20:30] = 0.6
    back = data.vocode(mel)
    assert back[0].abs().max() == 0 and back[1].abs().max() > 0.001
    assert back[1, 40 * 256:].abs().max() < 1e-6


def test_vocoder_does_not_depend_on_the_batch_but_on_the_seed():
    mel = torch.rand(3, 128, 48, generator=torch.Generator().manual_seed(5)) * 0.7
    alone, together = data.vocode(mel[2], seed=3), data.vocode(mel.view(3, 1, 128, 48), seed=3)
    assert together.shape == (3, 1, 48 * 256)
    assert torch.equal(alone, together[2, 0])
    assert not torch.allclose(alone, data.vocode(mel[2], seed=4), atol=1e-3)
    assert data.vocode(mel[0], iterations=2, length=5000).shape == (5000,)
    assert data.vocode(mel[0, :, :1], iterations=2).shape == (256,)


# ---- pictures ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fps", [1, 12, 25, 30000 / 1001, 120, 240])
@pytest.mark.parametrize("asked", [4, 15.625, 30])
def test_frames_by_presentation_time(tmp_path, fps, asked):
    times = steady(fps, max(1.5, 3 / fps))
    clip = make(tmp_path / "a.mp4", times)
    frames = data.read_frames(clip, asked, 16)
    moments = np.arange(len(frames)) / asked
    assert frames.shape == (int(np.ceil(times[-1] * asked - 1e-6)), 3, 16, 16) and frames.dtype == torch.uint8
    assert np.abs(seen(frames) - shown(times, moments)).max() < 6
    assert data.probe(clip).fps == pytest.approx(fps, rel=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_start_and_seek(tmp_path, suffix):
    steps = np.random.default_rng(0).choice([0.005, 0.02, 0.1, 0.7], 60)
    times = [0.0, *np.cumsum(steps).tolist()]
    clip = make(tmp_path / f"vfr{suffix}", times)
    assert data.probe(clip).duration == pytest.approx(times[-1], abs=0.01)
    for start, duration in ((0.0, None), (0.333, 2.0), (6.2, 1.0), (times[-1] - 0.01, None)):       # 6.2: by seeking
        frames = data.read_frames(clip, 50, 16, start, duration)
        moments = start + np.arange(len(frames)) / 50
        late = np.array([min(abs(moment - time) for time in times) < 1e-3 for moment in moments])    # on a boundary
        assert np.abs(seen(frames) - shown(times, moments))[~late].max(initial=0) < 6
        assert len(frames) == np.ceil(min(duration or 99, times[-1] - start) * 50 - 1e-2)


def test_the_clock_starts_at_the_first_shown_picture(tmp_path):
    times = [k / 10 + 1.2 for k in range(21)]
    clip = make(tmp_path / "late.mkv", times, wav=clicks(3.2, [1.7, 2.4]), sound="flac")
    assert data.probe(clip).start == pytest.approx(1.2, abs=2e-3)
    assert seen(data.read_frames(clip, 10, 8))[0] == pytest.approx(grey(0), abs=6)
    assert onsets(data.read_audio(clip)) == pytest.approx([0.5, 1.2], abs=2e-3)


def test_rotation_is_applied(tmp_path):
    def corner(image, k):
        image[:image.shape[0] // 2, :image.shape[1] // 2] = 230      # bright: upper left, before turning
    plain = make(tmp_path / "plain.mp4", steady(10, 0.5), levels=[30] * 5, draw=corner)
    places = {}
    for degrees in (0, 90, 180, -90):
        turned = tmp_path / f"turned{degrees}.mp4"
        with av.open(str(plain)) as source, av.open(str(turned), "w") as out:
            track = out.add_stream_from_template(source.streams.video[0])
            track.set_display_rotation(degrees)
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = track
                    out.mux(packet)
        frame = data.read_frames(turned, 10, 32)[2].float().mean(0)
        quarters = frame.view(2, 16, 2, 16).mean((1, 3)).flatten()
        places[degrees] = int(quarters.argmax())
        info = data.probe(turned)
        assert (info.width, info.height) == ((64, 48) if degrees in (0, 180) else (48, 64))
        copy = tmp_path / f"turned{degrees}.foley.mp4"
        data.write_video(turned, torch.zeros(1), copy)
        torch.testing.assert_close(data.read_frames(copy, 10, 32), data.read_frames(turned, 10, 32))
        cut = tmp_path / f"turned{degrees}.cut.mp4"
        data.write_video(turned, torch.zeros(1), cut, start=0.2)
        assert (data.read_frames(cut, 10, 32)[0].float() - data.read_frames(turned, 10, 32)[2].float()).abs().mean() < 8
    assert places[0] == 0 and places[180] == 3                   # upper left, lower right
    assert {places[90], places[-90]} == {1, 2} and places[90] == 2      # 90 turns counter-clockwise: lower left


def test_shrinking_is_antialiased(tmp_path):
    def stripes(image, k):
        image[:, ::2] = 200
        image[:, 1::2] = 50
    clip = make(tmp_path / "fine.mp4", [0, 0.5, 1], draw=stripes, size=(640, 480), options={"qp": "1"})
    frame = data.read_frames(clip, 2, 32)[0].float()
    assert frame.std() < 6 and abs(frame.mean() - 125) < 8


# ---- sound ---------------------------------------------------------------------------------------------------------

def test_late_sound_starts_late(tmp_path):
    clip = make(tmp_path / "a.mp4", steady(25, 2), wav=clicks(1.5, [0.1, 0.6]), late=0.4)
    wav = data.read_audio(clip)
    assert onsets(wav) == pytest.approx([0.5, 1.0], abs=2e-3)
    part = data.read_audio(clip, start=0.45, duration=0.8)
    assert len(part) == 12800 and onsets(part) == pytest.approx([0.05, 0.55], abs=2e-3)
    beyond = data.read_audio(clip, start=1.95, duration=1.0)
    assert len(beyond) == 16000 and beyond.abs().max() < 0.01


@pytest.mark.parametrize("suffix,codec,rate,layout", [
    ("mp4", "aac", 44100, "stereo"), ("mkv", "pcm_u8", 8000, "mono"), ("mkv", "pcm_s24le", 48000, "stereo"),
    ("mov", "pcm_alaw", 8000, "mono"), ("mkv", "libopus", 48000, "5.1"), ("mkv", "flac", 22050, "5.1")])
def test_sound_of_any_kind(tmp_path, suffix, codec, rate, layout):
    channels = av.AudioLayout(layout).nb_channels
    wav = np.repeat(clicks(7, [0.5, 1.3, 6.5], rate)[None], channels, 0)
    clip = make(tmp_path / f"a.{suffix}", steady(5, 7), wav=wav, rate=rate, sound=codec, layout=layout)
    back = data.read_audio(clip)
    assert back.dtype == torch.float32 and 0.4 < back.abs().max() <= 1
    assert onsets(back) == pytest.approx([0.5, 1.3, 6.5], abs=2e-3)
    assert onsets(data.read_audio(clip, 6.0, 1.0)) == pytest.approx([0.5], abs=2e-3)


# ---- writing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix,codec", [(".mp4", "libx264"), (".mov", "libx264"), (".mkv", "libx264"),
                                          (".webm", "libvpx"), (".avi", "mpeg4"), (".ts", "libx264")])
def test_written_video(tmp_path, suffix, codec):
    tick = Fraction(1, 25) if codec == "mpeg4" else TICK         # it has no finer clock than 1/65535
    source = make(tmp_path / f"a{suffix}", steady(25, 3), codec=codec, tags={"title": "rain"}, tick=tick)
    out = tmp_path / f"a.foley{data.output_suffix(source)}"
    info = data.probe(source)
    data.write_video(source, torch.from_numpy(clicks(9, [0.01, 0.5, 2.95])), out, {"comment": "made"})
    for (a, at, key), (b, bt, bkey) in zip(packets(source), packets(out), strict=True):
        assert at == pytest.approx(bt, abs=1.1e-3) and key == bkey
        assert a == b or suffix == ".ts"                         # .ts has start codes where mp4 has lengths
    made = data.probe(out)
    assert made.duration == pytest.approx(info.duration, abs=1e-3)
    wav = data.read_audio(out)
    assert abs(len(wav) / 16000 - info.duration) < 0.001
    assert onsets(wav) == pytest.approx([0.01, 0.5, 2.95], abs=2e-3)
    tags = data.read_tags(out)
    assert tags["comment"] == "made" and (suffix not in (".mp4", ".mkv") or tags["title"] == "rain")
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, out.name])


def test_b_frames_and_variable_rate_are_copied(tmp_path):
    times = [0.0, *np.cumsum(np.random.default_rng(1).choice([0.01, 0.04, 0.3], 40)).tolist()]
    source = make(tmp_path / "a.mp4", times, options={"bf": "3", "b-adapt": "0"})
    out = tmp_path / "b.mp4"
    data.write_video(source, torch.zeros(10), out)
    assert packets(source) == packets(out)
    assert torch.equal(data.read_frames(source, 30, 16), data.read_frames(out, 30, 16))


def test_packets_that_no_muxer_takes_are_encoded_anew(tmp_path):
    times = [k * 0.0004 for k in range(200)]                     # several in one millisecond, Matroska's clock
    source = make(tmp_path / "a.mkv", times, options={"bf": "0"})
    with pytest.warns(UserWarning, match="encoded anew"):
        data.write_video(source, torch.from_numpy(clicks(1, [0.03])), tmp_path / "b.mp4")
    made = data.probe(tmp_path / "b.mp4")
    assert made.duration == pytest.approx(data.probe(source).duration, abs=1e-3)
    assert onsets(data.read_audio(tmp_path / "b.mp4")) == pytest.approx([0.03], abs=2e-3)
    assert sorted(os.listdir(tmp_path)) == ["a.mkv", "b.mp4"]


def test_a_cut_is_exact(tmp_path):
    times = steady(25, 6)
    source = make(tmp_path / "a.mp4", times, wav=clicks(6, [5.0]))
    out = tmp_path / "cut.mp4"
    data.write_video(source, data.read_audio(source, 4.53, 1.0), out, start=4.53, duration=1.0)
    info = data.probe(out)
    assert info.duration == pytest.approx(1.0, abs=1e-3)
    assert len(data.read_audio(out)) == 16000
    assert onsets(data.read_audio(out)) == pytest.approx([0.47], abs=2e-3)
    frames = data.read_frames(out, 50, 16)
    assert np.abs(seen(frames) - shown(times, 4.53 + np.arange(50) / 50)).max() < 6


def test_animated_gif_becomes_mp4(tmp_path):
    with av.open(str(tmp_path / "a.gif"), "w") as file:
        track = file.add_stream("gif", rate=10)
        track.width, track.height, track.pix_fmt = 33, 21, "rgb8"
        for k in range(8):
            image = np.full((21, 33, 3), 30 * k, np.uint8)
            image[k:k + 5, :5] = 255 - 30 * k
            file.mux(track.encode(av.VideoFrame.from_ndarray(image)))
        file.mux(track.encode(None))
    info = data.probe(tmp_path / "a.gif")
    assert data.output_suffix(tmp_path / "a.gif") == ".mp4" and info.frames == 8
    data.write_video(tmp_path / "a.gif", torch.zeros(5), tmp_path / "b.mp4")
    made = data.probe(tmp_path / "b.mp4")
    assert made.frames == 8 and made.duration == pytest.approx(info.duration, abs=1e-3)


def test_wav_round_trip(tmp_path):
    wav = torch.from_numpy(clicks(1, [0.3]))
    data.write_wav(tmp_path / "a.wav", wav, {"comment": "made here", "title": "x"})
    back = data.read_audio(tmp_path / "a.wav")
    assert len(back) == 16000 and (back - wav).abs().max() < 1e-4
    assert data.read_tags(tmp_path / "a.wav")["comment"] == "made here"


# ---- bad files -----------------------------------------------------------------------------------------------------

def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and ";" in message                # the reason; the remedy
    assert all(word in message for word in words), message


def bad_files(folder):
    good = make(folder / "good.mp4", steady(25, 2), wav=clicks(2, [1.0]))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:1500])   # the index was at the end
    data.write_wav(folder / "sound.wav", torch.zeros(16000))
    os.rename(folder / "sound.wav", folder / "sound.mp4")
    with av.open(str(folder / "image.png"), "w", format="image2") as file:
        track = file.add_stream("png", rate=1)
        track.width, track.height, track.pix_fmt = 8, 8, "rgb24"
        file.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8))))
    with av.open(str(folder / "hollow.mkv"), "w") as file:       # a track of pictures, and not one picture
        file.add_stream("libx264", rate=25)
        file.start_encoding()
    (folder / "folder").mkdir()
    return {"missing.mp4": "no such file", "empty.mp4": "empty", "text.mp4": "not a video", "playlist.mp4": "",
            "cut.mp4": "cut off", "sound.mp4": "no picture", "image.png": "still image", "hollow.mkv": "",
            "folder": "folder"}


def test_bad_files_each_say_one_line(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        for read in (data.probe, lambda path: data.read_frames(path, 4, 8), data.output_suffix):
            with pytest.raises(data.MediaError) as caught:
                read(tmp_path / name)
            one_line(caught, name, reason)
    with pytest.raises(data.MediaError) as caught:
        data.find_videos([tmp_path / "folder"])
    one_line(caught, "folder", "no video")
    with pytest.raises(data.MediaError) as caught:
        data.read_audio(make(tmp_path / "mute.mp4", steady(25, 1)))
    one_line(caught, "mute.mp4", "no sound")
    with pytest.raises(data.MediaError) as caught:
        data.read_frames(tmp_path / "good.mp4", 4, 8, start=9)
    one_line(caught, "good.mp4", "2.000 s")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_file_gives_what_decodes(tmp_path, suffix):
    rng = np.random.default_rng(0)

    def noise(image, k):
        image[:] = rng.integers(0, 255, image.shape)
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    make(tmp_path / "a.mp4", steady(25, 2), draw=noise)
    data.write_video(tmp_path / "a.mp4", torch.zeros(10), whole)         # the index comes first
    cut.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cut off"):
        frames = data.read_frames(cut, 25, 16)
    assert 10 < len(frames) < 40
    assert torch.equal(frames[:10], data.read_frames(whole, 25, 16)[:10])
    data.write_video(cut, torch.zeros(10), tmp_path / f"out{suffix}")
    assert data.probe(tmp_path / f"out{suffix}").duration == pytest.approx(data.probe(cut).duration, abs=0.041)


def test_nothing_half_written(tmp_path):
    source = make(tmp_path / "a.mp4", steady(25, 1))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "missing" / "b.mp4", tmp_path / "file" / "b.mp4"):
        with pytest.raises(data.MediaError) as caught:
            data.write_video(source, torch.zeros(10), out)
        one_line(caught, str(out), "cannot be written")
        with pytest.raises(data.MediaError) as caught:
            data.write_wav(out.with_suffix(".wav"), torch.zeros(10))
        one_line(caught, str(out.with_suffix(".wav")), "cannot be written")
    with pytest.raises(data.MediaError) as caught:
        data.write_video(source, torch.zeros(10), tmp_path / "b.avi")
    one_line(caught, "b.avi", ".mp4")
    with pytest.raises(ZeroDivisionError), data.whole(tmp_path / "c.txt") as part:
        part.write_text("half")
        1 / 0
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file size stands for the full disk: the same error arrives by the same way, from a write."""
    make(tmp_path / "a.mp4", steady(25, 2), draw=lambda image, k: np.copyto(image, np.random.default_rng(k).integers(
        0, 255, image.shape, np.uint8)))
    code = f"""
import resource, sys, torch, data
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
video = lambda out, wav: data.write_video("a.mp4", wav, out)
for name, write in (("b.mp4", video), ("b.mkv", video), ("b.webm", video), ("b.wav", data.write_wav)):
    try:
        write(name, torch.randn(32000))
    except data.MediaError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["b.mp4", "b.mkv", "b.webm", "b.wav"], done.stderr
    assert all("cannot be written" in line for line in lines)
    assert os.listdir(tmp_path) == ["a.mp4"]


# ---- training sets -------------------------------------------------------------------------------------------------

FPS = 15.625


def flash_clip(path, moment, seconds=3.0):
    """White for 40 ms and a click, both at `moment`."""
    times = steady(125, seconds)
    levels = [235 if 0 <= time - moment < 0.04 else 30 for time in times[:-1]]
    return make(path, times, levels, wav=clicks(seconds, [moment]), size=(32, 32))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    (folder / "sub").mkdir()
    for k, name in enumerate(("c.mp4", "a.mp4", "sub/b.mp4")):
        flash_clip(folder / name, 1.0 + 0.4 * k)
    flash_clip(folder / "short.mp4", 0.3, 0.6)
    make(folder / "mute.mp4", steady(25, 3))
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    (folder / "a.foley.mp4").write_bytes((folder / "a.mp4").read_bytes())
    return folder


def test_prepare_is_the_same_for_any_number_of_workers(raw, tmp_path):
    data.prepare(raw, tmp_path / "1", FPS, 32)
    done = subprocess.run([sys.executable, "data.py", "prepare", str(raw), str(tmp_path / "3"), "--size", "32",
                           "--workers", "3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "broken.mp4" in done.stderr and "Traceback" not in done.stderr, done.stderr
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "13")
    assert one == three and sorted(one) == ["index.json", "shard-00000.safetensors"]
    index = json.loads(one["index.json"])
    assert [clip["name"] for clip in index["clips"]] == ["a.mp4", "c.mp4", "short.mp4", "sub/b.mp4"]
    assert [clip["name"] for clip in index["left_out"]] == ["broken.mp4", "mute.mp4"]


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_clips_keep_picture_and_sound_together(raw, tmp_path, kind):
    root = raw
    if kind == "prepared":
        data.prepare(raw, tmp_path / "set", FPS, 32)
        root = tmp_path / "set"
    with pytest.warns(UserWarning, match="left out"):
        clips = data.Clips(root, FPS, 32, frames=20, seed=1)
    assert len(clips) == 3
    both = 0
    for index in range(12):                                      # four epochs
        item = clips[index]
        assert item["video"].shape == (20, 3, 32, 32) and item["wav"].shape == (20480,)
        assert torch.equal(item["video"], clips[index]["video"]) and torch.equal(item["wav"], clips[index]["wav"])
        light = seen(item["video"])
        if light.max() > 120 and item["wav"].abs().max() > 0.4:
            flash, click = light.argmax() / FPS, onsets(item["wav"])[0]
            assert -1e-3 <= flash - click < 0.041                # the first frame taken within 40 ms of the click
            both += 1
    assert both >= 3 and len({clips[index]["start"] for index in range(12)}) > 4


def test_a_short_clip_is_padded(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    for root in (raw, tmp_path / "set"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # of the files that are no clips
            clips = data.Clips(root, FPS, 32, frames=20, random_start=False)
        items = [clips[i] for i in range(4)]
        item = next(item for item in items if item["name"] == "short.mp4")
        assert item["start"] == 0 and torch.equal(item["video"][-1], item["video"][9])
        assert item["wav"][12000:].abs().max() == 0 and onsets(item["wav"]) == pytest.approx([0.3], abs=2e-3)


def test_a_set_made_otherwise_names_the_command(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    with pytest.raises(data.MediaError) as caught:
        data.Clips(tmp_path / "set", 4, 32, frames=4)
    one_line(caught, "--fps 4 --size 32")
    os.remove(tmp_path / "set" / "index.json")
    with pytest.raises(data.MediaError) as caught:
        data.Clips(tmp_path / "set", FPS, 32, frames=4)
    one_line(caught, "prepare again")


def test_clips_in_worker_processes(raw, tmp_path):
    data.prepare(raw, tmp_path / "set", FPS, 32)
    clips = data.Clips(tmp_path / "set", FPS, 32, frames=8, random_start=False)
    here = [clips[i]["video"] for i in range(len(clips))]        # opens the shard here, before the workers start
    loader = torch.utils.data.DataLoader(clips, batch_size=1, num_workers=2)
    assert all(torch.equal(a["video"][0], b) for a, b in zip(loader, here, strict=True))


# ---- windows for stage 2 and for the autoencoder --------------------------------------------------------------------

FPS = 15.625                                     # 1024 samples a frame


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Three extracted clips whose features and sound both say which clip and which frame they belong to."""
    folder = tmp_path_factory.mktemp("features")
    for k in range(3):
        frame = torch.arange(160) + 200 * k                                          # (f,)
        save_tensors({"features": frame[:, None].half().expand(-1, 512).contiguous(),
                      "sound": frame.to(torch.int16).repeat_interleave(1024)}, folder / f"{k}.safetensors", {"fps": str(FPS)})
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
        assert item["features"].shape == (128, 512) and item["wav"].shape == (data.WINDOW,)
        frame = item["features"][:, 0]
        assert torch.equal(frame, spoken(item))
        jumps = (frame.diff() != 1).nonzero().flatten().tolist()
        joins.add(len(jumps))
        seams.update(jumps)
    assert max(joins) == {0: 0, 1: 1, 2: 2}[len(kind)] and len(seams) >= 5 * len(kind)


def test_pairs_are_a_function_of_seed_and_index(extracted):
    a, b = (data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=seed) for seed in (1, 1))
    other = data.Pairs(extracted, FPS, 128, merge=0.5, roll=0.5, seed=2)
    assert all(torch.equal(a[k]["wav"], b[k]["wav"]) for k in range(9))
    assert any(not torch.equal(a[k]["wav"], other[k]["wav"]) for k in range(9))
    assert not torch.equal(a[0]["wav"], a[3]["wav"])                                 # the same clip one epoch later


def test_pairs_name_the_remedy(extracted, tmp_path):
    with pytest.raises(data.MediaError, match="--extract"):
        data.Pairs(tmp_path, FPS, 128)
    with pytest.raises(data.MediaError, match="15.625"):
        data.Pairs(extracted, 4.0, 32)


def test_sounds_start_on_mel_columns(tmp_path):
    ramp = (torch.arange(3 * data.HOP * 64) // data.HOP).to(torch.int16).numpy()       # each sample says its mel column
    frames = np.zeros((1, 3, 2, 2), np.uint8)
    (tmp_path / "shard-00000.safetensors").write_bytes(data.to_safetensors({"a/frames": frames, "a/sound": ramp}))
    (tmp_path / "index.json").write_text(json.dumps(
        {"fps": 4, "size": 2, "clips": [{"name": "a", "shard": 0, "frames": 1, "samples": len(ramp)}], "left_out": []}))
    sounds = data.Sounds(tmp_path, 64 * data.HOP)
    starts = {int((sounds[k]["wav"][0] * 32767).round()) for k in range(20)}
    assert len(starts) > 10
    for k in range(5):
        columns = (sounds[k]["wav"] * 32767).round().view(-1, data.HOP)
        assert (columns == columns[:, :1]).all() and (columns[:, 0].diff() == 1).all()
