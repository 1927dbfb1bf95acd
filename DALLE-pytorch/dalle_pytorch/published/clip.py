"""CLIP: OpenAI's and open_clip's files, Hugging Face's folders, and the one that DALLE-pytorch trains."""

import math
import os
from pathlib import Path
from typing import Any

from dalle_pytorch.clip.published import PublishedCLIP, find_vocabulary
from dalle_pytorch.clip.trainable import CLIP, UPSTREAM_NAMES
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening, opens
from dalle_pytorch.files.downloads import CLIPS, RESNET_CLIPS, default_file
from dalle_pytorch.nn.upstream import State, count_parts, rename, strip_prefix
from dalle_pytorch.pretrained import read_config, read_tensors, resolve_folder
from dalle_pytorch.published.clip_config import (
    OPEN_CLIP_CONFIG,
    OPENAI,
    RESNET,
    ClipConfig,
    count_heads,
    read_clip_config,
)
from dalle_pytorch.published.common import TRAINING_STATE, as_checkpoint, as_state, build, check_agreement, is_file
from dalle_pytorch.published.unpickler import ForeignObject, read_torch, tensor_dict

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
_HUB_FILES = ("config.json", "preprocessor_config.json", "merges.txt", "tokenizer.json", OPEN_CLIP_CONFIG)
# Weights by their names in a folder, the preferred first, with the patterns of their files on the hub.
_HUGGING_FACE_WEIGHTS = {"model.safetensors": ("model*.safetensors", "model.safetensors.index.json"),
                         "pytorch_model.bin": ("pytorch_model*.bin", "pytorch_model.bin.index.json")}  # fmt: skip
_OPEN_CLIP_WEIGHTS = {name: (name,) for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")}
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's files alone
_TOWER_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                   "layer_norm_eps")  # fmt: skip
_TEXT_SETTINGS = (*_TOWER_SETTINGS, "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
                  "pad_token_id")  # fmt: skip
_VISION_SETTINGS = (*_TOWER_SETTINGS, "num_channels", "image_size", "patch_size")


@opens
def load_clip(
    path_or_name: str | os.PathLike | None = None, clip_config: str | os.PathLike | None = None
) -> CLIP | PublishedCLIP:
    """Opens a CLIP: a native folder; OpenAI's file (TorchScript or state dict) or its name for one ("ViT-B/32", which
    is the default); a Hugging Face folder or hub name; open_clip's file, or a folder or hub name with one; "HPSv2" or
    "HPSv2.1"; or the trainable CLIP's weights with their `hparams`.

    `clip_config` is what open_clip's weights do not tell, heads and activation: the name of its architecture, such as
    "ViT-H-14", or a JSON file of its format. A file `open_clip_config.json` beside the weights is found. Raises
    `CheckpointError` where it cannot be set.
    """
    path = "ViT-B/32" if path_or_name is None else path_or_name
    if str(path) in RESNET_CLIPS and not Path(path).exists():
        raise CheckpointError(f"{path} is {RESNET}")
    if str(path) in CLIPS and not Path(path).exists():
        file = CLIPS[str(path)]
        path, clip_config = default_file(file), clip_config or file.architecture
    if is_file(path):
        return open_clip(path, read_clip_file(path), clip_config)
    folder = resolve_folder(path, _HUB_FILES)
    if not (folder / "config.json").exists() and (folder / OPEN_CLIP_CONFIG).exists():
        weights = _find_weights(path, _OPEN_CLIP_WEIGHTS)
        model = open_clip(weights, read_clip_file(weights), clip_config)
        if isinstance(model, PublishedCLIP):
            model.bpe_path = find_vocabulary(folder)
        return model
    config = read_config(folder)
    _refuse_config(path, clip_config)
    if config.get("class") == "CLIP":
        return CLIP.from_pretrained(path)
    if "class" in config:
        return PublishedCLIP.from_pretrained(path)
    return _open_hugging_face_clip(_find_weights(path, _HUGGING_FACE_WEIGHTS), config)


def _refuse_config(path: str | os.PathLike, clip_config: str | os.PathLike | None) -> None:
    if clip_config is not None:
        raise CheckpointError(f"{path} says all of its settings, and clip_config cannot be set")


def read_clip_file(path: str | os.PathLike) -> Any:
    """The content of a file of weights, by `torch.save` or in safetensors."""
    return read_tensors(path) if Path(path).suffix == ".safetensors" else read_torch(path, TRAINING_STATE)


def _find_weights(name: str | os.PathLike, kinds: dict[str, tuple[str, ...]]) -> Path:
    """The weights, or their index, in a folder, or of a hub name, of which one kind is downloaded."""
    for weights, patterns in kinds.items():
        folder = resolve_folder(name, (*_HUB_FILES, *patterns))
        for path in (folder / weights, folder / f"{weights}.index.json"):
            if path.is_file():
                return path
    raise CheckpointError(f"{name} has neither {' nor '.join(kinds)}")


def open_trainable_clip(path: str | os.PathLike, checkpoint: dict[str, Any]) -> CLIP:
    """The trainable CLIP of a checkpoint of DALLE-pytorch."""
    return build(path, CLIP, checkpoint["hparams"], rename(checkpoint["weights"], UPSTREAM_NAMES))


