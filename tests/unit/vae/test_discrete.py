"""DiscreteVAE's draws in training, and its two ranges of pixels."""

import torch
import torch.nn.functional as F
from torch import nn

from dalle_pytorch.vae.discrete import DiscreteVAE


class Repeat(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits[None, :, None, None].expand(-1, -1, *image.shape[-2:])


def make_vae(**settings):
    torch.manual_seed(0)
    return DiscreteVAE(**{"image_size": 16, "num_tokens": 12, "codebook_dim": 8, "num_layers": 2, "hidden_dim": 8,
                          **settings})  # fmt: skip


def test_straight_through_decodes_one_code_and_has_the_gradient_of_the_mixture():
    vae, image = make_vae(straight_through=True, temperature=0.7), torch.rand(2, 3, 16, 16)
    bias = vae.encoder[-1].bias
    logits = vae(image, return_logits=True)
    torch.manual_seed(5)
    mixture = F.gumbel_softmax(logits, tau=0.7, dim=1)
    tokens = mixture.argmax(1).flatten(1)
    torch.manual_seed(5)
    out = vae(image)
    torch.testing.assert_close(out, vae.decode(tokens))

    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    one_hot = F.one_hot(tokens, 12).float().transpose(1, 2).view_as(mixture).requires_grad_()
    decoded = vae.decoder(torch.einsum("bnhw,nd->bdhw", one_hot, vae.codebook.weight))
    (at_codes,) = torch.autograd.grad(decoded.square().sum(), one_hot)
    (expected,) = torch.autograd.grad(mixture, bias, at_codes)
    torch.testing.assert_close(gradient, expected)


def test_mixture_is_decoded_without_straight_through():
    vae, image = make_vae(temperature=0.7), torch.rand(2, 3, 16, 16)
    torch.manual_seed(5)
    mixture = F.gumbel_softmax(vae(image, return_logits=True), tau=0.7, dim=1)
    torch.manual_seed(5)
    expected = vae.decoder(torch.einsum("bnhw,nd->bdhw", mixture, vae.codebook.weight))
    torch.testing.assert_close(vae(image), expected)


def test_reinmax_gradient_is_exact_for_a_quadratic_function():
    """Which is what second-order accuracy means (arXiv:2304.08612): the mean over draws of its gradient is that of the
    expectation. The plain straight-through gradient is another."""
    scores, curvature = torch.tensor([0.5, -0.3, 0.1, 1.0]), torch.tensor([1.0, -2.0, 3.0, 0.5])
    logits = torch.tensor([0.2, -0.5, 0.8, 0.0], requires_grad=True)
    (exact,) = torch.autograd.grad(((scores + curvature) * logits.softmax(0)).sum(), logits)
    means = {}
    for reinmax in (True, False):
        vae = make_vae(num_tokens=4, codebook_dim=4, straight_through=True, reinmax=reinmax)
        # A VAE whose output is the codes that it draws, at the same logits everywhere.
        vae.encoder, vae.decoder = Repeat(logits), nn.Identity()
        nn.init.eye_(vae.codebook.weight)
        torch.manual_seed(0)
        codes = vae(torch.zeros(1, 3, 600, 600), temp=1.0)
        value = (scores.view(4, 1, 1) * codes + curvature.view(4, 1, 1) * codes**2).sum() / 600**2
        (means[reinmax],) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(means[True], exact, atol=0.01, rtol=0)
    assert (means[False] - exact).abs().max() > 0.05


def test_decoded_images_are_in_0_1():
    vae = make_vae(normalization=((0.5, 0.25, 0.0), (0.5, 0.25, 2.0)))
    torch.nn.init.normal_(vae.decoder[-1].weight)
    tokens = torch.randint(12, (2, 16))
    normalised = vae.decode(tokens)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    expected = (normalised * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    assert torch.equal(vae.decode_image(tokens), expected)
    assert normalised.min() < 0 and 0 < expected.float().mean() < 1
