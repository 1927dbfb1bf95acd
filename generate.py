"""Stage 1: a prompt becomes ranked candidate pictures and, with --output_npy, the tokens that upscale.py redraws.

python generate.py --text 'a red seven on brick|a blue star on wood' --num_images 64 --clip_sort --output_npy
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_pytorch.cli import ArgumentParser, number, run
from dalle_pytorch.errors import UsageError

if TYPE_CHECKING:
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.sampling.candidates import Candidate

DEFAULT_MODEL = Path(__file__).resolve().parent / "models/default"
SAMPLING = {"top_p": 0.9, "temperature": 1.0, "cond_scale": 1.0}  # of a model that says nothing else
LARGEST_SHEET = 64  # pictures on a contact sheet


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--text", help="the prompt; | separates several")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line")

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_images", type=number(int, 1), default=16, help="candidates per prompt (default 16)")
    group.add_argument("--batch_size", type=number(int, 1), default=32, help="candidates sampled at once (default 32)")
    group.add_argument("--top_k", type=number(float, 0), help="below 1: the fraction of tokens cut away; a whole "
                                                              "number: the tokens kept. Wins over --top_p")  # fmt: skip
    group.add_argument(
        "--top_p",
        type=number(float, 0, 1, above=True),
        help=f"draw from the likeliest tokens of this share (default {SAMPLING['top_p']})",
    )
    group.add_argument("--temperature", type=number(float, 0),
                       help="0 takes the likeliest token (default 1, or the embedded model's own)")  # fmt: skip
    group.add_argument("--cond_scale", type=number(float, 0),
                       help="guidance by the prompt; 1 is none (default 1, or the model's own)")  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, help="candidate i is the same under a seed, however many are drawn"
    )
    group.add_argument("--gentxt", action="store_true", help="let the model finish the prompt first")
    group.add_argument("--image", type=Path, metavar="FILE", help="finish this picture, of which the top rows are kept")
    group.add_argument(
        "--num_init_img_tokens", type=number(int, 0), help="tokens kept of --image (default 7 rows of 16)"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--outputs_dir", type=Path, default=Path("outputs"), help="a folder per prompt is made here")
    group.add_argument(
        "--clip_sort", action="store_true", help="rank with CLIP, best first; the score is in the file name"
    )
    group.add_argument("--keep", type=number(int, 1), metavar="K", help="write only the best K")
    group.add_argument(
        "--output_npy", action="store_true", help="write each picture's tokens beside it, for upscale.py"
    )

    group = parser.add_argument_group("models (without these, the one in models/default)")
    group.add_argument("--dalle_path", help="a native folder or a dalle.pt")
    group.add_argument("--vqgan_model_path", help="a VQGAN in place of the one that the prior names")
    group.add_argument("--vqgan_config_path", help="its model.yaml")
    group.add_argument(
        "--taming", action="store_true", help="the published VQGAN in place of the one that the prior names"
    )
    group.add_argument("--bpe_path", help="tokenizer: a .model of YouTokenToMe, or with --hug a tokenizer.json")
    group.add_argument("--hug", action="store_true", help="--bpe_path is a tokenizer.json")
    group.add_argument("--chinese", action="store_true", help="the BERT Chinese tokenizer")
    group.add_argument("--clip_path", help="the CLIP that ranks: a native folder, an OpenAI file, a hub name")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    arguments = parser.parse_args(argv)
    if arguments.num_init_img_tokens is not None and arguments.image is None:
        parser.error("--num_init_img_tokens goes with --image")
    return arguments


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts, lower-cased as in the earlier systems. Raises `UsageError` for an empty one."""
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"{arguments.prompts} is not a text file in UTF-8") from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"{arguments.prompts} holds no prompt")
    else:
        prompts = arguments.text.split("|")
    prompts = [" ".join(prompt.replace("\0", " ").split()).lower() for prompt in prompts]
    if not all(prompts):
        raise UsageError("a prompt is empty; say in a few words what to draw")
    return list(dict.fromkeys(prompts))


