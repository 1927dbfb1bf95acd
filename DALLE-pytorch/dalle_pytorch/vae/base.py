"""The interface of an image tokenizer: images to a grid of codebook indices and back."""

from __future__ import annotations

import inspect
import math
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.pretrained import PretrainedModel

#: for `_OpensFiles`, set by `dalle_pytorch.published.vaes`, which knows the formats
PUBLISHED_LOADERS: dict[type, Callable[..., ImageTokenizer]] = {}


class _OpensFiles(ABCMeta):
    """Lets `Class(path)` open a published file, as the classes of DALLE-pytorch do.

    A call whose arguments fit the signature of the class's loader calls that; any other makes a new model.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        loader = PUBLISHED_LOADERS.get(cls)
        if loader is not None:
            try:
                inspect.signature(loader).bind(*args, **kwargs)
            except TypeError:
                pass
            else:
                return loader(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class ImageTokenizer(PretrainedModel, metaclass=_OpensFiles):
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
    def encode_logits(self, image: Tensor) -> Tensor:
        """Logits of the codes, (b, num_tokens, h / f, w / f), of images (b, channels, h, w) in [0, 1]."""

    @abstractmethod
    def decode_embeddings(self, rows: Tensor) -> Tensor:
        """Images (b, channels, h·f, w·f), about [0, 1] and not clipped, of codebook rows (b, codebook_dim, h, w), or of
        what lies between them."""

    def decode_image(self, tokens: Tensor) -> Tensor:
        """Images (b, channels, h·f, w·f) in [0, 1] of tokens, see `embed`."""
        return self.decode_embeddings(self.embed(tokens)).clamp(0, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens (b, side²), in the range in which the upstream class returns them."""
        return self.decode_image(tokens)

    @torch.no_grad()
    def get_codebook_indices(self, image: Tensor) -> Tensor:
        """The most likely codes (b, h·w / f²) int64, row by row, of images (b, channels, h, w) in [0, 1].

        Raises `ValueError` for sides that are not multiples of f.
        """
        f = 2**self.num_layers
        if image.shape[-2] % f or image.shape[-1] % f:
            raise ValueError(f"image sides must be multiples of {f} pixels, got {tuple(image.shape[-2:])}")
        return self.most_likely(image)

    def most_likely(self, image: Tensor) -> Tensor:
        """What `get_codebook_indices` returns, for sides that are multiples of f."""
        return self.encode_logits(image).argmax(dim=1).flatten(1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Codebook rows (b, codebook_dim, h, w) of tokens (b, side²) of a square grid, or (b, h, w)."""
        if tokens.ndim == 2:
            side = math.isqrt(tokens.shape[1])
            if side * side != tokens.shape[1]:
                raise ValueError(f"expected the tokens of a square grid, got {tokens.shape[1]}")
            tokens = tokens.unflatten(1, (side, side))
        return F.embedding(tokens, self.codebook_weight).permute(0, 3, 1, 2)

    def rename_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of this tokenizer, from the names they have in a checkpoint of DALLE-pytorch's DALLE."""
        return dict(state)
