"""Compiles ahead what a first run on a GPU would compile one by one: all Triton kernels of the
networks, the tests and the sweep, in parallel, without touching the GPU.

    python tools/gpu/warm.py [-j 14] [--sets paper tests mini sweep]

Launches are recorded on the meta device with the real networks, then compiled by the very
JITFunction.run that a launch goes through, under a driver that answers "cuda:90": so the keys in
Triton's cache are the same.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch

import diffusion
import kernels
from align import PRESETS as ALIGN_PRESETS
from align import Alignment, AlignmentConfig

kernels.load()

import triton  # noqa: F401
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import ldm
import vae
from kernels import attention, fast, group_norm, transformer


class Fake:
    """A driver that only says for what to compile."""

    def __init__(self, arch=90):
        self.arch = arch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


jobs = {}


def record(kernel, args, constants, warps, stages):
    fixed = {p.name for p in kernel.params if p.do_not_specialize}

    def kind(name, value):
        if torch.is_tensor(value):
            return str(value.dtype)
        if value is None:
            return None
        if name in fixed or isinstance(value, float):
            return "x"
        return value == 1, value % 16 == 0

    signature = tuple((name, kind(name, value)) for name, value in args.items())
    key = kernel.__name__, signature, tuple(constants.items()), warps, stages
    jobs.setdefault(key, (kernel, args, constants, warps, stages))


def of_attention(kernel, args, constants, _grid, warps, stages):
    record(kernel, args, constants, warps, stages)


def of_group_norm(kernel, _grid, args, constants, warps):
    record(kernel, args, constants, warps, 1)


def of_transformer(kernel, _programs, args, constants, warps):
    record(kernel, args, constants, warps, 1)


def recording():
    """Every launcher records instead of launching; `active` takes meta tensors."""
    for module, names, launch in (
        (attention, ("forward", "backward"), of_attention),
        (group_norm, ("forward", "backward"), of_group_norm),
        (transformer, ("_norm", "_gated"), of_transformer),
    ):
        for name in names:
            setattr(module, name, functools.partial(getattr(module, name), launch=launch))
    known = torch.float32, torch.float16, torch.bfloat16
    kernels.active = lambda *tensors: all(x.dtype in known for x in tensors)
    kernels.mode = "triton"


class ChannelsLast(torch.utils._python_dispatch.TorchDispatchMode):
    """A GPU's convolution gives channels last for channels last, the meta device's does not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ != "convolution":
            return out
        return out.contiguous(memory_format=torch.channels_last)


def meta(cls, config, dtype):
    with torch.device("meta"):
        network = cls(config)
    network = network.to(dtype).to(memory_format=torch.channels_last)
    return network.requires_grad_(False).eval()


def guided_step(unet_config, align_config, dtype, frames=32, clips=1):
    """All that sampling launches: a guided step of optimised networks, the score after it."""
    unet, align = meta(ldm.UNet, unet_config, dtype), meta(Alignment, align_config, dtype)
    plain = meta(ldm.UNet, unet_config, dtype), meta(Alignment, align_config, dtype)
    fast.optimise(unet)
    fast.optimise(align.model)
    x = torch.empty(clips, 4, 16, 64, device="meta")
    context = torch.empty(clips, frames, unet_config.context_dim, device="meta")
    features = torch.empty(clips, frames, align_config.feature_dim, device="meta")
    times = diffusion.dpm_times(25)
    with ChannelsLast(), torch.no_grad():
        eps = fast.guided(unet, context, context, 4.5, align, features, 1.0, times, diffusion.sigma)
        eps(x, times[:1])
        align.log_prob(x, torch.empty(clips, device="meta"), features)
        t = torch.empty(clips, device="meta")
        plain[0](torch.cat([x, x]), torch.cat([t, t]), torch.cat([context, context]))
        plain[1].grad_log_prob(x, t, features)


