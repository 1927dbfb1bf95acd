"""Redraws tokens or images with the diffusion decoder: `python upscale.py --help`."""

from dalle_pytorch.cli import run
from text_to_image.commands.upscale import main

if __name__ == "__main__":
    run(main)
