"""`Model`: parts are opened when they are used, never mixed with the default model's, and saved as they were."""

import json

import pytest
import torch
from factories import small_decoder

import text_to_image.model
from dalle_pytorch import load_prior
from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.nn.linear import has_int8
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling import dtypes
from dalle_pytorch.sampling.settings import SamplingSettings
from text_to_image import Model, TextToImage

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this build of PyTorch has no FBGEMM for this processor")


@pytest.fixture
def bundle(tiny_bundle, tiny_vae, monkeypatch):
    """A whole model, in the place of the default one."""
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    settings = {"top_p": 0.8, "temperature": 0.7, "cond_scale": 1.5, "clip_guidance_scale": 30, "cutn": 3,
                "guidance_through_unet": False, "num_inference_steps": "quad7", "sampler": "dpm++"}  # fmt: skip
    (tiny_bundle / "sampling.json").write_text(json.dumps(settings))
    (tiny_bundle / "words.json").write_text('["a", "red", "seven"]')
    monkeypatch.setattr(text_to_image.model, "DEFAULT_MODEL", tiny_bundle)
    return tiny_bundle


@pytest.fixture
def clips(monkeypatch):
    """The paths of the CLIPs that are opened, which are none."""
    paths = []

    def load_clip(path, clip_config=None):
        paths.append(path)
        return torch.nn.Identity()

    monkeypatch.setattr(text_to_image.model, "load_clip", load_clip)
    return paths


def test_parts_are_opened_when_they_are_used(bundle, monkeypatch, clips):
    monkeypatch.setattr(text_to_image.model, "load_prior", lambda *_: pytest.fail("the prior is opened"))
    pipe = TextToImage.from_pretrained(device="cpu")
    assert len(pipe.upscale(torch.zeros(256, dtype=torch.long), num_inference_steps=1)) == 1
    monkeypatch.setattr(text_to_image.model, "load_prior", load_prior)
    pipe = TextToImage.from_pretrained(device="cpu")
    pipe.generate("a red seven", 1, rank=False)
    assert not clips and "decoder" not in vars(pipe.model)


def test_the_default_model(bundle, clips):
    model = Model.from_pretrained(device="cpu").open("prior", "scorer", "decoder")
    assert clips == [bundle / "clip"]
    assert model.sampling == SamplingSettings(None, 0.8, 0.7, 1.5)
    assert model.guidance == {"clip_guidance_scale": 30, "cutn": 3, "guidance_through_unet": False}
    assert (model.num_inference_steps, model.sampler) == ("quad7", "dpm++")
    assert model.unknown_words("a red, blue seven blue") == ["blue"]


def test_the_models_own_steps_are_those_that_are_visited(bundle):
    tokens = torch.zeros(256, dtype=torch.long)

    def passes(**options):
        pipe = TextToImage.from_pretrained(device="cpu")
        seen = []
        pipe.model.decoder.unet.register_forward_pre_hook(lambda *_: seen.append(1))
        return pipe.upscale(tokens, **options)[0].upscaled_pixels[0], len(seen)

    own, count = passes()
    assert count == 7
    torch.testing.assert_close(own, passes(num_inference_steps="quad7", sampler="dpm++")[0])
    assert (own - passes(sampler="ddim")[0]).abs().max() > 1e-3 and passes(num_inference_steps=3)[1] == 3


def test_how_the_model_guides_is_the_default(bundle):
    pipe = TextToImage.from_pretrained(device="cpu")
    own, other = pipe.guidance("a red seven"), pipe.guidance("a red seven", cutn=5, guidance_every=None)
    assert (own.clip_guidance_scale, own.cutn, own.guidance_through_unet, own.guidance_every) == (30, 3, False, 1)
    assert (other.clip_guidance_scale, other.cutn, other.guidance_every) == (30, 5, 1)


def test_a_prior_of_ones_own_is_not_mixed_with_the_default_model(bundle, clips):
    model = Model.from_pretrained(device="cpu", prior=bundle / "dalle").open("scorer")
    assert clips == [None]  # the published one
    assert model.sampling == SamplingSettings(top_p=0.9) and model.guidance == {}
    assert model.words is None
    with pytest.raises(UsageError, match="no decoder"):
        model.open("decoder")


def test_a_decoder_of_ones_own_is_not_mixed_with_the_default_model(bundle, clips):
    model = Model.from_pretrained(device="cpu", decoder=bundle / "decoder").open("decoder", "scorer")
    assert clips == [None] and model.guidance == {}
    assert (model.num_inference_steps, model.sampler) == ("quad25", "ddim")
    with pytest.raises(UsageError, match="no prior"):
        model.open("prior")
    # Another CLIP leaves the rest of the default model as it is, but its guidance scale.
    model = Model.from_pretrained(device="cpu", scorer="owner/clip").open("prior", "scorer")
    assert clips == [None, "owner/clip"] and model.guidance == {} and model.sampling.temperature == 0.7


@pytest.mark.parametrize("part", ["prior", "vae", "vqgan_config_path", "tokenizer", "scorer", "decoder",
                                  "super_resolution"])  # fmt: skip
