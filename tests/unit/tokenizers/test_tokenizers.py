"""Tokenizers: recorded ids, round trips, padding, length, unknown words, damaged files."""

import gzip
import hashlib
import json
import random
import runpy
import unicodedata
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.tokenizers.chinese import ChineseTokenizer
from dalle_pytorch.tokenizers.hug import HugTokenizer, train_bpe
from dalle_pytorch.tokenizers.load import load_tokenizer
from dalle_pytorch.tokenizers.simple import CLIP_VOCABULARY, SimpleTokenizer
from dalle_pytorch.tokenizers.yttm import YttmTokenizer

CAPTIONS = [glyphs.make_scene(i).caption for i in range(1500)]


@pytest.fixture
def hug(tmp_path) -> HugTokenizer:
    train_bpe(CAPTIONS, 384).save(str(tmp_path / "tokenizer.json"))
    return HugTokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def yttm(parity) -> YttmTokenizer:
    return YttmTokenizer(parity("tokenizers/yttm") / "bpe.model")


@pytest.fixture(scope="module")
def simple() -> SimpleTokenizer:
    return SimpleTokenizer()


# --------------------------------------------------------------------------------------------------
# tokenizer.json


def test_captions_survive(hug):
    unseen = [glyphs.make_scene(i, "test").caption for i in range(300)]
    assert all(hug.decode(hug.encode(caption)) == caption for caption in unseen)
    assert hug.decode(hug.encode("  A Red\tSEVEN\non  brick ")) == "a red seven on brick"
    assert max(max(hug.encode(caption)) for caption in unseen) < hug.vocab_size <= 384


def test_punctuation_is_no_part_of_a_word():
    tokenizer = train_bpe(["a dog's ball, isn't it? a ball."] * 9, 256)
    assert len(tokenizer.encode("ball").ids) == 1
    assert tokenizer.encode("ball.").ids[0] == tokenizer.encode("ball").ids[0]
    assert tokenizer.decode(tokenizer.encode("Isn't it a dog's ball?").ids) == "isn't it a dog's ball?"


def test_padding_and_length(hug):
    tokens = hug.tokenize(["a red seven", ""], 8)
    ids = hug.encode("a red seven")
    assert tokens.dtype == torch.int64 and tokens.tolist() == [ids + [0] * (8 - len(ids)), [0] * 8]
    assert 0 not in ids and torch.equal(hug.tokenize("a red seven", 8), tokens[:1])
    assert hug.decode(tokens[0]) == "a red seven"
    assert hug.decode(tokens[0], pad_tokens={ids[1]}) == "a seven"
    for error in (ValueError, RuntimeError):  # DALLE-pytorch raises the latter
        with pytest.raises(error, match=r"^[^\n]*'a red seven' has 3 tokens, expected at most 2$"):
            hug.tokenize("a red seven", 2)
    assert hug.tokenize("a red seven", 2, truncate_text=True).tolist() == [ids[:2]]


def test_unknown_words(hug):
    assert hug.unknown_words("a 猫, red 犬! seven 猫") == ["猫", "犬"]


def test_training_is_deterministic():
    first, second = (train_bpe(CAPTIONS, 256).to_str() for _ in range(2))
    assert first == second
    tokenizer = json.loads(first)
    assert [tokenizer["model"]["vocab"][token] for token in ("[PAD]", "[UNK]")] == [0, 1]
    assert train_bpe(CAPTIONS, 60).get_vocab_size() == 60


def test_padding_and_truncation_kept_in_a_file_are_off(tmp_path, hug):
    hug.tokenizer.enable_padding(length=40)
    hug.tokenizer.enable_truncation(2)
    hug.tokenizer.save(str(tmp_path / "padded.json"))
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "padded.json").read_bytes())
    for tokenizer in (HugTokenizer(tmp_path / "padded.json"), load_tokenizer(beside=tmp_path / "model")):
        assert tokenizer.decode(tokenizer.encode("a red seven")) == "a red seven" and len(tokenizer.encode("red")) == 1
        saved = json.loads(tokenizer.to_hugging_face().to_str())
        assert saved["padding"] is saved["truncation"] is None


