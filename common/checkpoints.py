"""Checkpoints: anybody's are read without running anything in them, ours are written atomically.

in   .safetensors (ours with its configuration in the header), or a torch.save file, zipped or
     older: a bare state dict, or a Lightning checkpoint with optimizer states, callbacks and
     hyper-parameters around its `state_dict`
out  {name: tensor}, read through a map of the file: filling a network needs little more memory than
     the network's own

A pickle is a program. Here it runs on a machine that can build nothing but dicts, lists, numbers,
strings and descriptions of tensors: whatever class it names becomes one stub, so classes of foreign
packages need not be importable and run nothing. A name that no checkpoint has a use for and every
attack needs (the standard library's and torch's functions) refuses the file.

    python -m common.checkpoints convert DIR OUT      published files -> safetensors, half the size
    python -m common.checkpoints show FILE            a model card of what the file says of itself
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from common import cli, model_card
from common.files import UserError, atomic_write


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or is not what was asked for."""


# ---- unpickling without running anything -------------------------------------------------------


class Stub:
    """Stands for an object of any class; whatever the pickle does with it, nothing happens."""

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def __init__(self, *_args, **_kwargs):
        pass

    def ignore(self, *_args):
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class Dict(dict):
    """An ordered dict, the library's or a foreign one; attributes set on it are left out."""

    def __setstate__(self, _state):
        pass


class Storage(NamedTuple):
    """A stretch of bytes in the file, by its key, and the type of its elements."""

    dtype: torch.dtype
    key: str
    shift: int  # elements from its beginning


class TensorSpec:
    """A tensor as torch's pickles describe it: storage, offset, size and stride, in elements.

    A parameter is the tensor that it holds.
    """

    def __new__(cls, first, *rest):
        # torch rebuilds a parameter from the tensor that it holds
        return first if isinstance(first, TensorSpec) else object.__new__(cls)

    def __init__(self, storage, *rest):
        if isinstance(storage, TensorSpec):
            return
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        # plain counts: checked here, because views of the file are built from them later
        offset, size, stride = rest[:3]
        counts = (offset, *size, *stride)
        valid = all(isinstance(n, int) and n >= 0 for n in counts)
        if not valid or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor of impossible shape")
        self.storage = storage
        self.offset = offset + storage.shift
        self.size = tuple(size)
        self.stride = tuple(stride)

    def __setstate__(self, _state):
        pass


DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD = {
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
}
# names of the standard library, numpy and torch that hyper-parameters, callbacks and optimizers
# hold as plain data
DATA_NAMES = {
    "builtins": "object set frozenset list dict tuple int float complex bool str bytes bytearray "
    "slice range",
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
    """The standard machine with nothing to call.

    `dtypes` collects {storage key: element type} of all storages that the pickle names.
    """

    def __init__(self, file):
        super().__init__(file)
        self.dtypes = {}

    def find_class(self, module, name):
        # protocol 2, torch's, has Python 2's names for modules
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        # a state dict itself, its tensors, their storages
        if module == "collections" and name == "OrderedDict":
            return Dict
        if module == "torch._utils" and name in REBUILD:
            return TensorSpec
        if module == "torch" and name in DTYPES:
            return type(name, (Stub,), {"dtype": DTYPES[name]})
        # a function of a trusted package could do harm; what it holds as plain data is listed
        package = module.split(".")[0]
        trusted = package in sys.stdlib_module_names or package in ("torch", "numpy")
        # an optimizer or a layer among the hyper-parameters
        part = module.startswith(("torch.optim.", "torch.nn.modules."))
        if trusted and not part and name not in DATA_NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")
        return Stub

    def persistent_load(self, saved_id):
        kind, storage_type, key, _device, _numel, *view = saved_id
        dtype = getattr(storage_type, "dtype", None)
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise pickle.UnpicklingError("it stores something that is no tensor")
        self.dtypes[key] = dtype
        # older files store views of storages: (key, offset, size)
        shift = view[0][1] if view and view[0] else 0
        return Storage(dtype, key, shift)


# ---- reading -----------------------------------------------------------------------------------

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


class Entry(NamedTuple):
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    first: int  # byte
    size: tuple
    stride: tuple  # in elements

    @property
    def extent(self):
        """Elements from the first to the last, both included."""
        if not all(self.size):
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))


