"""Bad command lines: every option of every command with values that it does not expect."""

from collections.abc import Iterator
from pathlib import Path

from faults.harness import Case
from faults.models import commands

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e308", "1e-308", "9" * 400, "1.5", "x", "", " ", "[", "{a: 1}", "null",
          "true", "../..", "/dev/null", "/", "a\nb", "\x1b[2J", "\udcff", "-", "--", "é" * 200, "a,b", "a=b",
          "%s%n", "x" * 100_000)  # fmt: skip
KEPT = {"--title", "--takes_config", "--device", "--wandb_name", "--report_to", "--distributed_backend"}


def options(command: str) -> list[str]:
    """The spellings of a command's options that take a value."""
    from importlib import import_module

    from dalle_pytorch.settings import Settings
    from text_to_image.__main__ import COMMANDS

    module = import_module(COMMANDS[command])
    settings = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Settings)
                and value.__module__ in (module.__name__, "diffusion.settings")]  # fmt: skip
    return sorted({f"--{name}" for kind in settings for name in kind.__dataclass_fields__} - KEPT)


def cases(models: Path) -> Iterator[Case]:
    for name, command in commands(models).items():
        for option in options(name):
            for value in VALUES:
                yield Case(f"{name} {option} {value[:40]!r}", [*command, option, value])
        for rest in (["--no_such_option", "1"], ["--config", "missing.yaml"], ["stray"], ["--help=3"], ["--text"],
                     ["@missing"], ["-x"]):  # fmt: skip
            yield Case(f"{name} {' '.join(rest)}", [*command, *rest], must_refuse=rest[0] != "stray")
    for rest in ([""], ["no_such_command"], ["\udcff"], ["--version"], ["-x"], ["a\nb"], ["x" * 100_000]):
        yield Case(f"dalle {rest[0][:40]!r}", rest, must_refuse=True)
