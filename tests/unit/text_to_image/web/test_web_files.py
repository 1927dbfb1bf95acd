"""Files of visitors, and pieces of HTML with their text."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.files.tokens import load_tokens, save_tokens
from text_to_image.results import Result, ResultImage
from text_to_image.web import html
from text_to_image.web.files import Folders, preview, read_picture, read_tokens, write_files
from text_to_image.web.forms import Diffusion, Generation, Saved
from text_to_image.web.server import check_access
from text_to_image.web.uploads import rename


def image_of(index, shade):
    return ResultImage(index, torch.arange(256), torch.full((3, 64, 64), shade), 0.5)


def test_files_have_names_of_their_own(tmp_path):
    first, second = image_of(3, 0.2), image_of(0, 0.4)
    diffused = Result([first]).with_upscaled([[torch.ones(3, 128, 128)]])
    saved = Saved(Generation("../../etc/passwd"), Diffusion([3, 0]))
    paths = write_files(tmp_path, Result([first, second], saved.generation.prompt), diffused, saved)
    assert [path.name for path in paths] == ["candidate-3.png", "candidate-3.npy", "candidate-3-diffused.png",
                                             "candidate-0.png", "candidate-0.npy", "settings.json"]  # fmt: skip
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert np.asarray(Image.open(paths[0])).mean() == 51 and Image.open(paths[2]).size == (128, 128)
    assert torch.equal(load_tokens(paths[1], 256), first.tokens)
    assert json.loads(paths[-1].read_text())["prompt"] == "../../etc/passwd"


def test_files_are_there_while_they_are_written(tmp_path):
    folders = Folders.inside(tmp_path)
    with folders.writing() as folder:
        (folder / "a").touch()
        assert folder.parent == folders.written and folder.stat().st_mode & 0o77 == 0
    assert list(folders.written.iterdir()) == [] and folders.served.is_dir()


def test_a_picture_is_its_centre_square(tmp_path):
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    picture.save(tmp_path / "upload", "PNG")
    read = read_picture(tmp_path / "upload")
    assert read.size == (512, 512) and np.asarray(read).reshape(-1, 3).min(0).tolist() == [0, 0, 255]
    shown = np.asarray(preview(read, 0.25)).astype(int)
    assert (shown[:128] == [0, 0, 255]).all() and (abs(shown[128:] - [96, 96, 160]) < 2).all()


def test_what_is_no_picture_is_refused_without_its_path(tmp_path):
    (tmp_path / "upload").write_text("no picture")
    with pytest.raises(FileError, match="the picture cannot be used: ") as raised:
        read_picture(tmp_path / "upload")
    assert str(tmp_path) not in str(raised.value)


def test_uploaded_tokens(tmp_path):
    save_tokens(tmp_path / "upload", torch.arange(16))
    assert torch.equal(read_tokens(tmp_path / "upload", 16, 16), torch.arange(16))
    for size, length, said in ((15, 16, "the file: expected tokens from 0 to 14"), (16, 25, "expected 25 tokens")):
        with pytest.raises(FileError, match=said) as raised:
            read_tokens(tmp_path / "upload", size, length)
        assert str(tmp_path) not in str(raised.value)
    (tmp_path / "upload").write_text("no tokens")
    with pytest.raises(FileError, match="the file is not a usable token file") as raised:
        read_tokens(tmp_path / "upload", 16, 16)
    assert str(tmp_path) not in str(raised.value)


BODY = (b'--b0und\r\nContent-Disposition: form-data; name="files"; filename="../../a;\\"b.png"\r\n'
        b'Content-Type: image/png\r\n\r\nfilename="kept"\r\n\r\nfilename="kept"\r\n'
        b"--b0und\r\ncontent-disposition: form-data; name=\"files\"; filename*=utf-8''%2e%2e\r\n\r\nx\r\n"
        b"--b0und--\r\n")  # fmt: skip


def test_uploaded_files_get_another_name():
    renamed = rename(BODY, b"b0und")
    assert renamed.count(b'filename="upload"') == 2 and renamed.count(b'filename="kept"') == 2
    assert b".." not in renamed and b"b.png" not in renamed and b"%2e" not in renamed
    assert renamed.count(b"--b0und") == BODY.count(b"--b0und") and renamed.endswith(b"x\r\n--b0und--\r\n")


def test_text_of_visitors_is_escaped():
    for said in (html.status("<b>"), html.note("<b>"), html.marked("a <b>", {"<b>"}, ""), html.marked("a", (), "<b>")):
        assert "&lt;b&gt;" in said and "<b>" not in said


def test_unknown_words_are_marked():
    said = html.marked("a жук on a жук", ["жук"], "")
    assert said.count("<mark>жук</mark>") == 2 and "never seen" in said and "<mark>a</mark>" not in said
    assert html.marked("a red seven", [], "") == ""
    assert "does not read “on wood”" in html.marked("a red seven on wood", [], "on wood")


def test_picked_images_are_framed():
    style = html.pick_style([0, 4])
    assert "> :has([alt^='#0 '])::before" in style and "> :has([alt^='#4 '])::after" in style and "#1" not in style
    assert html.pick_style([]) == ""


@pytest.mark.parametrize("host, share, auth", [
    ("0.0.0.0", False, []), ("192.168.1.2", False, []), ("127.0.0.1", True, []), ("127.0.0.1", False, ["ada"]),
    ("127.0.0.1", False, ["ada:"]), ("127.0.0.1", False, [":secret"]), ("::", False, []), ("", False, []),
])  # fmt: skip
def test_a_page_for_others_needs_accounts(host, share, auth):
    with pytest.raises(UsageError, match="--auth NAME:PASSWORD"):
        check_access(host, share, auth)


def test_accounts():
    assert check_access("127.0.0.1", False, []) == [] and check_access("localhost", False, []) == []
    assert check_access("0.0.0.0", True, ["ada:a:b"]) == [("ada", "a:b")]
