"""Mel spectrograms and back, onsets, and the prepared sets that training reads.

in   sound float32 (n,) at 16 kHz, and folders of videos; files themselves are read and written by media.py, whose
     functions are handed on here
out  mel float32 (128, s) in [0, 1] and sound again, onset times, and a prepared set: every clip's frames as JPEG and its
     sound as int16, in large files with random access (`Set` has the form), and readers that draw windows from it

Diff-Foley section 3.1 and its data_preprocess/wav2spec.py fix the mel; fast Griffin-Lim is Perraudin, Balazs and
Sondergaard 2013.

    python data.py prepare RAW OUT --fps 15.625 --size 64 --workers 4
    python data.py prepare vggsound OUT --csv vggsound.csv --fps 4 --size 224

Differs from the official code: one filterbank at 16 kHz serves mel and its inverse (there: the inverse is at 22,050 Hz,
and tones fall).
"""

import argparse
import csv
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from common import ffmpeg
from common.audio import HOP, WINDOW
from common.media import (
    SAMPLE_RATE,
    TEXT_SUFFIXES,
    MediaError,
    atomic_write,
    find_videos,
    output_suffix,  # noqa: F401
    search,
)

with suppress(
    ImportError
):  # Windows has none: there nothing keeps two processes from preparing one set
    import fcntl

SHORTEST = 0.5  # seconds: what is shorter is no clip
SILENT = 0.001  # of full scale, -60 dB: sound that never rises above it is none
HELD_OUT = 0.05  # share of the clips in each of "val" and "test"
SPLITS = ("train", "val", "test")
COMPANIONS = {".json", ".csv", ".txt"}  # files that lie beside clips and are not missed in a set
JPEG_QUANTIZER = (
    "2"  # 40 to 45 dB, 13 to 21 kB a frame of 224 pixels; 38 to 42 dB, 1.4 to 3.2 kB of 64
)
FORMAT = 3  # of prepared sets
BLOCK = 2**14  # bytes that share a checksum
SHARD = 2**30  # bytes after which a set goes on in a new file
COMMIT = 2.0  # seconds of work that a kill can cost
OPEN = 64  # shards that a process holds open


# ---- frames as JPEG ------------------------------------------------------------------------------------------------


def encode_jpegs(images, size):
    """uint8 (size, size, 3) images -> bytes of each. Full chroma: without it small things lose 2 to 6 dB, for a fifth of the
    bytes."""
    context, scaler, last, jpeg = (
        av.CodecContext.create("mjpeg", "w"),
        VideoReformatter(),
        None,
        None,
    )
    context.width, context.height, context.pix_fmt, context.time_base = (
        size,
        size,
        "yuvj444p",
        Fraction(1, 25),
    )
    context.thread_count, context.qscale, context.options = (
        1,
        True,
        {"qmin": JPEG_QUANTIZER},
    )  # for every frame alike
    for number, image in enumerate(images):
        if image is not last:  # what is shown for longer than one frame is encoded once
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame = scaler.reformat(
                frame, format="yuvj444p", dst_colorspace="ITU601", dst_color_range="JPEG", threads=1
            )
            frame.pts = number
            (jpeg,), last = map(bytes, context.encode(frame)), image
        yield jpeg


@lru_cache(maxsize=1)
def jpeg_decoder(_process):
    """A process's decoder and converter: setting them up costs more than a frame, and threads more than they bring."""
    context = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    return context, VideoReformatter()


def decode_jpegs(jpegs, size):
    """Bytes of each frame -> uint8 (f, 3, size, size)."""
    context, scaler = jpeg_decoder(os.getpid())
    out = np.empty((len(jpegs), 3, size, size), np.uint8)
    for image, jpeg in zip(out, jpegs):
        (frame,) = context.decode(av.Packet(jpeg))
        for channel, plane in zip(
            (1, 2, 0), scaler.reformat(frame, format="gbrp", threads=1).planes
        ):
            image[channel] = np.frombuffer(plane, np.uint8).reshape(size, plane.line_size)[:, :size]
    return out


# ---- sets of clips on disk -----------------------------------------------------------------------------------------

AS_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name need not be text
AGAIN = "delete the set and prepare it again"


