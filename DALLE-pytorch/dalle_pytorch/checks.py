"""Settings that come out of a file, checked before anything is made of them."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_SIZE = 2**20  # of a number: no width, vocabulary or side of a published model is near it
MAX_VALUES = 10_000  # of all settings together, those that are named several times counted each time
MAY_BE_NEGATIVE = ("num_head_channels", "num_heads_upsample")  # -1, none; and token ids


def check_values(settings: Any) -> None:
    """Raises `ValueError` for numbers that no model has, and for more values than any model is described by."""
    waiting, left = [("it", settings)], MAX_VALUES
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple, set, frozenset, str)):
            left -= len(value)
            if left < 0:
                raise ValueError(f"{name} is longer than any setting")
        if isinstance(value, Mapping):
            waiting += [(str(key)[:80], item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(name, item) for item in value]
        elif isinstance(value, (int, float)) and not -MAX_SIZE <= value <= MAX_SIZE:  # NaN too
            raise ValueError(f"{name} is {value:.6g}, expected at most {MAX_SIZE:,} in size")
        elif isinstance(value, int) and value < 0 and name not in MAY_BE_NEGATIVE and not name.endswith("_id"):
            raise ValueError(f"{name} is {value}, expected 0 or more")


def check_types(called: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings of `called`, a class or function, that are not of the type it declares.

    A whole number that is 1 or more by default, or has no default, cannot be less.
    """
    called = called.__init__ if isinstance(called, type) else called
    hints = typing.get_type_hints(called)
    for name, parameter in inspect.signature(called).parameters.items():
        if name not in settings or name not in hints:
            continue
        value, hint = settings[name], hints[name]
        if not _fits(value, hint):
            expected = inspect.formatannotation(hint).replace("collections.abc.", "")
            raise ValueError(f"{name} is a {type(value).__name__}, expected {expected}")
        if hint is int and value < 1 and (parameter.default is parameter.empty or parameter.default >= 1):
            raise ValueError(f"{name} is {value}, expected 1 or more")


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if hint is bool:
        return isinstance(value, int) and value in (0, 1)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, type(None)) else True
