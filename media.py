"""Video and sound files in and out: pictures and sound of anything FFmpeg decodes (through PyAV), and new files.

in   any video FFmpeg decodes, or a folder of them
out  frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], and new files: the same picture with new
     sound, or wav

Pictures and sound share one clock: zero is the moment the first picture is shown. `python sample.py clip.mp4` reads and
writes through here; `data.py` hands the same functions on.

Differs from the official code: frames are taken from the source by presentation time (there: a lossy re-encode at 4
fps).
"""
import heapq
import io
import itertools
import math
import os
import secrets
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from av.video.reformatter import VideoReformatter

SAMPLE_RATE = 16000
LONGEST = 6 * 3600.0            # seconds; beyond this the time stamps are taken for damage, not for a film
SETTLE = 4.0                    # seconds; a later start is reached by seeking
CONTAINERS = {".mp4": ("mp4", "aac"), ".m4v": ("mp4", "aac"), ".mov": ("mov", "aac"), ".mkv": ("matroska", "flac"),
              ".webm": ("webm", "libopus")}      # what we write: the muxer and the sound codec in it
STRUCTURE = {"major_brand", "minor_version", "compatible_brands", "encoder"}     # tags that describe the old file
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".ogv",
                  ".flv", ".wmv", ".3gp", ".gif"}


class MediaError(Exception):
    """A user's file cannot be used: one line naming the file, the reason and the remedy."""

    def __str__(self):                           # a data loader's worker hands it on as the last line of a traceback
        return super().__str__().strip().split("\n")[-1].removeprefix(f"{__name__}.MediaError: ")


FINAL = {}                      # temporary path -> the path it stands for, which is what messages have to name


@contextmanager
def whole(path):
    """A temporary path beside `path` that becomes `path` on success and vanishes on failure: all or nothing."""
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")          # short: a name's length has a limit
    FINAL[part] = FINAL.get(path, path)
    try:
        yield part
        os.replace(part, path)
    except (OSError, av.error.FFmpegError) as error:
        reason = error.strerror or error
        raise MediaError(f"{FINAL[part]}: cannot be written ({reason}); "
                         "free some space or choose another folder") from error
    finally:
        del FINAL[part]
        with suppress(OSError):
            part.unlink()


def find_videos(paths):
    """Files as given; folders are searched, in sorted order, leaving out hidden files and our own NAME.foley.*"""
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()
                        and ".foley." not in p.name and not p.name.startswith(".")) if path.is_dir() else [path]
        if not inside:
            raise MediaError(f"{path}: no video in this folder ({' '.join(sorted(VIDEO_SUFFIXES))}); give another")
        found += inside
    return found


# ---- reading -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MediaInfo:
    """What a video holds. Times are seconds; the picture's clock starts when its first picture is shown."""
    duration: float             # of the picture, the last frame's own time included
    start: float                # the container's time stamp of the first shown picture
    width: int                  # as shown: after rotation
    height: int
    fps: float                  # mean rate
    frames: int
    codec: str
    has_audio: bool
    audio_start: float          # of the sound, on the picture's clock
    audio_duration: float


@contextmanager
def opened(path):
    """An input container. Local files only: a playlist in disguise must not reach the network."""
    path = Path(path)
    if not path.exists():
        raise MediaError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder, not a video; give a file in it")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); copy or download it again")
    try:
        container = av.open(f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: not a video that FFmpeg can open, or cut off before its index ({error.strerror}); "
                         "check that it plays, or convert it to mp4") from error
    with container:
        yield container


def has_picture(container):
    """Whether there is a stream of pictures; cover art does not count."""
    stream = container.streams.best("video")
    return stream is not None and not stream.disposition & av.stream.Disposition.attached_pic


def picture_stream(container, path):
    """The stream that a player shows."""
    stream = container.streams.best("video")
    if not has_picture(container):
        what = "sound but no picture" if container.streams.audio else "no picture"
        raise MediaError(f"{path}: holds {what}; give a file with a video stream")
    if stream.codec_context is None:
        raise MediaError(f"{path}: its video codec is unknown to this FFmpeg; convert it to mp4 (H.264)")
    return stream


