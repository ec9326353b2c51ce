"""What an implementation of packed attention has to provide.

A row holds the tokens of several samples. **Each query sees one interval of keys**, which serves packing, causality,
images that are seen whole, and context parallelism alike:

    query i sees key j   iff   first[i] <= j <= last[i]          j counts the row's keys in sequence order

    query [B, Q, Hq, D], key and value [B, K, Hkv, D]     Hq a multiple of Hkv: query head h reads head h // (Hq // Hkv)
    scores = query * D ** -0.5 @ key.T, softmax in float32 over the keys that are seen, times value
    output [B, Q, Hq, D] in the dtype of query

``first`` and ``last`` never decrease along a row, and first <= last. In a row packed causally first is the start of the
query's sample and last the query itself; where an image is seen whole, last is the last token of the image. Q may be
smaller than K (context parallelism: the queries of one device, the keys of all).

Empty slots see themselves alone and are seen by no token. They must hold finite values; what comes out for them is
finite and of no meaning, and its cotangent must be zero.

To write an implementation: subclass ``Implementation`` in a module of ``backends`` and register it in
``registry.IMPLEMENTATIONS`` as "attention/NAME", put it into the order of the tuning tables (``tuning/attention``)
where it is to be chosen, and inherit the tests of tests/pallas_kernels/attention/suite.py. ``checks.attention`` holds
the float64 oracle and the cases; compilations for absent hardware belong into ``checks.aot_table``.
A forward kernel gives its results the names ``OUTPUT`` and ``LSE`` (``checkpoint_name``), so that a remat policy can
keep them and the kernel is not run again for the backward pass.
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
      places: int32 [B, K], where keys lie in any order: the place of each in the order that ``first`` and ``last``
        count in (then these may stand in any order too). None: keys and queries are in sequence order.
    """

    first: jax.Array
    last: jax.Array
    places: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, as far as the choice of an implementation depends on it.

    Sizes are those of all devices together, but for the queries where several devices share a row.

    Attributes:
      batch: rows B.
      queries: Q; S / n where n devices share rows of S slots.
      keys: K.
      heads: query heads Hq.
      kv_heads: heads of key and value Hkv.
      dim: head size D.
      dtype: name of the dtype of query, key and value ("bfloat16" or "float32").
      device: key of a tuning table, e.g. "cpu", "tpu_v5e", "nvidia_h200".
      causal: every query sees its sample up to itself (Q = K, no window); some kernels know no other rows.
      in_order: keys and queries can be had in sequence order (those of a cache cannot).
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
    # True: made of XLA's own operations, which take slots in any order (``Intervals.places``) and which the partitioner
    # can split. False: takes sequence order only (places is None), and each device calls it on its own rows and heads.
    any_order: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot serve ``problem``, or None if it can. Never raises."""
        raise NotImplementedError

    @classmethod
    def here(cls) -> Self:
        """An instance that computes on this machine, interpreted if need be; raises ``Unavailable`` with the reason."""
        return cls()

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        """Values worth trying for each field, as JSON has them."""
        return {}

    def with_chunk(self, chunk: int) -> Self:
        """The instance that works on ``chunk`` queries at a time, where that is a parameter."""
        del chunk
        return self

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        """Attention as the module says; differentiable in query, key and value."""
        raise NotImplementedError


def visible(intervals: Intervals, keys: int) -> jax.Array:
    """bool [B, Q, K]: which keys are seen, as a mask."""
    places = jnp.arange(keys)[None] if intervals.places is None else intervals.places
    places = places[:, None, :]
    return (intervals.first[:, :, None] <= places) & (places <= intervals.last[:, :, None])


def needs_order(problem: Problem) -> str | None:
    """The refusal of an implementation that takes sequence order only."""
    return None if problem.in_order else "keys of a cache are not in sequence order"


def needs_causal_rows(problem: Problem) -> str | None:
    """The refusal of an implementation that knows packed causal rows only: self-attention, each query the last seen."""
    if problem.queries != problem.keys:
        return f"needs as many queries as keys, not {problem.queries} and {problem.keys}"
    return None if problem.causal else "knows causal rows only (no images seen whole)"
