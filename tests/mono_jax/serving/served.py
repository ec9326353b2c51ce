"""Requests for the tests of the engine, and what must come of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mono_jax.generation.decode import Generation, Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.contract import EngineConfig, Event, Request
from tests.mono_jax.generation.test_decode import IMAGE

CONFIG = EngineConfig(max_rows=4, max_slots=480, max_length=128, max_queue=100, page=8, prefill_chunk=32)


class Letters:
    """A tokenizer of a kind: every token is a letter, so that stop strings come often."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token % 9) for token in ids)


@dataclasses.dataclass
class Client:
    """Keeps the events of a request."""

    request: Request
    events: list[Event] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def logprobs(self) -> list[Any]:
        return [one for event in self.events for one in event.logprobs or ()]

    @property
    def finish(self) -> str | None:
        assert all(event.finish is None for event in self.events[:-1])
        return self.events[-1].finish if self.events else None


def random_requests(count: int, seed: int, most_images: int = 3) -> list[Request]:
    """With images of few kinds and common beginnings, so that prefixes recur, and every kind of sampling."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (16, 8, 8, 3), np.uint8) for _ in range(3)]
    system = rng.integers(3, 90, 11).tolist()
    requests = []
    for _ in range(count):
        ids: list[int] = list(system) if rng.random() < 0.6 else []
        patches = []
        for _ in range(rng.integers(0, most_images + 1)):
            ids += rng.integers(3, 90, rng.integers(0, 4)).tolist() + [IMAGE] * 16
            patches.append(images[rng.integers(3)])
        ids += rng.integers(3, 90, rng.integers(1, 24)).tolist()
        prompt = Prompt(np.array(ids, np.int32), np.concatenate(patches) if patches else None)
        requests.append(Request(prompt, random_sampling(rng)))
    return requests


def random_sampling(rng: np.random.Generator) -> Sampling:
    def maybe(share: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < share else otherwise

    return Sampling(
        max_new_tokens=int(rng.integers(1, 21)),
        temperature=maybe(0.6, float(rng.uniform(0.3, 1.5)), 0.0),
        top_k=maybe(0.3, int(rng.integers(1, 40)), 0),
        top_p=maybe(0.3, float(rng.uniform(0.3, 1.0)), 1.0),
        seed=int(rng.integers(-5, 1000)),
        stop_tokens=maybe(0.5, tuple(rng.integers(3, 90, 3).tolist()), ()),
        banned_tokens=maybe(0.2, (5, 6), ()),
        repetition_penalty=maybe(0.3, float(rng.uniform(0.8, 1.6)), 1.0),
        presence_penalty=maybe(0.3, float(rng.uniform(-1, 2)), 0.0),
        frequency_penalty=maybe(0.3, float(rng.uniform(-1, 2)), 0.0),
        stop=maybe(0.3, ("abc", "bb", "e"), ()),
        logprobs=maybe(0.5, int(rng.integers(0, 6)), None),
    )


def alone(generator: Generator, requests: Sequence[Request]) -> list[Generation]:
    """What ``Generator`` answers (rows of its batches do not depend on one another: ``test_decode.py``)."""
    samplings = [dataclasses.replace(r.sampling, stop=(), logprobs=None, return_logits=True) for r in requests]
    return generator.generate([request.prompt for request in requests], samplings)


def check(client: Client, expected: Generation) -> None:
    """That the client got what ``Generator`` answers, or the beginning of it if it was cancelled."""
    sampling, finish = client.request.sampling, client.finish
    text = Letters.decode(expected.tokens)
    cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    assert finish in ("stop", "length", "cancelled")
    if finish == "cancelled":
        assert client.tokens == expected.tokens[: len(client.tokens)]
        assert text.startswith(client.text)
    elif cuts:
        assert (finish, client.text) == ("stop", text[: min(cuts)])
        assert client.tokens == expected.tokens[: len(client.tokens)]
        assert client.events[-1].stopped_by in sampling.stop
    else:
        assert (client.tokens, client.text, finish) == (expected.tokens, text, expected.finish)
    if sampling.logprobs is None:
        assert not client.logprobs
        return
    for one, token, logits in zip(client.logprobs, client.tokens, expected.logits, strict=False):
        logprobs = logits - np.logaddexp.reduce(logits)
        assert one.token == token
        np.testing.assert_allclose(one.logprob, logprobs[token], atol=2e-4)
        best = np.sort(logprobs)[::-1][: sampling.logprobs]
        np.testing.assert_allclose([value for _, value in one.top], best, atol=2e-4)
        np.testing.assert_allclose([logprobs[number] for number, _ in one.top], best, atol=2e-4)
    assert len(client.logprobs) == len(client.tokens)
