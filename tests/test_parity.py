"""The networks against the official code's recorded outputs, float32, under the same stand-in
weights; and checkpoints in and out.

python -m pytest tests/test_parity.py -rP        prints every difference measured
"""

import collections
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from golden import rule

import align
import cavp
import diffusion
import ldm
import vae
from common import machine
from compat import official
from kernels import fast
from tools.plain import plainly


@pytest.fixture(scope="module", autouse=True)
def memory():
    """The full networks take 5 GB; what they free is reused instead of being faulted in anew."""
    machine.keep_freed_memory()
    yield
    gc.collect()


def network(cls, config, prefix):
    """The paper preset's network, without the seconds that its random initialization would take."""
    with torch.device("meta"):
        model = cls(config)
    return rule.fill(model, prefix).to(
        memory_format=torch.channels_last
    )  # as `load` leaves it; convolutions are faster so


# --------------------------------------------------------------------------------------------------
# keys and shapes


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "name, cls", [("cavp", cavp.CAVP), ("ldm", ldm.LDM), ("classifier", align.Alignment)]
)
def test_keys_and_shapes(name, cls):
    with torch.device("meta"):
        model = cls()
    assert shapes(model) == rule.official_keys(name)


def test_evaluation_classifier_is_the_classifier_and_the_autoencoder():
    with torch.device("meta"):
        both = shapes(align.Alignment()) | {
            f"first_stage_model.{k}": v for k, v in shapes(vae.AutoencoderKL()).items()
        }
    assert both == rule.official_keys("eval_classifier")


# --------------------------------------------------------------------------------------------------
# CAVP


@pytest.fixture(scope="module")
def towers():
    return rule.fill(cavp.CAVP())


def pattern(frames):
    """(1, f, 3, 224, 224): a moving wave, so that neighbouring frames differ."""
    i = torch.arange(frames, dtype=torch.float64)[:, None, None, None]
    c = torch.arange(3, dtype=torch.float64)[:, None, None]
    y, x = torch.meshgrid(*[torch.arange(224, dtype=torch.float64) / 224] * 2, indexing="ij")
    v = 0.5 + 0.5 * torch.sin(
        2 * torch.pi * ((1 + c) * x + (0.5 + 0.25 * i) * y + 0.11 * i * i / 8)
    ) * torch.cos(0.7 * i + c)
    return v.float()[None]


VIDEOS = {
    "video16": lambda: rule.uniform("in.cavp.video16", 1, 16, 3, 224, 224),
    "video32": lambda: rule.uniform("in.cavp.video32", 1, 32, 3, 224, 224),
    "pattern16": lambda: pattern(16),
    "pattern32": lambda: pattern(32),
}
SPECTROGRAMS = {"spec512": (1, 128, 512), "spec256x2": (2, 128, 256)}


