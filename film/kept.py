"""Windows of a long film on disk, so that a run that was stopped goes on where it was.

in   a file of an earlier run beside the output, and what its windows depend on
out  the latents and scores of the windows that are done; every further one is appended

The file begins with a line of JSON: its version, and the sum of all that a window depends on (the
video, the weights, the settings, the hits, torch's version, the device). Records of fixed size
follow, each with a sum of its own: candidate and start sample, score, latents (4, 16, 64) as plain
float32. A record that a kill cut off is drawn again. Nothing is unpickled.
"""

import contextlib
import hashlib
import json
import os
import struct
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ldm import LATENT_SHAPE

VERSION = 1
LEAST = 5  # windows: a shorter clip is soon drawn again
NUMBERS = struct.Struct("<iqd")  # candidate, start sample, score
SIZE = NUMBERS.size + 4 * int(np.prod(LATENT_SHAPE)) + 4  # bytes of a record, its sum among them
# settings that no window depends on
OTHERS = ("candidates", "keep_all", "batch", "keep_audio", "as_official", "onsets")
OTHERS += ("lufs", "duck", "rate", "layout")  # these make other files of the same windows


def windows_file(target: Path | str) -> Path:
    """The hidden file of the output NAME.foley: .NAME.foley.windows beside it."""
    target = Path(target)
    return target.with_name(f".{target.name}.windows")


def signature(clip, models, settings) -> str:
    """SHA-256 of all that a clip's windows depend on."""

    def seen(path):
        stat = Path(path).stat()
        return [str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns]

    depends = {
        "source": seen(clip.source),
        "weights": [seen(path) for path in models.sums.paths.values()],
        "settings": {k: v for k, v in asdict(settings).items() if k not in OTHERS},
        # those that were given or found, whoever did
        "hits": [hit._asdict() for hit in clip.hits],
        "finder": str(settings.onsets) if not isinstance(settings.onsets, tuple) else "hits",
        "clip": [clip.start, clip.seconds, list(clip.starts)],
        "computed": [torch.__version__, models.device, str(next(models.ldm.parameters()).dtype)],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def header(key: str) -> bytes:
    return json.dumps({"diff-foley windows": VERSION, "sum": key}).encode() + b"\n"


def read_records(content: bytes, first: bytes):
    """[(candidate, start, score, latents)] of whole records, and whether one of them is damaged.

    What follows a damaged one is not read. Sums count on from that of the header `first`: another
    run at the same time, with other settings, may have appended here.
    """
    begin = zlib.crc32(first)
    records = []
    for at in range(0, len(content) - SIZE + 1, SIZE):
        record = content[at : at + SIZE]
        if zlib.crc32(record[:-4], begin) != int.from_bytes(record[-4:], "little"):
            return records, True
        candidate, start, score = NUMBERS.unpack_from(record)
        latents = np.frombuffer(record[NUMBERS.size : -4], "<f4").reshape(LATENT_SHAPE)
        records.append((candidate, start, score, torch.from_numpy(latents.copy())))
    return records, False


class Kept:
    """The file to which a clip's windows are appended as they are drawn."""

    def __init__(self, path: Path, first: bytes, size: int):
        """size: bytes of `path` that are good; what follows them goes. 0: begin with `first`."""
        self.path = path
        self.begin = zlib.crc32(first)
        with open(path, "r+b" if size else "wb") as file:
            file.truncate(size)
            if not size:
                file.write(first)

    def add(self, candidate: int, start: int, score, latents):
        """Append a window; score: a number, or None. A full disk ends the keeping with a line."""
        if self.path is None or not latents.isfinite().all():
            return
        score = float("nan") if score is None else float(score)
        record = NUMBERS.pack(candidate, start, score)
        record += latents.numpy().astype("<f4").tobytes()
        record += zlib.crc32(record, self.begin).to_bytes(4, "little")
        try:
            # in one piece and at once, so that a kill costs at most this window
            with open(self.path, "ab", buffering=0) as file:
                if file.write(record) < SIZE:
                    raise OSError("no space left")
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(
                f"{self.path}: finished windows cannot be kept ({reason}); a run that is stopped "
                "begins anew",
                stacklevel=2,
            )
            self.path = None


def go_on(clip, path: Path | str, models, settings):
    """Sets what an earlier run has drawn of this clip, and where the rest is kept.

    Only of long clips, of models that were read from files, and not where parts of the sound are
    known already. Another signature replaces the file; a damaged part is drawn anew, with a line.
    """
    if len(clip.starts) < LEAST or not models.sums.paths or clip.known:
        return
    path = Path(path)
    first = header(signature(clip, models, settings))
    try:
        content = path.read_bytes() if path.exists() else b""
        same = content.startswith(first)
        records, damaged = read_records(content[len(first) :], first) if same else ((), False)
        size = len(first) + SIZE * len(records) if same else 0
        clip.keeper = Kept(path, first, size)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(
            f"{clip.source}: finished windows cannot be kept in {path.parent} ({reason}); a run "
            "that is stopped begins anew",
            stacklevel=2,
        )
        return
    for candidate, start, score, latents in records:
        if candidate < settings.candidates and start in clip.needs:
            clip.latents[candidate, start] = latents
            if not np.isnan(score):
                clip.scores[candidate, start] = torch.tensor(score, dtype=torch.float32)
    total = len(clip.starts) * settings.candidates
    if damaged:
        warnings.warn(f"{clip.source}: {path}: damaged; a part of it is drawn anew", stacklevel=2)
    elif content and not same:
        warnings.warn(
            f"{clip.source}: {path}: of other settings, weights or another video, or damaged; all "
            f"{total} windows are drawn anew",
            stacklevel=2,
        )
    if clip.latents:
        warnings.warn(
            f"{clip.source}: goes on after {len(clip.latents)} of {total} windows, which an "
            "earlier run has drawn",
            stacklevel=2,
        )


def forget(path: Path | str):
    """Delete the file: its output is written."""
    with contextlib.suppress(OSError):
        os.unlink(path)
