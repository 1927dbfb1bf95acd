"""Rotary positions of text and image tokens, as in DALLE-pytorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch.errors import UsageError

MAX_TABLE = 2**26  # numbers: 256 × 256 image tokens in heads of 1,024 channels


def rotary_table(dim_head: int, text_len: int, image_fmap_size: int) -> Tensor:
    """Cosine and sine of each position's angles, (text_len + image_fmap_size², dim_head // 2, 2).

    As in DALLE-pytorch 1.x, a third of the channels rotates with the position in the text (RoFormer, arXiv:2104.09864;
    all image tokens are at position 8192), a third with the row and a third with the column (both in [-1, 1]; text is
    at -10). Remaining channels are not rotated.
    """
    if dim_head % 2:
        raise UsageError(f"rotary_emb needs an even dim_head, got {dim_head}")
    if (text_len + image_fmap_size**2) * dim_head > MAX_TABLE:
        raise UsageError(f"rotary_emb is for shorter sequences than {text_len} + {image_fmap_size}² tokens")
    pairs = dim_head // 3 // 2
    side = image_fmap_size
    text_frequencies = 10000.0 ** (-2 * torch.arange(pairs, dtype=torch.float32, device="cpu") / (dim_head // 3))
    pixel_frequencies = torch.linspace(1.0, 5.0, pairs, device="cpu") * math.pi
    grid = torch.linspace(-1.0, 1.0, side, device="cpu")
    outside = torch.full((text_len,), -10.0, device="cpu")
    in_text = torch.cat((torch.arange(text_len, device="cpu").float(), grid.new_full((side * side,), 8192.0)))
    positions = (
        (in_text, text_frequencies),
        (torch.cat((outside, grid.repeat_interleave(side))), pixel_frequencies),
        (torch.cat((outside, grid.repeat(side))), pixel_frequencies),
    )
    angles = torch.cat([position[:, None] * frequencies for position, frequencies in positions], dim=-1)
    angles = F.pad(angles, (0, dim_head // 2 - 3 * pairs))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels. `x` is (b, n, heads, dim_head), `table` (n, dim_head // 2, 2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # which knows no complex numbers
        (even, odd), (cos, sin) = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1), table.to(dtype)[:, None].unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
    # One complex product is several times faster on a CPU than real ones.
    pairs, rotation = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2))), torch.view_as_complex(table.to(dtype))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)
