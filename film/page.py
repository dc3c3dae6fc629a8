"""A page to pick by ear: `sample.py --page` writes OUT/index.html, which a browser shows from disk.

in   what sample.py prints of each input with --json, and the files that this names
out  index.html: for every input its picture with each of its sounds, frames, hits, spectrograms and
     scores on one time axis; or why there is none

The page refers to pictures and sounds by relative links and holds all else itself (page.html with
player.js and hits.js), so that it moves with its folder and needs no network. Hits can be corrected
there, and saved as a file for --onsets.
"""

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
import urllib.parse
from itertools import count, zip_longest
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch

import foley
from common import distributed, media, plots
from common.audio import COLUMN, HOP, SAMPLE_RATE, mel
from common.files import UserError, write_bytes
from common.onsets import read_hits
from film.jobs import onsets_file

FOLDER = Path(__file__).parent
GENERATOR = b'<meta name="generator" content="diff-foley-compact'  # which our pages begin with
FRAME = 128  # pixels: side of a frame in the strip
STRIP = 16  # by how much the strip is wider than high, nearly: so many square frames
MOST_FRAMES = 24
COLUMNS = 4000  # of a spectrogram at most
SPAN = 60  # seconds of sound transformed at once
# of a hit the page offers those that the shipped model knows
MATERIALS = [name for name in foley.MATERIALS if name not in foley.OTHER]


def fill(template, content):
    """A page as bytes: a template of this folder with style, player and `content` in it."""
    # nothing in the data, such as a name, can end the script that holds it
    text = json.dumps(content).replace("<", "\\u003c")
    page = (FOLDER / template).read_text(encoding="utf-8")
    # the data last: nothing in it is replaced
    parts = {"style": "style.css", "player": "player.js", "hits": "hits.js"}
    for name, file in parts.items():
        page = page.replace(f"{{{{{name}}}}}", (FOLDER / file).read_text(encoding="utf-8"))
    return page.replace("{{data}}", text).encode()


def link(path, folder):
    """A file as a URL relative to the folder, whatever its name."""
    relative = os.path.relpath(Path(path).absolute(), Path(folder).absolute())
    return urllib.parse.quote(os.fsencode(Path(relative).as_posix()))


