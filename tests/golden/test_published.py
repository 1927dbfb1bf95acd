"""Published checkpoints: the recorded numbers, sizes read off the weights, and what is said of what does not fit."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from factories import Letters
from safetensors.torch import load_file, save_file

from dalle_pytorch.clip import published as clip_published
from dalle_pytorch.clip.published import PublishedCLIP
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.pretrained import PretrainedModel, load_state
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.published.clip import load_clip
from dalle_pytorch.published.dalle import load_dalle
from dalle_pytorch.published.load import UnknownFormatError, open_published
from dalle_pytorch.published.unpickler import module_state, read_torch
from dalle_pytorch.published.vaes import load_discrete_vae
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE
from dalle_pytorch.vae.vqgan import VQGanVAE

PRIORS = ["full_rotary_shift", "full_learned_pos", "axial_conv", "reversible", "stable_sandwich", "shared_layers",
          "dall3_default"]  # fmt: skip
VQGANS = ["gumbel_f8", "vq_f16"]


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    assert actual.shape == reference.shape
    assert (actual - reference).abs().max() <= 1e-4 * reference.abs().max()


def one_line(function, *arguments, **keywords) -> str:
    """The message of the `CheckpointError` that a call raises."""
    with pytest.raises(CheckpointError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(source, target, change) -> str:
    """A copy of a checkpoint after `change` has worked on it."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return str(target)


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# --------------------------------------------------------------------------------------------------
# VQGAN


@pytest.mark.parametrize("case", VQGANS)
@torch.no_grad()
def test_vqgan_as_recorded(parity, case):
    folder = parity(f"vqgan/{case}")
    golden = load_file(folder / "golden.safetensors")
    vae = VQGanVAE(folder / "last.ckpt", folder / "model.yaml")
    tokens = vae.get_codebook_indices(golden["image"])
    assert torch.equal(tokens, golden["indices"]) and not vae.training
    assert torch.equal(vae.embed(tokens), golden["embeddings"])
    assert_close(vae.decode(tokens), golden["decoded"])
    assert vae.image_size == 64 and vae.num_layers == {"gumbel_f8": 3, "vq_f16": 4}[case]


@pytest.mark.parametrize("case", VQGANS)
def test_vqgan_needs_no_configuration(parity, case, tmp_path):
    folder = parity(f"vqgan/{case}")
    shutil.copy(folder / "last.ckpt", tmp_path)
    with_it = VQGanVAE(vqgan_model_path=folder / "last.ckpt", vqgan_config_path=str(folder / "model.yaml"))
    without = VQGanVAE(tmp_path / "last.ckpt")
    assert same_weights(with_it, without)
    tokens = torch.arange(16)[None]
    assert torch.equal(with_it.decode(tokens), without.decode(tokens))
    assert without.image_size == 256  # which only the configuration tells


def test_vqgan_becomes_a_native_folder(parity, tmp_path):
    vae = VQGanVAE(parity("vqgan/gumbel_f8") / "last.ckpt")  # model.yaml is beside it
    vae.save_pretrained(tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())
    assert config["num_tokens"] == 96 and config["image_size"] == 64 and not any("path" in name for name in config)
    again = PretrainedModel.from_pretrained(tmp_path / "native")
    assert same_weights(vae, again) and again.config == vae.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model["params"].update(n_embed=1024),
            "n_embed is 1024 according to .*model.yaml, but 96 in the weights",
        ),
        (lambda model: model["params"]["ddconfig"].update(ch_mult=[1, 2]), r"ch_mult is \[1, 2\] according"),
        (
            lambda model: model["params"]["ddconfig"].update(attn_resolutions=[16]),
            r"attn_resolutions is \[16\] according",
        ),
        (lambda model: model.update(target="taming.models.vqgan.VQModel"), "quantizer is VQModel according"),
        (lambda model: model["params"].update(remap="used.npy"), "remap"),
        (lambda model: model.pop("params"), "is not a configuration of a VQGAN: missing 'params'"),
    ],
)
def test_vqgan_configuration_that_contradicts(parity, tmp_path, change, message):
    folder = parity("vqgan/gumbel_f8")
    config = yaml.safe_load((folder / "model.yaml").read_text())
    change(config["model"])
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=message):
        VQGanVAE(folder / "last.ckpt", tmp_path / "model.yaml")


