"""Which outputs a call of sample.py is to make, and what it says of each.

in   the command line's inputs: videos, folders, patterns and lists of them; the outputs' manifests
out  a Job for each video, in order: to be drawn, kept as it is, or why there is none

Of several processes (RANK and WORLD_SIZE, as torchrun sets them) each gets every n-th Job.
"""

import glob
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from common import distributed, media
from common.files import UserError, make_folder
from common.media import MediaError
from common.mux import CONTAINERS
from common.onsets import read_hits
from film import manifest
from film.provenance import VERSION
from film.redo import SOUNDS, base_name, described, said


@dataclass
class Job:
    """One video, or an input that gives none."""

    given: Path | str
    target: Path | None = None  # its outputs without their suffix
    line: dict | None = None  # what is said of it where nothing is to be drawn
    count: int = 1  # videos of the whole call
    stamp: dict | None = None  # of the video, before it is read
    hits: list | None = None  # that --onsets gives to it
    record: dict | None = None  # the manifest's line of the outputs that are there
    begun: bool = False  # whether they were being written when a run ended
    weights: manifest.Weights | None = None

    def fail(self, reason):
        self.line = {"input": str(self.given), "error": str(reason)}


def onsets_file(target):
    """NAME.onsets.txt of the output NAME.foley."""
    return Path(f"{str(target).removesuffix('.foley')}.onsets.txt")


def sound_suffix(args):
    """Of the sounds that are written: .wav, or .flac."""
    return ".flac" if args.format == "flac" else ".wav"


def output_file(target, source, args):
    """NAME.foley.mp4 or what else holds the picture; of the sound alone NAME.foley.wav or .flac."""
    if args.format in ("wav", "flac"):
        return Path(f"{target}.{args.format}")
    suffix = f".{args.format}" if args.format else media.output_suffix(source)
    return Path(f"{target}{suffix}")


def stem_file(target, name, suffix=".wav"):
    """NAME.own.wav or NAME.mix.wav beside the output NAME.foley."""
    return Path(f"{str(target).removesuffix('.foley')}.{name}{suffix}")


def foreign_stem(target, suffix):
    """A file that --stems would write over and that is not ours, or None."""
    for name in ("own", "mix"):
        path = stem_file(target, name, suffix)
        if not path.exists():
            continue
        # what cannot be read is somebody's, too
        comment = ""
        with suppress(MediaError):
            comment = media.read_tags(path).get("comment", "")
        if "diff-foley" not in comment:
            return path
    return None


def labels_of(video, folder):
    """The file of a video's hits in the folder that --onsets names."""
    return folder / f"{Path(video).stem}.onsets.txt"


# ---- inputs --------------------------------------------------------------------------------------


def is_video(path):
    """Whether a file counts that was not named itself: as in `media.search`."""
    if ".foley." in path.name or not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in media.VIDEO_SUFFIXES:
        return True
    return suffix not in media.TEXT_SUFFIXES and media.kind_of(path) == "video"


def expand(pattern):
    """The files that fit a pattern, and those in folders that fit it. `**`, once: at any depth.

    Hidden files fit as in a shell. Raises MediaError for a second `**`.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        for path in map(Path, sorted(glob.glob(pattern))):
            yield from media.walk(path) if path.is_dir() else [path]
        return
    place = parts.index("**")
    rest = Path(*parts[place + 1 :])
    if "**" in rest.parts:
        raise MediaError(f"{pattern}: has ** twice; give it once")
    # media.walk, unlike glob, goes through each linked folder once
    for folder in sorted(glob.glob(str(Path(*parts[:place])))):
        for path in media.walk(folder):
            inside = path.relative_to(folder)
            # a file fits as it is, or lies in a folder that fits
            if rest == Path() or any(part.match(str(rest)) for part in (inside, *inside.parents)):
                yield path


def match(pattern):
    """The videos that fit a pattern, ours never. Raises MediaError where nothing does."""
    videos = [path for path in expand(pattern) if is_video(path)]
    if not videos:
        raise MediaError(f"{pattern}: no such file, and as a pattern it fits no video; correct it")
    return videos


def read_list(path):
    """The inputs of a list: a path, folder or pattern a line, from the list's folder on; what
    begins with # is a comment. Raises MediaError."""
    remedy = "give a text file in UTF-8 with one path a line"
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise MediaError(f"{path}: not a text file; {remedy}") from None
    inputs = []
    for line in map(str.strip, lines):
        if "\0" in line:
            raise MediaError(f"{path}: not a text file; {remedy}")
        if not line or line.startswith("#"):
            continue
        # the folder's own name is no pattern
        is_pattern = glob.has_magic(line) and not (path.parent / line).exists()
        folder = glob.escape(str(path.parent)) if is_pattern else path.parent
        inputs.append(os.path.join(folder, line))
    if not inputs:
        raise MediaError(f"{path}: names no file; {remedy}")
    return inputs


