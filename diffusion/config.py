"""Settings of the U-Net and of the diffusion that it is trained with, under guided-diffusion's names.

torch is not imported here, so that a command line can show the defaults at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dalle_pytorch.checks import check_types
from dalle_pytorch.errors import UsageError

MAX_STEPS = 100_000  # of a diffusion
NORM_GROUPS = 32  # of every group norm


@dataclass
class UNetConfig:
    """The architecture of a `UNet`. Raises `UsageError` for values that do not fit together."""

    image_size: int = 256  # side in pixels it is designed for; it accepts any side that its levels divide
    num_channels: int = 64  # at the finest level
    num_res_blocks: int = 2  # per level
    channel_mult: Sequence[float] = (1, 2, 3)  # channels of each level, finest first, in multiples of `num_channels`
    attention_resolutions: Sequence[int] = ()  # sides of feature maps, at `image_size`; the middle always attends
    num_heads: int = 4
    num_head_channels: int = -1  # channels per head, in place of `num_heads`
    num_heads_upsample: int = -1  # heads of the decoder half, if different
    dropout: float = 0.0
    learn_sigma: bool = False  # twice the output channels: the variance too (Nichol & Dhariwal 2021)
    class_cond: bool = False  # condition on ImageNet classes
    use_scale_shift_norm: bool = True  # the timestep scales and shifts features instead of being added
    resblock_updown: bool = True  # resample inside residual blocks instead of by convolutions
    use_new_attention_order: bool = True  # see `AttentionBlock`
    emb_condition: bool = False  # condition on codebook rows
    emb_input_dims: int = 256  # channels of a codebook row
    emb_output_dims: int = 512  # channels that join the middle
    emb_stride: int = 2  # side of the token grid in multiples of the middle's
    low_res_condition: bool = False  # condition on an image of any size
    patch_size: int = 1  # fold squares of this side into channels
    gated: bool = False  # one more output channel, the gate of `Denoiser`

    def __post_init__(self) -> None:
        _check(self)
        self.channel_mult = tuple(self.channel_mult)
        self.attention_resolutions = tuple(self.attention_resolutions)
        if any(count < 1 and count != -1 for count in (self.num_head_channels, self.num_heads_upsample)):
            raise UsageError("expected num_head_channels and num_heads_upsample of 1 or more, or -1")
        if any(side < 1 for side in self.attention_resolutions):
            raise UsageError(f"expected attention_resolutions of 1 or more, got {self.attention_resolutions}")
        if any(width % NORM_GROUPS for width in self.widths):
            factors, widths = (", ".join(f"{x:g}" for x in values) for values in (self.channel_mult, self.widths))
            raise UsageError(f"num_channels {self.num_channels} times channel_mult {factors} is {widths}: expected "
                             f"multiples of {NORM_GROUPS}")  # fmt: skip
        if self.emb_condition and self.emb_output_dims % NORM_GROUPS:
            raise UsageError(f"expected emb_output_dims in multiples of {NORM_GROUPS}, got {self.emb_output_dims}")

    @property
    def widths(self) -> list[int]:
        """Channels at each level."""
        return [int(mult * self.num_channels) for mult in self.channel_mult]

    @property
    def time_dim(self) -> int:
        """Width of the embedding of a timestep."""
        return 4 * self.num_channels

    @property
    def downscale(self) -> int:
        """Pixels per pixel of the middle's feature map, each way."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


@dataclass
class DiffusionConfig:
    """How a U-Net is trained, with guided-diffusion's defaults. `Denoiser` says what each setting does."""

    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False
    residual_std: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.diffusion_steps > MAX_STEPS:
            raise UsageError(f"expected diffusion_steps of at most {MAX_STEPS:,}, got {self.diffusion_steps:,}")


def _check(config: "UNetConfig | DiffusionConfig") -> None:
    try:
        check_types(type(config), vars(config))
    except ValueError as error:
        raise UsageError(error) from None
