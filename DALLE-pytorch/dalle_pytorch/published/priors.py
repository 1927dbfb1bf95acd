"""The priors that are still published: min-dalle (DALL·E mini and mega) and minDALL-E, each a folder of files."""

import math
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dalle_pytorch.devices import release_memory
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.nn.upstream import State, rename
from dalle_pytorch.pretrained import construct, load_state
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.priors.min_dalle import DalleBart
from dalle_pytorch.priors.mindalle import MinDALLE
from dalle_pytorch.published.common import TRAINING_STATE, build, check_agreement
from dalle_pytorch.published.unpickler import read_torch, read_yaml, tensor_dict
from dalle_pytorch.published.vaes import build_vqgan
from dalle_pytorch.tokenizers.min_dalle import MinDalleTokenizer
from dalle_pytorch.tokenizers.mindalle import MinDALLETokenizer
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE

PriorType = TypeVar("PriorType", bound=Prior)

HEADS = {1024: 16, 1536: 24, 2048: 32}  # of the published priors by width, which the weights do not tell
STAGE1, STAGE2, SETTINGS = "stage1_last.ckpt", "stage2_last.ckpt", "config.yaml"
_MINDALLE_NAMES = (
    (r"\.attn\.key\.", ".attn.k_proj."), (r"\.attn\.query\.", ".attn.q_proj."), (r"\.attn\.value\.", ".attn.v_proj."),
    (r"\.attn\.proj\.", ".attn.out_proj."), (r"\.mlp\.0\.", ".proj_in."), (r"\.mlp\.2\.", ".proj_out."),
)  # fmt: skip


def find_published_prior(path: str | os.PathLike) -> tuple[type[Prior], Path, str] | None:
    """What kind of prior a folder, or the decoder in it, holds: its class, the folder, and the ending of its files'
    names, `_mini` for DALL·E mini where it is beside mega. None for other folders and files."""
    path = Path(path)
    named = re.fullmatch(r"decoder(\w*)\.pt", path.name)
    if named and path.is_file() and path.with_name(f"encoder{named[1]}.pt").is_file():
        return DalleBart, path.parent, named[1]
    if path.name == STAGE2 and path.is_file():
        return MinDALLE, path.parent, ""
    if not path.is_dir():
        return None
    names = (path / STAGE2, path / "decoder.pt", path / "decoder_mini.pt")
    return next(filter(None, (find_published_prior(name) for name in names)), None)


def open_published_prior(
    path: str | os.PathLike, vae: ImageTokenizer | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", low_memory: bool = False, **flags: Any,
) -> Prior:  # fmt: skip
    """Opens a folder for which `find_published_prior` finds a kind, one file at a time, each moved to the device
    before the next.

    Args:
        vae: in place of the prior's own.
        dtype: of the prior's weights; those of the VAE are float32.
        low_memory: holds a text encoder's weights for a prompt's pass only, and reads them again for the next prompt.
        flags: `heads`, where the prior's width is not that of a published one; `start_token`, see `DalleBart`.
    """
    found = find_published_prior(path)
    if found is None:
        raise CheckpointError(f"{path} holds no prior of min-dalle or minDALL-E")
    kind, folder, suffix = found
    if kind is MinDALLE:
        return _open_mindalle(folder, vae, dtype, device, **flags)
    return _open_min_dalle(folder, suffix, vae, dtype, device, low_memory, **flags)


def _read(path: Path, dtype: torch.dtype, device: torch.device | str) -> State:
    """The weights in a file, converted one after another so that they are in memory once."""
    content = read_torch(path, TRAINING_STATE)
    state = tensor_dict(content.get("state_dict", content) if isinstance(content, dict) else content, path)
    for name in state:
        state[name] = state[name].to(device, dtype if state[name].is_floating_point() else None)
    return state


