"""Stage 2: the networks of latent diffusion and the alignment classifier of double guidance, and their training (Diff-Foley Sec. 3.2, 3.3).

in   the set that `cavp.py --extract` wrote, features (f, 512) and sound of every clip; a trained autoencoder (--vae)
out  OUT/last.safetensors: U-Net, conditioner and autoencoder in one file (or the classifier, with --model align)

    python ldm.py --data features/ --vae runs/vae/last.safetensors
    python ldm.py --data features/ --vae runs/vae/last.safetensors --model align

Sampling is three independent parts: `diffusion.guided_eps` makes one function eps(x, t) of the networks, the condition and both
guidance scales; `dpm_solver`, `ddim` and `plms` are pure functions of any such eps; `sample.py` plans windows around them.

Differs from the official code: the unconditional branch is the conditioner of zero features, as in training;
the classifier sees its own projection of exactly the window's features; log sigmoid instead of log(sigmoid); sound is cut at the sample where its frame starts. The mini preset adds the condition to the
latent columns it belongs to in time (`aligned`), because its short training cannot teach cross-attention where "now" is.
"""

import functools
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import audio, distributed, training
from common.checkpoints import Checkpoint, checkpoint_errors, load_into
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
    tuples,
)
from vae import PRESETS as VAE_PRESETS

# latents are scaled by LATENT_SCALE in this file and nowhere else
LATENT_SHAPE = (
    4,
    16,
    64,
)  # of one window: channels, mel rows, columns of 8 mel columns (2048 samples)


@dataclass(frozen=True)
class UNetConfig:
    """The paper preset's sizes: Stable Diffusion 1.x's, official `diffusionmodules/openai_unetmodel.py`."""

    width: int = 320
    multipliers: tuple = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks a level on the way down, one more on the way up
    attention: tuple = (
        1,
        2,
        4,
    )  # downsampling factors at which a transformer follows each residual block
    heads: int = 8
    context_dim: int = 768
    groups: int = 32
    aligned: int = (
        0  # condition tokens added to each latent column; 0: cross-attention alone, as published
    )


@dataclass(frozen=True)
class LDMConfig:
    fps: float = 4.0  # of the features; must be the CAVP's
    frames: int = 32  # condition tokens of one window
    positions: int = 40  # rows of the position table
    feature_dim: int = 512
    guidance: float = 4.5  # the classifier-free scale that suits it
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)


