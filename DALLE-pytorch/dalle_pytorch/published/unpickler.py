"""Reads tensors and settings from other projects' PyTorch files without running code from them.

A PyTorch file is a pickle, a program that may call anything. Here it can call a closed list of names only: those that
build tensors and containers, each replaced by a harmless function. Classes that published checkpoints are known to
contain (Lightning's callbacks, the dVAE's modules, the classes of a TorchScript archive) become `ForeignObject`, which
only stores its state. A file with any other name is refused.
"""

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
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import read_yaml as read_any_yaml

MAX_PICKLE_BYTES = 256 * 2**20  # the largest published checkpoints need a few million
MAX_EXPANDED = 2**24  # elements of a tensor that shares storage among them
MAX_KEY_LENGTH = 500  # characters of a weight's name, which regular expressions go through
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
    """An object of a class that is not loaded: the name of the class, and the state in the file."""

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
        """Drops the items of a subclass of list."""

    extend = add = append


# Public functions


def read_torch(path: str | os.PathLike, leave_out: Collection[str] = ()) -> Any:
    """The content of a file of `torch.save`, of any version, or `torch.jit.save`, on the CPU.

    It consists of tensors, dicts, lists, tuples, sets, numbers, strings and `ForeignObject`s. Entries of a dict named
    in `leave_out` are skipped and their tensors not read. Raises `CheckpointError`, one line, for a file that is
    missing, damaged, or contains anything else.
    """
    path = Path(path)
    with opening(path, "is damaged or not a PyTorch file"), open(path, "rb") as file:
        try:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
            file.seek(0)
            return read(file, os.fstat(file.fileno()).st_size, leave_out)
        except _Refusal as error:
            raise CheckpointError(
                f"{path} holds more than tensors and settings ({error}), and was not opened"
            ) from None


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a YAML file."""
    with opening(path, "cannot be read as YAML"):
        settings = read_any_yaml(path)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected a mapping of settings, got a {type(settings).__name__}")
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
    """`value` if it is a state dict, else raises `CheckpointError`."""
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{source} holds no weights")
    for key, tensor in value.items():
        if not (isinstance(key, str) and len(key) <= MAX_KEY_LENGTH and isinstance(tensor, Tensor)):
            raise CheckpointError(f"{source} is not a state dict: {str(key)[:80]} is a {type(tensor).__name__}")
    return value


# Unpickling


class _Refusal(Exception):
    """A name outside the closed list, which is the message."""


class _Dict(dict):
    """Replaces OrderedDict and defaultdict, and drops their attributes."""

    def __init__(self, *args):
        super().__init__()
        for arg in args:
            pairs = arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
            self.update((_key(key), value) for key, value in pairs)

    def __setstate__(self, state: Any) -> None:
        pass


def _key(value: Any) -> Any:
    """`value` if it may be a key, or in a set: a tuple of tuples may take as long to hash as there are paths in it."""
    parts = value if isinstance(value, tuple) else (value,)
    nested = any(isinstance(part, (tuple, frozenset)) for part in parts)
    # Numbers beyond a machine word can be made to share one hash.
    if nested or len(parts) > 100 or any(isinstance(part, (int, float)) and abs(part) > 2**60 for part in parts):
        raise pickle.UnpicklingError("it has a key that nothing is kept under")
    return value


class _Function:
    """A function that a pickle may call but not modify."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it assigns to a function")


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int
    first: int = 0  # offset of a view of another storage


