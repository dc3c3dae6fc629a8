"""Stage 2: latent diffusion conditioned on CAVP features (Diff-Foley Sec. 3.2), and its training.

in   the set that `cavp.py --extract` wrote, features (f, 512) and sound of every clip;
     a trained autoencoder (--vae)
out  OUT/last.safetensors: U-Net, conditioner and autoencoder in one file

    python ldm.py --data features/ --vae runs/vae/last.safetensors

The equations (Sec. 3.2), and where they are:

    latents          z = 0.18215 (mean + deviation noise), of the autoencoder's posterior
    denoising_loss   || noise - eps(alpha_t z + sigma_t noise, t, context) ||^2, t in 0..999
    Conditioner      context = W features + b + position, of zero features in a fifth of the samples

The mini preset can be told more than the features: hits and materials (common/controls.py). Half
of its training tells the true ones. Two heads beside the U-Net find hits and materials in the
features.

Sampling is three independent parts: `diffusion.guided_eps` makes one function eps(x, t) of the
networks, the condition and both guidance scales (`kernels.fast.guided` is the same, faster, and
what `sample.py` runs); `dpm_solver`, `ddim` and `plms` are pure functions of any such eps;
`sample.py` plans windows around them. The classifier of double guidance is
`align.py`.

Differs from the official code: the unconditional branch is the conditioner of zero features, as in
training; sound is cut at the sample where its frame starts. The mini preset adds the condition to
the latent columns it belongs to in time (`aligned`), because its short training cannot teach
cross-attention where "now" is.
"""

import argparse
import functools
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import foley
from common import audio, cli, controls, distributed, training
from common.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_errors,
    load_network,
    one_line,
)
from compat import stable_diffusion
from diffusion import ALPHAS_CUMPROD, dpm_solver, guided_eps, make_schedule, q_sample
from kernels.attention import attention
from vae import (
    LATENT_SCALE,
    AutoencoderKL,
    GroupNorm,
    VAEConfig,
    onset_agreement,
    sample_posterior,
    upsample,
)
from vae import PRESETS as VAE_PRESETS

# share of the training items with another clip's features, which learn to play what they are told
STRANGERS = 0.1
# of what is told: its weights begin at zero beside features that weigh some ten times as much, and
# at a scale of 1 they had not learned materials in 2900 steps
CONTROL_SCALE = 40
# channels, rows of 8 mel bands, columns of 8 mel columns (2048 samples) of one window
LATENT_SHAPE = (4, 16, 64)


@dataclass(frozen=True)
class UNetConfig:
    """The paper preset's sizes: Stable Diffusion 1.x's (official `openai_unetmodel.py`)."""

    width: int = 320
    multipliers: tuple = (1, 2, 4, 4)  # of the width, one a resolution; each halves the map
    blocks: int = 2  # residual blocks a resolution on the way down, one more on the way up
    attention: tuple = (1, 2, 4)  # downsampling factors at which transformers follow the blocks
    heads: int = 8
    context_dim: int = 768
    groups: int = 32
    # condition tokens added to each latent column; 0: cross-attention alone, as published
    aligned: int = 0


@dataclass(frozen=True)
class LDMConfig:
    """The paper preset's sizes."""

    fps: float = 4.0  # of the features; must be the CAVP's
    frames: int = 32  # condition tokens of one window
    positions: int = 40  # rows of the position table
    feature_dim: int = 512
    guidance: float = 4.5  # the classifier-free scale that suits it
    # mel columns a feature lasts, in which hits can be told; 0: nothing can, as published
    columns: int = 0
    materials: tuple = ()  # that can be told
    names_materials: bool = False  # whether a head beside the U-Net says what is hit
    # largest scales of the guidances distilled into it (distill.py); (): none are, as published
    scales: tuple = ()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()


