"""DALLE-pytorch 1.6.6 for `sampling.py`, in a process of its own that finds it before the package of this repository.

`install` puts it into a folder. As a script, with that folder in PYTHONPATH and settings as JSON in the first argument,
this prints seconds and peak memory as JSON; with `weights` that does not exist it only writes these.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

PACKAGES = ("dalle-pytorch==1.6.6", "rotary-embedding-torch==0.1.5")
# What its modules import and the measured path does not use. These no longer install, or bring another build of torch.
STAND_INS = ("axial_positional_embedding", "omegaconf", "pkg_resources", "taming", "taming.models",
             "taming.models.vqgan")  # fmt: skip


def install(folder: Path) -> None:
    """Installs DALLE-pytorch without what it depends on, unless it is there."""
    if not (folder / "dalle_pytorch").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *PACKAGES], check=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.modules.update({name: MagicMock() for name in STAND_INS})
    import torch

    from dalle_pytorch import DALLE, DiscreteVAE
    from dalle_pytorch.dalle_pytorch import gumbel_sample, top_k

    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    vae = DiscreteVAE(image_size=256, num_layers=4, num_tokens=1024, codebook_dim=8, hidden_dim=8)
    dalle = DALLE(vae=vae, **settings["sizes"]).eval()
    weights = Path(settings["weights"])
    if not weights.exists():
        own = {name: tensor for name, tensor in dalle.state_dict().items() if not name.startswith("vae.")}
        torch.save(own, weights)
        return
    dalle.load_state_dict(torch.load(weights), strict=False)
    vae.decode = lambda tokens: tokens  # the prior is measured alone
    rows, clock = settings["rows"], getattr(time, settings["clock"])
    text = torch.ones(rows, dalle.text_seq_len, dtype=torch.long)
    tokens = torch.randint(0, 1024, (rows, dalle.image_seq_len))

    def cached() -> float:
        """Seconds of whole grids. At cond_scale 1 its sampler forgets the cache that `use_cache` asks for."""
        dalle.forward_with_cond_scale = lambda text, image, cond_scale, cache: dalle(text, image, cache=cache)
        started = clock()
        dalle.generate_images(text, use_cache=True)
        return clock() - started

    @torch.no_grad()
    def default() -> float:
        """Seconds of whole grids: the pass over the whole sequence that it makes for a token, at some positions."""
        positions = range(0, dalle.image_seq_len, dalle.image_seq_len // settings["positions"])
        started = clock()
        for position in positions:
            logits = dalle.forward_with_cond_scale(text, tokens[:, :position], cond_scale=1.0)[:, -1]
            gumbel_sample(top_k(logits, thres=0.5))
        return (clock() - started) * dalle.image_seq_len / len(positions)

    measure = cached if settings["cached"] else default
    seconds = sorted(measure() for _ in range(settings["repeats"]))[settings["repeats"] // 2]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mib": int(peak.split()[1]) / 1024}))


if __name__ == "__main__":
    main()
