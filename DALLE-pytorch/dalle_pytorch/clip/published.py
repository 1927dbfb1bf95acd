"""Published CLIPs (arXiv:2103.00020), on `transformers`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.files.images import resize
from dalle_pytorch.pretrained import NATIVE_FILES, records_config, resolve_folder
from dalle_pytorch.tokenizers.simple import SimpleTokenizer

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY_NAMES = ("merges.txt", "tokenizer.json")  # either holds CLIP's merges in a Hugging Face folder


class PublishedCLIP(CLIPModel):
    """A CLIP with a vision transformer, as published by OpenAI and others. `load_clip` opens one.

    `text` and `vision` are sizes and options by the names of transformers' `CLIPTextConfig` and `CLIPVisionConfig`;
    `image_mean` and `image_std` are those of pixels in [0, 1]. `bpe_path` is the vocabulary that came with it, None for
    CLIP's own.
    """

    mean: Tensor
    std: Tensor

    @records_config
    def __init__(
        self, *, text: Mapping[str, Any], vision: Mapping[str, Any], projection_dim: int = 512,
        image_mean: Sequence[float] = IMAGE_MEAN, image_std: Sequence[float] = IMAGE_STD,
    ):  # fmt: skip
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig  # takes seconds to import

        super().__init__()
        self.model = CLIPModel(
            CLIPConfig(text_config=dict(text), vision_config=dict(vision), projection_dim=projection_dim)
        )
        for tower in (self.model.text_model, self.model.vision_model):
            ids = torch.arange(tower.embeddings.position_ids.shape[1], device="cpu")
            tower.embeddings.register_buffer("position_ids", ids[None], persistent=False)
        text_config, image_size = CLIPTextConfig(**text), CLIPVisionConfig(**vision).image_size
        if not isinstance(image_size, int):
            raise UsageError(f"expected a single image_size, got {image_size}")
        self.image_size = image_size
        self.text_seq_len = text_config.max_position_embeddings
        self.num_text_tokens = text_config.vocab_size
        self.bpe_path: Path | None = None
        self._tokenizer: SimpleTokenizer | None = None
        self.register_buffer("mean", torch.tensor(image_mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std, device="cpu").view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, **overrides: Any) -> Self:
        return super().from_pretrained(resolve_folder(folder, (*NATIVE_FILES, *VOCABULARY_NAMES)), dtype, **overrides)

    def opened(self, folder: Path) -> None:
        self.bpe_path = find_vocabulary(folder)

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes a native folder, including a vocabulary that came with the model."""
        super().save_pretrained(folder, dtype)
        if self.bpe_path is not None and self.bpe_path.parent != Path(folder):
            write_bytes(Path(folder) / self.bpe_path.name, self.bpe_path.read_bytes())

    def encode_image(self, image: Tensor) -> Tensor:
        pixels = (resize(image, self.image_size) - self.mean) / self.std
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=text).pooler_output)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """CLIP's tokenizer, read on first use."""
        if self._tokenizer is None:
            tokenizer = SimpleTokenizer(self.bpe_path)
            if tokenizer.vocab_size != self.num_text_tokens:
                raise CheckpointError(
                    f"this CLIP has {self.num_text_tokens} text tokens, but its vocabulary {tokenizer.vocab_size}; "
                    "set its `tokenizer`"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (b, text_seq_len) of one text or several: begin, truncated text, end, zeros."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        begin, end = self.num_text_tokens - 2, self.num_text_tokens - 1
        tokens = torch.zeros(len(texts), self.text_seq_len, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [begin, *self.tokenizer.encode(text)[: self.text_seq_len - 2], end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def lost_text(self, text: str) -> str:
        return self.tokenizer.lost_text(text, self.text_seq_len - 2)

    def visual_features(self, image: Tensor) -> list[Tensor]:
        pixels = (image - self.mean) / self.std
        layers = self.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
        return [F.normalize(layer.float(), dim=-1) for layer in layers]


def find_vocabulary(folder: Path) -> Path | None:
    """The file with CLIP's merges in a folder, or None."""
    return next((folder / name for name in VOCABULARY_NAMES if (folder / name).is_file()), None)
