"""The judge: a small classifier that names everything in a glyphs scene. It never sees a model's output in training.

    python benchmarks/judge.py --output_dir runs/default/judge

trains it on drawn scenes, resumably, and prints its share of test scenes read without a mistake. The trained one is in
models/default/judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.data.loading import SampleDataset
from dalle_pytorch.pretrained import PretrainedModel, records_config
from dalle_pytorch.scenes import facts
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.scenes.facts import NOT_ASKED, answers
from dalle_pytorch.settings import again, option
from dalle_pytorch.training import TrainingSettings, TrainingTask
from dalle_pytorch.training.commands.progress import run_training

# Scenes to train on, in turn: what is rare in those of the other trainings must be read just as well.
MIXTURES = ("everything", "things", "recoloured", "made", "glyphs", "everything")
# How much a picture has of the fine grain that only 256 pixels can show is asked too.
QUESTIONS = facts.QUESTIONS | {"detail": ("none", "faint", "fine")}
IMAGE_SIZE = 256
BILINEAR = Image.Resampling.BILINEAR


def judge_by_attribute(scene: glyphs.Scene, seen: dict[str, str]) -> dict[str, bool]:
    """Which of the things that the caption of `scene` says are so in a picture of which the judge says `seen`."""
    facts = answers(scene)
    right = {"count": seen["count"] == facts["count"], "background": seen["background"] == facts["background"]}
    first = (seen["kind"], seen["colour"])
    if len(scene.subjects) == 1:
        right |= {"subject": first[0] == facts["kind"], "colour": first[1] == facts["colour"]}
        if glyphs.states_size(scene):
            right["size"] = seen["size"] == facts["size"]
        if glyphs.states_place(scene):
            right["place"] = seen["place"] == facts["place"]
        return right
    second = (seen["second_kind"], seen["second_colour"])
    wanted = [(facts["kind"], facts["colour"]), (facts["second_kind"], facts["second_colour"])]
    drawn = [first, second]
    if not glyphs.states_place(scene) and drawn != wanted:
        drawn = [second, first]
    right["subject"] = [kind for kind, _ in drawn] == [kind for kind, _ in wanted]
    right["colour"] = [colour for _, colour in drawn] == [colour for _, colour in wanted]
    if glyphs.states_place(scene):
        # Which is where: each subject at its own place, along the axis that was asked for.
        right["place"] = drawn == wanted and seen["relation"] == facts["relation"]
    return right


def log_likelihood(scene: glyphs.Scene, logits: dict[str, Tensor]) -> Tensor:
    """The log-probability (b,) that the judge gives to all that the caption of `scene` says, in nats."""
    log_p = {name: values.log_softmax(-1) for name, values in logits.items()}
    facts = answers(scene)

    def sum_of(facts: dict[str, str]) -> Tensor:
        return sum(log_p[name][:, QUESTIONS[name].index(answer)] for name, answer in facts.items())

    if scene.relation and not glyphs.states_place(scene):
        # Either subject may be the first.
        del facts["relation"]
        swap = {"kind": "second_kind", "second_kind": "kind", "colour": "second_colour", "second_colour": "colour"}
        return torch.logaddexp(sum_of(facts), sum_of({swap.get(name, name): facts[name] for name in facts}))
    if not scene.relation and not glyphs.states_size(scene):
        del facts["size"]
    if not scene.relation and not glyphs.states_place(scene):
        del facts["place"]
    return sum_of(facts)


def coarse(images: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) without what half the pixels a side do not show."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


class ResidualBlock(nn.Module):
    """Two convolutions on maps (b, channels, h, w), added to what they are given."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(*_convolution(channels, channels), *_convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convolution(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(8, out_channels), nn.SiLU()]