MINI = {"fps": 15.625, "frames": 128, "positions": 128}
PRESETS = {
    "paper": LDMConfig(),
    "mini": LDMConfig(
        **MINI,
        guidance=2.5,
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
# paper: 250 epochs of VGGSound's 200,000 clips at 8 x 220, lr constant after its warm-up, no clipping (official `diff_foley_train.yaml`);
# of the classifier only the lr is published, its steps and batch are ours
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
        "v_loss": 1,
        "by_energy": 1,
        "shift": 3,
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
        "v_loss": 0,
        "by_energy": 0,
        "shift": 1,
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# U-Net blocks; attribute names are those of the official keys


@functools.cache
def embedding_frequencies(half, device):
    """Made where it is used: torch.compile sees past the cache, and a copy from the CPU would split what it can record as a CUDA graph."""
    powers = torch.arange(half, dtype=torch.float32, device=device) / half
    return torch.exp(-math.log(10000) * powers)


def timestep_embedding(t, dim):
    """(b,) possibly fractional -> (b, dim), cosines first."""
    angles = t.float()[:, None] * embedding_frequencies(dim // 2, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb_dim, groups):
        super().__init__()
        # the official keys' places, with holes where a SiLU or a dropout stands
        self.in_layers = nn.ModuleDict(
            {"0": GroupNorm(groups, c_in), "2": nn.Conv2d(c_in, c_out, 3, padding=1)}
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.ModuleDict(
            {"0": GroupNorm(groups, c_out), "3": nn.Conv2d(c_out, c_out, 3, padding=1)}
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.out_layers["3"].weight)
        nn.init.zeros_(self.out_layers["3"].bias)

    def forward(self, x, emb):  # (b, c_in, h, w), (b, emb_dim) -> (b, c_out, h, w)
        h = self.in_layers["2"](self.in_layers["0"](x, silu=True))
        h = self.out_layers["3"](self.out_layers["0"](h, silu=True, add=self.emb_layers(emb)))
        return self.skip_connection(x) + h


class Attention(nn.Module):
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
        return self.to_out(attention(q, k, v).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # the identity stands where the official network has a dropout
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, context):  # (b, n, dim), (b, m, context_dim) -> (b, n, dim)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, c, context_dim, heads, groups):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, context_dim, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x, context):  # (b, c, h, w), (b, m, context_dim) -> (b, c, h, w)
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)  # time fastest
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y.view(b, h, w, c).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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


# ---------------------------------------------------------------------------------------------------------------------
# the networks. Read here what they compute; `kernels.fast.optimise` makes the same numbers with less work


class Backbone(nn.Module):
    """Time embedding, the way down and the middle: shared by the U-Net and the classifier."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        emb = 4 * cfg.width
        self.time_embed = nn.Sequential(nn.Linear(cfg.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList(
            [Blocks(nn.Conv2d(LATENT_SHAPE[0], cfg.width, 3, padding=1))]
        )
        if cfg.aligned:
            self.aligned = nn.Linear(cfg.aligned * cfg.context_dim, cfg.width)
        c = cfg.width
        self.skip_widths = [c]
        for level, multiplier in enumerate(cfg.multipliers):
            if level:
                self.input_blocks.append(Blocks(Downsample(c)))
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
        cfg = self.config
        layers = [ResBlock(c_in, c_out, 4 * cfg.width, cfg.groups)]
        if 2**level in cfg.attention:
            layers.append(SpatialTransformer(c_out, cfg.context_dim, cfg.heads, cfg.groups))
        return Blocks(*layers)

    @property
    def dtype(self):
        return self.time_embed[0].weight.dtype

    def one_time_each(self, t, x):
        """A number, or one time, or (b,) of them -> (b,), where x (b, 4, 16, w) is."""
        t = torch.as_tensor(t, device=x.device)
        if t.numel() == 1:
            t = t.reshape(1).expand(len(x))
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"times of shape {tuple(t.shape)} for {len(x)} latents; "
                "give one time, or one for each"
            )
        return t

    def embed(self, t):
        """(b,) -> (b, 4 width)"""
        return self.time_embed(timestep_embedding(t, self.config.width).to(self.dtype))

    def check_frames(self, frames, width):
        wanted = self.config.aligned * width
        if frames != wanted:
            raise ValueError(
                f"the condition has {frames} frames; {width} latent columns want {wanted}, "
                f"{self.config.aligned} each"
            )

    def columns(self, context, width):
        """(b, f, context_dim) -> (b, c, 1, w): what the mini preset adds to each latent column, of
        the condition's tokens of its moment."""
        self.check_frames(context.shape[1], width)
        moments = context.unflatten(1, (width, self.config.aligned)).flatten(2)
        return self.aligned(moments).transpose(1, 2)[:, :, None]

    def down(self, x, emb, context):
        """(b, 4, 16, w), (b, 4 width), (b, f, context_dim) -> the map in the middle, and the skips."""
        h = self.input_blocks[0](x.to(self.dtype), emb, context)
        if self.config.aligned:
            h = h + self.columns(context, x.shape[3])
        skips = [h]
        for block in list(self.input_blocks)[1:]:
            h = block(h, emb, context)
            skips.append(h)
        return self.middle_block(h, emb, context), skips


class UNet(Backbone):
    """eps(x, t, context): x (b, 4, 16, w), t (b,) or one number, in [0, 999] and possibly
    fractional, context (b, f, context_dim)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        c = self.out_width
        skips = list(self.skip_widths)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(cfg.multipliers))):
            for i in range(cfg.blocks + 1):
                block = self.stage(c + skips.pop(), cfg.width * multiplier, level)
                c = cfg.width * multiplier
                if level and i == cfg.blocks:
                    block.append(Upsample(c))
                self.output_blocks.append(block)
        self.out = nn.ModuleDict(
            {"0": GroupNorm(cfg.groups, c), "2": nn.Conv2d(c, LATENT_SHAPE[0], 3, padding=1)}
        )
        nn.init.zeros_(self.out["2"].weight)
        nn.init.zeros_(self.out["2"].bias)

    def forward(self, x, t, context):
        emb = self.embed(self.one_time_each(t, x))
        context = context.to(self.dtype)
        h, skips = self.down(x, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out["2"](self.out["0"](h, silu=True))


class Conditioner(nn.Module):
    """CAVP features (b, f, 512) -> context (b, f, context_dim): a linear map plus a learned embedding of the position."""

    def __init__(self, feature_dim, context_dim, positions):
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(feature_dim, context_dim))
        self.pos_emb = nn.Embedding.from_pretrained(
            torch.empty(positions, context_dim), freeze=False
        )
        if (
            not self.pos_emb.weight.is_meta
        ):  # where normal numbers take a second and 150 MB of imports to not draw
            self.reset()

    def reset(self):
        """Weights to start from. Features are unit vectors, entries of 0.04: torch's default would bury them under the positions."""
        nn.init.normal_(self.embedder[0].weight)
        nn.init.zeros_(self.embedder[0].bias)
        nn.init.normal_(self.pos_emb.weight, std=0.1)

    def forward(self, features):
        dim, positions = self.embedder[0].in_features, len(self.pos_emb.weight)
        if features.ndim != 3 or features.shape[2] != dim:
            raise ValueError(
                f"features of shape {tuple(features.shape)}; wanted is (b, frames, {dim})"
            )
        if features.shape[1] > positions:
            raise ValueError(
                f"features of {features.shape[1]} frames; this network was trained on at most {positions} at a time"
            )
        return (
            self.embedder(features.to(self.pos_emb.weight.dtype))
            + self.pos_emb.weight[: features.shape[1]]
        )


def add_schedule(module):
    for name, value in make_schedule().items():
        module.register_buffer(name, value)


class LDM(nn.Module):
    """U-Net, conditioner and the autoencoder it was trained on, in one file."""

    def __init__(self, config=LDMConfig()):
        super().__init__()
        self.config = config
        add_schedule(self)
        self.model = nn.ModuleDict(
            {"diffusion_model": UNet(config.unet)}
        )  # the official key's two names
        self.first_stage_model = AutoencoderKL(config.vae)
        self.cond_stage_model = Conditioner(
            config.feature_dim, config.unet.context_dim, config.positions
        )

    @property
    def unet(self):
        return self.model["diffusion_model"]

    @property
    def conditioner(self):
        return self.cond_stage_model

    @property
    def vae(self):
        return self.first_stage_model

    def null_context(self, frames):
        """The unconditional branch as trained: the conditioner of zero features, (1, f, context_dim)."""
        return self.conditioner(
            self.conditioner.pos_emb.weight.new_zeros(1, frames, self.config.feature_dim)
        )

    @torch.no_grad()
    def encode(self, mel):
        """(b, 128, s) in [0, 1] -> scaled latents (b, 4, 16, s/8), a sample of the posterior."""
        return LATENT_SCALE * sample_posterior(*(y.float() for y in self.vae.encode(mel[:, None])))

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (b, 4, 16, w) -> mel (b, 128, 8w) in [0, 1]: the first channel, clamped."""
        return (
            self.vae.decode((z / LATENT_SCALE).to(self.vae.post_quant_conv.weight.dtype))[:, 0]
            .float()
            .clamp(0, 1)
        )

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, encoder=True):
        """Ours, or the official ldm_epoch240.ckpt; strict. encoder=False: without the autoencoder's, which generating does not need."""
        file = Checkpoint(path)
        with checkpoint_errors(path, cls), torch.device("meta"):
            model = cls(LDMConfig() if file.config is None else read_config(LDMConfig, file.config))
        unused = () if encoder else ("first_stage_model.encoder.", "first_stage_model.quant_conv.")
        if unused:
            del model.vae.encoder, model.vae.quant_conv
        tensors = {k: file[k] for k in file if not k.startswith(unused)}
        return load_into(model, file, tensors, device, dtype).requires_grad_(False)


def read_config(cls, config):
    config = dict(config)
    config["unet"] = UNetConfig(**tuples(config["unet"]))
    if "vae" in config:
        config["vae"] = VAEConfig(**tuples(config["vae"]))
    return cls(**config)


# ---------------------------------------------------------------------------------------------------------------------
# training


def start(args, model, validate):
    """-> run, optimizer and average of a `model` that is on the device already."""
    cfg = model.config
    if args.lora < 0 or args.lora and not args.init:
        raise training.TrainingError(
            "--lora RANK: adapts trained weights; give a rank of 1 or more, and the weights with --init"
        )
    if args.lora:
        training.add_lora(
            model.unet if isinstance(model, LDM) else model.model, args.lora, SpatialTransformer
        )
    training.freeze(args, model)
    optimizer = training.adamw(
        [{"params": model.parameters()}], args, weight_decay=0.01
    )  # torch's default decay, as published
    ema = training.EMA(model)  # the published run has none; it costs nothing at sampling time
    training.recompute(args, model, ResBlock, SpatialTransformer)
    if args.data.is_dir() and not (args.data / "set.json").is_file():
        raise training.TrainingError(
            f"{args.data}: no features here; write some with python cavp.py --data CLIPS --init CAVP --extract FEATURES"
        )

    def reader(split):  # nothing is joined or rotated where it only serves to measure
        merge, roll = (args.merge, args.roll) if split == "train" else (0.0, 0.0)
        return data.Pairs(args.data, cfg.fps, cfg.frames, merge, roll, args.seed, split)

    run = training.TrainingRun(
        args,
        model,
        optimizer,
        asdict(cfg),
        ema,
        *training.train_val_split(reader),
        validate,
        training.merge_lora if args.lora else None,
    )
    return run, optimizer, ema


def latents(first_stage, mel, noise):
    """mel (b, 128, s), noise (b, 4, 16, s/8) -> scaled latents (b, 4, 16, s/8), a sample of the posterior."""
    with torch.no_grad():
        mean, logvar = first_stage.encode(mel[:, None])
    return LATENT_SCALE * sample_posterior(mean.float(), logvar.float(), noise)


def denoising_loss(model, z, t, noise, features, v_loss=False, by_energy=False):
    """Mean squared error of the predicted noise; z, noise (b, 4, 16, w), t (b,), features (b, f, 512).
    v_loss: divided by alpha-bar, which makes it the error of v (Salimans and Ho 2022): then every noise level costs about the same.
    As published, a clip's unpredictable texture at the low ones drowns what the condition decides at the high ones.
    by_energy: a column counts by the energy that the network itself expects there, so that hits are not outvoted by the hiss
    between them. The weight depends on what goes in alone, not on z, so what the loss is least for stays the mean."""
    noisy = q_sample(z, t, noise)
    eps = model.unet(noisy, t, model.conditioner(features)).float()
    error, alphas = (eps - noise).square(), ALPHAS_CUMPROD.to(t.device)[t].view(-1, 1, 1, 1)
    if v_loss:
        error = error / alphas
    if by_energy:
        expected = (
            noisy - (1 - alphas).sqrt() * eps.detach()
        ) / alphas.sqrt()  # the clean latents that eps implies
        error = error * expected.square().mean((1, 2), keepdim=True).clamp(
            0.1, 8
        )  # (b, 1, 1, w); 1 on average over the mini set
    return error.mean()


def noise_levels(count, shift, generator):
    """(count,) of 0..999: uniform, as published, for a `shift` s of 1; above it mapped by t -> s t / (1 + (s - 1) t) of the unit
    interval (Esser et al. 2024, arXiv 2403.03206, eq. 23), which visits the high ones more often: what the sound will be is decided there."""
    t = torch.randint(0, 1000, (count,), generator=generator)
    if shift == 1:
        return t
    u = (t + torch.rand(count, generator=generator)) / 1000
    return (1000 * shift * u / (1 + (shift - 1) * u)).long().clamp(max=999)


def validate(model, pairs, device, most=16, drawn=4, **weights):
    """The loss of `most` clips at four noise levels, and the onsets of `drawn` sampled ones held against the true ones'."""
    g, shape, losses, mels = torch.Generator().manual_seed(0), (1, *LATENT_SHAPE), [], []
    t, frames = torch.tensor([100, 350, 600, 850], device=device), model.config.frames
    for i in range(min(most, len(pairs))):
        item = pairs[i]
        mel, features = audio.mel(item["wav"].to(device))[None], item["features"].to(device)[None]
        z = latents(model.vae, mel, torch.randn(shape, generator=g).to(device)).expand(
            len(t), -1, -1, -1
        )
        noise = torch.randn(z.shape, generator=g).to(device)
        losses.append(
            denoising_loss(model, z, t, noise, features.expand(len(t), -1, -1), **weights).item()
        )
        if i < drawn:
            eps = guided_eps(
                model.unet,
                model.conditioner(features),
                model.null_context(frames),
                model.config.guidance,
            )
            made = dpm_solver(eps, torch.randn(shape, generator=g).to(device), 25)
            mels.append((mel[0], model.decode(made)[0]))
    return {"val_loss": sum(losses) / len(losses), "val_onset_f1": onset_agreement(mels)}, mels


def initial(args):
    """The network that training starts from: --init one of ours or the official one; --init Stable Diffusion v1 (CompVis' or diffusers'
    names, or diffusers' folder) as the published run did, with a new conditioner; or a new one. --vae takes any autoencoder."""
    if args.init and args.init.is_dir():
        found = [
            next(iter(sorted((args.init / part).glob("diffusion_pytorch_model.*"))), None)
            for part in ("unet", "vae")
        ]
        if None in found:
            raise training.TrainingError(
                f"--init {args.init}: no unet/ and vae/ with a diffusion_pytorch_model; give a file, or such a folder"
            )
        args.init, args.vae = found[0], args.vae or found[1]
    file = Checkpoint(args.init) if args.init else {}
    unet = (
        None
        if "cond_stage_model.pos_emb.weight" in file
        else stable_diffusion.parts(file).get("unet")
    )
    if args.init and unet is None:
        model = LDM.load(args.init)
        if args.new_conditioner:
            model.conditioner.reset()
        if args.vae:
            with checkpoint_errors(args.vae, AutoencoderKL):
                model.first_stage_model.load_state_dict(AutoencoderKL.load(args.vae).state_dict())
        return model
    source = args.vae or (
        args.init if any(k.startswith("first_stage_model.") for k in file) else None
    )
    if not source:
        raise training.TrainingError(
            "stage 2 works on an autoencoder's latents: add --vae runs/vae/last.safetensors"
        )
    first_stage = AutoencoderKL.load(source)
    model = LDM(replace(PRESETS[args.preset], vae=first_stage.config))
    model.first_stage_model.load_state_dict(first_stage.state_dict())
    if unet:
        with checkpoint_errors(args.init, UNet):
            model.unet.load_state_dict(unet)
    return model


def final_rate(args):
    """What the learning rate's cosine ends at, as a share of its peak; the published rate stays constant."""
    return 0.05 if args.preset == "mini" else 1.0


def train(args):
    """eps-prediction, t uniform over 0..999, the condition dropped for a fifth of the samples by zeroing the raw features
    (official `sd_ddpm_scale.py`). A batch of sounds is encoded once and seen at --repeats noise levels: the frozen encoder would else cost
    half as much as the small U-Net's training."""
    training.resolve_defaults(args, RECIPES, "ldm")
    distributed.init(args.device)
    training.check_batch(args)
    training.check_run_folder(args)
    device = training.set_up(args)
    model = initial(args).to(device, memory_format=torch.channels_last).train()
    (
        model.unet.requires_grad_(True),
        model.conditioner.requires_grad_(True),
        model.vae.requires_grad_(False),
    )
    if args.shift < 1:
        raise training.TrainingError("--shift must be at least 1")
    weights = {"v_loss": bool(args.v_loss), "by_energy": bool(args.by_energy)}
    run, optimizer, ema = start(args, model, functools.partial(validate, device=device, **weights))
    network, n = (
        distributed.wrap_ddp(model, functools.partial(denoising_loss, **weights)),
        args.repeats,
    )
    for step in run:
        draw = training.generator(args, step)
        posterior = torch.randn(args.batch, *LATENT_SHAPE, generator=draw)
        noise = torch.randn(args.batch * n, *LATENT_SHAPE, generator=draw)
        t = noise_levels(args.batch * n, args.shift, draw)
        kept = torch.rand(args.batch * n, 1, 1, generator=draw) >= 0.2
        for batch, rows in run.parts(network):
            many = slice(n * rows.start, n * rows.stop)
            mel = audio.mel(batch["wav"].to(device, non_blocking=True))  # (b, 128, 512)
            features = batch["features"].to(device, non_blocking=True).repeat_interleave(
                n, 0
            ) * kept[many].to(device)  # (b*n, f, 512)
            with training.autocast(args):
                z = latents(model.vae, mel, posterior[rows].to(device)).repeat_interleave(
                    n, 0
                )  # (b*n, 4, 16, 64)
                loss = network(z, t[many].to(device), noise[many].to(device), features)
            (loss / run.count).backward()
            run.add(loss=loss)
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
    p.add_argument(
        "--new-conditioner",
        action="store_true",
        help="with --init: keep U-Net and autoencoder, start the conditioner anew "
        "(new features, as the published run did from Stable Diffusion)",
    )
    training.add_stage2_arguments(p)
    p.add_argument(
        "--v-loss",
        type=int,
        choices=(0, 1),
        help="1 counts every noise level alike, 0 as published",
    )
    p.add_argument(
        "--by-energy",
        type=int,
        choices=(0, 1),
        help="1 counts a moment by the energy that is expected there, 0 all alike, as published",
    )
    p.add_argument(
        "--shift",
        type=float,
        help="above 1, high noise levels are seen more often; 1: all alike, as published",
    )
    with distributed.report_errors("ldm.py"):
        train(p.parse_args(argv))


if __name__ == "__main__":
    main()
