"""GroupNorm with its neighbours in a U-Net: y = act(GroupNorm(cat([x, skip], 1) + add)), forward and backward.

in   x (b, c, *spatial), skip (b, c2, *spatial) or None, add (b, c + c2) or None, weight and bias (c + c2,); maps are
     read where they are if contiguous or channels last, else copied; act is SiLU or nothing
out  (b, c + c2, *spatial) in x's dtype and format

    python -m kernels.group_norm --out group_norm           times, on a GPU

    n = (u - mean) rstd,  z = n weight + bias,  dz = dy act'(z)                 u: the sum under the norm
    du = rstd (weight dz - <weight dz> - n <weight dz n>)                       < >: the mean over a group
    dweight = sum dz n,  dbias = sum dz,  dadd = sum du

Replaces up to five passes over memory (concatenation, addition, statistics, normalisation, SiLU) by one: a program
holds a group, or a few neighbouring ones, in registers. Every U-Net map fits; of the autoencoder's large ones, one
kernel makes the statistics of stretches of positions, and the next merges them and normalises. Statistics are float32:
the mean, then squares about it; along a stretch lane by lane (Welford), merged by Chan's formula. x, mean and rstd are
kept for the backward pass, where a program reads its groups twice, the second time from cache. Sums over the batch are
torch's, without atomics: equal from run to run. What a sample becomes does not depend on the others in its batch.

Reading the skip in place saves a read and a write of every channel only where nothing else needs the concatenation: a
residual block's 1x1 convolution must then be split in two. Otherwise, concatenate and give that as x.

Where the kernels do not run (`kernels.active`) or fail, `group_norm_ref` does. Sizes are reasoned from registers and
memory sectors and compiled by `kernels.gate`; docs/performance.md has what an H100 says of them.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels.benchmark import Site, run

HELD = 32768  # values in a program's registers: 128 in each thread of 8 warps, half of an SM's
TWICE = 131072  # values that one program of the backward pass reads twice; more take two launches
TILE = 8192  # values a step, where a program does not hold its groups
STRETCHES = 64  # at most, of a group
# {(positions, channels of a group): groups a program}, forward, channels last, where an H100 wants
# fewer than the rule of `plan` gives at every batch; `python tools/gpu/sweep.py` prints this table
FEWER = {(256, 20): 1}


def group_norm_ref(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    dtype, wide = x.dtype, torch.promote_types(x.dtype, weight.dtype)
    if skip is not None:
        x = torch.cat([x, skip], 1)  # (b, c + c2, *spatial)
    if add is not None:
        x = x + add.to(dtype)[(..., *[None] * (x.dim() - 2))]
    y = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y, inplace=not y.requires_grad) if silu else y).to(
        dtype
    )  # a map less at the peak


# ---------------------------------------------------------------------------------------------------------------------
# kernels; a tile is (positions, channels), the channels those of G neighbouring groups of D

if kernels.triton is not None:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    @triton.jit
    def _program(groups, D: constexpr, G: constexpr, BLOCK_C: constexpr):
        """This program's sample, groups (of the whole batch), channels, which lanes have one, and whose each is."""
        blocks = groups // G
        b = (tl.program_id(0) // blocks).to(tl.int64)
        first = tl.program_id(0) % blocks * G
        group, lane = tl.arange(0, G), tl.arange(0, BLOCK_C)
        return (
            b,
            b * groups + first + group,
            first * D + lane,
            lane < G * D,
            group[:, None] == (lane // D)[None, :],
        )

    @triton.jit
    def _by_group(v, member):  # (channels,) -> (groups,): sums
        return tl.sum(tl.where(member, v[None, :], 0.0), 1)

    @triton.jit
    def _by_channel(v, member):  # (groups,) -> (channels,): each its group's
        return tl.sum(tl.where(member, v[:, None], 0.0), 0)

    @triton.jit
    def _load(at, mask):
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _at(x, skip, b, p, c, positions, channels, border, LAST: constexpr):
        """Addresses of a tile: channels from `border` on are the skip's; without one, border is channels."""
        step = 1 if LAST else positions
        row = border if LAST else 1
        at = x + b * positions * border + c * step
        if skip is not None:
            at = tl.where(
                c < border, at, skip + b * positions * (channels - border) + (c - border) * step
            )
            row = tl.where(c < border, border, channels - border)[None, :] if LAST else 1
        return at[None, :] + p[:, None] * row

    @triton.jit
    def _read(
        x,
        skip,
        add,
        add_row,
        b,
        start,
        last,
        c,
        own,
        positions,
        channels,
        border,
        BLOCK_P: constexpr,
        LAST: constexpr,
        EVEN: constexpr,
    ):
        """u of a tile, zeros outside; its positions; what is inside (EVEN: no tile reaches past the last position)."""
        p = start + tl.arange(0, BLOCK_P)
        mask = own[None, :] if EVEN else (p < last)[:, None] & own[None, :]
        u = _load(_at(x, skip, b, p, c, positions, channels, border, LAST), mask)
        if add is not None:
            u = tl.where(mask, u + _load(add + b * add_row + c, own)[None, :], 0.0)
        return u, p, mask

    @triton.jit
    def _write(
        y, n, weight, bias, b, p, c, mask, positions, channels, LAST: constexpr, SILU: constexpr
    ):
        z = n * weight[None, :] + bias[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(
            _at(y, None, b, p, c, positions, channels, channels, LAST),
            z.to(y.dtype.element_ty),
            mask=mask,
        )

    @triton.jit
    def group_norm_statistics(
        x,
        skip,
        add,
        add_row,
        means,
        squares,
        positions,
        channels,
        border,
        groups,
        stretch,
        D: constexpr,
        G: constexpr,
        BLOCK_P: constexpr,
        BLOCK_C: constexpr,
        LAST: constexpr,
        EVEN: constexpr,
    ):
        """Of a stretch, at (stretch, b, group): the mean and the sum of squares about it."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        seen = tl.zeros((BLOCK_P,), tl.float32)
        m = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(first, last, BLOCK_P):
            u, p, mask = _read(
                x,
                skip,
                add,
                add_row,
                b,
                start,
                last,
                c,
                own,
                positions,
                channels,
                border,
                BLOCK_P,
                LAST,
                EVEN,
            )
            seen += tl.where(p < last, 1.0, 0.0)
            d = tl.where(mask, u - m, 0.0)
            m += d * (1.0 / tl.maximum(seen, 1.0))[:, None]
            q += d * tl.where(mask, u - m, 0.0)
        whole = _by_group(tl.sum(m * seen[:, None], 0), member) / (D * (last - first))
        d = m - _by_channel(whole, member)[None, :]
        at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * G + group
        tl.store(means + at, whole)
        tl.store(squares + at, _by_group(tl.sum(q + d * d * seen[:, None], 0), member))

    @triton.jit
    def group_norm_forward(
        x,
        skip,
        add,
        add_row,
        weight,
        bias,
        y,
        means,
        squares,
        mean,
        rstd,
        positions,
        channels,
        border,
        groups,
        stretch,
        eps,
        D: constexpr,
        G: constexpr,
        BLOCK_P: constexpr,
        BLOCK_C: constexpr,
        LAST: constexpr,
        EVEN: constexpr,
        SILU: constexpr,
        BLOCK_S: constexpr,
    ):
        """Of groups that fit in registers (BLOCK_S 1), or of one of their stretches, whose statistics it merges."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        if BLOCK_S == 1:
            u, p, mask = _read(
                x,
                skip,
                add,
                add_row,
                b,
                0,
                last,
                c,
                own,
                positions,
                channels,
                border,
                BLOCK_P,
                LAST,
                EVEN,
            )
            m = _by_group(tl.sum(u, 0), member) / (D * positions)
            n = tl.where(mask, u - _by_channel(m, member)[None, :], 0.0)
            variance = _by_group(tl.sum(n * n, 0), member) / (D * positions)
        else:
            s = tl.arange(0, BLOCK_S)
            seen = tl.minimum(tl.maximum(positions - s * stretch, 0), stretch).to(tl.float32)[
                :, None
            ]
            at = (s.to(tl.int64) * tl.num_programs(0) * G)[:, None] + group[
                None, :
            ]  # (stretches, groups)
            part = _load(means + at, seen > 0)
            m = tl.sum(part * seen, 0) / positions
            d = part - m[None, :]
            variance = tl.sum(_load(squares + at, seen > 0) + d * d * seen * D, 0) / (D * positions)
        r = tl.rsqrt(variance + eps)
        if tl.program_id(1) == 0:
            tl.store(mean + group, m)
            tl.store(rstd + group, r)
        w, shift = _load(weight + c, own) * _by_channel(r, member), _load(bias + c, own)
        if BLOCK_S == 1:
            _write(y, n, w, shift, b, p, c, mask, positions, channels, LAST, SILU)
        else:
            m = _by_channel(m, member)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(
                    x,
                    skip,
                    add,
                    add_row,
                    b,
                    start,
                    last,
                    c,
                    own,
                    positions,
                    channels,
                    border,
                    BLOCK_P,
                    LAST,
                    EVEN,
                )
                _write(y, u - m[None, :], w, shift, b, p, c, mask, positions, channels, LAST, SILU)

    @triton.jit
    def _gradient(
        dy,
        u,
        mean,
        rstd,
        weight,
        bias,
        b,
        p,
        c,
        mask,
        positions,
        channels,
        LAST: constexpr,
        SILU: constexpr,
    ):
        """n and dz of a tile, zeros outside."""
        g = _load(_at(dy, None, b, p, c, positions, channels, channels, LAST), mask)
        n = tl.where(mask, (u - mean[None, :]) * rstd[None, :], 0.0)
        if SILU:
            z = n * weight[None, :] + bias[None, :]
            s = tl.sigmoid(z)
            g *= s * (1.0 + z * (1.0 - s))
        return n, g

    @triton.jit
    def group_norm_backward(
        x,
        skip,
        add,
        add_row,
        weight,
        bias,
        dy,
        mean,
        rstd,
        sums,
        dx,
        dskip,
        dadd,
        positions,
        channels,
        border,
        groups,
        stretch,
        D: constexpr,
        G: constexpr,
        BLOCK_P: constexpr,
        BLOCK_C: constexpr,
        LAST: constexpr,
        EVEN: constexpr,
        SILU: constexpr,
        SUM: constexpr,
        SPREAD: constexpr,
    ):
        """SUM: dz and dz n over a stretch, to sums (2, stretches, b, c). SPREAD: du, from sums (2, b, c) unless SUM."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        m, r = _load(mean + b * groups + c // D, own), _load(rstd + b * groups + c // D, own)
        w, shift = _load(weight + c, own), _load(bias + c, own)
        at, end = b * channels + c, tl.num_programs(0).to(tl.int64) * G * D
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        if SUM:
            plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            weighed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(
                    x,
                    skip,
                    add,
                    add_row,
                    b,
                    start,
                    last,
                    c,
                    own,
                    positions,
                    channels,
                    border,
                    BLOCK_P,
                    LAST,
                    EVEN,
                )
                n, g = _gradient(
                    dy, u, m, r, w, shift, b, p, c, mask, positions, channels, LAST, SILU
                )
                plain += g
                weighed += g * n
            a, q = tl.sum(plain, 0), tl.sum(weighed, 0)
            tl.store(sums + tl.program_id(1) * end + at, a, mask=own)
            tl.store(sums + (tl.num_programs(1) + tl.program_id(1)) * end + at, q, mask=own)
        else:
            a, q = _load(sums + at, own), _load(sums + end + at, own)
        if SPREAD:
            a = _by_channel(_by_group(a * w, member) / (D * positions), member)
            q = _by_channel(_by_group(q * w, member) / (D * positions), member)
            total = tl.zeros((BLOCK_C,), tl.float32)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(
                    x,
                    skip,
                    add,
                    add_row,
                    b,
                    start,
                    last,
                    c,
                    own,
                    positions,
                    channels,
                    border,
                    BLOCK_P,
                    LAST,
                    EVEN,
                )
                n, g = _gradient(
                    dy, u, m, r, w, shift, b, p, c, mask, positions, channels, LAST, SILU
                )
                du = tl.where(
                    mask, (g * w[None, :] - a[None, :] - n * q[None, :]) * r[None, :], 0.0
                )
                into = _at(dx, dskip, b, p, c, positions, channels, border, LAST)
                tl.store(into, du.to(dx.dtype.element_ty), mask=mask)
                total += tl.sum(du, 0)
            if dadd is not None:
                tl.store(dadd + tl.program_id(1) * end + at, total, mask=own)


# ---------------------------------------------------------------------------------------------------------------------
# launches


def plan(x, channels, groups, last, forward):
    """Constants, blocks of groups, positions a stretch, stretches and warps of a launch, from one sample's shape alone.
    Channels last, neighbouring groups share a program until a position's run of channels is made of 16-byte loads and
    not shorter than a 32-byte sector; where that takes over half of the limit, any run down to a sector will do."""
    positions, d, limit, g = x[0, 0].numel(), channels // groups, HELD if forward else TWICE, 1
    power, run = kernels.triton.next_power_of_2, d * x.element_size()
    rows = power(positions)
    while last and groups % (2 * g) == 0 and (g * run % 16 or g * run < 32):
        g *= 2
    wide = g
    while g > 1 and 2 * rows * power(g * d) > limit and g * run >= 64:
        g //= 2
    whole = rows * power(g * d) <= limit
    if not whole:
        g = wide
    elif last and forward:
        g = FEWER.get((positions, d), g)
    block_c = power(g * d)
    block_p = rows if whole and forward else min(rows, max(1, TILE // block_c))
    stretch = positions if whole else -(-positions // STRETCHES // block_p) * block_p
    constants = {
        "D": d,
        "G": g,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "LAST": last,
        "EVEN": positions % block_p == 0,
    }
    # forward, 8 warps were never slower than 16 on an H100
    warps = min(8 if forward else 16, max(4, block_p * block_c // (1024 if forward else 512)))
    return constants, groups // g, stretch, -(-positions // stretch), warps


def _launch(kernel, grid, args, constants, warps):
    with torch.cuda.device_of(args["x"]):
        kernel[grid](**args, **constants, num_warps=warps, num_stages=1)


def _new(x, *shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=x.device)


def _map(x, channels, last):
    b, _, *spatial = x.shape
    y = _new(x, *((b, *spatial, channels) if last else (b, channels, *spatial)), dtype=x.dtype)
    return y.movedim(-1, 1) if last else y


def _dense(t, last=False):
    """Its values as (b, *spatial, c) or (b, c, *spatial) in memory, a copy if need be."""
    return t if t is None else t.movedim(1, -1).contiguous() if last else t.contiguous()


def _rows(add):
    """add (b, c), a slice or one row expanded too, as it is where its channels are contiguous."""
    return add if add is None or add.stride(1) == 1 else add.contiguous()


def _sources(x, weight, bias, groups, add, skip):
    channels, last = len(weight), x.stride(1) == 1
    add = _rows(add)
    return (
        channels,
        last,
        {
            "x": _dense(x, last),
            "skip": _dense(skip, last),
            "add": add,
            "add_row": 0 if add is None else add.stride(0),
            "weight": _dense(weight),
            "bias": _dense(bias),
            "positions": x[0, 0].numel(),
            "channels": channels,
            "border": x.shape[1],
            "groups": groups,
        },
    )


def forward(x, weight, bias, groups, eps, silu, add, skip, launch=_launch):
    """y, and mean and rstd, each (b, groups)."""
    channels, last, args = _sources(x, weight, bias, groups, add, skip)
    constants, blocks, stretch, stretches, warps = plan(x, channels, groups, last, True)
    grid, y, (mean, rstd) = (
        (len(x) * blocks, stretches),
        _map(x, channels, last),
        _new(x, 2, len(x), groups),
    )
    means, squares = _new(x, 2, stretches, len(x), groups) if stretches > 1 else (None, None)
    args |= {"means": means, "squares": squares, "stretch": stretch}
    if stretches > 1:
        sources = {k: v for k, v in args.items() if k not in ("weight", "bias")}
        launch(group_norm_statistics, grid, sources, constants, warps)
    of = {"SILU": silu, "BLOCK_S": kernels.triton.next_power_of_2(stretches)}
    launch(
        group_norm_forward,
        grid,
        args | {"y": y, "mean": mean, "rstd": rstd, "eps": eps},
        constants | of,
        warps,
    )
    return y, mean, rstd


def backward(
    dy, x, weight, bias, groups, silu, add, skip, mean, rstd, wanted=(True,) * 5, launch=_launch
):
    """Gradients of x, weight, bias, add and skip; sums over the batch only for those that are wanted."""
    channels, last, args = _sources(x, weight, bias, groups, add, skip)
    constants, blocks, stretch, stretches, warps = plan(x, channels, groups, last, False)
    grid, whole, constants["SILU"] = (len(x) * blocks, stretches), stretches == 1, silu
    dx, dskip = (None if t is None else _map(t, t.shape[1], last) for t in (x, skip))
    sums = _new(x, 2, stretches, len(x), channels)
    dadd = None
    if add is not None and wanted[3]:
        dadd = _new(x, stretches, *add.shape)
    args |= {
        "dy": _dense(dy, last),
        "mean": mean,
        "rstd": rstd,
        "sums": sums,
        "dx": dx,
        "dskip": dskip,
        "dadd": dadd,
        "stretch": stretch,
    }
    launch(group_norm_backward, grid, args, constants | {"SUM": True, "SPREAD": whole}, warps)
    of_weights = wanted[1] or wanted[2]
    if of_weights or not whole:
        sums = sums.sum(1)  # (2, b, c)
    if not whole:
        launch(
            group_norm_backward,
            grid,
            args | {"sums": sums},
            constants | {"SUM": False, "SPREAD": True},
            warps,
        )
    dbias = dweight = None
    if of_weights:
        dbias, dweight = sums.sum(1)
        dbias, dweight = dbias.to(bias.dtype), dweight.to(weight.dtype)
    if dadd is not None:
        dadd = dadd.sum(0).to(add.dtype)
    return dx, dweight, dbias, dadd, dskip


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add, skip, groups, eps, silu):
        y, mean, rstd = forward(x, weight, bias, groups, eps, silu, add, skip)
        ctx.save_for_backward(x, weight, bias, add, skip, mean, rstd)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (*tensors, mean, rstd), (groups, eps, silu) = ctx.saved_tensors, ctx.settings
        x, weight, bias, add, skip = tensors
        try:
            wanted = ctx.needs_input_grad[:5]
            grads = backward(dy, x, weight, bias, groups, silu, add, skip, mean, rstd, wanted)
            return *grads, None, None, None
        except torch.OutOfMemoryError:  # says nothing about the kernel
            raise
        except Exception as error:  # of the compiler's, the assembler's and the driver's own kinds
            kernels.failed("group_norm's backward pass", error)
        with torch.enable_grad():
            x, weight, bias, add, skip = tensors = [
                t if t is None else t.detach().requires_grad_() for t in tensors
            ]
            y = group_norm_ref(x, weight, bias, groups, eps, silu, add, skip)
        grads = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], dy))
        return *(t if t is None else next(grads) for t in tensors), None, None, None


def group_norm(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    """act(GroupNorm(cat([x, skip], 1) + add)): x (b, c, *spatial), skip (b, c2, *spatial), add (b, c + c2)."""
    channels, (b, _, *spatial) = x.shape[1] + (0 if skip is None else skip.shape[1]), x.shape
    if channels % groups:
        raise ValueError(f"{channels} channels do not split into {groups} groups")
    if (
        not len(weight) == len(bias) == channels
        or add is not None
        and add.shape != (b, channels)
        or (skip is not None and skip.shape != (b, skip.shape[1], *spatial))
    ):
        raise ValueError(
            f"weight, bias, add and skip do not fit x {tuple(x.shape)} and {channels} channels"
        )
    fits = (
        spatial
        and x.numel()
        and channels // groups <= TILE
        and channels * x[0, 0].numel() < 2**31
        and (skip is None or skip.dtype == x.dtype)
    )
    if fits and kernels.active(*(t for t in (x, weight, bias, add, skip) if t is not None)):
        try:
            return _GroupNorm.apply(x, weight, bias, add, skip, groups, eps, silu)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kernels.failed("group_norm", error)
    return group_norm_ref(x, weight, bias, groups, eps, silu, add, skip)


# ---------------------------------------------------------------------------------------------------------------------
# what is shipped, and how fast it is

# (network, batches, {map: channels of the norms over it, and of the skip where that is read beside x})
SITES = [
    (
        "unet",
        (2, 16, 128),
        {
            (16, 64): ((320, 0), (640, 0), (960, 0), (640, 320), (960, 320)),
            (8, 32): (
                (320, 0),
                (640, 0),
                (960, 0),
                (1280, 0),
                (1920, 0),
                (960, 320),
                (1280, 640),
                (1920, 640),
            ),
            (4, 16): ((640, 0), (1280, 0), (1920, 0), (2560, 0), (1920, 640), (2560, 1280)),
            (2, 8): ((1280, 0), (2560, 0), (2560, 1280)),
        },
    ),
    (
        "classifier",
        (1, 8, 64),
        {(16, 64): ((128, 0),), (8, 32): ((128, 0), (256, 0)), (4, 16): ((256, 0),)},
    ),
    (
        "vae",
        (1, 8),
        {
            (128, 512): ((128, 0), (256, 0)),
            (64, 256): ((128, 0), (256, 0), (512, 0)),
            (32, 128): ((256, 0), (512, 0)),
            (16, 64): ((512, 0),),
        },
    ),
]


def _inputs(b, c, s, h, w, device, add=False):
    def make(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    x, skip = (
        make(b, n, h, w).to(memory_format=torch.channels_last) if n else None for n in (c - s, s)
    )
    return {
        "x": x,
        "weight": make(c),
        "bias": make(c),
        "groups": 32,
        "silu": True,
        "add": make(b, c) if add else None,
        "skip": skip,
    }


def shipped():
    """What `kernels.gate` compiles: each different launch of forward and backward at the networks' shapes, in bfloat16,
    with SiLU and, where they have one, the time embedding; without these a kernel is a part of that."""
    calls, names = {}, {torch.bfloat16: "*bf16", torch.float32: "*fp32"}

    def record(kernel, grid, args, constants, warps):
        args = {
            k: names[v.dtype] if torch.is_tensor(v) else "fp32" if k == "eps" else v
            for k, v in args.items()
        }
        seen = [(k, (v % 16 == 0, v == 1) if isinstance(v, int) else v) for k, v in args.items()]
        name = f"{kernel.__name__} {network} {c}@{h}x{w}" + f" skip {s}" * (s > 0)
        calls.setdefault(
            (kernel, *constants.items(), *seen),
            {
                "name": name,
                "fn": kernel,
                "args": args,
                "constexprs": constants,
                "num_warps": warps,
                "num_stages": 1,
                "matrix": False,
            },
        )

    for network, _, maps in SITES:
        for (h, w), c, s in ((m, *norm) for m, norms in maps.items() for norm in norms):
            given = _inputs(2, c, s, h, w, "meta", network != "vae" and not s)
            y, mean, rstd = forward(**given, eps=1e-5, launch=record)
            backward(y, **given, mean=mean, rstd=rstd, launch=record)
            if network == "classifier":  # in guidance, whose gradient is x's alone
                alone = True, False, False, False, False
                backward(y, **given, mean=mean, rstd=rstd, wanted=alone, launch=record)
    return calls.values()


# height, width, channels, of which the skip's: the published U-Net's largest and commonest at each level, and a map of the decoder
TIMED = (
    (16, 64, 320, 0),
    (16, 64, 640, 320),
    (16, 64, 960, 320),
    (8, 32, 640, 0),
    (8, 32, 1280, 640),
    (4, 16, 1280, 0),
    (4, 16, 2560, 1280),
    (2, 8, 1280, 0),
    (2, 8, 2560, 1280),
    (128, 512, 128, 0),
)


def timed(b, device="cuda"):
    """With SiLU; with the time embedding where the U-Net's have one."""
    for h, w, c, s in TIMED:
        if b * h * w * c >= 2**31:
            continue  # no sampling decodes as many clips at once
        given = _inputs(b, c, s, h, w, device, add=not s and h <= 16)
        args = tuple(
            given[k] if k in given else 1e-5
            for k in ("x", "weight", "bias", "groups", "eps", "silu", "add", "skip")
        )
        leaves = [t.normal_() for t in args if torch.is_tensor(t)]
        yield Site(
            f"group norm {c}@{h}x{w}" + f" skip {s}" * (s > 0),
            group_norm,
            group_norm_ref,
            args,
            4 * b * c * h * w,
            0,
            leaves,
            2.5,
        )


if __name__ == "__main__":
    run("kernels.group_norm", __doc__, timed)
