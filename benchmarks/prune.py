"""Whether candidates that will not be kept can be told early: `python benchmarks/prune.py --help`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from judge import judge_by_attribute, likeliest, log_likelihood
from measures import best_of, interval
from quality import GROUPS, Models, scene_of
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_bytes, write_text
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling.loop import evaluation
from dalle_pytorch.settings import Settings, option
from text_to_image.batch.prune import repeat_last_row
from text_to_image.model import DEFAULT_MODEL

ROWS = (4, 6, 8)  # of 16: after which candidates are compared
# After so many rows, this share of all candidates goes on. The last rule costs what 100 of 256 candidates cost.
RULES = [((8, 1 / 2),), ((8, 1 / 4),), ((4, 1 / 2),), ((4, 1 / 2), (8, 1 / 4)), ((4, 1 / 4), (8, 5 / 32))]
MEASURES = {
    "clip_repeat": "CLIP, the last row repeated", "clip_plain": "CLIP, the rest in the mean colour",
    "likelihood": "likelihood under the prior", "gain": "the same, given the prompt minus without",
    "last_head": "head on the prior's last state", "mean_head": "head on the mean of its states",
    "final": "the final score itself, the bound",
}  # fmt: skip
RIDGE = (10.0, 100.0, 1e3, 1e4, 1e5)
Records = list[dict[str, np.ndarray]]


@dataclass
class PruneSettings(Settings):
    """Which measure of a candidate that is drawn in part tells best whether it will be CLIP's best, and what is gained
    by dropping the others there.

    python benchmarks/prune.py --split validation --count 4

    For every caption: candidates with CLIP's final score, what the judge reads, and after 4, 6 and 8 of 16 rows the
    measures. Finished captions are kept in --output_dir: the same command resumes. Prints the rank correlations of the
    measures with the final score within a caption; and for rules that drop candidates the best of those left, less the
    best of as many candidates without dropping as cost the same tokens: its score, and whether the judge reads
    everything that was asked for. Intervals are bootstrapped over captions.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(4, "captions of each kind", low=1)
    num_images: int = option(64, "candidates of each", low=2)
    batch_size: int = option(64, "candidates sampled at once", low=1)
    split: str = option("validation", "captions that training never showed", choices=glyphs.world.SPLITS)
    seed: int = option(0, "of the candidates")
    output_dir: Path = option(Path("outputs/prune"), "where the records go")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")


# Recording


@contextmanager
def recorded_states(prior: DALLE) -> Iterator[list[Tensor]]:
    """Within it, the prior's last hidden states (b, n, dim) are appended to the list."""
    states: list[Tensor] = []
    hook = prior.norm.register_forward_hook(lambda module, args, output: states.append(output))
    try:
        yield states
    finally:
        hook.remove()


