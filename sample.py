"""Sound for silent video: the main job (Diff-Foley, Sec. 3.3 and 3.4).

in   videos, or folders of them, of any length, frame rate and size
out  NAME.foley.mp4 (picture copied bit for bit, sound exactly as long) and NAME.foley.wav beside each

    python sample.py demo.mp4
    python sample.py clips/ --out dubbed/ --candidates 4 --plot

Windows of 131,072 samples (8.192 s) are planned in samples. They start on whole video features and whole mel columns, overlap by
a second or more, and each is conditioned, classifier included, on the frames of its own seconds. Overlapping windows begin from the
same slice of one noise field and are faded into each other as spectrograms, so that one phase-coherent Griffin-Lim makes the whole sound.
Sound is scaled down only where it would clip; nothing else touches its level.

Differs from the official demo, which joins windows end to end (0.176 s of slip in each), drops tails, crashes under 8 seconds,
shows its classifier the frames of the whole clip, and inverts the mel at another rate than it was made with.
"""
import argparse
import ctypes
import itertools
import json
import math
import re
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

STARTED = time.perf_counter()       # before the slow imports: the profile counts them
VERSION = "0.1"


# ---------------------------------------------------------------------------------------------------------------------
# the command line; it stands before the imports of torch (2 s), so that --help and wrong usage answer at once

class Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse would print the whole usage first
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def number(kind, low, high=math.inf):
    """An argparse type: a finite number within [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"from {low:g} up" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {limits}")
        return value
    return parse


def parse_arguments(argv=None):
    p = Parser("sample.py", description=__doc__, formatter_class=Formatter)
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="video files, or folders of them; after -- a name may start with a dash")
    p.add_argument("--out", type=Path, metavar="DIR", help="write there; default: beside each input")
    p.add_argument("--weights", default="mini", metavar="mini|DIR",
                   help="the model shipped here, or a folder holding cavp, ldm and align checkpoints, ours or the published ones")
    g = p.add_argument_group("sampling; the defaults are the paper's")
    g.add_argument("--steps", type=number(int, 1, 1000), default=25, help="network calls")
    g.add_argument("--cfg", type=number(float, 0), default=4.5, help="classifier-free guidance; 1: off")
    g.add_argument("--cg", type=number(float, 0), default=50.0, help="guidance by the alignment classifier; 0: off")
    g.add_argument("--sampler", choices=("dpm", "ddim", "plms"), default="dpm", help="DPM-Solver++ 2M, DDIM or PLMS")
    g.add_argument("--seed", type=number(int, 0, 2**40), default=0, help="same seed, same sound")
    g.add_argument("--candidates", type=number(int, 1, 1000), default=1, metavar="N", help="draw N and keep the one that the classifier rates best")
    g.add_argument("--keep-all", action="store_true", help="write every candidate too, NAME.foley.K.wav")
    g = p.add_argument_group("input")
    g.add_argument("--start", type=number(float, 0), default=0.0, metavar="S", help="seconds into the picture")
    g.add_argument("--duration", type=number(float, 1e-3), metavar="S", help="seconds of picture; default: all the rest")
    g.add_argument("--keep-audio", type=number(float, -100, 100), nargs="?", const=0.0, metavar="dB", help="mix the clip's own sound in, at this gain (0 if none is named)")
    g = p.add_argument_group("run")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the networks; auto: bfloat16 on a GPU")
    g.add_argument("--batch", type=number(int, 1, 4096), metavar="N", help="windows in one network call; default: 2 on a CPU, 16 on a GPU")
    g.add_argument("--plot", action="store_true", help="NAME.foley.png: frames, spectrogram, waveform on one time axis")
    g.add_argument("--profile", action="store_true", help="print seconds and peak memory of each stage")
    g.add_argument("--json", action="store_true", help="print one line of JSON for each input")
    return p.parse_args(argv)


def stop(signum, _frame):
    """Ctrl-C and kill unwind like an exception, so that temporary files go, and say one line."""
    print("sample.py: stopped; finished outputs are kept", file=sys.stderr)
    sys.exit(128 + signum)


def keep_freed_memory():
    """glibc returns large blocks to the system on every free and faults them in anew at the next use: a quarter of the time on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):            # not glibc
        return
    mallopt(-3, 2**30)                                      # M_MMAP_THRESHOLD
    mallopt(-1, 2**30)                                      # M_TRIM_THRESHOLD


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    parse_arguments()
    keep_freed_memory()

