"""What goes into a container and what comes out of it: a test for every kind of file that once came
out wrong. All are made here with PyAV.
"""

import io
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import TICK, add_frame, add_sound, clicks, grey, make, onsets, packets, seen, steady

import data
import sample
from common import ffmpeg, isolation, media, mux
from film import jobs

ROOT = Path(__file__).parent.parent
SAID = pytest.mark.filterwarnings("ignore:.*encoded anew")


def picture(path):
    """The stream that a player shows, and its container's tags, as (stream's properties, tags)."""
    with av.open(str(path)) as file:
        stream = file.streams.best("video")
        return {
            "tag": stream.codec_context.codec_tag,
            "aspect": stream.sample_aspect_ratio,
            "rate": stream.average_rate,
            "timecode": {k.lower(): v for k, v in stream.metadata.items()}.get("timecode"),
            "codec": stream.codec_context.codec.canonical_name,
        }


def dubbed(source, tmp_path, start=0.0, duration=None, suffix=None, **options):
    """The source with silence, as `write_video` makes it."""
    out = tmp_path / f"out{suffix or media.output_suffix(source)}"
    media.write_video(
        source, torch.zeros(160000), out, {"comment": "ours"}, start, duration, **options
    )
    return out


def display_times(path):
    """Seconds of the frames as they are decoded."""
    with av.open(str(path)) as file:
        return [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]


def encode(
    path,
    frames,
    codec="libx264",
    muxer=None,
    rate=25,
    size=(64, 48),
    options=None,
    prepare=None,
    wav=None,
    noise=0,
):
    """A file of gray frames, with noise, encoded at a constant rate, and sound at 48 kHz as MP2.

    `prepare(stream)` may set up the video stream.
    """
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=muxer) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if prepare:
            prepare(stream)
        if wav is not None:
            sound = file.add_stream("mp2", rate=48000, layout="mono")
            add_sound(file, sound, np.round(32767 * wav).astype("<i2"), "s16")
        for k in range(frames):
            pixels = grey(k) + rng.integers(-noise, noise + 1, (size[1], size[0], 1))
            image = pixels.repeat(3, 2).astype(np.uint8)
            file.mux(add_frame(stream, image, k, Fraction(1, rate)))
        file.mux(stream.encode(None))
    return path


def with_streams(path, source, add):
    """A copy of `source` with what `add(container)` adds; it returns packets to write."""
    with av.open(str(source)) as src, av.open(str(path), "w") as dst:
        tracks = {s.index: dst.add_stream_from_template(s, opaque=True) for s in src.streams}
        further = add(dst) or []
        for packet in [p for p in src.demux() if p.dts is not None]:
            packet.stream = tracks[packet.stream.index]
            dst.mux(packet)
        for packet in further:
            dst.mux(packet)
    return path


# ---- time stamps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix, muxer, codec",
    [
        (".264", "h264", "libx264"),
        (".hevc", "hevc", "libx265"),
        (".m2v", "mpeg2video", "mpeg2video"),
        (".m4v", "m4v", "mpeg4"),
        (".avi", "avi", "libx264"),
        (".avi", "avi", "mpeg4"),
        (".asf", "asf", "libx264"),
    ],
)
def test_streams_without_display_times(tmp_path, suffix, muxer, codec):
    options = (
        {"x265-params": "log-level=none:bframes=2"}
        if codec == "libx265"
        else {"bf": "2", "g": "12"}
    )
    source = encode(tmp_path / f"a{suffix}", 75, codec, muxer, options=options)
    info = media.probe(source)
    assert info.frames == 75 and info.duration == pytest.approx(3.0, abs=0.002)
    assert np.abs(seen(media.read_frames(source, 25, 16)) - [grey(k) for k in range(75)]).max() < 12
    out = dubbed(source, tmp_path)
    assert len(packets(out)) == 75 and media.probe(out).duration == pytest.approx(3.0, abs=0.002)
    assert np.diff(display_times(out)) == pytest.approx(0.04, abs=2e-3)
    assert np.abs(seen(media.read_frames(out, 25, 16)) - [grey(k) for k in range(75)]).max() < 12


