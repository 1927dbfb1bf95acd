"""The server of `dalle serve` without a browser: what programs call, who may come in, and what is served."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import gradio
import pytest
from factories import small_decoder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import ROOT
from PIL import Image

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from text_to_image import TextToImage
from text_to_image.commands import serve
from text_to_image.web import server
from text_to_image.web.forms import Limits
from text_to_image.web.server import served
from text_to_image.web.work import Workers

PROMPT = "a red seven on brick"


@pytest.fixture(scope="module")
def address():
    """That of a page of the default model with small limits."""
    workers = Workers([TextToImage.from_pretrained(device="cpu")])
    limits = Limits(max_images=64, max_picks=2, max_steps=30, max_size=256, max_upload=1)
    with served(workers, limits, batch_size=2) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def test_the_example_of_the_documentation(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/web.md").read_text("utf-8"), re.DOTALL)
    assert "http://127.0.0.1:7860" in code
    exec(code.replace("http://127.0.0.1:7860", address), {})
    said = capsys.readouterr().out.splitlines()
    assert "['lighthouse']" in said and "2 candidates" in said
    assert Image.open("candidate.png").size == (128, 128) and Image.open("diffused.png").size == (256, 256)


def test_an_api_of_three_functions(client):
    assert client.view_api(return_format="dict", print_info=False)["named_endpoints"].keys() == {
        "/generate", "/diffuse", "/unknown_words"}  # fmt: skip


@pytest.mark.parametrize("name, arguments, said", [
    ("/generate", {"prompt": " "}, "prompt: a prompt is empty"),
    ("/generate", {"prompt": 7}, "prompt: expected a prompt, which is text"),
    ("/generate", {"prompt": PROMPT, "num_images": 65}, "num_images: this page allows at most 64, got 65"),
    ("/generate", {"prompt": PROMPT, "num_images": "x"}, "num_images: expected a whole number"),
    ("/generate", {"prompt": PROMPT, "top_p": 7}, "top_p: expected a number, above 0, at most 1"),
    ("/generate", {"prompt": PROMPT, "picture": "/etc/passwd"}, "picture: expected an uploaded file"),
    ("/generate", {"prompt": PROMPT, "picture": {"path": str(ROOT / "images/strip.webp")}}, "expected an uploaded"),
    ("/generate", {"prompt": PROMPT, "picture": handle_file(str(ROOT / "README.md"))}, "the picture cannot be used"),
    ("/diffuse", {"prompt": PROMPT, "tokens": []}, "tokens: expected lists of 256"),
    ("/diffuse", {"prompt": PROMPT, "tokens": [[1, 2]]}, "tokens: expected lists of 256"),
    ("/diffuse", {"prompt": PROMPT, "tokens": [[10**6] * 256]}, "tokens: expected lists of 256"),
    ("/diffuse", {"prompt": PROMPT, "tokens": [[0] * 256] * 3}, "picks: this page allows at most 2, got 3"),
    ("/diffuse", {"prompt": PROMPT, "tokens": [[0] * 256], "steps": 31}, "steps: this page allows at most 30, got 31"),
    ("/diffuse", {"prompt": PROMPT, "tokens": [[0] * 256], "size": 257}, "size: this page allows at most 256"),
])  # fmt: skip
def test_a_refusal_says_why(client, name, arguments, said):
    with pytest.raises(AppError) as raised:
        client.predict(**arguments, api_name=name)
    assert said in str(raised.value) and "/tmp" not in str(raised.value)


def test_a_cancelled_request_frees_the_device(client):
    job = client.submit(PROMPT, 64, api_name="/generate")
    next(iter(job))
    job.cancel()
    # Of 32 batches: were they all drawn first, the time limit of this would be over.
    assert len(client.submit(PROMPT, 1, api_name="/generate").result(timeout=300)) == 1


def get(url, data=None, **headers):
    """Status and content of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "pyproject.toml"), "pyproject.toml", "../pyproject.toml",
                                  str(ROOT / "models/default/sampling.json")])  # fmt: skip
def test_files_of_the_machine_are_not_served(address, path):
    status, content = get(f"{address}gradio_api/file={path}")
    assert status in (403, 404) and b"root:" not in content and b"[project]" not in content


def upload(address, name, content):
    body = b"\r\n".join([b"--edge", b'Content-Disposition: form-data; name="files"; filename="%s"' % name, b"", content,
                         b"--edge--", b""])  # fmt: skip
    return get(f"{address}gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=edge"})


