"""Published formats of the prior, its VAEs and CLIP into our classes: sizes are read off the weights, names changed.

Every `load_` function opens a native folder as well. All of them raise `CheckpointError` with one line that names the
file and what is wrong with it; files are read by `foreign`, which runs nothing in them.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from dalle_pytorch.attention import make_pattern
from dalle_pytorch.checkpoints import (
    CheckpointError,
    PretrainedModel,
    load_state,
    parameters_on_meta,
    read_config,
    read_tensors,
    resolve_folder,
)
from dalle_pytorch.clip import CLIP
from dalle_pytorch.dalle import DALLE
from dalle_pytorch.downloads import CLIPS, DVAE_DECODER, DVAE_ENCODER, VQGANS, default_file
from dalle_pytorch.foreign import ForeignObject, module_state, read_torch, read_yaml, tensor_dict
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE
from dalle_pytorch.vae.vqgan import VQGanVAE

if TYPE_CHECKING:
    from dalle_pytorch.clip_published import PublishedCLIP

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]
Names = Sequence[tuple[str, str]]

AUXILIARY_NAME = "auxiliary.pt"  # what DALLE-pytorch writes beside DeepSpeed's weights
CONSOLIDATED_NAME = "pytorch_model.bin"  # what DeepSpeed's zero_to_fp32.py makes of them

# --------------------------------------------------------------------------------------------------
# Names: regular expressions, applied in order

_TRANSFORMER_NAMES = (
    # A wrapper per option (layer scale, norm, cache, token shift): how many depends on release and options.
    (r"transformer\.layers\.layers\.(\d+)\.0\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.layers\.(\d+)\.1\.", r"transformer.layers.\1.ff."),
    (r"transformer\.layers\.blocks\.(\d+)\.f\.net\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.blocks\.(\d+)\.g\.net\.", r"transformer.layers.\1.ff."),
    (r"\.(fn\.)+(norm|norm_out)\.", r".\2."),
    (r"\.(fn\.)+to_qkv\.", r".fn.to_qkv."),
    (r"\.(fn\.)+to_out\.0\.", r".fn.to_out."),
    (r"\.(fn\.)+net\.0\.", r".fn.proj_in."),
    (r"\.(fn\.)+net\.3\.", r".fn.proj_out."),
)
_DALLE_NAMES = (
    *_TRANSFORMER_NAMES,
    (r"^to_logits\.0\.", "norm."),
    (r"^to_logits\.1\.", "to_logits."),
    (r"^image_pos_emb\.weights[._]0$", "image_pos_emb.rows"),
    (r"^image_pos_emb\.weights[._]1$", "image_pos_emb.columns"),
)
_TRAINABLE_CLIP_NAMES = (
    *_TRANSFORMER_NAMES,
    (r"^to_visual_embedding\.", "patch_emb."),
    (r"^visual_pos_emb\.", "patch_pos_emb."),
)
_OPENAI_DVAE_NAMES = (
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"^blocks\.input\.", "conv_in."),
    (r"^blocks\.output\.conv\.", "conv_out."),
    (r"\.id_path\.", ".skip."),
)
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


def _rename(state: State, names: Names) -> State:
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def _below(state: State, prefix: str) -> State:
    """What is under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


# --------------------------------------------------------------------------------------------------
# What all formats share


def _build(source: object, model_class: type[Model], arguments: Mapping[str, Any], state: State) -> Model:
    """The model of these settings and weights, in evaluation mode."""
    known = inspect.signature(model_class.__init__).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise CheckpointError(f"{source} has settings that {model_class.__name__} does not know: {', '.join(unknown)}")
    try:
        with parameters_on_meta():
            model = model_class(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source} does not describe a {model_class.__name__}: {error}") from error
    load_state(model, state, source)
    return model.eval()


def _agree(source: object, said: Mapping[str, Any], told: Mapping[str, Any], said_by: object = "its settings") -> None:
    """Refuses settings that contradict the weights."""
    for name in told.keys() & said.keys():
        if said[name] != told[name]:
            raise CheckpointError(f"{source}: {said_by} have {name} {said[name]}, and the weights {told[name]}")


