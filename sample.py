"""Sound for silent video: the main job (Diff-Foley, Sec. 3.3 and 3.4).

in   videos, or folders of them, of any length, frame rate and size
out  beside each NAME.foley.mp4 (picture copied bit for bit, sound exactly as long) and NAME.foley.wav

    python sample.py demo.mp4
    python sample.py clips/ --out dubbed/ --candidates 4 --plot
    python sample.py --verify dubbed/clip.foley.mp4       is its sound ours? By tag and watermark, without any model

Windows of 131,072 samples (8.192 s) are planned in samples: they start on whole video features and whole mel columns,
overlap by a second or more, and each is conditioned, classifier included, on the frames of its own seconds. Windows
that overlap begin from the same slice of one noise field and are faded into each other as spectrograms, so that one
phase-coherent Griffin-Lim makes the whole sound. It is scaled down where it would clip; but for the watermark (1 dB, see
watermark.py) nothing else touches its level.

Differs from the official demo, which joins windows end to end (0.176 s of slip in each), drops tails, crashes under 8
s, shows its classifier the frames of the whole clip, and inverts the mel at another rate than it was made with.
"""

import argparse
import itertools
import json
import math
import numbers
import os
import re
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from common import isolation

STARTED = time.perf_counter()  # before the slow imports: the profile counts them
VERSION = "0.2"


# ---------------------------------------------------------------------------------------------------------------------
# the command line; it stands before the imports of torch (2 s), so that --help and wrong usage answer at once


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage first
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as written, and every default that is a value."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number within [low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"from {low:g} up" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' * (kind is int)}number {limits}"
            )
        return value

    return parse


def parse_arguments(argv=None):
    p = Parser("sample.py", description=__doc__, formatter_class=Formatter)
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="videos or folders; after -- names may begin with a dash",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="make nothing, but say of each INPUT (wav too) whether its sound is ours; "
        "exit status 3 where one is not",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="write there; default: beside each input"
    )
    p.add_argument(
        "--weights",
        default="mini",
        metavar="mini|official|DIR",
        help="the model shipped here; the published one "
        "(4.3 GB, fetched once); or a folder with the checkpoints cavp, ldm and align: ours or the published ones",
    )
    g = p.add_argument_group("sampling; steps and sampler are the paper's by default")
    g.add_argument("--steps", type=number(int, 1, 1000), default=25, help="of the sampler")
    g.add_argument(
        "--cfg",
        type=number(float, 0),
        help="classifier-free guidance; 1: off; default: what suits the weights "
        "(published: 4.5, as in the paper; mini: 2.5)",
    )
    g.add_argument(
        "--cg",
        type=number(float, 0),
        help="guidance by the alignment classifier; 0: off; default: what suits the "
        "weights' own classifier (published: 50, as in the paper; mini: 15)",
    )
    g.add_argument(
        "--sampler",
        choices=("dpm", "ddim", "plms"),
        default="dpm",
        help="DPM-Solver++ 2M, DDIM or PLMS",
    )
    g.add_argument("--seed", type=number(int, 0, 2**40), default=0, help="same seed, same sound")
    g.add_argument(
        "--as-official",
        action="store_true",
        help="what the official demo does with the published weights, quirk for "
        "quirk: windows end to end, pitch at 0.73, the first 8.2 s (see official.py)",
    )
    g.add_argument(
        "--candidates",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="draw N and keep the one that the classifier rates best",
    )
    g.add_argument(
        "--keep-all", action="store_true", help="write every candidate too, as NAME.foley.K.wav"
    )
    g = p.add_argument_group("input")
    g.add_argument(
        "--start", type=number(float, 0), default=0.0, metavar="S", help="seconds into the picture"
    )
    g.add_argument(
        "--duration",
        type=number(float, 1e-3),
        metavar="S",
        help="seconds of picture; default: the rest",
    )
    g.add_argument(
        "--keep-audio",
        type=number(float, -100, 100),
        nargs="?",
        const=0.0,
        metavar="dB",
        help="mix the clip's own sound in, at this gain (0 if none is given); the mix is written: 16 kHz, one channel",
    )
    g.add_argument(
        "--keep-tracks",
        action="store_true",
        help="the clip's own sound tracks stay, as they are, as further tracks of the video",
    )
    g = p.add_argument_group("run")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 for "
        "networks of the published size, on a GPU and on a CPU that computes in it; else float32",
    )
    g.add_argument(
        "--kernels",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="fused kernels for NVIDIA GPUs; auto: where they can run",
    )
    g.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="say which kernels run, what had to be done without, and what else lies in a folder",
    )
    g.add_argument(
        "--batch",
        type=number(int, 1, 4096),
        metavar="N",
        help="windows in one network call; default: 1 on a CPU, 16 on a GPU",
    )
    g.add_argument(
        "--plot",
        action="store_true",
        help="NAME.foley.png: frames, onsets, spectrogram, waveform on one time axis",
    )
    g.add_argument(
        "--profile", action="store_true", help="print seconds and peak memory of each stage"
    )
    g.add_argument("--json", action="store_true", help="print one line of JSON for each input")
    args = p.parse_args(argv)
    if args.steps == 1000 and args.sampler != "dpm":
        p.error(f"argument --steps: --sampler {args.sampler} takes 999 at most")
    return args