PRESETS = {
    "paper": LDMConfig(),
    "mini": LDMConfig(
        fps=15.625,
        frames=128,
        positions=128,
        guidance=3.5,
        columns=4,
        materials=tuple(foley.MATERIALS),
        names_materials=True,
        vae=VAE_PRESETS["mini"],
        unet=UNetConfig(
            width=48,
            multipliers=(1, 2, 3),
            blocks=1,
            attention=(2, 4),
            heads=3,
            context_dim=128,
            groups=16,
            aligned=2,
        ),
    ),
}
# paper: 250 epochs of VGGSound's 200,000 clips at 8 x 220, lr constant after its warm-up, no
# clipping (official `diff_foley_train.yaml`)
RECIPES = {
    "mini": {
        "steps": 5000,
        "batch": 8,
        "lr": 5e-4,
        "warmup": 100,
        "grad_clip": 1,
        "merge": 0.5,
        "roll": 0,
        "repeats": 4,
        "v_loss": True,
        "energy_weighting": True,
        "timestep_shift": 3,
    },
    "paper": {
        "steps": 28_400,
        "batch": 1760,
        "lr": 1e-4,
        "warmup": 1000,
        "grad_clip": 0,
        "merge": 0.5,
        "roll": 0,
        "repeats": 1,
        "v_loss": False,
        "energy_weighting": False,
        "timestep_shift": 1,
    },
}


# --------------------------------------------------------------------------------------------------
# U-Net blocks; attribute names are those of the official keys


@functools.cache
def embedding_frequencies(half, device):
    """(half,), from 1 down to 1/10000.

    Made on the device, since a copy from the CPU could not be part of a CUDA graph."""
    powers = torch.arange(half, dtype=torch.float32, device=device) / half
    return torch.exp(-math.log(10000) * powers)


