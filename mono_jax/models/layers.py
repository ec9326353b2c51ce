"""Basic layers shared by every model of the family, and how modules become pure functions.

All modules are Flax NNX modules without mutable state. ``Structure`` builds one abstractly and binds it to a plain
nested dict of arrays when called; ``stacked`` makes one module of many equal layers, which ``scan_layers`` runs.
Kernels are [in, out], or ``Transposed``. Parameters are cast to the dtype of the activations at use; normalisation
statistics are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mono_jax.axes import TENSOR
from mono_jax.models.sharding import by_rows, ways_of_rows
from pallas_kernels.precision import product_precision

INIT_STD = 0.02

Build = Callable[[nnx.Rngs], nnx.Module]


class Structure:
    """A module without its arrays: ``init`` creates them, ``bind`` inserts a nested dict of them."""

    def __init__(self, build: Build):
        self._build = build
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters as a plain nested dict."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key))))

    def init_stacked(self, key: jax.Array, count: int) -> dict[str, Any]:
        """Parameters of ``count`` such modules, stacked on a new leading axis."""
        return jax.vmap(self.init)(jax.random.split(key, count))

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The module with ``params`` as its parameters."""
        return nnx.merge(self._graph, dict(params))


def stacked(build: Build, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """``count`` layers as one module: each parameter has a leading axis [count, ...]."""
    structure = Structure(build)
    return structure.bind(structure.init_stacked(rngs.params(), count))


def scan_layers(layers: nnx.Module, x: jax.Array, count: int, wrap: Callable[[Any], Any]) -> jax.Array:
    """Passes x through the first ``count`` layers of a ``stacked`` module; ``wrap`` (remat) wraps the scan's body."""
    graph, state = nnx.split(layers)

    def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        return by_rows(nnx.merge(graph, layer)(by_rows(x))), None

    return jax.lax.scan(wrap(body), x, jax.tree.map(lambda a: a[:count], state))[0]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = INIT_STD) -> jax.Array:
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A kernel [..., in, out] that is stored as ``array`` [..., out, in], for decoding on CPUs.

    XLA's matmuls on CPUs pack the whole right operand, however few rows there are. With the weights on the left, 2 to
    32 rows take between a fifth and two thirds of the time; one row, or many, take as long as before (BUILD_NOTES).
    """

    array: jax.Array

    FEW_ROWS: ClassVar[int] = 48

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.array.shape[:-2], self.array.shape[-1], self.array.shape[-2]

    @property
    def matrix(self) -> jax.Array:
        """The kernel [..., in, out] itself."""
        return self.array.swapaxes(-1, -2)

    def astype(self, dtype: jnp.dtype) -> Transposed:
        return Transposed(self.array.astype(dtype))

    def __getitem__(self, index: Any) -> Transposed:
        """Indexes the leading axes."""
        return self if index is Ellipsis else Transposed(self.array[index])

    def times(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., in] @ kernel [in, out], accumulated and returned in ``dtype`` (None: that of x)."""
        weights, rows = self.array, x.reshape(-1, x.shape[-1])
        few = len(rows) <= self.FEW_ROWS
        operands, last = (weights, rows) if few else (rows, weights), (((1,), (1,)), ((), ()))
        precision = product_precision(x, weights)
        y = jax.lax.dot_general(*operands, last, precision=precision, preferred_element_type=dtype)
        if few:
            y = jax.lax.optimization_barrier(y).T  # without the barrier XLA would turn it into the form for many rows
        return y.reshape(*x.shape[:-1], weights.shape[0])


Kernel = jax.Array | Transposed


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., in] @ kernel [in, out]."""
    if isinstance(kernel, Transposed):
        return kernel.times(x)
    return jnp.matmul(x, kernel, precision=product_precision(x, kernel))


@jax.custom_vjp
def product_with_wide_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out]; the kernel's gradient is accumulated in float32 over slots and devices."""
    return product(x, kernel)


def _product_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _product_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    slots = tuple(range(x.ndim - 1))
    precision = product_precision(x, dy)
    gradient = jnp.tensordot(x, dy, (slots, slots), precision=precision, preferred_element_type=jnp.float32)
    return product(dy, kernel.T), gradient.astype(kernel.dtype)


product_with_wide_gradient.defvjp(_product_fwd, _product_bwd)


