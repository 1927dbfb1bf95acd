"""The benchmark's statistics, and that it runs, resumes and refuses, on an untrained model."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from factories import small_unet
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import clip_twins
import decoding
import judge
import measures
import prune
import quality
import skip_table
import sweep
import sweep_guidance

from dalle_pytorch import scenes as glyphs
from diffusion.decoder import DiffusionDecoder


def test_best_of_equals_the_mean_over_all_subsets():
    generator = np.random.default_rng(0)
    scores, right = generator.random(7).tolist(), (generator.random(7) < 0.4).tolist()
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        expected = sum(right[max(subset, key=lambda i: scores[i])] for subset in subsets) / len(subsets)
        assert measures.best_of(scores, right, n) == pytest.approx(expected)
    assert measures.best_of(scores, scores, 7) == max(scores)
    assert measures.best_of(scores, scores, 1) == pytest.approx(np.mean(scores))
    with pytest.raises(ValueError, match="best of 8"):
        measures.best_of(scores, right, 8)


def test_frechet_distance_of_gaussians():
    generator = np.random.default_rng(1)
    a = generator.standard_normal((200_000, 2)) * [1, 2]
    b = generator.standard_normal((200_000, 2)) * [3, 1] + [0, 1]
    # Diagonal covariances: squared differences of means and of standard deviations.
    assert measures.frechet_distance(a, b) == pytest.approx(1 + 4 + 1, rel=0.02)
    assert measures.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_intervals_hold_the_distances():
    generator = np.random.default_rng(3)
    a = generator.standard_normal((300, 16))
    pairs = [(a + 0.5 * generator.standard_normal(a.shape), a), (generator.standard_normal((300, 16)), a)]
    for pair, (low, high) in zip(pairs, measures.frechet_interval(pairs, rounds=50), strict=True):
        assert 0 <= low < measures.frechet_distance(*pair) < high


def test_frechet_ratio_of_sets_that_are_moved():
    generator = np.random.default_rng(4)
    to = generator.standard_normal((400, 4))
    # Moved alike everywhere, each is as far as it was moved, whichever captions are drawn.
    assert measures.frechet_ratio(to + 2, to + 1, to, rounds=20) == pytest.approx((4, 4, 4))
    other = generator.standard_normal((400, 4))
    ratio, low, high = measures.frechet_ratio(to + 2, other + 1, to, rounds=50)
    assert low < ratio < high and low < 4 < high


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        low, high = measures.interval(generator.random(60) < 0.7, rounds=400, seed=seed)
        hits += low <= 0.7 <= high
    assert 0.88 < hits / 200 < 0.99


def logits_for(answers):
    return {name: torch.tensor([[6.0 if option == answers.get(name) else 0.0 for option in options]])
            for name, options in judge.QUESTIONS.items()}  # fmt: skip


def test_likelihood_is_highest_for_what_the_caption_says():
    for index in range(60):
        scene, other = glyphs.make_scene(index, "test"), glyphs.make_scene(index + 1, "test")
        mine, theirs = (logits_for(judge.answers(s)) for s in (scene, other))
        if judge.answers(scene) != judge.answers(other):
            assert judge.log_likelihood(scene, mine) > judge.log_likelihood(scene, theirs)


def test_likelihood_does_not_ask_for_what_the_caption_leaves_open():
    scene = next(s for s in map(glyphs.make_scene, range(1000)) if s.relation and not glyphs.states_place(s))
    facts = judge.answers(scene)
    swapped = facts | {"kind": facts["second_kind"], "second_kind": facts["kind"],
                       "colour": facts["second_colour"], "second_colour": facts["colour"]}  # fmt: skip
    values = [float(judge.log_likelihood(scene, logits_for(f))) for f in (facts, swapped)]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("of", ["recoloured", "made", "everything"])
def test_the_shipped_judge_reads_drawn_scenes(of):
    """It reads 99.6 % or more of a thousand; a judge that reads fewer makes every figure a lower bound."""
    shipped = judge.Judge.from_pretrained(quality.DEFAULT_MODEL / "judge").eval()
    assert judge.share_of_scenes_read(shipped, count=100, of=of) >= 0.97


@pytest.fixture
def model(tiny_bundle):
    """An untrained model with all the parts that the benchmark wants."""
    from dalle_pytorch.pretrained import PretrainedModel
    from diffusion.decoder import DiffusionDecoder
    from diffusion.unet import UNet

    torch.manual_seed(0)
    unet = UNet(image_size=64, num_channels=32, channel_mult=[1, 1], num_res_blocks=1, attention_resolutions=[],
                num_heads=1, resblock_updown=False, learn_sigma=False, emb_condition=True, emb_input_dims=8,
                emb_output_dims=32, emb_stride=1, low_res_condition=True, patch_size=4)  # fmt: skip
    vae = PretrainedModel.from_pretrained(tiny_bundle / "vae")
    DiffusionDecoder(unet, vae, diffusion_steps=100, noise_schedule="linear").save_pretrained(tiny_bundle / "decoder")
    judge.Judge(channels=16, hidden=16).save_pretrained(tiny_bundle / "judge")
    (tiny_bundle / "sampling.json").write_text('{"top_p": 0.9, "temperature": 1.0, "cond_scale": 1.0}')
    return tiny_bundle


def test_benchmark_runs_goes_on_and_refuses_other_settings(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "share_of_scenes_read", lambda model: judge.share_of_scenes_read(model, 10))
    command = ["--model", model, "--num_images", 3, "--curve_count", 1, "--curve_images", 4, "--guided_count", 1,
               "--steps", 2, "--device", "cpu", "--output_dir", tmp_path / "out"]  # fmt: skip
    command = list(map(str, command))
    quality.main([*command, "--count", "1"])
    lines = (tmp_path / "out/records.jsonl").read_text().splitlines()
    quality.main([*command, "--count", "2"])
    table = capsys.readouterr().out
    assert all(words in table for words in ("best of 3", "after diffusion", "CLIP guidance on minus off"))
    grown = [line for line in (tmp_path / "out/records.jsonl").read_text().splitlines() if line]
    assert grown[: len(lines)] == lines and len(grown) == 1 + 2 * len(quality.GROUPS)
    figures = json.loads((tmp_path / "out/quality.json").read_text())
    shares = figures["groups"]["a glyph"]["shares"]
    records = [json.loads(line) for line in grown[1:]]
    ones = [r for r in records if r["group"] == "a glyph"]
    assert len(ones) == 2 and shares["best of 3"]["count"] == 2
    assert shares["best of 3"]["mean"] == np.mean([all(r["right"][r["best"]].values()) for r in ones])
    assert figures["groups"]["two subjects"]["best_of"]["captions"] == 1
    quality.main([*command[:-1], str(tmp_path / "parallel"), "--count", "2", "--jobs", "2"])
    parallel = [json.loads(line) for line in (tmp_path / "parallel/records.jsonl").read_text().splitlines()[1:]]
    for name in ("caption", "best", "right"):  # features depend on the number of threads by rounding
        found, wanted = ({(r["group"], r["index"]): r[name] for r in rs} for rs in (parallel, records))
        assert found == wanted
    with pytest.raises(quality.UsageError, match="other settings"):
        quality.main([*command, "--count", "1", "--seed", "9"])
    shutil.rmtree(tmp_path / "out")


def test_sweep_of_settings_marks_the_best(model, tmp_path, capsys):
    sweep.main(["--model", str(model), "--count", "1", "--num_images", "2", "--cond_scale", "1", "2", "--temperature",
                "1", "--top_p", "0.9", "1", "--device", "cpu", "--output_dir", str(tmp_path)])  # fmt: skip
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert len(rows) == 3 and all(row["one"]["count"] == len(quality.GROUPS) for row in rows)
    best = max(rows, key=lambda row: row["one"]["mean"])
    assert f"| **{best['top_p']}** | **{best['temperature']}** | **{best['cond_scale']}** |" in capsys.readouterr().out


class Oracle:
    """A CLIP that fits the i-th text to the i-th picture, or to any but that."""

    image_size, device = 32, "cpu"

    def __init__(self, right):
        self.right = right

    def tokenize(self, texts):
        return torch.arange(len(texts))

    def encode_text(self, tokens):
        return torch.eye(2)[tokens]

    def encode_image(self, pictures):
        assert pictures.shape == (2, 3, 32, 32) and 0 < pictures.max() <= 1
        return torch.eye(2) if self.right else torch.eye(2).flip(0)


def test_clip_is_asked_for_what_differs(model, tmp_path, capsys):
    scenes = [glyphs.make_scene(index) for index in range(2)]
    assert clip_twins.tell_apart(Oracle(True), scenes) == (1, 1)
    assert clip_twins.tell_apart(Oracle(False), scenes) == (0, 0)
    clip_twins.main(["--clip_path", str(model / "clip"), "--count", "20", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "clip_twins.json").read_text())
    assert sum(row["pairs"] for row in rows) == 20
    assert {row["subjects"] for row in rows} == {"1", "2, placed", "2, unplaced"}
    clip_twins.main(["--clip_path", str(model / "clip"), "--count", "12", "--exchanged", "--of", "painted",
                     "--output_dir", str(tmp_path)])  # fmt: skip
    rows = json.loads((tmp_path / "clip_twins.json").read_text())
    assert {row["fact"] for row in rows} == {"colours", "doubled"}
    assert {row["subjects"] for row in rows} == {
        f"2, unplaced, of {number}" for number in ("one family", "two families")
    }
    assert all(0 <= row["caption told"]["mean"] <= 1 for row in rows) and "picture told" in capsys.readouterr().out


def test_sweep_of_guidance_compares_with_none(model, tmp_path, capsys):
    sweep_guidance.main(["--model", str(model), "--count", "1", "--num_images", "2", "--clip_guidance_scale", "1e-9",
                         "1e5", "--cutn", "2", "--guidance_min_sigma", "0", "1e9", "--guidance_through_unet", "True",
                         "False", "--worst", "--steps", "2", "--device", "cpu",
                         "--output_dir", str(tmp_path)])  # fmt: skip
    rows = json.loads((tmp_path / "sweep_guidance.json").read_text())
    assert all(row["nats"]["count"] == len(quality.GROUPS) and row["time"] > 0 for row in rows)
    moved = [abs(row["nats"]["mean"]) for row in rows]
    # Neither a small scale moves anything nor noise that no step has; the networks' gradients differ.
    assert max(moved[:4]) < 1e-3 < min(moved[4:6]) and moved[6:] == [0, 0] and moved[4] != moved[5]
    assert "| 100000 | 1 | 2 | 1 | 0 | 1 |" in capsys.readouterr().out


def test_decoding_goes_on_adds_ways_and_refuses_other_settings(model, tmp_path, capsys):
    decoder = DiffusionDecoder.from_pretrained(model / "decoder")
    for parameter in decoder.parameters():  # with layers that are zero, the number of steps changes nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    decoder.save_pretrained(model / "decoder")
    command = ["--model", model, "--converged", "ddim 5", "--reference", "ddim 3", "--samplers", "ddim", "dpm++",
               "--device", "cpu", "--output_dir", tmp_path / "out"]  # fmt: skip
    command = list(map(str, command))
    decoding.main([*command, "--count", "1", "--steps", "2", "3", "--guided_steps"])
    lines = (tmp_path / "out/records.jsonl").read_text().splitlines()
    decoding.main([*command, "--count", "2", "--steps", "3", "5", "--guided_steps", "2"])
    grown = [line for line in (tmp_path / "out/records.jsonl").read_text().splitlines() if line]
    assert grown[: len(lines)] == lines and len(lines) == 1 + len(quality.GROUPS)
    rows = {row["way"]: row for row in json.loads((tmp_path / "out/decoding.json").read_text())}
    kinds = len(quality.GROUPS)
    assert {way: row["captions"] for way, row in rows.items()} == {
        "ddim 2": kinds, "ddim 3": 2 * kinds, "ddim 5": 2 * kinds, "ddim 2 guided": 2 * kinds,
        "dpm++ 2": kinds, "dpm++ 3": 2 * kinds, "dpm++ 5": 2 * kinds, "dpm++ 2 guided": 2 * kinds,
    }  # fmt: skip
    assert rows["ddim 5"]["distance"] < 1e-4 < rows["ddim 2"]["distance"] and rows["ddim 2"]["passes"] == 2
    assert rows["ddim 3"]["attributes_difference"] is None and rows["ddim 2"]["attributes_difference"]["count"] == kinds
    assert "| ddim 2 guided | 2 | 12 | " in capsys.readouterr().out
    with pytest.raises(quality.UsageError, match="other settings"):
        decoding.main([*command, "--count", "1", "--seed", "1"])
    with pytest.raises(quality.UsageError, match="101 of 100"):
        decoding.main([*command, "--steps", "101"])
    with pytest.raises(quality.UsageError, match="nothing to draw"):
        decoding.main([*command, "--steps", "--guided_steps", "--output_dir", str(tmp_path / "empty")])


def test_summary_of_decoding():
    def found(shift, scale, count):
        """Of captions of which all but every `count`-th are right, features moved and scaled."""
        generator = np.random.default_rng(0)
        return {("a glyph", i): {"right": {"count": i % count != 0, "colour": True}, "seconds": scale, "distance": None,
                                 "features": (scale * generator.standard_normal(2) + shift).tolist()}
                for i in range(300)}  # fmt: skip

    records = {"drawn": found(0, 1, 1000), "ddim 4": found(3, 1, 2), "ddim 10": found(1, 1, 1000)}
    four, ten = decoding.summarize(records, "ddim 10", 100, components=2)
    assert (four["passes"], ten["passes"], four["seconds"]) == (4, 10, 1)
    assert four["frechet"] == pytest.approx(18) and ten["frechet"] == pytest.approx(2)
    assert four["frechet_ratio"]["mean"] == pytest.approx(9)
    assert four["attributes_difference"]["mean"] == pytest.approx(-0.5 * (150 - 1) / 300)
    assert ten["attributes_difference"] is None
    text = decoding.table([four, ten], "ddim 10")
    assert "| ddim 10 | 10 | 300 |" in text and "| 9.00 (9.00 to 9.00) | – | 1.00 |" in text


def test_distances_of_decoding_are_of_principal_components():
    """The drawn scenes differ along (3, 4); across, where the others lie apart, nothing is seen of one component."""
    along = np.random.default_rng(0).standard_normal((50, 1)) * [0.6, 0.8]

    def found(features):
        return {("a glyph", i): {"right": {"count": True}, "seconds": 1, "distance": None, "features": one.tolist()}
                for i, one in enumerate(features)}  # fmt: skip

    records = {
        "drawn": found(along),
        "ddim 4": found(np.add(along, [0.6, 0.8])),
        "ddim 5": found(np.add(along, [-0.8, 0.6])),
    }

    def distances(components):
        return [row["frechet"] for row in decoding.summarize(records, "ddim 4", 100, components)]

    assert distances(1) == pytest.approx([1, 0], abs=1e-6)
    assert distances(2) == pytest.approx([1, 1], abs=1e-6)
    assert distances(50) == [None, None]


def test_skipped_steps_are_compared(model, tiny_vae, tmp_path, capsys):
    small = DiffusionDecoder(small_unet(image_size=64), tiny_vae)
    small.save_pretrained(tmp_path / "unconditional")
    tiny_vae.save_pretrained(tmp_path / "vae")
    skip_table.main(["--unconditional", str(tmp_path / "unconditional"), "--model", str(model), "--count", "1",
                     "--skip_steps", "0", "0.5", "--steps", "2", "--clip_guidance", "--device", "cpu",
                     "--output_dir", str(tmp_path)])  # fmt: skip
    rows = json.loads((tmp_path / "skip_table.json").read_text())
    ways = [f"{decoder} {skip}" for decoder in ("conditioned", "unconditional") for skip in ("0", "0.5")]
    assert list(rows) == ["drawn", "enlarged", *ways]
    assert all(row["attributes"]["count"] == len(quality.GROUPS) and row["frechet"] is None for row in rows.values())
    assert "| unconditional 0.5 | " in capsys.readouterr().out


def test_summary_of_skipped_steps():
    def one(right, features):
        return {"right": right, "features": features}

    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((50, 2)).tolist()
    opinions = [{"drawn": one({"count": True, "colour": True}, f),
                 "moved": one({"count": i % 2 == 0, "colour": True}, [f[0] + 3, f[1]])}
                for i, f in enumerate(drawn)]  # fmt: skip
    rows = skip_table.summarize(opinions)
    assert (rows["moved"]["attributes"]["mean"], rows["moved"]["everything"]["mean"]) == (0.75, 0.5)
    assert rows["drawn"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert rows["moved"]["frechet"] == pytest.approx(9)


def pruned_records(captions=6, candidates=32):
    """Captions whose scores a direction of the last state tells after 8 rows, and nothing else does."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(captions):
        shapes = dict.fromkeys(("clip_repeat", "clip_plain", "likelihood", "unconditional"), (candidates, 3))
        shapes |= dict.fromkeys(("last_state", "mean_state"), (candidates, 3, 8))
        one = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
        one["scores"] = 3 + one["last_state"][:, 2] @ np.arange(8) / 10
        one["right"] = one["scores"] > np.quantile(one["scores"], 0.9)
        found.append(one)
    prune.add_measures(found)
    return found


