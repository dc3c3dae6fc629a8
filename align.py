"""The alignment classifier of double guidance: probability that sound and picture belong together (Diff-Foley Sec. 3.3).

in   the set that `cavp.py --extract` wrote, features (f, 512) and sound of every clip; a trained autoencoder (--vae)
out  OUT/last.safetensors: the classifier

    python align.py --data features/ --vae runs/vae/last.safetensors

It is the way down of stage 2's U-Net with a pooled head, at every noise level; sampling follows the gradient of its
log-probability (`diffusion.guided_eps`), and candidates are ranked by it.

Differs from the official code: the classifier sees its own projection of exactly the window's features; log sigmoid
instead of log(sigmoid).
"""

import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import audio, distributed, training
from common.checkpoints import Checkpoint, checkpoint_errors, load_into
from diffusion import q_sample
from ldm import (
    LATENT_SHAPE,
    Backbone,
    Conditioner,
    UNetConfig,
    add_schedule,
    final_rate,
    latents,
    read_config,
    start,
)
from vae import LATENT_SCALE, AutoencoderKL, GroupNorm


@dataclass(frozen=True)
class AlignmentConfig:
    """The official double-guidance classifier's sizes (`double_guidance/alignment_backbone.py`)."""

    fps: float = 4.0
    frames: int = 32
    positions: int = 40
    feature_dim: int = 512
    guidance: float = 50.0  # the scale of its gradient that suits it in double guidance
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            width=128, multipliers=(1, 2, 2), blocks=1, attention=(2, 4), context_dim=512
        )
    )


MINI = AlignmentConfig(
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
)
PRESETS = {"paper": AlignmentConfig(), "mini": MINI}
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


# ---------------------------------------------------------------------------------------------------------------------
# the network


class Classifier(Backbone):
    """The way down with a pooled head: (b, 1) logit that sound x at noise level t and the context belong together."""

    def __init__(self, cfg):
        super().__init__(cfg)
        c = self.out_width
        self.out = nn.ModuleDict(
            {"0": GroupNorm(cfg.groups, c), "2": nn.Conv2d(c, cfg.width, 3, padding=1)}
        )
        self.classifier = nn.Linear(cfg.width, 1)

    def forward(self, x, t, context):
        h, _ = self.down(x, self.embed(self.one_time_each(t, x)), context.to(self.dtype))
        h = self.out["2"](self.out["0"](h, silu=True))
        return self.classifier(h.mean((2, 3)))


class Alignment(nn.Module):
    """Probability that sound and picture belong together, at any noise level: the classifier of double guidance (Sec. 3.3)."""

    def __init__(self, config=AlignmentConfig()):
        super().__init__()
        self.config = config
        self.register_buffer("scale_factor", torch.tensor(LATENT_SCALE))
        add_schedule(self)
        self.model = Classifier(config.unet)
        self.cond_model = Conditioner(config.feature_dim, config.unet.context_dim, config.positions)

    def logit(self, x, t, features):
        """x scaled latents (b, 4, 16, w), t (b,), features (b, f, 512) -> (b, 1)."""
        return self.model(x, t, self.cond_model(features))

    def forward(self, x, t, features):
        return self.logit(x, t, features).sigmoid()

    def log_prob(self, x, t, features):
        """log p(aligned); log sigmoid of the logit, which does not underflow where the sigmoid does."""
        return F.logsigmoid(self.logit(x, t, features).float())

    def grad_log_prob(self, x, t, features):
        """d log p / d x, (b, 4, 16, w); through the classifier only, in x's own dtype."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, t, features).sum(), x)[0]

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Ours, or the official double_guidance_classifier.ckpt; strict. An autoencoder that a file carries beside it is left out."""
        file = Checkpoint(path)
        with checkpoint_errors(path, cls), torch.device("meta"):
            model = cls(
                AlignmentConfig()
                if file.config is None
                else read_config(AlignmentConfig, file.config)
            )
        tensors = {k: file[k] for k in file if not k.startswith("first_stage_model.")}
        return load_into(model, file, tensors, device, dtype).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# training


