"""Reading video and sound files: everything here runs FFmpeg (through PyAV) on files nobody vouches for.

in   any file FFmpeg decodes
out  MediaInfo, frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], as NumPy arrays

Pictures and sound share one clock: zero is the moment the first picture is shown. A damaged file can crash a decoder
and with it the whole process, so `common.media` calls these functions in a child process (`common.isolation`), which
is why this module does not import torch: the child must start fast.

Differs from the official code: frames are taken from the source by presentation time (there: a lossy re-encode at 4
fps).
"""

import itertools
import math
import os
import re
import warnings
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import av.format
import numpy as np
from av.video.reformatter import VideoReformatter

from common.files import UserError

SAMPLE_RATE = 16000
LONGEST = 6 * 3600.0  # seconds; longer time stamps are taken for damage, not for a film
SETTLE = 4.0  # seconds; a later start is reached by seeking
BACKWARDS = 0.5  # seconds; a clock that steps back further has started over
GAP = 10.0  # seconds; in broadcast formats a longer step forward is a new clock too
UNREAD = 0.75  # share of a file; where its last packet ends before, FFmpeg stopped early
LOUDEST = 1e6  # times full scale; a larger sample is damage
VIDEO_SUFFIXES = set(
    [
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
    ]
)
# Playlists, which point elsewhere and may wait for more for ever, and devices: never opened.
NOT_FILES = set(
    [
        "alsa",
        "concat",
        "concatf",
        "dash",
        "fbdev",
        "hls",
        "imf",
        "iec61883",
        "jack",
        "kmsgrab",
        "lavfi",
        "oss",
        "pulse",
        "rtp",
        "rtsp",
        "sap",
        "sdp",
        "v4l2",
        "video4linux2,v4l2",
        "webm_dash_manifest",
        "x11grab",
        "xcbgrab",
    ]
)
# Text art and stills, which FFmpeg opens as pictures although nobody would call the file a video.
NOT_VIDEOS = ("adf", "bin", "idf", "image2", "tty", "xbin")
# ITU-R BS.775: centre and surrounds at -3 dB to left and right, no LFE; mono is the mean of left and right.
SIDE, CENTRE, SURROUND = 0.5, math.sqrt(0.5), 0.5 * math.sqrt(0.5)
DOWNMIX = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "WL", "WR", "BC"), SIDE),
    **dict.fromkeys(("FC", "TC", "TFC", "BFC"), CENTRE),
    **dict.fromkeys(("BL", "BR", "SL", "SR", "TFL", "TFR", "TBL", "TBR", "TSL", "TSR"), SURROUND),
    **dict.fromkeys(("TBC", "BFL", "BFR", "SDL", "SDR"), SURROUND),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}


class MediaError(UserError):
    """A user's file cannot be used: one line naming the file, the reason and the remedy."""

    def __str__(self):  # a data loader's worker hands it on as the last line of a traceback
        return super().__str__().strip().split("\n")[-1].removeprefix(f"{__name__}.MediaError: ")


@dataclass(frozen=True)
class MediaInfo:
    """What a video holds. Times are seconds; the picture's clock starts when its first picture is shown."""

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
def open_options():
    """Local files only, of any kind but playlists."""
    formats = ",".join(sorted(av.formats_available - NOT_FILES))
    return {"protocol_whitelist": "file", "format_whitelist": formats}


@contextmanager
def opened(path):
    """An input container. Local files only: a playlist in disguise must not reach the network."""
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


