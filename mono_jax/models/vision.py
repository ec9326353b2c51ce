"""From pixels to visual tokens: patch embedding, pixel shuffle, projector, and InternViT.

A visual token covers s x s patches of p x p pixels (s = 1 / downsample_ratio). The batch contains the
pixels of each token, so convolution and pixel shuffle are a reshape and one matmul:

    patches [.., s*p, s*p, 3] -> [.., s*s, p*p*3] @ kernel + bias + PE -> [.., s*s, C]
                              -> (InternViT over each tile) -> concat to [.., s*s*C] -> projector -> [.., d]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, of_native_cells
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.layers import INIT_STD, LayerNorm, Linear, RMSNorm, scan_layers, stacked
from mono_jax.models.sharding import by_rows
from pallas_kernels.devices import device_key, split_mesh
from pallas_kernels.precision import library_products


def normalise(patches: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """uint8 pixels [..., 3] to ImageNet-normalised ``dtype``; floating input counts as normalised."""
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches.astype(dtype)
    return ((patches.astype(jnp.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).astype(dtype)


def cubic(distance: Any, numpy: Any = np) -> Any:
    """The cubic kernel with a = -0.75 at ``distance`` >= 0, by NumPy or ``jax.numpy``."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (distance - 1) * (distance - 2) ** 2  # factored, so that nothing cancels in float32
    return numpy.where(distance <= 1, near, numpy.where(distance < 2, far, 0.0))


def bicubic_matrix(size_out: int, size_in: int) -> np.ndarray:
    """float32 [out, in]: cubic interpolation (a = -0.75), half-pixel centres, borders clamped, no antialiasing."""
    centres = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    base = np.floor(centres).astype(int)
    matrix = np.zeros((size_out, size_in))
    for offset in range(-1, 3):
        weight = cubic(np.abs(centres - (base + offset)))
        np.add.at(matrix, (np.arange(size_out), np.clip(base + offset, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


def cell_embedding(table: jax.Array, config: VisionConfig) -> jax.Array:
    """Positional embedding float32 [cells, s*s, C] of each token cell of a tile from ``table`` [1 + G*G, C].

    Row 0 of the table belongs to the class slot. For tiles of another size, it is interpolated bicubically in float32.
    """
    grid, shuffle = config.grid, config.shuffle
    tile_grid = config.tile // config.patch_size
    width = table.shape[-1]
    square = table[1:].astype(jnp.float32).reshape(grid, grid, width)
    if tile_grid != grid:
        matrix = bicubic_matrix(tile_grid, grid)
        square = jnp.einsum("yi,xj,ijc->yxc", matrix, matrix, square, precision="highest")
    cells = square.reshape(tile_grid // shuffle, shuffle, tile_grid // shuffle, shuffle, width)
    return cells.transpose(0, 2, 1, 3, 4).reshape(-1, shuffle * shuffle, width)


def native_embedding(table: jax.Array, cells: jax.Array, config: VisionConfig) -> jax.Array:
    """Positional embedding float32 [B, V, s*s, C] of tokens at ``native_cells`` int32 [B, V].

    Each image's grid samples the stored grid like a tile of its size (``cell_embedding``).
    """
    grid, shuffle, width = config.grid, config.shuffle, table.shape[-1]

    def weights(place: jax.Array, count: jax.Array) -> jax.Array:
        """float32 [B, V, s, G]: of the stored grid's lines, for the patches of a token at ``place`` of ``count``."""
        # Centres are (2 p + 1) G / 2n - 1/2 for patch p of n: integers over 2n, so that nothing is rounded twice.
        patches = count[..., None] * shuffle
        centres = (2 * (place[..., None] * shuffle + jnp.arange(shuffle)) + 1) * grid - patches
        near = (centres // (2 * patches))[..., None] + jnp.arange(-1, 3)  # [B, V, s, 4]
        lines = jax.nn.one_hot(jnp.clip(near, 0, grid - 1), grid)
        double = 2 * patches[..., None]
        shares = cubic((jnp.abs(centres[..., None] - near * double) / double).astype(jnp.float32), jnp)
        return jnp.einsum("bvst,bvstg->bvsg", shares, lines, precision="highest")

    @jax.checkpoint  # [B, V, s*s, G*G] weights are not kept for the backward pass
    def read(table: jax.Array) -> jax.Array:
        row, column, rows, columns = of_native_cells(cells)
        down, across = weights(row, rows), weights(column, columns)
        both = down[:, :, :, None, :, None] * across[:, :, None, :, None, :]
        both = both.reshape(*cells.shape, shuffle**2, grid**2)
        return jnp.matmul(both, table[1:].astype(jnp.float32).reshape(grid**2, width), precision="highest")

    return read(table)


class PatchEmbedding(Linear):
    """kernel [p*p*3, C] with rows in (row, column, channel) order, bias [C]: a convolution with stride p."""

    def __init__(self, config: VisionConfig, *, wide: bool = False, rngs: nnx.Rngs):
        features = config.patch_size**2 * config.num_channels
        super().__init__(features, config.hidden_size, bias=True, wide=wide, rngs=rngs)


class VisionTower(nnx.Module):
    """Embeds the pixels of visual tokens; with ``kind == "intern_vit"``, InternViT then runs over each tile."""

    def __init__(self, config: VisionConfig, *, wide: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.patch_embedding = PatchEmbedding(config, wide=wide, rngs=rngs)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.hidden_size,)) * INIT_STD)
        self.position_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (1 + config.grid**2, config.hidden_size)) * INIT_STD
        )
        if config.kind == "intern_vit":
            self.layers = stacked(lambda rngs: ViTLayer(config, wide, rngs=rngs), config.num_hidden_layers, rngs)

    def __call__(self, patches: jax.Array, cells: jax.Array, dtype: jnp.dtype, wrap: Callable[[Any], Any]) -> jax.Array:
        """Patches [B, V, P, P, 3] and cells int32 [B, V] to patch features [B, V, s*s*C].

        ``wrap`` is the remat of InternViT's layers, for which V must consist of whole tiles.
        """
        config = self.config
        b, v = cells.shape
        s, p = config.shuffle, config.patch_size
        x = normalise(patches, dtype).reshape(b, v, s, p, s, p * config.num_channels)
        # Sliced, not transposed: TPUs would pad transposed pixels to many times their size.
        x = jnp.stack([x[:, :, i, :, j].reshape(b, v, -1) for i, j in np.ndindex(s, s)], axis=2)
        position = by_rows(self._positions(cells))
        x = by_rows(self.patch_embedding(x)) + position.astype(dtype)
        if config.kind == "intern_vit":
            x = self._encode(x.reshape(b, -1, config.tile_tokens * s * s, config.hidden_size), wrap)
        return x.reshape(b, v, -1)

    def _positions(self, cells: jax.Array) -> jax.Array:
        """float32 [B, V, s*s, C]."""
        if self.config.native:
            return native_embedding(self.position_embedding[...], cells, self.config)
        return jnp.take(cell_embedding(self.position_embedding[...], self.config), cells, axis=0)

    def _encode(self, x: jax.Array, wrap: Callable[[Any], Any]) -> jax.Array:
        """x [B, tiles, patches, C] through InternViT up to ``select_layer``, with class tokens in front in between."""
        config = self.config
        token = (self.class_embedding[...] + self.position_embedding[...][0]).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (*x.shape[:2], 1, config.hidden_size)), x], axis=2)
        layers = config.select_layer + (config.num_hidden_layers + 1 if config.select_layer < 0 else 0)
        return scan_layers(self.layers, x, layers, wrap)[:, :, 1:]


