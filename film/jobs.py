"""Which outputs a call of sample.py is to make, and what it says of each.

in   the command line's inputs: videos, and folders of them
out  (video, output without its suffix, None), or (input, None, why there is none), in order
"""

import json
import sys
from pathlib import Path

from common import media
from common.files import UserError
from common.media import MediaError
from common.onsets import read_hits
from film.redo import base_name, said


def onsets_file(target):
    """NAME.onsets.txt of the output NAME.foley."""
    return Path(f"{str(target).removesuffix('.foley')}.onsets.txt")


def labels_of(video, folder):
    """The file of a video's hits in the folder that --onsets names."""
    return folder / f"{Path(video).stem}.onsets.txt"


def plan_outputs(inputs, out, verbose=False, redo=False):
    """-> [(video, output without its suffix, None)], or (input, None, why there is none).

    Every video once. verbose: what else lies in a folder is named on stderr. redo: the output of an
    output has its name.
    """
    jobs = []
    seen = set()
    taken = {}
    for given in inputs:
        try:
            videos = media.find_videos([given])
            if verbose and Path(given).is_dir():
                for other in media.search(given)[1]:
                    print(f"sample.py: {other}: no video, left alone", file=sys.stderr)
        except MediaError as error:
            jobs.append((given, None, str(error)))
            continue
        for video in videos:
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


def plan_jobs(args, settings, materials):
    """`plan_outputs`; videos whose onsets somebody may have edited are not overwritten, and
    the files of all hits are read before any work."""
    jobs = plan_outputs(args.inputs, args.out, args.verbose, bool(args.redo))
    # a fault in one file is that video's alone
    if isinstance(settings.onsets, Path):
        for k, (video, target, error) in enumerate(jobs):
            try:
                if error is None:
                    read_hits(labels_of(video, settings.onsets), materials)
            except UserError as fault:
                jobs[k] = (video, target, str(fault))
    # the same hits suit no two videos
    if isinstance(settings.onsets, tuple) and len(jobs) > 1:
        raise ValueError(
            f"onsets {args.onsets}: is one file for {len(jobs)} videos; give a folder that has "
            "NAME.onsets.txt of each"
        )
    # a file that is there may have been edited
    if args.write_onsets:
        for k, (video, target, error) in enumerate(jobs):
            if error is None and onsets_file(target).exists():
                path = onsets_file(target)
                error = f"{path}: is there already; move it, or leave --write-onsets out"
                jobs[k] = (video, target, error)
    return jobs


def report(line, args):
    """What one input came to: on stdout as JSON or in words, mistakes on stderr."""
    if "error" in line:
        print(f"sample.py: {line['error']}", file=sys.stderr)
    elif not args.json:
        print(
            f"{line['output']}  {line['seconds']:.2f} s, windows: {line['windows']}{said(line)}",
            flush=True,
        )
    if args.json:
        print(json.dumps(line), flush=True)
    if args.profile and "error" not in line:
        out = sys.stderr if args.json else sys.stdout
        print(f"{'stage':<12}{'seconds':>9}{'peak MiB':>10}", file=out)
        for stage, row in line["profile"].items():
            print(f"{stage:<12}{row['seconds']:>9.2f}{row['peak_mib']:>10.0f}", file=out)
