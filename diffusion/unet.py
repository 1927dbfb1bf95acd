"""The ADM U-Net (Dhariwal & Nichol 2021, guided-diffusion), optionally conditioned on image tokens and on an image.

Module names give guided-diffusion's parameter names, so that its checkpoints load without translation. Beyond ADM:

- `emb_condition` (the DALL-3 fork of guided-diffusion): codebook rows of a token grid are concatenated in the middle.
- `low_res_condition` (ADM's super-resolution, here also together with tokens): an image is concatenated to the input.
- `patch_size` k folds k×k pixels into channels on the way in and out. At 256 pixels and k = 4 that is about ten times
  cheaper than full resolution, because the two most expensive levels are not needed.
"""

import math
from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.checkpointing import Checkpointed
from dalle_pytorch.pretrained import PretrainedModel
from diffusion.config import NORM_GROUPS, UNetConfig

NUM_CLASSES = 1000  # of the class-conditional ImageNet models


# Blocks


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Cosines and sines of (b,) timesteps, which may be fractional, at `dim / 2` geometric frequencies: (b, dim)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels)


def zero_init(module: nn.Module) -> nn.Module:
    """Zeroes the last layer of a residual branch, so that every block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def match_size(low_res: Tensor, x: Tensor) -> Tensor:
    """`low_res` scaled to the side of `x`, bilinearly as in guided-diffusion."""
    size = x.shape[-2:]
    return low_res if low_res.shape[-2:] == size else F.interpolate(low_res, size, mode="bilinear")


class Downsample(nn.Sequential):
    """Divides the side by `stride`, by a convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2):
        super().__init__(OrderedDict(op=nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)))


class Upsample(nn.Sequential):
    """Doubles the side, then convolves."""

    def __init__(self, channels: int):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv))


