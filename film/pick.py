"""A candidate that somebody picked by ear becomes the sound of its video: sample.py --pick.

in   picks.json, which the page saves: {input: file name of the sound}; the outputs' manifests
out  NAME.foley.wav is the picked file, NAME.foley.mp4 has its sound; nothing is drawn

Both are written as drawing writes them, with the tags of the candidate, and signed where --sign is
given. The manifest's line of the outputs stays but for what is new; --keep-all's files stay too.
"""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import soundfile

from common import media, xmp
from common.files import UserError, atomic_write, written
from common.resample import BLOCK
from film import loudness, manifest
from film.jobs import Job, is_input, kept_line, stem_file
from film.mix import Sound
from film.outputs import level_of, sign, write_video
from film.provenance import with_source_type
from film.redo import SOUNDS

NAMES = re.compile(r"(.+\.foley)(\.\d+)?\.(wav|flac)")  # of what can be picked
GAIN = re.compile(r", gain ([+-]\d+\.\d+) dB$")  # what level.with_gain adds to a comment


def read_picks(path: Path | str) -> dict[str, str]:
    """{input: file name of its sound} of a file that the page saved. Raises UserError."""
    try:
        picks = json.loads(Path(path).read_text("utf-8"))
        if not picks or not all(name and isinstance(name, str) for name in picks.values()):
            raise ValueError("names no files")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = (
            getattr(error, "strerror", None) or "is no picks.json: {video: file name of its sound}"
        )
        raise UserError(f"{path}: {reason}; give the file that Save picks wrote") from None
    return picks


def plan_jobs(args) -> list[tuple[Job, str | None]]:
    """A Job for each pick of the files that `args.inputs` names, and the file that was picked."""
    jobs = []
    for given in args.inputs:
        try:
            jobs += [(Job(Path(video)), name) for video, name in read_picks(given).items()]
        except UserError as error:
            jobs.append((Job(given), None))
            jobs[-1][0].fail(error)
    return jobs


def pick_all(jobs, args) -> list[Job]:
    """The Jobs of `plan_jobs`, done: their `line` is set."""
    manifests = {}
    for job, name in jobs:
        if job.line is None:
            try:
                pick(job, name, args, manifests)
            except UserError as error:
                job.fail(error)
    return [job for job, _ in jobs]


def pick(job, name: str, args, manifests: dict):
    """Give the outputs of one video the sound in the file `name`, and set the job's line.

    manifests: {folder: what `manifest.read` gives}, of the folders that were read before. Raises
    UserError.
    """
    video = job.given
    folder = args.out or video.parent
    match = NAMES.fullmatch(name)
    if not match:
        raise UserError(f"{video}: {name} is no sound of ours; pick a candidate")
    job.target = folder / match[1]
    if folder not in manifests:
        manifests[folder] = manifest.read(folder)
    record = manifests[folder][0].get(job.target.name)
    if record is None or "replacing" in record:
        raise UserError(
            f"{video}: no finished output {job.target}; give the --out that it was made with"
        )
    # --format flac, of the sound alone, has no other wav
    paths = {key: folder / path for key, path in record["paths"].items()}
    scores = {Path(one["wav"]).name: one["score"] for one in record.get("candidates", ())}
    picked = folder / name
    if picked != paths["wav"] and name not in scores:
        raise UserError(f"{video}: {name} is none of its candidates; draw them with --keep-all")
    check(video, record, picked, paths, args)
    job.record = record
    job.line = kept_line(video, folder, record) | {"picked": name}
    sums = {path: entry["sha256"] for path, entry in record["files"].items()}
    if picked == paths["wav"] or sums[name] == sums[paths["wav"].name] and not args.overwrite:
        # what is there already was picked, too: later runs keep it
        if name in scores and record.get("picked") != name:
            manifest.append(folder, record | {"picked": name})
        return
    with written() as files:
        sound = write(video, record, picked, paths, args)
    result = record["result"] | level_of(sound) | {"score": scores[name]}
    new = {manifest.relative(path, folder): manifest.fingerprint(Path(path)) for path in files}
    record = record | {"files": record["files"] | new, "result": result, "picked": name}
    manifest.append(folder, record)
    del job.line["kept"]
    job.line |= result


def check(video, record, picked, paths, args):
    """Raises UserError for outputs whose sound cannot be replaced, or that somebody edited."""
    settings = record["settings"]
    # candidates are mixes then, and NAME.foley.wav is not
    if settings.get("stems") and settings.get("keep_audio") is not None:
        raise UserError(
            f"{video}: was made with --stems and --keep-audio, so {picked.name} is a mix; draw "
            "it without one of the two"
        )
    folder = picked.parent
    unchanged = []
    for path in dict.fromkeys((picked, *paths.values())):
        entry = record["files"].get(manifest.relative(path, folder))
        # hits are there to be edited
        if entry is None or path.suffix == ".txt":
            continue
        same = path.is_file() and manifest.is_same(path, entry)
        if same:
            unchanged.append(path)
        elif path == picked or (path.is_file() and not args.overwrite):
            remedy = "draw it anew" if path == picked else "move it, or give --overwrite"
            raise UserError(f"{path}: was changed or deleted since it was written; {remedy}")
    if not is_input(video, record, unchanged):
        raise UserError(f"{video}: is not the video that {picked.name} was made for; draw it anew")
    signed = [path for path in unchanged if path != picked and xmp.has_credentials(path)]
    if signed and args.signer is None:
        raise UserError(f"{signed[0]}: is signed; give --sign CERT KEY, as when it was drawn")


def write(video, record, picked, paths, args) -> Sound:
    """The outputs with the picked sound, all of them or none. -> the Sound of the video."""
    sound, tags = read(picked)
    settings = record["settings"]
    with ExitStack() as stack:
        if paths["output"].suffix not in SOUNDS:
            part = stack.enter_context(atomic_write(paths["output"]))
            film_tags = with_source_type(tags, True)
            cut = settings["start"], settings["duration"]
            form = settings["keep_tracks"], settings["as_official"]
            sound = write_video(video, sound, part, film_tags, *cut, *form)
            sign(args.signer, part, paths["output"], film_tags, video)
        copies = [paths["wav"]]
        if settings.get("stems"):
            copies.append(stem_file(str(paths["wav"].with_suffix("")), "mix", picked.suffix))
        for path in copies:
            part = stack.enter_context(atomic_write(path))
            shutil.copyfile(picked, part)
            if not xmp.has_credentials(picked):
                sign(args.signer, part, path, tags)
    return sound


def read(path) -> tuple[Sound, dict]:
    """A sound that we wrote, and its tags but for the gain that they tell of."""
    tags = media.read_tags(path)
    comment = tags.get("comment", "")
    gain = GAIN.search(comment)
    # of wav in a chunk, of flac among the other tags
    packet = xmp.read(path) or tags.get("xmp")
    tags = {"comment": GAIN.sub("", comment)} | ({xmp.TAG: packet} if packet else {})

    def blocks():
        yield from soundfile.blocks(path, BLOCK, dtype="float32", always_2d=True)

    about = soundfile.info(path)
    form = about.frames, about.samplerate, about.channels
    measured = loudness.measure(blocks(), about.samplerate)
    return Sound(blocks, *form, float(gain[1]) if gain else 0.0, measured), tags
