"""The spectrogram autoencoder: the first stage of the latent diffusion model (Diff-Foley Sec. 3.2; the layout of Stable Diffusion 1.4's).

in   a folder of clips (only their sound is read): mel (b, 1, 128, s) in [0, 1]
out  OUT/last.safetensors: mel (b, c, 128, s) -> mean and log-variance (b, 4, 16, s/8), and back

    python vae.py --data clips/
    python vae.py --data clips/ --preset paper --init sd-v1-4.ckpt

Differs from the official code: it trains here (there the image autoencoder of Stable Diffusion is used as it is); GroupNorm's
group count is a number in the configuration, so that narrow networks exist; the mini preset reads one channel instead of three
equal ones; and a trained mini autoencoder leaves with latents of standard deviation 1/0.18215, the one factor `ldm.py` applies.
"""

import copy
import functools
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from common import audio, distributed, training
from common.checkpoints import Checkpoint, checkpoint_errors, load_into
from compat import stable_diffusion
from kernels.group_norm import group_norm


@dataclass(frozen=True)
class VAEConfig:
    """The paper preset's sizes: Stable Diffusion 1.4's, official `stage1_autoencoder/model.py`."""

    channels: int = 3  # of the mel: the official network sees it three times over
    width: int = 128
    multipliers: tuple = (1, 2, 4, 4)  # a level each; the map halves between levels
    blocks: int = 2  # residual blocks a level on the way down, one more on the way up
    groups: int = 32
    z_channels: int = 4


PRESETS = {
    "paper": VAEConfig(),
    "mini": VAEConfig(channels=1, width=16, multipliers=(1, 2, 4, 6), blocks=1, groups=8),
}
# the paper's run trains no autoencoder: that preset's numbers are latent diffusion's, its steps and batch ours;
# kl weighs the KL sum against the sum of absolute errors; 1e-6 is latent diffusion's kl-f8 recipe
RECIPES = {
    "mini": {
        "steps": 4800,
        "batch": 8,
        "lr": 1e-3,
        "warmup": 200,
        "grad_clip": 1,
        "kl": 1e-4,
        "change": 1.0,
    },
    "paper": {
        "steps": 100_000,
        "batch": 32,
        "lr": 4.5e-5,
        "warmup": 1000,
        "grad_clip": 0,
        "kl": 1e-6,
        "change": 0.0,
    },
}
LATENT_SCALE = (
    0.18215  # what ldm.py, and only ldm.py, multiplies latents by (Stable Diffusion's factor)
)
LATENT_STD = 1 / LATENT_SCALE  # what a latent's standard deviation must be for that to make it one
CROP = 128  # mel columns of a training sample


# ---------------------------------------------------------------------------------------------------------------------
# blocks


class GroupNorm(nn.GroupNorm):
    """GroupNorm and what stands around it, in one pass over the map where a kernel runs: y = silu(norm(cat([x, skip], 1) + add))."""

    def forward(
        self, x, silu=False, add=None, skip=None
    ):  # (b, c, h, w), add (b, c), skip (b, c2, h, w)
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu, add, skip)