@pytest.mark.parametrize("suffix, muxer", [(".mpg", "mpeg"), (".ts", "mpegts")])
def test_a_clock_that_starts_over(tmp_path, suffix, muxer):
    part = encode(
        tmp_path / f"part{suffix}", 75, "mpeg2video", muxer, wav=clicks(3, [1.0], 48000), noise=20
    )
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes(part.read_bytes() * 2)
    with pytest.warns(UserWarning, match="clock starts over"):
        info = media.probe(joined)
    # sound may end later than the picture
    assert info.frames == 150 and info.duration == pytest.approx(6.0, abs=0.1)
    shown = list(ffmpeg.frames_from(joined, 0.0))
    assert np.diff([moment for moment, _ in shown]).min() > 0.03
    levels = np.array([frame.to_ndarray(format="gray").mean() for _, frame in shown])
    assert np.abs(levels[:75] - levels[75:]).max() < 1 and len(set(levels.round())) > 60
    assert onsets(media.read_audio(joined)) == pytest.approx([1.0, 4.0], abs=0.1)
    out = dubbed(joined, tmp_path)
    assert len(packets(out)) == 150 and media.probe(out).duration == pytest.approx(6.0, abs=0.1)


# ---- what the header says of the picture --------------------------------------------------------


def anamorphic(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(4, 3)


@SAID
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("cut", [(0.0, None), (0.5, 1.0)])
def test_pixels_that_are_not_square(tmp_path, suffix, cut):
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    source = encode(tmp_path / "a.mp4", 50, codec, prepare=anamorphic)
    assert picture(source)["aspect"] == Fraction(4, 3)
    out = dubbed(source, tmp_path, *cut, suffix=suffix)
    assert picture(out)["aspect"] == pytest.approx(Fraction(4, 3), rel=0.02)
    (tmp_path / "again").mkdir()
    again = dubbed(out, tmp_path / "again")
    assert picture(again)["aspect"] == pytest.approx(Fraction(4, 3), rel=0.02)


def test_an_aspect_that_only_the_container_knows(tmp_path):
    source = encode(tmp_path / "a.mkv", 25, "libvpx", prepare=anamorphic)
    wide = dubbed(
        encode(tmp_path / "a.mp4", 25, "libvpx-vp9", prepare=anamorphic), tmp_path, suffix=".webm"
    )
    assert picture(source)["aspect"] in (1, None), (
        "then VP8 says it itself and this test proves nothing"
    )
    assert picture(wide)["aspect"] == pytest.approx(Fraction(4, 3), rel=0.01)
    assert np.abs(seen(media.read_frames(wide, 25, 16)) - [grey(k) for k in range(25)]).max() < 8


@SAID
@pytest.mark.parametrize(
    "suffix, codec", [(".webm", "libvpx-vp9"), (".mkv", "libx264"), (".mp4", "libx264")]
)
@pytest.mark.parametrize("rate", [30, 50])
def test_frame_rate_of_a_cut(tmp_path, suffix, codec, rate):
    source = encode(tmp_path / f"a{suffix}", 2 * rate, codec, rate=rate)
    out = dubbed(source, tmp_path, 0.5, 1.0)
    assert picture(out)["rate"] == pytest.approx(rate, rel=0.02)


def test_the_codecs_four_letters(tmp_path):
    quiet = {"x265-params": "log-level=none"}
    for tag in ("hvc1", "hev1"):
        source = encode(
            tmp_path / f"{tag}.mp4",
            10,
            "libx265",
            options=quiet,
            prepare=lambda s, t=tag: setattr(s, "codec_tag", t),
        )
        assert picture(source)["tag"] == tag
        for suffix in (".mp4", ".mov"):
            assert picture(dubbed(source, tmp_path, suffix=suffix))["tag"] == "hvc1"
    raw = encode(tmp_path / "a.hevc", 10, "libx265", "hevc", options=quiet)
    assert picture(dubbed(raw, tmp_path))["tag"] == "hvc1"

    def prores(stream):
        stream.pix_fmt = "yuva444p10le"
        stream.codec_context.codec_tag = "ap4h"

    source = encode(tmp_path / "a.mov", 5, "prores_ks", options={"profile": "4444"}, prepare=prores)
    assert picture(source)["tag"] == picture(dubbed(source, tmp_path))["tag"] == "ap4h"


@SAID
def test_time_code(tmp_path):
    def dnxhr(stream):
        stream.pix_fmt = "yuv422p"
        stream.metadata["timecode"] = "10:00:00:00"

    source = encode(
        tmp_path / "a.mov",
        50,
        "dnxhd",
        size=(256, 144),
        options={"profile": "dnxhr_sq"},
        prepare=dnxhr,
    )
    assert picture(source)["timecode"] == "10:00:00:00"
    assert picture(dubbed(source, tmp_path))["timecode"] == "10:00:00:00"
    assert picture(dubbed(source, tmp_path, 0.6, 1.0))["timecode"] == "10:00:00:15"
    h264 = encode(
        tmp_path / "b.mp4", 50, prepare=lambda s: s.metadata.update(timecode="00:59:59:24")
    )
    for suffix in (".mp4", ".mov", ".mkv"):
        assert picture(dubbed(h264, tmp_path, suffix=suffix))["timecode"] == "00:59:59:24"
        assert (
            picture(dubbed(h264, tmp_path, 0.04, 1.0, suffix=suffix))["timecode"] == "01:00:00:00"
        )


def test_later_time_codes():
    later = mux.later_timecode
    ntsc = Fraction(30000, 1001)
    assert later("23:59:59:24", 1, Fraction(25)) == "00:00:00:00"
    assert later("00:00:59;29", 1, ntsc) == "00:01:00;02"  # 0 and 1 are dropped
    assert later("00:09:59;29", 1, ntsc) == "00:10:00;00"  # but for every tenth minute
    assert later("00:00:00;00", 107892, ntsc) == "01:00:00;00"  # so that it keeps to the clock
    assert later("00:00:59;59", 1, 2 * ntsc) == "00:01:00;04"
    assert later("01:00:00:00", 48, Fraction(24000, 1001)) == "01:00:02:00"
    assert later("nonsense", 50, Fraction(25)) == "nonsense"


# ---- colours of what is encoded anew ------------------------------------------------------------

HLG = {"color_primaries": 9, "color_trc": 18, "colorspace": 9, "color_range": 1}
HD = {"color_primaries": 1, "color_trc": 1, "colorspace": 1, "color_range": 1}
JPEG = {"color_primaries": 1, "color_trc": 1, "colorspace": 5, "color_range": 2}


@SAID
@pytest.mark.parametrize(
    "suffix, codec, pixels, colours, kept",
    [
        (".mp4", "libx264", "yuv420p", HD, "yuv420p"),
        (".mp4", "libx264", "yuv422p", HD, "yuv420p"),
        (".mp4", "libx264", "yuv420p", JPEG, "yuv420p"),
        (".mov", "libx265", "yuv420p10le", HLG, "yuv420p10le"),
        (".webm", "libx265", "yuv420p10le", HLG, "yuv420p"),
        (".mkv", "libx264", "yuv422p10le", HLG, "yuv420p10le"),
    ],
)
def test_colours_of_a_cut(tmp_path, suffix, codec, pixels, colours, kept):
    """The planes' own numbers come out again, and what they mean: no conversion, no flattening."""
    source = tmp_path / ("a.mkv" if suffix == ".webm" else f"a{suffix}")
    values = (90, 160, 110)  # Y, Cb, Cr at 8 bit
    deep = "10" in pixels
    with av.open(str(source), "w") as file:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {"crf": "4"}
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, pixels
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for k in range(50):
            frame = av.VideoFrame(128, 96, pixels)
            for plane, value in zip(frame.planes, values, strict=True):
                samples = np.full(
                    plane.buffer_size // (2 if deep else 1),
                    value * (4 if deep else 1),
                    "<u2" if deep else "u1",
                )
                plane.update(samples.tobytes())
            for name, code in colours.items():
                setattr(frame, name, code)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with pytest.warns(UserWarning, match="encoded anew"):
        out = dubbed(source, tmp_path, 0.5, 1.0, suffix=suffix)
    with av.open(str(out)) as file:
        frame = next(file.decode(video=0))
    assert frame.format.name in (kept, kept.replace("yuv", "yuvj"))
    assert {name: int(getattr(frame, name)) for name in colours} == colours
    deep = "10" in kept
    for plane, value in zip(frame.planes[:2], values, strict=False):
        samples = np.frombuffer(bytes(plane), "<u2" if deep else "u1")[:32]
        assert samples.mean() == pytest.approx(value * (4 if deep else 1), rel=0.02)


@SAID
def test_rgb_becomes_709_and_says_so(tmp_path):
    source = tmp_path / "a.mov"
    with av.open(str(source), "w") as file:
        stream = file.add_stream("qtrle", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for k in range(25):
            image = np.full((48, 64, 3), (255, 32, 0), np.uint8)
            file.mux(add_frame(stream, image, k, Fraction(1, 25)))
        file.mux(stream.encode(None))
    out = dubbed(source, tmp_path, 0.1, 0.5)
    with av.open(str(out)) as file:
        frame = next(file.decode(video=0))
    assert int(frame.colorspace) == 1
    red = media.read_frames(out, 25, 16)[3].float().mean((1, 2))
    assert np.abs(red.numpy() - [255, 32, 0]).max() < 12


@SAID
def test_what_is_encoded_anew_keeps_its_rotation(tmp_path):
    source = encode(tmp_path / "a.mp4", 25, prepare=lambda s: s.set_display_rotation(90))
    for suffix in (".mp4", ".mkv"):
        out = dubbed(source, tmp_path, 0.1, 0.5, suffix=suffix)
        assert (media.probe(out).width, media.probe(out).height) == (48, 64)


# ---- copied or encoded, and said ----------------------------------------------------------------


@pytest.mark.parametrize("suffix, codec", [(".wmv", "wmv2"), (".avi", "utvideo"), (".flv", "flv")])
def test_what_no_container_of_ours_holds_is_encoded_and_said(tmp_path, suffix, codec):
    source = encode(tmp_path / f"a{suffix}", 25, codec)
    with pytest.warns(UserWarning, match=r"a\.\w+: \.mp4 does not hold .* encoded anew \(H\.264\)"):
        out = dubbed(source, tmp_path)
    assert out.suffix == ".mp4" and media.probe(out).frames == 25


@pytest.fixture(scope="module")
def gops(tmp_path_factory):
    """Six seconds, a key frame each second, nothing predicted across it."""
    path = tmp_path_factory.mktemp("gops") / "gops.mp4"
    return encode(
        path, 150, options={"x264-params": "keyint=25:min-keyint=25:scenecut=0:bframes=2"}
    )


@pytest.mark.parametrize(
    "start, duration", [(1.0, 2.0), (1.012, 2.0), (3.0, None), (0.0, 4.0), (2.0, 1.008)]
)
def test_a_cut_at_key_frames_is_copied_and_said(tmp_path, gops, start, duration):
    with pytest.warns(UserWarning, match="key frames; its picture is copied"):
        out = dubbed(gops, tmp_path, start, duration)
    first = round(start)
    last = 6 if duration is None else first + round(duration)
    own = [content for content, _, _ in packets(gops)][25 * first : 25 * last]
    assert [content for content, _, _ in packets(out)] == own
    seconds = last - first
    with av.open(str(out)) as file:
        stream = file.streams.video[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(seconds, abs=0.02)
    assert (
        np.abs(
            seen(media.read_frames(out, 25, 16, 0.02, seconds - 0.1))
            - [grey(25 * first + k) for k in range(math.ceil((seconds - 0.1) * 25))]
        ).max()
        < 8
    )


def test_any_other_cut_is_encoded_and_said(tmp_path, gops):
    for start, duration in ((1.1, 2.0), (1.0, 1.5), (1.5, None)):
        with pytest.warns(UserWarning, match="key frames; its picture is encoded anew"):
            out = dubbed(gops, tmp_path, start, duration)
        assert media.probe(out).duration == pytest.approx(duration or 4.5, abs=0.03)


def test_a_cut_that_others_are_predicted_across_is_encoded(tmp_path):
    source = encode(
        tmp_path / "a.mp4",
        150,
        options={"x264-params": "keyint=25:min-keyint=25:scenecut=0:open-gop=1:bframes=2"},
    )
    assert sum(key for _, _, key in packets(source)) > 3
    with pytest.warns(UserWarning, match="encoded anew"):
        out = dubbed(source, tmp_path, 1.0, 2.0)
    assert (
        np.abs(seen(media.read_frames(out, 25, 16)) - [grey(25 + k) for k in range(50)]).max() < 8
    )


# ---- other streams ------------------------------------------------------------------------------


def film(path, subtitles="subrip", tracks=2):
    """A film of 3 s with two sound tracks, subtitles at 0.5 to 1.5 s, and two chapters."""
    source = make(path.with_name("plain.mp4"), steady(25, 3), wav=clicks(3, [1.0]), sound="aac")

    def add(container):
        container.set_chapters(
            [
                {
                    "id": k,
                    "start": 1500 * k,
                    "end": 1500 * (k + 1),
                    "time_base": Fraction(1, 1000),
                    "metadata": {"title": title},
                }
                for k, title in enumerate(("One", "Two"))
            ]
        )
        packets = []
        for _ in range(tracks - 1):
            sound = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 48000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
            packets.append((sound, frame))
        if subtitles:
            words = container.add_mux_stream(subtitles)
            words.metadata["language"] = "deu"
            text = av.Packet(b"hello" if subtitles == "subrip" else b"\0\5hello")
            text.stream, text.time_base = words, Fraction(1, 1000)
            text.pts = text.dts = 500
            text.duration = 1000
        coded = [
            packet
            for sound, frame in packets
            for packet in (*sound.encode(frame), *sound.encode(None))
        ]
        if path.suffix == ".mkv":
            container.add_attachment("font.ttf", "application/x-truetype-font", b"\0" * 3000)
        return [*coded, *([text] if subtitles else [])]

    return with_streams(path, source, add)


def streams(path):
    with av.open(str(path)) as file:
        return [stream.type for stream in file.streams], [
            c["metadata"].get("title") for c in file.chapters()
        ]


@pytest.mark.parametrize("suffix, words", [(".mkv", "subrip"), (".mp4", "mov_text")])
def test_subtitles_chapters_and_attachments(tmp_path, suffix, words):
    source = film(tmp_path / f"film{suffix}", words)
    with pytest.warns(UserWarning, match="sound track .*replaced"):
        out = dubbed(source, tmp_path)
    kinds, chapters = streams(out)
    assert kinds.count("audio") == 1 and kinds.count("subtitle") == 1 and chapters == ["One", "Two"]
    assert ("attachment" in kinds) == (suffix == ".mkv")
    with av.open(str(out)) as file:
        stream = file.streams.subtitles[0]
        # mp4 fills the time before with empty ones
        words = [p for p in file.demux(stream) if p.size > 2]
        assert [float(p.pts * p.time_base) for p in words][0] == pytest.approx(0.5, abs=0.03)
    kept = dubbed(source, tmp_path, keep_tracks=True)
    with av.open(str(kept)) as file:
        assert len(file.streams.audio) == 3
        best = file.streams.best("audio")
        # ours is what plays
        assert best.index == file.streams.audio[0].index and best.rate == 16000
        assert all(
            not s.disposition & av.stream.Disposition.default for s in file.streams.audio[1:]
        )


@SAID
def test_they_move_with_a_cut(tmp_path):
    source = film(tmp_path / "film.mkv")
    out = dubbed(source, tmp_path, 0.7, 2.0)
    with av.open(str(out)) as file:
        text = next(p for p in file.demux(file.streams.subtitles[0]) if p.size)
        # shown since 0.5, until 1.5
        assert float(text.pts * text.time_base) == pytest.approx(0, abs=0.02)
        assert float(text.duration * text.time_base) == pytest.approx(0.8, abs=0.03)
        ends = [float(c["end"] * c["time_base"]) for c in file.chapters()]
    first = 1.5 - media.probe(source).start - 0.7  # Matroska's clock begins with the sound
    assert ends == pytest.approx([first, 2.0], abs=0.03)


def test_what_a_container_cannot_take_is_named(tmp_path):
    source = film(tmp_path / "film.mkv", tracks=1)
    with pytest.warns(
        UserWarning, match=r"not kept in \.mp4: .*subtitles \(srt, deu\).*attachment \(font.ttf"
    ):
        out = dubbed(source, tmp_path, suffix=".mp4")
    assert streams(out)[0].count("subtitle") == 0


def test_cover_art(tmp_path):
    plain = make(tmp_path / "plain.mp4", steady(25, 1))
    context = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt, context.time_base = (
        32,
        32,
        "yuvj420p",
        Fraction(1, 25),
    )
    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8)).reformat(
        format="yuvj420p"
    )
    frame.pts = 0
    jpeg = bytes((context.encode(frame) or context.encode(None))[0])

    def add(container):
        cover = container.add_mux_stream("mjpeg", width=32, height=32)
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(jpeg)
        packet.stream, packet.time_base = cover, TICK
        packet.pts = packet.dts = 0
        return [packet]

    source = with_streams(tmp_path / "a.mp4", plain, add)
    for suffix in (".mp4", ".mkv"):
        with av.open(str(dubbed(source, tmp_path, suffix=suffix))) as file:
            covers = [
                s for s in file.streams.video if s.disposition & av.stream.Disposition.attached_pic
            ]
            assert [bytes(p) for p in file.demux(covers) if p.size] == [jpeg]


# ---- sound --------------------------------------------------------------------------------------


def tone(channels, layout, loud, path, codec, sound_format="fltp", rate=48000, bad=None):
    """A clip whose channel `loud` has a tone of amplitude 0.3.

    `bad` is put into every channel for a millisecond.
    """
    wav = np.zeros((channels, rate), np.float32)
    wav[loud] = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    if bad is not None:
        wav[:, rate // 2 : rate // 2 + 48] = bad
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        track = file.add_stream(codec, rate=rate, layout=layout)
        for k in range(25):
            image = np.full((48, 64, 3), grey(k), np.uint8)
            file.mux(add_frame(video, image, k, Fraction(1, 25)))
        file.mux(video.encode(None))
        add_sound(file, track, wav.T.reshape(-1), "flt")
    return path


@pytest.mark.parametrize(
    "layout, channels, loud, share",
    [
        ("mono", 1, 0, 1.0),
        ("stereo", 2, 0, 0.5),
        ("5.1", 6, 0, 0.5),
        ("5.1", 6, 2, math.sqrt(0.5)),
        ("5.1", 6, 3, 0.0),
        ("5.1", 6, 4, math.sqrt(0.5) / 2),
        ("7.1", 8, 2, math.sqrt(0.5)),
        ("7.1", 8, 7, math.sqrt(0.5) / 2),
    ],
)
def test_downmix(tmp_path, layout, channels, loud, share):
    """ITU-R BS.775: the centre, where dialogue is, at -3 dB; no LFE."""
    clip = tone(channels, layout, loud, tmp_path / "a.mkv", "pcm_f32le")
    rms = media.read_audio(clip)[4000:12000].square().mean().sqrt().item()
    assert rms == pytest.approx(0.3 * share / math.sqrt(2), abs=2e-3)


@pytest.mark.parametrize("suffix, codec", [(".mp4", "aac"), (".mkv", "libopus"), (".mkv", "flac")])
def test_eight_channels_are_read(tmp_path, suffix, codec, capsys):
    clip = tone(8, "7.1", 2, tmp_path / f"a{suffix}", codec)
    rms = media.read_audio(clip)[4000:12000].square().mean().sqrt().item()
    assert rms == pytest.approx(0.3 / 2, rel=0.1)
    assert sample.main(["--verify", str(clip)]) == 3  # once a segmentation fault
    assert "not known as ours" in capsys.readouterr().out


def test_an_order_of_channels_of_its_own(tmp_path):
    """QuickTime names each channel; PyAV frees such a layout twice, which ended the process."""
    clip = tone(7, "6.1", 2, tmp_path / "a.mov", "pcm_s16le")
    rms = media.read_audio(clip)[4000:12000].square().mean().sqrt().item()
    assert rms == pytest.approx(0.15, abs=2e-3)


def test_channels_without_names_are_averaged():
    nine = ffmpeg.downmix_weights(av.AudioLayout("9 channels"))
    assert nine == pytest.approx(np.full(9, 1 / 9))
    for layout in ("hexagonal", "22.2", "6.1", "7.1.4"):
        assert ffmpeg.downmix_weights(av.AudioLayout(layout)).max() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_are_none(tmp_path, suffix, bad):
    clip = tone(2, "stereo", slice(None), tmp_path / f"a{suffix}", "pcm_f32le", bad=bad)
    with pytest.warns(UserWarning, match="96 samples of its sound are no numbers"):
        wav = media.read_audio(clip)
    assert wav.isfinite().all() and wav.abs().max() < 0.33
    assert wav[8002:8014].abs().max() < 0.1  # silence there, a millisecond of it
    assert wav[2000:7900].square().mean().sqrt() == pytest.approx(0.3 / math.sqrt(2), rel=0.01)


def test_prepare_names_what_it_mends(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    tone(2, "stereo", slice(None), tmp_path / "raw" / "nan.mov", "pcm_f32le", bad=math.nan)
    report = data.prepare(tmp_path / "raw", tmp_path / "set")
    assert report.left_out == [] and "nan.mov: 96 samples" in capsys.readouterr().err


# ---- folders ------------------------------------------------------------------------------------


@SAID
def test_a_rotated_anamorphic_matroska_stays_upright(tmp_path):
    def both(stream):
        anamorphic(stream)
        stream.set_display_rotation(180)

    source = encode(tmp_path / "a.mkv", 25, prepare=both)
    with av.open(str(dubbed(source, tmp_path))) as file:
        assert abs(next(file.decode(video=0)).rotation) == 180


@pytest.mark.parametrize("suffix, muxer", [(".ts", "mpegts"), (".mpg", "mpeg")])
def test_joined_films_whose_sound_is_longer_than_the_picture(tmp_path, suffix, muxer):
    parts = []
    for k, (pictures, seconds) in enumerate(((25, 3.0), (75, 1.0), (50, 2.0))):
        part = tmp_path / f"{k}{suffix}"
        encode(
            part,
            pictures,
            "mpeg2video",
            muxer,
            wav=clicks(seconds, [0.5], 48000),
            noise=20,
            options={"bf": "2"},
        )
        parts.append(part.read_bytes())
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes(b"".join(parts))
    with pytest.warns(UserWarning, match="clock starts over"):
        info = media.probe(joined)
    assert info.frames == 150 and 6.9 < info.duration < 8.6
    moments = [moment for moment, _ in ffmpeg.frames_from(joined, 0.0)]
    assert len(moments) == 150 and min(np.diff(moments)) > 0.005
    assert sum(np.diff(moments) > 0.3) <= 2  # where a picture ends before its sound


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nok.mp4\n",
        "ffconcat version 1.0\nfile ok.mp4\n",
    ],
)
def test_a_playlist_is_no_video(tmp_path, text):
    make(tmp_path / "ok.mp4", steady(25, 1))
    for name in ("list.m3u8", "list.dat", "list.mp4"):
        (tmp_path / name).write_text(text)
        with pytest.raises(media.MediaError, match="not a video"):
            media.probe(tmp_path / name)  # a live one waits for ever
    assert [p.name for p in media.find_videos([tmp_path])] == ["list.mp4", "ok.mp4"]


def test_a_joined_flv_that_ffmpeg_stops_reading_is_said(tmp_path):
    part = encode(tmp_path / "part.flv", 50, "flv")
    joined = tmp_path / "joined.flv"
    joined.write_bytes(part.read_bytes() * 2)
    with pytest.warns(UserWarning, match="FFmpeg reads 50 % of it"):
        media.probe(joined)


def test_whatever_ffmpeg_opens_in_a_folder_is_a_video(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    clip = make(tmp_path / "clip.mp4", steady(25, 1), wav=clicks(1, [0.5]))
    names = ["a.f4v", "b.MP4", "c.divx", "d", "deep/e.xyz", "f.mxf.mp4"]
    for name in names:
        (folder / name).write_bytes(clip.read_bytes())
    encode(folder / "g.264", 25, muxer="h264")
    av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8)).save(str(folder / "still.png"))
    (folder / "notes.nfo").write_text("not a film\n" * 50)  # FFmpeg has a reader for text art
    (folder / "labels.json").write_text("{}")
    (folder / "own.foley.mp4").write_bytes(clip.read_bytes())
    (folder / ".hidden.mp4").write_bytes(clip.read_bytes())
    media.write_wav(folder / "sound.wav", torch.zeros(16000))
    os.symlink(folder, folder / "deep" / "round")  # a loop
    (tmp_path / "linked").mkdir()
    os.symlink(folder, tmp_path / "linked" / "inside")
    found = sorted(p.relative_to(folder).as_posix() for p in media.find_videos([folder]))
    assert found == sorted([*names, "g.264"])
    assert len(media.find_videos([tmp_path / "linked"])) == len(names) + 1
    assert [p.name for p in media.search(folder)[1]] == [
        "labels.json",
        "notes.nfo",
        "sound.wav",
        "still.png",
    ]
    planned = jobs.plan_outputs([folder, tmp_path / "linked"], tmp_path, verbose=True)
    said = capsys.readouterr().err
    assert len(planned) == len(names) + 1 and all(
        f"{name}: no video" in said for name in ("notes.nfo", "still.png", "sound.wav")
    )
    report = data.prepare(folder, tmp_path / "set")
    assert report.clips == len(names)
    assert sorted((name, reason) for name, reason, _ in report.left_out) == [
        ("g.264", "no sound track"),
        ("notes.nfo", "not a video"),
        ("sound.wav", "not a video"),
        ("still.png", "not a video"),
    ]


