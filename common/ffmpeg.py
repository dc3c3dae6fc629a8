"""Reading video and sound files with FFmpeg (through PyAV): files that nobody vouches for.

in   any file FFmpeg decodes
out  MediaInfo, frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], as NumPy arrays

Pictures and sound share one clock: zero is the moment the first picture is shown. A damaged file
can crash a decoder and with it the process, so `common.media` calls these functions in a child
process (`common.isolation`), which is why this module does not import torch: the child must start
fast. A file that cannot be used raises MediaError.

Differs from the official code: frames are taken from the source by presentation time (there: from
a lossy copy at 4 fps).
"""

import itertools
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import av.format
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import VideoReformatter

from common.files import UserError

SAMPLE_RATE = 16000
LONGEST = 6 * 3600.0  # seconds; longer time stamps are taken for damage
SEEK_FROM = 4.0  # seconds; a later start is reached by seeking
BACKWARDS = 0.5  # seconds; a clock that steps back further has started over
GAP = 10.0  # seconds; in broadcast formats a longer step forward is a new clock too
JOINED = 0.75  # share of a file; where its last packet ends before, FFmpeg stopped early
LOUDEST = 1e6  # times full scale; a larger sample is damage
VIDEO_SUFFIXES = {
    ".3gp",
    ".avi",
    ".flv",
    ".gif",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
}
# Never opened: playlists, which point elsewhere and may wait for more for ever, and devices.
REFUSED_FORMATS = (
    "alsa concat concatf dash fbdev hls imf iec61883 jack kmsgrab lavfi oss pulse rtp rtsp sap sdp "
    "v4l2 video4linux2,v4l2 webm_dash_manifest x11grab xcbgrab"
)
# Text art and stills: FFmpeg opens them as pictures, but nobody would call the file a video.
NOT_VIDEOS = ("adf", "bin", "idf", "image2", "tty", "xbin")
# ITU-R BS.775: center and surrounds at -3 dB to left and right, no LFE; mono is their mean.
SIDE = 0.5
CENTER = math.sqrt(0.5)
SURROUND = 0.5 * math.sqrt(0.5)
DOWNMIX = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "WL", "WR", "BC"), SIDE),
    **dict.fromkeys(("FC", "TC", "TFC", "BFC"), CENTER),
    **dict.fromkeys(("BL", "BR", "SL", "SR", "TFL", "TFR", "TBL", "TBR", "TSL", "TSR"), SURROUND),
    **dict.fromkeys(("TBC", "BFL", "BFR", "SDL", "SDR"), SURROUND),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}
# layouts by number of channels, as FFmpeg's own program guesses where names are missing
CHANNEL_GUESSES = {2: "stereo", 6: "5.1", 7: "6.1", 8: "7.1"}


class MediaError(UserError):
    """A user's file cannot be used: one line naming the file, the reason and the remedy."""

    def __str__(self):
        # a data loader's worker passes it on as the last line of a traceback
        return super().__str__().strip().split("\n")[-1].removeprefix(f"{__name__}.MediaError: ")


@dataclass(frozen=True)
class MediaInfo:
    """What a video holds. Times are seconds; 0 is when the first picture is shown."""

    duration: float  # of the picture, the last frame's own time included
    start: float  # the container's time stamp of the first shown picture
    width: int  # as shown: after rotation
    height: int
    fps: float  # mean rate
    frames: int
    codec: str
    has_audio: bool
    audio_start: float  # of the sound, on the picture's clock
    audio_duration: float


# ---- containers and streams --------------------------------------------------------------------


@lru_cache
def open_options() -> dict[str, str]:
    """Local files only, of any format but `REFUSED_FORMATS`."""
    formats = ",".join(sorted(av.formats_available.difference(REFUSED_FORMATS.split())))
    return {"protocol_whitelist": "file", "format_whitelist": formats}


