"""Where the tokens of a packed row stand: what every layer needs to know about its slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mono_jax.models.architecture import Architecture
from mono_jax.models.rope import rotary
from pallas_kernels.attention.api import SequenceOrder
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.attention.intervals import packed_intervals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The S slots of B rows, modality-major: each row's first slots are visual.

    Attributes:
      positions, segments: int32 [B, S], position within the sample, number of the sample (0 = empty slot).
      order: int32 [B, S], the slot at each sequence position; inverse: the sequence position of each slot.
      cosines, sines: float32 [B, S, head_dim / 2], RoPE angles.
      intervals: the keys that each token sees, in sequence order; the same in every layer.
      visual: visual slots of every row, where that is known when the program is compiled.
      causal: no token sees a later one.
      boundaries: int32 [B] where rows have ragged boundaries (each its own number of visual slots), else None.
    """

    positions: jax.Array
    segments: jax.Array
    order: jax.Array
    inverse: jax.Array
    cosines: jax.Array
    sines: jax.Array
    intervals: Intervals
    boundaries: jax.Array | None = None
    visual: int = dataclasses.field(default=0, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def all_text(self) -> bool:
        """Whether no slot can be visual."""
        return self.boundaries is None and self.visual == 0

    @property
    def sequence(self) -> SequenceOrder:
        return SequenceOrder(self.order, self.inverse)

    def is_visual(self) -> jax.Array:
        """bool [1 or B, S]."""
        ends = jnp.array([self.visual]) if self.boundaries is None else self.boundaries
        return jnp.arange(self.positions.shape[1])[None] < ends[:, None]


def make_slots(config: Architecture, batch: Mapping[str, jax.Array], visual: int) -> Slots:
    """The slots of a batch whose rows have ``visual`` visual slots, or boundaries of their own in "visual_slots"."""
    order, boundaries = batch["order"], batch.get("visual_slots")
    inverse = jnp.argsort(order, axis=1)
    images = order < (visual if boundaries is None else boundaries[:, None]) if config.bidirectional_images else None
    intervals = packed_intervals(batch["segments"], images)
    lengths = batch["lengths"] if "lengths" in batch else sample_lengths(batch["positions"], batch["segments"])
    positions, segments, lengths = (
        jnp.take_along_axis(a, inverse, axis=1) for a in (batch["positions"], batch["segments"], lengths)
    )
    cosines, sines = rotary(config, positions, lengths)
    causal = not config.bidirectional_images
    return Slots(positions, segments, order, inverse, cosines, sines, intervals, boundaries, visual, causal)


def sample_lengths(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """int32 [B, S]: tokens of each token's sample (its largest position + 1)."""
    rows, length = segments.shape
    longest = jnp.zeros((rows, length + 1), jnp.int32)
    longest = jax.vmap(lambda l, s, p: l.at[s].max(p + 1))(longest, segments, positions)
    return jnp.take_along_axis(longest, segments, axis=1)
