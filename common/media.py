"""Video and sound files in and out: pictures and sound of anything FFmpeg decodes, and new files.

in   any video FFmpeg decodes, or a folder of them
out  frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], and new files: the same
     picture with new sound, or wav

Pictures and sound share one clock: zero is the moment the first picture is shown. Reading and
writing happen in a child process (`common.isolation`), by the functions of the same names in
`common.ffmpeg`, `common.motion` and `common.mux`: a decoder that crashes on a damaged file raises
MediaError here. It costs about a millisecond a call. Where a docstring names no other error, a file
that cannot be used raises MediaError.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile
import torch

from common import isolation, xmp
from common.ffmpeg import SAMPLE_RATE, VIDEO_SUFFIXES, MediaError, MediaInfo
from common.files import atomic_write
from common.mux import CONTAINERS
from common.resample import blocks_of

# files beside clips (labels, lists), which need not be opened to know that they are no videos
TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".log", ".md", ".py", ".txt"}
WRITE = ("write_video", "encoded_peak")  # functions of the child that write files
LARGEST = 2**32 - 2**20  # bytes of sound in a wav, whose sizes have 32 bits: tags take some, too
SOUND_SUFFIXES = {".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"}


def in_child(path: Path | str, module: str, function: str, *args, **kwargs):
    """Call `module.function(*args, **kwargs)` in the child process; errors name the file `path`.

    Raises MediaError, and for functions that WRITE OSError where the disk refuses the output.
    """
    try:
        return isolation.call(module, function, *args, **kwargs)
    except isolation.ChildDied as died:
        # a segmentation fault in a decoder, or memory that ran out
        reason = f"FFmpeg crashed on this file ({died})"
    except isolation.ChildError as error:
        # already one line for the user
        if error.kind == "MediaError":
            raise MediaError(str(error)) from None
        # atomic_write or scratch_file around the call turns this into a FileError that names it
        if error.disk is not None and function in WRITE:
            raise OSError(error.disk, str(error)) from None
        reason = f"FFmpeg cannot use it ({error.kind}: {error})"
    raise MediaError(f"{path}: {reason}; convert it to mp4")


# ---- finding -----------------------------------------------------------------------------------


def walk(folder: Path | str) -> Iterator[Path]:
    """Every file below a folder but hidden ones, sorted; links to folders are followed once."""
    visited = set()  # real paths of folders: links may form a loop
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # os.walk goes on with what is left in `folders`
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def search(folder: Path | str, kinds=("video",), ours: bool = False):
    """Files below a folder -> (list of those of these `kinds`, list of all others).

    A file is of a kind ("video", "sound") by its name or by its content: whatever FFmpeg opens
    counts. Our own outputs, NAME.foley.*, are in neither list unless `ours`.
    """
    chosen = []
    others = []
    suffixes = VIDEO_SUFFIXES | SOUND_SUFFIXES if "sound" in kinds else VIDEO_SUFFIXES
    for path in walk(folder):
        if not path.is_file() or (".foley." in path.name and not ours):
            continue
        # the name decides where it can: opening a file costs some milliseconds
        suffix = path.suffix.lower()
        if suffix in suffixes or (suffix not in TEXT_SUFFIXES and kind_of(path) in kinds):
            chosen.append(path)
        else:
            others.append(path)
    return sorted(chosen), sorted(others)


def kind_of(path: Path | str) -> str | None:
    """ "video", "sound" or None, by content."""
    with suppress(MediaError):
        return in_child(path, "common.ffmpeg", "kind_of", path)
    return None


def find_videos(paths: Iterable[Path | str]) -> list[Path]:
    """Files as given, and the videos below the folders among `paths`: see `search`."""
    videos = []
    for path in map(Path, paths):
        inside = search(path)[0] if path.is_dir() else [path]
        if not inside:
            raise MediaError(f"{path}: no video in this folder that FFmpeg opens; give another")
        videos += inside
    return videos


# ---- reading -----------------------------------------------------------------------------------


def probe(path: Path | str) -> MediaInfo:
    """Duration, size, rate and sound of a video: see MediaInfo."""
    return MediaInfo(**in_child(path, "common.ffmpeg", "probe", path))


def read_tags(path: Path | str) -> dict[str, str]:
    """The tags of a file that we wrote, names in lower case."""
    return in_child(path, "common.ffmpeg", "read_tags", path)


def read_frames(path: Path | str, fps, size: int, start=0.0, duration: float | None = None):
    """uint8 (f, 3, size, size); frame i is on view start + i/fps seconds after the first picture.

    Ends with the picture, or after `duration` seconds: f = ceil(fps * seconds).
    """
    args = (path, float(fps), size, start, duration)
    return torch.from_numpy(in_child(path, "common.ffmpeg", "read_frames", *args))


def read_audio(
    path: Path | str,
    start: float = 0.0,
    duration: float | None = None,
    rate: int = SAMPLE_RATE,
    channels: int = 1,
):
    """float32 (n,), 16 kHz mono; sample 0 is heard `start` seconds after the first picture.

    Downmix by ITU-R BS.775, of two channels (n, 2). Silence fills what the track leaves out; with
    `duration` n = round(rate * duration), else all sound from `start` on.
    """
    args = (path, start, duration, rate, channels)
    return torch.from_numpy(in_child(path, "common.ffmpeg", "read_audio", *args))


def spool_audio(path: Path | str, out: Path | str, start, duration, rate, channels) -> float:
    """The same as plain float32 in the file `out`, of any length in little memory; -> its peak."""
    args = (path, out, start, duration, rate, channels)
    return in_child(path, "common.ffmpeg", "spool_audio", *args)


def clip_motion(path: Path | str, start: float = 0.0, seconds: float | None = None):
    """Block motion at 25 frames a second, int8 (f, 5, 12, 12): see `common.motion`."""
    return torch.from_numpy(in_child(path, "common.motion", "clip_motion", path, start, seconds))


def jpeg(image) -> bytes:
    """A picture uint8 (h, w, 3) as a JPEG: see `common.ffmpeg.jpeg`."""
    return in_child("picture", "common.ffmpeg", "jpeg", image.numpy()).tobytes()


# ---- writing -----------------------------------------------------------------------------------


def output_suffix(source: Path | str) -> str:
    """The suffix under which `write_video` can best keep the picture of `source`."""
    return in_child(source, "common.mux", "output_suffix", source)


def write_video(
    source: Path | str,
    wav,
    out: Path | str,
    tags: dict[str, str] | None = None,
    start: float = 0.0,
    duration: float | None = None,
    keep_tracks: bool = False,
    rate: int = SAMPLE_RATE,
    channels: int = 1,
):
    """Write the picture of `source` with the sound `wav`, cut or padded to its length.

    wav: a tensor (n,) or (n, channels), or a file of that as plain float32. Atomic; see
    `common.mux.write_video`. Raises MediaError, or FileError where `out` cannot be written.
    """
    if Path(out).suffix.lower() not in CONTAINERS:
        suffixes = ", ".join(CONTAINERS)
        raise MediaError(f"{out}: we write no sound into this kind of file; end it in {suffixes}")
    # the child gets an array, not a tensor: it must not import torch
    if isinstance(wav, torch.Tensor):
        wav = wav.detach().float().cpu().numpy()
    with atomic_write(out) as part:
        args = (source, wav, part, tags, start, duration, keep_tracks, rate, channels)
        in_child(source, "common.mux", "write_video", *args)


class CarefulFile(io.FileIO):
    """A file that libsndfile, which reports no full disk, writes to: `refused` is its error."""

    refused = None

    def write(self, data):
        rest = memoryview(data)
        try:
            # a disk that is nearly full takes a part
            while len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.refused = self.refused or error
        return len(data)


def sound_format(suffix: str, samples: int, channels: int, subtype: str) -> str:
    """What libsndfile calls the kind of file: FLAC, WAV, or beyond 4 GB RF64 (EBU Tech 3306)."""
    if suffix.lower() == ".flac":
        return "FLAC"
    # PCM_16, PCM_U8, FLOAT
    width = {"FLOAT": 4, "DOUBLE": 8, "PCM_U8": 1}.get(subtype) or int(subtype[4:]) // 8
    return "RF64" if samples * channels * width > LARGEST else "WAV"


def write_sound(
    out: Path | str,
    blocks: Iterable[np.ndarray],
    samples: int,
    rate: int,
    channels: int,
    tags: dict[str, str] | None = None,
    subtype: str | None = None,
):
    """Write blocks of sound (n, channels) as wav or flac, atomically. Raises FileError.

    samples: of all blocks together, a channel; subtype: how libsndfile calls the sample format,
    None: 16 bits at 16 kHz, else 24. Integers are written as they are. `tags` by the names that
    both know: title, artist, comment, copyright, software; and xmp.TAG.
    """
    subtype = subtype or ("PCM_16" if rate == SAMPLE_RATE else "PCM_24")
    kind = sound_format(Path(out).suffix, samples, channels, subtype)
    with atomic_write(out) as part, CarefulFile(part, "w+") as disk:
        with soundfile.SoundFile(disk, "w", rate, channels, subtype, format=kind) as file:
            tags = dict(tags or {})
            packet = tags.pop(xmp.TAG, None)
            for name, value in tags.items():
                setattr(file, name, value)
            for block in blocks:
                # only a format of integers has a full scale
                to_clip = subtype.startswith("PCM") and block.dtype.kind == "f"
                file.write(np.clip(block, -1, 1) if to_clip else block)
        if packet:
            xmp.embed(disk, packet)
        if disk.refused:
            raise disk.refused


def write_wav(out: Path | str, wav, tags: dict[str, str] | None = None):
    """Write mono sound (n,) at 16 kHz as 16-bit wav, atomically: see `write_sound`."""
    blocks = blocks_of(wav.detach().float().cpu().numpy())
    write_sound(out, blocks, len(wav), SAMPLE_RATE, 1, tags)
