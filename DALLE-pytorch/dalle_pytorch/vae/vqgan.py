"""VQGAN: a convolutional autoencoder whose bottleneck is a grid of codes (Esser et al. 2021, taming-transformers).

    image (b, 3, h, w) ─Encoder─▶ (b, z, side, side) ─quantizer─▶ tokens (b, side²)
    tokens (b, side²) ─codebook─▶ (b, c, side, side) ─Decoder─▶ image (b, 3, h, w)

Two quantizers, as published: nearest neighbour (VQModel) and Gumbel (GumbelVQ), which scores every code with a
1×1 convolution. The layout and the parameter names are those of the published checkpoints. Two additions are our own:
`patch_size` folds pixels into channels first, which makes the network some ten times cheaper, and `local_encoder`
makes every token a function of its own square of pixels, which is easier for a prior to learn.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.upstream import strip_prefix
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.vae.base import ImageTokenizer

# Blocks


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(b, in, h, w) → (b, out, h, w): two normalised 3×3 convolutions beside a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of (b, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


def _downsample(channels: int) -> nn.Module:
    # The published models pad right and bottom only.
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


def _upsample(channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(resize=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention if `attention`, then a change of resolution."""

    def __init__(
        self, widths: Sequence[int], dropout: float, attention: bool, downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(width) if attention else nn.Identity() for width in widths[1:])
        self.downsample, self.upsample = downsample or nn.Identity(), upsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def _middle(channels: int, dropout: float, attention: bool) -> nn.Module:
    # In this order, which is that of the initial weights under a seed.
    block_1 = ResnetBlock(channels, channels, dropout)
    attn_1 = AttnBlock(channels) if attention else nn.Identity()
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=attn_1, block_2=ResnetBlock(channels, channels, dropout)))


# Encoder and decoder


class Encoder(nn.Module):
    """Pixels (b, in_channels, h, w) in [-1, 1] → (b, z_channels, h / f, w / f)."""

    def __init__(self, *, in_channels, z_channels, ch, ch_mult, num_res_blocks, resolution, attn_resolutions,
                 patch_size, mid_attention, double_z, dropout):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, ch, 3, padding=1)
        self.down = nn.ModuleList()
        side, width = resolution // patch_size, ch
        for i, mult in enumerate(ch_mult):
            widths = [width] + [ch * mult] * num_res_blocks
            width = widths[-1]
            last = i == len(ch_mult) - 1
            self.down.append(Level(widths, dropout, side in attn_resolutions, None if last else _downsample(width)))
            side = side if last else side // 2
        self.mid = _middle(width, dropout, mid_attention)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, z_channels * (2 if double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class LocalEncoder(nn.Module):
    """Pixels (b, in_channels, h, w) in [-1, 1] → (b, z_channels, h / f, w / f), each from its own f × f square alone.

    The published encoder sees the neighbours of a square, and through its normalisation the whole image, so that one
    square has many tokens. Here equal squares have equal tokens whatever their position and surroundings: a prior
    learns a shape once, not once per background.
    """

    def __init__(self, *, in_channels: int, z_channels: int, width: int, downsampling: int, blocks: int = 2):
        super().__init__()
        self.downsampling = downsampling
        self.conv_in = nn.Conv2d(in_channels * downsampling**2, width, 1)
        self.block = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.SiLU(), nn.Conv2d(2 * width, width, 1))
            for _ in range(blocks)
        )
        self.conv_out = nn.Conv2d(width, z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.downsampling))
        for block in self.block:
            x = x + block(F.silu(x))
        return self.conv_out(F.silu(x))


class Decoder(nn.Module):
    """(b, z_channels, side, side) → pixels (b, out_ch, side · f, side · f), about [-1, 1]."""

    def __init__(self, *, out_ch, z_channels, ch, ch_mult, num_res_blocks, resolution, attn_resolutions, patch_size,
                 mid_attention, dropout):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        width = ch * ch_mult[-1]
        side = resolution // patch_size // 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _middle(width, dropout, mid_attention)
        levels = []
        for i in reversed(range(len(ch_mult))):
            widths = [width] + [ch * ch_mult[i]] * (num_res_blocks + 1)
            width = widths[-1]
            levels.append(Level(widths, dropout, side in attn_resolutions, upsample=_upsample(width) if i else None))
            side *= 2
        self.up = nn.ModuleList(reversed(levels))  # numbered from the finest, as published
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_ch * patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


# Quantizers: logits over the codes, of which the largest is the token, and the codebook


class VectorQuantizer(nn.Module):
    """Nearest neighbour: a code's logit is minus its squared distance."""

    def __init__(self, num_tokens: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, embed_dim)

    @property
    def codebook(self) -> Tensor:
        return self.embedding.weight

    def logits(self, z: Tensor) -> Tensor:
        """(b, embed_dim, h, w) → (b, num_tokens, h, w)."""
        codes = self.codebook
        return 2 * F.conv2d(z, codes[..., None, None]) - z.square().sum(1, True) - codes.square().sum(1)[:, None, None]


