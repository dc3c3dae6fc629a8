"""kernels/fast.py: optimised networks give the plain ones' numbers, and a recorded step serves all
clips of its shape. Without a GPU: where one would record, a stand-in runs the step again."""

import copy
import functools
from dataclasses import replace

import pytest
import tiny
import torch
from golden import rule

import diffusion
import ldm
import sample
from align import PRESETS as ALIGN_PRESETS
from align import Alignment, AlignmentConfig
from common.profiling import Profile
from kernels import fast
from tools.plain import Cached

PUBLISHED = ldm.UNetConfig(width=32, context_dim=24, groups=8)
FORMS = {  # the paper's depths, narrow, and the mini preset's
    "published": (
        PUBLISHED,
        replace(AlignmentConfig().unet, width=32, context_dim=24, groups=8),
    ),
    "mini": (ldm.PRESETS["mini"].unet, ALIGN_PRESETS["mini"].unet),
    "tiny": (tiny.UNET, tiny.UNET),
}


@functools.cache
def networks(form):
    """U-Net and classifier, not to be changed."""
    unet, classifier = FORMS[form]
    config = AlignmentConfig(positions=128, feature_dim=24, unet=classifier)
    unet = rule.fill(ldm.UNet(unet), "model.diffusion_model.")
    return unet, rule.fill(Alignment(config))


def clip(name, unet, count=2):
    """x, context, features"""
    frames = 16 * max(1, unet.config.aligned)
    return (
        rule.normal(f"{name}.x", count, 4, 16, 16),
        rule.normal(f"{name}.context", count, frames, unet.config.context_dim),
        rule.normal(f"{name}.features", count, frames, 24),
    )


def optimised(unet, align):
    unet, align = copy.deepcopy(unet), copy.deepcopy(align)
    assert fast.optimise(unet) is unet and fast.optimise(unet) is unet
    fast.optimise(align.model)
    return unet, align


def guided(unet, align, context, features, times, cg=15.0, cfg=4.5):
    null_context = torch.zeros_like(context[:1])
    return fast.guided(
        unet, context, null_context, cfg, align, features, cg, times, diffusion.sigma
    )


