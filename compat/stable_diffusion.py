"""Stable Diffusion v1 weights under the names that our networks use, which are CompVis' own.

in   {name: tensor} of a public file: CompVis' whole checkpoint, U-Net or autoencoder;
     diffusers' U-Net or autoencoder
out  {"unet": ..., "vae": ...}: what it holds of the two, for a strict load into `ldm.UNet` and
     `vae.AutoencoderKL`

    ldm.UNet(ldm.UNetConfig()).load_state_dict(stable_diffusion.parts(state)["unet"])

Only names change, and the autoencoder's attention matrices become 1x1 convolutions. A name that no
rule knows stays as it is, so that a strict load refuses the file. Left out on purpose, as in
Diff-Foley's start from sd-v1-4-full-ema.ckpt: the text encoder (here video is the condition), the
moving average (the raw U-Net is read) and the noise schedule (`ldm.py` makes it); of an autoencoder
also the networks of its training loss.
"""

import re
from pathlib import Path

from common.checkpoints import CheckpointError

# what the names of each network begin with in CompVis' whole checkpoint
WHOLE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
# names of what is left out on purpose
LEFT_OUT = re.compile(
    r"cond_stage_model\.transformer\.|model_ema\.|(first_stage_model\.)?loss\."
    r"|(betas|\w*alphas_cumprod(_prev)?|posterior_\w+)$"
)

# diffusers' names -> CompVis', inside a residual block of the U-Net
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# the parts of the U-Net that stand once
UNET_PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# the parts of the autoencoder that stand once on each side
VAE_PLACES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}
# the autoencoder's attention, as newer files spell it and as older ones do
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def one_of(names):
    """A pattern: one of these names and the dot behind it."""
    return "(" + "|".join(map(re.escape, names)) + r")\."


def highest(pattern, state, default):
    """The highest number that the pattern's group takes in the names; default without any."""
    matches = (re.match(pattern, name) for name in state)
    return max((int(m[1]) for m in matches if m), default=default)


def rename(state, rules):
    """Every (pattern, replacement) in turn on every name.

    On a name collision the second tensor gets an invalid name, so that a strict load fails instead
    of losing it."""
    out = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in out:
            new = f"{key} (a second {new})"
        out[new] = value
    return out


def unet_keys(state):
    """diffusers' `UNet2DConditionModel` -> CompVis' `openaimodel.UNetModel`, without prefix.

    diffusers nests modules by resolution; CompVis numbers them in one row a side, n + 1 entries a
    resolution: on the way down n resnets, each with its transformer, then the downsampler
    (`conv_in` comes before, as entry 0); on the way up n + 1 resnets, each with its transformer,
    and behind the last of them, in the same entry, the upsampler."""
    # residual blocks of a resolution on the way down
    n = 1 + highest(r"down_blocks\.\d+\.resnets\.(\d+)\.", state, 1)
    # the resolutions, as diffusers counts them on the way up, that have transformers
    attended = {m[1] for k in state if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", k))}

    def entry(side, part, first):
        """A replacement for groups (resolution, position in it)."""
        return lambda m: f"{side}_blocks.{int(m[1]) * (n + 1) + int(m[2]) + first}.{part}."

    def upsampler(m):
        # behind the resnet, and behind the transformer where there is one
        place = 2 if m[1] in attended else 1
        return f"output_blocks.{int(m[1]) * (n + 1) + n}.{place}."

    rules = [
        # inside the blocks first, while their names still say what they are
        (r"(\.resnets\.\d+\.)" + one_of(UNET_RESNET), lambda m: f"{m[1]}{UNET_RESNET[m[2]]}."),
        ("^" + one_of(UNET_PLACES), lambda m: f"{UNET_PLACES[m[1]]}."),
        # the way down, behind entry 0
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", entry("input", 0, 1)),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", entry("input", 1, 1)),
        (r"^down_blocks\.(\d+)\.downsamplers\.(0)\.conv\.", entry("input", "0.op", n + 1)),
        # the way up
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", entry("output", 0, 0)),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", entry("output", 1, 0)),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.", upsampler),
    ]
    return rename(state, rules)


def autoencoder_keys(state):
    """diffusers' `AutoencoderKL` -> CompVis' `autoencoder.AutoencoderKL`, without prefix.

    CompVis counts resolutions from the highest on both sides, diffusers in running order; the
    middle attention has 1x1 convolutions (c, c, 1, 1) in CompVis, matrices (c, c) in diffusers."""
    last = highest(r"decoder\.up_blocks\.(\d+)\.", state, 3)
    rules = [
        (r"(\.attentions\.0\.)" + one_of(VAE_ATTENTION), lambda m: f"{m[1]}{VAE_ATTENTION[m[2]]}."),
        (r"(\.resnets\.\d+)\.conv_shortcut\.", r"\1.nin_shortcut."),
        (r"^(encoder|decoder)\." + one_of(VAE_PLACES), lambda m: f"{m[1]}.{VAE_PLACES[m[2]]}."),
        # the order of the resolutions
        (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
        (r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}."),
        (r"^((?:encoder\.down|decoder\.up)\.\d+)\.resnets\.", r"\1.block."),
        (r"^((?:encoder\.down|decoder\.up)\.\d+\.(?:down|up)sample)rs\.0\.", r"\1."),
    ]
    out = rename(state, rules)
    # (c, c) -> (c, c, 1, 1)
    matrix = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    for key, value in out.items():
        if matrix.fullmatch(key) and value.ndim == 2:
            out[key] = value[:, :, None, None]
    return out


def split_whole(state, present):
    """CompVis' whole checkpoint -> {part: state} of the parts that are present."""
    out = {}
    for part in present:
        prefix = WHOLE[part]
        out[part] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    # what is of neither stays with the first, so that a strict load refuses it
    strays = {k: v for k, v in state.items() if not k.startswith(tuple(WHOLE.values()))}
    next(iter(out.values())).update({f"{k} (of neither)": v for k, v in strays.items()})
    return out


def parts(state):
    """What a file holds of the U-Net and the autoencoder, each for a strict load; {} without any.

    state: {name: tensor}, names as in the file."""

    def holds(*prefixes):
        return any(k.startswith(prefixes) for k in state)

    kept = {k: v for k, v in state.items() if not LEFT_OUT.match(k)}
    # CompVis' names: the whole file, the U-Net alone, the autoencoder alone
    if holds(*WHOLE.values()):
        return split_whole(kept, [part for part, prefix in WHOLE.items() if holds(prefix)])
    if holds("output_blocks."):
        return {"unet": kept}
    if holds("encoder.down.", "decoder.up."):
        return {"vae": kept}
    # diffusers' names, where nothing is left out
    if holds("up_blocks."):
        return {"unet": unet_keys(state)}
    if holds("encoder.down_blocks.", "decoder.up_blocks."):
        return {"vae": autoencoder_keys(state)}
    return {}


def weights_in(folder: Path):
    """Paths of the U-Net's and the autoencoder's weights in a folder as diffusers writes it.

    CheckpointError if either is missing."""
    found = []
    for part in WHOLE:
        found += sorted((folder / part).glob("diffusion_pytorch_model.*"))[:1]
    if len(found) < len(WHOLE):
        raise CheckpointError(
            f"{folder}: no unet/ and vae/ with a diffusion_pytorch_model; "
            "give a file, or such a folder"
        )
    return found