def stop(signum, _frame):
    """Ctrl-C and kill unwind like an exception, so that temporary files go, and say one line."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a second one would break the unwinding of the first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("sample.py: stopped; finished outputs are kept", file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    parse_arguments()
    isolation.start()  # the child that reads files gets ready while torch loads
    # Read when torch loads. Waiting threads sleep rather than spin: on a busy machine that halved the time it took.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tqdm import tqdm

import data
import kernels
from align import Alignment
from cavp import CAVP
from common import audio, media, plots, watermark
from common.audio import HOP, SAMPLE_RATE, WINDOW
from common.checkpoints import Checkpoint, CheckpointError
from common.machine import (
    computes_bfloat16,
    find_device,
    keep_freed_memory,
    peak_memory,
    return_freed_memory,
)
from common.media import MediaError
from compat import hub, official
from diffusion import SAMPLERS, TIMES, sigma
from kernels import fast
from ldm import LATENT_SHAPE, LDM, UNetConfig

COLUMNS = WINDOW // HOP  # mel columns of a window
LATENT = WINDOW // LATENT_SHAPE[2]  # samples of a latent column
OVERLAP = 16384  # samples that neighbouring windows share at least
CLAIM = "AI-generated sound: diff-foley"  # how the tag of every output begins
FADE = 32  # mel columns of a cross-fade: long against a hit, short against the overlap
SPAN = 4096  # mel columns vocoded at once: 65 s, which bounds memory


# ---------------------------------------------------------------------------------------------------------------------
# windows


def plan_windows(samples, fps):
    """Start samples of the windows that cover `samples` of sound.

    Starts are multiples of a grid on which video features and mel columns coincide (and latent columns, where those
    can), counted from the clip's beginning: nothing adds up. Windows are spread evenly: where the last one would end
    long after the clip, all overlap more instead.
    """
    frame = SAMPLE_RATE / Fraction(fps).limit_denominator(1001)  # samples of one video feature
    grids = [
        math.lcm(frame.numerator, n * frame.denominator) // frame.denominator for n in (LATENT, HOP)
    ]
    grid = next((g for g in grids if g <= WINDOW // 4), None)
    if grid is None:
        raise MediaError(
            f"these weights want {float(fps):g} frames a second, which meet mel columns (62.5 a second) too rarely to place "
            "windows; train at 15.625, 12.5, 25 or 4"
        )
    last = math.ceil(max(0, samples - WINDOW) / grid)  # in steps of the grid, as all below
    steps = math.ceil(last / ((WINDOW - OVERLAP) // grid))
    return [last * k // max(1, steps) * grid for k in range(steps + 1)]


def fade_weights(starts):
    """(n, 512): the share of each window in its own mel columns; the shares of a column sum to one. Windows hand over linearly in
    the middle of their overlap, where both have seen what comes before and after."""
    column = (
        torch.arange(COLUMNS, dtype=torch.float64) + 0.5
    )  # centres, counted from a window's start
    shares = torch.ones(len(starts), COLUMNS, dtype=torch.float64)
    for k, (before, after) in enumerate(itertools.pairwise(starts)):
        middle = (before + WINDOW + after) / 2
        for row, start, sign in (
            (k, before, 1),
            (k + 1, after, -1),
        ):  # the first one fades out, the second in
            passed = (column - (middle - start) / HOP) / FADE
            shares[row] -= (0.5 + sign * passed).clamp(0, 1)
    return shares.float()


def join_windows(mels, starts):
    """(n, 128, 512) -> (128, columns). Faded as amplitudes: halfway, what one window lacks loses 6 dB; the mean of two
    logarithms would take half its decibels."""
    if len(starts) == 1:
        return mels[0]
    out = mels.new_zeros(mels.shape[1], starts[-1] // HOP + COLUMNS)
    for mel, share, start in zip(mels, fade_weights(starts), starts):
        first = start // HOP
        out[:, first : first + COLUMNS] += share * 10 ** (
            5 * mel
        )  # mel is 0.2 log10 of amplitude, and a constant that cancels
    return out.log10_().mul_(0.2)


def noise_field(seed, candidate, columns):
    """(4, 16, columns) of noise, the start of a whole clip's diffusion. Windows take slices of it, so what they share
    they start from alike; a longer clip begins with the noise of a shorter one."""
    generator = torch.Generator().manual_seed((int(seed) << 16) + candidate)
    return torch.randn(columns, *LATENT_SHAPE[:2], generator=generator).permute(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# measuring


class Profile:
    """`with profile("stage"):` adds up seconds; memory is the peak so far: the process's, or on a GPU what was
    allocated there."""

    def __init__(self, device="cpu", started=None):
        self.cuda, self.rows = torch.device(device).type == "cuda", {}
        self.started = time.perf_counter() if started is None else started

    def add(self, stage, seconds):
        peak = peak_memory("cuda" if self.cuda else "cpu") / 2**20
        seconds += self.rows.get(stage, {"seconds": 0.0})["seconds"]
        self.rows[stage] = {"seconds": seconds, "peak_mib": round(peak, 1)}

    @contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        return_freed_memory()
        if self.cuda:
            torch.cuda.synchronize()  # what was only queued belongs to this stage
        self.add(stage, time.perf_counter() - start)

    def table(self):
        """Every row, and the total by the clock: what lies between the stages counts too."""
        self.rows.pop("total", None)
        self.add("total", time.perf_counter() - self.started)
        return {
            stage: row | {"seconds": round(row["seconds"], 3)} for stage, row in self.rows.items()
        }


# ---------------------------------------------------------------------------------------------------------------------
# the networks


@dataclass
class Models:
    cavp: torch.nn.Module
    ldm: torch.nn.Module
    align: torch.nn.Module | None  # only guidance by it and the ranking of candidates need it
    device: str = "cpu"
    name: str = "mini"


def find_checkpoint(folder, *patterns):
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise MediaError(
                f"{folder}: {found[0].name} and {found[1].name} both fit {pattern}; leave only one there"
            )
        if found:
            return found[0]
    return None


def load_models(weights="mini", device="auto", dtype=None):
    """The networks of `mini`, `official` (fetched once), or a folder with our three files or the published ones; ready to generate,
    no more. dtype None: bfloat16 for networks of the published size, on a GPU and on a CPU that computes in it; the mini model stays in
    float32, as in bfloat16 its sounds are a little worse (96 clips on a GPU: level error 2.30 instead of 2.18 dB, Fréchet 7.40 and 7.05)."""
    device = find_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype {quoted(dtype)}: not one of torch.float32, torch.bfloat16")
    if weights == "official":
        folder = hub.official()
    else:
        folder = Path(__file__).parent / "weights" / "mini" if weights == "mini" else Path(weights)
    if not folder.is_dir():
        raise MediaError(
            f"{folder}: no such folder of weights; give mini, official, or a folder that has them"
        )
    cavp, ldm = (
        find_checkpoint(folder, f"{name}.safetensors", f"{name}*.ckpt") for name in ("cavp", "ldm")
    )
    align = find_checkpoint(folder, "align.safetensors", "double_guidance_classifier.ckpt")
    for name, path in (("cavp", cavp), ("ldm", ldm)):
        if path is None:
            raise MediaError(
                f"{folder}: no {name}.safetensors and no {name}*.ckpt; add it, or give another folder of weights"
            )
    try:
        if dtype is None:
            width = ((Checkpoint(ldm).config or {}).get("unet") or {}).get(
                "width", UNetConfig.width
            )
            half = width >= 128 and (device.type == "cuda" or computes_bfloat16(device.type))
            dtype = torch.bfloat16 if half else torch.float32
        cavp = CAVP.load(cavp, audio=False).fold().to(device, dtype)
        ldm, align = (
            LDM.load(ldm, device, dtype, encoder=False),
            align and Alignment.load(align, device, dtype),
        )
        fast.optimise(ldm.unet)
        if align is not None:
            fast.optimise(align.model)
    except CheckpointError as e:
        raise MediaError(str(e)) from None
    if cavp.config.fps != ldm.config.fps:
        raise MediaError(
            f"{folder}: cavp has {cavp.config.fps:g} frames a second, ldm {ldm.config.fps:g}; "
            "take both from one training"
        )
    return Models(cavp, ldm, align, str(device), folder.resolve().name)


# ---------------------------------------------------------------------------------------------------------------------
# from pictures to sound


def video_features(path, cavp, count, seconds, start=0.0, profile=None):
    """(count, d) unit features of the picture from `start` on; past its `seconds` the last frame stands still.

    Read a minute at a time, with the frames on either side that the features depend on: memory stays bounded, and no
    feature depends on where a minute ends (the demo's 40-frame chunks: `demo_util.py` 158).
    """
    profile = profile or Profile()
    fps, size = cavp.config.fps, cavp.config.size
    span = round(60 * fps)
    shown = max(1, math.ceil(seconds * fps - 1e-6))  # frames that begin before the end
    features, frames = [], None
    for at in range(0, count, span):
        low, high = max(0, at - cavp.context), min(count, at + span + cavp.context)
        with profile("decode"):
            wanted = min(high, shown) - low
            if wanted > 0:
                frames = media.read_frames(path, fps, size, start + low / fps, wanted / fps)[
                    :wanted
                ]
            else:
                frames = frames[-1:]
            still = frames[-1:].expand(high - low - len(frames), -1, -1, -1)
            frames = torch.cat([frames, still])  # (high - low, 3, h, w)
        with profile("features"):
            features.append(cavp.encode_clip(frames)[at - low :][:span])
    return torch.cat(features)[:count]


@torch.no_grad()
def draw(
    features,
    starts,
    models,
    seed=0,
    candidates=1,
    steps=25,
    cfg=None,
    cg=None,
    sampler="dpm",
    batch=1,
    progress=None,
    profile=None,
):
    """features (f, d) -> mels (candidates, n, 128, 512) on the CPU, scores (candidates,) or None without a classifier.

    A window's noise depends on seed, candidate and place alone: other inputs do not change a sound, nor, with a batch
    of one, do other candidates; a larger batch changes it by rounding. A score is the classifier's log-probability,
    at diffusion time 0 and averaged over windows, that sound and picture belong together.
    """
    profile, ldm, align = profile or Profile(models.device), models.ldm, models.align
    cfg = ldm.config.guidance if cfg is None else cfg
    cg = align.config.guidance if cg is None else cg
    frames, width = ldm.config.frames, LATENT_SHAPE[2]
    jobs = [(c, s) for c in range(candidates) for s in starts]
    done = itertools.count(1)
    step = lambda *_: progress and progress(next(done), math.ceil(len(jobs) / batch) * steps)
    mels, scores = [], []
    for i in range(0, len(jobs), batch):
        x, v = [], []
        for candidate, start in jobs[i : i + batch]:
            column = round(start / LATENT)
            x.append(noise_field(seed, candidate, column + width)[..., column:])
            v.append(features[round(start * ldm.config.fps / SAMPLE_RATE) :][:frames])
        x, v = torch.stack(x).to(models.device), torch.stack(v)  # (b, 4, 16, 64), (b, f, d)
        with profile("sampling"):
            eps = fast.guided(
                ldm.unet,
                ldm.conditioner(v),
                ldm.null_context(frames),
                cfg,
                align,
                v,
                0.0 if align is None else cg,
                times=TIMES[sampler](steps),
                sigma=sigma,
            )
            z = SAMPLERS[sampler](eps, x, steps, step)  # (b, 4, 16, 64)
            if align is not None:
                scores.append(align.log_prob(z, z.new_zeros(len(z)), v).float().flatten().cpu())
        with profile("autoencoder"):
            mels.append(ldm.decode(z).float().cpu())  # (b, 128, 512)
    mels = torch.cat(mels).unflatten(0, (candidates, len(starts)))
    return mels, torch.cat(scores).view(candidates, -1).mean(1) if scores else None


def limit(wav):
    """Scaled down as a whole where it would clip."""
    return wav / max(1.0, float(wav.abs().max()))


def marked(wav):
    """Sound (n,) with the watermark: what every sound is given before it leaves the program."""
    return limit(watermark.mark(wav))


def tags_of(name, seed, mark=True):
    """The tags of an output: what made it, and whether the sound itself says so."""
    return {
        "comment": f"{CLAIM} {name}, seed {seed}, version {VERSION}{'' if mark else ', no watermark'}"
    }


def mix(wavs, path, gain, start):
    """The clip's own sound, `gain` dB louder, under every candidate {number: sound (n,)}."""
    if not media.probe(path).has_audio:
        warnings.warn(f"{path}: has no sound of its own; --keep-audio adds nothing", stacklevel=2)
        return wavs
    samples = len(next(iter(wavs.values())))
    own = media.read_audio(path, start, samples / SAMPLE_RATE) * 10 ** (gain / 20)
    return {k: limit(wav + own) for k, wav in wavs.items()}


def vocode(mel, samples, device="cpu"):
    """(128, columns) -> (samples,). A long sound is made in spans, whose phases do not fit together: they change over
    within one column, the quietest near a span's end."""
    cuts, columns = [0], mel.shape[1]
    while columns - cuts[-1] > SPAN:
        late = cuts[-1] + SPAN - 128  # the last 2 s of a span
        cuts.append(late + int(mel[:, late : late + 128].sum(0).argmin()))
    out = torch.zeros(columns * HOP)
    rise = (torch.arange(HOP) + 0.5) / HOP
    for a, b in itertools.pairwise([*cuts, columns]):
        low, high = max(0, a - 16), min(columns, b + 16)  # some columns more, for the phases
        wav = audio.vocode(mel[:, low:high].to(device)).cpu()  # ((high - low) * HOP,)
        share = torch.ones_like(wav)
        if a:
            share[: (a - low + 1) * HOP] = torch.cat([torch.zeros((a - low) * HOP), rise])
        if b < columns:
            share[(b - low) * HOP :] = torch.cat([1 - rise, torch.zeros((high - b - 1) * HOP)])
        out[low * HOP : high * HOP] += share * wav
    return limit(out[:samples])


@dataclass
class Result:
    wav: torch.Tensor  # (samples,) the best candidate, as long as the picture
    wavs: dict  # candidate -> its sound: the best one's, or all
    scores: list  # of each candidate, higher is better; None without a classifier
    best: int  # its number among the candidates
    mel: torch.Tensor  # (128, columns) of the best
    starts: list  # samples at which the windows start
    seconds: float  # of picture
    profile: Profile
    marked: bool = True  # whether the sounds carry the watermark

    def __repr__(self):
        return f"Result({self.seconds:.2f} s, {len(self.wavs)} of {len(self.scores)} candidates, marked={self.marked})"


def check_official(path, models, sampler, steps, seconds):
    """What --as-official cannot be asked for."""
    cfg = models.ldm.config
    if (
        models.align is None
        or models.align.config.unet.context_dim != cfg.feature_dim
        or cfg.unet.aligned
    ):
        raise MediaError(
            "--as-official is the demo of the published networks; give --weights official, or a folder with them"
        )
    if sampler == "plms":
        raise MediaError(
            "--as-official: with PLMS the demo falls through to another sampler, unguided; give dpm or ddim"
        )
    if sampler == "ddim" and official.ddim_times(steps)[-1] == 1000:
        raise MediaError(
            f"--as-official: with DDIM the demo crashes at {steps} steps; give another --steps"
        )
    if seconds * cfg.fps < cfg.frames - 0.5:
        raise MediaError(
            f"{path}: the official demo crashes under {cfg.frames / cfg.fps:g} s; leave out --as-official"
        )


def generate_as_official(
    path,
    models,
    seed,
    steps,
    cfg,
    cg,
    sampler,
    candidates,
    start,
    seconds,
    keep_all,
    progress,
    profile,
):
    check_official(path, models, sampler, steps, seconds)
    cfg = models.ldm.config.guidance if cfg is None else cfg
    cg = models.align.config.guidance if cg is None else cg
    with profile("decode"):
        frames = official.read_frames(
            path, models.cavp.config.fps, models.cavp.config.size, start, seconds
        )
    with profile("features"):
        features = official.encode(models.cavp, frames)  # (f, d)
    windows = len(features) // models.ldm.config.frames
    candidates = candidates if keep_all else 1  # the demo does not rank them
    noise = torch.stack(
        [noise_field(seed, k, windows * LATENT_SHAPE[2]) for k in range(candidates)]
    ).to(models.device)
    done = itertools.count(1)
    calls = len(official.ddim_times(steps)) if sampler == "ddim" else steps
    step = lambda *_: progress and progress(next(done), windows * calls)
    with profile("sampling"):
        mels = official.draw(
            features, models, noise, steps, cfg, cg, sampler, step
        ).cpu()  # (k, w, 128, 512)
    with profile("vocoder"):
        wavs = {k: official.vocode(mels[k]) for k in range(candidates if keep_all else 1)}
    mel = torch.cat(list(mels[0]), 1)
    return Result(
        wavs[0],
        wavs,
        [None] * candidates,
        0,
        mel,
        [w * WINDOW for w in range(windows)],
        seconds,
        profile,
    )


def quoted(value):
    return json.dumps(value) if isinstance(value, str) else str(value)


def check_number(name, value, low, high=math.inf, whole=False):
    """A number within [low, high], also one of numpy's; neither text nor a truth value."""
    kind = numbers.Integral if whole else numbers.Real
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    ):
        return
    limits = f"from {low:g} up" if high == math.inf else f"from {low:g} to {high:g}"
    raise ValueError(f"{name} {quoted(value)}: not a {'whole ' if whole else ''}number {limits}")


