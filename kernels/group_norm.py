"""GroupNorm with its neighbors in a U-Net: y = act(GroupNorm(cat([x, skip], 1) + add)).

in   x (b, c, *spatial), skip (b, c2, *spatial) or None, add (b, c + c2) or None, weight and bias
     (c + c2,); maps are read in place if contiguous or channels last, else copied; act is SiLU or
     nothing
out  (b, c + c2, *spatial) in x's dtype and format; gradients of x, skip, add, weight and bias

    python -m kernels.group_norm --out group_norm           times, on a GPU

    n = (u - mean) rstd,  z = n weight + bias,  dz = dy act'(z)         u: the sum under the norm
    du = rstd (weight dz - <weight dz> - n <weight dz n>)               < >: the mean over a group
    dweight = sum dz n,  dbias = sum dz,  dadd = sum du

Replaces up to five passes over memory (concatenation, addition, statistics, normalization, SiLU) by
one: a program holds a group, or a few neighboring ones, in registers. Every U-Net map fits; of the
autoencoder's large ones, one kernel makes the statistics of stretches of positions, and the next
merges them and normalizes. Statistics are float32: the mean, then squares about it; along a stretch
lane by lane (Welford), merged by Chan's formula. x, mean and rstd are kept for the backward pass,
where a program reads its groups twice, the second time from cache. Sums over the batch are torch's,
without atomics: equal from run to run. A sample's result does not depend on the others in its
batch.

Reading the skip in place saves a read and a write of every channel only where nothing else needs
the concatenation: a residual block's 1x1 convolution must then be split in two. Otherwise,
concatenate and give that as x.

Where the kernels do not run (`kernels.active`) or fail, `group_norm_ref` does. Sizes are reasoned
from registers and memory sectors and compiled by `kernels.gate`; docs/performance.md has what an
H100 says of them.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels
from kernels.benchmark import Site, run
from kernels.launch import Launch, Shipped, cdiv, gradients, guarded, recording

HELD = 32768  # values in a program's registers: 128 in each thread of 8 warps, half of an SM's
TWICE = 131072  # values that one program of the backward pass reads twice; more take two launches
TILE = 8192  # values a step, where a program does not hold its groups
STRETCHES = 64  # at most, of a group
# {(positions, channels of a group): groups a program}, forward, channels last, where an H100 wants
# fewer than the rule of `plan` gives at every batch; `python -m tools.gpu.sweep` prints this table
FEWER = {(256, 20): 1}


def group_norm_ref(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    """The same in plain torch: fallback, test oracle and baseline."""
    dtype = x.dtype
    wide = torch.promote_types(dtype, weight.dtype)
    if skip is not None:
        x = torch.cat([x, skip], 1)  # (b, c + c2, *spatial)
    if add is not None:
        x = x + add.to(dtype)[(..., *[None] * (x.dim() - 2))]
    y = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    if silu:
        y = F.silu(y, inplace=not y.requires_grad)  # in place: a map less at the peak
    return y.to(dtype)


# --------------------------------------------------------------------------------------------------
# kernels; a tile is (positions, channels), the channels those of G neighboring groups of D

if kernels.triton is not None:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    from kernels.launch import load

    @triton.jit
    def _program(groups, D: constexpr, G: constexpr, BLOCK_C: constexpr):
        """This program's sample, groups (of the whole batch) and channels; which lanes have one
        (BLOCK_C,), and whose each is (G, BLOCK_C)."""
        blocks = groups // G
        b = (tl.program_id(0) // blocks).to(tl.int64)
        first = tl.program_id(0) % blocks * G
        group = tl.arange(0, G)
        lane = tl.arange(0, BLOCK_C)
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
    def _at(x, skip, p, place, border, LAST: constexpr):
        """Addresses of a tile: channels from `border` on are the skip's; without one, border is
        channels."""
        b, c, own, positions, channels = place
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
    def _read(source, place, start, last, BLOCK_P: constexpr, LAST: constexpr, EVEN: constexpr):
        """u of a tile in float32, zeros outside; its positions; what is inside (EVEN: no tile
        reaches past the last position)."""
        x, skip, add, add_row, border = source
        b, c, own, positions, channels = place
        p = start + tl.arange(0, BLOCK_P)
        mask = own[None, :] if EVEN else (p < last)[:, None] & own[None, :]
        u = load(_at(x, skip, p, place, border, LAST), mask)
        if add is not None:
            u = tl.where(mask, u + load(add + b * add_row + c, own)[None, :], 0.0)
        return u, p, mask

    @triton.jit
    def _write(y, n, weight, bias, p, place, mask, LAST: constexpr, SILU: constexpr):
        """act(n weight + bias), computed in float32, to y in its dtype."""
        z = n * weight[None, :] + bias[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(_at(y, None, p, place, place[4], LAST), z.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def group_norm_statistics(
        x,  # (b, border, *spatial)
        skip,  # (b, channels - border, *spatial) or None
        add,  # (b, channels), rows add_row apart, or None
        add_row,
        means,  # (stretches, b, groups), float32, like squares
        squares,
        positions,
        channels,
        border,
        groups,
        stretch,  # positions of a program
        D: constexpr,
        G: constexpr,
        BLOCK_P: constexpr,
        BLOCK_C: constexpr,
        LAST: constexpr,
        EVEN: constexpr,
    ):
        """Of a stretch: the mean and the sum of squares about it."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        source = x, skip, add, add_row, border
        place = b, c, own, positions, channels
        # Welford: each lane of the tile has its own mean and squares of what it has seen
        seen = tl.zeros((BLOCK_P,), tl.float32)
        m = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(first, last, BLOCK_P):
            u, p, mask = _read(source, place, start, last, BLOCK_P, LAST, EVEN)
            seen += tl.where(p < last, 1.0, 0.0)
            d = tl.where(mask, u - m, 0.0)
            m += d * (1.0 / tl.maximum(seen, 1.0))[:, None]
            q += d * tl.where(mask, u - m, 0.0)
        # Chan: the lanes' means merge, and squares about them become squares about the merged one
        mean = _by_group(tl.sum(m * seen[:, None], 0), member) / (D * (last - first))
        d = m - _by_channel(mean, member)[None, :]
        at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * G + group
        tl.store(means + at, mean)
        tl.store(squares + at, _by_group(tl.sum(q + d * d * seen[:, None], 0), member))

    @triton.jit
    def _merge(
        means, squares, group, positions, stretch, D: constexpr, G: constexpr, BLOCK_S: constexpr
    ):
        """Mean and variance of groups from those of their stretches, the last of which may be
        shorter (Chan)."""
        s = tl.arange(0, BLOCK_S)
        seen = tl.minimum(tl.maximum(positions - s * stretch, 0), stretch).to(tl.float32)[:, None]
        at = (s.to(tl.int64) * tl.num_programs(0) * G)[:, None] + group[None, :]
        part = load(means + at, seen > 0)  # (stretches, groups)
        m = tl.sum(part * seen, 0) / positions
        d = part - m[None, :]
        return m, tl.sum(load(squares + at, seen > 0) + d * d * seen * D, 0) / (D * positions)

    @triton.jit
    def group_norm_forward(
        x,  # x to add_row as in group_norm_statistics
        skip,
        add,
        add_row,
        weight,  # (channels,), like bias
        bias,
        y,  # (b, channels, *spatial), in the format of x
        means,  # (stretches, b, groups), float32, like squares; None if BLOCK_S is 1
        squares,
        mean,  # (b, groups), float32, like rstd
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
        """Of groups that fit in registers (BLOCK_S 1), or of one of their stretches, whose
        statistics it merges."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        source = x, skip, add, add_row, border
        place = b, c, own, positions, channels
        # statistics, in float32: the mean first, then the squares about it
        if BLOCK_S == 1:
            u, p, mask = _read(source, place, 0, last, BLOCK_P, LAST, EVEN)
            m = _by_group(tl.sum(u, 0), member) / (D * positions)
            n = tl.where(mask, u - _by_channel(m, member)[None, :], 0.0)
            variance = _by_group(tl.sum(n * n, 0), member) / (D * positions)
        else:
            m, variance = _merge(means, squares, group, positions, stretch, D, G, BLOCK_S)
        r = tl.rsqrt(variance + eps)
        if tl.program_id(1) == 0:
            tl.store(mean + group, m)
            tl.store(rstd + group, r)
        # the norm's weight and 1 / deviation are one factor for each channel
        w = load(weight + c, own) * _by_channel(r, member)
        shift = load(bias + c, own)
        if BLOCK_S == 1:
            _write(y, n, w, shift, p, place, mask, LAST, SILU)
        else:
            m = _by_channel(m, member)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(source, place, start, last, BLOCK_P, LAST, EVEN)
                _write(y, u - m[None, :], w, shift, p, place, mask, LAST, SILU)

    @triton.jit
    def _gradient(dy, u, norm, p, place, mask, LAST: constexpr, SILU: constexpr):
        """n and dz of a tile, zeros outside; norm: mean, rstd, weight and bias of each channel."""
        mean, rstd, weight, bias = norm
        g = load(_at(dy, None, p, place, place[4], LAST), mask)
        n = tl.where(mask, (u - mean[None, :]) * rstd[None, :], 0.0)
        if SILU:
            z = n * weight[None, :] + bias[None, :]
            s = tl.sigmoid(z)
            g *= s * (1.0 + z * (1.0 - s))
        return n, g

    @triton.jit
    def group_norm_backward(
        x,  # x to add_row as in group_norm_statistics
        skip,
        add,
        add_row,
        weight,  # (channels,), like bias
        bias,
        dy,  # (b, channels, *spatial), in the format of x
        mean,  # (b, groups), float32, like rstd
        rstd,
        sums,  # (2, stretches, b, channels), float32; if not SUM, (2, b, channels)
        dx,  # like x
        dskip,  # like skip
        dadd,  # (stretches, b, channels), float32, or None
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
        """SUM: dz and dz n over a stretch, to sums. SPREAD: du, from sums unless SUM."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        source = x, skip, add, add_row, border
        place = b, c, own, positions, channels
        m = load(mean + b * groups + c // D, own)
        r = load(rstd + b * groups + c // D, own)
        w = load(weight + c, own)
        norm = m, r, w, load(bias + c, own)
        at = b * channels + c
        end = tl.num_programs(0).to(tl.int64) * G * D
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        # a and q: sums of dz and dz n of each channel, in float32
        if SUM:
            plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            weighed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(source, place, start, last, BLOCK_P, LAST, EVEN)
                n, g = _gradient(dy, u, norm, p, place, mask, LAST, SILU)
                plain += g
                weighed += g * n
            a = tl.sum(plain, 0)
            q = tl.sum(weighed, 0)
            tl.store(sums + tl.program_id(1) * end + at, a, mask=own)
            tl.store(sums + (tl.num_programs(1) + tl.program_id(1)) * end + at, q, mask=own)
        else:
            a = load(sums + at, own)
            q = load(sums + end + at, own)
        if SPREAD:
            # their means over the group, and with them du, the maps read once more
            a = _by_channel(_by_group(a * w, member) / (D * positions), member)
            q = _by_channel(_by_group(q * w, member) / (D * positions), member)
            total = tl.zeros((BLOCK_C,), tl.float32)
            for start in range(first, last, BLOCK_P):
                u, p, mask = _read(source, place, start, last, BLOCK_P, LAST, EVEN)
                n, g = _gradient(dy, u, norm, p, place, mask, LAST, SILU)
                du = (g * w[None, :] - a[None, :] - n * q[None, :]) * r[None, :]
                du = tl.where(mask, du, 0.0)
                into = _at(dx, dskip, p, place, border, LAST)
                tl.store(into, du.to(dx.dtype.element_ty), mask=mask)
                total += tl.sum(du, 0)
            if dadd is not None:
                tl.store(dadd + tl.program_id(1) * end + at, total, mask=own)


# --------------------------------------------------------------------------------------------------
# launches


def plan(x, channels, groups, last, forward):
    """Grid, sizes and warps for maps like x, whose channels are last if `last`. They follow from
    one sample's shape alone, so its numbers do not depend on the batch."""
    positions = x[0, 0].numel()
    d = channels // groups
    limit = HELD if forward else TWICE
    power = kernels.triton.next_power_of_2
    rows = power(positions)
    # channels last, neighboring groups share a program until a position's run of channels is made
    # of 16-byte loads and not shorter than a 32-byte sector
    run = d * x.element_size()
    g = 1
    while last and groups % (2 * g) == 0 and (g * run % 16 or g * run < 32):
        g *= 2
    aligned = g
    # where that takes over half of the limit, any run down to a sector will do
    while g > 1 and 2 * rows * power(g * d) > limit and g * run >= 64:
        g //= 2
    fits = rows * power(g * d) <= limit
    if not fits:
        g = aligned
    elif last and forward:
        g = FEWER.get((positions, d), g)
    block_c = power(g * d)
    block_p = min(rows, max(1, TILE // block_c))
    stretch = positions
    if not fits:
        stretch = cdiv(cdiv(positions, STRETCHES), block_p) * block_p
    elif forward:
        block_p = rows
    if forward:  # 8 warps were never slower than 16 on an H100
        warps = min(8, max(4, block_p * block_c // 1024))
    else:
        warps = min(16, max(4, block_p * block_c // 512))
    sizes = {"D": d, "G": g, "BLOCK_P": block_p, "BLOCK_C": block_c, "stretch": stretch}
    sizes |= {"LAST": last, "EVEN": positions % block_p == 0}
    return Launch((len(x) * groups // g, cdiv(positions, stretch)), sizes, warps)


def _new(x, *shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=x.device)


def _map(x, channels, last):
    b, _, *spatial = x.shape
    if last:
        return _new(x, b, *spatial, channels, dtype=x.dtype).movedim(-1, 1)
    return _new(x, b, channels, *spatial, dtype=x.dtype)


def _dense(x, last):
    """Its values as (b, *spatial, c) or (b, c, *spatial) in memory, a copy if need be."""
    if x is not None and last:
        x = x.movedim(1, -1)
    return x if x is None else x.contiguous()


def _rows(add):
    """add (b, c), a slice or one row expanded too, in place where its channels are contiguous."""
    return add if add is None or add.stride(1) == 1 else add.contiguous()


def _prepare(x, weight, bias, groups, add, skip, forward):
    """A launch with all that either pass reads."""
    last = x.stride(1) == 1
    add = _rows(add)
    launch = plan(x, len(weight), groups, last, forward)
    launch.args |= {
        "x": _dense(x, last),
        "skip": _dense(skip, last),
        "add": add,
        "add_row": 0 if add is None else add.stride(0),
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "positions": x[0, 0].numel(),
        "channels": len(weight),
        "border": x.shape[1],
        "groups": groups,
    }
    return launch


def forward(x, weight, bias, groups, eps, silu, add, skip):
    """y, and mean and rstd, each (b, groups)."""
    launch = _prepare(x, weight, bias, groups, add, skip, True)
    stretches = launch.grid[1]
    y = _map(x, len(weight), launch.args["LAST"])
    mean, rstd = _new(x, 2, len(x), groups)
    means = squares = None
    if stretches > 1:
        means, squares = _new(x, 2, stretches, len(x), groups)
        launch.run(group_norm_statistics, means=means, squares=squares)
    launch.args |= {"SILU": silu, "BLOCK_S": kernels.triton.next_power_of_2(stretches), "eps": eps}
    launch.run(group_norm_forward, y=y, means=means, squares=squares, mean=mean, rstd=rstd)
    return y, mean, rstd


def backward(
    dy, x, weight, bias, groups, silu, add, skip, mean, rstd, of_weights=True, of_add=True
):
    """Gradients of x, weight, bias, add and skip; sums over the batch only if `of_weights` and
    `of_add`."""
    launch = _prepare(x, weight, bias, groups, add, skip, False)
    last = launch.args["LAST"]
    stretches = launch.grid[1]
    dx = _map(x, x.shape[1], last)
    dskip = None if skip is None else _map(skip, skip.shape[1], last)
    dadd = _new(x, stretches, *add.shape) if add is not None and of_add else None
    launch.args |= {"dy": _dense(dy, last), "mean": mean, "rstd": rstd, "SILU": silu}
    launch.args |= {"dx": dx, "dskip": dskip, "dadd": dadd}
    sums = _new(x, 2, stretches, len(x), len(weight))
    launch.run(group_norm_backward, sums=sums, SUM=True, SPREAD=stretches == 1)
    if of_weights or stretches > 1:
        sums = sums.sum(1)  # (2, b, c)
    if stretches > 1:
        launch.run(group_norm_backward, sums=sums, SUM=False, SPREAD=True)
    dbias = dweight = None
    if of_weights:
        dbias, dweight = sums.sum(1)
        dbias = dbias.to(bias.dtype)
        dweight = dweight.to(weight.dtype)
    if dadd is not None:
        dadd = dadd.sum(0).to(add.dtype)
    return dx, dweight, dbias, dadd, dskip


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu, add, skip):
        y, mean, rstd = forward(x, weight, bias, groups, eps, silu, add, skip)
        ctx.save_for_backward(x, weight, bias, add, skip, mean, rstd)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *tensors, mean, rstd = ctx.saved_tensors
        groups, eps, silu = ctx.settings
        _, weight, bias, *_, add, _ = ctx.needs_input_grad

        def by_kernels(x, w, b, a, skip):
            wanted = weight or bias, add
            return backward(dy, x, w, b, groups, silu, a, skip, mean, rstd, *wanted)

        def reference(x, w, b, a, skip):
            return group_norm_ref(x, w, b, groups, eps, silu, a, skip)

        def by_torch(*tensors):
            return gradients(reference, tensors, dy)

        grads = guarded("group_norm's backward pass", by_kernels, by_torch, *tensors)
        return *grads[:3], None, None, None, *grads[3:]


def group_norm(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    """act(GroupNorm(cat([x, skip], 1) + add)): x (b, c, *spatial), skip (b, c2, *spatial), add
    (b, c + c2). Raises ValueError where groups or shapes do not fit."""
    b, channels, *spatial = x.shape
    fits = True
    if skip is not None:
        fits = skip.shape == (b, skip.shape[1], *spatial)
        channels += skip.shape[1]
    if channels % groups:
        raise ValueError(f"{channels} channels do not split into {groups} groups")
    if add is not None:
        fits = fits and add.shape == (b, channels)
    if not fits or not len(weight) == len(bias) == channels:
        raise ValueError(
            f"weight, bias, add and skip do not fit x {tuple(x.shape)} and {channels} channels"
        )
    known = (
        spatial
        and x.numel()
        and channels // groups <= TILE
        and channels * x[0, 0].numel() < 2**31
        and (skip is None or skip.dtype == x.dtype)
    )
    args = x, weight, bias, groups, eps, silu, add, skip
    if known and kernels.active(*(t for t in args if torch.is_tensor(t))):
        return guarded("group_norm", _GroupNorm.apply, group_norm_ref, *args)
    return group_norm_ref(*args)


# --------------------------------------------------------------------------------------------------
# what the networks launch, and how fast it is

SITES = {  # network: {map: {channels of a skip that is read beside x: channels of the norms}}
    "unet": {
        (16, 64): {0: (320, 640, 960), 320: (640, 960)},
        (8, 32): {0: (320, 640, 960, 1280, 1920), 320: (960,), 640: (1280, 1920)},
        (4, 16): {0: (640, 1280, 1920, 2560), 640: (1920,), 1280: (2560,)},
        (2, 8): {0: (1280, 2560), 1280: (2560,)},
    },
    "classifier": {(16, 64): {0: (128,)}, (8, 32): {0: (128, 256)}, (4, 16): {0: (256,)}},
    "vae": {
        (128, 512): {0: (128, 256)},
        (64, 256): {0: (128, 256, 512)},
        (32, 128): {0: (256, 512)},
        (16, 64): {0: (512,)},
    },
}


def _inputs(b, c, s, h, w, device, add=False):
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    def empty_map(channels):
        return empty(b, channels, h, w).to(memory_format=torch.channels_last)

    return {
        "x": empty_map(c - s),
        "weight": empty(c),
        "bias": empty(c),
        "groups": 32,
        "eps": 1e-5,
        "silu": True,
        "add": empty(b, c) if add else None,
        "skip": empty_map(s) if s else None,
    }


def _launches(network, given):
    """Forward and backward; in guidance, of the classifier, the gradient is x's alone."""
    with recording() as launches:
        y, mean, rstd = forward(**given)
        given = {name: value for name, value in given.items() if name != "eps"}
        backward(y, **given, mean=mean, rstd=rstd)
        if network == "classifier":
            backward(y, **given, mean=mean, rstd=rstd, of_weights=False, of_add=False)
    return launches


def shipped():
    """Forward and backward at the networks' shapes, in bfloat16, with SiLU and, where they have
    one, the time embedding; without these a kernel is a part of that."""
    for network, maps in SITES.items():
        for (h, w), norms in maps.items():
            for s, widths in norms.items():
                for c in widths:
                    given = _inputs(2, c, s, h, w, "meta", network != "vae" and not s)
                    for launch in _launches(network, given):
                        yield Shipped(f"{network} {c}@{h}x{w} skip {s}", launch)


# height, width, channels, of which the skip's: the published U-Net's largest and commonest at each
# level, and a map of the decoder
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
    """Sites with SiLU; with the time embedding where the U-Net's have one."""
    for h, w, c, s in TIMED:
        size = b * h * w * c
        if size >= 2**31:
            continue  # no sampling decodes as many clips at once
        args = tuple(_inputs(b, c, s, h, w, device, add=not s and h <= 16).values())
        yield Site(
            f"group norm {c}@{h}x{w} skip {s}",
            group_norm,
            group_norm_ref,
            args,
            nbytes=4 * size,
            leaves=[t.normal_() for t in args if torch.is_tensor(t)],
            backward=2.5,
        )


if __name__ == "__main__":
    run("kernels.group_norm", __doc__, timed)
