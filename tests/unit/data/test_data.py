"""Folders of pictures, and the order in which any map-style data is read."""

import json
import re
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.data.captions import all_captions
from dalle_pytorch.data.datasets import open_dataset
from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import BatchLoader, BrokenSample, SampleDataset, Skipped
from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.images import image_to_tensor


def add(folder, name, caption="a picture", size=(40, 40), colour=(200, 30, 30), mode="RGB"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def noise(path, size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text("noise")


class Numbers(SampleDataset):
    """Samples that tell their index; those in `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSample("broken image", index)
        return {"x": torch.tensor(index)}


def read(dataset, batch_size, **settings):
    return [batch["x"].tolist() for batch in BatchLoader(dataset, batch_size, **settings)]


def flat(batches):
    return list(chain.from_iterable(batches))


# --------------------------------------------------------------------------------------------------
# Order


def test_every_epoch_is_a_permutation_and_differs():
    samples = flat(read(Numbers(10), 5, last_step=4))
    assert sorted(samples[:10]) == sorted(samples[10:]) == list(range(10)) and samples[:10] != samples[10:]
    assert samples == flat(read(Numbers(10), 5, last_step=4))
    assert samples != flat(read(Numbers(10), 5, last_step=4, seed=1))


def test_batches_go_on_where_they_stopped():
    whole = read(Numbers(10), 3, last_step=8, seed=1)
    assert len(whole) == 8 and whole[5:] == read(Numbers(10), 3, first_step=5, last_step=8, seed=1)


@pytest.mark.parametrize("length", [10, 11, 12])
def test_samples_of_a_step_do_not_depend_on_how_it_is_shared(length):
    data = Numbers(length)
    whole = [sorted(batch) for batch in read(data, 8, last_step=6)]
    ranks = [read(data, 8, last_step=6, rank=rank, world_size=2) for rank in (0, 1)]
    halves = read(data, 4, last_step=12)
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == whole
    assert [sorted(a + b) for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


def test_workers_change_nothing_and_broken_samples_are_replaced():
    data = Numbers(20, broken=(3, 4, 17))
    results = []
    for num_workers in (0, 2):
        loader = BatchLoader(data, 4, last_step=10, num_workers=num_workers)
        results.append([batch["x"].tolist() for batch in loader])
        assert loader.skipped == {"broken image": 6} and loader.epoch == 2 and loader.steps_per_epoch == 5
        assert loader.examples["broken image"] in {f"{i}: broken image" for i in data.broken}
    assert results[0] == results[1]
    assert all(len(batch) == 4 and not {3, 4, 17} & set(batch) for batch in results[0])


def test_over_half_broken_stops_with_the_counts():
    with pytest.raises(FileError, match=r"(\d+) of \d+ samples cannot be used: \1 × broken image; for example \d+: "):
        read(Numbers(1000, broken=range(600)), 10, last_step=100)
    with pytest.raises(FileError, match="3 of 4 samples"):
        read(Numbers(4, broken=(0, 1, 2)), 4, last_step=10)
    with pytest.raises(FileError, match="2 of 2 samples"):
        read(Numbers(2, broken=(0, 1)), 2, last_step=10)


def test_half_broken_goes_on():
    assert len(read(Numbers(1000, broken=range(400)), 10, last_step=100)) == 100


# --------------------------------------------------------------------------------------------------
# Folders


def test_write_folder_makes_an_image_text_folder(tmp_path):
    glyphs.write_folder(tmp_path, 3, resolution=64)
    data = ImageTextFolder(tmp_path, 64)
    assert len(data) == 3 and data[1]["caption"] == glyphs.make_scene(1).caption
    assert np.array_equal(data[1]["image"].permute(1, 2, 0), glyphs.draw(glyphs.make_scene(1), 64))


def test_nested_folders_and_formats(tmp_path):
    names = ["a.png", "b/c.JPG", "b/d/e.webp", "f.bmp", "g.gif", "h.tif"]
    for name in names:
        add(tmp_path, name, caption=name)
    add(tmp_path, ".hidden.png")
    add(tmp_path, "captions.apart/x.png", caption=None)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("from elsewhere")
    data = ImageTextFolder(tmp_path, 16)
    captions = {data[i]["caption"] for i in range(len(data))}
    assert captions == {*names, "from elsewhere"}
    images = [data[i]["image"] for i in range(len(data))]
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in images)


def test_stem_that_several_have_pairs_only_side_by_side(tmp_path):
    add(tmp_path, "a/0.png", caption="of a")
    add(tmp_path, "b/0.png", caption=None)
    data = ImageTextFolder(tmp_path, 16)
    assert data.images == ["a/0.png"] and data.left_out == {"image without caption": 1}


def test_missing_pairs_are_counted_once_an_epoch_on_the_first_process(tmp_path):
    for i in range(4):
        add(tmp_path, f"{i}.png")
    add(tmp_path, "alone.png", caption=None)
    (tmp_path / "readme.txt").write_text("about these pictures")
    data = ImageTextFolder(tmp_path, 16)
    for rank, times in ((0, 2), (1, 0)):
        loader = BatchLoader(data, 4, last_step=2, rank=rank, world_size=2)
        list(loader)
        assert loader.skipped["image without caption"] == loader.skipped["caption without image"] == times


def test_pictures_alone(tmp_path):
    add(tmp_path, "a.png", caption=None)
    item = open_dataset(tmp_path, 16, captions=False)[0]
    assert set(item) == {"image"}


def test_caption_of_several_is_drawn_by_epoch(tmp_path):
    add(tmp_path, "a.png", caption="one\n\n two \nthree\r\n")
    data = ImageTextFolder(tmp_path, 16)

    def captions(**settings):
        return [batch["caption"][0] for batch in BatchLoader(data, 1, last_step=30, **settings)]

    assert set(captions()) == {"one", "two", "three"}
    assert captions() == captions(num_workers=2) != captions(seed=1)
    assert data[0]["caption"] == "one"


def test_captions_of_other_tools(tmp_path):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.caption").write_text("of a")
    add(tmp_path, "b.png", caption="of b")
    (tmp_path / "b.caption").write_text("not read")
    add(tmp_path, "deep/c.png", caption=None)
    add(tmp_path, "deep/d.png", caption=None)
    rows = [{"file_name": "c.png", "text": "of c"}, {"file_name": "d.png", "text": ["of d", "of it"]},
            {"file_name": "gone.png", "text": "of none"}]  # fmt: skip
    (tmp_path / "deep/metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    add(tmp_path, "table/e.png", caption=None)
    (tmp_path / "table/metadata.csv").write_text('\ufefffile_name,blurb,text\r\ne.png,"of ""e"",\nand more",short\r\n')
    data = ImageTextFolder(tmp_path, 16, caption_key="blurb")
    captions = {image: data.all_captions(i) for i, image in enumerate(data.images)}
    assert captions == {"a.png": ["of a"], "b.png": ["of b"], "deep/c.png": ["of c"], "deep/d.png": ["of d", "of it"],
                        "table/e.png": ['of "e", and more']}  # fmt: skip
    assert data.left_out == {"caption without image": 2}
    assert {part.name for part in data.identity() if isinstance(part, Path)} >= {"metadata.jsonl", "metadata.csv"}
    assert set(all_captions(str(tmp_path), Skipped(), caption_key="blurb")) == {
        *chain.from_iterable(captions.values()), "of none", "not read"}  # fmt: skip


@pytest.mark.parametrize("content, said", [
    ('{"file_name": "a.png", "title": "x"}', "has no captions as 'caption', 'text' or 'caption', but file_name,"),
    ('{"text": "x"}', "has no 'file_name'"), ("{", "cannot be read"), ("3", "cannot be read"), ("[" * 99_999, "cannot"),
])  # fmt: skip
def test_metadata_that_cannot_be_read_is_told(tmp_path, content, said):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(FileError, match=rf"metadata\.jsonl {said}"):
        ImageTextFolder(tmp_path, 16)


def test_what_a_folder_holds_instead_is_told(tmp_path):
    for name in ("a.heic", "b.heic", "c.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(FileError, match=r"there are 2 × \.heic, 1 × \.parquet"):
        ImageTextFolder(tmp_path, 16)


def test_messages_are_cut(tmp_path):
    add(tmp_path, "a.png", caption="x" * 100_000)
    data = ImageTextFolder(tmp_path, 16, caption_problem=lambda caption: "long caption")
    with pytest.raises(BrokenSample, match="long caption") as error:
        data[0]
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text, reason", [
    (b"", "empty caption"), (b"\n  \n", "empty caption"), ("café".encode("latin-1"), "caption that is not UTF-8"),
])  # fmt: skip
def test_captions_that_are_skipped(tmp_path, text, reason):
    path = add(tmp_path, "a.png")
    path.with_suffix(".txt").write_bytes(text)
    with pytest.raises(BrokenSample) as error:
        ImageTextFolder(tmp_path, 16)[0]
    assert error.value.reason == reason and "a.txt" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_tell_themselves(tmp_path, encoding):
    add(tmp_path, "a.png").with_suffix(".txt").write_bytes("红色 café".encode(encoding))
    assert ImageTextFolder(tmp_path, 16)[0]["caption"] == "红色 café"


def test_caption_problem_skips_that_caption(tmp_path):
    add(tmp_path, "a.png", caption="short\nfar too long a caption")
    add(tmp_path, "b.png", caption="another one that is too long")
    data = ImageTextFolder(tmp_path, 16, caption_problem=lambda c: "long caption" if len(c) > 10 else None)
    assert {data.sample(0, np.random.default_rng(i))["caption"] for i in range(9)} == {"short"}
    with pytest.raises(BrokenSample, match="long caption"):
        data[1]


def test_centre_square_is_as_generate_sees_it(tmp_path):
    noise(tmp_path / "a.png", (50, 40))
    expected = image_to_tensor(Image.open(tmp_path / "a.png"), 16)[0].mul(255).round().to(torch.uint8)
    data = ImageTextFolder(tmp_path, 16, crop_ratio=1)
    assert torch.equal(data.sample(0, np.random.default_rng(0))["image"], expected)


def test_random_crop_is_drawn_by_epoch_and_keeps_its_share(tmp_path):
    noise(tmp_path / "a.png", (64, 64))
    data = ImageTextFolder(tmp_path, 16, crop_ratio=0.5)
    images = [batch["image"] for batch in BatchLoader(data, 1, last_step=6)]
    again = [batch["image"] for batch in BatchLoader(data, 1, first_step=2, last_step=6, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(images[2:], again, strict=True))
    assert not torch.equal(images[0], images[1])

    # Where the corners of a slope end up tells the crop's sides.
    slope = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    Image.fromarray(np.ascontiguousarray(slope)).save(tmp_path / "a.png")
    spans = []
    for i in range(200):
        row = data.sample(0, np.random.default_rng(i))["image"][0, 0].float()
        spans.append(float(row[-1] - row[0]) * 16 / 15 / 256)
    assert min(spans) > 0.5**0.5 - 0.03 and max(spans) < 1.01 and np.ptp(spans) > 0.2


def test_random_crops_reach_all_edges(tmp_path):
    across = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    Image.fromarray(np.stack((across, across.T, across), axis=2)).save(tmp_path / "a.png")
    data = ImageTextFolder(tmp_path, 16, captions=False, crop_ratio=0.25)
    crops = torch.stack([data.sample(0, np.random.default_rng(i))["image"] for i in range(200)])
    for edge in (crops[:, 0, 0, 0], crops[:, 1, 0, 0], 255 - crops[:, 0, 0, -1], 255 - crops[:, 1, -1, 0]):
        # Up to half of the image is cut off there, or nothing.
        assert edge.min() < 12 and edge.max() > 90


@pytest.mark.parametrize("mode, colour", [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)])
def test_transparency_is_laid_over_white(tmp_path, mode, colour):
    image = Image.new(mode, (20, 20), colour)
    image.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert (open_dataset(tmp_path, 16, captions=False)[0]["image"] == 255).all()
    pixels = open_dataset(tmp_path, 16, captions=False, transparent=True)[0]["image"]
    assert pixels.shape == (4, 16, 16) and (pixels[3] == 0).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16", "P"])
def test_other_kinds_of_pixels(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 257 * 100, np.uint16))
    else:
        image = Image.new("L", (20, 20), 100).convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    pixels = open_dataset(tmp_path, 16, captions=False)[0]["image"]
    assert pixels.shape == (3, 16, 16)
    if mode != "1":
        assert (pixels.float() - 100).abs().max() < 6


def test_camera_held_sideways(tmp_path):
    image = Image.new("RGB", (40, 40), "white")
    image.paste((0, 0, 0), (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = open_dataset(tmp_path, 16, captions=False)[0]["image"].float()
    assert pixels[:, :6].mean() < 10 and pixels[:, 10:].mean() > 245


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone", "folder", "postscript"])
def test_broken_pictures_are_skipped(tmp_path, damage):
    noise(tmp_path / "b.png", (30, 30))
    noise(tmp_path / "a.png", (60, 60))
    path = tmp_path / "b.png"
    data = ImageTextFolder(tmp_path, 16)
    content = {"truncated": path.read_bytes()[:1000], "text": b"no picture", "empty": b"",
               "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}  # fmt: skip
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(content[damage])
    with pytest.raises(BrokenSample, match=r"b\.png: broken image"):
        data[1]
    loader = BatchLoader(data, 2, last_step=1)
    assert len(next(iter(loader))["image"]) == 2 and loader.skipped == {"broken image": 1}


def test_decompression_bomb_is_an_error(tmp_path, monkeypatch):
    add(tmp_path, "a.png", size=(60, 60))
    monkeypatch.setattr("dalle_pytorch.files.images.LARGEST_IMAGE", 2000)
    with pytest.raises(BrokenSample, match=r"broken image \(60×60 pixels, expected at most 2000"):
        ImageTextFolder(tmp_path, 16)[0]


def test_what_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(FileError, match="there is no folder"):
        open_dataset(tmp_path / "nowhere", 16)
    with pytest.raises(FileError, match="no images with captions"):
        open_dataset(tmp_path, 16)
    with pytest.raises(FileError, match="holds no images;"):
        open_dataset(tmp_path, 16, captions=False)
    for i in range(3):
        add(tmp_path, f"{i}.png", caption=None)
    with pytest.raises(FileError, match="no images with captions"):
        open_dataset(tmp_path, 16)
    add(tmp_path, "pair.png")
    with pytest.raises(FileError, match="over half of the 4 images"):
        open_dataset(tmp_path, 16)
    with pytest.raises(FileError, match="holds no archives"):
        open_dataset(tmp_path, 16, wds="jpg,txt")
    with pytest.raises(FileError, match="--wds jpg,txt"):
        open_dataset(tmp_path / "data-{0..3}.tar", 16)
    with pytest.raises(FileError, match="--wds jpg,txt"):
        open_dataset("pipe:cat data.tar", 16)
    with pytest.raises(FileError, match="suffixes of pictures and captions"):
        open_dataset(tmp_path, 16, wds="jpg,txt,cls")
    with pytest.raises(FileError, match="suffixes of pictures and captions"):
        open_dataset(tmp_path, 16, wds="jpg")
    with pytest.raises(FileError, match="takes no --wds"):
        open_dataset("glyphs", 16, wds="jpg,txt")
    for query in ("sky=2", "twins=2", "terse_every=often", "resolution=64", "twins=["):
        known = "there are count: int, split: str, of: str, terse_every: int"
        with pytest.raises(UsageError, match=re.escape(f"data set glyphs: no option {query}; {known}")):
            open_dataset(f"glyphs?{query}", 16)
    for name, resolution, message in (("glyphs", 20, "multiples of 16"), ("glyphs?split=moon", 16, "got 'moon'"),
                                      ("glyphs?count=0", 16, "count must be at least 1")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            open_dataset(name, resolution)


def test_glyphs_have_no_end_but_a_door():
    batch = next(iter(BatchLoader(open_dataset("glyphs", 32), 2, last_step=1)))
    assert batch["image"].shape == (2, 3, 32, 32) and batch["mask"].ndim == 3 and "negative_captions" not in batch
    batch = next(iter(BatchLoader(open_dataset("glyphs?wrong_captions=4", 32), 2, last_step=1)))
    assert [len(row) for row in batch["negative_captions"]] == [4, 4]


def test_endless_without_a_last_step():
    assert len(list(islice(BatchLoader(Numbers(3), 2), 20))) == 20
