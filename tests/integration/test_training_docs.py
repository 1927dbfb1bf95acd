"""docs/training.md means what it says: its commands are run on 2,000 pictures, and the options that it names exist."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from PIL import Image

from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.scenes.__main__ import DrawSettings
from dalle_pytorch.training.commands.train_clip import TrainClipSettings
from dalle_pytorch.training.commands.train_dalle import TrainDalleSettings
from dalle_pytorch.training.commands.train_tokenizer import TrainTokenizerSettings
from dalle_pytorch.training.commands.train_vae import TrainVaeSettings
from dalle_pytorch.training.commands.train_vqgan import TrainVQGanSettings
from diffusion.settings import TrainDiffusionSettings
from text_to_image.commands.generate import GenerateSettings
from text_to_image.commands.upscale import UpscaleSettings

PAGE = (ROOT / "docs/training.md").read_text("utf-8")
SCENES = "DALLE-pytorch/dalle_pytorch/scenes/__main__.py"
SETTINGS = {
    "DALLE-pytorch/train_tokenizer.py": TrainTokenizerSettings,
    "DALLE-pytorch/train_vae.py": TrainVaeSettings,
    "DALLE-pytorch/train_vqgan.py": TrainVQGanSettings,
    "DALLE-pytorch/train_dalle.py": TrainDalleSettings,
    "DALLE-pytorch/train_clip.py": TrainClipSettings,
    "diffusion/train.py": TrainDiffusionSettings,
    "generate.py": GenerateSettings,
    "upscale.py": UpscaleSettings,
    SCENES: DrawSettings,
}
OF_OTHERS = {"--logdir"}  # options on the page that are TensorBoard's

# The last of an option counts: the commands of the page in a few steps.
SHORT = {
    "__main__.py": "--count 2000 --resolution 64",
    "train_tokenizer.py": "",
    "generate.py": "--num_images 4 --keep 2",
    "upscale.py": "--steps 2 --cutn 2 --keep 1",
}
TRAINING = "--steps 2 --batch_size 4 --num_workers 0 --log_every 1 --sample_every 2"


@cache
def script(path: str):
    """The module of a script, which is in no package."""
    spec = importlib.util.spec_from_file_location("page_" + re.sub(r"\W", "_", path), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python` command in the fenced sh blocks of a page, from the script's path on."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.replace("python -m dalle_pytorch.scenes", f"python {SCENES}") for line in lines]
    words = (shlex.split(line, comments=True) for line in lines)
    return [line[1:] for line in words if line[:1] == ["python"]]


def parse(path: str, arguments: list[str]) -> object:
    """The arguments as the script reads them."""
    return SETTINGS[path].parse(arguments) if path in SETTINGS else None


def settings_files(text: str) -> dict[str, str]:
    """The yaml blocks of a page, by the name in the comment that each begins with."""
    return dict(re.findall(r"^```yaml\n# (\S+)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@cache
def options(path: str) -> frozenset[str]:
    """The options that a script's help lists."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse(path, ["--help"])
    return frozenset(re.findall(r"--[\w-]+", text.getvalue()))


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_commands_are_accepted(page, tmp_path, monkeypatch):
    """Each is parsed by its script; an unknown option or a bad value ends the script's parser."""
    text = (ROOT / page).read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for name, body in settings_files(text).items():
        Path(name).write_text(body)
    found = commands(text)
    assert len(found) > 5
    for path, *arguments in found:
        assert (ROOT / path).is_file(), path
        parse(path, arguments)


def test_settings_of_dalle_pytorch(tmp_path):
    """The defaults that the page names are options with such values."""
    path = tmp_path / "upstream.yaml"
    path.write_text(settings_files(PAGE)[path.name])
    arguments = TrainDalleSettings.parse(["--image_text_folder", "pictures", "--config", str(path)])
    assert (arguments.dim, arguments.depth, arguments.steps, arguments.epochs) == (512, 2, None, 20)
    assert not arguments.rotary_emb and not arguments.shift_tokens and arguments.lr_decay == "constant"


def test_options_exist():
    """Every option in the text is one of a script's."""
    known = frozenset().union(*map(options, SETTINGS)) | OF_OTHERS
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose))
    assert named and named <= known, named - known


@pytest.mark.slow
def test_the_way_from_pictures_to_pictures(tmp_path, monkeypatch):
    """The commands of the page's first block, one after the other, each training in two steps."""
    monkeypatch.chdir(tmp_path)
    first = PAGE[: PAGE.index("```", PAGE.index("```sh") + 5) + 4]
    used = set()
    for path, *arguments in commands(first):
        more = SHORT.get(Path(path).name, TRAINING)
        script(path).main([*arguments, *more.split()])
        used.add(path)
    assert used >= {*SETTINGS} - {"DALLE-pytorch/train_vae.py"} | {"generate.py", "upscale.py"}
    assert len(list(Path("pictures").glob("*.png"))) == 2000
    for metrics in Path("runs").glob("*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2], metrics
    assert list(Path("outputs").glob("*/0-upscaled.png"))


@pytest.mark.slow
def test_the_lesson(tmp_path, monkeypatch):
    """examples/teaching_dalle at settings that teach nothing: both pictures are there, of the sizes that they say."""
    settings = yaml.safe_load((ROOT / "examples/teaching_dalle/settings.yaml").read_text("utf-8"))
    settings["output_dir"] = "lesson"
    settings["pictures"] |= {"count": 24, "image_size": 16}
    few = {"steps": 2, "batch_size": 4, "num_workers": 0, "sample_every": 0}
    settings["vae"] |= {**few, "num_tokens": 16, "emb_dim": 8, "hidden_dim": 8}
    settings["dalle"] |= {**few, "dim": 32, "depth": 1, "heads": 1}
    settings["generation"] |= {"captions": ["a red seven on lego", "a cyan one on wood"], "num_images": 3}
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    lesson = script("examples/teaching_dalle/teach.py")  # its trainings are processes of their own
    lesson.main(["--settings", "settings.yaml"])
    side, gap = 16 * lesson.ENLARGED, 4
    shown = Image.open("lesson/dvae_reconstruction.png")
    assert shown.size == (lesson.SHOWN * (side + gap) + gap, 2 * (side + gap) + gap)
    drawn = Image.open("lesson/generation_results.png")
    assert drawn.width == 3 * (side + gap) + gap and drawn.height > 2 * (side + 2 * gap)
    assert PretrainedModel.from_pretrained("lesson/dalle/dalle").vae.num_tokens == 16