def read_zip(path):
    """-> the unpickled object, {storage key: (first byte, bytes)}."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        # below the archive's one folder
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        byteorder = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        if "data.pkl" not in entries or byteorder != b"little":
            raise pickle.UnpicklingError(
                "a zip archive that is not torch.save's, or a big-endian machine's"
            )
        with archive.open(entries["data.pkl"]) as file:
            content = Unpickler(file).load()
        # storages are entries of their own, uncompressed
        places = {}
        for name, entry in entries.items():
            if name.startswith("data/") and entry.compress_type == zipfile.ZIP_STORED:
                # its local header ends in the lengths of its name and of the padding behind that
                raw.seek(entry.header_offset + 26)
                name_length, padding = struct.unpack("<HH", raw.read(4))
                first = entry.header_offset + 30 + name_length + padding
                places[name.removeprefix("data/")] = first, entry.file_size
    return content, places


def read_older(path):
    """The same of a file without zip: five pickles, then every storage's length and bytes."""
    with open(path, "rb") as file:
        if Unpickler(file).load() != MAGIC:
            raise pickle.UnpicklingError("it has none of torch.save's marks")
        # the protocol's version, and the machine's sizes of integers
        for _ in range(2):
            Unpickler(file).load()
        unpickler = Unpickler(file)
        content = unpickler.load()
        keys = Unpickler(file).load()
        places = {}
        for key in keys:
            length = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
            places[key] = file.tell(), length
            file.seek(length, os.SEEK_CUR)
    return content, places


