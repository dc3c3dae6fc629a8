"""What this machine has and can do: devices, number formats, memory.

out  a torch device, bytes, and settings of glibc's allocator
"""

import contextlib
import ctypes
import json
import re
import sys
from pathlib import Path

import torch


def find_device(name):
    """auto, cpu, cuda or cuda:1, or a torch.device -> torch.device. auto: a GPU if there is one.

    Raises ValueError for anything else, and for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shown = json.dumps(name) if isinstance(name, str) else str(name)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # torch knows more kinds
        raise ValueError(f"device {shown}: not one of auto, cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {shown}: torch finds no such GPU; give auto or cpu")
    return device


def computes_bfloat16(device):
    """Whether bfloat16 is fast here.

    A CPU with AMX or avx512_bf16 is twice as fast in it; others emulate it several times slower.
    """
    return torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def peak_memory(device="cpu"):
    """Peak bytes so far: allocated on the GPU, else resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux, where ru_maxrss starts with that of the parent process
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    import resource  # Windows has none

    # macOS counts bytes, others kilobytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def glibc(function, *args):
    """Call a function of glibc; without effect where the system has another C library."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*args)


def keep_freed_memory(largest=2**30):
    """Keep freed blocks of up to `largest` bytes in the process.

    glibc returns large blocks to the system on every free and faults them in anew at the next use,
    which costs a training step on a CPU a quarter of its time and more.
    """
    glibc("mallopt", -3, largest)  # M_MMAP_THRESHOLD
    glibc("mallopt", -1, 2 * largest)  # M_TRIM_THRESHOLD
    glibc("mallopt", -8, 1)  # M_ARENA_MAX: autograd's thread reuses what the main one freed


def return_freed_memory():
    """Give freed memory back to the system, between stages that need blocks of other sizes."""
    glibc("malloc_trim", 0)
