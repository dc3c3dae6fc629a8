"""The alignment classifier of double guidance: do sound and video belong together? (Diff-Foley
Sec. 3.3)

in   the set that `cavp.py --extract` wrote, features (f, 512) and sound of every clip;
     a trained autoencoder (--vae)
out  OUT/last.safetensors: the classifier

    python align.py --data features/ --vae runs/vae/last.safetensors

It is the way down of stage 2's U-Net with a pooled head, p(aligned | x_t, t, features), and is
trained by binary cross-entropy at every noise level. Sampling follows the gradient of its
log-probability (Eq. 10, `diffusion.guided_eps`), and candidates are ranked by it.

Differs from the official code: the classifier sees its own projection of exactly the window's
features; log sigmoid instead of log(sigmoid).
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import audio, distributed, training
from common.checkpoints import load_network, one_line
from diffusion import q_sample
from ldm import (
    LATENT_SHAPE,
    Backbone,
    Conditioner,
    UNetConfig,
    add_schedule,
    begin_run,
    final_lr,
    latents,
)
from vae import LATENT_SCALE, AutoencoderKL, GroupNorm


@dataclass(frozen=True)
class AlignmentConfig:
    """The official double-guidance classifier's sizes (`alignment_backbone.py`)."""

    fps: float = 4.0  # of the features; must be the CAVP's
    frames: int = 32  # condition tokens of one window
    positions: int = 40  # rows of the position table
    feature_dim: int = 512
    guidance: float = 50.0  # the scale of its gradient that suits it in double guidance
    unet: UNetConfig = UNetConfig(
        width=128, multipliers=(1, 2, 2), blocks=1, attention=(2, 4), context_dim=512
    )


PRESETS = {
    "paper": AlignmentConfig(),
    "mini": AlignmentConfig(
        fps=15.625,
        frames=128,
        positions=128,
        guidance=15.0,
        unet=UNetConfig(
            width=32,
            multipliers=(1, 2, 4),
            blocks=1,
            attention=(2, 4),
            heads=4,
            context_dim=128,
            groups=16,
            aligned=2,
        ),
    ),
}
# only the learning rate is published; steps and batch are ours
RECIPES = {
    "mini": {
        "steps": 800,
        "batch": 16,
        "lr": 5e-4,
        "warmup": 100,
        "grad_clip": 1,
        "merge": 0,
        "roll": 1,
        "repeats": 4,
    },
    "paper": {
        "steps": 50_000,
        "batch": 256,
        "lr": 5e-5,
        "warmup": 0,
        "grad_clip": 0,
        "merge": 0,
        "roll": 0,
        "repeats": 1,
    },
}


# --------------------------------------------------------------------------------------------------
# the network


class Classifier(Backbone):
    """The way down with a pooled head: logit (b, 1) that sound x (b, 4, 16, w) at time t (b,) or a
    number and context (b, f, context_dim) belong together."""

    def __init__(self, cfg):
        super().__init__(cfg)
        c = self.out_width
        # named as in the official keys, which count a SiLU too
        conv = nn.Conv2d(c, cfg.width, 3, padding=1)
        self.out = nn.ModuleDict({"0": GroupNorm(cfg.groups, c), "2": conv})
        self.classifier = nn.Linear(cfg.width, 1)

    def forward(self, x, t, context):
        emb = self.embed(self.one_time_each(t, x))
        h, _ = self.down(x, emb, context.to(self.dtype))
        h = self.out["2"](self.out["0"](h, silu=True))
        # one logit for the window: the mean over rows and columns
        return self.classifier(h.mean((2, 3)))


