"""`TextToImage` and `Result`: what a prompt becomes, that images belong to themselves, and what is refused."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from factories import small_decoder, small_unet
from PIL import Image

from dalle_pytorch.errors import UsageError, UserError
from dalle_pytorch.files.images import image_to_tensor
from diffusion.decoder import DiffusionDecoder
from text_to_image import TextToImage
from text_to_image.inputs import clean_prompt
from text_to_image.results import Result, claim_folder, safe_name

PROMPT = "a red seven on brick"


@pytest.fixture
def pipe(tiny_bundle, tiny_vae):
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    return TextToImage.from_pretrained(tiny_bundle, "cpu")


def test_call(pipe, tmp_path):
    options = {"num_inference_steps": 2, "clip_guidance": True, "seed": 7}
    result = pipe(f"  {PROMPT.upper()} ", num_images=5, keep=3, upscale=True, **options)
    assert result.prompt == PROMPT and len(result) == 3
    scores = [image.score for image in result]
    assert scores == sorted(scores, reverse=True) and isinstance(scores[0], float)
    assert result[0].image.size == (64, 64) and result[0].upscaled.size == (128, 128)
    assert result[0].tokens.shape == (256,) and result[0].tokens.dtype == torch.int64
    assert [image.index for image in result[:2]] == [result[0].index, result[1].index]
    folder = result.save(tmp_path)
    assert folder == tmp_path / "a_red_seven_on_brick"
    ranks = {f"{rank}-{score:.4f}.png" for rank, score in enumerate(scores)}
    ranks |= {f"{rank}{kind}" for rank in range(3) for kind in (".npy", "-upscaled.png")}
    assert {path.name for path in folder.iterdir()} == ranks | {"caption.txt", "grid.png", "before_after.png"}
    # The candidates are those of the seed, whatever else is asked.
    again = pipe.generate(PROMPT, 5, seed=7, rank=False)
    assert torch.equal(again[result[0].index].tokens, result[0].tokens) and again[0].score is None
    assert result[0].upscaled is not None and again[0].upscaled is None


def test_a_notebook_shows_a_result(pipe):
    result = pipe.generate("a <b> seven", 3)
    shown = result._repr_html_()
    assert "a &lt;b&gt; seven" in shown and "<b>" not in shown
    captions = re.findall("<figcaption>(.*?)</figcaption>", shown)
    assert captions == [f"{rank} · {image.score:.4f}" for rank, image in enumerate(result)]
    assert [image.size for image in images(shown)] == [(64, 64)] * 3
    assert repr(result) == f"Result(a <b> seven, 3 images, scores {result[0].score:.4f} to {result[2].score:.4f})"
    assert repr(result[:1]) == f"Result(a <b> seven, 1 image, score {result[0].score:.4f})"
    upscaled = pipe.upscale(result[[2, 0]], 2, num_inference_steps=1)
    assert [image.index for image in upscaled] == [result[2].index, result[0].index]
    assert upscaled.prompt == result.prompt
    assert [image.size for image in images(upscaled._repr_html_())] == [(64, 64), (128, 128), (128, 128)] * 2
    assert [image.size for image in images(upscaled[1]._repr_html_())] == [(64, 64), (128, 128), (128, 128)]
    assert repr(upscaled).endswith("upscaled)") and "tensor" not in repr(upscaled[0])
    assert "and 6 more" in Result([*result] * 23 + [result[0]], None)._repr_html_()


def images(shown):
    """The images in a piece of HTML."""
    found = re.findall('<img src="data:image/webp;base64,([^"]*)" width="(?:64|128)"', shown)
    assert len(found) == shown.count("<img")
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_batches_across_inputs_take_fewer_passes_and_draw_the_same(pipe):
    result, passes = pipe.generate(PROMPT, 3, rank=False), []
    pipe.model.decoder.unet.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    options = {"num_images": 2, "num_inference_steps": 3, "seed": 5}
    one, counts = pipe.upscale(result, batch_size=1, **options), []
    assert passes == [1] * 18
    for batch_size, expected in ((4, [4] * 3 + [2] * 3), (6, [6] * 3)):
        passes.clear()
        many = pipe.upscale(result, batch_size=batch_size, **options)
        assert passes == expected
        counts.append(len(passes))
        for a, b in zip(one, many, strict=True):
            torch.testing.assert_close(
                torch.stack(a.upscaled_pixels), torch.stack(b.upscaled_pixels), atol=4e-3, rtol=0
            )
    assert counts == [6, 3]
    assert (one[0].upscaled_pixels[0] - one[0].upscaled_pixels[1]).abs().max() > 0.05
    assert (one[0].upscaled_pixels[0] - one[1].upscaled_pixels[0]).abs().max() > 0.05


def test_an_unconditional_unet_begins_with_tokens_or_the_image(tiny_bundle, tiny_vae):
    decoder = DiffusionDecoder(small_unet(image_size=64), tiny_vae)
    pipe = TextToImage.from_pretrained(tiny_bundle, "cpu", decoder=decoder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8))
    tokens, starts = torch.randint(32, (256,), generator=torch.Generator().manual_seed(0)), []
    decode = decoder.decode
    decoder.decode = lambda *given, **options: starts.append(options["init_image"]) or decode(*given, **options)
    options = {"num_inference_steps": 4, "skip_steps": 2, "seed": 3}
    together = pipe.upscale([image, tokens], 2, **options)
    alone = pipe.upscale(tokens, 1, **options)
    torch.testing.assert_close(together[1].upscaled_pixels[0], alone[0].upscaled_pixels[0], atol=4e-3, rtol=0)
    assert (together[1].upscaled_pixels[0] - together[1].upscaled_pixels[1]).abs().max() > 0.05
    torch.testing.assert_close(starts[1], tiny_vae.decode_image(tokens[None]).detach())
    pipe.upscale(image, init_from="image", **options)
    torch.testing.assert_close(starts[2], image_to_tensor(image, 64))
    told = []
    pipe.upscale(tokens, progress=lambda done, total: told.append((done, total)), **options)
    assert told == [(1, 2), (2, 2)]
    guided = pipe.upscale(image, clip_guidance=pipe.guidance(PROMPT), init_scale=1e5, **options)
    plain = pipe.upscale(image, clip_guidance=pipe.guidance(PROMPT), **options)
    assert not torch.equal(guided[0].upscaled_pixels[0], plain[0].upscaled_pixels[0])
    for wrong, said in (({"init_from": "image"}, "input 0 is tokens"), ({"init_from": "noise"}, "got 'noise'"),
                        ({"init_scale": 1.0}, "guidance by CLIP"), ({"skip_steps": 4}, "cannot skip 4 of 4"),
                        ({"stop_at": 3}, "from 1 to 2")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            pipe.upscale(tokens, **options | wrong)


def test_inputs_of_upscale(pipe, tmp_path):
    result = pipe.generate(PROMPT, 2, rank=False)
    folder = result.save(tmp_path)
    vae = pipe.model.decoder.vae
    encoded = vae.get_codebook_indices(image_to_tensor(result[0].image))[0]
    tokens = result[0].tokens
    cases = [(result, tokens), (result[1:], result[1].tokens), (result[0], tokens), (tokens, tokens),
             (torch.stack([tokens, tokens]), tokens), (result[0].image, encoded), (folder / "0.png", encoded),
             ([str(folder / "0.npy"), tokens], tokens)]  # fmt: skip
    for given, expected in cases:
        assert torch.equal(pipe.read(given)[0].tokens, expected)
    assert len(pipe.read([tokens, result[0].image])) == 2
    for wrong in (torch.full((256,), 32), torch.zeros(255, dtype=torch.long), [], tmp_path / "none.png"):
        with pytest.raises(UserError):
            pipe.upscale(wrong, num_inference_steps=1)


def test_progress_and_previews(pipe):
    told, seen = [], []
    result = pipe.generate(PROMPT, 3, batch_size=2, rank=False, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (768, 768) and told == sorted(told) and len(told) == 512
    told.clear()
    upscaled = pipe.upscale(result, num_inference_steps=2, batch_size=2, output_size=96,
                            progress=lambda done, total: told.append((done, total)),
                            callback=lambda *preview: seen.append(preview))  # fmt: skip
    assert told == [(2, 6), (4, 6), (5, 6), (6, 6)]
    assert [(step, list(items)) for step, _, items in seen] == [
        (1, [(0, 0), (1, 0)]), (2, [(0, 0), (1, 0)]), (1, [(2, 0)]), (2, [(2, 0)])]  # fmt: skip
    assert seen[0][1].shape == (2, 3, 96, 96)
    assert torch.equal(seen[1][1][1], upscaled[1].upscaled_pixels[0])


def test_candidates_come_in_batches_best_first(pipe):
    expected, so_far = pipe.generate(PROMPT, 5), list(pipe.generate_batches(PROMPT, 5, batch_size=2))
    assert [sorted(image.index for image in result) for result in so_far] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    for result in so_far:
        assert [image.index for image in result] == [image.index for image in expected if image.index in
                                                     {image.index for image in result}]  # fmt: skip
    assert so_far[-1].prompt == PROMPT and all(map(torch.equal, (image.tokens for image in so_far[-1]),
                                                   (image.tokens for image in expected)))  # fmt: skip
    kept = list(pipe.generate_batches(PROMPT, 5, batch_size=2, keep=1))
    assert [image[0].index for image in kept] == [result[0].index for result in so_far]


def test_sampling_ends_where_it_is_told_to(pipe):
    told = []

    def cancelled(done, total):
        told.append(done)
        if len(told) == 300:
            raise InterruptedError

    batches = pipe.generate_batches(PROMPT, 4, batch_size=1, progress=cancelled)
    assert len(next(batches)) == 1
    with pytest.raises(InterruptedError):
        next(batches)
    assert told == list(range(1, 301))


def test_bars_where_they_are_asked_for(pipe, capsys):
    pipe(PROMPT, 1, upscale=True, num_inference_steps=1, progress=True)
    pipe.optimize("brick", iterations=1, progress=True)
    shown = capsys.readouterr().err
    for bar in (PROMPT, "diffusing", "brick"):
        assert f"{bar}: 100%" in shown
    pipe(PROMPT, 1, upscale=True, num_inference_steps=1)
    pipe.optimize("brick", iterations=1)
    assert capsys.readouterr().err == ""


def test_what_was_drawn_earlier_is_ranked(pipe):
    result = pipe.generate(PROMPT, 4, seed=2)
    ranked = pipe.rank([image.tokens for image in result[[3, 1, 0, 2]]], f" {PROMPT.upper()}")
    assert ranked.prompt == PROMPT and [image.index for image in ranked] == [2, 1, 3, 0]
    assert all(torch.equal(image.tokens, other.tokens) for image, other in zip(ranked, result, strict=True))
    assert [image.score for image in ranked] == pytest.approx([image.score for image in result], abs=1e-4)


def test_an_image_is_completed(pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    tokens = pipe.encode_init_image(image)
    assert len(tokens) == 112  # 7 rows of 16
    result = pipe.generate(PROMPT, 2, init_image=image, num_init_image_tokens=40, rank=False)
    assert torch.equal(result[0].tokens[:40], tokens[:40])
    assert not torch.equal(result[0].tokens, result[1].tokens)


def test_sampling_settings(pipe):
    own = pipe.sampling()
    assert own.top_p == 0.9 and own.temperature == 1
    assert pipe.sampling(temperature=0.5, top_k=None).temperature == 0.5
    greedy = pipe.generate(PROMPT, 2, rank=False, temperature=0)
    assert torch.equal(greedy[0].tokens, greedy[1].tokens)
    assert pipe.complete_prompt("a red", seed=3) == pipe.complete_prompt("A  red", seed=3)


@pytest.mark.parametrize("call", [
    lambda pipe: pipe(" "),
    lambda pipe: pipe(PROMPT, 0),
    lambda pipe: pipe(PROMPT, top_p=2),
    lambda pipe: pipe(PROMPT, clip_guidance=True),
    lambda pipe: pipe.generate(PROMPT, init_image=Image.new("RGB", (64, 64)), num_init_image_tokens=256),
    lambda pipe: pipe.upscale(torch.zeros(256, dtype=torch.long), clip_guidance=True),
    lambda pipe: pipe.upscale(torch.zeros(256, dtype=torch.long), stop_at=3, num_inference_steps=2),
    lambda pipe: pipe.upscale(torch.zeros(256, dtype=torch.long), batch_size=0),
])  # fmt: skip
def test_what_is_out_of_range(pipe, call):
    with pytest.raises(UsageError):
        call(pipe)


def test_prompts_are_cleaned():
    assert clean_prompt(" A\tRed \0 Seven\n") == "a red seven"


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "/", "..", "a\0b", "🐟", "x" * 10_000, "   ", "ж" * 500, "-rf", "."]
)
def test_folder_names_stay_inside(tmp_path, prompt):
    name = safe_name(prompt)
    path = tmp_path / name
    path.mkdir()
    assert path.resolve().parent == tmp_path.resolve() and len(name.encode()) <= 80


@pytest.mark.parametrize("prompt, name", [
    ("-rf", "rf"), ("--help", "help"), (".hidden", "hidden"), ("con", "con_"), ("NUL", "NUL_"), ("lpt1", "lpt1_"),
    ("com¹", "com¹_"), ("com0 .", "com0_"), ("console", "console"), ("con 1", "con_1"), ("a - b", "a_-_b"),
    (79 * "a" + "é", 79 * "a"), ("-" * 800_000 + "a", "prompt"),
])  # fmt: skip
def test_folder_names(prompt, name):
    assert safe_name(prompt) == name


def test_a_prompt_keeps_its_folder(tmp_path):
    for prompt in ("a red ", "a red", " a  red\n"):
        assert claim_folder(tmp_path, prompt) == tmp_path / "a_red"
    (tmp_path / "a_red/caption.txt").write_bytes(b"\xef\xbb\xbfa red\r\n")
    assert claim_folder(tmp_path, "a red") == tmp_path / "a_red"
    (tmp_path / "a_red/caption.txt").write_bytes(b"a r\xe9d")
    assert claim_folder(tmp_path, "a red") == tmp_path / "a_red-2"
