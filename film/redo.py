"""Redo a moment: new sound for some stretches of a sound that is there already.

in   stretches in seconds of the picture; the sound of an earlier output, or the clip's own; the
     spectrograms that are drawn of windows around the stretches
out  the same sound, sample for sample, at its own rate and in its own channels, but for the
     stretches: new sound, marked, that takes over within FADE_IN samples inside of their beginnings
     and gives way within FADE_OUT inside of their ends

Latents outside of a stretch are those of the sound (`known_latents`), and the sampler fills in the
others (`diffusion.fill_in`, `repaint`). Griffin-Lim mixes the known samples in before every
iteration, as they will be in the end, so that the phases of the new sound fit to them (`fill`): in
the cross-fade the level then does not dip (docs/directing.md).
"""

import argparse
import glob
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from common import audio, media, watermark
from common.audio import HOP, SAMPLE_RATE, WINDOW
from common.files import atomic_write
from common.media import MediaError
from common.resample import blocks_of, resample
from diffusion import ALPHAS_CUMPROD, ddim_step, descending_pairs
from film import loudness, manifest
from film.level import AIM
from film.provenance import COMPOSITE
from vae import LATENT_SCALE

SHORTEST = 0.1  # seconds of a stretch: less than a latent column is nothing to draw
# samples inside of a stretch over which the new sound takes over (64 ms) and gives way (200 ms):
# what rings at its end is not cut off; of a short stretch a third
FADE_IN = 1024
FADE_OUT = 3200
CONTEXT = 16384  # samples that a window shows of the sound on either side of a stretch
AROUND = 16  # mel columns of known sound on either side, for the phases
SOUNDS = (".wav", ".flac")  # outputs without a picture
SLACK = 0.1  # seconds by which a sound may be longer or shorter than the picture
GAIN = re.compile(r"gain ([+-]\d+\.\d+) dB")  # in the tag of a sound whose level was changed
SECONDS = r"(\d+\.?\d*|\.\d+)"
# in what form libsndfile gives back exactly the samples that a file of such a subtype holds
EXACT = {
    "PCM_U8": "int16",
    "PCM_16": "int16",
    "PCM_24": "int32",
    "PCM_32": "int32",
    "FLOAT": "float32",
    "DOUBLE": "float64",
}


# ---- which stretches ---------------------------------------------------------------------------


def described(stretches):
    """((12.5, 14.0), (20.0, 21.0)) -> "12.5-14,20-21"."""
    return ",".join(f"{a:.10g}-{b:.10g}" for a, b in stretches)