import torch                                                                                                   # noqa: E402
from tqdm import tqdm                                                                                          # noqa: E402

import data                                                                                                    # noqa: E402
from cavp import CAVP                                                                                          # noqa: E402
from data import HOP, SAMPLE_RATE, WINDOW, MediaError                                                          # noqa: E402
from ldm import LATENT_SHAPE, LDM, SAMPLERS, Alignment, guided_eps                                             # noqa: E402
from training import TrainingError                                                                             # noqa: E402

COLUMNS = WINDOW // HOP             # mel columns of a window
LATENT = 8 * HOP                    # samples of a latent column
OVERLAP = 16384                     # samples that neighbouring windows share at least
FADE = 32                           # mel columns of a cross-fade: long against a hit, short against the overlap
SPAN = 4096                         # mel columns vocoded at once: 65 s, which bounds memory


# ---------------------------------------------------------------------------------------------------------------------
# windows

def plan_windows(samples, fps):
    """Start samples of the windows that cover `samples` of sound.

    Starts are multiples of a grid on which video features and mel columns coincide (and latent columns, where those can), counted
    from the clip's beginning: rounding never adds up. Windows are spread evenly: where the last one would end long after
    the clip, all overlap more instead.
    """
    frame = SAMPLE_RATE / Fraction(fps).limit_denominator(1001)                 # samples of one video feature
    for column in (LATENT, HOP):
        grid = math.lcm(frame.numerator, column * frame.denominator) // frame.denominator
        if grid <= WINDOW // 4:
            break
    else:
        raise ValueError(f"{fps} frames a second never fall on mel columns within a window")
    last = math.ceil(max(0, samples - WINDOW) / grid)                           # all further counts in steps of the grid
    steps = math.ceil(last / ((WINDOW - OVERLAP) // grid))
    return [last * k // max(1, steps) * grid for k in range(steps + 1)]


def fade_weights(starts):
    """(n, columns): the share of each window in each mel column; shares of a column sum to one.

    Windows hand over linearly in the middle of their overlap, where both have heard and seen what comes before and after.
    """
    column = torch.arange(starts[-1] // HOP + COLUMNS, dtype=torch.float64)
    taken = [torch.ones_like(column)]                                           # how far the window before has handed over
    for before, after in zip(starts, starts[1:]):
        middle = (before + WINDOW + after) / 2 / HOP
        taken.append(((column + 0.5 - middle) / FADE + 0.5).clamp(0, 1))
    taken = torch.stack(taken + [torch.zeros_like(column)])                     # (n + 1, columns)
    return (taken[:-1] - taken[1:]).float()


def join_windows(mels, starts):
    """(..., n, 128, 512) -> (..., 128, columns), cross-faded as amplitudes: a hit that one window lacks loses 6 dB in a fade, not half its decibels."""
    if len(starts) == 1:
        return mels[..., 0, :, :]
    weights = fade_weights(starts).to(mels.device)
    out = mels.new_zeros(*mels.shape[:-3], mels.shape[-2], weights.shape[1])
    for k, first in enumerate(s // HOP for s in starts):
        own = slice(first, first + COLUMNS)
        out[..., own] += weights[k, own] * 10 ** (5 * mels[..., k, :, :])       # mel is 0.2 log10 of amplitude, and a constant that cancels
    return 0.2 * out.log10()


def noise_field(seed, candidate, columns):
    """(4, 16, columns) of noise: the start of a whole clip's diffusion. Windows take slices, so what two share they start from alike;
    a longer clip begins with the noise of a shorter one."""
    generator = torch.Generator().manual_seed((seed << 16) + candidate)
    return torch.randn(columns, *LATENT_SHAPE[:2], generator=generator).permute(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# measuring

class Profile:
    """`with profile("stage"):` adds up seconds; memory is the peak so far: of the process on a CPU, of allocations on a GPU."""

    def __init__(self, device="cpu", started=None):
        self.cuda, self.rows = torch.device(device).type == "cuda", {}
        self.started = time.perf_counter() if started is None else started

    def peak(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        import resource             # not on every system
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    @contextmanager
    def __call__(self, stage, started=None):
        start = time.perf_counter() if started is None else started
        yield
        if self.cuda:
            torch.cuda.synchronize()                # what was only queued belongs to this stage
        seconds = self.rows.get(stage, {"seconds": 0.0})["seconds"] + time.perf_counter() - start
        self.rows[stage] = {"seconds": seconds, "peak_mib": self.peak()}

    def table(self):
        """The rows and the total by the wall clock, which no row sums: what lies between them counts too."""
        rows = dict(self.rows, total={"seconds": time.perf_counter() - self.started, "peak_mib": self.peak()})
        return {k: {"seconds": round(v["seconds"], 3), "peak_mib": round(v["peak_mib"], 1)} for k, v in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the networks

@dataclass
class Models:
    cavp: torch.nn.Module
    ldm: torch.nn.Module
    align: torch.nn.Module | None   # only needed for guidance by it (cg) and for ranking candidates
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    name: str = "mini"


def find_checkpoint(folder, *patterns):
    found = next((sorted(folder.glob(p)) for p in patterns if list(folder.glob(p))), [])
    if len(found) > 1:
        raise MediaError(f"{folder}: {' and '.join(f.name for f in found)} both fit {patterns[-1]}; leave only one there")
    return found[0] if found else None


def load_models(weights="mini", device="cpu", dtype=torch.float32):
    """`mini`, or a folder with our three files or the published ones."""
    folder = Path(__file__).parent / "weights" / "mini" if weights == "mini" else Path(weights)
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder of weights; give --weights mini or a folder holding cavp, ldm and align checkpoints")
    paths = {"cavp": find_checkpoint(folder, "cavp.safetensors", "cavp*.ckpt"), "ldm": find_checkpoint(folder, "ldm.safetensors", "ldm*.ckpt"),
             "align": find_checkpoint(folder, "align.safetensors", "double_guidance_classifier.ckpt")}
    for name in ("cavp", "ldm"):
        if paths[name] is None:
            raise MediaError(f"{folder}: no {name}.safetensors and no {name}*.ckpt; put the checkpoint there, or give another --weights DIR")
    try:
        cavp, ldm = CAVP.load(paths["cavp"], device), LDM.load(paths["ldm"], device)
        align = Alignment.load(paths["align"], device) if paths["align"] else None
    except TrainingError as e:
        raise MediaError(str(e)) from None
    except (RuntimeError, KeyError, TypeError) as e:            # what load_state_dict and a strange configuration raise
        reason = " ".join(str(e).split())[:160]
        raise MediaError(f"{folder}: a checkpoint there does not fit its network ({reason}); fetch or train it again") from None
    return Models(cavp, ldm, align, str(device), dtype, Path(folder).name)


# ---------------------------------------------------------------------------------------------------------------------
# from pictures to sound

def video_features(path, cavp, count, seconds, start=0.0, profile=None):
    """(count, d) unit features of the picture from `start` on; past its `seconds` the last frame stands still.

    Read a minute at a time, with the frames on either side that the features depend on: memory stays bounded, and no feature depends
    on where a minute ends (REFERENCE 12, oddity 11).
    """
    profile = profile or Profile()
    fps, size = cavp.config.fps, cavp.config.size
    span = round(60 * fps)
    shown = max(1, math.ceil(seconds * fps - 1e-6))                             # frames that begin before the picture ends
    features, frames = [], None
    for at in range(0, count, span):
        low, high = max(0, at - cavp.context), min(count, at + span + cavp.context)
        with profile("decode"):
            wanted = min(high, shown) - low
            if wanted > 0:
                frames = data.read_frames(path, fps, size, start + low / fps, wanted / fps)[:wanted]
            else:
                frames = frames[-1:]
            frames = torch.cat([frames, frames[-1:].expand(high - low - len(frames), -1, -1, -1)])      # (high - low, 3, h, w)
        with profile("features"):
            features.append(cavp.encode_clip(frames)[at - low:][:span])
    return torch.cat(features)[:count]


@torch.no_grad()
def draw(features, starts, models, seed=0, candidates=1, steps=25, cfg=4.5, cg=50.0, sampler="dpm", batch=2, progress=None, profile=None):
    """features (f, d) -> mels (candidates, n, 128, 512) on the CPU and scores (candidates,) or None without a classifier.

    A window's noise depends on seed, candidate and place alone, so neither the batch nor other inputs change a sound. A score is the
    classifier's log-probability, at diffusion time 0 and averaged over windows, that sound and picture belong together.
    """
    profile, ldm = profile or Profile(models.device), models.ldm
    length, fps = ldm.config.frames, models.cavp.config.fps
    jobs = [(c, s) for c in range(candidates) for s in starts]
    calls = itertools.count(1)
    step = lambda *_: progress and progress(next(calls), math.ceil(len(jobs) / batch) * steps)
    mels, scores = [], []
    for i in range(0, len(jobs), batch):
        some = jobs[i:i + batch]
        columns = [round(s / LATENT) for _, s in some]
        x = torch.stack([noise_field(seed, c, k + LATENT_SHAPE[2])[..., k:] for (c, _), k in zip(some, columns)]).to(models.device)        # (b, 4, 16, 64)
        v = torch.stack([features[round(s * fps / SAMPLE_RATE):][:length] for _, s in some])                                            # (b, f, d)
        with torch.autocast(torch.device(models.device).type, torch.bfloat16, enabled=models.dtype == torch.bfloat16):
            with profile("sampling"):
                eps = guided_eps(ldm.unet, ldm.conditioner(v), ldm.null_context(length), cfg, models.align, v, cg)
                z = SAMPLERS[sampler](eps, x, steps, step)
                if models.align is not None:
                    scores.append(models.align.log_prob(z, z.new_zeros(len(z)), v).float().flatten().cpu())
            with profile("autoencoder"):
                mels.append(ldm.decode(z).float().cpu())                                                                      # (b, 128, 512)
    mels = torch.cat(mels).view(candidates, len(starts), *mels[0].shape[1:])
    return mels, torch.cat(scores).view(candidates, -1).mean(1) if scores else None


def vocode(mel, samples, device="cpu"):
    """(128, columns) -> (samples,). A long sound is made in spans, changed over within 16 ms at the quietest column near a span's end:
    phases of two spans do not fit together, and there it is not heard."""
    cuts, columns = [0], math.ceil(samples / HOP)
    while columns - cuts[-1] > SPAN:
        late = mel[:, cuts[-1] + SPAN - 128:cuts[-1] + SPAN].sum(0)
        cuts.append(cuts[-1] + SPAN - 128 + int(late.argmin()))
    out = torch.zeros(columns * HOP)
    rise = (torch.arange(HOP) + 0.5) / HOP
    for a, b in zip(cuts, cuts[1:] + [columns]):
        low, high = max(0, a - 16), min(columns, b + 16)                        # a few columns more, for the phases at the ends
        wav = data.vocode(mel[:, low:high].to(device)).cpu()                    # ((high - low) * 256,)
        if a:
            wav[:(a - low) * HOP] = 0
            wav[(a - low) * HOP:][:HOP] *= rise
        if b < columns:
            wav[(b - low) * HOP:][:HOP] *= 1 - rise
            wav[(b + 1 - low) * HOP:] = 0
        out[low * HOP:high * HOP] += wav
    return limit(out[:samples])


def limit(wav):
    """Scaled down as a whole where it would clip."""
    return wav / max(1.0, float(wav.abs().max()))


@dataclass
class Result:
    wav: torch.Tensor               # (samples,) the best candidate, as long as the picture
    wavs: dict                      # candidate -> wav: the best one, or all
    scores: list                    # of each candidate, higher is better; None without a classifier
    best: int
    mel: torch.Tensor               # (128, columns) of the best
    starts: list                    # samples at which the windows start
    seconds: float
    profile: Profile


def interval(path, start=0.0, duration=None):
    """Seconds of picture from `start` on, at most `duration`."""
    whole = data.probe(path).duration
    if start >= whole:
        raise MediaError(f"{path}: --start {start:g} is past the end of the picture ({whole:.2f} s); start earlier")
    return min(whole - start, math.inf if duration is None else duration)


@torch.no_grad()
def generate(video_path, models, seed=0, steps=25, cfg=4.5, cg=50.0, sampler="dpm", candidates=1, start=0.0, duration=None, batch=None,
             keep_all=False, progress=None, profile=None):
    """A video file -> Result: round(seconds * 16000) samples in time with the picture. `progress` is called with (done, all) network calls."""
    profile = profile or Profile(models.device)
    if models.align is None and (cg or candidates > 1):
        raise MediaError(f"{models.name}: no alignment classifier among the weights; put align.safetensors or "
                         "double_guidance_classifier.ckpt there, or give --cg 0 and one candidate")
    with profile("decode"):
        seconds = interval(video_path, start, duration)
    samples = max(1, round(seconds * SAMPLE_RATE))
    fps = models.cavp.config.fps
    starts = plan_windows(samples, fps)
    count = round(starts[-1] * fps / SAMPLE_RATE) + models.ldm.config.frames
    features = video_features(video_path, models.cavp, count, seconds, start, profile)
    batch = batch or (2 if torch.device(models.device).type == "cpu" else 16)
    mels, scores = draw(features, starts, models, seed, candidates, steps, cfg, cg, sampler, batch, progress, profile)
    best = 0 if scores is None else int(scores.argmax())
    scores = [None] * candidates if scores is None else scores.tolist()
    wavs, shown = {}, math.ceil(samples / HOP)
    with profile("vocoder"):
        for k in range(candidates) if keep_all else [best]:
            wavs[k] = vocode(join_windows(mels[k], starts)[:, :shown], samples, models.device)
    return Result(wavs[best], wavs, scores, best, join_windows(mels[best], starts)[:, :shown], starts, seconds, profile)


# ---------------------------------------------------------------------------------------------------------------------
# pictures and files

def draw_plot(path, source, result, start):
    """Frames, spectrogram and waveform on one time axis."""
    from matplotlib.figure import Figure            # slow to import; no window system needed
    seconds, count = result.seconds, 12
    frames = data.read_frames(source, count / seconds, 96, start + seconds / count / 2, seconds)[:count]    # (f, 3, h, w)
    figure = Figure((12, 6), layout="constrained")
    strip, mel, wave = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 1))
    for k, frame in enumerate(frames):
        strip.imshow(frame.permute(1, 2, 0), extent=(k * seconds / count, (k + 1) * seconds / count, 0, 1), aspect="auto")
    strip.set(yticks=[], ylim=(0, 1), title=Path(source).name)
    mel.imshow(result.mel, origin="lower", aspect="auto", extent=(0, result.mel.shape[1] * HOP / SAMPLE_RATE, 0, len(result.mel)), vmin=0, vmax=1)
    mel.set(ylabel="mel band")
    wave.plot(torch.arange(len(result.wav)) / SAMPLE_RATE, result.wav, linewidth=0.5)
    wave.set(xlim=(0, seconds), ylim=(-1, 1), xlabel="seconds", ylabel="sound")
    figure.savefig(path, dpi=100)


def dub(source, target, models, args, profile, progress=None):
    """One input: generate, mix, write every file or none. `target` is the output without its suffix. -> the line for --json."""
    seconds = interval(source, args.start, args.duration)
    result = generate(source, models, args.seed, args.steps, args.cfg, args.cg, args.sampler, args.candidates, args.start, args.duration,
                      args.batch, args.keep_all, progress, profile)
    if args.keep_audio is not None:
        with profile("decode"):
            own = data.read_audio(source, args.start, seconds)[:len(result.wav)] * 10 ** (args.keep_audio / 20)
        own = torch.nn.functional.pad(own, (0, len(result.wav) - len(own)))
        result.wavs = {k: limit(wav + own) for k, wav in result.wavs.items()}
        result.wav = result.wavs[result.best]
    tags = {"comment": f"AI-generated sound: diff-foley {models.name}, seed {args.seed}, {VERSION}"}
    trim = {"start": args.start, "duration": args.duration} if args.start or args.duration is not None else {}
    video, wave = Path(f"{target}{data.output_suffix(source)}"), Path(f"{target}.wav")
    with ExitStack() as stack:                      # everything under temporary names first
        new = lambda path: stack.enter_context(data.whole(path))
        with profile("writing"):
            data.write_video(source, result.wav, new(video), tags, **trim)
            data.write_wav(new(wave), result.wav, tags)
            kept = []
            for k, wav in result.wavs.items() if args.keep_all else ():
                kept.append({"wav": f"{target}.{k}.wav", "score": result.scores[k]})
                data.write_wav(new(Path(kept[-1]["wav"])), wav, tags)
        if args.plot:
            with profile("plot"):
                draw_plot(new(Path(f"{target}.png")), source, result, args.start)
    return {"input": str(source), "output": str(video), "wav": str(wave), "seconds": round(len(result.wav) / SAMPLE_RATE, 4),
            "windows": len(result.starts), "seed": args.seed, "score": result.scores[result.best], "profile": profile.table(),
            **({"candidates": kept} if args.keep_all else {})}


def plan_outputs(inputs, out):
    """-> [(video, output without suffix, reason why it cannot be done or None)], every video once."""
    jobs, seen, taken = [], set(), {}
    for given in inputs:
        try:
            videos = data.find_videos([given])
        except MediaError as e:
            jobs.append((given, None, str(e)))
            continue
        for video in videos:
            if video.resolve() in seen:
                continue
            seen.add(video.resolve())
            target = (out or video.parent) / f"{video.stem}.foley"
            other = taken.setdefault(target.resolve(), video)
            clash = None if other is video else f"{video}: {target}.wav is already the sound of {other}; rename one of the two, or do it alone with another --out"
            jobs.append((video, target, clash))
    return jobs


def print_profile(rows, file):
    print(f"{'stage':<12}{'seconds':>9}{'peak MiB':>10}", *(f"{k:<12}{v['seconds']:>9.2f}{v['peak_mib']:>10.0f}" for k, v in rows.items()), sep="\n", file=file)


def main(argv=None):
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sample.py: --device cuda: torch finds no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.dtype == "bfloat16" or args.dtype == "auto" and device == "cuda" else torch.float32
    profile = Profile(device, STARTED)
    try:
        with profile("loading", STARTED):
            models = load_models(args.weights, device, dtype)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
    except (MediaError, OSError) as e:
        print(f"sample.py: {e}" if isinstance(e, MediaError) else f"sample.py: --out {args.out}: {e.strerror}; give another folder", file=sys.stderr)
        return 1
    failed = 0
    for video, target, error in plan_outputs(args.inputs, args.out):
        with warnings.catch_warnings(), tqdm(desc=Path(video).name, unit="step", leave=False, disable=None) as bar:
            warnings.simplefilter("ignore")                                     # but for what `data` has to say of this file
            warnings.filterwarnings("once", re.escape(str(video)))
            warnings.showwarning = lambda message, *_: print(f"sample.py: {message}", file=sys.stderr)

            def progress(done, all_calls):
                bar.total = all_calls
                bar.update(done - bar.n)

            try:
                line = {"input": str(video), "error": error} if error else dub(video, target, models, args, profile, progress)
            except MediaError as e:
                line = {"input": str(video), "error": str(e)}
        if "error" in line:
            failed += 1
            print(f"sample.py: {line['error']}", file=sys.stderr)
        if args.json:
            print(json.dumps(line), flush=True)
        elif "error" not in line:
            print(f"{line['output']}  {line['seconds']:.2f} s, {line['windows']} window{'s' * (line['windows'] > 1)}", flush=True)
        if args.profile and "error" not in line:
            print_profile(line["profile"], sys.stderr if args.json else sys.stdout)
        profile = Profile(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
