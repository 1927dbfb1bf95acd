"""The interface of an image tokenizer: images to a grid of codebook indices and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.pretrained import PretrainedModel


class ImageTokenizer(PretrainedModel, ABC):
    """A discrete autoencoder. Priors, decoders and the pipeline know image tokenizers by this class alone.

    Attributes:
        num_tokens: size of the codebook.
        image_size: side in pixels of the images it was made for. Other multiples of 2^num_layers work as well.
        num_layers: a token stands for a square of f = 2^num_layers pixels a side.
        channels: channels of the images, 4 with opacity.
    """

    num_tokens: int
    image_size: int
    num_layers: int
    channels: int = 3

    @property
    def image_fmap_size(self) -> int:
        """Side of the token grid of an image of `image_size` pixels."""
        return self.image_size // 2**self.num_layers

    @property
    def codebook_dim(self) -> int:
        """Width of a codebook row."""
        return self.codebook_weight.shape[1]

    @property
    @abstractmethod
    def codebook_weight(self) -> Tensor:
        """The codebook, (num_tokens, codebook_dim)."""

    @abstractmethod
    def get_codebook_indices(self, image: Tensor) -> Tensor:
        """The most likely codes (b, h·w / 4^num_layers) int64, row by row, of images (b, channels, h, w) in [0, 1]."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens (b, side²), in the range in which the upstream class returns them."""

    @abstractmethod
    def decode_image(self, tokens: Tensor) -> Tensor:
        """Images (b, channels, side·f, side·f) in [0, 1] of tokens (b, side²)."""

    def rename_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of this tokenizer from the names that they have inside a prior of DALLE-pytorch."""
        return dict(state)

    def embed(self, tokens: Tensor) -> Tensor:
        """Codebook rows (b, codebook_dim, side, side) of tokens (b, side²). Raises `ValueError` for another number."""
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not make a square grid")
        return F.embedding(tokens, self.codebook_weight).transpose(1, 2).unflatten(2, (side, side))
