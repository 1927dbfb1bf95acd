"""The command `serve`."""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dalle_pytorch.files.text import read_text
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.settings import Settings, option
from text_to_image.settings import DTYPE_HELP
from text_to_image.web.forms import Limits
from text_to_image.web.server import LOCAL, check_access, check_address, check_extra, served


@dataclass
class _Access(Settings):
    title: ClassVar[str] = "where the page is, and for whom"
    host: str = option(LOCAL[0], "the address it listens at; 0.0.0.0 for all of this machine, which needs --auth")
    port: int | None = option(None, "its port (default: the first free one from 7860 on)", low=1, high=65535)
    share: bool = option(False, "a public address too, by gradio's tunnel, which needs --auth")
    auth: list[str] = option([], "who may come in", kind=str, nargs="+", metavar="NAME:PASSWORD")
    auth_file: Path | None = option(None, "the same, one a line: other users of this machine see a command line",
                                    metavar="FILE")  # fmt: skip


@dataclass
class _Models(Settings):
    title: ClassVar[str] = "models (without these, the default model)"
    model: str | None = option(None, "a folder with all parts, as models/default, or a hub name", metavar="NAME")
    dalle_path: str | None = option(None, "the prior, as in generate.py; without --decoder_path there is no diffusion")
    clip_path: str | None = option(None, "the CLIP that ranks and guides")
    decoder_path: str | None = option(None, "the diffusion decoder, a native folder")
    devices: list[str] = option([], "cpu, cuda:0 …, each of which works on one request at a time (default: a GPU if "
                                    "there is one)", nargs="+", metavar="DEVICE")  # fmt: skip
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    batch_size: int = option(4, "candidates sampled at once, and shown together", low=1)


@dataclass
class ServeSettings(_Models, Limits, _Access):
    """A web page: a prompt becomes candidates, the picked ones are diffused, and all can be downloaded.

    dalle serve
    dalle serve --host 0.0.0.0 --auth ada:secret --devices cuda:0 cuda:1
    """


def main(argv: Sequence[str] | None = None) -> None:
    settings = ServeSettings.parse(argv)
    check_extra()
    lines = read_text(settings.auth_file).splitlines() if settings.auth_file else []
    check_address(settings.host, settings.port)
    accounts = check_access(settings.host, settings.share, [*settings.auth, *filter(None, lines)])

    from text_to_image.pipeline import TextToImage
    from text_to_image.web.work import Workers

    workers = Workers(
        [
            TextToImage.from_pretrained(settings.model, device, prior=settings.dalle_path, scorer=settings.clip_path,
                                        decoder=settings.decoder_path, dtype=settings.dtype)
            for device in settings.devices or [None]
        ],
        diffusion=settings.dalle_path is None or settings.decoder_path is not None,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with served(workers, Limits(**settings.values(Limits)), host=settings.host, port=settings.port,
                share=settings.share, accounts=accounts, batch_size=settings.batch_size) as address:  # fmt: skip
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