def check_arguments(seed, steps, cfg, cg, sampler, candidates, start, duration, batch):
    """What `generate` cannot be asked for, in a line: the limits of the command line."""
    if sampler not in tuple(SAMPLERS):
        raise ValueError(f"sampler {quoted(sampler)}: not one of {', '.join(SAMPLERS)}")
    # DDIM and PLMS step between whole times of 1000, and from the last of them there is none left
    check_number("steps", steps, 1, 1000 if sampler == "dpm" else 999, whole=True)
    check_number("seed", seed, 0, 2**40, whole=True)
    check_number("candidates", candidates, 1, 1000, whole=True)
    check_number("start", start, 0)
    for name, value, low in (("cfg", cfg, 0), ("cg", cg, 0), ("duration", duration, 1e-3)):
        if value is not None:  # then: the weights' own scales, and all of the film
            check_number(name, value, low)
    if batch is not None:
        check_number("batch", batch, 1, 4096, whole=True)


@torch.no_grad()
def generate(
    video_path,
    models,
    seed=0,
    steps=25,
    cfg=None,
    cg=None,
    sampler="dpm",
    candidates=1,
    start=0.0,
    duration=None,
    batch=None,
    keep_all=False,
    progress=None,
    profile=None,
    as_official=False,
    keep_audio=None,
    mark=True,
):
    """A video -> Result: round(seconds * 16000) samples in time with the picture from `start` on, with the clip's own sound mixed
    in at `keep_audio` dB if given. All its sounds carry the watermark, but with mark=False or as_official, which is for its numbers.
    `progress(done, all)` is called after every step of the sampler."""
    check_arguments(seed, steps, cfg, cg, sampler, candidates, start, duration, batch)
    profile = profile or Profile(models.device)
    if models.align is None and (cg != 0 or candidates > 1):
        raise MediaError(
            f"{models.name}: no alignment classifier among these weights; add align.safetensors or "
            "double_guidance_classifier.ckpt, or give cg 0 and one candidate"
        )
    with profile("decode"):
        whole = media.probe(video_path).duration
    if start >= whole:
        raise MediaError(
            f"{video_path}: start {start:g} is past its end, {whole:.2f} s; start earlier"
        )
    seconds = min(whole - start, duration or (official.SECONDS if as_official else math.inf))
    if as_official:
        result = generate_as_official(
            video_path,
            models,
            seed,
            steps,
            cfg,
            cg,
            sampler,
            candidates,
            start,
            seconds,
            keep_all,
            progress,
            profile,
        )
        return finish(result, video_path, start, keep_audio, False)
    samples = max(1, round(seconds * SAMPLE_RATE))
    starts = plan_windows(samples, models.ldm.config.fps)
    count = round(starts[-1] * models.ldm.config.fps / SAMPLE_RATE) + models.ldm.config.frames
    features = video_features(video_path, models.cavp, count, seconds, start, profile)
    batch = batch or (1 if torch.device(models.device).type == "cpu" else 16)
    mels, scores = draw(
        features,
        starts,
        models,
        seed,
        candidates,
        steps,
        cfg,
        cg,
        sampler,
        batch,
        progress,
        profile,
    )
    best = 0 if scores is None else int(scores.argmax())
    wavs = {}
    with profile("vocoder"):
        columns = math.ceil(samples / HOP)
        for k in range(candidates) if keep_all else [best]:
            wavs[k] = vocode(join_windows(mels[k], starts)[:, :columns], samples, models.device)
        mel = join_windows(mels[best], starts)[:, :columns]
    scores = [None] * candidates if scores is None else scores.tolist()
    return finish(
        Result(wavs[best], wavs, scores, best, mel, starts, seconds, profile),
        video_path,
        start,
        keep_audio,
        mark,
    )


