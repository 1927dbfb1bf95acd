"""What the weights of a CLIP do not tell: heads, activation, and how images are normalised. In open_clip's terms."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_pytorch.checks import check_values
from dalle_pytorch.clip.published import IMAGE_MEAN, IMAGE_STD
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.pretrained import read_config

OPEN_CLIP_CONFIG = "open_clip_config.json"
RESNET = "a CLIP with a ResNet; only those with a vision transformer are supported"
HEAD_WIDTH = 64  # of all text encoders that are named here, and of OpenAI's CLIPs
#: width, layers and head width of the image encoders that open_clip has under these names
_VISION = {
    "S": (384, 12, 64), "M": (512, 12, 64), "B": (768, 12, 64), "L": (1024, 24, 64), "H": (1280, 32, 80),
    "g": (1408, 40, 88), "bigG": (1664, 48, 104), "e": (1792, 56, 112),
}  # fmt: skip
_NAME = re.compile(rf"ViT-({'|'.join(_VISION)})[-/](\d+)(-plus)?(?:-(\d+))?(-quickgelu)?")
# Settings of a tower that are read, those that matter in training only, and those whose usual values change nothing.
_KNOWN = {"width", "layers", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "context_length",
          "vocab_size"}  # fmt: skip
_TRAINING = {"patch_dropout", "dropout"}
_USUAL = {"pool_type": ("tok", "argmax"), "final_ln_after_pool": (False,), "pos_embed_type": ("learnable",)}


@dataclass(frozen=True)
class ClipConfig:
    """Settings of both towers.

    Attributes:
        vision, text: `width`, `layers`, `image_size` … as far as they are told, to be compared with the weights.
        vision_heads, text_heads: a number of heads, or where it is negative their width.
        hidden_act: transformers' name of the activation.
        image_mean, image_std: of pixels in [0, 1].
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    vision_heads: int = -HEAD_WIDTH
    text_heads: int = -HEAD_WIDTH
    hidden_act: str = "gelu"
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD


OPENAI = ClipConfig({}, {}, hidden_act="quick_gelu")


def read_clip_config(source: str | os.PathLike) -> ClipConfig:
    """The settings in a JSON file of open_clip's, or those of the architecture of that name, such as "ViT-H-14"."""
    path = Path(source)
    if path.is_file():
        with opening(path, "is not a configuration of open_clip's"):
            return _parse(path, read_config(path.parent, path.name))
    match = _NAME.fullmatch(str(source))
    if match is None:
        if path.suffix == ".json":
            raise CheckpointError(f"{path} is missing")
        raise CheckpointError(
            f"{str(source)[:80]!r} is neither a JSON file nor an architecture of open_clip's that is known here: "
            "ViT-B-32, ViT-L-14, ViT-H-14, ViT-g-14, ViT-bigG-14, ViT-B-32-quickgelu …"
        )
    size, patch_size, plus, image_size, quick = match.groups()
    width, layers, head_width = _VISION[size]
    vision = {"width": 896 if plus else width, "layers": layers, "patch_size": int(patch_size)}
    if image_size:
        vision["image_size"] = int(image_size)
    return ClipConfig(vision, {}, -head_width, hidden_act="quick_gelu" if quick else "gelu")


def _parse(path: Path, config: dict[str, Any]) -> ClipConfig:
    check_values(config)
    model, pixels = config.get("model_cfg", config), config.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        for key, value in tower.items():
            if value and key not in _KNOWN | _TRAINING and value not in _USUAL.get(key, ()):
                raise CheckpointError(f"{path}: {name} has {key}, which is not supported")
    if isinstance(vision.get("layers"), list):
        raise CheckpointError(f"{path} is of {RESNET}")
    heads = text.get("heads", 8)
    head_width = vision.get("head_width", HEAD_WIDTH)
    if not all(isinstance(value, int) and value > 0 for value in (heads, head_width)):
        raise ValueError("heads and head_width are whole numbers from 1")
    return ClipConfig(
        {**vision, "embed_dim": model["embed_dim"]}, text, -head_width, heads,
        "quick_gelu" if model.get("quick_gelu") else "gelu",
        tuple(pixels.get("mean", IMAGE_MEAN)), tuple(pixels.get("std", IMAGE_STD)),
    )  # fmt: skip


def count_heads(source: object, width: int, heads: int) -> int:
    """The number of heads of a tower of that width, see `ClipConfig`."""
    if width % abs(heads):
        raise CheckpointError(f"{source}: a width of {width} has no heads of {abs(heads)}" if heads < 0 else
                              f"{source}: a width of {width} has no {heads} heads")  # fmt: skip
    return heads if heads > 0 else width // -heads
