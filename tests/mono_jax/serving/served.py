"""Requests for the tests of the engine, and their expected results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import native_cells
from mono_jax.generation.decode import Generation, Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.specs import param_shardings
from mono_jax.serving.contract import EngineConfig, Event, Request
from mono_jax.serving.engine import Engine
from mono_jax.serving.loop import Loop
from mono_jax.serving.programs import Programs, Sizes
from mono_jax.serving.task import Task
from tests.mono_jax.generation.test_decode import IMAGE
from tests.mono_jax.helpers import random_params

REQUESTS = 40
CONFIG = EngineConfig(max_rows=4, max_slots=480, max_length=128, max_queue=100, page=8, prefill_chunk=32)


class Letters:
    """A simple tokenizer: every token is a letter, so that stop strings are frequent."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token % 9) for token in ids)


@dataclasses.dataclass
class Client:
    """Records the events of a request."""

    request: Request
    events: list[Event] = dataclasses.field(default_factory=list)

    def task(self, engine: Engine) -> Task:
        return engine._task(self.request, self.events.append)

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


def begin(engine: Engine, tasks: Sequence[Task]) -> None:
    """One turn, with newly arrived ``tasks``."""
    engine._loop.scheduler.queue.extend(tasks)
    engine._loop.turn()


def finish(engine: Engine) -> None:
    """Runs turns until nothing is left to do."""
    while not engine._loop.idle:
        engine._loop.turn()


def random_requests(
    count: int, seed: int, most_images: int = 3, grids: Sequence[tuple[int, int]] = ()
) -> list[Request]:
    """Requests with few images and common beginnings, so that prefixes recur, and all kinds of sampling.

    ``grids``: columns and rows of three images in native resolution; else they are tiles of 4 x 4 tokens.
    """
    rng = np.random.default_rng(seed)
    cells = [native_cells(*grid) for grid in grids] or [np.arange(16, dtype=np.int32)] * 3
    images = [rng.integers(0, 256, (len(of_image), 8, 8, 3), np.uint8) for of_image in cells]
    system = rng.integers(3, 90, 11).tolist()
    requests = []
    for _ in range(count):
        ids: list[int] = list(system) if rng.random() < 0.6 else []
        shown = []
        for _ in range(rng.integers(0, most_images + 1)):
            before = rng.integers(3, 90, rng.integers(0, 4)).tolist()
            shown.append(int(rng.integers(3)))
            ids += before + [IMAGE] * len(images[shown[-1]])
        ids += rng.integers(3, 90, rng.integers(1, 24)).tolist()
        pixels = [np.concatenate([of_image[i] for i in shown]) for of_image in (images, cells)] if shown else []
        prompt = Prompt(np.array(ids, np.int32), *pixels)
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
    """``Generator``'s answers (rows of its batches are independent of one another: ``test_decode.py``)."""
    samplings = [dataclasses.replace(r.sampling, stop=(), logprobs=None, return_logits=True) for r in requests]
    return generator.generate([request.prompt for request in requests], samplings)


def check(client: Client, expected: Generation) -> None:
    """Checks that the client got ``Generator``'s answer, or the beginning of it if it was cancelled."""
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


@dataclasses.dataclass
class Served:
    """A model, its programs, requests, and ``Generator``'s answers to them."""

    generator: Generator
    programs: Programs
    requests: list[Request]
    expected: list[Generation]

    def engine(self, config: EngineConfig = CONFIG) -> Engine:
        """An engine that uses the existing programs; ``config`` must give the same sizes."""
        engine = Engine(self.generator, Letters(), config)
        engine.programs = self.programs
        engine._loop = Loop(self.programs, config)
        return engine


def served(
    config: Architecture, dtype: Any = jnp.float32, mesh: Any = None, requests: list[Request] | None = None
) -> Served:
    """A random model; ``requests``: by default random ones."""
    params: Any = random_params(config)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(config, params, mesh))
    generator = Generator(config, params, dtype, mesh=mesh, layout="stacked" if mesh else "separate_transposed")
    tile_tokens = 0 if config.vision is None else config.vision.tile_tokens
    sizes = Sizes.of(CONFIG, tile_tokens, on_cpu=True, page_by_page=mesh is None)
    programs = Programs(
        generator, CONFIG, dataclasses.replace(sizes, rows=(1, 4), chunks=(16, 32), block=16, plain=True)
    )
    programs.compile()
    requests = requests or random_requests(REQUESTS, 1, 0 if config.vision is None else 3)
    return Served(generator, programs, requests, alone(generator, requests))


def run(served: Served, seed: int, cancels: float = 0.0, **changes: Any) -> tuple[list[Client], Loop]:
    """All requests in random order, arriving in random turns; some of them are cancelled in random turns."""
    rng = np.random.default_rng(seed)
    engine = served.engine(dataclasses.replace(CONFIG, **changes))
    loop, clients = engine._loop, [Client(request) for request in served.requests]
    arrivals = {int(number): int(rng.integers(0, 60)) for number in rng.permutation(len(clients))}
    tasks = {}
    turn = 0
    while arrivals or not loop.idle:
        arrived = [number for number, at in arrivals.items() if at <= turn]
        for number in arrived:
            del arrivals[number]
            tasks[number] = clients[number].task(engine)
        loop.scheduler.queue.extend([tasks[number] for number in arrived])
        loop.turn()
        for task in tasks.values():
            if task.finish is None and rng.random() < cancels:
                task.cancel()
        assert loop.scheduler.running <= CONFIG.max_rows
        turn += 1
    return clients, loop


def check_all(served: Served, clients: Sequence[Client]) -> None:
    for client, expected in zip(clients, served.expected):
        check(client, expected)
