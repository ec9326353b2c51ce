"""Log-likelihoods of continuations, for asking language models multiple-choice questions, and for perplexity.

row:  context ... | continuation ...      tokens are padded to a bucket of lengths, rows to a full batch,
      ids[:-1] in, ids[1:] out            so that few programs are compiled
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.batch import BatchSpec
from mono_jax.errors import GenerationError
from mono_jax.generation.decode import Generator
from mono_jax.generation.prompts import TEXT_BUCKET, bucket
from mono_jax.models.architecture import Architecture
from mono_jax.models.sharding import on_all
from mono_jax.models.transformer import Model, Params
from mono_jax.parallel.mesh import on_mesh, row_ways

SHORT = 16  # slots into which most answers to multiple-choice questions fit
CHUNK = 64  # slots of each row whose logits are in memory at once

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation


class Likelihoods:
    """Log-likelihoods under the model of a ``Generator``, ``batch_size`` pairs at a time."""

    def __init__(self, generator: Generator, max_length: int, batch_size: int = 16):
        """``max_length``: maximum number of tokens that the model reads at once."""
        self._generator, self._max_length = generator, max_length
        ways = 1 if generator.mesh is None else row_ways(generator.mesh)
        self._rows = -(-batch_size // ways) * ways

    def __call__(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair, the sum of the continuation's log-probabilities (nats), and whether greedy decoding yields it.

        If a pair is too long, the context is truncated at its beginning. Raises GenerationError for an empty context or
        continuation, a continuation that is too long, or an id outside the vocabulary.
        """
        rows = [self._checked(pair, number) for number, pair in enumerate(pairs)]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._rows):
            part = order[start : start + self._rows]
            results |= zip(part, self._scored([rows[number] for number in part]))
        return [results[number] for number in range(len(rows))]

    def _checked(self, pair: Pair, number: int) -> tuple[np.ndarray, int]:
        """(ids, how many of them at the end are the continuation)."""
        context, continuation = pair
        vocabulary = self._generator.config.vocab_size
        ids = np.array([*context, *continuation], np.int64)[-(self._max_length + 1) :]
        if not len(context) or not 0 < len(continuation) <= self._max_length:
            raise GenerationError(
                f"pair {number}: {len(context)} tokens of context and {len(continuation)} of continuation: each needs "
                f"at least one, and the continuation may have at most {self._max_length}"
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise GenerationError(f"pair {number}: a token id is outside the vocabulary of {vocabulary}")
        return ids.astype(np.int32), len(continuation)

    def _scored(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """Scores rows of one batch, sorted by length, longest first."""
        text = bucket(len(rows[0][0]) - 1, TEXT_BUCKET)
        wanted = SHORT if max(count for _, count in rows) <= SHORT else text
        batch = BatchSpec(0, text, 0).empty(self._rows)
        slots = np.zeros((self._rows, wanted), np.int32)
        for row, (ids, count) in enumerate(rows):
            n = len(ids) - 1
            batch["tokens"][row, :n], batch["targets"][row, :n] = ids[:-1], ids[1:]
            batch["positions"][row, :n], batch["segments"][row, :n] = np.arange(n), 1
            slots[row, :count] = np.arange(n - count, n)
        used = ("tokens", "targets", "patch_cells", "order", "positions", "segments")
        generator = self._generator
        program = _program(generator.config, generator.dtype, generator.mesh)
        found, greedy = jax.device_get(program(generator.params, {name: batch[name] for name in used}, slots))
        return [
            (float(found[row, :count].sum(dtype=np.float64)), bool(greedy[row, :count].all()))
            for row, (_, count) in enumerate(rows)
        ]


@functools.lru_cache(maxsize=16)
def _program(config: Architecture, dtype: Any, mesh: Mesh | None) -> Any:
    """(params, batch, slots int32 [B, N]) -> log-probability float32 [B, N] of the target at each slot, and whether the
    target is the likeliest token.
    """
    model = Model(config)

    def score(params: Params, batch: Mapping[str, jax.Array], slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jnp.take_along_axis(model(params, batch, dtype).hidden, slots[..., None], axis=1)
        targets = jnp.take_along_axis(batch["targets"], slots, axis=1)

        def of_chunk(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = part
            logits = model.logits(params, hidden)
            at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return at_target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

        rows, count = slots.shape
        chunk = next(size for size in range(min(CHUNK, count), 0, -1) if count % size == 0)
        parts = [jnp.moveaxis(a.reshape(rows, -1, chunk, *a.shape[2:]), 1, 0) for a in (hidden, targets)]
        found = jax.lax.map(of_chunk, tuple(parts))
        return on_all(tuple(jnp.moveaxis(a, 0, 1).reshape(rows, count) for a in found))

    return jax.jit(score if mesh is None else on_mesh(score, mesh))
