"""Native checkpoints: a folder of `config.json` and `model.safetensors`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.atomic import write_bytes, write_text
from dalle_pytorch.files.text import read_text
from dalle_pytorch.registry import MODEL_MODULES

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
NATIVE_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
_CLASSES: dict[str, type[PretrainedModel]] = {}

P = ParamSpec("P")
Model = TypeVar("Model", bound=nn.Module)
Pretrained = TypeVar("Pretrained", bound="PretrainedModel")


def records_config(init: Callable[Concatenate[Pretrained, P], None]) -> Callable[Concatenate[Pretrained, P], None]:
    """Decorates `__init__` so that its arguments, modules aside, become `self.config`, ready for JSON."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Pretrained, *args: P.args, **kwargs: P.kwargs) -> None:
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


class PretrainedModel(nn.Module):
    """A module that can be saved to and rebuilt from a native folder."""

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def own_state_dict(self) -> dict[str, Tensor]:
        """The tensors of this model's own file, without those of a model saved in a folder of its own."""
        return self.state_dict()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, floating-point weights as `dtype` if given."""
        folder = Path(folder)
        state = {
            name: tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else None).contiguous()
            for name, tensor in self.own_state_dict().items()
        }
        # Tied weights share storage, which safetensors refuses.
        seen: set[int] = set()
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        # Weights first: a folder with a config is complete. New weights are never under another model's config.
        path, config = folder / CONFIG_NAME, json.dumps({"class": type(self).__name__, **self.config}, indent=2) + "\n"
        if path.exists() and path.read_text("utf-8", errors="replace") != config:
            path.unlink()
        write_bytes(folder / WEIGHTS_NAME, save(state))
        write_text(path, config)

    def fingerprint(self) -> str:
        """A hash of the class, the configuration and the weights."""
        digest = hashlib.sha256(json.dumps([type(self).__name__, self.config], default=str).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, **overrides: Any) -> Self:
        """Opens a native folder, or a Hugging Face hub name, in evaluation mode on the CPU.

        `overrides` that are not None replace or complete the recorded constructor arguments, such as a DALLE's `vae`.
        Raises `CheckpointError`, one line that names the folder.
        """
        folder = resolve_folder(folder)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        config = read_config(folder)
        name = config.pop("class", None)
        model_class = _find_class(name)
        if model_class is None or not issubclass(model_class, cls):
            raise CheckpointError(f"{folder}: expected a {cls.__name__}, got {name}")
        arguments = {**config, **model_class.companions(folder, overrides), **overrides}
        model = construct(folder / CONFIG_NAME, model_class, arguments)
        load_state(model, read_tensors(folder / WEIGHTS_NAME), source=folder / WEIGHTS_NAME, dtype=dtype)
        model.opened(folder)
        return model.eval()

    def opened(self, folder: Path) -> None:
        """Called at the end of `from_pretrained`, to read further files of the model."""

    @classmethod
    def companions(cls, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments that are models in folders of their own, such as a DALLE's VAE."""
        return {}


def _find_class(name: object) -> type[PretrainedModel] | None:
    """The model class of that name, imported if need be."""
    if not isinstance(name, str):
        return None
    if name not in _CLASSES and name in MODEL_MODULES:
        importlib.import_module(MODEL_MODULES[name])
    return _CLASSES.get(name)


def companion_path(folder: Path, name: str) -> Path | None:
    """A file or folder `name` inside a model's folder or beside it, as in a bundle of models that share one."""
    return next((path for path in (folder / name, folder.parent / name) if path.exists()), None)


def resolve_folder(name: str | os.PathLike, patterns: Sequence[str] = NATIVE_FILES) -> Path:
    """`name` if it is a local folder; for a hub name, `owner/name`, a folder of its files that match `patterns`."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or folder.parent.is_dir():
        raise CheckpointError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns)))
    except Exception as error:  # the hub raises a dozen kinds
        raise CheckpointError(
            f"{text} is not a local folder and cannot be downloaded from the hub ({first_line(error)})"
        ) from error


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """The settings in a model folder's `config.json`, or in another JSON file there."""
    path = folder / name
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"the weights file {path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the weights file {path} is damaged or not a safetensors file: {error}") from None


def first_line(error: BaseException) -> str:
    """The message of an exception in one line of at most 200 characters, or the name of its class."""
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__


def construct(source: object, model_class: type[Model], arguments: Mapping[str, Any]) -> Model:
    """The model with these settings of a file, its parameters on the meta device.

    Raises `CheckpointError`, which names `source`, for settings that the constructor does not accept.
    """
    known = inspect.signature(model_class.__init__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if not takes_all and (unknown := sorted(map(str, arguments.keys() - known.keys()))):
        raise CheckpointError(f"{source} has settings unknown to {model_class.__name__}: {', '.join(unknown)}")
    try:
        with init_empty_weights(include_buffers=False):
            return model_class(**arguments)
    except Exception as error:  # values of any type and size can be in a file
        raise CheckpointError(f"{source} does not describe a {model_class.__name__}: {first_line(error)}") from error


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], source: object, dtype: torch.dtype = torch.float32
) -> None:
    """Loads `state` into `model` after checking every key and shape. Tensors of the right dtype are not copied.

    Raises `CheckpointError`, which names `source` and the first keys that do not match.
    """
    own = model.own_state_dict() if isinstance(model, PretrainedModel) else model.state_dict()
    problems = [f"lacks {key}" for key in own.keys() - state.keys()]
    problems += [f"has unknown {key}" for key in state.keys() - own.keys()]
    problems += [
        f"has {key} of shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
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