def pairings(features, generator=None):
    """features (b, f, d) of the right moments -> the same, moved in time, or another clip's; labels (b, 1) float: 1 for the first half
    in expectation, 0 for the two quarters (the official set that made its labels is unpublished). Moves wrap around; they are between a
    fortieth (0.2 s) and a half of the window. The other clip is the one half a batch away."""
    b, f, _ = features.shape
    kind = torch.rand(b, generator=generator)
    least = max(1, f // 40)
    shift = torch.randint(least, f // 2 + 1, (b,), generator=generator)
    shift *= torch.randint(0, 2, (b,), generator=generator) * 2 - 1  # either way
    moved = (torch.arange(f) - shift[:, None]) % f  # (b, f)
    row = torch.arange(b)
    out = features.clone()
    is_moved, is_other = (kind >= 0.5) & (kind < 0.75), kind >= 0.75
    out[is_moved] = features[row[is_moved, None], moved[is_moved]]
    out[is_other] = features[(row[is_other] + b // 2) % b]
    return out, (kind < 0.5).float()[:, None]


def classify(model, z, t, noise, features):
    return model.logit(q_sample(z, t, noise), t, features).float()


def noising(count, generator, clean=False):
    """Times (count,) and noise for as many latents; clean: 0 and none."""
    t, noise = (
        torch.randint(0, 1000, (count,), generator=generator),
        torch.randn(count, *LATENT_SHAPE, generator=generator),
    )
    return (torch.zeros_like(t), torch.zeros_like(noise)) if clean else (t, noise)


def validate(model, pairs, device, first_stage, clean=False, most=32, repeats=4):
    """Loss and share of right answers over pairings and noise levels of at most `most` clips, the same ones every time."""
    g, items = torch.Generator().manual_seed(0), [pairs[i] for i in range(min(most, len(pairs)))]
    features, label = pairings(
        torch.stack([item["features"] for item in items]).repeat_interleave(repeats, 0), g
    )
    logits = []
    for i, item in enumerate(items):
        rows = slice(repeats * i, repeats * (i + 1))
        z = latents(
            first_stage,
            audio.mel(item["wav"].to(device))[None],
            torch.randn(1, *LATENT_SHAPE, generator=g).to(device),
        )
        t, noise = noising(repeats, g, clean)
        logits.append(
            classify(
                model,
                z.expand(repeats, -1, -1, -1),
                t.to(device),
                noise.to(device),
                features[rows].to(device),
            ).cpu()
        )
    logits = torch.cat(logits)
    loss = F.binary_cross_entropy_with_logits(logits, label).item()
    return {
        "val_loss": loss,
        "val_accuracy": ((logits > 0) == (label > 0.5)).float().mean().item(),
    }, []


def train(args):
    """Binary cross-entropy on noised latents, t uniform over 0..999 (official `alignment_classifier.py` 232). --clean: without noise, at
    t = 0, as the paper trains the classifier that judges (official `alignment_classifier_metric.py` 248)."""
    training.resolve_defaults(args, RECIPES, "align")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)
    if args.batch < 2:
        raise training.TrainingError(
            "--batch 1 has no other clip to make a wrong pair with; give at least 2"
        )
    if not args.vae:
        raise training.TrainingError(
            "the classifier works on an autoencoder's latents: add --vae runs/vae/last.safetensors"
        )
    model = (
        (Alignment.load(args.init) if args.init else Alignment(PRESETS[args.preset]))
        .requires_grad_(True)
        .train()
    )
    model = model.to(device, memory_format=torch.channels_last)
    first_stage = AutoencoderKL.load(args.vae, device).requires_grad_(False)
    run, optimizer, ema = start(
        args,
        model,
        functools.partial(validate, device=device, first_stage=first_stage, clean=args.clean),
    )
    network, n = distributed.wrap_ddp(model, classify), args.repeats
    for step in run:
        draw = training.generator(args, step)
        posterior = torch.randn(args.batch, *LATENT_SHAPE, generator=draw)
        t, noise = noising(args.batch * n, draw, args.clean)
        loaded = list(itertools.islice(run.loader, run.count))
        # of the whole batch, because the other clip of a wrong pair may be another process's
        features = distributed.all_gather(
            torch.cat([batch["features"] for batch in loaded]).to(device)
        )
        features, label = pairings(features.repeat_interleave(n, 0), draw)
        for batch, rows in run.parts(network, loaded):
            many = slice(n * rows.start, n * rows.stop)
            mel, right = (
                audio.mel(batch["wav"].to(device, non_blocking=True)),
                label[many].to(device),
            )
            with training.autocast(args):
                z = latents(first_stage, mel, posterior[rows].to(device)).repeat_interleave(n, 0)
                logit = network(z, t[many].to(device), noise[many].to(device), features[many])
            loss = F.binary_cross_entropy_with_logits(logit, right)
            (loss / run.count).backward()
            run.add(loss=loss, accuracy=((logit > 0) == (right > 0.5)).float().mean())
        run.report(
            gradient_norm=training.update(args, step, optimizer, ema, model, final_rate(args))
        )


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--vae",
        type=Path,
        help="the trained autoencoder (vae.py's, an LDM file, or Stable Diffusion v1's)",
    )
    training.add_stage2_arguments(p)
    p.add_argument(
        "--clean",
        action="store_true",
        help="see no noise; for the judge of evaluate.py, not for guidance",
    )
    with distributed.report_errors("align.py"):
        train(p.parse_args(argv))


if __name__ == "__main__":
    main()
