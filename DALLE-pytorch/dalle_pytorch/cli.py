"""What every script shares: a mistake of the user's becomes one line on stderr and exit code 2; a device is chosen.

torch is imported only where a device is asked for, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

USER_ERROR = 2
INTERRUPTED = 130


class UsageError(ValueError):
    """Arguments that cannot be meant. The message is one line for the user."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (--help lists the options)\n")


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an `int` or `float` from `low` (or only `above` it) to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        # Not a number compares false, and so fails too.
        if not ((low < value if above else low <= value) and value <= high):
            noun = "a whole number" if kind is int else "a number"
            lowest = f"above {low:g}" if above else f"{low:g} or more"
            highest = "" if high == float("inf") else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"{noun}, {lowest}{highest}, is wanted, not {text!r}")
        return value

    return parse


def setting(text: str) -> tuple[str, str]:
    """An argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, not {text!r}")
    return name, value


def run(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> None:
    """Calls `main(argv)`. A mistake of the user's, or of the machine's, is told in one line and exits with code 2.

    Those are `ValueError` (the packages' `FileError` and `CheckpointError` among them), what the operating system
    refuses, a loss that is no number, and memory that is not enough. Anything else is a bug and shows its traceback.
    """
    try:
        main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        _fail(describe(error))
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has its own class for a device's memory, which cannot be named without importing torch.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _fail("the memory is not enough; a smaller --batch_size needs less")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def describe(error: OSError) -> str:
    """One line that says what the operating system refused, and what helps."""
    place = "a file" if error.filename is None else str(error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # The system does not say which file; what was half written has been removed.
        return "the disk is full, and not everything was written; free some space or write elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} may not be written or read ({error.strerror}); choose another place or mend its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{place} cannot be a folder: a file of that name is in the way"
    return f"{place}: {error.strerror or error}"


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or with none the GPU where there is one. Raises `UsageError` if it is not to be had."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"there is no device {name!r} here ({str(error).splitlines()[0]}); cpu always works") from None
    return device
