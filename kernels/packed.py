"""Weights in the order in which a CPU multiplies, made once instead of in every call.

in   a network for use: no gradient passes through it, its weights are not saved
out  the same network; each convolution and product keeps its weight as oneDNN wants it, from its first call on

oneDNN works on blocks of channels and reorders a weight before every product: of the published U-Net's convolutions 2.4 GB in float32,
written and read anew in each step (docs/performance.md has what that costs). The operations are those that torch.compile's frozen CPU graphs call, without its minutes
of compilation. Where torch has no oneDNN (macOS, ARM), on a GPU, and with `kernels.choose("torch")`, everything stays as it is.
"""

import platform
from types import MethodType

import torch
from torch import nn

import kernels

NONE = "none", [], ""  # nothing fused behind a product


def _convolve(self, x):
    if not self.weight.is_mkldnn:
        weight, self.weight = self.weight.data.to_mkldnn(), None  # never three copies at once
        ordered = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )
        self.weight = nn.Parameter(ordered, requires_grad=False)
    return torch.ops.mkldnn._convolution_pointwise(
        x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, *NONE
    )


def _order(layer, rows):
    if not layer.weight.is_mkldnn:
        layer.weight = nn.Parameter(
            torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, rows), requires_grad=False
        )


def _multiply(self, x):
    _order(self, x.numel() // x.shape[-1])
    return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *NONE)


def add_product(x, y, layer):
    """x (..., n) + layer(y), y (..., k), the layer without bias: the product adds to what is there, which spares a pass over memory."""
    if isinstance(layer.forward, MethodType) and layer.forward.__func__ is _multiply:
        _order(layer, y.numel() // y.shape[-1])
        return torch.ops.mkldnn._linear_pointwise.binary(y, x, layer.weight, None, "add")
    return torch.addmm(x.flatten(0, -2), y.flatten(0, -2), layer.weight.t()).view(x.shape)


def possible(dtype):
    """Whether this CPU and this build of torch have what it takes, and whether it pays: in bfloat16 it was worth 6 to 20 %, and the moments in
    which a weight lies in memory twice took `sample.py` from 1.13 to 1.20 times the size of its files."""
    return (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and platform.machine() in ("x86_64", "AMD64")
    )


def pack(network):
    """In place. -> network"""
    weight = next(network.parameters())
    if kernels.mode != "torch" and weight.device.type == "cpu" and possible(weight.dtype):
        for layer in network.modules():
            if type(layer) in (nn.Conv2d, nn.Linear):
                layer.forward = MethodType(
                    _convolve if type(layer) is nn.Conv2d else _multiply, layer
                )
    return network
