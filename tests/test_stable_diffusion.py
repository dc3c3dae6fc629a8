"""Public Stable Diffusion v1 files in our networks: names, what is refused, and the numbers of
diffusers' own networks.

    pip install diffusers && python -m pytest tests/test_stable_diffusion.py -rP

prints every difference measured.

Without diffusers the comparisons with it are skipped (`-m optional` runs them in an environment
that has it); the rest needs nothing but this repository.
"""

import argparse
import re
from dataclasses import replace

import pytest
import torch
from golden import rule

import ldm
import vae
from common import checkpoints, training
from compat import stable_diffusion

# the published layout, narrow; and another one, so that no index is right by coincidence
UNETS = [
    ldm.UNetConfig(width=32, heads=8, context_dim=64, groups=8),
    ldm.UNetConfig(
        width=32, multipliers=(1, 2, 3), blocks=1, attention=(2,), heads=4, context_dim=48, groups=8
    ),
]
VAES = [
    vae.VAEConfig(width=32, groups=8),
    vae.VAEConfig(channels=1, width=16, multipliers=(1, 2, 4), blocks=1, groups=8),
]
NETWORKS = {"unet": (ldm.UNet, UNETS[0]), "vae": (vae.AutoencoderKL, VAES[0])}
WITHOUT_PREFIX = {
    re.sub(r"^(model\.diffusion_model|first_stage_model)\.", "", k)
    for k in rule.official_keys("ldm")
}


def empty(cls, config):
    with torch.device("meta"):
        return cls(config)


def loaded(cls, config, state):
    model = empty(cls, config)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


# ------------------------------------------------------------------------------------------------
# names alone


def test_unet_names():
    block = "transformer_blocks.0"
    pairs = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.1.norm1.weight": "input_blocks.2.0.in_layers.0.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.bias": "input_blocks.4.0.skip_connection.bias",
        f"down_blocks.2.attentions.1.{block}.norm1.bias": f"input_blocks.8.1.{block}.norm1.bias",
        "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "up_blocks.0.resnets.2.norm2.weight": "output_blocks.2.0.out_layers.0.weight",
        # no transformers at this resolution
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.attentions.2.proj_out.bias": "output_blocks.5.1.proj_out.bias",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv1.weight": "output_blocks.11.0.in_layers.2.weight",
        "conv_norm_out.bias": "out.0.bias",
        "conv_out.weight": "out.2.weight",
    }
    assert set(pairs.values()) <= WITHOUT_PREFIX
    assert stable_diffusion.unet_keys({k: k for k in pairs}) == {
        ours: theirs for theirs, ours in pairs.items()
    }


