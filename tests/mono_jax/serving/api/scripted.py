"""An engine without a model: its answers repeat the request, so that mixed-up answers are detected."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.generation.chat import end_tokens
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.generation.text import TextStream
from mono_jax.models.architecture import Architecture
from mono_jax.serving.contract import EngineConfig, Event, Full, OnEvent, Request, Stats, TokenLogprobs, TooLong
from mono_jax.weights.prompt_format import PromptFormat


def digest(prompt: Prompt) -> str:
    """A number that is different for other prompts or pixels."""
    pixels = b"" if prompt.patches is None else np.ascontiguousarray(prompt.patches).tobytes()
    return f"{zlib.crc32(pixels, zlib.crc32(np.asarray(prompt.input_ids, np.int32).tobytes())):08x}"


def said(prompt: Prompt, sampling: Sampling) -> str:
    """The engine's default answer."""
    return f" seen {digest(prompt)} seed {sampling.seed} \n"


class Answering:
    """One request: the tokens of its answer come one or two at a time, by ``step``."""

    def __init__(self, engine: ScriptedEngine, request: Request, on_event: OnEvent):
        self.engine, self.request, self.on_event = engine, request, on_event
        self.cancelled, self.sent = False, 0
        words = engine.tokenizer.encode(engine.script(request.prompt, request.sampling))
        self.tokens = list(words)[: request.sampling.max_new_tokens]
        self.whole = len(words) <= len(self.tokens)
        self.text = TextStream(engine.tokenizer, request.sampling.stop)

    def cancel(self) -> None:
        with self.engine.changed:
            self.cancelled = True
            self.engine.changed.notify()

    def step(self) -> bool:
        """Whether it continues."""
        if self.cancelled:
            return self._end(Event(finish="cancelled", message="cancelled"))
        if self.request.scores:
            ids, count = map(int, self.request.prompt.input_ids[1:]), self.request.sampling.logprobs or 0
            scores = (None, *(logprob(token, place, count) for place, token in enumerate(ids, 1)))
            return self._end(Event(finish="length", scores=scores))
        new = self.tokens[self.sent : self.sent + 1 + self.sent % 2]
        self.sent += len(new)
        text, stopped = self.text.add(new), self.text.stopped_by is not None
        if last := stopped or self.sent == len(self.tokens):
            text += self.text.finish()
        finish = ("stop" if stopped or self.whole else "length") if last else None
        count = self.request.sampling.logprobs
        found = (
            None
            if count is None
            else tuple(logprob(token, place, count) for place, token in enumerate(new, self.sent - len(new) + 1))
        )
        event = Event(tuple(new), text, found, finish, cached_tokens=3 if self.sent == len(new) else 0)
        return self._end(event) if last else self._go_on(event)

    def _go_on(self, event: Event) -> bool:
        self.on_event(event)
        return True

    def _end(self, event: Event) -> bool:
        self.engine.ended[event.finish] = self.engine.ended.get(event.finish, 0) + 1
        self.on_event(event)
        return False


def logprob(token: int, place: int, count: int) -> TokenLogprobs:
    """Numbers computed from the token and its position; every other token is the likeliest."""
    own = -1.0 - token % 7 / 8 - place % 3
    best = [(token, own)] if place % 2 else [((token + 1) % 50, own + 0.5)]
    return TokenLogprobs(token, own, tuple([*best, (5, own - 1), (6, own - 2)][:count]))


class ScriptedEngine:
    """A ``ServingEngine``. ``script``: (prompt, sampling) -> the text of the answer.

    Attributes:
      under_way: unfinished requests. ended: ended requests by reason. refuse: raised by ``submit`` if not None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: Architecture,
        form: PromptFormat | None = None,
        script: Callable[[Prompt, Sampling], str] = said,
        **config: Any,
    ):
        self.name, self.tokenizer, self.architecture = "scripted", tokenizer, architecture
        self.form = form or PromptFormat(max_tiles=2)
        self.sampling = Sampling(max_new_tokens=64, stop_tokens=tuple(sorted(end_tokens(tokenizer))))
        self.config = EngineConfig(**{"max_length": 1024, "max_slots": 65536} | config)
        self.script = script
        self.refuse: Exception | None = None
        self.under_way: list[Answering] = []
        self.ended: dict[str, int] = {}
        self.changed = threading.Condition()
        self._held: int | None = None
        self._closed, self.closed = False, None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def prepare(self, prompt: Prompt) -> Prompt:
        return check_prompt(self.architecture, prompt, "")

    def hold(self, after: int = 0) -> None:
        """Requests pause after this number of tokens until ``release``; they can be cancelled."""
        self._hold(after)

    def release(self) -> None:
        self._hold(None)

    def _hold(self, after: int | None) -> None:
        with self.changed:
            self._held = after
            self.changed.notify()

    def _run(self) -> None:
        while not self._closed:
            with self.changed:
                self.changed.wait_for(lambda: self._closed or self._next())
                batch = self._next()
            for one in batch:
                if not one.step():
                    self.under_way.remove(one)

    def _next(self) -> list[Answering]:
        return [one for one in self.under_way if one.cancelled or self._held is None or one.sent < self._held]

    def submit(self, request: Request, on_event: OnEvent) -> Answering:
        if self.refuse is not None:
            raise self.refuse
        if len(self.under_way) >= self.config.max_rows + self.config.max_queue:
            raise Full("the queue is full")
        check_prompt(self.architecture, request.prompt, "")
        length = len(request.prompt.input_ids) + (0 if request.scores else request.sampling.max_new_tokens)
        if length > self.config.max_length:
            raise TooLong(f"{length} tokens: max_length is {self.config.max_length}: shorten the prompt")
        one = Answering(self, request, on_event)
        with self.changed:
            self.under_way.append(one)
            self.changed.notify()
        return one

    def stats(self) -> Stats:
        running = len(self.under_way)
        return Stats(
            running=running, max_rows=self.config.max_rows, slots=self.config.max_slots, requests=dict(self.ended),
            tokens_out=sum(self.ended.values()), step_s=(0.25, 0.75), slots_used=16 * running,
        )  # fmt: skip

    def close(self, drain: bool = True) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify()
        self._thread.join()
