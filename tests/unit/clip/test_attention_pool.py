"""AttentionPool against its definition, written out."""

import torch

from dalle_pytorch.clip.trainable import AttentionPool


def test_pool_is_the_attention_of_a_query_over_normalised_tokens():
    torch.manual_seed(0)
    pool = AttentionPool(dim=8, heads=2)
    torch.nn.init.normal_(pool.norm.weight)
    torch.nn.init.normal_(pool.norm.bias)
    x = 3 + 5 * torch.randn(3, 6, 8)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normal = normal * pool.norm.weight + pool.norm.bias
    keys, values = (normal @ pool.to_kv.weight.T).chunk(2, dim=-1)
    heads = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        weights = (keys[..., own] @ pool.query[head, 0] / 4**0.5).softmax(dim=1)  # (3, 6)
        heads.append((weights[..., None] * values[..., own]).sum(1))
    torch.testing.assert_close(pool(x), torch.cat(heads, dim=-1))