# ---- a decoder that dies ------------------------------------------------------------------------

DEADLY = """
import os, signal
import common.ffmpeg as ffmpeg
probe = ffmpeg.probe
def deadly_probe(path):
    return os.kill(os.getpid(), signal.SIGSEGV) if "deadly" in str(path) else probe(path)
ffmpeg.probe = deadly_probe
"""


@pytest.fixture
def deadly(monkeypatch):
    """A child whose decoder dies of every file named deadly."""
    isolation.stop()
    start, serve = isolation.COMMAND.rsplit("; ", 1)
    monkeypatch.setattr(isolation, "COMMAND", f"{start}\n{DEADLY}\n{serve}")
    yield
    isolation.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_dead_decoder_ends_one_input_with_one_line(tmp_path, deadly, capsys):
    for name in ("a.mp4", "deadly.mp4", "z.mp4"):
        make(tmp_path / name, steady(25, 1), wav=clicks(1, [0.5]))
    assert sample.main([str(tmp_path), "--steps", "1", "--cg", "0"]) == 1
    said = capsys.readouterr()
    assert (
        "deadly.mp4: FFmpeg crashed on this file (SIGSEGV)" in said.err
        and len(said.err.strip().splitlines()) == 1
    )
    assert sorted(p.name for p in tmp_path.glob("*.foley.*")) == [
        "a.foley.mp4",
        "a.foley.wav",
        "z.foley.mp4",
        "z.foley.wav",
    ]
    assert len(list(tmp_path.iterdir())) == 8  # with the manifest, nothing half-written


