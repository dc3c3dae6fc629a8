"""Do the sounds fall where things happen, and are they the right ones? One table, every figure with its 95 % interval.

in   a folder of clips with their labels, as foley.py makes, or any videos with sound (their own onsets are then the labels);
     sounds drawn here, or made elsewhere (--samples)
out  the table, OUT/evaluate.json {"rows": {row: {column: value}}, "intervals": {row: {column: [low, high]}},
     "clips": {video: {row: {what was measured: value}}}, ...}, evaluate.png. Rows:
     ours           the model's sound for each video
     ground_truth   the video's own sound: what detector and judges themselves can reach
     wrong_video    our sounds dealt to other videos: what the right sounds at the wrong times are worth
     silence        no sound at all
     round_trip     the true sound through an autoencoder and the vocoder: what stage 2 can reach at best (--round-trip FILE)

    python foley.py held-out --clips 512 --seed 1 && python evaluate.py --data held-out --out scores
    python evaluate.py --data held-out --ablate guidance --out scores/guidance
    torchrun --nproc_per_node 4 evaluate.py --data held-out         clips shared out; the same table
    python evaluate.py --data vggsound-test --official-melception melception-21-05-10T09-28-40.pt       the paper's figures too

onset_f1_100ms ...  found onsets against labelled ones, pooled over clips, one to one within 100 or 50 ms (`audio.match`)
heard_f1_100ms      the same within 100 ms of the onsets that are heard in the true sound, whatever the labels say
onset_count_error   mean difference of how many there are
desync_ms           mean over clips of how far the onset strengths must be slid over the true sound's to agree best (up to 1 s either
                    way), and desync_over_200ms, the share of clips beyond that; clips without any onset strength are left out
align_acc           share of clips that the judging classifier calls aligned; it is trained as the paper trains its own (Sec. 5.1: clean
                    latents), from its own seed, and neither guides nor ranks: `python align.py --clean`
material_acc        share of labelled hits at which judge.py hears the right material
frechet, inception_score, kl    in judge.py's space: distance of all clips, quality and variety, divergence clip by clip
melception_fid, melception_is (and its deviation over 10 splits, so from 10 clips on), melception_kl    the paper's, see melception.py. Only KL
                    has an interval: a thousand of such FIDs take too long, and clips drawn with repetition vary less, which IS is about
loudness_db         mean absolute difference of the level from the true sound's
All rows pass the same mel, detector and judges; the detector's constants were set on true sounds of seed 9.
"""

import argparse
import itertools
import json
import math
import os
import time
import warnings
from collections import namedtuple
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # read when torch loads: waiting threads sleep, which a busy machine needs

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from align import Alignment
from cavp import CAVP
from common import cli, distributed, plots
from common.audio import (
    COLUMN,
    HOP,
    SAMPLE_RATE,
    detect_onsets,
    f1,
    match,
    mel,
    onset_strength,
    vocode_long,
)
from common.media import MediaError, atomic_write, find_videos, probe, read_audio, write_wav
from data import SPLITS, read_onsets, split_of
from metrics.judge import Judge, clear_hits, divergence, frechet, inception_score
from metrics.melception import Melception, fid, kl, made_mel, scores, softmax, true_mel
from sample import (
    COLUMNS,
    Settings,
    add_watermark,
    generate,
    join_windows,
    load_models,
    plan_windows,
    tags_of,
    video_features,
)
from vae import LATENT_SCALE, AutoencoderKL

SLIDE = 62  # mel columns (1 s): how far onset strengths are slid over each other
FLOOR = 1e-3  # of full scale: below, a level counts as this
RESAMPLED = 1000  # times, for the intervals
ONCE = ("melception_made", "melception_true", "melception_classes")  # not drawn again for them

# what is known of a video before anything is drawn for it: onset times, those heard in its sound, [(column, material)] or None, its mel,
# level, features or None, what Melception hears in its sound or None
Case = namedtuple("Case", "video times own hits mel level features heard")
Judges = namedtuple("Judges", "materials alignment vae cavp melception", defaults=(None,) * 5)


