"""CLIP: OpenAI's files, Hugging Face's folders, and the one that DALLE-pytorch trains."""

import math
import os
from pathlib import Path
from typing import Any

from dalle_pytorch.clip.published import PublishedCLIP, find_vocabulary
from dalle_pytorch.clip.trainable import CLIP, UPSTREAM_NAMES
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening, opens
from dalle_pytorch.files.downloads import CLIPS, default_file
from dalle_pytorch.nn.upstream import State, count_parts, rename
from dalle_pytorch.pretrained import read_config, read_tensors, resolve_folder
from dalle_pytorch.published.common import TRAINING_STATE, as_checkpoint, as_state, build, is_file
from dalle_pytorch.published.unpickler import read_torch, tensor_dict

_OPENAI_CLIP_NAMES = (
    (r"^visual\.(class_embedding)$", r"vision_model.embeddings.\1"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' own spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.([qkv]_proj|out_proj)\.", r".self_attn.\1."),
)
_HUB_FILES = ("config.json", "preprocessor_config.json", "merges.txt", "tokenizer.json")
_TOWER_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                   "layer_norm_eps")  # fmt: skip
_TEXT_SETTINGS = (*_TOWER_SETTINGS, "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
                  "pad_token_id")  # fmt: skip
_VISION_SETTINGS = (*_TOWER_SETTINGS, "num_channels", "image_size", "patch_size")


@opens
def load_clip(path_or_name: str | os.PathLike | None = None) -> CLIP | PublishedCLIP:
    """Opens a CLIP: a native folder; OpenAI's file (TorchScript or state dict), or its name for one ("ViT-B/32", which
    is the default); a Hugging Face folder or hub name; or the trainable CLIP's weights with their `hparams`.
    """
    path = "ViT-B/32" if path_or_name is None else path_or_name
    if str(path) in CLIPS:
        path = default_file(CLIPS[str(path)])
    if is_file(path):
        return open_clip(path, read_torch(path, TRAINING_STATE))
    folder = resolve_folder(path, (*_HUB_FILES, "*.safetensors", "*.safetensors.index.json"))
    config = read_config(folder)
    if config.get("class") == "CLIP":
        return CLIP.from_pretrained(folder)
    if "class" in config:
        return PublishedCLIP.from_pretrained(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        folder = resolve_folder(path, (*_HUB_FILES, "pytorch_model*.bin", "*.bin.index.json"))
    return _open_hugging_face_clip(folder, config)


def open_trainable_clip(path: str | os.PathLike, checkpoint: dict[str, Any]) -> CLIP:
    """The trainable CLIP of a checkpoint of DALLE-pytorch."""
    return build(path, CLIP, checkpoint["hparams"], rename(checkpoint["weights"], UPSTREAM_NAMES))


def open_clip(path: str | os.PathLike, content: Any) -> CLIP | PublishedCLIP:
    """`load_clip` of the content of a file."""
    if isinstance(content, dict) and "hparams" in content:
        return open_trainable_clip(path, as_checkpoint(path, content))
    return _open_openai_clip(path, as_state(path, content))


def _open_openai_clip(path: str | os.PathLike, state: State) -> PublishedCLIP:
    def tower(prefix: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.bias"]),
            "num_hidden_layers": count_parts(state, prefix + r"(\d+)\."), "num_attention_heads": max(width // 64, 1),
            "hidden_act": "quick_gelu",
        }  # fmt: skip

    if "visual.layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{path} is a CLIP with a ResNet; only those with a vision transformer are supported")
    own: State = {}
    with opening(path, "is not a CLIP of OpenAI's"):
        vocab_size, text_width = state["token_embedding.weight"].shape
        width, channels, patch_size, _ = state["visual.conv1.weight"].shape
        text = tower("transformer.resblocks.", text_width) | {
            "vocab_size": vocab_size,
            "max_position_embeddings": len(state["positional_embedding"]),
            "bos_token_id": vocab_size - 2,
            # With this value transformers reads the features at the largest token id.
            "eos_token_id": 2,
        }
        vision = tower("visual.transformer.resblocks.", width) | {
            "num_channels": channels,
            "image_size": math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch_size,
            "patch_size": patch_size,
        }
        projection_dim = state["text_projection"].shape[1]
        for key, tensor in state.items():
            if key in ("input_resolution", "context_length", "vocab_size"):  # known from the shapes
                continue
            if key.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
                layer, _, kind = key.rpartition("in_proj_")
                own |= {f"{layer}{part}_proj.{kind}": chunk for part, chunk in zip("qkv", tensor.chunk(3), strict=True)}
            else:
                own[key] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    own = {f"model.{key}": tensor for key, tensor in rename(own, _OPENAI_CLIP_NAMES).items()}
    return build(path, PublishedCLIP, {"text": text, "vision": vision, "projection_dim": projection_dim}, own)


def _open_hugging_face_clip(folder: Path, config: dict[str, Any]) -> PublishedCLIP:
    from transformers import CLIPConfig  # takes seconds to import

    if config.get("model_type") != "clip":
        raise CheckpointError(f"{folder}: expected a model of type clip, got {config.get('model_type')}")
    with opening(folder / "config.json", "does not describe a CLIP"):
        # Fills in transformers' defaults.
        settings = CLIPConfig(**config).to_dict()
        arguments = {
            "text": {name: settings["text_config"][name] for name in _TEXT_SETTINGS},
            "vision": {name: settings["vision_config"][name] for name in _VISION_SETTINGS},
            "projection_dim": settings["projection_dim"],
        }
    if (folder / "preprocessor_config.json").is_file():
        pixels = read_config(folder, "preprocessor_config.json")
        arguments |= {name: pixels[name] for name in ("image_mean", "image_std") if name in pixels}
    # Older versions of transformers saved tables of positions.
    state = {
        f"model.{key}": tensor
        for key, tensor in _read_hugging_face_weights(folder).items()
        if not key.endswith(".position_ids")
    }
    model = build(folder, PublishedCLIP, arguments, state)
    model.bpe_path = find_vocabulary(folder)
    return model


def _read_hugging_face_weights(folder: Path) -> State:
    """The weights of a Hugging Face folder, in one file or several."""
    for name, read in (("model.safetensors", read_tensors), ("pytorch_model.bin", read_torch)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return tensor_dict(read(folder / name), folder / name)
        if index.is_file():
            with opening(index, "is not an index of weights"):
                parts = sorted(set(read_config(folder, index.name)["weight_map"].values()))
            # The name alone: a path could mean any file.
            return {key: tensor for part in parts for key, tensor in read(folder / Path(part).name).items()}
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
