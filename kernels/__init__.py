"""Fused Triton kernels for NVIDIA GPUs, each file with its plain-torch reference, which is fallback, test oracle and baseline at once.

in   tensors as the networks have them: any strides, float32, float16 or bfloat16
out  what the reference gives, to its own rounding

`choose("torch")` turns them off, `choose("triton")` insists on them, `choose("auto")` uses them where they can run: on a GPU with Triton
installed. On a CPU, on Windows and on macOS the references run. With TRITON_INTERPRET=1 they run on CPU tensors, slowly, for tests.
"""

import importlib
import os
import warnings

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
mode = "auto"
triton = None  # the module, where kernels can run; on Windows and macOS there is none


def load():
    """Import Triton: half a second and 60 MB, so only where something can run on it."""
    global triton
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        pass


if INTERPRETED or torch.cuda.is_available():
    load()


def choose(name):
    """auto, triton or torch, from now on, in this process."""
    global mode
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels {name!r}; give auto, triton or torch")
    if name == "triton" and triton is None:
        raise ValueError(
            "kernels triton: no NVIDIA GPU, or Triton is not installed; give auto or torch"
        )
    mode = name


def active(*tensors):
    """Whether the kernels take these tensors: all on one GPU (or any device under the interpreter) and of a dtype they know."""
    if mode == "torch" or triton is None or torch.compiler.is_compiling() and mode == "auto":
        return False
    known = all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in tensors)
    return known and (INTERPRETED or all(t.is_cuda for t in tensors))


def failed(kernel, error):
    """A kernel could not be compiled or launched: said once, and the references run from then on."""
    global mode
    if mode == "triton":
        raise error
    mode = "torch"
    warnings.warn(
        f"kernels: {kernel} does not run here ({str(error).splitlines()[0][:120]}); going on with torch's own",
        stacklevel=3,
    )


def describe():
    """For a person: which path runs."""
    if mode == "torch" or triton is None:
        return "torch's own kernels"
    return f"fused kernels of triton {triton.__version__}" + " in its interpreter" * INTERPRETED