class GumbelQuantizer(nn.Module):
    """A 1×1 convolution gives the logits (Jang et al. 2017 as GumbelVQ uses it)."""

    def __init__(self, num_tokens: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(embed_dim, num_tokens, 1)
        self.embed = nn.Embedding(num_tokens, embed_dim)

    @property
    def codebook(self) -> Tensor:
        return self.embed.weight

    def logits(self, z: Tensor) -> Tensor:
        """(b, embed_dim, h, w) → (b, num_tokens, h, w)."""
        return self.proj(z)

    @torch.no_grad()
    def set_codebook(self, codes: Tensor) -> None:
        """Sets the codebook (num_tokens, embed_dim), and the projection so that logits are minus squared distances up
        to a term common to all codes."""
        weight, bias = self.proj.parameters()
        self.embed.weight.copy_(codes)
        weight.copy_(2 * codes[..., None, None])
        bias.copy_(-codes.square().sum(1))


# The model


class VQGanVAE(ImageTokenizer):
    """The VQGAN of arXiv:2012.09841.

    `VQGanVAE(vqgan_model_path, vqgan_config_path)` opens taming's checkpoint with its model.yaml, `VQGanVAE()` the
    published one of 1024 codes at f = 16; with sizes by name, a new one is made.

    Args:
        image_size: side in pixels it is trained at; it takes any multiple of f = patch_size · 2^(len(ch_mult) − 1).
        attn_resolutions: sides of the feature maps, from image_size / patch_size down, at which the blocks attend.
        patch_size, mid_attention, local_encoder: see the top of this module. The rest goes by taming's names.
        decoder_only: no encoder, as min-dalle publishes it: images cannot be turned into tokens.
        unit_range: the network's pixels are in [0, 1] as min-dalle's are, not in [-1, 1].
    """

    @records_config
    def __init__(
        self, *, image_size: int = 256, num_tokens: int = 1024, embed_dim: int = 256, z_channels: int = 256,
        ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 4), num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (), in_channels: int = 3, out_ch: int = 3, double_z: bool = False,
        dropout: float = 0.0, gumbel: bool = True, patch_size: int = 1, mid_attention: bool = True,
        local_encoder: bool = False, decoder_only: bool = False, unit_range: bool = False,
    ):  # fmt: skip
        super().__init__()
        if gumbel and embed_dim != z_channels:
            raise UsageError(f"a Gumbel quantizer needs embed_dim = z_channels, got {embed_dim} and {z_channels}")
        if odd := [width for width in (ch * mult for mult in (1, *ch_mult)) if width > 32 and width % 32]:
            raise UsageError(f"ch · ch_mult above 32 must be multiples of 32, got {odd[0]}")
        shared = {
            "z_channels": z_channels, "ch": ch, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks,
            "resolution": image_size, "attn_resolutions": attn_resolutions, "patch_size": patch_size,
            "mid_attention": mid_attention, "dropout": dropout,
        }  # fmt: skip
        self.downsampling = patch_size * 2 ** (len(ch_mult) - 1)
        if image_size % self.downsampling:
            raise UsageError(f"image_size must be a multiple of {self.downsampling}, got {image_size}")
        if decoder_only:
            self.encoder = self.quant_conv = None
        elif local_encoder:
            self.encoder = LocalEncoder(in_channels=in_channels, z_channels=z_channels * (2 if double_z else 1),
                                        width=ch * ch_mult[-1], downsampling=self.downsampling)  # fmt: skip
        else:
            self.encoder = Encoder(in_channels=in_channels, double_z=double_z, **shared)
        self.decoder = Decoder(out_ch=out_ch, **shared)
        if not decoder_only:
            self.quant_conv = nn.Conv2d(z_channels * (2 if double_z else 1), embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.quantize = (GumbelQuantizer if gumbel else VectorQuantizer)(num_tokens, embed_dim)
        self.image_size, self.unit_range = image_size, unit_range
        self.num_tokens = num_tokens
        self.num_layers = self.downsampling.bit_length() - 1
        self.channels = in_channels

    @property
    def codebook_weight(self) -> Tensor:
        return self.quantize.codebook

    def rename_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The weights of the training losses' networks are not needed.
        return {key: tensor for key, tensor in strip_prefix(state, "model.").items() if not key.startswith("loss.")}

    def encode(self, image: Tensor) -> Tensor:
        """The continuous bottleneck (b, embed_dim, h / f, w / f) of images (b, 3, h, w) in [0, 1]. Raises `UsageError`
        if there is a decoder only."""
        if self.encoder is None or self.quant_conv is None:
            raise UsageError("this VQGAN has a decoder only and cannot turn images into tokens; give tokens (.npy), or "
                             "a whole VQGAN with the same codes")  # fmt: skip
        return self.quant_conv(self.encoder(image if self.unit_range else image * 2 - 1))

    def encode_logits(self, image: Tensor) -> Tensor:
        return self.quantize.logits(self.encode(image))

    def most_likely(self, image: Tensor) -> Tensor:
        z = self.encode(image)
        # As many squares at a time as have logits of 4 MiB: they stay in a CPU's cache, which is four times as fast.
        squares = rearrange(z, "b c h w -> (b h w) c 1 1").split(max(1, 2**20 // self.num_tokens))
        tokens = torch.cat([self.quantize.logits(part).flatten(1).argmax(1) for part in squares])
        return tokens.unflatten(0, (len(z), -1))

    def decode_embeddings(self, rows: Tensor) -> Tensor:
        pixels = self.decoder(self.post_quant_conv(rows))
        return pixels if self.unit_range else (pixels + 1) / 2
