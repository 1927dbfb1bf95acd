"""WebDataset shards: every sample once, whoever reads; the same stream after a break; what is broken is counted."""

import http.server
import io
import json
import shlex
import tarfile
import threading
from collections import Counter
from functools import partial
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from PIL import Image

from dalle_pytorch.data.datasets import open_dataset
from dalle_pytorch.data.loading import BatchLoader
from dalle_pytorch.data.shards import ShardStream, list_shards
from dalle_pytorch.errors import FileError
from dalle_pytorch.training.commands import train_tokenizer, train_vae


def picture(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, samples):
    """A tar of (key, {suffix: bytes})."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for key, files in samples:
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def samples(first, count):
    return [(f"{i:05}", {"jpg": picture(i), "txt": f"caption {i}".encode()}) for i in range(first, first + count)]


@pytest.fixture
def shards(tmp_path):
    """Five shards of 7 to 11 samples, 45 in all."""
    first = 0
    for shard in range(5):
        write_tar(tmp_path / f"data-{shard:03}.tar", samples(first, 7 + shard))
        first += 7 + shard
    return str(tmp_path / "data-{000..004}.tar")


EVERYTHING = Counter(f"caption {i}" for i in range(45))


def stream(urls, **settings):
    return ShardStream(urls, 16, **{"shuffle_buffer": 8, **settings})


def epoch_of(dataset, epoch, readers, seed=0):
    """The captions that each reader gets in one epoch."""

    def captions(reader):
        return [dataset.decode(raw)["caption"] for raw in dataset.raw_samples(seed, epoch, reader, readers)]

    return [captions(reader) for reader in range(readers)]


def flat(batches):
    return list(chain.from_iterable(batches))


def read(loader, count=None):
    return [batch["caption"] for batch in islice(loader, count)]


# --------------------------------------------------------------------------------------------------
# Sharing and order


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 6, 8, 16])
def test_readers_share_everything_without_overlap(shards, readers):
    shares = epoch_of(stream(shards), 0, readers)
    assert sum(map(Counter, shares), Counter()) == EVERYTHING
    assert all(shares)


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 2), (2, 0), (2, 2), (3, 2)])
def test_batches_of_all_processes_hold_everything_once(shards, world_size, num_workers):
    """Until the first reader has finished its epoch, nothing comes twice; and nothing is left out."""
    loaders = [
        BatchLoader(stream(shards), world_size, rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    seen = Counter()
    for loader in loaders:
        for batch in loader:
            places = {reader: epoch for reader, epoch, _ in loader.positions["places"]}
            if min(places.values()) > 0:
                break
            if places[loader.positions["places"][-1][0]] == 0:
                seen[batch["caption"][0]] += 1
    assert seen == EVERYTHING


def test_epochs_differ_and_seeds_too(shards):
    data = stream(shards)
    (first,), (second,), (again,), (other,) = (epoch_of(data, *args) for args in ((0, 1), (1, 1), (0, 1), (0, 1, 5)))
    assert first == again and len({tuple(order) for order in (first, second, other)}) == 3
    assert Counter(first) == Counter(second) == EVERYTHING
    shard_of = [int(caption.split()[1]) // 9 for caption in first]
    assert sum(a != b for a, b in pairwise(shard_of)) > 8  # mixed, not one shard after another


def test_order_is_kept_without_a_buffer(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 20))
    assert epoch_of(stream(tmp_path / "a.tar", shuffle_buffer=0), 0, 1) == [[f"caption {i}" for i in range(20)]]


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 2), (2, 2), (1, 3)])
def test_stream_goes_on_where_it_was_left(shards, world_size, num_workers):
    def loader(**settings):
        return BatchLoader(stream(shards, crop_ratio=0.5), 3 * world_size, rank=world_size - 1, world_size=world_size,
                           num_workers=num_workers, seed=4, **settings)  # fmt: skip

    whole = read(loader(last_step=30))
    for stop in (1, 2, 7, 16):
        broken_off = loader()
        assert read(broken_off, stop) == whole[:stop]
        positions = json.loads(json.dumps(broken_off.positions))
        resumed = loader(first_step=stop, last_step=30, positions=positions)
        assert read(resumed) == whole[stop:]
        assert resumed.epoch == 30 * 3 * world_size // 45 - (resumed.epoch < 30 * 3 * world_size // 45)


def test_crops_are_the_same_after_a_break(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    write_tar(tmp_path / "a.tar", [(f"{i}", {"jpg": buffer.getvalue(), "txt": b"x\ny\nz"}) for i in range(10)])
    data = stream(tmp_path / "a.tar", crop_ratio=0.5)
    first = BatchLoader(data, 4)
    batches = []
    for batch in islice(first, 3):
        batches.append(batch)
        positions = first.positions
        if len(batches) == 2:
            kept = positions
    again = next(iter(BatchLoader(data, 4, positions=kept)))
    assert again["image"].equal(batches[2]["image"]) and again["caption"] == batches[2]["caption"]
    assert not batches[0]["image"][0].equal(batches[0]["image"][1])


def test_another_number_of_workers_starts_the_epoch_anew(shards):
    loader = BatchLoader(stream(shards), 5, num_workers=2)
    read(loader, 14)
    assert loader.epoch >= 1
    other = BatchLoader(stream(shards), 5, num_workers=1, positions=loader.positions)
    assert other.positions == {"readers": 1, "places": [[0, loader.epoch, 0]]}


def test_nothing_is_decoded_on_the_way_to_the_old_place(shards, monkeypatch):
    data = stream(shards)
    loader = BatchLoader(data, 5)
    read(loader, 6)
    decoded = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(1) or decode(*args))
    read(BatchLoader(data, 5, positions=loader.positions), 1)
    assert len(decoded) == 5


# --------------------------------------------------------------------------------------------------
# Where shards are


def test_names_of_archives(tmp_path, shards):
    assert len(list_shards(shards)) == 5 and len(list_shards(tmp_path)) == 5
    one = tmp_path / "data-{odd}.tar"
    write_tar(one, samples(0, 1))
    assert list_shards(one) == [str(one)]
    assert list_shards("http://a/{0..1}.tar::pipe:cat b-{2,3}.tar.gz") == [
        "http://a/0.tar", "http://a/1.tar", "pipe:cat b-2.tar.gz", "pipe:cat b-3.tar.gz"]  # fmt: skip
    with pytest.raises(FileError, match=r"there is no archive .*x-0\.tar, nor any of 3"):
        list_shards(tmp_path / "x-{0..2}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no archives"):
        list_shards(tmp_path / "empty")


def test_names_in_a_folder_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch harmed; echo .tar", "http:a.tar"):
        write_tar(tmp_path / name, samples(0, 2))
    for urls in (".", "pipe:touch harmed; echo .tar", "http:a.tar"):  # a file that is there is that file
        found = epoch_of(stream(urls), 0, 1)[0]
        assert Counter(found) == Counter({f"caption {i}": 2 if urls == "." else 1 for i in range(2)})
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["pipe:touch harmed", "a.tar::pipe:touch harmed", "{p,q}ipe:touch harmed"])
def test_commands_are_typed_and_not_read_from_a_file(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps({"image_text_folder": name, "wds": "jpg,txt", "steps": 1}))
    for command in (train_vae, train_tokenizer):
        arguments = ["--config", "run.yaml"] if command is train_vae else ["--config", "tokenizer.yaml"]
        (tmp_path / "tokenizer.yaml").write_text(json.dumps({"image_text_folder": name, "wds": "jpg,txt"}))
        with pytest.raises(FileError, match="command line alone"):
            command.main(arguments)
    assert not (tmp_path / "harmed").exists()
    settings = train_vae.TrainVaeSettings.parse(["--config", "run.yaml", "--image_text_folder", name])
    assert settings.dataset_options()["commands"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz.gz"])
def test_compressed(tmp_path, name):
    write_tar(tmp_path / name, samples(0, 5))
    assert Counter(epoch_of(stream(tmp_path / name), 0, 1)[0]) == Counter(f"caption {i}" for i in range(5))


def test_output_of_a_command(tmp_path, shards):
    names = "pipe:cat " + shlex.quote(str(tmp_path)) + "/data-{000..004}.tar"
    assert Counter(epoch_of(stream(names), 0, 1)[0]) == EVERYTHING


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_web(shards, server):
    data = stream(server + "/data-{000..005}.tar")  # there is no 005
    loader = BatchLoader(data, 5, num_workers=2)
    seen = Counter(flat(read(loader, 20)))
    assert set(seen) == set(EVERYTHING)
    assert set(loader.skipped) == {"damaged archive"} and "data-005.tar" in loader.examples["damaged archive"]


# --------------------------------------------------------------------------------------------------
# What is in them


@pytest.mark.parametrize("wds, files, expected", [
    ("jpg,txt", {"jpg": picture(), "txt": b"one\n\n"}, "one"),
    (".JPG, .txt", {"jpg": picture(), "txt": b"one"}, "one"),
    ("img,cap", {"img": picture(), "cap": b"one"}, "one"),
    ("png;jpg,txt", {"jpg": picture(), "txt": b"one", "npy": b"other"}, "one"),
    ("jpg,json", {"jpg": picture(), "json": b'{"caption": "one", "url": "x"}'}, "one"),
    ("jpg,json", {"jpg": picture(), "json": b'{"caption": ["one", ""]}'}, "one"),
])  # fmt: skip
def test_suffixes(tmp_path, wds, files, expected):
    write_tar(tmp_path / "a.tar", [("0", files)])
    item = next(iter(open_dataset(tmp_path / "a.tar", 16, wds=wds)))
    assert item["caption"] == expected and item["image"].shape == (3, 16, 16)


def test_field_of_a_json_caption(tmp_path):
    write_tar(tmp_path / "a.tar", [("0", {"jpg": picture(), "json": json.dumps({"TEXT": "rot"}).encode()})])
    item = next(iter(open_dataset(tmp_path / "a.tar", 16, wds="jpg,json", caption_key="TEXT")))
    assert item["caption"] == "rot"


def test_pictures_alone(tmp_path):
    write_tar(tmp_path / "a.tar", [("0", {"jpg": picture()})])
    for wds in ("jpg", "jpg,txt"):
        assert set(next(iter(open_dataset(tmp_path / "a.tar", 16, wds=wds, captions=False)))) == {"image"}


def test_broken_samples_are_counted_and_left_out(tmp_path):
    good = samples(0, 20)
    bad = [
        ("b0", {"jpg": picture()[:400], "txt": b"cut off"}),
        ("b1", {"jpg": picture(), "txt": b" \n"}),
        ("b2", {"txt": b"alone"}),
        ("b3", {"jpg": picture()}),
        ("b4", {"jpg": picture(), "txt": "café".encode("latin-1")}),
    ]
    write_tar(tmp_path / "a.tar", good[:7] + bad + good[7:])
    loader = BatchLoader(stream(tmp_path / "a.tar"), 20, last_step=1)
    captions = Counter(read(loader)[0])
    assert captions == Counter(f"caption {i}" for i in range(20))
    assert loader.skipped.keys() <= {"broken image", "empty caption", "no jpg", "no txt", "caption that is not UTF-8"}
    loader = BatchLoader(stream(tmp_path / "a.tar"), 10, last_step=4)
    read(loader)
    assert all(loader.skipped[reason] in (1, 2) for reason in ("broken image", "empty caption", "no jpg", "no txt"))
    assert "a.tar: b2" in loader.examples["no jpg"]


def test_keys_with_dots(tmp_path):
    files = [(f"v1.0/photo.{i}.small", {"jpg": picture(i), "txt": f"caption {i}".encode()}) for i in range(4)]
    files += [("plain", {"jpg": picture(), "txt": b"plain"}), ("plain.mask", {"jpg": picture()}),
              ("._plain", {"jpg": b"junk", "txt": b"junk"})]  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    captions = epoch_of(stream(tmp_path / "a.tar", shuffle_buffer=0), 0, 1)
    assert captions == [[f"caption {i}" for i in range(4)] + ["plain"]]


def test_shards_that_are_not_sorted(tmp_path, monkeypatch):
    order = [*range(8), *range(8)]
    files = [(f"{i}", {"jpg": picture(i)} if n < 8 else {"txt": f"caption {i}".encode()}) for n, i in enumerate(order)]
    write_tar(tmp_path / "a.tar", files)
    assert epoch_of(stream(tmp_path / "a.tar", shuffle_buffer=0), 0, 1) == [[f"caption {i}" for i in range(8)]]
    monkeypatch.setattr("dalle_pytorch.data.shards.LARGEST_WAIT", 5000)
    raw = list(stream(tmp_path / "a.tar").read_shard(str(tmp_path / "a.tar")))
    assert any("a.tar: 0: files of one sample far apart (sort the archive by name)" in str(sample) for sample in raw)


@pytest.mark.parametrize("files, said", [
    ([], "no jpg in the archive (it is empty)"),
    ([("0", {"png": b"", "json": b""})], "no jpg in the archive (its files are .png, .json)"),
])  # fmt: skip
def test_archives_without_samples(tmp_path, files, said):
    write_tar(tmp_path / "a.tar", files)
    (sample,) = stream(tmp_path / "a.tar").read_shard(str(tmp_path / "a.tar"))
    assert str(sample).endswith(said)


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'"text"', b'{"caption": null}'])
def test_broken_json(tmp_path, data):
    write_tar(tmp_path / "a.tar", [*((f"{i}", {"jpg": picture(), "json": b'{"caption": "fine"}'}) for i in range(2)),
                                   ("bad", {"jpg": picture(), "json": data})])  # fmt: skip
    loader = BatchLoader(open_dataset(tmp_path / "a.tar", 16, wds="jpg,json"), 6, last_step=1)
    assert read(loader) == [["fine"] * 6] and loader.skipped.total() >= 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_truncated_archive(tmp_path, suffix, share):
    """What comes before the end is read, the shard counts as damaged once an epoch, and the other shards go on."""
    path = write_tar(tmp_path / f"a{suffix}", samples(0, 30))
    whole = path.read_bytes()
    cut = int(len(whole) * share)
    if suffix == ".tar":
        with tarfile.open(path) as tar:  # inside the picture that is nearest
            cut = min((member.offset_data + 300 for member in tar if member.size > 400), key=lambda x: abs(x - cut))
    path.write_bytes(whole[:cut])
    write_tar(tmp_path / f"b{suffix}", samples(100, 10))
    loader = BatchLoader(stream(tmp_path / ("{a,b}" + suffix)), 5, last_step=30)
    numbers = sorted({int(caption.split()[1]) for caption in flat(read(loader))})
    inner = [n for n in numbers if n < 100]
    assert numbers[-10:] == list(range(100, 110)) and inner == list(range(len(inner)))
    assert abs(len(inner) - 30 * share) < 3
    assert loader.skipped["damaged archive"] in (loader.epoch, loader.epoch + 1)
    assert "unexpected end of data" in loader.examples["damaged archive"]


def test_a_file_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_pytorch.data.shards.LARGEST_FILE", 2**20)
    write_tar(tmp_path / "a.tar.gz", [*samples(0, 3), ("big", {"jpg": bytes(2**20 + 1), "txt": b"x"}), *samples(4, 3)])
    *good, problem = stream(tmp_path / "a.tar.gz").read_shard(str(tmp_path / "a.tar.gz"))
    assert len(good) == 3 and str(problem).endswith("a.tar.gz: damaged archive (big.jpg has over 1 MiB)")


def test_over_half_broken_stops(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}", {"jpg": b"nothing", "txt": b"x"}) for i in range(300)])
    with pytest.raises(FileError, match=r"samples cannot be used: \d+ × broken image; for example .*a.tar: \d+"):
        read(BatchLoader(stream(tmp_path / "a.tar"), 4, num_workers=2))
    with pytest.raises(FileError, match="× no png"):
        read(BatchLoader(open_dataset(tmp_path / "a.tar", 16, wds="png,txt"), 4))
    (tmp_path / "b.tar").write_bytes(b"this is no archive" * 1000)
    with pytest.raises(FileError, match="× damaged archive"):
        read(BatchLoader(stream(tmp_path / "b.tar"), 4))
    write_tar(tmp_path / "c.tar", [])
    with pytest.raises(FileError, match=r"× no jpg in the archive; .*it is empty"):
        read(BatchLoader(stream(tmp_path / "c.tar"), 4))


def test_more_workers_than_samples_are_too_many(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 1))
    with pytest.raises(FileError, match="worker 2 of 2: epoch without a sample"):
        read(BatchLoader(stream(tmp_path / "a.tar"), 2, num_workers=2))
    assert read(BatchLoader(stream(tmp_path / "a.tar"), 2, last_step=3)) == [["caption 0"] * 2] * 3
