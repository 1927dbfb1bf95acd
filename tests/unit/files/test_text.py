"""Texts in the encodings that editors write, wherever one is read."""

import gzip
import json

import pytest

from dalle_pytorch.errors import FileError, UserError
from dalle_pytorch.files.text import decode_text, one_line, read_text
from dalle_pytorch.pretrained import read_config
from dalle_pytorch.published.unpickler import read_yaml
from dalle_pytorch.tokenizers.hug import HugTokenizer, train_bpe
from dalle_pytorch.tokenizers.simple import CLIP_VOCABULARY, SimpleTokenizer
from dalle_pytorch.tokenizers.yttm import YttmTokenizer
from dalle_pytorch.training.commands.train_tokenizer import TrainTokenizerSettings
from text_to_image.inputs import read_caption, read_prompts

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, encoding):
    def write(name, text):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    assert read_text(write("a.txt", "红 é\n")) == "红 é\n"
    assert read_prompts(None, write("prompts.txt", "A red seven\r\n\r\na star\n")) == ["a red seven", "a star"]
    assert read_caption(write("caption.txt", "A red  seven\n")) == "a red seven"
    assert read_config(write("config.json", '{"class": "CLIP"}').parent) == {"class": "CLIP"}
    assert read_yaml(write("model.yaml", "model: 3")) == {"model": 3}
    assert TrainTokenizerSettings.parse(["--config", str(write("run.yaml", "image_text_folder: é"))]).vocab_size == 4096
    saved = write("tokenizer.json", train_bpe(["a red seven"] * 9, 64).to_str())
    assert HugTokenizer(saved).decode(HugTokenizer(saved).encode("a seven")) == "a seven"
    model = write("bpe.model", "2 1\n9601 4\n97 5\n4 5 6\n1 0 2 3\n")
    assert YttmTokenizer(model).encode("a") == [6]
    merges = write("merges.txt", gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode())
    assert SimpleTokenizer(merges).encode("a small dog") == [320, 2442, 1929]


def test_marks_inside_joined_files():
    assert one_line(" a\ufeff  b\n") == "a b" and json.loads(decode_text('{"\ufeff": 1}'.encode())) == {"\ufeff": 1}


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfea", b"\xff\xfe\x00\xd8a\x00"])
def test_other_encodings_are_told(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(FileError, match=r"^[^\n]*a\.txt is not a text in (UTF-8|the UTF-16 that[^\n]*) \(byte \d+"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt"):
        read_prompts(None, tmp_path / "a.txt")
