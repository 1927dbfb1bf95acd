"""Captions before and after diffusion, as README shows them: `python benchmarks/strip.py --help`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.cli import run
from dalle_pytorch.files.images import contact_sheet, resize, save_image
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL

# What the four ancestors show, in the words of the drawn world.
CAPTIONS = (
    "an avocado to the left of a chair on wood", "a cat to the left of a rocket on a night sky", "a robot above a cake",
    "a penguin to the left of a snowman on white", "a sunflower on grass", "a star made of water",
    "a cat made of brick", "a red seven on brick",
)  # fmt: skip


@dataclass
class StripSettings(Settings):
    """Writes a strip of images: above, CLIP's best candidate of each caption, enlarged, and below the same diffused."""

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    text: str = option("|".join(CAPTIONS), "captions, separated by |")
    num_images: int = option(16, "candidates a caption", low=1)
    size: int = option(192, "side in pixels of an image on the strip", low=1)
    output: Path = option(Path("outputs/strip.png"), "the image")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")


def main(argv: Sequence[str] | None = None) -> None:
    settings = StripSettings.parse(argv)
    pipe = TextToImage.from_pretrained(settings.model, settings.device)
    before, after = [], []
    for caption in settings.text.split("|"):
        (image,) = pipe(caption, num_images=settings.num_images, keep=1, upscale=True)
        before.append(resize(image.pixels[None], settings.size)[0])
        after.append(resize(image.upscaled_pixels[0][None], settings.size)[0])
    save_image(settings.output, contact_sheet([*before, *after], columns=len(before)))


if __name__ == "__main__":
    run(main)
