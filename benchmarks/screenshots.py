"""The page of `dalle serve` as README shows it: `python benchmarks/screenshots.py --help`.

Needs the extras web and test, and Chromium (`apt-get install chromium`).
"""

import io
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_bytes
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL
from text_to_image.web.server import served
from text_to_image.web.work import Workers

WIDE, PHONE = (1280, 1310), (390, 844)  # pixels of the window
PATIENCE = 600_000  # milliseconds


@dataclass
class ScreenshotSettings(Settings):
    """Takes screenshots of the page, wide and on a phone, light and dark, and says how long a visitor waits."""

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    text: str = option("an avocado to the left of a chair on wood", "the prompt")
    num_images: int = option(8, "candidates", low=3)
    steps: int = option(6, "diffusion steps", low=3)
    batch_size: int = option(4, "candidates that are shown together", low=1)
    output_dir: Path = option(Path("images"), "where page_*.webp go")
    chromium: str | None = option(None, "the browser (default: chromium on the path)")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")


def main(argv: Sequence[str] | None = None) -> None:
    settings = ScreenshotSettings.parse(argv)
    workers = Workers([TextToImage.from_pretrained(settings.model, settings.device)])
    print(f"{_memory()} with the model opened")
    with served(workers, batch_size=settings.batch_size) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=settings.chromium or shutil.which("chromium"),
                                             args=["--no-sandbox"])  # fmt: skip
        page = browser.new_page(viewport={"width": WIDE[0], "height": WIDE[1]})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.goto(address)
        use(page, settings)
        print(f"{_memory()} at most")
        for name, size, dark in (("light", WIDE, False), ("dark", WIDE, True), ("phone_light", PHONE, False),
                                 ("phone_dark", PHONE, True)):  # fmt: skip
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            top = page.locator("#candidates") if name == "phone_dark" else page.locator("#title")
            top.evaluate("part => window.scrollTo(0, part.getBoundingClientRect().top + window.scrollY - 16)")
            page.wait_for_timeout(1000)  # colours fade
            shot = Image.open(io.BytesIO(page.screenshot()))
            buffer = io.BytesIO()
            shot.convert("RGB").save(buffer, "WEBP", quality=80, method=6)
            write_bytes(settings.output_dir / f"page_{name}.webp", buffer.getvalue())


def use(page: Page, settings: ScreenshotSettings) -> None:
    """Draws, picks the first and the third, and diffuses them."""
    status, images = page.locator("#status [role=status]"), page.locator("#candidates .grid-container > *")
    page.locator("#prompt textarea").fill(settings.text)
    page.locator("#num-images input[type=number]").fill(str(settings.num_images))
    page.locator("#num-images input[type=number]").blur()
    started = time.monotonic()
    page.get_by_role("button", name="Generate").click()
    expect(images.first).to_be_visible()
    print(f"{time.monotonic() - started:.1f} s to the first {settings.batch_size} images")
    expect(status).to_contain_text("Done")
    print(f"{time.monotonic() - started:.1f} s to all {settings.num_images}")
    for place, count in ((0, 1), (2, 2)):
        images.nth(place).click()
        expect(page.locator("#picks .token")).to_have_count(count)
    page.locator("#steps input[type=number]").fill(str(settings.steps))
    page.locator("#steps input[type=number]").blur()
    started = time.monotonic()
    page.get_by_role("button", name="Diffuse").click()
    expect(page.locator("#before-after img").first).to_be_visible()
    print(f"{time.monotonic() - started:.1f} s to the first preview of 2 images")
    expect(status).to_contain_text("diffused. Done")
    print(f"{time.monotonic() - started:.1f} s to all {settings.steps} steps")


def _memory() -> str:
    """The largest memory of this process so far."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


if __name__ == "__main__":
    run(main)
