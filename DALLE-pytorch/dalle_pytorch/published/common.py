"""What all published formats share: building a model, and errors for files that do not fit."""

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.nn.upstream import State
from dalle_pytorch.pretrained import Model, construct, load_state
from dalle_pytorch.published.unpickler import ForeignObject, module_state, tensor_dict

# What checkpoints hold besides settings and weights, often twice their size.
TRAINING_STATE = ("opt_state", "scheduler_state", "optimizer_states", "lr_schedulers", "callbacks", "loops",
                  "optimizer")  # fmt: skip


def build(source: object, model_class: type[Model], settings: Mapping[str, Any], state: State) -> Model:
    """The model of these settings and weights of a file, in evaluation mode."""
    model = construct(source, model_class, settings, state)
    load_state(model, state, source)
    return model.eval()


def check_agreement(
    source: object, settings: Mapping[str, Any], inferred: Mapping[str, Any], settings_from: object = "its hparams"
) -> None:
    """Refuses settings that contradict those inferred from the weights."""
    for name, value in inferred.items():
        if name in settings and settings[name] != value:
            told = settings[name] if isinstance(settings[name], str) else reprlib.repr(settings[name])
            raise CheckpointError(
                f"{source}: {name} is {told} according to {settings_from}, but {value} in the weights"
            )


def is_file(path: str | os.PathLike) -> bool:
    """Whether this means a single file, present or not, and no folder or hub name."""
    return Path(path).is_file() or Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def as_checkpoint(path: str | os.PathLike, content: Any) -> dict[str, Any]:
    """`content` as a checkpoint of DALLE-pytorch, which has the dictionaries `hparams` and `weights`."""
    names = ("hparams", "weights")
    if not isinstance(content, dict) or any(not isinstance(content.get(name), dict) for name in names):
        raise CheckpointError(f"{path} is not a checkpoint of DALLE-pytorch: missing {' or '.join(names)}")
    return {**content, "weights": tensor_dict(content["weights"], path) if content["weights"] else {}}


def as_state(path: object, content: Any) -> State:
    """The weights of a pickled module, a TorchScript archive or a state dict."""
    return tensor_dict(module_state(content) if isinstance(content, ForeignObject) else content, path)
