"""The console command, and what an installed package holds."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from text_to_image.__main__ import COMMANDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def run(*arguments):
    command = [sys.executable, "-m", "text_to_image", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_commands_are_listed():
    for arguments in ((), ("--help",)):
        done = run(*arguments)
        assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    done = run("paint")
    assert done.returncode == 2 and "paint" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name):
    probe = f"""
import sys
from text_to_image.__main__ import dispatch
try:
    dispatch(["{name}", "--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: dalle {name}") and done.stdout.endswith("False\n")


def test_opening_the_default_model_imports_nothing_that_takes_seconds():
    probe = """
import sys
import torch
before = {*sys.modules}
from text_to_image import TextToImage
TextToImage.from_pretrained(device="cpu").model.open("prior", "scorer", "decoder")
print({"torch._dynamo", "sympy", "transformers", "diffusers", "accelerate"} & {*sys.modules} - before)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "set()\n")


def test_the_console_command_is_there():
    module, _, function = PROJECT["project"]["scripts"]["dalle"].partition(":")
    assert module == "text_to_image.__main__" and function == "main"


def test_the_list_of_packages_is_complete():
    roots = {"dalle_pytorch": ROOT / "DALLE-pytorch", "diffusion": ROOT, "text_to_image": ROOT}
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for name, root in roots.items()
        for init in (root / name).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found | {"text_to_image.default_model"}


def test_the_default_model_is_packaged_whole():
    """All files but the card, the benchmark's judge and the recipe."""
    folder = ROOT / SETUPTOOLS["package-dir"]["text_to_image.default_model"]
    patterns = SETUPTOOLS["package-data"]["text_to_image.default_model"]
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    listed = subprocess.run(["git", "ls-files", folder], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    files = {ROOT / line for line in listed.splitlines()}
    left_out = {Path("README.md"), Path("judge"), Path("recipe")}
    assert packaged == {
        f for f in files if left_out.isdisjoint({f.relative_to(folder), *f.relative_to(folder).parents})
    }
