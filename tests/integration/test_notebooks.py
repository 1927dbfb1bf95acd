"""The notebooks run from start to end, are kept without outputs, and their pages in docs are of the same cells."""

import base64
import builtins
import importlib.util
import io
import re

import nbformat
import papermill
import pytest
from helpers import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from notebooks.render import NAMES, page

# As few images and steps as show every cell at work.
SMALL = {
    "text_to_image": {"num_images": 2, "batch_size": 1, "num_inference_steps": 2, "optimize_iterations": 1,
                      "training_pictures": 16, "training_steps": 1},
    "how_it_works": {"num_images": 1, "num_inference_steps": 2},
}  # fmt: skip


def read(name):
    return nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)


def source(notebook, title):
    """The code of the cell with that title."""
    return next(cell.source for cell in notebook.cells if cell.source.startswith(f"# @title {title}\n"))


def test_every_notebook_is_known():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES) == SMALL.keys()


@pytest.mark.parametrize("name", NAMES)
def test_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_start_to_end(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = papermill.execute_notebook(ROOT / f"notebooks/{name}.ipynb", tmp_path / "ran.ipynb", SMALL[name],
                                     cwd=tmp_path, kernel_name="python3", progress_bar=False)  # fmt: skip
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert code[0].source.startswith("# @title Install") and code[0].outputs == []
    outputs = [output for cell in code for output in cell.outputs]
    # Not a warning anywhere.
    assert [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)  # bars
    # What makes a figure shows one, and what ends with a result shows its images.
    for cell in code:
        kinds = set().union(*(output.get("data", {}).keys() for output in cell.outputs))
        assert "figure, " not in cell.source or "image/png" in kinds, cell.source
        last = cell.source.rpartition("\n")[2]
        if last in ("candidates", "picked", "upscaled", "finished") or re.match(
            r"pipe\.(upscale|optimize)|trained", last
        ):
            assert any("data:image/webp" in output.get("data", {}).get("text/html", "") for output in cell.outputs), (
                last
            )
    if name == "text_to_image":
        assert {path.name for path in (tmp_path / "outputs/an_avocado_on_wood").iterdir()} >= {
            "0.npy",
            "0-upscaled.png",
        }
        assert (tmp_path / "runs/dalle/dalle/model.safetensors").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_first_cell_installs(name, monkeypatch, tmp_path):
    """With a package missing; with everything there nothing is installed, see above."""
    monkeypatch.chdir(ROOT / "notebooks")  # as Jupyter does
    asked, cell = [], TransformerManager().transform_cell(source(read(name), "Install"))
    missing = {"text_to_image"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())

    class Shell:
        @staticmethod
        def run_line_magic(magic, line):
            asked.append((magic, line))

    def run(repository):
        namespace = {"get_ipython": lambda: Shell, "__builtins__": builtins}
        exec(cell.replace('repository = ""', f'repository = "{repository}"'), namespace)
        return namespace["package"]

    assert run("") == "..[notebook]"
    address = "https://host.example/project.git"
    assert run(address) == f"dalle-diffusion[notebook] @ git+{address}"
    assert asked == [("pip", 'install -q "{package}"')] * 2
    monkeypatch.chdir(tmp_path)
    assert run(address) == f"dalle-diffusion[notebook] @ git+{address}"
    with pytest.raises(FileNotFoundError, match="give the address of the repository"):
        run("")
    if name == "how_it_works":
        monkeypatch.chdir(ROOT / "notebooks")
        missing.add("matplotlib")
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'dalle-diffusion\[notebook\]'"):
            run("")


def test_a_mistake_is_told_in_one_line():
    notebook = new_notebook(cells=[new_code_cell("from dalle_pytorch.errors import UsageError\nraise UsageError('no')"),
                                   new_code_cell("1 / 0")])  # fmt: skip
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
    (mistake,), (bug,) = (cell.outputs for cell in notebook.cells)
    assert mistake.traceback == ["UsageError: no"]
    assert len("\n".join(bug.traceback).splitlines()) > 3


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_of_the_notebook(name):
    """Every cell of the notebook is on its page in docs, in order; `make notebooks` writes it anew."""
    text = (ROOT / f"docs/{name}.md").read_text("utf-8")
    expected, _ = page(name, read(name))
    place = 0
    for part in expected.split("\n\n"):
        place = text.find(part, place)
        assert place >= 0, f"docs/{name}.md lacks: {part}; make notebooks"
    files = re.findall(r"\]\(\.\./(images/notebooks/.*?)\)", text)
    assert len(files) > 5 and all((ROOT / file).is_file() for file in files)
    assert {ROOT / file for file in files} == set((ROOT / "images/notebooks").glob(f"{name}-*"))


def test_pages_are_small():
    files = [*(ROOT / "images/notebooks").iterdir(), *(ROOT / f"docs/{name}.md" for name in NAMES)]
    assert sum(file.stat().st_size for file in files) < 400 * 1024


def picture(size, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_page():
    img = f'<img src="data:image/webp;base64,{picture(8, "WEBP")}" width="16">'
    cells = [
        new_markdown_cell("# One\n\nsee [other](other.ipynb)"),
        new_code_cell("x", outputs=[
            new_output("stream", name="stdout", text="\r 0%\r"),
            new_output("stream", name="stdout", text=" 9%\r\ndone\n"),
            new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%|   |"}),
            new_output("execute_result", {"text/html": img * 9, "text/plain": "Result(9 images)"}, execution_count=1),
        ]),
        new_code_cell("y", outputs=[
            new_output("display_data", {"image/png": picture(20, "PNG"), "text/plain": "<Figure>"}),
            new_output("execute_result", {"text/plain": "7"}, execution_count=2),
        ]),
    ]  # fmt: skip
    text, images = page("name", new_notebook(cells=cells))
    assert text.split("\n\n")[1:] == [
        "# One", "see [other](other.md)", "```python\nx\n```", "```text\n9%\ndone\n```",
        "![Result(9 images)](../images/notebooks/name-00.webp)", "*Result(9 images)*", "```python\ny\n```",
        "![](../images/notebooks/name-01.webp)", "```text\n7\n```\n",
    ]  # fmt: skip
    sizes = [Image.open(io.BytesIO(data)).size for data in images.values()]
    assert sizes == [(8 * 20 - 4, 2 * 20 - 4), (20, 20)]