def test_autoencoder_names():
    theirs = "encoder.down_blocks.1"
    ours = "encoder.down.1"
    pairs = {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        f"{theirs}.resnets.0.conv_shortcut.weight": f"{ours}.block.0.nin_shortcut.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
        "encoder.mid_block.resnets.1.norm2.bias": "encoder.mid.block_2.norm2.bias",
        "encoder.mid_block.attentions.0.group_norm.weight": "encoder.mid.attn_1.norm.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias": "encoder.mid.attn_1.proj_out.bias",
        "decoder.mid_block.attentions.0.proj_attn.bias": "decoder.mid.attn_1.proj_out.bias",
        "decoder.mid_block.attentions.0.value.bias": "decoder.mid.attn_1.v.bias",
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.up_blocks.3.resnets.0.norm1.bias": "decoder.up.0.block.0.norm1.bias",
        "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    }
    assert set(pairs.values()) <= WITHOUT_PREFIX
    assert stable_diffusion.autoencoder_keys({k: k for k in pairs}) == {
        ours: theirs for theirs, ours in pairs.items()
    }


@pytest.mark.parametrize("name", ["to_q", "query"])
def test_attention_matrices_become_convolutions(name):
    matrix = rule.normal("matrix", 8, 8)
    mapped = stable_diffusion.autoencoder_keys(
        {f"decoder.mid_block.attentions.0.{name}.weight": matrix}
    )
    assert same(mapped, {"decoder.mid.attn_1.q.weight": matrix[:, :, None, None]})


@pytest.mark.parametrize(
    "translate", [stable_diffusion.unet_keys, stable_diffusion.autoencoder_keys]
)
def test_unknown_names_stay(translate):
    state = dict.fromkeys(
        [
            "add_embedding.linear_1.weight",
            "decoder.mid_block.attentions.1.query.weight",
            "down_blocks.0.downsamplers.1.conv.weight",
            "conv_in_2.weight",
        ]
    )
    assert translate(state) == state


@pytest.mark.parametrize(
    "keys", [["conv_in.bias", "input_blocks.0.0.bias"], ["input_blocks.0.0.bias", "conv_in.bias"]]
)
def test_two_tensors_for_one_place_are_both_kept(keys):
    mapped = stable_diffusion.unet_keys({k: k for k in keys})
    assert list(mapped.values()) == keys and mapped["input_blocks.0.0.bias"] == keys[0]


# ------------------------------------------------------------------------------------------------
# CompVis files


@pytest.fixture(scope="module")
def states():
    return {part: rule.fill(empty(*network)).state_dict() for part, network in NETWORKS.items()}


def whole(states):
    """A file as CompVis published them: both networks, and what is left out."""
    text = "cond_stage_model.transformer.text_model."
    networks = {
        stable_diffusion.WHOLE[part] + k: v
        for part, state in states.items()
        for k, v in state.items()
    }
    return (
        ldm.make_schedule()
        | networks
        | dict.fromkeys(
            [
                text + "embeddings.position_ids",
                text + "final_layer_norm.weight",
                "first_stage_model.loss.logvar",
                "model_ema.decay",
                "model_ema.num_updates",
                "model_ema.diffusion_modelinput_blocks00bias",
            ],
            torch.zeros(1),
        )
    )


def test_whole_checkpoint(states):
    found = stable_diffusion.parts(whole(states))
    assert list(found) == ["unet", "vae"]
    for part, network in NETWORKS.items():
        assert same(loaded(*network, found[part]).state_dict(), states[part])


def test_one_network_alone(states):
    around = dict.fromkeys(
        ["loss.logvar", "loss.discriminator.main.0.bias", "model_ema.decay"], torch.zeros(1)
    )
    prefixed = {f"first_stage_model.{k}": v for k, v in states["vae"].items()}
    for part, state in [
        ("unet", states["unet"]),
        ("vae", states["vae"] | around),
        ("vae", prefixed),
    ]:
        found = stable_diffusion.parts(state)
        assert list(found) == [part] and same(found[part], states[part])


@pytest.mark.parametrize(
    "part, key",
    [
        ("unet", "model.diffusion_model.label_emb.0.0.weight"),
        ("unet", "control_model.input_hint_block.0.weight"),
        ("unet", "cond_stage_model.embedder.0.weight"),
        ("unet", "scale_factor"),
        ("unet", "input_blocks.0.0.weight"),
        ("vae", "first_stage_model.quantize.embedding.weight"),
    ],
)
def test_unknown_keys_of_a_whole_checkpoint_are_refused(states, part, key):
    found = stable_diffusion.parts(whole(states) | {key: torch.zeros(1)})
    with pytest.raises(
        RuntimeError, match="Unexpected key.*" + key.removeprefix(stable_diffusion.WHOLE[part])
    ):
        loaded(*NETWORKS[part], found[part])


def test_other_files_are_not_recognised():
    text_encoder = dict.fromkeys(
        ["text_model.embeddings.position_ids", "text_model.encoder.layers.0.mlp.fc1.weight"]
    )
    for state in ({}, text_encoder, rule.official_keys("cavp"), rule.official_keys("classifier")):
        assert stable_diffusion.parts(state) == {}


# ------------------------------------------------------------------------------------------------
# diffusers' own networks


def their_unet(cfg):
    attends = [2**level in cfg.attention for level in range(len(cfg.multipliers))]
    with torch.device("meta"):
        model = pytest.importorskip("diffusers").UNet2DConditionModel(
            block_out_channels=[cfg.width * m for m in cfg.multipliers],
            layers_per_block=cfg.blocks,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            attention_head_dim=cfg.heads,  # the number of heads, whatever its name says
            cross_attention_dim=cfg.context_dim,
            norm_num_groups=cfg.groups,
        )
    return rule.fill(model)


def their_vae(cfg):
    levels = len(cfg.multipliers)
    with torch.device("meta"):
        model = pytest.importorskip("diffusers").AutoencoderKL(
            in_channels=cfg.channels,
            out_channels=cfg.channels,
            latent_channels=cfg.z_channels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[cfg.width * m for m in cfg.multipliers],
            layers_per_block=cfg.blocks,
            norm_num_groups=cfg.groups,
        )
    return rule.fill(model)


def epsilons(model):
    return {f"{name}.weight": m.eps for name, m in model.named_modules() if hasattr(m, "eps")}


def compare_unets(cfg, columns):
    theirs = their_unet(cfg)
    ours = loaded(ldm.UNet, cfg, stable_diffusion.parts(theirs.state_dict())["unet"])
    assert stable_diffusion.unet_keys(epsilons(theirs)) == epsilons(ours)
    x, context = rule.normal("x", 2, 4, 16, columns), rule.normal("context", 2, 32, cfg.context_dim)
    for t in (torch.tensor([0, 999]), torch.tensor([17.25, 640.5])):
        rule.close(
            f"U-Net of width {cfg.width}, t {t.tolist()}",
            ours(x, t, context),
            theirs(x, t, context).sample,
        )


def compare_autoencoders(cfg, columns):
    theirs = their_vae(cfg)
    ours = loaded(vae.AutoencoderKL, cfg, stable_diffusion.parts(theirs.state_dict())["vae"])
    assert stable_diffusion.autoencoder_keys(epsilons(theirs)) == epsilons(ours)
    mel, z = (
        rule.uniform("mel", 1, cfg.channels, 128, 8 * columns),
        rule.normal("z", 1, cfg.z_channels, 16, columns),
    )
    posterior = theirs.encode(mel).latent_dist
    mean, logvar = ours.encode(mel)
    rule.close(f"autoencoder of width {cfg.width}, mean", mean, posterior.mean)
    rule.close(f"autoencoder of width {cfg.width}, log-variance", logvar, posterior.logvar)
    rule.close(
        f"autoencoder of width {cfg.width}, decoded", ours.decode(z), theirs.decode(z).sample
    )


@pytest.mark.optional
@pytest.mark.parametrize("cfg", UNETS)
def test_unet(cfg):
    compare_unets(cfg, columns=16)


@pytest.mark.optional
@pytest.mark.parametrize("cfg", VAES)
def test_autoencoder(cfg):
    compare_autoencoders(cfg, columns=16)


@pytest.mark.optional
@pytest.mark.slow
def test_unet_at_full_size():
    compare_unets(ldm.UNetConfig(), columns=64)


@pytest.mark.optional
@pytest.mark.slow
def test_autoencoder_at_full_size():
    compare_autoencoders(vae.VAEConfig(), columns=64)


@pytest.mark.optional
def test_older_spelling_of_attention():
    new, old = their_vae(VAES[0]).state_dict(), {}
    for key, value in new.items():
        for now, once in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out.0": "proj_attn",
        }.items():
            key = key.replace(f".attentions.0.{now}.", f".attentions.0.{once}.")
        old[key] = value
    assert len(old.keys() - new.keys()) == 16
    assert same(stable_diffusion.parts(old)["vae"], stable_diffusion.parts(new)["vae"])