@pytest.mark.parametrize("name", [b"../../evil.py", b"a.png", b"..", b"/etc/passwd", b"\xd0\xb6"])
def test_names_of_uploads_are_our_own(address, name):
    status, content = upload(address, name, b"content")
    (path,) = json.loads(content)
    assert status == 200 and Path(path).name == "upload" and Path(path).read_bytes() == b"content"
    folder = Path(path).parents[2]
    assert folder.name.startswith("dalle-serve-") and folder.stat().st_mode & 0o77 == 0


def test_uploads_that_are_too_large(address):
    status, content = upload(address, b"a.png", bytes(2**21))
    assert status == 413 and content == b"expected a file of at most 1 MiB"


def test_the_page_loads_nothing_from_elsewhere(address):
    page = get(address)[1].decode()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//(?!127\.0\.0\.1)[^"' >]+\.(?:js|css|woff2?)""", page)
    assert "fonts.googleapis" not in get(f"{address}theme.css")[1].decode()


def test_accounts_are_asked_for(tiny_bundle, tiny_vae):
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    workers = Workers([TextToImage.from_pretrained(tiny_bundle, "cpu")])
    with served(workers, accounts=[("ada", "secret")]) as address:
        for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            assert get(f"{address}{path}")[0] == 401
        assert upload(address, b"a.png", b"")[0] == 401
        with pytest.raises(ValueError, match="Could not login"):
            Client(address, auth=("ada", "wrong"), verbose=False)
        words = Client(address, auth=("ada", "secret"), verbose=False).predict("a жук", api_name="/unknown_words")
        assert words == ["жук"]
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        assert folder.is_dir()
    assert not folder.exists()


def test_a_tunnel_that_cannot_be_reached(tiny_bundle, monkeypatch, capsys, tmp_path):
    def setup_tunnel(**options):
        raise OSError("no network")

    monkeypatch.setattr(gradio.networking, "setup_tunnel", setup_tunnel)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workers = Workers([TextToImage.from_pretrained(tiny_bundle, "cpu")], diffusion=False)
    with pytest.raises(UsageError, match="no public address"), served(workers, share=True, accounts=[("a", "b")]):
        pass
    assert capsys.readouterr().out == "" and not list(tmp_path.glob("dalle-serve-*"))


# The command


@pytest.fixture
def refused(capsys):
    """Runs the command in this process, for the one line on stderr."""

    def call(*options):
        with pytest.raises(SystemExit) as stopped:
            run(serve.main, list(map(str, options)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return call


def test_bad_arguments(refused, tmp_path):
    assert "needs --auth" in refused("--host", "0.0.0.0")
    assert "needs --auth" in refused("--share")
    assert "--auth NAME:PASSWORD" in refused("--auth", "ada")
    (tmp_path / "accounts").write_text("ada secret\n")
    assert "--auth NAME:PASSWORD" in refused("--host", "0.0.0.0", "--auth_file", tmp_path / "accounts")
    for host in ("nowhere.invalid", "é" * 200, "a\nb", "256.1.1.1"):
        assert "cannot listen at " in refused("--host", host, "--auth", "ada:secret")
    assert "nowhere/model" in refused("--model", "nowhere/model")
    assert "--max_images" in refused("--max_images", 0)
    assert "cuda:99" in refused("--devices", "cuda:99")


def test_a_missing_extra_is_named(refused, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert "pip install 'dalle-diffusion[web]'" in refused()


def test_a_port_that_is_taken(refused, address):
    port = address.rstrip("/").rpartition(":")[2]
    assert f"cannot listen at 127.0.0.1:{port}" in refused("--port", port)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_page_and_removes_its_files(tiny_bundle, tiny_vae, tmp_path, number, code):
    small_decoder(tiny_vae).save_pretrained(tiny_bundle / "decoder")
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
               "from text_to_image.__main__ import main; main()", "serve", "--model", str(tiny_bundle), "--devices",
               "cpu"]  # fmt: skip
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}) as process:  # fmt: skip
        try:
            assert "the page is at http://127.0.0.1:" in process.stdout.readline()
            assert [path.name for path in (tmp_path / "tmp").glob("dalle-serve-*")]
            process.send_signal(number)
            assert process.wait(300) == code
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert list((tmp_path / "tmp").glob("dalle-serve-*")) == [] and "Traceback" not in process.stderr.read()
