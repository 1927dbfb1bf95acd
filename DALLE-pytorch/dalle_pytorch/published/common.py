"""What all published formats share: renaming, making a model of settings and weights, saying what does not fit."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import init_empty_weights
from torch import nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.nn.upstream import State
from dalle_pytorch.pretrained import load_state
from dalle_pytorch.published.unpickler import ForeignObject, module_state, tensor_dict

Model = TypeVar("Model", bound=nn.Module)

# What checkpoints hold besides settings and weights, often twice as large as these.
TRAINING_STATE = (
    "opt_state",
    "scheduler_state",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "optimizer",
)


def build(
    source: object, model_class: type[Model], arguments: Mapping[str, Any], state: State, computed: str | None = None
) -> Model:
    """The model of these settings and weights, in evaluation mode.

    Tensors whose names end in `computed` are its own where the weights have none.
    """
    known = inspect.signature(model_class.__init__).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise CheckpointError(f"{source} has settings that {model_class.__name__} does not know: {', '.join(unknown)}")
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source} does not describe a {model_class.__name__}: {error}") from error
    own = model.state_dict() if computed else {}
    load_state(model, {key: tensor for key, tensor in own.items() if key.endswith(computed)} | state, source)
    return model.eval()


def agree(source: object, said: Mapping[str, Any], told: Mapping[str, Any], said_by: object = "its hparams") -> None:
    """Refuses settings that contradict what the weights tell."""
    for name, value in told.items():
        if name in said and said[name] != value:
            raise CheckpointError(
                f"{source} does not go together: {name} is {said[name]} by {said_by}, and {value} by the weights"
            )


def is_file(path: str | os.PathLike) -> bool:
    """Whether this means a single file, present or not, and no folder or hub name."""
    return Path(path).is_file() or Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def as_checkpoint(path: str | os.PathLike, content: Any) -> dict[str, Any]:
    """`content` as a checkpoint of DALLE-pytorch, which has the dictionaries `hparams` and `weights`."""
    wanted = ("hparams", "weights")
    if not isinstance(content, dict) or any(not isinstance(content.get(name), dict) for name in wanted):
        raise CheckpointError(f"{path} is no checkpoint of DALLE-pytorch: it lacks {' or '.join(wanted)}")
    return {**content, "weights": tensor_dict(content["weights"], path) if content["weights"] else {}}


def as_state(path: object, content: Any) -> State:
    """The weights of a pickled module, a TorchScript archive or a state dict."""
    return tensor_dict(module_state(content) if isinstance(content, ForeignObject) else content, path)
