"""What a decoder keeps of the VQGAN's image, by the steps it skips: `python benchmarks/skip_table.py --help`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from jobs import shared_by
from measures import frechet_distance
from quality import GROUPS, Models, Record, scene_of, with_interval
from tqdm import tqdm

from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import resize
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from diffusion.decoder import DiffusionDecoder
from diffusion.unet import UNet
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL


@dataclass
class SkipSettings(Settings):
    """What is kept of the tokens of drawn scenes by a U-Net that does not know them, and by one that does: attributes
    that the judge reads as the caption says, and the Fréchet distance to the drawn scenes on the judge's features.

    python benchmarks/skip_table.py --begin --unconditional runs/begin
    python diffusion/train.py --resume_checkpoint runs/begin --vae_path models/default/vae --steps 1000
        --image_text_folder 'glyphs?of=everything' --learning_rate 7e-4 --output_dir runs/unconditional
    python benchmarks/skip_table.py --unconditional runs/unconditional/decoder

    Both begin with the VQGAN's image, from the same noise. Prints the table in Markdown and writes `skip_table.json`.
    """

    unconditional: Path = option(help="folder of the decoder that does not know the tokens")
    model: Path = option(DEFAULT_MODEL, "folder of the model, with the decoder that does")
    begin: bool = option(False, "write that folder, with the weights that both share, as the start of a training")
    count: int = option(100, "captions of each kind", low=1)
    skip_steps: list[float] = option([0, 0.25, 0.4, 0.5, 0.75], "fractions of the steps", low=0, high=0.99, nargs="+")
    clip_guidance: bool = option(False, "guide both by the caption")
    steps: str = option("25", "diffusion steps")
    output_dir: Path = option(Path("outputs/skip"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


class Decoders(Models):
    """`Models` with a second pipeline, of the decoder that does not know the tokens."""

    def __init__(self, settings: SkipSettings):
        super().__init__(settings.model, settings.device)
        other = TextToImage.from_pretrained(settings.model, settings.device, decoder=settings.unconditional)
        self.decoders = {"conditioned": self.pipe, "unconditional": other}


def begin(settings: SkipSettings) -> None:
    """Writes the decoder of the model without its conditions: the weights are the decoder's, where it has the layer.

    It draws whole images, where the decoder draws what the VQGAN's lacks (`residual_std`): most is yet to be learnt.
    """
    decoder = DiffusionDecoder.from_pretrained(settings.model / "decoder")
    unconditional = {"emb_condition": False, "low_res_condition": False, "gated": False}
    unet = UNet(**decoder.unet.config | unconditional)
    old, new = decoder.unet.state_dict(), unet.state_dict()
    for name in old.keys() & new.keys():
        # The channels of `x` come before those of `low_res`, and those of the noise before the gate's.
        new[name] = old[name][tuple(map(slice, new[name].shape))]
    unet.load_state_dict(new)
    diffusion = asdict(decoder.settings) | {"residual_std": None}
    DiffusionDecoder(unet, decoder.vae, **diffusion).save_pretrained(settings.unconditional)


def redraw(decoders: Decoders, group: str, index: int, *, settings: SkipSettings) -> dict[str, Record]:
    """The judge's opinion of a drawn scene, of its VQGAN image enlarged, and of each decoder's image by skip."""
    scene = scene_of(group, index, "test")
    drawn = images_of([scene], 256)
    decoder = decoders.pipe.model.decoder
    tokens = decoder.vae.get_codebook_indices(resize(drawn, decoder.vae.image_size).to(decoder.device))[0].cpu()
    images = {"drawn": drawn, "enlarged": resize(decoders.pipe.read(tokens)[0].pixels[None], 256)}
    guidance = decoders.pipe.guidance(scene.caption) if settings.clip_guidance else False
    for (name, pipe), skip in product(decoders.decoders.items(), settings.skip_steps):
        result = pipe.upscale(tokens, init_from="tokens", skip_steps=skip, num_inference_steps=settings.steps,
                              clip_guidance=guidance)  # fmt: skip
        images[f"{name} {skip:g}"] = result[0].upscaled_pixels[0][None]
    return {name: decoders.opinion(scene, image) for name, image in images.items()}


def summarize(opinions: Sequence[dict[str, Record]]) -> dict[str, Record]:
    """Of each way: the share of attributes kept, and of images with all of them, and the distance to the drawn ones."""
    features = {name: np.asarray([one[name]["features"] for one in opinions]) for name in opinions[0]}
    return {
        name: {
            "attributes": with_interval([float(np.mean([*one[name]["right"].values()])) for one in opinions]),
            "everything": with_interval([float(all(one[name]["right"].values())) for one in opinions]),
            # Of no more images than features the covariance says nothing.
            "frechet": frechet_distance(values, features["drawn"]) if len(values) > values.shape[1] else None,
        }
        for name, values in features.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    settings = SkipSettings.parse(argv)
    if settings.begin:
        return begin(settings)
    captions = [*product(GROUPS, range(settings.count))]
    with shared_by(settings.jobs, partial(Decoders, settings)) as in_jobs:
        opinions = [*tqdm(in_jobs(partial(redraw, settings=settings), captions), "captions", len(captions))]
    rows = summarize(opinions)
    print(f"{len(captions)} drawn scenes, from their tokens, {settings.steps} steps")
    print("| decoder, skip_steps | attributes kept | everything kept | Fréchet distance |\n|---|---|---|---|")
    for name, row in rows.items():
        shares = (
            f"{s['mean']:.1%} ({s['low']:.1%} to {s['high']:.1%})" for s in (row["attributes"], row["everything"])
        )
        print(f"| {name} | {' | '.join(shares)} | {'–' if row['frechet'] is None else format(row['frechet'], '.2f')} |")
    write_text(settings.output_dir / "skip_table.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
