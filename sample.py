"""Sound for silent video: the main job (Diff-Foley Sec. 3.3 and 3.4).

in   videos, or folders of them, of any length, frame rate and size
out  beside each NAME.foley.mp4 (picture copied bit for bit, sound exactly as long) and
     NAME.foley.wav

    python sample.py demo.mp4
    python sample.py clips/ --out dubbed/ --candidates 4 --plot
    python sample.py --verify dubbed/clip.foley.mp4       is its sound ours? By tag and watermark

Read `generate_many` and what it calls: film/windows.py's `plan_windows` places windows of 131,072
samples (8.192 s), `video_features` is stage 1, `denoise` stage 2 under double guidance;
`Spectrogram` and `vocode_long` make one sound of the windows' latents.

Windows start on whole video features and whole mel columns and overlap by a second or more. Each is
conditioned, classifier included, on the frames of its own seconds. Windows that overlap begin from
the same slice of one noise field; every other one fills in what its neighbors have left. A window
whose sound does not play the hits that it was told is drawn again from other noise (film/tries.py).
All are cross-faded as spectrograms, so that one phase-coherent Griffin-Lim makes the whole sound.
It gets the watermark (1 dB, see common/watermark.py) and one constant gain, to a loudness of -23
LUFS or a true peak of -1 dBTP (film/level.py). A run of a long film that was stopped goes on where
it was (film/kept.py).

Differs from the official demo, which joins windows end to end (0.176 s of slip in each), drops
tails, crashes under 8 s, shows its classifier the frames of the whole clip, and inverts the mel at
another rate than it was made with.
"""

import functools
import itertools
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common import startup

# isort: split
import torch
from torch import Tensor

import kernels
from align import Alignment
from cavp import CAVP
from common import audio, cli, controls, distributed, isolation, media, watermark
from common.audio import HOP, SAMPLE_RATE, WINDOW
from common.checkpoints import Checkpoint, CheckpointError
from common.files import UserError
from common.machine import computes_bfloat16, find_device, keep_freed_memory
from common.media import MediaError
from common.onsets import Hit, opened_hits
from common.profiling import Profile, share
from compat import hub
from diffusion import SAMPLERS, TIMES, fill_in, sigma
from film import kept, level
from film.arguments import PAPER, TRIES, check_settings, make_parser, usual_sampling
from film.credentials import Signer
from film.hits import check_hits, hits_to_play
from film.jobs import (
    cannot_start,
    exit_status,
    find_sounds,
    plan_jobs,
    report,
)
from film.outputs import save, write_job
from film.page import Page
from film.progress import Progress, show_progress
from film.provenance import VERSION, WeightSums, make_tags
from film.redo import Redo, check_stretches, plan_redo, repaint
from film.tries import best_of_tries
from film.windows import (
    LATENT_HOP,
    Spectrogram,
    agreed,
    known_latents,
    plan_needs,
    plan_windows,
    take_batch,
    window_grid,
)
from kernels import fast
from ldm import LATENT_SHAPE, LDM, UNetConfig

startup.imported(__name__ == "__main__")

