"""Runs the notebooks, and writes what they show as pages: docs/NAME.md, with its images in images/notebooks.

    python notebooks/render.py            # both, which takes some minutes; `make notebooks`
    python notebooks/render.py how_it_works

Papermill and ipykernel are of the extra `test`. The notebooks themselves are kept without outputs.
"""

import base64
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import papermill
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("text_to_image", "how_it_works")
IMAGES = "images/notebooks"


def page(name: str, notebook: NotebookNode) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown for the folder docs, and its images as WebP, by their names in `IMAGES`."""
    parts = [f"<!-- made by notebooks/render.py from notebooks/{name}.ipynb -->"]
    images: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for shown in outputs(cell):
            if isinstance(shown, str):
                parts.append(f"```text\n{shown}\n```")
                continue
            image, caption = shown
            file, buffer = f"{name}-{len(images):02}.webp", io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=70, method=6)
            images[file] = buffer.getvalue()
            parts.append(f"![{caption}](../{IMAGES}/{file})" + (f"\n\n*{caption}*" if caption else ""))
    return "\n\n".join(parts) + "\n", images


def outputs(cell: NotebookNode) -> Iterator[str | tuple[Image.Image, str]]:
    """What a cell shows: texts, and images with captions. Progress bars of the notebook are left out."""
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    # Of a line that is written over, as bars in text are, the last state.
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in printed.split("\n")]
    if text := "\n".join(lines).strip():
        yield text
    for output in cell.outputs:
        data = output.get("data", {})
        caption = data.get("text/plain", "")
        if "image/png" in data:
            yield Image.open(io.BytesIO(base64.b64decode(data["image/png"]))), ""
        elif found := re.findall(r'<img src="data:image/\w+;base64,([^"]*)" width="(\d+)"', data.get("text/html", "")):
            yield row([(Image.open(io.BytesIO(base64.b64decode(code))), int(width)) for code, width in found]), caption
        elif caption and not data.keys() & {"text/html", "application/vnd.jupyter.widget-view+json"}:
            yield caption


def row(images: list[tuple[Image.Image, int]], longest: int = 8, gap: int = 4) -> Image.Image:
    """Images of a `Result` side by side, each of its width as the notebook shows it; a new row after `longest`."""
    width = max(width for _, width in images)
    rows = [images[i : i + longest] for i in range(0, len(images), longest)]
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) - gap, len(rows) * (width + gap) - gap), "white")
    for y, some in enumerate(rows):
        for x, (image, _) in enumerate(some):
            sheet.paste(image.resize((width, width)), (x * (width + gap), y * (width + gap)))
    return sheet


def main(names: list[str]) -> None:
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            notebook = papermill.execute_notebook(
                ROOT / f"notebooks/{name}.ipynb", f"{folder}/{name}.ipynb", cwd=folder, kernel_name="python3"
            )
        text, images = page(name, notebook)
        for old in (ROOT / IMAGES).glob(f"{name}-*.webp"):
            old.unlink()
        for file, data in images.items():
            (ROOT / IMAGES).mkdir(parents=True, exist_ok=True)
            (ROOT / IMAGES / file).write_bytes(data)
        (ROOT / f"docs/{name}.md").write_text(text, "utf-8")
        print(f"docs/{name}.md: {len(images)} images, {sum(map(len, images.values())) >> 10} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
