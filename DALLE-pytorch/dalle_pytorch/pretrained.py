"""Native checkpoints: a folder of `config.json` and `model.safetensors`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from dalle_pytorch.checks import check_types, check_values
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.atomic import write_bytes, write_text
from dalle_pytorch.files.boundary import opening, reason
from dalle_pytorch.files.documents import read_json
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
        with opening(folder):
            overrides = {name: value for name, value in overrides.items() if value is not None}
            config = read_config(folder)
            name = config.pop("class", None)
            model_class = _find_class(name)
            if model_class is None or not issubclass(model_class, cls):
                raise CheckpointError(f"{folder}: expected a {cls.__name__}, got {name}")
            arguments = {**config, **model_class.companions(folder, overrides), **overrides}
            state = read_tensors(folder / WEIGHTS_NAME)
            model = construct(folder / CONFIG_NAME, model_class, arguments, state)
            load_state(model, state, source=folder / WEIGHTS_NAME, dtype=dtype)
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
    if not is_hub_name(name):
        raise CheckpointError(f"there is no folder {name}")
    return download(str(name), patterns, f"{name} is not a local folder")


def is_hub_name(name: str | os.PathLike) -> bool:
    """Whether this has the form of a name of the hub, `owner/name`, and cannot be meant for a path."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).parent.is_dir()


def download(name: str, patterns: Sequence[str], otherwise: str) -> Path:
    """The folder of a hub name's files that match `patterns`. Raises `CheckpointError`, which begins `otherwise`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub raises a dozen kinds
        raise CheckpointError(f"{otherwise} and cannot be downloaded from the hub ({reason(error)})") from error


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """The settings in a model folder's `config.json`, or in another JSON file there."""
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder} is not a model folder: it has no {name}")
    with opening(path, "cannot be read as JSON"):
        config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped on the CPU."""
    with opening(f"the weights file {path}", "is damaged or not a safetensors file"):
        return load_file(path)


def construct(
    source: object, model_class: type[Model], arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Model:
    """The model with these settings of a file, its parameters on the meta device; `state` has its weights.

    Tensors that a constructor computes must name their device, or they are on the meta device too. Raises
    `CheckpointError`, which names `source`, for settings that the constructor does not accept, and for settings of far
    more parameters than there are in `state`, as soon as that is known.
    """
    known = inspect.signature(model_class.__init__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if not takes_all and (unknown := sorted(map(str, arguments.keys() - known.keys()))):
        raise CheckpointError(f"{source} has settings unknown to {model_class.__name__}: {', '.join(unknown)}")
    with opening(source, f"does not describe a {model_class.__name__}"), sized_by(state):
        check_values({name: value for name, value in arguments.items() if not isinstance(value, nn.Module)})
        check_types(model_class, arguments)
        return model_class(**arguments)


@contextmanager
def sized_by(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Constructs on the meta device, and raises `ValueError` at a parameter far beyond the number of those in `state`.

    A little more than `state` has may still be constructed, so that `load_state` can say what is missing.
    """
    left = [2 * len(state) + 1000, 2 * sum(tensor.numel() for tensor in state.values()) + 2**20]
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            left[:] = left[0] - 1, left[1] - parameter.numel()
            if min(left) < 0:
                raise ValueError("it describes a far larger network than the weights are of")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), _NotDrawn():
            yield
    finally:
        hook.remove()


class _NotDrawn(TorchFunctionMode):
    """Draws no numbers on the meta device, for which PyTorch would import its compiler and sympy: seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        if func in (torch.randn, torch.rand) and kwargs.get("device") is None:
            func = torch.empty
        return func(*args, **kwargs)


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], source: object, dtype: torch.dtype = torch.float32
) -> None:
    """Loads `state` into `model` after checking every key and shape. Tensors of the right dtype are not copied.

    Raises `CheckpointError`, which names `source` and the first keys that do not match.
    """
    own = model.own_state_dict() if isinstance(model, PretrainedModel) else model.state_dict()
    problems = [f"lacks {key}" for key in own.keys() - state.keys()]
    problems += [f"has unknown {key}" for key in state.keys() - own.keys()]
    problems += [problem for key in own.keys() & state.keys() if (problem := _misfit(key, own[key], state[key]))]
    if not problems:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        problems = [f"has numbers in {key} that are not finite" for key in state if not _is_finite(state[key])]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: it {', '.join(sorted(problems)[:3])}{more}"
        )
    model.load_state_dict(state, strict=False, assign=True)


def _misfit(key: str, own: Tensor, value: Tensor) -> str | None:
    """Why a tensor cannot take the place of the model's own, if it cannot."""
    if value.shape != own.shape:
        return f"has {key} of shape {tuple(value.shape)}, expected {tuple(own.shape)}"
    if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
        return f"has {key} of type {value.dtype}, expected {own.dtype}"
    return None if own.numel() else f"has no numbers in {key}"


def _is_finite(value: Tensor) -> bool:
    # The sum is several times faster, and finite unless a number is not or it overflows.
    return not value.is_floating_point() or bool(value.sum().isfinite() or value.isfinite().all())
