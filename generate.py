"""Draws candidate images of a prompt: `python generate.py --help`."""

from dalle_pytorch.cli import run
from text_to_image.commands.generate import main

if __name__ == "__main__":
    run(main)
