"""A reader of other projects' files that takes tensors and settings out of them and runs nothing.

A PyTorch file is a pickle, a program that may call anything. Here it can call a closed list of names: those that build
tensors and containers, each replaced by a harmless function of our own. Classes that published checkpoints are known to
carry (Lightning's callbacks, the dVAE's modules, the classes of a TorchScript archive) become `ForeignObject`, which
only holds what the file says of it. Any other name is a reason to refuse the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from dalle_pytorch.errors import CheckpointError

LARGEST_PICKLE = 256 * 2**20  # bytes; those of the largest published checkpoints have a few million
LARGEST_EXPANDED = 2**24  # elements that a tensor may have beyond those that are stored
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning\.pytorch|lightning_fabric)\.(callbacks|utilities)(\.\w+)*\.[A-Z]\w*"
    r"|omegaconf(\.\w+)*\.[A-Z]\w*|typing\.Any|argparse\.Namespace|pathlib\.\w*Path"  # settings beside the weights
    r"|(builtins|__builtin__)\.(dict|list|tuple|str|int|float|bool)"  # the types of such settings
    r"|numpy\.dtype|numpy\.(_?core)\.multiarray\.scalar"
    r"|dall_e\.(encoder|decoder|utils)\.[A-Z]\w*|torch\.nn\.modules\.\w+\.[A-Z]\w*|torch\.device"  # whole modules
    r"|torch\.nn\.parameter\.Parameter|torch\.Tensor"
    r"|__torch__(\.\w+)+"  # TorchScript
)


class ForeignObject:
    """An object of a class that is not loaded: `name` is the class's, `state` what the file says is in it."""

    name = ""
    state: dict[Any, Any]

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, item: Any) -> None:
        """What a list of such a class would take in is left out."""

    extend = add = append


# --------------------------------------------------------------------------------------------------
# What is public