class Linear(nnx.Module):
    """y [..., out] = x [..., in] @ kernel [in, out] (+ bias [out]) (+ what a low-rank adapter adds: ``adapt``).

    ``wide``: see ``product_with_wide_gradient``.
    """

    def __init__(self, features_in: int, features_out: int, *, bias: bool = False, wide: bool = False, rngs: nnx.Rngs):
        self.wide = wide
        self.kernel = nnx.Param(_normal(rngs, (features_in, features_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32))

    def adapt(self, rank: int, scale: float, *, rngs: nnx.Rngs) -> None:
        """Adds scale (x A) B to the output, A [in, rank] random and B [rank, out] zeros; see ``models.adapters``."""
        features_in, features_out = self.kernel.shape
        self.scale = scale
        self.lora_a = Linear(features_in, rank, wide=self.wide, rngs=rngs)
        self.lora_a.kernel = nnx.Param(_normal(rngs, (features_in, rank), features_in**-0.5))
        self.lora_b = Linear(rank, features_out, wide=self.wide, rngs=rngs)
        self.lora_b.kernel = nnx.Param(jnp.zeros((rank, features_out), jnp.float32))

    @property
    def is_transposed(self) -> bool:
        return isinstance(self.kernel[...], Transposed)

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix [in, out] that x is multiplied by, including an adapter's product; not for transposed kernels."""
        kernel = self.kernel[...].astype(dtype)
        if not hasattr(self, "lora_a"):
            return kernel
        low, high = (part.kernel[...].astype(dtype) for part in (self.lora_a, self.lora_b))
        return kernel + self.scale * product(low, high)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Rows flattened: the weight gradient of a [B, S, F] product makes XLA transpose on CPUs. Not if devices share
        # rows, because a device's slots are not contiguous then.
        kernel, flat = self.kernel[...].astype(x.dtype), x if ways_of_rows() > 1 else x.reshape(-1, x.shape[-1])
        multiply = product_with_wide_gradient if self.wide else product
        y = multiply(flat, kernel).reshape(*x.shape[:-1], kernel.shape[-1])
        if hasattr(self, "lora_a"):
            y += self.scale * self.lora_b(self.lora_a(x))
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


@jax.custom_vjp
def rows_with_wide_gradient(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows ``ids`` of table [vocabulary, d]; its gradient is accumulated in float32 over slots and devices."""
    return jnp.take(table, ids, axis=0)


def _rows_fwd(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.take(table, ids, axis=0), (table, ids)


def _rows_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(dy.astype(jnp.float32)).astype(table.dtype), None


rows_with_wide_gradient.defvjp(_rows_fwd, _rows_bwd)


class Embedding(nnx.Module):
    """Rows of embedding [vocabulary, d]; ``wide``: see ``rows_with_wide_gradient``."""

    def __init__(self, vocabulary: int, features: int, *, wide: bool = False, rngs: nnx.Rngs):
        self.wide = wide
        self.embedding = nnx.Param(_normal(rngs, (vocabulary, features)))

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Cast first: devices that hold parts of the table exchange rows of this dtype.
        table = self.embedding[...].astype(dtype)
        return rows_with_wide_gradient(table, ids) if self.wide else jnp.take(table, ids, axis=0)


class RMSNorm(nnx.Module):
    """Statistics in float32, cast back to the input's dtype, then times the scale [d].

    ``offset`` (Gemma): times 1 + scale, in float32, and cast afterwards.
    """

    def __init__(self, features: int, eps: float, *, offset: bool = False, rngs: nnx.Rngs):
        del rngs
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param((jnp.zeros if offset else jnp.ones)((features,), jnp.float32))

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """``scale`` [..., d] replaces the norm's own scale."""
        scale = self.scale[...] if scale is None else scale
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias [d]; statistics in float32."""

    def __init__(self, features: int, eps: float, *, rngs: nnx.Rngs):
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
        normed = (wide - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up; the backward pass keeps only its two arguments."""
    return jax.nn.silu(gate) * up


def _swiglu_fwd(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    through = dy * sigmoid
    return through * up * (1 + gate * (1 - sigmoid)), through * gate


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)): the FFN of InternLM2, and each expert of Mono-InternVL (eq. 5)."""

    def __init__(self, features: int, hidden: int, *, wide: bool = False, rngs: nnx.Rngs):
        self.gate = Linear(features, hidden, wide=wide, rngs=rngs)
        self.up = Linear(features, hidden, wide=wide, rngs=rngs)
        self.down = Linear(hidden, features, wide=wide, rngs=rngs)

    @property
    def is_transposed(self) -> bool:
        return self.gate.is_transposed

    @staticmethod
    def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
        return swiglu(gate, up)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(by_rows(self.gated(self.gate(x), self.up(x)), TENSOR))


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x)), gelu by its tanh form: the FFN of Gemma."""

    @staticmethod
    def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.gelu(gate, approximate=True) * up


FFNS: dict[str, type[SwiGLU]] = {"silu": SwiGLU, "gelu_tanh": GeGLU}  # by Architecture.hidden_act