def _is_file(path: str | os.PathLike) -> bool:
    """Whether this means a single file, present or not, and no folder or hub name."""
    return Path(path).is_file() or Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def _checkpoint(path: str | os.PathLike, content: Any) -> dict[str, Any]:
    """`content` as a checkpoint of DALLE-pytorch, which has the dictionaries `hparams` and `weights`."""
    wanted = ("hparams", "weights")
    if not isinstance(content, dict) or any(not isinstance(content.get(name), dict) for name in wanted):
        raise CheckpointError(f"{path} is no checkpoint of DALLE-pytorch: it lacks {' or '.join(wanted)}")
    return {**content, "weights": tensor_dict(content["weights"], path) if content["weights"] else {}}


# --------------------------------------------------------------------------------------------------
# The prior

# Tables that are computed here, and second names of the output layer under share_input_output_emb.
_DALLE_DROPPED = re.compile(r"vae\.|logits_mask$|transformer\.pos_emb$|(text|image)_emb\.linear\.|.*\.static_mask$")
# Recorded by some releases and without a meaning for the weights; 1.x took sparse_attn and ignored it.
_DALLE_IGNORED = {"vae", "sparse_attn", "optimize_for_inference"}


def load_dalle(path: str | os.PathLike, vae: nn.Module | None = None) -> DALLE:
    """Opens a prior, in evaluation mode on the CPU: a native folder; a `dalle.pt` of DALLE-pytorch or its DALL-3 fork;
    DeepSpeed's consolidated weights beside their `auxiliary.pt`, or the folder of the two.

    `vae` overrides the one that the checkpoint names.
    """
    if not _is_file(path) and not (Path(path) / AUXILIARY_NAME).is_file():
        return DALLE.from_pretrained(path, **({} if vae is None else {"vae": vae}))
    return _open_dalle(path, _prior_checkpoint(Path(path)), vae)


