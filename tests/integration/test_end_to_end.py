"""benchmarks/end_to_end.py: what it counts and scales, and what it refuses."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import end_to_end

from dalle_pytorch.errors import UsageError
from dalle_pytorch.sampling.settings import SamplingSettings


class CountedPrior(torch.nn.Linear):
    """Notes the sequences that it evaluates."""

    image_seq_len, text_seq_len = 16, 3

    def __init__(self):
        super().__init__(1, 1)
        self.seen = []

    def tokenize(self, texts):
        return torch.ones(len(texts), 3, dtype=torch.long)

    def unconditional_text(self, text):
        return torch.zeros_like(text)

    def next_token_logits(self, text, image_tokens):
        self.seen.append((len(text), image_tokens.shape[1], int(text.sum())))


def test_whole_sequences_are_scaled_to_all_positions_and_candidates():
    """A clock that ticks once between its readings: a second for each of the positions."""
    prior, ticks = CountedPrior(), iter(range(100))
    pipe = SimpleNamespace(model=SimpleNamespace(prior=prior), sampling=lambda: SamplingSettings(cond_scale=2.0))
    settings = end_to_end.EndToEndSettings(rows=2, positions=4, num_images=12)
    assert end_to_end.whole_sequences(pipe, settings, lambda: next(ticks)) == 16 * 12 / 2
    assert prior.seen == [(2, at, 6 * conditional) for at in (2, 6, 10, 14) for conditional in (1, 0)]


def test_measures_that_are_none():
    with pytest.raises(UsageError, match="measures: expected whole, start, demo, got speed"):
        end_to_end.main(["--measures", "speed"])


def test_both_ways_of_the_default_model(tmp_path, capsys):
    end_to_end.main(["--measures", "whole", "--num_images", "2", "--diffuse", "1", "--rows", "1", "--positions", "1",
                     "--steps", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    whole = json.loads((tmp_path / "end_to_end.json").read_text())["whole"]
    assert set(whole["ours"]) == set(whole["theirs"]) == {"tokens", "diffusion"}
    assert whole["ratio"] == pytest.approx(sum(whole["theirs"].values()) / sum(whole["ours"].values()))
    assert "| best of 2, 1 diffused |" in capsys.readouterr().out


def test_a_command_that_fails_is_told():
    with pytest.raises(UsageError, match="ended with exit code 3"):
        end_to_end.run_command("-c", "raise SystemExit(3)")
