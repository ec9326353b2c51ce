"""Attention of packed rows: ``pallas_kernels.attention`` on the slots of a model.

Which token sees which is computed once per step (``slots.make_slots``). XLA's implementations work directly on
modality-major slots, and on those of a cache; the kernels need sequence order and get it by a gather.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mono_jax.axes import CONTEXT, ROWS, TENSOR
from mono_jax.errors import ConfigError
from mono_jax.models.execution import Execution
from mono_jax.models.paged_cache import AnyCache, PagedCache
from mono_jax.models.slots import Slots
from pallas_kernels.attention import api
from pallas_kernels.attention.backends import xla
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.attention.intervals import scattered_intervals
from pallas_kernels.attention.order import permute
from pallas_kernels.errors import Unavailable


def attend(
    execution: Execution,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    cache: AnyCache | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention (float32 softmax) of query [B, Q, Hq, D] over key and value [B, K, Hkv, D].

    Keys are those of the same ``slots`` (a packed row attends to itself), or those of ``layer`` in ``cache`` if one is
    given, which includes the former. The slots of a cache are in any order, so it is read by one of XLA's
    implementations, whatever ``execution.attention`` names for rows. Exceptions are pages: a chunk of a prompt reads
    them in sequence order, by any implementation that supports fewer queries than keys, and single queries read page
    after page where pages are laid out for it. The output is [B, Q, Hq, D] in the dtype of ``query``. Empty slots get
    finite but meaningless values. Raises ConfigError if ``execution.attention`` names an implementation that cannot
    serve these rows, and for a cache if several devices share rows.
    """
    named = None if execution.attention == "auto" else execution.attention
    options = {"chunk": execution.attention_chunk, "rows": ROWS, "heads": TENSOR}
    if cache is not None:
        if slots.parts > 1:
            raise ConfigError(f"mesh.context is {slots.parts}: keys of a cache are not shared by devices; set it to 1")
        if isinstance(cache, PagedCache) and query.shape[1] == 1 and cache.heads_first:
            return cache.attend(layer, query, slots.positions, slots.window)
        key, value = cache.read(layer)
        if isinstance(cache, PagedCache) and query.shape[1] > 1:
            order, inverse = slots.sequence
            query = permute(query, order, inverse)
            mixed = api.attend(query, key, value, _paged(slots), implementation=named, **options)
            return permute(mixed, inverse, order)
        named = named if named in ("xla", "xla_chunked") else None
        return api.attend(query, key, value, _cached(slots, cache), implementation=named, **options)
    try:
        options |= {"causal": slots.causal, "context": CONTEXT, "parts": slots.own}
        options["ulysses"] = execution.exchanges_heads
        return api.attend(query, key, value, slots.intervals, slots.sequence, implementation=named, **options)
    except Unavailable as error:
        shared = slots.parts > 1 and not execution.exchanges_heads
        shared = f" (mesh.context is {slots.parts}: each device has a part of the queries)" if shared else ""
        raise ConfigError(f"execution.attention: {error}{shared}") from None


def attend_with_probabilities(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    cache: AnyCache | None = None,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities float32 [B, Hq, Q, K], all in memory, and the output of ``attend``."""
    if cache is not None:
        key, value = cache.read(layer)
    intervals = api.of_slots(slots.intervals, slots.sequence) if cache is None else _cached(slots, cache)
    return xla.probabilities_and_output(query, key, value, intervals)


def _ahead(slots: Slots) -> jax.Array:
    """int32 [B, S]: how many later tokens each token sees, in sequence order."""
    return slots.intervals.last - jnp.arange(slots.order.shape[1])


def _paged(slots: Slots) -> Intervals:
    """The keys of their row that ``slots`` see, counted from its first token; all in sequence order.

    Empty slots, which come after all tokens, see what the last token sees.
    """
    positions, segments = (jnp.take_along_axis(a, slots.order, axis=1) for a in (slots.positions, slots.segments))
    last = jnp.where(segments > 0, positions + _ahead(slots), 0)
    first = jnp.zeros_like(last)
    if slots.window is not None:
        first = jnp.where(segments > 0, jnp.maximum(positions - (slots.window - 1), 0), 0)
    return Intervals(*(jax.lax.cummax(bound, axis=1) for bound in (first, last)))


def _cached(slots: Slots, cache: AnyCache) -> Intervals:
    """The keys in ``cache`` that ``slots`` see, including their own."""
    reach = slots.positions + jnp.take_along_axis(_ahead(slots), slots.inverse, axis=1)
    return scattered_intervals(
        (slots.positions, slots.segments), (cache.positions, cache.segments), reach, slots.window
    )
