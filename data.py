"""All media in and out: pictures, sound, mel spectrograms and back, and the clips that training reads.

in   any video FFmpeg decodes (through PyAV), or a folder of them
out  frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], mel float32 (128, s) in [0, 1], and
     new files: the same picture with new sound, wav, or a prepared training set (safetensors shards + index.json)

Diff-Foley section 3.1 and its data_preprocess/wav2spec.py fix the mel; fast Griffin-Lim is Perraudin, Balazs and
Sondergaard 2013. Pictures and sound share one clock: zero is the moment the first picture is shown.

    python data.py prepare RAW OUT --fps 15.625 --size 64 --workers 4

Differs from the official code: frames are taken from the source by presentation time (there: a lossy re-encode at 4
fps), and one filterbank at 16 kHz serves mel and its inverse (there: the inverse is at 22,050 Hz, and tones fall).
"""
import argparse
import heapq
import io
import itertools
import json
import math
import os
import secrets
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import safetensors
import soundfile
import torch
from av.video.reformatter import VideoReformatter
from safetensors.numpy import save as to_safetensors
from safetensors.torch import load_file as load_safetensors
from tqdm import tqdm

SAMPLE_RATE = 16000
N_FFT = 1024
HOP = 256
N_MELS = 128
FMIN = 125.0
FMAX = 7600.0
WINDOW = 131072                 # samples of one model window: 512 mel columns, 8.192 s
LONGEST = 6 * 3600.0            # seconds; beyond this the time stamps are taken for damage, not for a film
SETTLE = 4.0                    # seconds; a later start is reached by seeking
SHARD = 64                      # clips per file of a prepared set
CONTAINERS = {".mp4": ("mp4", "aac"), ".m4v": ("mp4", "aac"), ".mov": ("mov", "aac"), ".mkv": ("matroska", "flac"),
              ".webm": ("webm", "libopus")}      # what we write: the muxer and the sound codec in it
STRUCTURE = {"major_brand", "minor_version", "compatible_brands", "encoder"}     # tags that describe the old file
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".ogv",
                  ".flv", ".wmv", ".3gp", ".gif"}


class MediaError(Exception):
    """A user's file cannot be used: one line naming the file, the reason and the remedy."""


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


