"""Attention without its matrix of scores in memory: o = softmax(q k^T d^-0.5) v for each head, forward and backward.

in   q (b, n, heads, d), k and v (b, m, heads, d), float32, float16 or bfloat16, as views of any strides: slices of one
     projection, a condition's keys expanded over the batch; any n and m, d a multiple of 8 up to 256
out  (b, n, heads, d) without gaps, so that .flatten(2) costs nothing

    python -m kernels.attention --out attention             times, on a GPU

    s = q k^T d^-0.5,  p = exp(s - lse),  o = p v                               lse: log-sum-exp of a row of s
    delta = <do, o>,  ds = p (do v^T - delta),  dq = ds k d^-0.5,  dk = ds^T q d^-0.5,  dv = p^T do

Replaces two products, the softmax and the copies that bring heads together and apart: a head is an address and a
stride. A program holds some queries of one head and passes over the keys with a running maximum (FlashAttention-2, Dao
2023). Up to 64 keys, be they a condition's 32 or a 4 x 16 map's, are one block: no loop, a plain softmax. Backward, one
kernel passes over the keys for dq; another over the queries for dk and dv, left out where only q has a gradient, as in
guidance. No atomics: the same twice. Sums, scores and lse are float32; products of half types run on tensor cores, of
float32 they are exact ("ieee", no TF32). A head of 40 is computed as 64 columns, 80 as 64 + 16, 160 as 128 + 32.

Where the kernels do not run (`kernels.active`), or fail, `attention_ref` does. Blocks are chosen from registers and
shared memory as `kernels.gate` compiles them; docs/performance.md has what an H100 says of them.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels.benchmark import Site, run

# Kernel -> block of queries, block of keys, warps, stages, for heads computed as up to 64, 96, 160 and 256 columns.
# 128 x 64 reads keys half as often as 64 x 64, and 1024 queries fill 132 SMs even so. Wide heads and the two sums of
# dkv take all of a thread's 255 registers; with one stage instead of two, the operand that stays would spill.
HALF = {
    "few": [(64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)],
    "forward": [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 16, 4, 2)],
    "dq": [(64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 2)],
    "dkv": [(32, 64, 4, 2), (32, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)],
}
# Of "few" where those make fewer programs than half of an H100's multiprocessors: one or two clips'
# small maps. None: the same. `python tools/gpu/sweep.py` prints what it finds better
SPARSE = [None, None, (16, 64, 4, 1), None]
HALF_OF_GPU = 64
EXACT = {
    "few": [(32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],  # float32
    "forward": [(32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (32, 16, 8, 2)],
    "dq": [(16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)],
    "dkv": [(16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)],
}
LOG2E = 1.4426950408889634  # scores are in base 2, whose exponential is an instruction


def attention_ref(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
    ):
        # training on a CPU: the backward pass of torch's fused attention takes up to three times as long as the plain products
        with torch.autocast("cpu", enabled=False):
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# kernels; a tile is rows of one head in two parts, D1 and D2 columns, powers of two; D2 is 0 where one part will do

if kernels.triton is not None:
    import triton
    import triton.language as tl

    LAYOUT = ["q_b", "q_n", "q_h", "k_b", "k_n", "k_h", "v_b", "v_n", "v_h", "heads", "n", "m"]
    jit = triton.jit(do_not_specialize=LAYOUT)  # one compilation for all their values

    @triton.jit
    def _program(rows, heads, BLOCK: tl.constexpr):
        """This program's sample, head and first row. Blocks of a head are neighbours, to find its keys in the cache."""
        blocks = tl.cdiv(rows, BLOCK)
        head = tl.program_id(0) // blocks
        return (
            (head // heads).to(tl.int64),
            (head % heads).to(tl.int64),
            tl.program_id(0) % blocks * BLOCK,
        )

    @triton.jit
    def _at(x, b, h, row, x_b, x_n, x_h, UNIT: tl.constexpr):
        """Address of a row, and the step to the next. Strides come divided by UNIT: loads are of 16 bytes only if the
        compiler sees that 8 divides them, which a 40 given at run time does not show."""
        step = x_n.to(tl.int64) * UNIT
        return x + (b * x_b + h * x_h) * UNIT + row * step, step

    @triton.jit
    def _part(x, row, step, last, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
        """Addresses of a tile's columns from START on, and which of them exist."""
        col = START + tl.arange(0, WIDTH)
        return x + row[:, None] * step + col[None, :], (row[:, None] < last) & (col[None, :] < D)

    @triton.jit
    def _load(x, row, step, last, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
        at, exists = _part(x, row, step, last, 0, D1, D)
        one = tl.load(at, mask=exists, other=0.0)
        two = one  # not used
        if D2 > 0:
            at, exists = _part(x, row, step, last, D1, D2, D)
            two = tl.load(at, mask=exists, other=0.0)
        return one, two

    @triton.jit
    def _store(x, row, step, last, one, two, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
        at, exists = _part(x, row, step, last, 0, D1, D)
        tl.store(at, one.to(x.dtype.element_ty), mask=exists)
        if D2 > 0:
            at, exists = _part(x, row, step, last, D1, D2, D)
            tl.store(at, two.to(x.dtype.element_ty), mask=exists)

    @triton.jit
    def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
        return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2 if D2 > 0 else D1), tl.float32)

    @triton.jit
    def _across(a1, a2, b1, b2, D2: tl.constexpr):
        """a b^T."""
        s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
        if D2 > 0:
            s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
        return s

    @triton.jit
    def _add(sum1, sum2, p, b1, b2, D2: tl.constexpr):
        """sum + p b."""
        sum1 = tl.dot(p.to(b1.dtype), b1, sum1, input_precision="ieee")
        if D2 > 0:
            sum2 = tl.dot(p.to(b2.dtype), b2, sum2, input_precision="ieee")
        return sum1, sum2

    @jit
    def attention_forward(
        q,
        k,
        v,
        o,
        lse,
        q_b,
        q_n,
        q_h,
        k_b,
        k_n,
        k_h,
        v_b,
        v_n,
        v_h,
        heads,
        n,
        m,
        D: tl.constexpr,
        D1: tl.constexpr,
        D2: tl.constexpr,
        UNIT: tl.constexpr,
        SCALE: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        EVEN: tl.constexpr,
        FEW: tl.constexpr,
    ):
        b, h, first = _program(n, heads, BQ)
        row, key, rows = tl.arange(0, BQ), tl.arange(0, BK), n - first
        q, q_step = _at(q, b, h, first, q_b, q_n, q_h, UNIT)
        k, k_step = _at(k, b, h, 0, k_b, k_n, k_h, UNIT)
        v, v_step = _at(v, b, h, 0, v_b, v_n, v_h, UNIT)
        q1, q2 = _load(q, row, q_step, rows, D, D1, D2)
        o1, o2 = _zeros(BQ, D1, D2)
        if FEW:
            k1, k2 = _load(k, key, k_step, m, D, D1, D2)
            v1, v2 = _load(v, key, v_step, m, D, D1, D2)
            s = _across(q1, q2, k1, k2, D2)  # (BQ, BK)
            if not EVEN:
                s = tl.where(key[None, :] < m, s, float("-inf"))
            top = tl.max(s, 1) * SCALE
            p = tl.exp2(s * SCALE - top[:, None])
            total = tl.sum(p, 1)
            o1, o2 = _add(o1, o2, p, v1, v2, D2)
        else:
            top = tl.full((BQ,), float("-inf"), tl.float32)
            total = tl.zeros((BQ,), tl.float32)
            for start in range(0, m, BK):
                k1, k2 = _load(k + start * k_step, key, k_step, m - start, D, D1, D2)
                v1, v2 = _load(v + start * v_step, key, v_step, m - start, D, D1, D2)
                s = _across(q1, q2, k1, k2, D2)
                if not EVEN:
                    s = tl.where(key[None, :] < m - start, s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1) * SCALE)
                p = tl.exp2(s * SCALE - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 1)
                o1, o2 = _add(o1 * shrink[:, None], o2 * shrink[:, None], p, v1, v2, D2)
                top = higher
        o += ((b * n + first) * heads + h) * D
        _store(
            o,
            row,
            heads.to(tl.int64) * D,
            rows,
            o1 / total[:, None],
            o2 / total[:, None],
            D,
            D1,
            D2,
        )
        tl.store(lse + (b * heads + h) * n + first + row, top + tl.log2(total), mask=row < rows)

    @jit
    def attention_dq(
        q,
        k,
        v,
        o,
        do,
        lse,
        delta,
        dq,
        q_b,
        q_n,
        q_h,
        k_b,
        k_n,
        k_h,
        v_b,
        v_n,
        v_h,
        heads,
        n,
        m,
        D: tl.constexpr,
        D1: tl.constexpr,
        D2: tl.constexpr,
        UNIT: tl.constexpr,
        SCALE: tl.constexpr,
        BACK: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        """Of a block of queries; delta on the way."""
        b, h, first = _program(n, heads, BQ)
        row, key, rows = tl.arange(0, BQ), tl.arange(0, BK), n - first
        q, q_step = _at(q, b, h, first, q_b, q_n, q_h, UNIT)
        k, k_step = _at(k, b, h, 0, k_b, k_n, k_h, UNIT)
        v, v_step = _at(v, b, h, 0, v_b, v_n, v_h, UNIT)
        at, step = ((b * n + first) * heads + h) * D, heads.to(tl.int64) * D
        q1, q2 = _load(q, row, q_step, rows, D, D1, D2)
        o1, o2 = _load(o + at, row, step, rows, D, D1, D2)
        do1, do2 = _load(do + at, row, step, rows, D, D1, D2)
        dot = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
        if D2 > 0:
            dot += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
        place = (b * heads + h) * n + first + row
        tl.store(delta + place, dot, mask=row < rows)
        log = tl.load(lse + place, mask=row < rows, other=0.0)
        dq1, dq2 = _zeros(BQ, D1, D2)
        for start in range(0, m, BK):
            k1, k2 = _load(k + start * k_step, key, k_step, m - start, D, D1, D2)
            v1, v2 = _load(v + start * v_step, key, v_step, m - start, D, D1, D2)
            p = tl.exp2(_across(q1, q2, k1, k2, D2) * SCALE - log[:, None])  # (BQ, BK)
            if not EVEN:
                p = tl.minimum(
                    p, 1.0
                )  # past the last key ds meets a k of 0, and only has to be finite
            ds = p * (_across(do1, do2, v1, v2, D2) - dot[:, None])
            dq1, dq2 = _add(dq1, dq2, ds, k1, k2, D2)
        _store(dq + at, row, step, rows, dq1 * BACK, dq2 * BACK, D, D1, D2)

    @jit
    def attention_dkv(
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        q_b,
        q_n,
        q_h,
        k_b,
        k_n,
        k_h,
        v_b,
        v_n,
        v_h,
        heads,
        n,
        m,
        D: tl.constexpr,
        D1: tl.constexpr,
        D2: tl.constexpr,
        UNIT: tl.constexpr,
        SCALE: tl.constexpr,
        BACK: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
    ):
        """Of a block of keys. The scores are transposed, so that p and ds are left operands as they are."""
        b, h, first = _program(m, heads, BK)
        row, key, rows = tl.arange(0, BQ), tl.arange(0, BK), m - first
        q, q_step = _at(q, b, h, 0, q_b, q_n, q_h, UNIT)
        k, k_step = _at(k, b, h, first, k_b, k_n, k_h, UNIT)
        v, v_step = _at(v, b, h, first, v_b, v_n, v_h, UNIT)
        at, step = ((b * m + first) * heads + h) * D, heads.to(tl.int64) * D
        k1, k2 = _load(k, key, k_step, rows, D, D1, D2)
        v1, v2 = _load(v, key, v_step, rows, D, D1, D2)
        do += (b * n * heads + h) * D
        lse += (b * heads + h) * n
        delta += (b * heads + h) * n
        dk1, dk2 = _zeros(BK, D1, D2)
        dv1, dv2 = _zeros(BK, D1, D2)
        for start in range(0, n, BQ):
            q1, q2 = _load(q + start * q_step, row, q_step, n - start, D, D1, D2)
            do1, do2 = _load(do + start * step, row, step, n - start, D, D1, D2)
            log = tl.load(lse + start + row, mask=row < n - start, other=0.0)
            dot = tl.load(delta + start + row, mask=row < n - start, other=0.0)
            p = tl.exp2(_across(k1, k2, q1, q2, D2) * SCALE - log[None, :])  # (BK, BQ)
            dv1, dv2 = _add(dv1, dv2, p, do1, do2, D2)
            ds = p * (_across(v1, v2, do1, do2, D2) - dot[None, :])
            dk1, dk2 = _add(dk1, dk2, ds, q1, q2, D2)
        _store(dk + at, key, step, rows, dk1 * BACK, dk2 * BACK, D, D1, D2)
        _store(dv + at, key, step, rows, dv1, dv2, D, D1, D2)


# ---------------------------------------------------------------------------------------------------------------------
# launches


def _power(n):
    """The next power of two that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def plan(kind, q, k, v):
    """Arguments, constants, grid, warps and stages of a launch; of shapes, strides and dtype alone."""
    (b, n, heads, d), m = q.shape, k.shape[1]
    whole, table = _power(d), EXACT if q.dtype == torch.float32 else HALF
    d1, d2 = whole // 2, _power(d - whole // 2) if d > 64 else whole
    d1, d2 = (d1, d2) if d1 + d2 < whole else (whole, 0)
    width = sum(d1 + d2 > limit for limit in (64, 96, 160))
    few = kind == "forward" and m <= table["few"][width][1]
    bq, bk, warps, stages = table["few" if few else kind][width]
    if few and table is HALF and SPARSE[width] and b * heads * -(-n // bq) < HALF_OF_GPU:
        bq, bk, warps, stages = SPARSE[width]
    bk = _power(m) if few else bk
    steps = {
        f"{name}_{axis}": x.stride(i) if x.shape[i] > 1 else 0
        for name, x in (("q", q), ("k", k), ("v", v))
        for i, axis in enumerate("bnh")
    }
    unit = 1 if any(s % 8 for s in steps.values()) else 8
    args = dict(
        q=q, k=k, v=v, heads=heads, n=n, m=m, **{name: s // unit for name, s in steps.items()}
    )
    constants = {
        "D": d,
        "D1": d1,
        "D2": d2,
        "UNIT": unit,
        "SCALE": d**-0.5 * LOG2E,
        "BQ": bq,
        "BK": bk,
    }
    constants |= {"FEW": few} if kind == "forward" else {"BACK": d**-0.5}
    constants |= {} if kind == "dkv" else {"EVEN": m % bk == 0}
    return args, constants, (b * heads * -(-m // bk if kind == "dkv" else -n // bq),), warps, stages


def _launch(kernel, args, constants, grid, warps, stages):
    with torch.cuda.device_of(args["q"]):
        kernel[grid](**args, **constants, num_warps=warps, num_stages=stages)


def _empty(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def forward(q, k, v, launch=_launch):
    """o, and lse (b, heads, n) in base 2."""
    args, *rest = plan("forward", q, k, v)
    o, lse = _empty(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    launch(attention_forward, args | {"o": o, "lse": lse}, *rest)
    return o, lse


def backward(do, q, k, v, o, lse, keys=True, launch=_launch):
    """dq, and dk and dv if `keys`."""
    args, *rest = plan("dq", q, k, v)
    do, delta, dq = do.contiguous(), _empty(lse), _empty(q)
    launch(attention_dq, args | {"o": o, "do": do, "lse": lse, "delta": delta, "dq": dq}, *rest)
    if not keys:
        return dq, None, None
    dk, dv = _empty(k), _empty(v)
    args, *rest = plan("dkv", q, k, v)
    launch(attention_dkv, args | {"do": do, "lse": lse, "delta": delta, "dk": dk, "dv": dv}, *rest)
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        o, lse = forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        try:
            return backward(do, q, k, v, o, lse, keys=any(ctx.needs_input_grad[1:]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton's, ptxas' or the driver's many kinds
            kernels.failed("attention's backward", error)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention_ref(*inputs), inputs, do)


def attention(q, k, v):
    """softmax(q k^T d^-0.5) v: q (b, n, heads, d), k and v (b, m, heads, d) -> (b, n, heads, d), contiguous."""
    b, n, heads, d = q.shape
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert k.shape == v.shape and (k.shape[0], *k.shape[2:]) == (b, heads, d), shapes
    fits = d % 8 == 0 and d <= 256 and q.dtype == k.dtype == v.dtype and q.numel() and k.numel()
    if fits and kernels.active(q, k, v):
        try:
            q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
            if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                return _Attention.apply(q, k, v)
            return forward(q, k, v)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kernels.failed("attention", error)
    return attention_ref(q, k, v)


# ---------------------------------------------------------------------------------------------------------------------
# what is shipped, and how fast it is

# (heads, their width, queries, the condition's tokens): self- and cross-attention at each level, of the published
# U-Net, the published classifier, and the mini model's U-Net and classifier
UNET = ((8, 40, 1024, 32), (8, 80, 256, 32), (8, 160, 64, 32), (8, 160, 16, 32))
SITES = UNET + (
    (8, 32, 256, 32),
    (8, 32, 64, 32),
    (3, 32, 256, 128),
    (3, 48, 64, 128),
    (4, 16, 256, 128),
    (4, 32, 64, 128),
)
WIDE = (
    (8, 192, 256, 32),
    (8, 256, 256, 32),
)  # of nobody's yet; compiled too, so that all widths are known to work


def inputs(b, heads, d, n, m, dtype, device):
    """q, k and v as the networks have them; m None: all of one projection."""
    if m is None:
        return torch.empty(b, n, 3, heads, d, dtype=dtype, device=device).unbind(2)
    return [torch.empty(b, rows, heads, d, dtype=dtype, device=device) for rows in (n, m, m)]


def shipped():
    """What `kernels.gate` compiles: each different launch of forward and backward, by the very calls that make them;
    bfloat16 everywhere, float16 and float32 at some sites. `wide`: each tile has 16 bytes for every thread."""
    calls, kinds = {}, {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

    def record(kernel, args, constants, grid, warps, stages):
        types = {
            name: "*" + kinds[x.dtype] if torch.is_tensor(x) else "i32" for name, x in args.items()
        }
        tile = (
            min(constants["BQ"], constants["BK"])
            * (constants["D2"] or constants["D1"])
            * args["q"].element_size()
        )
        calls.setdefault(
            (kernel, types["q"], *constants.values()),
            {
                "name": f"{kernel.__name__} {n}x{m or n} of {d}, {kinds[dtype]}, batch {b}",
                "fn": kernel,
                "args": types,
                "constexprs": constants,
                "num_warps": warps,
                "num_stages": stages,
                "matrix": True,
                "wide": kernel is attention_forward and tile >= 512 * warps,
            },
        )

    for dtype, sites in (
        (torch.bfloat16, SITES + WIDE),
        (torch.float16, UNET[:1]),
        (torch.float32, SITES[:5] + WIDE[1:]),
    ):
        for heads, d, n, tokens in sites:
            for m in (None, tokens):
                for b in (2, 16):  # few programs, and many
                    q, k, v = inputs(b, heads, d, n, m, dtype, "meta")
                    o, lse = forward(q, k, v, launch=record)
                    backward(o, q, k, v, o, lse, launch=record)
    return list(calls.values())


def timed(b, device="cuda"):
    """Self- and cross-attention of the published U-Net; of the latter, keys and values stay in cache."""
    for heads, d, n, tokens in UNET:
        for m in (None, tokens):
            q, k, v = leaves = [
                x.normal_() for x in inputs(b, heads, d, n, m, torch.bfloat16, device)
            ]
            name = f"{'cross' if m else 'self'}-attention {n}x{m or n} of {d}"
            yield Site(
                name,
                attention,
                attention_ref,
                (q, k, v),
                (4 if m else 8) * q.numel(),
                4 * q.numel() * (m or n),
                leaves,
                3.5,
            )


if __name__ == "__main__":
    run("kernels.attention", __doc__, timed)
