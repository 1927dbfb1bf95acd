"""The recorded attention weights are those that the layers attend with."""

import pytest
import torch
from torch import nn

from dalle_pytorch.clip.trainable import AttentionPool
from dalle_pytorch.nn.attention import Attention
from dalle_pytorch.nn.attention_weights import record_attention
from dalle_pytorch.nn.cache import KVCache
from dalle_pytorch.nn.cross_attention import CrossAttention
from dalle_pytorch.nn.masks import make_pattern
from dalle_pytorch.nn.transformer import Transformer


def identity_values(layer: Attention) -> None:
    """Makes the values of a layer its inputs, and its output the mean of the heads."""
    dim = layer.to_out.out_features
    with torch.no_grad():
        layer.to_qkv.weight[2 * layer.heads * dim :] = torch.eye(dim).repeat(layer.heads, 1)
        layer.to_out.weight[:] = torch.eye(dim).repeat(1, layer.heads) / layer.heads
        layer.to_out.bias.zero_()


@pytest.mark.parametrize("causal, pattern, masked", [
    (True, None, False), (False, None, True), (True, "axial_row", False), (True, "sparse", False)
])  # fmt: skip
def test_the_output_is_made_of_these_weights(causal, pattern, masked):
    torch.manual_seed(0)
    layer = Attention(8, 3, 8, causal, pattern=make_pattern(pattern, 4, 4) if pattern else None)
    identity_values(layer)
    x, key_mask = torch.randn(2, 20, 8), torch.rand(2, 20) < 0.7 if masked else None
    plain = layer(x, key_mask=key_mask)
    with record_attention(layer) as layers:
        out = layer(x, key_mask=key_mask)
    (weights,) = layers
    assert weights.shape == (2, 3, 20, 20) and torch.equal(out, plain)
    torch.testing.assert_close(out, weights.mean(1) @ x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 20))
    assert not causal or not weights.triu(1).any()
    assert key_mask is None or not weights.permute(0, 3, 1, 2)[~key_mask].any()


def test_a_step_that_continues_a_cache():
    torch.manual_seed(0)
    layer, x = Attention(8, 2, 4), torch.randn(1, 5, 8)
    with record_attention(layer) as whole:
        layer(x)
    cache = KVCache((1, 2, 5, 4), x.device, x.dtype)
    with record_attention(layer) as parts:
        layer(x[:, :4], cache=cache)
        layer(x[:, 4:], cache=cache)
    torch.testing.assert_close(parts[0], whole[0][:, :, :4, :4])
    torch.testing.assert_close(parts[1], whole[0][:, :, 4:])


def test_a_step_that_continues_shared_prompts():
    torch.manual_seed(0)
    layer, x, rows = Attention(8, 2, 4), torch.randn(2, 5, 8), torch.tensor([0, 0, 1, 1])
    with record_attention(layer) as whole:
        out = layer(x)
    prompts = KVCache((2, 2, 3, 4), x.device, x.dtype)
    layer(x[:, :3], cache=prompts)
    cache = KVCache((4, 2, 2, 4), x.device, x.dtype, torch.stack((prompts.keys, prompts.values)))
    with record_attention(layer) as parts:
        for position in (3, 4):
            torch.testing.assert_close(layer(x[rows, position, None], cache=cache)[:, 0], out[rows, position])
    torch.testing.assert_close(parts[1], whole[0][rows, :, 4:])


def test_attention_to_another_sequence():
    torch.manual_seed(0)
    layer, x, text = CrossAttention(8, 2), torch.randn(4, 1, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])[:, None, None]
    keys, values = layer.keys_and_values(text)
    with record_attention(layer) as layers:
        out = layer(x, keys, values, mask)
    assert layers[0].shape == (2, 2, 2, 3)
    torch.testing.assert_close(layer.out_proj((layers[0] @ values).transpose(1, 2).reshape(4, 1, 8)), out)
    pool, patches = AttentionPool(8, 2), torch.randn(3, 6, 8)
    with record_attention(pool) as layers:
        pool(patches)
    assert layers[0].shape == (3, 2, 1, 6)


def test_layers_are_recorded_in_the_order_of_their_calls_and_no_longer_than_asked():
    torch.manual_seed(0)
    transformer, x = Transformer(dim=8, depth=3, heads=2, dim_head=4, shared_attn_ids=[0, 1, 0]), torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="enough"), record_attention(nn.ModuleList([transformer])) as layers:
        transformer(x)
        raise RuntimeError("enough")
    transformer(x)
    assert len(layers) == 3
    first, second, third = layers
    assert torch.equal(first, transformer_weights(transformer, 0, x)) and not torch.equal(first, third)
    assert not torch.equal(first, second)


def transformer_weights(transformer, number, x):
    branch = transformer.layers[number].attn
    with record_attention(branch) as layers:
        branch(x)
    return layers[0]
