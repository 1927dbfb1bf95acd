"""What tests share: where recorded reference outputs are, and tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT.parent / "shared" / "parity"

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def parity():
    """The path of a recorded reference case, `parity("unet/adm_superres")`; the test is skipped where it is not to be had."""

    def find(name: str) -> Path:
        path = PARITY / name
        if not path.exists():
            pytest.skip(f"the reference outputs {name} are not beside this checkout")
        return path

    return find


@pytest.fixture
def tiny_vae():
    """A VQGAN of 16×16 tokens for 64-pixel pictures, untrained and always the same."""
    from dalle_pytorch.vae.vqgan import VQGanVAE

    torch.manual_seed(0)
    return VQGanVAE(image_size=64, num_tokens=32, embed_dim=8, z_channels=8, ch=8, ch_mult=(1,), num_res_blocks=1,
                    patch_size=4, mid_attention=False).eval()  # fmt: skip