def decode(container, stream, path):
    """Every frame of `stream` that decodes, in order of presentation; what does not is skipped, counted, and told."""
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(16, torch.get_num_threads())     # 1 in a data loader's workers
    packets, frames, lost, more = container.demux(stream), 0, 0, True
    while more:
        try:
            packet = next(packets, None)         # after a read error the demuxer has ended: None
            more = packet is not None
            for frame in packet.decode() if more else ():
                frames += 1
                yield frame
        except av.error.EOFError:                # what some decoders answer to the final flush
            continue
        except av.error.FFmpegError:
            lost += 1
    if lost and frames:
        warnings.warn(f"{path}: damaged or cut off; used the {frames} {stream.type} frames that decode", stacklevel=2)


def timed(container, stream, path):
    """(seconds, frame) pairs that never step back; a frame without a time stamp follows the one before it."""
    seconds = follows = None
    for frame in decode(container, stream, path):
        stamp = (follows or 0.0) if frame.pts is None else float(frame.pts * frame.time_base)
        seconds = stamp if seconds is None else max(seconds, stamp)
        audio = stream.type == "audio"
        follows = seconds + (frame.samples / frame.sample_rate if audio else float(1 / (stream.average_rate or 25)))
        yield seconds, frame


def picture(frame, width, height, scaler):
    """Frame to upright RGB uint8 (height, width, 3): aspect ratio not kept, as the paper's 224 x 224, and bilinear with
    antialiasing (swscale widens its kernel with the reduction, as PIL does). Transparency is dropped. `scaler`, a
    VideoReformatter, is kept from frame to frame: setting one up costs several times what it then does."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    a, b, c, d = np.frombuffer(bytes(matrix), np.int32)[[0, 1, 3, 4]] if matrix else (1, 0, 0, 1)
    turned = abs(int(b)) > abs(int(a))           # x' = a x + c y and y' = b x + d y; only quarter turns and mirrors
    coded = (height, width) if turned else (width, height)
    rgb = scaler.reformat(frame, *coded, format="rgb24", interpolation="BILINEAR", threads=1).to_ndarray()   # (h, w, 3)
    rgb, right, down = (rgb.swapaxes(0, 1), c, b) if turned else (rgb, a, d)
    return rgb[::-1 if down < 0 else 1, ::-1 if right < 0 else 1]


def readable(packets):
    """Packets up to the first read error: of a file that is cut off, what came before counts."""
    with suppress(av.error.FFmpegError):
        yield from packets


def probe(path):
    """MediaInfo of a video, from its packets rather than its header, which may promise anything."""
    path = Path(path)
    status = path.stat() if path.is_file() else None
    return _probe(path, status and (status.st_mtime_ns, status.st_size))


def _first_picture(path):
    """(seconds, frame, codec) of the first picture that is shown, or the reason why there is none."""
    with opened(path) as container:
        stream = picture_stream(container, path)
        for seconds, frame in timed(container, stream, path):
            return seconds, frame, stream.codec_context.codec.canonical_name
    with opened(path) as container, suppress(av.error.FFmpegError):
        if any(packet.has_sidedata("encryption_info") for packet in container.demux(picture_stream(container, path))):
            raise MediaError(f"{path}: is encrypted; give a copy without protection")
    raise MediaError(f"{path}: not one picture of it decodes; check that it plays, or export it again")


@lru_cache(maxsize=4096)
def _probe(path, _version):
    start, frame, codec = _first_picture(path)
    turned = abs(frame.rotation) in (90, 270)
    spans = {"video": [], "audio": []}           # (start, duration) of every packet that is shown or heard
    with opened(path) as container:
        stream, sound = picture_stream(container, path), container.streams.best("audio")
        still = container.format.name.endswith(("_pipe", "image2", "gif", "apng")) or container.metadata.get(
            "major_brand") in ("avif", "heic", "mif1")
        if stream.duration is not None:          # what the header promises, on the container's clock
            promise = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        else:
            promise = ((container.start_time or 0) + (container.duration or 0)) / 1e6
        for packet in readable(container.demux(*filter(None, (stream, sound)))):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and not packet.is_discard:
                span = float(stamp * packet.time_base), float((packet.duration or 0) * packet.time_base)
                spans[packet.stream.type].append(span)
    shown = sorted(span for span in spans["video"] if span[0] > start - 1e-6) or [(start, 0.0)]
    mean = (shown[-1][0] - start) / (len(shown) - 1) if len(shown) > 1 else float(1 / (stream.average_rate or 25))
    duration = shown[-1][0] + (shown[-1][1] or mean) - start
    if still and len(shown) == 1:
        raise MediaError(f"{path}: is a still image; give a video")
    if not 0 < duration <= LONGEST:
        raise MediaError(f"{path}: its time stamps say {duration:.6g} s of picture; remux it, or cut it to a few hours")
    first = min(spans["audio"], default=(start, 0.0))[0]
    last = max((a + b for a, b in spans["audio"]), default=first)
    if 0.5 < promise - max(start + duration, last if stream.duration is None else 0.0) < LONGEST:
        warnings.warn(f"{path}: cut off: {duration:.2f} of {promise - start:.2f} s of picture are there", stacklevel=3)
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    return MediaInfo(duration, start, width, height, len(shown) / duration, len(shown), codec,
                     bool(spans["audio"]), first - start, last - first)


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
    yield from frames_from(path, 0.0)            # the index misled us: from the beginning


def pictures(path, fps, size, start=0.0, duration=None):
    """What a viewer sees at start + i/fps, one after the other: uint8 (size, size, 3), the same array again where nothing
    new is shown. However long the video is, one frame of it is held in memory."""
    info = probe(path)
    if not 0 <= start < info.duration:
        raise MediaError(f"{path}: --start {start:g} lies outside its {info.duration:.3f} s; choose an earlier start")
    count = frame_count(min(info.duration - start, duration or LONGEST), fps)
    done, view, image, scaler = 0, None, None, VideoReformatter()
    for moment, frame in frames_from(path, start):
        slack = min(5e-4, float(frame.time_base) / 2)    # time stamps are rounded to this, in Matroska to 1 ms
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
    yield from itertools.repeat(image, count - done)     # the last stays until its own end


def frame_count(seconds, fps):
    return max(1, math.ceil(seconds * fps - 1e-6))


def read_frames(path, fps, size, start=0.0, duration=None):
    """uint8 (f, 3, size, size); frame i is what a viewer sees at start + i/fps seconds after the first shown picture.

    Ends with the picture: f = ceil(fps * seconds that are there). Only the result and one frame are held in memory."""
    seconds = min(max(0.0, probe(path).duration - start), duration or LONGEST)
    out = np.empty((frame_count(seconds, fps), 3, size, size), np.uint8)
    for i, image in enumerate(pictures(path, fps, size, start, duration)):
        out[i] = image.transpose(2, 0, 1)
    return torch.from_numpy(out)                                                     # (f, 3, h, w)


def monaural(frame):
    """The mean of a sound frame's channels, whatever their layout and sample format, as a float frame."""
    samples = frame.to_ndarray()                 # (channels, n), or (1, n * channels) when packed
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    mono = av.AudioFrame.from_ndarray(samples.mean(0, dtype=np.float32)[None], format="flt", layout="mono")
    mono.sample_rate = frame.sample_rate
    return mono


