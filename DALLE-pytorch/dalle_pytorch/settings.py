"""Settings as dataclasses: the one source of a command line, of its YAML file and of what a run records.

    @dataclass
    class DrawSettings(Settings):
        '''Draws images.'''
        num_images: int = option(16, "images to draw", low=1)

    settings = DrawSettings.parse(["--num_images", "4"])

Parsing runs on jsonargparse. torch is not imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from jsonargparse import ArgumentParser as JsonArgumentParser

from dalle_pytorch.errors import UsageError, UserError, as_message
from dalle_pytorch.files.boundary import opening

USER_ERROR = 2
DEBUG = "--debug"
# No option needs a larger number, and larger ones overflow in float32 or in memory.
LARGEST: dict[type, float] = {int: 2**31 - 1, float: 1e12}
SMALLEST = 1e-12  # unless 0: what divides by a smaller one overflows


def option(
    default: Any = MISSING, help: str = "", *, flags: Iterable[str] = (), low: float = float("-inf"),
    high: float = float("inf"), above: bool = False, kind: Callable[[Any], Any] | None = None, positional: bool = False,
    instead_of: str | None = None, part: str | None = None, **argparse_options: Any,
) -> Any:  # fmt: skip
    """A field of a `Settings` dataclass.

    Args:
        default: MISSING makes the option required.
        help: a phrase for `--help`, to which the default is added.
        flags: other spellings: `--lr`, or `--bf16=bf16`, a flag without a value that stands for that value.
        low, high, above: the range of a number; `above` excludes `low` itself. A number without them has one too, see
            `number`.
        kind: turns text, or a YAML value, into the setting; by the annotation unless given.
        positional: given without a flag.
        instead_of: the option that becomes None where this one is given, and the other way round.
        part: what the option names, where several name it together, such as "VAE".
        argparse_options: nargs, const, metavar and choices, argparse's.
    """
    metadata = {"help": help, "flags": tuple(flags), "bounds": (low, high, above), "kind": kind,
                "positional": positional, "instead_of": instead_of, "part": part, "required": default is MISSING,
                "argparse": argparse_options}  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is MISSING else default, metadata=metadata)


def again(settings: type[Settings], name: str, default: Any) -> Any:
    """The option `name` of another dataclass with another default."""
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    return dataclasses.field(default=default, metadata={**field.metadata, "required": False})


def number(kind: type, low: float, high: float, above: bool) -> Callable[[Any], Any]:
    """An `int` or finite `float` from `low` (or only `above` it) to `high`.

    Without bounds it is at most `LARGEST` in size; a `float` is 0 or at least `SMALLEST`.
    """
    least, most = max(low, -LARGEST[kind]), LARGEST[kind] if high == float("inf") else high

    def parse(text: Any) -> Any:
        try:
            value = kind(str(text))
        except ValueError:
            value = float("nan")
        # NaN compares false, and so fails too.
        in_range = (least < value if above else least <= value) and value <= most
        if not in_range or 0 < abs(value) < SMALLEST:
            noun = "a whole number" if kind is int else "a number"
            lowest = "" if low == float("-inf") else f", above {low:g}" if above else f", {low:g} or more"
            highest = f", at most {most:.10g}" if most == high or value > most else ""
            size = f", 0 or at least {SMALLEST:g} in size" if in_range else ""
            raise argparse.ArgumentTypeError(f"expected {noun}{lowest}{highest}{size}, got {str(text)[:80]!r}")
        return value

    return parse


def boolean(text: Any) -> bool:
    """True or False, as guided-diffusion's flags are given (`--learn_sigma True`)."""
    if str(text).lower() in ("true", "yes", "t", "y", "1"):
        return True
    if str(text).lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {str(text)!r}")