def _prior_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, put together from its parts if DeepSpeed wrote it."""
    content = None if path.is_dir() else read_torch(path)
    if path.is_dir() or path.name == AUXILIARY_NAME:
        folder = path if path.is_dir() else path.parent
        settings, path = read_torch(folder / AUXILIARY_NAME), folder / CONSOLIDATED_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {CONSOLIDATED_NAME}; run DeepSpeed's zero_to_fp32.py in it, which makes that"
            )
        content = read_torch(path)
    elif isinstance(content, dict) and "hparams" not in content:
        places = (path.parent, path.parent.parent)
        beside = next((place / AUXILIARY_NAME for place in places if (place / AUXILIARY_NAME).is_file()), None)
        if beside is None:
            return _checkpoint(path, content)
        settings = read_torch(beside)
    else:
        return _checkpoint(path, content)
    # `module` is where DeepSpeed's own files have the weights.
    return _checkpoint(path, {**settings, "weights": content.get("module", content)})


def _open_dalle(path: str | os.PathLike, checkpoint: dict[str, Any], vae: nn.Module | None) -> DALLE:
    weights = checkpoint["weights"]
    if all(key.startswith("module.") for key in weights):
        weights = _below(weights, "module.")
    arguments = _dalle_arguments(path, checkpoint["hparams"], weights)
    image_tokens = arguments["num_image_tokens"]
    if vae is None:
        vae = _checkpoint_vae(path, checkpoint, weights, image_tokens)
    if vae.num_tokens != image_tokens:
        raise CheckpointError(f"{path}: {image_tokens} image tokens wanted, this VAE has {vae.num_tokens}")
    state = _rename({key: value for key, value in weights.items() if not _DALLE_DROPPED.match(key)}, _DALLE_NAMES)
    for key in ("image_pos_emb.rows", "image_pos_emb.columns"):
        if key in state:
            state[key] = state[key].squeeze(0)
    return _build(path, DALLE, {**arguments, "vae": vae}, state | _sparse_layouts(arguments))


def _sparse_layouts(arguments: dict[str, Any]) -> State:
    """The random blocks of `sparse` layers, which upstream draws anew at each start and never saves."""
    types = arguments.get("attn_types") or "full"
    types = islice(cycle([types] if isinstance(types, str) else types), arguments["depth"])
    ids = arguments.get("shared_attn_ids") or range(arguments["depth"])
    first = {number: layer for layer, number in reversed(list(enumerate(islice(cycle(ids), arguments["depth"]))))}
    text_len, side = arguments.get("text_seq_len", 256) + 1, arguments["image_fmap_size"]
    return {
        f"transformer.layers.{layer}.attn.fn.pattern.layout": make_pattern(
            "sparse", text_len, side, first[number]
        ).layout
        for layer, (kind, number) in enumerate(zip(types, cycle(ids), strict=False))
        if kind == "sparse"
    }


def _checkpoint_vae(
    path: str | os.PathLike, checkpoint: dict[str, Any], weights: State, image_tokens: int
) -> nn.Module:
    """The VAE that was trained with: from the checkpoint itself if its weights are there, else the published one."""
    if checkpoint.get("vae_params"):
        return _build(path, DiscreteVAE, checkpoint["vae_params"], _below(weights, "vae."))
    if "vae.model.encoder.conv_in.weight" in weights:
        return _build(path, VQGanVAE, *_vqgan(path, _below(weights, "vae.model.")))
    if "vae.enc.blocks.input.w" in weights:
        return _build(
            path, OpenAIDiscreteVAE, *_openai_dvae(path, _below(weights, "vae.enc."), _below(weights, "vae.dec."))
        )
    name = checkpoint.get("vae_class_name") or "OpenAIDiscreteVAE"
    if name == "OpenAIDiscreteVAE":
        return OpenAIDiscreteVAE()
    if name == "VQGanVAE" and image_tokens in VQGANS:
        return VQGanVAE(*map(default_file, VQGANS[image_tokens]))
    raise CheckpointError(
        f"{path} was trained with a {name} of {image_tokens} tokens, which is not in it; give that one"
    )


def _dalle_arguments(path: str | os.PathLike, hparams: dict[str, Any], weights: State) -> dict[str, Any]:
    """The constructor's arguments: sizes and options from the weights where they tell, the rest as recorded."""
    types = hparams.get("attn_types") or ()
    if "mlp" in ((types,) if isinstance(types, str) else types):
        raise CheckpointError(f"{path} has gMLP layers (attn_types mlp), which are not supported")
    arguments = {key: value for key, value in hparams.items() if key not in _DALLE_IGNORED}
    try:
        text_seq_len = hparams.get("text_seq_len", 256)
        rotary_emb = "text_pos_emb.weight" not in weights
        share_emb = "text_emb.linear.weight" in weights
        reversible = any(".layers.blocks." in key for key in weights)
        feed_forwards = [key for key in weights if key.endswith("fn.net.0.weight")]
        if not feed_forwards:
            raise KeyError("layers")
        total_tokens, dim = weights["to_logits.1.weight"].shape
        told = {
            "dim": dim,
            "depth": 1 + max(int(re.search(r"\.(?:layers|blocks)\.(\d+)\.", key)[1]) for key in feed_forwards),
            "rotary_emb": rotary_emb,
            "share_input_output_emb": share_emb,
            "reversible": reversible,
            "sandwich_norm": any(key.endswith("norm_out.weight") for key in weights),
            # Without token shift the feed-forward stands in layer scale and norm alone.
            "shift_tokens": feed_forwards[0].count("fn.") > 2,
        }
        if not rotary_emb:
            told["text_seq_len"] = text_seq_len = len(weights["text_pos_emb.weight"]) - 1
        if not share_emb:
            told["num_text_tokens"] = len(weights["text_emb.weight"]) - text_seq_len
        _agree(path, arguments, told)
        arguments |= told
        inner = next(value for key, value in weights.items() if key.endswith("to_qkv.weight")).shape[0] // 3
        heads, dim_head = hparams.get("heads", 8), hparams.get("dim_head", 64)
        if heads * dim_head != inner:
            raise CheckpointError(
                f"{path}: {heads} heads of {dim_head} are recorded, and the weights' add up to {inner}"
            )
        image_tokens = total_tokens - text_seq_len - arguments.get("num_text_tokens", 10000)
        if rotary_emb:
            # One position per token; some releases leave out the last.
            side = math.isqrt(weights["transformer.pos_emb"].shape[-2] - text_seq_len)
        else:
            side = next(w for key, w in weights.items() if re.match(r"image_pos_emb\.weights[._]0$", key)).shape[1]
    except (KeyError, StopIteration, TypeError) as error:
        missing = f" {error}" if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{path} is no prior of DALLE-pytorch: its weights lack{missing or ' layers'}") from None
    return {**arguments, "image_fmap_size": side, "num_image_tokens": image_tokens}