def find_videos(given):
    """-> [(video, None)] of one input, or [(input, why it gives none)]."""
    try:
        # a file may be called anything
        if os.path.lexists(given) or not isinstance(given, str):
            return [(video, None) for video in media.find_videos([given])]
        if given.startswith("@"):
            inputs = read_list(Path(given[1:]))
            # a list in a list is a file of that name
            return [pair for name in inputs for pair in find_videos(name)]
        videos = match(given) if glob.has_magic(given) else media.find_videos([given])
        return [(video, None) for video in videos]
    except MediaError as error:
        return [(given, str(error))]
    # a name that is too long, say
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return [(given, f"{given}: cannot be used ({reason}); give the name of a file")]


def find_sounds(inputs):
    """Files and folders of --verify: of a pattern all videos and sounds that fit it, ours too.

    A name or pattern that fits nothing stays as it is: reading it says so. A list that cannot be
    read, or a pattern that cannot be, is its MediaError.
    """
    found = []
    for given in inputs:
        if not os.path.lexists(given) and given.startswith("@"):
            try:
                found += find_sounds(read_list(Path(given[1:])))
            except MediaError as error:
                found.append(error)
            continue
        fits = []
        if not os.path.lexists(given) and glob.has_magic(given):
            try:
                fits = [path for path in expand(given) if media.kind_of(path)]
            except MediaError as error:
                fits = [error]
        found += fits or [Path(given)]
    return found


def plan_outputs(inputs, out, verbose=False, redo=False):
    """-> [(video, output without its suffix, None)], or (input, None, why there is none).

    Every video once. verbose: what else lies in a folder is named on stderr. redo: the output of an
    output has its name.
    """
    jobs = []
    seen = set()
    taken = {}
    for given in inputs:
        if verbose and os.path.isdir(given):
            for other in media.search(given)[1]:
                print(f"sample.py: {other}: no video, left alone", file=sys.stderr)
        for video, error in find_videos(given):
            if error:
                jobs.append((video, None, error))
                continue
            if video.resolve() in seen:
                continue
            seen.add(video.resolve())
            name = base_name(video) if redo else video.stem
            target = (out or video.parent) / f"{name}.foley"
            other = taken.setdefault(target.resolve(), video)
            if other is video:
                jobs.append((video, target, None))
                continue
            reason = f"{video}: {other} has the same output {target}"
            jobs.append((video, None, f"{reason}; rename one, or do it alone with another --out"))
    return jobs


# ---- processes -----------------------------------------------------------------------------------


