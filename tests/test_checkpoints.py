"""Checkpoints in and out: what fits loads strictly and in its own memory; what is damaged or
hostile is one line and runs nothing.
"""

import argparse
import collections
import datetime
import enum
import functools
import importlib
import operator
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
from golden import rule

import align
import cavp
import ldm
import vae
from common import checkpoints, files
from common.checkpoints import Checkpoint, CheckpointError

MINI_UNET = ldm.PRESETS["mini"]
MINI_CLASSIFIER = align.PRESETS["mini"]
MINI = [
    (cavp.CAVP, cavp.PRESETS["mini"]),
    (vae.AutoencoderKL, vae.PRESETS["mini"]),
    (ldm.LDM, MINI_UNET),
    (align.Alignment, MINI_CLASSIFIER),
]
both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


# ---- what fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv1.conv.weight", "conv1.bn.running_mean"])
def test_numbers_that_are_not_finite_are_refused(name, number, tmp_path):
    torch.manual_seed(0)
    network = cavp.CAVP(cavp.PRESETS["mini"])
    tensors = network.state_dict()
    (full,) = (known for known in tensors if known.endswith(f"video_encoder.{name}"))
    tensors[full].view(-1)[3] = number
    path = tmp_path / "cavp.safetensors"
    checkpoints.save_model(path, network, asdict(network.config))
    with pytest.raises(CheckpointError, match=f"cavp.safetensors: {full} is not finite"):
        cavp.CAVP.load(path)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cls, config", MINI, ids=[c.__name__ for c, _ in MINI])