class Projector(nnx.Module):
    """LayerNorm(s*s*C) -> Linear -> exact GELU -> Linear, into the model's width (mlp1)."""

    def __init__(self, features_in: int, features_out: int, *, wide: bool = False, rngs: nnx.Rngs):
        self.norm = LayerNorm(features_in, 1e-5, rngs=rngs)
        self.fc1 = Linear(features_in, features_out, bias=True, wide=wide, rngs=rngs)
        self.fc2 = Linear(features_out, features_out, bias=True, wide=wide, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))


class LayerScale(nnx.Module):
    """x * scale [C]."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.full((features,), 0.1, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[...].astype(x.dtype)


class ViTAttention(nnx.Module):
    """Multi-head attention within a tile; optionally RMS-normalised queries and keys over all heads jointly."""

    def __init__(self, config: VisionConfig, wide: bool, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias, wide=wide, rngs=rngs)
        self.proj = Linear(width, width, bias=True, wide=wide, rngs=rngs)
        if config.qk_normalization:
            self.q_norm = RMSNorm(width, config.layer_norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        *tiles, length, width = x.shape
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (length, self.heads, width // self.heads)
        if _cudnn_serves(x.dtype, heads[-1]):
            mixed = _fused_attention(*(a.reshape(-1, *heads) for a in (query, key, value)))
        else:
            query, key, value = (a.reshape(*tiles, *heads) for a in (query, key, value))
            # Rows and tiles stay separate axes: devices that share a row would cut a merged one into many pieces.
            with library_products(x.dtype):
                mixed = jax.vmap(jax.nn.dot_product_attention, in_axes=1, out_axes=1)(query, key, value)
        return self.proj(mixed.reshape(x.shape))


def _cudnn_serves(dtype: jnp.dtype, dim: int) -> bool:
    """Whether cuDNN has a kernel for attention on whole tiles in ``dtype`` with heads of ``dim``, on one GPU."""
    here = device_key().startswith("nvidia") and split_mesh() is None
    return here and dtype == jnp.bfloat16 and dim % 8 == 0 and dim <= 128


@jax.custom_vjp
def _fused_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of [N, length, heads, D] without storing the scores.

    With gradients, XLA's implementation: cuDNN accumulates them in any order, so runs would not be reproducible.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _attention_fwd(*operands: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
    with library_products(operands[0].dtype):
        return jax.vjp(jax.nn.dot_product_attention, *operands)


_fused_attention.defvjp(_attention_fwd, lambda backward, dy: backward(dy))


class ViTMlp(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionConfig, wide: bool, *, rngs: nnx.Rngs):
        self.hidden_act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, wide=wide, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, wide=wide, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = {"gelu": lambda h: jax.nn.gelu(h, approximate=False), "silu": jax.nn.silu, "relu": jax.nn.relu}
        return self.fc2(act[self.hidden_act](self.fc1(x)))


class ViTLayer(nnx.Module):
    """Pre-norm block of InternViT with layer scale; x [B, tiles, 1 + patches, C]."""

    def __init__(self, config: VisionConfig, wide: bool, *, rngs: nnx.Rngs):
        norm = LayerNorm if config.norm_type == "layer_norm" else RMSNorm
        self.norm1 = norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.attn = ViTAttention(config, wide, rngs=rngs)
        self.ls1 = LayerScale(config.hidden_size, rngs=rngs)
        self.norm2 = norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.mlp = ViTMlp(config, wide, rngs=rngs)
        self.ls2 = LayerScale(config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))