def is_cover(stream):
    """Whether a stream of pictures is cover art: one image that players show beside the sound."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def has_picture(container):
    """Whether there is a stream of pictures; cover art does not count."""
    stream = container.streams.best("video")
    return stream is not None and not is_cover(stream)


def picture_stream(container, path):
    """The stream that a player shows."""
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
    names = ("_pipe", "image2", "gif", "apng")
    brand = container.metadata.get("major_brand")
    return container.format.name.endswith(names) or brand in ("avif", "heic", "mif1")


def kind_of(path):
    """ "video", "sound" or None: what FFmpeg finds in a file, by its content. Cheap: no frame is decoded."""
    try:
        with opened(path) as container:
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
    ticks = 1 / stream.time_base  # where nothing is known, FFmpeg guesses one picture a tick
    rates = (stream.guessed_rate, stream.average_rate)
    return next(
        (rate for rate in rates if rate and 0.1 <= rate <= 1000 and (rate < 250 or rate != ticks)),
        None,
    )


def lacks_display_times(container, stream):
    """Whether only the order of decoding is known: raw streams have no time stamps, and AVI and ASF store none for
    display, so that FFmpeg's guesses are a frame late, and step back where B-frames reorder."""
    raw = container.format.flags & av.format.Flags.no_timestamps.value
    return stream.type == "video" and (bool(raw) or container.format.name in ("avi", "asf"))


def until_error(packets):
    """Packets up to the first read error: of a file that is cut off, what came before counts."""
    with suppress(av.error.FFmpegError):
        yield from packets


class Clock:
    """Seconds that never start over, for the packets of one file.

    Recordings joined end to end, and broadcasts, start their clocks anew in mid-file. The stream that jumps first sets
    the shift from there on; one that comes to the joint later, while packets of its old stretch still arrive, takes
    the shift that is there already.
    """

    def __init__(self, broadcast):
        self.broadcast = broadcast
        self.shift = 0.0  # of the newest stretch
        self.shifts = {}  # stream -> the shift it has reached
        self.last = {}  # stream -> when its last packet was decoded
        self.ends = {}  # stream -> where that ended
        self.restarted = False

    def jumps(self, stream, moment):
        before = self.last.get(stream)
        if before is None:
            return False
        return moment < before - BACKWARDS or self.broadcast and moment > self.ends[stream] + GAP

    def move(self, stream, moment, duration):
        """The shift for a packet of a stream, by the file's own clock."""
        if self.jumps(stream, moment + self.shifts.get(stream, self.shift)):
            if self.jumps(stream, moment + self.shift):
                self.shift = max(self.ends.values()) - moment
                self.restarted = True
            self.shifts[stream] = self.shift
        shift = self.shifts.setdefault(stream, self.shift)
        self.last[stream] = moment + shift
        self.ends[stream] = moment + shift + duration
        return shift


def is_header(packet):
    """Whether it is one of Theora's headers, which a joined Ogg file repeats in mid-stream."""
    return packet.stream.codec_context.name == "theora" and bytes(packet)[:1] >= b"\x80"


def demuxed(container, path, clock=None):
    """Packets of the picture and the sound that a player picks, on a clock that never starts over (`Clock`).

    Both streams are read even where one is wanted: the jumps are the same for whoever reads. Streams without time
    stamps get those of their order of decoding.
    """
    streams = [container.streams.best("video"), container.streams.best("audio")]
    streams = [stream for stream in streams if stream is not None and stream.codec_context]
    raw = container.format.flags & av.format.Flags.no_timestamps.value
    clock = clock or Clock(container.format.flags & av.format.Flags.ts_discont.value)
    count = 0
    for packet in container.demux(streams):
        stream = packet.stream
        if packet.size and is_header(packet):
            continue
        if raw and packet.size and stream.type == "video":
            packet.pts = packet.dts = round(count / (frame_rate(stream) or 25) / packet.time_base)
            count += 1
        elif packet.dts is not None:
            moment = float(packet.dts * packet.time_base)
            duration = float((packet.duration or 0) * packet.time_base)
            ticks = round(clock.move(stream.index, moment, duration) / packet.time_base)
            packet.dts += ticks
            if packet.pts is not None:
                packet.pts += ticks
        elif packet.pts is not None:
            packet.pts += round(clock.shifts.get(stream.index, clock.shift) / packet.time_base)
        yield packet
    if clock.restarted:
        warnings.warn(f"{path}: its clock starts over in mid-file; read as going on", stacklevel=2)


