"""manifest.jsonl: what was made of what and how, so that a finished output is not drawn again.

in   outputs that have just been written, and what they were made of: input, weights, settings
out  one line of JSON for each in the manifest.jsonl of their folder, and whether an earlier line
     still holds

    {"target": "clip.foley", "paths": {"output": "clip.foley.mp4", "wav": "clip.foley.wav"},
     "result": {"seconds": 8.0, "windows": 1, "seed": 0, "score": -0.1},
     "files": {"clip.foley.mp4": {"size": ..., "mtime_ns": ..., "sha256": ...}, ...},
     "candidates": [{"wav": "clip.foley.0.wav", "score": -0.1}, ...],
     "input": {"path": "clip.mp4", "size": ..., "mtime_ns": ..., "sha256": ...},
     "weights": {"name": "mini", "folder": ..., "files": {"ldm.safetensors": {...}, ...}},
     "settings": {"seed": 0, "cfg": 2.5, ...}, "left_open": ["cfg", "cg", "onsets"],
     "device": "cpu", "dtype": "float32", "version": "0.2", "date": "2026-11-27T08:00:00Z"}

Of several lines with one target the last holds. Paths are relative to the manifest where they lie
below its folder. `settings` has every argument that changes what is written, hits of a file one by
one; those in `left_open` were not given but chosen by the weights. `candidates` are the sounds that
--keep-all wrote, with their scores; `picked` is the one among them that --pick took. A line with
"replacing": true says that outputs are about to be written: after a crash nobody knows which are
there; with false that writing them failed and none are.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from common.files import FileError, UserError, sha256
from common.onsets import read_hits
from compat import hub
from film.provenance import VERSION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "manifest.jsonl"
# arguments that change nothing in the files of one output; all others count, new ones too
IRRELEVANT = {
    *("inputs", "out", "overwrite", "verify", "pick", "page", "signer"),
    *("weights",),  # their sums are compared instead
    *("device", "kernels", "batch", "verbose", "json", "profile"),
}

# of --json's line, what is said again of an output that is kept
RESULT = ("seconds", "windows", "seed", "score", "gain", "lufs")


# ---- files ---------------------------------------------------------------------------------------


def stamp(path: Path) -> dict:
    """Size and time of change: a file in which both are as before is taken to be the same."""
    try:
        stat = path.stat()
    except OSError:
        return {"size": None, "mtime_ns": None}  # as no file's
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def fingerprint(path: Path, before: dict | None = None, known: dict | None = None) -> dict:
    """{"size", "mtime_ns", "sha256"} of a file.

    before: its stamp at an earlier time; if it changed since, the sum is None. known: an earlier
    fingerprint of this file, which holds as long as its stamp does.
    """
    before = before or stamp(path)
    if known and known["sha256"] and all(known[name] == before[name] for name in before):
        return {**before, "sha256": known["sha256"]}
    digest = None
    with suppress(OSError):
        digest = sha256(path)
    return {**before, "sha256": digest if stamp(path) == before else None}


def is_same(path: Path, entry: dict) -> bool:
    """Whether a file is what `fingerprint` found. It is read only where its time alone differs."""
    now = stamp(path)
    if now["size"] != entry["size"] or entry["sha256"] is None:
        return False
    return now["mtime_ns"] == entry["mtime_ns"] or fingerprint(path)["sha256"] == entry["sha256"]


class Weights:
    """The checkpoints of --weights, and their sums, which are computed where they are needed."""

    def __init__(self, weights: str):
        paths = hub.find_weights(weights).values()
        # stamps from before they are loaded: a training may replace them at any time
        self.stamps = {path: stamp(path) for path in paths if path is not None}
        self.folder = str(next(iter(self.stamps)).parent.resolve())
        self.known = {}
        self.found = {}

    def learn(self, records):
        """Take over the sums that a manifest has of these very files."""
        for record in records:
            if record["weights"]["folder"] == self.folder:
                self.known.update(record["weights"]["files"])

    def sums(self) -> dict:
        """{name: fingerprint}; 4 GB take a few seconds, once."""
        for path, before in self.stamps.items():
            if path.name not in self.found:
                self.found[path.name] = fingerprint(path, before, self.known.get(path.name))
        return self.found

    def take(self, loaded):
        """The sums that were computed while these files were loaded: `provenance.WeightSums`."""
        with suppress(OSError, UserError):
            for name, digest in loaded.result().items():
                path = loaded.paths[name]
                if stamp(path) == self.stamps.get(path):
                    self.found.setdefault(path.name, {**self.stamps[path], "sha256": digest})

    def made(self, record: dict) -> bool:
        """Whether an output was made with these weights, wherever they lay then."""
        then = {name: entry["sha256"] for name, entry in record["weights"]["files"].items()}
        now = {name: entry["sha256"] for name, entry in self.sums().items()}
        return then == now and None not in now.values()


# ---- settings ------------------------------------------------------------------------------------


def plain(value):
    """Paths, tuples and hits as JSON has them."""
    return json.loads(json.dumps(value, default=str))


def asked(args) -> dict:
    """The arguments that change what is written, as given."""
    given = {name: plain(value) for name, value in vars(args).items() if name not in IRRELEVANT}
    # redoing has a sampler of its own, whatever is given
    if given.get("redo"):
        given |= {"sampler": "ddim"}
    return given


def is_off(value):
    return value is None or value is False or value == []


def same_settings(record: dict, args, hits_file: Path | None) -> bool:
    """Whether an output was made with these arguments. What is off need not be known to its line.

    hits_file: the hits that --onsets gives to this input, if it names a file or a folder.
    """
    settings = record["settings"]
    wanted = asked(args)
    for name in settings.keys() | wanted.keys():
        then = settings.get(name)
        now = wanted.get(name)
        # the same weights choose the same again
        if now is None and name in record["left_open"]:
            continue
        # hits are compared one by one: their file may have been edited, or moved
        if name == "onsets" and isinstance(then, list):
            if hits_file is None or said(plain(known_hits(hits_file, then))) != said(then):
                return False
        elif then != now and not (is_off(then) and is_off(now)):
            return False
    return True


def known_hits(path, hits):
    """The hits of a file; None where it cannot be read or has other materials than these hits."""
    with suppress(UserError, TypeError, ValueError):
        return read_hits(path, {hit[2] for hit in hits})


def said(hits):
    """[[time, strength, material, ...]] -> what a person says of them: the first three."""
    return hits and [hit[:3] for hit in hits]


# ---- the manifest --------------------------------------------------------------------------------


def read(folder: Path, verbose: bool = True) -> tuple[dict, dict]:
    """{target: its newest line} of a folder, and {file: [its fingerprint]} of all its lines.

    Both are empty without a manifest. Damaged lines are left out; verbose: and named on stderr.
    """
    path = folder / NAME
    records = {}
    made = {}
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except OSError:
        return records, made
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            check(record)
            records[record["target"]] = record
            for name, entry in record.get("files", {}).items():
                made.setdefault(name, []).append(entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # a crash, or a process that is writing it now, leaves half of the last line
            if verbose and text and number < len(lines):
                print(f"sample.py: {path}: line {number} is damaged, left out", file=sys.stderr)
    return records, made


def check(record):
    """Raises KeyError, TypeError, AttributeError or ValueError for what `add` did not write."""
    {record["target"]: None}  # what cannot be a key is no name
    if "replacing" in record:
        return
    files = [*record["files"].values(), *record["weights"]["files"].values(), record["input"]]
    for entry in files:
        if not isinstance(entry["size"], int) or not isinstance(entry["mtime_ns"], int):
            raise ValueError("no stamp")
        entry["sha256"]
    for name, kind in (("settings", dict), ("left_open", list), ("result", dict), ("paths", dict)):
        if not isinstance(record[name], kind):
            raise TypeError(name)
    record["paths"]["output"]
    record["weights"]["folder"]
    for candidate in record.get("candidates", ()):
        if not isinstance(candidate["wav"], str):
            raise TypeError("candidates")
        candidate["score"]


def append(folder: Path, record: dict):
    """Add a line, on disk when this returns, whoever else adds some. Raises FileError."""
    path = folder / NAME
    text = json.dumps({**record, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}) + "\n"
    try:
        with open(path, "ab+", buffering=0) as file:
            # released when the file is closed; some network drives have no locks
            if fcntl:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            # half a line, which a crash left, ends here
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            if file.write(text.encode()) < len(text):
                raise OSError(28, "No space left on device")
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from None


def can_write(folder: Path) -> bool:
    """Whether outputs and their manifest can be written there."""
    path = folder / NAME
    usable = not path.exists() or (path.is_file() and os.access(path, os.W_OK))
    return os.access(folder, os.W_OK | os.X_OK) and usable


def relative(path: Path | str, folder: Path) -> str:
    """The path within the folder, or else the whole path."""
    path = Path(path).resolve()
    folder = folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def add(job, line: dict, written: list, args, settings, models):
    """Append the line of an output that has just been written.

    line: --json's of it; written: its files; settings: resolved. Raises FileError.
    """
    folder = job.target.parent
    # the arguments as given, then what the weights chose where they were left open
    given = asked(args)
    used = {**given, **plain(asdict(settings))}
    onsets = plain(settings.onsets if job.hits is None else job.hits)
    used["onsets"] = said(onsets) if isinstance(onsets, list) else onsets
    del used["batch"]
    paths = [str(path) for path in sorted(written)]
    source = {"path": relative(job.given, folder), **fingerprint(job.given, job.stamp)}
    # an output that was redone in its place still stems from the video that it was drawn for
    if job.record and any(Path(path).resolve() == job.given.resolve() for path in paths):
        source = job.record["input"]
    job.weights.take(models.sums)
    weights = {"name": models.name, "folder": job.weights.folder, "files": job.weights.sums()}
    candidates = [
        {"wav": relative(one["wav"], folder), "score": one["score"]}
        for one in line.get("candidates", ())
    ]
    append(
        folder,
        {
            "target": job.target.name,
            "paths": {k: relative(v, folder) for k, v in line.items() if v in paths},
            "result": {k: line[k] for k in RESULT if k in line},
            "files": {relative(path, folder): fingerprint(Path(path)) for path in paths},
            "candidates": candidates,
            "input": source,
            "weights": weights,
            "settings": used,
            "left_open": [k for k in used if given.get(k) is None and used[k] is not None],
            "device": models.device,
            "dtype": str(next(models.ldm.parameters()).dtype).removeprefix("torch."),
            "version": VERSION,
        },
    )
