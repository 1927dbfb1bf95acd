"""Native checkpoints: a folder of `config.json` and `model.safetensors`, written whole or not at all.

This is the ground floor: it knows folders, tensors and atomic writes, and no model. A class that derives
from `PretrainedModel` and marks its constructor with `records_config` gains `save_pretrained` and `from_pretrained`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
NATIVE_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")

_CLASSES: dict[str, type[PretrainedModel]] = {}
_META_LOCK = threading.Lock()


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model. The message is one line for the user."""


# --------------------------------------------------------------------------------------------------
# Atomic writes


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block ends without an error.

    The block may create a file or a folder there. On an error what it wrote is removed, and whatever stood
    at `path` before stays as it was. The rename of a file is atomic; a folder is replaced by moving the old one aside.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.unlink()
    try:
        yield temporary
        if temporary.is_dir():
            _sync(*temporary.rglob("*"))
            if path.exists():
                aside = temporary.with_suffix(".old")
                path.rename(aside)
                temporary.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
                return
        else:
            _sync(temporary)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(*paths: Path) -> None:
    """Sends files to the disk, so that a full disk is an error here and not a truncated file later."""
    for path in paths:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


# --------------------------------------------------------------------------------------------------
# Configuration beside the weights


def records_config(init: Callable) -> Callable:
    """Decorates `__init__` so that its arguments, modules aside, become `self.config`, ready for JSON."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        config = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in bound.arguments.items()
            if name != "self" and not isinstance(value, nn.Module)
        }
        init(self, *args, **kwargs)
        self.config = config

    return wrapper


def opens_published(init: Callable) -> Callable:
    """Decorates `__init__` so that `Class(path, …)` opens published files, and `Class()` the best-known ones, if
    `read_published` can do without a path.

    The class's `read_published` takes those paths and returns the constructor's arguments, the weights, and what an
    error calls them. A model made that way is in evaluation mode.
    """

    @functools.wraps(init)
    def wrapper(self, *paths, **arguments):
        wanted = inspect.signature(self.read_published).parameters
        best_known = not arguments and all(path.default is not path.empty for path in wanted.values())
        if not paths and not best_known and wanted.keys().isdisjoint(arguments):
            return init(self, **arguments)
        settings, state, source = self.read_published(*paths, **arguments)
        with parameters_on_meta():
            init(self, **settings)
        load_state(self, state, source)
        self.eval()

    return wrapper


class PretrainedModel(nn.Module):
    """A module that can be saved to and rebuilt from a native folder."""

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def own_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of this model's own file. A model that holds another, saved beside it, leaves that one's out."""
        return self.state_dict()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, floating-point weights as `dtype` if given."""
        folder = Path(folder)
        state = {
            name: tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else None).contiguous()
            for name, tensor in self.own_state_dict().items()
        }
        # Tied weights share storage, which safetensors does not store twice on its own.
        seen: set[int] = set()
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        # Weights first: a folder with a config is a whole one.
        write_bytes(folder / WEIGHTS_NAME, save(state))
        write_text(folder / CONFIG_NAME, json.dumps({"class": type(self).__name__, **self.config}, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, **overrides
    ) -> PretrainedModel:
        """Opens a native folder, or a Hugging Face hub name, in evaluation mode on the CPU.

        `overrides` replace or complete the recorded constructor arguments (a DALLE's `vae`, say).
        Raises `CheckpointError` with one line that names the folder and what is wrong with it.
        """
        folder = resolve_folder(folder)
        config = read_config(folder)
        name = config.pop("class", None)
        model_class = _find_class(name)
        if model_class is None or not issubclass(model_class, cls):
            raise CheckpointError(f"{folder} holds a {name}, and a {cls.__name__} is wanted")
        arguments = {**config, **model_class.companions(folder, overrides), **overrides}
        known = inspect.signature(model_class.__init__).parameters
        if unknown := sorted(set(arguments) - set(known)):
            raise CheckpointError(
                f"{folder / CONFIG_NAME} has settings that {name} does not know: {', '.join(unknown)}"
            )
        try:
            with parameters_on_meta():
                model = model_class(**arguments)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_NAME} does not describe a {name}: {error}") from error
        load_state(model, read_tensors(folder / WEIGHTS_NAME), source=folder / WEIGHTS_NAME, dtype=dtype)
        return model.eval()

    @classmethod
    def companions(cls, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments that live in folders of their own, such as a DALLE's VAE; none for most models."""
        return {}


def _find_class(name: str | None) -> type[PretrainedModel] | None:
    """The model class of that name: one already defined, or one that the package exports and has not imported yet."""
    package = importlib.import_module(__package__)
    if name not in _CLASSES and name in package.__all__:
        getattr(package, name)
    return _CLASSES.get(name)


def companion_path(folder: Path, name: str) -> Path | None:
    """Where a model's companion is: inside its folder, or beside it, as in a bundle of models that share one."""
    return next((path for path in (folder / name, folder.parent / name) if path.exists()), None)


# --------------------------------------------------------------------------------------------------
# Reading


def resolve_folder(name: str | os.PathLike, patterns: Sequence[str] = NATIVE_FILES) -> Path:
    """A local folder as it is; of anything else of the form `owner/name` the files like `patterns` from the hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or folder.parent.is_dir():
        raise CheckpointError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns)))
    except Exception as error:  # the hub raises a dozen kinds, all of them meaning: not to be had
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{text} is neither a local folder nor to be had from the hub ({reason})") from error


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """The settings in a model folder's `config.json`, or in another JSON file there."""
    path = folder / name
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a table of settings")
    return config


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, memory-mapped on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"the weights file {path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the weights file {path} is damaged or no safetensors file: {error}") from None


def load_state(
    model: nn.Module, state: dict[str, torch.Tensor], source: object, dtype: torch.dtype = torch.float32
) -> None:
    """Puts `state` into `model`, every key and shape checked; tensors are taken over and not copied where they can."""
    own = model.own_state_dict() if isinstance(model, PretrainedModel) else model.state_dict()
    problems = [f"lacks {key}" for key in own.keys() - state.keys()]
    problems += [f"has the unknown {key}" for key in state.keys() - own.keys()]
    problems += [
        f"has {key} of shape {tuple(state[key].shape)} where {tuple(own[key].shape)} is wanted"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: it {', '.join(sorted(problems)[:3])}{more}"
        )
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, strict=False, assign=True)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within it, parameters get a shape and no memory: they are about to be replaced. Buffers are made as usual."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and module.__dict__.get("_parameters") is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    with _META_LOCK:
        nn.Module.register_parameter = register
        try:
            yield
        finally:
            nn.Module.register_parameter = original