def test_mini_presets_load_what_they_save(tmp_path, cls, config):
    model = rule.fill(cls(config))
    checkpoints.save_model(tmp_path / "m.safetensors", model, asdict(config), step=3)
    loaded = cls.load(tmp_path / "m.safetensors")
    assert loaded.config == config and same(model, loaded) and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    checkpoints.save_model(tmp_path / "half.safetensors", model, asdict(config), torch.float16)
    half = cls.load(tmp_path / "half.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "m")]
    assert sizes[0] < 0.55 * sizes[1]
    for key, own in model.state_dict().items():
        rounded = half.state_dict()[key]
        assert rounded.dtype == own.dtype
        assert torch.allclose(rounded, own, rtol=1e-3, atol=1e-6)


def official_pickle(path, model, prefix="module."):
    """The form of a published checkpoint: a torch pickle, Lightning's wrapper, DDP's prefix."""
    torch.save(
        {"epoch": 66, "state_dict": {prefix + k: v for k, v in model.state_dict().items()}}, path
    )


def test_official_files_load_strictly(tmp_path):
    """A file without a configuration is of the published sizes."""
    model = rule.fill(align.Alignment())
    official_pickle(tmp_path / "classifier.ckpt", model)
    assert same(align.Alignment.load(tmp_path / "classifier.ckpt"), model)
    state = {
        **model.state_dict(),
        "first_stage_model.quant_conv.bias": torch.zeros(8),
    }  # some releases carry an autoencoder along
    torch.save(state, tmp_path / "with_vae.ckpt")
    assert same(align.Alignment.load(tmp_path / "with_vae.ckpt"), model)
    for change in ({"surplus": torch.zeros(1)}, {"model.classifier.bias": torch.zeros(2)}):
        torch.save({**model.state_dict(), **change}, tmp_path / "wrong.ckpt")
        with pytest.raises(checkpoints.CheckpointError, match="wrong.ckpt"):
            align.Alignment.load(tmp_path / "wrong.ckpt")
    short = model.state_dict()
    del short["model.classifier.bias"]
    torch.save(short, tmp_path / "short.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match="classifier.bias"):
        align.Alignment.load(tmp_path / "short.ckpt")


def test_autoencoder_loads_out_of_an_ldm_file(tmp_path):
    whole = rule.fill(ldm.LDM(MINI_UNET))
    checkpoints.save_model(tmp_path / "ldm.safetensors", whole, asdict(MINI_UNET))
    inner = vae.AutoencoderKL.load(tmp_path / "ldm.safetensors")
    assert inner.config == MINI_UNET.vae and same(inner, whole.vae)
    with torch.device("meta"):
        autoencoder = vae.AutoencoderKL()
    rule.fill(autoencoder, "first_stage_model.")
    official_pickle(tmp_path / "official.ckpt", autoencoder, prefix="first_stage_model.")
    assert same(vae.AutoencoderKL.load(tmp_path / "official.ckpt"), autoencoder)


@both_formats
def test_every_dtype_layout_and_wrapping(tmp_path, zipped):
    base = torch.arange(60, dtype=torch.float32)
    tensors = {
        "f32": base.view(3, 4, 5),
        "f16": base.half(),
        "bf16": base.bfloat16(),
        "f64": base.double(),
        "i64": base.long(),
        "u8": base.byte(),
        "bool": base > 7,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "slice": base[7:40:3],
        "transposed": base.view(6, 10).T,
        "shared": base[2:5],
        "images": base.view(1, 5, 3, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base * 2),
    }
    for wrap in (
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"state_dict": collections.OrderedDict(("module." + k, v) for k, v in s.items())},
    ):
        save(wrap(tensors), tmp_path / "t.ckpt", zipped)
        file = Checkpoint(tmp_path / "t.ckpt")
        assert file.config is None and file.keys() == tensors.keys()
        for _ in range(2):
            assert all(
                torch.equal(file[k], v) and file[k].dtype == v.dtype for k, v in tensors.items()
            )
            file.release()  # and all is there again


def foreign_module(name, **members):
    """A package that exists only while the file is written."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for key, cls in members.items():
        cls.__module__, cls.__qualname__, cls.__name__ = name, key, key
        setattr(sys.modules[name], key, cls)


def lightning_checkpoint(state):
    """All that trainers are known to leave beside the weights."""

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    class ListConfig(list):
        pass

    class DictConfig:
        def __getstate__(self):
            return {"_content": {"lr": 1e-4}, "_metadata": {"ref_type": dict, "key": None}}

    class Mode(enum.Enum):
        MIN = "min"

    foreign_module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=ModelCheckpoint)
    foreign_module("pytorch_lightning.utilities.parsing", AttributeDict=AttributeDict)
    foreign_module("omegaconf.dictconfig", DictConfig=DictConfig, ListConfig=ListConfig, Mode=Mode)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    listed = ListConfig([1, "two"])
    listed.flags = {"readonly": True}
    return {
        "epoch": 240,
        "global_step": 56_000,
        "pytorch-lightning_version": "1.6.0",
        "state_dict": state,
        "callbacks": {
            ModelCheckpoint: {
                "best_model_score": torch.tensor(0.5),
                "best": np.float64(0.1),
                "dirpath": "/x",
            }
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(
            config=DictConfig(),
            sizes=listed,
            mode=Mode.MIN,
            path=pathlib.PurePosixPath("/a/b"),
            dtype=torch.float32,
            shape=torch.Size([1, 2]),
            device=torch.device("cpu"),
            array=np.arange(3),
            names={"a", "b"},
            when=datetime.datetime(2023, 6, 1),
            options=argparse.Namespace(lr=1),
            counts=collections.defaultdict(list, a=[1]),
            cls=torch.optim.AdamW,
            complex=1 + 2j,
        ),
    }


@both_formats
def test_lightning_checkpoints_load_without_their_classes(tmp_path, zipped):
    model = rule.fill(align.Alignment(MINI_CLASSIFIER))
    before = set(sys.modules)
    try:
        save(lightning_checkpoint(model.state_dict()), tmp_path / "l.ckpt", zipped)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith(("pytorch_lightning", "omegaconf")):
                del sys.modules[name]
    file = Checkpoint(tmp_path / "l.ckpt")
    assert file.keys() == model.state_dict().keys()
    assert all(torch.equal(file[k], v) for k, v in model.state_dict().items())
    assert not {n for n in sys.modules if n.startswith(("pytorch_lightning", "omegaconf"))}


MEASURE = """
import sys, torch
from common import checkpoints
from common.machine import peak_memory
def peak():
    return peak_memory("cpu")
with torch.device("meta"):
    pairs = [(torch.nn.Linear(1536, 1536), torch.nn.Conv2d(512, 512, 3)) for _ in range(20)]
    model = torch.nn.Sequential(*sum(pairs, ()))
before = peak()
checkpoints.load_into(model, checkpoints.Checkpoint(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
own = sum(t.nbytes for t in model.state_dict().values())
print((peak() - before) / own, own)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("zip.ckpt", "float32"),
        ("older.ckpt", "float32"),
        ("w.safetensors", "float32"),
        ("zip.ckpt", "bfloat16"),
    ],
)
def test_loading_needs_the_networks_own_memory(tmp_path, name, dtype):
    """376 MB of weights, among 376 MB that a trainer left, in at most a tenth more than is kept."""
    pairs = [(torch.nn.Linear(1536, 1536), torch.nn.Conv2d(512, 512, 3)) for _ in range(20)]
    model = torch.nn.Sequential(*sum(pairs, ()))
    state = model.state_dict()
    if name.endswith("safetensors"):
        checkpoints.save_tensors(tmp_path / name, state)
    else:
        other = {"state": {i: torch.zeros_like(v) for i, v in enumerate(state.values())}}
        save(
            {"optimizer_states": [other], "state_dict": state},
            tmp_path / name,
            name.startswith("zip"),
        )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / name, dtype],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(checkpoints.__file__).parent.parent,
    )
    ratio, own = map(float, done.stdout.split())
    assert own > (1.5e8 if dtype == "bfloat16" else 3e8) and 0.9 < ratio <= 1.1, done.stderr