# ---- decoding ----------------------------------------------------------------------------------


def decoding_threads():
    """One in a process that shares the machine with others of its kind (OMP_NUM_THREADS=1), else one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(16, int(asked) if asked.isdecimal() and int(asked) else cores or 1)


def decoded(container, stream, path):
    """(frames, time stamps of the packets so far) for every packet of `stream`; what does not decode is skipped,
    counted, and told."""
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = decoding_threads()
    packets = demuxed(container, path)
    count = lost = 0
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


def timed(container, stream, path):
    """(seconds, frame) pairs that never step back; a frame without a time stamp follows the one before it."""
    in_order = lacks_display_times(container, stream)
    slots = (
        deque()
    )  # where only the order is known: the n-th frame shown takes the n-th packet's time
    seconds = follows = None
    for packet, frames in decoded(container, stream, path):
        if in_order and packet.size and packet.dts is not None:
            slots.append(float(packet.dts * packet.time_base))
        for frame in frames:
            if in_order and slots:
                stamp = slots.popleft()
            elif frame.pts is None:
                stamp = follows or 0.0
            else:
                stamp = float(frame.pts * frame.time_base)
            seconds = stamp if seconds is None else max(seconds, stamp)
            if stream.type == "audio":
                follows = seconds + frame.samples / frame.sample_rate
            else:
                follows = seconds + 1 / float(frame_rate(stream) or 25)
            yield seconds, frame


def display_matrix(frame):
    """The nine numbers that turn a frame upright, as containers store them, or None."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return np.frombuffer(bytes(matrix), np.int32).tolist() if matrix else None


def picture(frame, width, height, scaler):
    """Frame to upright RGB uint8 (height, width, 3): aspect ratio not kept, as the paper's 224 x 224, and bilinear with
    antialiasing (swscale widens its kernel with the reduction, as PIL does). Transparency is dropped. `scaler`, a
    VideoReformatter, is kept from frame to frame: setting one up costs several times what it then does."""
    a, b, _, c, d, *_ = display_matrix(frame) or (1, 0, 0, 0, 1)
    turned = abs(b) > abs(a)  # x' = a x + c y and y' = b x + d y; only quarter turns and mirrors
    coded = (height, width) if turned else (width, height)
    rgb = scaler.reformat(frame, *coded, format="rgb24", interpolation="BILINEAR", threads=1)
    rgb = rgb.to_ndarray()  # (h, w, 3)
    rgb, right, down = (rgb.swapaxes(0, 1), c, b) if turned else (rgb, a, d)
    return rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


# ---- what a file holds -------------------------------------------------------------------------


def probe(path):
    """MediaInfo of a video, from its packets rather than its header, which may promise anything."""
    path = Path(path)
    status = path.stat() if path.is_file() else None
    return _probe(path, status and (status.st_mtime_ns, status.st_size))


def _first_picture(path):
    """(seconds, frame, codec) of the first picture that is shown, or the reason why there is none."""
    with opened(path) as container:
        stream = picture_stream(container, path)
        codec = stream.codec_context.codec.canonical_name
        for seconds, frame in timed(container, stream, path):
            return seconds, frame, codec
    with opened(path) as container, suppress(av.error.FFmpegError):
        packets = container.demux(picture_stream(container, path))
        if any(packet.has_sidedata("encryption_info") for packet in packets):
            raise MediaError(f"{path}: is encrypted; give a copy without protection")
    if codec == "webp":
        raise MediaError(
            f"{path}: this FFmpeg does not decode animated webp; convert it to mp4 or gif"
        )
    raise MediaError(
        f"{path}: not one picture of it decodes; check that it plays, or export it again"
    )


