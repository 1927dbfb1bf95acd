"""generate.py and upscale.py on other projects' files, from the prompt to the picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import upscale
from dalle_pytorch import cli, load_dalle
from dalle_pytorch.clip import published as clip_published
from dalle_pytorch.files.tokens import load_tokens, save_tokens
from dalle_pytorch.published import dalle as published_prior
from dalle_pytorch.vae.vqgan import VQGanVAE

TEXT_TOKENS, PADDING = 227, 12  # those of the recorded bpe.model, and the prior's text_seq_len


@pytest.fixture
def bpe(parity):
    return parity("tokenizers/yttm") / "bpe.model"


def prior(parity, path, image_tokens: int = 64, own_vae: bool = True):
    """The recorded dalle.pt with as many text tokens as the tokenizer has, and image tokens as asked for."""
    torch.manual_seed(0)
    content = torch.load(parity("dalle/axial_conv") / "dalle.pt", weights_only=True)
    weights, rows = content["weights"], TEXT_TOKENS + PADDING
    content["hparams"]["num_text_tokens"] = TEXT_TOKENS
    weights["text_emb.weight"] = torch.randn(rows, 48)
    weights["image_emb.weight"] = torch.randn(image_tokens, 48)
    weights["to_logits.1.weight"] = torch.randn(rows + image_tokens, 48) * 0.1
    weights["to_logits.1.bias"] = torch.zeros(rows + image_tokens)
    content["weights"] = {key: tensor for key, tensor in weights.items() if not key.endswith("logits_mask")}
    if not own_vae:
        content["weights"] = {key: tensor for key, tensor in content["weights"].items() if not key.startswith("vae.")}
        content |= {"vae_params": None, "vae_class_name": "OpenAIDiscreteVAE"}
    torch.save(content, path)
    return path


@pytest.fixture
def command(tmp_path):
    def call(*options, text="an armchair shaped like a cube"):
        fixed = ["--text", text, "--device", "cpu", "--outputs_dir", tmp_path / "out", "--num_images", 3]
        generate.main([str(option) for option in (*fixed, *options)])
        (folder,) = (tmp_path / "out").iterdir()
        return folder

    return call


def refused(capsys, main, *options) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [str(option) for option in options])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1, told
    return told


# --------------------------------------------------------------------------------------------------
# Stage 1


@pytest.mark.parametrize("cond_scale", [1, 3])
def test_prior_with_its_own_vae_and_tokenizer(parity, tmp_path, command, bpe, cond_scale):
    path = prior(parity, tmp_path / "dalle.pt")
    folder = command("--dalle_path", path, "--bpe_path", bpe, "--output_npy", "--cond_scale", cond_scale)
    tokens = load_tokens(folder / "0.npy", 64, 16)
    picture = load_dalle(path).vae.decode_image(tokens[None])[0].permute(1, 2, 0) * 255
    assert np.abs(np.asarray(Image.open(folder / "0.png")).astype(float) - picture.detach().numpy()).max() <= 1
    assert {path.name for path in folder.iterdir()} >= {f"{i}.{kind}" for i in range(3) for kind in ("png", "npy")}


def test_tamings_vqgan_and_openais_clip(parity, tmp_path, command, bpe, monkeypatch):
    class Words:
        vocab_size = 600

        def encode(self, text):
            return [len(word) for word in text.split()]

    monkeypatch.setattr(clip_published, "SimpleTokenizer", lambda path: Words())
    vqgan, clip = parity("vqgan/gumbel_f8"), parity("clip/clip_vit_jit") / "clip_jit.pt"
    # The VAE that the checkpoint names is not fetched.
    path = prior(parity, tmp_path / "dalle.pt", image_tokens=96, own_vae=False)
    models = ("--vqgan_model_path", vqgan / "last.ckpt", "--vqgan_config_path", vqgan / "model.yaml", "--taming")
    ranked = ("--clip_path", clip, "--clip_sort", "--output_npy")
    folder = command("--dalle_path", path, "--bpe_path", bpe, *models, *ranked)
    pictures = sorted(folder.glob("[0-9]*.png"), key=lambda picture: int(picture.name.split("-")[0]))
    scores = [float(picture.stem.split("-", 1)[1]) for picture in pictures]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    decoded = VQGanVAE(vqgan / "last.ckpt").decode_image(load_tokens(folder / "0.npy", 96, 16)[None])[0]
    picture = np.asarray(Image.open(pictures[0])).astype(float)
    assert np.abs(picture - decoded.detach().permute(1, 2, 0).numpy() * 255).max() <= 1


def test_a_vqgan_that_does_not_fit_and_a_tokenizer_that_does_not(parity, tmp_path, bpe, capsys):
    options = ("--text", "an armchair", "--bpe_path", bpe, "--outputs_dir", tmp_path / "out")
    path = prior(parity, tmp_path / "dalle.pt")
    vqgan = ("--vqgan_model_path", parity("vqgan/gumbel_f8") / "last.ckpt")
    message = refused(capsys, generate.main, *options, "--dalle_path", path, *vqgan)
    assert "expected a VAE of 64 image tokens, got 96" in message
    message = refused(capsys, generate.main, *options, "--dalle_path", path, "--vqgan_config_path", "model.yaml")
    assert "goes with --vqgan_model_path" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("native", [False, True], ids=["dalle.pt", "native"])
@pytest.mark.parametrize(("codes", "file"), [(1024, "vqgan.1024.model.ckpt"), (8192, "vqgan.gumbel_f8.model.ckpt"),
                                             (16384, "vqgan.16384.model.ckpt")])  # fmt: skip
def test_taming_means_the_vqgan_that_fits_the_prior(parity, tmp_path, monkeypatch, capsys, bpe, native, codes, file):
    fetched = []

    def default_file(public):
        fetched.append(public.name)
        raise published_prior.CheckpointError(f"{public.name} cannot be downloaded")

    monkeypatch.setattr(published_prior, "default_file", default_file)
    path = prior(parity, tmp_path / "dalle.pt", image_tokens=codes)
    if native:
        vae = VQGanVAE(image_size=32, num_tokens=codes, embed_dim=8, z_channels=8, ch=8, ch_mult=(1, 1, 1, 1),
                       num_res_blocks=1, mid_attention=False)  # fmt: skip
        path = tmp_path / "native"
        load_dalle(tmp_path / "dalle.pt", vae=vae).save_pretrained(path)
    options = ("--text", "an armchair", "--bpe_path", bpe, "--outputs_dir", tmp_path / "out", "--taming")
    assert f"{file} cannot" in refused(capsys, generate.main, *options, "--dalle_path", path)
    assert fetched == [file]


def test_taming_for_a_prior_that_none_fits(parity, tmp_path, capsys, bpe):
    path = prior(parity, tmp_path / "dalle.pt")
    options = ("--text", "an armchair", "--bpe_path", bpe, "--outputs_dir", tmp_path / "out", "--taming")
    message = refused(capsys, generate.main, *options, "--dalle_path", path)
    assert "64 image tokens, taming's published VQGANs have 1024, 8192, 16384" in message


# --------------------------------------------------------------------------------------------------
# Stage 2


def test_upscale_with_a_published_unet_and_vqgan(parity, tmp_path):
    case, vqgan = parity("unet/adm_tokens_256_style"), parity("vqgan/vq_f16")
    flags = json.loads((case / "case.json").read_text())["flags"]
    save_tokens(tmp_path / "0.npy", torch.randint(80, (256,), generator=torch.Generator().manual_seed(0)))
    given = [f"{name}={flags[name]}" for name in ("image_size", "num_head_channels", "rescale_timesteps")]
    models = ["--model_path", case / "model.pt", "--unet_flags", *given, "--vae_path", vqgan / "last.ckpt",
              "--vqgan_config_path", vqgan / "model.yaml"]  # fmt: skip
    superres = ["--super_res_path", parity("unet/adm_superres") / "model.pt", "--output_size", 128]
    for name, more in (("small", []), ("large", superres)):
        options = ["--input", tmp_path / "0.npy", "--outputs_dir", tmp_path / name, "--steps", 3, "--cpu"]
        upscale.main([str(option) for option in (*options, *models, *more)])
    assert Image.open(tmp_path / "small/0-upscaled.png").size == (64, 64)
    assert Image.open(tmp_path / "large/0-upscaled.png").size == (128, 128)


def test_upscale_says_what_does_not_fit(parity, tmp_path, capsys):
    save_tokens(tmp_path / "0.npy", torch.zeros(256, dtype=torch.long))
    case = parity("unet/adm_tokens_256_style")
    options = ("--input", tmp_path / "0.npy", "--model_path", case / "model.pt", "--cpu")
    vae = ("--vae_path", parity("vqgan/gumbel_f8") / "last.ckpt")
    flags = ("--unet_flags", "num_head_channels=16")
    assert "expects codebook rows of 24 channels, got a VAE with 32" in refused(
        capsys, upscale.main, *options, *flags, *vae
    )
    message = refused(capsys, upscale.main, *options, "--model_size", 256, *vae)
    assert "attention_resolutions=" in message or "num_head_channels=" in message
    vae = ("--dvae_mode", "--vae_path", parity("dalle/dvae_gumbel") / "vae.pt")
    assert not list(tmp_path.glob("*.png"))
    assert refused(capsys, upscale.main, *options, "--unet_flags", "num_heads=x", *vae)
