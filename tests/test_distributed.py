"""Processes, micro-batches, recomputing: every layout of a step has the same gradient."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from bounds import PATIENCE
from safetensors.torch import load_file

import cavp
from common import training

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent)]  # of tiny, of the project
# what each process of a job does: all four trainings, two steps each, keeping the first step's
# gradients, loss terms and average
JOB = """
import os, sys
sys.path[:0] = {here}
import torch
import tiny
from common import training
out, ports = sys.argv[1], sys.argv[2].split(",")
tiny.install()
tiny.install_no_extras()
report, update, seen = training.TrainingRun.report, training.update, {{}}
def spy_update(args, step, optimizer, ema, model, final=0.0):
    gradients = {{k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}}
    norm = update(args, step, optimizer, ema, model, final)
    if step == 0:
        average = {{k: v.clone() for k, v in ema.model.state_dict().items()}}
        seen.update(gradients=gradients, ema=average)
    return norm
def spy_report(run, **values):
    report(run, **values)
    if run.step == 0:
        seen.update(terms={{k: v[-1] for k, v in run.totals.items()}})
training.update, training.TrainingRun.report = spy_update, spy_report
for stage, port in zip(tiny.MAINS, ports, strict=True):
    os.environ["MASTER_PORT"] = port
    first_stage = f"{{out}}/first_stage.safetensors"
    args = tiny.arguments(stage, f"{{out}}/{{stage}}", 2, 4, first_stage, micro_batch=sys.argv[3])
    tiny.MAINS[stage](args)
    torch.save(seen, f"{{out}}/{{stage}}-{{os.environ.get('RANK', 0)}}.pt")
"""


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(out, ports, micro, **environment):
    command = [sys.executable, "-c", JOB.format(here=PATHS), out, ",".join(ports), str(micro)]
    return subprocess.Popen(
        [str(c) for c in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The same trainings in one process and in two: two chunks of 2, or one each."""
    one = tmp_path_factory.mktemp("one")
    two = tmp_path_factory.mktemp("two")
    ports = free_ports(4)
    for folder in (one, two):
        tiny.autoencoder(folder)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    running = [
        start(one, ports, 2),
        *(start(two, ports, 2, RANK=str(r), LOCAL_RANK=str(r), **meet) for r in (0, 1)),
    ]
    for job in running:
        text, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, text[-3000:]
    return one, two


def load(folder, stage, rank=0):
    return torch.load(folder / f"{stage}-{rank}.pt", weights_only=True)


def apart(a, b):
    """Largest difference between two {name: tensor}, against the largest entry there is."""
    assert a.keys() == b.keys()
    scale = max(v.abs().max() for v in a.values())
    return max((a[k] - b[k]).abs().max() for k in a) / scale


def floats(state):
    return {k: v for k, v in state.items() if v.is_floating_point()}


@pytest.mark.parametrize("stage", tiny.MAINS)
def test_two_processes_have_the_gradient_of_one(jobs, stage):
    one, two, other = load(jobs[0], stage), load(jobs[1], stage), load(jobs[1], stage, 1)
    assert apart(one["gradients"], two["gradients"]) < 1e-5
    assert all(torch.equal(two["gradients"][k], other["gradients"][k]) for k in two["gradients"])
    assert one["terms"] == pytest.approx(two["terms"], rel=1e-5) and two["terms"] == other["terms"]


@pytest.mark.parametrize("stage", tiny.MAINS)
def test_every_process_holds_the_same_average(jobs, stage):
    one, two, other = (
        load(folder, stage, rank)["ema"]
        for folder, rank in ((jobs[0], 0), (jobs[1], 0), (jobs[1], 1))
    )
    assert all(torch.equal(two[k], other[k]) for k in two)
    moved = {k for k in one if "running" in k}  # norms saw all chunks, in whichever process
    assert bool(moved) == (stage == "cavp")
    assert all(torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-6) for k in moved)
    assert (jobs[1] / stage / "last.safetensors").stat().st_size > 0