@contextmanager
def open_input(path: Path | str):
    """An input container. A playlist in disguise cannot reach other files or the network."""
    path = Path(path)
    if not path.exists():
        raise MediaError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder, not a video; give a file in it")
    if not path.is_file():
        raise MediaError(f"{path}: is no file; give a video file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); copy or download it again")
    try:
        container = av.open(f"file:{path}", metadata_errors="replace", options=open_options())
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path}: not a video that FFmpeg can open, or cut off before its index "
            f"({error.strerror}); check that it plays, or convert it to mp4"
        ) from error
    with container:
        yield container


def has_flag(container, name: str) -> bool:
    """Whether FFmpeg sets a flag for the container's format."""
    return bool(container.format.flags & av.format.Flags[name].value)


def is_cover(stream):
    """Whether a video stream is cover art: one image that players show beside the sound."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def has_picture(container):
    """Whether there is a video stream; cover art does not count."""
    stream = container.streams.best("video")
    return stream is not None and not is_cover(stream)


def picture_stream(container, path):
    """The video stream that a player shows. Raises MediaError where there is none."""
    stream = container.streams.best("video")
    if not has_picture(container):
        what = "sound but no picture" if container.streams.audio else "no picture"
        raise MediaError(f"{path}: holds {what}; give a file with a video stream")
    if stream.codec_context is None:
        raise MediaError(
            f"{path}: its video codec is unknown to this FFmpeg; convert it to mp4 (H.264)"
        )
    return stream


def is_still(container):
    """Whether the format holds images; with one picture in it the file is no video."""
    # image2 and *_pipe are FFmpeg's readers of single images
    names = ("_pipe", "image2", "gif", "apng")
    brand = container.metadata.get("major_brand")
    return container.format.name.endswith(names) or brand in ("avif", "heic", "mif1")


def kind_of(path: Path | str) -> str | None:
    """ "video", "sound" or None, by a file's content. Cheap: no frame is decoded."""
    try:
        with open_input(path) as container:
            names = container.format.name.split(",")
            if any(name in NOT_VIDEOS or name.endswith("_pipe") for name in names):
                return None
            stream = container.streams.best("video")
            if has_picture(container) and stream.codec_context and not is_still(container):
                return "video"
            return "sound" if container.streams.best("audio") else None
    except MediaError:
        return None


def frame_rate(stream):
    """Frames a second by FFmpeg's best guess, as a Fraction, or None."""
    for rate in (stream.guessed_rate, stream.average_rate):
        # where nothing is known, FFmpeg guesses one picture a tick
        if rate and 0.1 <= rate <= 1000 and (rate < 250 or rate * stream.time_base != 1):
            return rate
    return None


def lacks_display_times(container, stream) -> bool:
    """Whether only the order of decoding is known.

    Raw streams have no time stamps; AVI and ASF store none for display, so that FFmpeg's guesses
    are a frame late, and step back where B-frames reorder.
    """
    unordered = has_flag(container, "no_timestamps") or container.format.name in ("avi", "asf")
    return stream.type == "video" and unordered


def stamp_of(packet):
    """A packet's time stamp in ticks: of its display, else of its decoding, else None."""
    return packet.dts if packet.pts is None else packet.pts


def until_error(packets):
    """Packets up to the first read error: of a file that is cut off, what came before counts."""
    with suppress(av.error.FFmpegError):
        yield from packets


