"""What the endpoints share: the engine, limits, and ways to work without holding up the loop."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from mono_jax.serving.contract import Request, ServingEngine

T = TypeVar("T")


class Service:
    """Everything behind the endpoints. ``fetcher``: None = images are not fetched."""

    def __init__(self, engine: ServingEngine, config: ApiConfig, fetcher: Fetcher | None = None):
        """Raises DataError for a chat template that cannot be used."""
        self.engine, self.config, self.fetcher = engine, config, fetcher
        self.started = int(time.time())
        self.gate, self.metrics = Gate(), Metrics(engine)
        limits = ImageLimits(max_pixels=config.max_pixels, max_bytes=config.max_body, min_side=1, max_aspect=200.0)
        self.prompts = PromptMaker(engine, limits)
        self._workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "prompts")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for another model."""
        if name not in (None, self.engine.name):
            raise ApiError(
                404, f"model {name[:80]!r} is not here: {self.engine.name!r} is", param="model", code="model_not_found"
            )

    def check_choices(self, number: int) -> None:
        if number > self.config.max_choices:
            raise ApiError(
                400, f"{number} answers are asked for: this server gives {self.config.max_choices} at most", param="n"
            )

    def room(self, prompt: Prompt) -> int:
        """Tokens that an answer to ``prompt`` may have; may be negative."""
        return self.engine.config.max_length - len(prompt.input_ids)

    async def make(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)`` in a thread: decoding images and encoding texts take a while."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    def running(self, requests: Sequence[Request], param: str) -> Running:
        return Running(self.engine, requests, self.gate, self.config.timeout_s, param)

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
        stop = functools.partial(self._workers.shutdown, cancel_futures=True)
        await asyncio.get_running_loop().run_in_executor(None, stop)