def test_attention_at_sides_that_do_not_occur(parity, tmp_path):
    folder = parity("vqgan/gumbel_f8")
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["model"]["params"]["ddconfig"]["attn_resolutions"] = [8, 5]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    assert VQGanVAE(folder / "last.ckpt", tmp_path / "model.yaml").config["attn_resolutions"] == [8]


def test_vqgan_keys_are_named(parity, tmp_path):
    state = read_torch(parity("vqgan/gumbel_f8") / "last.ckpt")["state_dict"]
    state["encoder.extra"] = state.pop("decoder.mid.block_1.conv1.bias")
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    message = one_line(VQGanVAE, tmp_path / "last.ckpt")
    assert "lacks decoder.mid.block_1.conv1.bias" in message and "has unknown encoder.extra" in message
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "last.ckpt")
    assert "is not a VQGAN of taming-transformers: missing 'encoder.conv_in.weight'" in one_line(
        VQGanVAE, tmp_path / "last.ckpt"
    )
    assert "needs the weights of its VQGAN" in one_line(VQGanVAE, None, tmp_path / "model.yaml")


# --------------------------------------------------------------------------------------------------
# OpenAI's dVAE


@pytest.fixture
def dvae_folder(parity):
    return parity("openai_dvae/openai_dvae")


@torch.no_grad()
def test_dvae_as_recorded(dvae_folder):
    golden = load_file(dvae_folder / "golden.safetensors")
    vae = OpenAIDiscreteVAE(dvae_folder / "encoder.pkl", dvae_folder / "decoder.pkl")
    tokens = vae.get_codebook_indices(golden["image"])
    assert torch.equal(tokens, golden["indices"]) and (vae.image_size, vae.num_layers, vae.num_tokens) == (256, 3, 128)
    assert_close(vae.decode(tokens), golden["decoded"])
    rows = vae.embed(tokens)
    assert rows.shape == (1, 16, 8, 8) and torch.equal(rows[0, :, 1, 2], vae.codebook_weight[tokens[0, 10]])


def test_dvae_becomes_a_native_folder(dvae_folder, tmp_path):
    vae = open_published(dvae_folder / "decoder.pkl")
    vae.save_pretrained(tmp_path / "native")
    assert same_weights(vae, OpenAIDiscreteVAE.from_pretrained(tmp_path / "native"))
    assert same_weights(vae, open_published(dvae_folder))


def test_new_dvae_has_the_published_sizes():
    with torch.device("meta"):
        vae = OpenAIDiscreteVAE(image_size=256)
    assert vae.encoder.conv_out.weight.shape == (8192, 2048, 1, 1) and vae.decoder.conv_in.weight.shape[1] == 8192
    assert len(vae.encoder.groups) == 4 and [len(group) for group in vae.decoder.groups] == [2] * 4


def test_dvae_halves_that_do_not_belong_together(dvae_folder, tmp_path):
    decoder = module_state(read_torch(dvae_folder / "decoder.pkl"))
    decoder["blocks.input.w"] = decoder["blocks.input.w"][:, :100]
    torch.save(decoder, tmp_path / "decoder.pkl")
    message = one_line(OpenAIDiscreteVAE, dvae_folder / "encoder.pkl", tmp_path / "decoder.pkl")
    assert "encoder has 128 codes, the decoder 100" in message
    message = one_line(OpenAIDiscreteVAE, dvae_folder / "decoder.pkl", dvae_folder / "encoder.pkl")
    assert "the encoder has" in message or "missing" in message


# --------------------------------------------------------------------------------------------------
# CLIP


@pytest.fixture
def clip_folder(parity):
    return parity("clip/clip_vit_jit")


def clip_state(folder):
    """The weights in the archive as PyTorch itself reads them."""
    state = dict(torch.jit.load(folder / "clip_jit.pt", map_location="cpu").state_dict())
    # Numbers beside the weights in OpenAI's own archives.
    sizes = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(600)}
    return {**state, **sizes}


