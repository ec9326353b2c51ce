"""The layout of the tokens in packed rows: what every layer needs to know about its slots.

Slots are modality-major: of a row's S slots the first V are visual, the other T text. If several devices share rows
(the mesh axis ``context``), each has a part of either kind, so that every device's experts know their slots at compile
time, and no slot moves to another device:

    V V V V V V T T      one part: as in the batch
    V V V T V V V T      two parts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.models.rope import rotary
from mono_jax.models.sharding import by_rows, ways_of_rows
from pallas_kernels.attention.api import Parts, SequenceOrder, parts_of
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.attention.intervals import packed_intervals, within_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What differs in sliding layers: attributes of ``Slots`` with the same names."""

    cosines: jax.Array
    sines: jax.Array
    intervals: Intervals
    own: Parts | None
    window: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The S slots of B rows, modality-major in each of their parts.

    Attributes:
      positions, segments: int32 [B, S], position within the sample, index of the sample (0 = empty slot).
      order: int32 [B, S], the slot at each sequence position; inverse: the sequence position of each slot.
      cosines, sines: float32 [B, S, head_dim / 2], RoPE angles.
      intervals: the keys that each token sees, in sequence order; the same in every layer.
      visual: number of visual slots of every row, if known at compile time.
      parts: number of devices that share each row.
      own: the work of each part, if there are several.
      causal: whether every token sees its sample up to itself, in all layers.
      sliding: what differs in layers with a sliding window; None if there are none.
      window: int32 scalar, tokens that this layer sees, including the token itself; None: all of the sample.
      boundaries: int32 [B] if rows have ragged boundaries (different numbers of visual slots), else None.
    """

    positions: jax.Array
    segments: jax.Array
    order: jax.Array
    inverse: jax.Array
    cosines: jax.Array
    sines: jax.Array
    intervals: Intervals
    boundaries: jax.Array | None = None
    own: Parts | None = None
    sliding: Seen | None = None
    window: jax.Array | None = None
    visual: int = dataclasses.field(default=0, metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def of_layer(self, is_sliding: jax.Array) -> Slots:
        """The slots as a layer sees them; ``is_sliding``: bool scalar."""
        if self.sliding is None:
            return self
        everything = jnp.full((), jnp.iinfo(jnp.int32).max // 2, jnp.int32)
        whole = Seen(self.cosines, self.sines, self.intervals, self.own, everything)
        seen = jax.tree.map(lambda a, b: jnp.where(is_sliding, a, b), self.sliding, whole)
        named = {spec.name: getattr(seen, spec.name) for spec in dataclasses.fields(seen)}
        return dataclasses.replace(self, **named, sliding=None)

    @property
    def all_text(self) -> bool:
        """Whether no slot can be visual."""
        return self.boundaries is None and self.visual == 0

    @property
    def sequence(self) -> SequenceOrder:
        return SequenceOrder(self.order, self.inverse)

    def is_visual(self) -> jax.Array:
        """bool [1 or B, S]."""
        slot = jnp.arange(self.positions.shape[1])[None]
        if self.boundaries is not None:
            return slot < self.boundaries[:, None]
        return slot % (slot.shape[1] // self.parts) < self.visual // self.parts

    def in_parts(self, x: jax.Array) -> jax.Array:
        """[B, N, C], N slots of each row, as [B, parts, N / parts, C]; with one part x is unchanged.

        (XLA:TPU does not fuse SwiGLU's gradient into matmuls of [B, 1, N, C]: 3 % of a step's bound.)
        """
        rows, slots, features = x.shape
        return x if self.parts == 1 else x.reshape(rows, self.parts, slots // self.parts, features)

    def apart(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The visual slots of x [B, S, C] and its text slots, both ``in_parts``; boundaries must not be ragged."""
        x, visual = self.in_parts(x), self.visual // self.parts
        return x[..., :visual, :], x[..., visual:, :]

    def together(self, visual: jax.Array, text: jax.Array) -> jax.Array:
        """The inverse of ``apart``."""
        x = jnp.concatenate([visual, text], axis=-2)
        return x.reshape(x.shape[0], -1, x.shape[-1])


def make_slots(config: Architecture, batch: Mapping[str, jax.Array], visual: int) -> Slots:
    """The slots of a batch whose rows have ``visual`` visual slots each, or ragged boundaries in "visual_slots".

    Raises ConfigError if the devices that share a row in the mesh in use cannot have equal parts of it.
    """
    order, boundaries, parts = batch["order"], batch.get("visual_slots"), ways_of_rows()
    images = order < (visual if boundaries is None else boundaries[:, None]) if config.bidirectional_images else None
    intervals = packed_intervals(batch["segments"], images)
    if parts > 1:
        _check_parts(parts, visual, order.shape[1] - visual, boundaries is not None)
        order = _in_parts(order, visual, parts)
    inverse = jnp.argsort(order, axis=1)
    lengths = batch["lengths"] if "lengths" in batch else sample_lengths(batch["positions"], batch["segments"])
    positions, segments, lengths = (
        jnp.take_along_axis(a, inverse, axis=1) for a in (batch["positions"], batch["segments"], lengths)
    )

    def seen(intervals: Intervals, local: bool) -> tuple[jax.Array, jax.Array, Intervals, Parts | None]:
        cosines, sines = (by_rows(a) for a in rotary(config, positions, lengths, local=local))
        own = parts_of(SequenceOrder(order, inverse), intervals, parts) if parts > 1 else None
        return cosines, sines, intervals, own

    cosines, sines, _, own = seen(intervals, local=False)
    sliding = None
    if config.sliding_window is not None:
        window = jnp.full((), config.sliding_window, jnp.int32)
        sliding = Seen(*seen(within_window(intervals, config.sliding_window), local=True), window)
    places = (positions, segments, order, inverse, cosines, sines, intervals)
    return Slots(*places, boundaries, own, sliding, visual=visual, parts=parts, causal=config.causal)


def _check_parts(parts: int, visual: int, text: int, ragged: bool) -> None:
    if ragged:
        raise ConfigError(
            f"mesh.context is {parts}, but data.boundary_block gives each row its own boundary: devices that "
            "share rows need the same one in all rows: set mesh.context to 1, or data.boundary_block to 0"
        )
    if visual % parts or text % parts:
        raise ConfigError(
            f"rows of {visual} visual and {text} text slots cannot be shared by {parts} devices: change "
            "data.visual_tokens and data.text_tokens to multiples, or mesh.context"
        )


def _in_parts(slot: jax.Array, visual: int, parts: int) -> jax.Array:
    """Slots of the batch, int32 [B, S], as slots of rows in ``parts``."""
    mine, length = visual // parts, slot.shape[1] // parts
    of_text = length - mine
    place = slot - visual  # among the text slots
    text = place // max(of_text, 1) * length + mine + place % max(of_text, 1)
    return jnp.where(slot < visual, slot // max(mine, 1) * length + slot % max(mine, 1), text)


def sample_lengths(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """int32 [B, S]: tokens of each token's sample (its largest position + 1)."""
    rows, length = segments.shape
    longest = jnp.zeros((rows, length + 1), jnp.int32)
    longest = jax.vmap(lambda l, s, p: l.at[s].max(p + 1))(longest, segments, positions)
    return jnp.take_along_axis(longest, segments, axis=1)