@pytest.fixture
def gradients(monkeypatch, tmp_path):
    """gradients(stage, **flags) -> those of a first step, {name: tensor}, and the step's terms."""
    tiny.install(monkeypatch.setattr)
    tiny.install_no_extras(monkeypatch.setattr)
    update, report, number = training.update, training.TrainingRun.report, iter(range(99))

    def run(stage, **flags):
        seen = {}

        def spy_update(args, step, optimizer, ema, model, final=0.0):
            seen.update(
                {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            )
            seen["model"] = model
            return update(args, step, optimizer, ema, model, final)

        def spy_report(run, **values):
            report(run, **values)
            seen["terms"] = dict(run.totals)

        monkeypatch.setattr(training, "update", spy_update)
        monkeypatch.setattr(training.TrainingRun, "report", spy_report)
        tiny.MAINS[stage](
            tiny.arguments(
                stage,
                tmp_path / f"{stage}{next(number)}",
                1,
                4,
                tiny.autoencoder(tmp_path),
                **flags,
            )
        )
        return {k: v for k, v in seen.items() if torch.is_tensor(v)}, seen

    return run


@pytest.mark.parametrize("stage", ["vae", "ldm", "align"])
def test_micro_batches_add_up(gradients, stage):
    whole = gradients(stage)[0]
    for micro in (1, 2):
        assert apart(whole, gradients(stage, micro_batch=micro)[0]) < 1e-5


def test_contrastive_chunks_give_the_gradient_through_all_of_them(gradients, monkeypatch):
    """With norms and dropout: two cached chunks against one backward pass through both graphs."""
    cached, seen = gradients("cavp", micro_batch=2)

    def direct(run, network, encode, chunks, loss_fn, label_weight):
        features = [encode(chunk) for chunk in chunks]
        loss, terms = loss_fn(
            torch.cat([f.video for f in features]),
            torch.cat([f.audio for f in features]),
            run.model.logit_scale.exp(),
        )
        (loss + label_weight * sum(f.label_loss for f in features)).backward()
        return terms

    monkeypatch.setattr(training, "cached_backward", direct)
    plain, other = gradients("cavp", micro_batch=2)
    assert apart(plain, cached) < 5e-6  # sums in another order, in float32
    assert (
        apart(
            floats(dict(other["model"].named_buffers())),
            floats(dict(seen["model"].named_buffers())),
        )
        == 0
    )  # moved once a chunk
    monkeypatch.setattr(training, "seed_of", lambda *_: 0)
    assert apart(plain, gradients("cavp", micro_batch=2)[0]) > 1e-4  # dropout is at work here


def test_with_still_norms_any_chunk_gives_the_same(gradients, monkeypatch):
    monkeypatch.setattr(
        cavp.CAVP, "train", lambda self, mode=True: torch.nn.Module.train(self, False)
    )
    whole = gradients("cavp", micro_batch=4)[0]
    for micro in (1, 2):
        assert apart(whole, gradients("cavp", micro_batch=micro)[0]) < 1e-5


@pytest.mark.parametrize("stage", tiny.MAINS)
def test_recomputing_keeps_less_and_changes_nothing(gradients, stage):
    kept = []

    def run(**flags):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            result = gradients(stage, micro_batch=2, **flags)
        kept.append(sum(sizes))
        return result

    plain, again = run(), run(recompute=True)
    assert apart(plain[0], again[0]) < 1e-6
    buffers = [
        floats(dict(seen["model"].named_buffers())) or {"": torch.ones(1)}
        for _, seen in (plain, again)
    ]
    assert apart(*buffers) < 1e-6
    assert kept[1] < 0.7 * kept[0]


def torchrun(stage, out, *extra, code=None):
    """Two processes under torchrun, as a user starts them; `code` runs in each before."""
    script = out.parent / f"{stage}_{out.name}.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = {PATHS}\nimport tiny\nfrom common import media\n"
        f"tiny.install()\n{code or ''}\n"
        f"tiny.MAINS[{stage!r}](sys.argv[1:])\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        *tiny.arguments(stage, out, 1000, 4, save_every=100),
        *extra,
    ]
    return subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_sigterm_stops_all_processes_after_the_same_step(tmp_path):
    job = torchrun("vae", tmp_path / "run")
    seen, limit = b"", time.monotonic() + PATIENCE
    while not re.search(rb" ([3-9]|\d\d+)/1000", seen) and time.monotonic() < limit:
        seen += os.read(job.stderr.fileno(), 4096)
    job.send_signal(signal.SIGTERM)
    _, rest = job.communicate(timeout=PATIENCE)
    stopped = re.findall(rb"stopped after step (\d+)", rest)
    assert len(stopped) == 1, rest
    state = torch.load(tmp_path / "run" / "last.state.pt", weights_only=True)
    assert state["step"] == int(stopped[0]) >= 3
    assert all(
        torch.isfinite(v).all() for v in load_file(tmp_path / "run" / "last.safetensors").values()
    )


def test_one_process_that_fails_ends_the_job_with_one_line(tmp_path):
    vanish = """
real = tiny.Sounds.__getitem__
def gone(self, index):
    if os.environ["RANK"] == "1" and index >= 6:
        raise media.MediaError("set/shard-00001.bin: missing; prepare the set again")
    return real(self, index)
tiny.Sounds.__getitem__ = gone
"""
    job = torchrun("vae", tmp_path / "run", code=vanish)
    _, text = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert (
        text.count(b"vae.py: ") == 1
        and b"vae.py: set/shard-00001.bin: missing; prepare the set again" in text
    )
    assert b"training.py" not in text  # no traceback of ours; torchrun adds its own account


def test_a_batch_that_cannot_be_shared_is_one_line(tmp_path):
    job = torchrun("vae", tmp_path / "run", "--batch", "5")
    _, text = job.communicate(timeout=PATIENCE)
    assert text.count(b"vae.py: ") == 1 and b"--batch 5" in text and not (tmp_path / "run").exists()