# ----------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How sound is drawn. Raises ValueError, in one line, for what cannot be."""

    seed: int = 0  # same seed, same sound
    steps: int | None = None  # of the sampler; None: 25, as in the paper, or film.arguments.FEW
    # "double", as in the paper: two calls of the U-Net a step and one of the classifier; or
    # "distilled", one call (distill.py); None: distilled where the weights are
    guidance: str | None = None
    cfg: float | None = None  # classifier-free guidance scale, 1: off; None: the weights' own
    cg: float | None = None  # classifier guidance scale, 0: off; None: the weights' own
    # one of diffusion.SAMPLERS; None: "dpm", DPM-Solver++ 2M as in the paper, or UniPC if distilled
    sampler: str | None = None
    # where its steps lie: one of diffusion.SCHEDULES, or times, as diffusion.search_schedule gives
    schedule: str | tuple[float, ...] = "uniform"
    # of so many steps one computes the deep half of the U-Net, the others go on with its result
    deep_every: int = 1
    candidates: int = 1  # drawn of each clip; the classifier ranks them
    keep_all: bool = False  # the sound of every candidate, not of the best alone
    tries: int = TRIES  # at most, of a window whose sound does not play the hits that it was given
    batch: int | None = None  # windows in one network call; None: 1 on a CPU, 16 on a GPU
    keep_audio: float | None = None  # dB: gain of the clip's own sound under the new one; None: off
    # loudness of the generated sound (ITU-R BS.1770), unless that takes a true peak above -1 dBTP;
    # None: as the model makes it
    lufs: float | None = -23.0
    duck: float | None = None  # dB by which keep_audio's sound is lowered under each hit
    rate: int = SAMPLE_RATE  # of what is written; 48000
    layout: str = "mono"  # of what is written; "stereo"
    as_official: bool = False  # the official demo quirk for quirk (compat/official.py)
    # who finds the hits, one of controls.FINDERS; or the hits themselves, their file
    # (common/onsets.py), or a folder of such files for many videos; None: what suits the weights
    onsets: str | Path | tuple[Hit, ...] | None = None
    # the given hits are only the first ones of the clip; predict the others from them
    find_rest: bool = False
    material: tuple[str, ...] = ()  # what may be heard; (): what the model sees
    # stretches of an existing sound, (from, to) in seconds, that alone are made anew; (): all of it
    redo: tuple[tuple[float, float], ...] = ()
    redo_of: str | Path | None = None  # that sound's file; None: see film.redo.find_sound

    def __post_init__(self):
        check_settings(self)
        level.check(self)
        check_stretches(self.redo, self.as_official)

    def resolve(self, models):
        """The same with the values that were left to the weights and to the device."""
        align = models.align
        # both guidance and ranking are the classifier's
        if align is None and (self.cg != 0 or self.candidates > 1):
            raise CheckpointError(
                f"{models.name}: no alignment classifier among these weights; add "
                "align.safetensors or double_guidance_classifier.ckpt, "
                "or give --cg 0 and --candidates 1"
            )
        # what these weights can be told
        config = models.ldm.config
        if (self.onsets is not None or self.material) and not config.columns:
            raise CheckpointError(
                f"{models.name}: these weights cannot be told onsets or materials; leave --onsets, "
                "--find-rest and --material out, or take --weights mini"
            )
        known = models.ldm.materials if config.columns else ()
        for name in self.material:
            if name not in known:
                raise ValueError(f"material {cli.quoted(name)}: not one of {', '.join(known)}")
        onsets = opened_hits(self.onsets, controls.FINDERS, known)
        if onsets is None and config.columns:
            onsets = "both"
        cfg = config.guidance if self.cfg is None else self.cfg
        cg = align.config.guidance if self.cg is None else self.cg
        guidance = self.guidance or ("distilled" if config.scales else "double")
        if guidance == "distilled":
            controls.check_scales((cfg, cg), config.scales, models.name)
        # how it is sampled
        steps, sampler = usual_sampling(self, guidance)
        batch = self.batch or (1 if torch.device(models.device).type == "cpu" else 16)
        return replace(
            self,
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            cfg=cfg,
            cg=cg,
            batch=batch,
            onsets=onsets,
        )


# ----------------------------------------------------------------------------------------------
# noise


def noise_field(seed, candidate, columns, attempt=0):
    """(4, 16, columns) of noise, the start of a whole clip's diffusion.

    Windows take slices of it, so what they share they start from alike; a longer clip begins with
    the noise of a shorter one.
    """
    # a generator for each candidate, so that their number changes none of them; of these there are
    # 1000 at most, of attempts MOST_TRIES
    rng = torch.Generator().manual_seed((int(seed) << 16) + (attempt << 10) + candidate)
    # columns first, so that a longer field begins with a shorter one
    return torch.randn(columns, *LATENT_SHAPE[:2], generator=rng).permute(1, 2, 0)


# ----------------------------------------------------------------------------------------------
# the networks


@dataclass
class Models:
    """What `load_models` gives and `generate` takes."""

    cavp: torch.nn.Module
    ldm: torch.nn.Module
    align: torch.nn.Module | None  # only guidance by it and the ranking of candidates need it
    device: str = "cpu"
    name: str = "mini"
    sums: WeightSums = field(default_factory=WeightSums)  # of the files they came from

    def __repr__(self):
        return f"Models({self.name}, on {self.device})"