@pytest.mark.parametrize("name", ["clip_jit.pt", "clip_state_dict.pt"])
@torch.no_grad()
def test_clip_as_recorded(clip_folder, name, tmp_path):
    golden = load_file(clip_folder / "golden.safetensors")
    torch.save(clip_state(clip_folder), tmp_path / "clip_state_dict.pt")
    clip = load_clip((clip_folder if name == "clip_jit.pt" else tmp_path) / name)
    clip.save_pretrained(tmp_path / "native")
    for model in (clip, load_clip(tmp_path / "native")):
        image, text = model.encode_image(golden["image"]), model.encode_text(golden["tokens"])
        assert_close(image, golden["image_features"])
        assert_close(text, golden["text_features"])
        cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        assert_close(cosine * model.model.logit_scale.exp(), golden["logits_per_image"])
        assert model.image_size == 64 and not model.training


def test_clip_in_half_precision_opens_in_float32(clip_folder, tmp_path):
    state = clip_state(clip_folder)
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()},
               tmp_path / "clip.pt")  # fmt: skip
    assert {parameter.dtype for parameter in load_clip(str(tmp_path / "clip.pt")).parameters()} == {torch.float32}


def test_layers_are_counted_not_believed(clip_folder, tmp_path):
    """A name with a number is one more layer, not as many as the number says."""
    state = clip_state(clip_folder)
    for number in ("99999999", "9" * 5000):
        name = f"visual.transformer.resblocks.{number}.ln_1.bias"
        torch.save({**state, name: torch.ones(1)}, tmp_path / "clip.pt")
        message = one_line(load_clip, tmp_path / "clip.pt")
        assert "has unknown" in message or "lacks" in message or "is not a state dict" in message


def test_clip_that_is_none(clip_folder, tmp_path):
    state = clip_state(clip_folder)
    torch.save({**state, "visual.layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "clip.pt")
    assert "with a ResNet" in one_line(load_clip, tmp_path / "clip.pt")
    del state["visual.proj"]
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "clip.pt")
    message = one_line(load_clip, tmp_path / "clip.pt")
    assert "lacks model.visual_projection.weight" in message and "has unknown model.more" in message
    torch.save({"a": torch.ones(1)}, tmp_path / "clip.pt")
    assert "is not a CLIP of OpenAI's or open_clip's: missing 'token_embedding.weight'" in one_line(
        load_clip, tmp_path / "clip.pt"
    )
    assert "is missing" in one_line(load_clip, tmp_path / "none.pt")


@torch.no_grad()
def test_clip_tokens_and_scores(clip_folder, monkeypatch):
    clip = load_clip(clip_folder / "clip_jit.pt")
    monkeypatch.setattr(clip_published, "SimpleTokenizer", lambda path: Letters(600))
    tokens = clip.tokenize(["ab", "", "a" * 100])
    assert tokens.shape == (3, 77) and tokens[0, :5].tolist() == [598, 1, 2, 599, 0]
    assert tokens[1, :3].tolist() == [598, 599, 0] and tokens[2, -2:].tolist() == [1, 599]
    images = torch.rand(3, 3, 128, 128)
    scores = clip.score("ab", images)
    features = clip.encode_image(F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1))
    assert_close(scores, F.cosine_similarity(clip.encode_text(tokens[:1]), features))
    monkeypatch.setattr(clip_published, "SimpleTokenizer", lambda path: Letters(601))
    clip = load_clip(clip_folder / "clip_jit.pt")
    assert "has 600 text tokens, but its vocabulary 601" in one_line(clip.tokenize, "ab")
    clip.tokenizer = Letters(601)
    assert clip.tokenize("ab").shape == (1, 77)


