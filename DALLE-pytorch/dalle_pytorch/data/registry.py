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
    """Items have `image` (3, resolution, resolution) uint8, `caption`, and what else a task may use."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """The captions alone, in the order of the items."""


def open_registered(name: str, resolution: int) -> RegisteredDataset | None:
    """The data set registered as `name`, None if there is none. Raises `UsageError` for options it does not have."""
    name, _, query = name.partition("?")
    for entry in entry_points(group=GROUP, name=name):
        opener, options = entry.load(), {key: yaml.safe_load(value) for key, value in parse_qsl(query)}
        parameters = inspect.signature(opener, eval_str=True).parameters
        for key, value in options.items():
            if key not in parameters or not isinstance(value, parameters[key].annotation):
                known = ", ".join(f"{name}: {parameter.annotation}" for name, parameter in parameters.items())
                raise UsageError(f"data set {name}: no option {key}={value}; there are {known}")
        return opener(resolution, **options)
    return None