def default_dtype(ldm_path, device):
    """bfloat16 for networks of the published size, on a GPU and on a CPU that computes in it.

    The mini model stays in float32: in bfloat16 its sounds are a little worse (96 clips on a GPU:
    level error 2.30 instead of 2.18 dB, Frechet distance 7.40 instead of 7.05).
    """
    unet = (Checkpoint(ldm_path).config or {}).get("unet") or {}
    wide = unet.get("width", UNetConfig.width) >= 128
    return torch.bfloat16 if wide and computes_bfloat16(device.type) else torch.float32


def load_models(
    weights: str | Path = "mini",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    encoder: bool = False,
) -> Models:
    """The networks, ready to generate and no longer for training.

    weights: "mini", "official" (downloaded once), or a folder with our three files or the
    published ones; dtype None: see `default_dtype`; encoder: with the autoencoder's, which
    `Settings.redo` needs. Raises CheckpointError, HubError, and ValueError for a device or dtype
    that cannot be.
    """
    device = find_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype {cli.quoted(dtype)}: not one of torch.float32, torch.bfloat16")
    # which files, and in what format they run
    paths = hub.find_weights(weights)
    if dtype is None:
        dtype = default_dtype(paths["ldm"], device)

    # without what only training needs: CAVP's audio tower and, but for redoing, the encoder
    cavp = CAVP.load(paths["cavp"], audio=False).fold().to(device, dtype)
    ldm = LDM.load(paths["ldm"], device, dtype, encoder)
    align = paths["align"] and Alignment.load(paths["align"], device, dtype)
    if cavp.config.fps != ldm.config.fps:
        raise CheckpointError(
            f"{paths['ldm'].parent}: cavp has {cavp.config.fps:g} frames a second, "
            f"ldm {ldm.config.fps:g}; take both from one training"
        )
    # the same numbers with less work (kernels/fast.py)
    fast.optimise(ldm.unet)
    if align is not None:
        fast.optimise(align.model)
    name = paths["ldm"].resolve().parent.name
    return Models(cavp, ldm, align, str(device), name, WeightSums(paths))


default_models = functools.cache(load_models)  # for `generate` where it is given none


# ----------------------------------------------------------------------------------------------
# from picture to spectrogram


def video_features(path, cavp, count, seconds, start=0.0, profile=None):
    """(count, d) unit features of the picture from `start` on; past its end the last frame is held.

    Read a minute at a time, with the frames on either side that the features depend on: memory
    stays bounded, and no feature depends on where a minute ends (the demo's 40-frame chunks:
    `demo_util.py` 158).
    """
    profile = profile or Profile()
    fps = cavp.config.fps
    minute = round(60 * fps)
    shown = max(1, math.ceil(seconds * fps - 1e-6))  # frames that begin before the end
    features = []
    frames = None
    for at in range(0, count, minute):
        # this minute, and the frames around it that its features depend on
        low = max(0, at - cavp.context)
        high = min(count, at + minute + cavp.context)
        with profile("decode"):
            wanted = min(high, shown) - low
            if wanted > 0:
                at_second = start + low / fps
                frames = media.read_frames(path, fps, cavp.config.size, at_second, wanted / fps)
                frames = frames[:wanted]
            else:
                frames = frames[-1:]
            # past the picture's end its last frame is held
            still = frames[-1:].expand(high - low - len(frames), -1, -1, -1)
            frames = torch.cat([frames, still])  # (high - low, 3, h, w)
        with profile("features"):
            features.append(cavp.encode_clip(frames)[at - low :][:minute])
    return torch.cat(features)[:count]


