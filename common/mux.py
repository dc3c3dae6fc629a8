"""Writing video files: the picture of a source with new sound, and all else that came with it.

in   a source video, sound (n,) or (n, channels), which stretch of the picture
out  a file whose picture is copied packet by packet where possible, and encoded anew where not

Like `common.ffmpeg`, this runs in a child process and does not import torch.
"""

import heapq
import io
import math
import re
import struct
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common import xmp
from common.ffmpeg import (
    LONGEST,
    SAMPLE_RATE,
    MediaError,
    check_start,
    demux,
    display_matrix,
    frame_rate,
    frames_from,
    is_cover,
    lacks_display_times,
    open_input,
    picture_stream,
    probe,
    side_data,
    stamp_of,
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
# QuickTime and Matroska could hold these two, and no player expects them there
UNEXPECTED = ("gif", "rawvideo")
# tags that describe the old file
STRUCTURE = {"major_brand", "minor_version", "compatible_brands", "encoder", "timecode"}
TICK = Fraction(1, 90000)  # seconds; the clock of what is encoded anew
COLORS = ("color_primaries", "color_trc", "colorspace", "color_range")
BT709 = {"color_primaries": 1, "color_trc": 1, "colorspace": 1, "color_range": 1}  # ITU-T H.273
FULL_RANGE = 2  # FFmpeg's own code
HDR10 = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")
# FFmpeg refuses: time stamps no muxer accepts, a codec tag the container does not know
REFUSALS = (av.error.ArgumentError, av.error.InvalidDataError, av.error.PatchWelcomeError)


@dataclass(frozen=True)
class Job:
    """One file to write: `seconds` of the picture of `source` from `start` on, with new sound."""

    source: Path
    wav: np.ndarray | Path  # (n, channels), or a file of that as plain float32
    tags: dict
    start: float
    seconds: float
    suffix: str
    keep_tracks: bool = False
    rate: int = SAMPLE_RATE  # of the sound
    channels: int = 1

    @property
    def muxer(self):
        return CONTAINERS[self.suffix][0]

    @property
    def offset(self):
        """The start on the container's own clock, in seconds."""
        return probe(self.source).start + self.start

    @property
    def is_cut(self):
        """Whether it is less than all of the picture."""
        return self.start > 0 or self.seconds <= probe(self.source).duration - 1e-3


# ---- which container ---------------------------------------------------------------------------


@cache
def holds(suffix: str, codec: str) -> bool:
    """Whether the container of this suffix takes this video codec, according to FFmpeg."""
    with av.open(io.BytesIO(), "w", format=CONTAINERS[suffix][0]) as empty:
        return codec in empty.supported_codecs


def output_suffix(source: Path | str) -> str:
    """The suffix under which `write_video` can copy the picture of `source`.

    Its own if we write sound there, else .mp4, .mkv or .mov; and .mp4 for what none of them holds,
    which is then encoded anew.
    """
    codec = probe(source).codec
    suffixes = [".mp4", ".mkv", ".mov"]
    if codec in UNEXPECTED:
        return ".mp4"
    own = Path(source).suffix.lower()
    if own in CONTAINERS:
        suffixes.insert(0, own)
    return next((suffix for suffix in suffixes if holds(suffix, codec)), ".mp4")


# ---- the picture, copied -----------------------------------------------------------------------


def packets_of_picture(container, stream, path):
    """The packets of one stream, up to the first read error."""
    packets = until_error(demux(container, path))
    return (packet for packet in packets if packet.stream.index == stream.index)


def display_times(source):
    """{number of a packet in order of decoding: time stamp} of a stream that has none for display.

    Decoding tells the order: every packet is numbered, and the n-th frame shown takes the n-th
    packet's time. None where packets and frames do not pair (two fields a frame, damage).
    """
    slots = []
    numbers = []
    with open_input(source) as container:
        stream = picture_stream(container, source)
        reorders = stream.codec_context.has_b_frames  # else frames come in the packets' order
        with suppress(av.error.EOFError):
            for packet in demux(container, source):
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
    """Packets of which only the order of decoding is known, with both time stamps.

    `times` are those of `display_times`.
    """
    slots = sorted(times.values())
    # decoding has to run ahead of display by this
    delay = max(slot - times[number] for number, slot in enumerate(slots))
    packets = (packet for packet in packets if packet.size)
    for number, packet in enumerate(packets):
        packet.pts = times[number]
        packet.dts = slots[number] - delay
        yield packet


def copied_packets(packets, track, first, end):
    """The source's own packets, moved by `first` ticks so that the first picture is at 0.

    What cannot decode before it is left out. Matroska stores no decoding times, so those of the
    first few packets are unknown: they are held until one is known, and count down from it.
    """
    begun = False
    extra = 0
    held = []
    for packet in packets:
        if stamp_of(packet) is None:  # the demuxer's closing mark
            continue
        packet.pts = stamp_of(packet) - first
        begun = begun or packet.is_keyframe or packet.pts >= 0
        # behind the edit list's end, yet others may be predicted from it: it stays, for one tick
        if packet.is_discard and packet.pts >= end:
            packet.pts = end + extra
            packet.duration = 1
            extra += 1
        if not begun:
            continue
        packet.stream = track
        held.append(packet)
        if packet.dts is not None:
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
    next: int | None  # of the key frame that follows, None at the end of the film


def cut_at_key_frames(source, start, seconds):
    """A KeyFrameCut where both ends fall on key frames within half a frame, else None.

    None, too, where something outside is shown inside or predicted from there.
    """
    # times on the container's clock; a cut to the end needs no key frame behind it
    info = probe(source)
    near = 0.5 / info.fps
    low = info.start + start
    high = low + seconds
    if start + seconds > info.duration - near:
        high = math.inf
    first = last = following = None
    with open_input(source) as container:
        stream = picture_stream(container, source)
        if lacks_display_times(container, stream):
            return None
        for packet in packets_of_picture(container, stream, source):
            if not packet.size:
                continue
            if packet.pts is None or packet.is_discard:
                return None
            moment = float(packet.pts * packet.time_base)
            inside = first is not None and following is None
            if packet.is_keyframe and first is None and abs(moment - low) <= near:
                first = last = packet.pts
            elif packet.is_keyframe and inside and abs(moment - high) <= near:
                following = packet.pts
            elif low + near < moment < high - near:
                # decoded before the first key frame or after the next, but shown between them
                if not inside:
                    return None
                last = max(last, packet.pts)
            elif inside and moment >= high:
                return None  # no key frame where the cut ends
    if first is None or (following is None and high < math.inf):
        return None
    return KeyFrameCut(first, last, following)


def cut_packets(packets, track, cut, zero, end):
    """The packets from one key frame up to another, in ticks from where the cut begins.

    The first picture is shown at 0, the last until `end`. Pictures shown before the first, which
    follow it in decoding, are left out.
    """
    begun = False
    for packet in packets:
        if packet.is_keyframe and packet.pts == cut.next:
            return
        is_first = not begun and packet.is_keyframe and packet.pts == cut.first
        begun = begun or is_first
        if not begun or not packet.size or packet.pts < cut.first:
            continue
        is_last = packet.pts == cut.last
        packet.pts -= zero
        packet.dts = packet.pts if packet.dts is None else packet.dts - zero
        if is_first:  # within half a frame of the beginning
            packet.pts = 0
            packet.dts = min(0, packet.dts)
        if is_last:
            packet.duration = max(1, end - packet.pts)
        packet.stream = track
        yield packet


# ---- the picture, encoded anew -----------------------------------------------------------------


@dataclass
class Encoding:
    """How frames like `frame` are encoded anew, in the source's colors.

    8 bits a sample as H.264, more as HEVC; in webm VP9.
    """

    frame: av.VideoFrame
    muxer: str

    @property
    def deep(self):
        """Whether the source has more than 8 bits a sample."""
        return max(part.bits for part in self.frame.format.components) > 8

    @property
    def size(self):
        """Width and height before rotation, even, as 4:2:0 wants."""
        return max(2, self.frame.width // 2 * 2), max(2, self.frame.height // 2 * 2)

    @property
    def codec(self):
        # this FFmpeg's VP9 has 8 bits alone; its AV1, run as root, makes itself a real-time process
        if self.muxer == "webm":
            return "libvpx-vp9"
        # HEVC takes no tiny pictures
        return "libx265" if self.deep and min(self.size) >= 64 else "libx264"

    @property
    def pixels(self):
        return "yuv420p10le" if self.deep and self.muxer != "webm" else "yuv420p"

    @property
    def name(self):
        """For people: codec, and bits a sample where they matter."""
        name = {"libx264": "H.264", "libx265": "HEVC", "libvpx-vp9": "VP9"}[self.codec]
        if not self.deep:
            return name
        bits = "8 bits a sample instead of more" if self.muxer == "webm" else "10 bits a sample"
        return f"{name}, {bits}"

    @property
    def colors(self):
        """Primaries, transfer, matrix and range of the result, as FFmpeg's codes."""
        if self.frame.format.is_rgb:
            return BT709
        colors = {name: int(getattr(self.frame, name)) for name in COLORS}
        if self.frame.format.name.startswith("yuvj"):
            colors["color_range"] = FULL_RANGE
        return colors

    def add_track(self, container, rate, aspect):
        """A video track of this encoding in an output container."""
        options = {"crf": "18"}
        if self.codec == "libx265":
            options |= {"preset": "fast", "x265-params": "log-level=error"}
        track = container.add_stream(self.codec, rate=rate, options=options)
        track.width, track.height = self.size
        track.pix_fmt = self.pixels
        context = track.codec_context
        context.time_base = TICK
        context.sample_aspect_ratio = aspect
        for name, code in self.colors.items():
            setattr(context, name, code)
        if self.codec == "libx265" and self.muxer in ("mp4", "mov"):
            context.codec_tag = "hvc1"
        if matrix := display_matrix(self.frame):
            track.set_display_matrix(matrix)
        return track

    def convert(self, frame, scaler):
        """Depth and chroma as the track has them; matrix and range stay."""
        if (frame.format.name, frame.width, frame.height) == (self.pixels, *self.size):
            return frame
        if frame.format.is_rgb:
            colors = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
        else:
            # swscale takes gray for full range whatever it is told: with the same range on both
            # sides it leaves the values alone
            gray = self.frame.format.name.startswith("gray")
            full = gray or self.colors["color_range"] == FULL_RANGE
            color_range = "JPEG" if full else "MPEG"
            colors = {"src_color_range": color_range, "dst_color_range": color_range}
        return scaler.reformat(frame, *self.size, format=self.pixels, threads=1, **colors)


def first_frame(source, start):
    """The frame on view at `start`, which decides how a cut is encoded."""
    # the last that begins by then
    chosen = None
    for moment, frame in frames_from(source, start):
        if chosen is not None and moment > start + 1e-9:
            break
        chosen = frame
    return chosen


def views(source, start, seconds):
    """(ticks since `start`, frame, ticks until the next) of the pictures of a cut.

    From the one on view at `start`; the last is shown until the end.
    """
    end = round(seconds / TICK)
    view = None
    for moment, frame in frames_from(source, start):
        moment = min(max(0, round((moment - start) / TICK)), end)
        if view and moment > view[0]:
            yield *view, moment
        if moment == end:
            return
        view = moment, frame
    yield *view, end


def encoded_packets(source, track, encoding, start, seconds):
    """The pictures of a cut, encoded, each shown until the next or the end."""
    lengths = {}
    scaler = VideoReformatter()

    def encode(image):
        for packet in track.encode(image):
            # the encoder forgets how long the last picture is shown
            packet.duration = lengths.pop(packet.pts)
            yield packet

    for moment, frame, until in views(source, start, seconds):
        image = encoding.convert(frame, scaler)
        image.pts = moment
        image.time_base = TICK
        image.pict_type = 0  # the encoder chooses its own key frames
        lengths[moment] = until - moment
        yield from encode(image)
    yield from encode(None)


# ---- sound, and everything else in the source --------------------------------------------------


def sound_seconds(sound, rate, channels, samples):
    """Sound as an array (n, channels) or a file of it as plain float32, cut or padded to so many
    samples: float32 (n, channels) in [-1, 1], a second at a time, so that none of a file stays."""
    with ExitStack() as stack:
        is_array = isinstance(sound, np.ndarray)
        file = None if is_array else stack.enter_context(open(sound, "rb"))
        for at in range(0, samples, rate):
            count = min(rate, samples - at)
            if is_array:
                block = sound.reshape(-1, channels)[at : at + count]
            else:
                block = np.frombuffer(file.read(4 * channels * count), np.float32)
                block = block.reshape(-1, channels)
            block = np.clip(block, -1, 1).astype(np.float32)
            yield np.pad(block, ((0, count - len(block)), (0, 0)))


def sound_packets(sound, track, samples):
    """Sound as of `sound_seconds`, encoded a second at a time."""
    rate = track.rate
    layout = track.layout.name
    seconds = sound_seconds(sound, rate, track.layout.nb_channels, samples)
    for second, block in enumerate(seconds):
        at = second * rate
        frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate = rate
        frame.pts = at
        frame.time_base = Fraction(1, rate)
        yield from track.encode(frame)
    yield from track.encode(None)


def describe(stream):
    """A stream in words: "subtitles (mov_text, deu)"."""
    kinds = {"audio": "sound track", "subtitle": "subtitles", "video": "second picture"}
    kind = kinds.get(stream.type, stream.type)
    words = [stream.metadata.get(key) for key in ("language", "filename", "handler_name")]
    if stream.codec_context:
        words.insert(0, stream.codec_context.name)
    words = ", ".join(word for word in words if word not in (None, "", "und"))
    return f"{kind} ({words})" if words else kind


@dataclass
class Extras:
    """The source's other streams: those that are kept, and the names of those that cannot be."""

    tracks: dict = field(default_factory=dict)  # number of the source's stream -> our track
    dropped: list = field(default_factory=list)

    def add(self, container, stream, track=None):
        """Keep a stream, as `track` or as a new track of its kind."""
        try:
            track = track or container.add_stream_from_template(stream)
        except (ValueError, av.error.FFmpegError):
            self.dropped.append(describe(stream))
            return
        track.metadata.update(stream.metadata)
        track.disposition = stream.disposition
        # our sound is the one to play
        if stream.type == "audio":
            track.disposition = stream.disposition & ~av.stream.Disposition.default
        self.tracks[stream.index] = track


def cover_image(source, index):
    """The bytes of a cover: the first packet of its stream."""
    with open_input(source) as container:
        for packet in container.demux(container.streams[index]):
            if packet.size:
                return bytes(packet)
    return b""


def add_cover(extras, container, stream, job):
    """Keep a cover: a stream in mp4 and mov, an attachment in Matroska, nothing in webm."""
    if job.muxer == "webm":
        extras.dropped.append(describe(stream))
    elif job.muxer == "matroska":
        names = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}
        name = names.get(stream.codec_context.name, ("cover", "application/octet-stream"))
        container.add_attachment(*name, cover_image(job.source, stream.index))
    else:
        extras.add(container, stream, container.add_stream_from_template(stream, opaque=True))


def add_extras(container, src, picture, job):
    """Add subtitles, attachments, covers and, if wanted, the source's sound; -> Extras."""
    extras = Extras()
    if job.keep_tracks:
        for stream in src.streams.audio:
            extras.add(container, stream)
    elif len(src.streams.audio) > 1:
        tracks = ", ".join(describe(stream) for stream in src.streams.audio)
        extras.dropped.append(f"{tracks}: replaced (--keep-tracks keeps them)")
    kept = ("subtitle", "attachment") if job.muxer == "matroska" else ("subtitle",)
    for stream in src.streams:
        if stream.index == picture.index or stream.type == "audio":
            continue
        if stream.type == "video" and is_cover(stream):
            add_cover(extras, container, stream, job)
        elif stream.type in kept:
            extras.add(container, stream)
        # the muxer makes the tracks of time code and chapters anew
        elif stream.type != "data" or ("timecode" not in stream.metadata and not src.chapters()):
            extras.dropped.append(describe(stream))
    return extras


def extra_packets(job, tracks):
    """Packets of the further tracks, on the cut's clock.

    What begins before it is left out, but for subtitles, which are shown for the rest of their
    time.
    """
    with open_input(job.source) as container:
        streams = [container.streams[index] for index in tracks]
        streams = [stream for stream in streams if stream.type != "attachment"]
        packets = until_error(container.demux(streams)) if streams else ()
        for packet in packets:
            first = round(job.offset / packet.time_base)
            end = round(job.seconds / packet.time_base)
            stamp = first if is_cover(packet.stream) else stamp_of(packet)
            if not packet.size or stamp is None:
                continue
            packet.pts = stamp - first
            length = packet.duration or 0
            if packet.stream.type == "subtitle":
                if packet.pts < 0 < packet.pts + length:
                    length += packet.pts
                    packet.pts = 0
                packet.duration = min(length, end - packet.pts)
            packet.dts = packet.pts
            # a packet counts as inside if its middle is
            if packet.pts >= 0 and packet.pts + length // 2 < end:
                packet.stream = tracks[packet.stream.index]
                yield packet


def chapters_of(src, job):
    """The source's chapters on the cut's clock, those of them that lie in it."""
    kept = []
    for chapter in src.chapters():
        zero = round(job.offset / chapter["time_base"])
        start = max(0, chapter["start"] - zero)
        end = min(round(job.seconds / chapter["time_base"]), chapter["end"] - zero)
        if end > start:
            kept.append({**chapter, "start": start, "end": end})
    return kept


def timecode_of(src, picture):
    """The time code of the source's first picture, wherever it is written, or None."""
    places = [picture.metadata, *(stream.metadata for stream in src.streams.data), src.metadata]
    for metadata in places:
        for key, value in metadata.items():
            if key.lower() == "timecode":
                return value
    return None


def later_timecode(text: str, count: int, rate) -> str:
    """A time code HH:MM:SS:FF `count` pictures later.

    With ; or . before the frames, two numbers (at 60 a second four) are dropped each minute but
    every tenth (SMPTE 12M).
    """
    fields = re.fullmatch(r"(\d+):(\d+):(\d+)([:;.])(\d+)", text)
    if not fields or not rate:
        return text
    # the nominal rate is that of the numbers: 30 for 29.97 frames a second
    hours, minutes, secs, frames = (int(fields[k]) for k in (1, 2, 3, 5))
    nominal = round(rate)
    dropped = 0 if fields[4] == ":" else nominal // 15

    # the number of the picture, without the dropped ones
    minutes += 60 * hours
    number = (60 * minutes + secs) * nominal + frames - dropped * (minutes - minutes // 10)
    number += count

    # put the dropped numbers back in
    if dropped:
        per_ten = 600 * nominal - 9 * dropped
        per_one = 60 * nominal - dropped
        tens, rest = divmod(number, per_ten)
        number += 9 * dropped * tens + dropped * max(0, (rest - dropped) // per_one)
    secs, frames = divmod(number, nominal)
    return f"{secs // 3600 % 24:02}:{secs // 60 % 60:02}:{secs % 60:02}{fields[4]}{frames:02}"


# ---- Matroska's aspect ratio -------------------------------------------------------------------


def set_display_size(path, width, height):
    """Write a display size into a Matroska file's picture track; False where there is no place.

    PyAV has no way to tell the muxer of an aspect ratio. The place is a Projection of no effect (14
    bytes), which `write` asked for; nothing else moves.
    """
    with open(path, "rb") as file:
        content = bytearray(file.read(65536))
    unit = content.find(b"\x54\xb2\x81\x04")  # DisplayUnit: unknown
    place = content.find(b"\x76\x70\x8b\x76\x75\x88")  # Projection, of one ProjectionPoseRoll
    if place < 0:
        return False
    if unit >= 0:
        content[unit + 3] = 0  # pixels
    # DisplayWidth, DisplayHeight, and Void over the rest
    content[place : place + 14] = (
        struct.pack(">HBHHBH", 0x54B0, 0x82, width, 0x54BA, 0x82, height) + b"\xec\x82\x00\x00"
    )
    with open(path, "r+b") as file:
        file.write(content)
    return True


def display_size(width, height, aspect):
    """Width and height with square pixels: one side grows. 16 bits have to hold each."""
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)
    largest = max(width, height)
    if largest > 65535:
        width, height = width * 65535 // largest, height * 65535 // largest
    return max(1, width), max(1, height)


# ---- one file ----------------------------------------------------------------------------------


def copied_track(container, src, stream, muxer, keep_tag):
    """A track of the source's own kind, with its frame rate, aspect ratio and codec tag."""
    track = container.add_stream_from_template(stream, opaque=True)  # so that no encoder need exist
    context = track.codec_context
    if stream.sample_aspect_ratio:
        context.sample_aspect_ratio = stream.sample_aspect_ratio
    if rate := frame_rate(stream):
        context.framerate = rate
    tag = stream.codec_context.codec_tag if src.format.name.startswith("mov") else ""
    if stream.codec_context.codec.canonical_name == "hevc" and tag != "dvh1":
        tag = "hvc1"  # QuickTime and Safari refuse hev1
    if keep_tag and muxer in ("mp4", "mov") and len(tag) == 4 and tag.isprintable():
        context.codec_tag = tag
    return track


def copied_picture(src, stream, track, job, cut):
    """The source's own packets of the picture; `cut` is a KeyFrameCut, or None for all of it."""
    packets = packets_of_picture(src, stream, job.source)
    if lacks_display_times(src, stream):
        packets = in_display_order(packets, display_times(job.source))
    first = round(job.offset / stream.time_base)
    if cut is None:
        end = round(probe(job.source).duration / stream.time_base)
        return copied_packets(packets, track, first, end)
    return cut_packets(packets, track, cut, first, round(job.seconds / stream.time_base))


def add_picture(dst, src, stream, job, method, first, keep_tag):
    """-> the picture's track and its packets, copied or encoded anew."""
    rate = frame_rate(stream)
    cut = method if isinstance(method, KeyFrameCut) else None
    if method == "encode":
        encoding = Encoding(first, job.muxer)
        mean = Fraction(probe(job.source).fps).limit_denominator(1001)
        track = encoding.add_track(dst, rate or mean, stream.sample_aspect_ratio or Fraction(1))
        packets = encoded_packets(job.source, track, encoding, job.start, job.seconds)
    else:
        track = copied_track(dst, src, stream, job.muxer, keep_tag)
        packets = copied_picture(src, stream, track, job, cut)
    track.metadata.update(stream.metadata)
    if timecode := timecode_of(src, stream):
        # of the picture on view at the start; a copied cut begins with the key frame next to it
        nearest = 0.5 if cut else 1e-3
        count = math.floor(job.start * (rate or 0) + nearest)
        track.metadata["timecode"] = later_timecode(timecode, count, rate)
    return track, packets


def add_sound(dst, codec, rate, channels):
    """A track of one or two channels, the one that players choose."""
    # as many bits as AAC takes here; its fast search is 4 times faster and no worse (measured)
    options = {"aac_coder": "fast"} if codec == "aac" else {}
    layout = "mono" if channels == 1 else "stereo"
    track = dst.add_stream(codec, rate=rate, layout=layout, options=options)
    track.bit_rate = (96000 if rate == SAMPLE_RATE else 128000) * channels
    # sound at 16 kHz is ours alone, which 16 bits hold; beside it may be somebody's recording
    if codec == "flac" and rate != SAMPLE_RATE:
        track.codec_context.format = "s32"  # FLAC's name for 24 bits
    track.disposition = av.stream.Disposition.default
    return track


def muxer_options(muxer, tags, patch_aspect):
    """Options of the output container."""
    options = {}
    if muxer in ("mp4", "mov"):
        # tags such as com.apple.quicktime.make
        dotted = any("." in key for key in tags)
        options["movflags"] = "faststart+use_metadata_tags" if dotted else "faststart"
    if patch_aspect:
        options["write_crc32"] = "0"  # of the header that is patched
    return options


def write(out, job, method, keep_tag=True, extras_too=True):
    """Write `out`; `method` is "copy", "encode" or a KeyFrameCut. -> names of what was left out."""
    first = first_frame(job.source, job.start)
    extras = Extras()
    with open_input(job.source) as src:
        stream = picture_stream(src, job.source)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        anamorphic = aspect != 1 and job.muxer in ("matroska", "webm")
        patch_aspect = anamorphic and not display_matrix(first)  # a rotation needs the same place
        tags = {key: value for key, value in src.metadata.items() if key.lower() not in STRUCTURE}
        tags |= job.tags
        # as a tag in Matroska; mp4 and mov have a box for it, which follows all else
        about = None if job.muxer in ("matroska", "webm") else tags.pop(xmp.TAG, None)
        options = muxer_options(job.muxer, tags, patch_aspect)
        with av.open(f"file:{out}", "w", job.muxer, container_options=options) as dst:
            # all tracks, before the first packet
            dst.metadata.update(tags)
            track, pictures = add_picture(dst, src, stream, job, method, first, keep_tag)
            if patch_aspect:
                track.set_display_rotation(180)  # leaves the place that `set_display_size` needs
            sound = add_sound(dst, CONTAINERS[job.suffix][1], job.rate, job.channels)
            if extras_too:
                extras = add_extras(dst, src, stream, job)
                if src.chapters():
                    dst.set_chapters(chapters_of(src, job))
            # all packets, in order of decoding
            samples = round(job.seconds * job.rate)  # sound exactly as long as the picture
            sources = [pictures, sound_packets(job.wav, sound, samples)]
            if extras.tracks:
                sources.append(extra_packets(job, extras.tracks))
            for packet in heapq.merge(*sources, key=lambda packet: packet.dts * packet.time_base):
                dst.mux_one(packet)
            width = track.codec_context.width
            height = track.codec_context.height
    # what PyAV cannot tell the muxer, and what cannot be kept
    if about:
        with open(out, "r+b") as file:
            xmp.embed(file, about)
    if xmp.has_credentials(job.source):
        extras.dropped.append("Content Credentials (they hold for the unchanged file alone)")
    if patch_aspect and not set_display_size(out, *display_size(width, height, aspect)):
        extras.dropped.append(f"pixel aspect ratio {aspect}")
    if anamorphic and not patch_aspect and job.muxer == "webm":
        extras.dropped.append(
            f"pixel aspect ratio {aspect}: beside a rotation webm has no place for it"
        )
    if method == "encode" and any(side_data(first, name) for name in HDR10):
        extras.dropped.append("HDR10 mastering metadata")
    return extras.dropped


def choose_method(job):
    """-> ("copy", "encode" or a KeyFrameCut, what to say of it)."""
    info = probe(job.source)
    if not holds(job.suffix, info.codec) or info.codec in UNEXPECTED:
        return "encode", f"{job.suffix} does not hold {info.codec}"
    with open_input(job.source) as src:
        unordered = lacks_display_times(src, picture_stream(src, job.source))
    if unordered and (job.is_cut or display_times(job.source) is None):
        return "encode", "its pictures have no time stamps for display"
    if not job.is_cut:
        return "copy", ""
    if cut := cut_at_key_frames(job.source, job.start, job.seconds):
        return cut, "the cut begins and ends on key frames; its picture is copied"
    return "encode", "the cut does not begin and end on key frames"


def attempts(job):
    """(method, keyword arguments of `write`, what to say) one after the other, until one works."""
    method, reason = choose_method(job)
    if method != "encode":
        yield method, {}, reason
        yield method, {"keep_tag": False}, reason
        yield method, {"keep_tag": False, "extras_too": False}, reason
        reason = f"cannot be copied into {job.suffix}"
    encoding = Encoding(first_frame(job.source, job.start), job.muxer)
    reason = f"{reason}; its picture is encoded anew ({encoding.name})"
    yield "encode", {}, reason
    yield "encode", {"extras_too": False}, reason


def write_video(
    source: Path | str,
    wav: np.ndarray | str,
    out: Path | str,
    tags: dict[str, str] | None = None,
    start: float = 0.0,
    duration: float | None = None,
    keep_tracks: bool = False,
    rate: int = SAMPLE_RATE,
    channels: int = 1,
):
    """Write the picture of `source` with the sound `wav`, cut or padded to its length.

    wav: (n,) or (n, channels), or a file of that as plain float32, which may be longer than memory.

    Copied packet by packet: all of the picture, with rotation, colors, aspect ratio and codec tag,
    and a cut that begins and ends on key frames. Encoded anew, with a warning: any other cut, and
    what `out` cannot hold. Subtitles, chapters, attachments, cover and time code are kept where the
    container takes them, the source's own sound tracks with `keep_tracks`; a warning names the
    rest.

    The caller renames `out`. Raises MediaError where no attempt succeeds.
    """
    out = Path(out)
    seconds = min(check_start(source, start) - start, duration or LONGEST)
    suffix = out.suffix.lower()
    job = Job(Path(source), wav, tags or {}, start, seconds, suffix, keep_tracks, rate, channels)
    # the first attempt that a muxer takes
    refusal = None
    for method, options, reason in attempts(job):
        try:
            dropped = write(out, job, method, **options)
        except REFUSALS as error:
            refusal = error
            continue
        if not options.get("extras_too", True):
            dropped = ["all further streams"]
        if reason:
            warnings.warn(f"{source}: {reason}", stacklevel=2)
        if dropped:
            warnings.warn(f"{source}: not kept in {out.suffix}: {'; '.join(dropped)}", stacklevel=2)
        return
    raise MediaError(
        f"{source}: its picture cannot be written into {out.suffix} ({refusal.strerror}); "
        "convert it to mp4"
    ) from refusal