def read_audio(path, start=0.0, duration=None):
    """float32 (n,), 16 kHz mono, the channels averaged; sample 0 is heard `start` seconds after the first picture.

    Silence fills what the track leaves out; with `duration` n = round(16000 * duration), else all sound from `start`
    on. Kept in [-1, 1] by division where the peak exceeds 1, as decoded lossy sound may."""
    with opened(path) as container:
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise MediaError(f"{path}: has no sound track that decodes; give a video with sound")
        info = probe(path) if has_picture(container) else None
        zero = info and info.start               # sound alone starts its own clock
        if zero is not None and start > SETTLE:
            seek(container, stream, zero + start - 1.0)          # a decoder needs some frames to settle
        runs, resampler, rate, end = [], None, None, 0.0         # a run: (moment of its first sample, its samples)
        for moment, frame in timed(container, stream, path):
            zero = moment if zero is None else zero
            if duration is not None and moment - zero >= start + duration:
                break
            if frame.sample_rate != rate or abs(moment - end) > 0.02:        # a new rate, or a jump of the clock
                if resampler:
                    runs[-1][1].extend(resampler.resample(None))
                resampler, rate, end = av.AudioResampler("flt", "mono", SAMPLE_RATE), frame.sample_rate, moment
                runs.append((moment - zero, []))
            runs[-1][1].extend(resampler.resample(monaural(frame)))
            end += frame.samples / rate
        if resampler:
            runs[-1][1].extend(resampler.resample(None))
    if not runs and duration is None:
        raise MediaError(f"{path}: its sound track does not decode; give a video with sound")
    placed = [(round((moment - start) * SAMPLE_RATE), np.concatenate([piece.to_ndarray()[0] for piece in pieces]))
              for moment, pieces in runs if pieces]
    n = max((at + len(x) for at, x in placed), default=0)
    if info:                                     # coders fill their last block, but packets know where sound ends
        end = round((info.audio_start + info.audio_duration - start) * SAMPLE_RATE)
        n = end if 0 < n - end < SAMPLE_RATE // 10 else n
    placed = [(at, x[:max(0, n - at)]) for at, x in placed]
    n = n if duration is None else round(duration * SAMPLE_RATE)
    del runs                                     # of an hour, each copy is a quarter of a gigabyte
    wav = np.zeros(max(0, n), np.float32)
    for at, x in placed:
        part = x[max(0, -at):max(0, n - at)]
        wav[max(0, at):max(0, at) + len(part)] = part
    wav /= max(1.0, wav.max(initial=0), -wav.min(initial=0))
    return torch.from_numpy(wav)                                                     # (n,)