# ---- mel spectrogram and its inverse -------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def mel_basis(rate=SAMPLE_RATE):
    """Slaney's filterbank: linear below 1 kHz and logarithmic above, triangles of unit area in Hz. (128, 513)"""
    step = math.log(6.4) / 27                    # 27 steps from 1 kHz to 6.4 kHz, by definition of the scale

    def to_mel(hz):
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(to_mel(FMIN), to_mel(FMAX), N_MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.linspace(0, rate / 2, N_FFT // 2 + 1)
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def stft(wav):
    """(b, n) -> complex (b, 513, ceil(n/256)). The last sample is dropped, as the published preprocessing does: a
    centred transform of n-1 samples has 1 + (n-1)//256 = ceil(n/256) columns, so 131,072 samples make exactly 512."""
    window = torch.hann_window(N_FFT, device=wav.device)
    return torch.stft(wav[..., :-1], N_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)


def mel(wav):
    """Sound (..., n) to mel (..., 128, ceil(n/256)): clip(0.2 log10(magnitude) + 0.8, 0, 1), reflected at the ends."""
    shape, n = wav.shape[:-1], wav.shape[-1]
    short = max(0, N_FFT // 2 + 2 - n)           # reflection needs more than half a window of sound: append silence
    wav = torch.nn.functional.pad(wav.float().reshape(-1, n), (0, short))
    power = mel_basis().to(wav.device) @ stft(wav).abs()                             # (b, m, s)
    level = (0.2 * power.clamp_min(1e-5).log10() + 0.8).clamp(0, 1)
    return level[..., :-(-n // HOP)].reshape(*shape, N_MELS, -(-n // HOP))


def mel_to_magnitude(level, iterations=32):
    """(b, 128, s) -> non-negative (b, 513, s) whose mel is `level`. Multiplicative updates for the Kullback-Leibler
    divergence (Lee and Seung 2001): they are scale-free, so quiet columns are met as exactly as loud ones. A level of
    0 stands for "at most 1e-4" (-82 dB) and gives exact silence; resynthesised, that floor would be a steady hiss."""
    basis = mel_basis().to(level.device).expand(len(level), -1, -1)                  # (b, m, 513)
    target = torch.where(level > 0, 10 ** (5 * level - 4), 0.0)                      # (b, m, s)
    weight = basis.sum(1).clamp_min(1e-9)[..., None]                                 # (b, 513, 1)
    magnitude = basis.transpose(1, 2) @ (target / basis.sum(2, keepdim=True)) / weight
    for _ in range(iterations):
        magnitude = magnitude * (basis.transpose(1, 2) @ (target / (basis @ magnitude + 1e-12))) / weight
    return magnitude


def griffin_lim(magnitude, iterations=32, seed=0):
    """(b, 513, s) -> (b, s*256): phases that fit each other, by the fast algorithm (Perraudin et al. 2013), momentum 0.99.

    Every item starts from the same random phases, drawn on the CPU from `seed`, so its sound depends neither on the
    batch it sits in nor on the device."""
    window = torch.hann_window(N_FFT, device=magnitude.device)
    samples = magnitude.shape[-1] * HOP
    generator = torch.Generator().manual_seed(seed)
    turn = torch.rand(magnitude.shape[1:], generator=generator) * (2 * math.pi)
    spectrum = magnitude * torch.polar(torch.ones_like(turn), turn).to(magnitude.device)
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        consistent = stft(torch.istft(spectrum, N_FFT, HOP, window=window, length=samples))
        ahead = consistent + 0.99 * (consistent - previous)      # momentum; the first step only finds a phase
        spectrum = magnitude * ahead / ahead.abs().clamp_min(1e-12)
        previous = consistent
    return torch.istft(spectrum, N_FFT, HOP, window=window, length=samples)


def vocode(level, iterations=32, seed=0, length=None):
    """Mel (..., 128, s) to sound (..., s*256), or `length` samples: the filterbank's inverse, then Griffin-Lim."""
    shape, columns = level.shape[:-2], level.shape[-1]
    if columns < 3:                              # too short to reflect: vocode with silence appended, then cut
        level = torch.nn.functional.pad(level, (0, 3 - columns))
    magnitude = mel_to_magnitude(level.float().reshape(-1, *level.shape[-2:]))       # (b, 513, s)
    wav = griffin_lim(magnitude, iterations, seed)[:, :columns * HOP]
    length = columns * HOP if length is None else length
    return torch.nn.functional.pad(wav, (0, length - wav.shape[-1])).reshape(*shape, length)


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


def read_frames(path, fps, size, start=0.0, duration=None):
    """uint8 (f, 3, size, size); frame i is what a viewer sees at start + i/fps seconds after the first shown picture.

    Ends with the picture: f = ceil(fps * seconds that are there). Only the result and one frame are held in memory."""
    info = probe(path)
    if not 0 <= start < info.duration:
        raise MediaError(f"{path}: --start {start:g} lies outside its {info.duration:.3f} s; choose an earlier start")
    seconds = min(info.duration - start, duration or LONGEST)
    count = max(1, math.ceil(seconds * fps - 1e-6))
    out = np.empty((count, 3, size, size), np.uint8)
    done, view, image, scaler = 0, None, None, VideoReformatter()
    for moment, frame in frames_from(path, start):
        slack = min(5e-4, float(frame.time_base) / 2)    # time stamps are rounded to this, in Matroska to 1 ms
        while view is not None and done < count and start + done / fps < moment - slack:
            image = picture(view, size, size, scaler).transpose(2, 0, 1) if image is None else image
            out[done], done = image, done + 1
        if done == count:
            break
        view, image = frame, None
    if view is None:
        raise MediaError(f"{path}: no picture decodes after {start:g} s; choose an earlier start")
    if done < count:
        out[done:] = picture(view, size, size, scaler).transpose(2, 0, 1)    # the last stays until its own end
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
    wav = np.zeros(max(0, n), np.float32)
    for at, x in placed:
        part = x[max(0, -at):max(0, n - at)]
        wav[max(0, at):max(0, at) + len(part)] = part
    return torch.from_numpy(wav / max(1.0, np.abs(wav).max(initial=0)))      # (n,)


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


# ---- training sets -------------------------------------------------------------------------------------------------

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


def load_clip(path, fps, size):
    """Frames (f, 3, h, w) and int16 sound (n,) of a whole clip, equally long; or the reason why it cannot be used."""
    with warnings.catch_warnings(record=True):
        try:
            frames = read_frames(path, fps, size)
            wav = read_audio(path, duration=probe(path).duration)
        except MediaError as error:
            return str(error)
    return frames.numpy(), (wav.numpy() * 32767).round().astype(np.int16)


def load_clips(paths, fps, size, workers):
    """`load_clip` of every path, in order, in `workers` processes that stay at most a few clips ahead."""
    if workers <= 1:
        yield from (load_clip(path, fps, size) for path in paths)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(load_clip, path, fps, size))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def write_shard(path, tensors):
    """Named arrays to a safetensors file, whole or not at all."""
    with whole(path) as part:
        part.write_bytes(to_safetensors(tensors))


def prepare(raw, out, fps=15.625, size=64, workers=1):
    """Folder of videos to OUT/shard-*.safetensors and OUT/index.json; the same bytes for any number of workers.
    Returns the index. index.json comes last, so an interrupted set is never mistaken for a finished one."""
    out, raw = Path(out), Path(raw)
    videos = find_videos([raw])
    root = raw if raw.is_dir() else raw.parent
    index = {"fps": fps, "size": size, "clips": [], "left_out": []}
    with whole(out / "index.json") as part:      # an unwritable folder is noticed before the work, not after
        out.mkdir(parents=True, exist_ok=True)
        for old in (out / "index.json", *out.glob("shard-*.safetensors")):
            old.unlink(missing_ok=True)
        shard, full = {}, 0
        for path, clip in zip(videos, tqdm(load_clips(videos, fps, size, workers), total=len(videos), unit="clip")):
            name = path.relative_to(root).as_posix()
            if isinstance(clip, str):
                index["left_out"].append({"name": name, "reason": clip})
                continue
            if len(shard) == 2 * SHARD:
                write_shard(out / f"shard-{full:05d}.safetensors", shard)
                shard, full = {}, full + 1
            shard[f"{name}/frames"], shard[f"{name}/sound"] = clip
            index["clips"].append({"name": name, "shard": full, "frames": len(clip[0]), "samples": len(clip[1])})
        if shard:
            write_shard(out / f"shard-{full:05d}.safetensors", shard)
        part.write_text(json.dumps(index, indent=1))
    return index


def prepared_index(path):
    """index.json -> (frames a second, size), [clip entries]."""
    try:
        index = json.loads(path.read_text())
        return (index["fps"], index["size"]), index["clips"]
    except (ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path}: not the index of a prepared set; run python data.py prepare again") from error


class Clips(torch.utils.data.Dataset):
    """Windows of `frames` pictures and the sound that starts with the first of them, from a prepared set (read lazily,
    slice by slice) or from a plain folder of videos (decoded on access).

    item  {"video": uint8 (frames, 3, size, size), "wav": float32 (round(16000 * frames / fps),), "name", "start": s}
    random_start draws the first frame from (seed, index), where index e * len + i is clip i in epoch e, so runs repeat
    whatever reads them, and leaves out clips that are too short; otherwise windows start at 0 and short clips end in
    their last picture and in silence. `frames` None: whole clips."""

    def __init__(self, root, fps, size, frames=None, seed=0, random_start=True):
        self.root, self.fps, self.size, self.frames = Path(root), fps, size, frames
        if not self.root.is_dir():
            raise MediaError(f"{root}: no such folder; give a prepared set or a folder of videos")
        self.seed, self.random_start = seed, random_start and frames is not None
        self.shards, self.process = {}, None     # open files, and the process that opened them
        index = self.root / "index.json"
        self.prepared = index.is_file()
        found = self.read_index(index) if self.prepared else self.search()
        self.clips = [clip for clip in found if not self.random_start or clip["frames"] >= frames]
        if len(found) > len(self.clips):
            warnings.warn(f"{root}: left out {len(found) - len(self.clips)} of {len(found)} clips, "
                          f"shorter than {frames / fps:.2f} s", stacklevel=2)
        if not self.clips:
            raise MediaError(f"{root}: no clip with sound of at least {frames / fps:.2f} s; give longer clips")

    def read_index(self, path):
        made, clips = prepared_index(path)
        if made != (self.fps, self.size):
            raise MediaError(f"{self.root}: prepared at {made[0]:g} fps and {made[1]} pixels; run python data.py "
                             f"prepare RAW {self.root} --fps {self.fps:g} --size {self.size}")
        return clips

    def search(self):
        if list(self.root.glob("shard-*.safetensors")):
            raise MediaError(f"{self.root}: an unfinished prepared set; run python data.py prepare again")
        videos, clips = find_videos([self.root]), []
        for path in videos:
            with suppress(MediaError):
                info = probe(path)
                if info.has_audio:
                    frames = math.ceil(info.duration * self.fps - 1e-6)
                    clips.append({"name": path.relative_to(self.root).as_posix(), "frames": frames})
        if len(clips) < len(videos):
            warnings.warn(f"{self.root}: left out {len(videos) - len(clips)} of {len(videos)} files, unreadable or "
                          "without sound", stacklevel=3)
        return clips

    def __len__(self):
        return len(self.clips)

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}   # open files do not travel to another process

    def window(self, index):
        """Entry of the clip, its first frame in this draw, and the number of frames."""
        clip, first = self.clips[index % len(self.clips)], 0
        if self.random_start:
            first = int(np.random.default_rng([self.seed, index]).integers(clip["frames"] - self.frames + 1))
        return clip, first, self.frames or clip["frames"]

    def __getitem__(self, index):
        clip, first, frames = self.window(index)
        start, n = first / self.fps, round(frames / self.fps * SAMPLE_RATE)
        if self.prepared:
            video = self.slice(clip, "frames", first, frames)
            wav = self.slice(clip, "sound", round(start * SAMPLE_RATE), n).float() / 32767
        else:
            path = self.root / clip["name"]
            video = read_frames(path, self.fps, self.size, start, frames / self.fps)[:frames]
            wav = read_audio(path, start, n / SAMPLE_RATE)
        video = torch.cat([video, video[-1:].expand(frames - len(video), -1, -1, -1)])  # (f, 3, h, w)
        wav = torch.nn.functional.pad(wav, (0, n - len(wav)))                                # (n,)
        return {"video": video, "wav": wav, "name": clip["name"], "start": start}

    def slice(self, clip, what, start, n):
        """`n` entries from `start` of a clip's "frames" or "sound", read from its shard without touching the rest."""
        if self.process != os.getpid():
            self.shards, self.process = {}, os.getpid()
        path = self.root / f"shard-{clip['shard']:05d}.safetensors"
        if path not in self.shards:
            try:
                self.shards[path] = safetensors.safe_open(path, "pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise MediaError(f"{path}: missing or damaged; run python data.py prepare again") from error
        return self.shards[path].get_slice(f"{clip['name']}/{what}")[start:start + n]


class Sounds(Clips):
    """Windows of the sound alone, for the autoencoder: {"wav": float32 (samples,)}; a "frame" is one mel column here."""

    def __init__(self, root, samples, seed=0):
        super().__init__(root, SAMPLE_RATE / HOP, None, samples // HOP, seed)

    def read_index(self, path):
        return [{**clip, "frames": clip["samples"] // HOP} for clip in prepared_index(path)[1]]

    def __getitem__(self, index):
        clip, first, columns = self.window(index)
        if self.prepared:
            wav = self.slice(clip, "sound", first * HOP, columns * HOP).float() / 32767
        else:
            wav = read_audio(self.root / clip["name"], first / self.fps, columns / self.fps)
        return {"wav": torch.nn.functional.pad(wav, (0, columns * HOP - len(wav)))}


class Pairs(torch.utils.data.Dataset):
    """Features and sound of one model window, for stage 2, from the folder that `cavp.py --extract` wrote.

    item  {"features": float32 (frames, 512), "wav": float32 (WINDOW,)}, a pure function of (seed, index), see Clips
    merge  share of the items that are two clips joined in time (split-and-merge augmentation of stage 2), with
           the sound cut at the sample where the second one's first frame starts (officially up to 0.25 s beside it)
    roll   share of the items whose features and sound are rotated in time by the same amount
    A clip shorter than the window ends in its last feature and in silence."""

    def __init__(self, root, fps, frames, merge=0.0, roll=0.0, seed=0):
        self.fps, self.frames, self.merge, self.roll, self.seed = fps, frames, merge, roll, seed
        self.files = sorted(Path(root).glob("*.safetensors"))
        if not self.files:
            raise MediaError(f"{root}: no features here; write them with "
                             f"python cavp.py --data CLIPS --init CAVP --extract {root}")
        with safetensors.safe_open(self.files[0], "pt") as file:
            made = float((file.metadata() or {}).get("fps", 0))
        if made != fps:
            raise MediaError(f"{root}: features at {made:g} a second, the model needs {fps:g}; "
                             "extract them with a CAVP of the same preset")

    def __len__(self):
        return len(self.files)

    def cut(self, path, draw, frames, samples):
        """`frames` features and `samples` of sound from a random place of a clip."""
        try:
            clip = load_safetensors(path)
            features, sound = clip["features"], clip["sound"]
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise MediaError(f"{path}: not a file of cavp.py --extract; remove it and extract again") from error
        first = int(draw.integers(max(0, len(features) - frames) + 1))
        features = features[first:first + frames].float()
        features = torch.cat([features, features[-1:].expand(frames - len(features), -1)])
        start = round(first / self.fps * SAMPLE_RATE)
        wav = sound[start:start + samples].float() / 32767
        return features, torch.nn.functional.pad(wav, (0, samples - len(wav)))

    def __getitem__(self, index):
        draw = np.random.default_rng([self.seed, index])
        path = self.files[index % len(self.files)]
        if draw.random() < self.merge:
            n = int(draw.integers(self.frames // 4, self.frames * 3 // 4 + 1))
            m = round(n / self.fps * SAMPLE_RATE)
            other = self.files[int(draw.integers(len(self.files)))]
            parts = [self.cut(path, draw, n, m), self.cut(other, draw, self.frames - n, WINDOW - m)]
            features, wav = (torch.cat(part) for part in zip(*parts))
        else:
            features, wav = self.cut(path, draw, self.frames, WINDOW)
        if draw.random() < self.roll:
            n = int(draw.integers(self.frames))
            features, wav = features.roll(n, 0), wav.roll(round(n / self.fps * SAMPLE_RATE))
        return {"features": features, "wav": wav}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="prepare")
    p = commands.add_parser("prepare", help="folder of videos to a compact training set",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("raw", type=Path, help="folder of videos")
    p.add_argument("out", type=Path, help="folder to write: shard-*.safetensors and index.json")
    p.add_argument("--fps", type=float, default=15.625, help="frames a second: one to 4 mel columns (paper: 4)")
    p.add_argument("--size", type=int, default=64, help="side of the square frames in pixels (mini: 64, paper: 224)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    args = parser.parse_args()
    if not (0 < args.fps <= 240 and 1 <= args.size <= 4096 and args.workers >= 0):
        parser.error("--fps must be in (0, 240], --size in [1, 4096], --workers at least 0")
    try:
        index = prepare(args.raw, args.out, args.fps, args.size, args.workers)
    except MediaError as error:
        sys.exit(print(error, file=sys.stderr) or 1)
    for clip in index["left_out"]:
        print(clip["reason"], file=sys.stderr)
    print(f"{args.out}: {len(index['clips'])} clips, {len(index['left_out'])} left out")
    sys.exit(1 if index["left_out"] else 0)


if __name__ == "__main__":
    main()
