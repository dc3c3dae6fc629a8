"""media.py: pictures and sound of every awkward kind of file, and the files that are written."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from clips import TICK, clicks, grey, make, one_line, onsets, packets, seen, shown, steady

from common import media, xmp
from common.files import FileError

ROOT = Path(__file__).parent.parent


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [1, 12, 25, 30000 / 1001, 120, 240])
@pytest.mark.parametrize("asked", [4, 15.625, 30])
def test_frames_by_presentation_time(tmp_path, fps, asked):
    times = steady(fps, max(1.5, 3 / fps))
    clip = make(tmp_path / "a.mp4", times)
    frames = media.read_frames(clip, asked, 16)
    moments = np.arange(len(frames)) / asked
    assert (
        frames.shape == (int(np.ceil(times[-1] * asked - 1e-6)), 3, 16, 16)
        and frames.dtype == torch.uint8
    )
    assert np.abs(seen(frames) - shown(times, moments)).max() < 6
    assert media.probe(clip).fps == pytest.approx(fps, rel=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_start_and_seek(tmp_path, suffix):
    steps = np.random.default_rng(0).choice([0.005, 0.02, 0.1, 0.7], 60)
    times = [0.0, *np.cumsum(steps).tolist()]
    clip = make(tmp_path / f"vfr{suffix}", times)
    assert media.probe(clip).duration == pytest.approx(times[-1], abs=0.01)
    # 6.2 is reached by seeking
    for start, duration in ((0.0, None), (0.333, 2.0), (6.2, 1.0), (times[-1] - 0.01, None)):
        frames = media.read_frames(clip, 50, 16, start, duration)
        moments = start + np.arange(len(frames)) / 50
        near = np.array([min(abs(moment - time) for time in times) < 1e-3 for moment in moments])
        assert np.abs(seen(frames) - shown(times, moments))[~near].max(initial=0) < 6
        assert len(frames) == np.ceil(min(duration or 99, times[-1] - start) * 50 - 1e-2)


def test_the_clock_starts_at_the_first_shown_picture(tmp_path):
    times = [k / 10 + 1.2 for k in range(21)]
    clip = make(tmp_path / "late.mkv", times, wav=clicks(3.2, [1.7, 2.4]), sound="flac")
    assert media.probe(clip).start == pytest.approx(1.2, abs=2e-3)
    assert seen(media.read_frames(clip, 10, 8))[0] == pytest.approx(grey(0), abs=6)
    assert onsets(media.read_audio(clip)) == pytest.approx([0.5, 1.2], abs=2e-3)


def test_rotation_is_applied(tmp_path):
    def corner(image, k):
        # bright: upper left, before turning
        image[: image.shape[0] // 2, : image.shape[1] // 2] = 230

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
        frame = media.read_frames(turned, 10, 32)[2].float().mean(0)
        quarters = frame.view(2, 16, 2, 16).mean((1, 3)).flatten()
        places[degrees] = int(quarters.argmax())
        info = media.probe(turned)
        assert (info.width, info.height) == ((64, 48) if degrees in (0, 180) else (48, 64))
        copy = tmp_path / f"turned{degrees}.foley.mp4"
        media.write_video(turned, torch.zeros(1), copy)
        torch.testing.assert_close(
            media.read_frames(copy, 10, 32), media.read_frames(turned, 10, 32)
        )
        cut = tmp_path / f"turned{degrees}.cut.mp4"
        media.write_video(turned, torch.zeros(1), cut, start=0.2)
        first = media.read_frames(cut, 10, 32)[0].float()
        assert (first - media.read_frames(turned, 10, 32)[2].float()).abs().mean() < 8
    assert places[0] == 0 and places[180] == 3  # upper left, lower right
    assert places[90] == 2 and places[-90] == 1  # 90 turns counter-clockwise: lower left


def test_shrinking_is_antialiased(tmp_path):
    def stripes(image, k):
        image[:, ::2] = 200
        image[:, 1::2] = 50

    clip = make(
        tmp_path / "fine.mp4", [0, 0.5, 1], draw=stripes, size=(640, 480), options={"qp": "1"}
    )
    frame = media.read_frames(clip, 2, 32)[0].float()
    assert frame.std() < 6 and abs(frame.mean() - 125) < 8


# ---- sound --------------------------------------------------------------------------------------


def test_late_sound_starts_late(tmp_path):
    clip = make(tmp_path / "a.mp4", steady(25, 2), wav=clicks(1.5, [0.1, 0.6]), late=0.4)
    wav = media.read_audio(clip)
    assert onsets(wav) == pytest.approx([0.5, 1.0], abs=2e-3)
    part = media.read_audio(clip, start=0.45, duration=0.8)
    assert len(part) == 12800 and onsets(part) == pytest.approx([0.05, 0.55], abs=2e-3)
    beyond = media.read_audio(clip, start=1.95, duration=1.0)
    assert len(beyond) == 16000 and beyond.abs().max() < 0.01


@pytest.mark.parametrize(
    "suffix,codec,rate,layout",
    [
        ("mp4", "aac", 44100, "stereo"),
        ("mkv", "pcm_u8", 8000, "mono"),
        ("mkv", "pcm_s24le", 48000, "stereo"),
        ("mov", "pcm_alaw", 8000, "mono"),
        ("mkv", "libopus", 48000, "5.1"),
        ("mkv", "flac", 22050, "5.1"),
    ],
)
def test_sound_of_any_kind(tmp_path, suffix, codec, rate, layout):
    channels = av.AudioLayout(layout).nb_channels
    wav = np.repeat(clicks(7, [0.5, 1.3, 6.5], rate)[None], channels, 0)
    clip = make(
        tmp_path / f"a.{suffix}", steady(5, 7), wav=wav, rate=rate, sound=codec, layout=layout
    )
    back = media.read_audio(clip)
    assert back.dtype == torch.float32 and 0.4 < back.abs().max() <= 1
    assert onsets(back) == pytest.approx([0.5, 1.3, 6.5], abs=2e-3)
    assert onsets(media.read_audio(clip, 6.0, 1.0)) == pytest.approx([0.5], abs=2e-3)


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix,codec",
    [
        (".mp4", "libx264"),
        (".mov", "libx264"),
        (".mkv", "libx264"),
        (".webm", "libvpx"),
        (".avi", "mpeg4"),
        (".ts", "libx264"),
    ],
)
def test_written_video(tmp_path, suffix, codec):
    tick = Fraction(1, 25) if codec == "mpeg4" else TICK  # it has no finer clock than 1/65535
    source = make(
        tmp_path / f"a{suffix}", steady(25, 3), codec=codec, tags={"title": "rain"}, tick=tick
    )
    out = tmp_path / f"a.foley{media.output_suffix(source)}"
    info = media.probe(source)
    media.write_video(
        source, torch.from_numpy(clicks(9, [0.01, 0.5, 2.95])), out, {"comment": "made"}
    )
    for (a, at, key), (b, bt, bkey) in zip(packets(source), packets(out), strict=True):
        assert at == pytest.approx(bt, abs=1.1e-3) and key == bkey
        assert a == b or suffix == ".ts"  # .ts has start codes where mp4 has lengths
    made = media.probe(out)
    assert made.duration == pytest.approx(info.duration, abs=1e-3)
    wav = media.read_audio(out)
    assert abs(len(wav) / 16000 - info.duration) < 0.001
    assert onsets(wav) == pytest.approx([0.01, 0.5, 2.95], abs=2e-3)
    tags = media.read_tags(out)
    assert tags["comment"] == "made" and (suffix not in (".mp4", ".mkv") or tags["title"] == "rain")
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, out.name])


def test_b_frames_and_variable_rate_are_copied(tmp_path):
    times = [0.0, *np.cumsum(np.random.default_rng(1).choice([0.01, 0.04, 0.3], 40)).tolist()]
    source = make(tmp_path / "a.mp4", times, options={"bf": "3", "b-adapt": "0"})
    out = tmp_path / "b.mp4"
    media.write_video(source, torch.zeros(10), out)
    assert packets(source) == packets(out)
    assert torch.equal(media.read_frames(source, 30, 16), media.read_frames(out, 30, 16))


def test_packets_that_no_muxer_takes_are_encoded_anew(tmp_path):
    times = [k * 0.0004 for k in range(200)]  # several in one millisecond, Matroska's clock
    source = make(tmp_path / "a.mkv", times, options={"bf": "0"})
    with pytest.warns(UserWarning, match="encoded anew"):
        media.write_video(source, torch.from_numpy(clicks(1, [0.03])), tmp_path / "b.mp4")
    made = media.probe(tmp_path / "b.mp4")
    assert made.duration == pytest.approx(media.probe(source).duration, abs=1e-3)
    assert onsets(media.read_audio(tmp_path / "b.mp4")) == pytest.approx([0.03], abs=2e-3)
    assert sorted(os.listdir(tmp_path)) == ["a.mkv", "b.mp4"]


def test_a_cut_is_exact(tmp_path):
    times = steady(25, 6)
    source = make(tmp_path / "a.mp4", times, wav=clicks(6, [5.0]))
    out = tmp_path / "cut.mp4"
    media.write_video(source, media.read_audio(source, 4.53, 1.0), out, start=4.53, duration=1.0)
    info = media.probe(out)
    assert info.duration == pytest.approx(1.0, abs=1e-3)
    assert len(media.read_audio(out)) == 16000
    assert onsets(media.read_audio(out)) == pytest.approx([0.47], abs=2e-3)
    frames = media.read_frames(out, 50, 16)
    assert np.abs(seen(frames) - shown(times, 4.53 + np.arange(50) / 50)).max() < 6


def test_animated_gif_becomes_mp4(tmp_path):
    with av.open(str(tmp_path / "a.gif"), "w") as file:
        track = file.add_stream("gif", rate=10)
        track.width, track.height, track.pix_fmt = 33, 21, "rgb8"
        for k in range(8):
            image = np.full((21, 33, 3), 30 * k, np.uint8)
            image[k : k + 5, :5] = 255 - 30 * k
            file.mux(track.encode(av.VideoFrame.from_ndarray(image)))
        file.mux(track.encode(None))
    info = media.probe(tmp_path / "a.gif")
    assert media.output_suffix(tmp_path / "a.gif") == ".mp4" and info.frames == 8
    media.write_video(tmp_path / "a.gif", torch.zeros(5), tmp_path / "b.mp4")
    made = media.probe(tmp_path / "b.mp4")
    assert made.frames == 8 and made.duration == pytest.approx(info.duration, abs=1e-3)


def test_wav_round_trip(tmp_path):
    wav = torch.from_numpy(clicks(1, [0.3]))
    media.write_wav(tmp_path / "a.wav", wav, {"comment": "made here", "title": "x"})
    back = media.read_audio(tmp_path / "a.wav")
    assert len(back) == 16000 and (back - wav).abs().max() < 1e-4
    assert media.read_tags(tmp_path / "a.wav")["comment"] == "made here"


def test_a_wav_beyond_four_gigabytes_is_rf64(tmp_path, monkeypatch):
    hours = 4 * 3600 * 48000
    assert media.sound_format(".wav", hours, 2, "PCM_24") == "WAV"
    assert media.sound_format(".wav", 2 * hours, 2, "PCM_24") == "RF64"
    assert media.sound_format(".flac", 2 * hours, 2, "PCM_24") == "FLAC"
    assert media.sound_format(".wav", 2**29, 1, "DOUBLE") == "RF64"
    # the same in small: its sound, its tags, its size
    monkeypatch.setattr(media, "LARGEST", 10000)
    wav = torch.from_numpy(clicks(1, [0.3]))
    path = tmp_path / "a.wav"
    packet = xmp.make_packet({"tool": "a test"})
    media.write_wav(path, wav, {"comment": "made here", xmp.TAG: packet})
    content = path.read_bytes()
    assert content[:4] == b"RF64" and content[12:16] == b"ds64"
    assert int.from_bytes(content[20:28], "little") == len(content) - 8
    assert soundfile.info(path).format == "RF64"
    assert np.abs(soundfile.read(path)[0] - wav.numpy()).max() < 1e-4
    assert (media.read_audio(path) - wav).abs().max() < 1e-4
    assert media.read_tags(path)["comment"] == "made here" and xmp.read(path) == packet


def test_a_packet_is_found_behind_four_gigabytes_of_sound(tmp_path):
    """In a file with a hole, which takes no disk."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 16000, "PCM_16", format="RF64")
    head = path.read_bytes()
    at = head.index(b"data")
    size = 2**32 + 2**20
    with open(path, "r+b") as file:
        file.write(head[:28] + size.to_bytes(8, "little") + head[36 : at + 8])
        file.truncate(at + 8 + size)
    with open(path, "r+b") as file:
        xmp.embed(file, "<x:xmpmeta/>")
        file.seek(20)
        assert int.from_bytes(file.read(8), "little") == path.stat().st_size - 8
    assert xmp.read(path) == "<x:xmpmeta/>"
    assert path.stat().st_blocks * 512 < 2**20


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_samples_of_a_file_are_written_as_they_are(tmp_path, subtype):
    kind = np.float32 if subtype == "FLOAT" else np.int32
    samples = (np.random.default_rng(0).uniform(-1, 1, (1000, 2)) * 2**31).astype(kind)
    # beyond full scale, too
    samples = samples / 2**30 if subtype == "FLOAT" else samples & ~0xFFFF
    samples = samples.astype(kind)
    path = tmp_path / "a.wav"
    media.write_sound(path, [samples[:300], samples[300:]], 1000, 44100, 2, None, subtype)
    assert soundfile.info(path).subtype == subtype
    assert np.array_equal(soundfile.read(path, dtype=kind, always_2d=True)[0], samples)