@pytest.mark.optional
@pytest.mark.parametrize(
    "part, missing, additional",
    [
        ("unet", "up_blocks.1.upsamplers.0.conv.bias", None),
        ("unet", None, "class_embedding.linear_1.weight"),
        ("unet", "mid_block.attentions.0.proj_out.weight", None),
        ("unet", None, "up_blocks.0.resnets.3.conv1.weight"),
        ("vae", "encoder.conv_norm_out.bias", None),
        ("vae", None, "encoder.down_blocks.0.attentions.0.to_q.weight"),
        ("vae", "decoder.mid_block.attentions.0.to_k.bias", None),
        ("vae", None, "encoder.mid_block.attentions.0.key.bias"),
    ],
)
def test_a_key_too_few_or_too_many_is_refused(part, missing, additional):
    state = {"unet": their_unet, "vae": their_vae}[part](NETWORKS[part][1]).state_dict()
    state.pop(missing, None)
    if additional:
        state[additional] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Missing key" if missing else "Unexpected key"):
        loaded(*NETWORKS[part], stable_diffusion.parts(state)[part])


# ------------------------------------------------------------------------------------------------
# stage 2 starts from them


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_tensors(path, state) if path.suffix == ".safetensors" else torch.save(
        {"state_dict": state}, path
    )
    return path


