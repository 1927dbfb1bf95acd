"""Latents moved by CLIP: what they stand for, what the image is led to, the best that is kept, and runs in parts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.errors import CheckpointError, SamplingDiverged, UsageError
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE
from diffusion.samplers import generator
from text_to_image import TextToImage, latents
from text_to_image.latents import Chapter, Latents, Optimization, augment, kept_bytes, start_tokens
from text_to_image.model import Model, Parts
from text_to_image.settings import LATENTS, OPTIMIZERS, OptimizationSettings

COLOURS = ("red", "green", "blue")


class Palette(ImageTokenizer):
    """Its codes are the corners of the cube of colours, and each is a square of two pixels a side."""

    num_tokens, image_size, num_layers = 8, 16, 1

    def __init__(self):
        super().__init__()
        self.config = {}
        self.codebook = torch.nn.Parameter(torch.tensor([*itertools.product((0.0, 1.0), repeat=3)]))

    @property
    def codebook_weight(self):
        return self.codebook

    def encode_logits(self, image):
        return -(F.avg_pool2d(image, 2)[:, None] - self.codebook[..., None, None]).square().sum(2)

    def decode_embeddings(self, rows):
        return F.interpolate(rows, scale_factor=2)


class ColourClip(CLIPModel):
    """Features are the mean colour; texts name colours."""

    image_size = 8

    def __init__(self, names=COLOURS):
        super().__init__()
        self.config = {}
        self.names, self.features = names, torch.nn.Parameter(torch.eye(3))

    def tokenize(self, texts):
        return torch.tensor([self.names.index(text) for text in texts])

    def lost_text(self, text):
        return text[4:]

    def encode_text(self, text):
        return self.features[text]

    def encode_image(self, image):
        assert image.shape[-2:] == (8, 8)
        return image.mean((2, 3)) @ self.features + 1e-3

    def visual_features(self, image):
        raise NotImplementedError


def make_run(prompts="red", vae=None, clips=None, size=(16, 16), start=None, **options):
    """Parts of a story are separated by blanks, here and below."""
    vae = vae or Palette()
    options = {"iterations": 20, "latents": "codes", "learning_rate": 0.3, "cutn": 4, "cut_size": [0.8, 1.0],
               "cut_noise": 0.0, "augments": [], **options}  # fmt: skip
    settings = OptimizationSettings(**options)
    chapters = [Chapter([(part, 1.0)]) if isinstance(part, str) else part for part in
                (prompts.split() if isinstance(prompts, str) else prompts)]  # fmt: skip
    start = start_tokens(vae, size, noise="codes") if start is None else start
    return Optimization(vae, clips or [ColourClip()], chapters, start, settings)


def colour(image):
    return image.pixels.mean((1, 2))


@pytest.mark.parametrize("kind", LATENTS)
def test_the_image_takes_the_colour_of_the_prompt(kind):
    run = make_run(latents=kind, iterations=60)
    before = run.score(run.preview())
    result = run.run()
    red, green, blue = colour(result[0])
    assert red > 0.85 and green < 0.15 and blue < 0.15
    assert result[0].score > 0.95 > before + 0.2
    assert result[0].score == pytest.approx(run.targets[0][0].score(result[0].pixels))
    assert result.prompt == "red" and result[0].tokens.shape == (64,)
    if kind != "soft":
        assert torch.equal(run.vae.decode_image(result[0].tokens[None])[0], result[0].pixels)


def test_weights_and_negative_weights():
    white = torch.full((8, 8), 7)
    run = make_run([Chapter([("red", 1.0), ("green", -0.5)])], start=white, iterations=60)
    assert run.targets[0][0].weights.tolist() == pytest.approx([2 / 3, -1 / 3])
    red, green, _ = colour(run.run()[0])
    assert red > 0.8 and green < 0.3
    red, green, blue = colour(make_run([Chapter([("red", 1.0), ("blue", 1.0)])], iterations=60).run()[0])
    assert red > 0.7 and blue > 0.7 and green < 0.3


def test_an_image_as_a_prompt():
    blue = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 16, 16)
    assert colour(make_run([Chapter([], [(blue, 1.0)])], iterations=60).run()[0])[2] > 0.85
    assert make_run([Chapter([], [(blue, 1.0)])]).caption == "images"


def test_several_clips_are_followed_together():
    clips = [ColourClip(), ColourClip(("green", "red", "blue"))]  # which asks for green by the name of red
    run = make_run(clips=clips, iterations=60)
    red, green, blue = colour(run.run()[0])
    assert red > 0.7 and green > 0.7 and blue < 0.3
    yellow = torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, 16, 16)
    assert run.score(yellow) == pytest.approx(math.sqrt(0.5), abs=0.01)
    assert run.score(yellow * torch.tensor([1.0, 0, 0])[:, None, None]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("make", [
    lambda: DiscreteVAE(image_size=16, num_tokens=12, codebook_dim=8, num_layers=2, hidden_dim=8),
    lambda: OpenAIDiscreteVAE(image_size=16, num_tokens=12, codebook_dim=8, encoder_dim=8, decoder_dim=8),
    None,
])  # fmt: skip
@pytest.mark.parametrize("kind", LATENTS)
def test_every_image_tokenizer(make, kind, tiny_vae):
    torch.manual_seed(0)
    vae = make() if make else tiny_vae
    run = make_run(vae=vae.requires_grad_(False), latents=kind, size=(24, 16), iterations=40)
    before = run.score(run.preview())
    result = run.run()
    f = 2**vae.num_layers
    assert result[0].pixels.shape == (3, 16, 24) and result[0].tokens.shape == (16 // f, 24 // f)
    assert result[0].score > before


def test_the_latents_of_a_tokenizer_by_default(tiny_vae):
    assert make_run(latents=None).latents.kind == "one_hot"
    assert make_run(latents=None, vae=tiny_vae, size=(16, 16)).latents.kind == "codes"


# --------------------------------------------------------------------------------------------------
# Latents


def test_codes_are_the_nearest_with_a_gradient_that_goes_straight_through():
    codes = Latents(Palette(), "codes")
    tokens = torch.tensor([[1, 2], [7, 0]])
    value = (codes.encode(tokens) + 0.3 * torch.randn(1, 3, 2, 2, generator=generator(0))).requires_grad_()
    rows = codes.rows(value)
    assert torch.equal(codes.tokens(value), tokens)
    torch.testing.assert_close(rows, codes.vae.embed(tokens[None]))
    rows.sum().backward()
    torch.testing.assert_close(value.grad, codes.std.expand_as(value))


def test_one_hot_latents_sharpen():
    one_hot = Latents(Palette(), "one_hot")
    tokens = torch.tensor([[1, 2], [7, 0]])
    value = one_hot.encode(tokens)
    assert value.softmax(1).amax().item() == pytest.approx(8 / 15)
    torch.testing.assert_close(one_hot.rows(value, 0.1), one_hot.vae.embed(tokens[None]), atol=1e-3, rtol=0)
    assert (one_hot.rows(value) - 0.5).abs().max() < 0.35


def test_latents_stay_in_the_range_of_the_codebook():
    run = make_run(latents="soft", learning_rate=5.0)
    run.run()
    rows = run.latents.rows(run.state.value)
    assert rows.min() > -1e-5 and rows.max() < 1 + 1e-5
    value = torch.full((1, 8, 1, 1), 100.0)
    Latents(Palette(), "one_hot").clamp_(value)
    assert (value == 100).all()


def test_the_start():
    vae = Palette()
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    assert start_tokens(vae, (8, 4), image).tolist() == [[4, 4, 1, 1]] * 2
    assert start_tokens(vae, (5, 5), image).tolist() == [[4, 1]] * 2  # its centre, in whole tokens
    for noise in ("codes", "pixels", "gradient"):
        drawn = [start_tokens(vae, (32, 16), noise=noise, seed=seed) for seed in (0, 0, 1)]
        assert drawn[0].shape == (8, 16) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    changes = [(start_tokens(vae, (32, 32), noise=noise).diff() != 0).float().mean() for noise in ("gradient", "codes")]
    assert changes[0] < 0.3 < changes[1]
    for size in ((1, 16), (16, 1), (9000, 16)):
        with pytest.raises(UsageError, match="expected sides of 2 to 8192 pixels"):
            start_tokens(vae, size)


def test_init_weight_holds_the_start():
    start = torch.full((8, 8), 1)
    free, held = (colour(make_run(start=start, init_weight=weight, iterations=40).run()[0]) for weight in (0, 10))
    assert free[0] > 0.8 and free[2] < 0.2
    assert held[0] < 0.2 and held[2] > 0.8


# --------------------------------------------------------------------------------------------------
# Cutouts


def test_augmentations():
    cutouts = torch.rand(6, 3, 8, 8, generator=generator(0))
    assert torch.equal(augment(cutouts, [], 0.0, generator(1)), cutouts)
    flipped = augment(cutouts, ["flip"], 0.0, generator(1))
    ways = [0 if torch.allclose(a, b, atol=1e-5) else 1 if torch.allclose(a, b.flip(-1), atol=1e-5) else 2
            for a, b in zip(flipped, cutouts, strict=True)]  # fmt: skip
    assert set(ways) == {0, 1}
    for name in ("affine", "colour"):
        same = augment(cutouts[:1].expand(6, -1, -1, -1), [name], 0.0, generator(1))
        assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(same, 2)), name
        assert (same - cutouts[:1]).abs().mean() < 0.3, name
    erased = augment(cutouts, ["erasing"], 0.0, generator(1))
    grey = ((erased != cutouts).any(1) & (erased == 0.5).all(1)).sum((1, 2))
    assert (grey > 0).any() and (grey == 0).any() and torch.equal(grey > 0, (erased != cutouts).flatten(1).any(1))
    noise = augment(cutouts, [], 0.2, generator(1)) - cutouts
    assert 0.02 < noise.std() < 0.2 and noise.std((1, 2, 3)).max() > 1.5 * noise.std((1, 2, 3)).min()


def test_turned_cutouts_keep_their_proportions():
    """A disc stays one."""
    places = torch.linspace(-1, 1, 64)
    disc = ((places[:, None] ** 2 + places**2) < 0.25).float().expand(20, 3, 64, 64)
    turned = augment(disc, ["affine", "flip"], 0.0, generator(0))
    widths, heights = ((turned[:, 0].amax(axis) > 0.5).sum(1) for axis in (1, 2))
    assert (widths - heights).abs().max() <= 1 and widths.unique().numel() > 1


def cutouts_of_a_step(start, **options):
    """What CLIP sees in the first step of a run."""
    clip, seen = ColourClip(), []
    run = make_run(clips=[clip], cutn=5, start=start, **{"cut_padding": 0.0, **options})
    clip.encode_image = lambda image: seen.append(image.detach()) or ColourClip.encode_image(clip, image)
    run._step()
    return seen[0]


def test_cutouts_of_a_run():
    framed = torch.zeros(8, 8, dtype=torch.long)  # black, with a white frame two pixels wide
    framed[0], framed[-1], framed[:, 0], framed[:, -1] = 7, 7, 7, 7
    whole = cutouts_of_a_step(framed, cut_size=[1.0])
    assert whole.shape == (5, 3, 8, 8) and all(torch.equal(whole[0], cutout) for cutout in whole)
    small = cutouts_of_a_step(framed, cut_size=[0.25])
    assert any(not torch.equal(small[0], cutout) for cutout in small)
    assert all((cutout == 0).any() for cutout in small)
    margin = cutouts_of_a_step(framed, cut_size=[0.25], cut_padding=1.0)
    assert any((cutout == 1).all() for cutout in margin)
    assert not torch.equal(cutouts_of_a_step(framed, cut_size=[1.0], cut_noise=0.1), whole)
    assert not torch.equal(cutouts_of_a_step(framed, cut_size=[1.0], augments=["affine"]), whole)


def test_every_iteration_has_its_own_cutouts():
    run = make_run(learning_rate=1e-9, iterations=5)
    run.run()
    assert len({loss for _, loss, _ in run.state.history}) == 5


# --------------------------------------------------------------------------------------------------
# The run


def test_the_average_of_the_latents():
    run = make_run(ema_decay=0.5, iterations=12, latents="soft")
    average, values = run.state.ema, []
    run.run(lambda run: values.append(run.state.value.detach().clone()))
    for i, value in enumerate(values[1:]):
        decay = min(0.5, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(run.state.ema, average)
    assert not torch.allclose(run.state.ema, run.state.value)
    run = make_run(ema_decay=0.0, iterations=5)
    run.run()
    assert torch.equal(run.state.ema, run.state.value)


def test_the_best_image_is_kept(monkeypatch):
    scores = iter([0.3, 0.5, 0.1, 0.2])
    monkeypatch.setattr(Optimization, "score", lambda self, image: next(scores))
    run, averages = make_run(iterations=40, latents="soft"), []
    result = run.run(lambda run: averages.append(run.state.ema.clone()))
    assert result[0].score == 0.5
    assert torch.equal(result[0].pixels, run.latents.image(averages[20]))
    assert [row[2] for row in run.state.history if row[2] == row[2]] == [0.3, 0.5, 0.1, 0.2]
    assert [row[0] for row in run.state.history] == [*range(1, 41)]


def test_a_run_ends_where_the_score_stalls(monkeypatch):
    scores = iter([0.3, 0.5, *[0.4] * 10])
    monkeypatch.setattr(Optimization, "score", lambda self, image: next(scores))
    run = make_run(iterations=100, patience=25)
    run.run()
    assert run.done and run.iteration == 50


def test_the_learning_rate_falls():
    def rates(**options):
        run, found = make_run(learning_rate=0.4, **options), []
        run.run(lambda run: found.append(run.optimizer.param_groups[0]["lr"]))
        return found[1:]

    falling = rates()
    assert falling[0] == pytest.approx(0.4) and falling[10] == pytest.approx(0.22)
    assert falling == sorted(falling, reverse=True) and 0.04 < falling[-1] < 0.05
    assert set(rates(lr_decay=False)) == {0.4}


def test_a_story_goes_on_from_image_to_image():
    run, values = make_run("red blue", iterations=40), []
    result = run.run(lambda run: values.append(run.state.value.detach().clone()))
    assert [int(colour(image).argmax()) for image in result] == [0, 2]
    assert torch.equal(values[40], run.state.finished[0])
    assert result.prompt == "red ^ blue" and run.iteration == run.iterations == 80


def test_a_run_can_be_stopped():
    run = make_run(iterations=100)
    result = run.run(stop=lambda: run.iteration == 7)
    assert run.iteration == 7 and not run.done
    assert len(result) == 1 and result[0].score is None  # none was scored yet
    result = run.run(stop=lambda: run.iteration == 35)
    assert torch.equal(result[0].pixels, run.latents.image(run.state.best)) and result[0].score == run.state.best_score


def test_a_loss_that_is_not_finite(monkeypatch):
    run = make_run()
    monkeypatch.setattr(run.targets[0][0], "weights", torch.tensor([math.nan]))
    with pytest.raises(SamplingDiverged, match="not finite after 0 iterations"):
        run.run()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    options = {"prompts": "red blue", "iterations": 25, "optimizer": optimizer, "latents": "codes", "cut_noise": 0.1,
               "augments": ["affine", "erasing"], "learning_rate": 0.05}  # fmt: skip
    whole = make_run(**options)
    expected = whole.run()
    for stops in ((0, 13), (25, 26), (38,)):
        for stop in (*stops, None):
            run = make_run(**options)
            if stop != stops[0]:
                run.load(tmp_path / "state")
            result = run.run(stop=lambda: run.iteration == stop)  # noqa: B023
            run.save(tmp_path / "state")
        assert torch.equal(run.state.value, whole.state.value) and torch.equal(run.state.ema, whole.state.ema)
        assert repr(run.state.history) == repr(whole.state.history)
        for image, other in zip(result, expected, strict=True):
            assert torch.equal(image.tokens, other.tokens) and image.score == other.score


def test_only_the_same_run_is_resumed(tmp_path):
    run = make_run()
    run.run(stop=lambda: run.iteration == 3)
    run.save(tmp_path / "state")
    others = {"seed": {"seed": 1}, "prompts": {"prompts": "blue"}, "start": {"start": torch.zeros(8, 8).long()},
              "cutn, iterations": {"iterations": 30, "cutn": 5},
              "models": {"clips": [ColourClip(), ColourClip()]}}  # fmt: skip
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=f"of a run with other {name};"):
            make_run(**{"start": run.start_tokens, **other}).load(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is not the state of a run of optimize"):
        run.load(tmp_path / "state")
    with pytest.raises(CheckpointError, match="is missing"):
        run.load(tmp_path / "other")


def test_memory_is_told_without_taking_it(monkeypatch):
    # The input, and once what exp returned.
    assert kept_bytes(Palette(), lambda x: x.sin().exp().square(), (1, 4, 1024, 2**18)) == 2 * 4 * 2**30
    layer = torch.nn.Linear(8, 8)
    assert kept_bytes(layer, lambda x: layer(x).sin(), (4, 8)) == 4 * 8 * 4  # weights are there anyway
    monkeypatch.setattr(latents, "free_bytes", lambda device: 2**20)
    assert make_run(size=(64, 64))
    with pytest.raises(UsageError, match=r"an image of 512×256 pixels and 4 cutouts need about .* a smaller size"):
        make_run(size=(512, 256))
    with pytest.raises(UsageError, match="4000 cutouts"):
        make_run(cutn=4000)


def test_free_memory_of_this_machine():
    assert 2**20 < latents.free_bytes(torch.device("cpu")) < 2**50


def test_settings_out_of_range():
    for name, value in (("iterations", 0), ("learning_rate", 0.0), ("optimizer", "Lion"), ("ema_decay", 1.0),
                        ("latents", "hard"), ("patience", 0), ("cutn", 0), ("cut_size", [2.0]), ("cut_size", [1, 0.5]),
                        ("cut_size", []), ("cut_noise", -1.0), ("augments", ["Xx"]), ("seed", -1)):  # fmt: skip
        with pytest.raises(UsageError, match=name):
            OptimizationSettings(**{name: value})
    assert OptimizationSettings(augments=["Af", "flip"]).augments == ["affine", "flip"]
    assert OptimizationSettings(augments=["none"]).augments == []


def test_the_plain_scheme():
    plain = OptimizationSettings(plain=True, augments=["Af"], cutn=9)
    assert (plain.ema_decay, plain.lr_decay, plain.cut_size, plain.cut_padding, plain.cut_noise) == (
        0,
        False,
        [0.75],
        0,
        0,
    )
    assert plain.augments == [] and plain.cutn == 9


# --------------------------------------------------------------------------------------------------
# The pipeline


@pytest.fixture
def pipe():
    return TextToImage(Model(Parts(generator=Palette(), scorer=ColourClip()), None, "cpu"))


def test_prompts_of_the_pipeline(pipe):
    run = pipe.optimization("Red:2|green:-1 ^ blue ^", add="green:3", remove="blue|red:2")
    more = [("green", 3.0), ("blue", -0.5), ("red", -2.0)]
    assert [chapter.prompts for chapter in run.chapters] == [
        [("red", 2.0), ("green", -1.0), *more], [("blue", 1.0), *more]]  # fmt: skip
    assert run.caption == "red, green ^ blue, green"
    assert pipe.optimization([("Red".lower(), 1.0)]).chapters[0].prompts == [("red", 1.0)]
    with pytest.raises(UsageError, match="needs a prompt"):
        pipe.optimization(" | ")
    with pytest.raises(UsageError, match="init_noise"):
        pipe.optimization("red", init_noise="white")
    with pytest.raises(UsageError, match="too small"):
        pipe.optimization("red:0")
    image = Image.new("RGB", (40, 20), "blue")
    run = pipe.optimization("red", image_prompts=[(image, 2.0)], init_image=image, size=(8, 4))
    assert run.chapters[0].image_prompts[0][0].shape == (3, 20, 40) and run.start_tokens.tolist() == [[1] * 4] * 2


def test_optimize(pipe):
    steps = []
    result = pipe.optimize("red", iterations=30, progress=lambda *done: steps.append(done))
    assert int(colour(result[0]).argmax()) == 0 and steps[0] == (0, 30) and steps[-1] == (30, 30)
    assert all(parameter.grad is None for parameter in pipe.model.generator.parameters())


def test_clips_in_place_of_the_model_s(pipe):
    clips = [ColourClip(("blue", "green", "red"))]
    assert pipe.optimization("red", clips=clips).clips == clips
    assert pipe.optimization("red").clips == [pipe.model.scorer]


def test_what_is_too_long_for_a_clip(pipe):
    assert make_run("green red").lost_texts() == ["n"]
