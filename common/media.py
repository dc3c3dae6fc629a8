"""Video and sound files in and out: pictures and sound of anything FFmpeg decodes, and new files.

in   any video FFmpeg decodes, or a folder of them
out  frames uint8 (f, 3, h, w), sound float32 (n,) at 16 kHz in [-1, 1], and new files: the same picture with new
     sound, or wav

Pictures and sound share one clock: zero is the moment the first picture is shown. Reading and writing happen in a child
process (`common.isolation`), by the functions of the same names in `common.ffmpeg` and `common.mux`: a decoder that
crashes on a damaged file raises MediaError here. It costs about a millisecond a call.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

import soundfile
import torch

from common import isolation
from common.ffmpeg import SAMPLE_RATE, VIDEO_SUFFIXES, MediaError, MediaInfo
from common.files import atomic_write
from common.mux import CONTAINERS

# what lies beside clips (labels, lists), which need not be opened to know that it is no video
TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".log", ".md", ".py", ".txt"}
SOUND_SUFFIXES = {".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"}


def in_child(path, module, function, *args, **kwargs):
    """A function of `common.ffmpeg` or `common.mux` in the child process; what goes wrong there is told of `path`."""
    try:
        return isolation.call(module, function, *args, **kwargs)
    except isolation.ChildDied as died:
        raise MediaError(
            f"{path}: FFmpeg crashed on this file ({died}); convert it to mp4"
        ) from None
    except isolation.ChildError as error:
        if error.kind == "MediaError":
            raise MediaError(str(error)) from None
        if error.disk is not None and function == "write_video":
            raise OSError(
                error.disk, str(error)
            ) from None  # for atomic_write, which names the output
        raise MediaError(
            f"{path}: FFmpeg cannot use it ({error.kind}: {error}); convert it to mp4"
        ) from None


# ---- finding -----------------------------------------------------------------------------------


def walk(folder):
    """Every file below a folder, in sorted order, through links to folders (each folder once), without hidden ones."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def search(folder, kinds=("video",), ours=False):
    """Files below a folder -> (those of these kinds, all others). With `ours` our own NAME.foley.* count, else they are
    neither. A file is a video by its name or by its content: whatever FFmpeg opens counts."""
    chosen, others = [], []
    named = VIDEO_SUFFIXES | (SOUND_SUFFIXES if "sound" in kinds else set())
    for path in walk(folder):
        if not path.is_file() or ".foley." in path.name and not ours:
            continue
        suffix = path.suffix.lower()
        wanted = suffix in named or suffix not in TEXT_SUFFIXES and kind_of_file(path) in kinds
        (chosen if wanted else others).append(path)
    return sorted(chosen), sorted(others)


def kind_of_file(path):
    """ "video", "sound" or None, by content."""
    with suppress(MediaError):
        return in_child(path, "common.ffmpeg", "kind_of", path)
    return None


def find_videos(paths):
    """Files as given; folders are searched: see `search`."""
    found = []
    for path in map(Path, paths):
        inside = search(path)[0] if path.is_dir() else [path]
        if not inside:
            raise MediaError(f"{path}: no video in this folder that FFmpeg opens; give another")
        found += inside
    return found


# ---- reading -----------------------------------------------------------------------------------


def probe(path):
    """MediaInfo of a video."""
    return MediaInfo(**in_child(path, "common.ffmpeg", "probe", path))


def read_tags(path):
    """The tags of a file that we wrote, names in lower case."""
    return in_child(path, "common.ffmpeg", "read_tags", path)


def read_frames(path, fps, size, start=0.0, duration=None):
    """uint8 (f, 3, size, size); frame i is what a viewer sees at start + i/fps seconds after the first shown picture.
    Ends with the picture: f = ceil(fps * seconds that are there)."""
    return torch.from_numpy(
        in_child(path, "common.ffmpeg", "read_frames", path, float(fps), size, start, duration)
    )


def read_audio(path, start=0.0, duration=None):
    """float32 (n,), 16 kHz mono (downmix: ITU-R BS.775); sample 0 is heard `start` seconds after the first picture.
    Silence fills what the track leaves out; with `duration` n = round(16000 * duration), else all from `start` on."""
    return torch.from_numpy(in_child(path, "common.ffmpeg", "read_audio", path, start, duration))


# ---- writing -----------------------------------------------------------------------------------


def output_suffix(source):
    """The suffix under which `write_video` can best keep the picture of `source`."""
    return in_child(source, "common.mux", "output_suffix", source)


def write_video(source, wav, out, tags=None, start=0.0, duration=None, keep_tracks=False):
    """The picture of `source` with the sound `wav` (n,), cut or padded to be exactly as long: `common.mux.write_video`,
    whole or not at all."""
    if Path(out).suffix.lower() not in CONTAINERS:
        raise MediaError(
            f"{out}: we write no sound into this kind of file; end it in {', '.join(CONTAINERS)}"
        )
    wav = wav.detach().float().cpu().numpy()
    with atomic_write(out) as part:
        in_child(
            source,
            "common.mux",
            "write_video",
            source,
            wav,
            part,
            tags,
            start,
            duration,
            keep_tracks,
        )


def write_wav(out, wav, tags=None):
    """Sound (n,) as 16-bit wav; `tags` by the names that wav knows: title, artist, comment, copyright, software."""
    memory = io.BytesIO()  # the file itself is written in one piece, so a full disk is noticed
    with soundfile.SoundFile(memory, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file:
        for name, value in (tags or {}).items():
            setattr(file, name, value)
        file.write(wav.detach().float().cpu().clamp(-1, 1).numpy())
    with atomic_write(out) as part:
        part.write_bytes(memory.getvalue())


def plan_outputs(inputs, out, verbose=False):
    """-> [(video, output without its suffix, None)], or (input, None, why there is none).

    Every video once. verbose: what else lies in a folder is named on stderr.
    """
    jobs = []
    seen = set()
    taken = {}
    for given in inputs:
        try:
            videos = find_videos([given])
            if verbose and Path(given).is_dir():
                for other in search(given)[1]:
                    print(f"sample.py: {other}: no video, left alone", file=sys.stderr)
        except MediaError as error:
            jobs.append((given, None, str(error)))
            continue
        for video in videos:
            if video.resolve() in seen:
                continue
            seen.add(video.resolve())
            target = (out or video.parent) / f"{video.stem}.foley"
            other = taken.setdefault(target.resolve(), video)
            if other is video:
                jobs.append((video, target, None))
                continue
            reason = f"{video}: {other} has the same output {target}"
            jobs.append((video, None, f"{reason}; rename one, or do it alone with another --out"))
    return jobs
