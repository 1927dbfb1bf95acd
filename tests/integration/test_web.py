"""The page of `dalle serve` in a browser, on the default model: what a visitor does, and what they are told.

It needs Chromium, which pip cannot install: `apt-get install chromium`.
"""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from playwright.sync_api import Error, Page, expect, sync_playwright

from dalle_pytorch.errors import UserError
from text_to_image import TextToImage
from text_to_image.web.forms import Limits
from text_to_image.web.server import served
from text_to_image.web.work import Workers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

PROMPT = "a red seven on brick"
CANDIDATES = "#candidates .grid-container > *"
PATIENCE = 240_000  # milliseconds for what takes the model's time on a slow machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def address():
    workers = Workers([TextToImage.from_pretrained(device="cpu")])
    with served(workers, Limits(max_images=64, max_picks=2), batch_size=2) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except Error as error:  # Ubuntu's chromium-browser only says how to install one
            pytest.skip(f"{CHROMIUM} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def no_traceback(capfd):
    """The server runs in this process, and prints what nobody caught."""
    yield
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def visit(address, browser):
    """Opens the page as another visitor each time."""
    contexts = []

    def visit() -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        expect(page.get_by_role("button", name="Generate")).to_be_visible()
        return page

    yield visit
    for context in contexts:
        context.close()


def generate(page: Page, prompt=PROMPT, count=2):
    page.locator("#num-images input[type=number]").fill(str(count))
    page.locator("#num-images input[type=number]").blur()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").press("Enter")


def status(page: Page):
    return page.locator("#status [role=status]")


def candidates(page: Page):
    return page.locator(CANDIDATES)


def wait_for_frames(page: Page, *framed: bool):
    """Waits until these of the candidates have a tick, and no others."""
    ticks = (f"[...document.querySelectorAll('{CANDIDATES}')].map("
             "each => getComputedStyle(each, '::after').content.includes('✓'))")  # fmt: skip
    page.wait_for_function(f"framed => JSON.stringify({ticks}) == JSON.stringify(framed)", arg=framed)


def file(page: Page, name: str):
    """Its line; name and suffix are parts of their own."""
    return page.locator("#files tr", has_text=re.compile(r"^\s*" + name.replace(".", r"\s*\.")))


def download(page: Page, name: str, folder):
    with page.expect_download() as expected:
        file(page, name).locator("a").click()
    assert expected.value.suggested_filename == name
    expected.value.save_as(folder / name)
    return folder / name


def test_from_a_prompt_to_the_files(visit, tmp_path):
    page = visit()
    generate(page, count=3)
    # The first batch, before the second; `expect` looks once a second and could miss it.
    page.wait_for_function(f"document.querySelectorAll('{CANDIDATES}').length == 2")
    expect(status(page)).to_have_text("3 candidates. Done.")
    expect(candidates(page)).to_have_count(3)
    captions = candidates(page).all_inner_texts()
    scores = [float(caption.split("·")[1]) for caption in captions]
    assert scores == sorted(scores, reverse=True)

    # Picks: two, of which one is put back and another taken.
    numbers = [re.search(r"#(\d)", caption)[1] for caption in captions]
    for place in (0, 1):
        candidates(page).nth(place).click()
        expect(page.locator("#picks")).to_contain_text(f"#{numbers[place]}")
    page.wait_for_function("document.querySelectorAll('#files a').length == 5")
    wait_for_frames(page, True, True, False)
    candidates(page).nth(0).click()
    expect(page.locator("#picks")).not_to_contain_text(f"#{numbers[0]}")
    candidates(page).nth(2).click()
    expect(page.locator("#picks")).to_contain_text(f"#{numbers[2]}")
    expect(file(page, f"candidate-{numbers[2]}.png")).to_be_visible()
    wait_for_frames(page, False, True, True)

    # Diffusion, with a preview before the end.
    page.locator("#steps input[type=number]").fill("8")
    page.locator("#steps input[type=number]").blur()
    page.get_by_label("CLIP guidance").check()
    page.get_by_role("button", name="Diffuse").click()
    expect(page.locator("#before-after img").first).to_be_visible()
    expect(status(page)).to_have_text("2 images diffused. Done.")
    expect(page.locator("#after .grid-container > *")).to_have_count(2)
    expect(file(page, f"candidate-{numbers[1]}-diffused.png")).to_be_visible()
    first = page.locator("#before-after img").first.get_attribute("src")
    page.locator("#after .grid-container > *").nth(1).click()
    expect(page.locator("#before-after img").first).not_to_have_attribute("src", first)

    # Files.
    name = f"candidate-{numbers[1]}"
    assert Image.open(download(page, f"{name}.png", tmp_path)).size == (128, 128)
    assert Image.open(download(page, f"{name}-diffused.png", tmp_path)).size == (256, 256)
    assert np.load(download(page, f"{name}.npy", tmp_path)).shape == (256,)
    settings = json.loads(download(page, "settings.json", tmp_path).read_text())
    assert (settings["prompt"], settings["num_images"]) == (PROMPT, 3)
    assert settings["picks"] == [int(numbers[1]), int(numbers[2])]
    assert settings["clip_guidance"] and settings["steps"] == 8

    # What another request draws takes their place.
    generate(page, count=1)
    expect(page.locator("#before-after")).to_be_hidden()
    expect(page.locator("#after")).to_be_hidden()
    expect(page.locator("#picks .token")).to_have_count(0)

    # Another visitor loads them.
    other = visit()
    other.get_by_role("button", name="Finish a picture").click()
    other.locator("#settings input[type=file]").set_input_files(tmp_path / "settings.json")
    expect(other.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(other.locator("#settings-note")).to_contain_text("The settings are loaded.")
    expect(other.locator("#num-images input[type=number]")).to_have_value("3")
    other.locator("#tokens input[type=file]").set_input_files(tmp_path / f"{name}.npy")
    expect(status(other)).to_have_text("1 image. Done.")
    expect(candidates(other)).to_have_count(1)
    candidates(other).nth(0).click()
    (tmp_path / "other").mkdir()
    loaded = np.load(download(other, "candidate-0.npy", tmp_path / "other"))
    assert np.array_equal(loaded, np.load(tmp_path / f"{name}.npy"))
    other.get_by_role("button", name="Generate").click()
    expect(status(other)).to_have_text("3 candidates. Done.")
    assert candidates(other).all_inner_texts() == captions


def test_two_visitors_and_a_cancelled_request(visit):
    first, second = visit(), visit()
    generate(first, count=64)
    expect(candidates(first)).not_to_have_count(0)
    generate(second, "a blue star on wood")
    expect(second.locator("#status")).to_contain_text("queue: 1/1")
    expect(candidates(second)).to_have_count(0)
    first.get_by_role("button", name="Cancel").click()
    expect(status(first)).to_contain_text("Stopped at")
    expect(status(second)).to_have_text("2 candidates. Done.")
    assert 2 <= candidates(first).count() < 64  # those that were finished stay
    expect(status(first)).to_contain_text("Stopped at")

    # Diffusion is cancelled in the same way, and so is a request that still waits.
    candidates(second).nth(0).click()
    second.locator("#steps input[type=number]").fill("100")
    second.locator("#steps input[type=number]").blur()
    second.get_by_role("button", name="Diffuse").click()
    expect(status(second).locator("progress")).to_be_visible()
    generate(first)
    expect(first.locator("#status")).to_contain_text("queue: 1/1")
    first.get_by_role("button", name="Cancel").click()
    expect(status(first)).to_have_text("Cancelled.")
    second.get_by_role("button", name="Cancel").click()
    expect(status(second)).to_contain_text("Stopped at")
    generate(second, count=1)
    expect(status(second)).to_have_text("1 candidate. Done.")
    assert status(first).inner_text() == "Cancelled."  # not where the work before it stopped


def test_work_that_fails_leaves_no_progress_bar(visit, monkeypatch):
    whole = TextToImage.generate_batches

    def failing(*args, **kwargs):
        yield next(whole(*args, **kwargs))
        raise UserError("no memory is left")

    monkeypatch.setattr(TextToImage, "generate_batches", failing)
    page = visit()
    generate(page, count=4)
    expect(page.get_by_text("no memory is left")).to_be_visible()
    expect(status(page)).to_have_text("Stopped at 50%.")
    expect(candidates(page)).to_have_count(2)


def test_what_is_refused_is_told(visit, tmp_path):
    page = visit()
    generate(page, " ")
    refused = page.locator("#refused p")
    expect(refused).to_have_text("Prompt: a prompt is empty; say in a few words what to draw")
    page.locator("#seed input").fill("-3")
    generate(page)
    expect(refused).to_contain_text("Seed: expected a whole number, 0 or more")
    page.locator("#prompt textarea").fill("a lighthouse")  # other events leave it there
    expect(page.locator("#note mark")).to_have_text("lighthouse")
    expect(refused).to_contain_text("Seed: expected a whole number, 0 or more")
    page.get_by_role("button", name="New", exact=True).click()
    expect(page.locator("#seed input")).not_to_have_value("-3")
    page.get_by_role("button", name="Finish a picture").click()
    (tmp_path / "a.png").write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "a.png")
    expect(page.locator("#picture")).to_contain_text("the picture cannot be used")
    page.locator("#tokens input[type=file]").set_input_files(tmp_path / "a.png")
    expect(page.locator("#tokens")).to_contain_text("not a usable token file")
    (tmp_path / "settings.json").write_text('{"prompt": "a", "num_images": "all"}')
    page.locator("#settings input[type=file]").set_input_files(tmp_path / "settings.json")
    expect(page.locator("#settings")).to_contain_text("num_images: expected a whole number, 1 or more")
    generate(page, count=3)
    expect(status(page)).to_have_text("3 candidates. Done.")
    expect(refused).to_have_count(0)
    refused = page.locator("#diffusion-refused p")
    page.get_by_role("button", name="Diffuse").click()
    expect(refused).to_have_text("Picked: pick at least one image: click on it")
    for place in range(3):
        candidates(page).nth(place).click()
        page.wait_for_function(f"document.querySelectorAll('#picks .token').length == {place + 1}")
    page.get_by_role("button", name="Diffuse").click()
    expect(refused).to_have_text("Picked: this page allows at most 2, got 3")


def test_words_that_the_model_has_never_seen_are_marked(visit):
    page = visit()
    page.locator("#prompt textarea").fill("a <b>lighthouse</b> on wood")
    expect(page.locator("#note mark")).to_have_text("<b>lighthouse</b>")
    page.get_by_role("button", name="a penguin on white").click()
    expect(page.locator("#prompt textarea")).to_have_value("a penguin on white")
    expect(page.locator("#note mark")).to_have_count(0)


def test_a_picture_is_finished(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Finish a picture").click()
    page.locator("#picture input[type=file]").set_input_files(ROOT / "images/best_of.png")
    expect(page.locator("#picture-preview img")).to_be_visible()
    generate(page, count=1)
    expect(status(page)).to_have_text("1 candidate. Done.")
    candidates(page).nth(0).click()
    expect(file(page, "settings.json")).to_be_visible()
    settings = json.loads(download(page, "settings.json", tmp_path).read_text())
    tokens = np.load(download(page, "candidate-0.npy", tmp_path))
    assert len(settings["init_image_tokens"]) == 7 * 16 and tokens[:112].tolist() == settings["init_image_tokens"]


def test_a_visitor_logs_in(tiny_bundle, browser):
    workers = Workers([TextToImage.from_pretrained(tiny_bundle, "cpu")], diffusion=False)
    with served(workers, accounts=[("ada", "secret")]) as address, browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        for password in ("wrong", "secret"):
            page.get_by_label("username").fill("ada")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                expect(page.get_by_text("Incorrect")).to_be_visible()
        expect(page.get_by_role("button", name="Generate")).to_be_visible()


def test_a_phone(address, browser):
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing is wider than the screen
    tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("request", "results", "options")]
    assert tops == sorted(tops)
    expect(page.locator("footer")).to_be_hidden()
    context.close()
