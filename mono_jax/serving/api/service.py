"""What the endpoints share: the engine, limits, and ways to work without blocking the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from data_pipelines.encoding.decoding import ImageLimits
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.metrics import Metrics
from mono_jax.serving.api.requests.fetching import Fetcher
from mono_jax.serving.api.requests.prompts import PromptMaker
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.api.tickets.arrivals import Arrivals
from mono_jax.serving.api.tickets.gate import Gate
from mono_jax.serving.api.tickets.running import Running
from mono_jax.serving.api.tickets.visit import Room, Visit
from mono_jax.serving.contract import Request, ServingEngine

T = TypeVar("T")
_VALUE_BYTES = 200  # that a log-probability takes in memory and as JSON; a token takes two more of this size
_LAST_S = 1.0  # that workers have to finish after everything else has


class Service:
    """The state shared by all endpoints. ``fetcher``: None = images are not fetched.

    Attributes:
      hangs: after closing: whether a worker is still busy, which only the end of the process stops.
    """

    def __init__(self, engine: ServingEngine, config: ApiConfig, fetcher: Fetcher | None = None):
        """Raises DataError for a chat template that cannot be used."""
        self.engine, self.config, self.fetcher = engine, config, fetcher
        self.started = int(time.time())
        self.gate, self.metrics, self.arrivals = Gate(), Metrics(engine), Arrivals(config.max_requests)
        self.room = Room(config.max_bytes, self.arrivals.drop)
        limits = ImageLimits(max_pixels=config.max_pixels, max_bytes=config.max_body, min_side=1, max_aspect=200.0)
        self.prompts = PromptMaker(engine, limits, config.pixel_path)
        # A separate pool: an image can be made to take seconds by its sender.
        self._texts = ThreadPoolExecutor(2, "texts")
        self._images = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")
        self._working: set[Future[Any]] = set()
        self._with_images: set[Future[Any]] = set()
        self.hangs = False

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if ``name`` is another model."""
        if name not in (None, self.engine.name):
            raise ApiError(
                404,
                f"model {name[:80]!r} is not served, only {self.engine.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_choices(self, number: int, scored: int = 0) -> None:
        """Raises ApiError 400 for more answers, plus ``scored`` prompts, than can ever be accepted at a time."""
        config = self.engine.config
        most = min(self.config.max_choices, config.max_rows + config.max_queue - scored)
        if number > most:
            why = f"{number} answers requested: this server gives at most {max(0, most)}"
            raise ApiError(400, why, param="n")

    def room_left(self, prompt: Prompt) -> int:
        """The number of tokens that an answer to ``prompt`` may have; can be negative."""
        return self.engine.config.max_length - len(prompt.input_ids)

    def longest(self, requests: Sequence[Request]) -> int:
        """The maximum number of tokens of all answers together."""
        return sum(min(each.sampling.max_new_tokens, self.engine.config.max_length) for each in requests)

    def take_logprobs(self, visit: Visit, tokens: int, logprobs: int | None) -> None:
        """Reserves the bytes for the log-probabilities of ``tokens`` tokens, each with ``logprobs`` likeliest ones.

        Raises as ``take``.
        """
        if logprobs is not None:
            what = f"log-probabilities of up to {tokens} tokens, with {logprobs} others each,"
            lower = "send fewer prompts, or lower n, max_tokens or the number of log-probabilities"
            more = tokens * (logprobs + 2) * _VALUE_BYTES
            self.take(visit, more, what, lower, param="logprobs", code="too_many_logprobs")

    def take(self, visit: Visit, more: int, what: str, lower: str, *, param: str, code: str) -> None:
        """Reserves ``more`` bytes for ``what``; raises ApiError 400 if there can never be room, 429 if not now."""
        if visit.taken + more > self.config.max_bytes:
            why = f"{what} take {more} bytes of the {self.config.max_bytes} that all requests may hold: {lower}"
            raise ApiError(400, why, param=param, code=code)
        visit.take(more)

    def visit(self) -> Visit:
        """The ``Visit`` of a request that arrives now."""
        return Visit(self.room, self.gate, self.config.timeout_s)

    async def with_text(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs ``function(*arguments)`` in a thread, because encoding text takes a while."""
        return await self._worked(_submit(self._texts, function, *arguments))

    async def with_images(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs ``function(*arguments, gone)`` in an image thread; ``gone`` is set once nothing waits for the result.

        Raises ApiError 429 if too many wait already: work that cannot be cancelled must not queue up without limit.
        """
        if len(self._with_images) >= self.config.max_preparing:
            why = f"the images of {self.config.max_preparing} requests are already being decoded"
            raise ApiError(429, why, code="too_many_images", retry_s=1)
        gone = threading.Event()
        future = _submit(self._images, function, *arguments, gone)
        self._with_images.add(future)
        future.add_done_callback(self._with_images.discard)
        try:
            return await self._worked(future)
        finally:
            gone.set()

    async def _worked(self, future: Future[T]) -> T:
        self._working.add(future)
        future.add_done_callback(self._working.discard)
        return await asyncio.wrap_future(future)

    def running(self, requests: Sequence[Request], visit: Visit, param: str) -> Running:
        return Running(self.engine, requests, self.gate, visit, param)

    def close_answers(self, running: Running) -> None:
        """Cancels what is still running, and records the times."""
        running.cancel()
        if running.first_token_s is None:
            return
        self.metrics.first_token.observe(running.first_token_s)
        if (later := max(running.tokens) - 1) > 0:
            self.metrics.token_gap.observe((running.passed_s - running.first_token_s) / later)

    async def close(self) -> None:
        if self.fetcher is not None:
            await self.fetcher.close()
        for pool in (self._texts, self._images):
            pool.shutdown(wait=False, cancel_futures=True)
        if working := [asyncio.wrap_future(future) for future in list(self._working)]:
            _, unfinished = await asyncio.wait(working, timeout=_LAST_S)
            self.hangs = bool(unfinished)


def _submit(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """``pool.submit``, except that a call that is cancelled while it waits no longer holds its arguments.

    The pool holds it until a worker is free. Its bytes, as many as a request may have, are no longer accounted for.
    """
    held = [arguments]
    future = pool.submit(lambda: function(*held.pop()))
    future.add_done_callback(lambda _: held.clear())
    return future
