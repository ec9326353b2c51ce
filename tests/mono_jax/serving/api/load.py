"""Sends many requests to a server, a tenth of them malformed or broken off, and reports the outcomes.

    python -m tests.mono_jax.serving.api.load --requests=10000 --at_a_time=64          # scripted engine
    python -m tests.mono_jax.serving.api.load --real --requests=1000 --at_a_time=32    # a real, tiny model

Answers are compared with the expected ones: those of the scripted engine name the pixels that it saw, those of a real
model are ``Generator``'s. The server is a separate process, whose memory is read after every tenth of the requests.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from PIL import Image

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.generation.chat import tiling_of
from mono_jax.generation.questions import Questions
from mono_jax.weights.prompt_format import PromptFormat
from tests.mono_jax.serving.api.real_server import ROOT, expected, messages, questions, serving_folder
from tests.mono_jax.serving.api.running_server import message, picture
from tests.mono_jax.serving.api.scripted import digest
from tests.tiny_folder import tiny_config, tiny_folder

GOLDEN = ROOT / "tests" / "golden"
MALFORMED = 0.1
KINDS = 48  # recurring questions
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass
class Target:
    """A server: its address, its process, its questions as request bodies, and the text that answers each."""

    url: str
    process: psutil.Process
    bodies: list[dict[str, Any]]
    answers: list[str]


@contextlib.contextmanager
def scripted() -> Iterator[Target]:
    command = [sys.executable, "-m", "tests.mono_jax.serving.api.scripted_server", str(GOLDEN / "chat")]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    tokenizer, form, asked = Tokenizer(GOLDEN / "chat"), PromptFormat(max_tiles=2), questions(KINDS)
    maker = Questions(
        ChatEncoder(tokenizer, form.template, form.system_message), tiling_of(tiny_config(tokenizer), form)
    )
    answers = []
    for number, one in enumerate(asked):
        text = "<image>\n" * len(one["pictures"]) + one["text"]
        prompt = maker.prompt([("human", text)], [("", data) for data in one["pictures"]])
        answers.append(f"seen {digest(prompt)} seed {number}")
    bodies = [{"messages": messages(one), "seed": number} for number, one in enumerate(asked)]
    try:
        yield Target(f"http://127.0.0.1:{int(server.stdout.readline())}", psutil.Process(server.pid), bodies, answers)
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def real() -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as place:
        folder = tiny_folder(GOLDEN, Path(place))
        asked = questions(KINDS)
        answers = expected(folder, asked)
        bodies = [{"messages": messages(one), "max_tokens": 8, "temperature": 0} for one in asked]
        with serving_folder(folder, "--body_timeout_s=2", "--max_body=1000000") as server:
            yield Target(server.url, psutil.Process(server.process), bodies, answers)


def attack(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of a request that would take much time or memory if it were trusted."""
    asked = {"prompt": "Hi", "echo": True, "logprobs": 1, "stream": True, "max_tokens": 3_000_000_000}
    if (kind := rng.randrange(6)) == 0:
        return TEXT, json.dumps(asked).encode()
    if kind == 1:
        return TEXT, json.dumps({"prompt": [1] * 300_000 + [1.5]}).encode()
    if kind == 2:
        return CHAT, json.dumps({"messages": rng.choice([[{}], [message("a")], [[]]]) * 15_000}).encode()
    if kind == 3:
        return CHAT, json.dumps({"messages": [message(*["a"] * 5000)]}).encode()
    if kind == 4:
        path, long = rng.choice(
            [(TEXT, "x" * 900_000), (TEXT, "<|im_end|>" * 80_000), ("/tokenize", "\u20ac" * 90_000)]
        )
        return path, json.dumps({"prompt": long}).encode()
    return CHAT, json.dumps({"messages": [message(lying(rng), "What?")]}).encode()