# ---- writing -------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def holds(suffix, codec):
    """Whether the container of this suffix takes this video codec, by FFmpeg's own account."""
    with av.open(io.BytesIO(), "w", format=CONTAINERS[suffix][0]) as empty:
        return codec in empty.supported_codecs


def output_suffix(source):
    """The suffix under which `write_video` can copy the picture of `source`: its own if we write sound there, else
    .mp4, else .mkv; and .mp4 for what none of them holds (animated gif), which is then encoded anew."""
    codec, suffix = probe(source).codec, Path(source).suffix.lower()
    own = (suffix,) if suffix in CONTAINERS else ()
    return next((s for s in (*own, ".mp4", ".mkv") if holds(s, codec)), ".mp4")


def copied_packets(packets, track, first, end):
    """The source's own packets, moved so that the first shown picture is at 0; what cannot decode before it is left."""
    begun, extra, held = False, 0, []
    for packet in packets:
        if packet.pts is None and packet.dts is None:            # the demuxer's closing mark
            continue
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - first
        begun = begun or packet.is_keyframe or packet.pts >= 0
        if packet.is_discard and packet.pts >= end:      # behind the edit list's end, yet others may be predicted
            packet.pts, packet.duration, extra = end + extra, 1, extra + 1           # from it: it stays, for one tick
        if not begun:
            continue
        packet.stream = track
        held.append(packet)
        if packet.dts is not None:               # Matroska stores no decoding times: the first few are unknown
            packet.dts -= first
            for back, early in enumerate(reversed(held)):
                early.dts = packet.dts - back
            yield from held
            held.clear()
    for packet in held:
        packet.dts = packet.pts
        yield packet


def encoded_packets(source, track, start, seconds):
    """The pictures of a cut, encoded anew: from the one on view at `start`, each shown until the next or the end."""
    tick = Fraction(1, 90000)

    def encode(moment, frame, until):
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(frame, track.width, track.height, scaler)))
        image.pts, image.time_base, lengths[moment] = moment, tick, until - moment
        return timed_packets(track.encode(image))

    def timed_packets(packets):
        for packet in packets:
            packet.duration = lengths.pop(packet.pts)    # the encoder forgets how long the last picture is shown
            yield packet

    lengths, end, view, scaler = {}, round(seconds / tick), None, VideoReformatter()
    for moment, frame in frames_from(source, start):
        moment = min(max(0, round((moment - start) / tick)), end)
        if view and moment > view[0]:
            yield from encode(*view, moment)
        if moment == end:
            break
        view = moment, frame
    else:
        yield from encode(*view, end)
    yield from timed_packets(track.encode(None))


