"""The transformer's kernels in Triton's interpreter: as near to float64 as torch's own
(`bounds.check_kernel`), in any layout.

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_transformer.py
"""

import pytest
import torch
import torch.nn.functional as F
from bounds import check_kernel, largest, rms

import kernels
from kernels import transformer
from kernels.transformer import add_layer_norm, add_layer_norm_ref, geglu, geglu_ref

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [8, 48, 320, 1000]
LAYOUTS = {
    "contiguous": (0, 0),
    "sliced": (8, 16),
    "ragged": (1, 3),
}  # columns before a row's own, and around it


@pytest.fixture(autouse=True)
def insist(poisoned, monkeypatch):
    """A kernel that fails raises, and what one does not write is NaN."""
    assert torch.empty(1).isnan() and torch.empty_like(torch.zeros(1)).isnan()
    monkeypatch.setattr(kernels, "mode", "triton")


@pytest.fixture
def kernels_only(monkeypatch):
    for name in ("add_layer_norm_ref", "geglu_ref"):
        monkeypatch.setattr(transformer, name, None)


@pytest.fixture
def references_only(monkeypatch):
    for name in ("add_layer_norm_kernel", "geglu_kernel"):
        monkeypatch.setattr(transformer, name, None)


def rows(*shape, dtype, layout="contiguous", offset=0.0, seed=0):
    """Random, among NaN that belong to nobody."""
    before, around = LAYOUTS[layout]
    t = torch.full((*shape[:-1], shape[-1] + around), NAN, dtype=dtype)[
        ..., before : before + shape[-1]
    ]
    return t.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset)


def affine(c, dtype):
    return rows(c, dtype=dtype, offset=1.0, seed=8), rows(c, dtype=dtype, seed=9)


def check(ours, theirs, exact, offset=0.0):
    """In the mean square and at worst. Rows whose mean is `offset` deviations away are known to as
    many times fewer digits."""
    assert ours.is_contiguous()
    for measure in (rms, largest):
        check_kernel(
            "output", ours, theirs, exact, magnitude=offset * measure(exact), measure=measure
        )


def check_norm(x, y, weight, bias, offset=0.0):
    s, z = add_layer_norm(x, y, weight, bias)
    if y is None:
        assert s is x
    else:
        assert s.is_contiguous() and torch.equal(s, x + y)
    exact = F.layer_norm(s.double(), weight.shape, weight.double(), bias.double())
    check(z, add_layer_norm_ref(x, y, weight, bias)[1], exact, offset)


def check_geglu(h):
    check(geglu(h), geglu_ref(h), geglu_ref(h.double()))


# --------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(kernels_only, dtype, c, layout, added, offset):
    x = rows(
        3, 3, c, dtype=dtype, layout=layout, offset=offset
    )  # rows that do not fill the last program
    check_norm(x, rows(3, 3, c, dtype=dtype, seed=1) if added else None, *affine(c, dtype), offset)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu(kernels_only, dtype, d, layout):
    check_geglu(
        3 * rows(3, 3, 2 * d, dtype=dtype, layout=layout)
    )  # 9 rows: one more than a program has
    check_geglu(rows(3, 3, 2 * d, dtype=dtype, layout=layout, offset=-2.0))


@pytest.mark.parametrize("c", [1, 257, 640, 1280, 2560])
def test_other_widths(kernels_only, c):
    """Each of the table's launches, a value alone, and a width beyond a power of two."""
    x = rows(1, 3, c, dtype=torch.bfloat16)
    check_norm(
        x, rows(1, 3, c, dtype=torch.bfloat16, layout="sliced", seed=1), *affine(c, torch.bfloat16)
    )
    check_geglu(rows(1, 3, 2 * c, dtype=torch.bfloat16))


def test_rows_without_one_stride(kernels_only):
    """Copied: a cut through the tokens, channels that are not neighbours; repeated rows are read
    where they are."""
    x, y, shared = (
        rows(*shape, dtype=torch.float32) for shape in ((2, 5, 640), (2, 640, 4), (1, 1, 640))
    )
    check_norm(x[:, 1:], y.transpose(1, 2), *affine(640, torch.float32))
    check_norm(shared.expand(2, 4, 640), x[:, :4], *affine(640, torch.float32))
    check_norm(x[0, 0], None, *affine(640, torch.float32))
    check_geglu(x[:, 1:])
    check_geglu(y[:1].transpose(1, 2))  # one stride between rows, another within


def test_weights_of_another_dtype(kernels_only):
    """A float32 norm in a network that runs in bfloat16; the weights need not be contiguous."""
    x, y = rows(2, 3, 48, dtype=torch.bfloat16), rows(2, 3, 48, dtype=torch.bfloat16, seed=1)
    check_norm(x, y, *rows(48, 2, dtype=torch.float32, seed=2).unbind(1))


