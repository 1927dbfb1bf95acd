"""Renders the sprites of things from Noto Emoji's vector art.

    npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz && pip install resvg-py
    python models/default/recipe/render_sprites.py package/icons.json

writes sprites.webp beside the code that draws scenes. The committed one is of version 1.2.9.
"""

import io
import json
import sys
from importlib.resources import files
from pathlib import Path

import resvg_py
from PIL import Image

from dalle_pytorch.files.atomic import atomic_write
from dalle_pytorch.scenes.sprites import COLUMNS, SPRITE
from dalle_pytorch.scenes.things import THINGS

# Icons that are not called what their things are.
ICONS = {
    "cat": "cat-face", "dog": "dog-face", "tiger": "tiger-face", "cow": "cow-face", "pig": "pig-face",
    "monkey": "monkey-face", "rabbit": "rabbit-face", "mouse": "mouse-face", "bee": "honeybee",
    "ladybug": "lady-beetle", "whale": "spouting-whale", "sheep": "ewe", "dinosaur": "sauropod", "apple": "red-apple",
    "corn": "ear-of-corn", "cheese": "cheese-wedge", "cake": "birthday-cake", "ice cream": "soft-ice-cream",
    "coffee": "hot-beverage", "donut": "doughnut", "car": "automobile", "train": "locomotive", "ufo": "flying-saucer",
    "pine tree": "evergreen-tree", "gift": "wrapped-gift", "sneaker": "running-shoe", "gem": "gem-stone",
    "smiley": "grinning-face", "clown": "clown-face", "santa": "santa-claus", "pumpkin": "jack-o-lantern",
}  # fmt: skip


def render(icons: dict, name: str) -> Image.Image:
    """The icon (SPRITE, SPRITE) RGBA, in the middle of a square that it fills."""
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="0 0 {width} {height}" width="512" height="512">{icon["body"]}</svg>')  # fmt: skip
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    picture = picture.crop(picture.getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


def main(path: str) -> None:
    icons = json.loads(Path(path).read_text("utf-8"))
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, -(-len(THINGS) // COLUMNS) * SPRITE))
    for number, thing in enumerate(THINGS):
        name = ICONS.get(thing, thing.replace(" ", "-"))
        sheet.paste(render(icons, name), (number % COLUMNS * SPRITE, number // COLUMNS * SPRITE))
    with atomic_write(Path(str(files("dalle_pytorch.scenes") / "sprites.webp"))) as temporary:
        sheet.save(temporary, "WEBP", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main(sys.argv[1])
