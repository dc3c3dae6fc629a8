"""Fused Triton kernels for NVIDIA GPUs, each file with its plain-torch reference: fallback,
test oracle and baseline at once.

in   tensors as the networks have them: any strides, float32, float16 or bfloat16
out  what the reference gives, to its own rounding

`choose("torch")` turns them off, `choose("triton")` insists on them, `choose("auto")` uses them
where they can run: on a GPU with Triton installed. On a CPU, on Windows and on macOS the references
run. With TRITON_INTERPRET=1 they run on CPU tensors, slowly, for tests.
"""

import contextlib
import importlib
import os
import warnings

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
mode = "auto"
triton = None  # the module, where kernels can run; on Windows and macOS there is none


def load():
    """Import Triton: half a second and 60 MB, so only where something can run on it."""
    global triton
    with contextlib.suppress(ImportError):
        triton = importlib.import_module("triton")


# on a machine without a GPU nothing can run on Triton, unless interpreted
if INTERPRETED or torch.cuda.is_available():
    load()


def choose(name):
    """auto, triton or torch, from now on, in this process. Raises ValueError for another name, and
    for triton where it cannot run."""
    global mode
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels {name!r}; give auto, triton or torch")
    if name == "triton" and triton is None:
        raise ValueError(
            "kernels triton: no NVIDIA GPU, or Triton is not installed; give auto or torch"
        )
    mode = name


def active(*tensors):
    """Whether the kernels take these tensors: all on one GPU (or any device under the interpreter)
    and of a dtype they know."""
    if mode == "torch" or triton is None:
        return False
    if mode == "auto" and torch.compiler.is_compiling():
        return False  # Inductor fuses the references itself
    return all(t.dtype in DTYPES and (INTERPRETED or t.is_cuda) for t in tensors)


def failed(kernel, error):
    """A kernel could not be compiled or launched: warns once, and the references run from then on.
    Where kernels were insisted on, raises the error."""
    global mode
    if mode == "triton":
        raise error
    mode = "torch"
    # the first line: the rest is the compiler's dump
    reason = str(error).partition("\n")[0][:120]
    warnings.warn(
        f"kernels: {kernel} does not run here ({reason}); going on with torch's own", stacklevel=3
    )


def describe():
    """For a person: which path runs, by whose version."""
    if mode == "torch" or triton is None:
        return f"torch {torch.__version__}'s own kernels"
    name = f"torch {torch.__version__}, fused kernels of triton {triton.__version__}"
    return f"{name} in its interpreter" if INTERPRETED else name
