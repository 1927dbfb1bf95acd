"""Attention patterns over a sequence of <bos>, text and image grid."""

import math

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "sparse")
CONV_KERNEL_SIZE = 5
SPARSE_BLOCK_SIZE = 16
SPARSE_LOCAL_BLOCKS = 4
MAX_MASKED = 2**13  # tokens of a sequence whose pattern is a mask of all pairs


class MaskPattern(nn.Module):
    """A pattern kept as a boolean mask (n, n), true where a query (row) attends to a key (column)."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` over the keys before `stop`: bool (stop - start, stop)."""
        return self.mask[start:stop, :stop]


class SparsePattern(nn.Module):
    """Causal block-sparse attention over the whole sequence, in blocks of 16 tokens; all tokens attend to the text.

    A block attends to the earlier blocks of its window of four and a few random ones, the layout of DeepSpeed's
    `VariableSparsityConfig`. The random blocks are a buffer that is saved with the weights.
    """

    layout: Tensor

    def __init__(self, text_len: int, seq_len: int, seed: int):
        super().__init__()
        self.text_len = text_len
        blocks = math.ceil(seq_len / SPARSE_BLOCK_SIZE)
        index = torch.arange(blocks, device="cpu")
        layout = index[:, None] // SPARSE_LOCAL_BLOCKS == index // SPARSE_LOCAL_BLOCKS
        generator = torch.Generator("cpu").manual_seed(seed)
        num_random = max(seq_len // SPARSE_BLOCK_SIZE // 4, 1)
        for row in layout:
            row[torch.randperm(blocks, generator=generator, device="cpu")[:num_random]] = True
        self.register_buffer("layout", layout.tril())

    def forward(self, start: int, stop: int) -> Tensor:
        query = torch.arange(start, stop, device=self.layout.device)[:, None]
        key = torch.arange(stop, device=self.layout.device)
        visible = self.layout[query // SPARSE_BLOCK_SIZE, key // SPARSE_BLOCK_SIZE] | (key < self.text_len)
        return visible & (key <= query)


def make_pattern(attn_type: str, text_len: int, image_fmap_size: int, seed: int = 0) -> nn.Module | None:
    """The pattern of that name, or None for `full`. `seed` chooses the random blocks of `sparse`.

    Text attends to all earlier text, and image tokens to all text. Among image tokens, `axial_row` and `axial_col`
    attend to the earlier ones of the same row or column, `conv_like` to those in the 5 × 5 square that ends at the
    token.
    """
    if attn_type == "full":
        return None
    seq_len = text_len + image_fmap_size**2
    if seq_len > MAX_MASKED:
        raise UsageError(f"attention of type {attn_type} takes at most {MAX_MASKED:,} tokens, got {seq_len:,}")
    if attn_type == "sparse":
        return SparsePattern(text_len, seq_len, seed)
    index = torch.arange(image_fmap_size**2, dtype=torch.int16, device="cpu")
    row, column = index // image_fmap_size, index % image_fmap_size
    rows_above, columns_left = row[:, None] - row, column[:, None] - column
    if attn_type == "axial_row":
        visible = rows_above == 0
    elif attn_type == "axial_col":
        visible = columns_left == 0
    elif attn_type == "conv_like":
        within = [(distance >= 0) & (distance < CONV_KERNEL_SIZE) for distance in (rows_above, columns_left)]
        visible = within[0] & within[1]
    else:
        raise UsageError(f"unknown attention type {attn_type!r}, expected one of {', '.join(ATTENTION_TYPES)}")
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device="cpu")
    mask[text_len:, text_len:] = visible
    return MaskPattern(mask.tril())
