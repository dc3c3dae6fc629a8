"""Writing video files: the picture of a source with new sound, and everything else that came with it.

in   a source video, sound (n,) at 16 kHz, which stretch of the picture
out  a file whose picture is copied packet by packet where that is possible, and encoded anew where it is not

Like `common.ffmpeg`, this runs in a child process and does not import torch.
"""

import heapq
import io
import math
import re
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common.ffmpeg import (
    LONGEST,
    SAMPLE_RATE,
    MediaError,
    check_start,
    demuxed,
    display_matrix,
    frame_rate,
    frames_from,
    is_cover,
    lacks_display_times,
    opened,
    picture_stream,
    probe,
    until_error,
)

# what we write: the muxer and the sound codec in it
CONTAINERS = {
    ".mp4": ("mp4", "aac"),
    ".m4v": ("mp4", "aac"),
    ".mov": ("mov", "aac"),
    ".mkv": ("matroska", "flac"),
    ".webm": ("webm", "libopus"),
}
# tags that describe the old file
STRUCTURE = {"major_brand", "minor_version", "compatible_brands", "encoder", "timecode"}
TICK = Fraction(1, 90000)  # seconds; the clock of what is encoded anew
COLOURS = ("color_primaries", "color_trc", "colorspace", "color_range")
UNSPECIFIED, BT709, LIMITED, FULL = 2, 1, 1, 2  # ITU-T H.273 code points; of the range FFmpeg's own
HDR10 = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")
# FFmpeg refuses: time stamps no muxer accepts, a codec tag the container does not know
REFUSED = (av.error.ArgumentError, av.error.InvalidDataError, av.error.PatchWelcomeError)


@dataclass(frozen=True)
class Job:
    """One file to write: the picture of `source` from `start` on for `seconds`, under the sound `wav` (n,)."""

    source: Path
    wav: np.ndarray
    tags: dict
    start: float
    seconds: float
    suffix: str
    keep_tracks: bool = False

    @property
    def muxer(self):
        return CONTAINERS[self.suffix][0]

    @property
    def whole(self):
        """Whether it is all of the picture."""
        return self.start == 0 and self.seconds > probe(self.source).duration - 1e-3


# ---- which container ---------------------------------------------------------------------------


@cache
def holds(suffix, codec):
    """Whether the container of this suffix takes this video codec, by FFmpeg's own account."""
    with av.open(io.BytesIO(), "w", format=CONTAINERS[suffix][0]) as empty:
        return codec in empty.supported_codecs


def output_suffix(source):
    """The suffix under which `write_video` can copy the picture of `source`: its own if we write sound there, else
    .mp4, .mkv or .mov; and .mp4 for what none of them holds, which is then encoded anew, as uncompressed pictures and
    animated gif are."""
    codec, suffix = probe(source).codec, Path(source).suffix.lower()
    if codec in (
        "gif",
        "rawvideo",
    ):  # QuickTime and Matroska could hold them, and no player expects them there
        return ".mp4"
    own = (suffix,) if suffix in CONTAINERS else ()
    return next((s for s in (*own, ".mp4", ".mkv", ".mov") if holds(s, codec)), ".mp4")


# ---- the picture, copied -----------------------------------------------------------------------


def display_times(source):
    """{number of a packet in order of decoding: time stamp} of a stream that has none for display.

    Decoding tells the order: every packet is numbered, and the n-th frame shown takes the n-th packet's time. None
    where packets and frames do not come in pairs (two fields a frame, damage)."""
    with opened(source) as container:
        stream = picture_stream(container, source)
        reorders = stream.codec_context.has_b_frames
        slots, numbers = [], []
        with suppress(av.error.EOFError):
            for packet in demuxed(container, source):
                if packet.stream.index != stream.index:
                    continue
                if packet.size:
                    slots.append(packet.dts)
                    packet.pts = packet.dts = len(slots) - 1
                if reorders:
                    numbers += [frame.pts for frame in packet.decode()]
                elif packet.size:
                    numbers.append(packet.pts)
    if sorted(n for n in numbers if n is not None) != list(range(len(slots))) or None in slots:
        return None
    return dict(zip(numbers, slots, strict=True))


