"""What only a GPU can show: the kernels as it runs them, recorded steps, the second stream.

python -m pytest -m gpu
"""

import copy

import pytest
import torch
from bounds import check_kernel, rms
from golden import rule

import diffusion
import kernels
import ldm
from align import Alignment, AlignmentConfig
from common import audio
from kernels import attention, fast, group_norm, transformer
from tools.plain import Cached

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = [(320, 16, 64), (640, 8, 32), (1280, 4, 16), (1280, 2, 8)]
UNET = ldm.UNetConfig(
    width=64, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=2, context_dim=32, groups=16
)


@pytest.fixture(autouse=True)
def insist():
    kernels.choose("triton")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    kernels.choose("auto")


def as_exact(run, reference, *tensors, offset=0.0):
    """Output and all gradients of `run` against the reference in float64; `offset` is how many
    deviations the inputs are from 0."""

    def results(function, dtype):
        own = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = function(*own)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(
            out.shape
        )
        return [out, *torch.autograd.grad(out, own, weights.to(dtype))]

    dtype = tensors[0].dtype
    exact = results(reference, torch.float64)
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, ours, theirs, truth in zip(
        names, results(run, dtype), results(reference, dtype), exact, strict=True
    ):
        assert ours.dtype == dtype
        check_kernel(name, ours, theirs, truth, magnitude=offset * rms(truth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c, h, w", LEVELS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_norm(c, h, w, dtype, layout):
    x = (rule.normal("x", 2, c, h, w) + 10).to("cuda", dtype).to(memory_format=layout)
    weight, bias, add = (
        rule.normal(n, *s).to("cuda", dtype)
        for n, s in (("weight", (c,)), ("bias", (c,)), ("add", (2, c)))
    )
    as_exact(
        lambda x, w, b, a: group_norm.group_norm(x, w, b, 32, 1e-5, True, a),
        lambda x, w, b, a: group_norm.group_norm_ref(x, w, b, 32, 1e-5, True, a),
        x,
        weight,
        bias,
        add,
        offset=10,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c, h, w", LEVELS)
@pytest.mark.parametrize("keys", [None, 32, 77])
def test_attention(c, h, w, keys, dtype):
    n, m = h * w, keys or h * w
    q, k, v = (
        rule.normal(name, 2, rows, 8, c // 8).to("cuda", dtype)
        for name, rows in (("q", n), ("k", m), ("v", m))
    )
    as_exact(attention.attention, attention.attention_ref, q, k, v)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_kernels(dtype):
    x, y = (rule.normal(n, 2, 1024, 320).to("cuda", dtype) for n in "xy")
    weight, bias = (rule.normal(n, 320).to("cuda", dtype) for n in ("weight", "bias"))
    for run, reference, inputs in (
        (transformer.add_layer_norm, transformer.add_layer_norm_ref, (x, y, weight, bias)),
        (lambda h: [transformer.geglu(h)], lambda h: [transformer.geglu_ref(h)], (x,)),
    ):
        exact = reference(*(t.double() for t in inputs))
        for ours, theirs, truth in zip(run(*inputs), reference(*inputs), exact, strict=True):
            check_kernel("output", ours, theirs, truth)


def small_networks(dtype):
    """Plain and optimised: U-Net, classifier."""
    config = AlignmentConfig(frames=32, positions=32, feature_dim=16, unet=UNET)
    unet = rule.fill(ldm.UNet(UNET), "model.diffusion_model.").to("cuda", dtype)
    align = rule.fill(Alignment(config)).to("cuda", dtype)
    fused, fused_align = copy.deepcopy(unet), copy.deepcopy(align)
    fast.optimise(fused)
    fast.optimise(fused_align.model)
    return unet, align, fused, fused_align


def conditions(name, clips):
    return (
        rule.normal(f"{name} x", clips, 4, 16, 64).cuda(),
        rule.normal(f"{name} context", clips, 32, 32).cuda(),
        rule.normal(f"{name} features", clips, 32, 16).cuda(),
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_a_recorded_run_is_the_plain_one(sampler, dtype, bound):
    """Kernels, graph and second stream together, against torch's own kernels call by call; a second
    clip through the same graph too, and the first one again after it."""
    unet, align, fused, fused_align = small_networks(dtype)
    draw, times = diffusion.SAMPLERS[sampler], diffusion.TIMES[sampler](5)

    def recorded(x, context, features):
        null_context = torch.zeros_like(context)
        eps = fast.guided(
            fused, context, null_context, 4.5, fused_align, features, 15.0, times, diffusion.sigma
        )
        return eps, x

    clips = [conditions(name, 2) for name in ("one", "two")]
    made = [recorded(*clip) for clip in clips]
    ours = [(clip, draw(*made[clip], 5).clone()) for clip in (0, 1, 0)]
    assert len(fused.recorded) == 1
    assert all(kept.graphs is not None for kept in fused.recorded.values())
    kernels.choose("torch")
    for clip, run in ours:
        x, context, features = clips[clip]
        null_context = torch.zeros_like(context)
        eps = diffusion.guided_eps(unet, context, null_context, 4.5, align, features, 15.0)
        rule.close(f"{sampler} {dtype} clip {clip}", run.cpu(), draw(eps, x, 5).cpu(), bound)


@torch.no_grad()
def test_a_recorded_run_computes_the_deep_half_of_every_second_step():
    unet, align, fused, fused_align = small_networks(torch.float32)
    times = diffusion.solver_times(6)
    clips = [conditions(name, 2) for name in ("one", "two", "one")]
    ours = []
    for x, context, features in clips:
        given = (context, torch.zeros_like(context), 4.5, fused_align, features, 15.0)
        eps = fast.guided(fused, *given, times, diffusion.sigma, deep_every=2)
        ours.append(diffusion.dpm_solver(eps, x, 6).clone())
    assert [len(kept.graphs) for kept in fused.recorded.values()] == [2]
    kernels.choose("torch")
    for (x, context, features), run in zip(clips, ours, strict=True):
        given = (context, torch.zeros_like(context), 4.5, align, features, 15.0)
        plain = diffusion.guided_eps(Cached(unet), *given)
        rule.close("run", run.cpu(), diffusion.dpm_solver(plain, x, 6).cpu(), 1e-4)


@torch.no_grad()
def test_shapes_have_graphs_of_their_own_and_few_are_kept():
    _, _, fused, _ = small_networks(torch.float32)
    for clips in (1, 2, 3, 1, 4, 5):
        x, context, _ = conditions("shape", clips)
        eps = fast.guided(
            fused, context, torch.zeros_like(context), 4.5, times=diffusion.solver_times(2)
        )
        assert diffusion.dpm_solver(eps, x, 2).isfinite().all()
        assert len(fused.recorded) <= fast.KEPT
    assert len({x[-2][0] for x in fused.recorded}) == fast.KEPT


@torch.no_grad()
def test_a_time_that_was_not_prepared_stops_a_recorded_run():
    _, _, fused, _ = small_networks(torch.float32)
    x, context, _ = conditions("times", 1)
    eps = fast.guided(fused, context, None, 1.0, times=diffusion.solver_times(5))
    first = diffusion.dpm_solver(eps, x, 5)
    with pytest.raises(ValueError, match="not among the 5 that this condition was prepared for"):
        diffusion.dpm_solver(eps, x, 7)
    assert torch.equal(diffusion.dpm_solver(eps, x, 5), first)


def test_vocoder():
    mel = torch.rand(128, 700, generator=torch.Generator().manual_seed(0)) * 0.7
    ours, theirs = audio.vocode(mel.cuda(), iterations=4).cpu(), audio.vocode(mel, iterations=4)
    rule.close("vocoder", ours, theirs, 1e-4)