def timestep_embedding(t, dim):
    """t (b,), possibly fractional -> (b, dim), cosines first."""
    angles = t.float()[:, None] * embedding_frequencies(dim // 2, t.device)  # (b, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_module(module):
    """Zero weights and biases: a residual branch that ends in it adds nothing at first."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """Two normalized convolutions, shifted by the time's embedding, beside a skip connection."""

    def __init__(self, c_in, c_out, emb_dim, groups):
        super().__init__()
        # numbered as in the official keys, which count a SiLU and a dropout too
        self.in_layers = nn.ModuleDict(
            {"0": GroupNorm(groups, c_in), "2": nn.Conv2d(c_in, c_out, 3, padding=1)}
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        conv = zero_module(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.out_layers = nn.ModuleDict({"0": GroupNorm(groups, c_out), "3": conv})
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):  # (b, c_in, h, w), (b, emb_dim) -> (b, c_out, h, w)
        h = self.in_layers["2"](self.in_layers["0"](x, silu=True))
        # the time's embedding, one number a channel, is added before the second norm
        h = self.out_layers["3"](self.out_layers["0"](h, silu=True, add=self.emb_layers(emb)))
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Multi-head attention of x to the context; self-attention where that is x itself."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):  # (b, n, dim), (b, m, context_dim) -> (b, n, dim)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in (q, k, v))  # (b, n or m, heads, d)
        return self.to_out(attention(q, k, v).flatten(2))  # heads side by side


class GEGLU(nn.Module):
    """Linear layer with a GELU gate (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):  # (b, n, dim) -> (b, n, inner)
        value, gate = self.proj(x).chunk(2, dim=-1)  # each (b, n, inner)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers on each position by itself."""

    def __init__(self, dim):
        super().__init__()
        # the identity stands where the official network has a dropout
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # (b, n, dim) -> the same shape
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition, feed-forward; each normed and added."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, context):  # (b, n, dim), (b, m, context_dim) -> (b, n, dim)
        # self-attention, among the latents
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        # cross-attention, to the video
        x = x + self.attn2(self.norm2(x), context)
        # and each position by itself
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over all positions of a map, added to it; zero at first."""

    def __init__(self, c, context_dim, heads, groups):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, context_dim, heads)])
        self.proj_out = zero_module(nn.Conv2d(c, c, 1))

    def forward(self, x, context):  # (b, c, h, w), (b, m, context_dim) -> (b, c, h, w)
        b, c, h, w = x.shape
        # one token a position, time fastest
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)  # (b, h*w, c)
        for block in self.transformer_blocks:
            y = block(y, context)
        # back into a map, (b, c, h, w)
        return x + self.proj_out(y.view(b, h, w, c).permute(0, 3, 1, 2))


def downsample(c):
    """(b, c, h, w) -> (b, c, h/2, w/2)"""
    return nn.Sequential(OrderedDict(op=nn.Conv2d(c, c, 3, stride=2, padding=1)))


class Blocks(nn.Sequential):
    """Sequential that hands each layer only the arguments it uses."""

    def forward(self, x, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


# --------------------------------------------------------------------------------------------------
# the networks. Here is what they compute; `kernels.fast.optimise` gives the same numbers faster


class Backbone(nn.Module):
    """Time embedding, the way down and the middle: shared by the U-Net and the classifier."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        emb = 4 * cfg.width
        # the time, (b,) -> (b, emb)
        self.time_embed = nn.Sequential(nn.Linear(cfg.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList(
            [Blocks(nn.Conv2d(LATENT_SHAPE[0], cfg.width, 3, padding=1))]
        )
        # mini: tokens of the condition -> what they add to their latent column
        if cfg.aligned:
            self.aligned = nn.Linear(cfg.aligned * cfg.context_dim, cfg.width)
        c = cfg.width
        # channels of the skips, for the way up
        self.skip_widths = [c]
        for level, multiplier in enumerate(cfg.multipliers):
            # half the resolution, but for the first
            if level:
                self.input_blocks.append(Blocks(downsample(c)))
                self.skip_widths.append(c)
            for _ in range(cfg.blocks):
                self.input_blocks.append(self.stage(c, cfg.width * multiplier, level))
                c = cfg.width * multiplier
                self.skip_widths.append(c)
        self.middle_block = Blocks(
            ResBlock(c, c, emb, cfg.groups),
            SpatialTransformer(c, cfg.context_dim, cfg.heads, cfg.groups),
            ResBlock(c, c, emb, cfg.groups),
        )
        self.out_width = c

    def stage(self, c_in, c_out, level):
        """A residual block, and a transformer at the resolutions that have them."""
        cfg = self.config
        layers = [ResBlock(c_in, c_out, 4 * cfg.width, cfg.groups)]
        if 2**level in cfg.attention:
            layers.append(SpatialTransformer(c_out, cfg.context_dim, cfg.heads, cfg.groups))
        return Blocks(*layers)

    @property
    def dtype(self):
        return self.time_embed[0].weight.dtype

    def one_time_each(self, t, x):
        """A number, one time, or (b,) of them -> (b,), on the device of x (b, 4, 16, w)."""
        t = torch.as_tensor(t, device=x.device)
        # one time is every latent's
        if t.numel() == 1:
            t = t.reshape(1).expand(len(x))
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"times of shape {tuple(t.shape)} for {len(x)} latents; "
                "give one time, or one for each"
            )
        return t

    def embed(self, t):
        """Times (b,) -> (b, 4 width)."""
        return self.time_embed(timestep_embedding(t, self.config.width).to(self.dtype))

    def check_frames(self, frames: int, width: int):
        """Raises ValueError if a condition of so many frames does not fit `width` columns."""
        wanted = self.config.aligned * width
        if frames != wanted:
            raise ValueError(
                f"the condition has {frames} frames; {width} latent columns want {wanted}, "
                f"{self.config.aligned} each"
            )

    def columns(self, context, width):
        """(b, f, context_dim) -> (b, c, 1, w): what the mini preset adds to each latent column,
        made of the condition's tokens at the same time."""
        self.check_frames(context.shape[1], width)
        # (b, w, aligned * context_dim): the tokens of each column side by side
        tokens = context.unflatten(1, (width, self.config.aligned)).flatten(2)
        return self.aligned(tokens).transpose(1, 2)[:, :, None]

    def down(self, x, emb, context):
        """(b, 4, 16, w), (b, 4 width), (b, f, context_dim) -> the middle map, list of skips."""
        first, *blocks = self.input_blocks
        h = first(x.to(self.dtype), emb, context)
        # beside cross-attention, which a short training cannot teach where "now" is
        if self.config.aligned:
            h = h + self.columns(context, x.shape[3])
        skips = [h]
        for block in blocks:
            h = block(h, emb, context)
            skips.append(h)
        return self.middle_block(h, emb, context), skips


class UNet(Backbone):
    """eps(x, t, context) (b, 4, 16, w): the predicted noise.

    x (b, 4, 16, w); t (b,) or one number, in [0, 999] and possibly fractional;
    context (b, f, context_dim). ValueError if their shapes do not fit."""

    def __init__(self, cfg):
        super().__init__(cfg)
        c = self.out_width
        skips = list(self.skip_widths)
        self.output_blocks = nn.ModuleList()
        # from the lowest resolution up, one block more than on the way down
        for level, multiplier in reversed(list(enumerate(cfg.multipliers))):
            for i in range(cfg.blocks + 1):
                block = self.stage(c + skips.pop(), cfg.width * multiplier, level)
                c = cfg.width * multiplier
                # the last of a resolution leads to the next one
                if level and i == cfg.blocks:
                    block.append(upsample(c))
                self.output_blocks.append(block)
        conv = zero_module(nn.Conv2d(c, LATENT_SHAPE[0], 3, padding=1))
        self.out = nn.ModuleDict({"0": GroupNorm(cfg.groups, c), "2": conv})

    def forward(self, x, t, context):
        emb = self.embed(self.one_time_each(t, x))
        context = context.to(self.dtype)
        h, skips = self.down(x, emb, context)
        # the way up, each block with the skip of its resolution
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out["2"](self.out["0"](h, silu=True))


class Conditioner(nn.Module):
    """CAVP features (b, f, 512) -> context (b, f, context_dim): a linear map plus a learned
    embedding of the position, and of the numbers that may follow a feature. ValueError for
    features of another shape, or too many frames."""

    def __init__(self, feature_dim, context_dim, positions, numbers=0):
        super().__init__()
        self.feature_dim = feature_dim
        if numbers:
            # nothing told, nothing added
            self.controls = zero_module(nn.Linear(numbers, context_dim, bias=False))
        self.embedder = nn.Sequential(nn.Linear(feature_dim, context_dim))
        # torch's own initialization takes a second and 150 MB of imports even on the meta device
        table = torch.empty(positions, context_dim)
        self.pos_emb = nn.Embedding.from_pretrained(table, freeze=False)
        if not table.is_meta:
            self.reset()

    def reset(self):
        """Draw new weights. Features are unit vectors, entries of 0.04: torch's default would bury
        them under the positions."""
        nn.init.normal_(self.embedder[0].weight)
        nn.init.zeros_(self.embedder[0].bias)
        nn.init.normal_(self.pos_emb.weight, std=0.1)

    def forward(self, features):
        dim = self.feature_dim
        # what follows a feature, if anything does
        given = features[..., dim:]
        fits = features.shape[-1] == dim
        if given.shape[-1] and hasattr(self, "controls"):
            fits = given.shape[-1] == self.controls.in_features
        if features.ndim != 3 or not fits:
            raise ValueError(
                f"features of shape {tuple(features.shape)}; wanted is (b, frames, {dim})"
            )
        frames = features.shape[1]
        table = self.pos_emb.weight  # (positions, context_dim)
        if frames > len(table):
            raise ValueError(
                f"features of {frames} frames; "
                f"this network was trained on at most {len(table)} at a time"
            )
        # what is seen, and when
        context = self.embedder(features[..., :dim].to(table.dtype)) + table[:frames]
        # each kind of knowledge by a map of its own, into one context
        if given.shape[-1]:
            context = context + self.controls(CONTROL_SCALE * given.to(table.dtype))
        return context


def add_schedule(module):
    """The buffers of the noise schedule, which the official files hold."""
    for name, value in make_schedule().items():
        module.register_buffer(name, value)


class LDM(nn.Module):
    """U-Net, conditioner and the autoencoder it was trained on, in one file."""

    def __init__(self, config=LDMConfig()):
        super().__init__()
        self.config = config
        add_schedule(self)
        # two names, as in the official keys
        self.model = nn.ModuleDict({"diffusion_model": UNet(config.unet)})
        self.first_stage_model = AutoencoderKL(config.vae)
        # mini: how much it can be told, and who finds the hits to tell
        numbers = 0
        if config.columns:
            numbers = controls.width(config.columns, len(config.materials))
            self.onset_head = controls.Head(config.feature_dim, config.columns)
        if config.names_materials:
            self.material_head = controls.Head(config.feature_dim, len(config.materials))
        self.cond_stage_model = Conditioner(
            config.feature_dim, config.unet.context_dim, config.positions, numbers
        )
        if config.scales:
            self.conditioner.scales = controls.Scales(config.scales, config.unet.context_dim)

    __repr__ = one_line

    # short names for what the official keys call otherwise
    @property
    def unet(self):
        return self.model["diffusion_model"]

    @property
    def conditioner(self):
        return self.cond_stage_model

    @property
    def vae(self):
        return self.first_stage_model

    @property
    def materials(self):
        """Names of the materials that it has learned to be told; of others its weights are zero."""
        first = controls.width(self.config.columns, 0)
        columns = self.conditioner.controls.weight[:, first:].any(0)
        return tuple(n for n, known in zip(self.config.materials, columns, strict=True) if known)

    def null_context(self, frames: int):
        """The unconditional branch as trained: the context of zero features, (1, f, dim)."""
        zeros = self.conditioner.pos_emb.weight.new_zeros(1, frames, self.config.feature_dim)
        return self.conditioner(zeros)

    def guided_context(self, conditions, scales):
        """Conditions (b, f, d) and scales (1 or b, 3) -> the context (b, f, dim) for which a
        distilled network predicts what double guidance with these scales would."""
        return self.conditioner(conditions) + self.conditioner.scales(scales)

    def with_controls(self, features, tracks: controls.Tracks):
        """Features (b, f, d) -> (b, f, d + controls), with what the tracks say after each feature.

        A network that cannot be told anything, as the published one, gets the features alone."""
        if not self.config.columns:
            return features
        columns, materials = self.config.columns, len(self.config.materials)
        return torch.cat([features, controls.tokens(tracks, features, columns, materials)], 2)

    def without_materials(self, conditions):
        """What `with_controls` gives, with materials left open; None where it names none."""
        first = self.config.feature_dim + controls.width(self.config.columns, 0)
        if not conditions[..., first:].any():
            return None
        # materials are the last numbers
        left = conditions.clone()
        left[..., first:] = 0
        return left

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (b, 4, 16, w) -> mel (b, 128, 8w): first channel, clamped to [0, 1]."""
        z = (z / LATENT_SCALE).to(self.vae.post_quant_conv.weight.dtype)
        return self.vae.decode(z)[:, 0].float().clamp(0, 1)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, encoder=True):
        """Ours, or the official ldm_epoch240.ckpt; strict. CheckpointError if it is neither.

        encoder=False: without the autoencoder's encoder, which generating does not need."""
        without = () if encoder else ("first_stage_model.encoder", "first_stage_model.quant_conv")
        return load_network(cls, path, LDMConfig(), device, dtype, without).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# loss


def latents(vae, mel, noise):
    """mel (b, 128, s), noise (b, 4, 16, s/8) -> scaled latents (b, 4, 16, s/8), a sample of the
    posterior, without a graph."""
    with torch.no_grad():
        mean, logvar = vae.encode(mel[:, None])
    return LATENT_SCALE * sample_posterior(mean.float(), logvar.float(), noise)


def denoising_loss(model, z, t, noise, features, v_loss=False, energy_weighting=False):
    """Mean squared error of the predicted noise (Sec. 3.2); z, noise (b, 4, 16, w), t (b,),
    features (b, f, 512). The published loss has neither weighting.

    v_loss: divided by alpha_t^2, which makes it the error of v (Salimans & Ho 2022, arXiv
    2202.00512): then every noise level costs about the same. As published, a clip's unpredictable
    texture at the low ones drowns what the condition decides at the high ones.
    energy_weighting: a column counts by the energy that the network itself expects there, so that
    hits are not outvoted by the hiss between them. The weight depends on the input alone, not on z,
    so the minimum of the loss stays the mean."""
    noisy = q_sample(z, t, noise)
    eps = model.unet(noisy, t, model.conditioner(features)).float()
    error = (eps - noise).square()
    alphas = ALPHAS_CUMPROD.to(t.device)[t].view(-1, 1, 1, 1)
    # ||v error||^2 = ||eps error||^2 / alpha_t^2
    if v_loss:
        error = error / alphas
    if energy_weighting:
        # the clean latents that eps implies
        clean = (noisy - (1 - alphas).sqrt() * eps.detach()) / alphas.sqrt()
        energy = clean.square().mean((1, 2), keepdim=True)  # (b, 1, 1, w); about 1 on average
        error = error * energy.clamp(0.1, 8)
    return error.mean()


def training_loss(model, z, t, noise, features, onsets=None, **weightings):
    """The denoising loss, and beside it those of the heads, which reach nothing but the heads.

    onsets: features (b, f, 512) that they see, hits (b, s) to find, their materials (b, f), and
    weights (b,) of the items."""
    loss = denoising_loss(model, z, t, noise, features, **weightings)
    # networks that share no weights, in one step
    if onsets is not None:
        seen, hits, materials, weight = onsets
        odds = model.onset_head(seen).flatten(1)
        heads = controls.onset_loss(odds, hits)
        heads = heads + controls.material_loss(model.material_head(seen), materials, hits)
        loss = loss + (weight * heads).mean()
    return loss


def sample_timesteps(count: int, shift: float, rng):
    """(count,) integer times in 0..999: uniform, as published, for a shift of 1.

    Above it mapped by t -> s t / (1 + (s - 1) t) of the unit interval (Esser et al. 2024, arXiv
    2403.03206, eq. 23), which visits the high ones more often: there the sound is decided."""
    t = torch.randint(0, 1000, (count,), generator=rng)
    if shift == 1:
        return t
    # continuous times in [0, 1), so that the map leaves no integer out
    u = (t + torch.rand(count, generator=rng)) / 1000
    return (1000 * shift * u / (1 + (shift - 1) * u)).long().clamp(max=999)


# --------------------------------------------------------------------------------------------------
# what a training starts from


def from_ours(path, vae=None, new_conditioner=False, controls_of=None, trains_unet=True):
    """One of ours, or the official file. vae: path of an autoencoder to put in place of its own;
    new_conditioner: start that part anew; controls_of: a configuration whose `columns` and
    `materials` this network is to have from now on. CheckpointError if the autoencoder does not
    fit."""
    model = LDM.load(path)
    config = model.config
    old = model.state_dict()
    if controls_of is not None:
        config = replace(config, columns=controls_of.columns, materials=controls_of.materials)
        old = {k: v for k, v in old.items() if ".controls." not in k}
    # what can be told can be found, too
    config = replace(config, names_materials=bool(config.materials))
    # guidance distilled into a U-Net that is trained on would no longer be its own
    if trains_unet:
        config = replace(config, scales=())
        old = {k: v for k, v in old.items() if ".scales." not in k}
    if config != model.config:
        # new layers, which at first change nothing
        model = LDM(config)
        model.load_state_dict({**model.state_dict(), **old})
    if new_conditioner:
        model.conditioner.reset()
    if vae:
        with checkpoint_errors(vae, AutoencoderKL):
            model.vae.load_state_dict(AutoencoderKL.load(vae).state_dict())
    return model


def from_scratch(preset: str, vae):
    """New networks on the latents of the autoencoder in the file `vae`."""
    if vae is None:
        raise training.TrainingError(
            "stage 2 works on an autoencoder's latents: add --vae runs/vae/last.safetensors"
        )
    first_stage = AutoencoderKL.load(vae)
    model = LDM(replace(PRESETS[preset], vae=first_stage.config))
    model.vae.load_state_dict(first_stage.state_dict())
    return model


def from_stable_diffusion(path, preset: str, vae=None):
    """The published run's start: Stable Diffusion v1's U-Net, and a new conditioner.

    path: a file under CompVis' or diffusers' names; vae: path of another autoencoder than the one
    there. CheckpointError if there is no such U-Net."""
    networks = stable_diffusion.parts(Checkpoint(path))
    if "unet" not in networks:
        raise CheckpointError(
            f"{path}: not a checkpoint of LDM, nor of Stable Diffusion v1's U-Net"
        )
    # a whole file holds the autoencoder too
    if vae is None and "vae" in networks:
        vae = path
    model = from_scratch(preset, vae)
    with checkpoint_errors(path, UNet):
        model.unet.load_state_dict(networks["unet"])
    return model


def initial(args):
    """The network that training starts from, by what --init is; --vae takes any autoencoder."""
    if args.init is None:
        return from_scratch(args.preset, args.vae)
    if "cond_stage_model.pos_emb.weight" not in Checkpoint(args.init):
        return from_stable_diffusion(args.init, args.preset, args.vae)
    # the preset says what can be told
    controls_of = PRESETS[args.preset] if args.new_controls else None
    trains_unet = "model" not in args.freeze
    return from_ours(args.init, args.vae, args.new_conditioner, controls_of, trains_unet)


# --------------------------------------------------------------------------------------------------
# training


def begin_run(args, model, network, validate, **labels):
    """-> run, optimizer and moving average, of a `model` that is on its device already.

    network: its part that --lora adapts, and leaves fixed otherwise; labels: what `data.Pairs` is
    to give of hits and materials."""
    if args.lora < 0 or (args.lora and not args.init):
        raise training.TrainingError(
            "--lora RANK: adapts trained weights; "
            "give a rank of 1 or more, and the weights with --init"
        )
    # adapters, before anything counts what is trained
    if args.lora:
        training.add_lora(network, args.lora, SpatialTransformer)
    training.freeze(args, model)
    # torch's default decay, as published
    optimizer = training.adamw([{"params": model.parameters()}], args, weight_decay=0.01)
    # the published run has none; it costs nothing at sampling time
    ema = training.EMA(model)
    training.recompute(args, model, ResBlock, SpatialTransformer)
    if args.data.is_dir() and not (args.data / "set.json").is_file():
        raise training.TrainingError(
            f"{args.data}: no features here; "
            "write some with python cavp.py --data CLIPS --init CAVP --extract FEATURES"
        )
    cfg = model.config

    def reader(split):
        # only what is trained on is merged, rotated or given another clip's features
        augmentation = {}
        if split == "train":
            augmentation = {"merge": args.merge, "roll": args.roll, "strangers": STRANGERS}
        return data.Pairs(
            args.data, cfg.fps, cfg.frames, seed=args.seed, split=split, **augmentation, **labels
        )

    clips, held_out = training.train_val_split(reader)
    export = training.merge_lora if args.lora else None
    run = training.TrainingRun(
        args, model, optimizer, asdict(cfg), ema, clips, held_out, validate, export
    )
    return run, optimizer, ema


def validate(model, pairs, device, max_clips: int = 16, max_sampled: int = 4, **weightings):
    """The loss at four noise levels, and the onset agreement of some sampled clips with the
    reference sound; the same random numbers every time."""
    rng = torch.Generator().manual_seed(0)
    t = torch.tensor([100, 350, 600, 850], device=device)  # diffusion times
    losses = []
    mels = []

    def randn(count):
        # drawn on the CPU: the same for every device
        return torch.randn(count, *LATENT_SHAPE, generator=rng).to(device)

    for i in range(min(max_clips, len(pairs))):
        item = pairs[i]
        mel = audio.mel(item["wav"].to(device))[None]  # (1, 128, s)
        features = item["features"].to(device)[None]  # (1, f, 512)
        # the loss, at all times in one batch
        z = latents(model.vae, mel, randn(1)).expand(len(t), -1, -1, -1)
        each = features.expand(len(t), -1, -1)
        losses.append(denoising_loss(model, z, t, randn(len(t)), each, **weightings).item())
        # the whole generation, without the classifier
        if i < max_sampled:
            context = model.conditioner(features)
            null_context = model.null_context(model.config.frames)
            eps = guided_eps(model.unet, context, null_context, model.config.guidance)
            sampled = dpm_solver(eps, randn(1), 25)
            mels.append((mel[0], model.decode(sampled)[0]))
    return {"val_loss": sum(losses) / len(losses), "val_onset_f1": onset_agreement(mels)}, mels


def final_lr(args):
    """Share of the peak learning rate that the cosine ends at; the published one is constant."""
    return 0.05 if args.preset == "mini" else 1.0


def repeat_items(model, batch, n: int, conditional, chances, noise):
    """A micro-batch -> features (b*n, f, d) as the conditioner sees them, every clip n times, and
    what the onset head learns from; conditional (b*n, 1, 1) is 0 for the unconditional branch."""

    def repeat(name):
        return batch[name].to(noise.device, non_blocking=True).repeat_interleave(n, 0)

    features = repeat("features")
    # the paper's network knows the features alone
    if not model.config.columns:
        return features * conditional, None
    # mini: what else is known of the clips, and what of it this step tells
    hits, materials, stranger = map(repeat, ("hits", "materials", "stranger"))
    # the heads learn from every clip once
    onsets = controls.head_items(features[::n], hits[::n], materials[::n], stranger[::n], noise)
    count = len(model.config.materials)
    drawn = controls.draw(features, hits, materials, stranger, count, conditional, chances)
    return model.with_controls(*drawn), onsets


def train(args):
    """eps-prediction, the condition dropped for a fifth of the samples by zeroing the raw features
    (official `sd_ddpm_scale.py`).

    A batch of sounds is encoded once and seen at --repeats noise levels: else the frozen encoder
    would cost half as much as the small U-Net's training."""
    training.resolve_defaults(args, RECIPES, "ldm")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)

    # U-Net and conditioner are trained, the autoencoder is not
    model = initial(args).to(device, memory_format=torch.channels_last).train()
    model.unet.requires_grad_(True)
    model.conditioner.requires_grad_(True)
    if model.config.columns:
        model.onset_head.requires_grad_(True)
        model.material_head.requires_grad_(True)
    model.vae.requires_grad_(False)
    weightings = {"v_loss": args.v_loss, "energy_weighting": args.energy_weighting}
    measure = functools.partial(validate, device=device, **weightings)
    # what the set is asked for besides features and sound
    config = model.config
    labels = {}
    if args.labels and not config.columns:
        raise training.TrainingError(
            f"--labels {args.labels}: this network cannot be told anything; add --new-controls"
        )
    if config.columns:
        onsets = data.read_all_onsets(args.labels) if args.labels else None
        labels = {"columns": config.columns, "materials": config.materials, "labels": onsets}
    run, optimizer, ema = begin_run(args, model, model.unet, measure, **labels)
    network = distributed.wrap_ddp(model, functools.partial(training_loss, **weightings))

    n = args.repeats
    for step in run:
        # random numbers of the whole batch, of all processes
        rng = training.generator(args, step)
        posterior = torch.randn(args.batch, *LATENT_SHAPE, generator=rng)
        noise = torch.randn(args.batch * n, *LATENT_SHAPE, generator=rng)
        t = sample_timesteps(args.batch * n, args.timestep_shift, rng)
        # four fifths; the others train the unconditional branch
        conditional = torch.rand(args.batch * n, 1, 1, generator=rng) >= 0.2
        chances = torch.rand(args.batch * n, 4, generator=rng)
        head_noise = torch.randn(args.batch, config.frames, config.feature_dim, generator=rng)
        # this process's micro-batches
        for batch, rows in run.parts(network):
            repeated = slice(n * rows.start, n * rows.stop)
            mel = audio.mel(batch["wav"].to(device, non_blocking=True))  # (b, 128, 512)
            features, onsets = repeat_items(
                model,
                batch,
                n,
                conditional[repeated].to(device),
                chances[repeated].to(device),
                head_noise[rows].to(device),
            )
            # each sound is encoded once and seen at n noise levels
            with training.autocast(args):
                z = latents(model.vae, mel, posterior[rows].to(device))
                z = z.repeat_interleave(n, 0)  # (b*n, 4, 16, 64)
                loss = network(
                    z, t[repeated].to(device), noise[repeated].to(device), features, onsets
                )
            # gradients add up over the micro-batches to that of the whole batch's mean
            (loss / run.count).backward()
            run.add(loss=loss)
        norm = training.update(args, step, optimizer, ema, model, final_lr(args))
        run.report(gradient_norm=norm)


def main(argv=None):
    p = training.arguments(__doc__, RECIPES)
    p.add_argument(
        "--vae",
        type=Path,
        help="the autoencoder: vae.py's, an LDM file's, or Stable Diffusion v1's",
    )
    p.add_argument(
        "--new-conditioner",
        action="store_true",
        help="with --init: keep U-Net and autoencoder, start the conditioner anew "
        "(new features, as the published run did from Stable Diffusion)",
    )
    p.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="folder of the clips' .json files, as foley.py writes them: the hits that the network "
        "learns to be told; default: the onsets of the clips' own sound",
    )
    p.add_argument(
        "--new-controls",
        action="store_true",
        help="with --init: the network learns anew, or for the first time, to be told hits and "
        "materials",
    )
    g = training.add_stage2_arguments(p)
    switch = argparse.BooleanOptionalAction
    g.add_argument("--v-loss", action=switch, help="weight all noise levels alike")
    g.add_argument(
        "--energy-weighting", action=switch, help="weight latent columns by their expected energy"
    )
    g.add_argument(
        "--timestep-shift",
        type=cli.number(float, 1),
        help="above 1, high noise levels are seen more often",
    )
    cli.renamed(p, "--by-energy", "--energy-weighting", type=cli.truth)
    cli.renamed(p, "--shift", "--timestep-shift", type=cli.number(float, 1))
    cli.removed(p, "--model", "the classifier is trained by python align.py")
    cli.removed(p, "--convert", "it is now python -m common.checkpoints convert DIR OUT")
    args = p.parse_args(argv)
    for flag in ("new_conditioner", "new_controls"):
        if getattr(args, flag) and not args.init:
            name = flag.replace("_", "-")
            p.error(f"argument --{name}: is for the network of --init; add that")
    with distributed.report_errors("ldm.py"):
        # a folder as diffusers writes it: its two files, whose SHA-256 the run records
        if args.init and args.init.is_dir():
            args.init, own = stable_diffusion.weights_in(args.init)
            args.vae = args.vae or own
        train(args)


if __name__ == "__main__":
    main()
