"""Native checkpoints: a folder of `config.json` and `model.safetensors`."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.atomic import write_bytes, write_text

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
NATIVE_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
_CLASSES: dict[str, type[PretrainedModel]] = {}


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
    """Decorates `__init__` so that `Class(path, …)` opens published files as upstream's classes do, and `Class()` the
    best-known ones if the reader can do without a path.

    `published_reader` takes the paths and returns the constructor's arguments, the weights, and the name of the source
    for errors. The package that knows the published formats sets it. Such a model is in evaluation mode.
    """

    @functools.wraps(init)
    def wrapper(self, *paths, **arguments):
        reader = type(self).published_reader
        wanted = {} if reader is None else inspect.signature(reader).parameters
        best_known = reader and not arguments and all(path.default is not path.empty for path in wanted.values())
        if reader is None or (not paths and not best_known and wanted.keys().isdisjoint(arguments)):
            return init(self, *paths, **arguments)
        settings, state, source = reader(*paths, **arguments)
        with init_empty_weights(include_buffers=False):
            init(self, **settings)
        load_state(self, state, source)
        self.eval()

    return wrapper


class PretrainedModel(nn.Module):
    """A module that can be saved to and rebuilt from a native folder."""

    config: dict[str, Any]
    published_reader: ClassVar[Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor], object]] | None] = None

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
            with init_empty_weights(include_buffers=False):
                model = model_class(**arguments)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_NAME} does not describe a {name}: {error}") from error
        load_state(model, read_tensors(folder / WEIGHTS_NAME), source=folder / WEIGHTS_NAME, dtype=dtype)
        model.opened(folder)
        return model.eval()

    def opened(self, folder: Path) -> None:
        """Called at the end of `from_pretrained`: takes what belongs to the model and is not in its own two files."""

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
