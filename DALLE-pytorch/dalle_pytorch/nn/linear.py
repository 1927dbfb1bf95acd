"""Linear layers whose weights are kept in the layout that a CPU's matrix product wants, or in 8 bits."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`, of which some outputs can be computed alone."""

    def outputs(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The outputs `start` to `stop` (..., stop - start) of x (..., in_features)."""
        return F.linear(x, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def rows(self, indices: Tensor) -> Tensor:
        """The weights of some outputs, (..., in_features), where they are the embeddings of tokens (...) too."""
        return F.embedding(indices, self.weight)


class PackedLinear(nn.Module):
    """A linear layer that packs its weight for MKL when it is first called, and anew for another number of rows.

    With few rows this is up to twice as fast as `F.linear`, which rearranges the weight in every call.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: tuple[tuple[int, int, int | None], tuple] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)

    def outputs(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Linear`."""
        key = x.numel() // x.shape[-1], start, stop
        packed = self.packed
        if packed is None or packed[0] != key:
            weight, bias = self.weight[start:stop], None if self.bias is None else self.bias[start:stop]
            packed = key, (torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), key[0]), weight, bias, key[0])
            self.packed = packed
        return torch.ops.mkl._mkl_linear(x, *packed[1])

    def rows(self, indices: Tensor) -> Tensor:
        """See `Linear`."""
        return F.embedding(indices, self.weight)


class Int8Linear(nn.Module):
    """A linear layer whose product is one of whole numbers, by FBGEMM, which only CPUs have.

    Each row of the input is divided by its own largest absolute value and rounded to 8 bits; the sums are exact, and
    are multiplied back. So a row's output has the same bits alone and among any others (dynamic quantization by row,
    as in arXiv:2206.01861). Weights take a byte each, and another when packed, with a scale for each output.

    Attributes:
        weight: (out_features, in_features) int8, to be multiplied by `weight_scale` (out_features, 1).
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        # Without VNNI a CPU adds the products of two neighbours in 16 bits, and would cut off what is beyond: 255 times
        # the sum of their weights must be below 2^15, so that sum is at most 127, or 128 when both are rounded up.
        neighbours = F.pad(weight.abs(), (0, 1)).unfold(1, 2, 1).sum(dim=-1)
        scale = (neighbours.amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._packed: dict[tuple[int, int | None], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)

    def outputs(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Linear`."""
        packed = self._packed.get((start, stop))
        if packed is None:
            packed = self._packed[start, stop] = _pack(self.weight[start:stop], self.weight_scale[start:stop])
        largest = x.abs().amax(dim=-1, keepdim=True)
        # The ratio is NaN for a row of zeros: its whole numbers are some or other, and multiplied by 0.
        y = _multiply(x / largest, 1 / 127, 128, packed)
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias[start:stop], y, largest)

    def rows(self, indices: Tensor) -> Tensor:
        """See `Linear`."""
        return F.embedding(indices, self.weight) * F.embedding(indices, self.weight_scale)


def has_int8() -> bool:
    """Whether this build of PyTorch has FBGEMM's product of whole numbers, for this processor."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, _INT8_PRODUCT)


# On 8-bit integers: float32 (b, k) over a scale, plus a zero point, rounded; the sums are multiplied by the scales.
_INT8_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"


def _multiply(x: Tensor, scale: float, zero_point: int, packed: Any) -> Tensor:
    return getattr(torch.ops.quantized, _INT8_PRODUCT)(x, scale, zero_point, packed)


def _pack(weight: Tensor, scale: Tensor) -> Any:
    """FBGEMM's layout of int8 weights (n, k) and their scales (n, 1)."""
    zeros = torch.zeros(len(weight), dtype=torch.long)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            # Quantized tensors are to be removed some day; there is no other way to this product yet.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight * scale, scale[:, 0].double(), zeros, 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine
