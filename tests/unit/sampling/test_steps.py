"""Priors prepared for sampling: the same steps with fewer kernels, and weights that are packed."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling.loop import prefill
from dalle_pytorch.sampling.steps import prepared
from dalle_pytorch.vae.discrete import DiscreteVAE

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of PyTorch has no MKL")


def make_dalle(**options) -> DALLE:
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=24, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=4)
    sizes = {"dim": 36, "num_text_tokens": 30, "text_seq_len": 6, "depth": 3, "heads": 2, "dim_head": 16}
    return DALLE(vae=vae, **{**sizes, **options}).eval()


def steps(dalle: DALLE, rows: int, count: int = 3) -> torch.Tensor:
    text = torch.randint(1, 30, (1, 6), generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, 40, (rows, count), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        cache = prefill(dalle, text).cache.gather(torch.zeros(rows, dtype=torch.long), dalle.total_seq_len)
        return torch.stack([dalle.step(tokens[:, i], i, cache) for i in range(count)])


class Kernels(TorchDispatchMode):
    """Counts the operators that compute or copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).split(".")[-1]
        if not func.is_view and name not in ("_unsafe_view", "detach", "promote_types"):
            self.names.append(name)
        return func(*args, **kwargs or {})


@needs_mkl
@pytest.mark.parametrize("options", [{}, {"share_input_output_emb": True}, {"shared_ff_ids": (0, 0, 1)}])
def test_prepared_priors_take_the_same_steps(options):
    dalle = make_dalle(**options)
    fast = prepared(dalle)
    for rows in (5, 1, 5):
        torch.testing.assert_close(steps(fast, rows), steps(dalle, rows))
    assert fast is prepared(dalle) and fast is not dalle and fast.vae is dalle.vae
    # Weights are shared, not copied.
    ours = {name: tensor.data_ptr() for name, tensor in dalle.state_dict().items()}
    assert ours == {name: tensor.data_ptr() for name, tensor in fast.state_dict().items()}
    assert not any("Packed" in type(module).__name__ for module in dalle.modules())


@needs_mkl
def test_changed_weights_are_packed_anew():
    dalle = make_dalle()
    before = steps(prepared(dalle), 2)
    with torch.no_grad():
        dalle.transformer.layers[1].ff.fn.proj_in.weight.mul_(3)
    after = steps(prepared(dalle), 2)
    torch.testing.assert_close(after, steps(dalle, 2))
    assert (after - before).abs().max() > 1e-3
    dalle.load_state_dict(make_dalle().state_dict(), assign=True)
    assert torch.equal(steps(prepared(dalle), 2), before)


def test_what_cannot_be_packed_is_left_alone(monkeypatch):
    dalle = make_dalle()
    assert prepared(dalle.double()) is dalle
    monkeypatch.setattr("dalle_pytorch.sampling.steps.MAX_PACKED", 1000)
    dalle = make_dalle()
    assert prepared(dalle) is dalle
    copy.deepcopy(dalle)


@needs_mkl
@pytest.mark.parametrize("options, rows, per_layer", [({}, 1, 18), ({}, 16, 23), ({"qk_norm": True}, 16, 31)])
def test_kernels_of_a_step(options, rows, per_layer, monkeypatch):
    """A layer runs few kernels, and weights are packed in the first step alone."""
    monkeypatch.setattr("dalle_pytorch.nn.cache.SHARED_LENGTH", 1)
    dalle = make_dalle(**options)
    counts = {}
    for depth in (1, 3):
        fast = prepared(make_dalle(depth=depth, **options))
        text, tokens = torch.ones(1, 6, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        with torch.no_grad():
            cache = prefill(fast, text).cache.gather(tokens, dalle.total_seq_len)
            for position in range(3):
                with Kernels() as kernels:
                    fast.step(tokens, position, cache)
        counts[depth] = kernels.names
        assert not any("reorder" in name for name in kernels.names)
    assert len(counts[3]) - len(counts[1]) <= 2 * per_layer, counts[1]
