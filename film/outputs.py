"""The files of one input: picture and sound, and what was asked for beside them.

in   a `sample.Result`, and the command line's arguments
out  NAME.foley.mp4 (or what holds the picture), NAME.foley.wav, ..., all of them or none
"""

import math
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import data
from common import audio, media, plots, xmp
from common.audio import SAMPLE_RATE
from common.files import FileError, UserError, atomic_write, scratch_file, written
from common.media import MediaError
from common.onsets import write_hits
from film import manifest, redo
from film.jobs import onsets_file, output_file, sound_suffix, stem_file
from film.level import CEILING, MOST_BOOST, down, with_gain
from film.mix import foley, mix, own_sound, redone, write_blocks
from film.provenance import with_source_type
from film.redo import SOUNDS

LOSSY = (".mp4", ".m4v", ".mov", ".webm")  # videos whose sound is not quite what was encoded
OWN = {"comment": "the clip's own sound, a stem beside diff-foley's"}  # says whose file it is


def plot(path, result, count=12):
    """NAME.foley.png of one result, with `count` frames."""
    # the frame in the middle of each of `count` equal parts
    width = result.seconds / count
    frames = media.read_frames(
        result.source, 1 / width, 96, result.start + width / 2, result.seconds
    )
    onsets = {"generated": audio.detect_onsets(result.mel.numpy())}
    with suppress(MediaError):  # no labels
        annotated = data.read_onsets(result.source)
        onsets["annotated"] = [onset["time"] - result.start for onset in annotated]
    name = result.source.name
    plots.plot_result(path, name, frames[:count], onsets, result.mel, result.wav, result.seconds)


# ---- one file ----------------------------------------------------------------------------------


def write_video(
    source, sound, path, tags, start=0.0, duration=None, keep_tracks=False, as_official=False
):
    """The picture of `source` with a Sound, made quieter until the encoded one keeps to CEILING.

    The official demo's sound is left alone. -> the Sound that was written.
    """
    suffix = Path(path).suffix.lower()
    form = sound.rate, sound.channels
    folder = Path(path).parent
    with scratch_file(folder) as spool, scratch_file(folder) as encoded:
        while True:
            write_blocks(spool, sound.blocks())
            if suffix not in LOSSY or as_official:
                break
            args = (spool, encoded, suffix, *form)
            peak = media.in_child(source, "film.encoding", "encoded_peak", *args)
            if peak <= CEILING:
                break
            sound = sound.louder(down(CEILING - 0.05 - peak))
        tags = with_gain(tags, sound.gain)
        media.write_video(source, spool, path, tags, start, duration, keep_tracks, *form)
    return sound


def write_film(result, sound, path, keep_tracks=False):
    """`write_video` of a Result."""
    cut = result.start, result.duration
    official = result.settings.as_official
    return write_video(result.source, sound, path, result.tags, *cut, keep_tracks, official)


def sound_tags(result, sound):
    """The tags of a Sound that is written alone."""
    return with_source_type(with_gain(result.sound_tags, sound.gain), sound.has_own)


def write(result, sound, path, keep_tracks=False):
    """A Sound as the path's suffix says: alone, or with the picture. -> the Sound as written."""
    if Path(path).suffix.lower() not in SOUNDS:
        return write_film(result, sound, path, keep_tracks)
    tags = sound_tags(result, sound)
    if sound.exact is not None and sound.exact.fits(Path(path).suffix.lower()):
        sound.exact.write(path, tags)
        return sound
    media.write_sound(path, sound.blocks(), sound.samples, sound.rate, sound.channels, tags)
    return sound


def own_if_asked(result, folder, stack, stems=False):
    """The clip's Own sound in a file that the stack deletes; None where nobody wants it."""
    # what is redone has it already, in the stretches
    if result.redo or (not stems and result.settings.keep_audio is None):
        return None
    return stack.enter_context(own_sound(result, folder))


def save(result, path, keep_tracks=False):
    """The best candidate in one file: see `sample.Result.save`."""
    with ExitStack() as stack:
        own = own_if_asked(result, Path(path).parent, stack)
        write(result, sound_of(result, own, result.best), path, keep_tracks)


# ---- all of one input --------------------------------------------------------------------------


def sound_of(result, own, k):
    """What is written of candidate k."""
    return redone(result, k) if result.redo else mix(result, own, k)


