"""A server in this process, on a free loopback port, and a plain client for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from PIL import Image

from mono_jax.serving.api.requests.fetching import Fetcher
from mono_jax.serving.api.server import Server, bind
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.contract import ServingEngine


class Client:
    """Sends one request after the other, each on a new connection."""

    def __init__(self, port: int, service: Service, server: Server):
        self.port, self.service, self.server = port, service, server
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and answer, parsed if it is JSON, else as text. ``body``: bytes are sent unchanged, else JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
            reply = connection.getresponse()
            text = reply.read().decode()
        finally:
            connection.close()
        is_json = (reply.getheader("Content-Type") or "").startswith("application/json")
        self.headers = dict(reply.getheaders())
        return reply.status, json.loads(text) if is_json else text

    def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        return self.request("POST", path, body, **options)

    def get(self, path: str, **options: Any) -> tuple[int, Any]:
        return self.request("GET", path, **options)

    def chat(self, *content: Any, **parameters: Any) -> tuple[int, Any]:
        """One user message of these parts: texts, or encoded pictures."""
        return self.post("/v1/chat/completions", {"messages": [message(*content)], **parameters})

    def chat_with(self, headers: dict[str, str]) -> tuple[int, Any]:
        return self.post("/v1/chat/completions", {"messages": [message("Hi")]}, headers=headers)

    def stream(self, path: str, body: Any) -> list[Any]:
        """The frames of a streamed answer, the last one "[DONE]"."""
        status, text = self.post(path, body | {"stream": True})
        assert status == 200, text
        frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        return [frame if frame == "[DONE]" else json.loads(frame) for frame in frames]


def message(*content: Any) -> dict[str, Any]:
    parts = [image_part(part) if isinstance(part, bytes) else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def image_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture(number: int, width: int = 40, height: int = 40) -> bytes:
    """A PNG of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def wait_for(condition: Callable[[], Any]) -> None:
    """Waits until it is true; fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    engine: ServingEngine,
    config: ApiConfig | None = None,
    keys: Collection[str] = (),
    fetching: Callable[[], Fetcher] | None = None,
) -> Iterator[Client]:
    """The API of a started engine."""
    service = Service(engine, config or ApiConfig(drain_s=0), fetching() if fetching else None)
    place = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(service, keys, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])))
    thread.start()
    assert ready.wait(60)
    try:
        yield Client(place.getsockname()[1], service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