class Clock:
    """Seconds that never start over, for the packets of one file.

    Recordings joined end to end, and broadcasts, start their clocks anew in mid-file. The stream
    that jumps first sets the shift from there on; one that comes to the joint later, while packets
    of its old stretch still arrive, takes the shift that is set already.
    """

    def __init__(self, container):
        self.broadcast = has_flag(container, "ts_discont")
        self.shift = 0.0  # of the newest stretch
        self.shifts = {}  # stream -> the shift it has reached
        self.last = {}  # stream -> when its last packet was decoded
        self.ends = {}  # stream -> where that packet ended
        self.restarted = False

    def jumps(self, stream, moment):
        """Whether a packet at `moment` cannot continue its stream."""
        if stream not in self.last:
            return False
        gap = self.broadcast and moment > self.ends[stream] + GAP
        return gap or moment < self.last[stream] - BACKWARDS

    def ticks(self, packet):
        """The shift of a packet, in ticks of its stream."""
        stream = packet.stream.index
        if packet.dts is not None:
            moment = float(packet.dts * packet.time_base)
            if self.jumps(stream, moment + self.shifts.get(stream, self.shift)):
                if self.jumps(stream, moment + self.shift):
                    self.shift = max(self.ends.values()) - moment
                    self.restarted = True
                self.shifts[stream] = self.shift
            moment += self.shifts.setdefault(stream, self.shift)
            self.last[stream] = moment
            self.ends[stream] = moment + float((packet.duration or 0) * packet.time_base)
        return round(self.shifts.get(stream, self.shift) / packet.time_base)


def is_header(packet):
    """Whether it is one of Theora's headers, which a joined Ogg file repeats in mid-stream."""
    theora = packet.stream.codec_context.name == "theora"
    return theora and packet.size and bytes(packet)[:1] >= b"\x80"


def demux(container, path, clock=None):
    """Packets of the video and audio streams that a player picks, on a `Clock`.

    Both streams are read even where one is wanted: the jumps are the same for whoever reads.
    Streams without time stamps get those of their order of decoding. Warns of a clock that starts
    over.
    """
    streams = [container.streams.best("video"), container.streams.best("audio")]
    streams = [stream for stream in streams if stream is not None and stream.codec_context]
    raw = has_flag(container, "no_timestamps")
    clock = clock or Clock(container)
    count = 0
    for packet in container.demux(streams):
        if is_header(packet):
            continue
        # no time stamps: at the rate that the header states
        if raw and packet.size and packet.stream.type == "video":
            seconds = count / (frame_rate(packet.stream) or 25)
            packet.pts = packet.dts = round(seconds / packet.time_base)
            count += 1
        elif stamp_of(packet) is not None:
            ticks = clock.ticks(packet)
            if packet.dts is not None:
                packet.dts += ticks
            if packet.pts is not None:
                packet.pts += ticks
        yield packet
    if clock.restarted:
        warnings.warn(f"{path}: its clock starts over in mid-file; read as going on", stacklevel=2)


# ---- decoding ----------------------------------------------------------------------------------


def decoding_threads() -> int:
    """One where processes share the machine (OMP_NUM_THREADS=1), else one a core, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(16, int(asked) if asked.isdecimal() and int(asked) else cores or 1)


def decode(container, stream, path):
    """(packet, its frames) for every packet of `stream`.

    What does not decode is skipped; a warning says how many frames do.
    """
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = decoding_threads()
    packets = demux(container, path)
    count = 0
    lost = 0
    while True:
        try:
            packet = next(packets, None)  # after a read error the demuxer has ended: None
            if packet is None:
                break
            if packet.stream.index != stream.index:
                continue
            frames = packet.decode()
        except av.error.EOFError:  # what some decoders answer to the final flush
            continue
        except av.error.FFmpegError:
            lost += 1
            continue
        count += len(frames)
        yield packet, frames
    if lost and count:
        warnings.warn(
            f"{path}: damaged or cut off; used the {count} {stream.type} frames that decode",
            stacklevel=2,
        )


def timed_frames(container, stream, path):
    """(seconds, frame) pairs that never step back, on the container's clock.

    A frame without a time stamp follows the one before it. Where only the order of decoding is
    known, the n-th frame shown takes the n-th packet's time.
    """
    in_order = lacks_display_times(container, stream)
    # times of the packets whose frames have not been shown yet
    slots = deque()
    seconds = -math.inf
    follows = 0.0
    for packet, frames in decode(container, stream, path):
        if in_order and packet.size and packet.dts is not None:
            slots.append(float(packet.dts * packet.time_base))
        for frame in frames:
            if slots:
                stamp = slots.popleft()
            elif frame.pts is None:
                stamp = follows
            else:
                stamp = float(frame.pts * frame.time_base)
            seconds = max(seconds, stamp)
            if stream.type == "audio":
                follows = seconds + frame.samples / frame.sample_rate
            else:
                follows = seconds + 1 / float(frame_rate(stream) or 25)
            yield seconds, frame


def side_data(frame, name: str):
    """What a frame has beside its picture under FFmpeg's name for it, or None."""
    # frame.side_data would be held by the frame and hold it: hundreds of pictures that nobody wants
    # any more would stay in memory until Python looks for such cycles
    return SideDataContainer(frame).get(name)


