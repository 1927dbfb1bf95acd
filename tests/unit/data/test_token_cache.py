"""Image tokens kept in a folder: those that the VAE finds, found once, in whatever pieces."""

import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_pytorch.data import token_cache
from dalle_pytorch.data.datasets import open_dataset
from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import BatchLoader
from dalle_pytorch.data.token_cache import TokenCache, cache_tokens
from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.lock import locked

COUNT = 25


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(token_cache, "PART_SIZE", 8)


@pytest.fixture
def folder(tmp_path):
    """Pictures with two captions each; three of them are broken in one way or another."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(COUNT):
        picture(i).save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(f"caption {i}\nother {i}")
    (place / "03.png").write_bytes(b"nothing")
    (place / "04.txt").write_text("")
    (place / "alone.png").write_bytes(b"")
    (place / "24.txt").write_text("\n")
    return place


@pytest.fixture
def archives(tmp_path):
    """Three archives of 11, 0 and 16 pictures, the last but one of which is broken."""
    number = 0
    for shard, count in enumerate((11, 0, 16)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                picture(number).save(buffer, "PNG")
                data = buffer.getvalue() if number != 25 else b"nothing"
                for suffix, content in (("png", data), ("txt", f"caption {number}".encode())):
                    member = tarfile.TarInfo(f"{number:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return str(tmp_path / "{0..2}.tar")


def numbers(cache):
    return [int(cache[i]["caption"].split()[1]) for i in range(len(cache))]


def expected(vae, number):
    pixels = torch.from_numpy(np.array(picture(number))).permute(2, 0, 1)[None].float() / 255
    return vae.get_codebook_indices(pixels)[0]


GOOD = [i for i in range(COUNT) if i not in (3, 4, 24)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder(tmp_path, folder, tiny_vae, num_workers):
    seen = []
    cache = cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64, crop_ratio=0.5), tiny_vae, batch_size=3,
                         num_workers=num_workers, progress=lambda *counts: seen.append(counts))  # fmt: skip
    assert numbers(cache) == GOOD
    for i in (0, 5, 21):
        assert torch.equal(cache[i]["tokens"], expected(tiny_vae, GOOD[i]))
    assert cache[0]["tokens"].dtype == torch.int64 and cache.tokens.dtype == np.uint16
    assert cache.left_out == {"broken image": 1, "empty caption": 2, "image without caption": 1}
    assert seen[-1] == (COUNT, COUNT)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "key.json", "index.json", "tokens.npy", "captions.jsonl", "starts.npy"}  # fmt: skip


def test_archives(tmp_path, archives, tiny_vae):
    cache = cache_tokens(tmp_path / "cache", open_dataset(archives, 64, wds="png,txt"), tiny_vae, batch_size=3,
                         num_workers=2)  # fmt: skip
    assert numbers(cache) == [i for i in range(27) if i != 25]
    assert torch.equal(cache[25]["tokens"], expected(tiny_vae, 26))
    assert cache.left_out == {"broken image": 1, "no png in the archive": 1}


def test_captions_are_drawn_by_epoch(tmp_path, folder, tiny_vae):
    cache = cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
    loader = BatchLoader(cache, len(cache), last_step=3)
    captions = [caption for batch in loader for caption in batch["caption"]]
    assert {caption.split()[0] for caption in captions} == {"caption", "other"} and len(set(captions)) > 30
    assert loader.skipped["empty caption"] == 6  # what the cache lacks is told once an epoch
    batch = next(iter(loader))
    assert batch["tokens"].shape == (len(cache), 256)


def test_caption_problem_is_the_data_sets(tmp_path, folder, tiny_vae):
    data = ImageTextFolder(folder, 64, caption_problem=lambda caption: "other" if "other" in caption else None)
    cache = cache_tokens(tmp_path / "cache", data, tiny_vae)
    assert {cache.sample(0, np.random.default_rng(i))["caption"] for i in range(9)} == {"caption 0"}


@pytest.mark.parametrize("name", ["folder", "archives"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_goes_on_after_a_break(tmp_path, folder, archives, tiny_vae, name, num_workers, monkeypatch):
    data = ImageTextFolder(folder, 64) if name == "folder" else open_dataset(archives, 64, wds="png,txt")
    whole = cache_tokens(tmp_path / "whole", data, tiny_vae, batch_size=3)

    encoded = []
    encode = tiny_vae.get_codebook_indices
    monkeypatch.setattr(tiny_vae, "get_codebook_indices", lambda images: encoded.append(len(images)) or encode(images))
    for stop in (7, 2, 1):
        calls = iter(range(stop))

        def interrupt(done, total, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache_tokens(tmp_path / "cache", data, tiny_vae, batch_size=2, num_workers=num_workers, progress=interrupt)
        with pytest.raises(FileError, match="not a finished token cache"):
            TokenCache(tmp_path / "cache")
    encoded.clear()
    cache = cache_tokens(tmp_path / "cache", data, tiny_vae, batch_size=3)
    assert numbers(cache) == numbers(whole) and np.array_equal(cache.tokens, whole.tokens)
    assert sum(encoded) < len(cache) and cache.left_out == whole.left_out


def test_finished_parts_are_not_read_again(tmp_path, folder, tiny_vae, monkeypatch):
    data = ImageTextFolder(folder, 64)
    join = token_cache._join_parts
    monkeypatch.setattr(token_cache, "_join_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache_tokens(tmp_path / "cache", data, tiny_vae)
    monkeypatch.setattr(token_cache, "_join_parts", join)
    monkeypatch.setattr(tiny_vae, "get_codebook_indices", lambda images: pytest.fail("found again"))
    assert numbers(cache_tokens(tmp_path / "cache", data, tiny_vae)) == GOOD
    assert numbers(cache_tokens(tmp_path / "cache", data, tiny_vae)) == GOOD


@pytest.mark.parametrize("name", ["folder", "archives"])
def test_processes_share_the_work(tmp_path, folder, archives, tiny_vae, name):
    data = ImageTextFolder(folder, 64) if name == "folder" else open_dataset(archives, 64, wds="png,txt")
    alone = cache_tokens(tmp_path / "alone", data, tiny_vae)
    caches, read = {}, {}

    def build(rank):
        caches[rank] = cache_tokens(tmp_path / "cache", data, tiny_vae, rank=rank, world_size=2,
                                    progress=lambda done, _: read.__setitem__(rank, done))  # fmt: skip

    threads = [threading.Thread(target=build, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert np.array_equal(caches[0].tokens, alone.tokens) and np.array_equal(caches[1].tokens, alone.tokens)
    assert numbers(caches[0]) == numbers(alone)
    assert sum(read.values()) == (COUNT if name == "folder" else 28) and (name == "archives" or min(read.values()) > 5)


def test_cache_of_something_else_is_refused(tmp_path, folder, tiny_vae, monkeypatch):
    data = ImageTextFolder(folder, 64)
    cache_tokens(tmp_path / "cache", data, tiny_vae)
    with torch.no_grad():
        tiny_vae.codebook_weight[0, 0] += 1
    with pytest.raises(FileError, match="the image tokens of another VAE"):
        cache_tokens(tmp_path / "cache", data, tiny_vae)
    with torch.no_grad():
        tiny_vae.codebook_weight[0, 0] -= 1
    (folder / "00.txt").write_text("a caption of another length")
    with pytest.raises(FileError, match="the image tokens of other data"):
        cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
    (folder / "00.txt").write_text("caption 0\nother 0")
    times = (folder / "05.txt").stat()
    cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
    for name, content in (("05.txt", b"caption 9\nother 5"), ("05.png", (folder / "06.png").read_bytes())):
        before = (folder / name).read_bytes()
        size = max(len(before), len(content))
        (folder / name).write_bytes(content.ljust(size, b"\n"))
        os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(FileError, match="the image tokens of other data"):
            cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
        (folder / name).write_bytes(before)
    monkeypatch.setattr(token_cache, "_make_parts", lambda *_: pytest.fail("made again"))
    cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)  # times differ, contents do not
    with pytest.raises(FileError, match="not for registered data sets"):
        cache_tokens(tmp_path / "cache", open_dataset("glyphs", 64), tiny_vae)


def test_folder_of_another_is_no_cache(tmp_path, folder, tiny_vae):
    with pytest.raises(FileError, match="is not empty and holds no token cache"):
        cache_tokens(folder, ImageTextFolder(folder, 64), tiny_vae)
    cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
    assert not [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_two_runs_make_one_cache(tmp_path, folder, tiny_vae, monkeypatch):
    """The second waits for the first, for a time."""
    data, caches = ImageTextFolder(folder, 64), []
    threads = [threading.Thread(target=lambda: caches.append(cache_tokens(tmp_path / "cache", data, tiny_vae)))
               for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [numbers(cache) for cache in caches] == [GOOD, GOOD]
    monkeypatch.setattr(token_cache, "WAIT", 0.1)
    with locked(tmp_path / "other", "a cache"), pytest.raises(UsageError, match="in use"):
        cache_tokens(tmp_path / "other", data, tiny_vae)
    with pytest.raises(FileError, match="no new image tokens"):  # the first process of the run has ended
        cache_tokens(tmp_path / "other", data, tiny_vae, rank=1, world_size=2)


def test_over_half_broken_stops(tmp_path, folder, tiny_vae):
    for i in range(15):
        (folder / f"{i:02}.png").write_bytes(b"nothing")
    with pytest.raises(FileError, match="cannot be used: 14 × broken image, 2 × empty caption"):
        cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)


@pytest.mark.parametrize("damage", ["index", "tokens", "starts", "captions"])
def test_damaged_cache_is_refused(tmp_path, folder, tiny_vae, damage):
    cache_tokens(tmp_path / "cache", ImageTextFolder(folder, 64), tiny_vae)
    name = {"index": "index.json", "tokens": "tokens.npy", "starts": "starts.npy", "captions": "captions.jsonl"}[damage]
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="cache"):
        TokenCache(tmp_path / "cache")
    path.unlink()
    with pytest.raises(FileError, match=f"{name} is missing"):
        TokenCache(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "key.json").read_text())["version"] == 2
