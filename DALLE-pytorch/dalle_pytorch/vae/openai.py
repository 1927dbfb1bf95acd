"""OpenAI's discrete VAE, the image side of the first DALL-E (Ramesh et al. 2021, arXiv:2102.12092).

image (b, 3, h, w) ─▶ encoder ─▶ logits (b, num_tokens, h / 8, w / 8) ─▶ tokens
tokens ─▶ one-hot, 1×1 convolution: the rows of a codebook ─▶ decoder ─▶ image
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.upstream import State, rename, strip_prefix
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.vae.base import ImageTokenizer

# The logit-Laplace distribution needs pixels in the open interval (0, 1): they are mapped to [0.1, 0.9].
PIXEL_MARGIN = 0.1

# The published names, in which groups, blocks and convolutions are counted from 1.
_UPSTREAM_NAMES = (
    (r"\.w$", ".weight"), (r"\.b$", ".bias"), (r"^blocks\.input\.", "conv_in."),
    (r"^blocks\.output\.conv\.", "conv_out."), (r"\.id_path\.", ".skip."),
    (r"^blocks\.group_(\d+)\.block_(\d+)\.", r"groups.\1.\2."), (r"\.res_path\.conv_(\d+)\.", r".convs.\1."),
)  # fmt: skip


class Block(nn.Module):
    """(b, in, h, w) → (b, out, h, w): four convolutions beside a skip connection, the branch scaled by `gain`."""

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int], gain: float):
        super().__init__()
        hidden = out_channels // 4
        widths = [in_channels, hidden, hidden, hidden, out_channels]
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2) for i, kernel in enumerate(kernels)
        )
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        return self.skip(x) + self.gain * h


def _groups(widths: Sequence[int], blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    """One group of `blocks` blocks for each step from a width to the next."""
    gain = 1 / (blocks * (len(widths) - 1)) ** 2
    return nn.ModuleList(
        nn.Sequential(*(Block(width if i == 0 else out, out, kernels, gain) for i in range(blocks)))
        for width, out in pairwise(widths)
    )


class Stack(nn.Module):
    """A convolution, groups of blocks with a change of resolution between them, a 1×1 convolution."""

    def __init__(self, conv_in: nn.Conv2d, groups: nn.ModuleList, conv_out: nn.Conv2d, resample: nn.Module):
        super().__init__()
        self.conv_in = conv_in
        self.groups = groups
        self.conv_out = conv_out
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Maps the output of `conv_in` to that of `conv_out`."""
        for i, group in enumerate(self.groups):
            x = group(x if i == 0 else self.resample(x))
        return self.conv_out(F.relu(x))


class OpenAIDiscreteVAE(ImageTokenizer):
    """The published dVAE: 8192 tokens, f = 8, made for 256 pixels.

    `OpenAIDiscreteVAE(encoder_path, decoder_path)` opens `encoder.pkl` and `decoder.pkl`, `OpenAIDiscreteVAE()` those
    that OpenAI publishes; with the sizes below by name, a new one is made.

    Args:
        image_size, num_tokens, codebook_dim, channels: see `ImageTokenizer`.
        encoder_dim, decoder_dim: width of the convolutions at full resolution; 2, 4 and 8 times that below.
        encoder_blocks, decoder_blocks: blocks at each of the four resolutions.
    """

    @records_config
    def __init__(
        self, *, image_size: int = 256, num_tokens: int = 8192, codebook_dim: int = 128, encoder_dim: int = 256,
        decoder_dim: int = 256, encoder_blocks: int = 2, decoder_blocks: int = 2, channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        if image_size % 8:
            raise UsageError(f"image_size must be a multiple of 8, got {image_size}")
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.num_layers = 3
        self.channels = channels
        down = [encoder_dim * times for times in (1, 1, 2, 4, 8)]
        up = [codebook_dim, *(decoder_dim * times for times in (8, 4, 2, 1))]
        self.encoder = Stack(
            nn.Conv2d(channels, encoder_dim, 7, padding=3), _groups(down, encoder_blocks, kernels=(3, 3, 3, 1)),
            nn.Conv2d(down[-1], num_tokens, 1), nn.MaxPool2d(2),
        )  # fmt: skip
        # The second half of the output channels are the scales of the Laplace distributions, for training only.
        self.decoder = Stack(
            nn.Conv2d(num_tokens, codebook_dim, 1), _groups(up, decoder_blocks, kernels=(1, 3, 3, 3)),
            nn.Conv2d(up[-1], 2 * channels, 1), nn.Upsample(scale_factor=2.0),
        )  # fmt: skip

    @property
    def codebook_weight(self) -> Tensor:
        # The decoder's first convolution of each one-hot token.
        weight, bias = self.decoder.conv_in.parameters()
        return weight[:, :, 0, 0].T + bias

    def rename_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename_halves(strip_prefix(state, "enc."), strip_prefix(state, "dec."))

    def encode_logits(self, image: Tensor) -> Tensor:
        return self.encoder(self.encoder.conv_in((1 - 2 * PIXEL_MARGIN) * image + PIXEL_MARGIN))

    def decode_embeddings(self, rows: Tensor) -> Tensor:
        pixels = self.decoder(rows)[:, : self.channels].sigmoid()
        return (pixels - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)


def rename_halves(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> State:
    """The weights of `OpenAIDiscreteVAE` from those of the published encoder and decoder."""
    own: State = {}
    for prefix, half in (("encoder.", encoder), ("decoder.", decoder)):
        for key, tensor in rename(half, _UPSTREAM_NAMES).items():
            own[prefix + re.sub(r"\d+", lambda number: str(int(number[0]) - 1), key)] = tensor
    return own
