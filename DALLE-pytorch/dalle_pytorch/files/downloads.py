"""The public files that a path left out means, downloaded once and kept in `~/.cache/dalle`."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.errors import CheckpointError

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 4  # connections in a row that bring nothing new
CHUNK = 2**20


@dataclass(frozen=True)
class PublicFile:
    """A file that a project publishes: its name in the cache, its address, and the SHA-256 of its content if known."""

    name: str
    url: str
    sha256: str | None = None


# The names are those that DALLE-pytorch gives them, so that what it has downloaded is found.
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


#: OpenAI's CLIPs under the names that its package has for them
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
    """Where that file is in the cache, after downloading it if need be; a broken-off download goes on where it stopped.

    Of several processes one downloads and the others wait. Raises `CheckpointError` with one line that says the address
    and where to put the file by hand.
    """
    path = cache_folder() / file.name
    if path.exists():
        return path
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{file.name}.lock")):
            if not path.exists():
                logging.getLogger(__name__).info("downloading %s to %s", file.url, path)
                _download(file, path)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} is not there and cannot be downloaded ({reason}); get it from {file.url} and put it there"
        ) from None
    return path


def _download(file: PublicFile, path: Path) -> None:
    """Fetches into a file beside `path` that has its name when it is whole."""
    part = path.with_name(f".{file.name}.part")
    failures, size, total = 0, _size(part), None
    while total is None or size < total:
        error = None
        try:
            total = _fetch(file.url, part)
        except urllib.error.HTTPError:
            raise  # refused by the server: asking again does not help
        except (OSError, http.client.HTTPException) as broken:
            error = broken
        before, size = size, _size(part)
        failures = 0 if size > before else failures + 1
        if failures == ATTEMPTS:
            raise error or OSError(f"it breaks off after {size} bytes")
    digest = _sha256(part)
    if size != total or file.sha256 not in (None, digest):
        part.unlink()
        was = f"{size} bytes of {total}" if size != total else f"content with the SHA-256 {digest[:12]}…"
        raise OSError(f"it came as {was}, which is not the file that is wanted")
    part.replace(path)


def _fetch(url: str, part: Path) -> int:
    """Appends to `part` what it lacks of the file at `url`, and returns how many bytes that has in all."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        # There is nothing after what we have: either that is all, or it is no part of the file that is there now.
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
            while chunk := response.read(CHUNK):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
            return out.tell() if total is None else total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