# ---- bad files ----------------------------------------------------------------------------------


def bad_files(folder):
    good = make(folder / "good.mp4", steady(25, 2), wav=clicks(2, [1.0]))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "playlist.mp4").write_text(
        "#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:1500])  # the index was at the end
    media.write_wav(folder / "sound.wav", torch.zeros(16000))
    os.rename(folder / "sound.wav", folder / "sound.mp4")
    with av.open(str(folder / "image.png"), "w", format="image2") as file:
        track = file.add_stream("png", rate=1)
        track.width, track.height, track.pix_fmt = 8, 8, "rgb24"
        file.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8))))
    with av.open(
        str(folder / "hollow.mkv"), "w"
    ) as file:  # a track of pictures, and not one picture
        file.add_stream("libx264", rate=25)
        file.start_encoding()
    (folder / "folder").mkdir()
    return {
        "missing.mp4": "no such file",
        "empty.mp4": "empty",
        "text.mp4": "not a video",
        "playlist.mp4": "",
        "cut.mp4": "cut off",
        "sound.mp4": "no picture",
        "image.png": "still image",
        "hollow.mkv": "",
        "folder": "folder",
    }


def test_bad_files_each_say_one_line(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        for read in (media.probe, lambda path: media.read_frames(path, 4, 8), media.output_suffix):
            with pytest.raises(media.MediaError) as caught:
                read(tmp_path / name)
            one_line(caught, name, reason)
    with pytest.raises(media.MediaError) as caught:
        media.find_videos([tmp_path / "folder"])
    one_line(caught, "folder", "no video")
    with pytest.raises(media.MediaError) as caught:
        media.read_audio(make(tmp_path / "mute.mp4", steady(25, 1)))
    one_line(caught, "mute.mp4", "no sound")
    with pytest.raises(media.MediaError) as caught:
        media.read_frames(tmp_path / "good.mp4", 4, 8, start=9)
    one_line(caught, "good.mp4", "2.000 s")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_file_gives_what_decodes(tmp_path, suffix):
    rng = np.random.default_rng(0)

    def noise(image, k):
        image[:] = rng.integers(0, 255, image.shape)

    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    make(tmp_path / "a.mp4", steady(25, 2), draw=noise)
    media.write_video(tmp_path / "a.mp4", torch.zeros(10), whole)  # the index comes first
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cut off"):
        frames = media.read_frames(cut, 25, 16)
    assert 10 < len(frames) < 40
    assert torch.equal(frames[:10], media.read_frames(whole, 25, 16)[:10])
    media.write_video(cut, torch.zeros(10), tmp_path / f"out{suffix}")
    assert media.probe(tmp_path / f"out{suffix}").duration == pytest.approx(
        media.probe(cut).duration, abs=0.041
    )


def test_nothing_half_written(tmp_path):
    source = make(tmp_path / "a.mp4", steady(25, 1))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.wav").mkdir()
    for name, words in (
        ("folder", ("folder", "cannot be written")),
        ("file/b", ("file: cannot be made",)),
    ):
        out = tmp_path / name
        with pytest.raises(FileError) as caught:
            media.write_video(source, torch.zeros(10), out.with_suffix(".mp4"))
        one_line(caught, *words)
        with pytest.raises(FileError) as caught:
            media.write_wav(out.with_suffix(".wav"), torch.zeros(10))
        one_line(caught, *words)
    media.write_wav(tmp_path / "missing" / "b.wav", torch.zeros(10))  # the folder is made
    with pytest.raises(media.MediaError) as caught:
        media.write_video(source, torch.zeros(10), tmp_path / "b.avi")
    one_line(caught, "b.avi", ".mp4")
    with pytest.raises(ZeroDivisionError), media.atomic_write(tmp_path / "c.txt") as part:
        part.write_text("half")
        raise ZeroDivisionError
    kept = ["a.mp4", "file", "folder.mp4", "folder.wav", "missing"]
    assert sorted(os.listdir(tmp_path)) == kept and os.listdir(tmp_path / "missing") == ["b.wav"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file size stands for the full disk: the same error comes from the same write."""

    def noise(image, k):
        image[:] = np.random.default_rng(k).integers(0, 255, image.shape, np.uint8)

    make(tmp_path / "a.mp4", steady(25, 2), draw=noise)
    np.random.default_rng(0).uniform(-0.5, 0.5, 80000).astype(np.float32).tofile(tmp_path / "sound")
    code = """
import resource, sys, torch
from common import media, xmp
from common.files import UserError, scratch_file
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
video = lambda out, wav: media.write_video("a.mp4", wav, out)
for name in ("b.mp4", "b.mkv", "b.webm", "b.wav"):
    write = media.write_wav if name == "b.wav" else video
    try:
        write(name, torch.randn(32000))
    except UserError as error:
        print(error)
try:
    with scratch_file("folder") as out:
        args = "sound", out, ".mp4", 16000, 1
        media.in_child("a.mp4", "film.encoding", "encoded_peak", *args)
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    named = [line.split(":")[0] for line in lines]
    assert named == ["b.mp4", "b.mkv", "b.webm", "b.wav", "folder"], done.stderr
    assert all("cannot be written" in line for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "folder", "sound"]
    assert not os.listdir(tmp_path / "folder")