class Checkpoint(Mapping):
    """{name: tensor} of a file, with `config`: what `save_model` put beside the weights, or None.

    metadata: {name: value} of the header, of anybody's safetensors, or the numbers and strings that
    lie beside a state dict. It may say anything.
    A tensor is a view of the mapped file, so it costs memory only when it is read, and `release`
    gives that back; write to none. Lightning's `state_dict`, other trainers' `model` and
    DistributedDataParallel's `module.` are taken off; whatever else lies in the file is left out.
    Raises CheckpointError.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = None
        try:
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if self.path.suffix == ".safetensors":
                self.metadata, self.entries = self.read_safetensors()
                self.config = self.metadata.get("config")
            else:
                self.metadata, self.entries = self.read_pickled()
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such checkpoint; give the path of a .safetensors or .ckpt file"
            ) from None
        # a damaged or hostile pickle can raise anything, but has run nothing but this file's code
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise CheckpointError(
                f"{path}: not opened as a checkpoint: {reason}; fetch or train it again"
            ) from None

    def read_safetensors(self):
        """-> metadata, {name: Entry}."""
        metadata = {}
        with safe_open(self.path, "pt") as file:  # checks the header
            for key, text in (file.metadata() or {}).items():
                metadata[key] = text
                # others' programs write plain text
                with contextlib.suppress(ValueError):
                    metadata[key] = json.loads(text)
        # 8 bytes of length, the header in JSON, then the tensors, contiguous
        length = int.from_bytes(self.map[:8], "little")
        header = json.loads(self.map[8 : 8 + length])
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            first = 8 + length + entry["data_offsets"][0]
            stride = torch.empty(entry["shape"], device="meta").stride()
            entries[name] = Entry(SAFE_DTYPES[entry["dtype"]], first, entry["shape"], stride)
        return metadata, entries

    def read_pickled(self):
        """-> metadata, {name: Entry}; each tensor is checked to lie inside its storage and file."""
        read = read_zip if self.map[:4] == b"PK\3\4" else read_older
        content, places = read(self.path)
        # without the trainer's wrapping
        state = content
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), dict):
                state = content[key]

        # optimizer states and the like, among the tensors of a state dict, are no TensorSpec
        entries = {}
        for name, tensor in state.items():
            if not isinstance(tensor, TensorSpec):
                continue
            first, length = places[tensor.storage.key]
            dtype = tensor.storage.dtype
            start = tensor.offset * dtype.itemsize
            # a damaged or hostile file may claim anything
            entry = Entry(dtype, first + start, tensor.size, tensor.stride)
            end = start + entry.extent * dtype.itemsize
            if end > length or first + length > len(self.map):
                raise pickle.UnpicklingError(f"{name} lies outside the file")
            entries[name.removeprefix("module.")] = entry
        if not entries:
            raise pickle.UnpicklingError("it holds no state dict")
        # as a Lightning checkpoint has its epoch; what is no plain value is nobody's to read
        plain = {key: value for key, value in content.items() if type(value) in (int, float, str)}
        return plain, entries

    def __getitem__(self, name):
        entry = self.entries[name]
        if not entry.extent:
            return torch.empty(entry.size, dtype=entry.dtype)
        flat = torch.frombuffer(self.map, dtype=entry.dtype, count=entry.extent, offset=entry.first)
        return flat.as_strided(entry.size, entry.stride)

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    def release(self):
        """Give back the memory of what was read; views stay valid and are read anew."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def checkpoint_errors(path: Path | str, cls: type):
    """Around building and filling a network of `cls`: what does not fit raises CheckpointError."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path}: not a checkpoint of {cls.__name__} ({reason}); give one of this network"
        ) from None


def is_finite(tensor):
    """Whether a tensor has neither NaN nor infinity, without a temporary copy of it."""
    if not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()  # NaN becomes both
    return math.isfinite(low) and math.isfinite(high)


def load_into(model, file, tensors=None, device="cpu", dtype=torch.float32):
    """Give `model`, built on the meta device, the weights of a Checkpoint; -> it, in eval mode.

    Strict. `tensors`, if given, are taken from the file instead of all of it. One after the other
    goes to its final device, type and layout (images channels-last), so that nothing is in memory
    twice. Parameters become `dtype`, other floats float32. Raises CheckpointError.
    """
    with checkpoint_errors(file.path, type(model)):
        model.load_state_dict(file if tensors is None else tensors, assign=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # NaN weights would not always show: a finder with them predicts no hits
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f"{file.path}: {name} is not finite (NaN or infinity); use another file"
            )
        # counters stay integers
        kind = tensor.dtype
        if isinstance(tensor, nn.Parameter):
            kind = dtype
        elif tensor.is_floating_point():
            kind = torch.float32
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        tensor.data = tensor.data.to(device, kind, copy=True, memory_format=layout)
        file.release()
    return model.eval()


# ------------------------------------------------------------------------------------------------
# networks


def config_from_json(cls, values: dict):
    """A configuration dataclass of its JSON form: lists become tuples, dicts nested dataclasses.

    Raises TypeError where a name is not one of its fields.
    """
    values = dict(values)
    for field in dataclasses.fields(cls):
        value = values.get(field.name)
        if isinstance(value, list):
            values[field.name] = tuple(value)
        elif isinstance(value, dict):
            values[field.name] = config_from_json(field.type, value)
    return cls(**values)


def empty_network(cls, path, values: dict | None, default):
    """A network of class `cls` on the meta device. Raises CheckpointError.

    values: the configuration in the file at `path`; None: the network is of `default`.
    """
    with checkpoint_errors(path, cls), torch.device("meta"):
        return cls(default if values is None else config_from_json(type(default), values))


def load_network(cls, path, default, device="cpu", dtype=torch.float32, without: tuple = ()):
    """A network of class `cls` with the weights of a file, strictly; in eval mode.

    default: the configuration of a file that has none (a published one); without: dotted names of
    parts that the caller does not need. Raises CheckpointError if the weights do not fit.
    """
    file = Checkpoint(path)
    model = empty_network(cls, path, file.config, default)
    # what is not needed is neither built nor read
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


# ---- writing -----------------------------------------------------------------------------------


def save_tensors(path: Path | str, tensors, dtype: torch.dtype | None = None, **metadata):
    """{name: tensor} -> one safetensors file, `metadata` as JSON in its header.

    `dtype` is that of matrices and convolutions; norms, biases and schedules keep their own, for
    they take next to no space. Raises FileError.
    """
    # safetensors takes no views and no gradients
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.ndim >= 2 else None).contiguous()
        for name, tensor in tensors.items()
    }
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    with atomic_write(path) as part:
        part.touch()
        mode = part.stat().st_mode  # that of any new file; safetensors makes it the owner's alone
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # a full disk; atomic_write names the file
            raise OSError(str(error)) from None
        part.chmod(mode)


def save_model(path: Path | str, model, config: dict, dtype=torch.float32, **metadata):
    """Weights, and the configuration that rebuilds their network. Raises FileError.

    `dtype`, float32 or float16, is that of matrices and convolutions.
    """
    save_tensors(path, model.state_dict(), dtype, config=config, **metadata)


# as `sample.py` calls them
PUBLISHED = {
    "cavp_epoch66": "cavp",
    "ldm_epoch240": "ldm",
    "double_guidance_classifier": "align",
}


def convert(source: Path | str, target: Path | str, dtype: torch.dtype):
    """Every checkpoint of a folder -> safetensors of its tensors alone; -> [(from, to)].

    Matrices and convolutions in `dtype`, under the names that `sample.py --weights` looks for.
    Raises CheckpointError where there is none, or where an output exists.
    """
    if not Path(source).is_dir():
        raise CheckpointError(f"{source}: no such folder; give the one that holds the checkpoints")
    files = [p for p in sorted(Path(source).glob("*")) if p.suffix in (".ckpt", ".safetensors")]
    if not files:
        raise CheckpointError(
            f"{source}: no .ckpt or .safetensors in it; give the folder that holds them"
        )
    pairs = []
    # nothing is overwritten, which is checked before the first file is written
    for path in files:
        out = Path(target) / f"{PUBLISHED.get(path.stem, path.stem)}.safetensors"
        if out.exists():
            raise CheckpointError(f"{out}: exists already; give another folder")
        pairs.append((path, out))
    for path, out in tqdm(pairs, desc="convert"):
        file = Checkpoint(path)
        # what the file says of itself stays with the weights
        known = {key: file.metadata[key] for key in model_card.KEYS if key in file.metadata}
        save_tensors(out, file, dtype, config=file.config, **known)
    return pairs


def parse_arguments(argv=None):
    parser = cli.Parser("python -m common.checkpoints", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "every checkpoint of a folder as safetensors of its tensors alone"
    p = commands.add_parser("convert", help=text, description=text)
    p.set_defaults(run=run_convert)
    p.add_argument("source", type=Path, metavar="DIR", help="folder of .ckpt or .safetensors")
    p.add_argument("target", type=Path, metavar="OUT", help="folder for the safetensors")
    p.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="bfloat16",
        help="of matrices and convolutions",
    )
    text = "print a model card, in Markdown, of what a checkpoint says of itself"
    p = commands.add_parser("show", help=text, description=text)
    p.set_defaults(run=run_show)
    p.add_argument("file", type=Path, metavar="FILE", help="a .safetensors or .ckpt file")
    return parser.parse_args(argv)


def run_convert(args):
    for path, out in convert(args.source, args.target, getattr(torch, args.dtype)):
        print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, of {path.stat().st_size / 1e6:.0f} MB")


def run_show(args):
    print(model_card.render(Checkpoint(args.file)), end="")


def main(argv=None):
    args = parse_arguments(argv)
    try:
        args.run(args)
    except UserError as error:
        sys.exit(f"python -m common.checkpoints: {error}")


if __name__ == "__main__":
    main()
