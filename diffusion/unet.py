"""The ADM U-Net (Dhariwal & Nichol 2021, guided-diffusion), which may be conditioned on image tokens and on a picture.

Module names give guided-diffusion's parameter names, so that its checkpoints fit without translation. Beyond ADM:

- `emb_condition` (the DALL-3 fork of guided-diffusion): codebook rows of a token grid join the middle of the network.
- `low_res_condition` (ADM's super-resolution, usable together with tokens): a picture joins the input.
- `patch_size` k folds every k×k pixels into channels on the way in and out. At 256 pixels and k = 4 that is some ten
  times cheaper than full resolution, because the levels that cost most are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.pretrained import PretrainedModel, records_config

NUM_CLASSES = 1000  # of the class-conditional ImageNet models
NORM_GROUPS = 32


# --------------------------------------------------------------------------------------------------
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
    """Zeroes a residual branch's last layer, so that every block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Halves the side by a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2):
        super().__init__()
        self.op = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the side, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


class ResBlock(nn.Module):
    """Two convolutions with the timestep between; `resample` (`halve` or `double`) happens inside, on both branches."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        dropout: float,
        scale_shift: bool,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
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

    `new_order` says how the 3·channels outputs of `qkv` are laid out: q, k, v outermost (the newer attention order),
    or heads outermost, each with its own q, k, v (the older one).
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} attention heads")
        self.num_heads = num_heads
        self.new_order = new_order
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


class Stage(nn.Sequential):
    """Layers in a row, of which the ResBlocks are also given the timestep.

    With `activation_checkpointing` training keeps each block's input alone, and computes the rest of it again for the
    gradient.
    """

    activation_checkpointing = False

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            inputs = (x, time) if isinstance(layer, ResBlock) else (x,)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x


# --------------------------------------------------------------------------------------------------
# The network


class UNet(PretrainedModel):
    """What a diffusion step asks of its network: noisy picture and timestep in, eps (or x_0) out.

    Arguments carry guided-diffusion's names.

    - `image_size` is the side in pixels the model was designed for; any side its levels divide is accepted.
    - `attention_resolutions` are sides of feature maps, at that `image_size`, with attention in every block; the middle
      always has it.
    - `num_heads` is overruled by `num_head_channels`. `num_heads_upsample`, of the second half, is `num_heads` unless
      given.
    - `learn_sigma` doubles the output channels: the second half places the variance between its bounds (Improved DDPM).
    - `emb_condition`, with `emb_input_dims` (channels of the codebook) and `emb_output_dims` (channels that join the
      middle): `image_embeds` are wanted, a grid `emb_stride` times as fine as the middle's feature map.
    - `low_res_condition`: a picture `low_res`, of any size, is wanted.
    - `patch_size` k works on k×k pixels folded into channels.
    - `gated` adds one output channel, the gate of `Denoiser`.
    """

    @records_config
    def __init__(
        self,
        image_size: int = 256,
        num_channels: int = 64,
        num_res_blocks: int = 2,
        channel_mult: Sequence[float] = (1, 2, 3),
        attention_resolutions: Sequence[int] = (),
        num_heads: int = 4,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        dropout: float = 0.0,
        learn_sigma: bool = False,
        class_cond: bool = False,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = True,
        emb_condition: bool = False,
        emb_input_dims: int = 256,
        emb_output_dims: int = 512,
        emb_stride: int = 2,
        low_res_condition: bool = False,
        patch_size: int = 1,
        gated: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.learn_sigma = learn_sigma
        self.gated = gated
        self.emb_stride = emb_stride
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.out_channels = (6 if learn_sigma else 3) + gated
        # How many pixels one pixel of the middle's feature map covers, each way.
        self.downscale = patch_size * 2 ** (len(channel_mult) - 1)

        time_dim = 4 * num_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if class_cond:
            self.label_emb = nn.Embedding(NUM_CLASSES, time_dim)

        def res_block(in_channels: int, out_channels: int, resample: Callable | None = None) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_dim, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, use_new_attention_order)

        attention_levels = {image_size // patch_size // side for side in attention_resolutions}
        widths = [int(mult * num_channels) for mult in channel_mult]
        if any(width % NORM_GROUPS for width in widths):
            by = ", ".join(f"{mult:g}" for mult in channel_mult)
            raise ValueError(f"num_channels {num_channels} by channel_mult {by} makes {', '.join(map(str, widths))} "
                             f"channels, not multiples of {NORM_GROUPS}")  # fmt: skip
        last = len(widths) - 1
        in_channels = (6 if low_res_condition else 3) * patch_size**2

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, widths[0], 3, padding=1))])
        channels, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, width)]
                channels = width
                if 2**level in attention_levels:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(Stage(*layers))
                skips.append(channels)
            if level < last:
                down = res_block(channels, channels, halve) if resblock_updown else Downsample(channels, channels)
                self.input_blocks.append(Stage(down))
                skips.append(channels)

        if emb_condition:
            both = channels + emb_output_dims
            self.external_block = Downsample(emb_input_dims, emb_output_dims, emb_stride)
            self.middle_block_cond = Stage(res_block(both, both), attention(both, num_heads), res_block(both, channels))
        else:
            self.middle_block = Stage(
                res_block(channels, channels), attention(channels, num_heads), res_block(channels, channels)
            )

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), width)]
                channels = width
                if 2**level in attention_levels:
                    layers.append(attention(channels, heads_up))
                if level > 0 and block == num_res_blocks:
                    layers.append(res_block(channels, channels, double) if resblock_updown else Upsample(channels))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, self.out_channels * patch_size**2, 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        image_embeds: Tensor | None = None,
        low_res: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """`x` (b, 3, h, w), pictures in [-1, 1] under noise, and (b,) timesteps → (b, out_channels, h, w).

        `image_embeds` (b, emb_input_dims, rows, columns) are codebook rows, `low_res` (b, 3, h', w') pictures in
        [-1, 1], `y` (b,) int64 classes; each is given exactly where the model is conditioned on it. Raises `ValueError`
        otherwise, and where sizes do not fit.
        """
        self._check(x, image_embeds, low_res, y)
        time = self.time_embed(timestep_embedding(timesteps, self.num_channels).to(self.time_embed[0].weight.dtype))
        if y is not None:
            time = time + self.label_emb(y)
        if low_res is not None:
            low_res = F.interpolate(low_res, x.shape[-2:], mode="bilinear")
            x = torch.cat([x, low_res], dim=1)

        h = F.pixel_unshuffle(x, self.patch_size).to(self.out[2].weight.dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, time)
            skips.append(h)
        if image_embeds is not None:
            h = self.middle_block_cond(torch.cat([h, self.external_block(image_embeds.to(h.dtype))], dim=1), time)
        else:
            h = self.middle_block(h, time)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(h), self.patch_size).to(x.dtype)

    def _check(self, x: Tensor, image_embeds: Tensor | None, low_res: Tensor | None, y: Tensor | None) -> None:
        for flag, name, given in (
            ("emb_condition", "image_embeds", image_embeds),
            ("low_res_condition", "low_res", low_res),
            ("class_cond", "y", y),
        ):
            if self.config[flag] != (given is not None):
                verdict = f"{name} is wanted" if self.config[flag] else f"{name} cannot be used"
                raise ValueError(f"this U-Net has {flag}={self.config[flag]}: {verdict}")
        sides = tuple(x.shape[-2:])
        if any(side % self.downscale for side in sides):
            raise ValueError(f"this U-Net takes sides that are multiples of {self.downscale} pixels, not {sides}")
        if image_embeds is not None:
            given, wanted = tuple(image_embeds.shape[-2:]), tuple(s // self.downscale * self.emb_stride for s in sides)
            if given != wanted:
                raise ValueError(f"a picture of {sides} pixels goes with a token grid of {wanted}, not {given}")