class Judge(PretrainedModel):
    """Pictures (b, 3, h, w) in [0, 1], brought to 256 pixels, to logits for every question.

    `hidden` features say how the scene is laid out and what it stands on. They choose where to look for the first and
    for the second subject, and what is found there, `hidden` features of each, is read by the same two heads: a subject
    learned in one place is known in all.
    """

    @records_config
    def __init__(self, channels: int = 64, hidden: int = 64):
        super().__init__()
        narrow, wide = channels * 2, channels * 3
        self.trunk = nn.Sequential(
            *_convolution(48 + 3, channels), *_convolution(channels, narrow, stride=2), ResidualBlock(narrow),
            *_convolution(narrow, wide, stride=2), ResidualBlock(wide), ResidualBlock(wide),
        )  # fmt: skip
        self.layout = nn.Sequential(nn.Conv2d(wide, channels // 2, 1), nn.Flatten(), nn.Linear(channels * 32, hidden),
                                    nn.LayerNorm(hidden), nn.SiLU())  # fmt: skip
        self.where = nn.Linear(hidden, 2 * 64)
        self.subject = nn.Sequential(nn.Linear(wide, hidden), nn.LayerNorm(hidden), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(options)) for name, options in QUESTIONS.items()
                                    if not name.startswith("second_")})  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] → (b, 3 · hidden): what all answers are read from."""
        if images.shape[-1] != IMAGE_SIZE:
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        # How strong the grain is, a number for each square of 8 pixels: convolutions are slow to see a variance. Of all
        # the rest half the pixels show as much.
        grain = F.avg_pool2d((images - coarse(images)).abs(), 8)
        folded = F.pixel_unshuffle(F.avg_pool2d(images, 2) * 2 - 1, 4)
        found = self.trunk(torch.cat([folded, 16 * grain], dim=1))
        layout = self.layout(found)
        places = self.where(layout).unflatten(1, (2, -1)).softmax(-1)
        subjects = self.subject(places @ found.flatten(2).transpose(1, 2))
        return torch.cat([layout[:, None], subjects], dim=1).flatten(1)

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Features (b, 3 · hidden) to logits (b, number of answers) for every question."""
        layout, first, second = features.chunk(3, dim=1)
        read_from = {"kind": first, "colour": first, "second_kind": second, "second_colour": second}
        return {name: self.heads[name.removeprefix("second_")](read_from.get(name, layout)) for name in QUESTIONS}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.logits(self.features(images))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The likeliest answer to every question, for each picture."""
        return likeliest(self(images))


def likeliest(logits: dict[str, Tensor]) -> list[dict[str, str]]:
    """The likeliest answer to every question, for each picture that the logits are of."""
    indices = {name: values.argmax(1).tolist() for name, values in logits.items()}
    rows = zip(*indices.values(), strict=True)
    return [{name: QUESTIONS[name][index] for name, index in zip(indices, row, strict=True)} for row in rows]


class JudgeTask(TrainingTask):
    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, wanted = batch["image"].float() / 255, batch["answers"]
        # Sampled pictures are not quite in place, and not clean; the judge must not mind.
        images = torch.roll(images, torch.randint(-4, 5, (2,)).tolist(), (2, 3))
        if torch.rand(()) < 0.5:
            images = images + 0.05 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
            wanted[:, list(QUESTIONS).index("detail")] = NOT_ASKED
        pairs = zip(self.judge(images).values(), wanted.unbind(1), strict=True)
        losses = [F.cross_entropy(logits, answer, ignore_index=NOT_ASKED, reduction="sum") for logits, answer in pairs]
        return torch.stack(losses).sum() / len(images), {}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"judge": self.judge}

    def compiled_parts(self) -> list[nn.Module]:
        return [self.judge.trunk]


class QuestionDataset(SampleDataset):
    """Scenes to train on with their answers, as indices in the order of `QUESTIONS`.

    Sampled pictures are softer than drawn ones: of ten scenes four have half the pixels a side, two a quarter, and two
    half their grain.
    """

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = glyphs.make_scene(index, "train", of=MIXTURES[index % len(MIXTURES)])
        softness = index // len(MIXTURES) % 10
        # Below 256 pixels there is no grain, and drawing takes a tenth of the time.
        image, detail = Image.fromarray(glyphs.draw(scene, IMAGE_SIZE // 2 if softness < 6 else IMAGE_SIZE)), "fine"
        if softness < 6:
            image = (image if softness < 4 else image.reduce(2)).resize((IMAGE_SIZE, IMAGE_SIZE), BILINEAR)
            detail = "none"
        elif softness < 8:
            image = Image.blend(image, image.reduce(2).resize(image.size, BILINEAR), 0.5)
            detail = "faint"
        indices = facts.indices(answers(scene) | {"detail": detail}, QUESTIONS)
        return {"image": torch.from_numpy(np.array(image)).permute(2, 0, 1), "answers": torch.tensor(indices)}


def share_of_scenes_read(judge: Judge, count: int = 1000, resolution: int = IMAGE_SIZE // 2,
                         of: str = "everything") -> float:  # fmt: skip
    """The share of the first `count` drawn test scenes of which the judge reads everything that the caption says."""
    right = 0
    for start in range(0, count, 100):
        scenes = [glyphs.make_scene(i, "test", of=of) for i in range(start, min(start + 100, count))]
        seen = judge.read(images_of(scenes, resolution))
        right += sum(all(judge_by_attribute(*pair).values()) for pair in zip(scenes, seen, strict=True))
    return right / count


@dataclass
class TrainJudgeSettings(TrainingSettings):
    __doc__ = __doc__

    steps: int | None = again(TrainingSettings, "steps", 1500)
    batch_size: int = again(TrainingSettings, "batch_size", 64)
    learning_rate: float = again(TrainingSettings, "learning_rate", 2e-3)
    judge_path: Path | None = option(None, "judge to continue from")


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainJudgeSettings.parse(argv)
    torch.manual_seed(settings.seed)
    judge = Judge() if settings.judge_path is None else Judge.from_pretrained(settings.judge_path)
    run_training("judge", JudgeTask(judge), QuestionDataset(), settings)
    for of in dict.fromkeys(MIXTURES):
        for resolution in (IMAGE_SIZE // 2, IMAGE_SIZE):
            share = share_of_scenes_read(judge, resolution=resolution, of=of)
            print(f"reads {share:.1%} of 1,000 test scenes ({of}) at {resolution} px without a mistake")


if __name__ == "__main__":
    run(main)
