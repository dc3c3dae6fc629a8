"""Stable Diffusion v1 weights under the names that our networks use, which are CompVis' own.

in   {name: tensor} of a public file: CompVis' whole checkpoint, U-Net or autoencoder; diffusers' U-Net or autoencoder
out  {"unet": ..., "vae": ...}: what it holds of the two, for a strict load into `ldm.UNet` and `vae.AutoencoderKL`

    ldm.UNet(ldm.UNetConfig()).load_state_dict(stable_diffusion.parts(state)["unet"])

Only names change, and the autoencoder's attention matrices become 1x1 convolutions. A name that no rule knows stays as
it is, so that a strict load refuses the file. Left out on purpose, as in Diff-Foley's start from sd-v1-4-full-ema.ckpt:
the text encoder (here video says what is heard), the moving average (the raw U-Net is read) and the noise schedule
(`ldm.py` makes it); of an autoencoder also the networks of its training loss.
"""

import re

WHOLE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
LEFT_OUT = re.compile(
    r"cond_stage_model\.transformer\.|model_ema\.|(first_stage_model\.)?loss\."
    r"|(betas|\w*alphas_cumprod(_prev)?|posterior_\w+)$"
)

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
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
VAE_PLACES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}
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
}  # as older files spell it


def one_of(names):
    return "(" + "|".join(map(re.escape, names)) + r")\."


def renamed(state, rules):
    """Every (pattern, replacement) in turn on every key. Of two tensors for one place, the second gets a name that fits
    nowhere: neither is dropped unseen."""
    out = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        out[f"{key} (a second {new})" if new in out else new] = value
    return out


def unet_keys(state):
    """diffusers' `UNet2DConditionModel` -> CompVis' `openaimodel.UNetModel`, without prefix.

    diffusers nests modules in levels; CompVis numbers them in one row a side, n + 1 entries a level: on the way down
    n resnets, each with its transformer, then the downsampler (`conv_in` comes before, as entry 0); on the way up n + 1
    resnets, each with its transformer, and behind the last of them, in the same entry, the upsampler."""
    n = 1 + max(
        (int(m[1]) for k in state if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", k))),
        default=1,
    )
    attended = {m[1] for k in state if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", k))}

    def first(m):
        return int(m[1]) * (n + 1)

    return renamed(
        state,
        [
            (r"(\.resnets\.\d+\.)" + one_of(UNET_RESNET), lambda m: f"{m[1]}{UNET_RESNET[m[2]]}."),
            ("^" + one_of(UNET_PLACES), lambda m: f"{UNET_PLACES[m[1]]}."),
            (
                r"^down_blocks\.(\d+)\.resnets\.(\d+)\.",
                lambda m: f"input_blocks.{first(m) + 1 + int(m[2])}.0.",
            ),
            (
                r"^down_blocks\.(\d+)\.attentions\.(\d+)\.",
                lambda m: f"input_blocks.{first(m) + 1 + int(m[2])}.1.",
            ),
            (
                r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.",
                lambda m: f"input_blocks.{first(m) + 1 + n}.0.op.",
            ),
            (
                r"^up_blocks\.(\d+)\.resnets\.(\d+)\.",
                lambda m: f"output_blocks.{first(m) + int(m[2])}.0.",
            ),
            (
                r"^up_blocks\.(\d+)\.attentions\.(\d+)\.",
                lambda m: f"output_blocks.{first(m) + int(m[2])}.1.",
            ),
            (
                r"^up_blocks\.(\d+)\.upsamplers\.0\.",
                lambda m: f"output_blocks.{first(m) + n}.{1 + (m[1] in attended)}.",
            ),
        ],
    )


def autoencoder_keys(state):
    """diffusers' `AutoencoderKL` -> CompVis' `autoencoder.AutoencoderKL`, without prefix.

    CompVis counts levels from the highest resolution on both sides, diffusers in running order; the middle attention
    has 1x1 convolutions (c, c, 1, 1) in CompVis, matrices (c, c) in diffusers."""
    last = max(
        (int(m[1]) for k in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k))), default=3
    )
    out = renamed(
        state,
        [
            (
                r"(\.attentions\.0\.)" + one_of(VAE_ATTENTION),
                lambda m: f"{m[1]}{VAE_ATTENTION[m[2]]}.",
            ),
            (r"(\.resnets\.\d+)\.conv_shortcut\.", r"\1.nin_shortcut."),
            (r"^(encoder|decoder)\." + one_of(VAE_PLACES), lambda m: f"{m[1]}.{VAE_PLACES[m[2]]}."),
            (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
            (r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}."),
            (r"^((?:encoder\.down|decoder\.up)\.\d+)\.resnets\.", r"\1.block."),
            (r"^((?:encoder\.down|decoder\.up)\.\d+\.(?:down|up)sample)rs\.0\.", r"\1."),
        ],
    )
    matrix = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {
        k: v[:, :, None, None] if matrix.fullmatch(k) and v.ndim == 2 else v for k, v in out.items()
    }


def parts(state):
    """What a file holds of the U-Net and the autoencoder, each ready to be loaded; {} where it holds neither. Keys of a
    whole CompVis checkpoint that are of neither and not left out on purpose stay, marked, with the first found."""

    def holds(*starts):
        return any(k.startswith(starts) for k in state)

    kept = {k: v for k, v in state.items() if not LEFT_OUT.match(k)}
    if holds(*WHOLE.values()):
        found = {
            part: {k.removeprefix(start): v for k, v in kept.items() if k.startswith(start)}
            for part, start in WHOLE.items()
            if holds(start)
        }
        strays = {
            f"{k} (of neither)": v
            for k, v in kept.items()
            if not k.startswith(tuple(WHOLE.values()))
        }
        next(iter(found.values())).update(strays)
        return found
    if holds("output_blocks."):
        return {"unet": kept}
    if holds("encoder.down.", "decoder.up."):
        return {"vae": kept}
    if holds("up_blocks."):
        return {"unet": unet_keys(state)}
    if holds("encoder.down_blocks.", "decoder.up_blocks."):
        return {"vae": autoencoder_keys(state)}
    return {}