class Alignment(nn.Module):
    """Probability that sound and video belong together, at any noise level (Sec. 3.3).

    In all methods x are scaled latents (b, 4, 16, w), t (b,) or a number in [0, 999],
    features (b, f, 512)."""

    def __init__(self, config=AlignmentConfig()):
        super().__init__()
        self.config = config
        # in the official files, where it says what latents were multiplied by
        self.register_buffer("scale_factor", torch.tensor(LATENT_SCALE))
        add_schedule(self)
        self.model = Classifier(config.unet)
        self.cond_model = Conditioner(config.feature_dim, config.unet.context_dim, config.positions)

    __repr__ = one_line

    def logit(self, x, t, features):
        """-> (b, 1)"""
        return self.model(x, t, self.cond_model(features))

    def forward(self, x, t, features):
        """-> probability (b, 1)"""
        return self.logit(x, t, features).sigmoid()

    def log_prob(self, x, t, features):
        """log p(aligned), (b, 1)."""
        # log sigmoid of the logit does not underflow where the sigmoid does
        return F.logsigmoid(self.logit(x, t, features).float())

    def grad_log_prob(self, x, t, features):
        """d log p(aligned) / d x, (b, 4, 16, w), in x's own dtype."""
        # with a graph of this call alone, also where sampling runs without
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, t, features).sum(), x)[0]

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Ours, or the official double_guidance_classifier.ckpt; strict. CheckpointError if it is
        neither. An autoencoder that a file carries beside it is left out."""
        without = ("first_stage_model",)
        model = load_network(cls, path, AlignmentConfig(), device, dtype, without)
        return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# pairs and loss


def pairings(features, rng=None):
    """features (b, f, d) of the right clip and time -> features (b, f, d), labels (b, 1) float.

    Half of them stay (label 1), a quarter is shifted in time and a quarter is another clip's
    (label 0), in expectation; the official set that made its labels is unpublished. Shifts wrap
    around and are between a fortieth (0.2 s) and a half of the window."""
    b, f, _ = features.shape
    # what each row becomes
    kind = torch.rand(b, generator=rng)  # (b,), as are the next two
    shifted = (kind >= 0.5) & (kind < 0.75)
    other = kind >= 0.75
    row = torch.arange(b)

    # where each frame comes from if its row is shifted, either way in time
    shift = torch.randint(max(1, f // 40), f // 2 + 1, (b,), generator=rng)
    shift *= torch.randint(0, 2, (b,), generator=rng) * 2 - 1
    frame = (torch.arange(f) - shift[:, None]) % f  # (b, f)

    out = features.clone()
    out[shifted] = features[row[shifted, None], frame[shifted]]
    # the other clip is the one half a batch away
    out[other] = features[(row[other] + b // 2) % b]
    return out, (kind < 0.5).float()[:, None]


def classify(model, z, t, noise, features):
    """Latents z (b, 4, 16, w), noised to time t (b,) -> logit (b, 1), float32."""
    return model.logit(q_sample(z, t, noise), t, features).float()


def times_and_noise(count: int, rng, clean=False):
    """Integer times (count,) and noise (count, *LATENT_SHAPE); clean: zeros instead."""
    t = torch.randint(0, 1000, (count,), generator=rng)
    noise = torch.randn(count, *LATENT_SHAPE, generator=rng)
    if clean:
        return t.zero_(), noise.zero_()
    return t, noise


# --------------------------------------------------------------------------------------------------
# training


def accuracy(logits, label):
    """Share of right answers, a tensor."""
    return ((logits > 0) == (label > 0.5)).float().mean()


def validate(model, pairs, device, vae, clean=False, max_clips: int = 32, repeats: int = 4):
    """Loss and accuracy over pairings and noise levels, the same ones every time."""
    rng = torch.Generator().manual_seed(0)
    items = [pairs[i] for i in range(min(max_clips, len(pairs)))]
    features = torch.stack([item["features"] for item in items])
    # on the CPU, as all that is drawn here: the same for every device
    features, label = pairings(features.repeat_interleave(repeats, 0), rng)
    logits = []
    for i, item in enumerate(items):
        rows = slice(repeats * i, repeats * (i + 1))
        # one latent a clip, in `repeats` pairings and at as many noise levels
        mel = audio.mel(item["wav"].to(device))[None]  # (1, 128, s)
        posterior = torch.randn(1, *LATENT_SHAPE, generator=rng)
        z = latents(vae, mel, posterior.to(device)).expand(repeats, -1, -1, -1)
        t, noise = times_and_noise(repeats, rng, clean)
        inputs = (y.to(device) for y in (t, noise, features[rows]))
        logits.append(classify(model, z, *inputs).cpu())
    logits = torch.cat(logits)  # (clips * repeats, 1)
    loss = F.binary_cross_entropy_with_logits(logits, label)
    return {"val_loss": loss.item(), "val_accuracy": accuracy(logits, label).item()}, []


def train(args):
    """Binary cross-entropy on noised latents, t uniform (official `alignment_classifier.py` 232).

    --clean: without noise, at t = 0, as the paper trains the classifier that is its metric
    (official `alignment_classifier_metric.py` 248)."""
    training.resolve_defaults(args, RECIPES, "align")
    distributed.init(args.device)
    training.check_batch(args, at_least=2)
    training.check_run_folder(args)
    device = training.set_up(args)
    if not args.vae:
        raise training.TrainingError(
            "the classifier works on an autoencoder's latents: add --vae runs/vae/last.safetensors"
        )

    # the classifier is trained, which `load` leaves without gradients; the autoencoder is not
    model = Alignment.load(args.init) if args.init else Alignment(PRESETS[args.preset])
    model = model.requires_grad_(True).train().to(device, memory_format=torch.channels_last)
    vae = AutoencoderKL.load(args.vae, device).requires_grad_(False)
    measure = functools.partial(validate, device=device, vae=vae, clean=args.clean)
    run, optimizer, ema = begin_run(args, model, model.model, measure)
    network = distributed.wrap_ddp(model, classify)

    n = args.repeats
    for step in run:
        # random numbers of the whole batch, of all processes
        rng = training.generator(args, step)
        posterior = torch.randn(args.batch, *LATENT_SHAPE, generator=rng)
        t, noise = times_and_noise(args.batch * n, rng, args.clean)
        # features too: the other clip of a wrong pair may be another process's
        loaded = list(itertools.islice(run.loader, run.count))
        features = torch.cat([batch["features"] for batch in loaded])  # (b, f, 512)
        features = distributed.all_gather(features.to(device))
        features, label = pairings(features.repeat_interleave(n, 0), rng)
        for batch, rows in run.parts(network, loaded):
            repeated = slice(n * rows.start, n * rows.stop)
            mel = audio.mel(batch["wav"].to(device, non_blocking=True))  # (b, 128, 512)
            target = label[repeated].to(device)
            # each sound is encoded once and seen at n noise levels, in n pairings
            with training.autocast(args):
                z = latents(vae, mel, posterior[rows].to(device))
                z = z.repeat_interleave(n, 0)  # (b*n, 4, 16, 64)
                times = t[repeated].to(device)
                logits = network(z, times, noise[repeated].to(device), features[repeated])
            # in float32, outside autocast
            loss = F.binary_cross_entropy_with_logits(logits, target)
            # gradients add up over the micro-batches to that of the whole batch's mean
            (loss / run.count).backward()
            run.add(loss=loss, accuracy=accuracy(logits, target))
        norm = training.update(args, step, optimizer, ema, model, final_lr(args))
        run.report(gradient_norm=norm)


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--vae",
        type=Path,
        help="the autoencoder: vae.py's, an LDM file's, or Stable Diffusion v1's",
    )
    training.add_stage2_arguments(p)
    p.add_argument(
        "--clean",
        action="store_true",
        help="train without noise: for evaluate.py's metric, not for guidance",
    )
    args = p.parse_args(argv)
    with distributed.report_errors("align.py"):
        train(args)


if __name__ == "__main__":
    main()
