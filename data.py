"""Prepared sets: folders of videos made ready for training, and the readers that draw windows.

in   a folder of videos
out  a prepared set, and datasets of windows of it

    python data.py prepare RAW OUT --fps 15.625 --size 64 --workers 4
    python data.py prepare vggsound OUT --csv vggsound.csv --fps 4 --size 224
    python data.py prepare RAW OUT --licence-csv licences.csv --require-licence
    python data.py check OUT

A set is a folder, each of whose files is complete or not there:

    set.json       what all clips have in common, and
                       "clips"    how many of them readers see; null until the set is first finished
                       "shards"   [{"clips": how many, "sha256": of the file}]
                       "moved"    {name: split} of clips that left the split which their shard says
                       "rights"   SHA-256 of licences.csv, if there is one
    shard-00000.safetensors       at most SHARD_CLIPS clips and SHARD_BYTES, of clip k in it
                       "k.bounds"    int64 (f + 1,), where each frame starts in
                       "k.frames"    uint8 (bytes,), JPEGs
                       "k.features"  float16 (f, width), instead of these two after --extract
                       "k.sound"     int16 (n,) at 16 kHz
                   and in its metadata [name, label, split] of each clip
    index.safetensors             every clip's split and the lengths of its arrays, which follow
                   from the other files: what is drawn from is chosen without opening a shard
    licences.csv   source, license and consent of the clips of which any is known: common/rights.py
    left_out.csv   the files that are not in it: name, reason, detail

Reading checks the form of a file, not every byte of it: that is what `check` does.
"""

import csv
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from fractions import Fraction
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from safetensors import safe_open
from safetensors.numpy import load_file
from tqdm import tqdm

from common import cli, ffmpeg, rights
from common.audio import HOP, WINDOW, detect_onsets, mel
from common.checkpoints import save_tensors
from common.controls import track_hits, track_materials
from common.files import FileError, UserError, atomic_write, make_folder, sha256, write_bytes
from common.media import SAMPLE_RATE, TEXT_SUFFIXES, MediaError, find_videos, search
from common.onsets import Hit
from common.rights import UNKNOWN

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two processes from preparing one set
    fcntl = None

MIN_SECONDS = 0.5  # a clip must last as long
SILENCE = 0.001  # of full scale, -60 dB: a clip must rise above it
HELD_OUT = 0.05  # share of the clips in each of "val" and "test"
SPLITS = ("train", "val", "test")
# 40 to 45 dB and 13 to 21 kB a frame of 224 pixels; 38 to 42 dB and 1.4 to 3.2 kB of 64
JPEG_QUANTIZER = "2"
FORMAT = 4
SHARD_CLIPS = 256
SHARD_BYTES = 2**30
OPEN_SHARDS = 16  # that a reader keeps open, at 0.6 MB each; opening one takes 0.6 ms


# ---- formats: frames as JPEG -------------------------------------------------------------------


def encode_jpegs(images, size):
    """uint8 (size, size, 3) images -> bytes of each, one by one.

    Full chroma: without it small things lose 2 to 6 dB, for a fifth of the bytes.
    """
    context = av.CodecContext.create("mjpeg", "w")
    context.width = size
    context.height = size
    context.pix_fmt = "yuvj444p"
    context.time_base = Fraction(1, 25)
    context.thread_count = 1
    # the same quantizer for every frame
    context.qscale = True
    context.options = {"qmin": JPEG_QUANTIZER}
    scaler = VideoReformatter()
    previous = None
    for number, image in enumerate(images):
        # what is shown for longer than one frame is encoded once
        if image is not previous:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            # JPEG's own matrix and full range
            frame = scaler.reformat(
                frame, format="yuvj444p", dst_colorspace="ITU601", dst_color_range="JPEG", threads=1
            )
            frame.pts = number
            (packet,) = context.encode(frame)
            jpeg = bytes(packet)
            previous = image
        yield jpeg


@functools.lru_cache(maxsize=1)
def jpeg_decoder(_process):
    """Decoder and converter of a process: making them costs more than decoding a frame."""
    context = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    return context, VideoReformatter()


