"""GroupNorm with what surrounds it in a U-Net: y = act(GroupNorm(cat([x, skip], 1) + add)), forward and backward.

in   x (b, c, *spatial), skip (b, c2, *spatial) or None, add (b, c + c2) or None, weight and bias (c + c2,); float32, float16 or bfloat16;
     maps are read in place where they are contiguous or channels last, else copied; act is SiLU or nothing
out  (b, c + c2, *spatial) in x's dtype and format

    python -m kernels.group_norm --out group_norm.json      times, on a GPU

    n = (u - mean) rstd,  z = n weight + bias,  dz = dy act'(z)                     u: the sum under the norm
    du = rstd (weight dz - <weight dz> - n <weight dz n>)                           < >: the mean over a group
    dweight = sum dz n,  dbias = sum dz,  dadd = sum du

Replaces up to five passes over memory (concatenation, addition, statistics, normalisation, SiLU) by one: a program holds a group, or a few
neighbouring ones, in registers. Every U-Net map fits. The autoencoder's large ones do not: there one kernel makes the statistics of
stretches of positions, and a second merges them and normalises. Statistics are float32: the mean, then squares about it; along a stretch
lane by lane (Welford), merged by Chan's formula. The backward pass keeps x, mean and rstd, and makes the rest again. It reads a group
twice, the second time from cache; its sums over the batch are torch's, without atomics, so equal from run to run.

Reading the skip in place saves the concatenation, a read and a write of every channel, only where nobody else needs it: a residual block's
1x1 convolution must then be split in two, the second adding to the first's output. Otherwise give the concatenation as x.

Where the kernels do not run (`kernels.active`) or fail, `group_norm_ref` does. The sizes below are reasoned from registers and memory
sectors and compiled by `kernels.gate`; no GPU has timed them yet.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels

HELD = 32768        # values in a program's registers: 64 in each thread of 16 warps, half of what an SM has
TWICE = 131072      # values that one program reads twice in the backward pass, rather than two launches
TILE = 8192         # values a step where a program does not hold its group
STRETCHES = 64      # parts of a group that fits neither way, at most


def group_norm_ref(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    dtype = x.dtype
    if skip is not None:
        x = torch.cat([x, skip], 1)                                             # (b, c + c2, *spatial)
    if add is not None:
        x = x + add.to(dtype)[(..., *[None] * (x.dim() - 2))]
    y = F.group_norm(x.to(weight.dtype), groups, weight, bias, eps)
    return (F.silu(y) if silu else y).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# kernels; a tile is (positions, channels), the channels those of G neighbouring groups of D

if kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _program(groups, D: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr):
        """This program's sample, groups (counted through the batch), channels, which lanes have one, and whose each is."""
        blocks = groups // G
        b = (tl.program_id(0) // blocks).to(tl.int64)
        first = tl.program_id(0) % blocks * G
        group, lane = tl.arange(0, G), tl.arange(0, BLOCK_C)
        return b, b * groups + first + group, first * D + lane, lane < G * D, group[:, None] == (lane // D)[None, :]

    @triton.jit
    def _by_group(v, member):                           # (channels,) -> (groups,): sums
        return tl.sum(tl.where(member, v[None, :], 0.0), 1)

    @triton.jit
    def _by_channel(v, member):                         # (groups,) -> (channels,): each its group's
        return tl.sum(tl.where(member, v[:, None], 0.0), 0)

    @triton.jit
    def _load(at, mask):
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _inside(p, last, own, EVEN: tl.constexpr):      # EVEN: no tile reaches beyond the last position
        if EVEN:
            return own[None, :]
        else:
            return (p < last)[:, None] & own[None, :]

    @triton.jit
    def _at(x, skip, b, p, c, positions, channels, border, LAST: tl.constexpr):
        """Addresses of a tile: channels from `border` on are skip's; without one, border is channels."""
        step = 1 if LAST else positions
        row = border if LAST else 1
        at = x + b * positions * border + c * step
        if skip is not None:
            at = tl.where(c < border, at, skip + b * positions * (channels - border) + (c - border) * step)
            row = tl.where(c < border, border, channels - border)[None, :] if LAST else 1
        return at[None, :] + p[:, None] * row

    @triton.jit
    def _read(x, skip, add, b, p, c, mask, own, positions, channels, border, LAST: tl.constexpr):
        u = _load(_at(x, skip, b, p, c, positions, channels, border, LAST), mask)
        if add is not None:
            u = tl.where(mask, u + _load(add + b * channels + c, own)[None, :], 0.0)
        return u

    @triton.jit
    def _write(y, n, weight, bias, b, p, c, mask, positions, channels, LAST: tl.constexpr, SILU: tl.constexpr):
        z = n * weight[None, :] + bias[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(_at(y, None, b, p, c, positions, channels, channels, LAST), z.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def group_norm_forward(x, skip, add, weight, bias, y, mean, rstd, positions, channels, border, groups, eps, D: tl.constexpr, G: tl.constexpr,
                           BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, SILU: tl.constexpr):
        """Of groups that fit in registers."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        p = tl.arange(0, BLOCK_P)
        mask = _inside(p, positions, own, EVEN)
        u = _read(x, skip, add, b, p, c, mask, own, positions, channels, border, LAST)
        m = _by_group(tl.sum(u, 0), member) / (D * positions)
        n = tl.where(mask, u - _by_channel(m, member)[None, :], 0.0)
        r = tl.rsqrt(_by_group(tl.sum(n * n, 0), member) / (D * positions) + eps)
        tl.store(mean + group, m)
        tl.store(rstd + group, r)
        w = _load(weight + c, own) * _by_channel(r, member)
        _write(y, n, w, _load(bias + c, own), b, p, c, mask, positions, channels, LAST, SILU)

    @triton.jit
    def group_norm_statistics(x, skip, add, mean, square, positions, channels, border, groups, stretch, D: tl.constexpr, G: tl.constexpr,
                              BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr):
        """Of a stretch, at (stretch, b, group): the mean and the sum of squares about it."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        seen = tl.zeros((BLOCK_P,), tl.float32)
        m = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(first, last, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = _inside(p, last, own, EVEN)
            u = _read(x, skip, add, b, p, c, mask, own, positions, channels, border, LAST)
            seen += tl.where(p < last, 1.0, 0.0)
            d = tl.where(mask, u - m, 0.0)
            m += d * (1.0 / tl.maximum(seen, 1.0))[:, None]
            q += d * tl.where(mask, u - m, 0.0)
        whole = _by_group(tl.sum(m * seen[:, None], 0), member) / (D * (last - first))
        d = m - _by_channel(whole, member)[None, :]
        at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * G + group
        tl.store(mean + at, whole)
        tl.store(square + at, _by_group(tl.sum(q + d * d * seen[:, None], 0), member))

    @triton.jit
    def group_norm_apply(x, skip, add, weight, bias, y, means, squares, mean, rstd, positions, channels, border, groups, eps, stretch,
                         D: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
                         LAST: tl.constexpr, EVEN: tl.constexpr, SILU: tl.constexpr):
        """Merges the stretches' statistics and normalises one of them."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        s = tl.arange(0, BLOCK_S)
        seen = tl.minimum(tl.maximum(positions - s * stretch, 0), stretch).to(tl.float32)[:, None]
        at = (s.to(tl.int64) * tl.num_programs(0) * G)[:, None] + group[None, :]
        part = _load(means + at, seen > 0)                                      # (stretches, groups)
        m = tl.sum(part * seen, 0) / positions
        d = part - m[None, :]
        r = tl.rsqrt(tl.sum(_load(squares + at, seen > 0) + d * d * seen * D, 0) / (D * positions) + eps)
        if tl.program_id(1) == 0:
            tl.store(mean + group, m)
            tl.store(rstd + group, r)
        m, w, shift = _by_channel(m, member), _load(weight + c, own) * _by_channel(r, member), _load(bias + c, own)
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        for start in range(first, last, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = _inside(p, last, own, EVEN)
            u = _read(x, skip, add, b, p, c, mask, own, positions, channels, border, LAST)
            _write(y, u - m[None, :], w, shift, b, p, c, mask, positions, channels, LAST, SILU)

    @triton.jit
    def _gradient(x, skip, add, dy, mean, rstd, weight, bias, b, p, c, mask, own, positions, channels, border,
                  LAST: tl.constexpr, SILU: tl.constexpr):
        """n and dz of a tile, zeros outside."""
        u = _read(x, skip, add, b, p, c, mask, own, positions, channels, border, LAST)
        g = _load(_at(dy, None, b, p, c, positions, channels, channels, LAST), mask)
        n = tl.where(mask, (u - mean[None, :]) * rstd[None, :], 0.0)
        if SILU:
            z = n * weight[None, :] + bias[None, :]
            s = tl.sigmoid(z)
            g *= s * (1.0 + z * (1.0 - s))
        return n, g

    @triton.jit
    def group_norm_backward(x, skip, add, weight, bias, dy, mean, rstd, sums, dx, dskip, dadd, positions, channels, border, groups, stretch,
                            D: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
                            EVEN: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr, SPREAD: tl.constexpr):
        """SUM: dz and dz n over a stretch, to sums (2, stretches, b, c); SPREAD: du from these; both: the stretch is everything."""
        b, group, c, own, member = _program(groups, D, G, BLOCK_C)
        m, r = _load(mean + b * groups + c // D, own), _load(rstd + b * groups + c // D, own)
        w, shift = _load(weight + c, own), _load(bias + c, own)
        end = tl.num_programs(0).to(tl.int64) * G * D
        at = b * channels + c
        first = tl.program_id(1) * stretch
        last = tl.minimum(first + stretch, positions)
        if SUM:
            plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            weighed = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for start in range(first, last, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                mask = _inside(p, last, own, EVEN)
                n, g = _gradient(x, skip, add, dy, m, r, w, shift, b, p, c, mask, own, positions, channels, border, LAST, SILU)
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
                p = start + tl.arange(0, BLOCK_P)
                mask = _inside(p, last, own, EVEN)
                n, g = _gradient(x, skip, add, dy, m, r, w, shift, b, p, c, mask, own, positions, channels, border, LAST, SILU)
                du = tl.where(mask, (g * w[None, :] - a[None, :] - n * q[None, :]) * r[None, :], 0.0)
                tl.store(_at(dx, dskip, b, p, c, positions, channels, border, LAST), du.to(dx.dtype.element_ty), mask=mask)
                total += tl.sum(du, 0)
            if add is not None:
                tl.store(dadd + tl.program_id(1) * end + at, total, mask=own)


# ---------------------------------------------------------------------------------------------------------------------
# launches

def _power(n):
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def plan(x, channels, groups, last, forward):
    """Constants, blocks of groups, positions a stretch, stretches and warps of a launch; from one sample's shape alone, so that its numbers do
    not depend on the batch. Channels last, neighbouring groups share a program until a position's run of channels is made of 16-byte loads and
    not shorter than a 32-byte sector; where that takes over half of the limit, any run down to a sector will do."""
    positions, d, limit, g = x[0, 0].numel(), channels // groups, HELD if forward else TWICE, 1
    run, values = d * x.element_size(), _power(x[0, 0].numel())
    while last and groups % (2 * g) == 0 and (g * run % 16 or g * run < 32):
        g *= 2
    wide = g
    while g > 1 and 2 * values * _power(g * d) > limit and g * run >= 64:
        g //= 2
    whole = values * _power(g * d) <= limit
    g = g if whole else wide
    block_p = values if whole and forward else min(values, max(1, TILE // _power(g * d)))
    stretch = positions if whole else -(-positions // STRETCHES // block_p) * block_p
    constants = dict(D=d, G=g, BLOCK_P=block_p, BLOCK_C=_power(g * d), LAST=last, EVEN=positions % block_p == 0)
    warps = min(16, max(4, block_p * _power(g * d) // (1024 if forward else 512)))
    return constants, groups // g, stretch, -(-positions // stretch), warps


def _launch(kernel, grid, args, constants, warps):
    with torch.cuda.device_of(args["x"]):
        kernel[grid](**args, **constants, num_warps=warps, num_stages=1)


def _dense(t, last):
    """Its values as (b, *spatial, c) or (b, c, *spatial) in memory, a copy if need be."""
    return t if t is None else t.movedim(1, -1).contiguous() if last else t.contiguous()


def _empty(like, channels, last):
    b, _, *spatial = like.shape
    shape = (b, *spatial, channels) if last else (b, channels, *spatial)
    y = torch.empty(shape, dtype=like.dtype, device=like.device)
    return y.movedim(-1, 1) if last else y


def _sources(x, weight, bias, groups, add, skip):
    channels, last = len(weight), x.stride(1) == 1
    args = dict(x=_dense(x, last), skip=_dense(skip, last), add=_dense(add, False), weight=_dense(weight, False), bias=_dense(bias, False),
                positions=x[0, 0].numel(), channels=channels, border=x.shape[1], groups=groups)
    return args, channels, last


def forward(x, weight, bias, groups, eps, silu, add, skip, launch=_launch):
    """y, and mean and rstd, each (b, groups)."""
    args, channels, last = _sources(x, weight, bias, groups, add, skip)
    constants, blocks, stretch, stretches, warps = plan(x, channels, groups, last, True)
    y = _empty(x, channels, last)
    mean, rstd = torch.empty(2, len(x), groups, device=x.device).unbind()
    out = dict(y=y, mean=mean, rstd=rstd, eps=eps)
    if stretches == 1:
        launch(group_norm_forward, (len(x) * blocks,), args | out, constants | dict(SILU=silu), warps)
        return y, mean, rstd
    means, squares = torch.empty(2, stretches, len(x), groups, device=x.device).unbind()
    grid, args["stretch"] = (len(x) * blocks, stretches), stretch
    part = {k: v for k, v in args.items() if k not in ("weight", "bias")} | dict(mean=means, square=squares)
    launch(group_norm_statistics, grid, part, constants, warps)
    constants = constants | dict(SILU=silu, BLOCK_S=_power(stretches))
    launch(group_norm_apply, grid, args | out | dict(means=means, squares=squares), constants, warps)
    return y, mean, rstd


def backward(dy, x, weight, bias, groups, silu, add, skip, mean, rstd, launch=_launch):
    """Gradients of x, weight, bias, add and skip."""
    args, channels, last = _sources(x, weight, bias, groups, add, skip)
    constants, blocks, stretch, stretches, warps = plan(x, channels, groups, last, False)
    dx, dskip = (None if t is None else _empty(t, t.shape[1], last) for t in (x, skip))
    sums = torch.empty(2, stretches, len(x), channels, device=x.device)
    dadd = None if add is None else torch.empty(stretches, len(x), channels, device=x.device)
    args.update(dy=_dense(dy, last), mean=mean, rstd=rstd, sums=sums, dx=dx, dskip=dskip, dadd=dadd, stretch=stretch)
    grid, constants["SILU"] = (len(x) * blocks, stretches), silu
    whole = stretches == 1
    launch(group_norm_backward, grid, args, constants | dict(SUM=True, SPREAD=whole), warps)
    sums = sums.sum(1)                                                          # (2, b, c)
    if not whole:
        launch(group_norm_backward, grid, args | dict(sums=sums), constants | dict(SUM=False, SPREAD=True), warps)
    dbias, dweight = sums.sum(1).to(weight.dtype)
    return dx, dweight, dbias, add if add is None else dadd.sum(0).to(add.dtype), dskip


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
            return *backward(dy, x, weight, bias, groups, silu, add, skip, mean, rstd), None, None, None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                                              # of Triton's, ptxas' or the driver's many kinds
            kernels.failed("group_norm's backward", error)
        with torch.enable_grad():
            x, weight, bias, add, skip = tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
            y = group_norm_ref(x, weight, bias, groups, eps, silu, add, skip)
        grads = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], dy))
        return *(t if t is None else next(grads) for t in tensors), None, None, None


def group_norm(x, weight, bias, groups, eps=1e-5, silu=False, add=None, skip=None):
    """act(GroupNorm(cat([x, skip], 1) + add)), in x's dtype and format. x (b, c, *spatial), skip (b, c2, *spatial), add (b, c + c2)."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels % groups:
        raise ValueError(f"{channels} channels do not split into {groups} groups")
    if skip is not None and (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"skip {tuple(skip.shape)} does not lie beside x {tuple(x.shape)}")
    if not len(weight) == len(bias) == channels or add is not None and add.shape != (len(x), channels):
        raise ValueError(f"weight, bias and add must have {channels} channels, add {len(x)} rows")
    fits = x.dim() > 2 and x.numel() and channels // groups <= TILE and (skip is None or skip.dtype == x.dtype)
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
SITES = [("unet", (2, 16, 128), {
    (16, 64): ((320, 0), (640, 0), (960, 0), (640, 320), (960, 320)),
    (8, 32): ((320, 0), (640, 0), (960, 0), (1280, 0), (1920, 0), (960, 320), (1280, 640), (1920, 640)),
    (4, 16): ((640, 0), (1280, 0), (1920, 0), (2560, 0), (1920, 640), (2560, 1280)),
    (2, 8): ((1280, 0), (2560, 0), (2560, 1280))}),
    ("classifier", (1, 8, 64), {(16, 64): ((128, 0),), (8, 32): ((128, 0), (256, 0)), (4, 16): ((256, 0),)}),
    ("vae", (1, 8), {(128, 512): ((128, 0), (256, 0)), (64, 256): ((128, 0), (256, 0), (512, 0)), (32, 128): ((256, 0), (512, 0)),
                     (16, 64): ((512, 0),)})]


def inputs(b, c, s, h, w, device, add=False):
    def make(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    x, skip = (make(b, n, h, w).to(memory_format=torch.channels_last) if n else None for n in (c - s, s))
    return dict(x=x, weight=make(c), bias=make(c), groups=32, silu=True, add=make(b, c) if add else None, skip=skip)


def shipped():
    """What `kernels.gate` compiles: each different launch of forward and backward at the networks' shapes, in bfloat16, with SiLU and, where
    they have one, the time embedding; what leaves these out is a part of it."""
    calls = {}

    def record(kernel, grid, args, constants, warps):
        kinds = {k: "*" + {torch.bfloat16: "bf16", torch.float32: "fp32"}[v.dtype] if torch.is_tensor(v) else "fp32" if isinstance(v, float) else v
                 for k, v in args.items()}
        key = kernel, *constants.items(), *((k, v % 16 == 0, v == 1) if isinstance(v, int) else (k, v) for k, v in kinds.items())
        calls.setdefault(key, dict(name=f"{kernel.__name__} {network} {c}@{h}x{w}" + f" of them {s} the skip's" * (s > 0), fn=kernel, args=kinds,
                                   constexprs=constants, num_warps=warps, num_stages=1, matrix=False))

    for network, _, maps in SITES:
        for (h, w), norms in maps.items():
            for c, s in norms:
                given = inputs(2, c, s, h, w, "meta", network != "vae" and not s)
                y, mean, rstd = forward(**given, eps=1e-5, launch=record)
                backward(y, **given, mean=mean, rstd=rstd, launch=record)
    return calls.values()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="also write the table here, as JSON")
    args = p.parse_args(argv)
    if not torch.cuda.is_available() or kernels.triton is None:
        sys.exit("kernels.group_norm: times need an NVIDIA GPU and Triton")
    bench = kernels.triton.testing.do_bench
    big = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    copy = 2 * big.numel() / bench(lambda: big.clone()) / 1e6
    about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=kernels.triton.__version__, copy_gb_s=round(copy))
    print(*(f"{k} {v}" for k, v in about.items()), "bfloat16, channels last, GroupNorm + SiLU; ms, and GB/s of ours", sep="; ")
    print(f"{'':34}{'forward':>30}{'':9}{'forward + backward':>30}\n{'':34}" + f"{'eager':>10}{'compiled':>10}{'ours':>10}{'GB/s':>9}" * 2)
    rows = []
    kernels.choose("triton")
    for network, b, c, h, w in ((n, b, c, *m) for n, batches, maps in SITES for m, norms in maps.items() for c, s in norms if not s for b in batches):
        given = inputs(b, c, 0, h, w, "cuda")
        leaves = [given[k].normal_().requires_grad_() for k in ("x", "weight", "bias")]
        dy, row = torch.randn_like(leaves[0]), dict(network=network, b=b, channels=c, map=[h, w])
        torch.compiler.reset()
        compiled = torch.compile(group_norm_ref, mode="max-autotune-no-cudagraphs", dynamic=False)
        for name, f in (("eager", group_norm_ref), ("compiled", compiled), ("ours", group_norm)):
            with torch.no_grad():
                row[name] = bench(lambda: f(**given), return_mode="median")
            row[name + "_both"] = bench(lambda: torch.autograd.grad(f(**given), leaves, dy), return_mode="median")
        size = dy.numel() * dy.element_size() / 1e6                             # MB: x to y, then x and dy to dx
        row |= dict(gb_s=2 * size / row["ours"], gb_s_both=5 * size / row["ours_both"])
        rows.append(row)
        times = "".join(f"{row[n + e]:>10.4f}" for e in ("",) for n in ("eager", "compiled", "ours")) + f"{row['gb_s']:>9.0f}"
        times += "".join(f"{row[n + '_both']:>10.4f}" for n in ("eager", "compiled", "ours")) + f"{row['gb_s_both']:>9.0f}"
        print(f"{network + f' b{b} {c}@{h}x{w}':<34}{times}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
