"""What all published formats share: renaming, making a model of settings and weights, saying what does not fit."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dalle_pytorch.checkpoints import CheckpointError, load_state, parameters_on_meta
from dalle_pytorch.foreign import ForeignObject, module_state, tensor_dict

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]
Names = Sequence[tuple[str, str]]  # regular expressions and replacements, applied in this order

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

# The transformer of DALLE-pytorch, in its prior and in its CLIP.
TRANSFORMER_NAMES = (
    # A wrapper per option (layer scale, norm, cache, token shift): how many depends on release and options.
    (r"transformer\.layers\.layers\.(\d+)\.0\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.layers\.(\d+)\.1\.", r"transformer.layers.\1.ff."),
    (r"transformer\.layers\.blocks\.(\d+)\.f\.net\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.blocks\.(\d+)\.g\.net\.", r"transformer.layers.\1.ff."),
    (r"\.(fn\.)+(norm|norm_out)\.", r".\2."),
    (r"\.(fn\.)+to_qkv\.", r".fn.to_qkv."),
    (r"\.(fn\.)+to_out\.0\.", r".fn.to_out."),
    (r"\.(fn\.)+net\.0\.", r".fn.proj_in."),
    (r"\.(fn\.)+net\.3\.", r".fn.proj_out."),
)


def rename(state: State, names: Names) -> State:
    """The same tensors under other names."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def below(state: State, prefix: str) -> State:
    """What is under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


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
        with parameters_on_meta():
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