def decoder(config, dtype):
    network = meta(vae.AutoencoderKL, config, dtype)
    z = torch.empty(1, 4, 16, 64, device="meta", dtype=dtype)
    with ChannelsLast(), torch.no_grad():
        network.decode(z.to(memory_format=torch.channels_last))


def empty(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


def tests():
    import test_gpu

    for dtype in test_gpu.DTYPES:
        for c, h, w in test_gpu.LEVELS:
            for layout in (torch.channels_last, torch.contiguous_format):
                x = empty(2, c, h, w, dtype=dtype).to(memory_format=layout).requires_grad_()
                weight, bias = (empty(c, dtype=dtype, grad=True) for _ in range(2))
                add = empty(2, c, dtype=dtype, grad=True)
                y = group_norm.group_norm(x, weight, bias, 32, 1e-5, True, add)
                torch.autograd.grad(y.sum(), (x, weight, bias, add))
            for keys in (None, 32, 77):
                sizes = h * w, keys or h * w, keys or h * w
                q, k, v = (empty(2, n, 8, c // 8, dtype=dtype, grad=True) for n in sizes)
                torch.autograd.grad(attention.attention(q, k, v).sum(), (q, k, v))
        with torch.no_grad():
            x, weight = empty(2, 1024, 320, dtype=dtype), empty(320, dtype=dtype)
            transformer.add_layer_norm(x, x, weight, weight)
            transformer.geglu(x)
    config = AlignmentConfig(frames=32, positions=32, feature_dim=16, unet=test_gpu.UNET)
    for dtype in (torch.float32, torch.bfloat16):
        for clips in (1, 2):
            guided_step(test_gpu.UNET, config, dtype, clips=clips)


def paper():
    for clips in (1, 8):  # small batches have block sizes of their own
        guided_step(ldm.UNetConfig(), AlignmentConfig(), torch.bfloat16, clips=clips)
    decoder(vae.VAEConfig(), torch.bfloat16)


def mini():
    model, align = ldm.PRESETS["mini"], ALIGN_PRESETS["mini"]
    for dtype in (torch.float32, torch.bfloat16):
        guided_step(model.unet, align, dtype, frames=model.frames)
        decoder(model.vae, dtype)


def sweep():
    sys.path.insert(0, str(Path(__file__).parent))
    import sweep as places

    with torch.no_grad():
        for b in (2, 16):
            for _, _, put, call in places.cases(b, "meta"):
                put()
                call()
                places.restore()


SETS = {"paper": paper, "tests": tests, "mini": mini, "sweep": sweep}


def compile_one(key):
    kernel, args, constants, warps, stages = jobs[key]
    start = time.time()
    error = None
    try:
        kernel.warmup(grid=(1,), **args, **constants, num_warps=warps, num_stages=stages)
    except Exception as e:  # of the compiler's many kinds; the others are worth having
        error = f"{type(e).__name__}: {str(e).splitlines()[0][:150]} {dict(constants)}"
    return key[0], time.time() - start, error


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("-j", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes")
    p.add_argument("--sets", nargs="+", choices=list(SETS), default=["paper", "tests", "mini"])
    p.add_argument("--only", type=int, metavar="N", help="the first N, to try it")
    args = p.parse_args()
    start = time.time()
    driver.set_active(Fake())
    recording()
    for name in args.sets:
        before = len(jobs)
        SETS[name]()
        print(f"warm.py: {name}: {len(jobs) - before} kernels", flush=True)
    with multiprocessing.get_context("fork").Pool(args.j) as pool:
        done = list(pool.imap_unordered(compile_one, list(jobs)[: args.only]))
    failed = [(name, error) for name, _, error in done if error]
    for name, error in failed:
        print(f"warm.py: {name}: {error}")
    work = [seconds for _, seconds, _ in done]
    print(
        f"warm.py: {len(done)} kernels in {time.time() - start:.0f} s, {sum(work):.0f} s of work, "
        f"longest {max(work):.1f} s, {len(failed)} failed",
        flush=True,
    )


if __name__ == "__main__":
    main()