def test_heads_are_fitted_to_the_other_captions(monkeypatch):
    monkeypatch.setattr(prune, "RIDGE", (1.0,))
    found = pruned_records()
    assert all(prune.rank_correlation(one["last_head"][:, 2], one["scores"]) > 0.9 for one in found)
    scores = found[0]["scores"].copy()
    found[0]["scores"] = scores[::-1].copy()  # what a caption is told does not depend on its own scores
    before = found[0]["last_head"].copy()
    prune.add_measures(found)
    np.testing.assert_allclose(found[0]["last_head"], before)


def test_rules_of_dropping():
    assert prune.cost(((8, 0.5),)) == 0.75 and prune.cost(((4, 0.25), (8, 5 / 32))) == pytest.approx(100 / 256, 1e-3)
    found = pruned_records()
    for rule in prune.RULES:
        for one in found:
            best = np.argsort(-one["final"][:, 0])[: round(32 * rule[-1][1])]
            assert sorted(best) == prune.survivors(one, rule, "final").tolist()
            assert prune.compare(one, rule, "final", "scores") >= 0
    gains = [[np.mean([prune.compare(one, rule, measure, "scores") for one in found]) for rule in prune.RULES[:2]]
             for measure in ("last_head", "clip_repeat")]  # fmt: skip
    assert min(gains[0]) > 0 > max(gains[1])


