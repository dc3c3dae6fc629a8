"""The spectrogram autoencoder, first stage of the latent diffusion model (Diff-Foley Sec. 3.2).

in   a folder of clips (only their sound is read): mel (b, 1, 128, s) in [0, 1]
out  OUT/last.safetensors: mel (b, c, 128, s) -> mean and log-variance (b, 4, 16, s/8), and back

    python vae.py --data clips/
    python vae.py --data clips/ --preset paper --init sd-v1-4.ckpt

The layout is Stable Diffusion 1.4's, and so are the names of all parts. The loss is the evidence
lower bound (Kingma & Welling 2014) with absolute errors and a small weight of the KL term.

Differs from the official code: it trains here (there the image autoencoder of Stable Diffusion is
used as it is); GroupNorm's group count is a number in the configuration, so that narrow networks
exist; the mini preset reads one channel instead of three equal ones; and a trained autoencoder
leaves with latents of standard deviation 1/0.18215, so that the one factor `ldm.py` applies fits.
"""

import copy
import functools
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from common import audio, cli, distributed, training
from common.checkpoints import Checkpoint, empty_network, load_into, one_line
from compat import stable_diffusion
from kernels.group_norm import group_norm


@dataclass(frozen=True)
class VAEConfig:
    """The paper preset's sizes: Stable Diffusion 1.4's, official `stage1_autoencoder/model.py`."""

    channels: int = 3  # of the mel: the official network sees it three times over
    width: int = 128
    multipliers: tuple = (1, 2, 4, 4)  # of the width, one a resolution; each halves the map
    blocks: int = 2  # residual blocks a resolution in the encoder; the decoder has one more
    groups: int = 32
    z_channels: int = 4


PRESETS = {
    "paper": VAEConfig(),
    "mini": VAEConfig(channels=1, width=16, multipliers=(1, 2, 4, 6), blocks=1, groups=8),
}
# The paper's run trains no autoencoder: that preset's numbers are latent diffusion's (kl-f8), its
# steps and batch ours. kl weighs the KL sum against the sum of absolute errors
RECIPES = {
    "mini": {
        "steps": 4800,
        "batch": 8,
        "lr": 1e-3,
        "warmup": 200,
        "grad_clip": 1,
        "kl": 1e-4,
        "delta_weight": 1.0,
    },
    "paper": {
        "steps": 100_000,
        "batch": 32,
        "lr": 4.5e-5,
        "warmup": 1000,
        "grad_clip": 0,
        "kl": 1e-6,
        "delta_weight": 0.0,
    },
}
# Stable Diffusion's factor, which `ldm.latents` multiplies by: diffusion wants a deviation of 1
LATENT_SCALE = 0.18215
# mel columns of a training sample
CROP = 128
# what the autoencoder's names begin with in a whole LDM's file
PREFIX = "first_stage_model."


# --------------------------------------------------------------------------------------------------
# blocks; attribute names are those of the official keys


class GroupNorm(nn.GroupNorm):
    """silu(norm(cat([x, skip], 1) + add)), in one pass over the map where a kernel runs.

    x (b, c, h, w), add (b, c + c2) or None, skip (b, c2, h, w) or None; silu: False for the norm
    alone."""

    def forward(self, x, silu: bool = False, add=None, skip=None):
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu, add, skip)


# the group count comes first
norm = functools.partial(GroupNorm, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU, added to the input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = norm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):  # (b, c_in, h, w) -> (b, c_out, h, w)
        # one name for all maps, so that none outlives its use
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):  # (b, c, h, w) -> the same shape
        y = self.norm(x)
        # (b, 1, h*w, c)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (b, h*w, c)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


def downsample(c):
    """(b, c, h, w) -> (b, c, h/2, w/2); padded right and bottom only, as published."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    """(b, c, h, w) -> (b, c, 2h, 2w)"""
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(repeat=repeat, conv=nn.Conv2d(c, c, 3, padding=1)))


class Level(nn.Module):
    """The residual blocks of one resolution, of these widths, and the change to the next one."""

    def __init__(self, widths, groups, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        if down:
            self.downsample = downsample(widths[-1])
        if up:
            self.upsample = upsample(widths[-1])

    def layers(self):
        """In running order. The caller runs them, so that it holds one map alone: here they are
        the largest thing in memory."""
        blocks, *resize = self.children()
        return [*blocks, *resize]


def middle(c, groups):
    """The blocks at the lowest resolution, of encoder and decoder alike."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(c, c, groups),
            attn_1=AttnBlock(c, groups),
            block_2=ResnetBlock(c, c, groups),
        )
    )