# ---------------------------------------------------------------------------------------------------------------------
# one clip


def level_of(wav):
    """Root mean square in dB of full scale, at least that of FLOOR."""
    return 20 * math.log10(max(FLOOR, float(torch.as_tensor(wav).double().square().mean().sqrt())))


def slide(made, true):
    """Two onset strengths (s,) -> seconds by which `made` is late at their best agreement; nan if one has none."""
    n = min(len(made), len(true))
    made, true = made[:n], true[:n]
    if not made.any() or not true.any():
        return math.nan
    lags = np.arange(-min(SLIDE, n - 1), min(SLIDE, n - 1) + 1)
    agreement = np.array(
        [made[max(0, k) : n + min(0, k)] @ true[max(0, -k) : n - max(0, k)] for k in lags]
    )
    return float(lags[np.lexsort((np.abs(lags), -agreement))[0]] * COLUMN)  # of equals the nearest


def samples_of(level):
    """How many samples the columns of a mel (128, s) stand for."""
    return level.shape[1] * HOP


def aligned(level, features, judges):
    """Mel (128, s), features (f, d) of the picture -> mean probability over the windows that they belong together."""
    fps, frames = judges.alignment.config.fps, judges.alignment.config.frames
    odds = []
    for start in plan_windows(samples_of(level), fps):
        column, first = start // HOP, round(start * fps / SAMPLE_RATE)
        piece = level[:, column : column + COLUMNS]
        z, _ = judges.vae.encode(F.pad(piece, (0, COLUMNS - piece.shape[1]))[None, None])
        odds.append(
            judges.alignment(
                LATENT_SCALE * z, torch.zeros(1), features[None, first : first + frames]
            ).item()
        )
    return float(np.mean(odds))


@torch.no_grad()
def measure(wav, case, judges, seconds=math.nan):
    """All that the table needs to know of a sound made for a case, or for another one that is longer or shorter."""
    wav = torch.as_tensor(wav)[: samples_of(case.mel)]
    level = mel(wav)
    found, strength = detect_onsets(level.numpy()), onset_strength(level.numpy())
    out = {
        "found": len(found),
        "labelled": len(case.times),
        "seconds": seconds,
        "loudness": level_of(wav) - case.level,
        "late": slide(strength, onset_strength(case.mel.numpy())),
        "pairs_100": len(match(found, case.times, 0.1)),
        "pairs_50": len(match(found, case.times, 0.05)),
        "own": len(case.own),
        "pairs_own": len(match(found, case.own, 0.1)),
    }
    if judges.materials:
        out["features"], out["classes"] = judges.materials.clip(level)
        if case.hits is not None:
            heard = judges.materials.hear(level, [column for column, _ in case.hits])
            out["hits"] = len(heard)
            out["right"] = sum(
                judges.materials.config.classes[k] == name for k, (_, name) in zip(heard, case.hits)
            )
    if judges.alignment:
        whole_clip = F.pad(level, (0, case.mel.shape[1] - level.shape[1]))
        out["aligned"] = aligned(whole_clip, case.features, judges) > 0.5
    if judges.melception:
        heard = judges.melception.clip(made_mel(level))
        out["melception_made"], out["melception_true"] = heard.features, case.heard.features
        out["melception_classes"], out["melception_kl"] = (
            softmax(heard.unbiased),
            kl(case.heard.logits, heard.logits),
        )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# a row of the table


