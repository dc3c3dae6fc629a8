"""Attention without its matrix of scores in memory: o = softmax(q k^T d^-0.5) v for each head.

in   q (b, n, heads, d), k and v (b, m, heads, d), float32, float16 or bfloat16, as views of any
     strides: slices of one projection, a condition's keys expanded over the batch; any n and m, d a
     multiple of 8 up to 256
out  (b, n, heads, d) contiguous, so that .flatten(2) costs nothing; gradients of q, k and v

    python -m kernels.attention --out attention             times, on a GPU

    s = q k^T d^-0.5,  p = exp(s - lse),  o = p v               lse: log-sum-exp of a row of s
    delta = <do, o>,  ds = p (do v^T - delta)
    dq = ds k d^-0.5,  dk = ds^T q d^-0.5,  dv = p^T do

Replaces two products, the softmax and the copies that bring heads together and apart: a head is an
address and a stride. A program holds some queries of one head and passes over the keys with a
running maximum (FlashAttention-2, Dao 2023). Up to 64 keys, be they a condition's 32 or a 4 x 16
map's, are one block: no loop, a plain softmax. Backward, one kernel passes over the keys for dq;
another over the queries for dk and dv, left out where only q has a gradient, as in guidance.

No atomics: the same twice. Sums, scores and lse are float32; products of half types run on tensor
cores, those of float32 are exact ("ieee", no TF32). A head of 40 is computed as 64 columns, 80 as
64 + 16, 160 as 128 + 32.

Where the kernels do not run (`kernels.active`) or fail, `attention_ref` does. Blocks are chosen
from registers and shared memory as `kernels.gate` compiles them; docs/performance.md has what an
H100 says of them.
"""

import itertools
from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels.benchmark import Site, run
from kernels.launch import Launch, Shipped, cdiv, gradients, guarded, recording

