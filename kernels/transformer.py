"""Between the matrix products of a transformer block: a residual sum with its LayerNorm, and GEGLU. Inference only.

in   x, y (b, n, c), y a branch's output or None; weight and bias (c,); h (b, n, 2d): values, then gates; float32,
     float16 or bfloat16; read in place where channels are contiguous and one stride leads from row to row, else copied
out  s, z (b, n, c) and g (b, n, d), contiguous, in the input's dtype

    python -m kernels.transformer --out transformer             times, on a GPU

    s = x + y, rounded;  z = weight (s - <s>) / sqrt(<(s - <s>)^2> + eps) + bias        < >: the mean over channels
    g = value gate (1 + erf(gate / sqrt 2)) / 2

Each replaces two kernels: 4 passes over memory for 5, and 3 for 5, with half the launches. A row stays in registers, so
the mean comes first and the squares about it after. Statistics and all arithmetic are float32, whatever the dtype.

The plain-torch references run where an input requires grad while gradients are recorded, where the kernels do not run
(`kernels.active`) or fail, for more than 4096 channels, and where y has not the shape and dtype of x. The launch sizes
are reasoned from registers and load widths and compiled by `kernels.gate`; docs/performance.md has what an H100 says
of them.
"""

import math

import torch
import torch.nn.functional as F

import kernels
from kernels.benchmark import Site, run

# channels up to: rows and warps of a program. A thread has 16 values of a row or fewer, two 16-byte loads in bfloat16;
# short rows are one warp's, which sums without barriers, and several are a program's, so that there are fewer to start
NORM = {256: (4, 1), 512: (2, 1), 1024: (1, 2), 2048: (1, 4), 4096: (1, 8)}
# rows, columns and warps of a program of GEGLU: 256 columns are a warp's 16-byte loads, and divide published widths
GATED = 8, 256, 4


