"""The files of one input: picture and sound, and what was asked for beside them.

in   a `sample.Result`, and the command line's arguments
out  NAME.foley.mp4 (or what holds the picture), NAME.foley.wav, ..., all of them or none
"""

import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import data
from common import audio, media, plots, xmp
from common.audio import SAMPLE_RATE
from common.files import atomic_write
from common.media import MediaError
from common.onsets import write_hits
from film.jobs import onsets_file


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
    video = f"{target}{media.output_suffix(result.source)}"
    sounds = {f"{target}.wav": result.wav}
    candidates = []
    if args.keep_all:
        for k, wav in result.wavs.items():
            sounds[f"{target}.{k}.wav"] = wav
            candidates.append({"wav": f"{target}.{k}.wav", "score": result.scores[k]})
    # all under temporary names first, so that a full disk leaves none of them
    with ExitStack() as stack:
        with result.profile("writing"):
            part = stack.enter_context(atomic_write(video))
            result.save(part, args.keep_tracks)
            sign(args.sign, part, video, result.tags, result.source)
            for path, wav in sounds.items():
                part = stack.enter_context(atomic_write(path))
                media.write_wav(part, wav, result.sound_tags)
                sign(args.sign, part, path, result.sound_tags)
            if args.write_onsets:
                write_hits(stack.enter_context(atomic_write(onsets_file(target))), result.hits)
        if args.plot:
            with result.profile("plot"):
                plot(stack.enter_context(atomic_write(f"{target}.png")), result)
    line = {
        "input": str(result.source),
        "output": video,
        "wav": f"{target}.wav",
        "seconds": round(len(result.wav) / SAMPLE_RATE, 4),
        "windows": len(result.starts),
        "seed": args.seed,
        "score": result.scores[result.best],
    }
    if args.write_onsets:
        line["onsets"] = str(onsets_file(target))
    if candidates:
        line["candidates"] = candidates
    return line