def listed(kind: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """Values between commas, or a list of them; none is an empty list."""

    def parse(text: Any) -> list[Any]:
        parts = text if isinstance(text, (list, tuple)) else str(text).split(",")
        return [kind(part.strip() if isinstance(part, str) else part) for part in parts if str(part).strip()]

    return parse


def name_value(text: Any) -> tuple[str, str]:
    """NAME=VALUE."""
    if isinstance(text, tuple):  # parsed before
        return text
    name, equals, value = str(text).partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {str(text)!r}")
    return name, value


def _text(value: Any) -> str:
    if isinstance(value, (bool, dict, list)):
        raise argparse.ArgumentTypeError(f"expected a value, got {value!r}")
    return str(value)


def _filled(value: Any) -> str:
    """A text that is not empty, as that of a shell's variable without a value."""
    if not (text := _text(value)).strip():
        raise argparse.ArgumentTypeError("it is empty; leave the option out for its default")
    return text


def _path(value: Any) -> Path:
    return Path(_filled(value))


class ArgumentParser(JsonArgumentParser):
    """jsonargparse's, whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r"(?:Parser key|argument) [\"']?(?:--)?([\w-]+)(?:/[\w/-]+)?[\"']?:", r"--\1:", message)
        if message.startswith("the following arguments are required: "):
            message = re.sub(r"(?<= )(\w+)(?=,|$)", self._spelling, message)
        print(f"{self.prog}: {as_message(message, 300)} (--help lists the options)", file=sys.stderr)
        sys.exit(USER_ERROR)

    def _spelling(self, match: re.Match[str]) -> str:
        """An argument as it is typed."""
        return f"--{match[1]}" if f"--{match[1]}" in self._option_string_actions else match[1]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a description as it is written, and defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in (None, False, "", [], argparse.SUPPRESS)
        return action.help if empty or "(default" in (action.help or "") else f"{action.help} (default: %(default)s)"


@dataclass
class Settings:
    """Base of all settings. Subclasses are dataclasses whose fields are `option`s; their docstring is the description.

    `title` heads the options that a class declares. With `takes_config` there is a `--config FILE` of YAML.
    """

    title: ClassVar[str] = "options"
    takes_config: ClassVar[bool] = False
    from_file = frozenset[str]()  # the options that `--config` set

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> Self:
        """The settings of a command line. A mistake is printed in one line, and exits with code 2."""
        parser, fields = cls.parser(prog), dataclasses.fields(cls)
        argv = _spell_out(fields, sys.argv[1:] if argv is None else argv)
        given = [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]
        in_file: dict[str, Any] = {}
        if cls.takes_config:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.error = parser.error
            finder.add_argument("--config")
            if path := finder.parse_known_args(argv)[0].config:
                in_file = _read_yaml(path, fields, parser)
                parser.set_defaults(in_file)
        from_file = in_file.keys() - set(given)
        given = [*in_file, *given]
        namespace = parser.parse_args(argv)
        values = {field.name: namespace[field.name] for field in fields}
        for field in fields:
            if field.metadata["argparse"].get("nargs") in ("+", "*"):  # between blanks, between commas, or both
                parts = values[field.name] or []
                values[field.name] = [x for part in parts for x in (part if isinstance(part, list) else [part])]
            if other := field.metadata["instead_of"]:
                found = [name for name in given if name in (field.name, other)]
                if found:  # the one given last counts
                    values[other if found[-1] == field.name else field.name] = None
        settings = cls(**values)
        settings.from_file = frozenset(from_file)
        return settings

    @classmethod
    def parser(cls, prog: str | None = None) -> ArgumentParser:
        """The parser of these settings."""
        description = inspect.cleandoc(cls.__doc__ or "")
        parser = ArgumentParser(prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        if cls.takes_config:
            parser.add_argument("--config", metavar="FILE", help="YAML file of options, one a line (batch_size: 8)")
        parser.add_argument(DEBUG, action="store_true", help="show where a mistake was found, and its cause")
        hints, groups = typing.get_type_hints(cls), {}
        for field in dataclasses.fields(cls):
            # The class that declares an option first heads it.
            owner = next(base for base in reversed(cls.__mro__) if field.name in inspect.get_annotations(base))
            title = vars(owner).get("title", cls.title)
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            _add(groups[title], field, hints[field.name])
        return parser

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["argparse"].get("choices")
            if value is not None and choices and value not in choices:
                raise UsageError(f"--{field.name}: {_no_choice(choices, value)}")

    def problems(self) -> dict[str, str]:
        """What is wrong with the values, by option: what a command line would refuse of them, in the same words."""
        hints, found = typing.get_type_hints(type(self)), {}
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if value is None and isinstance(hint, types.UnionType):
                continue
            try:
                _kind(hint, field.metadata)(value)
            except (argparse.ArgumentTypeError, UserError) as error:
                found[field.name] = str(error)
        return found

    def values(self, part: type[Settings]) -> dict[str, Any]:
        """The settings that a base class declares, such as the arguments of a network."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(part)}

    def named(self, part: str) -> str:
        """The options that name a part, as they are typed."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                 if field.metadata["part"] == part and getattr(self, field.name) not in (None, False)}  # fmt: skip
        return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())

    def as_dict(self) -> dict[str, Any]:
        """The settings as YAML can hold them, which `--config` reads again; hidden ones and None are left out."""
        shown = [field.name for field in dataclasses.fields(self) if field.metadata["help"] != argparse.SUPPRESS]
        return {name: _plain(getattr(self, name)) for name in shown if getattr(self, name) is not None}


def _add(group: Any, field: dataclasses.Field, hint: Any) -> None:
    options = field.metadata
    default = field.default if field.default_factory is MISSING else field.default_factory()
    settings: dict[str, Any] = {"type": _kind(hint, options), "default": default, "help": options["help"]}
    settings |= options["argparse"]
    if default == "" and settings["type"] is _filled:
        settings["type"] = _text
    if settings["type"] is boolean:
        settings |= {"nargs": "?", "const": True, "metavar": "True|False"}
    if options["positional"]:
        if options["required"]:
            settings.pop("default")
        group.add_argument(field.name, **settings)
    else:
        names = [f"--{field.name}", *(flag for flag in options["flags"] if "=" not in flag)]
        group.add_argument(*names, required=options["required"], **settings)


def _kind(hint: Any, options: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What turns text into a value of the annotated type."""
    if options["kind"] is not None:
        return options["kind"]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return listed(_kind(typing.get_args(hint)[0], options))
    if hint is bool:
        return boolean
    if hint in (int, float):
        return number(hint, *options["bounds"])
    return _path if hint is Path else _filled


def _spellings(fields: Iterable[dataclasses.Field]) -> dict[str, str]:
    """What all spellings stand for, without dashes: `lr` for `learning_rate`, `bf16` for `mixed_precision=bf16`."""
    spellings = {field.name: field.name for field in fields}
    for field in fields:
        for flag in field.metadata["flags"]:
            name, equals, value = flag.lstrip("-").partition("=")
            spellings[name] = field.name + equals + value
    return spellings


def _spell_out(fields: Iterable[dataclasses.Field], argv: Sequence[str]) -> list[str]:
    """The arguments with each flag under the name of its field."""
    spellings, spelled = _spellings(fields), []
    for argument in argv:
        name, equals, value = argument.partition("=")
        known = spellings.get(name[2:]) if name.startswith("--") else None
        spelled.append(f"--{known}{equals}{value}" if known else argument)
    return spelled


def _read_yaml(path: str, fields: Iterable[dataclasses.Field], parser: ArgumentParser) -> dict[str, Any]:
    """The options in a YAML file, checked as those of a command line. A mistake names the file and exits."""
    from dalle_pytorch.files.documents import read_yaml

    try:
        with opening(path, "is not YAML"):
            content = read_yaml(path) or {}
        return _options(path, content, fields, parser)
    except UserError as error:
        parser.error(str(error))


def _options(path: str, content: Any, fields: Iterable[dataclasses.Field], parser: ArgumentParser) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings (lines of `option: value`)")
    spellings, values = _spellings(fields), {}
    actions = {action.dest: action for action in parser._actions}
    for key, value in content.items():
        name, short, told = spellings.get(str(key).lstrip("-"), "").partition("=")
        if not name or (short and not isinstance(value, bool)):
            raise UsageError(f"{path}: {key}: there is no such option")
        if short:
            value = told if value else None
        if value is None:
            continue
        with opening(f"{path}:", str(key)):
            values[name] = _convert(actions[name], value)
    return values


def _convert(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the option takes it."""
    if value is True and action.const is not None:
        return action.const
    kind: Any = action.type
    if action.nargs in ("+", "*"):
        return [kind(item) for item in (value if isinstance(value, list) else [value])]
    value = kind(value)
    if action.choices is not None and value not in action.choices:
        raise ValueError(_no_choice(action.choices, value))
    return value


def _no_choice(choices: Iterable[Any], value: Any) -> str:
    return f"expected one of {', '.join(map(str, choices))}, got {value!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)
