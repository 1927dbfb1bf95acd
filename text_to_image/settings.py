"""Settings of `optimize`. torch is not imported, so that a command line prints its help at once."""

import argparse
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, listed, option

OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
INIT_NOISES = ("gradient", "pixels", "codes")
DTYPE_HELP = "numbers of the prior: float32, int8 (on CPUs) or bfloat16; auto is int8 where it pays, see docs/dtypes.md"
LATENTS = ("codes", "soft", "one_hot")
AUGMENTS = {"Fl": "flip", "Af": "affine", "Ji": "colour", "Er": "erasing"}  # the short names are VQGAN+CLIP's
#: what `plain` sets
PLAIN: dict[str, Any] = {"optimizer": "Adam", "learning_rate": 0.3, "lr_decay": False, "ema_decay": 0.0,
                         "cut_size": [0.75], "cut_padding": 0.0, "cut_noise": 0.0, "augments": []}  # fmt: skip


def _augment(name: Any) -> str:
    name = AUGMENTS.get(str(name), str(name))
    if name not in ("none", *AUGMENTS.values()):
        known = ", ".join(f"{short} or {long}" for short, long in AUGMENTS.items())
        raise argparse.ArgumentTypeError(f"expected none, {known}, got {name[:40]!r}")
    return name


@dataclass
class OptimizationSettings(Settings):
    """How CLIP's gradient moves the latents of an image tokenizer, see `text_to_image.latents`.

    Raises `UsageError`, which names the setting, for values out of range.
    """

    title: ClassVar[str] = "optimization"
    iterations: int = option(200, "steps, for each prompt of a story", low=1)
    learning_rate: float = option(0.7, "in standard deviations of the codebook, or in logits of one-hot latents", low=0,
                                  above=True, high=1e3)  # fmt: skip
    lr_decay: bool = option(True, "let the learning rate fall to a tenth, along a half cosine")
    optimizer: str = option("Adam", "one of " + ", ".join(OPTIMIZERS), choices=OPTIMIZERS)
    ema_decay: float = option(0.8, "of the average of the latents that the image is made of; 0 takes the last ones",
                              low=0, high=0.9999)  # fmt: skip
    latents: str | None = option(None, "codes (straight-through), soft (between the codes), or one_hot, relaxed "
                                       "(default: codes for a VQGAN, else one_hot)", choices=LATENTS)  # fmt: skip
    init_weight: float = option(0.0, "holds the latents near to those of the start", low=0)
    patience: int | None = option(None, "end after N iterations in which the score has not risen", low=1, metavar="N")
    seed: int = option(0, "the same seed gives the same image", low=0, high=2**64)
    cutn: int = option(2, "cutouts that each CLIP sees a step", low=1, high=4096)
    cut_pow: float = option(1.0, "small for large cutouts: their side goes with u^cut_pow, for a uniform u", low=0,
                            high=100)  # fmt: skip
    cut_size: list[float] = option([0.9, 1.0], "the smallest and the largest cutout, in sides of the image; one "
                                               "number for a single size", low=0.01, high=1, nargs="+")  # fmt: skip
    cut_padding: float = option(0.05, "of the image, by its margin, before it is cut, in sides", low=0, high=1)
    cut_noise: float = option(0.1, "the largest standard deviation of noise on a cutout", low=0, high=10)
    augments: list[str] = option(["affine", "colour", "erasing"], "changes of the cutouts: none, or "
                                 + ", ".join(f"{short} ({long})" for short, long in AUGMENTS.items()),
                                 kind=listed(_augment), nargs="+", metavar="NAME")  # fmt: skip
    plain: bool = option(False, "the plain scheme, for comparison: Adam at a constant rate, cutouts of one size, no "
                                "padding, noise or augmentation, no average; sets those options")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plain:
            vars(self).update(PLAIN)
        problems = self.problems()
        if wrong := [field.name for field in fields(OptimizationSettings) if field.name in problems]:
            raise UsageError(f"{wrong[0]}: {problems[wrong[0]]}")
        self.augments = [name for name in map(_augment, self.augments) if name != "none"]
        if not 1 <= len(self.cut_size) <= 2 or self.cut_size != sorted(self.cut_size):
            raise UsageError(f"expected cut_size as the smallest and the largest of at most 2, got {self.cut_size}")
