"""The published CLIP (Radford et al. 2021, arXiv:2103.00020) on `transformers`, behind the calls of our own CLIP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import NATIVE_FILES, records_config, resolve_folder
from dalle_pytorch.tokenizers.simple import SimpleTokenizer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY_NAMES = ("merges.txt", "tokenizer.json")  # either holds CLIP's merges in a Hugging Face folder


class PublishedCLIP(CLIPModel):
    """A CLIP with a vision transformer, as OpenAI and others have published them. `load_clip` opens one.

    `text` and `vision` are sizes and options under the names of transformers' `CLIPTextConfig` and `CLIPVisionConfig`;
    `image_mean` and `image_std` are those of pixels in [0, 1]. `bpe_path` is the vocabulary that came with it; None
    means CLIP's own.
    """

    mean: Tensor
    std: Tensor

    @records_config
    def __init__(
        self,
        *,
        text: Mapping[str, Any],
        vision: Mapping[str, Any],
        projection_dim: int = 512,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
    ):
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

        super().__init__()
        self.model = CLIPModel(
            CLIPConfig(text_config=dict(text), vision_config=dict(vision), projection_dim=projection_dim)
        )
        text_config, vision_config = CLIPTextConfig(**text), CLIPVisionConfig(**vision)
        assert isinstance(vision_config.image_size, int)
        self.image_size = vision_config.image_size
        self.text_seq_len = text_config.max_position_embeddings
        self.num_text_tokens = text_config.vocab_size
        self.bpe_path: Path | None = None
        self._tokenizer: SimpleTokenizer | None = None
        self.register_buffer("mean", torch.tensor(image_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, **overrides
    ) -> PublishedCLIP:
        """Opens a native folder, with the vocabulary in it if there is one."""
        folder = resolve_folder(folder, (*NATIVE_FILES, *VOCABULARY_NAMES))
        model = super().from_pretrained(folder, dtype, **overrides)
        model.bpe_path = find_vocabulary(folder)
        return model

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes a native folder, the vocabulary included if one came with the model."""
        super().save_pretrained(folder, dtype)
        if self.bpe_path is not None and self.bpe_path.parent != Path(folder):
            write_bytes(Path(folder) / self.bpe_path.name, self.bpe_path.read_bytes())

    # ----------------------------------------------------------------------------------------------
    # Features

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of pictures (b, 3, h, w) in [0, 1], scaled to `image_size`."""
        pixels = (resize(image, self.image_size) - self.mean) / self.std
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, text: Tensor) -> Tensor:
        """Features (b, dim), not normalised, of what `tokenize` gives, read at the end token."""
        return self.model.text_projection(self.model.text_model(input_ids=text).pooler_output)

    # ----------------------------------------------------------------------------------------------
    # Scoring

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """CLIP's vocabulary, read when first asked for."""
        if self._tokenizer is None:
            tokenizer = SimpleTokenizer(self.bpe_path)
            if tokenizer.vocab_size != self.num_text_tokens:
                raise CheckpointError(
                    f"this CLIP knows {self.num_text_tokens} text tokens, and CLIP's vocabulary has "
                    f"{tokenizer.vocab_size}; set its `tokenizer`"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (b, text_seq_len) of one text or several: begin, text, end, zeros. Longer ones are cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        begin, end = self.num_text_tokens - 2, self.num_text_tokens - 1
        tokens = torch.zeros(len(texts), self.text_seq_len, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [begin, *self.tokenizer.encode(text)[: self.text_seq_len - 2], end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def visual_features(self, image: Tensor) -> list[Tensor]:
        pixels = (image - self.mean) / self.std
        layers = self.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
        return [F.normalize(layer.float(), dim=-1) for layer in layers]


def find_vocabulary(folder: Path) -> Path | None:
    """The file with CLIP's merges in a folder, or None."""
    return next((folder / name for name in VOCABULARY_NAMES if (folder / name).is_file()), None)
