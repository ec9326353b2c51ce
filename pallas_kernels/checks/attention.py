"""The float64 oracle of packed attention and the cases that every implementation has to pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.api import attend
from pallas_kernels.attention.contract import Implementation, Intervals, Problem
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.devices import device_key

# Largest |difference| over largest |value|, per tensor. In bfloat16 probabilities and their gradients are rounded too.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


# ======================================================================================================================
# Oracle
# ======================================================================================================================


def oracle_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, intervals: Intervals, dy: np.ndarray
) -> tuple[np.ndarray, Arrays]:
    """(output, (dquery, dkey, dvalue)) in float64 numpy.

    Args:
      query: [B, Q, Hq, D] in sequence order.
      key: [B, K, Hkv, D], likewise.
      value: [B, K, Hkv, D], likewise.
      intervals: without places.
      dy: [B, Q, Hq, D], cotangent of the output.
    """
    query, key, value, dy = (np.float64(a) for a in (query, key, value, dy))
    y, dq, dk, dv = np.zeros_like(query), np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    (batch, _, heads, dim), keys, kv_heads = query.shape, key.shape[1], key.shape[2]
    for row, head in np.ndindex(batch, heads):
        places, kv_head = np.arange(keys), head // (heads // kv_heads)
        seen = np.asarray(intervals.first)[row, :, None] <= places
        seen &= places <= np.asarray(intervals.last)[row, :, None]
        q, k, v, dout = query[row, :, head], key[row, :, kv_head], value[row, :, kv_head], dy[row, :, head]
        scores = np.where(seen, q @ k.T * dim**-0.5, -np.inf)
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        p = exponentials / exponentials.sum(axis=1, keepdims=True)
        y[row, :, head] = out = p @ v
        dscores = p * (dout @ v.T - np.sum(dout * out, axis=1, keepdims=True)) * dim**-0.5
        dq[row, :, head] = dscores @ k
        dk[row, :, kv_head] += dscores.T @ q
        dv[row, :, kv_head] += p.T @ dout
    return y, (dq, dk, dv)


# ======================================================================================================================
# Cases
# ======================================================================================================================


def layouts(length: int) -> dict[str, list[list[int]]]:
    """Named rows of ``length`` slots, as the lengths of their samples; the remaining slots at the end are empty."""
    third = length // 3
    many = [1 + i % 4 for i in range(length)]
    tiny = many[: int(np.searchsorted(np.cumsum(many), length, side="right"))]
    return {
        "padding": [[third + 1, third - 3, 5], [third - 1, 2 * third - 7]],
        "one_sample": [[length]],
        "many_tiny_samples": [tiny, tiny[::-1]],
        "borders_on_blocks": [[length // 2, length // 2], [length // 4] * 3],
        "border_after_one_token": [[1, length - 1], [length - 1, 1]],
        "an_empty_row": [[], [length - 1]],
    }


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Packed rows in sequence order, generated from a seed.

    Attributes:
      layout: key of ``layouts``.
      length: K, slots per row.
      queries: positions of each row's queries, ascending, if they are only a part of the row.
      heads: Hq.
      kv_heads: Hkv.
      dim: D.
      dtype: of query, key and value.
      images: runs of tokens in each sample are bidirectional images.
      poison: value of query, key and value in empty slots; None = random values as in the other slots.
    """

    layout: str = "padding"
    length: int = 128
    queries: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    dtype: str = "float32"
    images: bool = False
    poison: float | None = None

    @classmethod
    def fitting(cls, implementation: type[Implementation], **changes: Any) -> AttentionCase:
        """A small case with the multiples of sizes that an implementation requires; a row has three such blocks."""
        multiple = implementation.granularity
        return cls(**({"length": 3 * multiple * max(1, 32 // multiple)} | changes))

    @property
    def problem(self) -> Problem:
        """The argument of ``unsupported``."""
        rows = len(layouts(self.length)[self.layout])
        queries = self.length if self.queries is None else len(self.queries)
        sizes = (rows, queries, self.length, self.heads, self.kv_heads, self.dim)
        return Problem(*sizes, self.dtype, device_key(), causal=not self.images)

    def segments(self) -> np.ndarray:
        """int32 [B, K]."""
        rows = layouts(self.length)[self.layout]
        segments = np.zeros((len(rows), self.length), np.int32)
        for row, samples in enumerate(rows):
            numbers = np.repeat(np.arange(1, len(samples) + 1), samples)
            segments[row, : len(numbers)] = numbers
        return segments

    def inputs(self) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Intervals, jax.Array, jax.Array]:
        """(query, key, value), intervals, cotangent (zero in empty slots), and bool [B, Q]: queries that are tokens."""
        rng, segments = np.random.default_rng(0), self.segments()
        shape, filled = segments.shape, (segments > 0)[..., None, None]
        # Runs of tokens that belong to images, and about as many that do not.
        images = np.repeat(rng.random(shape) < 0.5, rng.integers(1, 12, shape[1]), axis=1)[:, : shape[1]]
        visual = jnp.asarray(images & (segments > 0)) if self.images else None
        intervals = packed_intervals(jnp.asarray(segments), visual)

        def normal(heads: int) -> np.ndarray:
            array = rng.standard_normal((*shape, heads, self.dim))
            return array if self.poison is None else np.where(filled, array, self.poison)

        query, key, value = normal(self.heads), normal(self.kv_heads), normal(self.kv_heads)
        dy = rng.standard_normal(query.shape) * filled
        mine = np.array(self.queries or range(self.length))
        query, key, value, dy = (jnp.asarray(a, self.dtype) for a in (query[:, mine], key, value, dy[:, mine]))
        intervals = Intervals(intervals.first[:, mine], intervals.last[:, mine])
        return (query, key, value), intervals, dy, jnp.asarray(segments[:, mine] > 0)


def errors(implementation: Implementation, case: AttentionCase) -> dict[str, float]:
    """Relative errors of the output (of queries that are tokens) and of the three gradients."""
    qkv, intervals, dy, there = case.inputs()

    @jax.jit
    def run(qkv, intervals, dy):
        options = {"implementation": implementation, "causal": case.problem.causal}
        y, backward = jax.vjp(lambda *qkv: attend(*qkv, intervals, **options), *qkv)
        return y, backward(dy)

    y, gradients = run(qkv, intervals, dy)
    expected, expected_gradients = oracle_attention(*qkv, intervals, dy)
    finite = bool(jnp.isfinite(y).all()) and y.dtype == qkv[0].dtype
    there = np.asarray(there)[..., None, None]
    found = {"y": relative_error(jnp.where(there, y, 0), np.where(there, expected, 0)) if finite else float("inf")}
    names = ("dquery", "dkey", "dvalue")
    return found | {n: relative_error(a, e) for n, a, e in zip(names, gradients, expected_gradients)}


def runs(instance: Implementation, dtype: str, all_layouts: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """(label, largest error) of the cases of ``python -m pallas_kernels.check``, most informative first."""
    cases = {"padding": {}, "groups of 4": {"heads": 4, "kv_heads": 1}, "head size 128": {"dim": 128}}
    cases |= {name: {"layout": name} for name in list(layouts(96))[1 : None if all_layouts else 4]}
    cases |= {"images seen whole": {"images": True}, "head size 80": {"dim": 80}}
    for label, changes in cases.items():
        case = AttentionCase.fitting(type(instance), dtype=dtype, **changes)
        if label == "padding" or instance.unsupported(case.problem) is None:
            yield f"attention {label} {dtype}", lambda case=case: max(errors(instance, case).values())


def refusal(instance: Implementation, dtype: str) -> str | None:
    """Why the instance does not support ``dtype``, or None."""
    return instance.unsupported(AttentionCase.fitting(type(instance), dtype=dtype).problem)
