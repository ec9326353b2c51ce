"""Attention of packed rows: the forms of ``pallas_kernels.attention`` on the slots of a model.

Which token may see which follows from positions and segments, so the XLA forms work on modality-major slots directly;
the fused kernels (cuDNN, splash) want sequence order and get it by a gather.
"""

from __future__ import annotations

import jax

from mono_jax.axes import ROWS, TENSOR
from mono_jax.errors import ConfigError
from mono_jax.models.cache import Cache
from mono_jax.models.execution import Execution
from mono_jax.models.slots import Slots
from pallas_kernels.attention import api, xla
from pallas_kernels.attention import contract as kernels
from pallas_kernels.errors import Unavailable


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
    Raises ConfigError if ``execution.attention`` names a form that cannot serve these rows.
    """
    sequence = None if cache is not None else kernels.SequenceOrder(slots.order, slots.inverse)
    options = {"form": execution.attention, "chunk": execution.attention_chunk, "rows": ROWS, "heads": TENSOR}
    try:
        return api.attend(query, key, value, *_places(slots, cache), sequence, **options)
    except Unavailable as error:
        raise ConfigError(f"execution.attention: {error}") from None


def attend_with_probabilities(
    query: jax.Array, key: jax.Array, value: jax.Array, slots: Slots, cache: Cache | None = None
) -> tuple[jax.Array, jax.Array]:
    """Probabilities float32 [B, Hq, Q, K], all in memory, and the output of ``attend``."""
    return xla.probabilities_and_output(query, key, value, *_places(slots, cache))


def _places(slots: Slots, cache: Cache | None) -> tuple[kernels.Slots, kernels.Slots]:
    """Positions and segments of the queries, and of the keys."""
    keys = slots if cache is None else cache
    return kernels.Slots(slots.positions, slots.segments), kernels.Slots(keys.positions, keys.segments)