def test_measures_of_candidates_drawn_in_part(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prune, "GROUPS", {name: quality.GROUPS[name] for name in ("a glyph", "two subjects")})
    command = ["--model", str(model), "--num_images", "6", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    prune.main([*command, "--count", "1"])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    assert len(files) == 2 and "2 captions" in capsys.readouterr().out
    prune.main([*command, "--count", "2"])
    assert len(list((tmp_path / "out").glob("*.npz"))) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert "| the final score itself, the bound | +" in capsys.readouterr().out
    with pytest.raises(prune.UsageError, match="other settings"):
        prune.main([*command, "--seed", "9"])
    # Measures of the first rows alone, by the prior that the tokens are from.
    models = prune.Models(model, "cpu")
    prior, scene = models.pipe.model.prior, quality.scene_of("a glyph", 0, "validation")
    tokens = torch.stack([image.tokens for image in models.pipe.generate(scene.caption, 6)])
    text = prior.tokenize(scene.caption)
    with torch.no_grad():
        whole = prior.next_token_logits(text.expand(6, -1), tokens).log_softmax(-1)
        measured = prune.read_by_prior(prior, text, tokens)
    likelihood = whole.gather(-1, tokens[..., None])[..., 0].cumsum(1)
    for row, rows in enumerate(prune.rows_of(prior)):
        expected = likelihood[:, rows * prior.image_fmap_size - 1]
        torch.testing.assert_close(measured["likelihood"][:, row], expected, rtol=1e-4, atol=1e-3)
    assert measured["last_state"].shape[:2] == (6, len(prune.ROWS))
