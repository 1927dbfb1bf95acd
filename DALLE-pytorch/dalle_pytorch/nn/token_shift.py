"""Token shift: each token takes some channels of its neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenShift(nn.Module):
    """Replaces some channels of each token by those of its neighbours.

    A text token takes the first half of its channels from the token before it; an image token takes a quarter from
    the token above and a quarter from the one to the left, zeros at the border.
    """

    def __init__(self, text_len: int, image_fmap_size: int):
        super().__init__()
        self.text_len = text_len
        self.image_fmap_size = image_fmap_size

    def forward(self, x: Tensor) -> Tensor:
        """Shifts a sequence (b, n, dim) that starts with <bos>."""
        side = self.image_fmap_size
        text, image = x[:, : self.text_len], x[:, self.text_len :]
        before, stays = text.chunk(2, dim=-1)
        parts = [torch.cat((F.pad(before, (0, 0, 1, -1)), stays), dim=-1)]
        if length := image.shape[1]:
            above, left, *stays = image.chunk(4, dim=-1)
            above = F.pad(above, (0, 0, side, 0))[:, :length]
            left = F.pad(left, (0, 0, 1, -1))
            first_column = torch.arange(length, device=x.device) % side == 0
            left = left.masked_fill(first_column[:, None], 0)
            parts.append(torch.cat((above, left, *stays), dim=-1))
        return torch.cat(parts, dim=1)

    def fill(self, x: Tensor, ring: Tensor) -> None:
        """Stores in `ring` (b, side, width) the last image tokens, unshifted, of a sequence (b, n, dim)."""
        positions = torch.arange(x.shape[1] - self.text_len)[-self.image_fmap_size :]
        ring[:, positions % self.image_fmap_size] = x[:, self.text_len + positions, : ring.shape[-1]]

    def step(self, x: Tensor, ring: Tensor, position: int) -> Tensor:
        """Shifts the one image token (b, 1, dim) at `position` of the sequence and stores it in `ring`."""
        width = ring.shape[-1]
        column = (position - self.text_len) % self.image_fmap_size
        # The slot to be written holds the token above, the slot before it the one to the left.
        slot, token = ring[:, column], x[:, 0]
        left = ring[:, column - 1, width // 2 :] if column else torch.zeros_like(slot[:, width // 2 :])
        shifted = torch.cat((slot[:, : width // 2], left, token[:, width:]), dim=-1)
        slot.copy_(token[:, :width])
        return shifted[:, None]