class ResBlock(nn.Module):
    """Two convolutions with the timestep in between; `resample` applies to both branches."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, resample: nn.Module | None = None):
        super().__init__()
        self.scale_shift, self.resample = config.use_scale_shift_norm, resample
        time_outputs = out_channels * (2 if self.scale_shift else 1)
        self.in_layers = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, time_outputs))
        self.out_layers = nn.Sequential(
            group_norm(out_channels), nn.SiLU(), nn.Dropout(config.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )  # fmt: skip
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)

        time = self.emb_layers(time)[:, :, None, None]
        norm, activation, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + time)
        return self.skip_connection(x) + conv(dropout(activation(h)))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map.

    `use_new_attention_order` is the layout of the 3·channels outputs of `qkv`: q, k, v outermost (guided-diffusion's
    newer order), or heads outermost, each with its own q, k, v (the older one).
    """

    def __init__(self, channels: int, num_heads: int, config: UNetConfig):
        super().__init__()
        if config.num_head_channels != -1:
            num_heads = channels // config.num_head_channels
        if num_heads < 1 or channels % num_heads:
            raise UsageError(f"cannot divide {channels} channels into {num_heads} attention heads")
        self.num_heads, self.new_order = num_heads, config.use_new_attention_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, h * w))
        if self.new_order:
            q, k, v = qkv.reshape(b, 3, self.num_heads, c // self.num_heads, h * w).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv.reshape(b, self.num_heads, 3, c // self.num_heads, h * w).transpose(-1, -2).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h * w)
        return x + self.proj_out(attended).reshape(b, c, h, w)


class Stage(Checkpointed, nn.Sequential):
    """A sequence of layers; the ResBlocks also take the timestep.

    With `activation_checkpointing` only the input of each layer is kept for the backward pass; the rest is recomputed.
    """

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for layer in self:
            inputs = (x, time) if isinstance(layer, ResBlock) else (x,)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x


# The network


class UNet(PretrainedModel):
    """Predicts eps (or x_0) from a noisy image and its timestep. Arguments are the fields of `UNetConfig`."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = c = UNetConfig(**settings)
        self.config = asdict(c)
        self.image_size, self.downscale = c.image_size, c.downscale
        self.attention_levels = {c.image_size // c.patch_size // side for side in c.attention_resolutions}

        self.time_embed = nn.Sequential(
            nn.Linear(c.num_channels, c.time_dim), nn.SiLU(), nn.Linear(c.time_dim, c.time_dim)
        )
        if c.class_cond:
            self.label_emb = nn.Embedding(NUM_CLASSES, c.time_dim)

        in_channels = (6 if c.low_res_condition else 3) * c.patch_size**2
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, c.widths[0], 3, padding=1))])
        skips = [c.widths[0]]
        for level, width in enumerate(c.widths):
            for _ in range(c.num_res_blocks):
                self.input_blocks.append(self._stage(level, skips[-1], width, c.num_heads))
                skips.append(width)
            if level < len(c.widths) - 1:
                down = ResBlock(width, width, c, nn.AvgPool2d(2)) if c.resblock_updown else Downsample(width, width)
                self.input_blocks.append(Stage(down))
                skips.append(width)

        width = skips[-1]
        if c.emb_condition:
            both = width + c.emb_output_dims
            self.external_block = Downsample(c.emb_input_dims, c.emb_output_dims, c.emb_stride)
            self.middle_block_cond = self._middle(both, width)
        else:
            self.middle_block = self._middle(width, width)

        heads = c.num_heads if c.num_heads_upsample == -1 else c.num_heads_upsample
        self.output_blocks = nn.ModuleList()
        channels = width
        for level, width in reversed(list(enumerate(c.widths))):
            for block in range(c.num_res_blocks + 1):
                stage = self._stage(level, channels + skips.pop(), width, heads)
                channels = width
                if level > 0 and block == c.num_res_blocks:
                    up = (
                        ResBlock(width, width, c, nn.Upsample(scale_factor=2)) if c.resblock_updown else Upsample(width)
                    )
                    stage.append(up)
                self.output_blocks.append(stage)

        out_channels = (6 if c.learn_sigma else 3) + c.gated
        out = zero_init(nn.Conv2d(channels, out_channels * c.patch_size**2, 3, padding=1))
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), out)

    def check_class(self, class_label: int | None) -> None:
        """Raises `UsageError` unless the network is given a class of its own where it is conditioned on one."""
        if self.settings.class_cond != (class_label is not None):
            needs = f"needs an ImageNet class, 0 to {NUM_CLASSES - 1}" if self.settings.class_cond else "takes no class"
            raise UsageError(f"this U-Net {needs}, got {class_label}")
        if class_label is not None and not 0 <= class_label < NUM_CLASSES:
            raise UsageError(f"expected a class from 0 to {NUM_CLASSES - 1}, got {class_label}")

    def _stage(self, level: int, in_channels: int, out_channels: int, heads: int) -> Stage:
        """A residual block, with attention where this level has it."""
        stage = Stage(ResBlock(in_channels, out_channels, self.settings))
        if 2**level in self.attention_levels:
            stage.append(AttentionBlock(out_channels, heads, self.settings))
        return stage

    def _middle(self, channels: int, out_channels: int) -> Stage:
        c = self.settings
        return Stage(
            ResBlock(channels, channels, c),
            AttentionBlock(channels, c.num_heads, c),
            ResBlock(channels, out_channels, c),
        )

    def forward(self, x: Tensor, timesteps: Tensor, image_embeds: Tensor | None = None, low_res: Tensor | None = None,
                y: Tensor | None = None) -> Tensor:  # fmt: skip
        """Noisy images `x` (b, 3, h, w) in [-1, 1] before the noise, and (b,) timesteps → (b, out_channels, h, w).

        `image_embeds` (b, emb_input_dims, rows, columns) are codebook rows, `low_res` (b, 3, h', w') images in [-1, 1],
        `y` (b,) int64 classes. Raises `ValueError` if the network is conditioned on one that is missing or not on one
        that is given, and for sizes that do not fit.
        """
        self._check(x, image_embeds, low_res, y)
        dtype = next(self.parameters()).dtype
        time = self.time_embed(timestep_embedding(timesteps, self.settings.num_channels).to(dtype))
        if y is not None:
            time = time + self.label_emb(y)

        h = x if low_res is None else torch.cat([x, match_size(low_res, x)], dim=1)
        h = F.pixel_unshuffle(h, self.settings.patch_size).to(dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, time)
            skips.append(h)
        if image_embeds is not None:
            h = self.middle_block_cond(torch.cat([h, self.external_block(image_embeds.to(dtype))], dim=1), time)
        else:
            h = self.middle_block(h, time)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(h), self.settings.patch_size).to(x.dtype)

    def _check(self, x: Tensor, image_embeds: Tensor | None, low_res: Tensor | None, y: Tensor | None) -> None:
        c = self.settings
        for flag, conditioned, name, value in (
            ("emb_condition", c.emb_condition, "image_embeds", image_embeds),
            ("low_res_condition", c.low_res_condition, "low_res", low_res),
            ("class_cond", c.class_cond, "y", y),
        ):
            if conditioned != (value is not None):
                raise ValueError(f"a U-Net with {flag}={conditioned} {'needs' if conditioned else 'takes no'} {name}")
        sides = tuple(x.shape[-2:])
        if any(side % self.downscale for side in sides):
            raise UsageError(f"this U-Net expects sides in multiples of {self.downscale} pixels, got {sides}")
        if image_embeds is not None:
            grid, expected = tuple(image_embeds.shape[-2:]), tuple(s // self.downscale * c.emb_stride for s in sides)
            if grid != expected:
                raise ValueError(f"expected a token grid of {expected} for {sides} pixels, got {grid}")
