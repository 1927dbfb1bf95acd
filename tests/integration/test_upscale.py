"""upscale.py from the command line: what it writes, that pictures are their own, and every kind of bad input."""

import json

import numpy as np
import pytest
import torch
from factories import small_decoder, small_unet
from helpers import run_python
from PIL import Image

import text_to_image.model
import upscale
from dalle_pytorch.cli import run
from dalle_pytorch.errors import SamplingDiverged
from dalle_pytorch.files.images import image_to_tensor, read_image
from dalle_pytorch.files.tokens import save_tokens
from diffusion.decoder import DiffusionDecoder
from diffusion.super_resolution import SuperResolution
from text_to_image.commands.upscale import SAMPLERS
from text_to_image.inputs import find_inputs


class BrightClip(torch.nn.Module):
    """Every prompt asks for white."""

    image_size = 16
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.texts = []

    def lost_text(self, text):
        return ""

    def tokenize(self, texts):
        self.texts += texts
        return torch.zeros(len(texts), 1, dtype=torch.long)

    def encode_text(self, tokens):
        return torch.tensor([1.0, 0.0]).expand(len(tokens), 2)

    def encode_image(self, image):
        brightness = image.mean((1, 2, 3))
        return torch.stack([brightness, 1 - brightness], dim=1)


@pytest.fixture
def model(tiny_vae, tmp_path, monkeypatch):
    """A bundle in the place of models/default, untrained: tokens of 16×16 in 32 codes, pictures of 128 pixels."""
    tiny_vae.save_pretrained(tmp_path / "model/vae")
    small_decoder(tiny_vae).save_pretrained(tmp_path / "model/decoder")
    monkeypatch.setattr(text_to_image.model, "DEFAULT_MODEL", tmp_path / "model")
    clip = BrightClip()
    monkeypatch.setattr(text_to_image.model, "load_clip", lambda path, clip_config=None: clip)
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path):
    """What generate.py leaves: twelve token files by rank, and the caption."""
    folder = tmp_path / "outputs/a_seven"
    folder.mkdir(parents=True)
    for rank in range(12):
        save_tokens(folder / f"{rank}.npy", torch.randint(32, (256,), generator=torch.Generator().manual_seed(rank)))
    (folder / "caption.txt").write_text("a seven at 3:2\n")
    return folder


def call(*options):
    upscale.main([*map(str, options), "--steps", "2", "--cpu"])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same(a, b):
    """The same picture but for what the last bit of a convolution may round."""
    return pixels(a).shape == pixels(b).shape and np.abs(pixels(a) - pixels(b)).max() <= 1


# --------------------------------------------------------------------------------------------------


def test_a_folder_best_first(model, folder, capsys):
    call("--input", folder, "--keep", 3)
    written = sorted(path.name for path in folder.glob("*.png"))
    assert written == ["0-upscaled.png", "1-upscaled.png", "2-upscaled.png", "before_after.png"]
    assert Image.open(folder / "0-upscaled.png").size == (128, 128)
    assert Image.open(folder / "before_after.png").size == (2 * 132 + 4, 3 * 132 + 4)
    assert str(folder) in capsys.readouterr().out
    # Ten comes after two.
    assert [path.stem for path in find_inputs(folder)] == [str(rank) for rank in range(12)]


def test_a_picture_is_its_own_whatever_is_drawn_with_it(model, folder, tmp_path):
    call("--input", folder, "--keep", 2, "--num_batches", 3, "--seed", 4, "--outputs_dir", tmp_path / "a")
    call("--input", folder, "--keep", 1, "--batch_size", 2, "--seed", 4, "--outputs_dir", tmp_path / "b")
    call("--input", folder / "1.npy", "--seed", 4, "--outputs_dir", tmp_path / "c")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "0-upscaled.png", "0-upscaled-1.png", "before_after.png"}  # fmt: skip
    assert same(tmp_path / "a/0-upscaled.png", tmp_path / "b/0-upscaled.png")
    assert same(tmp_path / "a/0-upscaled-1.png", tmp_path / "b/0-upscaled-1.png")
    assert same(tmp_path / "a/1-upscaled.png", tmp_path / "c/1-upscaled.png")
    assert not same(tmp_path / "a/0-upscaled.png", tmp_path / "a/0-upscaled-1.png")
    call("--input", folder / "1.npy", "--seed", 5, "--outputs_dir", tmp_path / "d")
    assert not same(tmp_path / "c/1-upscaled.png", tmp_path / "d/1-upscaled.png")