@pytest.mark.optional
@pytest.mark.parametrize("form", ["whole file", "two files", "diffusers folder"])
def test_training_starts_from_stable_diffusion(tmp_path, monkeypatch, states, form):
    """U-Net and autoencoder are the file's, the conditioner is a new one."""
    config = replace(ldm.PRESETS["paper"], unet=UNETS[0], vae=VAES[0])
    monkeypatch.setitem(ldm.PRESETS, "paper", config)
    monkeypatch.setitem(vae.PRESETS, "paper", VAES[0])
    args = argparse.Namespace(init=tmp_path, vae=None, preset="paper", new_conditioner=False)
    expected = states
    if form == "whole file":
        args.init = write(tmp_path / "sd-v1-4.ckpt", whole(states))
    elif form == "two files":
        args.init = write(tmp_path / "unet.safetensors", states["unet"])
        with pytest.raises(training.TrainingError, match="add --vae"):
            ldm.initial(args)
        args.vae = write(tmp_path / "vae.ckpt", states["vae"])
    else:
        theirs = {"unet": their_unet(UNETS[0]).state_dict(), "vae": their_vae(VAES[0]).state_dict()}
        write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", theirs["unet"])
        with pytest.raises(checkpoints.CheckpointError, match="no unet/ and vae/"):
            stable_diffusion.weights_in(tmp_path)
        write(tmp_path / "vae" / "diffusion_pytorch_model.bin", theirs["vae"])
        args.init, args.vae = stable_diffusion.weights_in(tmp_path)
        expected = {part: stable_diffusion.parts(state)[part] for part, state in theirs.items()}
    model = ldm.initial(args)
    assert same(model.unet.state_dict(), expected["unet"]) and same(
        model.vae.state_dict(), expected["vae"]
    )
    assert 0.9 < model.conditioner.embedder[0].weight.std() < 1.1


def test_the_command_takes_a_diffusers_folder_as_its_two_files(tmp_path, monkeypatch, states):
    """So that the run records their sums, as those of any other files it starts from."""
    files = [
        write(tmp_path / part / "diffusion_pytorch_model.bin", states[part]) for part in NETWORKS
    ]
    parsed = []
    monkeypatch.setattr(ldm, "train", parsed.append)
    command = ["--data", "x", "--init", str(tmp_path)]
    ldm.main(command)
    ldm.main([*command, "--vae", "other.safetensors"])
    assert [parsed[0].init, parsed[0].vae] == files
    assert [parsed[1].init, parsed[1].vae.name] == [files[0], "other.safetensors"]


def test_another_networks_file_is_no_start(tmp_path, states):
    wrong = {k: v for k, v in states["unet"].items() if "time_embed" not in k}
    args = argparse.Namespace(
        init=write(tmp_path / "wrong.safetensors", wrong),
        vae=write(tmp_path / "v.safetensors", states["vae"]),
        preset="mini",
        new_conditioner=False,
    )
    with pytest.raises(
        checkpoints.CheckpointError, match="v.safetensors: not a checkpoint of AutoencoderKL"
    ):
        ldm.initial(args)
