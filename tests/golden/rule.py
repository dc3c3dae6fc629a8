"""Stand-in weights, inputs and recorded outputs for parity tests.

in   a name and a shape: every weight and input is a function of those alone, drawn from
     PCG64(crc32(name))
out  arrays as the official code saw them when the *.safetensors files beside this one were
     recorded from it

The official networks are too large to keep; a rule that fills them equally on both sides replaces
them. `*.keys.json` beside this file hold each official checkpoint's keys and shapes.

    python -m pytest tests/test_parity.py -rP        prints every difference measured
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def generator(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def normal(name, *shape):
    return torch.from_numpy(generator(name).standard_normal(shape, dtype=np.float32))


def uniform(name, *shape):
    return torch.from_numpy(generator(name).random(shape, dtype=np.float32))


def weight(key, shape):
    """The value of a checkpoint's tensor of one or more dimensions."""
    w = normal(key, *shape)
    if len(shape) > 1:
        # by fan-in, also for embeddings
        scale = np.float32(1 / np.sqrt(np.prod(shape[1:])))
        return w.mul_(float(scale))
    if key.endswith(".running_var"):
        return 1 + 0.1 * w.abs()
    if key.endswith(".weight"):  # every norm's scale
        return 1 + 0.1 * w
    if key.endswith((".bias", ".running_mean")):
        return 0.1 * w
    raise KeyError(f"{key}: the rule has no value for it")


def fill(model, prefix=""):
    """Give every weight of `model` the rule's value; `prefix` is that of the official keys.

    Scalars, counters and the noise schedule (keys without a dot) stay as constructed. A model of
    weights alone may be on the meta device before.
    """
    state = {}
    for key, old in model.state_dict().items():
        keep = "." not in prefix + key or not old.is_floating_point()
        state[key] = old if keep else weight(prefix + key, tuple(old.shape))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def recorded(name):
    """{name: tensor} of the official code's outputs."""
    return load_file(HERE / f"{name}.safetensors")


def official_keys(name):
    """{key: shape} of an official checkpoint."""
    return {k: tuple(v) for k, v in json.loads((HERE / f"{name}.keys.json").read_text()).items()}


def relative(ours, official):
    """Relative L2 difference, in float64."""
    ours, official = ours.double(), official.double()
    assert ours.shape == official.shape, (ours.shape, official.shape)
    return ((ours - official).norm() / official.norm()).item()


def close(name, ours, official, bound=1e-4):
    """Assert parity, and print what was measured."""
    difference = relative(ours, official)
    largest = (ours.double() - official.double()).abs().max().item()
    print(f"{name:44s} relative {difference:.1e}   largest {largest:.1e}")
    assert difference <= bound, (
        f"{name}: relative L2 difference {difference:.2e}, allowed {bound:g}"
    )
