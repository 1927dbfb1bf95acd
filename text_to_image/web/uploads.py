"""Names of uploaded files: gradio keeps those that visitors give, here they all have one of our own."""

import re

from starlette.datastructures import MutableHeaders  # pyright: ignore[reportMissingImports]
from starlette.responses import PlainTextResponse  # pyright: ignore[reportMissingImports]
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # pyright: ignore[reportMissingImports]

NAME = "upload"
_BOUNDARY = re.compile(r'multipart/form-data;.*?boundary="?([^";,]+)', re.IGNORECASE)
_FILE_NAME = re.compile(rb'filename\*?\s*=\s*(?:"(?:\\.|[^"\\])*"|[^;\r\n]*)', re.IGNORECASE)
_MORE = 2**16  # bytes of a request beside its file


class PlainNames:
    """An ASGI middleware that calls every file of an upload `NAME`, and refuses requests of more than `most` bytes."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most + _MORE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                refusal = PlainTextResponse(f"expected a file of at most {(self.most - _MORE) >> 20} MiB", 413)
                await refusal(scope, receive, send)
                return
        headers = MutableHeaders(scope=scope)
        if boundary := _BOUNDARY.search(headers.get("content-type", "")):
            body = rename(bytes(body), boundary[1].strip().encode("latin-1"))
            headers["content-length"] = str(len(body))
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def renamed() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, renamed, send)


def rename(body: bytes, boundary: bytes) -> bytes:
    """A multipart body whose files are called `NAME`. The boundary occurs between its parts alone."""
    parts = []
    for part in body.split(b"--" + boundary):
        head, blank, content = part.partition(b"\r\n\r\n")
        parts.append(_FILE_NAME.sub(f'filename="{NAME}"'.encode(), head) + blank + content)
    return (b"--" + boundary).join(parts)