def columns_of(measured, true):
    """Arrays of `measure`'s figures for all clips (or a resampling), and those of the true sounds -> {column: value}, None where there is none."""
    got, total = measured["found"].sum(), measured["labelled"].sum()
    row = {}
    for name in ("100", "50"):
        row[f"precision_{name}ms"], row[f"recall_{name}ms"], row[f"onset_f1_{name}ms"] = map(
            float, f1(measured[f"pairs_{name}"].sum(), got, total)
        )
    row["heard_f1_100ms"] = float(f1(measured["pairs_own"].sum(), got, measured["own"].sum())[2])
    row["onset_count_error"] = float(np.abs(measured["found"] - measured["labelled"]).mean())
    late = 1000 * np.abs(measured["late"][~np.isnan(measured["late"])])
    row["desync_ms"], row["desync_over_200ms"] = (
        (float(late.mean()), float((late > 200).mean())) if len(late) else (None, None)
    )
    row["align_acc"] = float(measured["aligned"].mean()) if "aligned" in measured else None
    row["material_acc"] = (
        float(measured["right"].sum() / max(1, measured["hits"].sum()))
        if "right" in measured
        else None
    )
    if "features" in measured:
        row["frechet"] = (
            frechet(measured["features"], true["features"]) if len(measured["found"]) > 2 else None
        )
        row["inception_score"] = inception_score(measured["classes"])
        row["kl"] = float(divergence(true["classes"], measured["classes"]).mean())
    if "melception_kl" in measured:
        if "melception_made" in measured:
            row["melception_fid"] = fid(measured["melception_made"], measured["melception_true"])
            row["melception_is"], row["melception_is_deviation"] = scores(
                measured["melception_classes"]
            )
        row["melception_kl"] = float(measured["melception_kl"].mean())
    row["loudness_db"] = float(np.abs(measured["loudness"]).mean())
    row["seconds"] = (
        None if np.isnan(measured["seconds"]).any() else float(measured["seconds"].mean())
    )
    return {**row, "clips": len(measured["found"])}


def score(measured, true, seed=0):
    """Lists of `measure` for the clips -> {column: value}, {column: (low, high)}: 95 % of RESAMPLED drawings of as many clips, with repetition."""
    measured, true = (
        {k: np.stack([m[k] for m in rows]) for k in rows[0]} for rows in (measured, true)
    )
    draw, n = np.random.default_rng(seed), len(measured["found"])
    drawn = [
        columns_of(
            *({k: v[pick] for k, v in rows.items() if k not in ONCE} for rows in (measured, true))
        )
        for pick in (draw.integers(n, size=n) for _ in range(RESAMPLED))
    ]
    row, intervals = columns_of(measured, true), {}
    for name, value in row.items():
        values = [d[name] for d in drawn if d.get(name) is not None]
        if values and value is not None and name != "clips":
            intervals[name] = [float(v) for v in np.percentile(values, (2.5, 97.5))]
    return row, intervals


def deal(count, seed=0):
    """A fixed derangement of `count` clips: everyone passes to the next in a shuffled ring, so none keeps its own."""
    ring = np.random.default_rng([seed, count]).permutation(count)
    dealt = np.empty(count, int)
    dealt[ring] = np.roll(ring, 1)
    return dealt


# ---------------------------------------------------------------------------------------------------------------------
# clips and their sounds


def read_case(video, judges):
    """A video and what its labels say; without labels, what its own sound says."""
    wav = read_audio(video, duration=probe(video).duration)
    level, onsets, features = mel(wav), None, None
    own = times = detect_onsets(level.numpy()).tolist()
    if video.with_suffix(".json").is_file():
        onsets = read_onsets(video)
        times = [onset["time"] for onset in onsets]
    if judges.alignment:
        config, seconds = judges.alignment.config, len(wav) / SAMPLE_RATE
        last = plan_windows(samples_of(level), config.fps)[-1]
        features = video_features(
            video, judges.cavp, round(last * config.fps / SAMPLE_RATE) + config.frames, seconds
        )
    heard = judges.melception and judges.melception.clip(true_mel(wav))
    return Case(
        video, times, own, onsets and clear_hits(onsets), level, level_of(wav), features, heard
    )


