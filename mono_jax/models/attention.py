"""Grouped-query attention within packed samples, behind one function.

A token attends to the tokens of its own sample at its own position or before it. Which token that is
follows from positions and segments alone, so the XLA forms work on slots in any order: in the
modality-major layout nothing has to be gathered. The fused kernels (cuDNN, splash) skip blocks above
the diagonal and therefore want sequence order; only for them q, k and v are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mono_jax.errors import ConfigError
from mono_jax.models.cache import Cache
from mono_jax.models.execution import Execution
from mono_jax.models.slots import Slots
from mono_jax.parallel.mesh import BATCH, ROWS, per_device, platform, tensor_axis

XLA_MAX_SEQUENCE = 2048  # "auto" on XLA: beyond this length the scores are made block by block


class Places(NamedTuple):
    """Where tokens stand: positions int32 [B, N] within the sample; segments int32 [B, N], 0 = empty."""

    positions: jax.Array
    segments: jax.Array


# (query, key, value, places), all in sequence order -> output in sequence order.
Fused = Callable[[jax.Array, jax.Array, jax.Array, Places], jax.Array]


def attend(
    execution: Execution,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    cache: Cache | None = None,
) -> jax.Array:
    """Softmax attention (float32 softmax) of query [B, Q, Hq, D] over key and value [B, K, Hkv, D].

    Keys are those of the same ``slots`` (a packed row attends to itself), or of ``cache`` where one is given. The
    output is [B, Q, Hq, D] in the dtype of ``query``. Empty slots give finite values without meaning.
    """
    kind = _choose(execution, query.shape[1], fused=cache is None)
    if kind in ("cudnn", "splash"):
        fused = _cudnn if kind == "cudnn" else _splash
        return _in_sequence_order(fused, query, key, value, slots)
    places = query_places, key_places = places_of(slots, cache)
    if kind == "xla_chunked":
        return _chunked(query, key, value, query_places, key_places, execution.attention_chunk)
    # Scores are made again in the backward pass: cheaper than keeping them, in memory and on CPUs in time.
    return jax.checkpoint(lambda *args: probabilities_and_output(*args)[1])(query, key, value, *places)


def places_of(slots: Slots, cache: Cache | None) -> tuple[Places, Places]:
    """Places of the queries and of the keys."""
    keys = slots if cache is None else cache
    return Places(slots.positions, slots.segments), Places(keys.positions, keys.segments)


def probabilities_and_output(
    query: jax.Array, key: jax.Array, value: jax.Array, query_places: Places, key_places: Places
) -> tuple[jax.Array, jax.Array]:
    """Attention with its probabilities float32 [B, Hq, Q, K] in memory; output as ``attend``."""
    b, q_len, heads, dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    # The queries of a group one behind the other: plain batched products, no transposed scores.
    grouped = (query * dim**-0.5).reshape(b, q_len, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(b, kv_heads, group * q_len, dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv_heads, group, q_len, -1)
    scores = jnp.where(_visible(query_places, key_places)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    mixed = probabilities.astype(value.dtype).reshape(b, kv_heads, group * q_len, -1)
    output = jnp.einsum("bhqk,bhkd->bhqd", mixed, value)
    output = output.reshape(b, kv_heads, group, q_len, dim).transpose(0, 3, 1, 2, 4)
    return probabilities.reshape(b, heads, q_len, -1), output.reshape(b, q_len, heads, dim)


def _visible(query_places: Places, key_places: Places) -> jax.Array:
    """bool [B, Q, K]: same sample, not padding, not later."""
    same = query_places.segments[:, :, None] == key_places.segments[:, None, :]
    past = query_places.positions[:, :, None] >= key_places.positions[:, None, :]
    return same & past & (key_places.segments[:, None, :] > 0)


def _choose(execution: Execution, length: int, fused: bool) -> str:
    """The form for rows of ``length`` slots; ``fused`` = a packed row attends to itself, as the fused kernels want."""
    kind = execution.attention
    if kind in ("cudnn", "splash") and fused:
        if kind == "splash" and length % 128:
            raise ConfigError(f"attention 'splash' needs rows of a multiple of 128 slots, got {length}: change V or T")
        return kind
    if kind == "auto" and fused:
        if platform() == "gpu":
            return "cudnn"
        if platform() == "tpu" and length % 128 == 0:
            return "splash"
    if kind == "xla":
        return "xla"
    chunked = length > execution.attention_chunk and (kind == "xla_chunked" or length > XLA_MAX_SEQUENCE)
    return "xla_chunked" if chunked else "xla"


def _chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, query_places: Places, key_places: Places, chunk: int
) -> jax.Array:
    """As ``probabilities_and_output``, with the scores of ``chunk`` queries in memory at once."""
    b, length = query.shape[:2]
    padding = -length % chunk
    query_places = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, padding))), query_places)
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))

    @jax.checkpoint
    def block(args: tuple[jax.Array, Places]) -> jax.Array:
        q, places = args
        return probabilities_and_output(q, key, value, places, key_places)[1]

    blocks = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(b, -1, chunk, *a.shape[2:]), 1, 0), (query, query_places))
    output = jnp.moveaxis(jax.lax.map(block, blocks), 0, 1)
    return output.reshape(b, length + padding, *output.shape[3:])[:, :length]


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [B, S, ...] in the order given; the backward pass gathers too (a scatter would be slow)."""
    del inverse
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0))(x, order)


def _permute_fwd(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _permute_bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = residuals
    return _permute(gradient, inverse, order), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def _in_sequence_order(fused: Fused, query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots) -> jax.Array:
    """Runs ``fused`` on arrays in sequence order and puts the output back into slots; rows and heads over the mesh."""

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, places: Places, order: jax.Array, inverse: jax.Array
    ) -> jax.Array:
        q, k, v = (_permute(a, order, inverse) for a in (query, key, value))
        ordered = jax.tree.map(lambda a: jnp.take_along_axis(a, order, axis=1), places)
        return _permute(fused(q, k, v, ordered), inverse, order)

    heads = P(ROWS, None, tensor_axis(key.shape[2]))
    places = Places(slots.positions, slots.segments)
    specs = (heads, heads, heads, BATCH, BATCH, BATCH)
    return per_device(run, specs, heads)(query, key, value, places, slots.order, slots.inverse)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, places: Places) -> jax.Array:
    """Flash attention of cuDNN; samples are kept apart by a mask [B, 1, S, S] shared by all heads."""
    mask = _visible(places, places)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, places: Places) -> jax.Array:
    """Splash attention (TPU): causal by block, samples kept apart by segment ids, no mask in memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, dim = query.shape[1:]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    interpret = platform() == "cpu"  # slow, for tests
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (query * dim**-0.5, key, value))
    segments = splash.SegmentIds(q=places.segments, kv=places.segments)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)
