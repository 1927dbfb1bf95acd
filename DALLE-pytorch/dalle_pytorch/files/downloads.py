"""Published files that are the defaults of paths, downloaded once to `~/.cache/dalle`."""

import hashlib
import http.client
import logging
import os
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dalle_pytorch.errors import CheckpointError

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 4  # consecutive connections without new bytes
CHUNK = 2**20


@dataclass(frozen=True)
class PublicFile:
    """A file that a project publishes: its name in the cache, its address, and the SHA-256 of its content if known."""

    name: str
    url: str
    sha256: str | None = None


# Named as in DALLE-pytorch, to share its downloads.
DVAE_ENCODER = PublicFile("encoder.pkl", "https://cdn.openai.com/dall-e/encoder.pkl")
DVAE_DECODER = PublicFile("decoder.pkl", "https://cdn.openai.com/dall-e/decoder.pkl")


def _vqgan(name: str, weights: str, config: str) -> tuple[PublicFile, PublicFile]:
    address = "https://heibox.uni-heidelberg.de/f/{}/?dl=1"
    return (
        PublicFile(f"vqgan.{name}.model.ckpt", address.format(weights)),
        PublicFile(f"vqgan.{name}.config.yml", address.format(config)),
    )


#: weights and settings of taming-transformers' VQGANs by the size of their codebooks; the f = 8 one is the Gumbel kind
VQGANS = {
    1024: _vqgan("1024", "140747ba53464f49b476", "6ecf2af6c658432c8298"),
    8192: _vqgan("gumbel_f8", "34a747d5765840b5a99d", "b24d14998a8d4f19a34f"),
    16384: _vqgan("16384", "867b05fc8c4841768640", "274fb24ed38341bfa753"),
}


def _clip(name: str, sha256: str) -> PublicFile:
    return PublicFile(f"{name}.pt", f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt", sha256)


#: OpenAI's CLIPs by the names in its package
CLIPS = {
    "ViT-B/32": _clip("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": _clip("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": _clip("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": _clip("ViT-L-14-336px", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


def cache_folder() -> Path:
    """Where downloaded files are kept."""
    return Path.home() / ".cache/dalle"


def default_file(file: PublicFile) -> Path:
    """The path of that file in the cache, downloaded if missing. An interrupted download is resumed.

    Of several processes one downloads and the others wait. Raises `CheckpointError` with the address and the path for
    a download by hand.
    """
    path = cache_folder() / file.name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{file.name}.lock")):
            if not path.exists():
                logging.getLogger(__name__).info("downloading %s to %s", file.url, path)
                _download(file, path)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CheckpointError(
            f"{path} is missing and cannot be downloaded ({reason}); download {file.url} to that path"
        ) from None
    return path


def _download(file: PublicFile, path: Path) -> None:
    """Downloads to a file beside `path`, renamed when it is complete."""
    part = path.with_name(f".{file.name}.part")
    failures, size, total = 0, _size(part), None
    while total is None or size < total:
        error = None
        try:
            total = _fetch(file.url, part)
        except urllib.error.HTTPError:
            raise  # refused by the server: no retry
        except (OSError, http.client.HTTPException) as broken:
            error = broken
        before, size = size, _size(part)
        failures = 0 if size > before else failures + 1
        if failures == ATTEMPTS:
            raise error or OSError(f"connection closed after {size} bytes")
    digest = _sha256(part)
    if size != total or file.sha256 not in (None, digest):
        part.unlink()
        if size != total:
            raise OSError(f"expected {total} bytes, got {size}")
        raise OSError(f"expected the SHA-256 {file.sha256}, got {digest}")
    part.replace(path)


def _fetch(url: str, part: Path) -> int:
    """Appends the missing bytes of the file at `url` to `part`, and returns the total size of the file."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        # Nothing follows these bytes: the file is complete, or it has changed.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return have
        part.unlink()
        return _fetch(url, part)
    with response:
        resumed = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == http.client.PARTIAL_CONTENT and resumed and int(resumed[1]) == have:
            total = int(resumed[2])
        else:
            have = 0
            total = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        with open(part, "ab" if have else "wb") as out:
            shutil.copyfileobj(response, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
            return out.tell() if total is None else total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
