"""Fused GroupNorm in the interpreter, output and every gradient, against float64: as near as
torch's own (`bounds.check_kernel`).

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_group_norm.py
"""

import types

import pytest
import torch
from bounds import check_kernel, rms
from golden import rule
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import group_norm
from kernels.launch import recording

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # of a sigmoid that is 0 for that
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


@pytest.fixture(autouse=True)
def insist():
    """A kernel that fails is then an error, not a fallback."""
    kernels.choose("triton")
    yield
    kernels.choose("auto")


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """The interpreter patches triton.language again at every call of a device function, 3 ms; once
    a launch will do."""
    from triton.runtime import interpreter

    tl, patch = group_norm.tl, interpreter._patch_lang
    whole = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patch(whole))
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k)
    )


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "sliced": lambda x: channels_last(torch.cat([x + 1, x], 1))[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: channels_last(x[:1]).expand(x.shape),
}


def draw(name, shape, dtype, layout="contiguous", offset=0.0):
    return LAYOUTS[layout]((rule.normal(name, *shape) + offset).to(dtype))


def results(function, x, weight, bias, add, skip, groups, silu, upstream, dtype=None):
    """Output, and gradients of all that is there; dtype None: everything as it is."""
    tensors = x, weight, bias, add, skip = [
        t if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (x, weight, bias, add, skip)
    ]
    y = function(x, weight, bias, groups, 1e-5, silu, add, skip)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], upstream.to(y.dtype))]


def check(
    shape, groups, dtype, layout="contiguous", offset=0.0, silu=True, weights=None, add=False, c2=0
):
    """shape: of x and skip together."""
    (b, c, *spatial), weights = shape, weights or dtype
    x = draw("x", (b, c - c2, *spatial), dtype, layout, offset)
    skip = draw("skip", (b, c2, *spatial), dtype, layout, offset) if c2 else None
    weight, bias = (draw(name, (c,), weights) for name in ("weight", "bias"))
    add = draw("add", (b, c), dtype) if add else None
    upstream = draw(
        "upstream", shape, dtype, "channels_last" if layout == "channels_last" else "contiguous"
    )
    given = x, weight, bias, add, skip, groups, silu, upstream
    exact = results(group_norm.group_norm_ref, *given, torch.float64)
    theirs, ours = (
        results(group_norm.group_norm_ref, *given),
        results(group_norm.group_norm, *given),
    )
    sources = [t for t in (x, x, weight, bias, add, skip) if t is not None]  # the output's is x
    names = ["output", *(f"gradient {i}" for i in range(len(exact) - 1))]
    for name, own, their, truth, source in zip(names, ours, theirs, exact, sources, strict=True):
        assert own.dtype == source.dtype
        # a map whose mean is `offset` deviations away is known to as many times fewer digits
        check_kernel(name, own, their, truth, magnitude=abs(offset) * rms(truth))
    last = x.stride(1) == 1
    assert (ours[0].movedim(1, -1) if last else ours[0]).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("offset, silu", [(0.0, True), (100.0, False)])
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 128, 8, 8), 16), ((2, 96, 7, 13), 6), ((2, 64, 9), 4), ((1, 32, 2, 3, 5), 8)],
)
def test_against_float64(shape, groups, layout, offset, silu, dtype):
    check(shape, groups, dtype, layout, offset, silu)