# --------------------------------------------------------------------------------------------------
# the network


class Encoder(nn.Module):
    """Mel (b, c, 128, s) -> mean and log-variance (b, 2 * z_channels, 16, s/8)."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv2d(cfg.channels, cfg.width, 3, padding=1)
        # down.0 has the highest resolution and runs first
        self.down = nn.ModuleList(
            Level([c_in] + [c] * cfg.blocks, cfg.groups, down=i < len(widths) - 1)
            for i, (c_in, c) in enumerate(pairwise([cfg.width, *widths]))
        )
        self.mid = middle(widths[-1], cfg.groups)
        self.norm_out = norm(cfg.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):  # (b, c, 128, s) -> (b, 8, 16, s/8)
        x = self.conv_in(x)
        for level in self.down:
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(self.norm_out(self.mid(x), silu=True))


class Decoder(nn.Module):
    """Latents (b, z_channels, 16, s/8) -> mel (b, c, 128, s)."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], cfg.groups)
        # up.0 has the highest resolution and runs last
        self.up = nn.ModuleList(
            Level([c_in] + [c] * (cfg.blocks + 1), cfg.groups, up=i > 0)
            for i, (c, c_in) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = norm(cfg.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], cfg.channels, 3, padding=1)

    def forward(self, z):  # (b, 4, 16, s/8) -> (b, c, 128, s)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(self.norm_out(x, silu=True))


class AutoencoderKL(nn.Module):
    """mel (b, c, 128, s) in [0, 1] <-> latents (b, 4, 16, s/8), unscaled.

    Nothing is mapped to [-1, 1], nothing clamped but the log-variance, as in the official
    `models/autoencoder.py`."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    __repr__ = one_line

    def encode(self, mel):
        """(b, 1 or c, 128, s), s a multiple of 8 -> mean, log-variance, each (b, 4, 16, s/8)."""
        mel = mel.expand(-1, self.config.channels, -1, -1)
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """(b, 4, 16, w) -> (b, c, 128, 8w), the network's raw output."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def calibrate(self, mean, std):
        """Move latents of this mean and standard deviation, (4,) each, to 0 and 1/LATENT_SCALE.

        Only the two 1x1 convolutions around the latents change, each by the inverse of the other's
        change: the decoded sound stays the same."""
        n = self.config.z_channels
        k = 1 / LATENT_SCALE / std
        self.quant_conv.weight[:n] *= k[:, None, None, None]
        self.quant_conv.bias[:n] = (self.quant_conv.bias[:n] - mean) * k
        # the other half of the channels holds log-variances
        self.quant_conv.bias[n:] += 2 * k.log()
        # the decoder's side undoes it
        self.post_quant_conv.bias += self.post_quant_conv.weight[:, :, 0, 0] @ mean
        self.post_quant_conv.weight /= k[:, None, None]

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """Ours, the part of a whole LDM's file (ours or official), or a Stable Diffusion v1
        autoencoder under CompVis' or diffusers' names; strict. CheckpointError if it is none."""
        file = Checkpoint(path)
        # of a whole LDM the autoencoder's part, of any other file everything
        tensors = {k.removeprefix(PREFIX): file[k] for k in file if k.startswith(PREFIX)} or file
        config = file.config
        # files without a configuration are other people's, under their names
        if config is None:
            tensors = stable_diffusion.parts(tensors).get("vae", tensors)
        else:
            config = config.get("vae", config)
        model = empty_network(cls, path, config, PRESETS["paper"])
        return load_into(model, file, tensors, device, dtype)


# --------------------------------------------------------------------------------------------------
# loss


def sample_posterior(mean, logvar, noise):
    """mean, logvar and standard normal noise (b, 4, 16, w) -> a sample."""
    return mean + (0.5 * logvar).exp() * noise


def kl_divergence(mean, logvar):
    """KL(posterior | standard normal), summed over all latents (Kingma & Welling 2014, eq. 10)."""
    return 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).sum()


def losses(model, mel, noise):
    """mel (b, 1, 128, s), noise (b, 4, 16, s/8) -> mean absolute error, that of the mel's time
    difference, KL per element of mel.

    The second: an onset is a change from column to column, and rare, so that the first term alone
    lets hits in noise blur."""
    mean, logvar = model.encode(mel)
    out = model.decode(sample_posterior(mean, logvar, noise))
    # the same scale for both, whatever the size of a batch
    error = out.float() - mel
    kl = kl_divergence(mean, logvar) / mel.numel()
    return error.abs().mean(), error.diff(dim=-1).abs().mean(), kl