def join(device):
    """-> number of this process, number of processes; each takes a GPU of its machine.

    Raises UserError for an environment that cannot be.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
    except ValueError:
        world = rank = local = -1
    if not 0 <= rank < world or local < 0:
        raise UserError(
            "RANK, WORLD_SIZE, LOCAL_RANK in the environment are no numbers of a process; unset "
            "them, or let torchrun set them"
        )
    if world > 1 and device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    # a batch system may share the inputs out without a place where its processes can meet
    if "MASTER_ADDR" in os.environ:
        distributed.init("cpu")
    return rank, world


def exit_status(any_failed):
    """1 if an input of any process failed, once all are done: torchrun ends all processes as soon
    as one ends with an error."""
    all_failures = distributed.all_gather_object(bool(any_failed))
    distributed.leave()
    return int(any(all_failures))


def cannot_start(error):
    """What is wrong before any work, in one line of one process -> exit status."""
    is_usage = isinstance(error, ValueError)
    if distributed.first_to_fail():
        say(f"sample.py: {'--' if is_usage else ''}{error}", sys.stderr)
    return 2 if is_usage else 1


# ---- what is there already -----------------------------------------------------------------------


def hits_file_of(job, args):
    """The file of hits that --onsets may mean for this video; None without such a file."""
    if not args.onsets:
        return None
    path = Path(args.onsets)
    path = labels_of(job.given, path) if path.is_dir() else path
    return path if path.is_file() else None


def look_up(job, args):
    """Sets `job.line` where an output is kept: finished with the same settings, or changed by
    somebody since."""
    folder = job.target.parent
    files = {folder / name: entry for name, entry in job.record["files"].items()}
    # hits are there to be edited; only another such file would take their place
    if not args.write_onsets:
        files.pop(onsets_file(job.target), None)
    # sounds that were redone are kept for the user, who may not want them
    before = f"{job.target.name}.before"
    files = {path: entry for path, entry in files.items() if not path.name.startswith(before)}
    there = {path: entry for path, entry in files.items() if path.is_file()}
    for path, entry in there.items():
        if not manifest.is_same(path, entry):
            # redoing takes a sound as it is, whoever changed it
            if not args.redo:
                job.fail(f"{path}: was changed since it was written; move it, or give --overwrite")
            return
    # the cheapest first
    finished = len(there) == len(files) and is_input(job.given, job.record, there)
    # somebody's work, which a run of the whole folder would undo, is kept whatever its settings
    redone = not args.redo and job.record["settings"].get("redo")
    picked = not args.redo and job.record.get("picked")
    same = bool(redone or picked) or (
        job.record.get("version") == VERSION
        and manifest.same_settings(job.record, args, hits_file_of(job, args))
        and job.weights.made(job.record)
    )
    if finished and same:
        job.line = kept_line(job.given, folder, job.record)
        if redone:
            job.line["redone"] = described(redone)
        elif picked:
            job.line["picked"] = picked


def is_input(video, record, files):
    """Whether outputs, whose unchanged files are given, were made of this video as it is."""
    # an output that was redone in its place is what the next run is given
    replaced = Path(video).resolve() in {path.resolve() for path in files}
    # where no line said what it was drawn for, it may be any video
    unknown = record["input"]["path"] in record["files"]
    return replaced or unknown or manifest.is_same(Path(video), record["input"])


def kept_line(video, folder, record):
    """--json's line of an output that is left as it is."""
    paths = {name: str(folder / path) for name, path in record["paths"].items()}
    line = {"input": str(video), **paths, "kept": True, **record["result"]}
    if record.get("candidates"):
        line["candidates"] = [
            {"wav": str(folder / one["wav"]), "score": one["score"]} for one in record["candidates"]
        ]
    return line


def refuse_foreign(job, args, made):
    """Fails a job that would write over a file that is not ours, or that was edited since.

    made: fingerprints of the files that the manifest's lines say we made, by name.
    """
    folder = job.target.parent
    # what holds the picture is asked of FFmpeg, so only where there is something to lose
    paths = []
    if any(Path(f"{job.target}{suffix}").is_file() for suffix in (*CONTAINERS, *SOUNDS)):
        with suppress(MediaError):  # drawing says what is wrong with the source
            paths.append(output_file(job.target, job.given, args))
    if args.redo:
        # it keeps the sound that it replaces, and may replace the video that it is given
        paths = [path for path in paths if path.resolve() != job.given.resolve()]
        paths = [path for path in paths if path.suffix not in SOUNDS]
    else:
        paths.append(Path(f"{job.target}{sound_suffix(args)}"))
        if args.keep_all:
            paths += [Path(f"{job.target}.{k}{sound_suffix(args)}") for k in range(args.candidates)]
        if args.plot:
            paths.append(Path(f"{job.target}.png"))
    for path in filter(Path.is_file, paths):
        entries = made.get(manifest.relative(path, folder), ())
        if any(manifest.is_same(path, entry) for entry in entries):
            continue
        reason = "was changed since it was written"
        if not entries:
            reason = f"is there already, and no line of {manifest.NAME} says that it is ours"
        job.fail(f"{path}: {reason}; move it, or give --overwrite")
        return


def compare(jobs, args, verbose):
    """Compares what is to be made with the manifests of what is there."""
    folders = {}
    weights = manifest.Weights(args.weights)
    for job in jobs:
        # drawing it says what is wrong with what is no file
        if job.line is not None or not job.given.is_file():
            continue
        folder = job.target.parent
        if folder not in folders:
            folders[folder] = manifest.read(folder, verbose)
            records = folders[folder][0].values()
            weights.learn(record for record in records if "replacing" not in record)
        records, made = folders[folder]
        job.weights = weights
        job.stamp = manifest.stamp(job.given)
        record = records.get(job.target.name, {"replacing": False})
        job.begun = record.get("replacing", False)
        job.record = None if "replacing" in record else record
        if args.overwrite:
            continue
        if job.record:
            look_up(job, args)
        # what a run that was killed left there is ours, in whatever state
        if job.line is None and not job.begun and manifest.can_write(folder):
            refuse_foreign(job, args, made)