def set_conditions(clip, models, settings):
    """Sets a clip's hits, and its conditions: the features and what stage 2 is told beside them.

    It is told the hits, found or given, and plays no others.
    """
    config = models.ldm.config
    clip.conditions = clip.features
    # by the features alone, as the published weights
    if not config.columns or (settings.onsets == "none" and not settings.material):
        return
    clip.hits = hits_to_play(clip, models, settings)
    clip.hits_given = settings.onsets != "none"
    # towards materials that a person names eps is led, towards those that are seen it is not
    clip.names_materials = bool(settings.material) or any(
        hit.material and not hit.is_guess for hit in clip.hits
    )
    # as tracks in time with the features
    tracks = controls.make_tracks(
        clip.hits,
        settings.material,
        config.materials,
        len(clip.features),
        config.columns,
        1 / config.fps,
    )
    tracks = controls.Tracks(*(track.to(clip.features) for track in tracks))
    if not clip.hits_given:
        tracks = tracks._replace(given=None)
    clip.conditions = models.ldm.with_controls(clip.features[None], tracks)[0]
    # held once: an hour's are 115 MB
    clip.features = clip.conditions[:, : clip.features.shape[1]]


@dataclass(eq=False)
class Clip:
    """One video on its way through the batches."""

    source: Path
    start: float  # seconds into the picture
    duration: float | None  # seconds asked for; None: to the end
    seconds: float  # of picture from `start` on
    profile: Profile
    starts: list = ()  # samples at which its windows start
    features: Tensor = None  # (f, d)
    conditions: Tensor = None  # (f, d + controls): features, and what stage 2 is told beside them
    hits: list = ()  # Hit, that it is told or that were found
    hits_given: bool = False  # whether stage 2 is to play these hits and no others
    names_materials: bool = False  # whether a person does
    # (candidate, start) -> latents (4, 16, 64) of a window, and which columns (64,) are known
    known: dict = field(default_factory=dict)
    redo: Redo | None = None  # the existing sound, where only stretches of it are drawn
    # (candidate, start) -> of windows that are drawn: latents (4, 16, 64), and score
    latents: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    mels: dict = field(default_factory=dict)  # candidate -> {0: mel}, where there is one window
    keeper: kept.Kept | None = None  # where these are kept on disk, until the output is written

    @functools.cached_property
    def needs(self):
        return plan_needs(self.starts)

    @property
    def samples(self):
        return max(1, round(self.seconds * SAMPLE_RATE))

    def windows(self, settings):
        """(this clip, candidate, start sample) of all that is to be drawn, in order."""
        every = itertools.product(range(settings.candidates), self.needs)
        return [(self, *window) for window in every if window not in self.latents]

    def can_draw(self, candidate, start):
        """Whether the neighbors are drawn that this window is to know."""
        return all((candidate, other) in self.latents for other in self.needs[start])

    def is_done(self, settings):
        return len(self.latents) == len(self.starts) * settings.candidates


def guided(models, conditions, opened, settings, times):
    """eps(x, t) under both guidances, for conditions (b, f, d) and all times of a sampler.

    opened: the conditions with materials left open where eps is to be led to them, or None."""
    ldm = models.ldm
    features = conditions[..., : ldm.config.feature_dim]
    conditions, opened = controls.fade_picture(conditions, opened, features)
    # one call a step, of a network that is told how strongly it is guided
    if settings.guidance == "distilled":
        scales = torch.tensor([[settings.cfg, settings.cg, controls.EMPHASIS]])
        scales = scales.repeat(len(conditions), 1).to(conditions.device)
        scales[:, 2] *= 0 if opened is None else (opened != conditions).flatten(1).any(1)
        context = ldm.guided_context(conditions, scales)
        return fast.guided(ldm.unet, context, None, 1, times=times, deep_every=settings.deep_every)
    return fast.guided(
        ldm.unet,
        ldm.conditioner(conditions),
        ldm.null_context(ldm.config.frames),
        settings.cfg,
        models.align,
        features,
        settings.cg,
        times=times,
        sigma=sigma,
        open_context=None if opened is None else ldm.conditioner(opened),
        emphasis=controls.EMPHASIS,
        deep_every=settings.deep_every,
    )


