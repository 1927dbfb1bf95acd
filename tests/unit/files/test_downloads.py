"""Default files: fetched once, resumed, checked, and one clear line where there is no network."""

import hashlib
import multiprocessing
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files import downloads
from dalle_pytorch.files.downloads import PublicFile, default_file

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
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(server.asked) == 1
    assert default_file(server.file()).read_bytes() == CONTENT