def test_more_characters_than_tokens(caplog):
    letters = [chr(ord("一") + i) for i in range(1503)]
    captions = [letter * (2 if i < 900 else 1) for i, letter in enumerate(letters)]
    tokenizer = train_bpe(captions, 1000)
    assert tokenizer.get_vocab_size() == 1000 and tokenizer.to_str() == train_bpe(captions, 1000).to_str()
    assert "of 1503 different characters in the captions the 506 rarest become unknown" in caplog.text
    assert 1 not in tokenizer.encode("".join(letters[:997])).ids and tokenizer.encode(letters[997]).ids[-1] == 1
    # Rare characters leave room for words.
    tokenizer = train_bpe(["a red seven on brick"] * 9000 + ["".join(letters[:60])], 50)
    assert tokenizer.encode("a red 一").tokens == ["▁a", "▁red", "▁", "[UNK]"] and tokenizer.get_vocab_size() <= 50


def test_what_truncation_loses(hug, simple):
    assert hug.lost_text("a red seven on brick", 5) == "" and hug.lost_text("a red seven on brick", 3) == "on brick"
    assert hug.lost_text("a red  seven\non brick", 0) == "a red  seven\non brick"
    assert simple.lost_text("a photo of unbelievableness here", 4) == "unbelievableness here"
    assert simple.lost_text("猫猫犬", len(simple.encode("猫猫"))) == "犬"


def test_train_tokenizer(tmp_path, capsys):
    captions = tmp_path / "captions/deeper"
    captions.mkdir(parents=True)
    (captions / "0.txt").write_text("ein rotes Haus\n\nein blaues Haus\n", "utf-8")
    train_tokenizer = runpy.run_path(str(ROOT / "DALLE-pytorch/train_tokenizer.py"))["main"]
    output = tmp_path / "out.json"
    train_tokenizer(["--image_text_folder", str(tmp_path), "--vocab_size", "64", "--output", str(output)])
    tokenizer = HugTokenizer(output)
    assert len(tokenizer.encode("ein haus")) == 2 and "2 captions" in capsys.readouterr().out
    train_tokenizer(["--image_text_folder", str(tmp_path), "--vocab_size", "9", "--output", str(output)])
    assert HugTokenizer(output).vocab_size == 9 and "9 tokens from 2 captions" in capsys.readouterr().out
    train_tokenizer(["--image_text_folder", "glyphs", "--count", "50", "--output", str(tmp_path / "glyphs.json")])
    assert HugTokenizer(tmp_path / "glyphs.json").decode([0]) == ""


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"version": "1.0"}'])
def test_damaged_tokenizer_json(tmp_path, content):
    with pytest.raises(CheckpointError, match="there is no tokenizer file"):
        HugTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*tokenizer\.json is not a tokenizer\.json[^\n]*$"):
        HugTokenizer(tmp_path / "tokenizer.json")


# --------------------------------------------------------------------------------------------------
# YouTokenToMe


def test_yttm_as_recorded(parity, yttm):
    golden = json.loads((parity("tokenizers/yttm") / "golden.json").read_text("utf-8"))
    assert yttm.vocab_size == golden["vocab_size"]
    assert [yttm.encode(text) for text in golden["texts"]] == golden["ids"]
    assert [yttm.decode(ids) for ids in golden["ids"]] == golden["decoded"]
    assert yttm.unknown_words("UPPER lower Mixed") == ["UPPER", "Mixed"]