# ---- what does not ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not a checkpoint",
        b"PK\x03\x04 cut short",
        pickle.dumps({"state_dict": {}}),
        b"\x80\x02].",
    ],
)
def test_unreadable_checkpoint_is_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        Checkpoint(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)


@both_formats
def test_a_cut_file_is_refused(tmp_path, zipped):
    path = tmp_path / "m.ckpt"
    save({"state_dict": {"a": torch.arange(3000.0), "b": torch.arange(3000.0)}}, path, zipped)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 200, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="m.ckpt"):
            Checkpoint(path)


@both_formats
@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (3000,), (2,)),
        (1, (3000,), (1,)),
        (-1, (5,), (1,)),
        (0, (5,), (-1,)),
        (2**62, (5,), (1,)),
        (0, (2**40,), (0,)),
        (0, (5, 5), (1,)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(
    tmp_path, zipped, offset, size, stride
):
    class Liar:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                torch.zeros(3000)._typed_storage(),
                offset,
                size,
                stride,
                False,
                collections.OrderedDict(),
            )

    save({"state_dict": {"a": Liar()}}, tmp_path / "m.ckpt", zipped)
    if size == (2**40,):  # an expanded number is no lie, and costs nothing
        assert Checkpoint(tmp_path / "m.ckpt")["a"].shape == size
        return
    with pytest.raises(CheckpointError, match="m.ckpt"):
        Checkpoint(tmp_path / "m.ckpt")


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only so that a call may be the function of another."""


def inner(folder):
    """A pickle that runs a command, for the loaders that a pickle can call."""
    torch.save(Call(os.system, f"touch {folder}/sprung"), folder / "inner.pt")
    return folder / "inner.pt"


ATTACKS = {  # each leaves a file named `sprung` when the pickle is run
    "os.system": lambda d: Call(os.system, f"touch {d}/sprung"),
    "eval": lambda d: Call(eval, f"__import__('os').system('touch {d}/sprung')"),
    "exec": lambda d: Call(exec, f"open('{d}/sprung', 'w').close()"),
    "open": lambda d: Call(open, f"{d}/sprung", "w"),
    "subprocess": lambda d: Call(subprocess.call, ["touch", f"{d}/sprung"]),
    "runpy": lambda d: Call(
        runpy.run_path, (d / "x.py").write_text(f"open('{d}/sprung', 'w')") and str(d / "x.py")
    ),
    "torch.load": lambda d: Call(functools.partial(torch.load, weights_only=False), str(inner(d))),
    "torch's storages": lambda d: Call(torch.storage._load_from_bytes, inner(d).read_bytes()),
    "pickle.loads": lambda d: Call(
        pickle.loads, pickle.dumps(Call(os.system, f"touch {d}/sprung"))
    ),
    "nested reduce": lambda d: Call(
        Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {d}/sprung"
    ),
    "partial": lambda d: Call(functools.partial(os.system, f"touch {d}/sprung")),
    "methodcaller": lambda d: Call(
        operator.methodcaller("system", f"touch {d}/sprung"), Call(importlib.import_module, "os")
    ),
    "map": lambda d: Call(list, Call(map, os.system, [f"touch {d}/sprung"])),
}


@both_formats
@pytest.mark.parametrize("place", ["state_dict", "callbacks"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_run_nothing(tmp_path, name, place, zipped):
    weights = {"a": torch.ones(3)}
    attack = ATTACKS[name](tmp_path)
    content = (
        {"state_dict": {**weights, "b": attack}}
        if place == "state_dict"
        else {"state_dict": weights, "callbacks": {"c": [attack]}}
    )
    save(content, tmp_path / "trap.ckpt", zipped)
    with pytest.raises(CheckpointError) as e:
        Checkpoint(tmp_path / "trap.ckpt")
    assert not (tmp_path / "sprung").exists()
    assert (
        "trap.ckpt: not opened" in str(e.value)
        and "which no weights need" in str(e.value)
        and "\n" not in str(e.value)
    )
    torch.load(tmp_path / "trap.ckpt", weights_only=False)  # the attack is a real one
    assert (tmp_path / "sprung").exists()


def test_a_foreign_function_is_not_called(tmp_path):
    """It is not told from a class, so the file is read, and nothing but that happens."""
    called = []

    def boom(*args):
        called.append(args)

    foreign_module("foreign_package.inner", boom=boom)
    try:
        save({"state_dict": {"a": torch.ones(3)}, "other": Call(boom, 1)}, tmp_path / "f.ckpt")
        assert list(Checkpoint(tmp_path / "f.ckpt")) == ["a"] and not called
        torch.load(tmp_path / "f.ckpt", weights_only=False)
        assert called
    finally:
        del sys.modules["foreign_package"], sys.modules["foreign_package.inner"]


MACHINE = (
    b"ccheckpoints\nUnpickler\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
)
STATES = b"(dX\x0a\x00\x00\x00find_classK\x01s", b"(N(dX\x0a\x00\x00\x00find_classK\x01st"


@pytest.mark.parametrize("target", MACHINE)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("build", [b"b", b"s", b"a"])
def test_the_machine_itself_cannot_be_changed(tmp_path, target, state, build):
    """BUILD, SETITEM and APPEND on what a name stands for, rather than on an object made of it."""
    kept = {
        c: dict(vars(c))
        for c in (checkpoints.Unpickler, checkpoints.TensorSpec, checkpoints.Dict, checkpoints.Stub)
    }
    (tmp_path / "m.ckpt").write_bytes(
        b"\x80\x02" + target + state + (b"K\x01" if build == b"s" else b"") + build + b"."
    )
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path / "m.ckpt")
    assert kept == {c: dict(vars(c)) for c in kept} and not hasattr(
        collections.OrderedDict, "find_class"
    )


def test_an_output_folder_that_cannot_be_made_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match="another folder"):
        files.make_folder(tmp_path / "file" / "run")
    with pytest.raises(files.FileError, match="another folder"):
        files.write_bytes(tmp_path / "file" / "x.safetensors", b"x")


@pytest.mark.parametrize("dtype, share", [("bfloat16", 0.5), ("float16", 0.5), ("float32", 1.0)])
def test_convert(tmp_path, capsys, dtype, share):
    """Published names become ours, the trainer's state goes, values are rounded once, and the same
    loader takes the result."""
    model = rule.fill(align.Alignment(MINI_CLASSIFIER))
    (tmp_path / "in").mkdir()
    checkpoints.save_model(tmp_path / "in" / "align.safetensors", model, asdict(MINI_CLASSIFIER))
    size = (tmp_path / "in" / "align.safetensors").stat().st_size
    save(
        {
            "state_dict": {"module." + k: v for k, v in model.state_dict().items()},
            "optimizer_states": [torch.zeros(10**6)],
        },
        tmp_path / "in" / "ldm_epoch240.ckpt",
    )
    checkpoints.main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", dtype])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "align.safetensors",
        "ldm.safetensors",
    ]
    assert capsys.readouterr().out.count("MB") == 4
    loaded = align.Alignment.load(tmp_path / "out" / "align.safetensors")
    assert loaded.config == MINI_CLASSIFIER
    for name in ("align", "ldm"):
        path = tmp_path / "out" / f"{name}.safetensors"
        assert path.stat().st_mode & 0o044 == (tmp_path / "in").stat().st_mode & 0o044
        assert path.stat().st_size < (share + 0.1) * size
        for key, value in model.state_dict().items():
            kept = value.to(getattr(torch, dtype)) if value.ndim >= 2 else value
            assert torch.equal(Checkpoint(path)[key], kept) and torch.equal(
                loaded.state_dict()[key], kept.float()
            )


def test_convert_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match="no .ckpt or .safetensors in it"):
        checkpoints.main(["convert", str(tmp_path), str(tmp_path / "out")])
    checkpoints.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(SystemExit, match="exists already"):
        checkpoints.main(["convert", str(tmp_path), str(tmp_path)])