def finish(result, path, start, keep_audio, mark):
    """The last of a sound's making: the clip's own under it, if wanted, and the watermark over both."""
    if keep_audio is not None:
        with result.profile("decode"):
            result.wavs = mix(result.wavs, path, keep_audio, start)
    if mark:
        with result.profile("vocoder"):
            result.wavs = {k: marked(wav) for k, wav in result.wavs.items()}
    result.wav, result.marked = result.wavs[result.best], mark
    return result


# ---------------------------------------------------------------------------------------------------------------------
# pictures and files


def plot(path, source, result, start, count=12):
    """NAME.foley.png of one result."""
    seconds = result.seconds
    middle = start + seconds / count / 2  # of the first of `count` equal parts
    frames = media.read_frames(source, count / seconds, 96, middle, seconds)[:count]
    onsets = {"generated": audio.detect_onsets(result.mel.numpy())}
    with suppress(MediaError):  # no labels
        onsets["annotated"] = [onset["time"] - start for onset in data.read_onsets(source)]
    plots.plot_result(
        path, Path(source).name, frames, onsets, result.mel, result.wav, result.seconds
    )


def dub(source, target, models, args, profile, progress=None):
    """One input: generate, mix, write all files or none. `target` is the output without its suffix. -> --json's line"""
    result = generate(
        source,
        models,
        args.seed,
        args.steps,
        args.cfg,
        args.cg,
        args.sampler,
        args.candidates,
        args.start,
        args.duration,
        args.batch,
        args.keep_all,
        progress,
        profile,
        args.as_official,
        args.keep_audio,
    )
    tags = tags_of(models.name, args.seed, result.marked)
    video, wave = f"{target}{media.output_suffix(source)}", f"{target}.wav"
    every = (
        [{"wav": f"{target}.{k}.wav", "score": result.scores[k]} for k in result.wavs]
        if args.keep_all
        else []
    )
    with ExitStack() as stack:  # all under temporary names first
        with profile("writing"):
            part = stack.enter_context(media.atomic_write(video))
            seconds = result.seconds if args.as_official else args.duration
            media.write_video(source, result.wav, part, tags, args.start, seconds, args.keep_tracks)
            for path, wav in [
                (wave, result.wav),
                *zip((c["wav"] for c in every), result.wavs.values()),
            ]:
                media.write_wav(stack.enter_context(media.atomic_write(path)), wav, tags)
        if args.plot:
            with profile("plot"):
                plot(
                    stack.enter_context(media.atomic_write(f"{target}.png")),
                    source,
                    result,
                    args.start,
                )
    line = {
        "input": str(source),
        "output": video,
        "wav": wave,
        "seconds": round(len(result.wav) / SAMPLE_RATE, 4),
        "windows": len(result.starts),
        "seed": args.seed,
        "score": result.scores[result.best],
        "profile": profile.table(),
    }
    return line | ({"candidates": every} if every else {})


