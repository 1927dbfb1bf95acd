"""All captions of a data set, without its images, to train a tokenizer on."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dalle_pytorch.data.datasets import open_dataset
from dalle_pytorch.data.folder import CAPTION_SUFFIXES, METADATA_NAMES, list_files, read_metadata
from dalle_pytorch.data.loading import BrokenSample, Skipped
from dalle_pytorch.data.registry import open_registered
from dalle_pytorch.data.samples import read_captions
from dalle_pytorch.data.shards import ShardStream
from dalle_pytorch.errors import FileError
from dalle_pytorch.files.text import one_line

REGISTERED_CAPTIONS = 20_000  # of a registered data set, which may be endless, unless told


def all_captions(
    source: str,
    skipped: Skipped,
    *,
    wds: str = "",
    caption_key: str = "caption",
    count: int | None = None,
    commands: bool = True,
) -> Iterator[str]:
    """The captions, or the first `count`, of a text file, one a line; of those in a folder, as in `ImageTextFolder`;
    with `wds` of shards, whose images and captions have these suffixes; or of a registered data set.

    What cannot be read is skipped and counted in `skipped`. Raises `FileError` if there is nothing at `source`, and if
    over half of what is there cannot be read.
    """
    if (registered := open_registered(source, 256)) is not None:
        yield from islice(registered.captions(), count or REGISTERED_CAPTIONS)
        return
    samples = _shards(source, wds, caption_key, commands) if wds else _text_files(Path(source), caption_key)
    yield from islice(_usable(samples, skipped), count)


def _usable(samples: Iterator[list[str] | BrokenSample], skipped: Skipped) -> Iterator[str]:
    for sample in samples:
        skipped.read += 1
        if isinstance(sample, BrokenSample):
            skipped.add(sample)
        else:
            yield from sample
        skipped.check()
    skipped.check(enough=1)


def _text_files(path: Path, caption_key: str) -> Iterator[list[str] | BrokenSample]:
    files = [path / name for name in list_files(path)[1]] if path.is_dir() else [path]
    if not files:
        raise FileError(f"{path} holds no captions ({', '.join((*CAPTION_SUFFIXES, *METADATA_NAMES))})")
    for file in files:
        try:
            if file.name in METADATA_NAMES:
                rows = read_metadata(file, caption_key)
                yield [line for _, captions in rows for caption in captions if (line := one_line(caption))]
            else:
                yield read_captions(file.read_bytes(), file)
        except FileNotFoundError:
            raise FileError(f"there is no folder or file of captions {file}") from None
        except OSError as error:
            yield BrokenSample("caption that cannot be read", file, error.strerror)
        except BrokenSample as broken:
            yield broken


def _shards(source: str, wds: str, caption_key: str, commands: bool) -> Iterator[list[str] | BrokenSample]:
    stream = open_dataset(source, 1, wds=wds, caption_key=caption_key, commands=commands)
    assert isinstance(stream, ShardStream)
    for url in stream.urls:
        for raw in stream.read_shard(url):
            try:
                yield stream.all_captions(raw)
            except BrokenSample as broken:
                yield broken
