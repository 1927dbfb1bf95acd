"""Rotary positions, attention and token shift, each against its definition written out."""

import math

import pytest
import torch

from dalle_pytorch.nn.attention import Attention
from dalle_pytorch.nn.rotary import apply_rotary, rotary_table
from dalle_pytorch.nn.token_shift import TokenShift


def test_rotary_angles():
    """Of 14 channels 4 turn with the place in the text, 4 with the row, 4 with the column, and 2 not at all."""
    table = rotary_table(dim_head=14, text_len=2, image_fmap_size=4)
    text_frequencies, pixel_frequencies = (1.0, 10000 ** (-2 / 4)), (math.pi, 5 * math.pi)
    grid = (-1, -1 / 3, 1 / 3, 1)
    places = [(0, -10, -10), (1, -10, -10), *((8192, row, column) for row in grid for column in grid)]
    angles = []
    for text, row, column in places:
        in_text = [text * frequency for frequency in text_frequencies]
        in_image = [place * frequency for place in (row, column) for frequency in pixel_frequencies]
        angles.append([*in_text, *in_image, 0.0])
    angles = torch.tensor(angles, dtype=torch.float64)
    expected = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
    torch.testing.assert_close(table, expected, atol=1e-3, rtol=0)  # 8192 has 11 bits left of single precision


def rotated(x, table):
    """(b, n, channels) with pairs of channels (u, v) turned to (u cos - v sin, u sin + v cos)."""
    cos, sin = table.unbind(-1)
    u, v = x[..., ::2], x[..., 1::2]
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2)


def test_rotation_turns_neighbouring_channels(monkeypatch):
    x, table = torch.randn(2, 7, 3, 14), rotary_table(14, 3, 2)
    expected = torch.stack([rotated(head, table) for head in x.unbind(2)], dim=2)
    torch.testing.assert_close(apply_rotary(x, table), expected)
    # Without complex numbers, as torch.compile wants it.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rotary(x, table), expected)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention(qk_norm):
    """Queries, keys and also values are rotated; norms of queries and keys come before."""
    torch.manual_seed(0)
    attention, table = Attention(dim=12, heads=2, dim_head=14, qk_norm=qk_norm), rotary_table(14, 3, 2)
    if qk_norm:
        torch.nn.init.normal_(attention.q_norm.weight)
        torch.nn.init.normal_(attention.k_norm.weight)
    x = torch.randn(2, 7, 12)
    q, k, v = (attention.to_qkv.weight @ x.mT).mT.chunk(3, dim=-1)
    heads = []
    for head in range(2):
        q_, k_, v_ = (part[..., 14 * head : 14 * head + 14] for part in (q, k, v))
        if qk_norm:
            q_ = q_ / q_.square().mean(-1, keepdim=True).sqrt() * attention.q_norm.weight
            k_ = k_ / k_.square().mean(-1, keepdim=True).sqrt() * attention.k_norm.weight
        q_, k_, v_ = (rotated(part, table) for part in (q_, k_, v_))
        scores = q_ @ k_.mT / 14**0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v_)
    expected = torch.cat(heads, dim=-1) @ attention.to_out.weight.T + attention.to_out.bias
    torch.testing.assert_close(attention(x, table), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [3, 4, 7, 12])
def test_token_shift(length):
    """Of 8 channels a text token takes 4 from the one before, an image token 2 from above and 2 from the left."""
    x = torch.randn(2, length, 8)
    expected = x.clone()
    for place in range(length):
        if place < 3:
            expected[:, place, :4] = x[:, place - 1, :4] if place else 0
            continue
        row, column = divmod(place - 3, 3)
        expected[:, place, :2] = x[:, place - 3, :2] if row else 0
        expected[:, place, 2:4] = x[:, place - 1, 2:4] if column else 0
    assert torch.equal(TokenShift(text_len=3, image_fmap_size=3)(x), expected)