def norm(channels, groups):
    return GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (b, c_in, h, w) -> (b, c_out, h, w)
        h = self.conv2(
            self.norm2(self.conv1(self.norm1(x, silu=True)), silu=True)
        )  # no map outlives its use
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(c, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)  # (b, c, h, w)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (b, h*w, c)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[
            :, 0
        ]  # (b, h*w, c), scale c^-0.5
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):  # padded right and bottom only, as published
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next; attribute names are those of the official keys."""

    def __init__(self, widths, groups, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if downsample:
            self.downsample = Downsample(widths[-1])
        if upsample:
            self.upsample = Upsample(widths[-1])

    def layers(self):
        """In running order, for a caller that keeps no map longer than it must: they are the largest thing in memory."""
        return [
            *self.block,
            *(
                getattr(self, change)
                for change in ("downsample", "upsample")
                if hasattr(self, change)
            ),
        ]


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResnetBlock(c, c, groups),
            AttnBlock(c, groups),
            ResnetBlock(c, c, groups),
        )

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


# ---------------------------------------------------------------------------------------------------------------------
# the network


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv2d(cfg.channels, cfg.width, 3, padding=1)
        self.down = nn.ModuleList(
            Level([before] + [w] * cfg.blocks, cfg.groups, downsample=i < len(widths) - 1)
            for i, (before, w) in enumerate(zip([cfg.width] + widths, widths))
        )
        self.mid = Middle(widths[-1], cfg.groups)
        self.norm_out = norm(widths[-1], cfg.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):  # (b, c, 128, s) -> (b, 8, 16, s/8)
        x = self.conv_in(x)
        for layer in (layer for level in self.down for layer in level.layers()):
            x = layer(x)
        return self.conv_out(self.norm_out(self.mid(x), silu=True))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], cfg.groups)
        self.up = nn.ModuleList(  # up.0 is the highest resolution, so it runs last
            Level([below] + [w] * (cfg.blocks + 1), cfg.groups, upsample=i > 0)
            for i, (below, w) in enumerate(zip(widths[1:] + widths[-1:], widths))
        )
        self.norm_out = norm(widths[0], cfg.groups)
        self.conv_out = nn.Conv2d(widths[0], cfg.channels, 3, padding=1)

    def forward(self, z):  # (b, 4, 16, s/8) -> (b, c, 128, s)
        x = self.mid(self.conv_in(z))
        for layer in (layer for level in reversed(self.up) for layer in level.layers()):
            x = layer(x)
        return self.conv_out(self.norm_out(x, silu=True))


class AutoencoderKL(nn.Module):
    """mel (b, c, 128, s) in [0, 1] <-> latents (b, 4, 16, s/8), unscaled. Nothing is mapped to [-1, 1], nothing clamped but
    the log-variance (official `models/autoencoder.py`)."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, mel):
        """(b, c, 128, s), s a multiple of 8 -> mean, log-variance, each (b, 4, 16, s/8); one channel is repeated to c."""
        mel = mel.expand(-1, self.config.channels, -1, -1)
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """(b, 4, 16, w) -> (b, c, 128, 8w), the network's raw output."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def calibrate(self, mean, std):
        """Move latents of this mean and standard deviation to 0 and LATENT_STD by changing the two 1x1 convolutions around
        them; the decoded sound stays the same. The published factor 0.18215 then fits this network too."""
        n, k = self.config.z_channels, LATENT_STD / std  # k (4,)
        self.quant_conv.weight[:n] *= k[:, None, None, None]
        self.quant_conv.bias[:n] = (self.quant_conv.bias[:n] - mean) * k
        self.quant_conv.bias[n:] += 2 * k.log()
        self.post_quant_conv.bias += self.post_quant_conv.weight[:, :, 0, 0] @ mean
        self.post_quant_conv.weight /= k[:, None, None]

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Ours, a whole LDM file (ours or official: its `first_stage_model.`), or a Stable Diffusion v1 autoencoder
        under CompVis' or diffusers' names; strict."""
        file = Checkpoint(path)
        prefix = "first_stage_model." * any(k.startswith("first_stage_model.") for k in file)
        tensors = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
        if file.config is None:
            tensors = stable_diffusion.parts(tensors).get("vae", tensors)
        with checkpoint_errors(path, cls), torch.device("meta"):
            model = cls(
                PRESETS["paper"]
                if file.config is None
                else VAEConfig(**tuples(file.config.get("vae", file.config)))
            )
        return load_into(model, file, tensors, device, dtype)