# Kernel -> block of queries, block of keys, warps, stages, for heads computed as up to 64, 96, 160
# and 256 columns. 128 x 64 reads keys half as often as 64 x 64, and 1024 queries fill 132 SMs even
# so. Wide heads and the two sums of dkv take all of a thread's 255 registers; with one stage
# instead of two, the operand that stays would spill.
LIMITS = (64, 96, 160)
HALF = {
    "few": [(64, 64, 4, 1)] * 4,
    "forward": [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 16, 4, 2)],
    "dq": [(64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 2)],
    "dkv": [(32, 64, 4, 2), (32, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)],
}
# Of "few" where those make fewer programs than half of an H100's multiprocessors: one or two clips'
# small maps. None: the same. `python -m tools.gpu.sweep` prints what it finds better
SPARSE = [None, None, (16, 64, 4, 1), None]
HALF_OF_GPU = 64
EXACT = {  # float32
    "few": [(32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    "forward": [(32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (32, 16, 8, 2)],
    "dq": [(16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)],
    "dkv": [(16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)],
}
LOG2E = 1.4426950408889634  # scores are in base 2, whose exponential is an instruction


def attention_ref(q, k, v):
    """The same in plain torch: fallback, test oracle and baseline."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    in_bfloat16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if in_bfloat16 and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        # training on a CPU: the backward pass of torch's fused attention takes up to three times
        # as long as the plain products
        with torch.autocast("cpu", enabled=False):
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).contiguous()


# --------------------------------------------------------------------------------------------------
# kernels. A tile is rows of one head, as a pair of D1 and D2 columns, powers of two; where one part
# will do, D2 is 0 and the second of the pair not used

if kernels.triton is not None:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    LAYOUT = ["q_b", "q_n", "q_h", "k_b", "k_n", "k_h", "v_b", "v_n", "v_h", "heads", "n", "m"]
    jit = triton.jit(do_not_specialize=LAYOUT)  # one compilation for all their values

    @triton.jit
    def _program(rows, heads, BLOCK: constexpr):
        """This program's sample, head and first row. Blocks of a head are neighbors, to find its
        keys in the cache."""
        blocks = tl.cdiv(rows, BLOCK)
        head = tl.program_id(0) // blocks
        b = (head // heads).to(tl.int64)
        h = (head % heads).to(tl.int64)
        return b, h, tl.program_id(0) % blocks * BLOCK

    @triton.jit
    def _at(x, b, h, row, x_b, x_n, x_h, UNIT: constexpr):
        """Rows of one head from a row on: their address, and the step from one to the next. Strides
        come divided by UNIT: loads are of 16 bytes only if the compiler sees that 8 divides them,
        which a 40 given at run time does not show."""
        step = x_n.to(tl.int64) * UNIT
        return x + (b * x_b + h * x_h) * UNIT + row * step, step

    @triton.jit
    def _part(at, row, step, last, START: constexpr, WIDTH: constexpr, D: constexpr):
        """Addresses of a tile's columns from START on, and which of them exist."""
        col = START + tl.arange(0, WIDTH)
        return at + row[:, None] * step + col[None, :], (row[:, None] < last) & (col[None, :] < D)

    @triton.jit
    def _load(rows, start, row, last, D: constexpr, D1: constexpr, D2: constexpr):
        """A tile of rows from `start` on in its own dtype, zeros where no row or column exists."""
        base, step = rows
        base += start * step
        last -= start
        at, exists = _part(base, row, step, last, 0, D1, D)
        one = tl.load(at, mask=exists, other=0.0)
        two = one
        if D2 > 0:
            at, exists = _part(base, row, step, last, D1, D2, D)
            two = tl.load(at, mask=exists, other=0.0)
        return one, two

    @triton.jit
    def _store(rows, row, last, tile, D: constexpr, D1: constexpr, D2: constexpr):
        base, step = rows
        at, exists = _part(base, row, step, last, 0, D1, D)
        tl.store(at, tile[0].to(base.dtype.element_ty), mask=exists)
        if D2 > 0:
            at, exists = _part(base, row, step, last, D1, D2, D)
            tl.store(at, tile[1].to(base.dtype.element_ty), mask=exists)

    @triton.jit
    def _zeros(ROWS: constexpr, D1: constexpr, D2: constexpr):
        return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2 if D2 > 0 else D1), tl.float32)

    @triton.jit
    def _scaled(tile, factor):
        return tile[0] * factor, tile[1] * factor

    @triton.jit
    def _across(a, b, D2: constexpr):
        """a b^T in float32: (rows of a, rows of b)."""
        s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
        if D2 > 0:
            s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
        return s

    @triton.jit
    def _add(total, p, b, D2: constexpr):
        """total + p b, the sum in float32, p rounded to b's dtype."""
        one = tl.dot(p.to(b[0].dtype), b[0], total[0], input_precision="ieee")
        two = total[1]
        if D2 > 0:
            two = tl.dot(p.to(b[1].dtype), b[1], two, input_precision="ieee")
        return one, two

    @jit
    def attention_forward(
        q,  # (b, n, heads, d), strides q_b, q_n, q_h, over UNIT
        k,  # (b, m, heads, d)
        v,  # (b, m, heads, d)
        o,  # (b, n, heads, d), contiguous
        lse,  # (b, heads, n), float32, in base 2
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
        D: constexpr,
        D1: constexpr,
        D2: constexpr,
        UNIT: constexpr,
        SCALE: constexpr,
        BQ: constexpr,
        BK: constexpr,
        EVEN: constexpr,
        FEW: constexpr,
    ):
        """o and lse of a block of queries. FEW: all keys are one block; EVEN: BK divides m."""
        b, h, first = _program(n, heads, BQ)
        row = tl.arange(0, BQ)
        key = tl.arange(0, BK)
        rows = n - first
        q = _at(q, b, h, first, q_b, q_n, q_h, UNIT)
        k = _at(k, b, h, 0, k_b, k_n, k_h, UNIT)
        v = _at(v, b, h, 0, v_b, v_n, v_h, UNIT)
        # the queries stay in registers or shared memory
        queries = _load(q, 0, row, rows, D, D1, D2)
        out = _zeros(BQ, D1, D2)
        if FEW:
            # a plain softmax over the only block of keys
            keys = _load(k, 0, key, m, D, D1, D2)
            values = _load(v, 0, key, m, D, D1, D2)
            s = _across(queries, keys, D2)  # (BQ, BK)
            if not EVEN:
                s = tl.where(key[None, :] < m, s, float("-inf"))
            top = tl.max(s, 1) * SCALE
            p = tl.exp2(s * SCALE - top[:, None])
            total = tl.sum(p, 1)
            out = _add(out, p, values, D2)
        else:
            # a running softmax: when a higher score comes, what was summed so far shrinks
            top = tl.full((BQ,), float("-inf"), tl.float32)
            total = tl.zeros((BQ,), tl.float32)
            for start in range(0, m, BK):
                keys = _load(k, start, key, m, D, D1, D2)
                values = _load(v, start, key, m, D, D1, D2)
                s = _across(queries, keys, D2)
                if not EVEN:
                    s = tl.where(key[None, :] < m - start, s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1) * SCALE)
                p = tl.exp2(s * SCALE - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 1)
                out = _add(_scaled(out, shrink[:, None]), p, values, D2)
                top = higher
        # rows of o, all heads' beside each other, in o's dtype
        o += ((b * n + first) * heads + h) * D
        step = heads.to(tl.int64) * D
        out = out[0] / total[:, None], out[1] / total[:, None]
        _store((o, step), row, rows, out, D, D1, D2)
        tl.store(lse + (b * heads + h) * n + first + row, top + tl.log2(total), mask=row < rows)

    @jit
    def attention_dq(
        q,  # q, k, v as in attention_forward
        k,
        v,
        o,  # (b, n, heads, d), contiguous, like do and dq
        do,
        lse,  # (b, heads, n), float32, like delta
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
        D: constexpr,
        D1: constexpr,
        D2: constexpr,
        UNIT: constexpr,
        SCALE: constexpr,
        BACK: constexpr,
        BQ: constexpr,
        BK: constexpr,
        EVEN: constexpr,
    ):
        """dq of a block of queries, and delta, which attention_dkv reads. BACK: d^-0.5."""
        b, h, first = _program(n, heads, BQ)
        row = tl.arange(0, BQ)
        key = tl.arange(0, BK)
        rows = n - first
        q = _at(q, b, h, first, q_b, q_n, q_h, UNIT)
        k = _at(k, b, h, 0, k_b, k_n, k_h, UNIT)
        v = _at(v, b, h, 0, v_b, v_n, v_h, UNIT)
        at = ((b * n + first) * heads + h) * D
        step = heads.to(tl.int64) * D
        # what belongs to the queries stays
        queries = _load(q, 0, row, rows, D, D1, D2)
        out = _load((o + at, step), 0, row, rows, D, D1, D2)
        grad = _load((do + at, step), 0, row, rows, D, D1, D2)
        # delta: of each row the product of o and do, in float32
        dot = tl.sum(out[0].to(tl.float32) * grad[0].to(tl.float32), 1)
        if D2 > 0:
            dot += tl.sum(out[1].to(tl.float32) * grad[1].to(tl.float32), 1)
        place = (b * heads + h) * n + first + row
        tl.store(delta + place, dot, mask=row < rows)
        log = tl.load(lse + place, mask=row < rows, other=0.0)
        # sum of ds k over the blocks of keys
        total = _zeros(BQ, D1, D2)
        for start in range(0, m, BK):
            keys = _load(k, start, key, m, D, D1, D2)
            values = _load(v, start, key, m, D, D1, D2)
            p = tl.exp2(_across(queries, keys, D2) * SCALE - log[:, None])  # (BQ, BK)
            if not EVEN:
                # past the last key ds meets a k of 0, and only has to be finite
                p = tl.minimum(p, 1.0)
            ds = p * (_across(grad, values, D2) - dot[:, None])
            total = _add(total, ds, keys, D2)
        _store((dq + at, step), row, rows, _scaled(total, BACK), D, D1, D2)

    @jit
    def attention_dkv(
        q,  # q, k, v as in attention_forward
        k,
        v,
        do,  # (b, n, heads, d), contiguous
        lse,  # (b, heads, n), float32, like delta
        delta,
        dk,  # (b, m, heads, d), contiguous, like dv
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
        D: constexpr,
        D1: constexpr,
        D2: constexpr,
        UNIT: constexpr,
        SCALE: constexpr,
        BACK: constexpr,
        BQ: constexpr,
        BK: constexpr,
    ):
        """dk and dv of a block of keys. The scores are transposed, so that p and ds are left
        operands as they are."""
        b, h, first = _program(m, heads, BK)
        row = tl.arange(0, BQ)
        key = tl.arange(0, BK)
        rows = m - first
        q = _at(q, b, h, 0, q_b, q_n, q_h, UNIT)
        k = _at(k, b, h, first, k_b, k_n, k_h, UNIT)
        v = _at(v, b, h, first, v_b, v_n, v_h, UNIT)
        at = ((b * m + first) * heads + h) * D
        step = heads.to(tl.int64) * D
        # what belongs to the keys stays
        keys = _load(k, 0, key, rows, D, D1, D2)
        values = _load(v, 0, key, rows, D, D1, D2)
        do += (b * n * heads + h) * D
        lse += (b * heads + h) * n
        delta += (b * heads + h) * n
        # sums of p do and ds q over the blocks of queries
        key_total = _zeros(BK, D1, D2)
        value_total = _zeros(BK, D1, D2)
        for start in range(0, n, BQ):
            queries = _load(q, start, row, n, D, D1, D2)
            grad = _load((do, step), start, row, n, D, D1, D2)
            log = tl.load(lse + start + row, mask=row < n - start, other=0.0)
            dot = tl.load(delta + start + row, mask=row < n - start, other=0.0)
            p = tl.exp2(_across(keys, queries, D2) * SCALE - log[None, :])  # (BK, BQ)
            value_total = _add(value_total, p, grad, D2)
            ds = p * (_across(values, grad, D2) - dot[None, :])
            key_total = _add(key_total, ds, queries, D2)
        _store((dk + at, step), key, rows, _scaled(key_total, BACK), D, D1, D2)
        _store((dv + at, step), key, rows, value_total, D, D1, D2)


