"""Packed attention behind one function; ``contract`` says what it computes."""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels.attention import gpu, tpu, xla
from pallas_kernels.attention.contract import SequenceOrder, Slots
from pallas_kernels.attention.order import in_sequence_order
from pallas_kernels.devices import Axes, platform
from pallas_kernels.errors import Unavailable

Form = Literal["auto", "xla", "xla_chunked", "cudnn", "splash"]
FUSED = {"cudnn": gpu.cudnn, "splash": tpu.splash}
XLA_MAX_SEQUENCE = 2048  # "auto" on XLA: beyond this length the scores are made block by block


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_slots: Slots,
    key_slots: Slots,
    sequence: SequenceOrder | None = None,
    *,
    form: Form = "auto",
    chunk: int = 512,
    rows: Axes = (),
    heads: str | None = None,
) -> jax.Array:
    """Softmax attention of query [B, Q, Hq, D] over key and value [B, K, Hkv, D] within packed samples.

    Args:
      query: [B, Q, Hq, D], slots in any order.
      key: [B, K, Hkv, D].
      value: likewise.
      query_slots: positions and segments int32 [B, Q].
      key_slots: positions and segments int32 [B, K].
      sequence: only for the fused forms (self-attention of a packed row, Q = K = S); without it they are not taken.
      form: "xla" (all scores at once), "xla_chunked" (those of ``chunk`` queries at a time), "cudnn" (Hopper), "splash"
        (TPU), or "auto": the fused form of the device that is traced for, else an XLA form by length.
      chunk: queries at a time of "xla_chunked".
      rows: axes of the mesh in use that split rows, for the fused forms.
      heads: axis of the mesh in use that splits heads, for the fused forms.

    Returns:
      [B, Q, Hq, D] in the dtype of query. Slots of segment 0 give finite values of no meaning.

    Raises:
      Unavailable: "splash" is asked for rows that it cannot serve.
    """
    chosen = _choose(form, query.shape[1], sequence, chunk)
    if chosen in FUSED:
        return in_sequence_order(FUSED[chosen], query, key, value, query_slots, sequence, rows=rows, heads=heads)
    if chosen == "xla_chunked":
        return xla.chunked_attention(query, key, value, query_slots, key_slots, chunk)
    return xla.scores_attention(query, key, value, query_slots, key_slots)


def _choose(form: Form, length: int, sequence: SequenceOrder | None, chunk: int) -> Form:
    if form in FUSED and sequence is not None:
        if form == "splash" and length % tpu.LANES:
            raise Unavailable(
                f"attention 'splash' needs rows of a multiple of {tpu.LANES} slots, got {length}: change V or T"
            )
        return form
    if form == "auto" and sequence is not None:
        if platform() == "gpu":
            return "cudnn"
        if platform() == "tpu" and length % tpu.LANES == 0:
            return "splash"
    if form == "xla":
        return "xla"
    chunked = length > chunk and (form == "xla_chunked" or length > XLA_MAX_SEQUENCE)
    return "xla_chunked" if chunked else "xla"