def tuples(config):
    """JSON has lists where the configuration has tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def sample_posterior(mean, logvar, noise=None):
    """noise: standard normal numbers of that shape; drawn here where not given."""
    return mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)


def losses(model, mel, noise):
    """mel (b, 1, 128, s), noise (b, 4, 16, s/8) -> mean absolute error, the same of the change from column to column, KL per element of
    mel (Kingma & Welling 2014, eq. 10). An onset is such a change: rare, so that the first term alone lets hits in noise blur."""
    mean, logvar = model.encode(mel)
    out = model.decode(sample_posterior(mean, logvar, noise))
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum() / mel.numel()
    wrong = out.float() - mel
    return wrong.abs().mean(), wrong.diff(dim=-1).abs().mean(), kl


# ---------------------------------------------------------------------------------------------------------------------
# training


@torch.no_grad()
def latent_statistics(model, dataset, device, clips=64):
    """Mean and standard deviation (4,) of the posterior means over the first clips."""
    z = torch.cat(
        [
            model.encode(audio.mel(dataset[i]["wav"].to(device))[None, None])[0]
            for i in range(min(clips, len(dataset)))
        ]
    )  # (n, 4, 16, w)
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


def calibrated(model, dataset, device):
    """A copy of the network whose latents have mean 0 and deviation LATENT_STD."""
    model = copy.deepcopy(model)
    model.calibrate(*latent_statistics(model, dataset, device))
    return model


def onset_agreement(pairs):
    """[(true, made) mels (128, s)] -> F1 of the onsets in the one against those in the other, within 100 ms, over all of them."""
    counts = np.zeros(3, int)
    for pair in pairs:
        true, made = (audio.detect_onsets(level.float().cpu().numpy()) for level in pair)
        counts += len(audio.match(made, true, 0.1)), len(made), len(true)
    return audio.f1(*counts)[2]


def validate(model, clips, device, most=16):
    """Error, KL and the onsets that survive the round trip, over whole windows of at most `most` clips."""
    pairs, errors, kls = [], [], []
    for i in range(min(most, len(clips))):
        mel = audio.mel(clips[i]["wav"].to(device))[None, None]  # (1, 1, 128, s)
        mean, logvar = model.encode(mel)
        made = model.decode(mean)[:, :1].float()
        errors.append((made - mel).abs().mean().item())
        kls.append(0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum().item() / mel.numel())
        pairs.append((mel[0, 0], made[0, 0].clamp(0, 1)))
    return {
        "val_error": np.mean(errors),
        "val_kl": np.mean(kls),
        "val_onset_f1": onset_agreement(pairs),
    }, pairs[:4]


def train(args):
    training.resolve_defaults(args, RECIPES, "vae")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)
    model = AutoencoderKL.load(args.init) if args.init else AutoencoderKL(PRESETS[args.preset])
    model = model.train().to(device, memory_format=torch.channels_last)
    training.freeze(args, model)
    # betas of latent diffusion's autoencoder recipe
    optimizer = training.adamw([{"params": model.parameters()}], args, betas=(0.5, 0.9))
    ema = training.EMA(model)
    training.recompute(args, model, ResnetBlock, AttnBlock)
    root = distributed.on_rank0(
        lambda: data.prepared(args.data, cache=args.out.parent / "prepared")
    )
    clips, held_out = training.train_val_split(
        functools.partial(data.Sounds, root, audio.WINDOW, args.seed)
    )
    run = training.TrainingRun(
        args,
        model,
        optimizer,
        asdict(model.config),
        ema,
        clips,
        held_out,
        functools.partial(validate, device=device),
        export=lambda m: calibrated(m, clips, device),
    )
    network = distributed.wrap_ddp(model, losses)
    for step in run:
        draw = training.generator(args, step)
        # a quarter of the columns: the network is convolutional, and four times as many clips are seen in the same time
        first = torch.randint(0, audio.WINDOW // audio.HOP - CROP + 1, (), generator=draw).item()
        noise = torch.randn(
            args.batch, model.config.z_channels, audio.N_MELS // 8, CROP // 8, generator=draw
        )
        for batch, rows in run.parts(network):
            mel = audio.mel(batch["wav"].to(device, non_blocking=True))[
                :, None, :, first : first + CROP
            ]  # (b, 1, 128, CROP)
            with training.autocast(args):
                error, change, kl = network(
                    mel.contiguous(memory_format=torch.channels_last),
                    noise[rows].to(device, non_blocking=True),
                )
            loss = error + args.change * change + args.kl * kl
            (loss / run.count).backward()
            run.add(loss=loss, error=error, change=change, kl=kl)
        run.report(gradient_norm=training.update(args, step, optimizer, ema, model))


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--change",
        type=float,
        help="weight of the error of the change from column to column; the preset's by default",
    )
    p.add_argument("--kl", type=float, help="weight of the KL term; the preset's by default")
    args = p.parse_args(argv)
    with distributed.report_errors("vae.py"):
        train(args)


if __name__ == "__main__":
    main()
