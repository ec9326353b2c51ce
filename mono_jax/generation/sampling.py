"""The choice of the next token, as a function of logits, position and each row's ``Sampling``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.errors import GenerationError
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import TEXT_BUCKET, bucket
from mono_jax.models.architecture import Architecture


class Request(NamedTuple):
    """``Sampling`` of each row as arrays [B]; stop and banned tokens [B, n], padded with -1."""

    max_new_tokens: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array
    banned_tokens: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


DTYPES = Request(
    max_new_tokens=np.int32,
    temperature=np.float32,
    top_k=np.int32,
    top_p=np.float32,
    seed=np.uint32,
    stop_tokens=np.int32,
    banned_tokens=np.int32,
    repetition_penalty=np.float32,
    presence_penalty=np.float32,
    frequency_penalty=np.float32,
)


class StaticChoices(NamedTuple):
    """Compile-time choices: size of the answer buffer; whether logits are kept; whether any row's tokens are drawn,
    filtered, or penalised.
    """

    answer: int
    with_logits: bool
    draws: bool
    filters: bool
    penalises: bool


class Occurrences(NamedTuple):
    """The tokens that each row already has: ``context`` bool [B, vocabulary], ``answer`` int32 (number of times)."""

    context: jax.Array
    answer: jax.Array


def per_row(sampling: Sampling | Sequence[Sampling], rows: int) -> list[Sampling]:
    if isinstance(sampling, Sampling):
        return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(rows)]
    if len(sampling) != rows:
        raise GenerationError(f"{len(sampling)} samplings for {rows} prompts: give one for each, or one for all")
    return list(sampling)


def static_choices(samplings: Sequence[Sampling]) -> StaticChoices:
    drawn = [s for s in samplings if s.temperature > 0]
    return StaticChoices(
        answer=bucket(max(s.max_new_tokens for s in samplings), TEXT_BUCKET),
        with_logits=any(s.return_logits for s in samplings),
        draws=bool(drawn),
        filters=any(s.top_k > 0 or s.top_p < 1 for s in drawn),
        penalises=any(s.penalises for s in samplings),
    )


def make_request(config: Architecture, samplings: Sequence[Sampling], rows: int, width: int | None = None) -> Request:
    """Samplings as arrays; rows added by rounding up have ``max_new_tokens`` 0.

    ``width``: of the tables of stop and banned tokens; None = as large as the samplings need.
    """
    image = () if config.vision is None else (config.image_token_id,)
    idle = rows - len(samplings)

    def column(values: list[Any], fill: Any = 0) -> list[Any]:
        return values + [fill] * idle

    def table(lists: list[tuple[int, ...]]) -> np.ndarray:
        result = np.full((rows, width or bucket(max(4, *map(len, lists)))), -1, np.int32)
        for row, values in zip(result, lists):
            row[: len(values)] = values
        return result

    fields = Request(
        max_new_tokens=column([s.max_new_tokens for s in samplings]),
        temperature=column([s.temperature for s in samplings]),
        top_k=column([s.top_k for s in samplings]),
        top_p=column([s.top_p for s in samplings], 1.0),
        seed=column([s.seed % 2**32 for s in samplings]),
        stop_tokens=table([s.stop_tokens for s in samplings]),
        banned_tokens=table([s.banned_tokens + image for s in samplings]),
        repetition_penalty=column([s.repetition_penalty for s in samplings], 1.0),
        presence_penalty=column([s.presence_penalty for s in samplings]),
        frequency_penalty=column([s.frequency_penalty for s in samplings]),
    )
    return Request(*map(np.asarray, fields, DTYPES))


def penalised(logits: jax.Array, request: Request, seen: Occurrences) -> jax.Array:
    """float32 [B, vocabulary]: the logits minus the penalties for tokens that the rows already contain."""
    repetition, presence, frequency = (
        penalty[:, None]
        for penalty in (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen.context | (seen.answer > 0), repeated, logits)
    return logits - presence * (seen.answer > 0) - frequency * seen.answer


def choose(logits: jax.Array, positions: jax.Array, request: Request, *, draws: bool, filters: bool) -> jax.Array:
    """The next token int32 [B] of each row from float32 logits [B, vocabulary].

    A draw is the argmax of logits plus Gumbel noise, which depends only on the row's seed and on the token's
    ``positions`` [B].
    """
    rows, vocabulary = logits.shape
    # -1 would be the last token: non-tokens are sent out of bounds, where they are dropped.
    banned = jnp.where(request.banned_tokens < 0, vocabulary, request.banned_tokens)
    logits = logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not draws:
        return likeliest

    def noise_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocabulary,))

    noise = jax.vmap(noise_of)(request.seed, positions)
    greedy = request.temperature == 0
    logits = logits / jnp.where(greedy, 1.0, request.temperature)[:, None]
    if not filters:
        drawn = jnp.argmax(logits + noise, axis=-1)
    else:
        ranked = jnp.argsort(-logits, axis=-1, stable=True)
        logits, noise = (jnp.take_along_axis(a, ranked, axis=-1) for a in (logits, noise))
        top_k = jnp.where(request.top_k > 0, request.top_k, vocabulary)[:, None]
        logits = jnp.where(jnp.arange(vocabulary) < top_k, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = (before < request.top_p[:, None]) | (request.top_p[:, None] == 1)  # sums may round to 1 early
        best = jnp.argmax(jnp.where(keep, logits, -jnp.inf) + noise, axis=-1)
        drawn = jnp.take_along_axis(ranked, best[:, None], axis=-1)[:, 0]
    return jnp.where(greedy, likeliest, drawn.astype(jnp.int32))