def test_a_picture_is_encoded_first(model, tiny_vae, tmp_path):
    picture = tmp_path / "some picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(picture)
    call("--input", picture, "--output_size", 96)
    assert Image.open(tmp_path / "some picture-upscaled.png").size == (96, 96)
    tokens = tiny_vae.get_codebook_indices(image_to_tensor(read_image(picture), 64))
    save_tokens(tmp_path / "tokens.npy", tokens[0])
    call("--input", tmp_path / "tokens.npy", "--output_size", 96)
    assert same(tmp_path / "some picture-upscaled.png", tmp_path / "tokens-upscaled.png")


def test_previews_and_stopping(model, folder):
    call("--input", folder / "0.npy", "--save_every", 1, "--batch_size", 2)
    previews = sorted(path.name for path in folder.glob("*step*"))
    assert previews == [f"0-upscaled{image}-step{step:04}.png" for image in ("-1", "") for step in (1, 2)]
    assert same(folder / "0-upscaled-step0002.png", folder / "0-upscaled.png")
    call("--input", folder / "0.npy", "--stop_at", 1)
    assert same(folder / "0-upscaled-step0001.png", folder / "0-upscaled.png")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_reaches_the_pictures(model, folder, sampler):
    options = ("--input", folder / "0.npy", "--sampler", sampler, "--cutn", 2)
    call(*options, "--outputs_dir", folder / "plain")
    call(*options, "--outputs_dir", folder / "guided", "--clip_guidance", "--clip_guidance_scale", 1e5)
    assert not same(folder / "plain/0-upscaled.png", folder / "guided/0-upscaled.png")


def test_the_default_model_says_how_strongly_it_is_guided(model, folder):
    options = ("--input", folder / "0.npy", "--cutn", 2, "--outputs_dir")
    call(*options, folder / "plain")
    for scale in (0, 1e5):
        (model / "sampling.json").write_text(f'{{"top_p": 0.9, "clip_guidance_scale": {scale}}}')
        call(*options, folder / str(scale), "--clip_guidance")
    assert same(folder / "plain/0-upscaled.png", folder / "0/0-upscaled.png")
    assert not same(folder / "plain/0-upscaled.png", folder / "100000.0/0-upscaled.png")


def test_prompts(model, folder, capsys):
    clip = text_to_image.model.load_clip(None)
    guided = ("--input", folder / "0.npy", "--clip_guidance", "--cutn", 1)
    call(*guided)
    # The caption's colon and number are part of it.
    assert clip.texts == ["a seven at 3:2"]
    clip.texts.clear()
    call(*guided, "--text", "A Seven:2|brick", "--image_prompts", f"{folder / '0-upscaled.png'}:3")
    assert clip.texts == ["a seven", "brick"]
    capsys.readouterr()
    call("--input", folder / "0.npy", "--text", "a seven")
    assert "no effect without --clip_guidance" in capsys.readouterr().err


def test_published_weights(tiny_vae, folder, tmp_path, capsys):
    unet = small_unet(image_size=64, channel_mult=(1, 2, 3, 4), attention_resolutions=(32, 16, 8), num_head_channels=64,
                      learn_sigma=True, emb_condition=True, emb_input_dims=8, emb_output_dims=32)  # fmt: skip
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    tiny_vae.save_pretrained(tmp_path / "vae")
    model = ("--model_path", tmp_path / "model.pt", "--vae_path", tmp_path / "vae")
    call("--input", folder / "0.npy", *model, "--model_size", 64)
    assert Image.open(folder / "0-upscaled.png").size == (64, 64)
    assert "attention_resolutions=" in fails(capsys, "--input", folder / "0.npy", *model, "--model_size", 256)


def test_an_unconditional_unet_begins_with_the_image(tiny_vae, folder, tmp_path, capsys):
    torch.save(small_unet(image_size=64, use_new_attention_order=False).state_dict(), tmp_path / "model.pt")
    tiny_vae.save_pretrained(tmp_path / "vae")
    model = ("--model_path", tmp_path / "model.pt", "--vae_path", tmp_path / "vae")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    call("--input", tmp_path / "photo.png", *model, "--init_from", "image", "--skip_steps", 0.5)
    assert Image.open(tmp_path / "photo-upscaled.png").size == (64, 64)
    call("--input", folder / "0.npy", *model, "--skip_steps", 1, "--outputs_dir", tmp_path / "a")
    call("--input", folder / "0.npy", *model, "--init_from", "tokens", "--skip_steps", "0.5", "--outputs_dir",
         tmp_path / "b")  # fmt: skip
    assert same(tmp_path / "a/0-upscaled.png", tmp_path / "b/0-upscaled.png")
    for options, said in ((("--init_from", "image"), "is tokens"), (("--skip_steps", "2"), "cannot skip 2 of 2"),
                          (("--init_scale", "1"), "guidance"), (("--class_label", "3"), "takes no class")):  # fmt: skip
        capsys.readouterr()
        assert said in fails(capsys, "--input", folder / "0.npy", "--steps", 2, *model, *options)
    assert not (folder / "0-upscaled.png").exists()


