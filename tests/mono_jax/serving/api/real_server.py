"""experiments/serve.py with a real, tiny model, and Generator's answers to the same questions."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.encoding.chat import ChatEncoder
from mono_jax.generation.chat import end_tokens, open_model, tiling_of
from mono_jax.generation.options import Sampling
from mono_jax.generation.questions import Questions
from tests.devices import COMPILES_FAST
from tests.mono_jax.serving.api.running_server import Client, picture

ROOT = Path(__file__).parents[4]
TOKENS = 8  # of each answer
LIMITS = ("--max_rows=2", "--max_slots=1024", "--max_length=256", "--prefill_chunk=64", "--page=128", "--programs=")


class RealServer(Client):
    """A server of the model in ``folder``; see ``serving_folder``."""

    def __init__(self, folder: Path, port: int, process: int):
        self.folder, self.port, self.process, self.url = folder, port, process, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def serving_folder(folder: Path, *flags: str) -> Iterator[RealServer]:
    """The command, in a separate process. SIGTERM stops it at the end; it must not have compiled anything more."""
    command = [sys.executable, "experiments/serve.py", f"--model={folder}", "--port=0", "--json", *LIMITS, *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILES_FAST, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert " is served at http://127.0.0.1:" in line, line
        yield RealServer(folder, int(line.split(":")[2].split("/")[0]), process.pid)
        process.send_signal(signal.SIGTERM)
        last = process.communicate(timeout=120)[0].splitlines()[-1]
        assert process.returncode == 0
        assert json.loads(last)["compilations"] == 0
    finally:
        process.kill()
        process.wait()


def questions(count: int) -> list[dict[str, Any]]:
    """Questions about images of two shapes; every third question has no image."""
    kinds = [{"text": f"What is number {number}?", "pictures": []} for number in range(count)]
    for number, asked in enumerate(kinds):
        if number % 3:
            asked["pictures"] = [picture(number, 64 if number % 2 else 40, 32)]
    return kinds


def messages(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """A question as OpenAI clients send it."""
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in asked["pictures"]]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": asked["text"]}]}]


def expected(folder: Path, asked: Sequence[dict[str, Any]], tokens: int = TOKENS) -> list[str]:
    """``Generator``'s greedy answers to all of them in one batch."""
    opened = open_model(str(folder), None)
    encoder = ChatEncoder(opened.tokenizer, opened.form.template, opened.form.system_message)
    maker = Questions(encoder, tiling_of(opened.generator.config, opened.form))
    prompts = []
    for one in asked:
        text = "<image>\n" * len(one["pictures"]) + one["text"]
        prompts.append(maker.prompt([("human", text)], [("picture", data) for data in one["pictures"]]))
    stops = tuple(sorted(end_tokens(opened.tokenizer, encoder)))
    found = opened.generator.generate(prompts, Sampling(max_new_tokens=tokens, stop_tokens=stops))
    return [opened.tokenizer.decode(each.tokens).strip() for each in found]