@torch.no_grad()
def sample_latents(windows, attempt, models, settings, callback=None):
    """[(latents (4, 16, 64), score)] of one batch of windows, of any clips.

    A window's noise depends on seed, candidate, attempt and place alone: other inputs do not change
    a sound, nor, with a batch of one, do other candidates; a larger batch changes it by rounding,
    which may now and then decide whether it is drawn again. A score is the classifier's
    log-probability, at diffusion time 0, that sound and picture belong together; None without a
    classifier.
    """
    ldm = models.ldm
    # each window's slice of the noise field, and the conditions of its own seconds
    noise = []
    conditions = []
    for clip, candidate, start in windows:
        column = round(start / LATENT_HOP)
        field = noise_field(settings.seed, candidate, column + LATENT_SHAPE[2], attempt)
        noise.append(field[..., column:])
        frame = round(start * ldm.config.fps / SAMPLE_RATE)
        conditions.append(clip.conditions[frame : frame + ldm.config.frames])
    x = torch.stack(noise).to(models.device)  # (b, 4, 16, 64)
    conditions = torch.stack(conditions)  # (b, f, d + controls)
    # where a person names materials, the same with these left open
    opened = ldm.without_materials(conditions)
    names = torch.tensor([clip.names_materials for clip, _, _ in windows], device=x.device)
    if opened is not None:
        opened = torch.where(names[:, None, None], opened, conditions) if names.any() else None

    # what is known of some of these windows, and is not to be drawn
    known = [known_latents(*window) for window in windows]
    known_z = torch.stack([z for z, _ in known]).to(x)
    is_known = torch.stack([mask for _, mask in known])[:, None, None]  # (b, 1, 1, 64)
    any_known = is_known.any()
    is_known = is_known.to(x.device)

    # latents, by the sampler under double guidance; the classifier then scores them
    scores = [None] * len(windows)
    with share([clip.profile for clip, _, _ in windows], "sampling"):
        schedule = {} if settings.schedule == "uniform" else {"schedule": settings.schedule}
        times = TIMES[settings.sampler](settings.steps, **schedule)
        eps = guided(models, conditions, opened, settings, times)
        if any_known:
            eps = fill_in(eps, known_z, is_known)
        sampler = repaint if settings.redo else SAMPLERS[settings.sampler]
        # progress counts first attempts alone
        z = sampler(eps, x, settings.steps, None if attempt else callback, **schedule)
        z = torch.where(is_known, known_z, z)  # (b, 4, 16, 64)
        if models.align is not None:
            features = conditions[..., : ldm.config.feature_dim]
            scores = models.align.log_prob(z, z.new_zeros(len(z)), features)
            scores = scores.float().flatten().cpu()
    # a copy of its own, which does not hold the whole batch
    return [(latents.clone(), score) for latents, score in zip(z.cpu(), scores, strict=True)]


def denoise(windows, models, settings, callback=None):
    """One batch of windows, of any clips: their latents and scores are added to the clips.

    Where hits are told, a window that does not play them is drawn again (film/tries.py).
    """

    def decode(windows, z):
        with share([clip.profile for clip, _, _ in windows], "autoencoder"):
            return models.ldm.decode(z.to(models.device))

    sampling = functools.partial(
        sample_latents, models=models, settings=settings, callback=callback
    )
    best = best_of_tries(windows, sampling, decode, settings.tries)
    for (clip, *window), (latents, score) in zip(windows, best, strict=True):
        clip.latents[tuple(window)] = latents
        if score is not None:
            clip.scores[tuple(window)] = score
        if clip.keeper is not None:
            clip.keeper.add(*window, score, latents)


# ----------------------------------------------------------------------------------------------
# from spectrogram to sound


def add_watermark(wav, out=None):
    """Sound (n,) with the watermark: what every sound is given before it leaves the program.

    out: where it is written, which may be `wav`; None: a tensor of its own.
    """
    marked = watermark.mark(wav, out)
    return audio.limit(marked, out=marked)