def test_samplers_are_those_of_the_package():
    from diffusion import samplers

    assert set(SAMPLERS) == set(samplers.SAMPLERS)


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written


def fails(capsys, *options):
    """The one line on stderr, a progress bar aside."""
    with pytest.raises(SystemExit) as exit:
        run(upscale.main, [*map(str, options), "--steps", "2", "--cpu"])
    captured = capsys.readouterr()
    assert exit.value.code == 2
    lines = [line for line in captured.err.strip().splitlines() if "%|" not in line]
    assert len(lines) == 1, captured.err
    return lines[0]


def bad_npy(kind, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickled":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "type":
        np.save(path, np.zeros(256, np.float32))
    elif kind == "shape":
        np.save(path, np.zeros(255, np.int64))
    elif kind == "size":
        np.save(path, np.zeros(64, np.int64))
    elif kind == "codebook":
        np.save(path, np.full(256, 32))
    elif kind == "negative":
        np.save(path, np.full(256, -1))
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["truncated", "pickled", "type", "shape", "size", "codebook", "negative", "empty"])
def test_bad_tokens_leave_everything_as_it_was(model, folder, capsys, kind):
    (folder / "0-upscaled.png").write_text("from an earlier run")
    bad_npy(kind, folder / "2.npy")
    before = {path.name for path in folder.iterdir()}
    # The bad one is third: it is found before the first is drawn.
    assert "2.npy" in fails(capsys, "--input", folder)
    assert {path.name for path in folder.iterdir()} == before
    assert (folder / "0-upscaled.png").read_text() == "from an earlier run"


def test_inputs_that_are_none(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    assert "nowhere" in fails(capsys, "--input", tmp_path / "nowhere")
    assert "--output_npy" in fails(capsys, "--input", tmp_path / "empty")
    assert "text.png: unknown format" in fails(capsys, "--input", tmp_path / "text.png")


def test_models_that_are_none(model, folder, tmp_path, capsys):
    inputs = ("--input", folder / "0.npy")
    (tmp_path / "bad.pt").write_bytes(b"bad")
    assert "bad.pt" in fails(capsys, *inputs, "--model_path", tmp_path / "bad.pt", "--vae_path", model / "vae")
    assert "none.pt is missing" in fails(capsys, *inputs, "--model_path", "none.pt", "--vae_path", model / "vae")
    assert "nowhere" in fails(capsys, *inputs, "--model_path", tmp_path / "nowhere")
    weights = model / "decoder/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert f"{weights} is damaged" in fails(capsys, *inputs)
    weights.unlink()
    assert f"{weights} is missing" in fails(capsys, *inputs)
    weights.write_bytes(content)
    config = json.loads((model / "decoder/config.json").read_text())
    config["unet"]["channel_mult"] = [1, 2]
    (model / "decoder/config.json").write_text(json.dumps(config))
    assert "does not fit DiffusionDecoder" in fails(capsys, *inputs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--num_batches", "0"), "--num_batches"),
        (("--batch_size", "-1"), "--batch_size"),
        (("--keep", "0"), "--keep"),
        (("--output_size", "0"), "--output_size"),
        (("--steps", "0"), "cannot visit 0"),
        (("--steps", "many"), "got 'many'"),
        (("--stop_at", "26"), "stop_at must be from 1 to 25"),
        (("--sampler", "plms"), "plms"),
        (("--clip_guidance", "--text", ""), "--text: it is empty"),
        (("--clip_guidance", "--text", "a:1|b:-1"), "cancel"),
        (("--clip_guidance_scale", "much"), "--clip_guidance_scale"),
        (("--clip_guidance", "--image_prompts", "none.png"), "none.png"),
        (("--dvae_mode",), "--vae_path"),
        (("--device", "warp"), "warp"),
        (("--unknown",), "--unknown"),
    ],
)
def test_options_that_cannot_be_meant(model, folder, capsys, options, said):
    with pytest.raises(SystemExit) as exit:
        run(upscale.main, ["--input", str(folder), *options])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and said in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_that_are_not_finite_write_nothing(model, folder, monkeypatch, sampler):
    decode = DiffusionDecoder.conditioning
    monkeypatch.setattr(DiffusionDecoder, "conditioning",
                        lambda *args: {name: x * float("nan") for name, x in decode(*args).items()})  # fmt: skip
    before = sorted(folder.iterdir())
    with pytest.raises(SamplingDiverged, match="diffusion step 1 is not finite"):
        call("--input", folder / "0.npy", "--sampler", sampler, "--save_every", 1)
    assert sorted(folder.iterdir()) == before


