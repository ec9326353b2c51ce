"""Requests as OpenAI's clients send them.

Unknown parameters are errors. So are parameters of OpenAI's API that are not supported here, unless their value has
no effect. A few parameters that do not affect the answer are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from data_pipelines.errors import did_you_mean

# Every list is bounded and stops at its first fault: pydantic would make a fault of some hundred bytes per element.
MAX_MESSAGES = 1024
MAX_PARTS = 4096  # of all messages together
MAX_PROMPTS = 2048
MAX_IDS = 1_000_000  # the engine's own limit is lower, but known only later
MAX_STOPS = 16
MAX_STOP = 512  # characters; each piece of an answer is searched for the possible beginning of one
MAX_TOKENS = 2**31 - 1
Unsupported = dict[str, tuple[Any, ...]]  # parameters of OpenAI's API, each with its values that have no effect
_NO_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls"),
    }
)
_OF_REQUESTS: Unsupported = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
}
# What clients send back of an answer, ``message.model_dump()``, has them, null or empty.
_OF_MESSAGES: Unsupported = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


class Body(BaseModel):
    """Types are strict: "1" is not a number, and true is not 1.

    unsupported: null is accepted for all of them. no_effect: parameters that are accepted with any value.
    """

    unsupported: ClassVar[Unsupported] = {}
    no_effect: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                harmless = [each for each in cls.unsupported[name] if type(each) is type(value)]  # true is not 1
                if value is not None and value not in harmless:
                    raise _fault("unsupported_parameter", "this server does not support it", name)
            elif name not in cls.no_effect:
                name = name[:80].encode("utf-8", "backslashreplace").decode()
                raise _fault("unknown_parameter", f"unknown; {did_you_mean(name, cls.model_fields)}", name)
        return kept


def _fault(kind: str, message: str, param: str) -> PydanticCustomError:
    """``param``: the model's field. Braces in a message would be replaced by values in pydantic's messages."""
    return PydanticCustomError(kind, message.replace("{", "(").replace("}", ")"), {"param": param})


Stop = Annotated[str, Field(max_length=MAX_STOP)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body):
    """How tokens are sampled; None = the default of the model's folder."""

    unsupported, no_effect = _OF_REQUESTS, _NO_EFFECT
    model: str | None = Field(None, description="as listed by /v1/models")
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1 = all")
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=2**31 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(stop for stop in stops if stop))

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _fault("invalid", "only with stream = true", "stream_options")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="no effect: the model determines the tiling"
    )


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Message(Body):
    unsupported = _OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(fail_fast=True, max_length=MAX_PARTS),
        ]
    )
    name: str | None = Field(None, description="no effect")


class ChatRequest(SamplingBody):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="takes precedence over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def longest(self) -> int | None:
        """Maximum tokens of an answer; None = not specified."""
        return self.max_completion_tokens or self.max_tokens

    @field_validator("messages", mode="before")
    @classmethod
    def _few_parts(cls, messages: Any) -> Any:
        contents = (
            [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
        )
        if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
            raise _fault("too_long", f"at most {MAX_PARTS} parts in total are allowed", "messages")
        return messages

    @model_validator(mode="after")
    def _with_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _fault("invalid", "only with logprobs = true", "top_logprobs")
        return self


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
SeveralPrompts = (
    Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingBody):
    prompt: str | TokenIds | SeveralPrompts
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="default 16; 0 with echo: nothing is generated"
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _fault("invalid", "0 only with echo = true", "max_tokens")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS)]