def in_display_order(packets, times):
    """Packets whose order of decoding alone is known, with both time stamps: see `display_times`."""
    slots = sorted(times.values())
    late = max(
        slot - times[number] for number, slot in enumerate(slots)
    )  # decoding has to run ahead by this
    number = 0
    for packet in packets:
        if packet.size:
            packet.pts = times[number]
            packet.dts = slots[number] - late
            number += 1
            yield packet


def copied_packets(packets, track, first, end):
    """The source's own packets, moved so that the first shown picture is at 0; what cannot decode before it is left."""
    begun, extra, held = False, 0, []
    for packet in packets:
        if packet.pts is None and packet.dts is None:  # the demuxer's closing mark
            continue
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - first
        begun = begun or packet.is_keyframe or packet.pts >= 0
        if (
            packet.is_discard and packet.pts >= end
        ):  # behind the edit list's end, yet others may be predicted
            packet.pts = end + extra  # from it: it stays, for one tick
            packet.duration = 1
            extra += 1
        if not begun:
            continue
        packet.stream = track
        held.append(packet)
        if packet.dts is not None:  # Matroska stores no decoding times: the first few are unknown
            packet.dts -= first
            for back, early in enumerate(reversed(held)):
                early.dts = packet.dts - back
            yield from held
            held.clear()
    for packet in held:
        packet.dts = packet.pts
        yield packet


class KeyFrameCut(NamedTuple):
    """Time stamps, in ticks of the source, of a cut that can be copied."""

    first: int  # of the key frame it begins with
    last: int  # of the picture shown last
    behind: int | None  # of the key frame that follows, None at the end of the film


def cut_at_key_frames(source, start, seconds):
    """A KeyFrameCut where both ends fall on key frames within half a frame, and nothing outside is shown inside or
    predicted from there; else None."""
    info = probe(source)
    near = 0.5 / info.fps
    low = info.start + start
    high = math.inf if start + seconds > info.duration - near else low + seconds
    first = last = behind = None
    with opened(source) as container:
        stream = picture_stream(container, source)
        if lacks_display_times(container, stream):
            return None
        for packet in until_error(demuxed(container, source)):
            if packet.stream.index != stream.index or not packet.size:
                continue
            if packet.pts is None or packet.is_discard:
                return None
            moment = float(packet.pts * packet.time_base)
            if packet.is_keyframe and first is None and abs(moment - low) <= near:
                first = last = packet.pts
            elif (
                packet.is_keyframe
                and first is not None
                and behind is None
                and abs(moment - high) <= near
            ):
                behind = packet.pts
            elif low + near < moment < high - near:
                if (
                    first is None or behind is not None
                ):  # it precedes or follows in decoding what it is shown after
                    return None
                last = max(last, packet.pts)
            elif moment >= high and first is not None and behind is None:
                return None  # no key frame where the cut ends
    if first is None or behind is None and high < math.inf:
        return None
    return KeyFrameCut(first, last, behind)


def cut_packets(packets, track, cut, zero, end):
    """The packets from one key frame up to another, in ticks from where the cut begins: the first picture at 0, the last
    until `end`. Pictures shown before the first, which follow it in decoding, are left out."""
    begun = False
    for packet in packets:
        if packet.is_keyframe and packet.pts == cut.behind:
            return
        first = not begun and packet.is_keyframe and packet.pts == cut.first
        begun = begun or first
        if not begun or not packet.size or packet.pts < cut.first:
            continue
        final = packet.pts == cut.last
        packet.pts -= zero
        packet.dts = packet.pts if packet.dts is None else packet.dts - zero
        if first:  # within half a frame of the beginning
            packet.pts = 0
            packet.dts = min(0, packet.dts)
        if final:
            packet.duration = max(1, end - packet.pts)
        packet.stream = track
        yield packet


# ---- the picture, encoded anew -----------------------------------------------------------------


