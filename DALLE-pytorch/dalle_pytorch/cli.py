"""The command line: parsing, one-line errors with exit code 2."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2
INTERRUPTED = 130


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too. With an option `--config` it reads options from a YAML file."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (--help lists the options)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = list(sys.argv[1:] if args is None else args)
        if "--config" not in self._option_string_actions:
            return super().parse_known_args(args, namespace)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        path = finder.parse_known_args(args)[0].config
        # In front of the command line's own, which therefore count; everything is checked in the one way.
        parsed, rest = super().parse_known_args((self._config_arguments(path) if path else []) + args, namespace)
        if parsed.config != path:
            self.error("--config is not to be shortened")
        return parsed, rest

    def _config_arguments(self, path: str) -> list[str]:
        """The arguments that a YAML file stands for."""
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                settings = yaml.safe_load(file) or {}
        except OSError as error:
            self.error(f"{path} cannot be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            self.error(f"{path} holds no settings (lines of `option: value`)")
        arguments = []
        for key, value in settings.items():
            try:
                arguments += self._setting_arguments(str(key).lstrip("-").replace("-", "_"), value)
            except (argparse.ArgumentError, ValueError) as error:
                self.error(f"{path}: {key}: {getattr(error, 'message', None) or error}")
        return arguments

    def _setting_arguments(self, name: str, value: Any) -> list[str]:
        """One setting as arguments. Raises `ValueError` or `ArgumentError` if there is no such option or value."""
        # The destination counts too: it is what the settings of a finished run are written under.
        action = self._option_string_actions.get(f"--{name}") or next(
            (action for action in self._actions if action.dest == name and action.nargs != 0), None
        )
        if action is None or name in ("config", "help"):
            raise ValueError("there is no such option")
        if value is None:
            return []
        option = f"--{name}" if f"--{name}" in action.option_strings else action.option_strings[0]
        switch = action.nargs == 0 or (action.nargs == "?" and action.type is None)
        if isinstance(value, bool) and (switch or f"--no-{name}" in action.option_strings):
            return [option] if value else [o for o in action.option_strings if o == f"--no-{name}"]
        if action.nargs == 0:
            raise ValueError(f"true or false is wanted, not {value!r}")
        if isinstance(value, dict):
            raise ValueError("a value is wanted, not a table")
        if isinstance(value, bool) and action.type in (None, str):
            raise ValueError(f"a value is wanted, not {str(value).lower()}")
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if action.nargs in (None, "?"):
            values = [",".join(values)]
        for text in values:
            self._check_value(action, self._get_value(action, text))
        # With "=", a value may begin with a dash.
        return [f"{option}={values[0]}"] if action.nargs in (None, "?") else [option, *values]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a description as it is written, and defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default in ("", [])
        return action.help if empty else super()._get_help_string(action)


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


def boolean(text: str) -> bool:
    """An argparse type: yes or no, as guided-diffusion's flags are given (`--learn_sigma True`)."""
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"True or False is wanted, not {text!r}")


def listed(kind: type) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them; none is an empty list."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            noun = {int: "whole numbers", float: "numbers"}.get(kind, "values")
            raise argparse.ArgumentTypeError(f"{noun} with commas between them are wanted, not {text!r}") from None

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
        blocking = next((path for path in (Path(place), *Path(place).parents) if path.is_file()), place)
        return f"{blocking} cannot be a folder: a file of that name is in the way"
    return f"{place}: {error.strerror or error}"
