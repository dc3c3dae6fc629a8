"""Do the sounds fall where things happen, and are they the right ones? One table, with intervals.

in   a folder of clips with labels, as foley.py makes, or any videos with sound (the onsets of their
     own sound are then the annotation, unless --annotations gives them); sounds generated now, or
     made elsewhere (--samples)
out  the table, and one for each of --groups; OUT/evaluate.png; OUT/evaluate.json: {"rows": {row:
     {column: value}}, "intervals": {row: {column: [low, high]}}, "groups": {group: {"rows",
     "intervals"}}, "clips": {video: {row: {statistic: value}}}, ...}. Intervals are of 95 %, by
     bootstrap over the clips

    python foley.py held-out --clips 512 --seed 1 && python evaluate.py --data held-out --out scores
    python evaluate.py --data held-out --ablate guidance --out scores/guidance
    torchrun --nproc_per_node 4 evaluate.py --data held-out      the clips divided; the same table
    python evaluate.py --data FOLDER --annotations onsets.json --groups groups.csv     real footage
    python evaluate.py --data held-out --clips 20 --page --out test     blind listening too: see
    python evaluate.py --out test --ratings ratings-*.json              film/listen.py

row                the sound that each video gets
ours               generated for it
ground_truth       its own, the reference: the ceiling of the metrics
wrong_video        ours, but of another video, of any group: the chance level
slid               ours, rotated in time by 1/9 to 8/9 of the clip: the chance level that knows the
                   rate of hits. The detected onsets and the onset strength are rotated, not the
                   sound, and what is counted is averaged over the eight shifts
metronome          hits at 5 a second, averaged over four phases: what regular hits are worth
silence            none
round_trip         its own through an autoencoder and the vocoder: the ceiling of stage 2
                   (--round-trip FILE)
marked             generated with the first K annotated hits given and the others found (--marks K):
                   all rows are then measured after the K-th hit alone
Of slid and metronome there is no sound: columns that need one are empty (null) there.

column             what it measures
onset_f1_100ms     F1 of predicted against annotated onsets, pooled over clips and matched one to
                   one within 100 ms; precision and recall; the same within 50 ms
heard_f1_100ms     F1 against the onsets detected in the reference, whatever the annotation says
onset_count_error  mean difference between the numbers of predicted and annotated onsets
mean_f1_100ms      mean over clips of the clip's own F1; clips without annotated onsets are left out
skill_100ms        that less the same of the sound slid: 0 for whatever only knows the rate of hits
onset_auc          probability that the onset strength is higher in a mel column within 60 ms of an
                   annotated onset than in one over 120 ms from all; mean over clips that have both.
                   0.5 is chance. A hit raises the strength in about half of the columns near it, so
                   the ceiling is not 1 but what ground_truth has
..._100ms_flux     onset_f1, mean_f1 and skill by a second, plain detector (`detect_onsets_flux` of
                   common/audio.py), which also gives the annotation where that is detected
desync_ms          mean absolute lag, up to 1 s, at which the onset strength agrees best with the
                   reference's; clips without onsets are left out
desync_over_200ms  share of clips with a larger lag
align_acc          share of clips that an independent alignment classifier accepts. It is trained as
                   the paper's is (Sec. 5.1: clean latents, `python align.py --clean`) from another
                   seed, and neither guides nor ranks
material_acc       share of annotated hits whose material metrics/judge.py recognizes. It knows the
                   levels of foley.py's sounds; of clips filmed otherwise, what sample.py writes is
                   measured with --lufs -23
frechet            distance between all sounds and all references in the judge's space
inception_score    quality and variety, by the judge's classes
kl                 mean divergence of a sound's classes from its reference's
melception_...     the paper's FID, inception score (with its deviation over 10 splits, from 10
                   clips on) and KL, with --official-melception: see metrics/melception.py. Of these
                   only KL has an interval: resampled clips repeat, which the others would notice
loudness_db        mean absolute difference in level from the reference
seconds            mean time to generate a sound

All rows share the mel, the onset detector (set on recorded sounds of seed 9) and the metrics.
"""

import csv
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from common import startup

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from align import Alignment
from cavp import CAVP
from common import distributed, plots
from common.audio import (
    COLUMN,
    HOP,
    SAMPLE_RATE,
    detect_onsets,
    detect_onsets_flux,
    f1,
    match,
    mel,
    onset_strength,
    vocode_long,
)
from common.cli import Parser, number
from common.controls import FINDERS
from common.files import UserError, atomic_write, make_folder, write_bytes
from common.machine import find_device
from common.media import MediaError, find_videos, probe, read_audio, read_tags, write_wav
from common.onsets import Hit
from data import SPLITS, read_onsets, split_of
from diffusion import SAMPLERS, SCHEDULES
from film import alike, listen
from film.arguments import GUIDANCE, add_deep_every, add_material, add_tries
from film.level import add_lufs
from film.provenance import make_tags
from film.windows import COLUMNS, Spectrogram
from metrics import judge, melception
from metrics.judge import Judge
from metrics.melception import Melception, Output
from sample import (
    VERSION,
    Settings,
    add_watermark,
    generate,
    load_models,
    plan_windows,
    video_features,
)
from vae import LATENT_SCALE, AutoencoderKL

startup.imported(__name__ == "__main__")

