"""Trains a CLIP to tell the facts of the drawn world, from captions and from pictures, for `train_clip.py --clip_path`.

    python models/default/recipe/read_facts.py --bpe_path tokenizer.json --output_dir runs/facts

Contrast alone learns which of two subjects is where only after thousands of steps, and which is in which colour, where
the caption does not say which is where, not at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.data.loading import SampleDataset
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.scenes.dataset import image_of
from dalle_pytorch.scenes.facts import ALL_QUESTIONS, attributes
from dalle_pytorch.settings import again, option
from dalle_pytorch.tokenizers.hug import HugTokenizer
from dalle_pytorch.training import TrainingSettings, TrainingTask
from dalle_pytorch.training.commands.progress import run_training
from dalle_pytorch.training.commands.train_clip import ClipArchitecture
from dalle_pytorch.training.tasks.base import Batch, Loss, write_tokenizer
from dalle_pytorch.training.tasks.clip import AttributeReader


@dataclass
class FactTrainingSettings(ClipArchitecture, TrainingSettings):
    __doc__ = __doc__

    title = "what is learned"

    output_dir: Path = again(TrainingSettings, "output_dir", Path("runs/facts"))
    steps: int | None = again(TrainingSettings, "steps", 4000)
    batch_size: int = again(TrainingSettings, "batch_size", 64)
    learning_rate: float = again(TrainingSettings, "learning_rate", 2e-3)
    bpe_path: Path = option(help="tokenizer.json")


class FactTask(TrainingTask):
    """The mean cross-entropy of the facts that one linear map reads from the features of captions and of pictures: what
    it can read is in the same place in either."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip
        self.read = AttributeReader(clip.dim_latent, [*map(len, ALL_QUESTIONS.values())])

    def forward(self, batch: Batch) -> Loss:
        images = batch["image"].float() / 255
        told = self.clip.encode_text(self.clip.tokenize(batch["caption"]).to(images.device))
        of_captions = self._loss(told, batch["caption_attributes"])
        of_pictures = self._loss(self.clip.encode_image(images), batch["attributes"])
        return of_captions + of_pictures, {"captions": of_captions.detach(), "pictures": of_pictures.detach()}

    def _loss(self, features: Tensor, wanted: Tensor) -> Tensor:
        return self.read.loss(F.normalize(features, dim=-1), wanted.to(features.device)) / len(features)

    def native_parts(self) -> dict[str, PretrainedModel]:
        return {"clip": self.clip}

    def write_companions(self, folder: Path) -> None:
        assert self.clip.tokenizer is not None
        write_tokenizer(self.clip.tokenizer, folder)


class Facts(SampleDataset):
    """Training scenes with the answers to `ALL_QUESTIONS`. Every second has two subjects, and a caption that does not
    say which is where; some other captions are terse."""

    def __init__(self, resolution: int):
        self.resolution = resolution

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        if index % 2:
            scene = glyphs.with_unplaced_caption(glyphs.make_scene(index, num_subjects=2, of="painted"), index)
        else:
            scene = glyphs.make_scene(index, of="everything")
            scene = glyphs.with_terse_caption(scene, index) if index % 5 == 0 else scene
        told = {name: torch.tensor(values) for name, values in attributes(scene).items()}
        return {"image": image_of(scene, self.resolution), "caption": scene.caption} | told


def main(argv: Sequence[str] | None = None) -> None:
    settings = FactTrainingSettings.parse(argv)
    torch.manual_seed(settings.seed)
    tokenizer = HugTokenizer(settings.bpe_path)
    clip = CLIP(num_text_tokens=tokenizer.vocab_size, **settings.values(ClipArchitecture))
    clip.text_transformer.set_layer_scale(1)
    clip.visual_transformer.set_layer_scale(1)
    clip.temperature.data.fill_(math.log(1 / 0.07))
    clip.tokenizer = tokenizer
    run_training("facts", FactTask(clip), Facts(clip.image_size), settings)


if __name__ == "__main__":
    run(main)