def _heads(path: Path, dim: int, heads: int | None) -> int:
    """The heads that were given, or those of the published prior of this width."""
    if heads is None and dim not in HEADS:
        raise CheckpointError(f"{path}: the weights do not tell how many attention heads a prior of width {dim} has; "
                              "give the flag heads (--prior_flags heads=16)")  # fmt: skip
    return HEADS[dim] if heads is None else heads


def _count(state: State, prefix: str) -> int:
    """How many layers `prefix.0.` … there are. Gaps are found when the weights are loaded."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{prefix}.")})


def _side(positions: Tensor) -> int:
    side = math.isqrt(len(positions))
    if side * side != len(positions):
        raise ValueError(f"{len(positions)} image positions are not a square")
    return side


def _built(
    source: Path, kind: type[PriorType], settings: dict[str, Any], state: State, dtype: torch.dtype
) -> PriorType:
    prior = construct(source, kind, settings, state)
    load_state(prior, state, source, dtype)
    return prior.requires_grad_(False).eval()


# min-dalle


def _open_min_dalle(
    folder: Path, suffix: str, vae: ImageTokenizer | None, dtype: torch.dtype, device: torch.device | str,
    low_memory: bool, heads: int | None = None, **flags: Any,
) -> DalleBart:  # fmt: skip
    encoder_path, decoder_path = folder / f"encoder{suffix}.pt", folder / f"decoder{suffix}.pt"
    settings: dict[str, Any] = {}
    state: State = {}
    for half, path in (("encoder", encoder_path), ("decoder", decoder_path)):
        part = _read(path, dtype, device)
        with opening(path, f"is not the {half} of min-dalle"):
            rows, dim = part["embed_tokens.weight"].shape
            positions = part["embed_positions.weight"]
            ff_dim = len(part["layers.0.glu.fc0.weight"])
            settings |= {f"{half}_depth": _count(part, "layers"), f"{half}_ff_dim": ff_dim}
            if half == "encoder":
                settings |= {"num_text_tokens": rows, "text_seq_len": len(positions), "dim": dim,
                             "heads": _heads(path, dim, heads)}  # fmt: skip
            else:
                settings |= {"image_vocab_size": rows, "image_fmap_size": _side(positions)}
        state |= {f"{half}.{name}": tensor for name, tensor in part.items()}
        release_memory(torch.device("cpu"))
    if vae is None:
        vae = _open_detokenizer(folder, settings["image_fmap_size"])
    prior = _built(decoder_path, DalleBart, {**settings, "vae": vae.to(device), **flags}, state, dtype)
    prior.tokenizer = MinDalleTokenizer.from_files(folder / f"vocab{suffix}.json", folder / f"merges{suffix}.txt")
    if low_memory:
        prior.reopen_encoder = lambda: _read(encoder_path, dtype, device)
    return prior


def _open_detokenizer(folder: Path, side: int) -> VQGanVAE:
    """The VQGAN of `detoker.pt`, of which that has the decoder alone, for grids of this side."""
    # min-dalle itself keeps it in the folder vqgan beside the prior's.
    places = (folder / "detoker.pt", folder.parent / "vqgan/detoker.pt")
    path = next((place for place in places if place.is_file()), places[0])
    state = rename(_read(path, torch.float32, "cpu"), [(r"^embedding\.", "quantize.embedding.")])
    with opening(path, "is not the detokenizer of min-dalle"):
        num_tokens, embed_dim = state["quantize.embedding.weight"].shape
        levels = range(len({key.split(".")[2] for key in state if key.startswith("decoder.up.")}))
        widths = [len(state[f"decoder.up.{i}.block.0.conv1.bias"]) for i in levels]
        blocks = {key.split(".")[4] for key in state if key.startswith("decoder.up.0.block.")}
        ch, channels = math.gcd(*widths), len(state["decoder.conv_out.bias"])
        attended = [i for i in levels if f"decoder.up.{i}.attn.0.norm.weight" in state]
        settings = {
            "image_size": side << (len(widths) - 1), "num_tokens": num_tokens, "embed_dim": embed_dim,
            "z_channels": state["decoder.conv_in.weight"].shape[1], "ch": ch, "ch_mult": [w // ch for w in widths],
            "num_res_blocks": len(blocks) - 1, "attn_resolutions": [side << (len(widths) - 1 - i) for i in attended],
            "mid_attention": "decoder.mid.attn_1.norm.weight" in state, "in_channels": channels, "out_ch": channels,
            "gumbel": False, "decoder_only": True, "unit_range": True,
        }  # fmt: skip
    return build(path, VQGanVAE, settings, state)


# minDALL-E


def _mindalle_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the VQGAN and of the transformer in minDALL-E's `config.yaml`. As in its own code, those that are
    absent are the published model's; so are all of them without the file."""
    config = read_yaml(path) if path.is_file() else {}
    found = []
    with opening(path, "is not a configuration of minDALL-E"):
        for stage, kind in (("stage1", "vqgan"), ("stage2", "transformer1d")):
            part = dict(config.get(stage) or {})
            if part.get("type", kind) != kind:
                raise CheckpointError(f"{path}: {stage} is a {part['type']}, expected a {kind}")
            found.append({**part, **dict(part.get("hparams") or {})})
        vqgan, transformer = found
        if not isinstance(transformer.get("gelu_use_approx", False), bool):
            raise ValueError("gelu_use_approx is neither true nor false")
    return vqgan, transformer


