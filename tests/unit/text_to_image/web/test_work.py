"""The work behind the page: it comes in parts, one request at a time on a device, and ends where it is cancelled."""

import asyncio
import threading
from contextlib import aclosing

import pytest
import torch
from factories import small_decoder
from PIL import Image

from dalle_pytorch.errors import UsageError
from text_to_image import TextToImage
from text_to_image.web.forms import Diffusion, Generation, Saved
from text_to_image.web.work import Cancelled, Workers, diffuse, generate, load, pick, stream

PROMPT = "a red seven on brick"


@pytest.fixture
def workers(tiny_bundle, tiny_vae):
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    return Workers([TextToImage.from_pretrained(tiny_bundle, "cpu")])


async def gather(work):
    return [value async for value in work]


def test_the_last_value_always_comes():
    def work(update):
        for number in range(100):
            update(number)

    values = asyncio.run(gather(stream(work)))
    assert values[-1] == 99 and values == sorted(values) and len(values) < 100


def test_what_work_raises_is_raised_after_what_it_told():
    def work(update):
        update(1)
        told.wait(60)
        raise UsageError("no")

    async def read():
        async for value in stream(work):
            assert value == 1
            told.set()

    told = threading.Event()
    with pytest.raises(UsageError, match="no"):
        asyncio.run(read())
    assert told.is_set()


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_work_ends_at_its_next_update(how):
    raised, stopped, go_on = [], threading.Event(), threading.Event()

    def work(update):
        try:
            update(0)
            go_on.wait(60)
            update(1)
        except Cancelled as error:
            raised.append(error)
        stopped.set()

    async def close():
        async with aclosing(stream(work)) as values:
            assert await anext(values) == 0
        go_on.set()

    async def cancel():
        task = asyncio.create_task(gather(stream(work)))
        while not task.done():
            await asyncio.sleep(0.01)
            task.cancel()
        go_on.set()

    asyncio.run(close() if how == "closed" else cancel())
    assert stopped.wait(60) and len(raised) == 1


def test_one_request_at_a_time(workers):
    held, order, waiting = threading.Event(), [], threading.Event()

    def second():
        waiting.set()
        with workers.one():
            order.append("second")

    with workers.one() as pipe:
        assert pipe is workers.pipes[0]
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        held.wait(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    with pytest.raises(KeyError), workers.one():
        raise KeyError
    with workers.one():  # it was given back
        pass


def test_candidates_of_a_request(workers):
    form = Generation(PROMPT, 5, temperature=0.9, cond_scale=2, seed=3)
    told = asyncio.run(gather(generate(workers, form, None, batch_size=2)))
    last, pipe = told[-1], workers.pipes[0]
    expected = pipe.generate(PROMPT, 5, seed=3, temperature=0.9, top_p=1.0, cond_scale=2)
    assert [image.index for image in last.result] == [image.index for image in expected]
    assert all(torch.equal(image.tokens, other.tokens) for image, other in zip(last.result, expected, strict=True))
    assert last.finished and (last.done, last.total) == (5 * 256, 5 * 256)
    assert [drawn.finished for drawn in told[:-1]] == [False] * (len(told) - 1)
    assert [drawn.done for drawn in told] == sorted(drawn.done for drawn in told)
    assert last.saved.generation == form and last.saved.models.keys() == {"prior", "tokenizer", "scorer", "decoder"}


def test_a_picture_is_completed_and_its_tokens_recorded(workers):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    form = Generation(PROMPT, 1, rows=2)
    last = asyncio.run(gather(generate(workers, form, picture, 1)))[-1]
    tokens = last.saved.init_image_tokens
    assert tokens == workers.pipes[0].encode_init_image(picture, 32).tolist()
    assert last.result[0].tokens[:32].tolist() == tokens
    again = asyncio.run(gather(generate(workers, form, tokens, 1)))[-1]
    assert torch.equal(again.result[0].tokens, last.result[0].tokens)


@pytest.mark.parametrize("guided", [False, True])
def test_diffusion_with_previews(workers, guided):
    result = workers.pipes[0].generate(PROMPT, 3, seed=4)
    picked = pick(result, [2, 0])
    saved = Saved(Generation(PROMPT, seed=4), Diffusion([2, 0], guided, steps=7, size=96))
    told = asyncio.run(gather(diffuse(workers, picked, saved)))
    last = told[-1]
    assert [image.index for image in last.result] == [2, 0] and last.finished and last.saved is saved
    expected = workers.pipes[0].upscale(picked, seed=4, num_inference_steps="quad7", clip_guidance=guided,
                                        output_size=96)  # fmt: skip
    for image, other in zip(last.result, expected, strict=True):
        assert torch.equal(image.upscaled_pixels[0], other.upscaled_pixels[0])
    tokens = [image.tokens for image in picked]
    again = asyncio.run(gather(diffuse(workers, tokens, saved)))[-1]
    assert torch.equal(again.result[0].upscaled_pixels[0], last.result[0].upscaled_pixels[0])


def test_earlier_tokens_are_candidates_again(workers):
    result = workers.pipes[0].generate(PROMPT, 2, seed=4)
    form = Generation(PROMPT, 2, seed=4)
    last = asyncio.run(gather(load(workers, [image.tokens for image in result], form)))[-1]
    assert last.finished and [image.index for image in last.result] == [0, 1]
    assert all(torch.equal(image.tokens, other.tokens) for image, other in zip(last.result, result, strict=True))
    assert last.saved == Saved(form, Diffusion(), models=workers.models, loaded=True)


def test_cancelled_work_ends_within_a_step(workers):
    """The device is free again after the token or diffusion step that is being computed."""
    passes, model = [], workers.pipes[0].model
    model.prior.transformer.register_forward_hook(lambda *_: passes.append("token"))
    model.decoder.unet.register_forward_hook(lambda *_: passes.append("step"))
    result = workers.pipes[0].generate(PROMPT, 1)
    saved = Saved(Generation(PROMPT), Diffusion([0], steps=900))

    async def begin(work):
        async with aclosing(work):
            await anext(work)

    for work, kind in ((generate(workers, Generation(PROMPT, 200), None, 100), "token"),
                       (diffuse(workers, result, saved), "step")):  # fmt: skip
        passes.clear()
        asyncio.run(begin(work))
        with workers.one():
            done = len(passes)
        assert set(passes) == {kind} and done < 250


def test_mistakes_of_the_model_are_told(workers):
    with pytest.raises(UsageError, match="expected 0 to 255 initial image tokens"):
        asyncio.run(gather(generate(workers, Generation(PROMPT, 1, rows=16), Image.new("RGB", (64, 64)), 1)))
    with workers.one():  # it was given back
        pass


def test_picks_keep_their_order(workers):
    result = workers.pipes[0].generate(PROMPT, 3)
    assert [image.index for image in pick(result, [1, 7, 0])] == [1, 0] and pick(result, [1]).prompt == PROMPT
    assert len(pick(None, [0])) == 0
