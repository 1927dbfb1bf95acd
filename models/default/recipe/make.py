"""Remakes the default model from nothing: `python models/default/recipe/make.py --help`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import atomic_write, write_text
from dalle_pytorch.settings import Settings, option

MODEL = Path(__file__).resolve().parents[1]
ROOT = MODEL.parents[1]


def stages(runs: Path, longer: float = 1.0, options: Sequence[str] = ()) -> dict[str, list[str]]:
    """The command of every stage, in order; `longer` multiplies the steps of training, `options` go to every one."""
    tokenizer, vae = str(runs / "tokenizer.json"), str(runs / "vqgan/vae")
    scripts = "DALLE-pytorch"
    drawn, painted = "glyphs?of=everything", "glyphs?of=painted"
    contrasted = "wrong_captions=4&twins=true&exchanged_every=3&facts=true"
    of_prior = ["--vae_path", vae, "--bpe_path", tokenizer, "--batch_size", "16", "--subject_weight", "3",
                "--image_noise", "0.3", "--ema_decay", "0.998", "--muon", "--save_every", "100"]  # fmt: skip
    # 32 scenes and their twins: 64 pictures a step.
    of_clip = ["--bpe_path", tokenizer, "--batch_size", "32", "--ema_decay", "0.99", "--muon", "--save_every", "100"]

    def training(script: str, name: str, count: int, data: str | None = drawn) -> list[str]:
        folder = [] if data is None else ["--image_text_folder", data]
        return [script, *folder, "--output_dir", str(runs / name), "--steps", str(round(count * longer)), *options]

    return {
        "tokenizer": [f"{scripts}/train_tokenizer.py", "--image_text_folder", drawn, "--count", "30000",
                      "--vocab_size", "768", "--output", tokenizer],
        "vqgan": [*training(f"{scripts}/train_vqgan.py", "vqgan", 3000), "--learning_rate", "1.5e-3",
                  "--num_tokens", "8192", "--local_encoder", "--starting_temp", "0", "--disc_weight", "0",
                  "--perceptual_weight", "0", "--save_every", "200"],
        # Tokens of other pictures among those it is shown: it learns to go by the caption rather than by what it drew.
        "dalle": [*training(f"{scripts}/train_dalle.py", "dalle", 6000, f"{drawn}&terse_every=6"), *of_prior,
                  "--learning_rate", "2e-3", "--dim", "192", "--depth", "6", "--heads", "3", "--layer_scale", "1"],
        # More of what is rare, and what is learned of a token is learned of those that look like it.
        "tuned": [*training(f"{scripts}/train_dalle.py", "tuned", 4000, f"{painted}&terse_every=6"), *of_prior,
                  "--dalle_path", str(runs / "dalle/dalle"), "--learning_rate", "1e-3", "--warmup_steps", "50",
                  "--share_codes"],
        # In the end as often as it is asked for: things in their own colours became rare.
        "finished": [*training(f"{scripts}/train_dalle.py", "finished", 600, f"{drawn}&terse_every=6"), *of_prior,
                     "--dalle_path", str(runs / "tuned/dalle"), "--learning_rate", "2.5e-4", "--warmup_steps", "50",
                     "--share_codes"],
        "facts": [*training("models/default/recipe/read_facts.py", "facts", 4000, None), "--bpe_path", tokenizer,
                  "--dim_latent", "256", "--visual_conv_stem", "--visual_attention_pool"],
        "clip": [*training(f"{scripts}/train_clip.py", "clip", 3000, f"{drawn}&terse_every=2&{contrasted}"), *of_clip,
                 "--clip_path", str(runs / "facts/clip"), "--learning_rate", "1e-3"],
        # What it will rank: scenes as the prior draws them.
        "ranker": [*training(f"{scripts}/train_clip.py", "ranker", 1800, f"{painted}&terse_every=4&{contrasted}"),
                   *of_clip, "--clip_path", str(runs / "clip/clip"), "--dalle_path", str(runs / "finished/dalle"),
                   "--learning_rate", "7e-4", "--warmup_steps", "50"],
        "decoder": [*training("diffusion/train.py", "decoder", 4000), "--vae_path", vae,
                    "--save_every", "100"],
        "judge": [*training("benchmarks/judge.py", "judge", 1500, None), "--warmup_steps", "50", "--ema_decay", "0.99"],
    }  # fmt: skip


def install(runs: Path) -> None:
    """Copies the trained parts to `models/default`, each whole or not at all."""
    for source, name in (
        ("vqgan/vae", "vae"),
        ("finished/dalle", "dalle"),
        ("ranker/clip", "clip"),
        ("decoder/decoder", "decoder"),
        ("judge/judge", "judge"),
    ):
        # What a trained part carries with it to be complete lies beside it there.
        with atomic_write(MODEL / name) as temporary:
            shutil.copytree(runs / source, temporary, ignore=shutil.ignore_patterns("vae", "tokenizer.json"))
    with atomic_write(MODEL / "tokenizer.json") as temporary:
        shutil.copy(runs / "tokenizer.json", temporary)
    # What it has never seen it cannot draw; generate.py warns of words that are not here.
    write_text(MODEL / "words.json", json.dumps(sorted(glyphs.words(glyphs.world.SUBJECTS))) + "\n")


@dataclass
class RecipeSettings(Settings):
    """Remakes the default model from nothing: tokenizer, VQGAN, prior, CLIP, decoder, and the judge of the benchmark.

    python models/default/recipe/make.py

    Every stage resumes from its last checkpoint, so the command can be stopped and given again at any time.
    Checkpoints and logs go to `runs/default`; the weights are copied to `models/default` when all stages are done. Its
    README.md says how long it took and what came of it.
    """

    runs: Path = option(ROOT / "runs/default", "folder for checkpoints and logs")
    only: str | None = option(None, "run this stage alone")
    longer: float = option(1.0, "multiplies the steps of training: a GPU has time for more", low=0, above=True,
                           metavar="FACTOR")  # fmt: skip
    mixed_precision: str = option("no", "of all trainings", choices=["no", "bf16"], flags=["--bf16=bf16"])
    compile: bool = option(False, "compile the networks of all trainings")


def main(argv: Sequence[str] | None = None) -> None:
    settings = RecipeSettings.parse(argv)
    options = ["--mixed_precision", settings.mixed_precision, *(["--compile"] if settings.compile else [])]
    commands = stages(settings.runs, settings.longer, options)
    if settings.only and settings.only not in commands:
        raise UsageError(f"there is no stage {settings.only!r}; there are {', '.join(commands)}")
    settings.runs.mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        if settings.only in (None, name):
            print(f"== {name}: python {' '.join(command)}", flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if not settings.only:
        install(settings.runs)
        print(f"the models are in {MODEL}")


if __name__ == "__main__":
    run(main)
