"""The Triton kernels without a GPU: in Triton's interpreter, by the compiler for GPUs that are not
here, and counted.

Interpreting and compiling cannot share a process, so each has its own; `tests/kernels/` is what the
interpreting one runs.
"""

import atexit
import collections
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import background
import pytest
import torch
from background import python
from golden import rule
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import ldm
import vae
from kernels import attention, benchmark, fast, group_norm, transformer

ROOT = Path(kernels.__file__).parent.parent
triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


def interpret(name):
    """tests/kernels/test_NAME.py in Triton's interpreter."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/test_{name}.py"]
    return python(command, TRITON_INTERPRET="1")


def gate(target, version):
    """kernels.gate by a version of Triton; None: the installed one. None if it cannot be had."""
    command = ["-m", "kernels.gate", "--target", str(target)]
    if version is None:
        return python(command)
    folder = fetch_triton(version)
    return folder and python(command, PYTHONPATH=folder)


FETCHING = threading.Lock()


def fetch_triton(version):
    """The folder of a Triton beside the one installed; None where it cannot be fetched."""
    with FETCHING:
        return download_triton(version)


@functools.cache
def download_triton(version):
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    wanted = f"triton=={version}"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--target", folder, wanted]
    return None if python(pip).returncode else folder


@pytest.fixture
def processes():
    """(function, *arguments) -> what it returns; begun with the tests (tests/background.py)."""
    return lambda call: background.start(call).result()


@triton
@pytest.mark.parametrize(
    "call",
    [
        (interpret, name)
        for name in ("attention", "group_norm", "transformer", "networks", "memory")
    ],
    ids=lambda call: call[1],
)
def test_in_the_interpreter(processes, call):
    done = processes(call)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    # the compilers differ in what they spill, and torch 2.11 comes with 3.6
    [(gate, target, version) for version in (None, "3.6.0") for target in (80, 90, 100)],
    ids=lambda call: f"{call[1]}-{call[2] or 'installed'}",
)
def test_gate(processes, call):
    """Every shipped configuration compiles for the target and keeps the rules."""
    done = processes(call)
    if done is None:
        pytest.skip(f"triton {call[2]} cannot be fetched")
    print(done.stdout)
    assert done.returncode == 0, (
        "\n".join(line for line in done.stdout.splitlines() if "FAILS" in line)
        + done.stderr[-1000:]
    )


# --------------------------------------------------------------------------------------------------
# how many operations a step is

VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "detach",
    "alias",
    "chunk",
    "unbind",
    "split_with_sizes",
    "lift_fresh",
    "empty",
    "empty_like",
    "new_empty",
}


class Count(TorchDispatchMode):
    """Operations that move data, by name."""

    def __init__(self):
        super().__init__()
        self.ops = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.ops[name] += 1
        out = func(*args, **(kwargs or {}))
        # a device's convolution gives channels last for channels last, the meta device's does not
        return out.contiguous(memory_format=torch.channels_last) if name == "convolution" else out


FORMAT = {
    "attention": torch.contiguous_format,
    "group_norm": torch.channels_last,
}  # of what the kernels give for such input


def fused(counter, name, reference):
    """A stand-in of a kernel on the meta device: one operation."""

    def run(*args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            out = reference(*args, **kwargs)
            if name in FORMAT:
                out = out.contiguous(memory_format=FORMAT[name])
        counter.ops[name] += 1
        return out

    return run


def count_forward(monkeypatch):
    with torch.device("meta"):
        unet, x, t, context = (
            ldm.UNet(ldm.UNetConfig()),
            torch.empty(2, 4, 16, 64),
            torch.empty(2),
            torch.empty(2, 32, 768),
        )
    unet = unet.to(memory_format=torch.channels_last).requires_grad_(False)
    unet, counter = fast.optimise(unet), Count()
    known, shifts = unet.prepare(context), unet.shifts(t)
    for name, reference in (
        ("attention", attention.attention_ref),
        ("group_norm", group_norm.group_norm_ref),
        ("add_layer_norm", transformer.add_layer_norm_ref),
        ("geglu", transformer.geglu_ref),
    ):
        monkeypatch.setattr(fast, name, fused(counter, name, reference))
    with counter, torch.no_grad():
        unet.step(x, shifts, known)
    print(sum(counter.ops.values()), dict(counter.ops.most_common()))
    return counter.ops


def test_training_on_a_cpu_avoids_the_fused_attentions_slow_backward(monkeypatch):
    """In bfloat16 autocast with gradients: plain products, and as good as bfloat16 allows.
    Everything else: the fused one."""
    draw = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(2, n, 3, 32, generator=draw).bfloat16().double().requires_grad_()
        for n in (40, 24, 24)
    ]
    weight = torch.randn(2, 40, 3, 32, generator=draw).bfloat16().double()
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    true = attention.attention_ref(*exact)
    true = [true, *torch.autograd.grad(true, exact, weight)]
    calls, fused_one = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *x: calls.append(1) or fused_one(*x),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = attention.attention_ref(*half)
        assert not calls and out.dtype == torch.bfloat16 and out.is_contiguous()
        results = [out, *torch.autograd.grad(out, half, weight.bfloat16())]
        for result, expected in zip(results, true, strict=True):
            assert (result.double() - expected).norm() < 0.01 * expected.norm()
        with torch.no_grad():
            attention.attention_ref(*half)
    attention.attention_ref(*half), attention.attention_ref(*exact)
    assert len(calls) == 3


def test_operations_of_a_unet_forward(monkeypatch):
    """Official, eager: 880. Each costs a launch, which at one clip is what a step costs."""
    ops = count_forward(monkeypatch)
    assert [ops[k] for k in ("group_norm", "attention", "add_layer_norm", "geglu")] == [
        61,
        32,
        48,
        16,
    ]
    assert ops["cat"] == 0 and sum(ops.values()) <= 391


def test_launches_that_no_operation_shows(monkeypatch):
    """Of a U-Net forward on a GPU: cuDNN's convolutions leave a bias to a launch of its own, a
    product that adds to something copies that first unless it adds in place, and the norm copies
    what the time adds unless it reads it where it lies. There were 84, 42 and 22 of these."""
    ops = count_forward(monkeypatch)
    with torch.device("meta"):
        unet = fast.optimise(ldm.UNet(ldm.UNetConfig()))
    biases = sum(
        layer.bias is not None for layer in unet.modules() if type(layer) is torch.nn.Conv2d
    )
    assert biases == 14 and ops["convolution"] == 52
    assert ops["addmm_"] == 42  # in place; addmm itself is a product with its bias inside
    shifts = unet.shifts(torch.empty(1, device="meta")).expand(2, -1).split(unet.shift_widths, 1)
    assert len(shifts) == 22 and all(x is group_norm._rows(x) for x in shifts)


# --------------------------------------------------------------------------------------------------
# a CPU's own order of weights

SMALL = ldm.UNetConfig(
    width=32, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=2, context_dim=32, groups=16
)


@torch.no_grad()
@pytest.mark.skipif(not fast.can_pack(torch.float32), reason="no oneDNN here")
def test_fused_and_packed_networks_give_the_same():
    """Also for batches of another size than the one that the weights were ordered for."""
    unet, decoder = (
        rule.fill(ldm.UNet(SMALL), "model.diffusion_model."),
        rule.fill(vae.AutoencoderKL(vae.PRESETS["mini"]), "vae."),
    )
    x, context, t = (
        rule.normal("x", 4, 4, 16, 64),
        rule.normal("c", 4, 32, 32),
        torch.full((4,), 400.0),
    )
    plain, mel = unet(x, t, context), decoder.decode(x)
    layers = [
        layer
        for network in (unet, decoder)
        for layer in network.modules()
        if type(layer) in (torch.nn.Conv2d, torch.nn.Linear)
    ]
    fast.optimise(unet)
    fast.pack(decoder)
    for b in (2, 1, 4):
        rule.close(f"U-Net, {b} of 4", unet(x[:b], t[:b], context[:b]), plain[:b], 1e-5)
        rule.close(f"decoder, {b} of 4", decoder.decode(x[:b]), mel[:b], 1e-5)
    assert (
        sum(p.is_mkldnn for network in (unet, decoder) for p in network.parameters())
        > len(layers) // 2
    )


@torch.no_grad()
def test_fused_networks_in_bfloat16_stay_as_near(fresh):
    unet, x, context, t = (
        rule.fill(ldm.UNet(SMALL), "model."),
        rule.normal("x", 2, 4, 16, 64),
        rule.normal("c", 2, 32, 32),
        torch.full((2,), 400.0),
    )
    plain = unet(x, t, context)
    unet = fast.optimise(unet.bfloat16())
    rule.close("U-Net in bfloat16", unet(x, t, context).float(), plain, 0.02)
    assert not any(p.is_mkldnn for p in unet.parameters())


def test_nothing_is_packed_where_torch_is_chosen(fresh):
    kernels.choose("torch")
    unet = fast.optimise(ldm.UNet(SMALL))
    unet(torch.zeros(1, 4, 16, 64), torch.zeros(1), torch.zeros(1, 32, 32))
    assert not any(p.is_mkldnn for p in unet.parameters())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("module", [attention, group_norm, transformer])
def test_a_benchmark_times_ours_before_anything_is_compiled(
    module, backward, tmp_path, monkeypatch
):
    """All of it but the clock, which is a GPU's: the calls and their gradients run, compiled rows
    come last, one that fails costs no other."""
    for name, small in (
        ("UNET", ((2, 8, 16, 4),)),
        ("TIMED", ((4, 4, 64, 0), (4, 4, 64, 32))),
        ("SITES", ((16, 32),)),
    ):
        if hasattr(module, name) and (name != "SITES" or module is transformer):
            monkeypatch.setattr(module, name, small)
    monkeypatch.setattr(benchmark, "graph_us", lambda function, calls=20: (function(), 2.0)[1])
    monkeypatch.setattr(
        benchmark,
        "compiled",
        lambda reference, mode: reference if reference is not transformer.geglu_ref else None,
    )
    rows = list(benchmark.measure(lambda b: module.timed(b, "cpu"), [1, 2], backward, "mode"))
    done = [row for row in rows if "ours_us" in row]
    assert rows[: len(done)] == done and all(row["gb_s"] > 0 for row in done)
    assert len(done) == {attention: 4, group_norm: 4, transformer: 0 if backward else 6}[
        module
    ] and len(rows) == 2 * len(done)
    assert sum("error" in row for row in rows) == (2 if done and module is transformer else 0)
    benchmark.plot({"benchmark": "b", "device": "d"}, rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["attention", "group_norm", "transformer"])
def test_times_need_a_gpu(name):
    done = subprocess.run(
        [sys.executable, "-m", f"kernels.{name}"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "without an NVIDIA GPU" in done.stderr


def test_flops_and_bytes_are_those_of_the_problem():
    site = next(iter(attention.timed(2, "cpu")))  # 2 batches, 8 heads, 1024 queries of 40
    assert site.flops == 4 * 2 * 8 * 1024 * 1024 * 40 and site.nbytes == 4 * 2 * 1024 * 8 * 40 * 2


# --------------------------------------------------------------------------------------------------
# choosing


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "auto")


def test_choice(fresh, monkeypatch):
    with pytest.raises(ValueError, match="auto, triton or torch"):
        kernels.choose("cuda")
    if not torch.cuda.is_available():
        assert not kernels.active(torch.zeros(1)) and "own kernels" in kernels.describe()
        with pytest.raises(ValueError, match="no NVIDIA GPU"):
            kernels.choose("triton")
    kernels.choose("torch")
    assert kernels.mode == "torch"


def test_a_broken_kernel_is_said_once_and_done_without(fresh, monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.active(torch.zeros(1)) and not kernels.active(
        torch.zeros(1, dtype=torch.float64)
    )
    with pytest.warns(UserWarning, match="going on with torch's own"):
        kernels.failed("attention", RuntimeError("no such\ndevice"))
    assert not kernels.active(torch.zeros(1))
    kernels.choose("triton")
    with pytest.raises(RuntimeError, match="no such"), warnings.catch_warnings():
        kernels.failed("attention", RuntimeError("no such\ndevice"))


def test_importing_the_networks_does_not_import_triton():
    """Half a second and 60 MB that a CPU has no use for."""
    code = "import sys, ldm, vae, cavp; sys.exit('triton' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0
