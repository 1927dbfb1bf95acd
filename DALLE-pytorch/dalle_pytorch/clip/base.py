"""The interfaces of a scorer, and of the CLIP models that are scorers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.errors import SamplingDiverged
from dalle_pytorch.pretrained import PretrainedModel


class Scorer(Protocol):
    """Anything that scores images against a prompt."""

    def score(self, prompt: str, images: Tensor) -> Tensor:
        """The cosine similarity (n,) of a prompt to each image of (n, 3, h, w) in [0, 1]."""
        ...


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The squared distance (b,) of two lists of `visual_features`: the mean over patches and over layers."""
    return torch.stack([(x - y).square().sum(-1).mean(-1) for x, y in zip(a, b, strict=True)]).mean(0)


class CLIPModel(PretrainedModel, ABC):
    """A text encoder and an image encoder with a common feature space (arXiv:2103.00020).

    `image_size` is the side in pixels of the image encoder's input.
    """

    image_size: int

    @abstractmethod
    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (b, n) int64 of one text or several, truncated."""

    @abstractmethod
    def lost_text(self, text: str) -> str:
        """The end of a text that `tokenize` truncates, empty if it all fits."""

    @abstractmethod
    def encode_text(self, text: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of tokens (b, n)."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of images (b, 3, h, w) in [0, 1], resized to `image_size`."""

    @abstractmethod
    def visual_features(self, image: Tensor) -> list[Tensor]:
        """The normalised features (b, n, dim) of the patches after each layer of the image encoder.

        `image` is (b, 3, image_size, image_size) in [0, 1].
        """

    @torch.no_grad()
    def score(self, prompt: str, images: Tensor) -> Tensor:
        """The cosine similarity (n,) of a prompt to each image of (n, 3, h, w) in [0, 1]."""
        text = self.encode_text(self.tokenize(prompt).to(self.device))
        scores = F.cosine_similarity(text, self.encode_image(images.to(self.device)))
        if not scores.isfinite().all():
            raise SamplingDiverged(f"this {type(self).__name__} scores images with numbers that are not finite")
        return scores
