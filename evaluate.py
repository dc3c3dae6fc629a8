"""Do the sounds fall where things happen? Onset scores on clips whose true onsets are known.

In:  a folder of clips with their labels, as foley.py makes; sounds drawn here, or made elsewhere (--samples).
Out: one table and OUT/evaluate.json, {"rows": {row: {column: value}}, ...}. Rows:
     ours           the model's sound for each video
     ground_truth   the video's own sound: what the detector itself can reach
     wrong_video    our sounds dealt to other videos: what the right rate of onsets at the wrong times is worth
     silence        no sound at all
     Columns: F1 at 100 and 50 ms, precision and recall at 100 ms, all pooled over the clips' onsets; desync_ms, the
     mean over clips of the shift (up to 1 s either way) that brings found and labelled onsets together best, where
     there are both; clips. All rows pass the same mel and detector, its constants set once on ground truth of seed 9.

Stands beside Diff-Foley's alignment accuracy (section 5.1), which needs a classifier and cannot say how late a hit is.

    python foley.py held_out --clips 64 --seed 7 && python evaluate.py --data held_out --out scores
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SAMPLE_RATE, MediaError, detect_onsets, f1, find_videos, match, mel, read_audio, whole, write_wav
from sample import generate, load_models

SMEAR = 0.03                    # seconds: width of an onset when two trains of onsets are slid over each other
SLIDE = 1.0                     # seconds: how far


def desync(found, labelled):
    """The shift in seconds that brings two trains of onsets together best (late: positive), nan if one is empty."""
    if not len(found) or not len(labelled):
        return math.nan
    apart = np.subtract.outer(np.asarray(found), np.asarray(labelled)).ravel()
    shifts = np.arange(-round(SLIDE / 0.004), round(SLIDE / 0.004) + 1) * 0.004
    agreement = np.exp(-0.5 * ((apart[:, None] - shifts) / SMEAR) ** 2).sum(0)
    agreement -= 1e-6 * np.abs(shifts)              # of equals the nearest
    return float(shifts[agreement.argmax()])


def deal(count, seed=0):
    """A fixed derangement of `count` clips: everyone passes to the next in a shuffled ring, so none keeps its own."""
    ring = np.random.default_rng([seed, count]).permutation(count)
    dealt = np.empty(count, int)
    dealt[ring] = np.roll(ring, 1)
    return dealt


def score(found, labelled):
    """One row of the table, from a list of onset times per clip and the labels of the same clips."""
    counts = {}
    for tolerance in (0.1, 0.05):
        pairs = sum(len(match(a, b, tolerance)) for a, b in zip(found, labelled))
        counts[tolerance] = f1(pairs, sum(map(len, found)), sum(map(len, labelled)))
    shifts = [abs(s) for s in map(desync, found, labelled) if not math.isnan(s)]
    precision, recall, both = counts[0.1]
    return {"onset_f1_100ms": both, "onset_f1_50ms": counts[0.05][2], "precision_100ms": precision,
            "recall_100ms": recall, "desync_ms": 1000 * float(np.mean(shifts)) if shifts else None, "clips": len(found)}


def onsets_of(wav):
    return detect_onsets(mel(torch.as_tensor(wav)).numpy())


def read_labels(video):
    """The labelled onset times beside a video."""
    try:
        return sorted(float(onset["time"]) for onset in json.loads(video.with_suffix(".json").read_text())["onsets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{video}: no {video.stem}.json with onsets beside it; make clips with foley.py") from error


def find_sample(folder, video):
    """The sound made elsewhere for a video: NAME.foley.wav, NAME.wav, or a video with sound of that name."""
    for name in (f"{video.stem}.foley.wav", f"{video.stem}.wav", f"{video.stem}.foley.mp4", f"{video.stem}.mp4"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise MediaError(f"{folder}: no {video.stem}.foley.wav, .wav or .mp4 there; make it, or leave out --samples")


def own_sounds(videos, args):
    """The sound to judge for each video in turn: read from --samples, or drawn with seed + clip number."""
    models = None if args.samples else load_models(args.weights, args.device)
    for number, video in enumerate(tqdm(videos, unit="clip")):
        if args.samples:
            yield read_audio(find_sample(args.samples, video))
            continue
        wav = generate(video, models, seed=args.seed + number, steps=args.steps, cfg=args.cfg, cg=args.cg,
                       sampler=args.sampler).wav
        if args.keep:
            write_wav(args.out / f"{video.stem}.foley.wav", wav)
        yield wav


def evaluate(args):
    """All rows: {row: {column: value}}."""
    if not args.data.is_dir():
        raise MediaError(f"{args.data}: no such folder; give one that python foley.py made")
    videos = find_videos([args.data])[:args.clips]
    if len(videos) < 2:
        raise MediaError(f"{args.data}: one clip; at least two are needed, so that sounds can be dealt to wrong videos")
    labelled = [read_labels(video) for video in videos]
    if not any(labelled):
        raise MediaError(f"{args.data}: not one labelled onset in {len(videos)} clips; give more with --clips")
    truth = [onsets_of(read_audio(video)) for video in videos]
    ours = [onsets_of(wav) for wav in own_sounds(videos, args)]
    dealt = [ours[k] for k in deal(len(videos))]
    nothing = [onsets_of(torch.zeros(SAMPLE_RATE)) for _ in videos]
    return {row: score(found, labelled) for row, found in
            (("ours", ours), ("ground_truth", truth), ("wrong_video", dealt), ("silence", nothing))}


def table(rows):
    """The rows as aligned text; '-' where a value does not exist."""
    def cell(column, value):
        return "-" if value is None else f"{value:.0f}" if column in ("desync_ms", "clips") else f"{value:.3f}"
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]] + [[name, *(cell(c, row[c]) for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])])
                     for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score sounds by where their onsets fall.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="clips with labels, as foley.py makes")
    parser.add_argument("--samples", type=Path, metavar="DIR",
                        help="sounds made elsewhere: NAME.foley.wav, NAME.wav or NAME.mp4 (else drawn now)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where evaluate.json goes (.)")
    parser.add_argument("--keep", action="store_true", help="write the drawn sounds there too, as NAME.foley.wav")
    parser.add_argument("--clips", type=int, metavar="N", help="only the first N (all)")
    parser.add_argument("--weights", default="mini", metavar="mini|DIR", help="the models to draw with (mini)")
    parser.add_argument("--seed", type=int, default=0, help="clip k is drawn with seed + k (0)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--cfg", type=float, help="classifier-free guidance (what suits the weights)")
    parser.add_argument("--cg", type=float, help="guidance by the alignment classifier, 0 for none (what suits it)")
    parser.add_argument("--sampler", choices=["dpm", "ddim", "plms"], default="dpm", help="(dpm)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    args = parser.parse_args(argv)
    if args.clips is not None and args.clips < 2:
        parser.error("--clips: must be 2 or more, so that sounds can be dealt to wrong videos")
    if args.steps < 1:
        parser.error("--steps: must be 1 or more")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = evaluate(args)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        with whole(args.out / "evaluate.json") as part:
            part.write_text(json.dumps({"rows": rows, "settings": settings}, indent=1) + "\n")
    except (MediaError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted, nothing written", file=sys.stderr)
        return 130
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
