"""benchmarks/sampling.py: the limit that it compares with, and what it refuses."""

import subprocess
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import dalle_pytorch_166
import sampling

from dalle_pytorch.errors import UsageError
from dalle_pytorch.priors.dalle import DALLE


def test_limit_is_that_of_a_count_by_hand(tiny_vae):
    prior = DALLE(vae=tiny_vae, dim=8, depth=3, heads=2, dim_head=2, num_text_tokens=9, text_seq_len=5)
    weights = 3 * (8 * 12 + 4 * 8 + 8 * 64 + 32 * 8) + 8 * 32
    keys = sum(6 + position for position in range(256)) * 3 * 4
    # Multiply-adds that cost nothing, and bytes that cost nothing.
    assert sampling.least_seconds(prior, 7, 1e99, 2.0) == pytest.approx((256 * weights + 7 * 2 * keys) * 4 / 2)
    assert sampling.least_seconds(prior, 7, 2.0, 1e99) == pytest.approx(7 * (256 * weights + 2 * keys) / 2)


def test_measures_that_are_none():
    with pytest.raises(UsageError, match="measures: expected batches"):
        sampling.main(["--measures", "speed"])


def test_installs_once(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    dalle_pytorch_166.install(tmp_path)
    assert "--no-deps" in commands[0] and "dalle-pytorch==1.6.6" in commands[0]
    (tmp_path / "dalle_pytorch").mkdir()
    dalle_pytorch_166.install(tmp_path)
    assert len(commands) == 1