MINI = Path(__file__).parent / "weights" / "mini"
MAX_LAG = 62  # mel columns (1 s) that onset strengths are shifted against each other
FLOOR = 1e-3  # of full scale: quieter sound counts as this loud
RESAMPLES = 1000  # of the bootstrap
SHIFTS = [k / 9 for k in range(1, 9)]  # of the clip's length, by which a sound is slid
BEAT = 0.2  # seconds between the metronome's hits
PHASES = [k / 4 * BEAT for k in range(4)]  # seconds before its first
NEAR = 0.06  # seconds from an annotated onset within which the onset strength should be high
FAR = 0.12  # and beyond which it should be low
# statistics that are not resampled
ONCE = ("melception_generated", "melception_reference", "melception_classes")
PLOTTED = ("onset_f1_100ms", "onset_f1_50ms", "align_acc", "material_acc")
# decimals in the printed table, where not 3
DIGITS = {"desync_ms": 0, "frechet": 2, "melception_fid": 2, "loudness_db": 2, "seconds": 2}

# rows with settings of their own, as in the paper's ablations
ABLATIONS = {
    "guidance": {
        "none": {"guidance": "double", "cfg": 1.0, "cg": 0.0},
        "classifier": {"guidance": "double", "cfg": 1.0},
        "classifier_free": {"guidance": "double", "cg": 0.0},
        "both": {"guidance": "double"},
        # of weights that learned both, by one call a step
        "default": {},
    },
    # who finds the hits
    "onsets": {
        "none": {"onsets": "none"},
        "model": {"onsets": "model"},
        "flow": {"onsets": "flow"},
        "both": {"onsets": "both"},
        "annotated": {"onsets": "annotated"},
    },
    # few steps: which solver, and where its steps lie; DDIM's and PLMS' are evenly spaced
    "few": {
        f"{sampler}_{schedule}_{steps}": {
            "sampler": sampler,
            "schedule": schedule,
            "steps": steps,
        }
        for steps in (4, 6, 8, 10, 15, 25)
        for sampler, schedules in (
            ("dpm", ("uniform", "karras")),
            ("unipc", ("uniform", "karras")),
            ("deis", ("uniform", "karras")),
            ("ddim", ("uniform",)),
            ("plms", ("uniform",)),
        )
        for schedule in schedules
    },
    "cfg": {
        f"cfg_{cfg:g}": {"guidance": "double", "cfg": cfg} for cfg in (1.0, 1.5, 2.5, 3.5, 4.5, 6.5)
    },
    "cg": {f"cg_{cg:g}": {"guidance": "double", "cg": cg} for cg in (0.0, 5.0, 15.0, 30.0, 50.0)},
    "samplers": {
        f"{sampler}_{steps}": {"guidance": "double", "sampler": sampler, "steps": steps}
        for sampler, steps in (
            *(("dpm", steps) for steps in (10, 25, 50)),
            *(("ddim", steps) for steps in (25, 50, 100)),
            *(("plms", steps) for steps in (25, 50)),
        )
    },
}


@dataclass
class Metrics:
    """The networks that judge; what is missing judges nothing."""

    judge: Judge = None
    alignment: Alignment = None
    vae: AutoencoderKL = None  # gives the alignment classifier its latents
    cavp: CAVP = None  # and its features
    melception: Melception = None


@dataclass
class EvalClip:
    """A video, and all that is known about it before anything is generated."""

    video: Path
    mel: torch.Tensor  # (128, s) of the reference, its own sound
    loudness: float  # dB
    ref_onsets: list  # seconds, detected in the reference
    onsets: list  # seconds, annotated; without labels those of the reference
    flux_onsets: list  # seconds, annotated; without labels those of the second detector
    hits: list  # [(mel column, material)] of the annotated hits that nothing masks
    annotated: tuple = ()  # Hit, all that is annotated: for rows that are told it
    skip: int = 0  # samples of the video's sound before the measured part (--marks)
    # where the metric is loaded
    ref_features: np.ndarray = None  # (d,) in the judge's space
    ref_classes: np.ndarray = None  # (classes,) probabilities
    starts: list = None  # samples at which the alignment classifier's windows start
    video_features: torch.Tensor = None  # (n, f, d), what it sees of the picture in each
    ref_melception: Output = None


# --------------------------------------------------------------------------------------------------
# one sound


def loudness(wav):
    """Root mean square of a sound (n,) in dB of full scale, at least that of FLOOR."""
    return 20 * math.log10(max(FLOOR, float(wav.double().square().mean().sqrt())))


def onset_lag(generated, reference):
    """Seconds by which the onset strength `generated` (s,) is late where it fits `reference` best.

    NaN if one of the two has no onsets. Of equally good lags the smallest.
    """
    n = min(len(generated), len(reference))
    generated = generated[:n]
    reference = reference[:n]
    if not (generated.any() and reference.any()):
        return math.nan
    # the nearest first, so that of equally good lags it wins
    limit = min(MAX_LAG, n - 1)
    lags = sorted(range(-limit, limit + 1), key=abs)
    # "full" has the lags from 1 - n to n - 1
    correlation = np.correlate(generated, reference, "full")[np.add(lags, n - 1)]
    return lags[correlation.argmax()] * COLUMN


def onset_auc(strength, annotated):
    """Area under the ROC curve of the onset strength (s,) as a sign of annotated onsets (seconds).

    The probability that a column within NEAR of one is stronger than a column beyond FAR of all, a
    tie counted as half. NaN if one of the two kinds is missing.
    """
    times = np.arange(len(strength)) * COLUMN
    distances = np.abs(times[:, None] - np.asarray(annotated)).min(1, initial=math.inf)  # (s,)
    near = strength[distances <= NEAR]
    far = np.sort(strength[distances > FAR])
    if not (len(near) and len(far)):
        return math.nan
    weaker = np.searchsorted(far, near, "left")
    not_stronger = np.searchsorted(far, near, "right")
    return float((weaker + not_stronger).mean() / (2 * len(far)))


