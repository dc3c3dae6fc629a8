"""What only a GPU can show: the kernels as it runs them, recorded steps, the second stream.    python -m pytest -m gpu"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import kernels
import ldm
from bounds import check_kernel, rms
from golden import rule
from kernels import attention, group_norm, solver, transformer

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
    """Output and all gradients of `run` against the reference in float64; `offset` is how many deviations the inputs are from 0."""

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
        for ours, theirs, truth in zip(run(*inputs), reference(*inputs), exact):
            check_kernel("output", ours, theirs, truth)


@torch.no_grad()
def test_solver():
    x, eps, previous, row = (
        rule.normal(n, *s).cuda()
        for n, s in (
            ("x", (1, 4, 16, 64)),
            ("e", (1, 4, 16, 64)),
            ("p", (1, 4, 16, 64)),
            ("r", (5,)),
        )
    )
    for ours, theirs in zip(
        solver.multistep(x, eps, previous, row), solver.multistep_ref(x, eps, previous, row)
    ):
        rule.close("multistep", ours.cpu(), theirs.cpu(), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("sampler", list(ldm.SAMPLERS))
def test_a_recorded_run_is_the_plain_one(sampler, dtype, bound):
    """Kernels, graph and second stream together, against torch's own kernels call by call; a second run with the same graph too."""
    unet = rule.fill(ldm.UNet(UNET), "model.diffusion_model.").to("cuda", dtype)
    align = rule.fill(
        ldm.Alignment(ldm.AlignmentConfig(frames=32, positions=32, feature_dim=16, unet=UNET))
    ).to("cuda", dtype)
    x, context, features = (
        rule.normal(n, *s).cuda()
        for n, s in (("x", (2, 4, 16, 64)), ("c", (2, 32, 32)), ("f", (2, 32, 16)))
    )
    eps = ldm.guided_eps(
        unet,
        context,
        torch.zeros_like(context),
        4.5,
        align,
        features,
        15.0,
        times=ldm.TIMES[sampler](5),
    )
    recorded = ldm.Replayed(eps)
    ours = [ldm.SAMPLERS[sampler](recorded, x, 5).clone() for _ in range(2)]
    assert recorded.graph
    kernels.choose("torch")
    plain = ldm.SAMPLERS[sampler](
        ldm.guided_eps(unet, context, torch.zeros_like(context), 4.5, align, features, 15.0), x, 5
    )
    for run in ours:
        rule.close(f"{sampler} {dtype}", run.cpu(), plain.cpu(), bound)


# what is recorded for the times 999 and 500 is asked for 250
UNPREPARED = """
import torch, ldm
torch.set_grad_enabled(False)
unet = ldm.UNet(ldm.UNetConfig(width=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_dim=32, groups=16)).cuda()
known = unet.prepare(torch.zeros(1, 32, 32, device="cuda"), torch.tensor([999.0, 500.0]))
eps = ldm.Replayed(lambda x, t: unet(x, t, known))
x = torch.zeros(1, 4, 16, 64, device="cuda")
eps(x, torch.tensor([500.0], device="cuda"))
assert eps.graph
torch.cuda.synchronize()
print("recorded", flush=True)
eps(x, torch.tensor([250.0], device="cuda"))
torch.cuda.synchronize()
print("went on")
"""


def test_a_time_that_was_not_prepared_stops_a_recorded_run():
    """In a process of its own: an assertion on the device ends what runs on it."""
    done = subprocess.run(
        [sys.executable, "-c", UNPREPARED],
        cwd=Path(ldm.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "recorded" in done.stdout and "went on" not in done.stdout


@torch.no_grad()
def test_a_sampler_of_other_times_is_refused_before_it_begins():
    unet = rule.fill(ldm.UNet(UNET), "model.diffusion_model.").cuda()
    x, context = rule.normal("x", 1, 4, 16, 64).cuda(), rule.normal("c", 1, 32, 32).cuda()
    recorded = ldm.Replayed(ldm.guided_eps(unet, context, None, 1.0, times=ldm.TIMES["dpm"](5)))
    first = ldm.dpm_solver(recorded, x, 5)
    with pytest.raises(ValueError, match="not among the 5 that eps was prepared for"):
        ldm.dpm_solver(recorded, x, 7)
    assert torch.equal(ldm.dpm_solver(recorded, x, 5), first)


def test_vocoder():
    mel = torch.rand(128, 700, generator=torch.Generator().manual_seed(0)) * 0.7
    ours, theirs = data.vocode(mel.cuda(), iterations=4).cpu(), data.vocode(mel, iterations=4)
    rule.close("vocoder", ours, theirs, 1e-4)
