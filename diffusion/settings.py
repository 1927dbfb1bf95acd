"""What the training of a diffusion is told. Names are guided-diffusion's; torch is not imported here."""

from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, again, option
from dalle_pytorch.training.settings import ImageSettings, TrainingSettings
from diffusion.config import DiffusionConfig, UNetConfig


@dataclass
class UNetArchitecture(Settings):
    """The `UNetConfig` of a training: cheaper than guided-diffusion's networks."""

    title = "model"

    image_size: int = option(
        UNetConfig.image_size, "side in pixels of the images it samples", low=1, flags=["--large_size"]
    )
    num_channels: int = option(UNetConfig.num_channels, "width at the finest level", low=32)
    channel_mult: list[float] = option([1, 1.5, 2], "widths of the levels, in units of --num_channels", nargs="+")
    num_res_blocks: int = option(1, "residual blocks per level", low=1)
    attention_resolutions: list[int] = option([], "sides of feature maps with attention, besides the middle", nargs="*")
    num_heads: int = option(UNetConfig.num_heads, "attention heads", low=1)
    num_head_channels: int = option(UNetConfig.num_head_channels, "width of a head, in place of --num_heads")
    num_heads_upsample: int = option(UNetConfig.num_heads_upsample, "heads of the second half, if different")
    use_new_attention_order: bool = option(UNetConfig.use_new_attention_order, "layout of the attention's weights")
    use_scale_shift_norm: bool = option(UNetConfig.use_scale_shift_norm, "the timestep scales and shifts")
    resblock_updown: bool = option(False, "resample inside residual blocks")
    patch_size: int = option(4, "fold this many pixels, each way, into channels (guided-diffusion: 1)", low=1)
    dropout: float = option(UNetConfig.dropout, low=0, high=1)
    learn_sigma: bool = option(UNetConfig.learn_sigma, "learn the variance too")


@dataclass
class DiffusionSettings(Settings):
    """The `DiffusionConfig` of a training, which is of residuals unless told otherwise."""

    title = "diffusion"

    diffusion_steps: int = option(DiffusionConfig.diffusion_steps, low=1)
    noise_schedule: str = option("cosine", choices=["linear", "cosine"])
    predict_xstart: bool | None = option(None, "the same as --predict x_0, or with False as eps")
    sigma_small: bool = option(DiffusionConfig.sigma_small, "the smaller of the two fixed variances")
    rescale_timesteps: bool = option(True, "timesteps of a thousand")
    residual_std: float | None = option(0.15, "standard deviation of residuals, of images in [-1, 1]", low=0,
                                        above=True)  # fmt: skip