def parse_stretches(text: str):
    """An argparse type: "12.5-14,20-21" -> ((12.5, 14.0), (20.0, 21.0))."""
    stretches = []
    for part in text.split(","):
        match = re.fullmatch(f"{SECONDS}-{SECONDS}", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(
                f'"{text}": give seconds of the picture, such as 12.5-14 or 3-4,12.5-14'
            )
        stretches.append((float(match[1]), float(match[2])))
    return tuple(stretches)


def check_stretches(stretches, as_official: bool = False):
    """Raises ValueError, in one line, for stretches ((from, to), ...) that cannot be redone."""
    if not stretches:
        return
    if as_official:
        raise ValueError("redo: is nothing that the official demo does; leave --as-official out")
    try:
        stretches = sorted((float(a), float(b)) for a, b in stretches)
    except (TypeError, ValueError):
        raise ValueError(f"redo {stretches}: give pairs of seconds, ((12.5, 14.0),)") from None
    for a, b in stretches:
        if not 0 <= a < b < math.inf:
            raise ValueError(f"redo {described([(a, b)])}: give the earlier second first")
        if b - a < SHORTEST - 1e-9:
            raise ValueError(f"redo {described([(a, b)])}: is shorter than {SHORTEST:g} s")
    for before, after in pairwise(stretches):
        if after[0] < before[1]:
            raise ValueError(f"redo {described([before, after])}: these overlap; give them as one")


def check_end(stretches, seconds: float, video):
    """Raises ValueError where one goes on beyond the picture's end."""
    for a, b in stretches:
        if b > seconds + 0.01:
            raise ValueError(
                f"redo {described([(a, b)])}: goes beyond the end of {video}, {seconds:.2f} s"
            )


def add_redo(group):
    """The flag of the command line."""
    group.add_argument(
        "--redo",
        type=parse_stretches,
        metavar="A-B[,A-B]",
        help="of an earlier output, or of the clip's own sound: new sound from second A to B "
        "alone; the rest stays sample for sample. The sampler is DDIM, every step taken twice",
    )


def plan_redo(args):
    """The command line's arguments -> the file whose sound is redone.

    Raises ValueError for arguments that do not go together, MediaError for a file.
    """
    first = args.inputs[0]
    names_several = os.path.isdir(first) or (
        not os.path.lexists(first) and (first.startswith("@") or glob.has_magic(first))
    )
    if len(args.inputs) > 1 or names_several:
        raise ValueError("redo: is for one clip at a time; give one video")
    if args.start or args.duration is not None:
        raise ValueError(
            "redo: counts seconds of the whole picture; leave --start and --duration out"
        )
    for flag, usual in (
        ("rate", SAMPLE_RATE),
        ("layout", "mono"),
        ("duck", None),
        ("stems", False),
    ):
        if getattr(args, flag) != usual:
            raise ValueError(f"redo: keeps rate, layout and level of the sound; leave --{flag} out")
    if args.write_onsets:
        raise ValueError(
            "redo: makes a part of the sound, and --write-onsets is of all of it; leave "
            "--write-onsets out"
        )
    video = Path(args.inputs[0])
    check_end(args.redo, media.probe(video).duration, video)
    path = find_sound(video, args.out)
    check_stem(path)
    return path


def place_windows(spans, samples: int, fps: float, plan, grid: int):
    """Start samples of windows that hold the spans [(a, b)] of a sound, with some of it around.

    plan: `sample.plan_windows`, from whose `grid` no start departs. Every span is in the middle of
    its windows, where the sound's ends allow it.
    """
    last = plan(samples, fps)[-1]
    starts = set()
    for a, b in spans:
        own = plan(min(b - a + 2 * CONTEXT, samples), fps)  # as if the sound began here
        first = round((a + b - own[-1] - WINDOW) / 2 / grid) * grid
        first = max(0, min(first, last - own[-1]))
        starts.update(first + start for start in own)
    return sorted(starts)


# ---- the sound that is there -------------------------------------------------------------------


@dataclass
class Sound:
    """A sound exactly as a file has it."""

    samples: np.ndarray  # (n, channels) int16, int32, float32 or float64
    rate: int = SAMPLE_RATE
    subtype: str = "PCM_16"  # how libsndfile calls its sample format

    @classmethod
    def read(cls, path):
        """Of a wav or flac file. Raises MediaError."""
        try:
            with soundfile.SoundFile(path) as file:
                if file.subtype not in EXACT:
                    raise MediaError(
                        f"{path}: its samples are compressed ({file.subtype}); convert it to PCM"
                    )
                samples = file.read(dtype=EXACT[file.subtype], always_2d=True)
                return cls(samples, file.samplerate, file.subtype)
        except (soundfile.LibsndfileError, OSError) as error:
            raise MediaError(f"{path}: is no wav or flac file that we can read ({error})") from None

    @classmethod
    def read_track(cls, path, seconds, is_ours):
        """Of a video: ours at 16 kHz mono, a clip's own at 48 kHz stereo with 24 bits."""
        if is_ours:
            wav = media.read_audio(path, 0, seconds).numpy()[:, None]
            return cls((wav * 32767).round().astype(np.int16))
        wav = media.read_audio(path, 0, seconds, 48000, 2).numpy().clip(-1, 1)
        # 24 bits, as libsndfile has them in 32
        return cls((wav * (2**23 - 1)).round().astype(np.int32) * 256, 48000, "PCM_24")

    @property
    def seconds(self):
        return len(self.samples) / self.rate

    @property
    def full_scale(self):
        """What stands for 1.0."""
        kind = self.samples.dtype
        return -float(np.iinfo(kind).min) if kind.kind == "i" else 1.0

    def replaced(self, wav, a: int, b: int):
        """The same with 16 kHz sound (n,) in all channels, from its sample a to b.

        It takes over inside of these (`share_of_new`), but for where the sound begins or ends.
        """
        # the samples of this rate between a and b
        first = math.ceil(a * self.rate / SAMPLE_RATE)
        stop = min(len(self.samples), math.ceil(b * self.rate / SAMPLE_RATE))
        divisor = math.gcd(self.rate, SAMPLE_RATE)
        ratio = self.rate // divisor, SAMPLE_RATE // divisor
        new = wav[first:stop].double().numpy()
        if self.rate != SAMPLE_RATE:
            new = resample(wav.numpy(), first, stop, *ratio)
        # in samples at 16 kHz
        times = (torch.arange(first, stop, dtype=torch.float64) + 0.5) * SAMPLE_RATE / self.rate
        end = math.inf if stop == len(self.samples) else b
        share = share_of_new(times, a, end).numpy()[:, None]
        # cross-faded, it is no louder than any sound that we make
        faded = (share * new[:, None]).astype(np.float32)
        peak = loudness.measure([faded], self.rate).true_peak
        new = new * 10 ** (min(0.0, AIM - peak) / 20)
        old = self.samples[first:stop].astype(np.float64)
        mixed = old + share * (new[:, None] * self.full_scale - old)
        if self.samples.dtype.kind == "i":
            limits = np.iinfo(self.samples.dtype)
            mixed = mixed.round().clip(limits.min, limits.max)
        samples = self.samples.copy()
        samples[first:stop] = mixed
        return replace(self, samples=samples)

    def fits(self, suffix):
        """Whether a file of this suffix holds these samples as they are."""
        return suffix == ".wav" or self.subtype in ("PCM_16", "PCM_24")

    def write(self, path, tags=None):
        """As wav or flac, atomically. Raises FileError."""
        form = len(self.samples), self.rate, self.samples.shape[1]
        media.write_sound(path, blocks_of(self.samples), *form, tags, self.subtype)


def share_of_new(times, a: int, b: float):
    """At times (n,) in samples, the share (n,) of a sound that is new from a to b, 0 to 1.

    It rises within FADE_IN and falls within FADE_OUT inside of these. a = 0, b = inf: at the ends
    of the old sound, where nothing is to be faded.
    """
    third = (b - a) / 3
    rise = torch.ones_like(times) if a == 0 else (times - a) / min(FADE_IN, third)
    fall = (b - times) / min(FADE_OUT, third)
    return 0.5 - 0.5 * (math.pi * torch.minimum(rise, fall).clamp(0, 1)).cos()


def base_name(video):
    """clip.mp4, clip.foley.mp4 -> "clip"."""
    return Path(video).stem.removesuffix(".foley")


def newest_sound(stem):
    """STEM.wav or STEM.flac, whichever was written last; None where neither is there."""
    there = [path for path in map(Path, (f"{stem}.wav", f"{stem}.flac")) if path.is_file()]
    return max(there, key=lambda path: path.stat().st_mtime_ns, default=None)


def check_stem(path):
    """Raises MediaError for a sound that --stems has written: the video has another."""
    mix = path.with_name(f"{base_name(path)}.mix{path.suffix}")
    is_ours = False
    with suppress(MediaError):  # what cannot be read is not ours
        is_ours = path.stem.endswith(".foley") and mix.is_file() and our_comment(mix)
    # an earlier run's stems may lie beside the output of a later one without --stems
    last = manifest.read(path.parent, verbose=False)[0].get(path.stem, {})
    is_left_over = path.name in last.get("files", ()) and mix.name not in last["files"]
    if is_ours and not is_left_over:
        raise MediaError(
            f"{path}: is a stem, and {mix} is what the video has; move {mix.name} over it to redo "
            "the mix, or elsewhere to redo the stem"
        )


def our_comment(path):
    """The tag that says that a sound is ours, or ""."""
    comment = media.read_tags(path).get("comment", "")
    return comment if comment.startswith(watermark.CLAIM) else ""


def find_sound(video, out=None):
    """The file whose sound is to be redone: an earlier output's wav, or the video itself.

    The wav is NAME.foley.wav in the folder `out` or beside the video, or of the same name as a
    video that is an output by its tag; or a flac, if that is newer. Raises MediaError where there
    is none.
    """
    video = Path(video)
    for folder in (out, video.parent):
        if folder is not None and (found := newest_sound(folder / f"{base_name(video)}.foley")):
            return found
    if our_comment(video) and (found := newest_sound(video.with_suffix(""))):
        return found
    if not media.probe(video).has_audio:
        raise MediaError(
            f"{video}: has no sound to redo, and no {base_name(video)}.foley.wav is there; leave "
            "--redo out once"
        )
    return video


# ---- the work ----------------------------------------------------------------------------------


@dataclass
class Redo:
    """The redoing of one clip's sound."""

    stretches: tuple  # ((from, to), ...) in seconds
    path: Path  # whose sound it is
    sound: Sound
    wav: Tensor  # (n,) the same, 16 kHz mono, before the gain; whole mel columns
    samples: int  # of the picture; what follows is silence that fills the last column
    gain: float  # dB, that it was given after it was made
    comment: str  # its tag, if it is an output of ours
    sounds: dict = field(default_factory=dict)  # candidate -> Sound with the stretches redone

    def __repr__(self):
        return f"Redo({self.path}: {described(self.stretches)})"

    @classmethod
    def open(cls, clip, settings):
        """Of a `sample.Clip`. Raises MediaError, and ValueError for what cannot be redone."""
        if clip.start or clip.duration is not None:
            raise ValueError(
                "redo: counts seconds of the whole picture; leave --start and --duration out"
            )
        check_end(settings.redo, clip.seconds, clip.source)
        path = Path(settings.redo_of or find_sound(clip.source))
        with clip.profile("decode"):
            comment = our_comment(path)
            if path.suffix.lower() in SOUNDS:
                sound = Sound.read(path)
                wav = media.read_audio(path)
            else:
                sound = Sound.read_track(path, clip.seconds, is_ours=bool(comment))
                wav = media.read_audio(path, 0, clip.seconds)
        if abs(sound.seconds - clip.seconds) > SLACK:
            raise MediaError(
                f"{path}: has {sound.seconds:.2f} s of sound for {clip.seconds:.2f} s of picture "
                f"({clip.source}); give the video that it was written with, or move it"
            )
        gain = GAIN.search(comment)
        gain = float(gain[1]) if gain else 0.0
        # as long as the picture, in whole mel columns
        columns = math.ceil(clip.samples / HOP)
        wav = wav[: clip.samples] * 10 ** (-gain / 20)
        wav = F.pad(wav, (0, columns * HOP - len(wav)))
        return cls(tuple(sorted(settings.redo)), path, sound, wav, clip.samples, gain, comment)

    @cached_property
    def spans(self):
        """[(a, b)] in samples; what ends with the sound ends with its last column."""
        spans = []
        for start, end in self.stretches:
            b = round(end * SAMPLE_RATE)
            spans.append((round(start * SAMPLE_RATE), b if b < self.samples else len(self.wav)))
        return spans

    def prepare(self, clip, ldm, settings, plan, grid: int):
        """Sets the clip's windows, and what is known of their latents.

        plan and grid: see `place_windows`. Raises ValueError for a network without an encoder.
        """
        if not hasattr(ldm.vae, "encoder"):
            raise ValueError("redo: needs the autoencoder's encoder; load_models(encoder=True)")
        clip.starts = place_windows(self.spans, clip.samples, ldm.config.fps, plan, grid)
        with clip.profile("autoencoder"):
            for start in clip.starts:
                known = self.known_latents(ldm, start)
                clip.known |= {(k, start): known for k in range(settings.candidates)}

    @torch.no_grad()
    def known_latents(self, ldm, start: int):
        """Latents (4, 16, 64) of the window at sample `start`, and which columns (64,) stay."""
        parameter = next(ldm.vae.parameters())
        window = F.pad(
            self.wav[start : start + WINDOW], (0, max(0, start + WINDOW - len(self.wav)))
        )
        mean, _ = ldm.vae.encode(audio.mel(window)[None, None].to(parameter))
        latents = LATENT_SCALE * mean[0].float().cpu()
        # a latent column holds the sound from half a mel column before its first one's center
        width = WINDOW // latents.shape[2]
        begins = start - HOP // 2 + width * torch.arange(latents.shape[2])
        stays = begins < self.samples
        for a, b in self.spans:
            stays &= (begins + width <= a) | (begins >= b)
        return latents, stays

    def vocode(self, drawn):
        """The windows' spectrogram (128, s) -> that of all the sound (128, columns), and the sound.

        Only the stretches are taken from it.
        """
        mel = audio.mel(self.wav)
        wav = self.wav
        for a, b in self.spans:
            columns = slice(math.ceil(a / HOP), math.ceil(b / HOP))
            mel[:, columns] = drawn[:, columns]
        for a, b in self.spans:
            wav = fill(wav, mel, a, b)
        return mel, wav

    def finish(self, result, wavs, settings, mark=True):
        """A `sample.Result` that has the sounds {candidate: (n,)} in the stretches alone."""
        floats = {}
        before = Sound(self.wav[: self.samples, None].numpy() * 10 ** (self.gain / 20))
        for k, wav in wavs.items():
            wav = wav * 10 ** (self.gain / 20)
            if settings.keep_audio is not None and media.probe(result.source).has_audio:
                own = media.read_audio(result.source, 0, len(wav) / SAMPLE_RATE)
                wav = wav + own * 10 ** (settings.keep_audio / 20)
            # all of it, so that the pattern begins with the sound
            if mark:
                wav = watermark.mark(wav)
            self.sounds[k] = self.sound
            floats[k] = before
            for a, b in self.spans:
                self.sounds[k] = self.sounds[k].replaced(wav, a, b)
                floats[k] = floats[k].replaced(wav, a, b)
        wavs = {k: torch.from_numpy(sound.samples[:, 0]) for k, sound in floats.items()}
        tags = [
            tags | {"comment": self.new_comment(tags["comment"], settings.seed)}
            for tags in (result.tags, result.sound_tags)
        ]
        wav = wavs[result.best]
        return replace(result, redo=self, wav=wav, wavs=wavs, tags=tags[0], sound_tags=tags[1])

    def new_comment(self, comment, seed: int):
        """The tag of the redone sound; `comment`: what it would be if all were new."""
        stretches = described(self.stretches)
        if self.comment:
            return f"{self.comment}, {stretches} s redone with seed {seed}"
        return f"{comment}, {stretches} s alone; the rest is the sound of {self.path.name}"

    @property
    def has_own(self):
        """Whether a clip's own sound is in it, by the tag. A video's tag names it anyway."""
        if not self.comment or '"keep_audio"' in self.comment:
            return True
        return COMPOSITE in self.comment and self.path.suffix.lower() in SOUNDS

    def line(self):
        """What --json says of it."""
        return {"seconds": self.stretches, "of": str(self.path)}


def keep_before(result, target, video, suffix, stack):
    """Keep the sound that the outputs replace, if they do, as NAME.foley.before.wav. -> its path.

    suffix: of the sounds, .wav or .flac. Never over one that is there: then as
    NAME.foley.before.2.wav.
    """
    if result.redo is None:
        return None
    old = Path(f"{target}{suffix}")
    replaces_source = Path(video).resolve() == result.source.resolve()
    if not old.exists() and not replaces_source:
        return None
    suffix = suffix if result.redo.sound.fits(suffix) else ".wav"
    path = Path(f"{target}.before{suffix}")
    number = 2
    while path.exists():
        path = Path(f"{target}.before.{number}{suffix}")
        number += 1
    part = stack.enter_context(atomic_write(path))
    if old.exists():
        part.write_bytes(old.read_bytes())
    else:
        result.redo.sound.write(part, {"comment": result.redo.comment})
    return str(path)


def said(line):
    """What is said of a redone sound after the rest; of any other nothing."""
    if "redo" not in line:
        return ""
    redo = line["redo"]
    kept = f", kept as {redo['before']}" if redo["before"] else ""
    return f", redone: {described(redo['seconds'])} s of {redo['of']}{kept}"


# ---- the sampler -------------------------------------------------------------------------------


def repaint(eps_fn, x, steps: int, callback=None):
    """DDIM that takes every step twice, with noise added in between, and the last once.

    The second time what is filled in has seen what is known (RePaint, Lugmayr et al. 2022, Sec.
    4.2). The noise is that of the start, rolled, so that it is a window's own in any batch.
    """
    start = x
    for i, (t, t_next) in enumerate(descending_pairs(steps, None)):
        times = torch.full((len(x),), float(t))
        x_next = ddim_step(x, eps_fn(x, times), t, t_next)
        if t_next:
            # back from t_next to t: x_t = sqrt(a) x_next + sqrt(1 - a) noise
            a = (ALPHAS_CUMPROD[t] / ALPHAS_CUMPROD[t_next]).item()
            noise = start.flatten(1).roll(97 * (i + 1), 1).view_as(x)
            x = a**0.5 * x_next + (1 - a) ** 0.5 * noise
            x_next = ddim_step(x, eps_fn(x, times), t, t_next)
        x = x_next
        if callback:
            callback(i, x)
    return x


# ---- from spectrogram to sound -----------------------------------------------------------------


def fill(wav, mel, a: int, b: int):
    """Sound (n,) with new samples a to b, of the spectrogram mel (128, n / 256), in phase with it.

    Griffin-Lim starts every iteration from what the joined sound will be, cross-fades included. It
    has the magnitudes of the old sound around them.
    """
    low = max(0, a // HOP - AROUND)
    high = min(mel.shape[1], math.ceil(b / HOP) + AROUND)
    part = wav[low * HOP : high * HOP]
    magnitude = audio.mel_to_magnitude(mel[None, :, low:high])  # (1, 513, s)
    centers = HOP * torch.arange(low, high)
    is_new = (centers >= a) & (centers < b)
    magnitude = torch.where(is_new, magnitude, audio.stft(part[None]).abs())
    times = torch.arange(low * HOP, high * HOP, dtype=torch.float64) + 0.5
    share = share_of_new(times, a, b if b < len(wav) else math.inf).float()
    new = audio.griffin_lim(magnitude, known=(part[None], 1 - share))[0]
    return torch.cat([wav[:a], new[a - low * HOP : b - low * HOP], wav[b:]])
