"""The main job on the default model: `python demo.py --help`."""

from dalle_pytorch.cli import run
from text_to_image.commands.demo import main

if __name__ == "__main__":
    run(main)
