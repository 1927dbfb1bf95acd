"""The main job on the embedded model: sample, rank, export tokens, diffuse the best. `make demo` runs it."""

from __future__ import annotations

import argparse
import resource
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_pytorch.cli import ArgumentParser, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", default="a red seven to the left of a blue star on brick", help="what to draw")
    parser.add_argument("--outputs_dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)

    import generate
    import upscale

    def call(script: Any, *options: str) -> Any:
        print(f"$ python {script.__name__}.py {shlex.join(options)}", flush=True)
        return script.main(options)

    started = time.monotonic()
    folders = call(generate, "--text", arguments.text, "--num_images", "16", "--clip_sort", "--output_npy",
                   "--outputs_dir", str(arguments.outputs_dir))  # fmt: skip
    for folder in folders:
        call(upscale, "--input", str(folder), "--keep", "2", "--clip_guidance")
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npictures: {', '.join(str(folder) for folder in folders)} (before_after.png shows both stages)")
    print(f"done in {seconds:.0f} s, with at most {peak:.1f} GiB of memory")


if __name__ == "__main__":
    run(main)