# --------------------------------------------------------------------------------------------------
# VAEs


def load_discrete_vae(path: str | os.PathLike) -> DiscreteVAE:
    """Opens a DiscreteVAE, in evaluation mode on the CPU: a native folder or a `vae.pt` of DALLE-pytorch."""
    if not _is_file(path):
        return DiscreteVAE.from_pretrained(path)
    return _open_discrete_vae(path, _checkpoint(path, read_torch(path)))


def _open_discrete_vae(path: str | os.PathLike, checkpoint: dict[str, Any]) -> DiscreteVAE:
    return _build(path, DiscreteVAE, checkpoint["hparams"], checkpoint["weights"])


def read_vqgan(
    path: str | os.PathLike | None = None, config_path: str | os.PathLike | None = None
) -> tuple[dict[str, Any], State, object]:
    """`VQGanVAE`'s arguments and weights from taming's checkpoint and its `model.yaml`, and the name of the file.

    Without paths they are the published ones of 1024 codes. Without a `config_path` it is a `model.yaml` beside the
    checkpoint; if there is none, the weights tell enough, and pictures are taken to have 256 pixels.
    """
    if path is None:
        if config_path is not None:
            raise CheckpointError(f"{config_path} is given without the VQGAN's weights that go with it")
        path, config_path = map(default_file, VQGANS[1024])
    return (*_open_vqgan(path, read_torch(path), config_path), path)


def _open_vqgan(
    path: str | os.PathLike, content: Any, config_path: str | os.PathLike | None
) -> tuple[dict[str, Any], State]:
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if config_path is None and Path(path).with_name("model.yaml").is_file():
        config_path = Path(path).with_name("model.yaml")
    config = {} if config_path is None else read_yaml(config_path)
    return _vqgan(path, tensor_dict(content, path), config, config_path)


