"""What stands between the engine and whoever serves it to clients.

    client -> API: text and images to a ``Request``     engine.submit(request, on_event) -> Ticket
    client <- API: ``Event``s to JSON                   on_event(Event), from the engine's thread

An engine answers requests in any company as ``Generator`` answers each of them alone. The API works with any
``ServingEngine``, so that its tests need no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

from data_pipelines import strict
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, GenerationError
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture
from mono_jax.weights.prompt_format import PromptFormat

Finish = Literal["stop", "length", "cancelled", "error"]


class Full(GenerationError):
    """Too many requests wait already: the client may come again later (HTTP 429 or 503)."""


class Closed(Full):
    """The engine takes no requests, now or later: it is closed, or a fault of the device has ended it (HTTP 503)."""


class TooLong(GenerationError):
    """A request that could never be served: it is longer than a row or the whole cache may be (HTTP 400)."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine: its memory follows from them, and nothing that clients do adds to it."""

    max_rows: int = field(16, ge=1, help="requests that are answered at the same time; others wait")
    max_slots: int = field(
        32768, ge=1, help="tokens of prompts and answers in the cache; requests for which there is no room wait"
    )
    max_length: int = field(8192, ge=1, help="most tokens of one request, prompt and answer")
    max_queue: int = field(256, ge=0, help="requests that may wait; more are refused")
    page: int = field(16, ge=1, help="tokens of a page, in which the cache is given out and prefixes are reused")
    prefill_chunk: int = field(512, ge=1, help="most tokens of a prompt that are read between two steps of answers")
    reuse_prefixes: bool = field(True, help="do not compute again what a prompt has in common with earlier ones")
    dtype: Literal["auto", "float32", "bfloat16"] = field("auto", help='"auto" = bfloat16, on a CPU float32')
    tensor: int = field(1, ge=-1, help="devices that share the model's heads and FFN columns; -1 = all there are")
    programs: str = field("", help='folder for compiled programs; "" = they are compiled anew at every start')

    def __post_init__(self) -> None:
        strict.check(self, "engine", ConfigError)
        if (most := self.pages_of_row) > self.pages:
            raise ConfigError(
                f"engine.max_length is {self.max_length}: such a request takes {most} pages of {self.page} tokens, and "
                f"engine.max_slots ({self.max_slots}) holds {self.pages}: lower max_length, or raise max_slots to "
                f"{most * self.page}"
            )

    @property
    def pages(self) -> int:
        """Whole ones in the cache."""
        return self.max_slots // self.page

    @property
    def pages_of_row(self) -> int:
        """Most pages of one request."""
        return -(-self.max_length // self.page)


@dataclasses.dataclass(frozen=True)
class Request:
    """``sampling.seed`` is the request's own; n answers are n requests with seeds of their own.

    ``sampling.stop_tokens`` must hold the tokens that end an answer: ``ServingEngine.sampling`` has them. ``scores``:
    the prompt's tokens are wanted with their log-probabilities and the ``sampling.logprobs`` likeliest, and no answer.
    ``prompt`` may be what ``ServingEngine.prepare`` made of it, which several requests may share.
    """

    prompt: Prompt
    sampling: Sampling
    scores: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities of the model itself, before temperature, penalties and filters.

    ``top``: (token, log-probability), the likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of an answer.

    Attributes:
      tokens: new ids, without the one that ended the answer. What a stop string cuts off is still among them.
      text: new text; held back while it may be part of a character or of a stop string. Pieces in order are the answer.
      logprobs: one for each of ``tokens``, if ``sampling.logprobs`` is not None.
      finish: not None in the last event of a request. "stop" = a stop token or string, "length" = max_new_tokens.
      message: why, if ``finish`` is "error" or "cancelled".
      cached_tokens: tokens of the prompt that were reused; in the first event with tokens, else 0.
      stopped_by: the stop string that ended the answer.
      scores: in the last event of a request for them: of each token of the prompt after those before it; None for the
        first one and for visual tokens.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: Finish | None = None
    message: str = ""
    cached_tokens: int = 0
    stopped_by: str | None = None
    scores: tuple[TokenLogprobs | None, ...] | None = None


OnEvent = Callable[[Event], None]  # must return at once, and not raise


class Ticket(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Ends it with an event "cancelled", from any thread; nothing happens to one that has ended."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine did since it was started, and what it holds now.

    Attributes:
      queued, running: requests that wait, and that are read or answered.
      max_rows: most requests that are answered at a time.
      slots_used, slots: tokens for which there is room in pages that requests hold, and in all pages.
      slots_reusable: in pages that no request holds, whose prefixes may be found again.
      requests: ended ones, by ``Finish``. refused: requests that were not taken (``Full``).
      tokens_in, tokens_cached, tokens_out: of prompts; of those the ones reused; of answers.
      first_token_s, step_s, queue_s: the latest values in seconds: from submit to first token; of a step of all
        answers; from submit to the begin of reading. The oldest of a few thousand are dropped.
      steps, chunks: steps of answers, and chunks of prompts.
      working_s: seconds in which there was work. host_share: processor time of the scheduler's thread over them, but
        for what it takes to wait for the device.
      compilations: programs compiled since the warm-up; 0 unless there is a fault.
      warm_up_s: seconds that the warm-up took; programs: how many it made.
    """

    queued: int = 0
    running: int = 0
    max_rows: int = 0
    slots_used: int = 0
    slots: int = 0
    slots_reusable: int = 0
    requests: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    first_token_s: tuple[float, ...] = ()
    step_s: tuple[float, ...] = ()
    queue_s: tuple[float, ...] = ()
    steps: int = 0
    chunks: int = 0
    working_s: float = 0.0
    host_share: float = 0.0
    compilations: int = 0
    warm_up_s: float = 0.0
    programs: int = 0


class ServingEngine(Protocol):
    """An engine as the API sees it; ``mono_jax.serving.engine.Engine`` is the one with a model.

    Attributes:
      name: of the model, for clients.
      architecture, tokenizer, form: of the model: how images are cut and prompts are written.
      sampling: how tokens are chosen where a request does not say; its stop tokens end every answer.
      config: the engine's sizes.
      closed: why no request is taken, and none will be; None while they are.
    """

    name: str
    architecture: Architecture
    tokenizer: Tokenizer
    form: PromptFormat
    sampling: Sampling
    config: EngineConfig

    @property
    def closed(self) -> str | None: ...

    def start(self) -> None:
        """Compiles what is needed, then serves in a thread of its own. Returns when requests are served at once."""

    def prepare(self, prompt: Prompt) -> Prompt:
        """``prompt`` with what ``submit`` works out of it (checks, digests of its pixels), which takes a while.

        From any thread; ``submit`` does it for others. Raises GenerationError, or ``TooLong``, as that does.
        """

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Takes a request; events come from the engine's thread, the last one with ``finish``.

        Raises ``Full``, ``Closed``, ``TooLong``, or GenerationError for a prompt that does not fit the model.
        """

    def stats(self) -> Stats:
        """From any thread."""

    def close(self, drain: bool = True) -> None:
        """Takes no more requests; finishes those there are, or ends them as "cancelled". Returns when it is done."""