def add_layer_norm_ref(x, y, weight, bias, eps=1e-5):
    s = x if y is None else (x + y).to(x.dtype)
    return s, F.layer_norm(s.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def geglu_ref(h):
    value, gate = h.chunk(2, -1)
    return value * F.gelu(gate)


# ---------------------------------------------------------------------------------------------------------------------
# kernels; a tile is (rows, columns), a row's start is row * stride * UNIT, from which the compiler learns its alignment

if kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(at, mask):
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit(do_not_specialize=["n", "x_row", "y_row"])
    def add_layer_norm_kernel(
        x,
        y,
        weight,
        bias,
        s,
        z,
        n,
        x_row,
        y_row,
        eps,
        C: tl.constexpr,
        UNIT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        c = tl.arange(0, COLUMNS)[None, :]
        own = c < C
        mask = (row < n) & own
        u = _load(x + row * x_row * UNIT + c, mask)
        w, shift = (
            _load(weight + c, own),
            _load(bias + c, own),
        )  # asked for before the sums are waited for
        if y is not None:
            rounded = (u + _load(y + row * y_row * UNIT + c, mask)).to(s.dtype.element_ty)
            tl.store(s + row * C + c, rounded, mask=mask)
            u = rounded.to(tl.float32)
        d = tl.where(mask, u - tl.sum(u, 1)[:, None] / C, 0.0)
        r = tl.rsqrt(tl.sum(d * d, 1)[:, None] / C + eps)
        tl.store(z + row * C + c, (d * r * w + shift).to(z.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["n", "h_row"])
    def geglu_kernel(
        h,
        g,
        n,
        h_row,
        D: tl.constexpr,
        UNIT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
        row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        d = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (row < n) & (d < D)
        at = h + row * h_row * UNIT + d
        value, gate = _load(at, mask), _load(at + D, mask)
        gated = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
        tl.store(g + row * D + d, gated.to(g.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# launches


def _launch(kernel, programs, args, constants, warps):
    with torch.cuda.device_of(next(iter(args.values()))):
        kernel[programs,](**args, **constants, num_warps=warps, num_stages=1)


def _rows(t):
    """(..., c) -> (n, c) with contiguous rows, in place where one stride leads from row to row; and that stride."""
    t = t.reshape(-1, t.shape[-1])
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def _norm(x, y, weight, bias, eps, launch=_launch):
    (a, x_row), (b, y_row) = _rows(x), (None, 0) if y is None else _rows(y)
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = None if y is None else torch.empty_like(z)
    c, unit = x.shape[-1], math.gcd(x_row, y_row, 8)
    columns = max(256, 1 << (c - 1).bit_length())
    rows, warps = NORM[columns]
    args = {
        "x": a,
        "y": b,
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "s": s,
        "z": z,
        "n": len(a),
        "x_row": x_row // unit,
        "y_row": y_row // unit,
        "eps": eps,
    }
    launch(
        add_layer_norm_kernel,
        -(-len(a) // rows),
        args,
        {"C": c, "UNIT": unit, "ROWS": rows, "COLUMNS": columns},
        warps,
    )
    return x if y is None else s, z


def _gated(h, launch=_launch):
    (a, h_row), d, (rows, columns, warps) = _rows(h), h.shape[-1] // 2, GATED
    g, unit = torch.empty((*h.shape[:-1], d), dtype=h.dtype, device=h.device), math.gcd(h_row, 8)
    args, constants = (
        {"h": a, "g": g, "n": len(a), "h_row": h_row // unit},
        {"D": d, "UNIT": unit, "ROWS": rows, "COLUMNS": columns},
    )
    launch(geglu_kernel, -(-len(a) // rows) * -(-d // columns), args, constants, warps)
    return g


def _attempt(name, run, *args):
    """What it gives; None where the kernels do not take these tensors, or fail, which is said."""
    tensors = [t for t in args if torch.is_tensor(t)]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded or not all(t.numel() for t in tensors) or not kernels.active(*tensors):
        return None
    try:
        return run(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's, ptxas' or the driver's many kinds
        kernels.failed(name, error)


def add_layer_norm(x, y, weight, bias, eps=1e-5):
    """(x + y, layer_norm of that as rounded), in x's dtype; x, y (b, n, c). Without y: (x itself, layer_norm(x))."""
    c = x.shape[-1]
    if not (c,) == weight.shape == bias.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are not of x's {c} channels"
        )
    fits = c <= max(NORM) and (y is None or (y.shape, y.dtype) == (x.shape, x.dtype))
    done = _attempt("add_layer_norm", _norm, x, y, weight, bias, eps) if fits else None
    return add_layer_norm_ref(x, y, weight, bias, eps) if done is None else done


def geglu(h):
    """value gelu(gate), with the exact gelu; h (b, n, 2d): values, then gates -> (b, n, d)."""
    if h.shape[-1] % 2:
        raise ValueError(f"{h.shape[-1]} channels are not values and as many gates")
    done = _attempt("geglu", _gated, h)
    return geglu_ref(h) if done is None else done


# ---------------------------------------------------------------------------------------------------------------------
# what is shipped, and how fast it is

SITES = (
    (1024, 320),
    (256, 640),
    (64, 1280),
)  # tokens and channels of a map; GEGLU is four times as wide


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
    """What `kernels.gate` compiles."""
    for dtype, (n, c) in (*((torch.bfloat16, site) for site in SITES), (torch.float32, SITES[0])):
        for name, given in inputs(2, n, c, "meta", dtype).items():
            calls, (run, *eps) = [], (_gated,) if name == "geglu" else (_norm, 1e-5)
            run(*given, *eps, launch=lambda *call: calls.append(call))
            (kernel, _, args, constants, warps), pointer = (
                calls[0],
                "*bf16" if dtype == torch.bfloat16 else "*fp32",
            )
            kinds = {
                k: pointer if torch.is_tensor(v) else "fp32" if k == "eps" else v
                for k, v in args.items()
            }
            yield {
                "name": f"{name} {constants.get('C') or constants['D']} {pointer[1:]}",
                "fn": kernel,
                "args": kinds,
                "constexprs": constants,
                "num_warps": warps,
                "num_stages": 1,
                "wide": True,
            }


def timed(b, device="cuda"):
    for n, c in SITES:
        passes = {
            "add_layer_norm": 4,
            "layer_norm": 2,
            "geglu": 1.5,
        }  # over memory of the first input's size
        for name, given in inputs(b, n, c, device).items():
            args = tuple(t if t is None else t.normal_() for t in given)
            width, pair = (
                (4 * c, (geglu, geglu_ref))
                if name == "geglu"
                else (c, (add_layer_norm, add_layer_norm_ref))
            )
            yield Site(f"{name} {n}x{width}", *pair, args, int(passes[name] * args[0].nbytes))


if __name__ == "__main__":
    run("kernels.transformer", __doc__, timed)