def count_onsets(onsets, flux_onsets, clip: EvalClip):
    """{statistic: number} of onset times by the two detectors, in seconds, ascending."""
    return {
        "predicted": len(onsets),
        "annotated": len(clip.onsets),
        "matched_100ms": len(match(onsets, clip.onsets, 0.1)),
        "matched_50ms": len(match(onsets, clip.onsets, 0.05)),
        "ref_onsets": len(clip.ref_onsets),
        "matched_ref": len(match(onsets, clip.ref_onsets, 0.1)),
        "predicted_flux": len(flux_onsets),
        "annotated_flux": len(clip.flux_onsets),
        "matched_100ms_flux": len(match(flux_onsets, clip.flux_onsets, 0.1)),
    }


def average(stats: list):
    """{statistic: mean} of several dictionaries of the same statistics."""
    return {name: float(np.mean([s[name] for s in stats])) for name in stats[0]}


def onset_stats(onsets, flux_onsets, clip: EvalClip):
    """`count_onsets`, and as slid_matched_... the matches of the onsets rotated within the clip."""
    duration = samples_of(clip.mel) / SAMPLE_RATE
    slid = []
    for shift in SHIFTS:
        rotated = [np.sort((o + shift * duration) % duration) for o in (onsets, flux_onsets)]
        slid.append(count_onsets(*rotated, clip))
    slid = average(slid)
    slid = {f"slid_{name}": slid[name] for name in slid if name.startswith("matched")}
    return count_onsets(onsets, flux_onsets, clip) | slid


def without_sound(stats):
    """These statistics, and NaN for those that need a sound."""
    return dict.fromkeys(("onset_auc", "lag", "loudness", "seconds"), math.nan) | stats


def slid_stats(stats):
    """The statistics of the row slid, from those of the sound."""
    # rotation keeps the numbers of onsets
    counts = ("predicted", "annotated", "ref_onsets", "predicted_flux", "annotated_flux")
    slid = {name: stats[name] for name in counts}
    for name in stats:
        if name.startswith("slid_"):
            slid[name.removeprefix("slid_")] = stats[name]
    return without_sound(slid)


def metronome_stats(clip: EvalClip):
    """The statistics of the row metronome."""
    duration = samples_of(clip.mel) / SAMPLE_RATE
    hits = [np.arange(phase, duration, BEAT) for phase in PHASES]
    return without_sound(average([onset_stats(h, h, clip) for h in hits]))


def samples_of(mel):
    """How many samples the columns of a mel (128, s) stand for."""
    return mel.shape[1] * HOP


