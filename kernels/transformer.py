"""Between the matrix products of a transformer block: a residual sum with its LayerNorm, and GEGLU.
Inference only.

in   x, y (b, n, c), y a branch's output or None; weight and bias (c,); h (b, n, 2d): values, then
     gates; float32, float16 or bfloat16; read in place where channels are contiguous and one stride
     leads from row to row, else copied
out  s, z (b, n, c) and g (b, n, d), contiguous, in the input's dtype

    python -m kernels.transformer --out transformer             times, on a GPU

    s = x + y, rounded;  z = weight (s - <s>) / sqrt(<(s - <s>)^2> + eps) + bias    < >: the mean
    g = value gate (1 + erf(gate / sqrt 2)) / 2                                     over channels

Each replaces two kernels: 4 passes over memory for 5, and 3 for 5, with half the launches. A row
stays in registers, so the mean comes first and the squares about it after. Statistics and all
arithmetic are float32, whatever the dtype.

The plain-torch references run where an input requires grad while gradients are recorded, where the
kernels do not run (`kernels.active`) or fail, for more than 4096 channels, and where y has not the
shape and dtype of x. The launch sizes are reasoned from registers and load widths and compiled by
`kernels.gate`; docs/performance.md has what an H100 says of them.
"""

import math

import torch
import torch.nn.functional as F

import kernels
from kernels.benchmark import Site, run
from kernels.launch import Launch, Shipped, cdiv, guarded, recording

# channels up to: rows and warps of a program. A thread has 16 values of a row or fewer, two 16-byte
# loads in bfloat16; short rows are one warp's, which sums without barriers, and several are a
# program's, so that there are fewer to start
NORM = {256: (4, 1), 512: (2, 1), 1024: (1, 2), 2048: (1, 4), 4096: (1, 8)}
# rows, columns and warps of a program of GEGLU: 256 columns are a warp's 16-byte loads, and divide
# published widths
GATED = 8, 256, 4