@dataclass
class TrainDiffusionSettings(DiffusionSettings, UNetArchitecture, ImageSettings, TrainingSettings):
    """Trains a diffusion decoder for the tokens of a VAE, or with --super_res a network that enlarges images, and
    writes it as a native folder. The flags of guided-diffusion are accepted too.

        python diffusion/train.py --image_text_folder pictures --vae_path runs/vae/vae --output_dir runs/decoder
        python upscale.py --model_path runs/decoder/decoder --input outputs/a_red_seven_on_brick

        python diffusion/train.py --image_text_folder pictures --super_res --image_size 1024 --output_dir runs/super_res
        python upscale.py --super_res_path runs/super_res/super_res --input outputs/a_red_seven_on_brick

        python diffusion/train.py --image_text_folder pictures --resume_checkpoint runs/decoder/decoder --distill 2 \\
            --learning_rate 1e-4 --output_dir runs/student
        python upscale.py --model_path runs/student/decoder --steps quad2 --sampler ddim --input outputs
    """

    title = "what is learned"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/decoder"))
    steps: int | None = again(TrainingSettings, "steps", 12_000)
    batch_size: int = again(TrainingSettings, "batch_size", 16)
    learning_rate: float = again(TrainingSettings, "learning_rate", 1e-3)
    ema_decay: float = again(TrainingSettings, "ema_decay", 0.999)
    weight_decay: float = again(TrainingSettings, "weight_decay", 0.0)
    num_workers: int = again(TrainingSettings, "num_workers", 2)

    vae_path: str | None = option(None, "VAE whose tokens are decoded: a native folder, a vae.pt, a VQGAN",
                                  part="VAE")  # fmt: skip
    vqgan_config_path: str | None = option(None, "model.yaml of a VQGAN")
    super_res: bool = option(False, "learn to enlarge images instead")
    small_size: int | None = option(None, "with --super_res, side of the small image in pixels (default: a quarter)",
                                    low=1)  # fmt: skip
    crop_size: int = option(128, "train mostly on crops of this many pixels", low=1)
    resume_checkpoint: str | None = option(None, "initial weights: a native folder, whose settings replace those of "
                                                 "the options, or a .pt of guided-diffusion, which they describe",
                                           metavar="PATH")  # fmt: skip
    emb_condition: bool = option(True, "condition on the codebook rows of the tokens")
    emb_output_dims: int = option(64, "channels by which they join the middle", low=1)
    low_res_condition: bool = option(True, "condition on the image that the VAE decodes")
    distill: int | None = option(None, "learn to draw in this number of passes what the decoder of "
                                       "--resume_checkpoint, a native folder, draws in four times as many", low=1,
                                 high=1000, metavar="PASSES")  # fmt: skip
    class_cond: bool = option(False, "must be False: classes are not supported")
    predict: str | None = option(None, "what the network predicts; residual is the difference of x_0 from the VAE's "
                                       "image, or from the small one (default: that with such an image, else x_0)",
                                 choices=["residual", "x_0", "eps"])  # fmt: skip
    use_kl: bool = option(False, "the variational bound as the loss")
    schedule_sampler: str | None = option(None, "how often each timestep is drawn (default: quadratic for residuals, "
                                                "as upscale.py visits them, else uniform)",
                                          choices=["uniform", "quadratic", "loss-second-moment"])  # fmt: skip
    timestep_respacing: str = option("", "must be empty: upscale.py takes --steps instead")
    microbatch: int = option(-1, "split --batch_size into batches of this many images, to save memory")
    use_fp16: bool = option(False, "the same as --fp16")

    def __post_init__(self) -> None:
        """Translates guided-diffusion's settings into ours, and fills in what depends on others."""
        super().__post_init__()
        if self.class_cond:
            raise UsageError("--class_cond is not supported: the network is conditioned on tokens, not on classes")
        if self.timestep_respacing:
            raise UsageError("--timestep_respacing does not apply to training; upscale.py takes --steps")
        if not self.super_res and self.small_size:
            raise UsageError("--small_size needs --super_res")
        if self.distill is not None and (self.super_res or not self.resume_checkpoint):
            raise UsageError("--distill needs --resume_checkpoint, the native folder of a decoder")
        has_image = self.low_res_condition or self.super_res
        if self.predict_xstart is not None and self.predict is None:
            self.predict = "x_0" if self.predict_xstart else "eps"
        self.predict = self.predict or ("residual" if has_image else "x_0")
        if self.predict == "residual" and not has_image:
            raise UsageError("--predict residual needs --low_res_condition: residuals are of the VAE's image")
        self.predict_xstart = self.predict == "x_0"
        self.schedule_sampler = self.schedule_sampler or ("quadratic" if self.predict == "residual" else "uniform")
        self.residual_std = self.residual_std if self.predict == "residual" else None
        if self.microbatch > 0:
            if self.batch_size % self.microbatch:
                raise UsageError(f"--microbatch {self.microbatch} does not divide --batch_size {self.batch_size}")
            self.ga_steps *= self.batch_size // self.microbatch
            self.batch_size = self.microbatch
        if self.use_fp16:
            self.mixed_precision = "fp16"
