"""Checkpoints: anybody's are read without running anything in them, ours are written whole.

in   .safetensors (ours with its configuration in the header), or a torch.save file, zipped or older: a bare state dict or a Lightning
     checkpoint with optimizer states, callbacks and hyper-parameters around its `state_dict`
out  {name: tensor}, read through a map of the file: filling a network needs little more memory than the network's own

A pickle is a program. Here it runs on a machine that can build nothing but dicts, lists, numbers, strings and *descriptions* of tensors:
whatever class it names becomes one inert stand-in, so classes of foreign packages need not be importable and run nothing. A name that no
checkpoint has a use for and every attack needs (the standard library's and torch's functions) refuses the file.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from common import cli
from common.files import UserError, atomic_write


class CheckpointError(UserError):
    """A file that cannot be read or written, or is not what was asked for: one line with the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# unpickling without running anything


class Stub:
    """Stands for an object of any class; whatever the pickle does with it, nothing happens."""

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def __init__(self, *_args, **_kwargs):
        pass

    def nothing(self, *_args):
        pass

    __setstate__ = __setitem__ = append = extend = add = nothing


class Dict(dict):
    """A foreign package's or the library's ordered dict; attributes that the pickle sets on it are left out."""

    def __setstate__(self, _state):
        pass


class Storage:
    """Name of a file's stretch of bytes and the type of its elements."""

    def __init__(self, dtype, key, numel, shift=0):
        self.dtype, self.key, self.numel, self.shift = (
            dtype,
            key,
            numel,
            shift,
        )  # shift: elements into the stretch


class TensorSpec:
    """A tensor as torch's pickles tell it: (storage, offset, size, stride, ...); a parameter is the tensor that it holds."""

    def __new__(cls, first, *rest):
        return first if isinstance(first, TensorSpec) else object.__new__(cls)

    def __init__(self, storage, *rest):
        if isinstance(storage, Storage):
            offset, size, stride = rest[:3]
            if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)) or len(
                size
            ) != len(stride):
                raise pickle.UnpicklingError("a tensor of impossible shape")
            self.storage, self.offset, self.size, self.stride = (
                storage,
                offset,
                tuple(size),
                tuple(stride),
            )
        elif not isinstance(storage, TensorSpec):
            raise pickle.UnpicklingError("a tensor without a storage")

    def __setstate__(self, _state):
        pass


DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
REBUILD = {
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
}
# names of the standard library, numpy and torch that hyper-parameters, callbacks and optimizers hold as plain data
DATA_NAMES = {
    "builtins": "object set frozenset list dict tuple int float complex bool str bytes bytearray slice range",
    "collections": "defaultdict deque Counter",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "functools": "partial",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "enum": "Enum IntEnum",
    "typing": "Any Union Optional Dict List Tuple",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "numpy": "dtype ndarray float64 float32 int64 int32 bool_",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "torch": "Size device dtype float16 float32 float64 bfloat16 int64 Tensor Generator",
}


class Unpickler(pickle.Unpickler):
    """The standard machine with nothing to call; `storages` collects {key: element type} of all that the pickle names."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        # protocol 2, torch's, has Python 2's names for modules
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module == "collections" and name == "OrderedDict":
            return Dict
        if module == "torch._utils" and name in REBUILD:
            return TensorSpec
        if module == "torch" and name in DTYPES:
            return type(name, (Stub,), {"dtype": DTYPES[name]})
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or package in ("torch", "numpy"):
            part = module.startswith(
                ("torch.optim.", "torch.nn.modules.")
            )  # an optimizer or a layer among the hyper-parameters
            if not part and name not in DATA_NAMES.get(module, "").split():
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")
        return Stub

    def persistent_load(self, saved_id):
        kind, storage_type, key, _device, numel, *view = saved_id
        dtype = getattr(storage_type, "dtype", None)
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise pickle.UnpicklingError("it stores something that is no tensor")
        self.storages[key] = dtype
        return Storage(dtype, key, view[0][1] if view and view[0] else 0)


# ---------------------------------------------------------------------------------------------------------------------
# files

MAGIC = 0x1950A86A20F9469CFC6C  # opens a torch.save file of before zip archives
SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_zip(path):
    """-> the unpickled object, {storage key: (first byte, bytes)}."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        entries = {
            e.filename.partition("/")[2]: e for e in archive.infolist()
        }  # below the archive's one folder
        if (
            "data.pkl" not in entries
            or "byteorder" in entries
            and archive.read(entries["byteorder"]) != b"little"
        ):
            raise pickle.UnpicklingError(
                "a zip archive that is not torch.save's, or a big-endian machine's"
            )
        with archive.open(entries["data.pkl"]) as f:
            content = Unpickler(f).load()
        where = {}
        for name, entry in entries.items():
            if name.startswith("data/") and entry.compress_type == zipfile.ZIP_STORED:
                raw.seek(
                    entry.header_offset + 26
                )  # how long its name is, and the padding behind it
                name_length, extra_length = struct.unpack("<HH", raw.read(4))
                where[name.removeprefix("data/")] = (
                    entry.header_offset + 30 + name_length + extra_length,
                    entry.file_size,
                )
    return content, where


