"""DALLE-pytorch's parameter names, mapped to ours."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

State = dict[str, Tensor]
Names = Sequence[tuple[str, str]]  # regular expressions and replacements, applied in this order

# The transformer of the prior and of CLIP.
TRANSFORMER_NAMES: Names = (
    # One `fn` per wrapper (layer scale, norm, cache, token shift): how many depends on release and options.
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


def rename(state: Mapping[str, Tensor], names: Names) -> State:
    """The same tensors under other names."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def count_parts(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers, the first group of a regular expression, there are at the beginning of the names."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def is_upstream(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of DALLE-pytorch."""
    return any("transformer.layers.layers." in key or "transformer.layers.blocks." in key for key in state)
