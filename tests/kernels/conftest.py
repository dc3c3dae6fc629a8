"""Triton's interpreter repaired, for tests alone: kernels run on CPU tensors, in a process of their
own.

    TRITON_INTERPRET=1 python -m pytest tests/kernels

Without the variable nothing here is collected: the same process cannot also compile kernels for
GPUs.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def widened(bits):
    """bfloat16, which NumPy holds as uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x):
    """float32 -> the nearest bfloat16, ties to even, as uint16."""
    return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()


def repair():
    """1. tl.dot multiplies the bit patterns of bfloat16 as integers (Triton issue #11584): give it
    their values.
    2. float32 to bfloat16 cuts off: round as GPUs do.
    3. Triton 3.6.0 with NumPy 2.4 or later: a loop's bound is an array of one element, which is no
    index any more."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot

    def exact_convert(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrowed(data)
        return convert(data, source, target, rounding)

    def operand(x):  # float16 too: exact, and NumPy has a fast product of float32 alone
        if x.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(widened(x.data), tl.float32)
        if x.dtype.scalar == tl.float16:
            return interpreter.TensorHandle(x.data.astype(np.float32), tl.float32)
        return x

    def patch_index(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._convert_float = exact_convert
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, operand(a), operand(b), *rest
    )
    interpreter._patch_lang_tensor = patch_index


if INTERPRETED:
    repair()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written is NaN, so what a kernel leaves out shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
