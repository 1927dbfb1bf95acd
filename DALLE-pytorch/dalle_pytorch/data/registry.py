"""Data sets that packages register under a name, as entry points of the group `dalle_pytorch.datasets`.

An entry point names a function `open(resolution, **options)`. `NAME?option=value&option=value` gives it options, which
are numbers, true or false, or else texts.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import entry_points
from urllib.parse import parse_qsl

import yaml

from dalle_pytorch.data.loading import SampleDataset
from dalle_pytorch.errors import UsageError

GROUP = "dalle_pytorch.datasets"


class RegisteredDataset(SampleDataset, ABC):
    """Items have `image` (3, resolution, resolution) uint8, `caption`, and what else a task may use.

    `attributes` are the numbers of possible values of the item's `attributes` (k,) int64, empty if it has none. A value
    of -100 is unknown. `caption_attributes`, if an item has it, holds those of them that its caption tells.
    """

    attributes: tuple[int, ...] = ()

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """The captions alone, in the order of the items."""


def open_registered(name: str, resolution: int) -> RegisteredDataset | None:
    """The data set registered as `name`, None if there is none. Raises `UsageError` for options it does not have."""
    name, _, query = name.partition("?")
    for entry in entry_points(group=GROUP, name=name):
        opener, options = entry.load(), {}
        _, *parameters = inspect.signature(opener, eval_str=True).parameters.values()
        kinds = {parameter.name: parameter.annotation for parameter in parameters}
        for key, text in parse_qsl(query):
            options[key] = text if kinds.get(key) is str else _parse(text)
            if not isinstance(options[key], kinds.get(key, ())):
                known = ", ".join(f"{option}: {inspect.formatannotation(kind)}" for option, kind in kinds.items())
                raise UsageError(f"data set {name}: no option {key}={text}; there are {known}")
        return opener(resolution, **options)
    return None


def _parse(text: str) -> object:
    """A number, true or false; any other text as it is."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