def promised_end(container, stream):
    """Where the header says that the picture ends, in seconds of the container's clock."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return ((container.start_time or 0) + (container.duration or 0)) / 1e6


@lru_cache(maxsize=4096)
def _probe(path, _version):
    start, frame, codec = _first_picture(path)
    spans = {"video": [], "audio": []}  # (start, duration) of every packet that is shown or heard
    with opened(path) as container:
        stream = picture_stream(container, path)
        in_order = lacks_display_times(container, stream)
        still = is_still(container)
        promise = promised_end(container, stream)
        clock = Clock(container.format.flags & av.format.Flags.ts_discont.value)
        flash, read = container.format.name == "flv", 0
        for packet in until_error(demuxed(container, path, clock)):
            read = max(read, (packet.pos or 0) + packet.size)
            by_order = in_order and packet.stream.index == stream.index
            stamp = packet.dts if packet.pts is None or by_order else packet.pts
            if stamp is not None and packet.size and not packet.is_discard:
                span = (
                    float(stamp * packet.time_base),
                    float((packet.duration or 0) * packet.time_base),
                )
                spans[packet.stream.type].append(span)
        rate = float(frame_rate(stream) or 25)
        no_end = stream.duration is None
    shown = sorted(span for span in spans["video"] if span[0] > start - 1e-6) or [(start, 0.0)]
    mean = (shown[-1][0] - start) / (len(shown) - 1) if len(shown) > 1 else 1 / rate
    duration = shown[-1][0] + (shown[-1][1] or mean) - start
    if still and len(shown) == 1:
        raise MediaError(f"{path}: is a still image; give a video")
    if not 0 < duration <= LONGEST:
        raise MediaError(
            f"{path}: its time stamps say {duration:.6g} s of picture; remux it, or cut it to a few hours"
        )
    first = min(spans["audio"], default=(start, 0.0))[0]
    last = max((a + b for a, b in spans["audio"]), default=first)
    size = path.stat().st_size
    if flash and read < UNREAD * size:  # other containers end in an index, of any size
        warnings.warn(
            f"{path}: FFmpeg reads {100 * read / size:.0f} % of it; the rest, if it was joined from several "
            "files, is not used",
            stacklevel=3,
        )
    missing = promise - max(start + duration, last if no_end else 0.0)
    if 0.5 < missing < LONGEST and not clock.restarted:
        warnings.warn(
            f"{path}: cut off: {duration:.2f} of {promise - start:.2f} s of picture are there",
            stacklevel=3,
        )
    turned = abs(frame.rotation) in (90, 270)
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    return MediaInfo(
        duration=duration,
        start=start,
        width=width,
        height=height,
        fps=len(shown) / duration,
        frames=len(shown),
        codec=codec,
        has_audio=bool(spans["audio"]),
        audio_start=first - start,
        audio_duration=last - first,
    )


def read_tags(path):
    """The tags of a file that we wrote, names in lower case (Matroska's come in capitals)."""
    with opened(path) as container:
        return {key.lower(): value for key, value in container.metadata.items()}


# ---- pictures ----------------------------------------------------------------------------------


def seek(container, stream, seconds):
    """Go to a key frame before `seconds` of the container's clock, where the format has an index to trust."""
    if container.format.name.startswith(("mov", "matroska")):
        with suppress(av.error.FFmpegError):
            container.seek(math.floor(seconds / stream.time_base), backward=True, stream=stream)


def frames_from(path, start):
    """(seconds since the first shown picture, frame), from the frame on view at `start` or one before it."""
    zero = probe(path).start
    with opened(path) as container:
        stream = picture_stream(container, path)
        if start > SETTLE:
            seek(container, stream, zero + start)
        frames = timed(container, stream, path)
        first = next(frames, None)
        if start <= SETTLE or first and first[0] - zero <= start:
            for moment, frame in itertools.chain([first] if first else [], frames):
                yield moment - zero, frame
            return
    yield from frames_from(path, 0.0)  # the index misled us: from the beginning


def frame_count(seconds, fps):
    return max(1, math.ceil(seconds * fps - 1e-6))


def check_start(path, start):
    """Seconds of picture; a start outside of them is the caller's mistake."""
    duration = probe(path).duration
    if not 0 <= start < duration:
        raise MediaError(
            f"{path}: start {start:g} s lies outside its {duration:.3f} s; choose an earlier start"
        )
    return duration


def pictures(path, fps, size, start=0.0, duration=None):
    """What a viewer sees at start + i/fps, one after the other: uint8 (size, size, 3), the same array again where
    nothing new is shown. However long the video is, one frame of it is held in memory."""
    seconds = min(check_start(path, start) - start, duration or LONGEST)
    count = frame_count(seconds, fps)
    done, view, image, scaler = 0, None, None, VideoReformatter()
    for moment, frame in frames_from(path, start):
        slack = min(
            5e-4, float(frame.time_base) / 2
        )  # time stamps are rounded to this, in Matroska to 1 ms
        while view is not None and done < count and start + done / fps < moment - slack:
            image = picture(view, size, size, scaler) if image is None else image
            yield image
            done += 1
        if done == count:
            return
        view, image = frame, None
    if view is None:
        raise MediaError(f"{path}: no picture decodes after {start:g} s; choose an earlier start")
    image = picture(view, size, size, scaler) if image is None else image
    yield from itertools.repeat(image, count - done)  # the last stays until its own end


def read_frames(path, fps, size, start=0.0, duration=None):
    """uint8 (f, 3, size, size); frame i is what a viewer sees at start + i/fps seconds after the first shown picture.

    Ends with the picture: f = ceil(fps * seconds that are there). Only the result and one frame are held in memory.
    """
    seconds = min(max(0.0, probe(path).duration - start), duration or LONGEST)
    out = np.empty((frame_count(seconds, fps), 3, size, size), np.uint8)
    for i, image in enumerate(pictures(path, fps, size, start, duration)):
        out[i] = image.transpose(2, 0, 1)
    return out  # (f, 3, h, w)


# ---- sound -------------------------------------------------------------------------------------


GUESSES = {6: "5.1", 7: "6.1", 8: "7.1"}  # as FFmpeg's own program takes channels without names


def name_channels(container, stream):
    """Give uncompressed sound in QuickTime a layout by its number of channels, before its first packet is decoded.

    There every channel is named, in any order, and such a layout PyAV frees each time it is looked at: a crash of the
    process. So the number comes from the bit rate."""
    context = stream.codec_context
    if "mov" not in container.format.name or not context.name.startswith("pcm_"):
        return
    bits = re.search(r"\d+", context.name)  # pcm_alaw and pcm_mulaw have none in their names, and 8
    bits = int(bits[0]) if bits else 8
    channels = round((context.bit_rate or 0) / (context.sample_rate * bits))
    if channels > 2:
        context.layout = GUESSES.get(channels, f"{channels} channels")


def downmix_weights(layout):
    """The share of each channel in mono: ITU-R BS.775 where its names are known, else the mean."""
    count = len(layout.channels)
    if layout.name == f"{count} channels" and count in GUESSES:
        layout = av.AudioLayout(GUESSES[count])
    names = [channel.name for channel in layout.channels]
    if len(names) == 1 or not all(name in DOWNMIX for name in names):
        return np.full(len(names), 1 / len(names), np.float32)
    return np.array([DOWNMIX[name] for name in names], np.float32)


class Downmixer:
    """Frames of any rate, layout and sample format -> float32 mono at 16 kHz.

    FFmpeg converts to interleaved floats first: of planar sound with eight channels or more PyAV would read a plane
    too many (a segmentation fault).
    """

    def __init__(self, frame):
        self.setup = self.setup_of(frame)
        self.to_float = av.AudioResampler("flt", frame.layout, frame.sample_rate)
        self.to_16k = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        self.weights = downmix_weights(frame.layout)
        self.rate = frame.sample_rate
        self.invalid = 0  # samples that are no numbers

    @staticmethod
    def setup_of(frame):
        return frame.sample_rate, frame.layout.name, frame.format.name

    def push(self, frame):
        """A frame, or None at the end -> arrays (n,)."""
        frames = []
        for part in self.to_float.resample(frame):
            samples = part.to_ndarray().reshape(-1, len(self.weights))  # (n, channels)
            valid = np.abs(samples) < LOUDEST  # false for NaN
            if not valid.all():
                self.invalid += int(samples.size - valid.sum())
                samples = np.where(valid, samples, 0)
            mono = av.AudioFrame.from_ndarray(
                (samples @ self.weights)[None], format="flt", layout="mono"
            )
            mono.sample_rate = self.rate
            frames += self.to_16k.resample(mono)
        if frame is None:
            frames += self.to_16k.resample(None)
        return [part.to_ndarray()[0] for part in frames]


def sound_runs(container, stream, path, zero, until):
    """[(moment of its first sample, arrays)] of the stretches of sound without a jump of the clock, and `zero`, which
    is the first sample's moment where there is no picture to count from."""
    runs, mixer, end, invalid = [], None, 0.0, 0
    name_channels(container, stream)
    for moment, frame in timed(container, stream, path):
        zero = moment if zero is None else zero
        if moment - zero >= until:
            break
        if mixer is None or mixer.setup != mixer.setup_of(frame) or abs(moment - end) > 0.02:
            if mixer:
                runs[-1][1].extend(mixer.push(None))
                invalid += mixer.invalid
            mixer, end = Downmixer(frame), moment
            runs.append((moment - zero, []))
        runs[-1][1].extend(mixer.push(frame))
        end += frame.samples / frame.sample_rate
    if mixer:
        runs[-1][1].extend(mixer.push(None))
        invalid += mixer.invalid
    if invalid:
        warnings.warn(
            f"{path}: {invalid} samples of its sound are no numbers; silence instead", stacklevel=3
        )
    return runs


def read_audio(path, start=0.0, duration=None):
    """float32 (n,), 16 kHz mono (downmix: ITU-R BS.775); sample 0 is heard `start` seconds after the first picture.

    Silence fills what the track leaves out; with `duration` n = round(16000 * duration), else all sound from `start`
    on. Kept in [-1, 1] by division where the peak exceeds 1, as decoded lossy sound may."""
    with opened(path) as container:
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise MediaError(f"{path}: has no sound track that decodes; give a video with sound")
        info = probe(path) if has_picture(container) else None
        if info and start > SETTLE:
            seek(
                container, stream, info.start + start - 1.0
            )  # a decoder needs some frames to settle
        zero = info and info.start  # sound alone starts its own clock
        until = LONGEST if duration is None else start + duration  # beyond, the clock is damaged
        runs = sound_runs(container, stream, path, zero, until)
    if not runs and duration is None:
        raise MediaError(f"{path}: its sound track does not decode; give a video with sound")
    placed = [
        (round((moment - start) * SAMPLE_RATE), np.concatenate(pieces))
        for moment, pieces in runs
        if pieces
    ]
    n = max((at + len(x) for at, x in placed), default=0)
    if info:  # coders fill their last block, but packets know where sound ends
        end = round((info.audio_start + info.audio_duration - start) * SAMPLE_RATE)
        n = end if 0 < n - end < SAMPLE_RATE // 10 else n
    placed = [(at, x[: max(0, n - at)]) for at, x in placed]
    n = n if duration is None else round(duration * SAMPLE_RATE)
    del runs  # of an hour, each copy is a quarter of a gigabyte
    wav = np.zeros(max(0, n), np.float32)
    for at, x in placed:
        part = x[max(0, -at) : max(0, n - at)]
        wav[max(0, at) : max(0, at) + len(part)] = part
    wav /= max(1.0, wav.max(initial=0), -wav.min(initial=0))
    return wav  # (n,)
