"""The boundary around files from elsewhere: one refusal, of one line, whatever failed."""

import json

import pytest
import torch

from dalle_pytorch.checks import check_types, check_values
from dalle_pytorch.errors import CheckpointError, FileError, UsageError
from dalle_pytorch.files.boundary import opening, opens
from dalle_pytorch.files.documents import read_json, read_yaml
from dalle_pytorch.pretrained import PretrainedModel, construct, load_state
from dalle_pytorch.tokenizers.hug import HugTokenizer
from dalle_pytorch.vae.discrete import DiscreteVAE


class PanicException(BaseException):
    """As pyo3's, which has no place to import it from."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("weights"), "model.pt is no model: missing 'weights'"),
        (ValueError("a\nb"), "model.pt is no model: a"),
        (AssertionError(), "model.pt is no model: AssertionError"),
        (RecursionError(), "model.pt is no model: it is nested too deeply"),
        (MemoryError(), "model.pt is no model: it needs more memory than there is"),
        (UsageError("4 heads"), "model.pt is no model: 4 heads"),
        (PanicException("in Rust"), "model.pt is no model: in Rust"),
        (PermissionError(13, "Permission denied", "x"), "model.pt cannot be read (Permission denied)"),
        (FileNotFoundError(2, "No such file", "model.yaml"), "model.yaml is missing"),
    ],
)
def test_whatever_fails_is_a_refusal_with_its_cause(error, said):
    with pytest.raises(CheckpointError) as refused, opening("model.pt", "is no model"):
        raise error
    assert str(refused.value) == said and refused.value.__cause__ is error


def test_the_innermost_refusal_stays_and_interruptions_pass():
    inner = opening("tokens.npy", "is no array", FileError)
    with pytest.raises(FileError, match=r"^tokens\.npy is no array: cut$"), opening("model"), inner:
        raise EOFError("cut")
    with pytest.raises(KeyboardInterrupt), opening("model"):
        raise KeyboardInterrupt

    @opens
    def load(path=None, other=None):
        raise IndexError("5")

    with pytest.raises(CheckpointError, match=r"^b\.pt cannot be opened: 5$"):
        load(other="b.pt")


def test_messages_are_short_and_show_no_control_characters():
    with pytest.raises(CheckpointError) as refused, opening("a\x1b]0;owned\x07\u202e.pt", "x" * 5000 + "\n"):
        raise ValueError("the end\udcff")
    message = str(refused.value)
    assert message.startswith("a\\x1b]0;owned\\x07\\u202e.pt xxx") and len(message) <= 290 and message.isprintable()
    assert message.endswith("the end\\udcff")


# Documents


def test_aliases_of_aliases_are_refused(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    for text in ("\n".join(lines), "a: &a [*a]", "x: " + "[" * 5000, "#" * 200_000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.yaml is no YAML: "), opening(path, "is no YAML"):
            read_yaml(path)


def test_nested_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"), opening("config.json"):
        read_json(tmp_path / "config.json")


# Settings and weights


@pytest.mark.parametrize("value", [10**9, -2, float("nan"), float("inf"), [[3, 10**9]], {"depth": -1}, "x" * 20_000])
def test_numbers_that_no_model_has(value):
    with pytest.raises(ValueError, match=r"it is|depth is"):
        check_values(value)
    check_values({"num_head_channels": -1, "pad_token_id": -1, "mean": -0.5, "sizes": [1, 2**20]})


def test_values_are_counted_as_often_as_they_are_named():
    shared = [0, 0]
    for _ in range(60):
        shared = [shared, shared]
    with pytest.raises(ValueError, match="longer than any setting"):
        check_values({"attn_types": shared})


def test_types_are_those_declared():
    for settings in ({"image_size": 64.0}, {"image_size": True}, {"num_layers": 0}, {"num_layers": -3},
                     {"temperature": "1"}, {"straight_through": 2}, {"normalization": [1]}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            check_types(DiscreteVAE, settings)
    check_types(DiscreteVAE, {"image_size": 64, "temperature": 1, "straight_through": 1, "normalization": None})


@pytest.mark.parametrize("settings", [{"num_resnet_blocks": 3000}, {"hidden_dim": 500_000}, {"num_layers": 9**9}])
def test_a_network_far_larger_than_its_weights_is_not_made(settings):
    small = DiscreteVAE(image_size=16, num_tokens=4, codebook_dim=4, num_layers=1, hidden_dim=4)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a DiscreteVAE: (it desc|num_layers is)"):
        construct("config.json", DiscreteVAE, {**small.config, **settings}, small.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.fill_(float("nan")), "not finite"),
        (lambda x: x.to(torch.complex64), "complex64, expected torch.float32"),
        (lambda x: x.to(torch.int64), "int64, expected torch.float32"),
        (lambda x: x.to(torch.float64) * 1e300, "not finite"),
        (lambda x: x[0, 0], r"of shape \(\), expected"),
    ],
)
def test_weights_are_finite_numbers_of_their_kind(tmp_path, change, said):
    vae = DiscreteVAE(image_size=16, num_tokens=4, codebook_dim=4, num_layers=1, hidden_dim=4)
    state = vae.state_dict()
    with pytest.raises(CheckpointError, match=f"file does not fit DiscreteVAE: it has .*codebook.weight .*{said}"):
        load_state(vae, {**state, "codebook.weight": change(state["codebook.weight"].clone())}, "file")
    large = {name: torch.full_like(tensor, 3e38) for name, tensor in state.items()}  # whose sum is not finite
    load_state(vae, large, "file")


def test_a_config_of_a_billion_layers(tiny_bundle):
    path = tiny_bundle / "dalle/config.json"
    for setting in ("depth", "text_seq_len", "dim_head", "image_fmap_size"):
        for value in (10**9, 10**5):
            config = json.loads((tiny_bundle / "dalle/config.json").read_text())
            path.write_text(json.dumps({**config, setting: value}))
            with pytest.raises(CheckpointError, match=r"dalle/config\.json does not describe a DALLE"):
                PretrainedModel.from_pretrained(tiny_bundle / "dalle")
            path.write_text(json.dumps(config))


# Tokenizers


def tokenizer_json(tmp_path, **parts):
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
    return path


def test_a_tokenizer_that_makes_texts_longer_and_longer(tmp_path, capfd):
    assert HugTokenizer(tokenizer_json(tmp_path)).encode("a") == [1]
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    path = tokenizer_json(tmp_path, normalizer={"type": "Sequence", "normalizers": [twice] * 40})
    with pytest.raises(CheckpointError, match="replacements make any text too long"):
        HugTokenizer(path)
    vocabulary = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 4_000_000_000}, "unk_token": "[UNK]"}
    with pytest.raises(CheckpointError, match="has the id 4000000000"):
        HugTokenizer(tokenizer_json(tmp_path, model=vocabulary))
    # Rust panics, and says so itself.
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        HugTokenizer(tokenizer_json(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))
    assert capfd.readouterr().err == ""