def decode_jpegs(jpegs, size):
    """Bytes of each frame -> uint8 (f, 3, size, size)."""
    context, scaler = jpeg_decoder(os.getpid())
    frames = np.empty((len(jpegs), 3, size, size), np.uint8)
    for frame, jpeg in zip(frames, jpegs, strict=True):
        if not jpeg:  # would end the stream, for later frames, too
            raise ValueError("an empty frame")
        (image,) = context.decode(av.Packet(jpeg))
        planes = scaler.reformat(image, format="gbrp", threads=1).planes
        # planes are green, blue, red, and their rows are padded
        for channel, plane in zip((1, 2, 0), planes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(size, plane.line_size)
            frame[channel] = rows[:, :size]
    return frames


# ---- formats: a set on disk --------------------------------------------------------------------

AGAIN = "delete the set and prepare it again"
NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name need not be text


def shard_path(root, number):
    return root / f"shard-{number:05d}.safetensors"


@contextmanager
def reading(path, clip="it"):
    """Whatever a missing or damaged file makes a library raise, as a MediaError of one line."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError):
            reason = f"no {reason} in it"
        raise MediaError(f"{path}: {clip} is missing or damaged ({reason}); {AGAIN}") from None


def open_shard(path):
    """-> the open file and its clips [(name, label, split)]."""
    with reading(path):
        # read, not mapped: a file that shrinks is then an error, not the end of the process
        file = safe_open(path, "np", backend="pread")
        return file, json.loads(file.metadata()["clips"])


def read_rights(root):
    """{name: Rights} of a set's clips, as far as any are known. Raises MediaError."""
    path = root / rights.TABLE
    try:
        return rights.read_table(path)
    except (UserError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise MediaError(
            f"{path}: damaged ({reason}); delete it, and prepare the set again with its CSV"
        ) from None


def read_metadata(root):
    """Content of set.json. Raises MediaError where the folder is no set."""
    if not root.is_dir():
        raise MediaError(f"{root}: no such folder; give that of a prepared set")
    path = root / "set.json"
    if not path.is_file():
        raise MediaError(
            f"{root}: not a prepared set; make one with python data.py prepare VIDEOS {root}"
        )
    with reading(path):
        metadata = json.loads(path.read_text())
        if metadata["format"] != FORMAT:
            raise MediaError(f"{root}: prepared by version 0.1, whose sets are not read; {AGAIN}")
        return metadata


# ---- writing -----------------------------------------------------------------------------------


def split_of(name: str, given: str | None = None) -> str:
    """The split of a clip by its name alone, so that files which come later move none.

    given: what a CSV says. As VGGSound's has no "val", a share of its "train" becomes that.
    """
    if given in ("val", "test"):
        return given
    u = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
    if u < HELD_OUT:
        return "val"
    if u < 2 * HELD_OUT and given is None:
        return "test"
    return "train"


class Writer:
    """Appends clips to a set, a new one or one that was begun.

    The same clips in the same order give the same bytes, also after a kill, which costs the clips
    that are not yet in a shard. The context writes those when it ends, unless the disk is full.

    metadata  {"columns": names of a clip's arrays, ...}: what all clips have in common
    names     {name: split} of the clips in the set, in order
    rights    {name: Rights} of those of which any are known; `new_rights` are added to the set's
    Raises MediaError for a set of another kind or one that another process is writing, and
    FileError where it cannot be written.
    """

    def __init__(self, root: Path, metadata: dict, new_rights: dict | None = None):
        self.root = Path(root)
        self.names = {}
        self.pending = []
        make_folder(self.root)
        # from here on no other process can write the set, until this one ends in whatever way
        self.acquire_lock()
        # what a kill left of files that were being written
        for part in self.root.glob(".*.part*"):
            part.unlink()
        # what was begun must have been begun as the same kind of set
        if not (self.root / "set.json").exists():
            self.metadata = {"format": FORMAT, **metadata, "clips": None, "moved": {}, "shards": []}
            self.write_metadata()
        self.metadata = read_metadata(self.root)
        for key, value in metadata.items():
            if self.metadata.get(key) != value:
                raise MediaError(
                    f"{root}: holds a set with {key} {self.metadata.get(key)} instead of {value}; "
                    "give another folder"
                )
        self.resume()
        self.rights = read_rights(self.root)
        self.add_rights(new_rights or {})

    def acquire_lock(self):
        try:
            self.lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT)
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MediaError(
                f"{self.root}: another process is preparing it; wait for that, or give another "
                "folder"
            ) from None
        except OSError as error:
            raise FileError(f"{self.root}: cannot be written ({error.strerror})") from None

    def resume(self):
        """Go on after the last shard, or in it if a run ended before the set was finished."""
        shards = self.metadata["shards"]
        for number in range(len(shards)):
            # headers alone: 0.6 ms a shard
            _, clips = open_shard(shard_path(self.root, number))
            self.names.update({name: split for name, _, split in clips})
        if len(self.names) > (self.metadata["clips"] or 0):
            # the last shard may be short: fill it up and write it anew, as no reader knows it yet
            shards.pop()
            path = shard_path(self.root, len(shards))
            file, clips = open_shard(path)
            with reading(path):
                for row, clip in enumerate(clips):
                    columns = self.metadata["columns"]
                    self.add(*clip, {name: file.get_tensor(f"{row}.{name}") for name in columns})
        self.names.update(self.metadata["moved"])

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _traceback):
        try:
            if isinstance(error, FileError):
                raise FileError(
                    f"{error}, and run the same command again: it goes on where it stopped"
                ) from None
            self.write_shard()
        finally:
            os.close(self.lock)

    def add(self, name: str, label: str, split: str, columns: dict):
        """One clip. columns {name: array}, which must not change afterwards."""
        size = sum(array.nbytes for _, arrays in self.pending for array in arrays.values())
        size += sum(array.nbytes for array in columns.values())
        # before it grows too large, as a shard is written from memory
        if len(self.pending) == SHARD_CLIPS or size > SHARD_BYTES:
            self.write_shard()
        self.pending.append(((name, label, split), columns))
        self.names[name] = split

    def write_shard(self):
        """The clips added since the last one. Until set.json lists it, a shard does not count."""
        if not self.pending:
            return
        path = shard_path(self.root, len(self.metadata["shards"]))
        tensors = {
            f"{row}.{column}": torch.as_tensor(columns[column])
            for row, (_, columns) in enumerate(self.pending)
            for column in self.metadata["columns"]
        }
        clips = [clip for clip, _ in self.pending]
        # one entry of metadata: safetensors writes several in random order
        save_tensors(path, tensors, clips=clips)
        # a kill before this is listed costs the shard: the next run writes it again
        self.metadata["shards"].append({"clips": len(clips), "sha256": sha256(path)})
        self.write_metadata()
        self.pending = []

    def add_rights(self, new: dict):
        """{name: Rights}, written at once: a kill must not part a clip from them."""
        self.rights |= new
        if new:
            self.write_rights()

    def write_rights(self):
        path = self.root / rights.TABLE
        rights.write_table(path, self.rights)
        self.metadata["rights"] = sha256(path)
        self.write_metadata()

    def write_metadata(self):
        write_bytes(self.root / "set.json", json.dumps(self.metadata, indent=1).encode() + b"\n")

    def finish(self, needed: tuple = SPLITS):
        """Show readers all that was added.

        Where chance left a split of `needed` without a clip, and there are three clips or more, the
        largest split gives it its first one (by the hash), for good.
        """
        self.write_shard()
        for split in needed:
            # by the hash of names, a small set easily has none in "val" or "test"
            counts = Counter(self.names.values())
            if len(self.names) >= 3 and not counts[split]:
                largest = max(SPLITS, key=lambda other: counts[other])
                donors = [name for name in self.names if self.names[name] == largest]
                first = min(donors, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
                self.names[first] = split
                self.metadata["moved"][first] = split
        # of clips that are in the set, and in their order
        if self.rights:
            self.rights = {name: self.rights[name] for name in self.names if name in self.rights}
            self.write_rights()
        # the index first: whoever reads set.json must find a row for each of its clips
        self.write_index()
        self.metadata["clips"] = len(self.names)
        self.write_metadata()

    def write_index(self):
        lengths = {column: [] for column in self.metadata["columns"]}
        for number in range(len(self.metadata["shards"])):
            file, clips = open_shard(shard_path(self.root, number))
            for row in range(len(clips)):
                for column in lengths:
                    lengths[column].append(file.get_slice(f"{row}.{column}").get_shape()[0])
        index = {column: torch.tensor(lengths[column]) for column in lengths}
        index["split"] = torch.tensor([SPLITS.index(split) for split in self.names.values()])
        save_tensors(self.root / "index.safetensors", index)


# ---- preparing ---------------------------------------------------------------------------------


class Job(NamedTuple):
    """A clip to be: a stretch of a file, the whole of it where `seconds` is None."""

    name: str
    path: Path
    start: float
    seconds: float | None
    label: str
    split: str


class LeftOut(NamedTuple):
    """Why a file is not in the set: in a few words, to count by, and in detail."""

    reason: str
    detail: str


class Report(NamedTuple):
    clips: int
    new: int
    left_out: list  # [(name, reason, detail)]
    missing: int  # rows of the CSV without a file
    licensed: int  # clips with a license
    unknown: list  # files that only the CSV of licenses names


def read_csv(path):
    """VGGSound's rows `id,start,label,train|test` -> [(id, start, label, split)]."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    youtube, start, label, split = row
                    split = SPLITS[SPLITS.index(split.strip())]
                    rows.append((youtube, int(float(start)), label, split))
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{path}: cannot be read ({error}); give a CSV file") from None
    except (ValueError, csv.Error):
        raise MediaError(
            f"{path}: line {reader.line_num} is not `id,start,label,train|val|test`; correct it"
        ) from None
    return rows


def find_jobs(raw, table=None):
    """-> jobs in a fixed order, [(name, reason, detail)] of other files, rows without a file.

    With a CSV (`table`), files are ID_START.mp4 (six digits), cut already, or ID.mp4, of which ten
    seconds from START are taken.
    """
    raw = Path(raw)
    root = raw if raw.is_dir() else raw.parent
    names = {path: path.relative_to(root).as_posix() for path in find_videos([raw])}
    left_out = []
    # a file that is no video was perhaps meant to be one; lists and labels were not
    for path in search(raw)[1] if raw.is_dir() else ():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            name = path.relative_to(root).as_posix()
            left_out.append((name, "not a video", "FFmpeg finds no moving picture in it"))
    if table is None:
        jobs = [Job(name, path, 0.0, None, "", split_of(name)) for path, name in names.items()]
        return jobs, left_out, 0
    jobs, missing = jobs_of_rows(read_csv(table), names)
    used = {job.path for job in jobs}
    for path, name in names.items():
        if path not in used:
            left_out.append((name, "not in the CSV", "no row of it asks for this file"))
    return jobs, left_out, missing


def jobs_of_rows(rows, names):
    """Rows of the CSV, {path: name} of the files -> jobs, and how often a row has no file."""
    # of two files of one name, as of two rows for one clip, the first counts
    files = {path.stem: path for path in reversed(names)}
    jobs = {}
    missing = 0
    for youtube, start, label, given in rows:
        stem = f"{youtube}_{start:06d}"
        split = split_of(stem, given)
        if stem in files:  # cut already
            path = files[stem]
            job = Job(names[path], path, 0.0, None, label, split)
        elif youtube in files:
            path = files[youtube]
            name = (Path(names[path]).parent / f"{stem}{path.suffix}").as_posix()
            job = Job(name, path, float(start), 10.0, label, split)
        else:
            missing += 1
            continue
        jobs.setdefault(job.name, job)
    return sorted(jobs.values()), missing


def rights_of(jobs, names, rows, table):
    """Rights of clips to be (jobs) and of those in the set (names), by the rows of the CSV `table`.

    -> {name: Rights}, [files that only the CSV names]. Clips of foley.py say theirs themselves.
    """
    made = {job.name: rights.made_by_foley(job.path) for job in jobs}
    known = {name: of for name, of in made.items() if of}
    # clips of the set count, too, whose files are gone
    files = {name: name for name in names}
    for job in jobs:
        files[job.name] = (Path(job.name).parent / job.path.name).as_posix()
    told, unknown = rights.assign(rows, files, table)
    return known | told, unknown


def keep_licensed(jobs, writer):
    """-> the jobs with a license and without a refusal, [(name, reason, detail)] of the others.

    Raises MediaError where the set holds a clip of the latter kind.
    """
    kept = []
    left_out = []
    for job in jobs:
        fault = fault_of_rights(writer.rights.get(job.name, UNKNOWN))
        if fault is None:
            kept.append(job)
        else:
            left_out.append((job.name, *fault))
    for name in writer.names:
        fault = fault_of_rights(writer.rights.get(name, UNKNOWN))
        if fault is not None:
            raise MediaError(
                f"{writer.root}: {name} is in this set already ({fault.reason}); name its license "
                "in the CSV, or give another folder"
            )
    return kept, left_out


def fault_of_rights(known):
    """-> LeftOut, or None where a clip may be used by what is known."""
    if not known.license:
        return LeftOut("no license", "no row of the CSV gives it one")
    if known.refused:
        return LeftOut("consent refused", f"the CSV says {known.consent!r} of it")
    return None


def encode_clip(job, fps, size):
    """-> ({column: array} of a clip, [what had to be mended in it]), or LeftOut.

    Runs in a worker, with the decoders in the same process.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            columns = encode_columns(job, fps, size)
        except MediaError as error:
            return LeftOut("undecodable", str(error).removeprefix(f"{job.path}: "))
        except Exception as error:  # whatever a damaged file makes a library raise
            detail = " ".join(str(error).split())[:200]
            return LeftOut("undecodable", f"{type(error).__name__}: {detail}")
    if isinstance(columns, LeftOut):
        return columns
    return columns, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def encode_columns(job, fps, size):
    info = ffmpeg.probe(job.path)
    seconds = min(info.duration - job.start, job.seconds or ffmpeg.LONGEST)
    if not info.has_audio:
        return LeftOut("no sound track", "only a picture")
    if seconds < MIN_SECONDS:
        lasts = f"{max(seconds, 0):.2f} s from {job.start:g} s on"
        return LeftOut("too short", f"{lasts}; {MIN_SECONDS:g} are needed")
    wav = ffmpeg.read_audio(job.path, job.start, seconds)
    peak = float(max(wav.max(), -wav.min()))
    if not peak > SILENCE:
        decibels = 20 * math.log10(max(peak, 1e-9))
        return LeftOut("silent", f"its sound never rises above {decibels:.0f} dBFS")
    # in place, as a film's sound is large
    wav *= 32767
    sound = wav.round(out=wav).astype("<i2")
    del wav
    # one by one, as nothing could hold a film's frames decoded
    bounds = [0]
    frames = bytearray()
    for jpeg in encode_jpegs(ffmpeg.pictures(job.path, fps, size, job.start, seconds), size):
        frames += jpeg
        bounds.append(len(frames))
    return {
        "bounds": np.array(bounds, np.int64),
        "frames": np.frombuffer(frames, np.uint8),
        "sound": sound,
    }


def set_up_worker():
    """One thread; Ctrl-C is the parent's to answer; and no worker outlives its parent."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # FFmpeg's decoders go by it, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # inherited from `cli.exit_on_signals`
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_alone(job, fps, size):
    """`encode_clip` in a process of its own, which the file may kill."""
    with ProcessPoolExecutor(1, initializer=set_up_worker) as pool, suppress(BrokenProcessPool):
        return pool.submit(encode_clip, job, fps, size).result()
    return LeftOut("undecodable", "the decoder died of it")


def encode_all(jobs, fps, size, workers):
    """Yields (job, `encode_clip` of it), in order; processes stay at most a few clips ahead."""
    jobs = deque(jobs)
    ahead = deque()
    pool = None
    try:
        while jobs or ahead:
            try:
                # anew after a file has killed it
                pool = pool or ProcessPoolExecutor(workers, initializer=set_up_worker)
                while jobs and len(ahead) <= 2 * workers:
                    ahead.append((jobs[0], pool.submit(encode_clip, jobs[0], fps, size)))
                    jobs.popleft()
                job, future = ahead[0]
                result = future.result()
                ahead.popleft()
            except BrokenProcessPool:
                # a file killed its process: which one it was shows when all under way are done
                # again, one alone at a time
                pool.shutdown()
                pool = None
                jobs.extendleft(job for job, _ in reversed(ahead))
                ahead.clear()
                job = jobs.popleft()
                result = encode_alone(job, fps, size)
            yield job, result
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def prepare(
    raw, out, fps=15.625, size=64, workers=1, table=None, licenses=None, require_license=False
) -> Report:
    """Folder of videos -> a set in `out`, the same bytes for any number of workers.

    The clips that it holds already stay; files that were left out are tried again.
    fps: frames a second; size: their side in pixels; table: a CSV of VGGSound's form (`read_csv`);
    licenses: a CSV of source, license and consent (common/rights.py); require_license: leave out
    clips of which it gives none.
    Raises MediaError where there is no clip, RightsError, and what `Writer` raises.
    """
    if not Path(raw).exists():
        raise MediaError(f"{raw}: no such file or folder; give the videos'")
    rows = rights.read_rows(licenses) if licenses else []
    jobs, left_out, missing = find_jobs(raw, table)
    metadata = {
        "columns": ["bounds", "frames", "sound"],
        "fps": fps,
        "size": size,
        "labels": table is not None,
    }
    with Writer(out, metadata) as writer:
        before = len(writer.names)
        known, unknown = rights_of(jobs, writer.names, rows, licenses)
        writer.add_rights(known)
        if require_license:
            jobs, unlicensed = keep_licensed(jobs, writer)
            left_out += unlicensed
        left_out += encode_missing(jobs, writer, workers)
        # also where there is no clip at all: then it says why
        with (
            atomic_write(writer.root / "left_out.csv") as part,
            open(part, "w", newline="", **NAMES) as file,
        ):
            csv.writer(file).writerows([("name", "reason", "detail"), *sorted(left_out)])
        if not writer.names:
            raise MediaError(f"{raw}: no usable clip: {summary(left_out, out)}")
        # VGGSound's CSV says what is "test"
        writer.finish(SPLITS if table is None else ("val",))
        new = len(writer.names) - before
        return Report(len(writer.names), new, left_out, missing, licensed(writer.rights), unknown)


def encode_missing(jobs, writer, workers):
    """Add the clips that a set lacks. -> [(name, reason, detail)] of those that cannot be."""
    left_out = []
    todo = [job for job in jobs if job.name not in writer.names]
    done = len(jobs) - len(todo)
    fps = writer.metadata["fps"]
    size = writer.metadata["size"]
    with tqdm(total=len(jobs), initial=done, desc="prepare", unit="clip", disable=not todo) as bar:
        for job, result in encode_all(todo, fps, size, workers):
            bar.update()
            if isinstance(result, LeftOut):
                left_out.append((job.name, *result))
                continue
            columns, mended = result
            writer.add(job.name, job.label, job.split, columns)
            for line in mended:
                bar.write(f"data.py: {line}", file=sys.stderr)
    return left_out


def licensed(known):
    """How many of a set's clips have a license: {name: Rights} of those with any -> a number."""
    return sum(bool(of.license) for of in known.values())


def summary(left_out, out):
    """One line on what was left out of a set."""
    counts = Counter(reason for _, reason, _ in left_out)
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    path = Path(out) / "left_out.csv"
    return f"left out {len(left_out)} files ({reasons}), each with its reason in {path}"


def prepared(root, fps=15.625, size=64, cache=Path("runs") / "prepared") -> Path:
    """The set to read for a --data folder: itself, or the one made of its videos.

    A plain folder of videos is prepared under `cache`, once, and later only what is new in it.
    """
    root = Path(root)
    if (root / "set.json").is_file():
        return root
    if not root.is_dir():
        raise MediaError(f"{root}: no such folder; give a prepared set or a folder of videos")
    # by the path, as folders may have the same name
    path = root.resolve()
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    out = Path(cache) / f"{path.name}-{mark}-{fps:g}fps-{size}px"
    print(
        f"{root}: videos; prepared at {fps:g} frames a second and {size} pixels in {out}",
        file=sys.stderr,
    )
    report = prepare(root, out, fps, size, os.cpu_count())
    if report.left_out:
        print(f"{root}: {summary(report.left_out, out)}", file=sys.stderr)
    return out


# ---- reading -----------------------------------------------------------------------------------


class Set:
    """Clips on disk, opened at the same cost however many they are.

    index  {"split", and every array's name: numpy (clips,)}: places in SPLITS, and lengths
    Raises MediaError where the folder is no set, is unfinished or damaged.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.metadata = read_metadata(self.root)
        # of a set's shards, however many they are, only these take memory
        self.shard = functools.lru_cache(OPEN_SHARDS)(self.open_shard)
        count = self.metadata["clips"]
        if count is None:
            raise MediaError(
                f"{root}: an unfinished set; run the command that makes it again, it goes on from "
                "there"
            )
        path = self.root / "index.safetensors"
        with reading(path):
            # where clips are being appended, it can have rows that are not for readers yet
            self.index = {name: column[:count] for name, column in load_file(path).items()}
            self.starts = np.cumsum([0, *(shard["clips"] for shard in self.metadata["shards"])])
            if len(self.index["split"]) < count:
                raise ValueError(f"{len(self.index['split'])} of {count} clips")

    def __reduce__(self):
        # what goes to another process is the name, not the open files
        return type(self), (self.root,)

    def open_shard(self, number):
        return open_shard(shard_path(self.root, number))

    @contextmanager
    def reading(self, clip):
        """-> (its shard, its place in it, [name, label, split]); errors within name the clip."""
        number = int(np.searchsorted(self.starts, clip, "right")) - 1
        row = int(clip - self.starts[number])
        file, clips = self.shard(number)
        with reading(shard_path(self.root, number), clips[row][0]):
            yield file, row, clips[row]

    def describe(self, clip):
        """-> name, label and split of a clip."""
        with self.reading(clip) as (_, _, (name, label, _)):
            return name, label, SPLITS[self.index["split"][clip]]

    def column(self, clip, name, start=0, stop=sys.maxsize):
        """Entries of a clip's array from `start` to `stop`, as far as it goes."""
        with self.reading(clip) as (file, row, _):
            # reads those bytes alone
            part = file.get_slice(f"{row}.{name}")
            stop = min(stop, part.get_shape()[0])
            if start >= stop:  # safetensors has no empty slices
                return file.get_tensor(f"{row}.{name}")[:0]
            return part[start:stop]

    def frames(self, clip, start=0, stop=sys.maxsize):
        """Frames of a clip from `start` to `stop`, as far as it goes: uint8 (f, 3, size, size)."""
        with self.reading(clip):
            bounds = self.column(clip, "bounds", start, stop + 1)
            first = int(bounds[0])
            jpegs = self.column(clip, "frames", first, int(bounds[-1])).tobytes()
            pairs = itertools.pairwise(bounds - first)
            return decode_jpegs([jpegs[a:b] for a, b in pairs], self.metadata["size"])

    @functools.cached_property
    def rights(self):
        """{name: Rights} of the clips of which any are known."""
        return read_rights(self.root)

    def left_out(self):
        """[(name, reason)] of the files that are not in the set."""
        path = self.root / "left_out.csv"
        if not path.exists():  # of features: whatever was left out, was so before
            return []
        with open(path, newline="", **NAMES) as file:
            return [(row["name"], row["reason"]) for row in csv.DictReader(file)]


def check(root: Path):
    """Yields a line for every fault of a set: files that have changed, unreadable clips."""
    clips = Set(root)
    path = clips.root / rights.TABLE
    written = clips.metadata.get("rights")
    if written and not path.is_file():
        yield f"{path}: missing; prepare the set again with its CSV"
    elif path.is_file() and sha256(path) != written:
        yield f"{path}: it has changed since it was written (SHA-256); prepare again with its CSV"
    for number, shard in enumerate(clips.metadata["shards"]):
        if clips.starts[number] == clips.metadata["clips"]:
            return  # what follows is not for readers yet
        path = shard_path(clips.root, number)
        try:
            _, descriptions = clips.shard(number)
            with reading(path):
                if sha256(path) != shard["sha256"]:
                    yield f"{path}: it has changed since it was written (SHA-256); {AGAIN}"
        except MediaError as error:
            yield str(error)
            continue
        for clip, (name, _, split) in enumerate(descriptions, clips.starts[number]):
            # what the index must say of this clip
            split = clips.metadata["moved"].get(name, split)
            row = {"split": SPLITS.index(split)}
            try:
                for column in clips.metadata["columns"]:
                    row[column] = len(clips.column(clip, column))
                if "frames" in row:
                    clips.frames(clip)
            except MediaError as error:
                yield str(error)
                continue
            if any(clips.index[key][clip] != value for key, value in row.items()):
                yield f"{clips.root / 'index.safetensors'}: {name} is another in its shard; {AGAIN}"


def read_onsets(video):
    """[{"time", "material", ...}] by time: the labels beside a clip, as foley.py writes them."""
    path = Path(video).with_suffix(".json")
    try:
        onsets = json.loads(path.read_text())["onsets"]
        # JSON as Python reads it has NaN
        if not all(math.isfinite(float(onset["time"])) for onset in onsets):
            raise ValueError("a time that is none")
        return sorted(onsets, key=lambda onset: float(onset["time"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "not the labels of foley.py" if path.is_file() else "no such file"
        raise MediaError(f"{path}: {reason}; make clips and their labels with foley.py") from error


def read_all_onsets(folder: Path):
    """{name: labels} of all clips below a folder that have some; names are without a suffix."""
    folder = Path(folder)
    files = sorted(folder.rglob("*"))
    # a .json that has no clip beside it is something else
    clips = {path.with_suffix("") for path in files if path.suffix != ".json" and path.is_file()}
    onsets = {}
    for path in files:
        if path.suffix == ".json" and path.with_suffix("") in clips:
            onsets[path.relative_to(folder).with_suffix("").as_posix()] = read_onsets(path)
    if not onsets:
        raise MediaError(f"{folder}: no clip with a .json file beside it; give foley.py's folder")
    return onsets


# ---- what training draws -----------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    """What the readers share: a set, and the numbers of the clips in it that they draw from.

    Items are pure functions of (seed, index), where index e * len + i is clip i in epoch e, so runs
    repeat whatever reads them.

    split  "train", "val", "test", or None for all clips
    column, least  clips whose array of that name has fewer entries are left out; messages give the
                   length in `seconds`
    """

    def __init__(self, root, seed, split, column, least, seconds):
        self.set = Set(root)
        self.seed = seed
        self.reason = f"shorter than {seconds:.2f} s"
        if column not in self.set.metadata["columns"]:
            columns = " and ".join(self.set.metadata["columns"])
            give = "a prepared set or a folder of videos"
            if column == "features":
                give = "what python cavp.py --extract wrote"
            raise MediaError(f"{root}: holds {columns}, not {column}; give {give}")
        index = self.set.index
        # two passes over numbers of the index: no shard is opened for it
        chosen = np.ones(len(index["split"]), bool)
        if split is not None:
            chosen = index["split"] == SPLITS.index(split)
        long = index[column] >= least
        self.clips = np.flatnonzero(chosen & long)
        self.short = np.flatnonzero(chosen & ~long)
        if not chosen.any():
            raise MediaError(
                f"{root}: no clip of its {len(chosen)} is for {split}; give three or more, and "
                "each split has one"
            )
        if not len(self.clips):
            of = f" for {split}" if split else ""
            raise MediaError(f"{root}: no clip of at least {seconds:.2f} s{of}; give longer clips")
        if len(self.short):
            warnings.warn(
                f"{root}: {len(self.short)} of {chosen.sum()} clips are {self.reason} and left out",
                stacklevel=3,
            )

    @property
    def left_out(self):
        """[(name, reason)] of the files that are not in the set and of clips too short here."""
        short = [(self.set.describe(clip)[0], self.reason) for clip in self.short]
        return self.set.left_out() + short

    def describe(self, index):
        """-> name, label and split of an item's clip."""
        return self.set.describe(self.clips[index % len(self.clips)])

    def data_summary(self):
        """What weights trained on these clips say of them: `rights.summarize`, and "seconds"."""
        known = [UNKNOWN] * len(self.clips)
        # names are in the shards, which a set of which nothing is known need not open
        if self.set.rights:
            names = (self.set.describe(clip)[0] for clip in self.clips)
            known = [self.set.rights.get(name, UNKNOWN) for name in names]
        samples = int(self.set.index["sound"][self.clips].sum())
        return {**rights.summarize(known), "seconds": round(samples / SAMPLE_RATE, 1)}

    def sound(self, clip, start, count):
        """`count` samples of a clip from `start` on, as far as it goes: float32 in [-1, 1]."""
        return self.set.column(clip, "sound", start, start + count).astype(np.float32) / 32767

    def __len__(self):
        return len(self.clips)


def padded(array, n, repeat=False):
    """numpy array -> tensor, its first axis filled up to n with zeros or with its last entry."""
    tensor = torch.from_numpy(array)
    if len(tensor) >= n:
        return tensor
    last = tensor[-1:] if repeat else tensor.new_zeros(1)
    return torch.cat([tensor, last.expand(n - len(tensor), *tensor.shape[1:])])


class Clips(Windows):
    """Windows of `frames` pictures and the sound that starts with the first of them.

    item  {"video": uint8 (frames, 3, size, size), "wav": float32 (round(16000 * frames / fps),),
           "name", "start": in seconds}, and "label" where the set has labels
    frames        None: each clip from its start to its end
    random_start  draw the first frame, and leave out clips that are too short; otherwise windows
                  start at 0, and short clips end in their last picture and in silence
    Raises MediaError where the set has another fps or size.
    """

    def __init__(
        self,
        root: Path,
        fps: float,
        size: int,
        frames: int | None = None,
        seed: int = 0,
        random_start: bool = True,
        split: str | None = None,
    ):
        self.fps = fps
        self.frames = frames
        self.random_start = random_start and frames is not None
        least = frames if self.random_start else 1
        super().__init__(root, seed, split, "bounds", least + 1, least / fps)
        metadata = self.set.metadata
        if (metadata["fps"], metadata["size"]) != (fps, size):
            raise MediaError(
                f"{root}: prepared at {metadata['fps']:g} fps and {metadata['size']} pixels; make "
                f"one with python data.py prepare VIDEOS OUT --fps {fps:g} --size {size}"
            )

    def __getitem__(self, index):
        clip = self.clips[index % len(self.clips)]
        available = int(self.set.index["bounds"][clip]) - 1
        frames = self.frames or available
        first = 0
        if self.random_start:
            rng = np.random.default_rng([self.seed, index])
            first = int(rng.integers(available - frames + 1))
        start = first / self.fps
        samples = round(frames / self.fps * SAMPLE_RATE)
        name, label, _ = self.set.describe(clip)
        # frame k is what shows at k / fps, so its sound starts at that moment
        item = {
            "video": padded(self.set.frames(clip, first, first + frames), frames, repeat=True),
            "wav": padded(self.sound(clip, round(start * SAMPLE_RATE), samples), samples),
            "name": name,
            "start": start,
        }
        if self.set.metadata["labels"]:
            item["label"] = label
        return item


class Sounds(Windows):
    """Windows of the sound alone, for the autoencoder, from a set of either kind.

    item  {"wav": float32 (samples,)}, starting on a mel column
    """

    def __init__(self, root: Path, samples: int, seed: int = 0, split: str | None = None):
        self.columns = samples // HOP
        super().__init__(root, seed, split, "sound", self.columns * HOP, samples / SAMPLE_RATE)

    def __getitem__(self, index):
        clip = self.clips[index % len(self.clips)]
        available = int(self.set.index["sound"][clip]) // HOP
        rng = np.random.default_rng([self.seed, index])
        first = int(rng.integers(available - self.columns + 1))
        return {"wav": torch.from_numpy(self.sound(clip, first * HOP, self.columns * HOP))}


class Pairs(Windows):
    """Features and sound of one model window, for stage 2, of a set that `cavp.py --extract` wrote.

    item   {"features": float32 (frames, 512), "wav": float32 (WINDOW,)}; a clip shorter than the
           window ends in its last feature and in silence
    merge  share of the items that are two clips of the split joined in time (split-and-merge
           augmentation of stage 2), with the sound cut at the sample where the second one's first
           frame starts (officially up to 0.25 s beside it)
    roll   share of the items whose features and sound are rotated in time by the same amount
    columns    mel columns of a feature; 0: none of the following. The item also has "hits" (frames
               * columns,) and "materials" (frames,), of common/controls.py
    materials  their names; another one counts as not known
    strangers  share of the items whose features are another clip's; "stranger" is 1 for them
    labels     {name without suffix: [{"time", ...}]}; of other clips onsets are detected
    Raises MediaError where the features have another rate.
    """

    def __init__(
        self,
        root: Path,
        fps: float,
        frames: int,
        merge: float = 0.0,
        roll: float = 0.0,
        seed: int = 0,
        split: str | None = None,
        columns: int = 0,
        materials: tuple = (),
        labels: dict | None = None,
        strangers: float = 0.0,
    ):
        self.fps = fps
        self.frames = frames
        self.strangers = strangers
        self.columns = columns
        self.materials = materials
        self.labels = labels
        self.merge = merge
        self.roll = roll
        super().__init__(root, seed, split, "features", 1, 1 / fps)
        if self.set.metadata["fps"] != fps:
            raise MediaError(
                f"{root}: features at {self.set.metadata['fps']:g} a second, the model needs "
                f"{fps:g}; extract them with a CAVP of the same preset"
            )
        if labels and not any(self.stem(clip) in labels for clip in self.clips):
            raise MediaError(
                f"{root}: none of its clips has labels; give the folder that it was prepared from"
            )

    def cut(self, clip, rng, frames, samples):
        """{"features", "wav", ...} of `frames` and `samples` from a random place of a clip."""
        available = int(self.set.index["features"][clip])
        first = int(rng.integers(max(0, available - frames) + 1))
        features = self.set.column(clip, "features", first, first + frames).astype(np.float32)
        sound = self.sound(clip, round(first / self.fps * SAMPLE_RATE), samples)
        item = {"features": padded(features, frames, repeat=True), "wav": padded(sound, samples)}
        if self.columns:
            item |= self.tracks(clip, first / self.fps, frames, item["wav"])
        return item

    def stem(self, clip):
        """A clip's name without the suffix, as in `labels`."""
        return Path(self.set.describe(clip)[0]).with_suffix("").as_posix()

    def tracks(self, clip, start, frames, wav):
        """What can be told of `frames` features of a clip from `start` seconds on."""
        count = frames * self.columns
        name = self.stem(clip)
        hits = []
        if self.labels and name in self.labels:
            for onset in self.labels[name]:
                material = onset.get("material")
                known = material if material in self.materials else None
                hits.append(Hit(float(onset["time"]) - start, onset.get("strength"), known))
        else:
            hits = [Hit(time) for time in detect_onsets(mel(wav).numpy())]
        nearest = track_materials(hits, self.materials, frames, 1 / self.fps)
        return {
            "hits": torch.from_numpy(track_hits(hits, count)),
            "materials": torch.from_numpy(nearest),
        }

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        clip = self.clips[index % len(self.clips)]
        if rng.random() < self.merge:
            # the first clip fills a quarter to three quarters of the window
            n = int(rng.integers(self.frames // 4, self.frames * 3 // 4 + 1))
            samples = round(n / self.fps * SAMPLE_RATE)
            other = self.clips[int(rng.integers(len(self.clips)))]
            first = self.cut(clip, rng, n, samples)
            second = self.cut(other, rng, self.frames - n, WINDOW - samples)
            item = {name: torch.cat([first[name], second[name]]) for name in first}
        else:
            item = self.cut(clip, rng, self.frames, WINDOW)
        # also without the augmentation a number is drawn, so that it changes no other
        if rng.random() < self.roll:
            n = int(rng.integers(self.frames))
            turns = {"wav": round(n / self.fps * SAMPLE_RATE), "features": n, "materials": n}
            item = {name: x.roll(turns.get(name, n * self.columns), 0) for name, x in item.items()}
        if self.columns:
            stranger = rng.random() < self.strangers
            item["stranger"] = torch.tensor(float(stranger))
            if stranger:
                other = self.clips[int(rng.integers(len(self.clips)))]
                item["features"] = self.cut(other, rng, self.frames, HOP)["features"]
        return item


# ---- annotations of hits -------------------------------------------------------------------------


def hit_labels(
    onsets: list, classes: list, start: float, fps: float, frames: int, segments: int
) -> torch.Tensor:
    """(segments,) index in `classes` of the material that is hit in each segment of a window.

    onsets [{"time", "material"}] of a clip; start of the window in seconds; frames of a segment;
    -1: no hit, or several materials.
    """
    hits = [set() for _ in range(segments)]
    for onset in onsets:
        segment = math.floor((onset["time"] - start) * fps / frames)
        if 0 <= segment < segments:
            hits[segment].add(classes.index(onset["material"]))
    return torch.tensor([hit.pop() if len(hit) == 1 else -1 for hit in hits])


class HitLabels:
    """Materials of hits for all clips of some data sets, from a folder of .json files."""

    def __init__(self, folder: Path, datasets: list, fps: float, frames: int, segments: int):
        self.window = (fps, frames, segments)
        self.onsets = {}
        for clips in datasets:
            for i in range(len(clips)):
                name = clips.describe(i)[0]
                self.onsets[name] = read_onsets(folder / name)
        materials = {onset["material"] for clip in self.onsets.values() for onset in clip}
        self.classes = sorted(materials)

    def of(self, batch: dict):
        """(n, segments) `hit_labels` of a batch's windows."""
        labels = []
        for name, start in zip(batch["name"], batch["start"].tolist(), strict=True):
            labels.append(hit_labels(self.onsets[name], self.classes, start, *self.window))
        return torch.stack(labels)


# ---- command line ------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = cli.Parser("data.py", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "make a training set of a folder of videos, or add what is new in it"
    p = commands.add_parser("prepare", help=text, description=text)
    p.set_defaults(run=run_prepare)
    p.add_argument("raw", type=Path, help="folder of videos")
    p.add_argument("set", type=Path, help="folder of the set; one that exists is continued")
    p.add_argument(
        "--csv",
        type=Path,
        help="rows `id,start,label,train|test`, as VGGSound's: clips, labels and splits",
    )
    p.add_argument(
        "--licence-csv",
        "--license-csv",
        type=Path,
        metavar="FILE",
        help="columns `file,source,licence,consent` and perhaps `attribution`, of any of the "
        "videos: kept with their clips",
    )
    p.add_argument(
        "--require-licence",
        "--require-license",
        action="store_true",
        help="leave out clips without a license, and those whose consent is `no`",
    )
    p.add_argument(
        "--fps",
        type=cli.number(float, 0.001, 240),
        default=15.625,
        help="frames a second: one to 4 mel columns (paper: 4)",
    )
    p.add_argument(
        "--size",
        type=cli.number(int, 1, 4096),
        default=64,
        help="side of the square frames in pixels (mini: 64, paper: 224)",
    )
    p.add_argument(
        "--workers",
        type=cli.number(int, 1),
        default=os.cpu_count(),
        help="processes that decode",
    )
    text = "read a set through, and name every file and clip that is damaged"
    p = commands.add_parser("check", help=text, description=text)
    p.set_defaults(run=run_check)
    p.add_argument("set", type=Path, help="folder of the set")
    return parser.parse_args(argv)


def run_prepare(args):
    """-> how many files were left out."""
    report = prepare(
        args.raw,
        args.set,
        args.fps,
        args.size,
        args.workers,
        args.csv,
        args.licence_csv,
        args.require_licence,
    )
    print(f"{args.set}: {report.clips} clips, {report.new} of them new", end="")
    print(f", {report.licensed} with a license", end="")
    print(f"; {report.missing} rows of {args.csv} have no file" if report.missing else "")
    if report.unknown:
        print(
            f"{args.licence_csv}: {len(report.unknown)} of its files are not among the videos: "
            + rights.some(report.unknown),
            file=sys.stderr,
        )
    if report.left_out:
        print(summary(report.left_out, args.set), file=sys.stderr)
    return len(report.left_out)


def run_check(args):
    """-> how many faults there are."""
    faults = 0
    for fault in check(args.set):
        print(fault, flush=True)
        faults += 1
    metadata = read_metadata(args.set)
    print(f"{args.set}: {licensed(Set(args.set).rights)} of its clips have a license")
    shards = len(metadata["shards"])
    print(f"{args.set}: {metadata['clips']} clips, shards: {shards}, faults: {faults}")
    return faults


def main():
    args = parse_arguments()
    # like an exception, so that `Writer` can write what it has
    cli.exit_on_signals("data.py", f"{args.set}: interrupted; run the same command again")
    try:
        faults = args.run(args)
    except UserError as error:
        print(f"data.py: {error}", file=sys.stderr)
        faults = 1
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
