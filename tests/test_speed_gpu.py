"""tools.speed_gpu without a GPU: every way to run a step gives the same numbers, and compiles to a
graph without copies from the CPU. The scripts of tools/gpu, dry."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import align
import kernels
import ldm
from tools import speed_gpu
from tools.gpu import sweep

UNET = ldm.UNetConfig(
    width=16, multipliers=(1,), blocks=1, attention=(1,), heads=2, context_dim=16, groups=8
)
ALIGN = align.AlignmentConfig(frames=32, positions=32, feature_dim=16, unet=UNET)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(speed_gpu, "UNET", UNET)
    monkeypatch.setattr(speed_gpu, "ALIGN", ALIGN)
    monkeypatch.setattr(speed_gpu, "STEPS", 1)
    yield
    kernels.choose("auto")


def test_every_way_has_a_row_with_and_without_the_classifier(small, monkeypatch):
    names, asked = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    for way in speed_gpu.ways("cpu", [w for w in speed_gpu.WAYS if w != "diffusers"]):
        kernels.choose(way.kernels)
        for cg in (0.0, speed_gpu.CG):
            row = speed_gpu.measure(way, 1, cg, "cpu", 1)
            assert "error" not in row and row["ms_per_step"] > 0, row
            assert row["classifier"] is bool(cg) and len(speed_gpu.cells(row)) == 6
        names.append(way.name)
    assert names == [
        "ours bfloat16",
        "torch's kernels, same graph",
        "eager bfloat16",
        "plain float32",
        "compiled, max-autotune",
        "compiled, our graph",
    ]
    assert len(asked) == 4 and not any(how["dynamic"] for how in asked)


def test_all_ways_take_the_same_step(small, monkeypatch):
    """In float32: the classifier guides each of them, and by as much. torch.compile's graphs, one a
    network, without the minutes of generating code."""
    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **how: real(function, backend="aot_eager", dynamic=False, fullgraph=True),
    )

    def same(dtype, device):
        torch.manual_seed(0)
        return [
            speed_gpu.random_network(cls, config, torch.float32, device)
            for cls, config in ((ldm.UNet, UNET), (align.Alignment, ALIGN))
        ]

    monkeypatch.setattr(speed_gpu, "networks", same)
    x, context, features = torch.randn(2, 4, 16, 64), torch.randn(2, 32, 16), torch.randn(2, 32, 16)
    t, steps = torch.full((2,), 999.0), {}
    for way in speed_gpu.ways("cpu", ["ours", "torch", "eager", "plain", "compiled"]):
        with torch.no_grad(), speed_gpu.streams(way.streams):
            for cg in (0.0, 5e3):
                steps[way.name, bool(cg)] = speed_gpu.step_of(way, context, features, cg)(x, t)
    for (name, guided), y in steps.items():
        reference = steps["ours bfloat16", guided]
        assert (y - reference).abs().max() < 1e-4 * reference.abs().max(), (name, guided)
    change = steps["ours bfloat16", True] - steps["ours bfloat16", False]
    assert (
        change.abs().max() > 1e-2 * reference.abs().max()
    )  # else a classifier without effect would pass


def test_a_way_that_fails_leaves_a_line_and_not_the_run(small, tmp_path):
    def unet(x, t, context):
        raise TypeError("not like this")

    row = speed_gpu.measure(speed_gpu.Way("broken", unet), 1, 0.0, "cpu", 1)
    assert row["error"] == "TypeError: not like this" and row["error"] in speed_gpu.cells(row)
    speed_gpu.plot([row], tmp_path / "speed.png")


def test_a_compiled_step_holds_no_tensor_of_the_cpu():
    """The time embedding's frequencies are made on the device that asks: on the meta device no
    operation may name another."""
    devices = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            devices.update(str(v) for v in (kwargs or {}).values() if isinstance(v, torch.device))
            out = function(*args, **(kwargs or {}))
            devices.update(str(v.device) for v in [*args, out] if torch.is_tensor(v) and v.dim())
            return out

    with torch.device("meta"):
        unet = ldm.UNet(UNET)
    ldm.embedding_frequencies.cache_clear()
    with Watch(), torch.no_grad():
        unet(*(torch.empty(*shape, device="meta") for shape in ((2, 4, 16, 64), (2,), (2, 32, 16))))
    ldm.embedding_frequencies.cache_clear()
    assert devices == {"meta"}


def test_one_change_at_a_time_without_a_gpu(tmp_path):
    """tools.gpu.step on small networks: every change leaves the numbers as they are, and the
    profiler's table has both networks' operations."""
    command = [
        sys.executable,
        "-m",
        "tools.gpu.step",
        "--out",
        tmp_path,
        "--clips",
        "1",
        "--only",
        "ours",
        "layer norm, geglu: torch's",
        "one stream",
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "DRY": "1"},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and len(rows) == 4 and all(row["differs"] < 1e-4 for row in rows), (
        done.stdout
    )
    assert "convolution" in (tmp_path / "profile.txt").read_text()


def test_the_sweep_starts_with_what_is_shipped(monkeypatch):
    first = {}
    for name, variant, put, _ in sweep.cases(1, "cpu"):
        put()
        first.setdefault(name, variant)
        sweep.restore()
    assert len(first) == len(sweep.GN_SITES) + len(sweep.ATTENTION)
    assert set(first.values()) == {"shipped"} and sweep.group_norm.plan is sweep.GN_PLAN
    assert sweep.attention.HALF == sweep.TABLE and sweep.attention.SPARSE == sweep.SPARSE


def test_the_sweep_says_what_belongs_into_the_tables(monkeypatch, capsys):
    def rows(name, **us):
        return [
            {"name": name, "b": b, "variant": variant.replace("_", " "), "us": taken}
            for variant, both in us.items()
            for b, taken in zip((2, 16), both, strict=True)
        ]

    sweep.say(
        rows("group norm 640@8x32 skip 0", shipped=(7.2, 11.5), one_group_a_program=(4.3, 8.7))
        + rows("group norm 320@16x64 skip 0", shipped=(9.4, 19.4), one_group_a_program=(7.3, 22))
        + rows("attention 64x64 of 160", shipped=(4.3, 5.2), other=(4.29, 7.0))
    )
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "group_norm.FEWER: (256, 20): 1" and len(said) == 4
    assert said[2].startswith("batch 2, group norm 320@16x64 skip 0: one group a program, 7.30 us")


TOOLS = Path(__file__).parent.parent / "tools" / "gpu"


def test_the_check_of_a_gpu_calls_what_is_there():
    script = (TOOLS / "check.sh").read_text()
    for name in ("check.sh", "mini.sh"):
        assert subprocess.run(["bash", "-n", TOOLS / name]).returncode == 0
    called = set(re.findall(r"(?:tools|tests)/[\w/]+\.(?:py|sh)", script))
    modules = set(re.findall(r"-m (tools[\w.]+)", script))
    assert modules >= {f"tools.gpu.{name}" for name in ("warm", "step", "sweep", "weights")}
    assert "tools.training_memory" in modules
    called |= {f"{name.replace('.', '/')}.py" for name in modules}
    assert all((TOOLS.parent.parent / path).is_file() for path in called)
    variants = set(re.findall(r'"([^"$]+)"', " ".join(re.findall(r"--only (.*)", script))))
    assert variants <= set(re.findall(r'^    "([^"]+)": \(', (TOOLS / "step.py").read_text(), re.M))
    done = subprocess.run(["bash", TOOLS / "check.sh", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "none of all, quick, sweep" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("mode", ["quick", "sweep"])
def test_the_check_of_a_gpu_runs_without_one(mode, tmp_path):
    """Every part, on small networks: each ends well and leaves what it found."""
    env = {
        "OUT": tmp_path / "out",
        "TMPDIR": tmp_path,
        "PYTHON": sys.executable,
        "DRY": 1,
        "TOTAL": 900,
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
    done = subprocess.run(
        ["bash", TOOLS / "check.sh", mode],
        cwd=TOOLS.parent.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    ends = dict(re.findall(r"^== (.*): exit (\d+)", done.stdout, re.M))
    assert done.returncode == 0 and set(ends.values()) == {"0"}, done.stdout
    if mode == "sweep":
        assert re.search(r"^fp32 0 seconds a clip: [\d.]+", done.stdout, re.M)
    parts = {
        "quick": {"warm", "tests", "steps", "weights", "demo, run 2", "demo, eight films, batch 8"},
        "sweep": {"warm", "train", "mini in both dtypes"},
    }
    assert parts[mode] <= set(ends) and "left out" not in done.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {
        "quick": {"steps.jsonl", "profile.txt"},
        "sweep": {"bf16.tar.aa", "fp32.tar.aa", "training_memory.jsonl"},
    }
    assert kept[mode] | {"log.txt"} <= written