@dataclass
class Encoding:
    """How frames like `frame` are encoded anew: 8 bit as H.264, more as HEVC (webm: VP9), in the source's colours."""

    frame: av.VideoFrame
    muxer: str

    @property
    def deep(self):
        return max(part.bits for part in self.frame.format.components) > 8

    @property
    def size(self):
        """Coded, before rotation, and even, as 4:2:0 wants."""
        return max(2, self.frame.width // 2 * 2), max(2, self.frame.height // 2 * 2)

    @property
    def codec(self):
        """This FFmpeg's VP9 has 8 bits alone (and its AV1 encoder, run as root, makes the process a real-time one)."""
        if self.muxer == "webm":
            return "libvpx-vp9"
        return (
            "libx265" if self.deep and min(self.size) >= 64 else "libx264"
        )  # HEVC takes no tiny pictures

    @property
    def pixels(self):
        return "yuv420p10le" if self.deep and self.codec != "libvpx-vp9" else "yuv420p"

    @property
    def name(self):
        name = {"libx264": "H.264", "libx265": "HEVC", "libvpx-vp9": "VP9"}[self.codec]
        if not self.deep:
            return name
        return (
            f"{name}, 10 bits a sample"
            if "10" in self.pixels
            else f"{name}, 8 bits a sample instead of more"
        )

    def add_track(self, container, rate, aspect):
        options = {"crf": "18"}
        if self.codec == "libx265":
            options |= {"preset": "fast", "x265-params": "log-level=error"}
        track = container.add_stream(self.codec, rate=rate, options=options)
        track.width, track.height = self.size
        track.pix_fmt = self.pixels
        track.codec_context.time_base = TICK
        track.codec_context.sample_aspect_ratio = aspect
        for name in COLOURS:
            setattr(track.codec_context, name, self.colours()[name])
        if self.codec == "libx265" and self.muxer in ("mp4", "mov"):
            track.codec_context.codec_tag = "hvc1"
        if display_matrix(self.frame):
            track.set_display_matrix(display_matrix(self.frame))
        return track

    def colours(self):
        if self.frame.format.is_rgb:
            return {
                "color_primaries": BT709,
                "color_trc": BT709,
                "colorspace": BT709,
                "color_range": LIMITED,
            }
        colours = {name: int(getattr(self.frame, name)) for name in COLOURS}
        if self.frame.format.name.startswith("yuvj"):
            colours["color_range"] = FULL
        return colours

    def convert(self, frame, scaler):
        """Depth and chroma as the track has them; matrix and range stay."""
        if (frame.format.name, frame.width, frame.height) == (self.pixels, *self.size):
            return frame
        if frame.format.is_rgb:
            colours = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
        else:
            # swscale takes grey for full range, whatever it is told: both the same, and it leaves the values alone
            full = self.colours()["color_range"] == FULL or self.frame.format.name.startswith(
                "gray"
            )
            colour_range = "JPEG" if full else "MPEG"
            colours = {"src_color_range": colour_range, "dst_color_range": colour_range}
        return scaler.reformat(frame, *self.size, format=self.pixels, threads=1, **colours)


def first_frame(source, start):
    """The frame on view at `start`, which decides how a cut is encoded."""
    chosen = None
    for moment, frame in frames_from(source, start):
        if chosen is not None and moment > start + 1e-9:
            break
        chosen = frame
    return chosen


def encoded_packets(source, track, encoding, start, seconds):
    """The pictures of a cut: from the one on view at `start`, each shown until the next or the end."""

    def encode(moment, frame, until):
        image = encoding.convert(frame, scaler)
        image.pts, image.time_base, image.pict_type = moment, TICK, 0
        lengths[moment] = until - moment
        return timed_packets(track.encode(image))

    def timed_packets(packets):
        for packet in packets:
            packet.duration = lengths.pop(
                packet.pts
            )  # the encoder forgets how long the last picture is shown
            yield packet

    lengths, end, view, scaler = {}, round(seconds / TICK), None, VideoReformatter()
    for moment, frame in frames_from(source, start):
        moment = min(max(0, round((moment - start) / TICK)), end)
        if view and moment > view[0]:
            yield from encode(*view, moment)
        if moment == end:
            break
        view = moment, frame
    else:
        yield from encode(*view, end)
    yield from timed_packets(track.encode(None))


# ---- sound, and everything else in the source --------------------------------------------------


def sound_packets(wav, track):
    """Sound (n,) encoded a second at a time."""
    for at in range(0, len(wav), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(
            wav[None, at : at + SAMPLE_RATE], format="flt", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, at, Fraction(1, SAMPLE_RATE)
        yield from track.encode(frame)
    yield from track.encode(None)


def describe(stream):
    """A stream in words: "subtitles (mov_text, deu)"."""
    kinds = {"audio": "sound track", "subtitle": "subtitles", "video": "second picture"}
    words = [stream.codec_context.name] if stream.codec_context else []
    words += [
        stream.metadata[key]
        for key in ("language", "filename", "handler_name")
        if stream.metadata.get(key)
    ]
    words = [word for word in words if word != "und"]
    return kinds.get(stream.type, stream.type) + (f" ({', '.join(words)})" if words else "")


@dataclass
class Extras:
    """The source's other streams: which go along, and the names of those that cannot."""

    tracks: dict = field(default_factory=dict)  # number of the source's stream -> our track
    dropped: list = field(default_factory=list)

    def add(self, container, stream, track=None):
        try:
            track = track or container.add_stream_from_template(stream)
        except (ValueError, av.error.FFmpegError):
            self.dropped.append(describe(stream))
            return
        track.metadata.update(stream.metadata)
        track.disposition = stream.disposition
        if stream.type == "audio":  # ours is the one to play
            track.disposition = stream.disposition & ~av.stream.Disposition.default
        self.tracks[stream.index] = track


def cover_image(source, index):
    """The bytes of a cover, which FFmpeg hands out as the only packet of its stream."""
    with opened(source) as container:
        return next(
            (bytes(packet) for packet in container.demux(container.streams[index]) if packet.size),
            b"",
        )


def add_extras(container, src, picture, job):
    """Add the tracks of subtitles, attachments, covers and, if wanted, the source's own sound; -> Extras."""
    extras = Extras()
    if job.keep_tracks:
        for stream in src.streams.audio:
            extras.add(container, stream)
    elif len(src.streams.audio) > 1:
        tracks = ", ".join(describe(stream) for stream in src.streams.audio)
        extras.dropped.append(f"{tracks}: replaced (--keep-tracks keeps them)")
    for stream in src.streams:
        if stream.index == picture.index or stream.type == "audio":
            continue
        if stream.type == "video" and is_cover(stream) and job.muxer == "matroska":
            name = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}
            name = name.get(stream.codec_context.name, ("cover", "application/octet-stream"))
            container.add_attachment(*name, cover_image(job.source, stream.index))
        elif stream.type == "video" and is_cover(stream) and job.muxer != "webm":
            extras.add(container, stream, container.add_stream_from_template(stream, opaque=True))
        elif stream.type == "subtitle" or stream.type == "attachment" and job.muxer == "matroska":
            extras.add(container, stream)
        elif stream.type == "data" and ("timecode" in stream.metadata or src.chapters()):
            pass  # the muxer makes the tracks of time code and chapters anew
        else:
            extras.dropped.append(describe(stream))
    return extras


def extra_packets(job, tracks):
    """Packets of the further tracks, on the cut's clock: what begins before it is left out, but for subtitles, which
    are shown for the rest of their time."""
    zero = probe(job.source).start + job.start
    with opened(job.source) as container:
        streams = [container.streams[index] for index in tracks]
        streams = [stream for stream in streams if stream.type != "attachment"]
        for packet in until_error(container.demux(streams)) if streams else ():
            first = round(zero / packet.time_base)
            end = round(job.seconds / packet.time_base)
            stamp = packet.dts if packet.pts is None else packet.pts
            if is_cover(packet.stream):
                stamp = first
            if not packet.size or stamp is None:
                continue
            packet.pts = stamp - first
            if packet.stream.type == "subtitle" and packet.pts < 0 < packet.pts + (
                packet.duration or 0
            ):
                packet.duration += packet.pts
                packet.pts = 0
            packet.dts = packet.pts
            middle = packet.pts + (packet.duration or 0) // 2
            if packet.pts < 0 or middle >= end:
                continue
            if packet.stream.type == "subtitle" and packet.duration:
                packet.duration = min(packet.duration, end - packet.pts)
            packet.stream = tracks[packet.stream.index]
            yield packet


def chapters_of(src, zero, seconds):
    """The source's chapters on the cut's clock, those of them that lie in it."""
    kept = []
    for chapter in src.chapters():
        tick = chapter["time_base"]
        low = max(0, chapter["start"] - round(zero / tick))
        high = min(round(seconds / tick), chapter["end"] - round(zero / tick))
        if high > low:
            kept.append({**chapter, "start": low, "end": high})
    return kept


def timecode_of(src, picture):
    """The time code of the source's first picture, wherever it is written, or None."""
    places = [picture.metadata, *(stream.metadata for stream in src.streams.data), src.metadata]
    for metadata in places:
        for key, value in metadata.items():
            if key.lower() == "timecode":
                return value
    return None


def later_timecode(text, count, rate):
    """A time code HH:MM:SS:FF so many pictures later; with ; or . before the frames, two (at 60 a second four) numbers are
    dropped each minute but every tenth (SMPTE 12M)."""
    fields = re.fullmatch(r"(\d+):(\d+):(\d+)([:;.])(\d+)", text)
    if not fields or not rate:
        return text
    hours, minutes, secs, frames = (int(fields[k]) for k in (1, 2, 3, 5))
    nominal = round(rate)
    dropped = 0 if fields[4] == ":" else nominal // 15
    minutes += 60 * hours
    number = (60 * minutes + secs) * nominal + frames - dropped * (minutes - minutes // 10)
    number += count
    if dropped:  # put the dropped numbers back in
        per_ten = 600 * nominal - 9 * dropped
        per_one = 60 * nominal - dropped
        tens, rest = divmod(number, per_ten)
        number += 9 * dropped * tens + dropped * max(0, (rest - dropped) // per_one)
    secs, frames = divmod(number, nominal)
    return f"{secs // 3600 % 24:02}:{secs // 60 % 60:02}:{secs % 60:02}{fields[4]}{frames:02}"


# ---- Matroska's aspect ratio -------------------------------------------------------------------


def set_display_size(path, width, height):
    """Write a display size into the picture's track of a Matroska file: PyAV has no way to tell the muxer of an aspect
    ratio. Its place is a Projection of no effect (14 bytes), which `write` asked for; nothing else moves."""
    with open(path, "rb") as file:
        content = bytearray(file.read(65536))
    unit = content.find(b"\x54\xb2\x81\x04")  # DisplayUnit: unknown
    place = content.find(b"\x76\x70\x8b\x76\x75\x88")  # Projection, of one ProjectionPoseRoll
    if place < 0:
        return False
    if unit >= 0:
        content[unit + 3] = 0  # pixels
    content[place : place + 14] = (
        struct.pack(">HBH", 0x54B0, 0x82, width)
        + struct.pack(">HBH", 0x54BA, 0x82, height)
        + b"\xec\x82\x00\x00"
    )
    with open(path, "r+b") as file:
        file.write(content)
    return True


def display_size(width, height, aspect):
    """Pixels of a picture with square ones: one side grows. 16 bits have to hold it."""
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)
    largest = max(width, height)
    if largest > 65535:
        width, height = width * 65535 // largest, height * 65535 // largest
    return max(1, width), max(1, height)


# ---- one file ----------------------------------------------------------------------------------


def copied_track(container, stream, rate, source_family, muxer, keep_tag):
    """A track of the source's own kind: frame rate, aspect ratio, language and the codec's four letters included."""
    track = container.add_stream_from_template(stream, opaque=True)  # so that no encoder need exist
    context = track.codec_context
    if stream.sample_aspect_ratio:
        context.sample_aspect_ratio = stream.sample_aspect_ratio
    if rate:
        context.framerate = rate
    tag = stream.codec_context.codec_tag if source_family.startswith("mov") else ""
    if stream.codec_context.codec.canonical_name == "hevc" and tag != "dvh1":
        tag = "hvc1"  # QuickTime and Safari refuse hev1
    if keep_tag and muxer in ("mp4", "mov") and len(tag) == 4 and tag.isprintable():
        context.codec_tag = tag
    return track


def muxer_options(muxer, tags, patch_aspect):
    options = {}
    if muxer in ("mp4", "mov"):
        dotted = any("." in key for key in tags)  # com.apple.quicktime.make
        options["movflags"] = "faststart+use_metadata_tags" if dotted else "faststart"
    if patch_aspect:
        options["write_crc32"] = "0"  # of the header that is patched
    return options


def add_picture(dst, src, stream, job, method, first, keep_tag):
    """-> the picture's track and its packets, copied or encoded anew."""
    rate = frame_rate(stream)
    if method == "encode":
        encoding = Encoding(first, job.muxer)
        rate_or_mean = rate or Fraction(probe(job.source).fps).limit_denominator(1001)
        track = encoding.add_track(dst, rate_or_mean, stream.sample_aspect_ratio or Fraction(1))
        pictures = encoded_packets(job.source, track, encoding, job.start, job.seconds)
    else:
        track = copied_track(dst, stream, rate, src.format.name, job.muxer, keep_tag)
        pictures = source_packets(src, stream, track, job, method)
    track.metadata.update(stream.metadata)
    if timecode := timecode_of(src, stream):
        # of the picture on view at the start; a copied cut begins with the key frame next to it
        nearest = 0.5 if isinstance(method, KeyFrameCut) else 1e-3
        count = math.floor(job.start * (rate or 0) + nearest)
        track.metadata["timecode"] = later_timecode(timecode, count, rate)
    return track, pictures


def add_sound(dst, codec):
    # As much as AAC takes at 16 kHz mono; there its fast search is 4 times faster and no worse (measured).
    options = {"aac_coder": "fast"} if codec == "aac" else {}
    track = dst.add_stream(codec, rate=SAMPLE_RATE, layout="mono", options=options)
    track.bit_rate = 96000
    track.disposition = av.stream.Disposition.default
    return track


def write(out, job, method, keep_tag=True, extras_too=True):
    """Write `out`; `method` is "copy", "encode" or a KeyFrameCut. -> names of what was left out"""
    first = first_frame(job.source, job.start)
    with opened(job.source) as src:
        stream = picture_stream(src, job.source)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        anamorphic = aspect != 1 and job.muxer in ("matroska", "webm")
        patch_aspect = anamorphic and not display_matrix(first)  # a rotation needs the same place
        tags = {key: value for key, value in src.metadata.items() if key.lower() not in STRUCTURE}
        tags |= job.tags
        options = muxer_options(job.muxer, tags, patch_aspect)
        with av.open(f"file:{out}", "w", job.muxer, container_options=options) as dst:
            dst.metadata.update(tags)
            track, pictures = add_picture(dst, src, stream, job, method, first, keep_tag)
            if patch_aspect:
                track.set_display_rotation(180)  # leaves the place that `set_display_size` needs
            sound = add_sound(dst, CONTAINERS[job.suffix][1])
            extras = add_extras(dst, src, stream, job) if extras_too else Extras()
            if extras_too and src.chapters():
                zero = probe(job.source).start + job.start
                dst.set_chapters(chapters_of(src, zero, job.seconds))
            sources = [pictures, sound_packets(job.wav, sound)]
            if extras.tracks:
                sources.append(extra_packets(job, extras.tracks))
            for packet in heapq.merge(*sources, key=lambda packet: packet.dts * packet.time_base):
                dst.mux_one(packet)
    if patch_aspect and not set_display_size(out, *display_size(*coded_size(track), aspect)):
        extras.dropped.append(f"pixel aspect ratio {aspect}")
    if anamorphic and not patch_aspect and job.muxer == "webm":
        extras.dropped.append(
            f"pixel aspect ratio {aspect}: beside a rotation webm has no place for it"
        )
    if method == "encode" and any(first.side_data.get(name) for name in HDR10):
        extras.dropped.append("HDR10 mastering metadata")
    return extras.dropped


def coded_size(track):
    return track.codec_context.width, track.codec_context.height


def source_packets(src, stream, track, job, method):
    """The source's own packets of the picture, in ticks from where the job starts."""
    info = probe(job.source)
    packets = (p for p in until_error(demuxed(src, job.source)) if p.stream.index == stream.index)
    if lacks_display_times(src, stream):
        packets = in_display_order(packets, display_times(job.source))
    if method == "copy":
        first, end = (round(moment / stream.time_base) for moment in (info.start, info.duration))
        return copied_packets(packets, track, first, end)
    first, end = (
        round(moment / stream.time_base) for moment in (info.start + job.start, job.seconds)
    )
    return cut_packets(packets, track, method, first, end)


def choose_method(job):
    """-> ("copy", "encode" or a KeyFrameCut, and why the picture has to be encoded anew)"""
    info = probe(job.source)
    if not holds(job.suffix, info.codec):
        return "encode", f"{job.suffix} does not hold {info.codec}"
    with opened(job.source) as src:
        unordered = lacks_display_times(src, picture_stream(src, job.source))
    if unordered and (not job.whole or display_times(job.source) is None):
        return "encode", "its pictures have no time stamps for display"
    if job.whole:
        return "copy", ""
    cut = cut_at_key_frames(job.source, job.start, job.seconds)
    return (cut, "") if cut else ("encode", "the cut does not begin and end on key frames")


def attempts(job):
    """(method, keyword arguments of `write`, what to say) one after the other, until a muxer takes it."""
    method, reason = choose_method(job)
    if method != "encode":
        said = (
            ""
            if method == "copy"
            else "the cut begins and ends on key frames; its picture is copied"
        )
        yield method, {}, said
        yield method, {"keep_tag": False}, said
        yield method, {"keep_tag": False, "extras_too": False}, said
        reason = f"cannot be copied into {job.suffix}"
    encoding = Encoding(first_frame(job.source, job.start), job.muxer)
    said = f"{reason}; its picture is encoded anew ({encoding.name})"
    yield "encode", {}, said
    yield "encode", {"extras_too": False}, said


def write_video(source, wav, out, tags=None, start=0.0, duration=None, keep_tracks=False):
    """The picture of `source` with the sound `wav` (n,), cut or padded to be exactly as long as the picture, into the
    file `out`, which the caller makes whole.

    Copied packet by packet: all of the picture, with rotation, colours, aspect ratio and codec tag, and a cut that
    begins and ends on key frames. Encoded anew, which is said: any other cut, and what `out` cannot hold. Subtitles,
    chapters, attachments, cover and time code go along where the container takes them, the source's own sound tracks
    with `keep_tracks`; what is left out is said."""
    out = Path(out)
    seconds = min(check_start(source, start) - start, duration or LONGEST)
    n = round(seconds * SAMPLE_RATE)
    wav = np.pad(np.clip(wav[:n], -1, 1), (0, max(0, n - len(wav)))).astype(np.float32)
    job = Job(Path(source), wav, tags or {}, start, seconds, out.suffix.lower(), keep_tracks)
    refusal = None
    for method, options, said in attempts(job):
        try:
            dropped = write(out, job, method, **options)
        except REFUSED as error:
            refusal = error
            continue
        if not options.get("extras_too", True):
            dropped = ["all further streams"]
        if said:
            warnings.warn(f"{source}: {said}", stacklevel=2)
        if dropped:
            warnings.warn(f"{source}: not kept in {out.suffix}: {'; '.join(dropped)}", stacklevel=2)
        return
    raise MediaError(
        f"{source}: its picture cannot be written into {out.suffix} ({refusal.strerror}); convert it to mp4"
    ) from refusal
