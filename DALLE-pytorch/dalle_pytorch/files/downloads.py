"""Published files that are the defaults of paths, downloaded once to `~/.cache/dalle`."""

import gzip
import hashlib
import http.client
import logging
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.atomic import atomic_write

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 4  # consecutive connections without new bytes
CHUNK = 2**20
LARGE = 2**30  # bytes from which on size and terms are said before a download

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicFile:
    """A file that a project publishes.

    Attributes:
        name: its path in the cache.
        url: its address.
        sha256, md5: hashes of its content, if known. A SHA-256 that Hugging Face's hub sends with it is checked too.
        terms: license and size of the model that it is a part of.
        architecture: open_clip's name of it, for a CLIP that does not tell.
    """

    name: str
    url: str
    sha256: str | None = None
    md5: str | None = None
    terms: str = ""
    architecture: str | None = None


@dataclass(frozen=True)
class PublicModel:
    """A model that a project publishes as several files, or as a `.tar.gz` of them.

    Attributes:
        name: the path in the cache of the file or folder that is opened.
        members, optional: files of the archive, which may lack the latter.
    """

    name: str
    files: tuple[PublicFile, ...] = ()
    archive: PublicFile | None = None
    members: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


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


def _hps(version: str) -> PublicFile:
    name = f"HPS_{version}_compressed.pt"
    return PublicFile(name, f"https://huggingface.co/xswu/HPSv2/resolve/main/{name}",
                      terms="HPSv2: 1.8 GiB, Apache 2.0 license", architecture="ViT-H-14")  # fmt: skip


#: OpenAI's CLIPs by the names in its package, and HPSv2
CLIPS = {
    "ViT-B/32": _clip("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": _clip("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": _clip("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": _clip("ViT-L-14-336px", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "HPSv2": _hps("v2"),
    "HPSv2.1": _hps("v2.1"),
}
RESNET_CLIPS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")  # OpenAI's names of those that are not supported


def _min_dalle(suffix: str, terms: str) -> PublicModel:
    address = "https://huggingface.co/kuprel/min-dalle/resolve/main/"
    names = (f"vocab{suffix}.json", f"merges{suffix}.txt", f"encoder{suffix}.pt", f"decoder{suffix}.pt", "detoker.pt")
    files = tuple(PublicFile(f"min-dalle/{name}", address + name, terms=terms) for name in names)
    return PublicModel(f"min-dalle/decoder{suffix}.pt", files)


#: the priors by their names on a command line. Sizes are computed from the shapes.
PRIORS = {
    "min-dalle": _min_dalle("_mini", "DALL·E mini: 1.0 GiB in all, MIT license"),
    "min-dalle-mega": _min_dalle("", "DALL·E mega: 5.0 GiB in all, MIT license"),
    "mindall-e": PublicModel(
        "mindall-e",
        archive=PublicFile(
            "mindall-e/1.3B.tar.gz",
            "https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz",
            md5="57b008f02ceaa02b779c8b7463143315",  # minDALL-E's code checks it against this part of the address
            terms="minDALL-E 1.3B: about 5 GiB, CC-BY-NC-SA 4.0: for non-commercial use only",
        ),
        members=("stage1_last.ckpt", "stage2_last.ckpt", "tokenizer/bpe-16k-vocab.json",
                 "tokenizer/bpe-16k-merges.txt"),
        optional=("config.yaml",),
    ),
}  # fmt: skip


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
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                logger.info("downloading %s to %s", file.url, path)
                _download(file, path)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CheckpointError(
            f"{path} is missing and cannot be downloaded ({reason}); download {file.url} to that path"
        ) from None
    return path


def default_model(model: PublicModel) -> Path:
    """The file or folder in the cache to open that model by. What is missing is downloaded as by `default_file`."""
    path = cache_folder() / model.name
    for file in model.files:
        default_file(file)
    if model.archive is not None and not all((path / name).is_file() for name in model.members):
        archive = default_file(model.archive)
        with FileLock(path / ".unpack.lock"):
            if archive.exists():
                _unpack(archive, model)
                archive.unlink()
    return path


def _unpack(archive: Path, model: PublicModel) -> None:
    """Writes the members that belong to the model beside the archive, whatever folder of it they are in. Nothing else
    in the archive, links among them, is looked at."""
    missing = set(model.members)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                path = f"/{member.name}"
                name = next((name for name in (*model.members, *model.optional) if path.endswith(f"/{name}")), None)
                source = tar.extractfile(member) if name and member.isfile() else None
                if name is None or source is None:
                    continue
                with atomic_write(archive.parent / name) as temporary, open(temporary, "wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
                missing.discard(name)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CheckpointError(f"{archive} is damaged: {error}; delete it to download it again") from None
    if missing:
        raise CheckpointError(f"{archive} is another archive: it lacks {', '.join(sorted(missing))}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that Hugging Face's hub sends with the redirection to a large file."""

    sha256: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> Any:
        tag = (headers.get("X-Linked-ETag") or "").strip('"')
        self.sha256 = tag if re.fullmatch("[0-9a-f]{64}", tag) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(file: PublicFile, path: Path) -> None:
    """Downloads to a file beside `path`, renamed when it is complete."""
    part, redirects = path.with_name(f".{path.name}.part"), _Redirects()
    failures, size, total = 0, _size(part), None
    while total is None or size < total:
        error = None
        try:
            total = _fetch(file, part, redirects)
        except urllib.error.HTTPError:
            raise  # refused by the server: no retry
        except (OSError, http.client.HTTPException) as broken:
            error = broken
        before, size = size, _size(part)
        failures = 0 if size > before else failures + 1
        if failures == ATTEMPTS:
            raise error or OSError(f"connection closed after {size} bytes")
    hashes = {"SHA-256": file.sha256 or redirects.sha256, "MD5": file.md5}
    digests = {name: _digest(part, name) for name in hashes if hashes[name]}
    try:
        if size != total:
            raise OSError(f"expected {total} bytes, got {size}")
        for name, digest in digests.items():
            if digest != hashes[name]:
                raise OSError(f"expected the {name} {hashes[name]}, got {digest}")
    except OSError:
        part.unlink()
        raise
    part.replace(path)


def _fetch(file: PublicFile, part: Path, redirects: _Redirects) -> int:
    """Appends the missing bytes of a file to `part`, and returns its total size."""
    have = _size(part)
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        # Nothing follows these bytes: the file is complete, or it has changed.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return have
        part.unlink()
        return _fetch(file, part, redirects)
    with response:
        resumed = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == http.client.PARTIAL_CONTENT and resumed and int(resumed[1]) == have:
            total = int(resumed[2])
        else:
            have = 0
            total = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        if total is not None and total >= LARGE and not have:
            terms = f" ({file.terms})" if file.terms else ""
            logger.warning("downloading %.1f GiB from %s to %s%s", total / 2**30, file.url, part.parent, terms)
        with open(part, "ab" if have else "wb") as out:
            shutil.copyfileobj(response, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
            return out.tell() if total is None else total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, name.replace("-", "").lower()).hexdigest()
