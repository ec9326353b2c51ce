"""What an implementation of packed attention has to provide.

A row holds the tokens of several samples. **Each query sees one interval of keys**, which covers packing, causality,
bidirectional images, and context parallelism:

    query i sees key j   iff   first[i] <= j <= last[i]          j counts the row's keys in sequence order

    query [B, Q, Hq, D], key and value [B, K, Hkv, D]     Hq a multiple of Hkv: query head h reads head h // (Hq // Hkv)
    scores = query * D ** -0.5 @ key.T, softmax in float32 over the keys that are seen, times value
    output [B, Q, Hq, D] in the dtype of query

``first`` and ``last`` never decrease along a row, and first <= last. In a causally packed row, first is the start of
the query's sample and last is the query itself; in a bidirectional image, last is the last token of the image. Q may be
smaller than K (context parallelism: the queries of one device, the keys of all).

Empty slots see only themselves and are seen by no token. They must hold finite values; their output is finite but
meaningless, and its cotangent must be zero.

To write an implementation: subclass ``Implementation`` in a module of ``backends`` and register it in
``registry.IMPLEMENTATIONS`` as "attention/NAME", add it to the order of the tuning tables (``tuning/attention``) of the
devices where it should be chosen, and inherit the tests of tests/pallas_kernels/attention/suite.py.
``checks.attention`` holds the float64 oracle and the cases; compilations for absent hardware belong in
``checks.aot_table``. A forward kernel names its results ``OUTPUT`` and ``LSE`` (``checkpoint_name``), so that a remat
policy can keep them and the kernel is not run again for the backward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

OUTPUT, LSE = "attention_out", "attention_lse"  # names of the output and of its log-sum-exps, for remat policies


class Intervals(NamedTuple):
    """Which keys each query sees.

    Attributes:
      first: int32 [B, Q], first key seen.
      last: int32 [B, Q], last key seen.
      places: int32 [B, K], for keys in any order: the position of each key in the order in which ``first`` and ``last``
        count (queries may then be in any order too). None: keys and queries are in sequence order.
    """

    first: jax.Array
    last: jax.Array
    places: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, as far as the choice of an implementation depends on it.

    Sizes are those of all devices together, except for the queries if several devices share a row.

    Attributes:
      batch: rows B.
      queries: Q; S / n if n devices share rows of S slots.
      keys: K.
      heads: query heads Hq.
      kv_heads: heads of key and value Hkv.
      dim: head size D.
      dtype: name of the dtype of query, key and value ("bfloat16" or "float32").
      device: key of a tuning table, e.g. "cpu", "tpu_v5e", "nvidia_h200".
      causal: every query sees its sample up to itself (Q = K, no window); some kernels support only such rows.
      in_order: keys and queries can be put into sequence order (those of a cache cannot).
    """

    ROOM: ClassVar[str] = "attention"
    EXACT: ClassVar[tuple[str, ...]] = ("dtype", "dim")
    SIZE: ClassVar[str] = "queries"

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    device: str
    causal: bool = True
    in_order: bool = True


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Base of all implementations: a frozen (hashable) dataclass whose fields are its tuning parameters."""

    name: ClassVar[str]
    # Q and K of the conformance suite's cases are multiples of this.
    granularity: ClassVar[int] = 1
    # True: built from XLA's own operations, which take slots in any order (``Intervals.places``) and can be split by
    # the partitioner. False: takes only sequence order (places is None), and each device calls it on its own rows and
    # heads.
    any_order: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot serve ``problem``, or None if it can. Never raises."""
        raise NotImplementedError

    @classmethod
    def here(cls) -> Self:
        """An instance that runs on this machine, interpreted if necessary; raises ``Unavailable`` with the reason."""
        return cls()

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        """Values worth trying for each field, as in JSON."""
        return {}

    def with_chunk(self, chunk: int) -> Self:
        """An instance that works on ``chunk`` queries at a time, if that is a parameter."""
        del chunk
        return self

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        """Attention as defined in the module's docstring; differentiable in query, key and value."""
        raise NotImplementedError


def visible(intervals: Intervals, keys: int) -> jax.Array:
    """bool [B, Q, K]: which keys are seen, as a mask."""
    places = jnp.arange(keys)[None] if intervals.places is None else intervals.places
    places = places[:, None, :]
    return (intervals.first[:, :, None] <= places) & (places <= intervals.last[:, :, None])


def needs_order(problem: Problem) -> str | None:
    """The refusal of an implementation that takes only sequence order."""
    return None if problem.in_order else "keys of a cache are not in sequence order"


def needs_causal_rows(problem: Problem) -> str | None:
    """The refusal of an implementation for packed causal rows only: self-attention, each query is the last key seen."""
    if problem.queries != problem.keys:
        return f"needs as many queries as keys, not {problem.queries} and {problem.keys}"
    return None if problem.causal else "supports only causal rows (no bidirectional images)"