def display_matrix(frame):
    """The nine numbers that turn a frame upright, as containers store them, or None."""
    matrix = side_data(frame, "DISPLAYMATRIX")
    return np.frombuffer(bytes(matrix), np.int32).tolist() if matrix else None


def picture(frame, width: int, height: int, scaler: VideoReformatter):
    """Frame -> upright RGB uint8 (height, width, 3).

    The aspect ratio is not kept, as for the paper's 224 x 224. Bilinear with antialiasing: swscale
    widens its kernel with the reduction, as PIL does. Transparency is dropped. `scaler` is kept
    from frame to frame: setting one up costs several times what it then does.
    """
    # x' = a x + c y and y' = b x + d y; only quarter turns and mirrors
    a, b, _, c, d, *_ = display_matrix(frame) or (1, 0, 0, 0, 1)
    turned = abs(b) > abs(a)
    coded = (height, width) if turned else (width, height)
    rgb = scaler.reformat(frame, *coded, format="rgb24", interpolation="BILINEAR", threads=1)
    rgb = rgb.to_ndarray()  # (h, w, 3)
    if turned:
        rgb = rgb.swapaxes(0, 1)
        a, d = c, b
    if d < 0:
        rgb = rgb[::-1]
    if a < 0:
        rgb = rgb[:, ::-1]
    return rgb


# ---- what a file holds -------------------------------------------------------------------------


def probe(path: Path | str) -> MediaInfo:
    """MediaInfo of a video, from its packets rather than its header, which may promise anything."""
    path = Path(path)
    status = path.stat() if path.is_file() else None
    return _probe(path, status and (status.st_mtime_ns, status.st_size))


def first_picture(path):
    """(seconds, frame, codec) of the first picture that is shown; else MediaError says why."""
    with open_input(path) as container:
        stream = picture_stream(container, path)
        codec = stream.codec_context.codec.canonical_name
        for seconds, frame in timed_frames(container, stream, path):
            return seconds, frame, codec
    with open_input(path) as container, suppress(av.error.FFmpegError):
        packets = container.demux(picture_stream(container, path))
        if any(packet.has_sidedata("encryption_info") for packet in packets):
            raise MediaError(f"{path}: is encrypted; give a copy without protection")
    if codec == "webp":
        reason = "this FFmpeg does not decode animated webp; convert it to mp4 or gif"
    else:
        reason = "not one picture of it decodes; check that it plays, or export it again"
    raise MediaError(f"{path}: {reason}")


def promised_end(container, stream):
    """Where the header says that the picture ends, in seconds of the container's clock."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return ((container.start_time or 0) + (container.duration or 0)) / 1e6


@dataclass
class Extent:
    """Where a stream lies, in seconds of the container's clock, by its packets."""

    count: int = 0
    start: float = math.inf
    last: tuple[float, float] = (-math.inf, 0.0)  # start and duration of the last that is shown
    end: float = -math.inf

    def add(self, start, duration):
        self.count += 1
        self.start = min(self.start, start)
        self.last = max(self.last, (start, duration))
        self.end = max(self.end, start + duration)