def test_a_path_to_nothing_is_refused_though_it_is_not_opened(bundle, part):
    for path in ("none.yaml", "none.pt", "none"):
        with pytest.raises(CheckpointError, match=f"^{path} is missing$"):
            Model.from_pretrained(device="cpu", **{part: path})
    with pytest.raises(CheckpointError, match="an empty path names no model"):
        Model.from_pretrained(device="cpu", **{part: ""})


def test_settings_that_no_vqgan_reads_are_refused(bundle):
    (bundle / "model.yaml").write_text("model: {}")
    model = Model.from_pretrained(device="cpu", vae=bundle / "vae", vqgan_config_path=bundle / "model.yaml")
    with pytest.raises(CheckpointError, match=r"vae is not a checkpoint of a VQGAN: .*model\.yaml"):
        model.open("vae")


def test_objects_as_parts(bundle, tiny_vae):
    prior, decoder = load_prior(bundle / "dalle"), small_decoder(tiny_vae)
    model = Model.from_pretrained(device="cpu", prior=prior, decoder=decoder, sampling=SamplingSettings(top_k=3),
                                  clip_guidance_scale=2, sampler="ddpm")  # fmt: skip
    assert model.prior is prior and model.decoder is decoder
    assert model.sampling.top_k == 3 and model.guidance == {"clip_guidance_scale": 2}
    assert (model.num_inference_steps, model.sampler) == ("quad25", "ddpm")
    assert any(parameter.requires_grad for parameter in prior.parameters())  # a training may go on with it


@needs_int8
def test_dtypes(bundle, tmp_path, monkeypatch):
    plain, int8 = (Model.from_pretrained(device="cpu", dtype=dtype) for dtype in ("auto", "int8"))
    assert not plain.prior.is_int8 and int8.prior.is_int8
    # Models are known by their files, whatever they compute with.
    assert int8.fingerprints("prior") == plain.fingerprints("prior") == plain.provenance("prior")
    assert int8.provenance("prior") == {**plain.fingerprints("prior"), "dtype": "int8"}
    with pytest.raises(UsageError, match="dtype float32"):
        int8.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(dtypes, "MEAN_WEIGHTS", 1)
    assert Model.from_pretrained(device="cpu").prior.is_int8
    # A prior of one's own stays as it is.
    prior = load_prior(bundle / "dalle")
    assert Model.from_pretrained(device="cpu", prior=prior).prior is prior
    assert Model.from_pretrained(device="cpu", prior=prior, dtype="int8").prior.is_int8 and not prior.is_int8
    with pytest.raises(UsageError, match="expected dtype as one of"):
        Model.from_pretrained(device="cpu", dtype="int4")


def test_saved_and_opened_again(bundle, tmp_path):
    first = TextToImage.from_pretrained(device="cpu")
    first.model.save_pretrained(tmp_path / "saved")

    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path / "saved") == files(bundle)
    second = TextToImage.from_pretrained(tmp_path / "saved", "cpu")
    assert isinstance(second.model.scorer, CLIPModel)
    assert second.model.sampling == first.model.sampling and second.model.words == first.model.words
    assert second.model.guidance == first.model.guidance
    assert (second.model.num_inference_steps, second.model.sampler) == ("quad7", "dpm++")
    a, b = (pipe("a red seven", 2, upscale=True, num_inference_steps=1) for pipe in (first, second))
    assert torch.equal(a[0].tokens, b[0].tokens) and a[0].score == b[0].score
    assert torch.equal(a[0].upscaled_pixels[0], b[0].upscaled_pixels[0])


def test_a_decoder_with_a_vae_of_its_own_is_saved_with_it(bundle, tiny_vae, tmp_path):
    other = DALLE.from_pretrained(bundle / "dalle").vae
    torch.nn.init.ones_(next(other.parameters()))
    Model.from_pretrained(bundle, "cpu", decoder=small_decoder(other)).save_pretrained(tmp_path / "saved")
    again = Model.from_pretrained(tmp_path / "saved", "cpu")
    assert torch.equal(next(again.decoder.vae.parameters()), next(other.parameters()))
    assert torch.equal(next(again.prior.vae.parameters()), next(tiny_vae.parameters()))


def test_load_prior_opens_any_prior(bundle):
    class Constant(DALLE):
        """Another class of prior, in a native folder."""

    config = json.loads((bundle / "dalle/config.json").read_text())
    (bundle / "dalle/config.json").write_text(json.dumps({**config, "class": "Constant"}))
    prior = load_prior(bundle / "dalle")
    assert isinstance(prior, Prior) and type(prior) is Constant
    with pytest.raises(CheckpointError, match="Prior"):
        load_prior(bundle / "vae")


@pytest.mark.parametrize("content", ["no json", "[]", '{"temperature": "hot"}', '{"temperature": -1}'])
def test_sampling_settings_that_are_none(bundle, content):
    (bundle / "sampling.json").write_text(content)
    with pytest.raises((CheckpointError, UsageError)):
        _ = Model.from_pretrained(device="cpu").sampling