def lying(rng: random.Random) -> bytes:
    """An image whose header declares a wrong size."""
    side = rng.choice([0, 3000, 60_000])
    if rng.random() < 0.5:
        data = bytearray(picture(0))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    buffer = io.BytesIO()
    Image.new("L", (40, 40)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@functools.cache
def slow_picture(scans: int = 300) -> bytes:
    """A small JPEG of a large, empty image, each of whose scans takes as long as a whole image."""
    buffer = io.BytesIO()
    Image.new("L", (1500, 1500), 128).save(buffer, "jpeg", progressive=True, quality=50)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def malformed(body: dict[str, Any], rng: random.Random) -> bytes:
    """A request that cannot be answered."""
    text = json.dumps(body)
    kind = rng.randrange(8)
    if kind == 0:
        return text[: rng.randrange(len(text))].encode()
    if kind == 1:
        return text.replace('"user"', rng.choice(['"robot"', "3", "null", '"assistant"'])).encode()
    if kind == 2:
        return json.dumps(body | {"temperature": rng.choice(["hot", -1, [], 1e9])}).encode()
    if kind == 3:
        return json.dumps(body | {rng.choice(["tools", "wrong", "logit_bias"]): [1]}).encode()
    if kind == 4:
        return os.urandom(rng.randrange(1, 3000))
    if kind == 5:
        return b" " * 1_000_100 if rng.random() < 0.2 else b"[" * rng.randrange(1, 5000)
    if kind == 6:
        return json.dumps(body | {"max_tokens": 10**9}).encode()
    data = bytearray(text.replace("iVBOR", "iVBxR") if "iVBOR" in text else text + "}", "utf-8")
    return bytes(data)


class Run:
    """``outcomes`` counts statuses, "gone" (broken off by us) and "wrong" (the answer to another request)."""

    def __init__(self, target: Target, seed: int):
        self.target, self.rng = target, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.examples: list[str] = []

    async def whole(self, count: int, at_a_time: int) -> None:
        connector = aiohttp.TCPConnector(limit=at_a_time)
        numbers = iter(range(count))
        async with aiohttp.ClientSession(self.target.url, connector=connector) as session:
            await asyncio.gather(*(self._worker(session, numbers) for _ in range(at_a_time)))

    async def _worker(self, session: aiohttp.ClientSession, numbers: Iterator[int]) -> None:
        for _ in numbers:
            if self.rng.random() >= MALFORMED:
                await self._asked(session)
                continue
            kind, body = self.rng.random(), self.target.bodies[self.rng.randrange(KINDS)]
            if kind < 0.3:
                await self._gone(session)
            elif kind < 0.65:
                await self._refused(session, CHAT, malformed(body, self.rng))
            elif kind < 0.95:
                await self._refused(session, *attack(self.rng))
            else:
                slow = {"messages": [message(slow_picture(), "What?")]}
                await self._refused(session, CHAT, json.dumps(slow).encode(), "slow")

    async def _asked(self, session: aiohttp.ClientSession) -> None:
        number = self.rng.randrange(KINDS)
        stream = self.rng.random() < 0.5
        async with session.post(CHAT, json=self.target.bodies[number] | {"stream": stream}) as reply:
            data = await reply.text()
        self.outcomes[str(reply.status)] += 1
        if reply.status != 200:
            self.examples.append(data[:300])
        elif _text(data, stream) != self.target.answers[number]:
            self.outcomes["wrong"] += 1
            self.examples.append(data[:300])

    async def _gone(self, session: aiohttp.ClientSession) -> None:
        body = self.target.bodies[self.rng.randrange(KINDS)] | {"stream": True}
        with contextlib.suppress(TimeoutError):
            timeout = aiohttp.ClientTimeout(self.rng.random() * 0.02)
            async with session.post(CHAT, json=body, timeout=timeout) as reply:
                await reply.content.read(self.rng.randrange(1, 300))
                reply.close()
        self.outcomes["gone"] += 1

    async def _refused(self, session: aiohttp.ClientSession, path: str, data: bytes, kind: str = "malformed") -> None:
        try:
            async with session.post(path, data=data, headers={"Content-Type": "application/json"}) as reply:
                answer = await reply.json()
        except aiohttp.ClientConnectionError:  # the server may not read a body that is too large to its end
            self.outcomes["refused"] += 1
            return
        self.outcomes[f"{kind} {reply.status}"] += 1
        if kind == "malformed" and reply.status == 200:
            self.examples.append(data[:300].decode(errors="replace"))
        elif reply.status != 200 and set(answer["error"]) != {"message", "type", "param", "code"}:
            self.outcomes["shapeless"] += 1


def _text(data: str, stream: bool) -> str:
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    frames = [line[6:] for line in data.split("\n\n") if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for f in frames for choice in json.loads(f)["choices"])


def load(target: Target, count: int, at_a_time: int, seed: int = 0) -> dict[str, Any]:
    """Runs ``count`` requests; records the server's memory in MiB after each tenth."""
    run, memory, start = Run(target, seed), [], time.perf_counter()
    for _ in range(10):
        asyncio.run(run.whole(count // 10, at_a_time))
        memory.append(round(target.process.memory_info().rss / 2**20, 1))
    seconds = time.perf_counter() - start
    return {
        "requests": count // 10 * 10,
        "at_a_time": at_a_time,
        "outcomes": dict(sorted(run.outcomes.items())),
        "examples": run.examples[:5],
        "memory_mib": memory,
        "seconds": round(seconds, 1),
        "open_files": target.process.num_fds(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="a real, tiny model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at_a_time", type=int, default=64)
    args = parser.parse_args()
    with real() if args.real else scripted() as target:
        print(json.dumps(load(target, args.requests, args.at_a_time)))


if __name__ == "__main__":
    main()