def is_clip(content: Any) -> bool:
    """Whether the content of a file has the names of OpenAI's or open_clip's weights."""
    return isinstance(content, dict) and any(
        isinstance(key, str) and key.removeprefix("module.") == "token_embedding.weight" for key in _weights(content)
    )


def _weights(content: Any) -> Any:
    """The weights of a file, those of a training under `state_dict`."""
    inner = content.get("state_dict") if isinstance(content, dict) else None
    return inner if isinstance(inner, dict) else content


def open_clip(
    path: str | os.PathLike, content: Any, clip_config: str | os.PathLike | None = None
) -> CLIP | PublishedCLIP:
    """`load_clip` of the content of a file."""
    if isinstance(content, dict) and "hparams" in content:
        _refuse_config(path, clip_config)
        return open_trainable_clip(path, as_checkpoint(path, content))
    state = as_state(path, _weights(content))
    state = strip_prefix(state, "module.") if all(key.startswith("module.") for key in state) else state
    if any(key.startswith("visual.layer1.") for key in state):
        raise CheckpointError(f"{path} is {RESNET}")
    if "token_embedding.weight" not in state:
        raise CheckpointError(f"{path} is not a CLIP of OpenAI's or open_clip's: missing 'token_embedding.weight'")
    beside = Path(path).parent / OPEN_CLIP_CONFIG
    if clip_config is not None or beside.is_file():
        return _open_clip_state(path, state, read_clip_config(clip_config or beside))
    if isinstance(content, ForeignObject) or all(name in state for name in _OPENAI_SIZES):
        return _open_clip_state(path, state, OPENAI)
    raise CheckpointError(
        f"{path} does not tell the heads and the activation of its CLIP: give --clip_config, the name of its open_clip "
        f"architecture (ViT-H-14 for HPSv2, ViT-B-32-quickgelu for weights of OpenAI's ViT-B/32) or its JSON file"
    )


def _open_clip_state(path: str | os.PathLike, state: State, config: ClipConfig) -> PublishedCLIP:
    def tower(prefix: str, width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.bias"]),
            "num_hidden_layers": count_parts(state, prefix + r"(\d+)\."),
            "num_attention_heads": count_heads(path, width, heads), "hidden_act": config.hidden_act,
        }  # fmt: skip

    own: State = {}
    with opening(path, "is not a CLIP with a vision transformer"):
        vocab_size, text_width = state["token_embedding.weight"].shape
        width, channels, patch_size, _ = state["visual.conv1.weight"].shape
        text = tower("transformer.resblocks.", text_width, config.text_heads) | {
            "vocab_size": vocab_size,
            "max_position_embeddings": len(state["positional_embedding"]),
            "bos_token_id": vocab_size - 2,
            # With this value transformers reads the features at the largest token id.
            "eos_token_id": 2,
        }
        vision = tower("visual.transformer.resblocks.", width, config.vision_heads) | {
            "num_channels": channels,
            "image_size": math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch_size,
            "patch_size": patch_size,
        }
        projection_dim = state["text_projection"].shape[1]
        _check_config(path, config, text, {**vision, "embed_dim": projection_dim})
        for key, tensor in state.items():
            if key in _OPENAI_SIZES:  # known from the shapes
                continue
            if key.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
                layer, _, kind = key.rpartition("in_proj_")
                own |= {f"{layer}{part}_proj.{kind}": chunk for part, chunk in zip("qkv", tensor.chunk(3), strict=True)}
            else:
                own[key] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    own = {f"model.{key}": tensor for key, tensor in rename(own, _OPENAI_CLIP_NAMES).items()}
    settings = {"text": text, "vision": vision, "projection_dim": projection_dim, "image_mean": config.image_mean,
                "image_std": config.image_std}  # fmt: skip
    return build(path, PublishedCLIP, settings, own)


def _check_config(path: str | os.PathLike, config: ClipConfig, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Refuses a configuration of another network than the weights are of."""
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "context_length": "max_position_embeddings"}
    for told, found in ((config.text, text), (config.vision, vision)):
        inferred = {key: found[names.get(key, key)] for key in told if names.get(key, key) in found}
        check_agreement(path, told, inferred, "the configuration")


def _open_hugging_face_clip(weights: Path, config: dict[str, Any]) -> PublishedCLIP:
    from transformers import CLIPConfig  # takes seconds to import

    folder = weights.parent
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
        for key, tensor in _read_hugging_face_weights(weights).items()
        if not key.endswith(".position_ids")
    }
    model = build(folder, PublishedCLIP, arguments, state)
    model.bpe_path = find_vocabulary(folder)
    return model


def _read_hugging_face_weights(path: Path) -> State:
    """The weights in a file, or in those that an index lists."""
    if path.suffix != ".json":
        return tensor_dict(read_clip_file(path), path)
    with opening(path, "is not an index of weights"):
        parts = sorted(set(read_config(path.parent, path.name)["weight_map"].values()))
    # The name alone: a path could mean any file.
    files = [path.parent / Path(part).name for part in parts]
    return {key: tensor for file in files for key, tensor in tensor_dict(read_clip_file(file), file).items()}
