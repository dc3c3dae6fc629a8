"""Fused attention against float64, forward and every gradient: as near as torch's own at each dtype
(`bounds.check_kernel`).

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_attention.py
"""

import pytest
import torch
from bounds import check_kernel

import align
import kernels
import ldm
from kernels import attention as file
from kernels.attention import attention

REFERENCE = file.attention_ref
# rows past the last, which no one keeps, may overflow
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:]
)


@pytest.fixture(autouse=True)
def insist(monkeypatch):
    """A kernel that fails, or is passed over, is an error here."""

    def fallback(*_):
        raise AssertionError("the reference ran in the kernels' place")

    kernels.choose("triton")
    monkeypatch.setattr(file, "attention_ref", fallback)
    yield
    kernels.choose("auto")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def run(f, leaves, views, do):
    """Output, and the gradient of each leaf."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = f(*views(*leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, do(out.detach()))]


def compare(
    leaves, dtype, views=lambda *x: x, do=lambda out: draw(*out.shape).to(out.dtype), magnitude=0.0
):
    """`leaves` hold what q, k and v are made of by `views`; `magnitude` is that of terms which
    cancel."""
    leaves = [x.to(dtype) for x in leaves]  # memory formats stay
    gradient = do(REFERENCE(*views(*leaves)).detach())
    exact = run(REFERENCE, [x.double() for x in leaves], views, lambda _: gradient.double())
    torchs, ours = (run(f, leaves, views, lambda _: gradient) for f in (REFERENCE, attention))
    assert ours[0].is_contiguous() and all(x.dtype == dtype for x in ours)
    names = ["output", *(f"gradient {i}" for i in range(len(leaves)))]
    for name, own, other, true in zip(names, ours, torchs, exact, strict=True):
        check_kernel(name, own, other, true, magnitude)


def qkv(b, heads, n, m, d):
    return draw(b, n, heads, d), draw(b, m, heads, d, seed=1), draw(b, m, heads, d, seed=2)


# --------------------------------------------------------------------------------------------------
# shapes, layouts, values


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 64, 64, 160),
        (2, 2, 16, 16, 160),
        (1, 1, 64, 32, 160),
        (2, 2, 96, 32, 40),  # the U-Net's
        (1, 1, 128, 128, 32),
        (1, 3, 64, 128, 48),
        (1, 4, 70, 32, 16),  # the others'
        (2, 2, 130, 77, 40),
        (1, 2, 100, 70, 8),
        (1, 2, 40, 130, 24),
        (1, 1, 33, 100, 96),
        (1, 1, 40, 70, 256),
        (2, 1, 3, 1, 80),
        (1, 1, 1, 65, 72),
    ],
    ids=str,
)
def test_shapes(shape, dtype):
    # a single key has no gradient: what is left is the rounding of two products of about 1 that
    # cancel
    compare(qkv(*shape), dtype, magnitude=1.0 if shape[3] == 1 else 0.0)


@each_dtype
def test_one_query_and_one_key(dtype):
    compare(qkv(1, 1, 1, 1, 40), dtype, magnitude=1.0)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 1, 1024, 1024, 40), torch.bfloat16),
        ((1, 2, 1024, 32, 40), torch.bfloat16),
        ((2, 1, 256, 256, 80), torch.bfloat16),
        ((2, 2, 256, 32, 80), torch.float16),
        ((1, 1, 256, 256, 80), torch.float32),
    ],
    ids=str,
)
def test_large_maps(shape, dtype):
    compare(qkv(*shape), dtype)


def one_projection(x):  # (b, n, 3, heads, d)
    return x.unbind(2)


def channels_last(x, k, v):  # a map, its channels last, and two with them first
    return [y.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (2, 40)) for y in (x, k, v)]


def expanded(q, k, v):
    return q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)


def odd_steps(q, k, v):  # rows of 83 values: no load of 16 bytes
    return [x[..., 1:81].unflatten(2, (2, 40)) for x in (q, k, v)]


LAYOUTS = {
    "one projection": ([(2, 50, 3, 2, 40)], one_projection),
    "channels last": ([(2, 80, 5, 10), (2, 80, 3, 11), (2, 80, 3, 11)], channels_last),
    "heads first": (
        [(2, 2, 50, 40), (2, 2, 33, 40), (2, 2, 33, 40)],
        lambda *x: [y.transpose(1, 2) for y in x],
    ),
    "expanded": ([(2, 50, 2, 40), (1, 33, 2, 40), (1, 33, 2, 40)], expanded),
    "odd steps": ([(2, 50, 83), (2, 33, 83), (2, 33, 83)], odd_steps),
    "every other row": (
        [(2, 100, 2, 40), (2, 66, 2, 40), (2, 66, 2, 40)],
        lambda *x: [y[:, ::2] for y in x],
    ),
    "shared keys and values": ([(2, 50, 2, 40), (2, 33, 2, 40)], lambda q, k: (q, k, k)),
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    shapes, views = LAYOUTS[layout]
    leaves = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    if layout == "channels last":
        leaves[0] = leaves[0].to(memory_format=torch.channels_last)
    compare(leaves, dtype, views)


@pytest.mark.parametrize(
    "do",
    [
        lambda out: torch.ones(()).to(out.dtype).expand(out.shape),
        lambda out: draw(*out.transpose(1, 2).shape).to(out.dtype).transpose(1, 2),
    ],
)
def test_gradients_arrive_with_any_strides(do):
    compare(qkv(2, 2, 50, 33, 40), torch.bfloat16, do=do)


@each_dtype
@pytest.mark.parametrize("n, m", [(40, 32), (70, 90)])
@pytest.mark.parametrize(
    "values",
    [(1, 0, 100, 0), (30, 0, 0, 0), (1, 0, 0, 100), (1, -3, 50, 0)],
    ids=["keys far from 0", "large scores", "values far from 0", "scores far below 0"],
)
def test_offsets(n, m, values, dtype):
    gain, *offsets = values
    q, k, v = (x + offset for x, offset in zip(qkv(1, 2, n, m, 40), offsets, strict=True))
    # scores, or products with the gradient, are that much larger than what they differ by
    compare([gain * q, k, v], dtype, magnitude=max(gain, *map(abs, offsets)))


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # float32, but the steps are large
def test_gradients_are_the_slopes_of_the_output():
    leaves = [x.requires_grad_() for x in qkv(1, 1, 2, 3, 8)]
    assert torch.autograd.gradcheck(
        attention, leaves, eps=2e-2, atol=2e-3, rtol=1e-2, fast_mode=True
    )


def test_the_same_twice():
    given = [x.bfloat16() for x in qkv(2, 2, 130, 77, 40)]
    first, second = (run(attention, given, lambda *x: x, torch.ones_like) for _ in range(2))
    assert all(map(torch.equal, first, second))


# --------------------------------------------------------------------------------------------------
# dispatch


@pytest.mark.parametrize(
    "why, width, dtype",
    [
        ("narrow", 20, torch.float32),
        ("wide", 264, torch.float32),
        ("exact", 40, torch.float64),
        ("off", 40, torch.float32),
    ],
)
def test_others_take_the_reference(why, width, dtype, monkeypatch):
    monkeypatch.setattr(file, "attention_ref", lambda *x: why)
    if why == "off":
        kernels.choose("torch")
    assert attention(*(x.to(dtype) for x in qkv(1, 1, 4, 5, width))) == why


def test_nothing_to_do():
    with pytest.raises(AssertionError, match="reference"):
        attention(*qkv(2, 2, 0, 5, 40))


def test_shapes_that_do_not_fit_are_told():
    q, k, v = qkv(1, 2, 3, 4, 8)
    with pytest.raises(AssertionError, match=r"k \(1, 4, 2, 8\), v \(1, 3, 2, 8\)"):
        attention(q, k, v[:, :3])


def test_no_graph_without_gradients():
    q, k, v = qkv(1, 1, 4, 5, 8)
    assert attention(q, k, v).grad_fn is None
    with torch.no_grad():
        assert attention(q.requires_grad_(), k, v).grad_fn is None


def test_guidance_leaves_out_the_keys(monkeypatch):
    launched = []
    backward = file.backward
    monkeypatch.setattr(
        file, "backward", lambda *x, keys: launched.append(keys) or backward(*x, keys=keys)
    )
    q, k, v = qkv(1, 1, 4, 5, 8)
    attention(q.requires_grad_(), k, v).sum().backward()
    attention(q, k, v.requires_grad_()).sum().backward()
    assert launched == [False, True] and q.grad.isfinite().all() and v.grad.isfinite().all()


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_failing_kernel_is_said_once_and_replaced(part, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("ptxas: no")

    given = qkv(1, 2, 4, 5, 8)
    expected = run(REFERENCE, given, lambda *x: x, torch.ones_like)
    monkeypatch.setattr(file, part, fails)
    with pytest.raises(RuntimeError, match="ptxas"):
        run(attention, given, lambda *x: x, torch.ones_like)
    kernels.choose("auto")
    monkeypatch.setattr(file, "attention_ref", REFERENCE)
    with pytest.warns(UserWarning, match="attention.*ptxas: no"):
        found = run(attention, given, lambda *x: x, torch.ones_like)
    torch.testing.assert_close(found, expected)
    assert kernels.mode == "torch"


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_full_memory_is_no_failure_of_the_kernel(part, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    kernels.choose("auto")
    monkeypatch.setattr(file, part, full)
    with pytest.raises(torch.OutOfMemoryError):
        run(attention, qkv(1, 2, 4, 5, 8), lambda *x: x, torch.ones_like)
    assert kernels.mode == "auto"


# --------------------------------------------------------------------------------------------------
# what is shipped


def sites(config, frames):
    """(heads, their width, queries, tokens) of a network's attentions; the middle block is one
    below the last level."""
    levels = len(config.multipliers)
    own = [i for i in range(levels) if 2**i in config.attention]
    return {
        (config.heads, config.width * config.multipliers[i] // config.heads, 1024 >> 2 * i, frames)
        for i in (*own, levels - 1)
    }


def test_every_network_is_shipped():
    configs = [*ldm.PRESETS.values(), *align.PRESETS.values()]
    assert set(file.SITES) == set.union(*(sites(config.unet, config.frames) for config in configs))


def test_shipped_launches_are_complete_and_different():
    shipped = list(file.shipped())
    names = {(x.launch.kernel.__name__, x.name) for x in shipped}
    assert len(names) == len(shipped)
    for x in shipped:
        assert list(x.launch.args) == x.launch.kernel.arg_names
        assert x.launch.args["UNIT"] == 8