def test_guidance_without_a_prompt(model, folder, capsys):
    (folder / "caption.txt").unlink()
    assert "--text" in fails(capsys, "--input", folder, "--clip_guidance")


def test_folders_that_cannot_be_written(model, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails(capsys, "--input", folder / "0.npy", "--outputs_dir", tmp_path / "file")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "may not be written" in fails(capsys, "--input", folder / "0.npy", "--outputs_dir", tmp_path / "closed")


def test_a_full_disk_leaves_no_half_file(model, folder, capsys, monkeypatch):
    import errno

    (folder / "0-upscaled.png").write_text("from an earlier run")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    before = {path.name for path in folder.iterdir()}
    assert "disk is full" in fails(capsys, "--input", folder / "0.npy")
    assert {path.name for path in folder.iterdir()} == before
    assert (folder / "0-upscaled.png").read_text() == "from an earlier run"


def test_help_and_mistakes_answer_at_once():
    for options, code in ((["--help"], 0), (["--input", "nowhere"], 2)):
        done, seconds = run_python("upscale.py", *options)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert seconds < 2


# --------------------------------------------------------------------------------------------------
# Super-resolution after the decoder


@pytest.fixture
def case(parity):
    return parity("unet/adm_superres")


def difference(a, b) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


def test_second_stage_of_upscale(model, folder, tmp_path, case, monkeypatch):
    options = ("--input", folder / "0.npy", "--super_res_path", case / "model.pt")
    sizes, enlarge = [], SuperResolution.enlarge

    def spy(self, pictures, size, *arguments, **keywords):
        sizes.append((tuple(pictures.shape), size))
        return enlarge(self, pictures, size, *arguments, **keywords)

    monkeypatch.setattr(SuperResolution, "enlarge", spy)
    call(*options, "--output_size", 160, "--num_batches", 2, "--inputs_per_batch", 1, "--outputs_dir", tmp_path / "a")
    assert sizes == [((1, 3, 128, 128), 160)] * 2
    assert Image.open(tmp_path / "a/0-upscaled-1.png").size == (160, 160)
    assert Image.open(tmp_path / "a/before_after.png").size == (3 * 164 + 4, 164 + 4)
    assert difference(tmp_path / "a/0-upscaled.png", tmp_path / "a/0-upscaled-1.png") > 10
    call(*options, "--output_size", 160, "--batch_size", 2, "--outputs_dir", tmp_path / "b")
    assert difference(tmp_path / "a/0-upscaled-1.png", tmp_path / "b/0-upscaled-1.png") < 1
    # Not merely the first stage's picture, resized.
    call("--input", folder / "0.npy", "--output_size", 160, "--outputs_dir", tmp_path / "c")
    assert difference(tmp_path / "a/0-upscaled.png", tmp_path / "c/0-upscaled.png") > 10


def test_four_times_the_size_unless_told(model, folder, case, monkeypatch):
    monkeypatch.setattr(SuperResolution, "enlarge", lambda self, pictures, size, *_, **__: torch.rand(1, 3, size, size))
    call("--input", folder / "0.npy", "--super_res_path", case / "model.pt", "--super_res_flags", "num_heads=4")
    assert Image.open(folder / "0-upscaled.png").size == (512, 512)


def test_options_that_contradict(model, folder, case, parity, capsys):
    inputs = ("--input", folder / "0.npy")
    superres = ("--super_res_path", case / "model.pt")
    assert "above the decoder's 128 pixels" in fails(capsys, *inputs, *superres, "--output_size", 128)
    message = fails(capsys, *inputs, *superres, "--super_res_flags", "num_channels=64")
    assert "num_channels=64" in message and "num_channels=32" in message
    assert "NAME=VALUE" in fails(capsys, *inputs, *superres, "--super_res_flags", "num_channels")
    assert "go with --super_res_path" in fails(capsys, *inputs, "--super_res_class", 3)
    plain = parity("unet/adm_fixed_variance_4000") / "model.pt"
    assert "not for super-resolution" in fails(capsys, *inputs, "--super_res_path", plain)
    assert "none.pt is missing" in fails(capsys, *inputs, "--super_res_path", "none.pt")
    assert "model_size and unet_flags go with" in fails(capsys, *inputs, "--unet_flags", "num_heads=2")
    assert not list(folder.glob("*.png"))