def verify(args):
    """--verify: of each file, of folders all videos and wavs, a line on stdout; mistakes on stderr. -> exit status"""
    failed = foreign = False
    files = [
        media.search(given, ("video", "sound"), ours=True)[0] if given.is_dir() else [given]
        for given in map(Path, args.inputs)
    ]
    for file in itertools.chain(*files):
        try:
            tags = media.read_tags(file).get("comment", "").startswith(CLAIM)
            sure = watermark.confidence(media.read_audio(file))
        except MediaError as e:
            print(f"sample.py: {e}", file=sys.stderr)
            line, words, failed = {"file": str(file), "error": str(e)}, None, True
        else:
            marked = sure >= watermark.SURE
            line = {
                "file": str(file),
                "tags": tags,
                "watermark": marked,
                "confidence": round(sure, 6),
            }
            foreign |= not (tags or marked)
            words = (
                f"{file}: {'ours' if tags or marked else 'not known as ours'} ({'tag' if tags else 'no tag'}, "
                f"{'watermark' if marked else 'no watermark'}, confidence {sure:.4f})"
            )
        if args.json or words:
            print(json.dumps(line) if args.json else words, flush=True)
    return 1 if failed else 3 if foreign else 0


def plan_outputs(inputs, out, verbose=False):
    """-> [(video, output without its suffix, or None and why there is none)], every video once. `verbose` names, on stderr, what else
    lies in a folder."""
    jobs, seen, taken = [], set(), {}
    for given in inputs:
        try:
            videos = media.find_videos([given])
            if verbose and Path(given).is_dir():
                for other in media.search(given)[1]:
                    print(f"sample.py: {other}: no video, left alone", file=sys.stderr)
        except MediaError as e:
            jobs.append((given, None, str(e)))
            continue
        for video in videos:
            if video.resolve() in seen:
                continue
            seen.add(video.resolve())
            target = (out or video.parent) / f"{video.stem}.foley"
            other = taken.setdefault(target.resolve(), video)
            clash = f"{video}: {other} has the same output {target}; rename one, or do it alone with another --out"
            jobs.append((video, target, None) if other is video else (video, None, clash))
    return jobs