def _open_mindalle(
    folder: Path, vae: ImageTokenizer | None, dtype: torch.dtype, device: torch.device | str, heads: int | None = None,
    **flags: Any,
) -> MinDALLE:  # fmt: skip
    path, settings_path = folder / STAGE2, folder / SETTINGS
    vqgan, given = _mindalle_settings(settings_path)
    tokenizer = MinDALLETokenizer.from_files(
        *(folder / f"tokenizer/bpe-16k-{name}" for name in ("vocab.json", "merges.txt"))
    )
    state = {key: value for key, value in _read(path, dtype, device).items() if not key.endswith(".attn.mask")}
    state = rename(state, _MINDALLE_NAMES)
    with opening(path, "is not the transformer of minDALL-E"):
        num_text_tokens, dim = state["tok_emb_txt.weight"].shape
        depth, text_seq_len = _count(state, "blocks"), len(state["pos_emb_txt.weight"])
        image_positions, attn_bias = state["pos_emb_img.weight"], "blocks.0.attn.q_proj.bias" in state
        mlp_bias = "blocks.0.proj_in.bias" in state
        num_image_tokens = len(state["tok_emb_img.weight"])
        inferred = {
            "vocab_size_txt": num_text_tokens, "vocab_size_img": num_image_tokens, "embed_dim": dim, "n_layers": depth,
            "ctx_len_txt": text_seq_len, "ctx_len_img": len(image_positions), "attn_bias": attn_bias,
            "mlp_bias": mlp_bias,
        }  # fmt: skip
        check_agreement(path, given, inferred, settings_path)
        settings = {
            "dim": dim, "depth": depth, "heads": _heads(path, dim, given.get("n_heads") if heads is None else heads),
            "ff_dim": len(state["blocks.0.proj_in.weight"]), "num_text_tokens": num_text_tokens,
            "pad_token": tokenizer.pad_id, "text_seq_len": text_seq_len, "attn_bias": attn_bias, "mlp_bias": mlp_bias,
            "gelu_use_approx": given.get("gelu_use_approx", False), "image_fmap_size": _side(image_positions),
            "num_image_tokens": num_image_tokens,
        }  # fmt: skip
    if vae is None:
        vae = build_vqgan(folder / STAGE1, _read(folder / STAGE1, torch.float32, "cpu"), vqgan, settings_path)
    prior = _built(path, MinDALLE, {**settings, "vae": vae.to(device), **flags}, state, dtype)
    prior.tokenizer = tokenizer
    return prior