@torch.no_grad()
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("form", ["published", "mini"])
def test_optimised_networks_give_the_same_numbers(form, deferred):
    unet, align = networks(form)
    fused, fused_align = optimised(unet, align)
    if deferred:  # as on a GPU
        fused.defer_biases()
        fused_align.model.defer_biases()
    x, context, features = clip("one", unet)
    t = torch.tensor([500.5, 3.0])
    rule.close("U-Net", fused(x, t, context), unet(x, t, context), 1e-5)
    rule.close("logit", fused_align.logit(x, t, features), align.logit(x, t, features), 1e-5)
    ours, plain = (a.grad_log_prob(x, t, features) for a in (fused_align, align))
    rule.close("gradient", ours, plain, 1e-5)
    times = diffusion.solver_times(3)
    known = fused.prepare(context, times)
    rows = times[[2, 0]]
    rule.close("prepared", fused(x, rows, known), unet(x, rows, context), 1e-5)
    for cfg, cg in ((4.5, 15.0), (1, 15.0), (2.5, 0.0)):
        ours = guided(fused, fused_align, context, features, times, cg, cfg)
        plain = diffusion.guided_eps(
            unet, context, torch.zeros_like(context[:1]), cfg, align, features, cg
        )
        made, expected = (diffusion.dpm_solver(eps, x, 3) for eps in (ours, plain))
        rule.close(f"three steps, cfg {cfg}, cg {cg}", made, expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cfg", [1, 2.5])
def test_what_is_left_open_in_one_context_is_emphasized_alike(cfg):
    unet, align = networks("tiny")
    fused, fused_align = optimised(unet, align)
    x, context, features = clip("one", unet)
    opened = context.clone()
    opened[..., : context.shape[2] // 2] = 0
    times = diffusion.solver_times(3)
    null = torch.zeros_like(context[:1])
    plain = diffusion.guided_eps(unet, context, null, cfg, align, features, 15.0, opened, 3.0)
    ours = fast.guided(
        *(fused, context, null, cfg, fused_align, features, 15.0, times, diffusion.sigma),
        open_context=opened,
        emphasis=3.0,
    )
    ends = [diffusion.dpm_solver(eps, x, 3) for eps in (ours, plain)]
    rule.close("three steps", *ends, 1e-5)
    # it is something else than without
    without = guided(fused, fused_align, context, features, times, 15.0, cfg)
    assert (diffusion.dpm_solver(without, x, 3) - ends[0]).norm() > 0.01 * ends[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("name, cfg", [("tiny", 2.5), ("tiny", 1), ("mini", 2.5)])
def test_the_deep_half_of_every_second_step(name, cfg):
    """The same latents as the plain networks give whose deep half is kept, and half of the work."""
    unet, align = networks(name)
    fused, fused_align = optimised(unet, align)
    x, context, features = clip("one", unet)
    null = torch.zeros_like(context[:1])
    times = diffusion.solver_times(5)
    deep_calls = []
    fused.middle_block.register_forward_hook(lambda *_: deep_calls.append(1))
    eps = fast.guided(
        *(fused, context, null, cfg, fused_align, features, 15.0, times, diffusion.sigma),
        deep_every=2,
    )
    first = diffusion.dpm_solver(eps, x, 5)
    assert len(deep_calls) == 3
    # another run begins with all of the network, too
    assert torch.equal(diffusion.dpm_solver(eps, x, 5), first)
    plain = diffusion.guided_eps(Cached(unet), context, null, cfg, align, features, 15.0)
    rule.close("five steps", first, diffusion.dpm_solver(plain, x, 5), 1e-5)
    every = diffusion.guided_eps(unet, context, null, cfg, align, features, 15.0)
    assert (first - diffusion.dpm_solver(every, x, 5)).norm() > 1e-4 * first.norm()


@torch.no_grad()
def test_networks_that_are_not_optimised_are_called_as_they_are():
    unet, align = networks("tiny")
    x, context, features = clip("one", unet)
    times = diffusion.solver_times(2)
    plain = diffusion.guided_eps(
        unet, context, torch.zeros_like(context), 4.5, align, features, 15.0
    )
    ours = guided(unet, align, context, features, times)
    rule.close("plain", diffusion.dpm_solver(ours, x, 2), diffusion.dpm_solver(plain, x, 2), 1e-6)


def test_what_has_no_fused_form_is_said():
    with pytest.raises(ValueError, match="LDM: no fused form of it is known"):
        fast.optimise(ldm.LDM(ldm.PRESETS["mini"]))
    with pytest.raises(ValueError, match="ResBlock: no fused form"):
        fast.optimise(ldm.ResBlock(8, 8, 8, 4))


@torch.no_grad()
def test_one_step_has_one_time():
    unet, align = networks("tiny")
    fused, _ = optimised(unet, align)
    x, context, _ = clip("one", unet)
    eps = fast.guided(fused, context, None, 1.0, times=[3, 500])
    with pytest.raises(ValueError, match="at one time for all latents"):
        eps(x, torch.tensor([500.0, 3.0]))


@pytest.fixture
def untried():
    """What this torch can do is found out anew, now and after the test."""
    fast._packing_works.cache_clear()
    yield
    fast._packing_works.cache_clear()


@pytest.mark.skipif(not fast.can_pack(torch.float32), reason="no oneDNN here")
@pytest.mark.parametrize(
    "owner, name",
    [
        (torch.ops.mkldnn, "_convolution_pointwise"),
        (torch.ops.mkldnn, "_linear_pointwise"),
        (torch.ops.mkldnn, "_reorder_linear_weight"),
        (torch._C._nn, "mkldnn_reorder_conv2d_weight"),
        (fast, "PACKED_SINCE"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_torch_without_the_private_operations_uses_its_own(untried, monkeypatch, owner, name):
    def other(weight):
        raise TypeError("takes 1 positional argument")

    unet, _ = networks("tiny")
    x, context, _ = clip("one", unet)
    t = torch.tensor([500.5, 3.0])
    monkeypatch.setattr(owner, name, (99,) if name == "PACKED_SINCE" else other)
    assert not fast.can_pack(torch.float32)
    with torch.no_grad():
        fused = fast.optimise(copy.deepcopy(unet))
        rule.close("U-Net", fused(x, t, context), unet(x, t, context), 1e-5)
    assert not any(weight.is_mkldnn for weight in fused.parameters())


def test_looking_for_the_private_operations_draws_no_random_number(untried):
    state = torch.get_rng_state()
    fast.can_pack(torch.float32)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------
# recording


@pytest.fixture
def records(monkeypatch):
    """What is recorded, and how often it is replayed, on a machine that cannot."""
    made = []

    def record(function, device):
        result = function()
        made.append(0)
        place = len(made) - 1

        def replay():
            made[place] += 1
            result.copy_(function())

        return result, replay

    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr(fast, "recordable", lambda x: True)
    return made


@torch.no_grad()
@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_a_recorded_step_serves_all_clips(records, sampler):
    unet, align = networks("tiny")
    fused, fused_align = optimised(unet, align)
    draw, times = diffusion.SAMPLERS[sampler], diffusion.TIMES[sampler](2)
    clips = [clip(name, unet) for name in ("one", "two", "three")]
    eps = [guided(fused, fused_align, c, f, times) for _, c, f in clips]
    expected = [
        draw(diffusion.guided_eps(unet, c, torch.zeros_like(c), 4.5, align, f, 15.0), x, 2)
        for x, c, f in clips
    ]
    for k in (0, 1, 0, 2, 1, 0):  # also those that lost their place to another one
        rule.close(f"clip {k}", draw(eps[k], clips[k][0], 2), expected[k], 1e-5)
    assert len(records) == 1 and records[0] == 6 * (3 if sampler == "plms" else 2)
    # step by step in turns
    t = torch.full((2,), float(times[-1]))
    first = [eps[k](clips[k][0], t) for k in (0, 1, 0)]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


@torch.no_grad()
def test_recorded_steps_in_turns_do_not_go_on_from_another_clips_map(records):
    unet, align = networks("tiny")
    fused, _ = optimised(unet, align)
    times = diffusion.solver_times(3)
    clips = [clip(name, unet) for name in ("one", "two")]

    def both():
        return [fast.guided(fused, c, None, 1, times=times, deep_every=2) for _, c, _ in clips]

    def step(eps, k, x):
        t = torch.full((2,), float(times[k]))
        return eps(x, t)

    # each alone: a deep step, a shallow one
    alone = []
    for eps, (x, _, _) in zip(both(), clips, strict=True):
        step(eps, 0, x)
        alone.append(step(eps, 1, x))
    assert len(records) == 2
    # in turns, all of the network is computed after a change of clips
    one, two = both()
    step(one, 0, clips[0][0])
    step(two, 0, clips[1][0])
    deep = fast.guided(fused, clips[0][1], None, 1, times=times)
    assert torch.equal(step(one, 1, clips[0][0]), step(deep, 1, clips[0][0]))
    assert not torch.equal(step(one, 1, clips[0][0]), alone[1])


@torch.no_grad()
def test_a_step_is_recorded_anew_only_for_what_changes_it(records):
    unet, align = networks("tiny")
    fused, fused_align = optimised(unet, align)

    def draw(count=2, steps=2, cfg=4.5, cg=15.0):
        x, context, features = clip("one", unet, count)
        times = diffusion.solver_times(steps)
        eps = guided(fused, fused_align, context, features, times, cg, cfg)
        diffusion.dpm_solver(eps, x, steps)
        return len(records)

    assert [draw(), draw(), draw(count=1), draw(), draw(count=1)] == [1, 1, 2, 2, 2]
    assert [draw(cfg=2.0), draw(cg=0.0), draw(), draw(cfg=2.0)] == [3, 4, 4, 4]
    assert [draw(steps=3), len(fused.recorded)] == [5, fast.KEPT]
    assert draw() == 6  # the oldest one went


@torch.no_grad()
def test_what_cannot_be_recorded_runs_and_says_so_once(records, monkeypatch):
    unet, align = networks("tiny")
    fused, fused_align = optimised(unet, align)

    def refuse(function, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(fast, "record", refuse)
    clips = [clip(name, unet) for name in ("one", "two")]
    eps = [guided(fused, fused_align, c, f, diffusion.solver_times(2)) for _, c, f in clips]
    with pytest.warns(UserWarning, match="without a CUDA graph .operation not permitted.") as said:
        made = [diffusion.dpm_solver(eps[k], clips[k][0], 2) for k in (0, 1, 0)]
    assert len(said) == 1 and torch.equal(made[0], made[2])
    for k in (0, 1):
        x, c, f = clips[k]
        plain = diffusion.guided_eps(unet, c, torch.zeros_like(c), 4.5, align, f, 15.0)
        rule.close(f"clip {k}", made[k], diffusion.dpm_solver(plain, x, 2), 1e-5)


@torch.no_grad()
def test_windows_of_all_clips_share_the_recorded_steps(records):
    """`sample.denoise` of two films: two windows at once and a remainder of one, of either."""
    config = ldm.LDMConfig(**tiny.TIME, unet=tiny.UNET, vae=tiny.VAE)
    classifier = AlignmentConfig(**tiny.TIME, unet=tiny.UNET)
    model, align = rule.fill(ldm.LDM(config)), rule.fill(Alignment(classifier))
    fast.optimise(model.unet)
    fast.optimise(align.model)
    models = sample.Models(None, model, align)
    for k in range(2):
        features = rule.normal(f"film {k}", 300, tiny.TIME["feature_dim"])
        starts = [0, 65536, 131072]
        settings = sample.Settings(seed=k, steps=2).resolve(models)
        film = sample.Clip(f"film {k}", 0.0, None, 16.4, Profile(), starts, features, features)
        windows = film.windows(settings)
        sample.denoise(windows[:2], models, settings)
        sample.denoise(windows[2:], models, settings)
    assert len(records) == 2 and records == [4, 4]