def cut_windows(mel, starts):
    """Mel (128, s) -> (n, 1, 128, 512), the model's windows from these samples on."""
    padded = F.pad(mel, (0, COLUMNS))
    firsts = [start // HOP for start in starts]
    return torch.stack([padded[None, :, first : first + COLUMNS] for first in firsts])


@torch.no_grad()
def measure(wav, clip: EvalClip, metrics: Metrics, seconds: float = math.nan):
    """{statistic: value}: all that the table needs to know of a sound (n,) for a clip.

    The sound may be longer or shorter than the clip. `seconds`: what it took to generate.
    """
    # cut to the measured part; the sound of another, shorter video may end before it begins
    wav = F.pad(wav, (0, max(0, clip.skip + HOP - len(wav))))
    wav = wav[clip.skip :][: samples_of(clip.mel)]
    log_mel = mel(wav)
    strength = onset_strength(log_mel)
    # a sound that is shorter than the clip goes on as silence
    columns = clip.mel.shape[1]
    padded = np.pad(strength, (0, columns - len(strength)))
    rotated = [np.roll(padded, round(shift * columns)) for shift in SHIFTS]
    stats = onset_stats(detect_onsets(log_mel), detect_onsets_flux(log_mel), clip) | {
        "onset_auc": onset_auc(padded, clip.onsets),
        "slid_onset_auc": float(np.mean([onset_auc(r, clip.onsets) for r in rotated])),
        "lag": onset_lag(strength, onset_strength(clip.mel)),
        "loudness": loudness(wav) - clip.loudness,
        "seconds": seconds,
    }
    if metrics.judge:
        stats["features"], stats["classes"] = metrics.judge.embed_clip(log_mel)
        stats |= {"ref_features": clip.ref_features, "ref_classes": clip.ref_classes}
        materials = metrics.judge.classify(log_mel, [column for column, _ in clip.hits])
        stats["hits"] = len(materials)
        pairs = zip(materials, clip.hits, strict=True)
        stats["correct"] = sum(predicted == annotated for predicted, (_, annotated) in pairs)
    if metrics.alignment:
        padded = F.pad(log_mel, (0, columns - log_mel.shape[1]))
        z, _ = metrics.vae.encode(cut_windows(padded, clip.starts))
        times = torch.zeros(len(z))  # diffusion times: without noise
        probability = metrics.alignment(LATENT_SCALE * z, times, clip.video_features)
        stats["aligned"] = probability.mean().item() > 0.5
    if metrics.melception:
        output = metrics.melception.embed_clip(melception.generated_mel(log_mel))
        stats |= {
            "melception_generated": output.features,
            "melception_reference": clip.ref_melception.features,
            "melception_classes": melception.softmax(output.unbiased),
            "melception_kl": melception.kl(clip.ref_melception.logits, output.logits),
        }
    return stats


# --------------------------------------------------------------------------------------------------
# a row of the table


def mean(values):
    """Of what is not NaN; None of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def clip_f1(matched, predicted, annotated):
    """Numbers of onsets (n,) -> the F1 of each clip (n,); NaN where none is annotated."""
    return np.where(annotated > 0, 2 * matched / np.maximum(predicted + annotated, 1), np.nan)


def mean_f1_and_skill(stats, detector=""):
    """The columns of F1 that are means over clips; the row slid has no skill."""
    counts = [stats[f"{name}{detector}"] for name in ("predicted", "annotated")]
    scores = clip_f1(stats[f"matched_100ms{detector}"], *counts)
    slid = stats.get(f"slid_matched_100ms{detector}")
    skill = None if slid is None else mean(scores - clip_f1(slid, *counts))
    return {f"mean_f1_100ms{detector}": mean(scores), f"skill_100ms{detector}": skill}


def columns_of(stats):
    """{statistic: array over clips} -> {column: value}; None where there is no value."""
    row = {}
    count = len(stats["predicted"])
    predicted = stats["predicted"].sum()
    for within in ("100ms", "50ms"):
        scores = f1(stats[f"matched_{within}"].sum(), predicted, stats["annotated"].sum())
        for name, score in zip(("precision", "recall", "onset_f1"), scores, strict=True):
            row[f"{name}_{within}"] = float(score)
    against_reference = f1(stats["matched_ref"].sum(), predicted, stats["ref_onsets"].sum())
    row["heard_f1_100ms"] = float(against_reference[2])
    row["onset_count_error"] = mean(np.abs(stats["predicted"] - stats["annotated"]))
    row |= mean_f1_and_skill(stats)
    row["onset_auc"] = mean(stats["onset_auc"])
    counts = [stats[f"{name}_flux"].sum() for name in ("matched_100ms", "predicted", "annotated")]
    row["onset_f1_100ms_flux"] = float(f1(*counts)[2])
    row |= mean_f1_and_skill(stats, "_flux")

    # a clip without onsets has no lag
    lags = 1000 * np.abs(stats["lag"])
    row["desync_ms"] = mean(lags)
    row["desync_over_200ms"] = mean(lags[~np.isnan(lags)] > 200)
    row["align_acc"] = mean(stats["aligned"]) if "aligned" in stats else None
    row["material_acc"] = None
    if "features" in stats:
        if stats["hits"].any():
            row["material_acc"] = float(stats["correct"].sum() / stats["hits"].sum())
        row["frechet"] = None
        if count > 2:
            row["frechet"] = judge.frechet_distance(stats["features"], stats["ref_features"])
        row["inception_score"] = judge.inception_score(stats["classes"])
        row["kl"] = mean(judge.kl_divergence(stats["ref_classes"], stats["classes"]))

    # in a resampling only the divergence is left
    if "melception_generated" in stats:
        generated = stats["melception_generated"]
        row["melception_fid"] = None
        if count > 1:
            row["melception_fid"] = melception.fid(generated, stats["melception_reference"])
        scores = melception.split_inception_score(stats["melception_classes"])
        row["melception_is"], row["melception_is_deviation"] = scores
    if "melception_kl" in stats:
        row["melception_kl"] = mean(stats["melception_kl"])
    row["loudness_db"] = mean(np.abs(stats["loudness"]))
    row["seconds"] = mean(stats["seconds"])
    return {**row, "clips": count}


def resample(stats, clips):
    """The statistics of some of the clips, by their numbers, which may repeat."""
    return {name: values[clips] for name, values in stats.items() if name not in ONCE}


def score(measured: list, seed: int = 0):
    """What `measure` says of each clip -> {column: value}, {column: [low, high]} of 95 %."""
    # arrays over the clips
    stats = {name: np.stack([m[name] for m in measured]) for name in measured[0]}
    # the bootstrap: as many clips, drawn with repetition
    rng = np.random.default_rng(seed)
    n = len(measured)
    resampled = []
    for _ in range(RESAMPLES):
        resampled.append(columns_of(resample(stats, rng.integers(n, size=n))))

    row = columns_of(stats)
    intervals = {}
    for name, value in row.items():
        values = [r[name] for r in resampled if r.get(name) is not None]
        # the number of clips is the same in all
        if values and value is not None and name != "clips":
            intervals[name] = np.percentile(values, (2.5, 97.5)).tolist()
    return row, intervals


# --------------------------------------------------------------------------------------------------
# clips and their sounds


def derange(count: int, seed: int = 0):
    """A fixed permutation of `count` clips in which none keeps its place: a shuffled ring."""
    ring = np.random.default_rng([seed, count]).permutation(count)
    # each gets the one before it in the ring
    return np.roll(ring, 1)[np.argsort(ring)]


def share_out(function, count: int, description: str):
    """[function(0), ... function(count - 1)], divided among the processes; all get all results."""
    world = distributed.world()
    mine = range(distributed.rank(), count, world)
    bar = tqdm(mine, desc=description, unit="clip", disable=distributed.rank() > 0)
    results = distributed.all_gather_object([function(k) for k in bar])
    # process r has done r, r + world, r + 2 world, ...
    return [results[k % world][k // world] for k in range(count)]


def find_clips(args):
    """The videos of --data, or of one --split of it; the first --clips of them."""
    if not args.data.is_dir():
        raise MediaError(f"{args.data}: no such folder; give one with videos, say of foley.py")
    videos = find_videos([args.data])
    if args.split:
        # a split goes by the name within the folder, as in training
        names = [video.relative_to(args.data).as_posix() for video in videos]
        videos = [args.data / name for name in names if split_of(name) == args.split]
    if len(videos) < 2:
        split = f" of the split {args.split}" if args.split else ""
        raise MediaError(
            f"{args.data}: {len(videos)} clips{split}; give at least two, for the row wrong_video"
        )
    return videos[: args.clips]


def listed(names):
    """Some names as text, at most five of them."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_annotations(path, videos):
    """--annotations: {video: onset times in seconds, ascending}. Raises MediaError."""
    try:
        content = json.loads(path.read_text())
        by_name = {name: sorted(map(float, times)) for name, times in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise MediaError(f"{path}: not a JSON file of {{name: [seconds]}}; correct it") from None
    missing = [video.stem for video in videos if video.stem not in by_name]
    if missing:
        raise MediaError(f"{path}: has no {listed(missing)}; add the onset times, or []")
    return {video: by_name[video.stem] for video in videos}


def read_groups(path, videos):
    """--groups: {group: numbers of its clips}, in the order of the file. Raises MediaError.

    A clip may be in several. Warns of names without a clip, and of clips without a group, which
    are in the whole table alone.
    """
    try:
        # spreadsheets begin their files with a byte-order mark
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"{path}: cannot be read ({error}); give a CSV file") from None
    if not rows or not {"name", "group"} <= rows[0].keys():
        raise MediaError(f"{path}: no rows with columns `name` and `group`; name both in line 1")
    members = {}  # {group: names}
    for row in rows:
        if row["name"] and row["group"]:
            members.setdefault(row["group"], set()).add(row["name"])

    names = [video.stem for video in videos]
    unknown = set().union(*members.values()).difference(names)
    without = set(names).difference(*members.values())
    if unknown and distributed.rank() == 0:
        print(f"evaluate.py: {path}: no clip named {listed(unknown)}; left out", file=sys.stderr)
    if without and distributed.rank() == 0:
        line = f"no group for {listed(without)}; counted in the whole table alone"
        print(f"evaluate.py: {path}: {line}", file=sys.stderr)
    groups = {}
    for group, of_group in members.items():
        clips = [k for k, name in enumerate(names) if name in of_group]
        if clips:
            groups[group] = clips
    return groups


def read_clip(video: Path, metrics: Metrics, annotated: list | None = None, material=(), marks=0):
    """An EvalClip. Its onsets: `annotated` (seconds), else the labels, else the reference's own.

    material: what every hit is to sound like, instead of what the labels say; marks: only what
    follows this many hits is measured.
    """
    wav = read_audio(video, duration=probe(video).duration)
    log_mel = mel(wav)
    ref_onsets = detect_onsets(log_mel).tolist()
    is_labeled = annotated is not None or video.with_suffix(".json").is_file()
    if annotated is None and is_labeled:
        labels = read_onsets(video)
    else:
        labels = [{"time": time} for time in (annotated if is_labeled else ref_onsets)]
    if material:
        labels = [{**onset, "material": material[0]} for onset in labels]
    hits = tuple(Hit(o["time"], o.get("strength"), o.get("material")) for o in labels)
    isolated = judge.isolated_hits(labels) if labels and "material" in labels[0] else []

    # the measured part begins after the marks, at a mel column, if a second of sound is left
    skip = 0
    if 0 < marks < len(hits):
        skip = math.ceil((hits[marks - 1].time + alike.AFTER) / COLUMN)
        if len(wav) < skip * HOP + SAMPLE_RATE:
            skip = 0
    if skip:
        wav = wav[skip * HOP :]
        log_mel = mel(wav)
        ref_onsets = detect_onsets(log_mel).tolist()
        isolated = [(column - skip, name) for column, name in isolated if column >= skip]
    flux_onsets = detect_onsets_flux(log_mel).tolist()
    clip = EvalClip(video, log_mel, loudness(wav), ref_onsets, ref_onsets, flux_onsets, isolated)
    clip.annotated = hits
    clip.skip = skip * HOP
    if is_labeled:
        start = skip * COLUMN
        clip.onsets = [hit.time - start for hit in hits if hit.time >= start]
        clip.flux_onsets = clip.onsets
    if metrics.judge:
        clip.ref_features, clip.ref_classes = metrics.judge.embed_clip(log_mel)
    if metrics.alignment:
        # the features of each window's own seconds
        fps = metrics.alignment.config.fps
        frames = metrics.alignment.config.frames
        clip.starts = plan_windows(samples_of(log_mel), fps)
        firsts = [round(start * fps / SAMPLE_RATE) for start in clip.starts]
        count = firsts[-1] + frames
        begin = clip.skip / SAMPLE_RATE
        features = video_features(video, metrics.cavp, count, len(wav) / SAMPLE_RATE, begin)
        clip.video_features = torch.stack([features[first : first + frames] for first in firsts])
    if metrics.melception:
        clip.ref_melception = metrics.melception.embed_clip(melception.reference_mel(wav))
    return clip


def load_metrics(folder: Path):
    """Those whose weights are in the folder: judge; judge_align, with cavp and ldm beside it."""
    metrics = Metrics()
    materials = folder / "judge.safetensors"
    if materials.is_file():
        metrics.judge = Judge.load(materials)
    alignment = folder / "judge_align.safetensors"
    if alignment.is_file():
        metrics.alignment = Alignment.load(alignment)
        metrics.vae = AutoencoderKL.load(folder / "ldm.safetensors")
        metrics.cavp = CAVP.load(folder / "cavp.safetensors", audio=False).fold()
    return metrics


def find_sample(folder: Path, video: Path, flag="--samples"):
    """The sound made elsewhere for a video; raises MediaError if there is none."""
    for suffix in (".foley.wav", ".wav", ".foley.mp4", ".mp4"):
        path = folder / f"{video.stem}{suffix}"
        if path.is_file():
            return path
    raise MediaError(
        f"{folder}: no {video.stem}.foley.wav, .wav or .mp4; make it, or leave out {flag}"
    )


def settings_of(args):
    """The command line's settings; ValueError for what cannot be."""
    names = ("seed", "steps", "guidance", "cfg", "cg", "sampler", "schedule", "deep_every")
    more = ("tries", "onsets", "material", "lufs")
    return Settings(**{name: getattr(args, name) for name in (*names, *more)})


def generate_sound(video, models, settings):
    """-> the unmarked sound (n,), and the seconds that it took."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        # about the file, which was read before
        warnings.simplefilter("ignore")
        result = generate(video, models, settings=settings, mark=False)
    return result.wav, time.perf_counter() - start


def make_sounds(videos, clips, args, changes, name):
    """[(sound (n,), seconds it took)], from --samples or generated with the seed + clip number."""
    if args.samples:
        paths = [find_sample(args.samples, video) for video in videos]
        return share_out(lambda k: (read_audio(paths[k]), math.nan), len(videos), name)
    changes = dict(changes)
    models = load_models(changes.pop("weights", args.weights[0]), args.device)
    annotated = [clip.annotated for clip in clips]

    def make(k):
        settings = replace(settings_of(args), seed=args.seed + k, **changes)
        if settings.onsets in ("annotated", "marked"):
            # what these weights were never told of is left open, as in training
            known = models.ldm.materials
            hits = [h if h.material in known else h._replace(material=None) for h in annotated[k]]
            if settings.onsets == "marked":
                settings = replace(settings, onsets=tuple(hits[: args.marks]), find_rest=True)
            else:
                settings = replace(settings, onsets=tuple(hits))
        wav, seconds = generate_sound(videos[k], models, settings)
        if args.keep:
            # what leaves the program is marked; the table measures it unmarked
            path = args.out / f"{videos[k].stem}.foley.wav"
            tags = make_tags(models, settings, VERSION, has_picture=False)
            write_wav(path, add_watermark(wav), tags)
        return wav, seconds

    return share_out(make, len(videos), name)


def write_listening(videos, wavs, partners, args):
    """--page: a blind listening test of these sounds, ours or of --samples, one of each video.

    partners: the video whose sound each video has in the pair with the wrong one.
    """
    models = None if args.samples else load_models(args.weights[0], args.device)
    ours = []
    for k, wav in enumerate(wavs):
        # what is generated here is marked here; what was made elsewhere keeps its tag
        if args.samples:
            ours.append((wav, tags_elsewhere(find_sample(args.samples, videos[k]))))
        else:
            settings = replace(settings_of(args), seed=args.seed + k)
            tags = make_tags(models, settings, VERSION, has_picture=False)
            ours.append((add_watermark(wav), tags))
    sounds = {
        "ours": ours,
        "ground_truth": [(read_audio(video), {}) for video in videos],
        "wrong_video": [ours[k] for k in partners],
    }
    if args.against:
        paths = [find_sample(args.against, video, "--against") for video in videos]
        sounds["against"] = [(read_audio(path), tags_elsewhere(path)) for path in paths]
    listen.write_test(args.out, videos, sounds, args.seed)
    print(f"{args.out / 'listen.html'}  open it in a browser; {listen.KEY} is not for raters")


def tags_elsewhere(path):
    """The comment of a sound made elsewhere, which may say how."""
    tags = read_tags(path)
    return {"comment": tags["comment"]} if "comment" in tags else {}


@torch.no_grad()
def round_trip(clip: EvalClip, vae):
    """The reference as an autoencoder and the vocoder reproduce it, window by window: (n,)."""
    samples = samples_of(clip.mel)
    # windows may start at any column: no frames are involved
    starts = plan_windows(samples, SAMPLE_RATE / HOP)
    z, _ = vae.encode(cut_windows(clip.mel, starts))

    def decode(z):
        return vae.decode(z)[:, 0].clamp(0, 1)

    joined = Spectrogram(z, starts, clip.mel.shape[1], decode, len(starts), clip.video)
    return vocode_long(joined, samples)


def variants(args):
    """{row: settings that differ from the command line's} of the generated rows."""
    if args.ablate:
        return ABLATIONS[args.ablate]
    if args.marks:
        return {"ours": {}, "marked": {"onsets": "marked"}}
    if len(args.weights) == 1:
        return {"ours": {}}
    return {Path(weights).name: {"weights": weights} for weights in args.weights}


def numbers(stats):
    """A clip's statistics without the arrays; None for NaN, which JSON does not have."""
    out = {}
    for name, value in stats.items():
        if np.ndim(value) == 0:
            out[name] = None if math.isnan(value) else value
    return out


def score_rows(measured, clips):
    """{row: what `measure` says of each clip} -> {"rows", "intervals"} of these clips (numbers)."""
    result = {"rows": {}, "intervals": {}}
    for name, stats in measured.items():
        row, intervals = score([stats[k] for k in clips])
        # rows without a sound lack columns
        columns = next(iter(result["rows"].values()), row)
        result["rows"][name] = {column: row.get(column) for column in columns}
        result["intervals"][name] = intervals
    return result


def with_hits_after_marks(clips, marks):
    """Numbers of the clips with a hit, and a second of sound, after the first --marks hits."""
    kept = [k for k, clip in enumerate(clips) if clip.skip and clip.onsets]
    line = (
        f"of {len(clips)} clips {len(kept)} have a hit, and a second of sound, after {marks} hits"
    )
    if len(kept) < 2:
        raise MediaError(f"--marks: {line}; give a smaller number")
    if len(kept) < len(clips) and distributed.rank() == 0:
        print(f"evaluate.py: {line}; the others are left out", file=sys.stderr)
    return kept


def check_weights(args):
    """Raises UserError for what these weights cannot be given."""
    if args.material or args.onsets or args.marks or args.ablate == "onsets":
        try:
            annotated = args.onsets == "annotated" or args.marks or args.ablate == "onsets"
            onsets = () if annotated else args.onsets
            replace(settings_of(args), onsets=onsets).resolve(
                load_models(args.weights[0], args.device)
            )
        except ValueError as error:
            raise UserError(f"--{error}") from None


def check_page(args, videos):
    """Raises UserError for what stands in the way of a listening test."""
    if args.page:
        listen.check_free(args.out)
    if args.against:
        for video in videos:
            find_sample(args.against, video, "--against")


def evaluate(args):
    """-> {"rows", "intervals", "groups", "clips"} as the module describes them."""
    # what would only show after an hour
    check_weights(args)
    videos = find_clips(args)
    check_page(args, videos)
    annotations = read_annotations(args.annotations, videos) if args.annotations else {}
    groups = read_groups(args.groups, videos) if args.groups else {}
    metrics = load_metrics(args.judges)
    if args.official_melception:
        metrics.melception = Melception.load(args.official_melception, args.device)

    def read(k):
        return read_clip(videos[k], metrics, annotations.get(videos[k]), args.material, args.marks)

    clips = share_out(read, len(videos), "reading")
    if args.marks:
        kept = with_hits_after_marks(clips, args.marks)
        videos = [videos[k] for k in kept]
        clips = [clips[k] for k in kept]
        groups = {name: [kept.index(k) for k in of if k in kept] for name, of in groups.items()}
        groups = {name: of for name, of in groups.items() if of}
    if not any(clip.onsets for clip in clips):
        raise MediaError(f"{args.data}: no onset in {len(videos)} clips; give more with --clips")

    measured = {}

    def add_row(name, wavs, seconds=None):
        seconds = seconds or [math.nan] * len(wavs)

        def measure_clip(k):
            return measure(wavs[k], clips[k], metrics, seconds[k])

        measured[name] = share_out(measure_clip, len(clips), f"{name}: metrics")

    for name, changes in variants(args).items():
        wavs, seconds = zip(*make_sounds(videos, clips, args, changes, name), strict=True)
        add_row(name, wavs, seconds)
    # the baselines; the wrong and the slid sounds are of the last variant
    partners = derange(len(videos))
    wrong = [wavs[k] for k in partners]
    if args.page and distributed.rank() == 0:
        write_listening(videos, wavs, partners, args)
    add_row("ground_truth", [read_audio(video) for video in videos])
    add_row("wrong_video", wrong)
    measured["slid"] = [slid_stats(stats) for stats in measured[name]]
    measured["metronome"] = [metronome_stats(clip) for clip in clips]
    add_row("silence", [torch.zeros(clip.skip + samples_of(clip.mel)) for clip in clips])
    if args.round_trip:
        vae = AutoencoderKL.load(args.round_trip)
        wavs = share_out(lambda k: round_trip(clips[k], vae), len(clips), "round_trip")
        add_row("round_trip", wavs)

    result = score_rows(measured, range(len(videos)))
    result["groups"] = {group: score_rows(measured, groups[group]) for group in groups}
    result["clips"] = {}
    for k, video in enumerate(videos):
        by_row = {name: numbers(stats[k]) for name, stats in measured.items()}
        result["clips"][video.relative_to(args.data).as_posix()] = by_row
    return result


# --------------------------------------------------------------------------------------------------
# the table


def table(rows: dict, intervals: dict):
    """As text, a line for each column; half the interval's width after a value, '-' for none."""

    def cell(name, column):
        value = rows[name].get(column)
        if value is None:
            return "-"
        if column == "clips":
            return str(value)
        digits = DIGITS.get(column, 3)
        text = f"{value:.{digits}f}"
        if column in intervals[name]:
            low, high = intervals[name][column]
            text += f" ±{(high - low) / 2:.{digits}f}"
        return text

    # a column of the table without any value is left out
    lines = [["", *rows]]
    for column in next(iter(rows.values())):
        cells = [cell(name, column) for name in rows]
        if set(cells) != {"-"}:
            lines.append([column, *cells])
    # names to the left, numbers to the right
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = []
    for title, *cells in lines:
        padded = [c.rjust(width) for c, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([title.ljust(widths[0]), *padded]))
    return "\n".join(text)


def write(args, rows, intervals, groups, clips):
    """The files, and the tables on the screen."""
    content = {"rows": rows, "intervals": intervals, "groups": groups}
    content |= {"settings": vars(args), "clips": clips}
    text = json.dumps(content, indent=1, default=str)
    write_bytes(args.out / "evaluate.json", f"{text}\n".encode())
    columns = [c for c in PLOTTED if rows["ground_truth"].get(c) is not None]
    # what a row does not have is NaN, which is not drawn
    values = {}
    bounds = {}
    for name, row in rows.items():
        values[name] = {c: math.nan if row[c] is None else row[c] for c in columns}
        bounds[name] = {c: intervals[name].get(c, [math.nan] * 2) for c in columns}
    with atomic_write(args.out / "evaluate.png") as part:
        plots.plot_table(part, values, bounds, columns)
    print(table(rows, intervals))
    for group, scores in groups.items():
        titled = [{f"{n} [{group}]": scores[k][n] for n in rows} for k in ("rows", "intervals")]
        print(f"\n{table(*titled)}")


def arguments(argv):
    p = Parser("evaluate.py", __doc__)
    add_table_arguments(p)
    add_generation_arguments(p)
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_listening_arguments(p.add_argument_group("blind listening"))
    args = p.parse_args(argv)
    check_listening(p, args)
    if args.samples and (args.ablate or len(args.weights) > 1):
        p.error("--samples: is one row; leave out --ablate and further --weights")
    if args.onsets and args.ablate == "onsets":
        p.error("--ablate onsets: has a row for each finder; leave out --onsets")
    others = (args.samples, args.ablate, args.onsets, args.round_trip, args.page, args.keep)
    if args.marks and any(others):
        p.error(
            "--marks: has rows of its own; leave out --samples, --ablate, --onsets, --round-trip, "
            "--page and --keep"
        )
    if args.marks and len(args.weights) > 1:
        p.error("--marks: is of one model; leave out further --weights")
    if args.samples and args.lufs is not None:
        p.error("--lufs: is of what is generated here; leave it out with --samples")
    try:
        settings_of(args)
        args.device = str(find_device(args.device))
    except ValueError as error:
        p.error(str(error))
    return args


def add_table_arguments(p):
    """What is measured, on which clips, by whom."""
    p.add_argument("--data", type=Path, help="folder of clips, best with labels")
    p.add_argument(
        "--samples",
        type=Path,
        help="folder of sounds made elsewhere, NAME.foley.wav, NAME.wav or NAME.mp4; "
        "default: generate them",
    )
    p.add_argument(
        "--annotations",
        type=Path,
        help="JSON file of onset times, {NAME: [seconds]}, instead of labels beside the clips",
    )
    p.add_argument(
        "--groups", type=Path, help="CSV file with columns name, group: the same table of each"
    )
    p.add_argument("--out", type=Path, default=Path(), help="output folder")
    p.add_argument(
        "--keep",
        action="store_true",
        help="write the generated sounds there too, tagged and with the watermark; the table "
        "measures them without",
    )
    p.add_argument(
        "--split",
        choices=SPLITS,
        help="only this split of the clips, as training on --data makes it; val and test are "
        "never trained on",
    )
    p.add_argument("--round-trip", type=Path, help="the autoencoder of the row round_trip")
    p.add_argument("--clips", type=number(int, 2), help="only the first so many")
    p.add_argument(
        "--weights",
        nargs="+",
        default=["mini"],
        metavar="mini|DIR",
        help="models that generate; with several, a row each",
    )
    p.add_argument("--judges", type=Path, default=MINI, help="folder of the metrics' weights")
    p.add_argument(
        "--official-melception",
        type=Path,
        help="SpecVQGAN's published weights, with the statistics file beside them",
    )
    p.add_argument("--ablate", choices=ABLATIONS, help="a row for each setting, instead of `ours`")
    p.add_argument(
        "--marks",
        type=number(int, 2),
        default=0,
        metavar="K",
        help="what marks are worth: in the row `marked` the first K annotated hits are given and "
        "the others found (sample.py --find-rest); all rows are of what follows those hits",
    )


def add_generation_arguments(p):
    """Settings of the sounds that are made here."""
    p.add_argument("--seed", type=int, default=0, help="clip k is generated with seed + k")
    p.add_argument("--steps", type=int, help="of the sampler; default: what suits the weights")
    p.add_argument("--guidance", choices=GUIDANCE, help="as for sample.py")
    p.add_argument(
        "--cfg", type=float, help="classifier-free guidance; default: what suits the weights"
    )
    p.add_argument("--cg", type=float, help="classifier guidance; 0: off; default: likewise")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="as for sample.py")
    p.add_argument("--schedule", choices=SCHEDULES, default="uniform", help="as for sample.py")
    add_deep_every(p)
    add_tries(p)
    p.add_argument(
        "--onsets",
        choices=(*FINDERS, "annotated"),
        help="who finds the hits, as for sample.py; annotated: the model is told the true ones",
    )
    add_material(p)
    add_lufs(p)
    # the model's own level, which the table measures
    p.set_defaults(lufs=None)


def add_listening_arguments(g):
    g.add_argument(
        "--page",
        action="store_true",
        help="OUT/listen.html too: pairs of sounds in random order, which fits the picture?",
    )
    g.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="with --page: pairs with these sounds of another model too, named as for --samples",
    )
    g.add_argument(
        "--ratings",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="instead of all else: how often ours was preferred, by the ratings that the page in "
        "--out saved",
    )


def check_listening(p, args):
    """What cannot be asked for of --page, --against and --ratings ends the program."""
    if not args.ratings and args.data is None:
        p.error("--data: is missing; give a folder of clips")
    if args.ratings and (args.page or args.data):
        p.error("--ratings: is by itself; leave out --page and --data")
    if args.against and not args.page:
        p.error("--against: is for listening; add --page")
    if args.page and (args.ablate or len(args.weights) > 1):
        p.error("--page: compares one row of ours; leave out --ablate and further --weights")


def main(argv=None):
    args = arguments(argv)
    with distributed.report_errors("evaluate.py"):
        if args.ratings:
            pairs, raters = listen.read_ratings(args.ratings, args.out / listen.KEY)
            print(listen.report(listen.tally(pairs, raters)))
            return
        distributed.init(args.device)
        make_folder(args.out)
        result = evaluate(args)
        if distributed.rank() == 0:
            write(args, **result)


if __name__ == "__main__":
    main()
