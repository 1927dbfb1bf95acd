"""The boundary around files from elsewhere: what fails while one is opened is a refusal of that file, in one line.

A file of another program, or a hostile one, makes readers fail in any way there is: with the errors of zipfile, yaml,
safetensors, transformers and torch, by recursion or memory, or with a panic of Rust. Nobody can list them, and no
caller wants to tell them apart. So every door through which such files come in is an `opening`. The error below is the
cause of the refusal, which a command line shows with `--debug`. What fails elsewhere is a bug.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from dalle_pytorch.errors import CheckpointError, FileError, UserError, as_message

P = ParamSpec("P")
Opened = TypeVar("Opened")


@contextmanager
def opening(
    source: object, problem: str = "cannot be opened", refusal: type[UserError] = CheckpointError
) -> Iterator[None]:
    """Raises `refusal` for whatever fails inside: `source`, `problem` ("is not a VQGAN"), and the reason.

    A `CheckpointError` or `FileError` passes: of openings within each other the innermost knows best what is wrong.
    """
    try:
        yield
    except (CheckpointError, FileError):
        raise
    except FileNotFoundError as error:
        raise refusal(f"{error.filename or source} is missing") from error
    except BaseException as error:
        # A panic of Rust, in `tokenizers` or `safetensors`, is not an Exception, and has no class to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.strerror:
            raise refusal(f"{source} cannot be read ({error.strerror})") from error
        raise refusal(f"{source} {problem}: {reason(error)}") from error


def opens(function: Callable[P, Opened]) -> Callable[P, Opened]:
    """Decorates a function that opens files from elsewhere, the first of which it is named by: an `opening`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Opened:
        names = (name for name in (*args, *kwargs.values()) if isinstance(name, str | os.PathLike))
        with opening(next(names, "a published file")):
            return function(*args, **kwargs)

    return wrapper


def reason(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    first = (str(error).strip().splitlines() or [""])[0]
    return as_message(f"missing {first}" if isinstance(error, KeyError) else first or type(error).__name__, 200)