def read_older(path):
    """The same of a file without zip: five pickles, then every storage's length and bytes."""
    with open(path, "rb") as f:
        if Unpickler(f).load() != MAGIC:
            raise pickle.UnpicklingError("it has none of torch.save's marks")
        Unpickler(f).load(), Unpickler(f).load()  # versions
        unpickler = Unpickler(f)
        content, where = unpickler.load(), {}
        for key in Unpickler(f).load():
            length = int.from_bytes(f.read(8), "little") * unpickler.storages[key].itemsize
            where[key] = f.tell(), length
            f.seek(length, os.SEEK_CUR)
    return content, where


class Checkpoint(Mapping):
    """{name: tensor} of a file. A tensor is a view of the mapped file, so it costs memory only when it is read, and `release` gives that
    back; write to none. `config` is what `save_model` put beside the weights, None in other people's files.

    Lightning's `state_dict`, other trainers' `model` and DistributedDataParallel's `module.` are taken off; whatever else lies in the file is left out.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(path, "rb") as f:
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            self.config, self.entries = (
                self.read_safetensors()
                if self.path.suffix == ".safetensors"
                else (None, self.read_pickled())
            )
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such checkpoint; give the path of a .safetensors or .ckpt file"
            ) from None
        except Exception as e:  # a damaged or hostile pickle can raise anything; none of it has run more than this file's code
            reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
            raise CheckpointError(
                f"{path}: not opened as a checkpoint: {reason}; fetch or train it again"
            ) from None

    def read_safetensors(self):
        with safe_open(self.path, "pt") as f:  # checks the header
            config = json.loads((f.metadata() or {}).get("config", "null"))
        length = int.from_bytes(self.map[:8], "little")
        header = json.loads(self.map[8 : 8 + length])
        header.pop("__metadata__", None)
        return config, {
            k: (SAFE_DTYPES[e["dtype"]], 8 + length + e["data_offsets"][0], tuple(e["shape"]), None)
            for k, e in header.items()
        }

    def read_pickled(self):
        content, where = (read_zip if self.map[:4] == b"PK\3\4" else read_older)(self.path)
        state = next(
            (content[k] for k in ("state_dict", "model") if isinstance(content.get(k), dict)),
            content,
        )
        entries = {}
        for name, tensor in state.items():
            if isinstance(tensor, TensorSpec):
                first, length = where[tensor.storage.key]
                dtype = tensor.storage.dtype
                start = (tensor.storage.shift + tensor.offset) * dtype.itemsize
                extent = (
                    1 + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride))
                    if all(tensor.size)
                    else 0
                )
                if start + extent * dtype.itemsize > length or first + length > len(self.map):
                    raise pickle.UnpicklingError(f"{name} lies outside the file")
                entries[name.removeprefix("module.")] = (
                    dtype,
                    first + start,
                    tensor.size,
                    tensor.stride,
                )
        if not entries:
            raise pickle.UnpicklingError("it holds no state dict")
        return entries

    def __getitem__(self, name):
        dtype, first, size, stride = self.entries[name]
        if not all(size):
            return torch.empty(size, dtype=dtype)
        stride = torch.empty(size, device="meta").stride() if stride is None else stride
        count = 1 + sum((n - 1) * s for n, s in zip(size, stride))
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=first).as_strided(
            size, stride
        )

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    def release(self):
        """Give back the memory of what was read; views stay valid and are read anew."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def checkpoint_errors(path, cls):
    """Around building and filling a network of `cls`: what a strange configuration or another network's weights raise, as one line."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
        raise CheckpointError(
            f"{path}: not a checkpoint of {cls.__name__} ({reason}); give one of this network"
        ) from None


def load_into(model, file, tensors=None, device="cpu", dtype=torch.float32):
    """Give `model`, made on the meta device, the weights of `file` (or `tensors`, taken from it): strictly, and one after the other at
    its final place, type and layout (images channels-last), so that nothing is ever there twice. -> the model, to be used rather than trained."""
    with checkpoint_errors(file.path, type(model)):
        model.load_state_dict(file if tensors is None else tensors, assign=True)
    for tensor in (*model.parameters(), *model.buffers()):
        to = (
            dtype
            if isinstance(tensor, nn.Parameter)
            else torch.float32
            if tensor.is_floating_point()
            else tensor.dtype
        )
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        tensor.data = tensor.data.to(device, to, copy=True, memory_format=layout)
        file.release()
    return model.eval()


# --------------------------------------------------------------------------------------------------
# networks


def config_from_json(cls, values: dict):
    """A configuration dataclass of its JSON form: lists become tuples, dicts nested dataclasses.

    TypeError where a name is not one of its fields."""
    values = dict(values)
    for field in dataclasses.fields(cls):
        value = values.get(field.name)
        if isinstance(value, list):
            values[field.name] = tuple(value)
        elif isinstance(value, dict):
            values[field.name] = config_from_json(field.type, value)
    return cls(**values)


def empty_network(cls, path, values: dict | None, default):
    """A network of class `cls` on the meta device: of the configuration `values` that the file at
    `path` holds, or of `default`, the published one, if that is None."""
    with checkpoint_errors(path, cls), torch.device("meta"):
        return cls(default if values is None else config_from_json(type(default), values))


def load_network(cls, path, default, device="cpu", dtype=torch.float32, without: tuple = ()):
    """A network of class `cls` with the weights of a file, strictly; in eval mode.

    default: the configuration of a file that has none (a published one); without: dotted names of
    parts that the caller does not need, neither built nor read. CheckpointError if it does not fit."""
    file = Checkpoint(path)
    model = empty_network(cls, path, file.config, default)
    for name in without:
        parent, _, part = name.rpartition(".")
        if hasattr(model.get_submodule(parent), part):
            delattr(model.get_submodule(parent), part)
    unused = tuple(f"{name}." for name in without)
    tensors = {k: file[k] for k in file if not k.startswith(unused)}
    return load_into(model, file, tensors, device, dtype)


def one_line(model):
    """What a notebook prints of a network: "LDM(8.6 M parameters, float32, cpu)"."""
    count = sum(p.numel() for p in model.parameters()) / 1e6
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    return f"{type(model).__name__}({count:.1f} M parameters, {dtype}, {first.device})"


# ---------------------------------------------------------------------------------------------------------------------
# writing


def save_tensors(path, tensors, dtype=None, **metadata):
    """{name: tensor} -> one safetensors file, `metadata` as JSON in its header. dtype: of matrices and convolutions; norms, biases and
    schedules keep their own, for they weigh nothing."""
    tensors = {
        k: v.detach().to("cpu", dtype if v.ndim >= 2 else None).contiguous()
        for k, v in tensors.items()
    }
    with atomic_write(path) as part:
        part.touch()
        mode = part.stat().st_mode  # that of any new file; safetensors makes it the owner's alone
        try:
            save_file(tensors, part, {k: json.dumps(v) for k, v in metadata.items()})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # a full disk; atomic_write names the file
        part.chmod(mode)


def save_model(path, model, config, half=False, **metadata):
    """Weights and the configuration that rebuilds them. half: in float16, half the size."""
    save_tensors(
        path, model.state_dict(), torch.float16 if half else None, config=config, **metadata
    )


PUBLISHED = {
    "cavp_epoch66": "cavp",
    "ldm_epoch240": "ldm",
    "double_guidance_classifier": "align",
}  # as `sample.py` calls them


def convert(source, target, dtype):
    """Every checkpoint of a folder -> safetensors of its tensors alone, with matrices and convolutions in `dtype`, under the name that
    `sample.py --weights` looks for. -> [(from, to)]"""
    source, target = Path(source), Path(target)
    files = sorted(p for p in source.glob("*") if p.suffix in (".ckpt", ".safetensors"))
    if not files:
        raise CheckpointError(
            f"{source}: no .ckpt or .safetensors there; give the folder that holds them"
        )
    pairs = [(p, target / f"{PUBLISHED.get(p.stem, p.stem)}.safetensors") for p in files]
    for path, out in pairs:
        if out.exists():
            raise CheckpointError(f"{out}: exists already; give another folder")
    for path, out in tqdm(pairs, desc="convert"):
        file = Checkpoint(path)
        save_tensors(out, file, dtype, config=file.config)
    return pairs


def main(argv=None):
    p = cli.Parser("python -m common.checkpoints", __doc__)
    p.add_argument("command", choices=("convert",))
    p.add_argument("source", type=Path, metavar="DIR", help="folder with .ckpt or .safetensors")
    p.add_argument("target", type=Path, metavar="OUT", help="where the safetensors go")
    p.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="bfloat16",
        help="of matrices and convolutions",
    )
    args = p.parse_args(argv)
    try:
        pairs = convert(args.source, args.target, getattr(torch, args.dtype))
    except UserError as error:
        sys.exit(f"{p.prog}: {error}")
    for path, out in pairs:
        print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, of {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