def report(line, args):
    """What one input came to: on stdout as JSON or in words, mistakes on stderr."""
    if "error" in line:
        print(f"sample.py: {line['error']}", file=sys.stderr)
    elif not args.json:
        print(f"{line['output']}  {line['seconds']:.2f} s, windows: {line['windows']}", flush=True)
    if args.json:
        print(json.dumps(line), flush=True)
    if args.profile and "error" not in line:
        print(
            f"{'stage':<12}{'seconds':>9}{'peak MiB':>10}",
            *(
                f"{stage:<12}{row['seconds']:>9.2f}{row['peak_mib']:>10.0f}"
                for stage, row in line["profile"].items()
            ),
            sep="\n",
            file=sys.stderr if args.json else sys.stdout,
        )


def main(argv=None):
    args = parse_arguments(argv)
    if args.verify:
        return verify(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "sample.py: --device cuda: torch finds no CUDA device; give --device cpu",
            file=sys.stderr,
        )
        return 2
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        kernels.choose(args.kernels)
    except ValueError as e:
        print(f"sample.py: --{e}", file=sys.stderr)
        return 2
    if args.verbose:
        print(
            f"sample.py: {device}, torch {torch.__version__}, {kernels.describe()}", file=sys.stderr
        )
    keep_freed_memory(largest=2**23)  # what fragments of larger ones would cost is memory
    try:
        models = load_models(
            args.weights, device, None if args.dtype == "auto" else getattr(torch, args.dtype)
        )
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
    except (MediaError, hub.HubError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"sample.py: --out {args.out}: {e.strerror}; give another folder", file=sys.stderr)
        return 1
    profile = Profile(device, STARTED)
    profile.add(
        "loading", time.perf_counter() - STARTED
    )  # imports and weights; counted with the first input
    failed = 0
    for video, target, error in plan_outputs(args.inputs, args.out, args.verbose):
        with (
            warnings.catch_warnings(),
            tqdm(desc=Path(video).name, unit="step", leave=False, disable=None) as bar,
        ):
            warnings.simplefilter("ignore")  # but for what `data` has to say about this very file
            warnings.filterwarnings(
                "once", ".*" if args.verbose else re.escape(str(video)) + "|kernels: "
            )
            warnings.showwarning = lambda message, *_: print(
                f"sample.py: {message}", file=sys.stderr
            )

            def progress(done, total):
                bar.total = total
                bar.update(done - bar.n)

            try:
                line = {"input": str(video), "error": error}
                if error is None:
                    line = dub(video, target, models, args, profile, progress)
            except MediaError as e:
                line["error"] = str(e)
        report(line, args)
        failed += "error" in line
        profile = Profile(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