def add_layer_norm_ref(x, y, weight, bias, eps=1e-5):
    """The same in plain torch: fallback, test oracle and baseline."""
    s = x if y is None else (x + y).to(x.dtype)
    return s, F.layer_norm(s.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def geglu_ref(h):
    value, gate = h.chunk(2, -1)
    return value * F.gelu(gate)


# --------------------------------------------------------------------------------------------------
# kernels; a tile is (rows, columns), a row's start is row * stride * UNIT, from which the compiler
# learns its alignment

if kernels.triton is not None:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    from kernels.launch import load

    @triton.jit(do_not_specialize=["n", "x_row", "y_row"])
    def add_layer_norm_kernel(
        x,  # (n, C), rows x_row * UNIT apart
        y,  # (n, C), rows y_row * UNIT apart, or None
        weight,  # (C,), like bias
        bias,
        s,  # (n, C), contiguous, like z; None without y
        z,
        n,
        x_row,
        y_row,
        eps,
        C: constexpr,
        UNIT: constexpr,
        ROWS: constexpr,
        COLUMNS: constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
        own = c < C
        mask = (row < n) & own
        # whole rows in float32; the weights are asked for before the sums are waited for
        u = load(x + row * x_row * UNIT + c, mask)
        w = load(weight + c, own)
        shift = load(bias + c, own)
        if y is not None:
            # the norm is of the sum as rounded, which is what the next block reads
            rounded = (u + load(y + row * y_row * UNIT + c, mask)).to(s.dtype.element_ty)
            tl.store(s + row * C + c, rounded, mask=mask)
            u = rounded.to(tl.float32)
        # mean, then squares about it, over the row's channels
        d = tl.where(mask, u - tl.sum(u, 1)[:, None] / C, 0.0)
        r = tl.rsqrt(tl.sum(d * d, 1)[:, None] / C + eps)
        tl.store(z + row * C + c, (d * r * w + shift).to(z.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["n", "h_row"])
    def geglu_kernel(
        h,  # (n, 2 D), rows h_row * UNIT apart
        g,  # (n, D), contiguous
        n,
        h_row,
        D: constexpr,
        UNIT: constexpr,
        ROWS: constexpr,
        COLUMNS: constexpr,
    ):
        # programs of the same rows are neighbors
        blocks: constexpr = (D + COLUMNS - 1) // COLUMNS
        row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        d = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (row < n) & (d < D)
        at = h + row * h_row * UNIT + d
        value = load(at, mask)
        gate = load(at + D, mask)
        gated = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
        tl.store(g + row * D + d, gated.to(g.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------
# launches


def _rows(t):
    """(..., c) -> (n, c) with contiguous rows, in place where one stride leads from row to row; and
    that stride."""
    t = t.reshape(-1, t.shape[-1])
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def _norm(x, y, weight, bias, eps):
    a, x_row = _rows(x)
    b = s = None
    y_row = 0
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y is not None:
        b, y_row = _rows(y)
        s = torch.empty_like(z)
    n, c = a.shape
    unit = math.gcd(x_row, y_row, 8)
    columns = max(256, kernels.triton.next_power_of_2(c))
    rows, warps = NORM[columns]
    args = {
        "x": a,
        "y": b,
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "s": s,
        "z": z,
    }
    args |= {"n": n, "x_row": x_row // unit, "y_row": y_row // unit, "eps": eps}
    args |= {"C": c, "UNIT": unit, "ROWS": rows, "COLUMNS": columns}
    Launch((cdiv(n, rows),), args, warps).run(add_layer_norm_kernel)
    return x if y is None else s, z


def _gated(h):
    a, h_row = _rows(h)
    n, d = len(a), h.shape[-1] // 2
    g = torch.empty((*h.shape[:-1], d), dtype=h.dtype, device=h.device)
    unit = math.gcd(h_row, 8)
    rows, columns, warps = GATED
    args = {"h": a, "g": g, "n": n, "h_row": h_row // unit}
    args |= {"D": d, "UNIT": unit, "ROWS": rows, "COLUMNS": columns}
    Launch((cdiv(n, rows) * cdiv(d, columns),), args, warps).run(geglu_kernel)
    return g


def _usable(*tensors):
    """Whether the kernels take them: no gradient is recorded, and there is something to do."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and all(t.numel() for t in tensors) and kernels.active(*tensors)


def add_layer_norm(x, y, weight, bias, eps=1e-5):
    """(x + y, layer_norm of that as rounded), in x's dtype; x, y (b, n, c). Without y: (x itself,
    layer_norm(x)). Raises ValueError where weight or bias is not (c,)."""
    c = x.shape[-1]
    if not (c,) == weight.shape == bias.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are not of x's {c} channels"
        )
    tensors = [x, weight, bias]
    fits = c <= max(NORM)
    if y is not None:
        tensors.append(y)
        fits = fits and (y.shape, y.dtype) == (x.shape, x.dtype)
    if fits and _usable(*tensors):
        return guarded("add_layer_norm", _norm, add_layer_norm_ref, x, y, weight, bias, eps)
    return add_layer_norm_ref(x, y, weight, bias, eps)


def geglu(h):
    """value gelu(gate), with the exact gelu; h (b, n, 2d): values, then gates -> (b, n, d). Raises
    ValueError for an odd number of channels."""
    if h.shape[-1] % 2:
        raise ValueError(f"{h.shape[-1]} channels are not values and as many gates")
    return guarded("geglu", _gated, geglu_ref, h) if _usable(h) else geglu_ref(h)


# --------------------------------------------------------------------------------------------------
# what the networks launch, and how fast it is

# tokens and channels of a map; GEGLU is four times as wide
SITES = ((1024, 320), (256, 640), (64, 1280))
PASSES = {"add_layer_norm": 4, "layer_norm": 2, "geglu": 1.5}  # over memory of the first input


def inputs(b, n, c, device, dtype=torch.bfloat16):
    """Of the sum and its norm, of a norm alone, of GEGLU."""
    shapes = (b, n, c), (b, n, c), (c,), (c,), (b, n, 8 * c)
    x, y, weight, bias, h = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    return {
        "add_layer_norm": (x, y, weight, bias),
        "layer_norm": (x, None, weight, bias),
        "geglu": (h,),
    }


def shipped():
    """All published widths in bfloat16, the first in float32."""
    for n, c, dtype in (*((*site, torch.bfloat16) for site in SITES), (*SITES[0], torch.float32)):
        for name, given in inputs(2, n, c, "meta", dtype).items():
            with recording() as launches:
                width = c
                if name == "geglu":
                    width = _gated(*given).shape[-1]
                else:
                    _norm(*given, 1e-5)
            yield Shipped(f"{name} {width} {str(dtype)[6:]}", launches[0], wide=True)


def timed(b, device="cuda"):
    """Sites of the published U-Net."""
    for n, c in SITES:
        for name, given in inputs(b, n, c, device).items():
            functions = add_layer_norm, add_layer_norm_ref
            width = c
            if name == "geglu":
                functions = geglu, geglu_ref
                width = 4 * c
            args = tuple(t if t is None else t.normal_() for t in given)
            nbytes = int(PASSES[name] * args[0].nbytes)
            yield Site(f"{name} {n}x{width}", *functions, args, nbytes)


if __name__ == "__main__":
    run("kernels.transformer", __doc__, timed)
