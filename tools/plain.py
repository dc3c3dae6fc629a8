"""The networks in plain PyTorch, as the official code is written: what tools.speed,
tools.speed_gpu and tools.speed_training compare with.

in   one of our networks
out  the same weights and numbers: 3-D convolutions and their norms as they stand, attention with
     all its scores in memory, maps as (b, c, h, w) in memory. `Cached`: a U-Net of ours with its
     deep half in every second call alone, which `kernels.fast.guided(deep_every=2)` is held to
"""

from types import MethodType

import torch
import torch.nn.functional as F

import cavp
import ldm
import vae


def conv_unit(self, x, frames):
    y = self.conv(x.unflatten(0, (-1, frames)).transpose(1, 2))  # (b, c, f, h, w)
    bn = self.bn
    y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    return y.transpose(1, 2).flatten(0, 1)


def slow_only(self, video):
    b, frames = video.shape[:2]
    x = video.flatten(0, 1)
    # all five parts in one go, whole clips at a time
    for part in range(5):
        x = self.run(part, x, frames)
    pooled = x.mean((2, 3))
    if self.peak:
        pooled = torch.cat([pooled, x.amax((2, 3))], 1)
    return pooled.view(b, frames, -1)


def attend(q, k, v):
    """(b, heads, n, d) -> (b, heads, n, d)"""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


def attention(self, x, context):
    def heads(y):
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

    y = attend(heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context)))
    return self.to_out(y.transpose(1, 2).flatten(2))


def attn_block(self, x):
    y = self.norm(x)
    maps = self.q(y), self.k(y), self.v(y)
    q, k, v = (z.flatten(2).transpose(1, 2)[:, None] for z in maps)  # (b, 1, h*w, c)
    return x + self.proj_out(attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


# module class: its plain forward
FORWARD = {
    cavp.ConvUnit: conv_unit,
    cavp.SlowOnly: slow_only,
    ldm.Attention: attention,
    vae.AttnBlock: attn_block,
}


def plainly(model):
    """Change `model` in place. -> model"""
    for module in model.modules():
        if type(module) in FORWARD:
            module.forward = MethodType(FORWARD[type(module)], module)
    return model.to(memory_format=torch.contiguous_format)


class Cached:
    """A plain U-Net whose deep half is computed in every second call."""

    def __init__(self, unet):
        self.unet = unet
        self.calls = 0
        self.deep = None

    def __call__(self, x, t, context):
        unet = self.unet
        emb = unet.embed(unet.one_time_each(t, x))
        half = len(unet.output_blocks) // 2
        if self.calls % 2 == 0:
            h, skips = unet.down(x, emb, context)
            for block in unet.output_blocks[:half]:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
            self.deep = h
        else:
            skips = self.shallow(x, emb, context, len(unet.output_blocks) - half)
        self.calls += 1
        h = self.deep
        for block in unet.output_blocks[half:]:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return unet.out["2"](unet.out["0"](h, silu=True))

    def shallow(self, x, emb, context, count):
        """The first `count` maps of the way down, as `Backbone.down` computes them."""
        first, *blocks = self.unet.input_blocks[:count]
        h = first(x, emb, context)
        if self.unet.config.aligned:
            h = h + self.unet.columns(context, x.shape[3])
        skips = [h]
        for block in blocks:
            h = block(h, emb, context)
            skips.append(h)
        return skips