def find_sample(folder, video):
    """The sound made elsewhere for a video: NAME.foley.wav, NAME.wav, or a video with sound of that name."""
    for name in (
        f"{video.stem}.foley.wav",
        f"{video.stem}.wav",
        f"{video.stem}.foley.mp4",
        f"{video.stem}.mp4",
    ):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise MediaError(
        f"{folder}: no {video.stem}.foley.wav, .wav or .mp4 there; make it, or leave out --samples"
    )


def load_judges(folder):
    """Those of weights/mini, or of another folder with judge.safetensors, judge_align.safetensors, cavp and ldm; what is missing judges nothing."""
    materials, alignment = folder / "judge.safetensors", folder / "judge_align.safetensors"
    judges = Judges(Judge.load(materials) if materials.is_file() else None)
    if alignment.is_file():
        judges = Judges(
            judges.materials,
            Alignment.load(alignment),
            AutoencoderKL.load(folder / "ldm.safetensors"),
            CAVP.load(folder / "cavp.safetensors", audio=False).fold(),
        )
    return judges


def shared(items):
    """[(number, result)] of this process -> the results of all of them, in order of the numbers."""
    return [
        result
        for _, result in sorted(
            itertools.chain(*distributed.all_gather_object(items)), key=lambda item: item[0]
        )
    ]


def each(items, function, name):
    """function(number, item) of every item, shared out over the processes; all of them get all results."""
    numbers = range(distributed.rank(), len(items), distributed.world())
    return shared(
        [
            (k, function(k, items[k]))
            for k in tqdm(numbers, desc=name, unit="clip", disable=distributed.rank() > 0)
        ]
    )


# Settings that a row may have of its own, as in the paper's ablations: (name of the row, {setting: value})
ABLATIONS = {
    "guidance": [
        ("none", {"cfg": 1.0, "cg": 0.0}),
        ("classifier", {"cfg": 1.0}),
        ("classifier_free", {"cg": 0.0}),
        ("both", {}),
    ],
    "cfg": [(f"cfg_{cfg:g}", {"cfg": cfg}) for cfg in (1.0, 1.5, 2.5, 3.5, 4.5, 6.5)],
    "cg": [(f"cg_{cg:g}", {"cg": cg}) for cg in (0.0, 5.0, 15.0, 30.0, 50.0)],
    "samplers": [
        (f"{sampler}_{steps}", {"sampler": sampler, "steps": steps})
        for sampler, steps in (
            ("dpm", 10),
            ("dpm", 25),
            ("dpm", 50),
            ("ddim", 25),
            ("ddim", 50),
            ("ddim", 100),
            ("plms", 25),
            ("plms", 50),
        )
    ],
}


def make_sounds(videos, args, settings, name):
    """[(sound, seconds it took)], read from --samples or drawn with seed + clip number."""
    models = (
        None if args.samples else load_models(settings.get("weights", args.weights[0]), args.device)
    )

    def make(number, video):
        if args.samples:
            return read_audio(find_sample(args.samples, video)).numpy(), math.nan
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files, which were read before
            chosen = {
                k: settings.get(k, getattr(args, k)) for k in ("steps", "cfg", "cg", "sampler")
            }
            drawn = Settings(seed=args.seed + number, **chosen)
            wav = generate(video, models, settings=drawn, mark=False).wav
        seconds = time.perf_counter() - start
        if args.keep:  # what leaves the program is marked; the table measures it unmarked
            write_wav(
                args.out / f"{video.stem}.foley.wav",
                add_watermark(wav),
                tags_of(models.name, args.seed + number),
            )
        return wav.numpy(), seconds

    return each(videos, make, name)


