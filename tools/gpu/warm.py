"""Compiles ahead what a first run on a GPU would compile one by one: all Triton kernels of the
networks, the tests and the sweep, in parallel, without touching the GPU.

    python -m tools.gpu.warm [-j 14] [--sets paper tests mini sweep train]

Launches are recorded on the meta device with the real networks, then compiled by the very
JITFunction.run that a launch goes through, under a driver that answers "cuda:90": so the keys in
Triton's cache are the same.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import kernels
from common import cli

kernels.load()  # before the kernels' own files, which look for it

import diffusion  # noqa: E402
import ldm  # noqa: E402
import vae  # noqa: E402
from align import PRESETS as ALIGN_PRESETS  # noqa: E402
from align import Alignment, AlignmentConfig  # noqa: E402
from kernels import attention, fast, group_norm, launch, transformer  # noqa: E402


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


jobs = {}  # forked processes find the launches here by their keys: tensors cannot be sent


def key(job):
    """What Triton compiles once: kernel, constants and what is known of each argument."""
    known = [job.kernel.__name__, job.warps, job.stages]
    for param in job.kernel.params:
        value = job.args[param.name]
        if torch.is_tensor(value):
            value = value.dtype
        elif isinstance(value, int) and not param.is_constexpr:
            value = None if param.do_not_specialize else (value == 1, value % 16 == 0)
        known.append(value)
    return tuple(known)


def active(*tensors):
    """`kernels.active`, on the meta device too."""
    return all(x.dtype in kernels.DTYPES for x in tensors)


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
    # both forms of the networks: optimized ones make other calls than plain ones
    unet, align = meta(ldm.UNet, unet_config, dtype), meta(Alignment, align_config, dtype)
    plain = meta(ldm.UNet, unet_config, dtype), meta(Alignment, align_config, dtype)
    fast.optimise(unet)
    fast.optimise(align.model)
    x = torch.empty(clips, 4, 16, 64, device="meta")
    context = torch.empty(clips, frames, unet_config.context_dim, device="meta")
    features = torch.empty(clips, frames, align_config.feature_dim, device="meta")
    times = diffusion.solver_times(25)
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
    from tools.gpu import sweep as places

    with torch.no_grad():
        for b in (2, 16):
            for _, _, put, call in places.cases(b, "meta"):
                put()
                call()
                places.restore()


def train():
    """Stage 2's forward and backward pass at the published size, with autocast's dtypes."""
    from tools import training_memory as memory

    run = launch.Launch.run
    with launch.recording() as launches, memory.as_on_a_gpu(run), memory.fake_tensors():
        stage = memory.Stage(memory.fake_network("ldm"), ldm.RECIPES["paper"], recompute=False)
        for n in (1, 4, 16):
            stage.loss(n).backward()
    # the compiler takes tensors of the meta device, not fake ones
    for job in launches:
        args = {
            k: empty(1, dtype=v.dtype) if torch.is_tensor(v) else v for k, v in job.args.items()
        }
        replace(job, args=args).run(job.kernel)


SETS = {"paper": paper, "tests": tests, "mini": mini, "sweep": sweep, "train": train}


def compile_one(name):
    """-> name, seconds, what went wrong"""
    job = jobs[name]
    start = time.time()
    error = None
    try:
        job.kernel.warmup(grid=(1,), **job.args, num_warps=job.warps, num_stages=job.stages)
    except Exception as e:  # of the compiler's many kinds; the others are worth having
        constants = {name: value for name, value in job.args.items() if name.isupper()}
        error = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:150]} {constants}"
    return job.kernel.__name__, time.time() - start, error


def main():
    p = cli.Parser("tools.gpu.warm", __doc__)
    p.add_argument("-j", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes")
    p.add_argument("--sets", nargs="+", choices=list(SETS), default=["paper", "tests", "mini"])
    p.add_argument("--only", type=int, metavar="N", help="the first N, to try it")
    args = p.parse_args()
    start = time.time()
    # from here on Triton compiles for the GPU that the driver claims
    driver.set_active(Fake())
    kernels.active = active
    kernels.mode = "triton"
    for name in args.sets:
        before = len(jobs)
        with launch.recording() as launches:
            SETS[name]()
        for job in launches:
            jobs.setdefault(key(job), job)
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