def packet_extents(container, stream, path, clock, since):
    """-> {"video": Extent, of pictures from `since` on, "audio": Extent}, bytes read."""
    in_order = lacks_display_times(container, stream)
    # no lists: an hour has 150,000 packets
    extents = {"video": Extent(), "audio": Extent()}
    bytes_read = 0
    for packet in until_error(demux(container, path, clock)):
        bytes_read = max(bytes_read, (packet.pos or 0) + packet.size)
        kind = packet.stream.type
        by_order = in_order and packet.stream.index == stream.index
        stamp = packet.dts if by_order else stamp_of(packet)
        if stamp is not None and packet.size and not packet.is_discard:
            start = float(stamp * packet.time_base)
            if kind == "audio" or start > since - 1e-6:
                extents[kind].add(start, float((packet.duration or 0) * packet.time_base))
    return extents, bytes_read


@lru_cache(maxsize=4096)
def _probe(path, _version):
    """`probe`; a file that has changed has another version, and is read anew."""
    start, frame, codec = first_picture(path)
    with open_input(path) as container:
        stream = picture_stream(container, path)
        promised = promised_end(container, stream)
        clock = Clock(container)
        extents, bytes_read = packet_extents(container, stream, path, clock, start)
        rate = float(frame_rate(stream) or 25)
        still = is_still(container)
        format_name = container.format.name
        sound_counts = stream.duration is None  # the promise is the container's

    # the last picture is shown for its own duration, or for the mean one where that is unknown
    shown = extents["video"]
    if not shown.count:
        shown.add(start, 0.0)
    last, last_duration = shown.last
    mean = (last - start) / (shown.count - 1) if shown.count > 1 else 1 / rate
    duration = last + (last_duration or mean) - start
    if still and shown.count == 1:
        raise MediaError(f"{path}: is a still image; give a video")
    if not 0 < duration <= LONGEST:
        raise MediaError(
            f"{path}: its time stamps say {duration:.6g} s of picture; "
            "remux it, or cut it to a few hours"
        )
    sound = extents["audio"]
    if not sound.count:
        sound = Extent(start=start, end=start)

    # other containers than flv end in an index, of any size
    size = path.stat().st_size
    if format_name == "flv" and bytes_read < JOINED * size:
        warnings.warn(
            f"{path}: FFmpeg reads {100 * bytes_read / size:.0f} % of it; "
            "the rest, if it was joined from several files, is not used",
            stacklevel=3,
        )
    end = max(start + duration, sound.end) if sound_counts else start + duration
    if 0.5 < promised - end < LONGEST and not clock.restarted:
        warnings.warn(
            f"{path}: cut off: {duration:.2f} of {promised - start:.2f} s of picture remain",
            stacklevel=3,
        )
    turned = abs(frame.rotation) in (90, 270)
    return MediaInfo(
        duration=duration,
        start=start,
        width=frame.height if turned else frame.width,
        height=frame.width if turned else frame.height,
        fps=shown.count / duration,
        frames=shown.count,
        codec=codec,
        has_audio=sound.count > 0,
        audio_start=sound.start - start,
        audio_duration=sound.end - sound.start,
    )


def read_tags(path: Path | str) -> dict[str, str]:
    """The tags of a file that we wrote, names in lower case (Matroska's come in capitals)."""
    with open_input(path) as container:
        return {key.lower(): value for key, value in container.metadata.items()}


# ---- pictures ----------------------------------------------------------------------------------


def seek(container, stream, seconds):
    """Go to a key frame before `seconds` of the container's clock, if its index can be trusted."""
    if container.format.name.startswith(("mov", "matroska")):
        with suppress(av.error.FFmpegError):
            container.seek(math.floor(seconds / stream.time_base), backward=True, stream=stream)


