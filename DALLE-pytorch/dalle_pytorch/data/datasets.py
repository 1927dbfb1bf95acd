"""Opens the data that a training names."""

import os

from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import Data
from dalle_pytorch.data.registry import open_registered
from dalle_pytorch.data.samples import CaptionProblem
from dalle_pytorch.data.shards import ARCHIVE_SUFFIXES, ShardStream, local_path
from dalle_pytorch.errors import FileError


def open_dataset(name: str | os.PathLike, resolution: int, *, wds: str | None = None, caption_key: str = "caption",
                 captions: bool = True, crop_ratio: float = 1.0, transparent: bool = False,
                 caption_problem: CaptionProblem | None = None, commands: bool = True) -> Data:  # fmt: skip
    """Opens the data that a training names: a registered data set, WebDataset shards, or a folder of images.

    Args:
        name: `--image_text_folder`: a registered name, a folder, or with `wds` archives as `list_shards` takes them.
        resolution: side of the images, in pixels.
        wds: suffixes of images and captions in the shards, `jpg,txt` or `jpg,json`; empty for a folder.
        caption_key: the field of JSON captions, and of a folder's metadata.jsonl or metadata.csv.
        captions: False if images alone will do.
        crop_ratio, transparent, caption_problem: as in `ImageTextFolder`; registered data sets do without.
        commands: whether `name` may be a command, `pipe:COMMAND`.

    Raises `FileError` for what is not there, or is not what `wds` says.
    """
    if (registered := open_registered(str(name), resolution)) is not None:
        if wds or transparent:
            raise FileError(f"{name} is a registered data set, which takes no --wds or --transparent")
        return registered
    settings = {"crop_ratio": crop_ratio, "transparent": transparent, "caption_problem": caption_problem}
    if wds:
        image, *rest = [suffix.strip().lower().lstrip(".") for suffix in wds.split(",")]
        if not image or len(rest) > 1 or (captions and not any(rest)):
            raise FileError(f"--wds names the suffixes of pictures and captions, as in jpg,txt, and not {wds!r}")
        caption = rest[0] if captions else None
        return ShardStream(name, resolution, image_suffix=image, caption_suffix=caption, caption_key=caption_key,
                           commands=commands, **settings)  # fmt: skip
    if not os.path.isdir(name):
        shards = str(name).endswith(ARCHIVE_SUFFIXES) or local_path(str(name)) is None
        hint = f"{name} is read with --wds jpg,txt, which names the suffixes in its archives"
        raise FileError(hint if shards else f"there is no folder {name}")
    return ImageTextFolder(name, resolution, captions=captions, caption_key=caption_key, **settings)
