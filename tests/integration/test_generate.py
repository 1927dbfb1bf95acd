"""generate.py: what it writes, what stays the same, and what it refuses."""

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch
from helpers import run_python
from PIL import Image

import generate
from dalle_pytorch import load_dalle
from dalle_pytorch.cli import run
from dalle_pytorch.errors import FileError
from dalle_pytorch.files import atomic, images
from dalle_pytorch.files.tokens import load_tokens
from dalle_pytorch.nn.linear import has_int8
from dalle_pytorch.sampling import dtypes
from text_to_image import TextToImage, model, results


@pytest.fixture
def command(tiny_bundle, tmp_path):
    """Runs generate.py on the tiny bundle in this process."""

    def call(*options, text="a red seven on brick"):
        models = ["--dalle_path", str(tiny_bundle / "dalle"), "--clip_path", str(tiny_bundle / "clip")]
        arguments = [*models, "--device", "cpu", "--outputs_dir", str(tmp_path / "out"), "--num_images", "5"]
        arguments += ["--batch_size", "2"]
        generate.main([*arguments, *(["--text", text] if text is not None else []), *map(str, options)])
        return tmp_path / "out"

    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_ranked_pictures_and_tokens(command, tiny_bundle):
    folder = command("--clip_sort", "--output_npy") / "a_red_seven_on_brick"
    pictures = sorted(folder.glob("[0-9]*.png"), key=lambda path: int(path.name.split("-")[0]))
    scores = [float(path.stem.split("-", 1)[1]) for path in pictures]
    assert len(pictures) == 5 and scores == sorted(scores, reverse=True)
    assert (folder / "caption.txt").read_text() == "a red seven on brick\n"
    assert Image.open(folder / "grid.png").width > 3 * 64
    # The tokens decode to the picture beside them.
    vae = load_dalle(tiny_bundle / "dalle").vae
    for rank, picture in enumerate(pictures):
        tokens = load_tokens(folder / f"{rank}.npy", 32, 256)
        assert np.load(folder / f"{rank}.npy").dtype == np.int64
        decoded = np.asarray(images.tensor_to_image(vae.decode_image(tokens[None])[0])).astype(int)
        assert np.abs(decoded - np.asarray(Image.open(picture))).max() <= 1


def test_scores_are_the_cosine_of_clip(command, tiny_bundle):
    from dalle_pytorch import load_clip

    folder = command("--clip_sort") / "a_red_seven_on_brick"
    best = next(folder.glob("0-*.png"))
    image = images.image_to_tensor(images.read_image(best))
    score = load_clip(tiny_bundle / "clip").score("a red seven on brick", image)
    assert float(best.stem[2:]) == pytest.approx(score.item(), abs=2e-3)  # a PNG has eight bits


def test_unsorted_names_and_keep(command):
    assert names(command("--keep", 2) / "a_red_seven_on_brick") == [
        "0.png",
        "1.png",
        "caption.txt",
        "grid.png",
        "settings.json",
    ]


def test_keep_writes_the_best(command):
    every = names(command("--clip_sort") / "a_red_seven_on_brick")
    best = names(command("--clip_sort", "--keep", 2) / "a_red_seven_on_brick")
    assert set(best) < set(every) and len(best) == 5  # what the first run left under other numbers is gone


def test_sampling_json_of_the_model_is_the_default(tiny_bundle, tmp_path, monkeypatch):
    """At a temperature of 0 all candidates are the likeliest one; a flag counts more than the file."""
    monkeypatch.setattr(model, "DEFAULT_MODEL", tiny_bundle)
    (tiny_bundle / "sampling.json").write_text('{"temperature": 0, "cond_scale": 1}')

    def count(*options):
        arguments = ["--text", "a red seven", "--num_images", "3", "--output_npy", "--device", "cpu"]
        (folder,) = generate.main([*arguments, "--outputs_dir", str(tmp_path / "out"), *options])
        return len({tuple(np.load(folder / f"{i}.npy")) for i in range(3)})

    assert count() == 1
    assert count("--temperature", "1") == 3
    (tiny_bundle / "sampling.json").unlink()
    assert count() == 3


def test_candidates_do_not_depend_on_batch_or_number(command):
    def tokens(*options):
        folder = command("--output_npy", *options) / "a_red_seven_on_brick"
        return [np.load(folder / f"{i}.npy").tolist() for i in range(3)]

    first = tokens()
    assert first == tokens("--batch_size", 5) == tokens("--num_images", 3)
    assert first != tokens("--seed", 1)


