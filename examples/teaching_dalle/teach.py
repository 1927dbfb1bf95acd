"""The lesson of a small DALL-E: `python examples/teaching_dalle/teach.py --help`."""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from torch import Tensor

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, save_image
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.vae.base import ImageTokenizer
from text_to_image import TextToImage

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "DALLE-pytorch"
SHOWN = 8  # pictures in dvae_reconstruction.png
ENLARGED = 3


def scenes(settings: dict[str, Any], held_out: bool = False) -> Iterator[Any]:
    """Scenes of one big digit in the middle, without end: those to train on, or those that training never shows.

    Raises `UsageError` if there are none.
    """
    every = product(settings["digits"], settings["colours"], settings["textures"])
    combinations = [parts for parts in every if (glyphs.split_of(*parts) != "train") == held_out]
    if not combinations:
        raise UsageError("a tenth of the combinations is kept out of training; name more digits, colours and textures")
    corner = (glyphs.world.GRID - glyphs.world.SIZES["big"]) // 2
    rng = np.random.default_rng([settings["seed"], held_out])
    while True:
        digit, colour, texture = combinations[rng.integers(len(combinations))]
        subject = glyphs.Subject(digit, colour, "big", corner, corner)
        caption = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {digit} on {texture}"
        variant, grain_seed = int(rng.integers(glyphs.world.VARIANTS)), int(rng.integers(2**31))
        yield glyphs.Scene((subject,), texture, variant, grain_seed, caption)


def draw_pictures(folder: Path, settings: dict[str, Any]) -> None:
    """Draws the pictures to train on, each beside its caption; what is there already stays."""
    for number, scene in enumerate(islice(scenes(settings), settings["count"])):
        path = folder / f"{number:05}.png"
        if not path.exists():
            write_text(path.with_suffix(".txt"), scene.caption + "\n")
            save_image(path, Image.fromarray(glyphs.draw(scene, settings["image_size"])))


def train(script: str, config: Path, options: dict[str, Any], *paths: str | Path) -> None:
    """Runs one of the training scripts with `options` in a file of its own."""
    write_text(config, yaml.safe_dump(options, sort_keys=False))
    arguments = [str(SCRIPTS / script), "--config", str(config), *map(str, paths)]
    print(f"$ python {shlex.join(arguments)}", flush=True)
    if code := subprocess.run([sys.executable, *arguments]).returncode:
        sys.exit(code)


def show_reconstructions(path: Path, vae: ImageTokenizer, shown: Sequence[Any], image_size: int) -> None:
    """The scenes `shown`, and below each what the VAE makes of its tokens."""
    drawn = [glyphs.draw(scene, image_size) for scene in shown]
    pictures = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in drawn]).float() / 255
    with torch.no_grad():
        decoded = vae.decode_image(vae.get_codebook_indices(pictures))
    save_image(path, contact_sheet([enlarge(picture) for picture in (*pictures, *decoded)], columns=len(drawn)))


def show_generations(path: Path, pipe: TextToImage, settings: dict[str, Any]) -> None:
    """A row of images for every caption, under which it is written."""
    rows = []
    for caption in settings["captions"]:
        result = pipe.generate(caption, settings["num_images"], rank=False, top_p=settings["top_p"],
                               cond_scale=settings["cond_scale"], seed=settings["seed"])  # fmt: skip
        rows.append((caption, contact_sheet([enlarge(image.pixels) for image in result], columns=len(result))))
    width, height, line = max(row.width for _, row in rows), rows[0][1].height, 16
    sheet = Image.new("RGB", (width, len(rows) * (height + line)), "white")
    for number, (caption, row) in enumerate(rows):
        top = number * (height + line)
        sheet.paste(row, (0, top))
        ImageDraw.Draw(sheet).text((4, top + height), caption, fill="black")
    save_image(path, sheet)


def enlarge(picture: Tensor) -> Tensor:
    """(3, h, w) to ENLARGED times that, pixel by pixel: what there is to see is small."""
    return picture.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises `UsageError` if it is none, or a section is missing."""
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    for section in ("output_dir", "pictures", "vae", "tokenizer", "dalle", "generation"):
        if not isinstance(settings, dict) or section not in settings:
            raise UsageError(f"{path} has no section {section!r}")
    return settings


@dataclass
class TeachSettings(Settings):
    """The lesson of a small DALL-E: draws digits in a colour on a texture, teaches a DiscreteVAE to write such images
    as tokens, teaches a DALLE to continue a caption with the tokens of its image, and lets it draw.

    python examples/teaching_dalle/teach.py

    It is the project's own scripts that train. What comes of it is in the settings' `output_dir`:
    dvae_reconstruction.png, generation_results.png, and a folder for each training.
    """

    settings: Path = option(HERE / "settings.yaml", "a YAML file of all settings")


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(TeachSettings.parse(argv).settings)
    output = Path(settings["output_dir"])
    pictures, tokenizer = output / "pictures", output / "tokenizer.json"

    unseen = list(islice(scenes(settings["pictures"], held_out=True), SHOWN))
    draw_pictures(pictures, settings["pictures"])
    train("train_vae.py", output / "vae.yaml", settings["vae"], "--image_folder", pictures,
          "--image_size", str(settings["pictures"]["image_size"]), "--output_dir", output / "vae")  # fmt: skip
    train("train_tokenizer.py", output / "tokenizer.yaml", settings["tokenizer"], "--image_text_folder", pictures,
          "--output", tokenizer)  # fmt: skip
    train("train_dalle.py", output / "dalle.yaml", settings["dalle"], "--image_text_folder", pictures,
          "--vae_path", output / "vae/vae", "--bpe_path", tokenizer, "--output_dir", output / "dalle")  # fmt: skip

    pipe = TextToImage.from_pretrained(device="cpu", prior=output / "dalle/dalle", tokenizer=tokenizer)
    show_reconstructions(output / "dvae_reconstruction.png", pipe.model.prior.vae, unseen,
                         settings["pictures"]["image_size"])  # fmt: skip
    show_generations(output / "generation_results.png", pipe, settings["generation"])
    print(f"look at {output}/dvae_reconstruction.png and {output}/generation_results.png")


if __name__ == "__main__":
    run(main)