def _vqgan(
    path: str | os.PathLike, state: State, config: dict[str, Any] | None = None, config_path: object = None
) -> tuple[dict[str, Any], State]:
    # The networks of the training losses are of no use here.
    state = {key: tensor for key, tensor in state.items() if not key.startswith("loss.")}
    config = (config or {}).get("model", config) or {}
    said = config.get("params", {})
    network = said.get("ddconfig", {})
    try:
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        levels = range(1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down.")))
        blocks = {key.split(".")[4] for key in state if key.startswith("encoder.down.0.block.")}
        gumbel = "quantize.embed.weight" in state
        num_tokens, embed_dim = state[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
        z_channels = state["decoder.conv_in.weight"].shape[1]
        told = {
            "ch": ch,
            "ch_mult": [len(state[f"encoder.down.{i}.block.0.conv1.bias"]) // ch for i in levels],
            "num_res_blocks": len(blocks),
            "z_channels": z_channels,
            "in_channels": in_channels,
            "out_ch": len(state["decoder.conv_out.bias"]),
            "double_z": len(state["encoder.conv_out.bias"]) == 2 * z_channels,
        }
        attended = [i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in state]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is no VQGAN of taming-transformers: it lacks {error}") from None
    image_size = network.get("resolution", 256)
    sides = [image_size // 2**i for i in levels]
    told["attn_resolutions"] = [sides[i] for i in attended]
    if "attn_resolutions" in network:  # sides that do not occur are without effect
        network = network | {"attn_resolutions": [side for side in sides if side in network["attn_resolutions"]]}
    _agree(path, network, told, config_path)
    _agree(path, said, {"n_embed": num_tokens, "embed_dim": embed_dim}, config_path)
    if "target" in config:
        _agree(path, {"quantizer": config["target"].rpartition(".")[2]}, {"quantizer": "GumbelVQ" if gumbel else "VQModel"},
               config_path)  # fmt: skip
    dropout = network.get("dropout", 0.0)
    return {"image_size": image_size, "num_tokens": num_tokens, "embed_dim": embed_dim, "gumbel": gumbel,
            "dropout": dropout, **told}, state  # fmt: skip


def read_openai_dvae(
    encoder_path: str | os.PathLike | None = None, decoder_path: str | os.PathLike | None = None
) -> tuple[dict[str, Any], State, object]:
    """`OpenAIDiscreteVAE`'s arguments and weights from `encoder.pkl` and `decoder.pkl`, and what to call the two.

    A path left out means the published file, or the one of the usual name beside the other.
    """
    if encoder_path is None and decoder_path is None:
        encoder_path, decoder_path = default_file(DVAE_ENCODER), default_file(DVAE_DECODER)
    encoder_path = Path(decoder_path).with_name(DVAE_ENCODER.name) if encoder_path is None else encoder_path
    decoder_path = Path(encoder_path).with_name(DVAE_DECODER.name) if decoder_path is None else decoder_path
    source = f"{encoder_path} with {decoder_path}"
    return (*_openai_dvae(source, *(_module(path, read_torch(path)) for path in (encoder_path, decoder_path))), source)


def _module(path: object, content: Any) -> State:
    """The weights of a pickled module, a TorchScript archive or a state dict."""
    return tensor_dict(module_state(content) if isinstance(content, ForeignObject) else content, path)


def _openai_dvae(source: object, encoder: State, decoder: State) -> tuple[dict[str, Any], State]:
    def blocks(state: State) -> int:
        return len({key.split(".")[2] for key in state if key.startswith("blocks.group_1.block_")})

    def from_zero(match: re.Match) -> str:
        return f"groups.{int(match[1]) - 1}.{int(match[2]) - 1}."

    def own_names(state: State, prefix: str) -> State:
        own = {}
        for key, tensor in _rename(state, _OPENAI_DVAE_NAMES).items():
            key = re.sub(r"^blocks\.group_(\d+)\.block_(\d+)\.", from_zero, key)
            key = re.sub(r"\.res_path\.conv_(\d+)\.", lambda match: f".convs.{int(match[1]) - 1}.", key)
            own[prefix + key] = tensor
        return own

    try:
        encoder_dim, channels = encoder["blocks.input.w"].shape[:2]
        codebook_dim, num_tokens = decoder["blocks.input.w"].shape[:2]
        drawn = len(encoder["blocks.output.conv.b"])
        arguments = {
            "num_tokens": num_tokens,
            "codebook_dim": codebook_dim,
            "encoder_dim": encoder_dim,
            "decoder_dim": decoder["blocks.output.conv.w"].shape[1],
            "encoder_blocks": blocks(encoder),
            "decoder_blocks": blocks(decoder),
            "channels": channels,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source} are not the encoder and decoder of OpenAI's dVAE: they lack {error}") from None
    if drawn != num_tokens:
        raise CheckpointError(
            f"{source} do not belong together: the encoder has {drawn} codes, the decoder {num_tokens}"
        )
    return arguments, own_names(encoder, "encoder.") | own_names(decoder, "decoder.")


# --------------------------------------------------------------------------------------------------
# CLIP

_HUB_FILES = ("config.json", "preprocessor_config.json", "merges.txt", "tokenizer.json")
_TEXT_SETTINGS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id"]
_VISION_SETTINGS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"]


def load_clip(path_or_name: str | os.PathLike | None = None) -> CLIP | PublishedCLIP:
    """Opens a CLIP, in evaluation mode on the CPU.

    It may be a native folder; OpenAI's file (TorchScript or state dict) or its name for one ("ViT-B/32", which None
    means too); a Hugging Face folder or hub name; or the trainable CLIP's weights with their `hparams`.
    """
    path = "ViT-B/32" if path_or_name is None else path_or_name
    if str(path) in CLIPS:
        path = default_file(CLIPS[str(path)])
    if _is_file(path):
        return _open_clip(path, read_torch(path))
    folder = resolve_folder(path, (*_HUB_FILES, "*.safetensors", "*.safetensors.index.json"))
    config = read_config(folder)
    if config.get("class") == "CLIP":
        return CLIP.from_pretrained(folder)
    from dalle_pytorch.clip_published import PublishedCLIP

    if "class" in config:
        return PublishedCLIP.from_pretrained(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        folder = resolve_folder(path, (*_HUB_FILES, "pytorch_model*.bin", "*.bin.index.json"))
    return _open_hugging_face_clip(folder, config)


def load_trainable_clip(path: str | os.PathLike) -> CLIP:
    """Opens a trainable CLIP, in evaluation mode on the CPU: a native folder or weights with their `hparams`."""
    if not _is_file(path):
        return CLIP.from_pretrained(path)
    return _open_trainable_clip(path, _checkpoint(path, read_torch(path)))


def _open_trainable_clip(path: str | os.PathLike, checkpoint: dict[str, Any]) -> CLIP:
    return _build(path, CLIP, checkpoint["hparams"], _rename(checkpoint["weights"], _TRAINABLE_CLIP_NAMES))


def _open_clip(path: str | os.PathLike, content: Any) -> CLIP | PublishedCLIP:
    if isinstance(content, dict) and "hparams" in content:
        return _open_trainable_clip(path, _checkpoint(path, content))
    return _open_openai_clip(path, _module(path, content))


def _open_openai_clip(path: str | os.PathLike, state: State) -> PublishedCLIP:
    from dalle_pytorch.clip_published import PublishedCLIP

    def layers(prefix: str) -> int:
        return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))

    def tower(prefix: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.bias"]),
            "num_hidden_layers": layers(prefix),
            "num_attention_heads": width // 64,
            "hidden_act": "quick_gelu",
        }

    if "visual.layer1.0.conv1.weight" in state:
        raise CheckpointError(
            f"{path} is a CLIP with a ResNet, and those with a vision transformer (ViT) are supported"
        )
    try:
        vocab_size, text_width = state["token_embedding.weight"].shape
        width, channels, patch_size, _ = state["visual.conv1.weight"].shape
        text = tower("transformer.resblocks.", text_width) | {
            "vocab_size": vocab_size,
            "max_position_embeddings": len(state["positional_embedding"]),
            # transformers' sign for: read the features at the largest token id.
            "eos_token_id": 2,
        }
        vision = tower("visual.transformer.resblocks.", width) | {
            "num_channels": channels,
            "image_size": math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch_size,
            "patch_size": patch_size,
        }
        projection_dim = state["text_projection"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is no CLIP of OpenAI's: it lacks {error}") from None
    own = {}
    for key, tensor in state.items():
        if key in ("input_resolution", "context_length", "vocab_size"):  # said again by the shapes
            continue
        if key.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
            layer, _, kind = key.rpartition("in_proj_")
            own |= {f"{layer}{part}_proj.{kind}": chunk for part, chunk in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            own[key] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    own = {f"model.{key}": tensor for key, tensor in _rename(own, _OPENAI_CLIP_NAMES).items()}
    return _build(path, PublishedCLIP, {"text": text, "vision": vision, "projection_dim": projection_dim}, own)


def _open_hugging_face_clip(folder: Path, config: dict[str, Any]) -> PublishedCLIP:
    from transformers import CLIPConfig

    from dalle_pytorch.clip_published import PublishedCLIP, find_vocabulary

    if config.get("model_type") != "clip":
        raise CheckpointError(f"{folder} holds a model of type {config.get('model_type')}, and a clip is wanted")
    config = CLIPConfig(**config)
    arguments = {
        "text": {name: getattr(config.text_config, name) for name in _TEXT_SETTINGS},
        "vision": {name: getattr(config.vision_config, name) for name in _VISION_SETTINGS},
        "projection_dim": config.projection_dim,
    }
    if (folder / "preprocessor_config.json").is_file():
        pixels = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        arguments |= {name: pixels[name] for name in ("image_mean", "image_std") if name in pixels}
    # Tables of positions, which older versions of transformers saved.
    state = {
        f"model.{key}": tensor
        for key, tensor in _read_hugging_face_weights(folder).items()
        if not key.endswith(".position_ids")
    }
    model = _build(folder, PublishedCLIP, arguments, state)
    model.bpe_path = find_vocabulary(folder)
    return model


def _read_hugging_face_weights(folder: Path) -> State:
    """The weights of a Hugging Face folder, in one file or several."""
    for name, read in (("model.safetensors", read_tensors), ("pytorch_model.bin", read_torch)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return tensor_dict(read(folder / name), folder / name)
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            # A name with a path in it could mean any file.
            return {key: tensor for part in parts for key, tensor in read(folder / Path(part).name).items()}
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


# --------------------------------------------------------------------------------------------------
# Anything


def open_published(path: str | os.PathLike, config_path: str | os.PathLike | None = None) -> PretrainedModel:
    """Opens a published prior, VAE or CLIP, or a native folder, whatever it is; `config_path` is a VQGAN's model.yaml.

    A folder may be DeepSpeed's, with its `auxiliary.pt`; hold a dVAE's two files, or a VQGAN's; or be Hugging Face's.
    """
    path = Path(path)
    if path.is_dir():
        if (path / AUXILIARY_NAME).is_file():
            return load_dalle(path)
        if (path / DVAE_ENCODER.name).is_file():
            return OpenAIDiscreteVAE(path / DVAE_ENCODER.name, path / DVAE_DECODER.name)
        if (path / "last.ckpt").is_file():
            return VQGanVAE(path / "last.ckpt", config_path)
        return load_clip(path) if "class" not in read_config(path) else PretrainedModel.from_pretrained(path)
    if path.name == AUXILIARY_NAME:
        return load_dalle(path)
    content = read_torch(path)
    if isinstance(content, ForeignObject) and content.name.startswith("dall_e."):
        other = {"Encoder": (path, None), "Decoder": (None, path)}
        return OpenAIDiscreteVAE(*other.get(content.name.rpartition(".")[2], (path, None)))
    if isinstance(content, ForeignObject):
        return _open_clip(path, content)
    keys = content.keys() if isinstance(content, dict) else ()
    if "hparams" in keys:
        checkpoint = _checkpoint(path, content)
        if "to_visual_latent.weight" in checkpoint["weights"]:
            return _open_trainable_clip(path, checkpoint)
        if "codebook.weight" in checkpoint["weights"]:
            return _open_discrete_vae(path, checkpoint)
        return _open_dalle(path, checkpoint, None)
    if "visual.conv1.weight" in keys or "visual.layer1.0.conv1.weight" in keys:
        return _open_clip(path, content)
    if "state_dict" in keys or "encoder.conv_in.weight" in keys:
        return _build(path, VQGanVAE, *_open_vqgan(path, content, config_path))
    if "to_logits.1.weight" in content.get("module", content) if isinstance(content, dict) else False:
        return load_dalle(path)
    raise CheckpointError(f"{path} is no prior, VAE or CLIP of a kind that is known here")
