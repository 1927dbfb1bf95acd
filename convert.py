"""Opens published models and writes native folders: `python convert.py --help`."""

from dalle_pytorch.cli import run
from text_to_image.commands.convert import main

if __name__ == "__main__":
    run(main)
