"""What the official demo does, quirk for quirk, for its numbers: `sample.py --as-official`.

in   a video of 8 s or more and the published networks
out  its mels and its sound: windows of 32 features end to end, 8.176 s of sound for each 8 s of
     picture, pitch at 0.73

Each function names what it follows in the official repository, under `inference/`. Two things are
not repeated: random numbers (the demo draws them on a GPU), and the gradient that turns to NaN
where the classifier is sure of a mismatch. PLMS is refused: there the demo falls through to an
unguided sampler of other latents (`diff_foley/models/diffusion/ddpm.py` 1352).
"""

import functools

import torch

from align import Alignment
from common import audio
from common.files import UserError
from common.media import in_child
from diffusion import SAMPLERS, TIMES, ddim, sigma
from kernels import fast
from ldm import LATENT_SCALE, LATENT_SHAPE

SECONDS = 8.2  # of every video (notebook: truncate_second)
CHUNK = 40  # frames encoded at once, with zeros before and after (`demo_util.py` 158)
INVERSE_RATE = 22050  # that mels made at 16000 are inverted with (`demo_util.py` 197)


class OfficialError(UserError):
    """What the demo cannot do."""


def check(path, models, settings, seconds):
    """Raises OfficialError for networks, settings and clips that the demo crashes on or ignores."""
    config = models.ldm.config
    align = models.align
    if align is None or align.config.unet.context_dim != config.feature_dim or config.unet.aligned:
        raise OfficialError(
            "--as-official is the demo of the published networks; give --weights official, "
            "or a folder with them"
        )
    if settings.sampler == "plms":
        raise OfficialError(
            "--as-official: with PLMS the demo falls through to another sampler, unguided; "
            "give --sampler dpm or ddim"
        )
    if settings.sampler == "ddim" and ddim_times(settings.steps)[-1] == 1000:
        raise OfficialError(
            f"--as-official: with DDIM the demo crashes at --steps {settings.steps}; give others"
        )
    if seconds * config.fps < config.frames - 0.5:
        raise OfficialError(
            f"{path}: the official demo crashes under {config.frames / config.fps:g} s; "
            "leave --as-official out"
        )


def read_frames(path, fps, size, start, seconds):
    """uint8 (f, 3, size, size): frames of an H.264 copy of the video (see `compat.demo_frames`)."""
    return torch.from_numpy(
        in_child(path, "compat.demo_frames", "read_frames", path, float(fps), size, start, seconds)
    )


def encode(cavp, frames):
    """uint8 (f, 3, h, w) -> unit features (f, 512). One near a chunk's end feels the zeros beyond
    it (`demo_util.py` 158-168)."""
    return torch.cat([cavp.encode_clip(chunk) for chunk in frames.split(CHUNK)])


def ddim_times(steps):
    """From 1 on by 1000 // `steps`, however many that gives: 31 for 30 (`ddim.py`).

    For 27 and some others the last is 1000, one more than there are; there the demo crashes.
    """
    return list(range(1, 1001, 1000 // steps))


def calls(settings):
    """How often the sampler calls back in a window."""
    return len(ddim_times(settings.steps)) if settings.sampler == "ddim" else settings.steps


class Unprojected:
    """The alignment classifier as the demo calls it: raw features go where the network was trained
    on its own projection of them (`alignment_classifier.py` 269)."""

    def __init__(self, align):
        self.model = align.model

    def cond_model(self, features):
        return features

    logit = Alignment.logit
    log_prob = Alignment.log_prob
    grad_log_prob = Alignment.grad_log_prob


def sample_mels(features, models, noise, settings, callback=None):
    """features (f, 512), noise (k, 4, 16, w * 64) -> mels (k, w, 128, 512), unclamped, of the w
    whole windows (notebook 289-325).

    The branch without condition is a zero embedding, not the embedding of zero features that
    training used; the classifier gets raw features, without its own projection, of the whole clip
    in every window; with DPM-Solver, `cfg` 1 drops it (`dpm_solver.py` 1378).
    """
    ldm = models.ldm
    frames = ldm.config.frames
    width = LATENT_SHAPE[2]
    sampler = SAMPLERS[settings.sampler]
    times = TIMES[settings.sampler](settings.steps)
    if settings.sampler == "ddim":
        times = ddim_times(settings.steps)
        sampler = functools.partial(ddim, times=times)
    cg = 0.0 if settings.sampler == "dpm" and settings.cfg == 1 else settings.cg
    classifier = Unprojected(models.align) if cg else None

    clip = features.expand(len(noise), -1, -1)
    mels = []
    for w in range(len(features) // frames):
        context = ldm.conditioner(clip[:, w * frames : (w + 1) * frames])
        eps = fast.guided(
            ldm.unet,
            context,
            torch.zeros_like(context),
            settings.cfg,
            classifier,
            clip,
            cg,
            times,
            sigma,
        )
        z = sampler(eps, noise[..., w * width : (w + 1) * width], settings.steps, callback)
        mels.append(ldm.vae.decode((z / LATENT_SCALE).to(context.dtype))[:, 0].float())
    return torch.stack(mels, 1)


def mel_to_magnitude(mel):
    """(b, 128, s) -> (b, 513, s): librosa's `mel_to_stft`, which is the least-squares solution
    without its negative part, with another filterbank than the mels were made with
    (`demo_util.py` 196-211)."""
    inverse = torch.linalg.pinv(audio.mel_basis(INVERSE_RATE).double()).float().to(mel.device)
    return (inverse @ 10 ** (5 * mel - 4)).clamp(min=0)


def vocode(mels):
    """(w, 128, 512) -> (w * 130816,): each window by itself, one after the other (notebook 351)."""
    wavs = audio.griffin_lim(mel_to_magnitude(mels))
    return wavs[:, : (mels.shape[-1] - 1) * audio.HOP].flatten()


@torch.no_grad()
def generate(path, models, settings, start, seconds, noise_field, profile, progress):
    """-> features (f, 512), mels (k, w, 128, 512), {candidate: wav} of the picture from `start` on.

    noise_field(seed, candidate, columns) -> (4, 16, columns). Raises OfficialError, MediaError.
    """
    check(path, models, settings, seconds)
    config = models.cavp.config
    with profile("decode"):
        frames = read_frames(path, config.fps, config.size, start, seconds)
    with profile("features"):
        features = encode(models.cavp, frames)
    windows = len(features) // models.ldm.config.frames
    progress.total += windows * calls(settings)
    # the demo does not rank candidates
    candidates = range(settings.candidates if settings.keep_all else 1)
    columns = windows * LATENT_SHAPE[2]
    noise = torch.stack([noise_field(settings.seed, k, columns) for k in candidates])
    with profile("sampling"):
        noise = noise.to(models.device)
        step = functools.partial(progress.step, 1)
        mels = sample_mels(features, models, noise, settings, step).cpu()
    with profile("vocoder"):
        wavs = {k: vocode(mels[k]) for k in candidates}
    return features, mels, wavs
