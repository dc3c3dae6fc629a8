"""What the kernel files share: launches as values, and torch's own operations where one fails.

A file's launchers end in `Launch.run`. Inside `recording()` nothing is launched but collected, on
the meta device too: so `kernels.gate`, tools.gpu.warm and the tests see what a GPU would get.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import kernels

if kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def load(at, mask):
        """In float32, whatever the dtype in memory; 0 where the mask is off."""
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


_recorded = None  # list of launches, inside `recording`


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


@dataclass
class Launch:
    """A grid, arguments and compile-time constants by name, and how many warps and stages."""

    grid: tuple
    args: dict
    warps: int
    stages: int = 1
    kernel: object = None

    def run(self, kernel, **more):
        """Launch the kernel on its tensors' device, with those of the arguments and of `more` that
        it names."""
        args = self.args | more
        args = {name: args[name] for name in kernel.arg_names}
        if _recorded is not None:
            _recorded.append(replace(self, args=args, kernel=kernel))
            return
        with torch.cuda.device_of(next(x for x in args.values() if torch.is_tensor(x))):
            kernel[self.grid](**args, num_warps=self.warps, num_stages=self.stages)


class Shipped(NamedTuple):
    """A launch that the networks make, and what `kernels.gate` demands of it."""

    name: str
    launch: Launch
    matrix: bool = False  # products on tensor cores, except in float32
    wide: bool = False  # no load of less than 16 bytes a thread


@contextlib.contextmanager
def recording():
    """-> the list of launches that were asked for inside, none of which ran."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def guarded(name, run, reference, *args):
    """run(*args); where that cannot be compiled or launched, reference(*args) from then on."""
    try:
        return run(*args)
    except torch.OutOfMemoryError:  # no fault of the kernel: the caller may free memory
        raise
    except Exception as error:  # Triton, ptxas and the driver raise many kinds
        kernels.failed(name, error)
    return reference(*args)


def gradients(function, tensors, dy):
    """Of function(*tensors), by autograd; None stands for a tensor that is not there."""
    # inside a backward pass gradients are not recorded by themselves
    with torch.enable_grad():
        tensors = [x if x is None else x.detach().requires_grad_() for x in tensors]
        y = function(*tensors)
    grads = iter(torch.autograd.grad(y, [x for x in tensors if x is not None], dy))
    return [x if x is None else next(grads) for x in tensors]