# --------------------------------------------------------------------------------------------------
# training


def mel_of(item, device):
    """A data set's item -> its mel, (1, 1, 128, s)."""
    return audio.mel(item["wav"].to(device))[None, None]


@torch.no_grad()
def latent_statistics(model, dataset, device, clips: int = 64):
    """Mean and standard deviation (4,) of the posterior means over the first clips."""
    first = range(min(clips, len(dataset)))
    z = torch.cat([model.encode(mel_of(dataset[i], device))[0] for i in first])  # (n, 4, 16, w)
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


def calibrated(model, dataset, device):
    """A copy of the network whose latents have mean 0 and deviation 1/LATENT_SCALE."""
    # the network goes on training as it is
    model = copy.deepcopy(model)
    model.calibrate(*latent_statistics(model, dataset, device))
    return model


def onset_agreement(pairs):
    """[(reference, generated) mels (128, s)] -> F1 of the generated onsets, within 100 ms."""
    counts = np.zeros(3, int)  # matches, generated onsets, reference onsets
    for pair in pairs:
        reference, generated = (audio.detect_onsets(mel.float().cpu().numpy()) for mel in pair)
        matches = audio.match(generated, reference, 0.1)
        counts += len(matches), len(generated), len(reference)
    return audio.f1(*counts)[2]


def validate(model, clips, device, max_clips: int = 16):
    """Error, KL and the onsets that survive the round trip, over whole windows."""
    pairs = []
    terms = []
    for i in range(min(max_clips, len(clips))):
        mel = mel_of(clips[i], device)
        mean, logvar = model.encode(mel)
        # the mean, not a sample: the measure is to have no noise
        out = model.decode(mean)[:, :1].float()
        error = (out - mel).abs().mean()
        terms.append((error.item(), kl_divergence(mean, logvar).item() / mel.numel()))
        pairs.append((mel[0, 0], out[0, 0].clamp(0, 1)))
    error, kl = np.mean(terms, axis=0)
    onset_f1 = onset_agreement(pairs)
    return {"val_error": error, "val_kl": kl, "val_onset_f1": onset_f1}, pairs[:4]


def train(args):
    """Reconstruction and KL on crops of sounds; what is saved is calibrated."""
    training.resolve_defaults(args, RECIPES, "vae")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)

    # network, optimizer and moving average
    model = AutoencoderKL.load(args.init) if args.init else AutoencoderKL(PRESETS[args.preset])
    model = model.train().to(device, memory_format=torch.channels_last)
    training.freeze(args, model)
    # betas of latent diffusion's autoencoder recipe
    optimizer = training.adamw([{"params": model.parameters()}], args, betas=(0.5, 0.9))
    ema = training.EMA(model)
    training.recompute(args, model, ResnetBlock, AttnBlock)

    # data: windows of sound, prepared once by the first process
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
        export=lambda averaged: calibrated(averaged, clips, device),
    )

    network = distributed.wrap_ddp(model, losses)
    for step in run:
        rng = training.generator(args, step)
        # a quarter of the columns: the network is convolutional, and four times as many clips are
        # seen in the same time
        first = torch.randint(0, audio.WINDOW // audio.HOP - CROP + 1, (), generator=rng).item()
        noise = torch.randn(
            args.batch, model.config.z_channels, audio.N_MELS // 8, CROP // 8, generator=rng
        )
        # this process's micro-batches
        for batch, rows in run.parts(network):
            mel = audio.mel(batch["wav"].to(device, non_blocking=True))  # (b, 128, s)
            mel = mel[:, None, :, first : first + CROP]  # (b, 1, 128, CROP)
            mel = mel.contiguous(memory_format=torch.channels_last)
            with training.autocast(args):
                error, delta, kl = network(mel, noise[rows].to(device))
            loss = error + args.delta_weight * delta + args.kl * kl
            # gradients add up over the micro-batches to that of the whole batch's mean
            (loss / run.count).backward()
            run.add(loss=loss, error=error, delta=delta, kl=kl)
        run.report(gradient_norm=training.update(args, step, optimizer, ema, model))


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--kl", type=cli.number(float, 0), help="weight of the KL term; default: the preset's"
    )
    training.beyond_the_paper(p).add_argument(
        "--delta-weight",
        type=cli.number(float, 0),
        help="weight of the L1 loss on the mel's time difference",
    )
    cli.renamed(p, "--change", "--delta-weight", type=cli.number(float, 0))
    args = p.parse_args(argv)
    with distributed.report_errors("vae.py"):
        train(args)


if __name__ == "__main__":
    main()
