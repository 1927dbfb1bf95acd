"""Serving the page: who may come in, from where, and what gradio must not do by itself."""

from __future__ import annotations

import io
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_pytorch.errors import UsageError
from text_to_image.web.forms import Limits

if TYPE_CHECKING:
    from text_to_image.web.work import Workers

HEAD = "<style>@media (max-width: 760px) { .gradio-container .main.app { padding: 8px 12px; } }</style>"
LOCAL = ("127.0.0.1", "localhost", "::1")


def check_extra() -> None:
    """Raises `UsageError`, which says what to install, if gradio is missing."""
    if find_spec("gradio") is None:
        raise UsageError("gradio is missing: pip install 'dalle-diffusion[web]'")


def check_access(host: str, share: bool, auth: Sequence[str]) -> list[tuple[str, str]]:
    """The names and passwords in "name:password". Raises `UsageError` for others, and for a page that is open to
    everyone outside this machine."""
    accounts = [(name, password) for name, _, password in (account.partition(":") for account in auth)]
    if not all(name and password for name, password in accounts):
        raise UsageError("expected --auth NAME:PASSWORD, neither of them empty")
    if (share or host not in LOCAL) and not accounts:
        raise UsageError("a page that others can reach, by --host or --share, needs --auth NAME:PASSWORD")
    return accounts


def check_address(host: str, port: int | None) -> None:
    """Raises `UsageError` if nothing can listen there: gradio would try a hundred ports."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        place = host if port is None else f"{host}:{port}"
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot listen at {place} ({reason})") from error


@contextmanager
def served(
    workers: Workers,
    limits: Limits | None = None,
    *,
    host: str = LOCAL[0],
    port: int | None = None,
    share: bool = False,
    accounts: Sequence[tuple[str, str]] = (),
    batch_size: int = 4,
) -> Iterator[str]:
    """Serves the page, of which it yields the address, until the block ends.

    All files, the visitors' and ours, are in a temporary folder that is removed then. Without `port` it is the first
    free one from 7860 on. Raises `UsageError` if it cannot listen there, or with `share` gets no public address.
    """
    check_address(host, port)

    from text_to_image.web.files import Folders

    with tempfile.TemporaryDirectory(prefix="dalle-serve-") as folder:
        files = Folders.inside(Path(folder))
        os.environ["GRADIO_TEMP_DIR"] = str(files.served)  # read whenever a part of the page is made
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it asks for the latest version

        from gradio.themes import Default  # pyright: ignore[reportMissingImports]
        from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

        from text_to_image.web.page import STYLE, Page
        from text_to_image.web.uploads import PlainNames

        limits = limits or Limits()
        most = limits.max_upload * 2**20
        page = Page(workers, limits, files, batch_size).build()
        theme = Default(
            primary_hue="indigo", neutral_hue="zinc", radius_size="lg",
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],  # none is downloaded
        )  # fmt: skip
        with redirect_stdout(io.StringIO()):  # of a tunnel that fails gradio tells in many lines
            _, local, public = page.launch(
                server_name=f"[{host}]" if ":" in host else host, server_port=port, share=share,
                auth=list(accounts) or None, prevent_thread_lock=True, quiet=True, footer_links=[],
                run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
                mcp_server=False, allowed_paths=[], max_file_size=most, state_session_capacity=limits.max_visitors,
                app_kwargs={"middleware": [Middleware(PlainNames, most=most)]}, theme=theme, css_paths=STYLE, head=HEAD,
            )  # fmt: skip
        try:
            if share and not public:
                raise UsageError("no public address: gradio's tunnel, which --share needs, cannot be reached")
            yield public or local
        finally:
            page.close(verbose=False)
