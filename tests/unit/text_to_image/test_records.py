"""What a run of optimize leaves beside its images."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dalle_pytorch.errors import UsageError
from text_to_image import records
from text_to_image.records import check_extras, plot_loss, write_video

COLOURS = ("red", "green", "blue")


@pytest.fixture
def frames(tmp_path):
    paths = [tmp_path / f"{colour}.png" for colour in COLOURS]
    for path, colour in zip(paths, COLOURS, strict=True):
        Image.new("RGB", (24, 16), colour).save(path)
    return paths


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_a_video_by_pillow(tmp_path, frames, kind):
    write_video(tmp_path / f"a.{kind}", frames, kind)
    with Image.open(tmp_path / f"a.{kind}") as video:
        assert (video.format, video.n_frames, video.size, video.info["loop"]) == (kind.upper(), 3, (24, 16), 0)
        durations = []
        for number, colour in enumerate(COLOURS):
            video.seek(number)
            pixel, wanted = (np.asarray(image.convert("RGB"), int)[8, 12] for image in
                             (video, Image.new("RGB", (24, 16), colour)))  # fmt: skip
            assert np.abs(pixel - wanted).max() < 40
            durations.append(video.info["duration"])
    assert durations[0] == durations[1] < 100 and durations[2] == 2000


def test_a_video_of_one_frame(tmp_path, frames):
    write_video(tmp_path / "a.webp", frames[:1], "webp")
    assert Image.open(tmp_path / "a.webp").size == (24, 16)


def test_an_mp4(tmp_path, frames, monkeypatch):
    """By an imageio_ffmpeg that writes down what it is given."""
    given = []

    def write_frames(path, size, **options):
        given.append((size, options["fps"], options["output_params"]))
        while True:
            frame = yield
            given.append(frame)
            with open(path, "ab") as file:
                file.write(bytes(frame[0, 0]))

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace(write_frames=write_frames))
    write_video(tmp_path / "a.mp4", frames, "mp4")
    assert given[0] == ((24, 16), records.FPS, ["-f", "mp4"])
    assert all(frame.shape == (16, 24, 3) and frame.dtype == np.uint8 for frame in given[1:])
    assert len(given) == 1 + 3 + 2 * records.FPS  # the last one stays
    assert (tmp_path / "a.mp4").read_bytes()[:9] == b"\xff\0\0\0\x80\0\0\0\xff"


def test_a_real_mp4(tmp_path, frames):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    write_video(tmp_path / "a.mp4", frames, "mp4")
    meta, *found = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    assert meta["size"] == (24, 16) and len(found) == 3 + 2 * records.FPS
    assert np.abs(np.frombuffer(found[0], np.uint8).reshape(16, 24, 3)[8, 12].astype(int) - (255, 0, 0)).max() < 40


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_loss(tmp_path / "loss.png", [(1, 0.5, math.nan), (2, 0.4, 0.3)])
    with Image.open(tmp_path / "loss.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # both lines


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ffmpeg is missing: pip install 'dalle-diffusion\[optimize\]', or make"):
        check_extras("mp4", False)
    with pytest.raises(UsageError, match=r"matplotlib is missing: pip install 'dalle-diffusion\[optimize\]'$"):
        check_extras(None, True)
    check_extras("webp", False)
    monkeypatch.setattr(records, "find_spec", importlib.util.find_spec)
    check_extras(None, False)