@pytest.mark.parametrize("eos", ["the end token", "2, as in older configurations"])
@torch.no_grad()
def test_hugging_face_clip(tmp_path, eos):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 48, "pad_token_id": 49,
            "eos_token_id": 49 if eos == "the end token" else 2}  # fmt: skip
    vision = {**sizes, "hidden_act": "gelu", "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 2]}')
    tokens = torch.tensor([[48, 3, 4, 49, 49, 49, 49, 49, 49], [48, 9, 8, 7, 6, 5, 4, 3, 49]])
    image = torch.rand(2, 3, 32, 32)
    pixels = (image - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([1, 1, 2])[:, None, None]
    expected = model(input_ids=tokens, pixel_values=pixels)
    clip = load_clip(tmp_path / "hf")
    clip.save_pretrained(tmp_path / "native", dtype=torch.float32)
    for model in (clip, load_clip(tmp_path / "native")):
        assert isinstance(model, PublishedCLIP) and model.image_size == 32
        assert_close(F.normalize(model.encode_text(tokens), dim=-1), expected.text_embeds)
        assert_close(F.normalize(model.encode_image(image), dim=-1), expected.image_embeds)


def test_hugging_face_weights_in_other_files(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    whole = load_clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in one_line(load_clip, tmp_path)
    # As older versions saved it, with tables that are computed now.
    torch.save({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "pytorch_model.bin")
    assert same_weights(whole, load_clip(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    keys = sorted(state)
    parts = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: state[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(whole, load_clip(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "expected a model of type clip, got bert" in one_line(load_clip, tmp_path)


def test_vocabulary_goes_with_the_model(tmp_path, clip_folder):
    clip = load_clip(clip_folder / "clip_jit.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/merges.txt").write_text("#version\n")
    clip.bpe_path = tmp_path / "hf/merges.txt"
    clip.save_pretrained(tmp_path / "native")
    assert load_clip(tmp_path / "native").bpe_path == tmp_path / "native/merges.txt"


@torch.no_grad()
def test_trainable_clip_as_recorded(parity):
    folder = parity("dalle/clip_trainable")
    golden = load_file(folder / "golden.safetensors")
    clip = load_clip(folder / "clip.pt")
    mask = golden["text_mask"].bool() if "text_mask" in golden else None
    assert_close(clip(golden["text"], golden["image"], text_mask=mask).flatten(), golden["scores"].flatten())
    loss = clip(golden["text"], golden["image"], text_mask=mask, return_loss=True)
    assert_close(loss.flatten(), golden["loss"].flatten())


def test_hub_name_without_a_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert "owner/name is not a local folder and cannot be downloaded from the hub (no route)" in one_line(
        load_clip, "owner/name"
    )


# --------------------------------------------------------------------------------------------------
# The prior. Its numbers are those of tests/unit/priors/test_dalle.py


@pytest.mark.parametrize("case", PRIORS)
@torch.no_grad()
def test_prior_becomes_a_native_folder(parity, case, tmp_path):
    folder = parity(f"dalle/{case}")
    golden = load_file(folder / "golden.safetensors")
    load_dalle(folder / "dalle.pt").save_pretrained(tmp_path / "native")
    dalle = load_dalle(tmp_path / "native")
    allowed = golden["logits_allowed"].bool()
    assert_close(dalle(golden["text"], golden["image_tokens"])[allowed], golden["logits"][allowed])
    decoded = golden["decoded_image"]
    assert_close(dalle.vae.decode(golden["image_tokens"][: len(decoded)]), decoded)


@pytest.fixture
def prior(parity):
    return parity("dalle/axial_conv") / "dalle.pt"


def test_another_vae(prior, tmp_path):
    vae = DiscreteVAE(image_size=32, num_tokens=64, codebook_dim=8, hidden_dim=8)
    assert load_dalle(prior, vae).vae is vae
    vae = DiscreteVAE(image_size=32, num_tokens=65, codebook_dim=8, hidden_dim=8)
    assert one_line(load_dalle, prior, vae) == f"{prior}: expected a VAE of 64 image tokens, got 65"
    load_dalle(prior).save_pretrained(tmp_path)
    assert "expected a VAE of 64 image tokens, got 65" in one_line(load_dalle, tmp_path, vae=vae)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"dim": 64}, "dim is 64 according to its hparams, but 48 in the weights"),
        ({"depth": 5}, "depth is 5 according to its hparams, but 4 in the weights"),
        ({"num_text_tokens": 100}, "num_text_tokens is 100 according to its hparams, but 120 in the weights"),
        ({"heads": 4}, "hparams have 4 heads of 16, the weights 48 channels in all"),
        ({"shift_tokens": False}, "shift_tokens is False according to its hparams, but True in the weights"),
        ({"attn_types": ("full", "mlp")}, r"gMLP layers \(attn_types mlp\), which are not supported"),
        ({"hidden": 3}, "settings unknown to DALLE: hidden"),
        ({"attn_types": ("fully",)}, "unknown attention type 'fully'"),
    ],
)
def test_hparams_that_contradict(prior, tmp_path, hparams, message):
    path = changed(prior, tmp_path / "dalle.pt", lambda content: content["hparams"].update(hparams))
    with pytest.raises(CheckpointError, match=message):
        load_dalle(path)


def test_prior_keys_are_named(prior, tmp_path):
    def change(content):
        content["weights"]["more"] = content["weights"].pop("to_logits.0.bias")

    message = one_line(load_dalle, changed(prior, tmp_path / "dalle.pt", change))
    assert "lacks norm.bias" in message and "has unknown more" in message


@torch.no_grad()
def test_ignored_and_sparse_attention(prior, tmp_path):
    golden = load_file(prior.parent / "golden.safetensors")
    # 1.x took sparse_attn and ignored it.
    path = changed(prior, tmp_path / "dalle.pt", lambda content: content["hparams"].update(sparse_attn=True))
    logits = load_dalle(path)(golden["text"], golden["image_tokens"])
    allowed = golden["logits_allowed"].bool()
    assert_close(logits[allowed], golden["logits"][allowed])
    # The random blocks of `sparse` layers were never saved: they are chosen here, always the same.
    path = changed(
        prior, tmp_path / "dalle.pt", lambda content: content["hparams"].update(attn_types=("full", "sparse"))
    )
    first, second = load_dalle(path), load_dalle(path)
    assert first.transformer.layers[1].attn.fn.pattern.layout.any() and same_weights(first, second)


def test_other_rotary_positions_are_refused(prior, tmp_path):
    path = changed(prior, tmp_path / "dalle.pt", lambda content: content["weights"]["transformer.pos_emb"].mul_(2))
    message = one_line(load_dalle, path)
    assert "rotary positions of an unsupported kind" in message and path in message


def test_training_state_is_not_read(prior, tmp_path, monkeypatch):
    def change(content):
        content["opt_state"] = {"state": {0: {"exp_avg": torch.zeros(2**20)}}}

    path = changed(prior, tmp_path / "dalle.pt", change)
    monkeypatch.setattr("dalle_pytorch.published.unpickler.zipfile.ZipFile.read", counted := Counted())
    assert same_weights(load_dalle(path), load_dalle(prior))
    assert counted.largest < 2**20


class Counted:
    """Stands for `ZipFile.read` and remembers the largest answer."""

    largest = 0

    def __get__(self, archive, _):
        def read(info):
            with archive.open(info) as member:
                data = member.read()
            Counted.largest = max(Counted.largest, len(data))
            return data

        return read


# Other VAEs within a checkpoint, as DALLE-pytorch saves them with the prior


def with_vae(prior, path, name: str, num_tokens: int, vae: dict[str, torch.Tensor]) -> None:
    """A prior for another codebook, its VAE saved with it under `vae.`."""
    content = torch.load(prior, weights_only=True)
    weights = {key: value for key, value in content["weights"].items() if not key.startswith("vae.")}
    text = len(weights["text_emb.weight"])
    for key in ("to_logits.1.weight", "to_logits.1.bias"):
        weights[key] = torch.cat((weights[key][:text], torch.zeros(num_tokens, *weights[key].shape[1:])))
    weights["image_emb.weight"] = torch.zeros(num_tokens, 48)
    weights |= {f"vae.{key}": value for key, value in vae.items()}
    torch.save({**content, "weights": weights, "vae_params": None, "vae_class_name": name}, path)


def test_vqgan_within_a_checkpoint(prior, parity, tmp_path):
    folder = parity("vqgan/gumbel_f8")
    state = read_torch(folder / "last.ckpt")["state_dict"]
    with_vae(prior, tmp_path / "dalle.pt", "VQGanVAE", 96, {f"model.{key}": value for key, value in state.items()})
    vae = load_dalle(tmp_path / "dalle.pt").vae
    assert isinstance(vae, VQGanVAE) and same_weights(vae, VQGanVAE(folder / "last.ckpt"))


def dvae_state(folder) -> dict[str, torch.Tensor]:
    """The weights of OpenAI's dVAE as DALLE-pytorch's wrapper has them."""
    halves = {"enc": "encoder.pkl", "dec": "decoder.pkl"}
    return {
        f"{half}.{key}": value
        for half, name in halves.items()
        for key, value in module_state(read_torch(folder / name)).items()
    }


def test_dvae_within_a_checkpoint(prior, dvae_folder, tmp_path):
    with_vae(prior, tmp_path / "dalle.pt", "OpenAIDiscreteVAE", 128, dvae_state(dvae_folder))
    vae = load_dalle(tmp_path / "dalle.pt").vae
    assert isinstance(vae, OpenAIDiscreteVAE) and same_weights(vae, open_published(dvae_folder))


def test_vae_that_is_not_there(prior, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_pytorch.files.downloads._download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "dalle.pt"
    with_vae(prior, path, "VQGanVAE", 64, {})
    assert "does not include its VAE, a VQGanVAE of 64 tokens" in one_line(load_dalle, path)
    for name, tokens, url in (
        ("OpenAIDiscreteVAE", 64, "https://cdn.openai.com/dall-e/encoder.pkl"),
        (None, 64, "https://cdn.openai.com/dall-e/encoder.pkl"),
        ("VQGanVAE", 1024, "https://heibox.uni-heidelberg.de/f/140747ba53464f49b476/?dl=1"),
        ("VQGanVAE", 8192, "https://heibox.uni-heidelberg.de/f/34a747d5765840b5a99d/?dl=1"),
    ):
        with_vae(prior, path, name, tokens, {})
        message = one_line(load_dalle, path)
        assert url in message and str(tmp_path / ".cache/dalle") in message


def offline(*args):
    raise OSError("no network")


@pytest.mark.parametrize("call", [VQGanVAE, OpenAIDiscreteVAE, load_clip, lambda: load_clip("ViT-L/14")])
def test_nothing_given_means_the_published_files(call, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_pytorch.files.downloads._download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = one_line(call)
    assert "no network" in message and "https://" in message and str(tmp_path / ".cache/dalle") in message


# DeepSpeed


@pytest.mark.parametrize("kind", ["consolidated", "beside", "mp_rank", "module"])
def test_deepspeed(prior, tmp_path, kind):
    content = torch.load(prior, weights_only=True)
    weights = content.pop("weights")
    folder = tmp_path / "dalle-ds-cp"
    (folder / "global_step10").mkdir(parents=True)
    # What DALLE-pytorch puts in the place of the weights.
    torch.save({**content, "weights": "To get a working standard checkpoint, look into consolidating"},
               folder / "auxiliary.pt")  # fmt: skip
    if kind != "mp_rank":
        assert "zero_to_fp32.py" in one_line(load_dalle, folder)
    if kind == "consolidated":
        torch.save(weights, folder / "pytorch_model.bin")
        opened = [load_dalle(folder), load_dalle(folder / "auxiliary.pt"), open_published(folder)]
    elif kind == "beside":
        torch.save({f"module.{key}": value for key, value in weights.items()}, folder / "consolidated.pt")
        opened = [load_dalle(folder / "consolidated.pt")]
    elif kind == "mp_rank":
        torch.save({"module": weights, "dp_world_size": 1}, folder / "global_step10/mp_rank_00_model_states.pt")
        opened = [load_dalle(folder / "global_step10/mp_rank_00_model_states.pt")]
    else:
        torch.save({"module": weights}, folder / "pytorch_model.bin")
        opened = [open_published(folder / "pytorch_model.bin")]
    assert all(same_weights(dalle, load_dalle(prior)) for dalle in opened)


# --------------------------------------------------------------------------------------------------
# DALLE-pytorch's weights into a model made from its settings, by `load_state_dict`


def same_outputs(dalle: DALLE, path) -> None:
    """Asserts that a prior and its VAE compute what `load_dalle` computes."""
    reference = load_dalle(path)
    text = torch.randint(1, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(reference.num_image_tokens, (2, reference.image_seq_len))
    with torch.no_grad():
        assert_close(dalle.eval()(text, tokens), reference(text, tokens))
        assert_close(dalle.vae.decode(tokens), reference.vae.decode(tokens))


@pytest.mark.parametrize("case", PRIORS)
def test_upstream_weights_into_a_new_prior(parity, case):
    path = parity(f"dalle/{case}") / "dalle.pt"
    content = torch.load(path, weights_only=True)
    settings = {"shift_tokens": True, "rotary_emb": True, **content["hparams"]}
    if case == "dall3_default":  # 16 × 16 tokens, whatever the size of the VAE's images
        settings["image_fmap_size"] = 16
    dalle = DALLE(vae=DiscreteVAE(**content["vae_params"]), **settings)
    result = dalle.load_state_dict(content["weights"])
    assert not result.missing_keys and not result.unexpected_keys
    same_outputs(dalle, path)


@pytest.mark.parametrize("kind", ["VQGanVAE", "OpenAIDiscreteVAE"])
def test_upstream_weights_with_another_vae(prior, parity, dvae_folder, tmp_path, kind):
    path = tmp_path / "dalle.pt"
    if kind == "VQGanVAE":
        folder = parity("vqgan/gumbel_f8")
        vae = VQGanVAE(**VQGanVAE(folder / "last.ckpt", folder / "model.yaml").config)
        state = {f"model.{key}": value for key, value in read_torch(folder / "last.ckpt")["state_dict"].items()}
    else:
        vae = OpenAIDiscreteVAE(**OpenAIDiscreteVAE(dvae_folder / "encoder.pkl").config)
        state = dvae_state(dvae_folder)
    with_vae(prior, path, kind, vae.num_tokens, state)
    content = torch.load(path, weights_only=True)
    dalle = DALLE(vae=vae, image_fmap_size=4, **content["hparams"])
    assert not any(dalle.load_state_dict(content["weights"]))
    same_outputs(dalle, path)


def test_upstream_weights_of_a_prior_alone(prior):
    content = torch.load(prior, weights_only=True)
    weights = {key: value for key, value in content["weights"].items() if not key.startswith("vae.")}
    dalle = DALLE(vae=load_dalle(prior).vae, **content["hparams"])
    dalle.load_state_dict(weights)
    same_outputs(dalle, prior)


def test_random_blocks_stay_under_upstream_weights(prior):
    content = torch.load(prior, weights_only=True)
    settings = {**content["hparams"], "attn_types": ("full", "sparse")}
    dalle = DALLE(vae=DiscreteVAE(**content["vae_params"]), **settings)
    layout = dalle.transformer.layers[1].attn.fn.pattern.layout.clone()
    assert not any(dalle.load_state_dict(content["weights"]))
    assert torch.equal(dalle.transformer.layers[1].attn.fn.pattern.layout, layout)
    assert torch.equal(dalle.norm.bias, load_dalle(prior).norm.bias)


def test_own_names_and_mismatches_in_load_state_dict(prior, parity):
    content = torch.load(prior, weights_only=True)
    dalle = DALLE(vae=DiscreteVAE(**content["vae_params"]), **content["hparams"])
    dalle.load_state_dict(load_dalle(prior).state_dict())
    same_outputs(dalle, prior)
    weights = content["weights"]
    more = weights.pop("to_logits.0.bias")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "norm\.bias"'):
        dalle.load_state_dict(weights)
    assert dalle.load_state_dict(weights, strict=False).missing_keys == ["norm.bias"]
    weights |= {"to_logits.0.bias": more, "more": more}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        dalle.load_state_dict(weights)
    other = DALLE(vae=dalle.vae, **{**content["hparams"], "dim": 64})
    with pytest.raises(RuntimeError, match=r"size mismatch for norm\.weight"):
        other.load_state_dict(weights, strict=False)
    weights["transformer.pos_emb"] *= 2
    with pytest.raises(ValueError, match="rotary positions of an unsupported kind"):
        dalle.load_state_dict(weights)


@torch.no_grad()
def test_upstream_weights_into_a_new_clip(parity):
    path = parity("dalle/clip_trainable") / "clip.pt"
    golden = load_file(path.with_name("golden.safetensors"))
    content = torch.load(path, weights_only=True)
    for weights in (content["weights"], load_clip(path).state_dict()):
        clip = CLIP(**content["hparams"])
        assert not any(clip.load_state_dict(weights))
        assert_close(clip(golden["text"], golden["image"], golden["text_mask"].bool()), golden["scores"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        CLIP(**{**content["hparams"], "dim_latent": 8}).load_state_dict(content["weights"])


# --------------------------------------------------------------------------------------------------
# Any file


def test_what_a_file_is(parity, tmp_path):
    kinds = {
        "dalle/dvae_gumbel/vae.pt": DiscreteVAE,
        "dalle/clip_trainable/clip.pt": "CLIP",
        "dalle/axial_conv/dalle.pt": "DALLE",
        "vqgan/gumbel_f8/last.ckpt": VQGanVAE,
        "vqgan/gumbel_f8": VQGanVAE,
        "openai_dvae/openai_dvae/encoder.pkl": OpenAIDiscreteVAE,
        "clip/clip_vit_jit/clip_jit.pt": PublishedCLIP,
    }
    for name, kind in kinds.items():
        model = open_published(parity(name))
        assert type(model).__name__ == getattr(kind, "__name__", kind) and not model.training
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UnknownFormatError, match="not a prior, VAE or CLIP") as error:
        open_published(tmp_path / "a.pt")
    assert list(error.value.entries) == ["a"]
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pt")
    assert "is not a CLIP of OpenAI's" in one_line(open_published, tmp_path / "a.pt")
    load_discrete_vae(parity("dalle/dvae_gumbel") / "vae.pt").save_pretrained(tmp_path / "vae")
    assert isinstance(open_published(tmp_path / "vae"), DiscreteVAE)


def test_discrete_vae_opens_its_file(parity, tmp_path):
    path = parity("dalle/dvae_gumbel") / "vae.pt"
    vae = DiscreteVAE(path)
    assert not vae.training and same_weights(vae, load_discrete_vae(path)) and vae.config == DiscreteVAE(path).config
    vae.save_pretrained(tmp_path / "native")
    assert same_weights(vae, DiscreteVAE.from_pretrained(tmp_path / "native"))
    # Without a path it is a new one, as ever.
    assert DiscreteVAE().training and DiscreteVAE(num_tokens=8).num_tokens == 8
    # And as DALLE-pytorch's own scripts open it.
    content = torch.load(path, weights_only=True)
    again = DiscreteVAE(**content["hparams"])
    again.load_state_dict(content["weights"])
    assert same_weights(vae, again)


def test_no_file_runs_code(parity, tmp_path):
    class Touch:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    calls = [
        load_dalle,
        load_discrete_vae,
        DiscreteVAE,
        load_clip,
        open_published,
        VQGanVAE,
        OpenAIDiscreteVAE,
    ]
    for call in calls:
        torch.save({"hparams": {"dim": Touch()}, "weights": {}, "state_dict": {}}, tmp_path / "file.pt")
        message = one_line(call, tmp_path / "file.pt")
        assert "holds more than tensors and settings" in message and not (tmp_path / "touched").exists()


def test_no_memory_for_parameters_that_are_replaced(parity, monkeypatch):
    devices = set()

    def load(model, *args):
        devices.update(parameter.device.type for parameter in model.parameters())
        load_state(model, *args)

    monkeypatch.setattr("dalle_pytorch.published.common.load_state", load)
    model = load_discrete_vae(parity("dalle/dvae_gumbel") / "vae.pt")
    assert devices == {"meta"} and model.device.type == "cpu"
