"""Rankers in Hugging Face's and open_clip's layouts: transformers' numbers, and what is asked for."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dalle_pytorch.clip.published import PublishedCLIP
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.published import clip_config
from dalle_pytorch.published.clip import load_clip
from dalle_pytorch.published.clip_config import read_clip_config
from dalle_pytorch.published.load import open_published
from text_to_image.commands import convert, generate

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 320, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def reference():
    """transformers' CLIP in ViT-H/14's shape: heads of 80, of which 64 makes another number, the plain GELU."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": "gelu", "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 48,
            "eos_token_id": 49, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4,
              "hidden_act": "gelu", "image_size": 28, "patch_size": 14}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for parameter in model.parameters():  # attention and activation show in the features
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def open_clip_state(model):
    """The weights under open_clip's names, written out part by part."""
    own, state = model.state_dict(), {"logit_scale": model.logit_scale.detach()}
    text, vision = "text_model.embeddings.", "vision_model.embeddings."
    state |= {
        "positional_embedding": own[f"{text}position_embedding.weight"], "text_projection":
        own["text_projection.weight"].T.contiguous(), "token_embedding.weight": own[f"{text}token_embedding.weight"],
        "visual.class_embedding": own[f"{vision}class_embedding"], "visual.proj":
        own["visual_projection.weight"].T.contiguous(), "visual.conv1.weight": own[f"{vision}patch_embedding.weight"],
        "visual.positional_embedding": own[f"{vision}position_embedding.weight"],
    }  # fmt: skip
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm"}  # fmt: skip
    for prefix, tower in (("", "text_model"), ("visual.", "vision_model")):
        for i in range(2):
            theirs, ours = f"{prefix}transformer.resblocks.{i}.", f"{tower}.encoder.layers.{i}."
            norms |= {f"{theirs}ln_1": f"{ours}layer_norm1", f"{theirs}ln_2": f"{ours}layer_norm2",
                      f"{theirs}mlp.c_fc": f"{ours}mlp.fc1", f"{theirs}mlp.c_proj": f"{ours}mlp.fc2",
                      f"{theirs}attn.out_proj": f"{ours}self_attn.out_proj"}  # fmt: skip
            for kind in ("weight", "bias"):
                parts = [own[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
                state[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
    return state | {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}


@torch.no_grad()
def assert_same_features(clip, reference, mean=clip_config.IMAGE_MEAN, std=clip_config.IMAGE_STD):
    assert isinstance(clip, PublishedCLIP) and clip.image_size == 28
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0], [48, 9, 8, 7, 6, 5, 4, 3, 49]])
    image = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    pixels = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = reference(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(F.normalize(clip.encode_text(tokens), dim=-1), expected.text_embeds)
    torch.testing.assert_close(F.normalize(clip.encode_image(image), dim=-1), expected.image_embeds)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards of bin"])
def test_hugging_face_layout_of_pickscore(reference, tmp_path, layout):
    reference.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "crop_size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    if layout != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        state, names = reference.state_dict(), sorted(reference.state_dict())
        if layout == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
            for name, part in parts.items():
                torch.save({key: state[key] for key in part}, tmp_path / name)
            index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_features(load_clip(tmp_path), reference, pixels["image_mean"], pixels["image_std"])
    with pytest.raises(CheckpointError, match="says all of its settings"):
        load_clip(tmp_path, "ViT-H-14")


@pytest.mark.parametrize("kind", ["training", "state dict", "safetensors", "distributed", "half"])
def test_open_clip_files(reference, tmp_path, kind):
    state, path = open_clip_state(reference), tmp_path / "weights.pt"
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG))
    if kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif kind == "state dict":
        torch.save(state, path)
    elif kind == "half":
        torch.save({"state_dict": {key: tensor.half() for key, tensor in state.items()}}, path)
    else:
        prefix = "module." if kind == "distributed" else ""
        state = {prefix + key: tensor for key, tensor in state.items()}
        torch.save({"epoch": 3, "name": "mine", "state_dict": state, "optimizer": {"state": {}}}, path)
    for load in (load_clip, open_published):
        with pytest.raises(CheckpointError, match=r"heads and the activation .* --clip_config") as error:
            load(path)
        assert "\n" not in str(error.value)
    clip = load_clip(path, tmp_path / "mine.json")
    if kind != "half":
        assert_same_features(clip, reference)
    assert [clip.config[tower]["num_attention_heads"] for tower in ("vision", "text")] == [4, 2]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    assert load_clip(path).config == clip.config == open_published(path).config