def sampling_settings(arguments: argparse.Namespace) -> dict[str, float | None]:
    """What the tokens are drawn by: the flags given, and for the rest what the model's sampling.json says."""
    beside = DEFAULT_MODEL / "sampling.json"
    own = json.loads(beside.read_text("utf-8")) if arguments.dalle_path is None and beside.exists() else {}
    settings = SAMPLING | {name: own[name] for name in SAMPLING if name in own}
    if arguments.top_k is not None:
        settings["top_p"] = None
    given = {name: getattr(arguments, name) for name in ("top_k", "top_p", "temperature", "cond_scale")}
    return settings | {name: value for name, value in given.items() if value is not None}


# --------------------------------------------------------------------------------------------------
# Models


def load_models(arguments: argparse.Namespace, device: Any) -> tuple[Any, Any, Any]:
    """The prior with its VAE, the tokenizer, and the scorer (None without --clip_sort), on `device`."""
    from dalle_pytorch import load_clip, load_dalle
    from dalle_pytorch.published.vaes import load_vqgan
    from dalle_pytorch.tokenizers.load import load_tokenizer

    vae = None
    if arguments.vqgan_model_path:
        vae = load_vqgan(arguments.vqgan_model_path, arguments.vqgan_config_path)
    elif arguments.vqgan_config_path:
        raise UsageError("--vqgan_config_path goes with --vqgan_model_path")
    dalle_path = arguments.dalle_path or DEFAULT_MODEL / "dalle"
    dalle = load_dalle(dalle_path, vae=vae, taming=arguments.taming).to(device)
    tokenizer = load_tokenizer(arguments.bpe_path, hug=arguments.hug, chinese=arguments.chinese, beside=dalle_path)
    scorer = None
    if arguments.clip_sort:
        # The default CLIP has seen nothing but the default model's world: it does not judge another's pictures.
        clip_path = arguments.clip_path or (None if arguments.dalle_path else DEFAULT_MODEL / "clip")
        scorer = load_clip(clip_path).to(device)
    dalle.tokenizer = tokenizer
    return dalle, tokenizer, scorer


@cache
def default_model_words() -> frozenset[str]:
    """The words of the captions that the default model was trained on."""
    return frozenset(json.loads((DEFAULT_MODEL / "words.json").read_text("utf-8")))