@pytest.mark.skipif(not has_int8(), reason="this build of PyTorch has no FBGEMM for this processor")
def test_int8_is_another_result(command, capsys):
    """A prompt that was drawn in float32 is not finished in int8."""
    folder = command("--output_npy") / "a_red_seven_on_brick"
    assert "dtype" not in json.loads((folder / "settings.json").read_text())["models"]
    command("--output_npy", "--dtype", "int8")
    assert json.loads((folder / "settings.json").read_text())["models"]["dtype"] == "int8"


def test_two_prompts_and_two_that_share_a_folder_name(command):
    out = command(text="A Red Seven|a red/seven|a red?seven|a blue star")
    assert names(out) == ["a_blue_star", "a_red_seven", "a_red_seven-2", "a_red_seven-3"]
    assert (out / "a_red_seven-2/caption.txt").read_text() == "a red/seven\n"
    assert (out / "a_red_seven/caption.txt").read_text() == "a red seven\n"


def test_prompts_from_a_file(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red seven\n\na blue star\n")
    assert names(command("--prompts", tmp_path / "prompts.txt", text=None)) == ["a_blue_star", "a_red_seven"]


def test_prompts_go_on_where_they_were(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a red seven\na blue star\na green heart\n")
    drawn, generated = [], TextToImage.generate

    def until(count):
        def generate(pipe, prompt, *args, **options):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.append(prompt)
            return generated(pipe, prompt, *args, **options)

        drawn.clear()
        monkeypatch.setattr(TextToImage, "generate", generate)

    def run(*options):
        command("--prompts", tmp_path / "prompts.txt", *options, text=None)
        return list(drawn)

    until(2)
    with pytest.raises(KeyboardInterrupt):
        run("--output_npy")
    until(9)
    assert run("--output_npy") == ["a green heart"]
    until(9)
    assert run() == []  # the tokens that are there too are no reason to draw
    assert capsys.readouterr().out.count("finished before; --overwrite draws it again") == 5
    (tmp_path / "out/a_red_seven/0.png").unlink()
    assert run("--output_npy") == ["a red seven"]
    for options in ({"--seed": 1}, {"--seed": 1, "--keep": 3}, {"--seed": 1, "--keep": 3, "--temperature": 0.5}):
        until(9)
        assert len(run(*(text for option in options.items() for text in option))) == 3
    until(9)
    assert len(run("--seed", 1, "--keep", 3, "--temperature", 0.5, "--overwrite")) == 3


def test_a_second_result_leaves_no_mixture(command, capsys):
    folder = command("--output_npy") / "a_red_seven_on_brick"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("0-upscaled.png", "1-upscaled-2.png", "before_after.png", "notes.txt", "stale.png"):
        (folder / name).write_text("mine")
    command("--num_images", 3)  # the same tokens: nothing of them is lost
    assert (folder / "0.npy").read_bytes() == first["0.npy"] and not (folder / "3.png").exists()
    assert (folder / "0-upscaled.png").exists() and names(folder / "stale") == ["3.npy", "4.npy"]
    command("--seed", 1)
    assert not list(folder.glob("*.npy")) and not list(folder.glob("*-upscaled*")) and not list(folder.glob(".*"))
    assert (folder / "stale/0.npy").read_bytes() == first["0.npy"] and (folder / "notes.txt").exists()
    gone = ["0-upscaled.png", "0.npy", "1-upscaled-2.png", "1.npy", "2.npy", "3.npy", "4.npy", "before_after.png"]
    assert names(folder / "stale") == gone
    assert "moved to stale/, as they belong to other tokens: 0-upscaled.png, 0.npy" in capsys.readouterr().out


def test_a_killed_second_result_leaves_the_first(command, monkeypatch):
    folder = command("--output_npy") / "a_red_seven_on_brick"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, saved = results.save_tokens, []

    def killed(path, tokens):
        save(path, tokens)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "save_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        command("--output_npy", "--seed", 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_same_prompt_in_two_processes(tmp_path, command, tiny_bundle):
    """Threads, each with a lock of its own: every file is of one of the two results."""
    pipe = TextToImage.from_pretrained(prior=str(tiny_bundle / "dalle"), device="cpu")
    drawn = [pipe.generate("a red seven", 3, rank=False, seed=seed) for seed in (0, 1)]
    threads = [threading.Thread(target=result.save, args=(tmp_path / "out",)) for result in drawn * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (folder,) = (tmp_path / "out").iterdir()
    tokens = [load_tokens(folder / f"{rank}.npy", 32) for rank in range(3)]
    assert any(all(map(torch.equal, tokens, [image.tokens for image in result])) for result in drawn)
    assert {"0.png", "1.png", "2.png", "grid.png", "caption.txt"} <= set(names(folder))


@pytest.mark.parametrize("text", ["../../evil", "/etc/passwd", "a\0b", "🐟🐟", "x" * 10_000, "a" + "/" * 300 + "b"])
def test_prompts_write_nothing_outside(command, tmp_path, text):
    before = names(tmp_path)
    out = command("--num_images", 1, text=text)
    assert len(names(out)) == 1 and names(tmp_path) == sorted([*before, "out"])


def test_picture_is_finished_from_its_top_rows(command, tmp_path, tiny_bundle):
    image = torch.rand(1, 3, 64, 64)
    images.save_image(tmp_path / "half.png", image[0])
    folder = (
        command("--image", tmp_path / "half.png", "--num_init_img_tokens", 48, "--output_npy") / "a_red_seven_on_brick"
    )
    vae = load_dalle(tiny_bundle / "dalle").vae
    given = vae.get_codebook_indices(images.image_to_tensor(images.read_image(tmp_path / "half.png")))[0, :48]
    tokens = [load_tokens(folder / f"{i}.npy", 32) for i in range(5)]
    assert all(torch.equal(row[:48], given) for row in tokens)
    assert not torch.equal(tokens[0], tokens[1])


def test_gentxt_finishes_the_prompt_first(command, capsys):
    out = command("--gentxt", "--num_images", 1, text="a red")
    assert "the prompt goes on: a red" in capsys.readouterr().out
    assert next(out.glob("*/caption.txt")).read_text().startswith("a red")


def test_a_prompt_that_is_too_long_is_told(command, capsys):
    command("--num_images", 1, text="a red seven on brick " * 3 + "and wood")
    assert "does not read beyond 12 tokens; left out: " in (said := capsys.readouterr().err) and "and wood\n" in said


def test_unknown_words_are_named(command, capsys):
    command("--num_images", 1, text="a жук on brick")
    assert "жук" in capsys.readouterr().err


# Bad input: one line, exit code 2, and nothing lost


@pytest.fixture
def refused(capsys):
    """Runs generate.py in this process, for the one line on stderr."""

    def call(*options, out, text="a red seven"):
        arguments = ["--text", text, "--outputs_dir", out, "--num_images", "1", "--device", "cpu", *options]
        with pytest.raises(SystemExit) as stopped:
            run(generate.main, list(map(str, arguments)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ([], " ", "empty"),
        ([], "a|", "empty"),
        (["--top_p", 0], "a", "--top_p"),
        (["--top_p", 1.5], "a", "--top_p"),
        (["--temperature", -1], "a", "--temperature"),
        (["--num_images", 0], "a", "--num_images"),
        (["--num_init_img_tokens", 3], "a", "--image"),
        (["--device", "cuda:99"], "a", "cuda:99"),
        (["--dtype", "float16"], "a", "--dtype"),
        (["--dtype", "int8"], "a", "dtype int8 needs FBGEMM"),
        (["--dalle_path", "nowhere/dalle"], "a", "nowhere/dalle"),
        (["--dalle_path", "missing.pt"], "a", "missing.pt"),
    ],
)
def test_bad_arguments(refused, tmp_path, options, text, message, monkeypatch):
    monkeypatch.setattr(dtypes, "has_int8", lambda: False)
    assert message in refused(*options, out=tmp_path / "out", text=text)
    assert not (tmp_path / "out").exists()


def test_image_that_is_none_is_refused(command, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(FileError, match=r"a\.png"):
        command("--image", tmp_path / "a.png")


def test_damaged_weights_are_refused(refused, tmp_path, tiny_bundle):
    weights = tiny_bundle / "dalle/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in refused("--dalle_path", tiny_bundle / "dalle", out=tmp_path / "out")


def test_output_folder_that_cannot_be_is_refused(refused, tmp_path, tiny_bundle):
    (tmp_path / "file").write_text("")
    assert "file" in refused("--dalle_path", tiny_bundle / "dalle", out=tmp_path / "file")


def test_full_disk_leaves_earlier_outputs(command, monkeypatch):
    folder = command("--output_npy") / "a_red_seven_on_brick"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        command("--output_npy", "--seed", 1)
    assert names(folder) == sorted(before)  # no half-written file, none missing
    assert all((folder / name).stat().st_size > 0 for name in before)


def test_help_answers_at_once():
    result, seconds = run_python("generate.py", "--help")
    assert result.returncode == 0 and "--clip_sort" in result.stdout
    assert seconds < 2
    result, _ = run_python("-c", "import sys, generate; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0
