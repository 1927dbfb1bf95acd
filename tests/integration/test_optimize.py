"""dalle optimize from the command line: what it writes, published generators, interruptions, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from factories import small_decoder
from helpers import ROOT
from PIL import Image

import text_to_image.model
import text_to_image.records
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.tokens import load_tokens
from dalle_pytorch.vae.discrete import DiscreteVAE
from text_to_image import latents
from text_to_image.commands import optimize, upscale

FOLDER = "a_red_seven_on_brick"


@pytest.fixture
def model(tiny_bundle, tiny_vae, monkeypatch):
    """An untrained bundle in the place of models/default: tokens of 16×16 in 32 codes, pictures of 64 pixels."""
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    monkeypatch.setattr(text_to_image.model, "DEFAULT_MODEL", tiny_bundle)
    return tiny_bundle


def call(folder, *options, prompts="a red seven on brick"):
    arguments = ["--prompts", prompts, "--iterations", 12, "--device", "cpu", "--outputs_dir", folder, *options]
    optimize.main([*map(str, arguments)])


def images(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".npy"))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_what_is_written(model, tmp_path, tiny_vae, capsys):
    call(tmp_path, "--save_every", 5, "--video", "gif")
    folder = tmp_path / FOLDER
    image, *_ = written = images(folder)
    assert written == [image, "0.npy", "grid.png"] and image.startswith("0-")
    assert f"{folder}: 12 iterations in " in capsys.readouterr().out
    assert sorted(path.stem for path in (folder / "previews").iterdir()) == ["000000", "000005", "000010", "000012"]
    assert 1 < Image.open(folder / "progress.gif").n_frames <= 4  # equal ones are one
    assert (folder / "caption.txt").read_text() == "a red seven on brick\n"
    assert json.loads((folder / "settings.json").read_text())["settings"]["iterations"] == 12
    tokens = load_tokens(folder / "0.npy", 32, 256)
    decoded = tiny_vae.decode_image(tokens[None])[0].permute(1, 2, 0) * 255
    assert np.abs(pixels(folder / image) - decoded.detach().numpy()).max() <= 1

    upscale.main(["--input", str(folder), "--steps", "2", "--cpu", "--clip_guidance"])
    assert Image.open(folder / "0-upscaled.png").size == (128, 128)


def test_a_size_that_is_not_square_and_a_story(model, tmp_path):
    call(tmp_path, "--size", 100, 40, "--save_every", 100, prompts="a star ^ a seven:2|wood:-1")
    folder = tmp_path / "a_star_a_seven"
    first, _, second, _, grid = images(folder)
    assert first.startswith("0-") and second.startswith("1-") and grid == "grid.png"
    assert Image.open(folder / first).size == (100, 40)
    assert np.load(folder / "0.npy").shape == (10, 25) and np.load(folder / "0.npy").dtype == np.int64
    with pytest.raises(ValueError, match=r"expected the shape \(256,\), got \(10, 25\)"):
        upscale.main(["--input", str(folder), "--steps", "2", "--cpu"])


def test_beginning_with_an_image_and_asking_for_one(model, tmp_path, tiny_vae):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    call(tmp_path, "--init_image", tmp_path / "red.png", "--learning_rate", 1e-9)  # which leaves it as it is
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 64, 64)
    assert torch.equal(load_tokens(tmp_path / FOLDER / "0.npy", 32), tiny_vae.get_codebook_indices(red)[0])
    call(tmp_path, "--image_prompts", tmp_path / "red.png:2", prompts="")
    recorded = json.loads((tmp_path / "images/settings.json").read_text())
    assert recorded["prompts"] == [[]] and recorded["image_prompts"][0][0][1] == 2


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(model, tmp_path, monkeypatch, capsys):
    options = ["--save_every", 4, "--video", "webp", "--augments", "Af", "Er", "--cut_noise", 0.1]
    call(tmp_path / "whole", *options)

    def step(self, original=latents.Optimization._step):
        original(self)
        if self.iteration == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(latents.Optimization, "_step", step)
    with pytest.raises(SystemExit) as ended:
        call(tmp_path / "parts", *options)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped after iteration 6; the same command with --resume goes on" in capsys.readouterr().err
    whole, parts = tmp_path / "whole" / FOLDER, tmp_path / "parts" / FOLDER
    assert images(parts)[:2] == ["0.npy", "0.png"] and not (parts / "settings.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(text_to_image.model, "DEFAULT_MODEL", model)
    (parts / "previews/000007.png").write_bytes(b"of a run that was killed")
    call(tmp_path / "parts", "--resume", *options)
    for name in (*images(whole), "settings.json", "previews/000004.png", "previews/000012.png", "state.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    names = [sorted(path.name for path in (folder / "previews").iterdir()) for folder in (whole, parts)]
    assert names[0] == names[1]
    # The same command without --resume begins anew.
    call(tmp_path / "parts", *options[2:], "--iterations", 3)
    assert sorted(path.stem for path in (parts / "previews").iterdir()) == ["000000", "000003"]


def test_ctrl_c_in_a_process_of_its_own(model, tmp_path):
    command = [sys.executable, "-m", "text_to_image", "optimize", "--prompts", "a red seven on brick", "--iterations",
               "100000", "--save_every", "1000", "--outputs_dir", tmp_path, "--vae_path", model / "vae", "--clip_path",
               model / "clip", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    state = tmp_path / FOLDER / "state.safetensors"
    deadline = time.monotonic() + 300
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT and "with --resume goes on" in told
    assert "0.npy" in images(state.parent)


# --------------------------------------------------------------------------------------------------
# Generators and CLIPs of other projects


def test_taming_s_checkpoint(model, tmp_path):
    from dalle_pytorch.vae.vqgan import VQGanVAE

    torch.manual_seed(0)
    vqgan = VQGanVAE(image_size=256, num_tokens=24, embed_dim=8, z_channels=8, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                     gumbel=False)  # fmt: skip
    torch.save({"state_dict": vqgan.state_dict()}, tmp_path / "last.ckpt")
    call(tmp_path, "--vqgan_checkpoint", tmp_path / "last.ckpt", "--size", 32, "--latents", "soft", "--clip_path",
         model / "clip", model / "clip")  # fmt: skip
    image, *_ = images(tmp_path / FOLDER)
    assert Image.open(tmp_path / FOLDER / image).size == (32, 32)
    assert len(load_tokens(tmp_path / FOLDER / "0.npy", 24)) == 256
    assert len(json.loads((tmp_path / FOLDER / "settings.json").read_text())["models"]) == 3


def test_openai_s_dvae(model, tmp_path, parity):
    folder = parity("openai_dvae/openai_dvae")
    call(tmp_path, "--vae_path", folder, "--size", 32, "--clip_path", model / "clip")
    assert len(load_tokens(tmp_path / FOLDER / "0.npy", 8192)) == 16


def test_a_discrete_vae(model, tmp_path):
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=32, num_tokens=24, codebook_dim=8, num_layers=2, hidden_dim=8)
    vae.save_pretrained(tmp_path / "vae")
    call(tmp_path, "--vae_path", tmp_path / "vae", "--clip_path", model / "clip")
    assert len(load_tokens(tmp_path / FOLDER / "0.npy", 24)) == 64


def test_parts_of_the_default_model_do_not_mix_with_a_generator(model, monkeypatch, tmp_path):
    asked = []

    def load_clip(path, clip_config=None):
        asked.append(path)
        raise UsageError("enough")

    monkeypatch.setattr(text_to_image.model, "load_clip", load_clip)
    with pytest.raises(UsageError, match="enough"):
        call(tmp_path, "--vae_path", model / "vae")
    assert asked == [None]  # OpenAI's


def test_published_generators_by_name(model, monkeypatch, tmp_path, tiny_vae):
    asked = []
    monkeypatch.setattr(text_to_image.model, "load_vae", lambda path=None, **options: asked.append(options) or tiny_vae)
    for name in ("vqgan", "dvae"):
        call(tmp_path, "--generator", name, "--clip_path", model / "clip", "--iterations", 1)
    assert asked == [{"taming": True}, {"taming": False}]


# --------------------------------------------------------------------------------------------------

BAD = [
    (["--prompts", ""], "expected --prompts or --image_prompts"),
    (["--prompts", " | "], "needs a prompt"),
    (["--prompts", "a seven:0"], "weights of the prompts are too small"),
    (["--prompts", "a seven:nan"], "expected weights of prompts of at most"),
    (["--image_prompts", "nothing.png"], "cannot read image nothing.png"),
    (["--init_image", "nothing.png"], "cannot read image nothing.png"),
    (["--size", "2"], "expected sides of 4 to 8192 pixels, got 2×2"),
    (["--size", "64", "64", "64"], "expected --size as width and height"),
    (["--size", "64", "9000"], "expected sides of 4 to 8192 pixels, got 64×9000"),
    (["--iterations", "0"], "--iterations: expected a whole number"),
    (["--optimizer", "Lion"], "Lion"),
    (["--augments", "Af", "Xx"], "got 'Xx'"),
    (["--cut_size", "0.9", "0.5"], "expected cut_size as the smallest and the largest"),
    (["--vae_path", "nothing"], "nothing"),
    (["--vae_path", "README.md"], "README.md"),
    (["--clip_path", "nothing/at/all"], "nothing/at/all"),
    (["--clip_config", "ViT-H-14"], "--clip_config goes with one --clip_path"),
    (["--vqgan_config", "model.yaml"], "--vqgan_config_path goes with --vae_path"),
    (["--resume"], "state.safetensors is missing"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_told_in_one_line(model, tmp_path, options, message, capsys):
    default = ["--prompts", "a seven", "--iterations", "1", "--outputs_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        run(optimize.main, [*default, *options])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and told.count("\n") == 1


def test_a_size_that_does_not_fit_the_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "free_bytes", lambda device: 2**25)
    monkeypatch.setattr(latents.Optimization, "_step", lambda self: pytest.fail("a step was made"))
    with pytest.raises(UsageError, match="an image of 1024×1024 pixels and 2 cutouts need about"):
        call(tmp_path, "--size", 1024)


def test_a_missing_extra_is_told_before_anything_is_opened(model, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_image.records, "find_spec", lambda name: None)
    for options in (["--video", "mp4"], ["--plot"]):
        with pytest.raises(UsageError, match="pip install"):
            call(tmp_path, *options, "--vae_path", tmp_path)
    assert not (tmp_path / FOLDER).exists()