@dataclass
class Result:
    """The sound of one clip."""

    # (samples,) of the best candidate, float32, 16 kHz, as long as the picture; the sound that
    # keep_audio keeps is mixed in where it is written
    wav: Tensor
    wavs: dict[int, Tensor]  # candidate -> its sound: the best one's, or all
    scores: list  # of each candidate, higher is better; None without a classifier
    best: int  # its number among the candidates
    spectrogram: Tensor | Spectrogram  # (128, columns) of the best, decoded where it is read
    starts: list[int]  # samples at which the windows start
    seconds: float  # of picture
    source: Path
    start: float  # seconds into the picture
    duration: float | None  # seconds asked for; None: to the end
    profile: Profile
    tags: dict[str, str]  # of the film
    marked: bool = True  # whether the sounds carry the watermark
    sound_tags: dict[str, str] = field(default_factory=dict)  # of the sound alone
    hits: list[Hit] = ()  # told, found, or else heard, in seconds of the source
    settings: Settings = Settings()  # as resolved
    # candidate -> its gain, dB over what the model made, and how loud it is
    levels: dict[int, level.Applied] = field(default_factory=dict)
    redo: Redo | None = None  # where only stretches of a sound were made anew

    @property
    def mel(self):
        """(128, columns) float32 of the best candidate."""
        return self.spectrogram[:, :]

    def __repr__(self):
        candidates = f"{len(self.wavs)} of {len(self.scores)} candidates"
        return f"Result({self.source}: {self.seconds:.2f} s, {candidates}, marked={self.marked})"

    def save(self, path: str | Path, keep_tracks: bool = False):
        """Write the picture with this sound (mp4, mov, mkv, webm), or the sound alone (wav, flac).

        Both are tagged. keep_tracks: the source's own sound tracks stay as further tracks. Raises
        MediaError and FileError; a file is written whole or not at all.
        """
        path = Path(path)
        if path.resolve() == self.source.resolve():
            raise MediaError(f"{path}: is the source itself; give another name")
        save(self, path, keep_tracks)

    @property
    def gain(self):
        """dB by which the sound is louder than the model made it."""
        return level.of(self, self.best).gain


def finish(clip, models, settings, mark):
    """The windows of a clip -> its Result."""
    count = settings.candidates
    # a candidate's score is the mean over its windows
    scores = [None] * count
    best = 0
    if clip.scores:
        every = itertools.product(range(count), clip.starts)
        means = torch.stack([clip.scores[window] for window in every]).view(count, -1).mean(1)
        best = int(means.argmax())
        scores = means.tolist()
    clip.features = clip.conditions = None  # the sound takes their place in memory
    # one spectrogram of each candidate's windows, and its sound
    spectrograms = {}
    wavs = {}

    def decode(z):
        with clip.profile("autoencoder"):
            return models.ldm.decode(z.to(models.device))

    for k in range(count) if settings.keep_all else [best]:
        columns = math.ceil(clip.samples / HOP)
        latents = agreed(clip, k)
        mels = clip.mels.get(k)
        spectrograms[k] = Spectrogram(
            latents, clip.starts, columns, decode, settings.batch, clip.source, mels
        )
        with clip.profile("vocoder"):
            if clip.redo:
                spectrograms[k], wavs[k] = clip.redo.vocode(spectrograms[k])
            else:
                wavs[k] = audio.vocode_long(spectrograms[k], clip.samples, models.device)
    result = make_result(clip, models, settings, mark, wavs, scores, best, spectrograms[best])
    return clip.redo.finish(result, wavs, settings, mark) if clip.redo else result


def make_result(clip, models, settings, mark, wavs, scores, best, spectrogram):
    """The last steps: the watermark, and the gain to the loudness that is wanted."""
    with clip.profile("vocoder"):
        if mark:
            wavs = {k: add_watermark(wav, out=wav) for k, wav in wavs.items()}
        levels = level.apply(wavs, settings)
    hits = clip.hits
    # where nobody told or found any
    if not clip.hits_given:
        hits = [Hit(time) for time in audio.detect_onsets(spectrogram)]
    return Result(
        hits=[hit._replace(time=hit.time + clip.start) for hit in hits],
        wav=wavs[best],
        wavs=wavs,
        scores=scores,
        best=best,
        spectrogram=spectrogram,
        starts=clip.starts,
        seconds=clip.seconds,
        source=clip.source,
        start=clip.start,
        duration=clip.duration,
        profile=clip.profile,
        tags=make_tags(models, settings, VERSION, mark),
        sound_tags=make_tags(models, settings, VERSION, mark, has_picture=False),
        settings=settings,
        levels=levels,
        marked=mark,
    )


# ----------------------------------------------------------------------------------------------
# the main job