def test_what_is_constant(kernels_only):
    """No variance: eps keeps the norm finite, and its size decides; a sample's numbers do not
    depend on the batch."""
    x, (weight, bias) = torch.full((1, 2, 320), 3.0), affine(320, torch.float32)
    assert torch.equal(add_layer_norm(x, None, weight, bias)[1], bias.expand(1, 2, 320))
    x = 1e-3 * rows(4, 3, 320, dtype=torch.float32)
    z = add_layer_norm(x, None, weight, bias, 1e-6)[1]
    check(
        z,
        add_layer_norm_ref(x, None, weight, bias, 1e-6)[1],
        F.layer_norm(x.double(), (320,), weight.double(), bias.double(), 1e-6),
    )
    assert torch.equal(z[2:3], add_layer_norm(x[2:3], None, weight, bias, 1e-6)[1])


def test_gates_far_from_zero(kernels_only):
    """The identity on one side, zero on the other."""
    gate = torch.tensor([-1e4, -20.0, -0.0, 0.0, 20.0, 1e4])
    for dtype in DTYPES:
        h = torch.cat([torch.full((6,), 2.0), gate]).to(dtype)[None, None]
        assert torch.equal(geglu(h)[0, 0], 2 * gate.clamp(min=0).to(dtype))


# --------------------------------------------------------------------------------------------------
# where the references run


def given(dtype=torch.float32, grad=False):
    x, y, h = (rows(2, 3, c, dtype=dtype, seed=c).requires_grad_(grad) for c in (8, 8, 16))
    return (x, y, *affine(8, dtype)), h


def check_references(arguments, h):
    for ours, theirs in zip(
        add_layer_norm(*arguments), add_layer_norm_ref(*arguments), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
    assert torch.equal(geglu(h), geglu_ref(h)) and geglu(h).requires_grad == h.requires_grad


def test_gradients_are_the_references(references_only):
    arguments, h = given(grad=True)
    check_references(arguments, h)
    geglu(h).sum().backward()
    sum(t.square().sum() for t in add_layer_norm(*arguments)).backward()
    assert h.grad.isfinite().all() and all(t.grad.isfinite().all() for t in arguments[:2])
    (x, y, weight, bias), _ = given()
    assert add_layer_norm(x, y, weight.requires_grad_(), bias)[1].requires_grad  # of any of them


def test_kernels_run_where_gradients_are_not_recorded(kernels_only):
    arguments, h = given(grad=True)
    with torch.no_grad():
        assert not any(t.requires_grad for t in (*add_layer_norm(*arguments), geglu(h)))


def test_float64_and_mode_torch_are_the_references(references_only, monkeypatch):
    check_references(*given(torch.float64))
    monkeypatch.setattr(kernels, "mode", "torch")
    check_references(*given())


def test_what_no_kernel_takes(references_only):
    x, (weight, bias) = rows(2, 3, 8, dtype=torch.bfloat16), affine(8, torch.bfloat16)
    for y in (rows(2, 3, 8, dtype=torch.float32), rows(1, 1, 8, dtype=torch.bfloat16)):
        s, z = add_layer_norm(x, y, weight, bias)
        assert (
            s.shape == z.shape == x.shape
            and s.dtype == z.dtype == x.dtype
            and torch.equal(s, (x + y).to(x.dtype))
        )
    check_references((x[:0], x[:0], weight, bias), x[:0])
    check_references(
        (rows(1, 1, 4104, dtype=torch.float32), None, *affine(4104, torch.float32)), x[:0]
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_failing_launch_is_said_once(references_only, monkeypatch, index):
    monkeypatch.setattr(kernels, "mode", "auto")
    call = [lambda: add_layer_norm(*given()[0])[1], lambda: geglu(given()[1])][index]
    with pytest.warns(
        UserWarning, match=["add_layer_norm", "geglu"][index] + ".* going on with torch's own"
    ):
        first = call()
    assert kernels.mode == "torch" and torch.equal(first, call())
    monkeypatch.setattr(kernels, "mode", "triton")
    with pytest.raises(AttributeError):
        call()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="7 channels"):
        geglu(torch.zeros(1, 2, 7))
    with pytest.raises(ValueError, match="of x's 8 channels"):
        add_layer_norm(torch.zeros(1, 2, 8), None, torch.zeros(4), torch.zeros(4))


def test_shipped():
    """All published widths in bfloat16, from the launcher itself."""
    names = [shipped.name for shipped in transformer.shipped()]
    widths = (("add_layer_norm", 1), ("layer_norm", 1), ("geglu", 4))
    assert {
        f"{name} {times * c} bfloat16" for c in (320, 640, 1280) for name, times in widths
    } <= set(names)
    assert len(set(names)) == len(names) == 12