def entry(columns):
    """A clip's entry in the index; its name, its label, its columns and their checksums are each (first byte, bytes)."""
    stretches = ("name", "label", *columns, "checks")
    return np.dtype([("shard", "<u4"), ("split", "<u4"), *((name, "<u8", 2) for name in stretches)])


def checksums(content):
    return [zlib.crc32(memoryview(content)[k : k + BLOCK]) for k in range(0, len(content), BLOCK)]


def read_about(root):
    """set.json, or the reason why a folder is no set."""
    try:
        about = json.loads((root / "set.json").read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']} instead of {FORMAT}")
        return about
    except FileNotFoundError:
        raise MediaError(
            f"{root}: not a prepared set; make one with python data.py prepare VIDEOS {root}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(
            f"{root / 'set.json'}: cannot be read ({error}); prepare the set in another folder"
        ) from None


class Set:
    """Clips on disk, opened at the same cost however many they are.

    set.json          what all clips have in common, and "clips": how many there are; null until it is first finished
    index.bin         an `entry` a clip, mapped into memory
    names.bin         names and labels, one after the other
    shard-00000.bin   columns, clip after clip, and behind each clip's the CRC-32 of every BLOCK bytes of them. A column is:
                          "bounds"    uint32 (f + 1,), where each frame starts in
                          "frames"    JPEGs
                          "features"  float16 (f, width), instead of these two in what `cavp.py --extract` writes
                          "sound"     int16 (n,)
    left_out.csv      the files that are not in it: name, reason, and what exactly was found

    Files only grow, an entry follows what it describes, and "clips" follows the entries: nobody sees half a clip."""

    def __init__(self, root):
        self.root, self.files, self.process = (
            Path(root),
            {},
            None,
        )  # open files, and the process that opened them
        self.about = read_about(self.root)
        if self.about["clips"] is None:
            raise MediaError(
                f"{root}: an unfinished set; run the command that makes it again, it goes on from there"
            )
        path = self.root / "index.bin"
        try:
            self.index = np.memmap(
                path, entry(self.about["columns"]), "r", shape=(self.about["clips"],)
            )
        except (OSError, ValueError) as error:
            raise MediaError(f"{path}: missing or cut off ({error}); {AGAIN}") from None

    def __reduce__(self):
        return type(self), (self.root,)  # to another process goes the name, not the map

    def stretch(self, name, start, count):
        """`count` bytes of one of the set's files."""
        if self.process != os.getpid():  # a file's position is shared with the process that forked
            self.files, self.process = {}, os.getpid()
        try:
            if name not in self.files:
                if len(self.files) == OPEN:
                    self.files.pop(next(iter(self.files))).close()
                self.files[name] = open(self.root / name, "rb", buffering=0)
            self.files[name].seek(start)
            found = self.files[name].read(count)
        except OSError as error:
            raise MediaError(
                f"{self.root / name}: cannot be read ({error.strerror}); {AGAIN}"
            ) from None
        if len(found) < count:
            raise MediaError(f"{self.root / name}: cut off at byte {start + len(found)}; {AGAIN}")
        return found

    def text(self, clip, what):
        """A clip's "name" or "label"."""
        return os.fsdecode(self.stretch("names.bin", *map(int, self.index[clip][what])))

    def column(self, clip, name, dtype, start=0, count=None):
        """`count` values, at most, of a clip's column from value `start` on, as an array. What is read is checked."""
        where, step = self.index[clip], np.dtype(dtype).itemsize
        first, size = map(int, where[name])
        start = min(start * step, size)
        size = size - start if count is None else min(count * step, size - start)
        if not size:
            return np.empty(0, dtype)
        begin, end = (
            int(where[self.about["columns"][0]][0]),
            int(where["checks"][0]),
        )  # of the clip in its shard
        at, shard = first + start - begin, f"shard-{where['shard']:05d}.bin"
        a, b = at // BLOCK, -(-(at + size) // BLOCK)  # blocks that hold it
        blocks = self.stretch(shard, begin + a * BLOCK, min(b * BLOCK, end - begin) - a * BLOCK)
        if np.frombuffer(
            self.stretch(shard, end + 4 * a, 4 * (b - a)), "<u4"
        ).tolist() != checksums(blocks):
            raise MediaError(
                f"{self.root / shard}: {self.text(clip, 'name')} is damaged in it; {AGAIN}"
            )
        return np.frombuffer(blocks, dtype, size // step, at - a * BLOCK)

    def frames(self, clip, start=0, count=None):
        """Pictures of a clip, as many of `count` as there are: uint8 (f, 3, size, size)."""
        bounds = self.column(clip, "bounds", "<u4", start, None if count is None else count + 1)
        blob = self.column(
            clip, "frames", np.uint8, int(bounds[0]), int(bounds[-1] - bounds[0])
        ).tobytes()
        at = (bounds - bounds[0]).tolist()
        return decode_jpegs([blob[a:b] for a, b in zip(at, at[1:])], self.about["size"])

    def left_out(self):
        """[(name, reason)] of the files that are not in the set."""
        path = self.root / "left_out.csv"
        if not path.exists():  # features: whatever was left out, was so before
            return []
        with open(path, newline="", **AS_NAMES) as file:
            return [(row["name"], row["reason"]) for row in csv.DictReader(file)]


def split_of(name, said=None):
    """The split of a clip, by its name alone, so that files which come later move none. `said`: what a CSV says; of its
    "train" a share becomes "val", as VGGSound's CSV has none."""
    u = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
    if said in ("val", "test"):
        return said
    return "val" if u < HELD_OUT else "test" if u < 2 * HELD_OUT and said is None else "train"


class Writer:
    """Appends clips to a set, a new one or one that was begun. After a kill at any moment the same clips in the same order
    give the same bytes as without it. A context: what was added is on disk when it ends, however it ends."""

    def __init__(self, root, about):
        self.root, self.about, self.dtype = (
            Path(root),
            {"format": FORMAT, **about, "clips": None},
            entry(about["columns"]),
        )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.root / ".lock", "wb")
            if "fcntl" in globals():
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MediaError(
                f"{root}: another process is preparing it; wait for that, or give another folder"
            ) from None
        except OSError as error:
            raise self.unwritable(error) from None
        if (self.root / "set.json").exists():
            made = read_about(self.root)
            differ = [
                f"{k} {made.get(k)} instead of {v}" for k, v in about.items() if made.get(k) != v
            ]
            if differ:
                raise MediaError(
                    f"{root}: a set with {', '.join(differ)} is there; give another folder"
                )
            self.about["clips"] = made["clips"]
        else:
            self.write_about(None)
        self.open()

    def unwritable(self, error):
        return MediaError(
            f"{self.root}: cannot be written ({error.strerror}); free some space or choose another folder, and "
            "run the same command again: it goes on where it stopped"
        )

    def write_about(self, clips):
        self.about["clips"] = clips
        with atomic_write(self.root / "set.json") as part:
            part.write_text(json.dumps(self.about, indent=1) + "\n")

    def path(self, shard):
        return self.root / f"shard-{shard:05d}.bin"

    def open(self):
        """Back to the last clip that is wholly there; what a kill left behind it is cut off."""
        self.index_file, self.names_file = (
            open(self.root / name, "a+b") for name in ("index.bin", "names.bin")
        )
        self.index_file.seek(0)
        self.names_file.seek(0)
        content, text = self.index_file.read(), self.names_file.read()
        index = np.frombuffer(content, self.dtype, len(content) // self.dtype.itemsize)
        shards = range(int(index["shard"].max(initial=0)) + 1)
        sizes = np.array(
            [path.stat().st_size if path.exists() else 0 for path in map(self.path, shards)]
        )
        there = (index["checks"].sum(1) <= sizes[index["shard"]]) & (
            index["label"].sum(1) <= len(text)
        )
        index = index[: len(index) if there.all() else int(there.argmin())]
        if len(index) < (self.about["clips"] or 0):
            raise MediaError(
                f"{self.root}: damaged, {len(index)} of its first {self.about['clips']} clips are there; {AGAIN}"
            )
        self.shard = self.end = self.names_end = 0
        if len(index):
            final = index[-1]
            self.shard, self.end, self.names_end = map(
                int, (final["shard"], final["checks"].sum(), final["label"].sum())
            )
        self.index_file.truncate(len(index) * self.dtype.itemsize)
        self.names_file.truncate(self.names_end)
        for path in self.root.glob("shard-*.bin"):
            if path > self.path(self.shard):
                path.unlink()
        self.shard_file = open(self.path(self.shard), "ab")
        self.shard_file.truncate(self.end)
        self.index, self.pending, self.clock = index.copy(), [], time.monotonic()
        self.names = {os.fsdecode(text[a : a + n]) for a, n in index["name"].tolist()}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        try:
            if not isinstance(error, OSError):
                self.commit()
        except OSError as second:
            raise self.unwritable(second) from None
        finally:
            for file in (self.shard_file, self.names_file, self.index_file, self.lock):
                with suppress(OSError):
                    file.close()
        if isinstance(error, OSError):
            raise self.unwritable(error) from None

    def add(self, name, label, split, columns):
        """One clip; `columns` {name: bytes}."""
        if self.end >= SHARD:
            self.commit()
            self.shard_file.close()
            self.shard, self.end = self.shard + 1, 0
            self.shard_file = open(self.path(self.shard), "ab")
        new = np.zeros((), self.dtype)
        new["shard"], new["split"] = self.shard, SPLITS.index(split)
        for what, text in (("name", name), ("label", label)):
            new[what] = self.names_end, self.names_file.write(os.fsencode(text))
            self.names_end += int(new[what][1])
        content = b"".join(columns[column] for column in self.about["columns"])
        columns = {**columns, "checks": np.array(checksums(content), "<u4").tobytes()}
        for column in (*self.about["columns"], "checks"):
            new[column] = self.end, self.shard_file.write(columns[column])
            self.end += int(new[column][1])
        self.names.add(name)
        self.pending.append(new)
        if time.monotonic() - self.clock > COMMIT:
            self.commit()

    def commit(self):
        """Columns and names first, then the entries that point at them."""
        if self.pending:
            for file in (self.shard_file, self.names_file):
                file.flush()
                os.fsync(file.fileno())
            self.index_file.write(np.stack(self.pending).tobytes())
            self.index_file.flush()
            os.fsync(self.index_file.fileno())
            self.index, self.pending = np.concatenate([self.index, np.stack(self.pending)]), []
        self.clock = time.monotonic()

    def finish(self, needed=SPLITS):
        """From now on readers see all that was added. Where chance has left a split of `needed` without a clip, and there are
        three clips or more, the largest split gives it its first one (by the hash), for good."""
        self.commit()
        text = self.root.joinpath("names.bin").read_bytes()
        for k in map(SPLITS.index, needed if len(self.index) >= 3 else ()):
            if not (self.index["split"] == k).any():
                rich = np.flatnonzero(
                    self.index["split"] == np.bincount(self.index["split"]).argmax()
                )
                names = [text[a : a + n] for a, n in self.index["name"][rich].tolist()]
                self.index["split"][
                    rich[min(range(len(rich)), key=lambda i: hashlib.sha256(names[i]).digest())]
                ] = k
                with open(self.root / "index.bin", "r+b") as file:
                    file.write(self.index.tobytes())
        if self.about["clips"] != len(self.index):
            self.write_about(len(self.index))


# ---- from videos to a set ------------------------------------------------------------------------------------------

Job = namedtuple("Job", "name path start seconds label split")  # a clip to be: a stretch of a file
Report = namedtuple(
    "Report", "clips new left_out missing"
)  # left_out [(name, reason, what was found)],
# missing rows of the CSV that have no file


def read_csv(path):
    """VGGSound's rows `id,start,label,train|test`, without a header -> [(id, start, label, split)]."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    youtube, start, label, split = row
                    rows.append(
                        (youtube, int(float(start)), label, SPLITS[SPLITS.index(split.strip())])
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"--csv {path}: cannot be read ({error}); give a text file") from None
    except (ValueError, csv.Error):
        raise MediaError(
            f"--csv {path}: line {number} is not `id,start,label,train|val|test`; correct it"
        ) from None
    return rows


def find_jobs(raw, table=None):
    """-> jobs in a fixed order, [(name, reason, what was found)] of the files that are none, rows of the CSV without one.
    With a CSV, files are ID_START.mp4 (six digits), cut already, or ID.mp4, of which ten seconds from START are taken."""
    raw = Path(raw)
    videos = find_videos([raw])
    root = raw if raw.is_dir() else raw.parent
    names = {path: path.relative_to(root).as_posix() for path in videos}
    others = search(raw)[1] if raw.is_dir() else []
    others = [path for path in others if path.suffix.lower() not in TEXT_SUFFIXES]
    spare = [
        (path.relative_to(root).as_posix(), "not a video", "FFmpeg finds no moving picture in it")
        for path in others
    ]
    if table is None:
        return (
            [Job(name, path, 0.0, None, "", split_of(name)) for path, name in names.items()],
            spare,
            0,
        )
    files, jobs, used, missing = {}, [], set(), 0
    for path in reversed(videos):  # of two of one name the first
        files[path.stem] = path
    for youtube, start, label, said in read_csv(table):
        stem = f"{youtube}_{start:06d}"
        cut, full = files.get(stem), files.get(youtube)
        if cut or full:
            path = cut or full
            name = (
                names[path]
                if cut
                else (Path(names[path]).parent / f"{stem}{path.suffix}").as_posix()
            )
            jobs.append(
                Job(
                    name,
                    path,
                    *((0.0, None) if cut else (float(start), 10.0)),
                    label,
                    split_of(stem, said),
                )
            )
            used.add(path)
        missing += not (cut or full)
    jobs = sorted(
        {job.name: job for job in reversed(jobs)}.values()
    )  # of two rows for one clip the first
    spare += [
        (names[path], "not in the CSV", "no row of it asks for this file")
        for path in videos
        if path not in used
    ]
    return jobs, spare, missing


def encode_clip(job, fps, size):
    """A clip's columns {name: bytes} and what had to be mended in it, or why it is left out: (reason, what was found). Frames
    are encoded one by one. Runs in a worker, so the decoders run in its own process."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            info = ffmpeg.probe(job.path)
            seconds = min(info.duration - job.start, job.seconds or ffmpeg.LONGEST)
            if not info.has_audio:
                return "no sound track", "only a picture"
            if seconds < SHORTEST:
                return (
                    "too short",
                    f"{max(seconds, 0):.2f} s from {job.start:g} s on; {SHORTEST:g} are needed",
                )
            wav = ffmpeg.read_audio(job.path, job.start, seconds)
            peak = float(max(wav.max(), -wav.min()))
            if not peak > SILENT:
                return (
                    "silent",
                    f"its sound never rises above {20 * math.log10(max(peak, 1e-9)):.0f} dBFS",
                )
            wav *= 32767  # in place, as of a film all this is large
            sound, bounds, frames = wav.round(out=wav).astype("<i2").tobytes(), [0], bytearray()
            del wav
            for jpeg in encode_jpegs(
                ffmpeg.pictures(job.path, fps, size, job.start, seconds), size
            ):
                frames += jpeg
                bounds.append(len(frames))
        except MediaError as error:
            return "undecodable", str(error).removeprefix(f"{job.path}: ")
        except (
            Exception
        ) as error:  # nothing that a damaged file makes a library raise may stop the others
            return "undecodable", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if len(frames) >= 2**32:
        return "too long", f"{len(frames) / 1e9:.1f} GB of frames; cut it"
    columns = {"bounds": np.array(bounds, "<u4").tobytes(), "frames": frames, "sound": sound}
    return columns, [
        str(warning.message) for warning in said if issubclass(warning.category, UserWarning)
    ]


def settle_worker():
    """One thread; Ctrl-C is the parent's to answer; and when that has died, nobody waits for us."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # FFmpeg's decoders go by it, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def encoded(jobs, fps, size, workers):
    """(job, `encode_clip` of it), in order, from `workers` processes that stay at most a few clips ahead. A file that kills
    its process is left out: which of those under way it was, is found by doing them again, one alone at a time."""
    jobs, ahead, pool = deque(jobs), deque(), None
    try:
        while jobs or ahead:
            try:
                pool = pool or ProcessPoolExecutor(max(1, workers), initializer=settle_worker)
                while jobs and len(ahead) <= 2 * workers:
                    ahead.append((jobs[0], pool.submit(encode_clip, jobs[0], fps, size)))
                    jobs.popleft()
                job, future = ahead[0]
                result = future.result()
            except BrokenProcessPool:
                pool = pool.shutdown()
                jobs.extendleft(job for job, _ in reversed(ahead))
                ahead = deque([(jobs.popleft(), None)])
                job, result = ahead[0][0], ("undecodable", "the decoder died of it")
                with (
                    ProcessPoolExecutor(1, initializer=settle_worker) as alone,
                    suppress(BrokenProcessPool),
                ):
                    result = alone.submit(encode_clip, job, fps, size).result()
            ahead.popleft()
            yield job, result
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def prepare(raw, out, fps=15.625, size=64, workers=1, table=None):
    """Folder of videos to a set in OUT, the same bytes for any number of workers; what is there already stays, files that
    were left out are tried again. -> Report"""
    jobs, left_out, missing = find_jobs(raw, table)
    about = {
        "columns": ["bounds", "frames", "sound"],
        "fps": fps,
        "size": size,
        "labels": table is not None,
    }
    with Writer(out, about) as writer:
        todo = [job for job in jobs if job.name not in writer.names]
        before = len(writer.names)
        with tqdm(
            total=len(jobs),
            initial=len(jobs) - len(todo),
            desc="prepare",
            unit="clip",
            disable=not todo,
        ) as bar:
            for job, result in encoded(todo, fps, size, workers):
                columns, found = result
                if isinstance(columns, dict):
                    writer.add(job.name, job.label, job.split, columns)
                    for line in found:
                        bar.write(f"data.py: {line}", file=sys.stderr)
                else:
                    left_out.append((job.name, columns, found))
                bar.update()
        with (
            atomic_write(writer.root / "left_out.csv") as part,
            open(part, "w", newline="", **AS_NAMES) as file,
        ):
            csv.writer(file).writerows([("name", "reason", "found"), *sorted(left_out)])
        if not writer.names:
            raise MediaError(f"{raw}: no usable clip: {counted(left_out, out)}")
        writer.finish(SPLITS if table is None else ("val",))
        return Report(len(writer.names), len(writer.names) - before, left_out, missing)


def counted(left_out, out):
    """One line about what was left out."""
    reasons = Counter(reason for _, reason, _ in left_out)
    return (
        f"left out {len(left_out)} files ("
        + ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        + f"), each with its reason in {Path(out) / 'left_out.csv'}"
    )


def prepared(root, fps=15.625, size=64, cache=Path("runs") / "prepared"):
    """The set to read for a --data folder: itself if it is one; a plain folder of videos is prepared under `cache`, once, and
    later only what is new in it."""
    root = Path(root)
    if (root / "set.json").is_file():
        return root
    if not root.is_dir():
        raise MediaError(f"{root}: no such folder; give a prepared set or a folder of videos")
    place = root.resolve()
    out = (
        Path(cache)
        / f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}-{fps:g}fps-{size}px"
    )
    print(
        f"{root}: videos; kept ready to read, at {fps:g} frames a second and {size} pixels, in {out}",
        file=sys.stderr,
    )
    report = prepare(root, out, fps, size, os.cpu_count())
    if report.left_out:
        print(f"{root}: {counted(report.left_out, out)}", file=sys.stderr)
    return out


def read_onsets(video):
    """[{"time", "material", ...}] by time: the labels beside a clip, as foley.py writes them."""
    labels = Path(video).with_suffix(".json")
    try:
        return sorted(
            json.loads(labels.read_text())["onsets"], key=lambda onset: float(onset["time"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "not the labels of foley.py" if labels.is_file() else "no such file"
        raise MediaError(
            f"{labels}: {reason}; make clips and their labels with foley.py"
        ) from error


# ---- what training draws -------------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    """What the readers share: a set, and which of its clips they draw from, as an array of numbers.

    Items are pure functions of (seed, index), where index e * len + i is clip i in epoch e, so runs repeat whatever reads
    them.
    split  "train", "val", "test", or None for all clips"""

    def __init__(self, root, seed, split, column, least, seconds):
        """Of the split's clips, those whose `column` has at least `least` bytes; to a person, that is so many `seconds`."""
        self.set, self.seed, self.split, self.needs = (
            Set(root),
            seed,
            split,
            f"shorter than {seconds:.2f} s",
        )
        if column not in self.set.about["columns"]:
            made = " and ".join(self.set.about["columns"])
            give = (
                "what python cavp.py --extract wrote"
                if column == "features"
                else "a prepared set or a folder of videos"
            )
            raise MediaError(f"{root}: holds {made}, not {column}; give {give}")
        index = self.set.index
        inside = (
            np.ones(len(index), bool) if split is None else index["split"] == SPLITS.index(split)
        )
        long = index[column][:, 1] >= least
        self.clips, self.short = (np.flatnonzero(inside & choice) for choice in (long, ~long))
        if not inside.any():
            raise MediaError(
                f"{root}: no clip of its {len(index)} is for {split}; give three or more, and each split has one"
            )
        if not len(self.clips):
            of = f" for {split}" if split else ""
            raise MediaError(f"{root}: no clip of at least {seconds:.2f} s{of}; give longer clips")
        if len(self.short):
            warnings.warn(
                f"{root}: {len(self.short)} of {inside.sum()} clips are {self.needs} and left out",
                stacklevel=3,
            )

    @property
    def left_out(self):
        """[(name, reason)] of the files that the set could not take and of the clips that are too short here."""
        return self.set.left_out() + [
            (self.set.text(clip, "name"), self.needs) for clip in self.short
        ]

    def about(self, index):
        """Name, label and split of an item's clip."""
        clip = self.clips[index % len(self.clips)]
        return (
            self.set.text(clip, "name"),
            self.set.text(clip, "label"),
            SPLITS[self.set.index[clip]["split"]],
        )

    def __len__(self):
        return len(self.clips)


def padded(array, n, repeat=False):
    """The first axis filled up to n: with silence, or with its last entry again."""
    array = torch.from_numpy(array)
    rest = array[-1:] if repeat else array.new_zeros(1)
    return (
        torch.cat([array, rest.expand(n - len(array), *array.shape[1:])])
        if len(array) < n
        else array
    )


class Clips(Windows):
    """Windows of `frames` pictures and the sound that starts with the first of them.

    item  {"video": uint8 (frames, 3, size, size), "wav": float32 (round(16000 * frames / fps),), "name", "start": s} and
          "label" where the set has labels
    random_start draws the first frame and leaves out clips that are too short; otherwise windows start at 0 and short clips
    end in their last picture and in silence. `frames` None: whole clips."""

    def __init__(self, root, fps, size, frames=None, seed=0, random_start=True, split=None):
        self.fps, self.frames, self.random_start = fps, frames, random_start and frames is not None
        least = frames if self.random_start else 1
        super().__init__(root, seed, split, "bounds", 4 * (least + 1), least / fps)
        made = self.set.about
        if (made["fps"], made["size"]) != (fps, size):
            raise MediaError(
                f"{root}: prepared at {made['fps']:g} fps and {made['size']} pixels; make one with "
                f"python data.py prepare VIDEOS OUT --fps {fps:g} --size {size}"
            )

    def __getitem__(self, index):
        clip = self.clips[index % len(self.clips)]
        there = int(self.set.index[clip]["bounds"][1]) // 4 - 1
        frames, first = self.frames or there, 0
        if self.random_start:
            first = int(np.random.default_rng([self.seed, index]).integers(there - frames + 1))
        start, n = first / self.fps, round(frames / self.fps * SAMPLE_RATE)
        sound = self.set.column(clip, "sound", "<i2", round(start * SAMPLE_RATE), n)
        item = {
            "video": padded(
                self.set.frames(clip, first, frames), frames, repeat=True
            ),  # (f, 3, h, w)
            "wav": padded(sound.astype(np.float32) / 32767, n),  # (n,)
            "name": self.set.text(clip, "name"),
            "start": start,
        }
        return {**item, "label": self.set.text(clip, "label")} if self.set.about["labels"] else item


class Sounds(Windows):
    """Windows of the sound alone, whatever else the set holds, for the autoencoder: {"wav": float32 (samples,)}, starting on
    a mel column."""

    def __init__(self, root, samples, seed=0, split=None):
        self.columns = samples // HOP
        super().__init__(root, seed, split, "sound", 2 * self.columns * HOP, samples / SAMPLE_RATE)

    def __getitem__(self, index):
        clip = self.clips[index % len(self.clips)]
        there = int(self.set.index[clip]["sound"][1]) // (2 * HOP)
        first = int(np.random.default_rng([self.seed, index]).integers(there - self.columns + 1))
        sound = self.set.column(clip, "sound", "<i2", first * HOP, self.columns * HOP)
        return {"wav": torch.from_numpy(sound.astype(np.float32) / 32767)}


class Pairs(Windows):
    """Features and sound of one model window, for stage 2, from the set that `cavp.py --extract` wrote.

    item  {"features": float32 (frames, 512), "wav": float32 (WINDOW,)}
    merge  share of the items that are two clips of the split joined in time (split-and-merge augmentation of stage 2), with
           the sound cut at the sample where the second one's first frame starts (officially up to 0.25 s beside it)
    roll   share of the items whose features and sound are rotated in time by the same amount
    A clip shorter than the window ends in its last feature and in silence."""

    def __init__(self, root, fps, frames, merge=0.0, roll=0.0, seed=0, split=None):
        self.fps, self.frames, self.merge, self.roll = fps, frames, merge, roll
        super().__init__(root, seed, split, "features", 1, 1 / fps)
        if self.set.about["fps"] != fps:
            raise MediaError(
                f"{root}: features at {self.set.about['fps']:g} a second, the model needs {fps:g}; "
                "extract them with a CAVP of the same preset"
            )

    def cut(self, clip, draw, frames, samples):
        """`frames` features and `samples` of sound from a random place of a clip."""
        width = self.set.about["width"]
        there = int(self.set.index[clip]["features"][1]) // (2 * width)
        first = int(draw.integers(max(0, there - frames) + 1))
        features = self.set.column(clip, "features", "<f2", first * width, frames * width).reshape(
            -1, width
        )  # (f, 512)
        sound = self.set.column(
            clip, "sound", "<i2", round(first / self.fps * SAMPLE_RATE), samples
        )
        return (
            padded(features.astype(np.float32), frames, repeat=True),
            padded(sound.astype(np.float32) / 32767, samples),
        )

    def __getitem__(self, index):
        draw = np.random.default_rng([self.seed, index])
        clip = self.clips[index % len(self.clips)]
        if draw.random() < self.merge:
            n = int(draw.integers(self.frames // 4, self.frames * 3 // 4 + 1))
            m = round(n / self.fps * SAMPLE_RATE)
            other = self.clips[int(draw.integers(len(self.clips)))]
            parts = [self.cut(clip, draw, n, m), self.cut(other, draw, self.frames - n, WINDOW - m)]
            features, wav = (torch.cat(part) for part in zip(*parts))
        else:
            features, wav = self.cut(clip, draw, self.frames, WINDOW)
        if draw.random() < self.roll:
            n = int(draw.integers(self.frames))
            features, wav = features.roll(n, 0), wav.roll(round(n / self.fps * SAMPLE_RATE))
        return {"features": features, "wav": wav}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="prepare")
    p = commands.add_parser(
        "prepare",
        help="folder of videos to a compact training set",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("raw", type=Path, help="folder of videos")
    p.add_argument("out", type=Path, help="folder of the set; one that is there is gone on with")
    p.add_argument(
        "--csv",
        type=Path,
        help="rows `id,start,label,train|test`, as VGGSound's: clips, labels and splits",
    )
    p.add_argument(
        "--fps", type=float, default=15.625, help="frames a second: one to 4 mel columns (paper: 4)"
    )
    p.add_argument(
        "--size",
        type=int,
        default=64,
        help="side of the square frames in pixels (mini: 64, paper: 224)",
    )
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    args = parser.parse_args()
    if not (0 < args.fps <= 240 and 1 <= args.size <= 4096 and args.workers >= 1):
        parser.error("--fps must be in (0, 240], --size in [1, 4096], --workers at least 1")
    try:
        report = prepare(args.raw, args.out, args.fps, args.size, args.workers, args.csv)
    except MediaError as error:
        sys.exit(print(error, file=sys.stderr) or 1)
    except KeyboardInterrupt:
        sys.exit(
            print(
                f"{args.out}: interrupted; the same command goes on where it stopped",
                file=sys.stderr,
            )
            or 130
        )
    print(
        f"{args.out}: {report.clips} clips, {report.new} of them new"
        + (f"; {report.missing} rows of {args.csv} have no file" if report.missing else "")
    )
    if report.left_out:
        print(counted(report.left_out, args.out), file=sys.stderr)
    sys.exit(1 if report.left_out else 0)


if __name__ == "__main__":
    main()
