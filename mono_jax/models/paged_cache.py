"""Keys and values in pages shared by rows of different lengths, for serving."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mono_jax.models.cache import Cache
from mono_jax.models.slots import Slots
from pallas_kernels.devices import platform, split_mesh
from pallas_kernels.precision import float32_sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Replaces ``Cache`` in the model; a row's keys are in pages anywhere, and several rows may read the same page.

    Attributes:
      keys, values: [L, N, page, Hkv, D], or with ``heads_first`` [L, N, Hkv, page, D]. Page 0 belongs to no row: slots
        of padding are written there.
      pages: int32 [B, P], those of each row in the order of its tokens; entries beyond its length are 0.
      lengths: int32 [B], tokens of each row, including those appended last.
      places: int32 [B, S], where the slots appended last are written, counted over all pages.
    """

    keys: jax.Array
    values: jax.Array
    pages: jax.Array
    lengths: jax.Array
    places: jax.Array
    heads_first: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of_rows(cls, keys: jax.Array, values: jax.Array, pages: jax.Array, *, heads_first: bool = False) -> PagedCache:
        """A cache to which nothing has been appended yet.

        ``heads_first``: single queries use ``attend``, which multiplies pages in their stored layout. (XLA:TPU copies
        all pages in order to write into this layout.)
        """
        rows = pages.shape[0]
        return cls(keys, values, pages, jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 0), jnp.int32), heads_first)

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
        return self.keys.shape[3 if self.heads_first else 2]

    def append(self, slots: Slots) -> PagedCache:
        """The cache with the places of S new slots, derived from their positions; ``write`` adds keys and values."""
        page = self._page
        is_token = slots.segments > 0
        of_row = jnp.take_along_axis(self.pages, slots.positions // page, axis=1, mode="clip")
        places = jnp.where(is_token, of_row * page + slots.positions % page, 0)
        lengths = jnp.max(jnp.where(is_token, slots.positions + 1, 0), axis=1)
        return dataclasses.replace(self, lengths=lengths, places=places)

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> PagedCache:
        """The cache with key and value [B, S, Hkv, D] of ``layer`` in the slots appended last.

        A value that is not finite becomes 0, since weight 0 would not keep it out of other rows that later hold its
        page. (The row itself also has such a key, from the next layer on.)
        """
        page, offset = self.places // self._page, self.places % self._page
        value = jnp.where(jnp.isfinite(value), value, 0)
        at = (layer, page, slice(None), offset) if self.heads_first else (layer, page, offset)
        keys, values = (
            old.at[at].set(new.astype(old.dtype), mode="promise_in_bounds")
            for old, new in ((self.keys, key), (self.values, value))
        )
        return dataclasses.replace(self, keys=keys, values=values)

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, P * page, Hkv, D] of ``layer``."""
        rows = self.pages.shape[0]

        def in_order(pages: jax.Array) -> jax.Array:
            pages = pages.swapaxes(2, 3) if self.heads_first else pages
            return pages.reshape(rows, -1, *pages.shape[3:])

        return tuple(in_order(a.at[layer, self.pages].get(mode="promise_in_bounds")) for a in (self.keys, self.values))

    def attend(
        self, layer: jax.Array, query: jax.Array, positions: jax.Array, window: jax.Array | None = None
    ) -> jax.Array:
        """Attention of one query per row, [B, 1, Hq, D], over the tokens of its row, including itself.

        Processes one page of every row at a time, up to the longest row's last one, with a running maximum and sum: the
        gathered data stays in the CPU's caches, and rows are not padded to a size (``read`` copies all pages first).
        Pages must have heads first.

        Args:
          positions: int32 [B, 1], of the queries in their rows.
          window: int32 scalar; keys this far or further before their query are not seen. None: all are seen.

        Returns:
          [B, 1, Hq, D] in the dtype of ``query``; for rows without tokens, finite but meaningless values.
        """
        rows, _, heads, dim = query.shape
        kv_heads, page = self.keys.shape[2], self._page
        grouped = (query * dim**-0.5).reshape(rows, kv_heads, heads // kv_heads, dim)
        first = jnp.zeros_like(positions)
        if window is not None:
            first = jnp.where(self.lengths[:, None] > 0, jnp.maximum(positions - (window - 1), 0), positions)

        def one_page(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, mixed = state
            key, value = (
                a.at[layer, self.pages[:, number]].get(mode="promise_in_bounds") for a in (self.keys, self.values)
            )
            place = number * page + jnp.arange(page)
            is_seen = (place >= first) & (place < self.lengths[:, None])
            scores = float32_sums("bhgd,bhkd->bhgk", grouped, key)
            scores = jnp.where(is_seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
            now = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            # Weights of a row that has seen no key yet are cancelled by its first key.
            kept, weights = jnp.exp(largest - now), jnp.exp(scores - now)
            added = float32_sums("bhgk,bhkd->bhgd", weights.astype(value.dtype), value)
            return now, total * kept + weights.sum(axis=-1, keepdims=True), mixed * kept + added

        shape = (*grouped.shape[:3], 1)
        start = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32)
        begin, end = jnp.min(first) // page, -(-jnp.max(self.lengths) // page)
        _, total, mixed = jax.lax.fori_loop(begin, end, one_page, start)
        return (mixed / jnp.maximum(total, 1e-30)).astype(query.dtype).reshape(query.shape)


def reads_page_by_page() -> bool:
    """Whether single queries should use ``PagedCache.attend``: on one CPU. (On accelerators loops cost launches.)"""
    return platform() == "cpu" and split_mesh() is None


AnyCache = Cache | PagedCache