def test_errors_warnings_and_arrays_come_back(tmp_path):
    with pytest.raises(media.MediaError, match="no such file"):
        media.probe(tmp_path / "nothing.mp4")
    with pytest.raises(isolation.ChildError) as caught:
        isolation.call("common.ffmpeg", "frame_count", "many", 4)
    assert caught.value.kind == "TypeError"
    assert isolation.call("common.ffmpeg", "frame_count", 2.0, 4) == 8
    buffer = io.BytesIO()
    sent = {
        "x": np.arange(6, dtype=np.int16).reshape(2, 3),
        "y": [np.zeros((0, 3)), 1, None],
        "path": Path("a"),
    }
    isolation.send(buffer, sent)
    buffer.seek(0)
    got = isolation.receive(buffer)
    assert np.array_equal(got["x"], sent["x"]) and got["x"].dtype == np.int16
    assert got["y"][0].shape == (0, 3) and got["y"][1:] == [1, None] and got["path"] == "a"
    assert isolation.receive(buffer) is None


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_an_interrupted_call_leaves_no_child_behind(monkeypatch):
    child = isolation.start()

    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(isolation, "receive", interrupted)
        isolation.call("common.ffmpeg", "frame_count", 2.0, 4)
    assert child.poll() == -signal.SIGKILL
    assert isolation.call("common.ffmpeg", "frame_count", 2.0, 4) == 8  # another one


def test_the_child_starts_without_torch():
    code = (
        f"{isolation.COMMAND.rsplit('; ', 2)[0]}\n"
        "import sys, common.ffmpeg, common.mux, compat.demo_frames\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists a process's children")
def test_two_signals_end_it_at_once(tmp_path):
    """`timeout` sends two: to the process and to its group. The second once left a lock held."""
    flags = ["--steps", "900", "--out", tmp_path]
    command = [sys.executable, ROOT / "sample.py", ROOT / "demo.mp4", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():  # then the signals are handled, and there is a child to end
        assert process.poll() is None
        time.sleep(0.01)
    child = int(children.read_text().split()[0])
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM and said.count("stopped") == 1
    assert not Path(f"/proc/{child}").exists() and list(tmp_path.iterdir()) == []


def test_sound_a_day_late_is_damage(tmp_path):
    """By a damaged clock; silence up to there would take gigabytes."""
    clip = make(tmp_path / "a.mkv", steady(25, 1), wav=clicks(1, [0.5]), sound="flac", late=90000.0)
    with pytest.raises(media.MediaError, match="does not decode"):
        media.read_audio(clip)
    assert not media.read_audio(clip, duration=1.0).any()
