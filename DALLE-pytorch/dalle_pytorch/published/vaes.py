"""DALLE-pytorch's DiscreteVAE, taming-transformers' VQGANs and OpenAI's dVAE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.downloads import DVAE_DECODER, DVAE_ENCODER, VQGANS, default_file
from dalle_pytorch.nn.upstream import State
from dalle_pytorch.published.common import TRAINING_STATE, agree, as_checkpoint, as_state, build, is_file
from dalle_pytorch.published.unpickler import read_torch, read_yaml, tensor_dict
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE, halves_from_upstream
from dalle_pytorch.vae.vqgan import VQGanVAE


def load_discrete_vae(path: str | os.PathLike) -> DiscreteVAE:
    """Opens a DiscreteVAE, in evaluation mode on the CPU: a native folder or a `vae.pt` of DALLE-pytorch."""
    if not is_file(path):
        return DiscreteVAE.from_pretrained(path)
    return open_discrete_vae(path, as_checkpoint(path, read_torch(path, TRAINING_STATE)))


def open_discrete_vae(path: str | os.PathLike, checkpoint: dict[str, Any]) -> DiscreteVAE:
    """`load_discrete_vae` of a checkpoint that has been read."""
    return build(path, DiscreteVAE, checkpoint["hparams"], checkpoint["weights"])


def read_vqgan(
    vqgan_model_path: str | os.PathLike | None = None, vqgan_config_path: str | os.PathLike | None = None
) -> tuple[dict[str, Any], State, object]:
    """`VQGanVAE`'s arguments and weights from taming's checkpoint and its `model.yaml`, and the name of the file.

    Without paths they are the published ones of 1024 codes. Without a config it is a `model.yaml` beside the
    checkpoint; if there is none, the weights tell enough, and pictures are taken to have 256 pixels.
    """
    path, config_path = vqgan_model_path, vqgan_config_path
    if path is None:
        if config_path is not None:
            raise CheckpointError(f"{config_path} is given without the VQGAN's weights that go with it")
        path, config_path = map(default_file, VQGANS[1024])
    return (*open_vqgan(path, read_torch(path, TRAINING_STATE), config_path), path)


def open_vqgan(
    path: str | os.PathLike, content: Any, config_path: str | os.PathLike | None
) -> tuple[dict[str, Any], State]:
    """`read_vqgan` of what is in the file."""
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if config_path is None and Path(path).with_name("model.yaml").is_file():
        config_path = Path(path).with_name("model.yaml")
    return vqgan(path, tensor_dict(content, path), config_path)


def _vqgan_config(path: str | os.PathLike) -> dict[str, Any]:
    """The settings of a model.yaml, those of its parts among them."""
    config = read_yaml(path)
    try:
        config = config.get("model", config)
        params = config["params"]
        settings = {**params["ddconfig"], **params, "quantizer": config["target"].rpartition(".")[2]}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no configuration of a VQGAN: it lacks target, params or ddconfig") from None
    if settings.get("remap") is not None:
        raise CheckpointError(f"{path} has the codes renumbered (remap), which is not supported")
    return settings


def vqgan(
    path: str | os.PathLike, state: State, config_path: str | os.PathLike | None = None
) -> tuple[dict[str, Any], State]:
    """`VQGanVAE`'s arguments and weights from those of taming's."""
    said = {} if config_path is None else _vqgan_config(config_path)
    # The networks of the training losses are of no use here.
    state = {key: tensor for key, tensor in state.items() if not key.startswith("loss.")}
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
    image_size = said.get("resolution", 256)
    sides = [image_size // 2**i for i in levels]
    told["attn_resolutions"] = [sides[i] for i in attended]
    if "attn_resolutions" in said:  # sides that do not occur are without effect
        said["attn_resolutions"] = [side for side in sides if side in said["attn_resolutions"]]
    quantizer = {"quantizer": "GumbelVQ" if gumbel else "VQModel", "n_embed": num_tokens, "embed_dim": embed_dim}
    agree(path, said, told | quantizer, config_path)
    arguments = {"image_size": image_size, "num_tokens": num_tokens, "embed_dim": embed_dim, "gumbel": gumbel}
    return {**arguments, **told, "dropout": said.get("dropout", 0.0)}, state


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
    return (*openai_dvae(source, *(as_state(path, read_torch(path)) for path in (encoder_path, decoder_path))), source)


def openai_dvae(source: object, encoder: State, decoder: State) -> tuple[dict[str, Any], State]:
    """`OpenAIDiscreteVAE`'s arguments and weights from those of its two halves."""

    def blocks(state: State) -> int:
        return len({key.split(".")[2] for key in state if key.startswith("blocks.group_1.block_")})

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
    return arguments, halves_from_upstream(encoder, decoder)


def load_vqgan(path: str | os.PathLike | None = None, config_path: str | os.PathLike | None = None) -> VQGanVAE:
    """Opens a VQGAN, in evaluation mode on the CPU: a native folder, or taming's checkpoint with its `model.yaml`.

    Left out, both mean the published one. Raises `CheckpointError` with one line that says what is wrong.
    """
    if path is not None and Path(path).is_dir():
        return VQGanVAE.from_pretrained(path)
    return VQGanVAE(path, config_path).eval()


def _read_discrete_vae(vae_path: str | os.PathLike) -> tuple[dict[str, Any], State, object]:
    vae = load_discrete_vae(vae_path)
    return vae.config, vae.state_dict(), vae_path


# `DiscreteVAE(vae_path)`, `VQGanVAE(vqgan_model_path, vqgan_config_path)` and `OpenAIDiscreteVAE()`, as upstream.
DiscreteVAE.published_reader = staticmethod(_read_discrete_vae)
VQGanVAE.published_reader = staticmethod(read_vqgan)
OpenAIDiscreteVAE.published_reader = staticmethod(read_openai_dvae)
