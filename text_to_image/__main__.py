"""`dalle <command>`, or `python -m text_to_image <command>`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError

COMMANDS = {
    name: f"text_to_image.commands.{name}"
    for name in ("generate", "upscale", "batch", "optimize", "serve", "convert", "demo")
}
COMMANDS |= {
    f"train_{name}": f"dalle_pytorch.training.commands.train_{name}"
    for name in ("tokenizer", "vae", "vqgan", "dalle", "clip")
}
COMMANDS["train_decoder"] = "diffusion.train"
HELP = f"usage: dalle {{{','.join(COMMANDS)}}} …\n\ndalle COMMAND --help lists the options of a command."


def dispatch(argv: Sequence[str] | None = None) -> None:
    """Calls the `main` of a command with the arguments after its name."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; expected one of {', '.join(COMMANDS)}")
    sys.argv[0] = f"dalle {name}"  # what a usage message says
    import_module(COMMANDS[name]).main(arguments)


def main() -> None:
    run(dispatch)


if __name__ == "__main__":
    main()
