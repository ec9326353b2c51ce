"""Running answers: from the engine's thread to the event loop, until they end, in whatever way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from mono_jax.errors import GenerationError
from mono_jax.serving.api.errors import CLIENT_CLOSED, ApiError, of_engine
from mono_jax.serving.api.tickets.gate import Gate
from mono_jax.serving.api.tickets.visit import Visit
from mono_jax.serving.contract import Event, Request, ServingEngine, Ticket

T = TypeVar("T")
Piece = tuple[int, Event]  # number of the answer, and its new event
_log = logging.getLogger(__name__)
_PING_S = 15.0  # proxies close idle connections


class Running:
    """The answers to one client's request. Leaving the context cancels those that have not finished.

    Attributes:
      first_token_s: seconds from the request's headers to the first token of any answer, or to its end; None until
        then.
      tokens: tokens of each answer so far, without those that ended it. cached: for each answer, the prompt tokens that
        were reused.
    """

    def __init__(self, engine: ServingEngine, requests: Sequence[Request], gate: Gate, visit: Visit, param: str):
        self._engine, self._requests, self._gate, self._visit, self._param = engine, requests, gate, visit, param
        self._events: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self.tokens, self.cached = [0] * len(requests), [0] * len(requests)
        self.first_token_s: float | None = None

    async def __aenter__(self) -> Self:
        """Submits all answers, or none; raises ApiError if ``submit`` fails."""
        self._gate.enter(self)
        try:
            for number, request in enumerate(self._requests):
                hear = functools.partial(_hear, asyncio.get_running_loop(), self._events, number)
                self._tickets[number] = self._engine.submit(request, hear)
        except BaseException as error:
            self.cancel()
            if isinstance(error, GenerationError):
                raise of_engine(error, self._param) from None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancels the answers that are still running."""
        self._gate.leave(self)
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()

    def cut(self, why: ApiError) -> None:
        """Makes ``pieces`` raise ``why``."""
        self._events.put_nowait(why)

    @property
    def passed_s(self) -> float:
        """Seconds since the request's headers."""
        return time.perf_counter() - self._visit.started

    async def pieces(self, ping: bool = False) -> AsyncIterator[Piece | None]:
        """Yields pieces until all answers have ended; ``ping``: also None after each interval without a piece.

        Raises ApiError: 500 for an answer that failed, 503 for one that the server cancelled, 504 after the timeout.
        """
        while self._tickets:
            left = self._visit.left_s
            try:
                async with asyncio.timeout(max(0.0, min(left, _PING_S) if ping else left)):
                    piece = await self._events.get()
            except TimeoutError:
                if not ping or left <= _PING_S:
                    raise self._visit.late() from None
                yield None
                continue
            if isinstance(piece, ApiError):
                raise piece
            number, event = piece
            if event.finish is not None:
                self._tickets.pop(number, None)
            if event.finish == "error":
                _log.error("an answer failed: %s", event.message)
                raise ApiError(500, "the answer failed: internal server error, see its log", code="generation_failed")
            if event.finish == "cancelled":
                raise ApiError(503, event.message or "the answer was cancelled", code="cancelled", retry_s=1)
            if (event.tokens or event.finish is not None) and event.scores is None and self.first_token_s is None:
                self.first_token_s = self.passed_s
            self.tokens[number] += len(event.tokens)
            self.cached[number] += event.cached_tokens
            yield piece


def _hear(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], number: int, event: Event) -> None:
    """Called in the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits for events any more
        loop.call_soon_threadsafe(events.put_nowait, (number, event))


@dataclasses.dataclass
class Choice:
    """One complete answer."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs or ()
        self.finish = event.finish


async def whole(running: Running) -> list[Choice]:
    """All answers, once every one has ended."""
    choices = [Choice() for _ in running.tokens]
    async for piece in running.pieces():
        choices[piece[0]].add(piece[1])
    return choices


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects: raises ApiError 499 then.

    receive: the ``receive`` of the ASGI request, whose body has been read.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(CLIENT_CLOSED, "the client has disconnected")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
