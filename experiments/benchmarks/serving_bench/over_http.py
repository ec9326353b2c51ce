"""Waiting times of a running server's client: from the request, with its JPEG, to the first piece of the answer."""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import os
import statistics
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments.benchmarks.serving_bench.run import save
from experiments.benchmarks.serving_bench.splitting import jpeg
from mono_jax.errors import ConfigError

FILE = "over_http.json"
_TIMEOUT_S = 600.0


class Server:
    """An OpenAI-compatible server at ``url``, which ends with /v1; the API key is read from OPENAI_API_KEY."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if ``url`` is not the URL of a server that answers."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url={url}: give it as http://127.0.0.1:8000/v1")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._place, self._path = parts.netloc, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"
        try:
            with self._answer("GET", "/models") as response:
                self.model = json.load(response)["data"][0]["id"]
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise ConfigError(f"--url={url}: no server answers there ({error})") from None

    def chat(self, picture: bytes, words: int, new_tokens: int) -> dict[str, Any]:
        """Streams one greedy answer: "first_s", "seconds", and the server's "prompt_tokens" and "tokens"."""
        image = {"url": f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"}
        text = " ".join(["what"] * words)
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": new_tokens}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        first, usage = None, {}
        with self._answer("POST", "/chat/completions", json.dumps(body)) as response:
            for frame in _frames(response):
                if any(choice["delta"].get("content") for choice in frame["choices"]):
                    first = first or time.perf_counter() - start
                usage = frame.get("usage") or usage
        seconds = time.perf_counter() - start
        counts = {"prompt_tokens": usage.get("prompt_tokens"), "tokens": usage.get("completion_tokens")}
        return {"first_s": first or seconds, "seconds": seconds} | counts  # an answer may consist only of its end

    def _answer(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = self._connect(self._place, timeout=_TIMEOUT_S)
        connection.request(method, self._path + path, body, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ConfigError(f"{self._place}{self._path}{path}: {response.status} {response.read(500)!r}")
        return response


def _frames(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            frame = json.loads(line[len(b"data: ") :])
            if "error" in frame:
                raise ConfigError(f"the answer was cut off: {frame['error']}")
            yield frame


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Waiting times of requests, each with its own image, for each of ``args.tiles`` and ``args.concurrency``."""
    server = Server(args.url)
    report: dict[str, Any] = {"url": args.url, "model": server.model, "points": []}
    numbers, text = itertools.count(args.seed), args.text or 64
    for tiles in args.tiles or [1]:
        server.chat(jpeg(tiles, args.tile_size, next(numbers)), text, 2)  # the first connection
        for at_a_time in args.concurrency:
            count = max(args.rounds, at_a_time)
            pictures = [jpeg(tiles, args.tile_size, next(numbers)) for _ in range(count)]
            start = time.perf_counter()
            with ThreadPoolExecutor(at_a_time) as pool:
                answers = list(pool.map(lambda picture: server.chat(picture, text, args.new_tokens), pictures))
            seconds = time.perf_counter() - start
            point = {"tiles": tiles, "concurrency": at_a_time, "requests": count, "seconds": seconds}
            point |= {"first_token_s": statistics.median(answer["first_s"] for answer in answers), "answers": answers}
            report["points"].append(point)
            save(report, args.out, FILE)
            print(
                f"{tiles} tiles, {answers[0]['prompt_tokens']} tokens in, {at_a_time} at a time: first piece "
                f"{point['first_token_s'] * 1e3:.4g} ms, {count / seconds:.3g} answers/s",
                flush=True,
            )
    return report
