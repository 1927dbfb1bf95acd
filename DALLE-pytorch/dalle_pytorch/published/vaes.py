"""DALLE-pytorch's DiscreteVAE, taming-transformers' VQGANs and OpenAI's dVAE."""

import os
from pathlib import Path
from typing import Any

from dalle_pytorch.checks import check_values
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening, opens
from dalle_pytorch.files.downloads import DVAE_DECODER, DVAE_ENCODER, VQGANS, default_file
from dalle_pytorch.nn.upstream import State, count_parts
from dalle_pytorch.published.common import TRAINING_STATE, as_checkpoint, as_state, build, check_agreement, is_file
from dalle_pytorch.published.unpickler import read_torch, read_yaml, tensor_dict
from dalle_pytorch.vae.base import PUBLISHED_LOADERS
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE, rename_halves
from dalle_pytorch.vae.vqgan import VQGanVAE


@opens
def load_discrete_vae(vae_path: str | os.PathLike) -> DiscreteVAE:
    """Opens a DiscreteVAE: a native folder or a `vae.pt` of DALLE-pytorch."""
    if not is_file(vae_path):
        return DiscreteVAE.from_pretrained(vae_path)
    return open_discrete_vae(vae_path, as_checkpoint(vae_path, read_torch(vae_path, TRAINING_STATE)))


def open_discrete_vae(path: str | os.PathLike, checkpoint: dict[str, Any]) -> DiscreteVAE:
    """`load_discrete_vae` of the content of a file."""
    return build(path, DiscreteVAE, checkpoint["hparams"], checkpoint["weights"])


@opens
def load_vqgan(
    vqgan_model_path: str | os.PathLike | None = None, vqgan_config_path: str | os.PathLike | None = None
) -> VQGanVAE:
    """Opens a VQGAN: a native folder, or taming's checkpoint with its `model.yaml`.

    Without paths it is the published one of 1024 codes. Without a config it is a `model.yaml` beside the checkpoint;
    if there is none, sizes are inferred from the weights, and images are taken to have 256 pixels.
    """
    path, config_path = vqgan_model_path, vqgan_config_path
    if path is None:
        if config_path is not None:
            raise CheckpointError(f"{config_path} needs the weights of its VQGAN (vqgan_model_path)")
        path, config_path = map(default_file, VQGANS[1024])
    elif Path(path).is_dir():
        return VQGanVAE.from_pretrained(path)
    return open_vqgan(path, read_torch(path, TRAINING_STATE), config_path)


def open_vqgan(path: str | os.PathLike, content: Any, config_path: str | os.PathLike | None) -> VQGanVAE:
    """`load_vqgan` of the content of a file."""
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if config_path is None and Path(path).with_name("model.yaml").is_file():
        config_path = Path(path).with_name("model.yaml")
    config = {} if config_path is None else _vqgan_config(config_path)
    return build_vqgan(path, tensor_dict(content, path), config, config_path)


def _vqgan_config(path: str | os.PathLike) -> dict[str, Any]:
    """The settings of a model.yaml and of its parts."""
    config = read_yaml(path)
    with opening(path, "is not a configuration of a VQGAN"):
        check_values(config)
        config = config.get("model", config)
        params = config["params"]
        settings = {**params["ddconfig"], **params, "quantizer": config["target"].rpartition(".")[2]}
    if settings.get("remap") is not None:
        raise CheckpointError(f"{path} renumbers the codes (remap), which is not supported")
    return settings


def build_vqgan(
    path: str | os.PathLike, state: State, config: dict[str, Any] | None = None,
    config_path: str | os.PathLike | None = None,
) -> VQGanVAE:  # fmt: skip
    """The VQGAN of taming's weights, checked against the settings in a file."""
    config = config or {}
    # The networks of the training losses are not needed.
    state = {key: tensor for key, tensor in state.items() if not key.startswith("loss.")}
    with opening(path, "is not a VQGAN of taming-transformers"):
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        levels = range(count_parts(state, r"encoder\.down\.(\d+)\."))
        gumbel = "quantize.embed.weight" in state
        num_tokens, embed_dim = state[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
        z_channels = state["decoder.conv_in.weight"].shape[1]
        image_size = config.get("resolution", 256)
        sides = [image_size // 2**i for i in levels]
        inferred = {
            "ch": ch, "ch_mult": [len(state[f"encoder.down.{i}.block.0.conv1.bias"]) // ch for i in levels],
            "num_res_blocks": count_parts(state, r"encoder\.down\.0\.block\.(\d+)\."),
            "z_channels": z_channels, "in_channels": in_channels,
            "out_ch": len(state["decoder.conv_out.bias"]),
            "double_z": len(state["encoder.conv_out.bias"]) == 2 * z_channels,
            "attn_resolutions": [sides[i] for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in state],
        }  # fmt: skip
        if "attn_resolutions" in config:  # sides that do not occur have no effect
            config["attn_resolutions"] = [side for side in sides if side in config["attn_resolutions"]]
    quantizer = {"quantizer": "GumbelVQ" if gumbel else "VQModel", "n_embed": num_tokens, "embed_dim": embed_dim}
    check_agreement(path, config, inferred | quantizer, config_path)
    settings = {"image_size": image_size, "num_tokens": num_tokens, "embed_dim": embed_dim, "gumbel": gumbel}
    return build(path, VQGanVAE, {**settings, **inferred, "dropout": config.get("dropout", 0.0)}, state)


@opens
def load_openai_dvae(
    encoder_path: str | os.PathLike | None = None, decoder_path: str | os.PathLike | None = None
) -> OpenAIDiscreteVAE:
    """Opens OpenAI's dVAE from `encoder.pkl` and `decoder.pkl`.

    Without paths they are the published files; one path left out is the file of the usual name beside the other.
    """
    if encoder_path is None:
        beside = default_file(DVAE_ENCODER) if decoder_path is None else Path(decoder_path)
        encoder_path = beside.with_name(DVAE_ENCODER.name)
        decoder_path = default_file(DVAE_DECODER) if decoder_path is None else decoder_path
    elif decoder_path is None:
        decoder_path = Path(encoder_path).with_name(DVAE_DECODER.name)
    encoder, decoder = (as_state(path, read_torch(path)) for path in (encoder_path, decoder_path))
    return build_openai_dvae(f"{encoder_path} with {decoder_path}", encoder, decoder)


def build_openai_dvae(source: object, encoder: State, decoder: State) -> OpenAIDiscreteVAE:
    """OpenAI's dVAE of the weights of its two halves."""
    with opening(source, "is not the encoder and decoder of OpenAI's dVAE"):
        blocks = r"blocks\.group_1\.block_(\d+)\."
        encoder_dim, channels = encoder["blocks.input.w"].shape[:2]
        codebook_dim, num_tokens = decoder["blocks.input.w"].shape[:2]
        if (encoded := len(encoder["blocks.output.conv.b"])) != num_tokens:
            raise ValueError(f"the encoder has {encoded} codes, the decoder {num_tokens}")
        settings = {
            "num_tokens": num_tokens, "codebook_dim": codebook_dim, "encoder_dim": encoder_dim,
            "decoder_dim": decoder["blocks.output.conv.w"].shape[1], "encoder_blocks": count_parts(encoder, blocks),
            "decoder_blocks": count_parts(decoder, blocks), "channels": channels,
        }  # fmt: skip
    return build(source, OpenAIDiscreteVAE, settings, rename_halves(encoder, decoder))


PUBLISHED_LOADERS.update({DiscreteVAE: load_discrete_vae, VQGanVAE: load_vqgan, OpenAIDiscreteVAE: load_openai_dvae})