def frames_from(path: Path | str, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds since the first picture, frame), from the frame on view at `start` or one before."""
    zero = probe(path).start
    with open_input(path) as container:
        stream = picture_stream(container, path)
        if start > SEEK_FROM:
            seek(container, stream, zero + start)
        frames = timed_frames(container, stream, path)
        first = next(frames, None)
        # some indexes point behind the key frame
        misled = start > SEEK_FROM and (first is None or first[0] - zero > start)
        if first is not None and not misled:
            for moment, frame in itertools.chain([first], frames):
                yield moment - zero, frame
    if misled:
        yield from frames_from(path, 0.0)


def frame_count(seconds: float, fps: float) -> int:
    """Number of frames of a picture of this length at another rate."""
    return max(1, math.ceil(seconds * fps - 1e-6))


def check_start(path: Path | str, start: float) -> float:
    """Duration of a video in seconds. A start outside of it raises MediaError."""
    duration = probe(path).duration
    if not 0 <= start < duration:
        raise MediaError(
            f"{path}: start {start:g} s lies outside its {duration:.3f} s; choose an earlier start"
        )
    return duration


def pictures(
    path: Path | str, fps: float, size: int, start: float = 0.0, duration: float | None = None
):
    """Yields what a viewer sees at start + i/fps: uint8 (size, size, 3).

    The same array again where nothing new is shown. However long the video is, one frame of it is
    held in memory.
    """
    seconds = min(check_start(path, start) - start, duration or LONGEST)
    count = frame_count(seconds, fps)
    scaler = VideoReformatter()
    done = 0
    view = None
    for moment, frame in frames_from(path, start):
        # time stamps are rounded to the container's ticks, in Matroska to 1 ms
        until = moment - min(5e-4, float(frame.time_base) / 2)
        if view is not None and start + done / fps < until:
            image = picture(view, size, size, scaler)
            while done < count and start + done / fps < until:
                yield image
                done += 1
        if done == count:
            return
        view = frame
    if view is None:
        raise MediaError(f"{path}: no picture decodes after {start:g} s; choose an earlier start")
    # the last picture stays until its own end
    yield from itertools.repeat(picture(view, size, size, scaler), count - done)


def read_frames(
    path: Path | str, fps: float, size: int, start: float = 0.0, duration: float | None = None
):
    """uint8 (f, 3, size, size); frame i is on view start + i/fps seconds after the first picture.

    Ends with the picture, or after `duration` seconds: f = ceil(fps * seconds). Only the result and
    one frame are held in memory.
    """
    seconds = min(max(0.0, probe(path).duration - start), duration or LONGEST)
    out = np.empty((frame_count(seconds, fps), 3, size, size), np.uint8)
    for i, image in enumerate(pictures(path, fps, size, start, duration)):
        out[i] = image.transpose(2, 0, 1)
    return out  # (f, 3, h, w)


def jpeg(image):
    """A picture uint8 (h, w, 3), sides of 16 pixels or a multiple, as the bytes of a JPEG (n,)."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width = frame.width
    encoder.height = frame.height
    encoder.pix_fmt = "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    # a constant scale of the quantizer: 2 is fine, 31 is coarse
    encoder.qmin = 4
    encoder.qmax = 4
    frame = frame.reformat(format="yuvj420p")
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    return np.frombuffer(b"".join(map(bytes, packets)), np.uint8)


# ---- sound -------------------------------------------------------------------------------------


def name_channels(container, stream):
    """Give uncompressed sound in QuickTime a layout by its number of channels.

    QuickTime names every channel, in any order, and PyAV frees such a layout each time it is looked
    at: a crash of the process. So the number comes from the bit rate, and the layout is set before
    the first packet is decoded.
    """
    context = stream.codec_context
    if "mov" not in container.format.name or not context.name.startswith("pcm_"):
        return
    # pcm_alaw and pcm_mulaw do not say their 8 bits
    bits = re.search(r"\d+", context.name)
    bits = int(bits[0]) if bits else 8
    channels = round((context.bit_rate or 0) / (context.sample_rate * bits))
    if channels > 2:
        context.layout = CHANNEL_GUESSES.get(channels, f"{channels} channels")


