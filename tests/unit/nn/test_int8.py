"""`Int8Linear`: exact sums, each row by itself."""

import pytest
import torch
from helpers import run_python
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_pytorch.nn.linear import Int8Linear, Linear, has_int8

pytestmark = pytest.mark.skipif(not has_int8(), reason="this build of PyTorch has no FBGEMM for this processor")


def make_linear(inputs: int, outputs: int, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(inputs, outputs, bias=bias)


def expected(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """The same sums of whole numbers in 64 bits."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    whole = (x / largest * 127).round().long() @ layer.weight.long().T
    y = whole.double() * layer.weight_scale[:, 0].double() / 127 * largest.double()
    return (y if layer.bias is None else y + layer.bias.double()).float()


EXTREMES = {
    "all the most": lambda i: torch.ones_like(i),
    "all the least": lambda i: -torch.ones_like(i),
    "by turns": lambda i: 1 - 2 * (i % 2),
    "in pairs": lambda i: 1 - 2 * (i // 2 % 2),
    "one alone": lambda i: (i == 5).long(),
}


@pytest.mark.parametrize("inputs", [1, 7, 64, 513])
@pytest.mark.parametrize("weights", EXTREMES)
def test_sums_are_exact_where_16_bits_would_be_too_few(inputs, weights):
    """The products of neighbours are added in 16 bits on some processors."""
    layer, i = make_linear(inputs, 5), torch.arange(inputs)
    with torch.no_grad():
        layer.weight.copy_(EXTREMES[weights](i).float())
    x = torch.stack([EXTREMES[name](i).float() * 3 for name in EXTREMES if name != "one alone"])
    int8 = Int8Linear(layer)
    torch.testing.assert_close(int8(x), expected(int8, x))
    torch.testing.assert_close(int8(x), layer(x).detach(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("inputs, outputs, bias", [(96, 40, True), (37, 5, False), (256, 1024, True)])
def test_a_row_is_the_same_bits_alone_and_among_others(inputs, outputs, bias):
    layer = Int8Linear(make_linear(inputs, outputs, bias))
    x = torch.randn(70, inputs) * torch.logspace(-3, 3, 70)[:, None]
    together = layer(x)
    torch.testing.assert_close(together, expected(layer, x))
    for rows in (1, 2, 3, 8, 33):
        assert torch.equal(layer(x[:rows]), together[:rows])
        assert torch.equal(layer(x[-rows:, None]), together[-rows:, None])


def test_outputs_are_near_those_of_float32():
    linear = make_linear(512, 256, bias=False)
    layer, x = Int8Linear(linear), torch.randn(64, 512)
    y = layer(x)
    with torch.no_grad():
        assert 1e-4 < (y - linear(x)).std() / linear(x).std() < 0.02
        # Each output and each row has a scale of its own.
        linear.weight[3] *= 1024
    x[5] *= 1024
    y[:, 3] *= 1024
    y[5] *= 1024
    assert torch.equal(Int8Linear(linear)(x), y)


def test_some_outputs_and_rows():
    linear = make_linear(24, 50)
    layer, x = Int8Linear(linear), torch.randn(3, 24)
    assert torch.equal(layer.outputs(x, 10), layer(x)[:, 10:])
    assert torch.equal(layer.outputs(x, stop=10), layer(x)[:, :10])
    indices = torch.tensor([[4, 0], [49, 4]])
    torch.testing.assert_close(layer.rows(indices), linear.rows(indices).detach(), rtol=0, atol=0.005)


def test_rows_of_zeros_and_of_what_is_not_finite():
    layer = Int8Linear(make_linear(16, 4))
    x = torch.randn(4, 16)
    x[1], x[2, 3], x[3, 3] = 0, torch.nan, torch.inf
    y = layer(x)
    assert torch.equal(y[:1], layer(x[:1])) and torch.equal(y[1], layer.bias)
    assert not y[2:].isfinite().any()


def test_bytes_and_kernels():
    layer = Int8Linear(make_linear(64, 128))
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == 64 * 128 + 2 * 4 * 128
    assert not list(layer.parameters())
    x = torch.randn(2, 64)
    layer(x)
    with Kernels() as kernels:
        layer(x)
    assert len(kernels.names) == 5, kernels.names


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_nothing_is_said_of_what_pytorch_will_remove():
    made = "from dalle_pytorch.nn.linear import Int8Linear; Int8Linear(torch.nn.Linear(8, 8))"
    code = f"import torch; {made}(torch.ones(1, 8))"
    done, _ = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_engine_of_quantized_tensors_is_left_as_it_was():
    engine = torch.backends.quantized.engine
    layer = Int8Linear(nn.Linear(8, 8))
    layer(torch.ones(1, 8))
    assert torch.backends.quantized.engine == engine