def test_open_clip_folder(reference, tmp_path):
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": pixels}))
    with pytest.raises(CheckpointError, match=r"neither open_clip_model.safetensors nor open_clip_pytorch_model.bin"):
        load_clip(tmp_path)
    torch.save(open_clip_state(reference), tmp_path / "open_clip_pytorch_model.bin")
    assert_same_features(load_clip(tmp_path), reference, pixels["mean"], pixels["std"])
    convert.main([str(tmp_path), str(tmp_path / "native")])
    assert_same_features(load_clip(tmp_path / "native"), reference, pixels["mean"], pixels["std"])


def test_quick_gelu_is_told(reference, tmp_path):
    torch.save(open_clip_state(reference), tmp_path / "weights.pt")
    (tmp_path / "mine.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    clip = load_clip(tmp_path / "weights.pt", tmp_path / "mine.json")
    assert clip.config["vision"]["hidden_act"] == clip.config["text"]["hidden_act"] == "quick_gelu"


def test_hub_name_of_open_clip_downloads_one_kind_of_weights(reference, tmp_path, monkeypatch):
    torch.save(open_clip_state(reference), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_features(load_clip("owner/name"), reference)
    assert not any("*.safetensors" in patterns for patterns in asked)
    assert all(pattern.endswith((".json", ".txt")) for pattern in asked[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}}, "layers is 3 according to the configuration, but 2"),
        ({"vision_cfg": {**CONFIG["vision_cfg"], "width": 640}}, "width is 640 according"),
        ({"embed_dim": 32}, "embed_dim is 32 according"),
        ({"vision_cfg": {**CONFIG["vision_cfg"], "head_width": 96}}, "a width of 320 has no heads of 96"),
        ({"text_cfg": {**CONFIG["text_cfg"], "heads": 3}}, "a width of 64 has no 3 heads"),
        ({"text_cfg": {**CONFIG["text_cfg"], "heads": "2"}}, "whole numbers"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg has hf_model_name, which is not supported"),
        ({"vision_cfg": {**CONFIG["vision_cfg"], "layers": [3, 4, 6, 3]}}, "a CLIP with a ResNet"),
        ({"vision_cfg": None}, "is not a configuration of open_clip's"),
    ],
)
def test_configurations_that_do_not_fit(reference, tmp_path, change, message):
    torch.save(open_clip_state(reference), tmp_path / "weights.pt")
    (tmp_path / "mine.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(CheckpointError, match=message) as error:
        load_clip(tmp_path / "weights.pt", tmp_path / "mine.json")
    assert "\n" not in str(error.value)


def test_architectures_by_name(reference, tmp_path):
    config = read_clip_config("ViT-H-14")
    assert (config.vision, config.vision_heads, config.text_heads, config.hidden_act) == (
        {"width": 1280, "layers": 32, "patch_size": 14}, -80, -64, "gelu")  # fmt: skip
    config = read_clip_config("ViT-H-14-378-quickgelu")
    assert config.vision["image_size"] == 378 and config.hidden_act == "quick_gelu"
    assert read_clip_config("ViT-B-16-plus-240").vision["width"] == 896
    assert [read_clip_config(f"ViT-{size}-14").vision_heads for size in ("L", "g", "bigG")] == [-64, -88, -104]
    torch.save(open_clip_state(reference), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="width is 1280 according to the configuration, but 320 in the weights"):
        load_clip(tmp_path / "weights.pt", "ViT-H-14")
    for name in ("ViT-H-14-CLIPA", "RN50", "nothing"):
        with pytest.raises(CheckpointError, match="nor an architecture of open_clip's that is known"):
            load_clip(tmp_path / "weights.pt", name)
    with pytest.raises(CheckpointError, match=r"none.json is missing"):
        load_clip(tmp_path / "weights.pt", tmp_path / "none.json")


def test_resnets_are_refused_by_name(tmp_path):
    for load in (load_clip, open_published):
        with pytest.raises(CheckpointError, match="RN50 is a CLIP with a ResNet; only those with a vision transformer"):
            load("RN50")
    with pytest.raises(CheckpointError, match="RN50x4 is a CLIP with a ResNet"):
        generate.main(["--text", "a", "--clip_path", "RN50x4", "--clip_sort", "--outputs_dir", str(tmp_path)])
    with pytest.raises(UsageError, match="--clip_config goes with --clip_path"):
        generate.main(["--text", "a", "--clip_config", "ViT-H-14"])


def test_hpsv2_is_a_name(reference, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    (tmp_path / ".cache/dalle").mkdir(parents=True)
    torch.save({"state_dict": open_clip_state(reference)}, tmp_path / ".cache/dalle/HPS_v2.1_compressed.pt")
    monkeypatch.setitem(clip_config._VISION, "H", (320, 2, 80))
    assert load_clip("HPSv2.1").config["vision"]["num_attention_heads"] == 4
