"""The networks that turn a prompt into an image, opened together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dalle_pytorch.checks import check_types, check_values
from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.devices import pick_device
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import read_json
from dalle_pytorch.files.downloads import CLIPS, RESNET_CLIPS
from dalle_pytorch.pretrained import PretrainedModel, is_hub_name, read_config, resolve_folder
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.published.clip import load_clip
from dalle_pytorch.published.common import is_file
from dalle_pytorch.published.load import is_named, load_prior, load_vae
from dalle_pytorch.sampling.dtypes import check_dtype, choose_dtype, converted, dtype_of
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.load import load_tokenizer
from dalle_pytorch.vae.base import ImageTokenizer
from diffusion.decoder import DiffusionDecoder
from diffusion.published import MODEL_SIZES, load_decoder, load_super_resolution
from diffusion.super_resolution import SuperResolution

_HERE = Path(__file__).resolve().parent
#: the embedded model: the one of the checkout, or the copy in an installed package
DEFAULT_MODEL = next(
    (folder for folder in (_HERE.parent / "models/default", _HERE / "default_model") if folder.is_dir()),
    _HERE / "default_model",
)
GENERATORS = ("vqgan", "dvae")  # the published ones
SAMPLING_NAME, WORDS_NAME = "sampling.json", "words.json"
GUIDANCE = ("clip_guidance_scale", "cutn", "guidance_every", "guidance_min_sigma", "guidance_through_unet")
NUM_INFERENCE_STEPS, SAMPLER = "quad25", "ddim"  # of a decoder that nothing else is recorded of

Source = str | os.PathLike
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Parts:
    """Parts in place of those of a model folder: paths, hub names, or the objects themselves.

    Attributes:
        prior: a native folder, a `dalle.pt` of DALLE-pytorch, a folder of min-dalle's or minDALL-E's; or "min-dalle",
            "min-dalle-mega" or "mindall-e", which are downloaded.
        prior_flags: what the files of `prior` do not tell, or is to be another, see `open_published_prior`.
        low_memory: the prior holds its text encoder, where it has one, for a prompt's pass only.
        vae: the image tokenizer, in place of the one that an opened prior or decoder names.
        vqgan_config_path: the `model.yaml` of a VQGAN in `vae` or `generator`.
        generator: the image tokenizer whose latents `optimize` moves, in place of the one of the folder; or "vqgan" or
            "dvae", taming's VQGAN and OpenAI's dVAE, which are downloaded.
        taming: the published VQGAN that fits the prior, in place of the one that it names.
        tokenizer: a YouTokenToMe `.model`, a `tokenizer.json`, or CLIP's vocabulary, in place of the prior's own.
        hug: `tokenizer` is a `tokenizer.json` whatever its name.
        chinese: the BERT Chinese tokenizer.
        scorer: the CLIP that ranks and guides, see `load_clip`.
        clip_config: what the files of `scorer` do not tell, see `load_clip`.
        decoder: a native folder, or guided-diffusion's `.pt`.
        model_size: which published settings (64, 128, 256, 512) a `.pt` in `decoder` has.
        unet_flags: guided-diffusion's flags of a `.pt` in `decoder`.
        class_label: the ImageNet class that `decoder` is conditioned on, if it is one of those.
        super_resolution: a super-resolution U-Net: guided-diffusion's `.pt`, or a native folder.
        super_res_flags, super_res_class: its flags, and the ImageNet class that it is conditioned on.
        sampling: how tokens are sampled, in place of the prior's own settings.
        dtype: what the prior computes with, one of `DTYPES`, see `converted`; "auto" leaves a prior that is given as an
            object as it is, and see `choose_dtype` for the others.
        clip_guidance_scale, cutn, guidance_every, guidance_min_sigma, guidance_through_unet: how CLIP guides, see
            `ClipGuidance`.
        num_inference_steps, sampler: the diffusion steps that `decoder` is visited at, and how.
    """

    prior: Prior | Source | None = None
    prior_flags: Mapping[str, Any] = field(default_factory=dict)
    low_memory: bool = False
    vae: ImageTokenizer | Source | None = None
    vqgan_config_path: Source | None = None
    generator: ImageTokenizer | Source | None = None
    taming: bool = False
    tokenizer: Tokenizer | Source | None = None
    hug: bool = False
    chinese: bool = False
    scorer: CLIPModel | Source | None = None
    clip_config: Source | None = None
    decoder: DiffusionDecoder | Source | None = None
    model_size: int | None = None
    unet_flags: Mapping[str, Any] = field(default_factory=dict)
    class_label: int | None = None
    super_resolution: SuperResolution | Source | None = None
    super_res_flags: Mapping[str, Any] = field(default_factory=dict)
    super_res_class: int | None = None
    sampling: SamplingSettings | None = None
    dtype: str = "auto"
    clip_guidance_scale: float | None = None
    cutn: int | None = None
    guidance_every: int | None = None
    guidance_min_sigma: float | None = None
    guidance_through_unet: bool | None = None
    num_inference_steps: str | None = None
    sampler: str | None = None

    def check_paths(self) -> None:
        """Raises `CheckpointError` for a path to nothing, whether it would be opened or not."""
        files = [self.vqgan_config_path, None if self.chinese else self.tokenizer]
        others = [self.prior, self.vae, self.scorer, self.decoder, self.super_resolution]
        others += [] if self.generator in GENERATORS else [self.generator]
        for path in (*files, *others):
            if path == "":
                raise CheckpointError("an empty path names no model")
            if not isinstance(path, Source) or Path(path).exists() or is_named(path):
                continue
            if str(path) in (*CLIPS, *RESNET_CLIPS):
                continue
            if path in files or is_file(path) or not is_hub_name(path):
                raise CheckpointError(f"{path} is missing")


class Model:
    """A prior, a CLIP and a diffusion decoder with what belongs to them. Each is opened when it is first used.

    A folder has them as `dalle`, `vae`, `clip`, `decoder` and `tokenizer.json`, with `sampling.json`, the settings that
    it is best sampled with, and `words.json`, the words of the captions that it was trained on.
    """

    def __init__(self, parts: Parts, folder: Path | None = None, device: torch.device | str | None = None):
        self.parts, self.folder = parts, folder
        self._fingerprints: dict[str, str] = {}
        self.device = pick_device(None if device is None else str(device))
        check_dtype(parts.dtype, self.device)

    @classmethod
    def from_pretrained(
        cls, name: Source | None = None, device: torch.device | str | None = None, **parts: Any
    ) -> Model:
        """Opens a folder or hub name, with `parts` (see `Parts`) in place of its own.

        Without a name it is the default model, unless a prior, decoder or generator is given: those are not mixed with
        parts of the default model, whose CLIP has seen nothing but its world. Raises `CheckpointError` for a name that
        is none.
        """
        given = Parts(**parts)
        given.check_paths()
        if name is not None:
            folder = resolve_folder(name)
        else:
            own = (given.prior, given.decoder, given.generator)
            folder = DEFAULT_MODEL if all(part is None for part in own) else None
        return cls(given, folder, device)

    def open(self, *names: str) -> Model:
        """Opens these parts now, so that what is wrong with them is told before any work is done."""
        for name in names:
            getattr(self, name)
        return self

    def fingerprints(self, *names: str) -> dict[str, str]:
        """Hashes of the content of these parts."""
        for name in names:
            if name not in self._fingerprints:
                self._fingerprints[name] = getattr(self, name).fingerprint()
        return {name: self._fingerprints[name] for name in names}

    def provenance(self, *names: str) -> dict[str, str]:
        """`fingerprints`, with the prior's dtype where that is not float32."""
        dtype = dtype_of(self.prior)
        return self.fingerprints(*names) | ({} if dtype == "float32" else {"dtype": dtype})

    def num_bytes(self, name: str) -> int:
        """The memory that the weights of this part take."""
        return sum(tensor.nbytes for tensor in getattr(self, name).state_dict().values())

    @cached_property
    def prior(self) -> Prior:
        """The prior, with its text tokenizer."""
        given, parts = self.parts.prior, self.parts
        if isinstance(given, Prior):
            prior = given.to(self.device)
        else:
            source = self._source(given, "dalle", "prior")
            options = {"device": self.device, "low_memory": parts.low_memory, **parts.prior_flags}
            prior = self._frozen(load_prior(source, self.vae, parts.taming, **options))
        if isinstance(parts.tokenizer, Tokenizer):
            prior.tokenizer = parts.tokenizer
        elif parts.tokenizer is not None or parts.chinese or prior.tokenizer is None:
            prior.tokenizer = load_tokenizer(parts.tokenizer, hug=parts.hug, chinese=parts.chinese)
        dtype = parts.dtype
        if dtype == "auto":
            dtype = "float32" if isinstance(given, Prior) else choose_dtype(prior, self.device.type)
        if dtype != "float32":
            self._fingerprints["prior"] = prior.fingerprint()  # of what the files hold
        return converted(prior, dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.prior.tokenizer is not None
        return self.prior.tokenizer

    @cached_property
    def vae(self) -> ImageTokenizer | None:
        """The image tokenizer that was given, None for those that the prior and the decoder name."""
        given = self.parts.vae
        if given is None or isinstance(given, ImageTokenizer):
            return given
        return load_vae(given, vqgan_config_path=self.parts.vqgan_config_path)

    @cached_property
    def generator(self) -> ImageTokenizer:
        """The image tokenizer whose latents `optimize` moves."""
        given, config_path = self.parts.generator or self._bundled("vae"), self.parts.vqgan_config_path
        if isinstance(given, ImageTokenizer):
            return self._frozen(given).eval()
        if given in GENERATORS and not Path(given).exists():
            return self._frozen(load_vae(taming=given == "vqgan"))
        return self._frozen(load_vae(self._source(given, "vae", "generator"), vqgan_config_path=config_path))

    @cached_property
    def scorer(self) -> CLIPModel:
        """The CLIP that ranks and guides; OpenAI's ViT-B/32 where none is given."""
        return self.clip(self.parts.scorer or self._bundled("clip"), self.parts.clip_config)

    def clip(self, given: CLIPModel | Source | None, clip_config: Source | None = None) -> CLIPModel:
        """A CLIP, or the one of a path or name, see `load_clip`, on the device of this model."""
        if given is None or isinstance(given, Source):
            return self._frozen(load_clip(given, clip_config))
        return given.to(self.device)

    @cached_property
    def decoder(self) -> DiffusionDecoder:
        given, parts = self.parts.decoder, self.parts
        if isinstance(given, DiffusionDecoder):
            return given.to(self.device)
        path = self._source(given, "decoder", "decoder")
        if is_file(path) or read_config(resolve_folder(path)).get("class") == "UNet":
            flags = {**(MODEL_SIZES[parts.model_size] if parts.model_size else {}), **parts.unet_flags}
            return self._frozen(load_decoder(path, self.vae or load_vae(taming=True), parts.class_label, **flags))
        if parts.model_size or parts.unet_flags:
            raise UsageError(f"model_size and unet_flags go with a .pt of guided-diffusion's, and {path} is a folder")
        return self._frozen(DiffusionDecoder.from_pretrained(path, vae=self.vae, class_label=parts.class_label))

    @cached_property
    def super_resolution(self) -> SuperResolution | None:
        given, parts = self.parts.super_resolution, self.parts
        if given is None or isinstance(given, SuperResolution):
            return given and given.to(self.device)
        return self._frozen(load_super_resolution(given, parts.super_res_class, **parts.super_res_flags))

    @property
    def sampling(self) -> SamplingSettings:
        """How tokens are sampled: as given, as the folder's `sampling.json` says, or as the prior does by itself."""
        if self.parts.sampling is not None:
            return self.parts.sampling
        names = [setting.name for setting in fields(SamplingSettings)]
        own = {} if self.parts.prior else {name: self._recorded[name] for name in names if name in self._recorded}
        with opening(f"{self.folder}/{SAMPLING_NAME}", "does not hold sampling settings"):
            check_types(SamplingSettings, own)
            return replace(self.prior.sampling, **own)

    @property
    def guidance(self) -> dict[str, Any]:
        """How the folder's own CLIP best guides its own decoder, as arguments of `ClipGuidance`, if it says so."""
        own = {name: self._recorded_with(name, self.parts.scorer, self.parts.decoder) for name in GUIDANCE}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def num_inference_steps(self) -> str:
        """The diffusion steps that are enough for the folder's own decoder, or 25 of any."""
        return self._recorded_with("num_inference_steps", self.parts.decoder) or NUM_INFERENCE_STEPS

    @property
    def sampler(self) -> str:
        """The sampler of these steps."""
        return self._recorded_with("sampler", self.parts.decoder) or SAMPLER

    def _recorded_with(self, name: str, *replaced: object) -> Any:
        """The setting as given, or as the folder's `sampling.json` says of parts of its own."""
        given = getattr(self.parts, name)
        return given if given is not None or any(replaced) else self._recorded.get(name)

    @cached_property
    def words(self) -> frozenset[str] | None:
        """The words of the captions that the prior was trained on, where they are known."""
        path = None if self.parts.prior else self._bundled(WORDS_NAME)
        if path is None:
            return None
        with opening(path, "is not a list of words"):
            return frozenset(map(str.__str__, read_json(path)))

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        path = self._bundled(SAMPLING_NAME)
        if path is None:
            return {}
        with opening(path, "does not hold sampling settings"):
            recorded = read_config(path.parent, path.name)
            check_values(recorded)
            check_types(Parts, recorded)
            return recorded

    def unknown_words(self, prompt: str) -> list[str]:
        """The words that the prior, or its tokenizer, has never seen."""
        if self.words is None:
            return self.tokenizer.unknown_words(prompt)
        return [word for word in dict.fromkeys(prompt.split()) if word.strip(".,;:!?\"'()") not in self.words]

    def save_pretrained(self, folder: Source, dtype: torch.dtype | None = None) -> None:
        """Writes the parts that there are as a folder for `from_pretrained`, floating-point weights as `dtype`.

        Super-resolution is left out. Raises `UserError` for a tokenizer that a `tokenizer.json` cannot hold.
        """
        folder = Path(folder)
        has_prior = self._has(self.parts.prior, "dalle")
        if has_prior:
            PretrainedModel.save_pretrained(self.prior, folder / "dalle", dtype)
            self.prior.vae.save_pretrained(folder / "vae", dtype)
            self.tokenizer.save(folder / "tokenizer.json")
            settings = {**asdict(self.sampling), **self.guidance}
            for name in ("num_inference_steps", "sampler"):
                settings[name] = self._recorded_with(name, self.parts.decoder)
            settings = {name: value for name, value in settings.items() if value is not None}
            write_text(folder / SAMPLING_NAME, json.dumps(settings) + "\n")
            if self.words is not None:
                write_text(folder / WORDS_NAME, json.dumps(sorted(self.words)) + "\n")
        if self._has(self.parts.decoder, "decoder"):
            self.decoder.save_pretrained(folder / "decoder", dtype)
            if not (has_prior and _equal(self.decoder.vae, self.prior.vae)):
                self.decoder.vae.save_pretrained(folder / "decoder/vae", dtype)
        if self._has(self.parts.scorer, "clip"):
            self.scorer.save_pretrained(folder / "clip", dtype)
            if self.parts.scorer and isinstance(self.scorer, CLIP) and self.scorer.tokenizer is not None:
                self.scorer.tokenizer.save(folder / "clip/tokenizer.json")  # not the prior's

    def _has(self, given: object, name: str) -> bool:
        return given is not None or self._bundled(name) is not None

    def _bundled(self, name: str) -> Path | None:
        """What the folder has under that name."""
        return self.folder / name if self.folder is not None and (self.folder / name).exists() else None

    def _source(self, given: Any, name: str, part: str) -> Source:
        source = given or self._bundled(name)
        if source is None:
            place = "" if self.folder is None else f" in {self.folder}"
            raise UsageError(f"this model has no {part}{place}; give one as `{part}`, a folder or a file")
        return source

    def _frozen(self, module: Module) -> Module:
        return module.to(self.device).requires_grad_(False)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same weights."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
