"""Clients of an engine, and sequential clients of a generator: how long they wait."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

from mono_jax.generation.decode import Generator
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.contract import Event, Request
from mono_jax.serving.engine import Engine


class NoText:
    """A tokenizer for random weights, whose answers are not text."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        del ids
        return ""


def serve(engine: Engine, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    """Sends all requests, with ``concurrency`` of them in flight at a time.

    "first_token_s" and "between_tokens_s" are medians over the requests; "seconds" is the total wall time.
    Raises RuntimeError if an answer does not reach its length, once all requests have ended.
    """
    free, lock = threading.Semaphore(concurrency), threading.Lock()
    first: list[float] = []
    between: list[float] = []
    tokens: list[list[int]] = [[] for _ in requests]
    failed: list[str] = []

    def client(number: int, start: float) -> Any:
        marks: list[float] = []

        def on_event(event: Event) -> None:
            tokens[number].extend(event.tokens)
            marks.extend([time.perf_counter()] * len(event.tokens))
            if event.finish is None:
                return
            with lock:
                if event.finish == "length":
                    first.append(marks[0] - start)
                    between.extend([] if len(marks) < 2 else [(marks[-1] - marks[0]) / (len(marks) - 1)])
                else:  # raised by the main thread, because the engine's thread drops what a client raises
                    failed.append(f"request {number} ended by {event.finish!r}: {event.message}")
            free.release()

        return on_event

    start, compiled = time.perf_counter(), engine.stats().compilations
    for number, request in enumerate(requests):
        free.acquire()
        engine.submit(request, client(number, time.perf_counter()))
    for _ in range(concurrency):
        free.acquire()
    seconds = time.perf_counter() - start
    if failed:
        raise RuntimeError(failed[0])
    count = sum(map(len, tokens))
    found = {"seconds": seconds, "tokens_per_s": count / seconds, "first_token_s": statistics.median(first)}
    between_s = statistics.median(between) if between else None
    found |= {"between_tokens_s": between_s, "compilations": engine.stats().compilations - compiled}
    return found | {"requests": {"first_token_s": first}, "tokens": tokens}


def one_by_one(generator: Generator, requests: Sequence[Request]) -> dict[str, Any]:
    """The same requests by ``Generator``, streamed, one after another: like ``serve`` with one client."""
    first: list[float] = []
    tokens: list[list[int]] = []
    start = time.perf_counter()
    for request in requests:
        marks: list[float] = []
        begin = time.perf_counter()
        [answer] = generator.generate(
            [request.prompt], request.sampling, on_tokens=lambda _, marks=marks: marks.append(time.perf_counter())
        )
        first.append(marks[0] - begin)
        tokens.append(answer.tokens)
    seconds = time.perf_counter() - start
    count = sum(map(len, tokens))
    found = {"seconds": seconds, "tokens_per_s": count / seconds, "first_token_s": statistics.median(first)}
    return found | {"tokens": tokens}


def batched(generator: Generator, prompts: Sequence[Prompt], sampling: Any) -> float:
    """Seconds for all prompts in one batch that starts and ends together."""
    start = time.perf_counter()
    generator.generate(prompts, [sampling] * len(prompts))
    return time.perf_counter() - start