def sounds_of(result, target, suffix, own, stems, keep_all):
    """-> the Sound of the video, {path: Sound} of the files beside it, --json's candidates."""
    # each is measured when it is made
    made = {k: sound_of(result, own, k) for k in (result.wavs if keep_all else [result.best])}
    best = made[result.best]
    sounds = {f"{target}{suffix}": best}
    if stems:
        sounds = {
            f"{target}{suffix}": foley(result, result.best) if best.has_own else best,
            stem_file(target, "mix", suffix): best,
        }
    candidates = []
    if keep_all:
        for k, sound in made.items():
            path = f"{target}.{k}{suffix}"
            sounds[path] = sound
            candidates.append({"wav": path, "score": result.scores[k]})
    return best, sounds, candidates


def level_of(sound):
    """What --json says of how loud a sound is."""
    lufs = sound.level.loudness
    lufs = round(lufs, 2) if math.isfinite(lufs) else None
    return {"gain": round(sound.gain, 2), "lufs": lufs}


def explain(result, args):
    """With --verbose: that a sound is quieter than was asked, and why."""
    wanted = result.settings.lufs
    if args.verbose and result.gain != 0 and wanted is not None:
        level = foley(result, result.best).level
        reason = f"its true peak is at {level.true_peak:.1f} dBTP"
        if result.gain >= MOST_BOOST:
            reason = f"a gain of {MOST_BOOST:+g} dB is the most"
        if level.loudness < wanted - 0.1:
            print(
                f"sample.py: {result.source}: {level.loudness:.1f} LUFS instead of {wanted:g}: "
                f"{reason}",
                file=sys.stderr,
            )


def sign(signer, part, target, tags, source=None):
    """Content Credentials for a file under its temporary name, where they are wanted (--sign).

    source: of the picture in it.
    """
    if signer is None:
        return
    name = Path(target).name
    if not signer.sign(part, name, xmp.parse_packet(tags[xmp.TAG]), source):
        suffix = Path(target).suffix
        reason = f"{suffix} holds no Content Credentials; {name} is not signed"
        warnings.warn(f"{source}: {reason}", stacklevel=2)


def write_outputs(result, target, args):
    """All files of one input, or none. `target`: the output without its suffix. -> --json's line"""
    suffix = sound_suffix(args)
    output = str(output_file(target, result.source, args))
    # all under temporary names first, so that a full disk leaves none of them
    with ExitStack() as stack:
        with result.profile("writing"):
            own = own_if_asked(result, Path(target).parent, stack, args.stems)
            best, sounds, candidates = sounds_of(
                result, target, suffix, own, args.stems, args.keep_all
            )
            if output not in sounds:
                part = stack.enter_context(atomic_write(output))
                best = write_film(result, best, part, args.keep_tracks)
                sign(args.signer, part, output, result.tags, result.source)
            before = redo.keep_before(result, target, output, suffix, stack)
            for path, sound in sounds.items():
                part = stack.enter_context(atomic_write(path))
                write(result, sound, part)
                sign(args.signer, part, path, sound_tags(result, sound))
            if args.stems and own is not None:
                part = stack.enter_context(atomic_write(stem_file(target, "own", suffix)))
                form = own.samples, result.settings.rate, own.channels
                media.write_sound(part, own.blocks(), *form, OWN)
            if args.write_onsets:
                write_hits(stack.enter_context(atomic_write(onsets_file(target))), result.hits)
        if args.plot:
            with result.profile("plot"):
                plot(stack.enter_context(atomic_write(f"{target}.png")), result)
    explain(result, args)
    line = {
        "input": str(result.source),
        "output": output,
        "wav": f"{target}{suffix}",
        "seconds": round(len(result.wav) / SAMPLE_RATE, 4),
        "windows": len(result.starts),
        "seed": args.seed,
        "score": result.scores[result.best],
        **level_of(best),
    }
    if args.write_onsets:
        line["onsets"] = str(onsets_file(target))
    if candidates:
        line["candidates"] = candidates
    if result.redo:
        line["redo"] = result.redo.line() | {"before": before}
    return line


def write_job(job, result, args, settings, models):
    """`write_outputs`, and their line in the manifest; settings: resolved. -> --json's line"""
    # of what is no plain file nothing can be said
    if job.weights is None:
        return write_outputs(result, job.target, args)
    folder = job.target.parent
    # from here on the files that are there may be others than a line says; a crash must not leave
    # it so
    manifest.append(folder, {"target": job.target.name, "replacing": True})
    try:
        with written() as paths:
            line = write_outputs(result, job.target, args)
    except UserError:
        with suppress(FileError):
            manifest.append(folder, job.record or {"target": job.target.name, "replacing": False})
        raise
    try:
        with result.profile("writing"):
            manifest.add(job, line, paths, args, settings, models)
    except FileError as error:
        print(f"sample.py: {error}; {line['output']} will be drawn again", file=sys.stderr)
    return line
