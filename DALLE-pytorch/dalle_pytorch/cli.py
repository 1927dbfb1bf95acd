"""The command line: one-line errors with exit code 2."""

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, but ends the process during an import, where libraries turn that into other errors,
    or drop it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _interrupt)  # before what takes time to import

from dalle_pytorch.errors import UsageError, UserError, as_message  # noqa: E402
from dalle_pytorch.settings import DEBUG, USER_ERROR  # noqa: E402


def run(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> None:
    """Calls `main(argv)`. A mistake of the user's, or of the machine's, is told in one line and exits with code 2.

    Those are `UserError`, what the operating system refuses, and memory that is not enough. Anything else is a bug and
    keeps its traceback, `ValueError` too. With `--debug` the traceback of a mistake is shown as well, with its cause.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 cannot show all prompts and file names.
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else argv
    debug = DEBUG in arguments
    try:
        if broken := [argument for argument in arguments if not _is_text(argument)]:
            raise UsageError(f"an argument is not text in UTF-8: {broken[0]}")
        main(argv)
        if argv is None:
            _leave_group()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        _fail(describe(error), debug)
    except UserError as error:
        _fail(str(error), debug)
    except (MemoryError, RuntimeError) as error:
        # torch has its own class for a device's memory, which cannot be named without importing torch.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _fail("out of memory; a smaller --batch_size needs less", debug)
    finally:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends


def _leave_group() -> None:
    """Ends a process of a group of gloo's, whose threads may outlive the group and then abort the interpreter at its
    end; torchrun takes that for a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() != "gloo":
        return
    distributed.barrier()  # the others have written what they write
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_text(argument: str) -> bool:
    """Whether it can be written again: bytes that are not UTF-8 come in as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _fail(message: str, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {as_message(message, UserError.longest)}", file=sys.stderr)
    sys.exit(USER_ERROR)


def describe(error: OSError) -> str:
    """One line that says what the operating system refused, and what helps."""
    place = "a file" if error.filename is None else str(error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # The system does not say which file; what was half written has been removed.
        return "the disk is full, and not everything was written; free some space or write elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} may not be written or read ({error.strerror}); choose another place or fix its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        blocking = next((path for path in (Path(place), *Path(place).parents) if path.is_file()), place)
        return f"{blocking} cannot be a folder: a file of that name is in the way"
    return f"{place}: {error.strerror or error}"
