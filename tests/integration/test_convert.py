"""convert.py: says what a file is, writes the native folder, refuses in one line."""

import json

import pytest
import torch

import convert
from dalle_pytorch import cli
from dalle_pytorch.pretrained import PretrainedModel, read_tensors
from dalle_pytorch.published.clip import load_clip
from dalle_pytorch.published.dalle import load_dalle
from dalle_pytorch.tokenizers.hug import HugTokenizer
from dalle_pytorch.tokenizers.yttm import YttmTokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE
from text_to_image import Model


def test_says_what_a_file_is(parity, capsys):
    path = parity("dalle/axial_conv") / "dalle.pt"
    convert.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    dalle = load_dalle(path)
    count = sum(tensor.numel() for tensor in dalle.own_state_dict().values())
    assert lines[:2] == [f"{path}:", f"  DALLE, {count:,} parameters"]
    for line in ("    dim: 48", "    depth: 4", "    image_fmap_size: 4", "    vae:", "        codebook_dim: 24"):
        assert line in lines
    assert any("axial_row" in line for line in lines) and not any("written" in line for line in lines)


CASES = [
    "dalle/axial_conv/dalle.pt",
    "dalle/dvae_gumbel/vae.pt",
    "dalle/clip_trainable/clip.pt",
    "vqgan/gumbel_f8",
    "vqgan/gumbel_f8/last.ckpt",
    "openai_dvae/openai_dvae/encoder.pkl",
    "clip/clip_vit_jit/clip_jit.pt",
]


@pytest.mark.parametrize("case", CASES)
def test_native_folder(parity, tmp_path, case, capsys):
    path, folder = parity(case), tmp_path / "native"
    convert.main([str(path), str(folder)])
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {folder}"
    again = load_clip(folder) if "clip" in case else PretrainedModel.from_pretrained(folder)
    convert.main([str(folder)])  # which says the same of it
    assert f"  {type(again).__name__}, " in capsys.readouterr().out


def test_dtype_and_vae(parity, tmp_path):
    prior, vqgan = parity("dalle/axial_conv") / "dalle.pt", parity("dalle/dvae_gumbel") / "vae.pt"
    convert.main([str(prior), str(tmp_path / "native"), "--vae_path", str(vqgan), "--dtype", "float16"])
    for folder in (tmp_path / "native", tmp_path / "native/vae"):
        tensors = read_tensors(folder / "model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.float16}


def test_unet(parity, tmp_path, capsys):
    case = parity("unet/adm_tokens_256_style")
    flags = json.loads((case / "case.json").read_text())["flags"]
    given = [f"{name}={flags[name]}" for name in ("num_head_channels", "image_size", "rescale_timesteps")]
    convert.main([str(case / "model.pt"), str(tmp_path / "unet"), "--unet_flags", *given])
    assert "  UNet, " in capsys.readouterr().out
    assert json.loads((tmp_path / "unet/config.json").read_text())["num_head_channels"] == 16
    # With its VAE it is a whole decoder.
    vae = VQGanVAE(image_size=64, num_tokens=8, embed_dim=24, z_channels=24, ch=8, ch_mult=(1,), num_res_blocks=1,
                   patch_size=4, mid_attention=False)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    options = ["--vae_path", str(tmp_path / "vae"), "--unet_flags", *given]
    convert.main([str(case / "model.pt"), str(tmp_path / "decoder"), *options])
    capsys.readouterr()
    convert.main([str(tmp_path / "decoder")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  DiffusionDecoder, ") and "    rescale_timesteps: True" in lines
    # Either folder is what upscale.py takes, the first with a VAE.
    torch.testing.assert_close(PretrainedModel.from_pretrained(tmp_path / "decoder/vae").state_dict(), vae.state_dict())
    for parts in ({"decoder": tmp_path / "decoder"}, {"decoder": tmp_path / "unet", "vae": tmp_path / "vae"}):
        decoder = Model.from_pretrained(device="cpu", **parts).decoder
        assert decoder.config["rescale_timesteps"] and decoder.vae.num_tokens == 8
    assert json.loads((tmp_path / "unet/diffusion.json").read_text()) == {"rescale_timesteps": True}


def test_tokenizers(parity, tmp_path, capsys):
    path = parity("tokenizers/yttm") / "bpe.model"
    convert.main([str(path), str(tmp_path)])
    assert "YttmTokenizer, 227 tokens" in capsys.readouterr().out
    text = "an armchair shaped like a CUBE"
    assert HugTokenizer(tmp_path / "tokenizer.json").encode(text) == YttmTokenizer(path).encode(text)
    convert.main([str(tmp_path / "tokenizer.json"), str(tmp_path / "more")])
    assert (tmp_path / "more/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_mistakes_are_one_line(parity, tmp_path, capsys):
    class Touch:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    torch.save({"weights": Touch()}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    vae = parity("dalle/dvae_gumbel") / "vae.pt"
    for arguments, said in (
        ([tmp_path / "evil.pt", tmp_path / "out"], "holds more than tensors and settings"),
        ([tmp_path / "noise.pt"], "is damaged or not a PyTorch file"),
        ([tmp_path / "none.pt"], "is missing"),
        ([tmp_path / "other.pt", tmp_path / "out"], "not a prior, VAE or CLIP"),
        ([vae, tmp_path / "model"], "holds a model already"),
        ([vae, "--unet_flags", "image_size"], "NAME=VALUE"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.run(convert.main, list(map(str, arguments)))
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and said in told and told.count("\n") == 1, told
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()