def channel_names(layout: av.AudioLayout):
    """Names of a layout's channels that `DOWNMIX` knows, guessed by their number, or None."""
    count = len(layout.channels)
    if layout.name == f"{count} channels" and count in CHANNEL_GUESSES:
        layout = av.AudioLayout(CHANNEL_GUESSES[count])
    names = [channel.name for channel in layout.channels]
    return names if count > 1 and all(name in DOWNMIX for name in names) else None


def downmix_weights(layout: av.AudioLayout):
    """Weight of each channel in mono, float32 (channels,): ITU-R BS.775, else the mean."""
    count = len(layout.channels)
    names = channel_names(layout)
    if names is None:
        return np.full(count, 1 / count, np.float32)
    return np.array([DOWNMIX[name] for name in names], np.float32)


def stereo_weights(layout: av.AudioLayout):
    """Weights of each channel in left and right, float32 (channels, 2), of which mono is the mean.

    A channel without a name, or in the middle, is heard on both sides.
    """
    mono = downmix_weights(layout)
    left = np.ones(len(mono), np.float32)
    for k, name in enumerate(channel_names(layout) or ()):
        # FL, BL, SL, TFL, FLC are on the left; FC, TC, LFE in the middle
        left[k] = {"L": 2, "R": 0}.get(name.removesuffix("C")[-1], 1)
    return np.stack([mono * left, mono * (2 - left)], 1)


def sound_format(frame):
    """All that frames must share to go through one `Downmixer`."""
    return frame.sample_rate, frame.layout.name, frame.format.name


class Downmixer:
    """Frames of one rate, layout and sample format -> float32 at `rate`, one or two channels.

    FFmpeg converts to interleaved floats first: of planar sound with eight channels or more PyAV
    would read a plane too many (a segmentation fault).
    """

    def __init__(self, frame, start, rate, channels):
        self.start = start  # seconds, of the first sample
        self.count = 0  # samples that were handed out
        self.channels = channels
        self.layout = "mono" if channels == 1 else "stereo"
        self.format = sound_format(frame)
        self.to_float = av.AudioResampler("flt", frame.layout, frame.sample_rate)
        self.to_rate = av.AudioResampler("flt", self.layout, rate)
        weights = downmix_weights if channels == 1 else stereo_weights
        self.weights = weights(frame.layout)  # (channels of the frame,) or (those, 2)
        self.rate = frame.sample_rate
        self.invalid = 0  # samples that are no numbers

    def push(self, frame):
        """Take a frame, or None at the end; yields (seconds of `start`, samples since, block)."""
        for part in self.to_float.resample(frame):
            samples = part.to_ndarray().reshape(-1, len(self.weights))  # (n, channels)
            valid = np.abs(samples) < LOUDEST  # false for NaN
            if not valid.all():
                self.invalid += int(samples.size - valid.sum())
                samples = np.where(valid, samples, 0)
            mixed = (samples @ self.weights).reshape(1, -1)
            mixed = av.AudioFrame.from_ndarray(mixed, format="flt", layout=self.layout)
            mixed.sample_rate = self.rate
            yield from self.hand_out(self.to_rate.resample(mixed))
        if frame is None:
            yield from self.hand_out(self.to_rate.resample(None))

    def hand_out(self, frames):
        for frame in frames:
            block = frame.to_ndarray().reshape(-1, self.channels)
            yield self.start, self.count, block
            self.count += len(block)


