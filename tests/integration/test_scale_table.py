"""The table of docs/scale.md: its formulas against the model itself."""

import pytest
import torch
from helpers import ROOT

from benchmarks.scale_table import Prior, table
from dalle_pytorch.nn.transformer import Transformer


def make_prior(**sizes):
    return Prior(**{"dim": 256, "depth": 2, "heads": 4, "dim_head": 32, "text_tokens": 63, "image_tokens": 256,
                    "vocabulary": 100, "codebook": 64} | sizes)  # fmt: skip


def test_activations_are_what_autograd_keeps():
    """Bytes that one more layer keeps under bf16 autocast, weights and their 16-bit copies aside."""
    prior = make_prior()

    def kept(depth):
        torch.manual_seed(0)
        model = Transformer(dim=256, depth=depth, heads=4, dim_head=32, text_len=64, image_fmap_size=16,
                            shift_tokens=True, rotary_emb=True)  # fmt: skip
        storages = {}

        def pack(tensor):
            if tensor.shape[:1] == (1,) or 320 in tensor.shape:  # not weights
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(1, 320, 256, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(x)
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    # The norm of q and k, which a CPU does in pieces, is left out of both.
    expected = prior.layer_activations() / prior.tokens - 2 * 2 * 4 * 32
    assert (kept(2) - kept(1)) / 320 == pytest.approx(expected, rel=0.03)


def test_operations_are_six_for_each_weight_and_token():
    prior = make_prior(dim=2048, depth=20, heads=16, dim_head=64)
    in_layers = 20 * prior.layer_parameters
    assert 6 * in_layers * prior.tokens < prior.flops("nothing") < 6.6 * in_layers * prior.tokens
    assert prior.flops("checkpointing") == pytest.approx(prior.flops("nothing") * 4 / 3, rel=0.01)


def test_rows_of_the_table():
    rows = table(make_prior(), gpus=8, batch=512, mfu=0.4)[2:]
    kinds = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
    assert ("DDP", "reversible") in kinds
    assert ("FSDP", "reversible") not in kinds
    assert len(rows) == 13


def test_table_in_the_documentation_is_the_scripts():
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    for image_tokens in (1024, 256):
        prior = Prior(dim=2048, depth=20, heads=16, dim_head=64, text_tokens=256, image_tokens=image_tokens,
                      vocabulary=16384, codebook=8192)  # fmt: skip
        assert "\n".join(table(prior, gpus=8, batch=512, mfu=0.4)) in page
