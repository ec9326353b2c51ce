"""What the endpoints share: the engine, limits, and ways to work without holding up the loop."""

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
from mono_jax.serving.api.tickets.gate import Gate
from mono_jax.serving.api.tickets.running import Running
from mono_jax.serving.api.tickets.visit import Room, Visit
from mono_jax.serving.contract import Request, ServingEngine

T = TypeVar("T")
_LAST_S = 1.0  # that workers have to end when all else has


class Service:
    """Everything behind the endpoints. ``fetcher``: None = images are not fetched.

    Attributes:
      hangs: once closed: whether a worker still works, which only the end of the process ends.
    """

    def __init__(self, engine: ServingEngine, config: ApiConfig, fetcher: Fetcher | None = None):
        """Raises DataError for a chat template that cannot be used."""
        self.engine, self.config, self.fetcher = engine, config, fetcher
        self.started = int(time.time())
        self.gate, self.metrics, self.room = Gate(), Metrics(engine), Room(config.max_bytes)
        limits = ImageLimits(max_pixels=config.max_pixels, max_bytes=config.max_body, min_side=1, max_aspect=200.0)
        self.prompts = PromptMaker(engine, limits, config.pixel_path)
        # Of their own: an image takes seconds if its sender wants it to.
        self._texts = ThreadPoolExecutor(2, "texts")
        self._images = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")
        self._working: set[Future[Any]] = set()
        self._with_images: set[Future[Any]] = set()
        self.hangs = False

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for another model."""
        if name not in (None, self.engine.name):
            raise ApiError(
                404, f"model {name[:80]!r} is not here: {self.engine.name!r} is", param="model", code="model_not_found"
            )

    def check_choices(self, number: int, scored: int = 0) -> None:
        """Raises ApiError 400 for more answers, and ``scored`` prompts, than can ever be taken at a time."""
        config = self.engine.config
        most = min(self.config.max_choices, config.max_rows + config.max_queue - scored)
        if number > most:
            raise ApiError(400, f"{number} answers are asked for: this server gives {max(0, most)} at most", param="n")

    def room_left(self, prompt: Prompt) -> int:
        """Tokens that an answer to ``prompt`` may have; may be negative."""
        return self.engine.config.max_length - len(prompt.input_ids)

    def visit(self) -> Visit:
        """Of a request that comes now."""
        return Visit(self.room, self.gate, self.config.timeout_s)

    async def with_text(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)`` in a thread: encoding texts takes a while."""
        return await self._worked(self._texts.submit(function, *arguments))

    async def with_images(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments, gone)`` in a thread for decoding images; ``gone`` is set when nobody waits any more.

        Raises ApiError 429 where too many wait already: what cannot be ended is not taken without end.
        """
        if len(self._with_images) >= self.config.max_preparing:
            why = f"images of {self.config.max_preparing} requests are being decoded already"
            raise ApiError(429, why, code="too_many_images", retry_s=1)
        gone = threading.Event()
        future = self._images.submit(function, *arguments, gone)
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
        """Gives up what still runs, and notes the times."""
        running.cancel()
        if running.first_token_s is None:
            return
        self.metrics.first_token.observe(running.first_token_s)
        if (later := max(running.tokens) - 1) > 0:
            rest = time.perf_counter() - running.started - running.first_token_s
            self.metrics.token_gap.observe(rest / later)

    async def close(self) -> None:
        if self.fetcher is not None:
            await self.fetcher.close()
        for pool in (self._texts, self._images):
            pool.shutdown(wait=False, cancel_futures=True)
        if working := [asyncio.wrap_future(future) for future in list(self._working)]:
            _, unfinished = await asyncio.wait(working, timeout=_LAST_S)
            self.hangs = bool(unfinished)
