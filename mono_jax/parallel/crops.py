"""Tiles made on the accelerator from parts of decoded images, with Pillow's bicubic filter as two matmuls, bit for bit.

Weights are 23-bit integers (``data_pipelines.encoding.crops``). Split into 8-bit digits, they are exact in bfloat16, as
pixels are, and the sums of their products are exact in float32; so three matmuls per axis give exact sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mono_jax.parallel.mesh import batch_spec
from pallas_kernels.precision import product_precision

_BITS = 22  # fractional bits of a weight
WHOLE_ROWS = "data.pixel_path='device' makes the tiles of whole rows, but mesh.context splits rows: use 'exact'"
_FIELDS = ("crop_pixels", "crop_starts", "crop_weights")


def with_patches(batch: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch with ``patches`` in place of crops, if it holds any."""
    if _FIELDS[0] not in batch:
        return dict(batch)
    made = tiles_program(mesh)(*(batch[name] for name in (*_FIELDS, "patch_cells")))
    return {"patches": made} | {name: array for name, array in batch.items() if name not in _FIELDS}


@functools.lru_cache(maxsize=8)
def tiles_program(mesh: Mesh) -> jax.stages.Wrapped:
    """``patches_of``, compiled for a mesh on the first call."""
    return jax.jit(patches_of, out_shardings=NamedSharding(mesh, batch_spec("patches")))


def patches_of(pixels: jax.Array, starts: jax.Array, weights: jax.Array, cells: jax.Array) -> jax.Array:
    """uint8 [B, V, P, P, 3] from pixels uint8 [B, N, C, C, 3], starts and weights int32 [B, N, 2, edge, P (, K)], and
    the tokens' cells int32 [B, V], edge * edge of which belong to each of the N tiles.

    Processes one tile of each row at a time, since the matrices of all tiles would be large.
    """
    rows, tiles, _, edge, side = starts.shape
    tokens = tiles * edge * edge

    def tile(parts: tuple[jax.Array, ...]) -> jax.Array:
        image, first, weight, cell = parts
        size = image.shape[1]
        image = jnp.moveaxis(image, 3, 1).reshape(rows, 3 * size, size)  # planes, one below the other
        wide = _filtered(image, _matrix(first[:, 1], weight[:, 1], size)).reshape(rows, 3, size, edge * side)
        wide = wide.swapaxes(2, 3).reshape(rows, 3 * edge * side, size)
        made = _filtered(wide, _matrix(first[:, 0], weight[:, 0], size)).reshape(rows, 3, edge, side, edge, side)
        made = made.transpose(0, 4, 2, 5, 3, 1).reshape(rows, edge * edge, side, side, 3)
        return jnp.take_along_axis(made, cell[..., None, None, None], axis=1)

    by_tile = cells[:, :tokens].reshape(rows, tiles, edge * edge)
    made = jax.lax.map(tile, tuple(jnp.moveaxis(part, 1, 0) for part in (pixels, starts, weights, by_tile)))
    made = jnp.moveaxis(made, 0, 1).reshape(rows, tokens, side, side, 3)
    return jnp.pad(made, ((0, 0), (0, cells.shape[1] - tokens), (0, 0), (0, 0), (0, 0)))


def _matrix(first: jax.Array, weights: jax.Array, size: int) -> jax.Array:
    """int32 [B, out, size] from first int32 [B, edge, P] and weights [B, edge, P, K]."""
    rows, taps = len(first), weights.shape[-1]
    first, weights = first.reshape(rows, -1), weights.reshape(rows, -1, taps)
    places = first[..., None] + jnp.arange(taps)
    batch, line = jnp.arange(rows)[:, None, None], jnp.arange(first.shape[1])[None, :, None]
    empty = jnp.zeros((rows, first.shape[1], size), jnp.int32)
    return empty.at[batch, line, places].add(weights, mode="drop")


def _filtered(lines: jax.Array, matrix: jax.Array) -> jax.Array:
    """uint8 [B, n, out]: the pixels of each line of uint8 [B, n, size], weighted by matrix int32 [B, out, size] and
    summed."""
    lines = lines.astype(jnp.bfloat16)
    total, left = jnp.full((), 1 << (_BITS - 1), jnp.int32), matrix
    for shift in (0, 8, 16):
        digit = left if shift == 16 else ((left + 128) & 255) - 128
        left = (left - digit) >> 8
        digit, exact = digit.astype(jnp.bfloat16), jnp.float32
        products = jnp.einsum(
            "bnx,box->bno", lines, digit, preferred_element_type=exact, precision=product_precision(lines, digit)
        )
        total += products.astype(jnp.int32) << shift
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)
