"""benchmarks/reversible_memory.py: reversible layers keep no activations, so that depth costs none."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/reversible_memory.py", "--depths", "4", "16", "--batch_size", "4",
               "--device", "cpu", "--output", tmp_path / "table.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 + 4
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    used = {(row["layers"], row["depth"]): row["activations_mib"] for row in rows}
    assert used["plain", 16] > 3 * used["plain", 4]
    # Twelve layers more cost plain ones 12 × 7 MiB; reversible ones their gradients, held twice, and allocator noise.
    assert used["reversible", 16] - used["reversible", 4] < 0.1 * (used["plain", 16] - used["plain", 4])
    assert used["reversible", 16] < used["plain", 4] * 1.5


def test_mistakes_are_one_line(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/reversible_memory.py", "--depths", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--depths" in done.stderr and done.stderr.count("\n") == 1
