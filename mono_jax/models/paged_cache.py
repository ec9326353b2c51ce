"""Keys and values in pages that rows of different lengths share, for serving."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mono_jax.models.cache import Cache
from mono_jax.models.slots import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """What ``Cache`` is to the model; the keys of a row lie in pages anywhere, and several rows may read the same page.

    Attributes:
      keys, values: [L, N, page, Hkv, D]. Page 0 is nobody's: the slots of padding are written there.
      pages: int32 [B, P], of each row in the order of its tokens; those beyond its length are 0.
      lengths: int32 [B], tokens of each row, those appended last included.
      places: int32 [B, S], where those slots are written, counted over all pages.
    """

    keys: jax.Array
    values: jax.Array
    pages: jax.Array
    lengths: jax.Array
    places: jax.Array

    @classmethod
    def of_rows(cls, keys: jax.Array, values: jax.Array, pages: jax.Array) -> PagedCache:
        """Nothing is appended yet."""
        rows = pages.shape[0]
        return cls(keys, values, pages, jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 0), jnp.int32))

    @property
    def positions(self) -> jax.Array:
        """int32 [B, P * page]: keys are read in the order of the row's tokens."""
        rows, pages = self.pages.shape
        return jnp.broadcast_to(jnp.arange(pages * self._page, dtype=jnp.int32), (rows, pages * self._page))

    @property
    def segments(self) -> jax.Array:
        """int32 [B, P * page]: 1 where a row has a token."""
        return (self.positions < self.lengths[:, None]).astype(jnp.int32)

    @property
    def _page(self) -> int:
        return self.keys.shape[2]

    def append(self, slots: Slots) -> PagedCache:
        """With the places of S new slots, which follow from their positions; ``write`` fills in keys and values."""
        page = self._page
        is_token = slots.segments > 0
        of_row = jnp.take_along_axis(self.pages, slots.positions // page, axis=1, mode="clip")
        places = jnp.where(is_token, of_row * page + slots.positions % page, 0)
        lengths = jnp.max(jnp.where(is_token, slots.positions + 1, 0), axis=1)
        return dataclasses.replace(self, lengths=lengths, places=places)

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> PagedCache:
        """With key and value [B, S, Hkv, D] of ``layer`` in the slots appended last.

        A value that is not finite becomes 0: weight 0 would not keep it from other rows once they hold its page. (The
        row itself has such a key too, from the layer after.)
        """
        page, offset = self.places // self._page, self.places % self._page
        value = jnp.where(jnp.isfinite(value), value, 0)
        keys, values = (
            old.at[layer, page, offset].set(new.astype(old.dtype), mode="promise_in_bounds")
            for old, new in ((self.keys, key), (self.values, value))
        )
        return dataclasses.replace(self, keys=keys, values=values)

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, P * page, Hkv, D] of ``layer``."""
        rows = self.pages.shape[0]
        return tuple(
            a.at[layer, self.pages].get(mode="promise_in_bounds").reshape(rows, -1, *a.shape[3:])
            for a in (self.keys, self.values)
        )


AnyCache = Cache | PagedCache
