"""From a request's parameters to ``Sampling``; parameters left out take the defaults of the model's folder."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from mono_jax.errors import GenerationError
from mono_jax.generation.options import Sampling
from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.requests.schemas import ChatRequest, CompletionRequest, SamplingBody

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


def of_chat(default: Sampling, body: ChatRequest) -> Sampling:
    """The sampling options for the first answer of a chat request."""
    return _sampling(default, body, body.longest, (body.top_logprobs or 0) if body.logprobs else None)


def of_completion(default: Sampling, body: CompletionRequest) -> Sampling:
    """The sampling options for the first answer of a completion request."""
    longest = COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    return _sampling(default, body, longest, body.logprobs)


def of_choice(first: Sampling, number: int, room: int | None) -> Sampling:
    """The sampling options for another answer to the same request.

    room: tokens that the engine has left for it; None = the client gave a number itself, and gets an error if it is
    too large.
    """
    longest = first.max_new_tokens if room is None else max(1, min(first.max_new_tokens, room))
    return dataclasses.replace(first, seed=first.seed + number, max_new_tokens=longest)


def _sampling(default: Sampling, body: SamplingBody, longest: int | None, logprobs: int | None) -> Sampling:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "max_new_tokens": longest,
        "stop": body.stops or None,
        "logprobs": logprobs,
        # Sampling twice gives two different answers unless the client sets a seed.
        "seed": secrets.randbits(32) if body.seed is None else body.seed,
    }
    try:
        return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    except GenerationError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None
