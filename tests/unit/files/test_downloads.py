"""Default files: fetched once, resumed, checked, and one clear line where there is no network."""

import hashlib
import io
import multiprocessing
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files import downloads
from dalle_pytorch.files.downloads import PublicFile, PublicModel, default_file, default_model

CONTENT = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name; `breaks` are the numbers of bytes after which the next answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks, self.asked = CONTENT, True, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def file(self, name="file.bin", sha256=None) -> PublicFile:
        return PublicFile(name, f"http://127.0.0.1:{self.server_port}/{name}", sha256)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted, content = self.headers.get("Range"), self.server.content
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if self.path == "/missing":
            self.send_error(404)
        elif self.path.startswith("/hub/"):
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("X-Linked-ETag", f'"{self.server.tag}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = self.server.breaks.pop(0) if self.server.breaks else len(content)
            self.wfile.write(content[start : start + end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def test_once(server, tmp_path):
    path = default_file(server.file(sha256=hashlib.sha256(CONTENT).hexdigest()))
    assert path == tmp_path / ".cache/dalle/file.bin" and path.read_bytes() == CONTENT
    assert default_file(server.file()) == path and len(server.asked) == 1


def test_resumed_after_a_break_and_after_a_restart(server):
    server.breaks = [1000, 500]
    part = downloads.cache_folder() / ".file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:300])
    assert default_file(server.file()).read_bytes() == CONTENT
    assert server.asked == ["bytes=300-", "bytes=1300-", "bytes=1800-"] and not part.exists()


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"], ids=["whole", "of another file"])
def test_a_part_with_nothing_to_follow(server, left):
    part = downloads.cache_folder() / ".file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert default_file(server.file()).read_bytes() == CONTENT


def test_server_without_ranges(server):
    server.ranges, server.breaks = False, [1000]
    assert default_file(server.file()).read_bytes() == CONTENT


def test_always_breaking_off_ends(server):
    server.breaks = [1000] + [0] * 100
    with pytest.raises(CheckpointError, match=r"closed after 1000 bytes"):
        default_file(server.file())
    server.breaks = []
    assert default_file(server.file()).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=1000-"


def test_wrong_content_is_not_kept(server):
    with pytest.raises(CheckpointError, match="expected the SHA-256"):
        default_file(server.file(sha256="0" * 64))
    assert not [path for path in downloads.cache_folder().iterdir() if path.suffix != ".lock"]


def test_no_network_and_no_file_are_one_line(server):
    path = downloads.cache_folder() / "file.bin"
    gone = PublicFile("file.bin", "http://127.0.0.1:9/file.bin")
    for file in (gone, PublicFile("file.bin", server.file("missing").url)):
        with pytest.raises(CheckpointError) as error:
            default_file(file)
        message = str(error.value)
        assert file.url in message and str(path) in message and "\n" not in message
    assert None in server.asked and len(server.asked) == 1
    # Put there by hand, it is taken as it is.
    path.write_bytes(b"by hand")
    assert default_file(gone).read_bytes() == b"by hand"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside the server's thread
def test_processes_share_one_download(server):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=default_file, args=(server.file(),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(server.asked) == 1
    assert default_file(server.file()).read_bytes() == CONTENT


def test_hash_of_the_hub(server):
    """Hugging Face redirects large files, and sends their SHA-256 with that."""
    server.tag = hashlib.sha256(CONTENT).hexdigest()
    assert default_file(server.file("hub/good.bin")).read_bytes() == CONTENT
    server.tag = "0" * 64
    with pytest.raises(CheckpointError, match="expected the SHA-256 0000"):
        default_file(server.file("hub/bad.bin"))
    server.tag = "f" * 40  # of a small file: no SHA-256
    assert default_file(server.file("hub/small.bin")).read_bytes() == CONTENT


def test_terms_are_said_before_a_large_download(server, monkeypatch, caplog):
    file = PublicFile("file.bin", server.file().url, terms="a model: 5.0 GiB in all, MIT license")
    default_file(PublicFile("small.bin", file.url, terms="not said"))
    monkeypatch.setattr(downloads, "LARGE", 1000)
    server.breaks = [2000]
    default_file(file)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, although it was resumed
    assert "(a model: 5.0 GiB in all, MIT license)" in caplog.text and file.url in caplog.text


def archive(**members) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, None if isinstance(content, str) else io.BytesIO(content))
    return data.getvalue()


def test_archive(server, tmp_path):
    inside = {"1.3B/a.ckpt": b"a", "1.3B/words/b.json": b"b", "../../evil": b"c", "1.3B/link.yaml": "/etc/passwd"}
    server.content = archive(**inside)
    model = PublicModel("model", archive=PublicFile("model/all.tar.gz", server.file().url,
                                                    md5=hashlib.md5(server.content).hexdigest()),
                        members=("a.ckpt", "words/b.json"), optional=("link.yaml",))  # fmt: skip
    folder = default_model(model)
    assert folder == tmp_path / ".cache/dalle/model" and default_model(model) == folder and len(server.asked) == 1
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".lock")} == {
        ".cache/dalle/model/a.ckpt", ".cache/dalle/model/words/b.json"
    }  # fmt: skip
    assert (folder / "words/b.json").read_bytes() == b"b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(**{"other": b"a"}), "is another archive: it lacks a.ckpt"),
        (archive(**{"a.ckpt": bytes(5000)})[:-30], "is damaged"),
        (b"no archive", "is damaged"),
    ],
    ids=["another", "cut", "none"],  # an archive's bytes hold the time
)
def test_archives_that_are_none(server, content, message):
    server.content = content
    model = PublicModel("model", archive=PublicFile("model/all.tar.gz", server.file().url), members=("a.ckpt",))
    with pytest.raises(CheckpointError, match=message):
        default_model(model)
    assert not (downloads.cache_folder() / "model/a.ckpt").exists()


def test_wrong_md5(server):
    with pytest.raises(CheckpointError, match="expected the MD5 0000"):
        default_file(PublicFile("file.bin", server.file().url, md5="0" * 32))
