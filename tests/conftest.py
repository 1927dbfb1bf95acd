"""What tests share: where recorded reference outputs are, and tiny models."""

from pathlib import Path

import pytest
import torch
from helpers import ROOT

REFERENCES = (ROOT / "tests/golden/data", ROOT.parent / "shared/parity")  # those committed, and the larger set

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def parity():
    """The path of a recorded reference case, `parity("unet/adm_superres")`; a test is skipped where it is not there."""

    def find(name: str) -> Path:
        for folder in REFERENCES:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"the reference outputs {name} are not beside this checkout")

    return find


@pytest.fixture
def tiny_vae():
    """A VQGAN of 16×16 tokens for 64-pixel pictures, untrained and always the same."""
    from dalle_pytorch.vae.vqgan import VQGanVAE

    torch.manual_seed(0)
    return VQGanVAE(image_size=64, num_tokens=32, embed_dim=8, z_channels=8, ch=8, ch_mult=(1,), num_res_blocks=1,
                    patch_size=4, mid_attention=False).eval()  # fmt: skip


@pytest.fixture
def tiny_bundle(tmp_path, tiny_vae):
    """A folder with an untrained prior, its VAE, a CLIP and a tokenizer, as in models/default."""
    from dalle_pytorch.clip.trainable import CLIP
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.tokenizers.hug import train_bpe

    folder = tmp_path / "bundle"
    folder.mkdir()
    tokenizer = train_bpe(["a red seven on brick", "a blue star on wood"] * 4, 64)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = tokenizer.get_vocab_size()
    dalle = DALLE(vae=tiny_vae, dim=32, depth=2, heads=2, dim_head=16, num_text_tokens=words, text_seq_len=12)
    clip = CLIP(
        dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=words, text_enc_depth=1, text_seq_len=12,
        text_heads=1, visual_enc_depth=1, visual_heads=1, visual_image_size=32, visual_patch_size=8,
    )  # fmt: skip
    tiny_vae.save_pretrained(folder / "vae")
    dalle.save_pretrained(folder / "dalle", save_vae=False)
    clip.save_pretrained(folder / "clip")
    return folder