def generate(
    video: str | Path,
    models: Models | None = None,
    *,
    settings: Settings = Settings(),
    start: float = 0.0,
    duration: float | None = None,
    mark: bool = True,
    on_step: Callable | None = None,
) -> Result:
    """Sound for one video: round(seconds * 16000) samples in time with its picture.

    models: of `load_models`; None: the mini model. start, duration: seconds of the picture.
    mark: the sound carries the watermark. on_step(done, total) is called after every step of the
    sampler, but for windows that are drawn again. Raises UserError for a video that cannot be read,
    ValueError for wrong arguments.
    """
    # a list of one
    many = generate_many(
        [video],
        models,
        settings=settings,
        start=start,
        duration=duration,
        mark=mark,
        on_step=on_step,
    )
    _, result = next(many)
    if isinstance(result, UserError):
        raise result
    return result


def generate_many(
    videos,
    models: Models | None = None,
    *,
    settings: Settings = Settings(),
    start: float = 0.0,
    duration: float | None = None,
    mark: bool = True,
    on_step: Callable | None = None,
    keep: dict[Path, Path] | None = None,
) -> Iterator[tuple[Path, Result | UserError]]:
    """The same for many videos, in order: (video, its Result, or why there is none).

    Windows of different clips and candidates share batches of `settings.batch` (on an H100 a step
    of eight windows takes 2.6 times as long as one of a single window). No more clips are read
    ahead than fill a batch. A clip's sound is the same as alone, but for the rounding of a batch.
    keep: files in which windows of long videos are kept, to go on from after a stop (film/kept.py).
    """
    # what cannot be asked for
    cli.check_number("start", start, 0)
    if duration is not None:
        cli.check_number("duration", duration, 1e-3)
    # models, and what settings leave to them
    cli.check_type("settings", settings, Settings)
    models = default_models(encoder=bool(settings.redo)) if models is None else models
    cli.check_type("models", models, Models)
    settings = settings.resolve(models)
    progress = Progress(on_step)
    clips = deque()  # (video, its Clip; or its Result or UserError, where that is known)
    windows = deque()  # of these clips, not yet drawn

    def finished():
        """Results from the front of the queue, up to the first clip that still lacks windows."""
        while clips:
            video, clip = clips[0]
            if isinstance(clip, Clip):
                if not clip.is_done(settings):
                    return
                clip = caught(finish, clip, models, settings, mark)
            clips.popleft()
            yield video, clip

    def denoise_waiting(least):
        """Windows of any clips, a batch at a time, as long as so many can be drawn."""
        while batch := take_batch(windows, least, settings.batch):
            denoise(batch, models, settings, functools.partial(progress.step, len(batch)))

    # clips are read until their windows fill a batch
    for video in map(Path, videos):
        clip = caught(open_clip, video, models, settings, start, duration, progress, keep)
        clips.append((video, clip))
        if isinstance(clip, Clip):
            windows.extend(clip.windows(settings))
            progress.total += settings.steps * len(clip.windows(settings))
        denoise_waiting(least=settings.batch)
        yield from finished()
    # the rest, which fills no batch
    denoise_waiting(least=1)
    yield from finished()


def caught(function, *args):
    """What the function returns, or the UserError that it raises: no input takes others down."""
    try:
        return function(*args)
    except UserError as error:
        return error


def open_clip(source, models, settings, start, duration, progress, keep=None):
    """-> the video's Clip, or its Result (as_official). Raises UserError."""
    profile = Profile(models.device)
    # how much of the picture is asked for
    with profile("decode"):
        whole = media.probe(source).duration
    if start >= whole:
        raise MediaError(
            f"{source}: --start {start:g} is past its end, {whole:.2f} s; start earlier"
        )
    seconds = min(whole - start, duration or math.inf)
    if settings.as_official:
        from compat import official

        if duration is None:
            seconds = min(seconds, official.SECONDS)
        return generate_as_official(source, models, settings, start, seconds, profile, progress)

    # its windows, and the features of all frames that these see
    config = models.ldm.config
    clip = Clip(source, start, duration, seconds, profile)
    clip.starts = plan_windows(clip.samples, config.fps)
    if settings.redo:
        clip.redo = Redo.open(clip, settings)
        clip.redo.prepare(clip, models.ldm, settings, plan_windows, window_grid(config.fps))
    count = round(clip.starts[-1] * config.fps / SAMPLE_RATE) + config.frames
    clip.features = video_features(source, models.cavp, count, seconds, start, profile)
    set_conditions(clip, models, settings)
    # what an earlier run has drawn; of what is redone there is little
    if keep and source in keep and not settings.redo:
        kept.go_on(clip, keep[source], models, settings)
    return clip


