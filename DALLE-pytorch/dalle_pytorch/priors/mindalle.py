"""MinDALLE: the prior of Kakao Brain's minDALL-E, a GPT over text tokens and image tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.cache import KVCache, TransformerCache, plain_cache
from dalle_pytorch.nn.cross_attention import CrossAttention
from dalle_pytorch.pretrained import records_config
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.loop import sample_text
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.mindalle import MinDALLETokenizer
from dalle_pytorch.vae.base import ImageTokenizer


class Block(nn.Module):
    """Causal attention and a feed-forward part, each after a norm; `approximate` is GELU as x · σ(1.702 x)."""

    def __init__(self, dim: int, heads: int, ff_dim: int, attn_bias: bool, ff_bias: bool, approximate: bool):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads, attn_bias)
        self.proj_in, self.proj_out = nn.Linear(dim, ff_dim, bias=ff_bias), nn.Linear(ff_dim, dim, bias=ff_bias)
        self.approximate = approximate

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        """(b, n, dim) → (b, n, dim), a sequence from its start or one token that continues the cache."""
        h = self.ln1(x)
        keys, values = cache.update(*self.attn.keys_and_values(h))
        x = x + self.attn(h, keys, values, is_causal=x.shape[1] > 1, prompts=cache.prompts)
        h = self.proj_in(self.ln2(x))
        return x + self.proj_out(h * torch.sigmoid(1.702 * h) if self.approximate else F.gelu(h))


class MinDALLE(Prior[TransformerCache]):
    """minDALL-E's transformer: the text and its padding, then the image tokens. The last text position predicts the
    first image token.

    Args:
        dim, depth, heads, ff_dim: width, layers, attention heads, and width of the feed-forward parts.
        num_text_tokens, text_seq_len: the text's vocabulary, and its length, padding included.
        pad_token: the text token that pads, which is looked at like any other.
        attn_bias, mlp_bias, gelu_use_approx: by the names of minDALL-E's settings, see `Block`.
        image_fmap_size, num_image_tokens: checked against the VAE's where given.
    """

    tokenizer_type = MinDALLETokenizer
    sampling = SamplingSettings(top_k=256)
    blocks: Sequence[Block]

    @records_config
    def __init__(
        self, *, vae: ImageTokenizer, dim: int, depth: int, heads: int, ff_dim: int, num_text_tokens: int,
        pad_token: int, text_seq_len: int = 64, attn_bias: bool = True, mlp_bias: bool = True,
        gelu_use_approx: bool = False, image_fmap_size: int = 16, num_image_tokens: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.set_vae(vae, image_fmap_size, num_image_tokens)
        self.text_seq_len, self.num_text_tokens, self.pad_token = text_seq_len, num_text_tokens, pad_token
        self.max_length = text_seq_len + self.image_seq_len
        self.tok_emb_txt, self.pos_emb_txt = nn.Embedding(num_text_tokens, dim), nn.Embedding(text_seq_len, dim)
        self.tok_emb_img = nn.Embedding(self.num_image_tokens, dim)
        self.pos_emb_img = nn.Embedding(self.image_seq_len, dim)
        blocks = (Block(dim, heads, ff_dim, attn_bias, mlp_bias, gelu_use_approx) for _ in range(depth))
        self.add_module("blocks", nn.ModuleList(blocks))
        self.ln_f = nn.LayerNorm(dim)
        self.head_txt = nn.Linear(dim, num_text_tokens, bias=False)
        self.head_img = nn.Linear(dim, self.num_image_tokens, bias=False)

    def check_text(self, text: Tensor) -> None:
        self.check_vocabulary(text, self.num_text_tokens)

    def _embed_image(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self.tok_emb_img(tokens) + self.pos_emb_img.weight[start : start + tokens.shape[1]]

    def _run(self, x: Tensor, cache: TransformerCache) -> Tensor:
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, layer.kv)
        return self.ln_f(x)

    def _hidden(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, TransformerCache]:
        """Hidden states (b, n, dim) of a text, or the first tokens of one, and of image tokens but a grid's last."""
        x = self.tok_emb_txt(text) + self.pos_emb_txt.weight[: text.shape[1]]
        x = torch.cat((x, self._embed_image(image_tokens[:, : self.image_seq_len - 1])), dim=1)
        cache = plain_cache([block.attn.heads for block in self.blocks], x.shape[:2], x)
        return self._run(x, cache), cache

    def _image_logits(self, hidden: Tensor) -> Tensor:
        return self.head_img(hidden).float()

    def text_logits(self, text: Tensor) -> Tensor:
        """Logits (b, n, num_text_tokens) of the text token after each of the first n (b, n)."""
        return self.head_txt(self._hidden(text, text[:, :0])[0]).float()

    def next_token_logits(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        return self._image_logits(self._hidden(text, image_tokens)[0][:, self.text_seq_len - 1 :])

    def prefill(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, TransformerCache]:
        hidden, cache = self._hidden(text, image_tokens)
        return self._image_logits(hidden[:, -1]), cache

    def step(self, tokens: Tensor, position: int, cache: TransformerCache) -> Tensor:
        return self._image_logits(self._run(self._embed_image(tokens[:, None], position), cache)[:, 0])

    def unconditional_text(self, text: Tensor) -> Tensor:
        return torch.full_like(text, self.pad_token)

    def generate_texts(
        self, tokenizer: Tokenizer, text: str | None = None, *, top_k: float | None = None, top_p: float | None = None,
        temperature: float = 1.0, seed: int | None = None,
    ) -> tuple[Tensor, list[str]]:  # fmt: skip
        """Continues `text`: tokens (1, text_seq_len), and the text in a list. Raises `UsageError` without one: nothing
        predicts the first token."""
        begin = torch.tensor([tokenizer.encode(text or "")], dtype=torch.long, device=self.device)
        if not begin.numel():
            raise UsageError("a MinDALLE continues a text; give its first words")
        settings = SamplingSettings(top_k, top_p, temperature)
        tokens = sample_text(self, begin, lambda tokens: self.text_logits(tokens)[:, -1], settings, seed)
        return tokens, [tokenizer.decode(row) for row in tokens]