@dataclass(frozen=True, eq=False)
class _StoredTensor:
    """The location of a tensor that is read later."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        pass  # attributes of the tensor


def _rebuild_tensor(storage, offset, size, stride, *_) -> _StoredTensor:
    return _StoredTensor(storage, storage.first + offset, tuple(size), tuple(stride), storage.dtype)


def _rebuild_tensor_v3(storage, offset, size, stride, _requires_grad, _hooks, dtype, *_) -> _StoredTensor:
    return _StoredTensor(storage, offset, tuple(size), tuple(stride), dtype)


def _set_of(kind: Callable) -> Callable:
    return lambda items=(): kind(map(_key, items))


_FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor, "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3, "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _type, args, _state: rebuild(*args),
    "_codecs.encode": lambda text, *_: text, "torch.jit._pickle.restore_type_tag": lambda value, *_: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
    "builtins.set": _set_of(set), "__builtin__.set": _set_of(set),
    "builtins.frozenset": _set_of(frozenset), "__builtin__.frozenset": _set_of(frozenset),
}  # fmt: skip
_TYPES = {
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _Dict,
    "torch.Size": tuple,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}  # fmt: skip


def _counted(opcode: bytes) -> Callable[[Any], None]:
    """The operation, once the items of what it is given, and of what is in that, are counted."""
    perform = pickle._Unpickler.dispatch[opcode[0]]
    takes_stack = opcode in (pickle.INST, pickle.OBJ)

    def load(self: Any) -> None:
        given = self.stack if takes_stack else self.stack[-2:]
        self.left -= sum(_length(item) + (sum(map(_length, item)) if isinstance(item, tuple) else 0) for item in given)
        if self.left < 0:
            raise pickle.UnpicklingError("it copies more than a file of its size can hold")
        perform(self)

    return load


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (tuple, list, dict, set, frozenset)) else 1


def _keyed(opcode: bytes) -> Callable[[Any], None]:
    """The operation on a dict or a set, once its keys are looked at."""
    perform = pickle._Unpickler.dispatch[opcode[0]]
    keys = {pickle.SETITEM: slice(-2, -1), pickle.DICT: slice(None, None, 2), pickle.SETITEMS: slice(None, None, 2)}

    def load(self: Any) -> None:
        for key in self.stack[keys.get(opcode, slice(None))]:
            _key(key)
        perform(self)

    return load


_COUNTED = {
    opcode[0]: _counted(opcode)
    for opcode in (pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ)
}
_KEYED = {
    opcode[0]: _keyed(opcode)
    for opcode in (pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET)
}


class _Unpickler(pickle._Unpickler):
    """Builds containers, `_StoredTensor`s and `ForeignObject`s, of classes made for this file alone.

    It is Python's, not C's, so that its work can be counted: a pickle may copy what it has built again and again, and
    a key may take any time to hash.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, **_COUNTED, **_KEYED}

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.inert: dict[str, type[ForeignObject]] = {}
        self.storages: dict[str, _Storage] = {}
        self.left = 1000 + 20 * len(data)

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

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "module":  # of PyTorch before 1.6: a class with its source text
            return rest[0]
        storage_type, key, _location, numel, *view = rest
        known = kind == "storage" and isinstance(storage_type, _Function) and isinstance(key, (str, int))
        if not known or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("it refers to an unknown storage")
        first = view[0][1] if view and view[0] is not None else 0
        storage = self.storages[str(key)] = _Storage(str(key), storage_type(), numel, first)
        return storage


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Reads one pickle at the file's position, and the storages it refers to."""
    start = file.tell()
    for _ in pickletools.genops(file):
        pass  # finds the end, and that all lengths are within the file
    size = file.tell() - start
    if size > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError("its pickle is larger than that of any checkpoint")
    file.seek(start)
    unpickler = _Unpickler(file.read(size))
    return unpickler.load(), unpickler.storages


# Files


def _read_zip(file: BinaryIO, size: int, leave_out: Collection[str]) -> Any:
    """The format since PyTorch 1.6, and TorchScript: a zip of `data.pkl` and `data/<key>` in a folder of any name."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        tables = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise pickle.UnpicklingError("expected a zip file with one data.pkl")
        folder = tables[0].removesuffix("data.pkl")
        left = size

        def read(name: str) -> bytearray:
            nonlocal left
            if folder + name not in members:
                raise pickle.UnpicklingError(f"it lacks {name}")
            info = members[folder + name]
            left -= info.file_size
            # PyTorch does not compress, so that together they are smaller than the file.
            if info.compress_type != zipfile.ZIP_STORED or left < 0:
                raise pickle.UnpicklingError(f"{name} unpacks to more than the size of the file")
            return bytearray(archive.read(info))

        if f"{folder}byteorder" in members and read("byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        contents, _ = _unpickle(io.BytesIO(read("data.pkl")))
        return _Finisher(lambda storage: read(f"data/{storage.key}"), size).finish(contents, leave_out)


def _read_legacy(file: BinaryIO, size: int, leave_out: Collection[str]) -> Any:
    """The format before PyTorch 1.6: five pickles, then the storages, each after the number of its elements."""
    if _unpickle(file)[0] != LEGACY_MAGIC:
        raise pickle.UnpicklingError("unknown magic number")
    _protocol, system = _unpickle(file)[0], _unpickle(file)[0]
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    contents, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    places = {}
    if not all(isinstance(key, (str, int)) for key in keys):
        raise pickle.UnpicklingError("it refers to an unknown storage")
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

    return _Finisher(read, size).finish(contents, leave_out)


def _flat(storage: _Storage, data: bytearray) -> Tensor:
    """The elements of a storage, (numel,)."""
    if len(data) < storage.numel * storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {storage.key} is cut short")
    data = data[: storage.numel * storage.dtype.itemsize]
    return torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


class _Finisher:
    """Copies unpickled data with tensors read from their storages, and refuses anything else."""

    def __init__(self, read: Callable[[_Storage], bytearray], size: int):
        self.read = read
        self.left = 4 * size + 4 * MAX_EXPANDED  # bytes of all tensors, copied
        self.flat: dict[str, Tensor] = {}
        self.done: dict[int, Any] = {}  # by identity, for shared parts and cycles

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
            copy = self.done[id(value)] = value
            copy.state = self(copy.state)
        elif isinstance(value, type) and issubclass(value, ForeignObject):
            copy = value.name
        elif isinstance(value, _StoredTensor):
            copy = self.done[id(value)] = self.tensor(value)
        else:
            raise pickle.UnpicklingError("it contains a function as a value")
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
        # A stride of 0 expands one element to any size.
        count = math.prod(stored.size)
        self.left -= count * stored.dtype.itemsize
        if last >= len(flat) or count > max(len(flat), MAX_EXPANDED) or self.left < 0:
            raise pickle.UnpicklingError(
                f"a tensor of shape {stored.size} does not fit its storage of {len(flat)} elements"
            )
        return flat.as_strided(stored.size, stored.stride, stored.offset)