def warn_of_unknown_words(prompt: str, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Names the words that the tokenizer, or the default model in its training, has never seen."""
    unknown = list(tokenizer.unknown_words(prompt))
    if arguments.dalle_path is None:
        words = dict.fromkeys(prompt.split())
        unknown = [word for word in words if word.strip(".,;:!?\"'()") not in default_model_words()]
    if unknown:
        words = ", ".join(word[:40] for word in unknown[:12]) + (" …" if len(unknown) > 12 else "")
        print(f"warning: this model has never seen: {words}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Output


def claim_folder(outputs_dir: Path, prompt: str) -> Path:
    """The folder of a prompt: the one that is already its own, or one that no other prompt has."""
    from dalle_pytorch.files.atomic import write_text
    from dalle_pytorch.files.names import safe_name

    name = safe_name(prompt)
    for suffix in ["", *(f"-{i}" for i in range(2, 10_000))]:
        folder = outputs_dir / f"{name}{suffix}"
        caption = folder / "caption.txt"
        if not folder.exists():
            write_text(caption, prompt + "\n")
            return folder
        if caption.exists() and caption.read_text("utf-8").strip() == prompt:
            return folder
    raise UsageError(f"{outputs_dir} has too many folders named {name}")


def write_results(folder: Path, candidates: list[Candidate], output_npy: bool) -> None:
    """Writes pictures, tokens and the contact sheet, then clears away what an earlier run left under such numbers."""
    from dalle_pytorch.files.images import contact_sheet, save_image
    from dalle_pytorch.files.tokens import save_tokens

    written = set()
    for rank, candidate in enumerate(candidates):
        score = "" if candidate.score is None else f"-{candidate.score:.4f}"
        written.add(f"{rank}{score}.png")
        save_image(folder / f"{rank}{score}.png", candidate.image)
        if output_npy:
            written.add(f"{rank}.npy")
            save_tokens(folder / f"{rank}.npy", candidate.tokens)
    save_image(folder / "grid.png", contact_sheet([candidate.image for candidate in candidates[:LARGEST_SHEET]]))
    for path in folder.iterdir():
        if re.fullmatch(r"\d+(--?\d\.\d+)?\.png|\d+\.npy", path.name) and path.name not in written:
            path.unlink()


# --------------------------------------------------------------------------------------------------


def init_tokens(arguments: argparse.Namespace, dalle: DALLE) -> Any:
    """The tokens of the upper part of --image, or None."""
    if arguments.image is None:
        return None
    from dalle_pytorch.files.images import image_to_tensor, read_image

    count = arguments.num_init_img_tokens
    count = int(0.4375 * dalle.image_seq_len) if count is None else count  # OpenAI's share: 14 rows of 32
    if count >= dalle.image_seq_len:
        raise UsageError(f"--num_init_img_tokens {count} leaves nothing to draw; this model's pictures have "
                         f"{dalle.image_seq_len} tokens")  # fmt: skip
    size = dalle.image_fmap_size * 2**dalle.vae.num_layers
    image = image_to_tensor(read_image(arguments.image), size).to(dalle.device)
    return dalle.vae.get_codebook_indices(image)[0, :count]


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Runs the command line; returns the folders written, one a prompt."""
    arguments = parse_arguments(argv)
    prompts = read_prompts(arguments)

    from tqdm import tqdm

    from dalle_pytorch.devices import pick_device
    from dalle_pytorch.sampling.candidates import generate_candidates
    from dalle_pytorch.sampling.settings import SamplingSettings

    device = pick_device(arguments.device)
    dalle, tokenizer, scorer = load_models(arguments, device)
    given = init_tokens(arguments, dalle)
    sampling = sampling_settings(arguments)

    folders = []
    for prompt in prompts:
        if arguments.gentxt:
            text_sampling = {name: value for name, value in sampling.items() if name != "cond_scale"}
            _, (prompt,) = dalle.generate_texts(tokenizer, prompt, seed=arguments.seed, **text_sampling)
            print(f"the prompt goes on: {prompt}")
        warn_of_unknown_words(prompt, tokenizer, arguments)
        folder = claim_folder(arguments.outputs_dir, prompt)
        drawn = dalle.image_seq_len - (0 if given is None else len(given))
        count = arguments.num_images if scorer else min(arguments.num_images, arguments.keep or arguments.num_images)
        started = time.monotonic()
        with tqdm(total=count * drawn, unit="token", unit_scale=True, dynamic_ncols=True, desc=prompt[:40]) as bar:

            def progress(finished: int, tokens: int, bar: tqdm = bar, count: int = count) -> None:
                bar.set_postfix_str(f"{finished} of {count} candidates", refresh=False)
                bar.update(min(arguments.batch_size, count - finished))

            candidates = generate_candidates(
                dalle, prompt, count, scorer=scorer, keep=arguments.keep, batch_size=arguments.batch_size,
                seed=arguments.seed, init_image_tokens=given, progress=progress,
                settings=SamplingSettings(**sampling),
            )  # fmt: skip
            bar.set_postfix_str(f"{count} of {count} candidates")
        seconds = time.monotonic() - started
        write_results(folder, candidates, arguments.output_npy)
        best = "" if candidates[0].score is None else f", best score {candidates[0].score:.4f}"
        print(f"{folder}: kept {len(candidates)} of {count} candidates, {count / seconds:.2f} candidates/s{best}")
        folders.append(folder)
    return folders


if __name__ == "__main__":
    run(main)