@pytest.mark.parametrize(
    "shape, dtype, offset, layout",
    [
        ((2, 320, 16, 64), torch.bfloat16, 100.0, "channels_last"),
        ((2, 1280, 2, 8), torch.bfloat16, 0.0, "channels_last"),
        ((2, 1280, 2, 8), torch.float32, 100.0, "contiguous"),
    ],
)
def test_real_shapes(shape, dtype, offset, layout):
    check(shape, 32, dtype, layout, offset, add=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_more_layouts(layout, dtype):
    check((3, 12, 5, 7), 3, dtype, layout, 10.0)


def test_what_the_time_adds_is_read_where_it_lies():
    """A slice of a table, and one row for the whole batch."""
    x = draw("x", (2, 64, 8, 8), torch.bfloat16, "channels_last")
    weight, bias = (draw(name, (64,), torch.bfloat16) for name in ("weight", "bias"))
    table = draw("table", (2, 160), torch.bfloat16)
    for add in (table[:, 32:96], table[1:, 32:96].expand(2, -1), table.t()[32:96].t()):
        assert not add.is_contiguous()
        ours, same = (
            group_norm.group_norm(x, weight, bias, 8, 1e-5, True, shift)
            for shift in (add, add.contiguous())
        )
        assert torch.equal(ours, same)


class Sums(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "sum"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (1, 4, 256, 256)])
def test_guidance_has_the_gradient_of_the_map_without_the_weights_sums(shape):
    x = draw("x", shape, torch.float32).requires_grad_()
    weight, bias = (draw(name, shape[1:2], torch.float32) for name in ("weight", "bias"))
    add = draw("add", shape[:2], torch.float32)
    gradients, sums = [], []
    for wanted in (False, True):
        rest = [t.detach().requires_grad_(wanted) for t in (weight, bias, add)]
        y = group_norm.group_norm(x, *rest[:2], 2, 1e-5, True, rest[2])
        with Sums() as counter:
            y.backward(y.detach())
        gradients.append(x.grad)
        sums.append(counter.count)
        x.grad = None
    one_launch = group_norm.plan(x, shape[1], 2, False, False).grid[1] == 1
    assert torch.equal(*gradients) and sums == [0 if one_launch else 1, 3]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_weights_of_float32_beside_halves(offset, dtype):
    check((2, 48, 4, 6), 4, dtype, "channels_last", offset, weights=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "c2, add, silu, offset",
    [
        (24, False, True, 0.0),
        (28, True, True, 0.0),
        (28, True, False, 100.0),
        (0, True, True, 100.0),
    ],
)
def test_time_embedding_and_skip(c2, add, silu, offset, layout, dtype):
    """40 + 24 channels in 8 groups of 8, and 36 + 28, where a group has channels of both."""
    check((2, 64, 5, 6), 8, dtype, layout, offset, silu, add=add, c2=c2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("limits, offset", [((256, 1024), 0.0), ((256, 512), 100.0)])
def test_maps_larger_than_a_program_holds(limits, offset, layout, dtype, monkeypatch):
    """In stretches, the last of them shorter; with the larger second limit the backward pass is
    still one launch."""
    held, twice = limits
    for name, value in (("HELD", held), ("TWICE", twice), ("TILE", 128), ("STRETCHES", 5)):
        monkeypatch.setattr(group_norm, name, value)
    check((2, 12, 11, 21), 3, dtype, layout, offset, add=True, c2=5)


def test_a_sample_does_not_depend_on_its_batch():
    x, weight, bias = draw("x", (3, 64, 4, 4), torch.bfloat16, "channels_last"), *torch.ones(2, 64)
    y = group_norm.group_norm(x, weight, bias, 8, silu=True)
    assert all(
        torch.equal(group_norm.group_norm(x[i : i + 1], weight, bias, 8, silu=True)[0], y[i])
        for i in range(3)
    )


def test_an_expanded_gradient_and_a_frozen_weight():
    x, weight, bias = draw("x", (2, 8, 3, 4), torch.float32).requires_grad_(), *torch.ones(2, 8)
    own, their = (
        torch.autograd.grad(f(x, weight, bias, 2, silu=True).sum(), x)[0]
        for f in (group_norm.group_norm, group_norm.group_norm_ref)
    )
    assert torch.allclose(own, their, atol=1e-6)


def signature(launch):
    constants = {name: value for name, value in launch.args.items() if name.isupper()}
    return launch.kernel.__name__, constants, launch.warps


def test_what_is_compiled_ahead_is_what_is_launched():
    shipped = [signature(x.launch) for x in group_norm.shipped()]
    with recording() as launched:
        for c, h, w in ((320, 16, 64), (2560, 2, 8), (128, 32, 512)):
            x = channels_last(torch.ones(1, c, h, w).bfloat16())
            weight, bias = torch.ones(2, c).bfloat16()
            y, mean, rstd = group_norm.forward(x, weight, bias, 32, 1e-5, True, None, None)
            group_norm.backward(y, x, weight, bias, 32, True, None, None, mean, rstd)
    assert len(launched) == 8 and all(signature(launch) in shipped for launch in launched)


def broken(*args, **kwargs):
    raise RuntimeError("no image for this device")


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_that_fails_leaves_it_to_torch(part, monkeypatch):
    kernels.choose("auto")
    monkeypatch.setattr(group_norm, part, broken)
    x, weight, bias, add, upstream = (
        draw(name, shape, torch.float32)
        for name, shape in (
            ("x", (2, 8, 5)),
            ("weight", (8,)),
            ("bias", (8,)),
            ("add", (2, 8)),
            ("upstream", (2, 8, 5)),
        )
    )
    given = x, weight, bias, add, None, 2, True, upstream
    with pytest.warns(
        UserWarning, match="group_norm.* does not run here .no image for this device"
    ):
        ours = results(group_norm.group_norm, *given)
    assert kernels.mode == "torch"
    for own, their in zip(ours, results(group_norm.group_norm_ref, *given), strict=True):
        assert torch.allclose(own, their, atol=1e-6)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_full_memory_is_no_failure_of_the_kernel(part, monkeypatch):
    """The error reaches the caller, who can free memory and call again; the kernels stay on."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels.choose("auto")
    monkeypatch.setattr(group_norm, part, full)
    x, weight, bias, upstream = (
        draw(name, shape, torch.float32)
        for name, shape in (
            ("x", (2, 8, 5)),
            ("weight", (8,)),
            ("bias", (8,)),
            ("upstream", (2, 8, 5)),
        )
    )
    with pytest.raises(torch.OutOfMemoryError):
        results(group_norm.group_norm, x, weight, bias, None, None, 2, True, upstream)
    assert kernels.mode == "auto"


@pytest.mark.parametrize(
    "mode, dtype, shape",
    [
        ("triton", torch.float64, (1, 8, 4)),
        ("torch", torch.float32, (1, 8, 4)),
        ("triton", torch.float32, (3, 8)),
        ("triton", torch.float32, (0, 8, 4)),
    ],
)
def test_what_goes_to_torch(mode, dtype, shape, monkeypatch):
    """float64, a mode, no positions at all, an empty batch."""
    monkeypatch.setattr(group_norm, "forward", broken)
    kernels.choose(mode)
    x, weight, bias = draw("x", shape, dtype), *torch.ones(2, 8, dtype=dtype)
    y = group_norm.group_norm(x, weight, bias, 2)
    assert y.shape == shape and torch.equal(y, group_norm.group_norm_ref(x, weight, bias, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 3},
        {"weight": torch.ones(7)},
        {"add": torch.ones(1, 8)},
        {"skip": torch.ones(2, 4, 5)},
    ],
)
def test_what_does_not_fit_is_said(wrong):
    with pytest.raises(ValueError, match="do not"):
        group_norm.group_norm(
            **{
                "x": torch.ones(2, 8, 4),
                "weight": torch.ones(8),
                "bias": torch.ones(8),
                "groups": 2,
            }
            | wrong
        )
