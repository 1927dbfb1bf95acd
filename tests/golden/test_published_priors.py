"""min-dalle and minDALL-E: recorded numbers and ids, sizes read off the weights, samples, folders, and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_matches
from safetensors.torch import load_file

import convert
from dalle_pytorch import cli, load_prior
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.priors.min_dalle import DalleBart
from dalle_pytorch.priors.mindalle import Block, MinDALLE
from dalle_pytorch.published.load import open_published
from dalle_pytorch.sampling.candidates import generate_candidates
from dalle_pytorch.sampling.loop import guide, prefill
from dalle_pytorch.tokenizers.min_dalle import MinDalleTokenizer
from dalle_pytorch.tokenizers.mindalle import MinDALLETokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE
from text_to_image import TextToImage
from text_to_image.commands import generate

LOGITS_AFTER = [0, 1, 17, 130, 255]
PROMPT = "a red seven on brick"


def tiny_vqgan(num_tokens, **options):
    """Grids of 16×16 tokens of 4×4 pixels, untrained and always the same."""
    torch.manual_seed(0)
    sizes = {"image_size": 64, "embed_dim": 8, "z_channels": 8, "ch": 8, "ch_mult": (1, 1, 2), "num_res_blocks": 1}
    return VQGanVAE(num_tokens=num_tokens, gumbel=False, **{**sizes, **options}).eval()


@pytest.fixture
def mini(parity, tmp_path):
    """The recorded min-dalle with an untrained detokenizer of another size, as the one on record is large."""
    folder = tmp_path / "mini"
    shutil.copytree(parity("priors/min_dalle_mini"), folder)
    vae = tiny_vqgan(64, decoder_only=True, unit_range=True)
    state = {name.replace("quantize.embedding", "embedding"): tensor for name, tensor in vae.state_dict().items()}
    torch.save(state, folder / "detoker.pt")
    return folder


@pytest.fixture
def mindalle(parity, tmp_path):
    """The recorded minDALL-E with an untrained VQGAN of another size."""
    folder = tmp_path / "mindalle"
    shutil.copytree(parity("priors/mindalle"), folder)
    torch.save({"state_dict": tiny_vqgan(128).state_dict()}, folder / "stage1_last.ckpt")
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings[settings.index("stage2:") :])
    return folder


def folders(mini, mindalle):
    return (mini, {"heads": 4}), (mindalle, {})


# Recorded


@pytest.mark.parametrize("start", ["published", "pypi"])
@torch.no_grad()
def test_min_dalle_as_recorded(parity, start):
    folder = parity("priors/min_dalle_mini")
    golden = load_file(folder / "golden.safetensors")
    prior = load_prior(folder, tiny_vqgan(64), heads=4, start_token=None if start == "published" else start)
    text, image_tokens = golden["text_tokens"], golden["image_tokens"]
    assert_matches(prior.encode_text(text), golden["encoder_state"])
    assert torch.equal(prior.unconditional_text(text)[0], text[0])  # <s></s>
    # Recorded without the prompt first; `guide` has the prompt first.
    logits = prior.next_token_logits(text.repeat_interleave(2, 0), image_tokens.repeat(2, 1))[:, LOGITS_AFTER]
    assert_matches(logits, golden[f"logits_{start}_bos"])
    assert_matches(guide(logits.roll(2, 0), prior.sampling.cond_scale), golden[f"supercond16_{start}_bos"])


@torch.no_grad()
def test_mindalle_as_recorded(parity):
    folder = parity("priors/mindalle")
    golden = load_file(folder / "golden.safetensors")
    prior = load_prior(folder, tiny_vqgan(128))
    text, image_tokens = golden["text_tokens"], golden["image_tokens"]
    assert_matches(prior.next_token_logits(text, image_tokens)[:, LOGITS_AFTER], golden["image_logits"])
    assert_matches(prior.text_logits(text)[:, [0, 1, 30, 62]], golden["text_logits"])


@torch.no_grad()
def test_image_tokenizers_as_recorded(parity):
    parity("priors/min_dalle_mini/detoker.pt")  # too large to be in this repository
    folder = parity("priors/min_dalle_mini/detoker.pt").parent
    golden = load_file(folder / "golden.safetensors")
    prior = load_prior(folder, heads=4)
    assert_matches(prior.vae.decode_image(golden["image_tokens"]), golden["image"])
    folder = parity("priors/mindalle/stage1_last.ckpt").parent
    golden = load_file(folder / "golden.safetensors")
    vae = load_prior(folder).vae
    assert_matches(vae.decode_embeddings(vae.embed(golden["image_tokens"])) * 2 - 1, golden["decoded"])
    assert torch.equal(vae.get_codebook_indices(golden["image"]), golden["indices"])


def test_ids_as_recorded(parity, tmp_path):
    folder = parity("priors/min_dalle_mini")
    mini = MinDalleTokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    recorded = json.loads((folder / "tokenizer_golden.json").read_text())
    assert list(map(mini.encode, recorded["texts"])) == recorded["ids"]
    assert mini.tokenize("girl", 5).tolist() == [[0, 81, 2, 1, 1]]
    assert mini.decode([0, 45, 48, 2, 1, 1]) == "a red" and mini.unknown_words("a wall-e") == ["wall-e"]
    assert [mini.lost_text("a red girl", length) for length in (5, 4, 3)] == ["", "", "girl"]
    folder = parity("priors/mindalle")
    files = (folder / "tokenizer/bpe-16k-vocab.json", folder / "tokenizer/bpe-16k-merges.txt")
    mindalle = MinDALLETokenizer.from_files(*files)
    recorded = json.loads((folder / "tokenizer_golden.json").read_text())
    assert mindalle.tokenize(recorded["texts"], 64, truncate_text=True).tolist() == recorded["ids"]
    assert mindalle.decode([38, 102, 144, 152]) == "a red seven"
    for tokenizer, text in ((mini, "wall-e eats"), (mindalle, "A cat, quickly?")):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = type(tokenizer)(tmp_path / "tokenizer.json")
        assert again.encode(text) == tokenizer.encode(text) and again.pad_id == tokenizer.pad_id


# Sampling


@torch.no_grad()
def test_cached_logits_equal_those_of_whole_sequences(mini, mindalle):
    for folder, flags in folders(mini, mindalle):
        prior = load_prior(folder, **flags)
        text = prior.tokenize([PROMPT, "girl"])
        image_tokens = torch.randint(0, prior.num_image_tokens, (2, 256), generator=torch.Generator().manual_seed(0))
        reference = prior.next_token_logits(text, image_tokens)
        assert reference.shape == (2, 256, prior.num_image_tokens)
        for first, rows in ((0, [0, 0, 1, 1]), (3, [1, 0, 0])):  # as many candidates of each prompt, and not
            logits, cache = prior.prefill(text, image_tokens[:, :first])
            torch.testing.assert_close(logits, reference[:, first])
            cache = cache.gather(torch.tensor(rows), prior.max_length)
            for position in range(first, 255):
                logits = prior.step(image_tokens[rows, position], position, cache)
                torch.testing.assert_close(logits, reference[rows, position + 1], atol=1e-4, rtol=1e-4)


def test_candidates_share_the_prompt(mini):
    prior = load_prior(mini, heads=4)
    prefix = prefill(prior, prior.tokenize(PROMPT), cond_scale=16)
    cache = prefix.cache.gather(torch.tensor([0] * 5 + [1] * 5), prior.max_length)
    assert {len(keys) for pair in cache.text for keys in pair} == {2}  # with the prompt, and without


def test_candidates_do_not_depend_on_the_batch(mini, mindalle):
    for folder, flags in folders(mini, mindalle):
        prior = load_prior(folder, **flags)
        one, two = (generate_candidates(prior, PROMPT, 3, batch_size=size, seed=1) for size in (1, 3))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0].tokens, one[1].tokens) and one[0].image.shape == (3, 64, 64)
        assert prior.sampling.top_k == 256 and prior.sampling.cond_scale == (16 if folder == mini else 1)


def test_padding_is_masked_in_one_and_looked_at_in_the_other(mini, mindalle):
    none = torch.empty(1, 0, dtype=torch.long)
    prior = load_prior(mini, heads=4)
    text = prior.tokenize("girl")
    with torch.no_grad():
        before = prior.next_token_logits(text, none)
        prior.encoder.embed_tokens.weight[1] += 1
        assert torch.equal(prior.next_token_logits(text, none), before)
        prior = load_prior(mindalle)
        text = prior.tokenize("girl")
        before = prior.next_token_logits(text, none)
        prior.tok_emb_txt.weight[152] += 1
        assert not torch.allclose(prior.next_token_logits(text, none), before)


def test_only_codes_are_drawn(mini):
    """As in mega, whose tables have rows for more tokens than there are codes."""
    prior = load_prior(mini, tiny_vqgan(48), heads=4)
    assert prior.start_token == 48 and prior.decoder.lm_head.out_features == 65
    assert prior.next_token_logits(prior.tokenize("girl"), torch.zeros(1, 3).long()).shape == (1, 4, 48)
    assert load_prior(mini, tiny_vqgan(48), heads=4, start_token="pypi").start_token == 47


def test_the_text_encoder_is_released(mini, tmp_path):
    reference = generate_candidates(load_prior(mini, heads=4), PROMPT, 1)[0].tokens
    load_prior(mini, heads=4).save_pretrained(tmp_path / "native")
    for folder, flags in ((mini, {"heads": 4}), (tmp_path / "native", {})):
        prior = load_prior(folder, low_memory=True, **flags)
        for _ in range(2):
            assert torch.equal(generate_candidates(prior, PROMPT, 1)[0].tokens, reference)
            assert all(parameter.is_meta for parameter in prior.encoder.parameters())
        prior.save_pretrained(tmp_path / "again")
        assert torch.equal(generate_candidates(load_prior(tmp_path / "again"), PROMPT, 1)[0].tokens, reference)


def test_float16(mini, mindalle):
    for folder, flags in folders(mini, mindalle):
        prior = load_prior(folder, dtype=torch.float16, **flags)
        own = prior.own_state_dict()
        assert {tensor.dtype for tensor in own.values()} == {torch.float16}
        assert {tensor.dtype for tensor in prior.vae.state_dict().values()} == {torch.float32}
        full = load_prior(folder, **flags)
        text, tokens = full.tokenize(PROMPT), torch.zeros(1, 5).long()
        with torch.no_grad():
            logits, reference = (p.next_token_logits(text, tokens) for p in (prior, full))
        assert logits.dtype == torch.float32 and (logits - reference).abs().max() < 0.05


def test_gelu_of_minDALL_E(mindalle):
    block = Block(4, 1, 4, attn_bias=False, ff_bias=False, approximate=True)
    for layer in (block.attn.out_proj, block.proj_in, block.proj_out):
        torch.nn.init.zeros_(layer.weight) if layer is block.attn.out_proj else torch.nn.init.eye_(layer.weight)
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])  # its own norm
    keys = type("Cache", (), {"update": lambda self, *pair: pair, "prompts": None})()
    assert (block(x, keys)[0, 0] - torch.tensor([1.84580, -1.15420, 1.84580, -1.15420])).abs().max() < 1e-4
    settings = (mindalle / "config.yaml").read_text()
    (mindalle / "config.yaml").write_text(settings.replace("gelu_use_approx: false", "gelu_use_approx: true"))
    assert load_prior(mindalle).blocks[2].approximate


def test_text_is_continued(mini, mindalle):
    pipe = TextToImage.from_pretrained(device="cpu", prior=mindalle)
    text = pipe.complete_prompt("a red seven", seed=3)
    assert text.startswith("a red seven ") and text == pipe.complete_prompt("a red seven", seed=3)
    with pytest.raises(UsageError, match="first words"):
        pipe.model.prior.generate_texts(pipe.model.tokenizer, None)
    with pytest.raises(UsageError, match="models images only"):
        load_prior(mini, heads=4).generate_texts(pipe.model.tokenizer, "a")


# Folders


def test_sizes_are_read_off_the_weights(mini, mindalle, tmp_path):
    vae = tiny_vqgan(20)
    sizes = {"dim": 24, "heads": 3, "encoder_depth": 1, "encoder_ff_dim": 20, "decoder_depth": 3, "decoder_ff_dim": 28,
             "num_text_tokens": 130, "image_vocab_size": 33, "text_seq_len": 9}  # fmt: skip
    prior = DalleBart(vae=vae, **sizes)
    for half in ("encoder", "decoder"):
        torch.save(getattr(prior, half).state_dict(), tmp_path / f"{half}_mini.pt")
    for name, suffix in (("vocab", "json"), ("merges", "txt")):
        shutil.copy(mini / f"{name}.{suffix}", tmp_path / f"{name}_mini.{suffix}")
    again = load_prior(tmp_path / "decoder_mini.pt", vae, heads=3)
    assert {name: again.config[name] for name in sizes} == sizes
    assert again.image_fmap_size == 16 and again.tokenizer.pad_id == 1
    assert type(load_prior(tmp_path, vae, heads=3)) is DalleBart

    options = {"dim": 24, "depth": 2, "heads": 2, "ff_dim": 40, "num_text_tokens": 160, "text_seq_len": 11,
               "attn_bias": False, "mlp_bias": False}  # fmt: skip
    prior = MinDALLE(vae=vae, pad_token=152, **options)
    names = {"attn.q_proj": "attn.query", "attn.k_proj": "attn.key", "attn.v_proj": "attn.value",
             "attn.out_proj": "attn.proj", "proj_in": "mlp.0", "proj_out": "mlp.2"}  # fmt: skip
    state = {"blocks.0.attn.mask": torch.ones(1, 2, 2)}
    for name, tensor in prior.own_state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        state[name] = tensor
    torch.save(state, mindalle / "stage2_last.ckpt")
    (mindalle / "config.yaml").unlink()
    again = load_prior(mindalle, vae, heads=2)
    assert {name: again.config[name] for name in options} == options
    assert torch.equal(again.head_img.weight, prior.head_img.weight)


def test_detokenizer(mini, tmp_path):
    """Its sizes, its range, and where min-dalle keeps it."""
    (tmp_path / "vqgan").mkdir()
    shutil.move(mini / "detoker.pt", tmp_path / "vqgan/detoker.pt")
    vae, reference = load_prior(mini, heads=4).vae, tiny_vqgan(64, decoder_only=True)
    tokens = torch.arange(64).repeat(4)[None]
    assert vae.image_size == 64 and vae.image_fmap_size == 16 and vae.config["ch_mult"] == [1, 1, 2]
    pixels = reference.decoder(reference.post_quant_conv(reference.embed(tokens)))
    assert torch.equal(vae.decode_image(tokens), pixels.clamp(0, 1))
    with pytest.raises(UsageError, match="decoder only"):
        vae.get_codebook_indices(torch.zeros(1, 3, 64, 64))


def test_native_folders(mini, mindalle, tmp_path, capsys):
    for folder, flags in folders(mini, mindalle):
        native = tmp_path / f"native-{folder.name}"
        convert.main([str(folder), str(native), *(["--prior_flags", "heads=4"] if flags else [])])
        first, second = load_prior(folder, **flags), load_prior(native)
        assert type(first) is type(second) is type(open_published(native))
        assert first.tokenizer.encode("a girl, 7") == second.tokenizer.encode("a girl, 7")
        candidates = [generate_candidates(prior, PROMPT, 1)[0] for prior in (first, second)]
        assert torch.equal(candidates[0].tokens, candidates[1].tokens)
        assert torch.equal(candidates[0].image, candidates[1].image)
        pipe = TextToImage.from_pretrained(device="cpu", prior=folder, prior_flags=flags)
        pipe.model.save_pretrained(tmp_path / f"bundle-{folder.name}")
        bundle = TextToImage.from_pretrained(tmp_path / f"bundle-{folder.name}", "cpu")
        assert bundle.model.sampling == first.sampling
        assert torch.equal(bundle.generate(PROMPT, 1, rank=False)[0].tokens, candidates[0].tokens)
    assert "DalleBart" in capsys.readouterr().out
    assert load_prior(tmp_path / "native-mini", start_token=63).start_token == 63


def test_on_the_command_line(mini, mindalle, tmp_path, capsys):
    given = ["--text", PROMPT, "--num_images", "2", "--output_npy", "--device", "cpu"]
    for folder, flags in ((mini, ["--low_memory", "--prior_flags", "heads=4", "start_token=pypi"]), (mindalle, [])):
        (written,) = generate.main([*given, "--dalle_path", str(folder), "--outputs_dir", str(tmp_path), *flags])
        tokens = np.load(written / "1.npy")
        assert tokens.shape == (256,) and (written / "1.png").is_file()
        shutil.rmtree(written)
    assert (tokens < 128).all()
    # An image to complete needs an encoder, which min-dalle does not publish.
    image = tmp_path / "image.png"
    pipe = TextToImage.from_pretrained(device="cpu", prior=mindalle)
    result = pipe.generate(PROMPT, 1, rank=False)
    result[0].image.save(image)
    given += ["--image", str(image), "--num_init_img_tokens", "16", "--outputs_dir", str(tmp_path)]
    (written,) = generate.main([*given, "--dalle_path", str(mindalle)])
    assert np.array_equal(np.load(written / "0.npy")[:16], pipe.encode_init_image(image, 16).numpy())
    with pytest.raises(SystemExit) as stopped:
        cli.run(generate.main, [*given, "--dalle_path", str(mini), "--prior_flags", "heads=4"])
    assert stopped.value.code == 2 and "has a decoder only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda folder: None, {}, "do not tell how many attention heads a prior of width 64 has"),
        (lambda folder: None, {"heads": 5}, "width of 64 cannot be divided among 5 heads"),
        (lambda folder: None, {"heads": "four"}, "whole number as heads, got 'four'"),
        (lambda folder: None, {"heads": 4, "start_token": 65}, "a start token below that, got 64 and 65"),
        (lambda folder: None, {"layers": 4}, "heads and start_token, not layers"),
        (lambda folder: (folder / "detoker.pt").unlink(), {"heads": 4}, "detoker.pt is missing"),
        (lambda folder: (folder / "vocab.json").unlink(), {"heads": 4}, "vocab.json is missing"),
        (lambda folder: (folder / "vocab.json").write_text('{"<s>": 5}'), {"heads": 4}, "are not a vocabulary"),
        (lambda folder: (folder / "merges.txt").write_text("#\na b c"), {"heads": 4}, "are not a vocabulary"),
        (lambda folder: torch.save({"a": torch.ones(1)}, folder / "encoder.pt"), {"heads": 4}, "not the encoder"),
    ],
)
def test_refusals_of_min_dalle(mini, change, flags, message):
    change(mini)
    with pytest.raises((CheckpointError, UsageError), match=message) as error:
        load_prior(mini, **flags)
    assert "\n" not in str(error.value) and str(mini) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_layers: 3", "n_layers: 4", "n_layers is 4 according to .*config.yaml, but 3 in the weights"),
        ("attn_bias: true", "attn_bias: false", "attn_bias is False according"),
        ("type: transformer1d", "type: igpt", "stage2 is a igpt, expected a transformer1d"),
        ("n_heads: 4", "n_heads: 7", "width of 64 cannot be divided among 7 heads"),
        ("gelu_use_approx: false", "gelu_use_approx: 3", "neither true nor false"),
        ("stage2:", "stage1: {hparams: 5}\nstage2:", "is not a configuration of minDALL-E"),
    ],
)
def test_settings_of_minDALL_E_that_contradict(mindalle, old, new, message):
    settings = (mindalle / "config.yaml").read_text()
    assert old in settings
    (mindalle / "config.yaml").write_text(settings.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        load_prior(mindalle)


@pytest.mark.parametrize(
    ("name", "address", "place"),
    [
        ("min-dalle", "resolve/main/vocab_mini.json", "min-dalle/vocab_mini.json"),
        ("min-dalle-mega", "resolve/main/vocab.json", "min-dalle/vocab.json"),
        ("mindall-e", "arena.kakaocdn.net", "mindall-e/1.3B.tar.gz"),
    ],
)
def test_names_without_a_network(tmp_path, monkeypatch, name, address, place):
    def no_network(*_args, **_keywords):
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    for open_it in (load_prior, open_published):
        with pytest.raises(CheckpointError) as error:
            open_it(name)
        message = str(error.value)
        assert address in message and f".cache/dalle/{place}" in message and "\n" not in message


def test_a_name_opens_what_lies_in_the_cache(mini, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / ".cache/dalle/min-dalle"
    shutil.copytree(mini, cache)
    for stem, suffix in (("vocab", "json"), ("merges", "txt"), ("encoder", "pt"), ("decoder", "pt")):
        (cache / f"{stem}.{suffix}").rename(cache / f"{stem}_mini.{suffix}")
    for name in ("encoder.pt", "decoder.pt"):  # mega's beside them
        (cache / name).write_bytes(b"another model")
    assert type(load_prior("min-dalle", heads=4)) is DalleBart
