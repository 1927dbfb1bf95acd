"""Multi-head attention with a key-value cache, the patterns that restrict it, and rotary positions.

The sequence is <bos>, the text, then a square grid of image tokens row by row: `text_len` counts <bos> and the text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "sparse")
CONV_KERNEL_SIZE = 5
SPARSE_BLOCK_SIZE = 16
SPARSE_LOCAL_BLOCKS = 4


# --------------------------------------------------------------------------------------------------
# Patterns: who may look at whom


class MaskPattern(nn.Module):
    """A pattern kept as a boolean mask (n, n), true where a query (row) may look at a key (column)."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` over the keys before `stop`: bool (stop - start, stop)."""
        return self.mask[start:stop, :stop]


class SparsePattern(nn.Module):
    """Causal block-sparse attention over the whole sequence, in blocks of 16 tokens; text is visible to all.

    A block sees the earlier blocks of its window of four and a few random ones, the layout of DeepSpeed's
    `VariableSparsityConfig`. The random choice is a buffer that is saved with the weights.
    """

    def __init__(self, text_len: int, seq_len: int, seed: int):
        super().__init__()
        self.text_len = text_len
        blocks = math.ceil(seq_len / SPARSE_BLOCK_SIZE)
        index = torch.arange(blocks)
        layout = index[:, None] // SPARSE_LOCAL_BLOCKS == index // SPARSE_LOCAL_BLOCKS
        generator = torch.Generator().manual_seed(seed)
        num_random = max(seq_len // SPARSE_BLOCK_SIZE // 4, 1)
        for row in layout:
            row[torch.randperm(blocks, generator=generator)[:num_random]] = True
        self.register_buffer("layout", layout.tril())

    def forward(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` over the keys before `stop`: bool (stop - start, stop)."""
        query = torch.arange(start, stop, device=self.layout.device)[:, None]
        key = torch.arange(stop, device=self.layout.device)
        visible = self.layout[query // SPARSE_BLOCK_SIZE, key // SPARSE_BLOCK_SIZE] | (key < self.text_len)
        return visible & (key <= query)


def make_pattern(attn_type: str, text_len: int, image_fmap_size: int, seed: int = 0) -> nn.Module | None:
    """The pattern of that name, or None for `full`. `seed` chooses the random blocks of `sparse`.

    Text looks at all earlier text and image tokens at all text. Among the image tokens, `axial_row` and `axial_col`
    show the earlier ones of the same row or column, and `conv_like` those in the 5 × 5 square that ends at the token.
    """
    if attn_type == "full":
        return None
    seq_len = text_len + image_fmap_size**2
    if attn_type == "sparse":
        return SparsePattern(text_len, seq_len, seed)
    index = torch.arange(image_fmap_size**2)
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
        raise ValueError(f"attention type {attn_type!r} is unknown; there are {', '.join(ATTENTION_TYPES)}")
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool)
    mask[text_len:, text_len:] = visible
    return MaskPattern(mask.tril())


# --------------------------------------------------------------------------------------------------
# Rotary positions


def rotary_table(dim_head: int, text_len: int, image_fmap_size: int) -> Tensor:
    """Cosine and sine of each position's angles, (text_len + image_fmap_size², dim_head // 2, 2).

    As in DALLE-pytorch 1.x, a third of the channels turns with the position in the text (RoFormer, arXiv:2104.09864;
    all image tokens stand at the far position 8192), a third with the row and a third with the column (both in
    [-1, 1]; text stands at -10). What is left over does not turn.
    """
    if dim_head % 2:
        raise ValueError(f"rotary_emb wants an even dim_head, and {dim_head} is odd")
    pairs = dim_head // 3 // 2
    side = image_fmap_size
    text_frequencies = 10000.0 ** (-2 * torch.arange(pairs, dtype=torch.float32) / (dim_head // 3))
    pixel_frequencies = torch.linspace(1.0, 5.0, pairs) * math.pi
    place = torch.linspace(-1.0, 1.0, side)
    outside = torch.full((text_len,), -10.0)
    positions = (
        (torch.cat((torch.arange(text_len).float(), torch.full((side * side,), 8192.0))), text_frequencies),
        (torch.cat((outside, place.repeat_interleave(side))), pixel_frequencies),
        (torch.cat((outside, place.repeat(side))), pixel_frequencies),
    )
    angles = torch.cat([position[:, None] * frequencies for position, frequencies in positions], dim=-1)
    angles = F.pad(angles, (0, dim_head // 2 - 3 * pairs))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels. `x` is (b, n, heads, dim_head), `table` (n, dim_head // 2, 2)."""
    # One complex product: several times faster on a CPU than the sum of products written out.
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2))) * torch.view_as_complex(table.to(dtype))[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Attention


class KVCache(nn.Module):
    """Preallocated keys and values, (b, heads, max_length, dim_head) each, of which the first `length` are filled."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.length = 0
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (b, heads, n, dim_head) and returns all there are."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class RMSNorm(nn.RMSNorm):
    """torch's, in the precision of what it is given: autocast leaves the weight alone, and mixed types are slow."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention; `qk_norm` adds an RMS norm on queries and keys (arXiv:2302.05442), before the rotation."""

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        pattern: nn.Module | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.pattern = pattern
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.q_norm = RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(dim_head, eps=1e-6) if qk_norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`x` is (b, n, dim): a sequence from its start, or one token that goes on from what is in `cache`.

        `rotary` holds the n positions' rows of `rotary_table`; `key_mask` (b, n) is false at keys that no one looks at.
        """
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, -1)
        if self.q_norm is not None:
            q, k, v = qkv.unbind(2)
            qkv = torch.stack((self.q_norm(q), self.k_norm(k), v), dim=2)
        if rotary is not None:
            # DALLE-pytorch turns the values too.
            qkv = apply_rotary(qkv.flatten(2, 3), rotary).view_as(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v)

        mask = None
        if self.pattern is not None:
            mask = self.pattern(k.shape[2] - length, k.shape[2])
        elif key_mask is not None:
            mask = key_mask[:, None, None, :]
        is_causal = self.causal and mask is None and length > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.dropout(self.to_out(out.transpose(1, 2).reshape(batch, length, -1)))