@torch.no_grad()
def round_trip(case, vae):
    """The true sound as an autoencoder and the vocoder give it back, in windows as sounds are drawn -> (samples,)."""
    samples, columns = samples_of(case.mel), case.mel.shape[1]
    starts = plan_windows(samples, SAMPLE_RATE / HOP)  # from any column on: no frames are involved
    padded = F.pad(case.mel, (0, COLUMNS))
    windows = torch.stack([padded[:, start // HOP : start // HOP + COLUMNS] for start in starts])[
        :, None
    ]
    made = vae.decode(vae.encode(windows)[0])[:, 0].clamp(0, 1)
    return vocode_long(join_windows(made, starts)[:, :columns], samples).numpy()


def by_clip(measured):
    """{row: [what `measure` gave]} -> for each clip {row: {name: number}}, without what is no single number."""

    def numbers(found):
        return {
            k: None if math.isnan(v) else v if isinstance(v, int) else float(v)
            for k, v in found.items()
            if np.ndim(v) == 0
        }

    return [dict(zip(measured, map(numbers, found))) for found in zip(*measured.values())]


def find_clips(args):
    """The videos of --data, those of --split alone if given, the first --clips of them."""
    if not args.data.is_dir():
        raise MediaError(
            f"{args.data}: no such folder; give a folder of videos, best one that python foley.py made"
        )
    videos = [
        video
        for video in find_videos([args.data])
        if args.split in (None, split_of(video.relative_to(args.data).as_posix()))
    ]
    if len(videos) < 2:
        of = f" of the split {args.split}" if args.split else ""
        raise MediaError(
            f"{args.data}: {len(videos)} clips{of}; at least two are needed, so that sounds can be dealt to wrong videos"
        )
    return videos[: args.clips]


def evaluate(args):
    """-> rows {row: {column: value}}, intervals {row: {column: [low, high]}}, clips {video: {row: {name: number}}}"""
    videos = find_clips(args)
    judges = load_judges(args.judges)
    if args.official_melception:
        judges = judges._replace(melception=Melception.load(args.official_melception, args.device))
    cases = each(videos, lambda _, video: read_case(video, judges), "reading")
    if not any(len(case.times) for case in cases):
        raise MediaError(
            f"{args.data}: not one onset in {len(videos)} clips; give more with --clips"
        )

    def row(name, sounds):
        return each(
            cases,
            lambda k, case: measure(*sounds[k][:1], case, judges, sounds[k][1]),
            f"judging {name}",
        )

    if args.ablate:
        variants = ABLATIONS[args.ablate]
    else:
        variants = (
            [("ours", {})]
            if len(args.weights) == 1
            else [(Path(w).name, {"weights": w}) for w in args.weights]
        )
    measured = {}
    for name, settings in variants:
        sounds = make_sounds(videos, args, settings, name)
        measured[name] = row(name, sounds)
    dealt = [(sounds[k][0], math.nan) for k in deal(len(videos))]  # of the last variant
    true = row("ground_truth", [(read_audio(case.video).numpy(), math.nan) for case in cases])
    measured |= {
        "ground_truth": true,
        "wrong_video": row("wrong_video", dealt),
        "silence": row(
            "silence", [(np.zeros(samples_of(case.mel), np.float32), math.nan) for case in cases]
        ),
    }
    if args.round_trip:
        vae = AutoencoderKL.load(args.round_trip)
        measured["round_trip"] = row(
            "round_trip",
            each(cases, lambda _, case: (round_trip(case, vae), math.nan), "round trip"),
        )
    scores = {name: score(rows, true) for name, rows in measured.items()}
    names = [video.relative_to(args.data).as_posix() for video in videos]
    return (
        {name: values for name, (values, _) in scores.items()},
        {name: intervals for name, (_, intervals) in scores.items()},
        dict(zip(names, by_clip(measured))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# the table


def table(rows, intervals):
    """As aligned text, columns down and rows across; '-' where a value does not exist, half the interval's width after it."""

    def cell(name, column):
        value, interval = rows[name][column], intervals[name].get(column)
        if value is None or isinstance(value, int):
            return "-" if value is None else str(value)
        digits = (
            0
            if column == "desync_ms"
            else 2
            if column in ("frechet", "melception_fid", "loudness_db", "seconds")
            else 3
        )
        return f"{value:.{digits}f}" + (
            f" ±{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
        )

    columns = [
        c for c in next(iter(rows.values())) if any(row.get(c) is not None for row in rows.values())
    ]
    lines = [["", *rows]] + [
        [c, *(cell(name, c) if c in rows[name] else "-" for name in rows)] for c in columns
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])])
        for line in lines
    )