# --------------------------------------------------------------------------------------------------
# launches


def _columns(d):
    """A head's columns as computed, in one or two powers of two that tensor cores take."""
    power = kernels.triton.next_power_of_2
    columns = max(16, power(d))
    half = columns // 2
    if d > 64 and half + max(16, power(d - half)) < columns:
        return half, max(16, power(d - half))
    return columns, 0


def plan(kind, q, k, v):
    """Of forward, dq or dkv, from shapes, strides and dtype alone."""
    b, n, heads, d = q.shape
    m = k.shape[1]
    d1, d2 = _columns(d)
    # blocks from the tables
    table = EXACT if q.dtype == torch.float32 else HALF
    width = bisect_left(LIMITS, d1 + d2)
    few = kind == "forward" and m <= table["few"][width][1]
    bq, bk, warps, stages = table["few" if few else kind][width]
    if few:
        if table is HALF and SPARSE[width] and b * heads * cdiv(n, bq) < HALF_OF_GPU:
            bq, bk, warps, stages = SPARSE[width]
        bk = max(16, kernels.triton.next_power_of_2(m))
    rows, block = (m, bk) if kind == "dkv" else (n, bq)
    # strides, 0 of what is repeated, divided by 8 where possible
    strides = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        for axis, size, stride in zip("bnh", x.shape, x.stride(), strict=False):
            strides[f"{name}_{axis}"] = stride if size > 1 else 0
    unit = 1 if any(stride % 8 for stride in strides.values()) else 8
    args = {name: stride // unit for name, stride in strides.items()}
    args |= {"q": q, "k": k, "v": v, "heads": heads, "n": n, "m": m}
    args |= {"D": d, "D1": d1, "D2": d2, "UNIT": unit, "SCALE": d**-0.5 * LOG2E}
    args |= {"BQ": bq, "BK": bk}
    if kind == "forward":
        args["FEW"] = few
    else:
        args["BACK"] = d**-0.5
    if kind != "dkv":
        args["EVEN"] = m % bk == 0
    return Launch((b * heads * cdiv(rows, block),), args, warps, stages)


def _empty(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def forward(q, k, v):
    """o, and lse (b, heads, n) in base 2."""
    o = _empty(q)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    plan("forward", q, k, v).run(attention_forward, o=o, lse=lse)
    return o, lse


def backward(do, q, k, v, o, lse, keys=True):
    """dq, and dk and dv if `keys`."""
    do = do.contiguous()
    delta = _empty(lse)
    dq = _empty(q)
    plan("dq", q, k, v).run(attention_dq, o=o, do=do, lse=lse, delta=delta, dq=dq)
    if not keys:
        return dq, None, None
    dk = _empty(k)
    dv = _empty(v)
    plan("dkv", q, k, v).run(attention_dkv, do=do, lse=lse, delta=delta, dk=dk, dv=dv)
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
        return guarded(
            "attention's backward",
            lambda: backward(do, q, k, v, o, lse, keys=any(ctx.needs_input_grad[1:])),
            lambda: tuple(gradients(attention_ref, (q, k, v), do)),
        )


def _attend(q, k, v):
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v)
    return forward(q, k, v)[0]


def attention(q, k, v):
    """softmax(q k^T d^-0.5) v: q (b, n, heads, d), k and v (b, m, heads, d) -> (b, n, heads, d),
    contiguous."""
    b, n, heads, d = q.shape
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert k.shape == v.shape and (k.shape[0], *k.shape[2:]) == (b, heads, d), shapes
    fits = d % 8 == 0 and d <= 256 and q.dtype == k.dtype == v.dtype and q.numel() and k.numel()
    if fits and kernels.active(q, k, v):
        return guarded("attention", _attend, attention_ref, q, k, v)
    return attention_ref(q, k, v)


# --------------------------------------------------------------------------------------------------
# what the networks launch, and how fast it is

# (heads, their width, queries, the condition's tokens): self- and cross-attention at each level, of
# the published U-Net and classifier, and of the mini model's
UNET = ((8, 40, 1024, 32), (8, 80, 256, 32), (8, 160, 64, 32), (8, 160, 16, 32))
CLASSIFIER = ((8, 32, 256, 32), (8, 32, 64, 32))
MINI = ((3, 32, 256, 128), (3, 48, 64, 128), (4, 16, 256, 128), (4, 32, 64, 128))
SITES = UNET + CLASSIFIER + MINI
# of no network yet; compiled too, so that all widths are known to work
WIDE = ((8, 192, 256, 32), (8, 256, 256, 32))
SHIPPED = {
    torch.bfloat16: SITES + WIDE,
    torch.float16: UNET[:1],
    torch.float32: SITES[:5] + WIDE[1:],
}


def inputs(b, heads, d, n, m, dtype, device):
    """q, k and v as the networks have them; m None: all of one projection."""
    if m is None:
        return torch.empty(b, n, 3, heads, d, dtype=dtype, device=device).unbind(2)
    return [torch.empty(b, rows, heads, d, dtype=dtype, device=device) for rows in (n, m, m)]


def shipped():
    """Forward and backward at the networks' shapes, few programs and many."""
    for dtype, sites in SHIPPED.items():
        for (heads, d, n, tokens), b in itertools.product(sites, (2, 16)):
            for m in (None, tokens):
                q, k, v = inputs(b, heads, d, n, m, dtype, "meta")
                with recording() as launches:
                    o, lse = forward(q, k, v)
                    backward(o, q, k, v, o, lse)
                name = f"{n}x{m or n} of {heads} x {d}, {str(dtype)[6:]}, batch {b}"
                for launch in launches:
                    yield Shipped(name, launch, matrix=True, wide=_fills_threads(launch))


def _fills_threads(launch):
    """Whether each tile of the forward pass has 16 bytes for every thread."""
    args = launch.args
    values = min(args["BQ"], args["BK"]) * (args["D2"] or args["D1"])
    tile = values * args["q"].element_size()
    return launch.kernel is attention_forward and tile >= 512 * launch.warps


def timed(b, device="cuda"):
    """Sites of the published U-Net. In cross-attention keys and values stay in cache."""
    for heads, d, n, tokens in UNET:
        for m in (None, tokens):
            leaves = [x.normal_() for x in inputs(b, heads, d, n, m, torch.bfloat16, device)]
            size = leaves[0].numel()
            yield Site(
                f"{'cross' if m else 'self'}-attention {n}x{m or n} of {d}",
                attention,
                attention_ref,
                tuple(leaves),
                nbytes=(4 if m else 8) * size,
                flops=4 * size * (m or n),
                leaves=leaves,
                backward=3.5,
            )


if __name__ == "__main__":
    run("kernels.attention", __doc__, timed)
