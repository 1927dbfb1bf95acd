"""What tests share: where things are, and recorded cases."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
UNET_CASES = ("adm_tokens_64_style", "adm_tokens_256_style", "adm_superres", "adm_fixed_variance_4000")
CONDITIONS = ("image_embeds", "low_res")


def run_python(*arguments):
    """A new interpreter, run to its end in the repository's root, and the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_case(folder):
    """Flags, recorded tensors and those of them that condition the network."""
    golden = load_file(folder / "golden.safetensors")
    flags = json.loads((folder / "case.json").read_text())["flags"]
    return flags, golden, {name: golden[name] for name in CONDITIONS if name in golden}


def assert_same_weights(ours, reference):
    ours, reference = ours.state_dict(), reference.state_dict()
    assert ours.keys() == reference.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, reference[name])] == []


def assert_matches(ours, reference):
    """Within 1e-4 of the reference's largest magnitude."""
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def leave_group() -> NoReturn:
    """Ends a process of a group of gloo's whose results are written, without tearing anything down: gloo's threads may
    outlive the group, and then abort the interpreter at its end."""
    torch.distributed.barrier()
    os._exit(0)
