"""tools.training_memory: what it counts of fake tensors is what real ones take, at the peak and of
all that autograd keeps. Whole networks allocate what the kernels do; a layer runs them.

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_memory.py
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import kernels
import ldm
from kernels import launch
from tools import training_memory

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402

LAUNCH = launch.Launch.run


@contextlib.contextmanager
def real_tensors():
    """Without the cached frequencies, which fake tensors do not outlive either."""
    ldm.embedding_frequencies.cache_clear()
    yield
    ldm.embedding_frequencies.cache_clear()


def install(monkeypatch):
    """The narrow presets; stage 2 is told nothing, as the published network of the predictions."""
    tiny.install(monkeypatch.setattr)
    told = {"columns": 0, "materials": (), "names_materials": False}
    untold = dataclasses.replace(ldm.PRESETS["mini"], **told)
    monkeypatch.setitem(ldm.PRESETS, "mini", untold)


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "all kept"])
@pytest.mark.parametrize("name", ["cavp", "ldm"])
def test_fake_steps_take_what_real_ones_do(name, recompute, monkeypatch):
    install(monkeypatch)
    case = name, "mini", recompute
    fake = training_memory.Prediction(*case)
    real = training_memory.Prediction(*case, real_tensors)
    # a fake BatchNorm's two statistics of bfloat16 maps are bfloat16 where real ones are float32
    norms = [m for m in real.stage.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    slack = sum(4 * norm.num_features for norm in norms)
    for n in (1, 2):
        row = fake.row(n)
        for column, nbytes in real.row(n).items():
            assert abs(nbytes - row[column]) <= slack, column
        assert row["predicted"] == row["state"] + row["activations"] + row["transient"]
        assert min(row.values()) > 0


def test_the_state_is_weights_gradients_two_moments_and_an_average(monkeypatch):
    install(monkeypatch)
    prediction = training_memory.Prediction("ldm", "mini", True)
    model = prediction.stage.model
    parameters = [*model.unet.parameters(), *model.conditioner.parameters()]
    trained = sum(4 * p.numel() for p in parameters)
    frozen = sum(4 * p.numel() for p in model.vae.parameters())
    steps = 4 * len(parameters)  # Adam counts them for each tensor
    buffers = sum(b.nbytes for b in model.buffers())
    assert prediction.state == 5 * trained + frozen + steps + 2 * buffers


@pytest.mark.parametrize("run", [LAUNCH, None], ids=["real", "fake"])
def test_attention_keeps_no_matrix_of_scores(run):
    """By hand: x, q, k, v and the output in bfloat16, a float32 a row and head, four matrices."""
    b, n, dim, heads = 2, 24, 16, 2
    layer = ldm.Attention(dim, dim, heads)
    how = {} if run is None else {"run": run}
    with training_memory.as_on_a_gpu(**how), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(b, n, dim, dtype=torch.bfloat16, requires_grad=True)
        kept = training_memory.kept_for_backward(layer, lambda: layer(x, x))
    assert kept == 2 * 5 * b * n * dim + 4 * b * n * heads + 2 * 4 * dim * dim


def test_a_recomputed_block_keeps_its_inputs(monkeypatch):
    """By hand: the map and the time's embedding."""
    block = ldm.ResBlock(16, 16, 64, 8)
    x = torch.randn(2, 16, 4, 8).bfloat16().requires_grad_()
    emb = torch.randn(2, 64).bfloat16().requires_grad_()
    args = training_memory.SimpleNamespace(recompute=True)
    training_memory.training.recompute(args, block, ldm.ResBlock)
    with training_memory.as_on_a_gpu(), torch.autocast("cpu", torch.bfloat16):
        kept = training_memory.kept_for_backward(block, lambda: block(x, emb))
    assert kept == x.nbytes + emb.nbytes


def test_the_largest_micro_batch_is_found():
    class Line(training_memory.Prediction):
        def __init__(self):
            self.peaks = {}

        def peak(self, n):
            return self.peaks.setdefault(n, 100 + 10 * n)

    found = {limit: Line().largest(limit) for limit in (100, 110, 119, 120, 1000, 5005)}
    assert found == {100: 0, 110: 1, 119: 1, 120: 2, 1000: 90, 5005: 490}


def test_kernels_are_as_before():
    mode = kernels.mode
    with training_memory.as_on_a_gpu():
        assert kernels.mode == "triton"
    assert kernels.mode == mode and launch.Launch.run is LAUNCH
