"""Losses that judge an image as eyes would: a discriminator of patches, and the features of a CLIP.

Both are VQGAN's (Esser et al. 2021, arXiv:2012.09841), which has LPIPS where a CLIP is here: pixels alone are content
with the mean of all that could be there, which is a blur.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dalle_pytorch.clip.base import CLIPModel, feature_distance
from dalle_pytorch.files.images import resize
from dalle_pytorch.training.codebook import sum_over_processes


class EqualizedConv2d(nn.Module):
    """A 4 × 4 convolution whose weights are scaled when used, so that all layers learn alike (Karras et al. 2018).

    Discriminator and autoencoder share an optimizer, and a learning rate that suits the one is too fast for the other.
    Weights are stored at a deviation of 0.1: at a rate of 1e-3 a step is a hundredth of them, as pix2pix has it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(out_channels, in_channels, 4, 4))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.gain, self.stride = 10 * math.sqrt(2 / (in_channels * 16)), stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, padding=1)


class PatchDiscriminator(nn.Sequential):
    """The PatchGAN of Isola et al. 2017: images (b, channels, h, w) in [-1, 1] → a score of every patch, (b, 1, …).

    With 2, 3 and 4 `num_layers` a patch has 34, 70 and 142 pixels a side. Its norms are of groups, not of the batch:
    an image's score is then the same whatever is beside it, on this process or on others.
    """

    def __init__(self, channels: int = 3, ch: int = 64, num_layers: int = 3):
        widths = [ch * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [EqualizedConv2d(channels, ch, 2), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            layers += [
                EqualizedConv2d(widths[i - 1], widths[i], 2 if i < num_layers else 1),
                nn.GroupNorm(math.gcd(32, widths[i]), widths[i]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, EqualizedConv2d(widths[-1], 1, 1))


class Adversary(nn.Module):
    """The hinge losses of a discriminator and of the autoencoder that is to deceive it.

    One backward pass serves both: the autoencoder's term sees the discriminator's weights as constants, the
    discriminator's sees the output as one.

    The autoencoder's term is weighed so that its gradient is `weight` times as long as the reconstruction's. VQGAN
    compares the two at the last layer's weights; here it is at the output itself, one layer on: parameters that are
    wrapped, or split over processes, are left alone, and the lengths are those of the whole batch of all processes.
    VQGAN's weight of 0.8 strews speckles over images that are not yet learned well; 0.2 does not.
    """

    def __init__(self, discriminator: PatchDiscriminator, weight: float = 0.2):
        super().__init__()
        self.discriminator, self.weight = discriminator, weight

    def forward(self, images: Tensor, output: Tensor, reconstruction: Tensor,
                strength: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss to add, and metrics, for images and outputs (b, c, h, w) in [0, 1].

        `reconstruction` is the loss so far, a function of `output`; `strength` in [0, 1] scales the weight.
        """
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        deceit = -functional_call(self.discriminator, constants, (output * 2 - 1,)).float().mean()
        scores = self.discriminator(torch.cat((images, output.detach())) * 2 - 1).float()
        real, drawn = scores.chunk(2)
        discrimination = (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2
        ratio = _gradient_length(reconstruction, output) / _gradient_length(deceit, output).clamp(min=1e-6)
        weight = self.weight * strength * ratio.clamp(max=1e4)
        metrics = {"discriminator": discrimination, "deceit": deceit, "adversary_weight": weight}
        return weight * deceit + discrimination, {name: value.detach() for name, value in metrics.items()}

    def idle(self) -> Tensor:
        """A loss of 0 that depends on every parameter, which data-parallel training insists on."""
        return 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


def _gradient_length(loss: Tensor, output: Tensor) -> Tensor:
    # Of the sum over pixels, not their mean: half precision has no numbers as small as a pixel's share of a mean.
    scale = torch.full_like(loss, output.numel())
    (gradient,) = torch.autograd.grad(loss, output, scale, retain_graph=True)
    return sum_over_processes(gradient.detach().float().square().sum()).sqrt()


class PerceptualLoss:
    """The distance of two images for a CLIP: the squared distance of the normalised features of each patch, the
    mean over patches and over all layers of the visual transformer.

    Pictures larger than the CLIP's are compared in a window of its size, at random: fine detail is what it is for.
    It is no module, so that the CLIP is neither trained nor saved with what is.
    """

    def __init__(self, clip: CLIPModel):
        self.clip = clip.eval().requires_grad_(False)

    def __call__(self, images: Tensor, output: Tensor) -> Tensor:
        """A scalar in [0, 4], of images and outputs (b, 3, h, w) about [0, 1]."""
        if self.clip.device != output.device:
            self.clip.to(output.device)
        size = self.clip.image_size
        top, left = (int(torch.randint(max(1, side - size + 1), ())) for side in output.shape[-2:])
        pair = (images[..., top : top + size, left : left + size] for images in (images, output))
        wanted, found = (self.clip.visual_features(resize(images, size)) for images in pair)
        return feature_distance(wanted, found).mean()
