"""The interface between the engine and the code that serves it to clients.

    client -> API: text and images to a ``Request``     engine.submit(request, on_event) -> Ticket
    client <- API: ``Event``s to JSON                   on_event(Event), from the engine's thread

An engine gives each request the answer that ``Generator`` would give it, whatever other requests run at the same time.
The API works with any ``ServingEngine``, so its tests need no model.
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
    """Too many requests are waiting: the client may try again later (HTTP 429 or 503)."""


class Closed(Full):
    """The engine accepts no requests, now or later: it is closed, or a device error has ended it (HTTP 503)."""


class TooLong(GenerationError):
    """A request that could never be served: it is longer than a row, or the whole cache, may be (HTTP 400)."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine: they determine its memory use, and nothing that clients do adds to it."""

    max_rows: int = field(16, ge=1, help="requests that are answered at the same time; further ones wait")
    max_slots: int = field(
        32768, ge=1, help="tokens of prompts and answers that the KV cache holds; requests wait until they fit"
    )
    max_length: int = field(8192, ge=1, help="maximum tokens of one request, prompt plus answer")
    max_queue: int = field(256, ge=0, help="maximum number of waiting requests; more are refused")
    page: int = field(16, ge=1, help="tokens per page, the unit of cache allocation and prefix reuse")
    prefill_chunk: int = field(512, ge=1, help="maximum prompt tokens that are prefilled between two decode steps")
    reuse_prefixes: bool = field(True, help="do not recompute a prefix that a prompt shares with earlier ones")
    dtype: Literal["auto", "float32", "bfloat16"] = field("auto", help='"auto" = bfloat16, or float32 on a CPU')
    tensor: int = field(1, ge=-1, help="devices over which heads and FFN columns are split; -1 = all devices")
    programs: str = field("", help='cache folder for compiled programs; "" = compile at every start')

    def __post_init__(self) -> None:
        strict.check(self, "engine", ConfigError)
        if (most := self.pages_of_row) > self.pages:
            raise ConfigError(
                f"engine.max_length is {self.max_length}: such a request takes {most} pages of {self.page} tokens, but "
                f"engine.max_slots ({self.max_slots}) holds {self.pages}: lower max_length, or raise max_slots to "
                f"{most * self.page}"
            )

    @property
    def pages(self) -> int:
        """Whole pages in the cache."""
        return self.max_slots // self.page

    @property
    def pages_of_row(self) -> int:
        """Maximum number of pages of one request."""
        return -(-self.max_length // self.page)


@dataclasses.dataclass(frozen=True)
class Request:
    """``sampling.seed`` belongs to this request; n answers are n requests with different seeds.

    ``sampling.stop_tokens`` must include the tokens that end an answer: ``ServingEngine.sampling`` has them.
    ``scores``: return log-probabilities of the prompt's tokens and of the ``sampling.logprobs`` likeliest ones, but no
    answer. ``prompt`` may be the result of ``ServingEngine.prepare``, which several requests may share.
    """

    prompt: Prompt
    sampling: Sampling
    scores: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before temperature, penalties and filters.

    ``top``: pairs (token, log-probability), the likeliest first, as many as were requested.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of an answer.

    Attributes:
      tokens: new ids, without the one that ended the answer. Tokens that a stop string cuts off are still included.
      text: new text; held back while it may be part of a character or stop string. The pieces in order are the answer.
      logprobs: one per entry of ``tokens``, if ``sampling.logprobs`` is not None.
      finish: not None in the last event of a request. "stop" = a stop token or string, "length" = max_new_tokens.
      message: the reason, if ``finish`` is "error" or "cancelled".
      cached_tokens: tokens of the prompt that were reused; in the first event with tokens, else 0.
      stopped_by: the stop string that ended the answer.
      scores: in the last event of a scoring request: for each prompt token, given those before it; None for the first
        one and for visual tokens.
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
    """A submitted request."""

    def cancel(self) -> None:
        """Ends it with an event "cancelled", from any thread; no effect if it has already ended."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done since it was started, and what it holds now.

    Attributes:
      queued, running: requests that wait, and that are being prefilled or answered.
      max_rows: maximum number of requests answered at a time.
      slots_used, slots: cache slots (tokens) in pages held by requests, and in all pages.
      slots_reusable: slots in pages that no request holds, whose prefixes can still be reused.
      requests: finished requests, by ``Finish``. refused: requests that were not accepted (``Full``).
      tokens_in, tokens_cached, tokens_out: prompt tokens; those of them that were reused; answer tokens.
      first_token_s, step_s, queue_s: the latest values in seconds: from submission to the first token; of a decode
        step that directly followed another, without a prefill chunk between them; from submission to the start of
        prefill. Only the latest few thousand are kept.
      step_host_s: CPU time of the scheduler's thread in each step of ``step_s``, without waiting for the device.
      steps, steps_timed, chunks: decode steps, those that ``step_s`` has or had, and prefill chunks.
      working_s: seconds with work to do. host_share: CPU time of the scheduler's thread as a share of them, without the
        CPU time spent waiting for the device.
      compilations: programs compiled since the warm-up; 0 unless there is a bug.
      warm_up_s: seconds that the warm-up took; programs: the number of programs it compiled.
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
    step_host_s: tuple[float, ...] = ()
    queue_s: tuple[float, ...] = ()
    steps: int = 0
    steps_timed: int = 0
    chunks: int = 0
    working_s: float = 0.0
    host_share: float = 0.0
    compilations: int = 0
    warm_up_s: float = 0.0
    programs: int = 0


class ServingEngine(Protocol):
    """An engine as the API uses it; ``mono_jax.serving.engine.Engine`` is the implementation with a model.

    Attributes:
      name: the model's name, for clients.
      architecture, tokenizer, form: of the model: they determine how images are cut and prompts are written.
      sampling: the default sampling options of requests; its stop tokens end every answer.
      config: the engine's sizes.
      closed: why no request is accepted any more; None while requests are accepted.
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
        """Compiles the programs, then serves in a separate thread. Returns when requests can be served at once."""

    def prepare(self, prompt: Prompt) -> Prompt:
        """``prompt`` with what ``submit`` derives from it (checks, digests of its pixels), which takes a while.

        Any thread; ``submit`` does it for unprepared prompts. Raises GenerationError or ``TooLong``, as ``submit``.
        """

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Accepts a request; events come from the engine's thread, the last one with ``finish``.

        Raises ``Full``, ``Closed``, ``TooLong``, or GenerationError for a prompt that does not fit the model.
        """

    def stats(self) -> Stats:
        """May be called from any thread."""

    def close(self, drain: bool = True) -> None:
        """Accepts no more requests; finishes those in progress, or ends them as "cancelled". Returns once done.

        May be called before ``start``, and again.
        """