def rows_of(prior: Prior) -> list[int]:
    """`ROWS` in a prior's grid."""
    return [max(1, rows * prior.image_fmap_size // 16) for rows in ROWS]


def read_by_prior(prior: DALLE, text: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What the prior makes of the first rows of token grids (n, 256) of a prompt, for each of `ROWS`: the
    log-likelihoods (n, rows) of the tokens with and without the prompt, and the states (n, rows, dim) after the last
    token and in the mean over tokens."""
    found: dict[str, list[Tensor]] = {"likelihood": [], "unconditional": [], "last_state": [], "mean_state": []}
    texts = {"likelihood": text, "unconditional": prior.unconditional_text(text)}
    ends = [rows * prior.image_fmap_size for rows in rows_of(prior)]
    for part in tokens.split(8):
        part = part[:, : ends[-1]]
        for name, one in texts.items():
            with recorded_states(prior) as recorded:
                logits = prior.next_token_logits(one.expand(len(part), -1), part)[:, :-1]
            sums = (logits.gather(-1, part[..., None])[..., 0] - logits.logsumexp(-1)).cumsum(1)
            found[name].append(sums[:, [end - 1 for end in ends]])
            if name == "likelihood":
                states = recorded[0][:, prior.text_seq_len + 1 :]  # after each image token
                found["last_state"].append(states[:, [end - 1 for end in ends]])
                found["mean_state"].append(torch.stack([states[:, :end].mean(1) for end in ends], 1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def partial_scores(models: Models, prompt: str, tokens: Tensor) -> dict[str, Tensor]:
    """CLIP's scores (n, rows) of the pictures of the first rows, for each of `ROWS`: with the last row of tokens
    repeated to the bottom, and with the mean colour there."""
    prior, clip = models.pipe.model.prior, models.pipe.model.scorer
    side, found = prior.image_fmap_size, []
    for rows in rows_of(prior):
        images = torch.cat([prior.vae.decode_image(repeat_last_row(part, side))
                            for part in tokens[:, : rows * side].split(32)])  # fmt: skip
        repeated = clip.score(prompt, images)
        drawn = rows * images.shape[2] // side
        images[:, :, drawn:] = images[:, :, :drawn].mean((2, 3), keepdim=True)
        found.append(torch.stack((repeated, clip.score(prompt, images))))
    repeated, plain = torch.stack(found, 2)
    return {"clip_repeat": repeated, "clip_plain": plain}


def record(settings: PruneSettings, models: Models, scene: glyphs.Scene) -> dict[str, np.ndarray]:
    """All that is measured of the candidates of a caption: arrays whose first axis is the candidates."""
    prior = models.pipe.model.prior
    result = models.pipe.generate(scene.caption, settings.num_images, seed=settings.seed,
                                  batch_size=settings.batch_size)  # fmt: skip
    found = sorted(result, key=lambda image: image.index)
    tokens = torch.stack([image.tokens for image in found]).to(prior.device)
    logits = [models.judge(pixels) for pixels in torch.stack([image.pixels for image in found]).split(32)]
    right = [all(judge_by_attribute(scene, seen).values()) for part in logits for seen in likeliest(part)]
    nats = torch.cat([log_likelihood(scene, part) for part in logits])
    measured = {"scores": torch.tensor([image.score for image in found]), "right": torch.tensor(right), "nats": nats}
    with evaluation(prior):
        measured |= read_by_prior(prior, prior.tokenize(scene.caption), tokens)
        measured |= partial_scores(models, scene.caption, tokens)
    return {name: values.cpu().numpy() for name, values in measured.items()}


def all_records(settings: PruneSettings) -> Records:
    """Records the captions that are not in --output_dir yet."""
    made_with = {name: str(vars(settings)[name]) for name in ("model", "num_images", "split", "seed")}
    path = settings.output_dir / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(made_with) + "\n")
    elif json.loads(path.read_text("utf-8")) != made_with:
        raise UsageError(f"{path} is of other settings; move it away or give another --output_dir")
    models, records = None, []
    keys = [(group, index) for index in range(settings.count) for group in GROUPS]
    for group, index in tqdm(keys, "captions", dynamic_ncols=True):
        path = settings.output_dir / f"{group.replace(' ', '_')}-{index:04}.npz"
        if not path.exists():
            models = models or Models(settings.model, settings.device)
            if not isinstance(models.pipe.model.prior, DALLE):
                raise UsageError(f"{settings.model} has a prior whose states are not known here")
            with torch.no_grad():
                arrays = record(settings, models, scene_of(group, index, settings.split))
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            write_bytes(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as file:
            records.append({name: file[name] for name in file.files})
    return records


# Measures


def add_measures(records: Records) -> None:
    """Adds to each record what follows from it: "gain", "final", and the heads' "last_head" and "mean_head", all
    (n, rows)."""
    for one in records:
        one["gain"] = one["likelihood"] - one["unconditional"]
        one["final"] = np.repeat(one["scores"][:, None], len(ROWS), axis=1)
    for name in ("last", "mean"):
        columns = [head(records, f"{name}_state", row) for row in range(len(ROWS))]
        for one, *values in zip(records, *columns, strict=True):
            one[f"{name}_head"] = np.stack(values, 1)


def head(records: Records, states: str, row: int) -> list[np.ndarray]:
    """What a linear head on the states says of each candidate: for each caption, ridge regression on the others of the
    final scores, both less their means within a caption. Of `RIDGE` that which does best, which flatters the head."""
    inputs = [one[states][:, row].astype(np.float64) for one in records]
    inputs = [x - x.mean(0) for x in inputs]
    spread = np.concatenate(inputs).std(0) + 1e-6
    inputs = [x / spread for x in inputs]
    wanted = [standardized(one["scores"]) for one in records]
    squares = [x.T @ x for x in inputs]
    products = [x.T @ y for x, y in zip(inputs, wanted, strict=True)]
    said: dict[float, list[np.ndarray]] = {}
    for ridge in RIDGE:
        matrix = sum(squares) + ridge * np.eye(inputs[0].shape[1])
        said[ridge] = [x @ np.linalg.solve(matrix - square, sum(products) - product)
                       for x, square, product in zip(inputs, squares, products, strict=True)]  # fmt: skip
    return max(said.values(), key=lambda values: sum(map(rank_correlation, values, wanted)))


def standardized(values: np.ndarray) -> np.ndarray:
    """Less their mean, over their standard deviation; captions whose scores are all alike weigh less."""
    return (values - values.mean()) / (values.std() + 1e-3)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, between two measures without ties."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


# Rules


def cost(rule: Sequence[tuple[int, float]], side: int = 16) -> float:
    """The tokens that a rule samples, over those of all candidates."""
    total, before, share = 0.0, 0, 1.0
    for rows, kept in [*rule, (side, 0.0)]:
        total, before, share = total + share * (rows - before) / side, rows, kept
    return total


def survivors(record: dict[str, np.ndarray], rule: Sequence[tuple[int, float]], measure: str) -> np.ndarray:
    """The numbers of the candidates that a rule finishes."""
    left = np.arange(len(record["scores"]))
    for rows, share in rule:
        values = record[measure][left, ROWS.index(rows)]
        count = max(1, round(share * len(record["scores"])))
        left = np.sort(left[np.argsort(-values, kind="stable")[:count]])
    return left


def compare(record: dict[str, np.ndarray], rule: Sequence[tuple[int, float]], measure: str, of: str) -> float:
    """The best candidate that a rule leaves, less the best of as many as cost the same tokens without it: its "scores"
    or "right"."""
    scores, left = record["scores"], survivors(record, rule, measure)
    best = left[np.argmax(scores[left])]
    return float(record[of][best]) - best_of(scores, record[of], round(cost(rule) * len(scores)))


def main(argv: Sequence[str] | None = None) -> None:
    settings = PruneSettings.parse(argv)
    torch.set_num_threads(1)
    records = all_records(settings)
    add_measures(records)
    print(f"{len(records)} captions ({settings.split}) of {settings.num_images} candidates\n")

    print("| rank correlation with the final score | " + " | ".join(f"after {rows} rows" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for measure, words in list(MEASURES.items())[:-1]:
        columns = [[rank_correlation(one[measure][:, row], one["scores"]) for one in records]
                   for row in range(len(ROWS))]  # fmt: skip
        print(f"| {words} | " + " | ".join(with_interval(values, 2) for values in columns) + " |")
    judged = [rank_correlation(one["scores"], one["nats"]) for one in records]
    print(f"\nThe final score with the judge's likelihood of the caption: {with_interval(judged, 2)}")

    names = [f"{', '.join(f'{share:.0%} after {rows}' for rows, share in rule)} (cost {cost(rule):.0%})"
             for rule in RULES]  # fmt: skip
    print("\nGo on after so many of 16 rows (cost: of the tokens of all candidates)")
    for of, digits, words in (("scores", 4, "score of the best"), ("right", 2, "everything right")):
        print(f"\n| {words}, less equal cost | " + " | ".join(names) + " |\n" + "|---" * (len(RULES) + 1) + "|")
        for measure, told in MEASURES.items():
            columns = [[compare(one, rule, measure, of) for one in records] for rule in RULES]
            print(f"| {told} | " + " | ".join(with_interval(values, digits) for values in columns) + " |")


def with_interval(values: Sequence[float], digits: int) -> str:
    """The mean over captions and its interval, with signs."""
    return "{:+z.{d}f} ({:+z.{d}f} to {:+z.{d}f})".format(np.mean(values), *interval(values), d=digits)


if __name__ == "__main__":
    run(main)