def mixed_blocks(container, stream, path, zero, until, rate, channels):
    """Sound in blocks: (start of its stretch in seconds, samples since, (n, channels)).

    A stretch has no jump of the clock. Seconds count from `zero` of the container's clock, or from
    the first sample where that is None; what begins after `until` is not read. Samples that are no
    numbers become silence, with a warning.
    """
    mixer = None
    invalid = 0
    end = 0.0
    name_channels(container, stream)
    for moment, frame in timed_frames(container, stream, path):
        if zero is None:
            zero = moment
        if moment - zero >= until:
            break
        # another format or a jump of the clock begins a new stretch
        if mixer is None or mixer.format != sound_format(frame) or abs(moment - end) > 0.02:
            if mixer is not None:
                yield from mixer.push(None)
                invalid += mixer.invalid
            mixer = Downmixer(frame, moment - zero, rate, channels)
            end = moment
        yield from mixer.push(frame)
        end += frame.samples / frame.sample_rate
    if mixer is not None:
        yield from mixer.push(None)
        invalid += mixer.invalid
    if invalid:
        warnings.warn(
            f"{path}: {invalid} samples of its sound are no numbers; silence instead", stacklevel=3
        )


def sound_blocks(path, start, duration, rate, channels):
    """(sample at which it begins, counted from `start`, block (n, channels)) of a file's sound."""
    with open_input(path) as container:
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise MediaError(f"{path}: has no sound track that decodes; give a video with sound")
        info = probe(path) if has_picture(container) else None
        # a second early, since a decoder needs some frames before its output is right
        if info and start > SEEK_FROM:
            seek(container, stream, info.start + start - 1.0)
        zero = info and info.start  # sound alone starts its own clock
        until = LONGEST if duration is None else start + duration  # beyond, the clock is damaged
        blocks = mixed_blocks(container, stream, path, zero, until, rate, channels)
        for moment, since, block in blocks:
            yield round((moment - start) * rate) + since, block


def end_of_sound(path, start, end, rate):
    """The sample at which the sound ends whose last block ends at sample `end`.

    Coders fill their last block, but packets know where sound ends.
    """
    with open_input(path) as container:
        if not has_picture(container):
            return end
    info = probe(path)
    known = round((info.audio_start + info.audio_duration - start) * rate)
    return known if 0 < end - known < rate // 10 else end


def read_audio(
    path: Path | str,
    start: float = 0.0,
    duration: float | None = None,
    rate: int = SAMPLE_RATE,
    channels: int = 1,
):
    """float32 (n,), mono at 16 kHz; sample 0 is heard `start` seconds after the first picture.

    Downmix by ITU-R BS.775, of two channels (n, 2). Silence fills what the track leaves out; with
    `duration` n = round(rate * duration), else all sound from `start` on. Kept in [-1, 1] by
    division where the peak exceeds 1, as decoded lossy sound may.
    """
    blocks = list(sound_blocks(path, start, duration, rate, channels))
    if not blocks and duration is None:
        raise MediaError(f"{path}: its sound track does not decode; give a video with sound")
    end = max((at + len(block) for at, block in blocks), default=0)
    end = end_of_sound(path, start, end, rate)
    n = end if duration is None else round(duration * rate)

    wav = np.zeros((max(0, n), channels), np.float32)
    for at, block in blocks:
        part = block[max(0, -at) : max(0, min(end, n) - at)]
        wav[max(0, at) :][: len(part)] = part
    wav /= max(1.0, wav.max(initial=0), -wav.min(initial=0))
    return wav[:, 0] if channels == 1 else wav


def spool_audio(
    path: Path | str, out: Path | str, start: float, duration: float, rate: int, channels: int
) -> float:
    """The sound of `read_audio` in a file of plain float32, a block at a time; -> its peak.

    It is not divided by its peak.
    """
    n = round(duration * rate)
    end = 0
    peak = 0.0
    with open(out, "r+b") as file:
        file.truncate(4 * n * channels)  # silence
        for at, block in sound_blocks(path, start, duration, rate, channels):
            end = max(end, at + len(block))
            part = block[max(0, -at) : max(0, n - at)]
            peak = max(peak, float(np.abs(part).max(initial=0)))
            if len(part):
                file.seek(4 * max(0, at) * channels)
                file.write(part.tobytes())
        known = max(0, min(n, end_of_sound(path, start, end, rate)))
        file.seek(4 * known * channels)
        file.write(np.zeros((max(0, min(n, end) - known), channels), np.float32).tobytes())
    return peak
