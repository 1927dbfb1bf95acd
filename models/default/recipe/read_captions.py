"""Trains the text encoder of a CLIP to read captions of the drawn world, for `train_clip.py --clip_path`.

    python models/default/recipe/read_captions.py --bpe_path tokenizer.json --output_dir runs/captions

Minutes on a CPU, for it draws nothing: contrast with images alone learns which of two subjects is where only after
thousands of steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.data.loading import SampleDataset
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.scenes.facts import ALL_QUESTIONS, NOT_ASKED, indices, paints, stated_answers
from dalle_pytorch.settings import again, option
from dalle_pytorch.tokenizers.hug import HugTokenizer
from dalle_pytorch.training import TrainingSettings, TrainingTask
from dalle_pytorch.training.commands.progress import run_training
from dalle_pytorch.training.commands.train_clip import ClipArchitecture
from dalle_pytorch.training.tasks.base import Batch, Loss, write_tokenizer


@dataclass
class CaptionTrainingSettings(ClipArchitecture, TrainingSettings):
    __doc__ = __doc__

    title = "what is learned"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/captions"))
    steps: int | None = again(TrainingSettings, "steps", 6000)
    batch_size: int = again(TrainingSettings, "batch_size", 64)
    learning_rate: float = again(TrainingSettings, "learning_rate", 2e-3)
    bpe_path: Path = option(help="tokenizer.json")


class CaptionTask(TrainingTask):
    """The mean cross-entropy of the facts that a linear map reads from the features of captions."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip
        self.read = nn.Linear(clip.dim_latent, sum(map(len, ALL_QUESTIONS.values())))

    def forward(self, batch: Batch) -> Loss:
        latents = F.normalize(self.clip.encode_text(self.clip.tokenize(batch["caption"])), dim=-1)
        logits = self.read(latents * self.clip.dim_latent**0.5).split([*map(len, ALL_QUESTIONS.values())], dim=1)
        pairs = [*zip(logits, batch["attributes"].unbind(1), strict=True)]
        losses = [F.cross_entropy(*pair, ignore_index=NOT_ASKED, reduction="sum") for pair in pairs]
        return torch.stack(losses).sum() / len(latents), {}

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"clip": self.clip}

    def write_companions(self, folder: Path) -> None:
        assert self.clip.tokenizer is not None
        write_tokenizer(self.clip.tokenizer, folder)


class Captions(SampleDataset):
    """Captions of training scenes, every fifth a terse one, every second of two subjects of which it does not say which
    is where, and the answers to `ALL_QUESTIONS` that they tell."""

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        if index % 2:
            scene = glyphs.with_unplaced_caption(glyphs.make_scene(index, num_subjects=2, of="everything"), index)
        else:
            scene = glyphs.make_scene(index, of="everything")
            scene = glyphs.with_terse_caption(scene, index) if index % 5 == 0 else scene
        told = indices(stated_answers(scene) | paints(scene), ALL_QUESTIONS)
        return {"caption": scene.caption, "attributes": torch.tensor(told)}


def main(argv: Sequence[str] | None = None) -> None:
    settings = CaptionTrainingSettings.parse(argv)
    torch.manual_seed(settings.seed)
    tokenizer = HugTokenizer(settings.bpe_path)
    clip = CLIP(num_text_tokens=tokenizer.vocab_size, **settings.values(ClipArchitecture))
    clip.text_transformer.set_layer_scale(1)
    clip.visual_transformer.set_layer_scale(1)
    clip.temperature.data.fill_(math.log(1 / 0.07))
    clip.tokenizer = tokenizer
    run_training("captions", CaptionTask(clip), Captions(), settings)


if __name__ == "__main__":
    run(main)
