"""JSON and YAML from elsewhere, within bounds. Read inside an `opening`, which refuses what they raise."""

import json
import os
from typing import Any

import yaml

from dalle_pytorch.files.text import read_text

MAX_JSON_BYTES = 64 * 2**20  # the largest vocabularies have half of that
MAX_YAML_BYTES = 128 * 2**10  # PyYAML reads some 100 kB a second
MAX_YAML_VALUES = 10_000


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses aliases of aliases, by which a short file stands for any number of values."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MAX_YAML_VALUES:
            raise ValueError(f"it stands for more than {MAX_YAML_VALUES:,} values")
        return node


def _values(node: Any, known: dict[int, int]) -> int:
    """The values that a node stands for, those of an alias counted wherever it is named."""
    if isinstance(node, tuple):  # a key and its value
        return sum(_values(part, known) for part in node)
    if id(node) not in known:
        known[id(node)] = MAX_YAML_VALUES  # if it is within itself
        known[id(node)] = 1 + sum(_values(part, known) for part in node.value if not isinstance(part, str))
    return known[id(node)]


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file."""
    return yaml.load(read_text(path, MAX_YAML_BYTES), _Loader)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file."""
    return json.loads(read_text(path, MAX_JSON_BYTES))