def generate_as_official(source, models, settings, start, seconds, profile, progress):
    """What the official demo makes of a video: unmarked, since it is for its numbers."""
    from compat import official

    features, mels, wavs = official.generate(
        source, models, settings, start, seconds, noise_field, profile, progress
    )
    starts = [k * WINDOW for k in range(len(mels[0]))]
    clip = Clip(source, start, seconds, seconds, profile, starts, features)
    mel = torch.cat(list(mels[0]), 1)
    return make_result(clip, models, settings, False, wavs, [None] * len(mels), 0, mel)


# ----------------------------------------------------------------------------------------------
# command line


def parse_arguments(argv=None):
    """-> the arguments, and the Settings among them."""
    p = make_parser("sample.py", __doc__)
    p.set_defaults(**asdict(Settings()))
    args = p.parse_args(argv)
    try:
        settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    except ValueError as error:
        p.error(f"--{str(error).replace('_', '-', 1)}")
    return args, settings


def load(args):
    """The models that the arguments ask for."""
    kernels.choose(args.kernels)
    device = find_device(args.device)
    if args.verbose:
        print(f"sample.py: {device}, {kernels.describe()}", file=sys.stderr)
    keep_freed_memory(largest=2**23)  # what fragments of larger ones would cost is memory
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    return load_models(args.weights, device, dtype, encoder=bool(args.redo))


def write_next(results, job, args, settings, models, keep, profile):
    """The next result, written. -> it, and --json's line. Raises UserError."""
    result = next(results)[1]
    if isinstance(result, UserError):
        raise result
    line = write_job(job, result, args, settings, models)
    kept.forget(keep[job.given])
    # loading and waiting count once, for the first output
    result.profile.rows = profile.rows | result.profile.rows
    profile.rows = {}
    return result, line


def main(argv=None):
    args, settings = parse_arguments(argv)
    if args.verify:
        return watermark.verify(find_sounds(args.inputs), "sample.py", args.json)
    clock = time.perf_counter()
    isolation.start()  # the child that reads files gets ready while weights load
    profile = Profile()
    models = None
    try:
        # a certificate that cannot sign shows before any work
        args.signer = args.sign and Signer(*args.sign)
        jobs = plan_jobs(args)
        if args.redo:
            settings = replace(settings, redo_of=plan_redo(args))
        page = Page(args, jobs)
        # what is kept needs no weights
        if any(job.line is None for job in jobs):
            with profile("loading"):
                models = load(args)
            settings = settings.resolve(models)
            check_hits(jobs, args, settings, models)
    except (ValueError, UserError) as error:
        return cannot_start(error)

    # every input in order: its outputs, or why there are none
    keep = {job.given: kept.windows_file(job.target) for job in jobs if job.line is None}
    steps = settings.steps or PAPER["steps"]
    progress = show_progress(steps, disable=distributed.rank() > 0 or None)
    any_failed = False
    with warnings.catch_warnings(), progress as on_step:
        files = [str(job.given) for job in jobs]
        cli.show_warnings("sample.py", ("kernels: ", *files), args.verbose)
        results = generate_many(
            keep,
            models,
            settings=settings,
            start=args.start,
            duration=args.duration,
            on_step=on_step,
            keep=keep,
        )
        for job in jobs:
            result = None  # before the next one is made: an hour of sound is 230 MB
            line = job.line
            try:
                if line is None:
                    result, line = write_next(results, job, args, settings, models, keep, profile)
                    line["profile"] = result.profile.table(time.perf_counter() - clock)
                    clock = time.perf_counter()
            except UserError as failure:
                line = {"input": str(job.given), "error": str(failure)}
            any_failed |= "error" in line
            report(line, args)
            page.add(line, job.target, result)
    any_failed |= not page.write()
    return exit_status(any_failed)


if __name__ == "__main__":
    cli.exit_on_signals("sample.py", "stopped; what is finished is kept; the same command goes on")
    sys.exit(main())
