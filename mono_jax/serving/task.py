"""A submitted request, on the host: how much of it has been read, dispatched and answered."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import numpy as np

from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.text import TextStream
from mono_jax.serving.chunks import Part, Reading
from mono_jax.serving.contract import Event, Finish, OnEvent, TokenLogprobs
from mono_jax.serving.memory import Logprobs
from mono_jax.serving.pages import Contents

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared(Prompt):
    """A prompt as ``check_prompt`` returns it, with everything derived from it; several requests may share it.

    Attributes:
      reading: its chunks. contents: of its pages; None if pages are not reused.
      engine: the engine it was made for; the sizes of other engines may differ.
    """

    _: dataclasses.KW_ONLY
    reading: Reading
    contents: Contents | None
    engine: object


@dataclasses.dataclass(eq=False)
class Task:
    """Also the ``Ticket`` of its client. Only the engine's thread changes fields, except ``cancelled``.

    Attributes:
      prompt: with its chunks. request: ``sampling`` as an array.
      contents: of its pages, including those of the answer; None if pages are not reused.
      scores: of a scoring request, by position in the prompt; None for a request that is answered.
      row, pages: held since admission. cached: prompt tokens that were found in the cache.
      read: prompt tokens that were read or found; embedded: visual tokens that are in the device's features.
      dispatched: answer tokens requested from the device; answer: those received.
      finish: None until it has ended.
    """

    prompt: Prepared
    sampling: Sampling
    request: np.ndarray
    on_event: OnEvent
    contents: Contents | None
    text: TextStream
    scores: list[TokenLogprobs | None] | None = None
    cancelled: bool = False
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    read: int = 0
    embedded: int = 0
    dispatched: int = 0
    answer: list[int] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    submitted_s: float = dataclasses.field(default_factory=time.perf_counter)
    first_token_s: float = 0.0

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def reading(self) -> Reading:
        return self.prompt.reading

    @property
    def tokens(self) -> int:
        """The number of prompt tokens."""
        return len(self.reading.ids)

    @property
    def most_tokens(self) -> int:
        """The maximum number of tokens in the cache at any time: the last token of an answer never enters it."""
        return self.tokens + (0 if self.scores is not None else self.sampling.max_new_tokens - 1)

    @property
    def is_read(self) -> bool:
        return self.read == self.tokens

    def patches(self, tile_tokens: int, upto: int, most: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Pixels and cells of the next tiles that are needed before visual token ``upto``, and their start.

        At most ``most`` tokens, in whole tiles except for the prompt's last one; None: all are embedded.
        """
        if self.embedded >= upto:
            return None
        start = self.embedded
        stop = min(start + most, -(-upto // tile_tokens) * tile_tokens, len(self.prompt.patches))
        self.embedded = stop
        return self.prompt.patches[start:stop], self.prompt.patch_cells[start:stop], start

    def token(self, token: int, done: bool, logprobs: TokenLogprobs | None) -> None:
        """Adds a token of the answer."""
        first = not self.answer
        if first:
            self.first_token_s = time.perf_counter() - self.submitted_s
        self.answer.append(token)
        is_stop = token in self.sampling.stop_tokens
        text = "" if is_stop else self.text.add([token])
        finish: Finish | None = None
        if done or self.text.stopped_by is not None:
            finish = "stop" if is_stop or self.text.stopped_by is not None else "length"
            text += self.text.finish()
            finish = "stop" if self.text.stopped_by is not None else finish
        listed = () if is_stop else (token,)
        self.send(
            Event(
                tokens=listed,
                text=text,
                logprobs=None if logprobs is None else (logprobs,) * len(listed),
                finish=finish,
                cached_tokens=self.cached if first else 0,
                stopped_by=self.text.stopped_by,
            )
        )

    def score(self, part: Part, found: Logprobs, targets: np.ndarray) -> None:
        """Adds the scores of a chunk."""
        slots = np.flatnonzero(targets >= 0)
        for place, slot in zip(self.reading.scored(part), slots):
            self.scores[place] = of_token(int(targets[slot]), found, slot, self.sampling.logprobs or 0)

    def end(self, finish: Finish, message: str = "") -> None:
        """Ends it early; text that was held back is not sent."""
        if self.finish is None:
            self.send(Event(finish=finish, message=message))

    def send(self, event: Event) -> None:
        self.finish = event.finish
        try:
            self.on_event(event)
        except BaseException:  # from a client, even SystemExit: it must not end other requests
            _log.exception("a client's on_event failed; its request is cancelled")
            self.cancelled = True


def of_token(token: int, found: Logprobs, at: int, count: int) -> TokenLogprobs:
    """The log-probabilities at index ``at``; ``found``: NumPy arrays."""
    top: Sequence[tuple[int, float]] = zip(found.tokens[at, :count].tolist(), found.top[at, :count].tolist())
    return TokenLogprobs(token, float(found.chosen[at]), tuple(top))
