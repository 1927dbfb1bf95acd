"""DiscreteVAE: the convolutional VAE of DALLE-pytorch, trained with Gumbel-softmax."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.vae.base import ImageTokenizer


class ResBlock(nn.Module):
    """Two 3 × 3 convolutions and a 1 × 1 one, with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(), nn.Conv2d(channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class DiscreteVAE(ImageTokenizer):
    """The dVAE of arXiv:2102.12092 with DALLE-pytorch's options and defaults.

    `DiscreteVAE(vae_path)` opens a `vae.pt` of DALLE-pytorch.

    Args:
        image_size, num_tokens, num_layers, channels: see `ImageTokenizer`.
        codebook_dim, num_resnet_blocks, hidden_dim: width of a codebook row; number and width of the convolutions.
        smooth_l1_loss: smooth L1 instead of mean squared error as reconstruction loss.
        temperature: of the Gumbel-softmax (arXiv:1611.01144).
        straight_through: one-hot codes in the forward pass, the gradient of the soft ones in the backward pass.
        reinmax: second-order accurate gradient for `straight_through` (arXiv:2304.08612).
        kl_div_loss_weight: weight of the KL divergence of the codes' distribution from the uniform one.
        normalization: mean and standard deviation of each channel for normalising images, or None.
    """

    mean: Tensor
    std: Tensor

    @records_config
    def __init__(
        self, *, image_size: int = 256, num_tokens: int = 512, codebook_dim: int = 512, num_layers: int = 3,
        num_resnet_blocks: int = 0, hidden_dim: int = 64, channels: int = 3, smooth_l1_loss: bool = False,
        temperature: float = 0.9, straight_through: bool = False, reinmax: bool = False,
        kl_div_loss_weight: float = 0.0,
        normalization: Sequence[Sequence[float]] | None = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):  # fmt: skip
        super().__init__()
        if num_layers < 1 or image_size % 2**num_layers:
            raise UsageError(f"image_size must be a multiple of 2^num_layers = {2**num_layers}, got {image_size}")
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.channels = channels
        self.smooth_l1_loss = smooth_l1_loss
        self.temperature = temperature
        self.straight_through = straight_through
        self.reinmax = reinmax
        self.kl_div_loss_weight = kl_div_loss_weight

        mean, std = ((0.0,) * channels, (1.0,) * channels) if normalization is None else normalization
        self.register_buffer("mean", torch.tensor(mean[:channels], device="cpu").view(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std[:channels], device="cpu").view(channels, 1, 1), persistent=False)

        down = [channels] + [hidden_dim] * num_layers
        up = [hidden_dim if num_resnet_blocks else codebook_dim] + [hidden_dim] * num_layers
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(down[i], hidden_dim, 4, 2, 1), nn.ReLU()) for i in range(num_layers)),
            *(ResBlock(hidden_dim) for _ in range(num_resnet_blocks)),
            nn.Conv2d(hidden_dim, num_tokens, 1),
        )
        self.decoder = nn.Sequential(
            *([nn.Conv2d(codebook_dim, hidden_dim, 1)] if num_resnet_blocks else []),
            *(ResBlock(hidden_dim) for _ in range(num_resnet_blocks)),
            *(nn.Sequential(nn.ConvTranspose2d(up[i], hidden_dim, 4, 2, 1), nn.ReLU()) for i in range(num_layers)),
            nn.Conv2d(hidden_dim, channels, 1),
        )
        self.codebook = nn.Embedding(num_tokens, codebook_dim)

    @property
    def codebook_weight(self) -> Tensor:
        return self.codebook.weight

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (b, channels, h, w) in the normalised space, [-1, 1] by default, of tokens (b, side²)."""
        return self.decoder(self.embed(tokens))

    def decode_embeddings(self, rows: Tensor) -> Tensor:
        return self.decoder(rows) * self.std + self.mean

    def encode_logits(self, image: Tensor) -> Tensor:
        return self.encoder((image - self.mean) / self.std)

    def forward(
        self,
        image: Tensor,
        return_loss: bool = False,
        return_recons: bool = False,
        return_logits: bool = False,
        return_recon_loss: bool = False,
        temp: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Reconstructs images (b, channels, h, w) in [0, 1] through sampled codes.

        Returns the reconstruction in the normalised space; with `return_logits` the encoder's logits; with
        `return_loss` the training loss (with `return_recons` a tuple of it and the reconstruction); with
        `return_recon_loss`, as in older releases, the reconstruction loss alone. `temp` overrides the temperature.
        """
        target = (image - self.mean) / self.std
        logits = self.encoder(target)
        if return_logits:
            return logits
        codes = self._sample_codes(logits, self.temperature if temp is None else temp)
        out = self.decoder(torch.einsum("bnhw,nd->bdhw", codes, self.codebook.weight))
        if not (return_loss or return_recon_loss):
            return out
        loss = F.smooth_l1_loss(target, out) if self.smooth_l1_loss else F.mse_loss(target, out)
        if return_recon_loss:
            return loss
        # Upstream sums over images and positions.
        log_probabilities = logits.log_softmax(dim=1)
        divergence = (log_probabilities.exp() * (log_probabilities + math.log(self.num_tokens))).sum()
        loss = loss + self.kl_div_loss_weight * divergence
        return (loss, out) if return_recons else loss

    def _sample_codes(self, logits: Tensor, temperature: float) -> Tensor:
        """Gumbel-softmax weights of the codes, (b, num_tokens, h, w), one-hot with `straight_through`."""
        codes = F.gumbel_softmax(logits, tau=temperature, dim=1, hard=self.straight_through)
        if not (self.straight_through and self.reinmax):
            return codes
        # Algorithm 2 of the ReinMax paper.
        codes = codes.detach()
        plain = logits.softmax(dim=1)
        middle = (codes + (logits / temperature).softmax(dim=1)) / 2
        middle = ((middle.log() - logits).detach() + logits).softmax(dim=1)
        gradient = 2 * middle - plain / 2
        return gradient - gradient.detach() + codes