def check_features(name, raw):
    """Every variant of one clip's features, from the network's raw output (b, n, 512)."""
    golden = rule.recorded("cavp")
    rule.close(f"{name} raw", raw, golden[f"{name}.raw_nopool"])
    rule.close(f"{name} unit", cavp.finish(raw, 1, True), golden[f"{name}.norm_nopool"])
    pooled, official = cavp.finish(raw, 16, False), golden[f"{name}.raw_pool"]
    if pooled.ndim == 2:
        rule.close(f"{name} unit pooled", cavp.finish(raw, 16, True), golden[f"{name}.norm_pool"])
        rule.close(f"{name} pooled", pooled, official)
    else:  # two windows: the official code leaves them as (b, 512, 2) ...
        rule.close(f"{name} pooled", pooled, official.transpose(1, 2))
        rule.close(
            f"{name} official unit pooled",
            F.normalize(official, dim=-1),
            golden[f"{name}.norm_pool"],
        )
        unit = cavp.finish(
            raw, 16, True
        )  # ... and normalizes over the windows, not the features; ours are unit vectors
        assert torch.allclose(unit.norm(dim=-1), torch.ones(1, 2), atol=1e-5)
        rule.close(f"{name} unit pooled", unit, F.normalize(official.transpose(1, 2), dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("name", VIDEOS)
def test_cavp_video(towers, name):
    check_features(name, towers.encode_video(VIDEOS[name](), normalize=False))


@torch.no_grad()
@pytest.mark.parametrize("name", SPECTROGRAMS)
def test_cavp_audio(towers, name):
    mel = rule.uniform(f"in.cavp.{name}", *SPECTROGRAMS[name])
    check_features(name, towers.encode_audio(mel, normalize=False))
    rule.close(
        f"{name} unit, in one call",
        towers.encode_audio(mel),
        rule.recorded("cavp")[f"{name}.norm_nopool"],
    )


def test_cavp_temperature(towers):
    rule.close(
        "exp(logit_scale)", towers.logit_scale.exp(), rule.recorded("cavp")["logit_scale_exp"], 1e-6
    )


def test_cavp_loss():
    golden = rule.recorded("loss")
    video = rule.normal("in.loss.video", 12, 512)
    a, b = (
        F.normalize(video, dim=-1),
        F.normalize(video + 3 * rule.normal("in.loss.spec", 12, 512), dim=-1),
    )
    inter, intra = cavp.contrastive_loss(a, b, 1 / 0.07, clips=3)
    rule.close("L_inter", inter[None], golden["extra_contrast_loss"])
    rule.close("L_intra", intra[None], golden["intra_contrast_loss"])
    rule.close("L", (inter + intra)[None], golden["total_loss"])


TINY = cavp.CAVPConfig(size=32, video_width=8, video_blocks=(1, 1, 2, 1), audio_widths=(8,) * 6)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, cavp.PRESETS["mini"]], ids=["narrow paper", "mini"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_features_do_not_depend_on_chunks(config, chunk):
    model = rule.fill(cavp.CAVP(config))
    frames = (rule.uniform("clip", 40, 3, config.size, config.size) * 255).to(torch.uint8)
    whole = model.encode_video(frames[None].float() / 255)[0]
    rule.close(f"chunks of {chunk}", model.encode_clip(frames, chunk), whole, 1e-5)


@torch.no_grad()
def test_context_is_exactly_how_far_a_frame_reaches():
    model = rule.fill(cavp.CAVP(TINY))
    video = rule.uniform("reach", 1, 24, 3, 32, 32)
    other = video.clone()
    other[:, 12] += 1
    changed = (
        model.encode_video(video, normalize=False) != model.encode_video(other, normalize=False)
    ).any(-1)[0]
    reach = (torch.arange(24) - 12).abs()
    assert model.context == 3 and torch.equal(changed, reach <= 3)


@torch.no_grad()
@pytest.mark.parametrize(
    "kernel, stride",
    [((1, 7, 7), 2), ((1, 3, 3), 1), ((1, 3, 3), 2), ((3, 1, 1), 1), ((1, 1, 1), 2)],
)
def test_folded_convolution_is_the_3d_one(kernel, stride):
    unit = rule.fill(cavp.ConvUnit(6, 10, kernel, stride), "unit.")
    video = rule.uniform("folded", 2, 6, 5, 12, 14)  # (b, c, f, h, w)
    bn = unit.bn
    expected = F.batch_norm(
        unit.conv(video), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5
    )
    got = unit(video.transpose(1, 2).flatten(0, 1), frames=5).unflatten(0, (2, 5)).transpose(1, 2)
    rule.close(f"ConvUnit {kernel} stride {stride}", got, expected, 1e-6)


# --------------------------------------------------------------------------------------------------
# autoencoder, conditioners, schedule


@pytest.fixture(scope="module")
def autoencoder():
    return network(vae.AutoencoderKL, vae.VAEConfig(), "first_stage_model.")


@torch.no_grad()
def test_autoencoder_encode(autoencoder):
    golden = rule.recorded("vae")
    mean, logvar = autoencoder.encode(rule.uniform("in.vae.image", 1, 3, 128, 512))
    rule.close("encode mean", mean, golden["encode.mean"])
    rule.close("encode log-variance", logvar, golden["encode.logvar"])


@torch.no_grad()
def test_autoencoder_decode(autoencoder):
    """A latent as it is, and a sampler's result at the one scale."""
    golden = rule.recorded("sample")
    rule.close(
        "decode",
        autoencoder.decode(rule.normal("in.vae.latent", 1, 4, 16, 64)),
        rule.recorded("vae")["decode.image"],
    )
    sampled = autoencoder.decode(golden["dpm5.cfg4.5"] / ldm.LATENT_SCALE)[:, 0]
    rule.close("decode a sample", sampled, golden["dpm5.cfg4.5.decoded_channel0"])


@torch.no_grad()
@pytest.mark.parametrize(
    "name, width, prefix",
    [("ldm_cond", 768, "cond_stage_model."), ("cls_cond", 512, "cond_model.")],
)
def test_conditioners(name, width, prefix):
    golden = rule.recorded("cond")
    model = network(lambda c: ldm.Conditioner(512, c, 40), width, prefix)
    rule.close(name, model(rule.normal("in.cond.feat", 2, 32, 512)), golden[f"{name}.embed"])
    rule.close(
        f"{name} of zero features", model(torch.zeros(1, 32, 512)), golden[f"{name}.embed_of_zero"]
    )
    with pytest.raises(ValueError, match="41 frames"):
        model(torch.zeros(1, 41, 512))  # there are 40 positions


def test_schedule():
    golden, ours = rule.recorded("schedule"), ldm.make_schedule()
    names = [k for k in golden if "." not in k]
    assert len(names) == 9
    for name in names:
        rule.close(name, ours[name], golden[name], 1e-6)
    assert set(ours) <= set(rule.official_keys("ldm"))


# --------------------------------------------------------------------------------------------------
# U-Net, classifier, and a whole sampling run


@pytest.fixture(scope="module")
def unet():
    return network(ldm.UNet, ldm.UNetConfig(), "model.diffusion_model.")


@pytest.fixture(scope="module")
def classifier():
    return rule.fill(align.Alignment())


MINI_UNET = ldm.PRESETS["mini"]
MINI_CLASSIFIER = align.PRESETS["mini"]
INT_T, FLOAT_T = torch.tensor([10, 700]), torch.tensor([10.5, 699.25])


@torch.no_grad()
def test_time_embedding(unet):
    golden = rule.recorded("unet")
    rule.close(
        "time embedding, fractional",
        ldm.timestep_embedding(FLOAT_T, 320),
        golden["time_embedding_320"],
    )
    rule.close(
        "time embedding, through its MLP",
        unet.time_embed(ldm.timestep_embedding(INT_T, 320)),
        golden["time_embed_of_int_t"],
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name, t, zero",
    [("eps", INT_T, False), ("eps_float_t", FLOAT_T, False), ("eps_zero_context", INT_T, True)],
)
def test_unet(unet, name, t, zero):
    x, context = rule.normal("in.unet.x", 2, 4, 16, 64), rule.normal("in.unet.context", 2, 32, 768)
    rule.close(name, unet(x, t, context * (not zero)), rule.recorded("unet")[name])


@pytest.mark.parametrize(
    "path, project", [("trained_path", True), ("official_guidance_path", False)]
)
def test_classifier(classifier, path, project):
    golden = rule.recorded("classifier")
    x, features = rule.normal("in.cls.x", 2, 4, 16, 64), rule.normal("in.cls.feat", 2, 32, 512)
    asked = classifier if project else official.Unprojected(classifier)
    logit = asked.logit(x, INT_T, features)
    rule.close(f"{path} logit", logit, golden[f"{path}.logit"])
    rule.close(f"{path} probability", logit.sigmoid(), golden[f"{path}.prob"])
    log_prob = asked.log_prob(x, INT_T, features)
    rule.close(f"{path} log p", log_prob, golden[f"{path}.prob"].log())
    gradient = asked.grad_log_prob(x, INT_T, features)
    rule.close(f"{path} gradient", gradient, golden[f"{path}.grad_log_prob"])
    if project:
        rule.close(
            f"{path} probability at t 0",
            classifier(x, torch.zeros(2), features),
            golden[f"{path}.prob_t0"],
        )
    else:
        rule.close(
            f"{path} gradient, fractional t",
            asked.grad_log_prob(x, FLOAT_T, features),
            golden[f"{path}.grad_log_prob_float_t"],
        )


def test_log_probability_does_not_underflow(classifier):
    """A sigmoid below a logit of -104 is 0 in float32 and its logarithm's gradient NaN."""
    x, features = rule.normal("in.cls.x", 1, 4, 16, 64), rule.normal("in.cls.feat", 1, 32, 512)
    bias = classifier.model.classifier.bias.clone()
    try:
        classifier.model.classifier.bias -= 300
        assert classifier(x, INT_T[:1], features).item() == 0
        assert -310 < classifier.log_prob(x, INT_T[:1], features).item() < -290
        gradient = classifier.grad_log_prob(x, INT_T[:1], features)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    finally:
        classifier.model.classifier.bias.copy_(bias)


@torch.no_grad()
@pytest.mark.parametrize(
    "cg, project, name",
    [(50, False, "dpm5.cfg4.5.cg50"), (5000, True, "dpm5.cfg4.5.cg5000.with_cond_model")],
)
def test_sampling_with_the_full_networks(unet, classifier, cg, project, name):
    """The official demo's guidance as it is; and the classifier used as it was trained, at a scale
    where nothing else matters."""
    golden = rule.recorded("sample")
    x, features = (
        rule.normal("in.sample.x_T", 1, 4, 16, 64),
        rule.normal("in.sample.feat", 1, 32, 512),
    )
    context = network(lambda c: ldm.Conditioner(512, c, 40), 768, "cond_stage_model.")(features)
    asked = classifier if project else official.Unprojected(classifier)
    eps_fn = diffusion.guided_eps(
        unet, context, torch.zeros_like(context), 4.5, asked, features, cg
    )
    rule.close(name, diffusion.dpm_solver(eps_fn, x, 5), golden[name])


# --------------------------------------------------------------------------------------------------
# bfloat16: what `sample.py` uses on a GPU, and on a CPU that computes in it


def rounded(model):
    """A copy with every weight rounded."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    return other.eval().requires_grad_(False)


@torch.no_grad()
def test_bfloat16_stages(towers, autoencoder, unet, classifier):
    """Stated rather than gated: the bound only tells rounding from a mistake."""

    def close(name, ours, official, bound=0.05):
        rule.close(f"bfloat16 {name}", ours.float(), official, bound)

    video = pattern(32)
    folded = cavp.CAVP()
    folded.load_state_dict(towers.state_dict())
    folded = folded.eval().fold().bfloat16()
    close(
        "CAVP video",
        folded.encode_video(video.bfloat16()),
        rule.recorded("cavp")["pattern32.norm_nopool"],
    )
    mel = rule.uniform("in.cavp.spec512", *SPECTROGRAMS["spec512"])
    close(
        "CAVP audio",
        rounded(towers).encode_audio(mel.bfloat16()),
        rule.recorded("cavp")["spec512.norm_nopool"],
    )
    small = rounded(autoencoder)
    close(
        "encode mean",
        small.encode(rule.uniform("in.vae.image", 1, 3, 128, 512).bfloat16())[0],
        rule.recorded("vae")["encode.mean"],
    )
    close(
        "decode",
        small.decode(rule.normal("in.vae.latent", 1, 4, 16, 64).bfloat16()),
        rule.recorded("vae")["decode.image"],
    )
    x, features = rule.normal("in.cls.x", 2, 4, 16, 64), rule.normal("in.cls.feat", 2, 32, 512)
    alignment, golden = rounded(classifier), rule.recorded("classifier")
    close("classifier probability", alignment(x, INT_T, features), golden["trained_path.prob"])
    close(
        "classifier gradient",
        alignment.grad_log_prob(x, INT_T, features),
        golden["trained_path.grad_log_prob"],
        0.2,
    )
    net, x = rounded(unet), rule.normal("in.unet.x", 2, 4, 16, 64)
    close(
        "U-Net",
        net(x, INT_T, rule.normal("in.unet.context", 2, 32, 768)),
        rule.recorded("unet")["eps"],
    )
    x, features = (
        rule.normal("in.sample.x_T", 1, 4, 16, 64),
        rule.normal("in.sample.feat", 1, 32, 512),
    )
    context = network(lambda c: ldm.Conditioner(512, c, 40), 768, "cond_stage_model.")(features)
    asked = official.Unprojected(alignment)
    eps = diffusion.guided_eps(net, context, torch.zeros_like(context), 4.5, asked, features, 50)
    close(
        "five guided steps",
        diffusion.dpm_solver(eps, x, 5),
        rule.recorded("sample")["dpm5.cfg4.5.cg50"],
    )


# --------------------------------------------------------------------------------------------------
# the same numbers with less work

NARROW = ldm.UNetConfig(width=32, context_dim=16, groups=8)


@torch.no_grad()
def test_plain_readings_agree():
    """What `speed.py` compares with is the same networks."""
    towers, video = rule.fill(cavp.CAVP(TINY)), rule.uniform("video", 2, 6, 3, 32, 32)
    plain = plainly(copy.deepcopy(towers)).encode_video(video)
    rule.close("CAVP video", towers.encode_video(video), plain, 1e-5)
    rule.close("CAVP video, norms folded", towers.fold().encode_video(video), plain, 1e-5)
    unet = rule.fill(ldm.UNet(NARROW), "model.diffusion_model.")
    inputs = rule.normal("x", 2, 4, 16, 16), FLOAT_T, rule.normal("context", 2, 5, 16)
    rule.close("U-Net", unet(*inputs), plainly(copy.deepcopy(unet))(*inputs), 1e-5)
    autoencoder, z = (
        rule.fill(vae.AutoencoderKL(vae.VAEConfig(width=16, groups=8))),
        rule.normal("z", 1, 4, 16, 16),
    )
    rule.close(
        "decoder", autoencoder.decode(z), plainly(copy.deepcopy(autoencoder)).decode(z), 1e-5
    )


@torch.no_grad()
def test_frames_at_once_change_nothing(monkeypatch):
    towers, video = rule.fill(cavp.CAVP(TINY)), rule.uniform("video", 1, 7, 3, 32, 32)
    together = towers.encode_video(video)
    monkeypatch.setattr(cavp, "FRAMES_AT_ONCE", 100)
    rule.close("all frames at once", towers.encode_video(video), together, 1e-6)


def test_a_clip_prepares_its_condition_once():
    """Keys and values of every cross-attention, the conditioners and the time embeddings: once for
    all steps and both guidances."""
    calls = collections.Counter()
    unet, classifier = (
        rule.fill(ldm.UNet(NARROW), "model.diffusion_model."),
        rule.fill(align.Alignment(MINI_CLASSIFIER)),
    )
    fast.optimise(unet)
    fast.optimise(classifier.model)
    watched = [
        m
        for net in (unet, classifier)
        for block in net.modules()
        if isinstance(block, ldm.TransformerBlock)
        for m in (block.attn2.to_k, block.attn2.to_v)
    ] + [classifier.cond_model, unet.time_embed, classifier.model.time_embed]
    for module in watched:
        module.register_forward_hook(lambda m, *_: calls.update([m]))
    context, features = rule.normal("context", 1, 128, 16), rule.normal("features", 1, 128, 512)
    null_context, times = torch.zeros_like(context), diffusion.solver_times(3)
    eps = fast.guided(
        unet, context, null_context, 4.5, classifier, features, 15.0, times, diffusion.sigma
    )
    diffusion.dpm_solver(eps, rule.normal("x", 1, 4, 16, 64), 3)
    assert len(watched) > 20 and all(calls[m] == 1 for m in watched)


# --------------------------------------------------------------------------------------------------
# in and out of the latents

MINI_UNET = ldm.PRESETS["mini"]
MINI_CLASSIFIER = align.PRESETS["mini"]


@torch.no_grad()
def test_calibration_keeps_the_sound_and_scales_the_latents():
    model = rule.fill(vae.AutoencoderKL(vae.PRESETS["mini"]))
    mel = rule.uniform("mel", 3, 1, 128, 128)
    before, logvar = model.encode(mel)
    decoded = model.decode(before)
    model.calibrate(before.mean((0, 2, 3)), before.std((0, 2, 3)))
    after, logvar_after = model.encode(mel)
    rule.close("decoded after calibration", model.decode(after), decoded, 1e-5)
    assert after.mean((0, 2, 3)).abs().max() < 1e-4
    rule.close("latent deviation", after.std((0, 2, 3)) * ldm.LATENT_SCALE, torch.ones(4), 1e-5)
    # the posterior's spread moves with the latents
    rule.close(
        "spread",
        (logvar_after / 2).exp() / after.std((0, 2, 3), keepdim=True),
        (logvar / 2).exp() / before.std((0, 2, 3), keepdim=True),
        1e-5,
    )


@torch.no_grad()
def test_ldm_decode_is_the_first_channel_clamped():
    model = rule.fill(ldm.LDM(MINI_UNET)).eval()
    z = 3 * rule.normal("z", 2, 4, 16, 64)
    raw = model.vae.decode(z / 0.18215)[:, 0]
    assert raw.min() < 0 and raw.max() > 1
    assert model.decode(z).shape == (2, 128, 512) and torch.equal(model.decode(z), raw.clamp(0, 1))


@torch.no_grad()
def test_null_context_is_the_conditioner_of_zero_features():
    model = rule.fill(ldm.LDM(MINI_UNET))
    assert torch.equal(model.null_context(128), model.conditioner(torch.zeros(1, 128, 512)))
    assert model.null_context(128).abs().max() > 0