def data_url(kind, content):
    """The bytes of a picture as a URL that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def strip(source, start, seconds, aspect):
    """-> a jpeg of frames side by side, spread evenly, and their number.

    As many as fill a line. Each is squeezed into a square, which the page undoes.
    """
    count = min(max(round(STRIP / aspect), 4), MOST_FRAMES)
    frames = []
    for k in range(count):
        middle = start + (k + 0.5) * seconds / count
        frames.append(media.read_frames(source, 1, FRAME, middle, 1e-3)[0])
    return media.jpeg(torch.cat(frames, 2).permute(1, 2, 0)), count


def read_sound(path, start, seconds):
    """`media.read_audio`, of our own wav files without FFmpeg, which takes much longer for them."""
    if path.suffix == ".wav":
        with contextlib.suppress(soundfile.LibsndfileError):
            wav, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
            if rate == SAMPLE_RATE:
                wav = torch.from_numpy(wav).mean(1)
                return wav[round(start * rate) : round((start + seconds) * rate)]
    return media.read_audio(path, start, seconds)


def spectrogram(path, start, seconds):
    """The mel of a sound (128, at most COLUMNS): of each pixel's columns the loudest."""
    pooled = math.ceil(seconds * SAMPLE_RATE / HOP / COLUMNS)  # columns of a pixel
    wav = read_sound(path, start, seconds)
    # a span at a time: the transform takes several times the memory of the sound
    span = max(1, SPAN * SAMPLE_RATE // HOP // pooled) * pooled * HOP
    parts = []
    for part in wav.split(span):
        parts.append(torch.nn.functional.max_pool1d(mel(part), pooled, ceil_mode=True))
    return torch.cat(parts, 1)


def candidates_of(line, target):
    """[(file, score)] of the candidates that lie beside an output, in order; [] for one alone.

    line: what --json prints of the input. An output that was made earlier may have a line without
    them: then they are the files that are there.
    """
    if "candidates" in line or not line.get("kept"):
        return [(Path(one["wav"]), one["score"]) for one in line.get("candidates", ())]
    pattern = re.compile(re.escape(target.name) + r"\.(\d+)\.wav")
    found = [pattern.fullmatch(path.name) for path in target.parent.iterdir()]
    numbers = sorted(int(match[1]) for match in found if match)
    return [(target.with_name(f"{target.name}.{k}.wav"), None) for k in numbers]


def sounds_of(line, target, start):
    """[{"name", "path", "score", "offset"}] of an input: what was made, the mix, its own sound.

    offset: the second of the file at which the picture starts.
    """
    made = Path(line.get("wav") or line["output"])
    listed = [("foley", made, line.get("score"), 0)]
    candidates = candidates_of(line, target)
    if len(candidates) > 1:
        listed = []
        for path, score in candidates:
            number = path.name.removeprefix(f"{target.name}.").partition(".")[0]
            listed.append((f"candidate {number}", path, score, 0))
    # of --stems, written with it; not what an earlier run left there
    source = Path(line["input"])
    own = ("original", source, None, start) if media.probe(source).has_audio else None
    for name in ("mix", "own"):
        path = Path(f"{str(target).removesuffix('.foley')}.{name}.wav")
        if path.is_file() and abs(path.stat().st_mtime - made.stat().st_mtime) < 60:
            if name == "own":
                own = ("original", path, None, 0)
            else:
                listed.append((name, path, None, 0))
    if own:
        listed.append(own)
    return [dict(zip(("name", "path", "score", "offset"), one, strict=True)) for one in listed]


def earlier_hits(target):
    """The hits of NAME.onsets.txt with the model's guesses, where it is there and can be read."""
    with contextlib.suppress(UserError):
        if onsets_file(target).is_file():
            return read_hits(onsets_file(target), foley.MATERIALS, with_guesses=True)
    return []


def download_name(target):
    """NAME.onsets.txt, without what browsers replace in the name of a file that they save."""
    name = onsets_file(target).name
    safe = [c if c.isprintable() and c not in '"*/:<>?\\|~%' else "_" for c in name]
    # a file that begins with a dot is hidden, and a space there is replaced, too
    return re.sub(r"^[. ]", "_", "".join(safe))


def tell_apart(inputs):
    """Gives inputs whose hits would be saved under one name, from different folders, names of their
    own: NAME.onsets.txt, NAME.2.onsets.txt."""
    taken = set()
    for one in inputs:
        if "error" in one:
            continue
        stem = one["hits_file"].removesuffix(".onsets.txt")
        numbers = count(2)
        # some systems do not tell capitals apart
        while one["hits_file"].casefold() in taken:
            one["hits_file"] = f"{stem}.{next(numbers)}.onsets.txt"
        taken.add(one["hits_file"].casefold())


class Cut(NamedTuple):
    """The part of a video for which a sound is made."""

    start: float
    duration: float | None = None  # None: up to the end


def cut_of(job, args):
    """The cut of the outputs that are there and stay, or else of those that are drawn.

    The two differ where a run keeps outputs whatever its settings.
    """
    settings = vars(args)
    if job.line is not None and job.record:
        settings = settings | job.record["settings"]
    return Cut(settings["start"], settings["duration"])


def command_of(source, hits_file, out, cut):
    """The command, quoted for a shell, by which the hits that the page saves are played.

    It makes the same part of the video, into the same folder.
    """
    flags = {"--onsets": hits_file}
    if out:
        flags["--out"] = out
    if cut.start:
        flags["--start"] = cut.start
    if cut.duration is not None:
        flags["--duration"] = cut.duration
    words = ["python", "sample.py", path_word(source)]
    for flag, value in flags.items():
        words += [flag, path_word(value)]
    return shlex.join(words)


def path_word(path):
    """A path as an argument: one that begins with a dash would be taken for a flag."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def card(line, target, result, folder, start):
    """What the page knows of one input.

    line: as --json prints it; result: its Result, or None for an output that was made earlier;
    start: the second of the input at which its sounds begin.
    """
    source = Path(line["input"])
    shape = media.probe(source)
    aspect = shape.width / shape.height
    seconds = line.get("seconds") or shape.duration - start
    # without a video of ours, as of --format wav, the source's own picture is shown
    picture = {"url": link(line["output"], folder), "offset": 0}
    if Path(line["output"]).suffix.lower() in media.SOUND_SUFFIXES:
        picture = {"url": link(source, folder), "offset": start}
    jpeg, frames = strip(source, start, seconds, aspect)
    hits = result.hits if result else earlier_hits(target)

    sounds = []
    for sound in sounds_of(line, target, start):
        mel = spectrogram(sound["path"], sound["offset"], seconds)
        sounds.append(
            {
                "name": sound["name"],
                "file": sound["path"].name,
                "url": link(sound["path"], folder),
                "offset": sound["offset"],
                "score": sound["score"],
                "spectrogram": data_url("png", plots.mel_png(mel)),
            }
        )
    # the candidate that the classifier ranked first
    scores = [sound["score"] for sound in sounds if sound["score"] is not None]
    ranked = len(scores) > 1
    for sound in sounds:
        sound["first"] = ranked and sound["score"] == max(scores)
    content = {
        "input": str(source),
        "name": source.name,
        "seconds": seconds,
        "aspect": aspect,
        "picture": picture,
        "strip": data_url("jpeg", jpeg),
        "frames": frames,
        "start": start,
        # fields of Hit, with times from where the picture begins
        "hits": [[round(hit.time - start, 6), *hit[1:]] for hit in hits],
        "hits_file": download_name(target),
        "sounds": sounds,
    }
    # other sounds are other clips: what was picked of these is not picked of those
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return content | {"id": digest[:16]}


def is_foreign(path):
    """Whether something is there that is no page of ours."""
    try:
        return GENERATOR not in path.read_bytes()[:1000]
    except FileNotFoundError:
        return False
    except OSError:  # a folder, or what we may not read
        return True


def read_cards(path):
    """{input: what a page of ours holds of it}; none of a page that is missing or unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
        found = re.search(r'<script[^>]*id="?data"?[^>]*>(.*?)</script>', text, re.DOTALL)
        inputs = json.loads(found[1])["inputs"] if found else []
        return {one["input"]: one for one in inputs if "sounds" in one}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def looks(content):
    """What tells the sounds of one input from others: their files and how they look."""
    return [(sound.get("file"), sound.get("spectrogram")) for sound in content["sounds"]]


class Page:
    """The page of one run, in the folder of its first output: `add` every input, then `write`.

    Raises ValueError, before any work, where a page that is not ours has its place. Without --page
    it does nothing.
    """

    def __init__(self, args, jobs):
        self.wanted = args.page
        self.out = args.out
        self.cuts = {job.target: cut_of(job, args) for job in jobs if args.page}
        self.quiet = args.json
        self.inputs = []
        # the first of several processes writes for all
        alone = distributed.world() == 1
        if args.page and alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("page: the processes must be able to meet; start them with torchrun")
        folders = [job.target.parent for job in jobs if job.target]
        self.folder = args.out or next(iter(folders), Path())
        self.path = self.folder / "index.html"
        if self.wanted and is_foreign(self.path):
            raise ValueError(f"page: {self.path} is there and not of ours; move it, or give --out")
        self.earlier = read_cards(self.path) if self.wanted else {}

    def add(self, line, target, result=None):
        """One input: its line of --json, its output without suffix, and what was drawn for it."""
        if not self.wanted:
            return
        # a result may be of an input before
        if result is not None and str(getattr(result, "source", None)) != line["input"]:
            result = None
        name = Path(line["input"]).name
        if "error" not in line:
            try:
                cut = self.cuts[target]
                made = card(line, target, result, self.folder, cut.start)
                before = self.earlier.get(line["input"])
                # of sounds that stay only the earlier page knows hits and scores; with them stays
                # the id under which the browser holds what was picked and edited. A page of an
                # earlier version lacks some fields
                if result is None and before and looks(before) == looks(made):
                    made |= before
                self.inputs.append(made | {"cut": cut})
                return
            # such as a sound that somebody deleted in between
            except UserError as error:
                line = {"error": str(error)}
        self.inputs.append({"name": name, "error": line["error"]})

    def write(self):
        """Writes the page, whole or not at all. -> whether all went well, which is printed."""
        if not self.wanted:
            return True
        # of all processes, in order: each has every n-th input
        parts = distributed.all_gather_object(self.inputs)
        inputs = [one for several in zip_longest(*parts) for one in several if one is not None]
        if distributed.rank() > 0:
            return True
        tell_apart(inputs)
        for one in inputs:
            if "error" not in one:
                cut = one.pop("cut")
                one["command"] = command_of(one["input"], one["hits_file"], self.out, cut)
        try:
            content = {"inputs": inputs, "materials": MATERIALS, "column": COLUMN}
            write_bytes(self.path, fill("page.html", content))
        except UserError as error:
            print(f"sample.py: {error}", file=sys.stderr)
            return False
        if not self.quiet:
            print(f"{self.path}  open it in a browser")
        return True
