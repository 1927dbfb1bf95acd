"""The interfaces of what ranks and guides: a scorer, and the CLIP models that are scorers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.pretrained import PretrainedModel


class Scorer(Protocol):
    """Anything that says how well images fit a prompt."""

    def score(self, prompt: str, images: Tensor) -> Tensor:
        """The cosine similarity (n,) of a prompt to each image of (n, 3, h, w) in [0, 1]."""
        ...


class CLIPModel(PretrainedModel, ABC):
    """A text encoder and an image encoder with a common feature space (arXiv:2103.00020).

    `image_size` is the side in pixels at which images are read.
    """

    image_size: int

    @abstractmethod
    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (b, n) int64 of one text or several. Longer ones are cut."""

    @abstractmethod
    def encode_text(self, text: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of what `tokenize` returns."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of images (b, 3, h, w) in [0, 1], scaled to `image_size`."""

    @abstractmethod
    def visual_features(self, image: Tensor) -> list[Tensor]:
        """The features (b, n, dim) of the patches in each layer of the image encoder, each of length 1.

        `image` is (b, 3, image_size, image_size) in [0, 1].
        """

    @torch.no_grad()
    def score(self, prompt: str, images: Tensor) -> Tensor:
        """The cosine similarity (n,) of a prompt to each image of (n, 3, h, w) in [0, 1]."""
        text = self.encode_text(self.tokenize(prompt).to(self.device))
        return F.cosine_similarity(text, self.encode_image(images.to(self.device)))