def test_yttm_by_definition(parity, yttm):
    """Against the algorithm written out: the whole word again after each merge."""
    lines = (parity("tokenizers/yttm") / "bpe.model").read_text().splitlines()
    num_characters, num_merges = map(int, lines[0].split())
    characters = {chr(int(code)): int(i) for code, i in (line.split() for line in lines[1 : num_characters + 1])}
    merges = [tuple(map(int, line.split())) for line in lines[num_characters + 1 :][:num_merges]]

    def encode(word: str) -> list[int]:
        ids = [characters["▁"]]
        for character in word:
            if character in characters:
                ids.append(characters[character])
            elif ids[-1] != 1:
                ids.append(1)
        for left, right, merged in merges:
            at = 0
            while at + 1 < len(ids):
                if ids[at : at + 2] == [left, right]:
                    ids[at : at + 2] = [merged]
                at += 1
        return ids

    random.seed(0)
    letters = [character for character in characters if character != "▁"] + ["x", "X", "?"]
    for _ in range(300):
        words = ["".join(random.choices(letters, k=random.randint(1, 12))) for _ in range(random.randint(0, 4))]
        assert yttm.encode("  ".join(words)) == [i for word in words for i in encode(word)]


def test_yttm_as_tokenizer_json(tmp_path, parity, yttm):
    yttm.to_hugging_face().save(str(tmp_path / "tokenizer.json"))
    hug = HugTokenizer(tmp_path / "tokenizer.json")
    golden = json.loads((parity("tokenizers/yttm") / "golden.json").read_text("utf-8"))
    assert [hug.encode(text) for text in golden["texts"]] == golden["ids"]
    assert [hug.decode(ids) for ids in golden["ids"]] == golden["decoded"]
    assert hug.vocab_size == yttm.vocab_size and hug.unknown_words("UPPER lower") == ["UPPER"]


def test_two_yttm_tokens_may_spell_the_same(tmp_path):
    path = tmp_path / "bpe.model"
    # ▁ a b c; ab+c and a+bc both spell abc.
    path.write_text("4 4\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n6 7 9\n8 7 10\n5 9 11\n1 0 2 3\n")
    tokenizer = YttmTokenizer(path)
    assert tokenizer.encode("abc bc") == [4, 10, 4, 9] and tokenizer.decode([4, 11, 4, 10]) == "abc abc"
    with pytest.raises(ValueError, match="spell the same"):
        tokenizer.to_hugging_face()
    with pytest.raises(ValueError, match="expected tokens below 12, got 99"):
        tokenizer.decode([99])


@pytest.mark.parametrize("content", ["", "1", "no numbers", "1 0\n97 4\n1 0 2 3\n", "2 1\n9601 4\n97 5\n4 5 6\n",
                                     "2 1\n9601 4\n97 5\n4 9 6\n1 0 2 3\n", "-1 0\n1 0 2 3"])  # fmt: skip
def test_damaged_yttm(tmp_path, content):
    (tmp_path / "bpe.model").write_text(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*bpe\.model[^\n]*$"):
        YttmTokenizer(tmp_path / "bpe.model")


def test_yttm_merges_that_double(tmp_path):
    """▁, a, and merges of the last token with itself: 2^30 characters in some hundred bytes."""
    merges = "\n".join(f"{i} {i} {i + 1}" for i in range(5, 35))
    (tmp_path / "bpe.model").write_text(f"2 30\n9601 4\n97 5\n{merges}\n1 0 2 3\n")
    with pytest.raises(CheckpointError, match=r"bpe\.model .* more than 1,000 characters"):
        YttmTokenizer(tmp_path / "bpe.model")
    (tmp_path / "bpe.model").write_text("2 1\n9601 4\n97 5\n4 5 600\n1 0 2 3\n")
    with pytest.raises(CheckpointError, match="not numbered from 0 on"):
        YttmTokenizer(tmp_path / "bpe.model")


# --------------------------------------------------------------------------------------------------
# CLIP's vocabulary


def test_simple_as_recorded(parity, simple):
    golden = json.loads((parity("tokenizers/clip_bpe") / "golden.json").read_text("utf-8"))
    assert [simple.encode(text) for text in golden["texts"]] == golden["ids"]
    assert simple.vocab_size == 49408
    assert simple.decode([49406, *simple.encode("A small  DOG!"), 49407, 0]) == "a small dog !"
    assert simple.encode("<|startoftext|>a<|endoftext|>") == [49406, 320, 49407]
    assert simple.unknown_words("猫 zzzqqq") == []
    # As CLIP's own clean-up has it, with ftfy 6.3.1.
    for text, mended in (("eﬃcient ﬁsh", "efficient fish"), ("l’humanitÃ©", "l'humanité"), ("ＬＯＵＤ", "loud"),
                         ("&amp;lt;3", "<3")):  # fmt: skip
        assert simple.encode(text) == simple.encode(mended)


def test_simple_against_another_implementation(simple, monkeypatch):
    """Ids of 300 strings of odd characters by instant-clip-tokenizer 0.1.1, which has NFC in place of ftfy."""
    monkeypatch.setattr("ftfy.fix_text", lambda text: unicodedata.normalize("NFC", text))
    recorded = json.loads(Path(__file__).with_name("clip_ids.json").read_text("utf-8"))
    assert [(text, simple.encode(text)) for text, _ in recorded] == [(text, ids) for text, ids in recorded]


def test_clip_vocabulary_is_openais():
    digest = hashlib.sha256(CLIP_VOCABULARY.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert "Copyright (c) 2021 OpenAI" in CLIP_VOCABULARY.with_name("bpe_simple_vocab_16e6.LICENSE").read_text()


def test_simple_from_files(tmp_path, simple):
    text = gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode()
    (tmp_path / "merges.txt").write_text(text, "utf-8")
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(text.encode()))
    merges = [line.split() for line in text.split("\n")[1:48895]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}), "utf-8")
    for name in ("merges.txt", "vocab.txt.gz", "tokenizer.json"):
        assert SimpleTokenizer(tmp_path / name).encode("a photo of a dog") == simple.encode("a photo of a dog")
    assert isinstance(load_tokenizer(tmp_path / "vocab.txt.gz"), SimpleTokenizer)


