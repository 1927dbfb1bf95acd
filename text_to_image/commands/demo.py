"""The command `demo`."""

import resource
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_pytorch.settings import Settings, option
from text_to_image.commands import generate, upscale


@dataclass
class DemoSettings(Settings):
    """The main job on the default model: sample, rank, export tokens, diffuse the best. `make demo` runs it."""

    text: str = option("an avocado to the left of a chair on wood", "what to draw")
    outputs_dir: Path = option(Path("outputs"), "a folder per prompt is made here")


def call(name: str, main: Callable[[Sequence[str]], Any], *options: str) -> Any:
    print(f"$ python {name}.py {shlex.join(options)}", flush=True)
    return main(options)


def main(argv: Sequence[str] | None = None) -> None:
    settings = DemoSettings.parse(argv)
    started = time.monotonic()
    folders = call("generate", generate.main, "--text", settings.text, "--num_images", "16", "--clip_sort",
                   "--output_npy", "--outputs_dir", str(settings.outputs_dir))  # fmt: skip
    for folder in folders:
        call("upscale", upscale.main, "--input", str(folder), "--keep", "2", "--clip_guidance")
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nimages: {', '.join(map(str, folders))} (before_after.png shows both stages)")
    print(f"done in {seconds:.0f} s, with at most {peak:.1f} GiB of memory")
