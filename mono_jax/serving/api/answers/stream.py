"""Server-sent events to untrusted clients: slow or disconnected ones are cut off, and never hold anything up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mono_jax.serving.api.answers.json_text import dumps
from mono_jax.serving.api.errors import ApiError, body
from mono_jax.serving.api.tickets.running import while_connected

Frames = AsyncIterator[dict[str, Any] | None]
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second header is for nginx


class EventStream(Response):
    """Sends what ``frames`` yields, as JSON, then "[DONE]"; None becomes a comment, which clients skip.

    An ApiError raised midway is sent as the last frame. ``close`` is always called.
    """

    def __init__(self, frames: Frames, close: Callable[[], None]):
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._frames, self._close = frames, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._stream(send))
        except ApiError:
            return  # the client has disconnected
        finally:
            self._close()

    async def _stream(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for frame in self._frames:
                await write(b": waiting\n\n" if frame is None else _data(frame))
            await write(b"data: [DONE]\n\n", more=False)
        except ApiError as error:
            await write(_data(body(error)), more=False)


def _data(frame: dict[str, Any]) -> bytes:
    return b"data: " + dumps(frame).encode() + b"\n\n"