@pytest.mark.parametrize("content", [b"", b"#version\na b\n", b"\xff\xfe", b"\x1f\x8bno gzip", b'{"model": 1}'])
def test_damaged_clip_vocabulary(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*vocab\.txt[^\n]*$"):
        SimpleTokenizer(tmp_path / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"none\.txt is missing"):
        SimpleTokenizer(tmp_path / "none.txt")


def test_clip_vocabulary_that_unpacks_without_end(tmp_path):
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(b"\n" * 2**25))
    with pytest.raises(CheckpointError, match="longer than 16,777,216 characters"):
        SimpleTokenizer(tmp_path / "vocab.txt.gz")


# --------------------------------------------------------------------------------------------------
# BERT, and which one


def test_chinese_from_a_folder(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "猫", "红", "色", "的", "a", "##b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = ChineseTokenizer(tmp_path)
    assert tokenizer.vocab_size == len(words)
    assert tokenizer.encode("红色的猫 AB") == [6, 7, 8, 5, 9, 10]
    assert tokenizer.tokenize("红色", 4).tolist() == [[6, 7, 0, 0]]
    assert tokenizer.decode([6, 7, 8, 5, 0, 0]).replace(" ", "") == "红色的猫"
    assert tokenizer.unknown_words("猫 狗") == ["狗"]
    assert isinstance(load_tokenizer(tmp_path, chinese=True), ChineseTokenizer)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"^[^\n]*is not a folder with a BERT vocabulary[^\n]*$"):
        ChineseTokenizer(tmp_path / "nothing")
    # transformers makes up a vocabulary of special tokens: every word would be unknown.
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"^[^\n]*empty is not a folder with a BERT vocabulary[^\n]*$"):
        ChineseTokenizer(tmp_path / "empty")
    (tmp_path / "empty/vocab.txt").write_text("\n".join(words[:5]))
    with pytest.raises(CheckpointError, match="it has no words"):
        ChineseTokenizer(tmp_path / "empty")


def test_which_one(tmp_path, hug, parity):
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), HugTokenizer)
    assert isinstance(load_tokenizer(parity("tokenizers/yttm") / "bpe.model"), YttmTokenizer)
    (tmp_path / "dalle").mkdir()
    beside = load_tokenizer(beside=tmp_path / "dalle")
    assert isinstance(beside, HugTokenizer) and beside.vocab_size == hug.vocab_size
    assert load_tokenizer().encode("a photo of a dog") == [320, 1125, 539, 320, 1929]
