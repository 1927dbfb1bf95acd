"""Parts of the page without a browser."""

from pathlib import Path

import gradio
import pytest
from factories import small_decoder

from text_to_image import TextToImage
from text_to_image.results import Result
from text_to_image.web import html
from text_to_image.web.files import Folders
from text_to_image.web.forms import Diffusion, Generation, Limits, Saved
from text_to_image.web.page import Page
from text_to_image.web.work import Drawn, Workers


@pytest.fixture
def page(tiny_bundle, tiny_vae, tmp_path):
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    workers = Workers([TextToImage.from_pretrained(tiny_bundle, "cpu")])
    return Page(workers, Limits(max_images=2), Folders.inside(tmp_path))


def test_previews_of_cancelled_diffusion_are_no_files(page, monkeypatch):
    monkeypatch.setattr(gradio, "File", lambda paths, visible: [Path(path).name for path in paths or ()])
    result = page.pipe.generate("a red seven", 2)
    drawn = Drawn(Saved(Generation("a red seven", 2), Diffusion()), 1, 1, result)
    saved = Saved(drawn.saved.generation, Diffusion([1], steps=4))
    half = Drawn(saved, 2, 4, Result([result.images[1]]).with_upscaled([[result[1].pixels]]))
    number = result[1].index
    plain = [f"candidate-{number}.png", f"candidate-{number}.npy"]
    assert list(page.on_files(drawn, [number], half)) == [[*plain, "settings.json"]]
    whole = Drawn(saved, 4, 4, half.result)
    assert list(page.on_files(drawn, [number], whole)) == [
        [*plain, f"candidate-{number}-diffused.png", "settings.json"]
    ]
    assert list(page.on_files(drawn, [], whole)) == list(page.on_files(None, [number], None)) == [[]]


def test_tokens_are_refused_with_the_reason(page, tmp_path):
    (tmp_path / "upload").write_text("no tokens")
    file, prompt, seed = page.check_tokens([str(tmp_path / "upload")], " ", 0)
    assert "not a usable token file" in file["message"] and "a prompt is empty" in prompt["message"]
    assert seed["is_valid"] and not (tmp_path / "upload").exists()
    file, prompt, _ = page.check_tokens([str(tmp_path / "upload")] * 3, "a seven", 0)
    assert file["message"] == "this page allows at most 2, got 3" and prompt["is_valid"]


def test_status_of_work_that_ended_before_its_time(page):
    stopped, done = html.status("Stopped at 40%."), html.status("3 candidates. Done.")
    assert page.on_end(html.status("40%", 40, 100)) == page.on_cancel(html.status("40%", 40, 100)) == stopped
    for shown in (stopped, done, html.status("Say what to draw."), None):  # nothing is under way, or it still waits
        assert page.on_end(shown) == gradio.skip() and page.on_cancel(shown) == html.status("Cancelled.")