def sound_packets(wav, track):
    """Sound (n,) encoded a second at a time."""
    for at in range(0, len(wav), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(wav[None, at:at + SAMPLE_RATE], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, at, Fraction(1, SAMPLE_RATE)
        yield from track.encode(frame)
    yield from track.encode(None)


def mux(out, source, wav, tags, start, seconds, copied):
    """Write `out`: the picture of `source`, copied or encoded anew, and the sound `wav` (n,), packets in order."""
    info, (muxer, codec) = probe(source), CONTAINERS[out.suffix.lower()]
    with opened(source) as src:
        stream = picture_stream(src, source)
        tags = {**{key: value for key, value in src.metadata.items() if key not in STRUCTURE}, **(tags or {})}
        flags = "faststart" + "+use_metadata_tags" * any("." in key for key in tags)         # com.apple.quicktime.make
        options = {"movflags": flags} if muxer in ("mp4", "mov") else {}
        with av.open(f"file:{out}", "w", muxer, container_options=options) as dst:
            dst.metadata.update(tags)
            if copied:
                track = dst.add_stream_from_template(stream, opaque=True)    # so that no encoder need exist
                track.metadata.update(stream.metadata)
                ticks = [round(moment / stream.time_base) for moment in (info.start, info.duration)]
                pictures = copied_packets(readable(src.demux(stream)), track, *ticks)
            else:
                track = dst.add_stream("libvpx-vp9" if muxer == "webm" else "libx264", options={"crf": "18"})
                track.width, track.height = max(2, info.width // 2 * 2), max(2, info.height // 2 * 2)    # 4:2:0: even
                track.pix_fmt, track.codec_context.time_base = "yuv420p", Fraction(1, 90000)
                pictures = encoded_packets(source, track, start, seconds)
            # As much as AAC takes at 16 kHz mono; there its fast search is 4 times faster and no worse (measured).
            sound = dst.add_stream(codec, rate=SAMPLE_RATE, layout="mono",
                                   options={"aac_coder": "fast"} if codec == "aac" else {})
            sound.bit_rate = 96000
            both = heapq.merge(pictures, sound_packets(wav, sound), key=lambda packet: packet.dts * packet.time_base)
            for packet in both:
                dst.mux_one(packet)


def write_video(source, wav, out, tags=None, start=0.0, duration=None):
    """The picture of `source` with the sound `wav` (n,), cut or padded to be exactly as long as the picture.

    Video packets are copied bit for bit with rotation, colour and tags. Encoded anew (libx264; VP9 in webm) are only a
    cut (start, duration), which rarely falls on a key frame, and packets that `out` cannot hold."""
    info, out = probe(source), Path(out)
    if out.suffix.lower() not in CONTAINERS:
        raise MediaError(f"{out}: we write no sound into this kind of file; end it in {', '.join(CONTAINERS)}")
    if not 0 <= start < info.duration:
        raise MediaError(f"{source}: --start {start:g} lies outside its {info.duration:.3f} s; choose an earlier start")
    seconds = min(info.duration - start, duration or LONGEST)
    n = round(seconds * SAMPLE_RATE)
    wav = torch.nn.functional.pad(wav.detach().float().cpu().clamp(-1, 1)[:n], (0, max(0, n - len(wav)))).numpy()
    with whole(out) as part:
        if seconds > info.duration - 1e-3 and holds(out.suffix.lower(), info.codec):
            with suppress(av.error.ArgumentError, av.error.InvalidDataError):        # time stamps no muxer accepts
                return mux(part, source, wav, tags, start, seconds, copied=True)
            warnings.warn(f"{source}: cannot be copied into {out.suffix}; its picture is encoded anew", stacklevel=2)
        mux(part, source, wav, tags, start, seconds, copied=False)


def write_wav(out, wav, tags=None):
    """Sound (n,) as 16-bit wav; `tags` by the names that wav knows: title, artist, comment, copyright, software."""
    memory = io.BytesIO()                        # the file itself is written in one piece, so a full disk is noticed
    with soundfile.SoundFile(memory, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file:
        for name, value in (tags or {}).items():
            setattr(file, name, value)
        file.write(wav.detach().float().cpu().clamp(-1, 1).numpy())
    with whole(out) as part:
        part.write_bytes(memory.getvalue())


def read_tags(path):
    """The tags of a file that `write_video` or `write_wav` wrote, names in lower case (Matroska's come in capitals)."""
    with opened(path) as container:
        return {key.lower(): value for key, value in container.metadata.items()}