PLOTTED = ("onset_f1_100ms", "onset_f1_50ms", "align_acc", "material_acc")


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Formatter)
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="clips, best with labels, as foley.py makes",
    )
    p.add_argument(
        "--samples",
        type=Path,
        metavar="DIR",
        help="sounds made elsewhere: NAME.foley.wav, NAME.wav or NAME.mp4; else drawn now",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where evaluate.json and evaluate.png go",
    )
    p.add_argument(
        "--keep",
        action="store_true",
        help="write the drawn sounds there too, as NAME.foley.wav, tagged and with the "
        "watermark; the table is of the same sounds without it",
    )
    p.add_argument(
        "--split",
        choices=SPLITS,
        help="only the clips that a training on DIR puts there: val and test are never trained on",
    )
    p.add_argument(
        "--round-trip",
        type=Path,
        metavar="FILE",
        help="a row more: the true sounds through this autoencoder and the vocoder",
    )
    p.add_argument("--clips", type=int, metavar="N", help="only the first N")
    p.add_argument(
        "--weights",
        nargs="+",
        default=["mini"],
        metavar="mini|DIR",
        help="the models to draw with; a row each, if several",
    )
    p.add_argument(
        "--judges",
        type=Path,
        default=Path(__file__).parent / "weights" / "mini",
        metavar="DIR",
        help="the judges' weights",
    )
    p.add_argument(
        "--official-melception",
        type=Path,
        metavar="FILE",
        help="SpecVQGAN's published weights, its bands' statistics beside them: the paper's FID, IS and KL too",
    )
    p.add_argument(
        "--ablate",
        choices=list(ABLATIONS),
        help="a row for every setting of one kind, instead of `ours`",
    )
    p.add_argument("--seed", type=int, default=0, help="clip k is drawn with seed + k")
    p.add_argument("--steps", type=int, default=25, help="denoising steps")
    p.add_argument(
        "--cfg", type=float, help="classifier-free guidance; what suits the weights where not given"
    )
    p.add_argument(
        "--cg", type=float, help="guidance by the alignment classifier, 0 for none; likewise"
    )
    p.add_argument(
        "--sampler", choices=["dpm", "ddim", "plms"], default="dpm", help="of the diffusion"
    )
    p.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to draw"
    )
    args = p.parse_args(argv)
    if args.clips is not None and args.clips < 2:
        p.error("--clips: must be 2 or more, so that sounds can be dealt to wrong videos")
    if args.steps < 1:
        p.error("--steps: must be 1 or more")
    if args.samples and (args.ablate or len(args.weights) > 1):
        p.error("--samples: are one row; leave --ablate and further --weights out")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with distributed.report_errors("evaluate.py", MediaError, OSError):
        distributed.init(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        rows, intervals, clips = evaluate(args)
        if distributed.rank() == 0:
            settings = {
                name: str(value) if isinstance(value, (Path, list)) else value
                for name, value in vars(args).items()
            }
            with atomic_write(args.out / "evaluate.json") as part:
                part.write_text(
                    json.dumps(
                        {
                            "rows": rows,
                            "intervals": intervals,
                            "settings": settings,
                            "clips": clips,
                        },
                        indent=1,
                    )
                    + "\n"
                )
            with atomic_write(args.out / "evaluate.png") as part:
                columns = [c for c in PLOTTED if rows["ground_truth"].get(c) is not None]
                plots.plot_table(part, rows, intervals, columns)
            print(table(rows, intervals))


if __name__ == "__main__":
    main()