def read_torch(path: str | os.PathLike, leave_out: Collection[str] = ()) -> Any:
    """What `torch.save`, `torch.jit.save` or an old PyTorch's `torch.save` wrote, on the CPU.

    It is made of tensors, dicts, lists, tuples, sets, numbers, strings and `ForeignObject`s. If it is a dict, entries
    named in `leave_out` are missing and their tensors are not read. Raises `CheckpointError`
    with one line if the file is missing or damaged, or holds anything else; that is then not run.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
            file.seek(0)
            return read(file, os.fstat(file.fileno()).st_size, leave_out)
    except FileNotFoundError:
        raise CheckpointError(f"the weights file {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"the weights file {path} cannot be read ({error.strerror or error})") from None
    except _Refusal as error:
        raise CheckpointError(
            f"{path} holds more than tensors and settings ({error}) and is not opened; nothing in it was run"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: it is nested too deeply") from None
    # Damage can surface as almost any exception of pickle, zipfile and torch.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no PyTorch file: {reason}") from None


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a YAML file. Raises `CheckpointError` if there are none."""
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"the settings file {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"the settings file {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no table of settings")
    return settings


def module_state(module: ForeignObject) -> dict[str, Tensor]:
    """The tensors of a pickled module or a TorchScript archive, under the names of its state dict."""
    state: dict[str, Tensor] = {}
    entered: set[int] = set()

    def collect(values: dict[Any, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                state[f"{prefix}{name}"] = value
            elif isinstance(value, ForeignObject) and id(value) not in entered:
                entered.add(id(value))
                collect(value.state, f"{prefix}{name}.")
            elif name in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                collect(value, prefix)

    collect(module.state, "")
    return state


def tensor_dict(value: Any, source: object) -> dict[str, Tensor]:
    """`value` if it is a state dict, names to tensors; else `CheckpointError`, which names `source`."""
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{source} holds no weights")
    for key, tensor in value.items():
        if not (isinstance(key, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(f"{source} is no table of weights: {str(key)[:80]} is a {type(tensor).__name__}")
    return value


# --------------------------------------------------------------------------------------------------
# Unpickling


class _Refusal(Exception):
    """A name outside the closed list. The message is that name."""


class _Dict(dict):
    """Stands for OrderedDict and defaultdict, whose further attributes are dropped."""

    def __init__(self, *args):
        super().__init__(*(arg for arg in args if isinstance(arg, (dict, list))))

    def __setstate__(self, state: Any) -> None:
        pass


class _Function:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a function is not a place to store into")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int
    first: int = 0  # where a view of another storage begins


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor is, to be read when all is known."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        pass  # attributes that a program has hung on its tensor


def _rebuild_tensor(storage, offset, size, stride, *_) -> _StoredTensor:
    return _StoredTensor(storage, storage.first + offset, tuple(size), tuple(stride), storage.dtype)


def _rebuild_tensor_v3(storage, offset, size, stride, _requires_grad, _hooks, dtype, *_) -> _StoredTensor:
    return _StoredTensor(storage, offset, tuple(size), tuple(stride), dtype)


_FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _type, args, _state: rebuild(*args),
    "_codecs.encode": lambda text, *_: text,
    "torch.jit._pickle.restore_type_tag": lambda value, *_: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}
_TYPES = {
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _Dict,
    "__builtin__.set": set, "builtins.set": set,
    "__builtin__.frozenset": frozenset, "builtins.frozenset": frozenset,
    "torch.Size": tuple,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds containers, `_StoredTensor`s and `ForeignObject`s. Everything it hands out is made for this one file."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.inert: dict[str, type[ForeignObject]] = {}
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _TYPES:
            return _TYPES[full]
        if full in _FUNCTIONS:
            return _Function(_FUNCTIONS[full])
        if module in ("torch", "torch.cuda", "torch.storage") and name.lstrip("_") in _STORAGES:
            return _Function(lambda: _STORAGES[name.lstrip("_")])
        # A dot in the name would reach into a class.
        if "." not in name and _INERT.fullmatch(full):
            if full not in self.inert:
                self.inert[full] = type(name, (ForeignObject,), {"name": full})
            return self.inert[full]
        raise _Refusal(full[:200])

    def persistent_load(self, saved: Any) -> Any:
        kind, *rest = saved
        if kind == "module":  # of PyTorch before 1.6: a class with its source text
            return rest[0]
        storage_type, key, _location, numel, *view = rest
        if kind != "storage" or not isinstance(storage_type, _Function) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("it refers to something that is no storage")
        first = view[0][1] if view and view[0] is not None else 0
        storage = self.storages[str(key)] = _Storage(str(key), storage_type(), numel, first)
        return storage


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Reads one pickle from where the file stands, and the storages that it refers to."""
    start, largest_index, count = file.tell(), 0, 0
    for opcode, argument, _ in pickletools.genops(file):
        count += 1
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            largest_index = max(largest_index, argument or 0)
    size = file.tell() - start
    # The unpickler makes room for the largest index, however large.
    if size > LARGEST_PICKLE or largest_index > count:
        raise pickle.UnpicklingError("its table of contents is larger than a checkpoint's can be")
    file.seek(start)
    unpickler = _Unpickler(file.read(size))
    return unpickler.load(), unpickler.storages


# --------------------------------------------------------------------------------------------------
# Files


def _read_zip(file: BinaryIO, size: int, leave_out: Collection[str]) -> Any:
    """The format since PyTorch 1.6, and TorchScript: a zip of `data.pkl` and `data/<key>` in a folder of any name."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        tables = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise pickle.UnpicklingError("it is a zip file without a data.pkl")
        folder = tables[0].removesuffix("data.pkl")
        left = size

        def read(name: str) -> bytearray:
            nonlocal left
            if folder + name not in members:
                raise pickle.UnpicklingError(f"it lacks {name}")
            info = members[folder + name]
            left -= info.file_size
            # PyTorch compresses none of these, so that all of them together are smaller than the file.
            if info.compress_type != zipfile.ZIP_STORED or left < 0:
                raise pickle.UnpicklingError(f"{name} unpacks to more than there is in the file")
            return bytearray(archive.read(info))

        if f"{folder}byteorder" in members and read("byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        contents, _ = _unpickle(io.BytesIO(read("data.pkl")))
        return _Finisher(lambda storage: read(f"data/{storage.key}")).finish(contents, leave_out)


def _read_legacy(file: BinaryIO, size: int, leave_out: Collection[str]) -> Any:
    """The format before PyTorch 1.6: five pickles, then the storages, each after the number of its elements."""
    if _unpickle(file)[0] != LEGACY_MAGIC:
        raise pickle.UnpicklingError("it begins like none")
    _protocol, system = _unpickle(file)[0], _unpickle(file)[0]
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    contents, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    places = {}
    for key in map(str, keys):
        (numel,) = struct.unpack("<q", file.read(8))
        length = numel * storages[key].dtype.itemsize
        if not 0 <= length <= size - file.tell():
            raise pickle.UnpicklingError(f"storage {key} is cut short")
        places[key] = (file.tell(), length)
        file.seek(length, os.SEEK_CUR)

    def read(storage: _Storage) -> bytearray:
        start, length = places[storage.key]
        file.seek(start)
        return bytearray(file.read(length))

    return _Finisher(read).finish(contents, leave_out)


def _flat(storage: _Storage, data: bytearray) -> Tensor:
    """The numbers of a storage, (numel,)."""
    if len(data) < storage.numel * storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {storage.key} is cut short")
    data = data[: storage.numel * storage.dtype.itemsize]
    return torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


class _Finisher:
    """Copies what was unpickled, with tensors in their places, and refuses whatever is not plain data."""

    def __init__(self, read: Callable[[_Storage], bytearray]):
        self.read = read
        self.flat: dict[str, Tensor] = {}
        self.done: dict[int, Any] = {}  # by identity: shared parts stay shared, and cycles end

    def finish(self, contents: Any, leave_out: Collection[str]) -> Any:
        if isinstance(contents, dict):
            contents = {key: value for key, value in contents.items() if key not in leave_out}
        return self(contents)

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, dict):
            copy = self.done[id(value)] = {}
            copy.update((self(key), self(item)) for key, item in value.items())
        elif isinstance(value, list):
            copy = self.done[id(value)] = []
            copy.extend(map(self, value))
        elif isinstance(value, (tuple, set, frozenset)):
            copy = self.done[id(value)] = type(value)(map(self, value))
        elif isinstance(value, ForeignObject):
            # Its class was made for this file, and stays with it.
            copy = self.done[id(value)] = value
            copy.state = self(copy.state)
        elif isinstance(value, type) and issubclass(value, ForeignObject):
            copy = value.name
        elif isinstance(value, _StoredTensor):
            copy = self.done[id(value)] = self.tensor(value)
        else:
            raise pickle.UnpicklingError("a function stands where a value should")
        return copy

    def tensor(self, stored: _StoredTensor) -> Tensor:
        storage = stored.storage
        if storage.key not in self.flat:
            self.flat[storage.key] = _flat(storage, self.read(storage))
        flat = self.flat[storage.key]
        if storage.dtype != stored.dtype:
            flat = flat.view(stored.dtype)
        if len(stored.size) != len(stored.stride) or min(stored.offset, *stored.size, *stored.stride, 0) < 0:
            raise pickle.UnpicklingError("a tensor has an impossible shape")
        if 0 in stored.size:
            return torch.empty(stored.size, dtype=stored.dtype)
        last = stored.offset + sum((size - 1) * stride for size, stride in zip(stored.size, stored.stride, strict=True))
        # A stride of 0 makes any size out of one number.
        if last >= len(flat) or math.prod(stored.size) > max(len(flat), LARGEST_EXPANDED):
            raise pickle.UnpicklingError(
                f"a tensor of shape {stored.size} does not fit its storage of {len(flat)} numbers"
            )
        return flat.as_strided(stored.size, stored.stride, stored.offset)