def check_folders(jobs):
    """-> the jobs, with one line for each folder into which nothing can be written."""
    refused = set()
    kept = []
    for job in jobs:
        folder = job.target and job.target.parent
        to_draw = job.line is None and folder.is_dir()
        if to_draw and folder in refused:
            continue
        if to_draw and not manifest.can_write(folder):
            refused.add(folder)
            job.given = folder
            job.fail(f"{folder}: cannot be written into; give another folder with --out")
        kept.append(job)
    return kept


def plan_jobs(args):
    """-> this process's [Job]: `line` is set where nothing is to be drawn.

    Raises UserError for an output folder, weights or an environment that cannot be, ValueError for
    flags that exclude each other.
    """
    if args.keep_tracks and args.format in ("wav", "flac"):
        raise ValueError(
            f"keep-tracks: {args.format} holds one sound alone; leave one of the two out"
        )
    rank, world = join(args.device)
    if args.out:
        make_folder(args.out)
    if args.pick:
        # where it is asked for, as it needs what writes outputs, and that these names
        from film import pick

        return pick.pick_all(pick.plan_jobs(args)[rank::world], args)
    first = rank == 0
    jobs = []
    for given, target, error in plan_outputs(
        args.inputs, args.out, args.verbose and first, bool(args.redo)
    ):
        jobs.append(Job(given, target))
        if error:
            jobs[-1].fail(error)
    for job in jobs:
        job.count = len(jobs)
    jobs = jobs[rank::world]
    if any(job.line is None for job in jobs):
        compare(jobs, args, first)
    return check_folders(jobs)


def check_onsets(jobs, args, settings, models):
    """Hits of files are read before any work; files of hits that somebody may have edited are not
    overwritten. `settings`: resolved. Raises ValueError."""
    materials = models.ldm.materials if settings.onsets else ()
    # the same hits suit no two videos
    if isinstance(settings.onsets, tuple) and jobs[0].count > 1:
        raise ValueError(
            f"onsets {args.onsets}: is one file for {jobs[0].count} videos; give a folder that has "
            "NAME.onsets.txt of each"
        )
    for job in jobs:
        if job.line is not None:
            continue
        # a fault in one file is that video's alone
        if isinstance(settings.onsets, Path):
            try:
                job.hits = read_hits(labels_of(job.given, settings.onsets), materials)
            except UserError as fault:
                job.fail(fault)
        # films have mixes of such names already
        if args.stems and (foreign := foreign_stem(job.target, sound_suffix(args))):
            job.fail(f"{foreign}: is there already and not ours; move it, or leave --stems out")
        # only what we wrote and nobody edited
        path = onsets_file(job.target)
        ours = job.record is not None and path.name in job.record["files"]
        if args.write_onsets and path.exists() and not (ours or args.overwrite):
            job.fail(f"{path}: is there already; move it, or leave --write-onsets out")


# ---- what is said --------------------------------------------------------------------------------


def describe(line):
    """A line of --json in words."""
    if line.get("kept"):
        reason = "same settings; --overwrite draws it again"
        if "redone" in line:
            reason = f"{line['redone']} s of it were redone; --overwrite draws it anew"
        elif "picked" in line:
            reason = f"{line['picked']} was picked; a run with --overwrite draws anew"
        return f"{line['output']}  kept ({reason})"
    if "picked" in line:
        return f"{line['output']}  has the sound of {line['picked']}"
    return f"{line['output']}  {line['seconds']:.2f} s, windows: {line['windows']}{said(line)}"


def report(line, args):
    """What one input came to: on stdout as JSON or in words, mistakes on stderr."""
    if "error" in line:
        say(f"sample.py: {line['error']}", sys.stderr)
    elif not args.json:
        say(describe(line))
    if args.json:
        say(json.dumps(line))
    if args.profile and "profile" in line:
        rows = [f"{'stage':<12}{'seconds':>9}{'peak MiB':>10}"]
        for stage, row in line["profile"].items():
            rows.append(f"{stage:<12}{row['seconds']:>9.2f}{row['peak_mib']:>10.0f}")
        say("\n".join(rows), sys.stderr if args.json else sys.stdout)


def say(text, file=None):
    """Print whole lines at once, since several processes may write to one terminal or file."""
    file = file or sys.stdout
    file.write(f"{text}\n")
    file.flush()
