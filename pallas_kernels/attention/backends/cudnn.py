"""Attention by cuDNN's fused kernels: packed rows, or a mask."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.backends.xla_blocked import XlaBlocked
from pallas_kernels.attention.contract import (
    LSE,
    OUTPUT,
    Implementation,
    Intervals,
    Problem,
    needs_causal_rows,
    needs_order,
    visible,
)
from pallas_kernels.devices import device_key, is_hopper_or_later
from pallas_kernels.errors import Unavailable

log = logging.getLogger(__name__)


def _unsupported(problem: Problem) -> str | None:
    if problem.dtype != "bfloat16":
        return f"needs bfloat16, not {problem.dtype}"
    if problem.dim % 8 or problem.dim > 128:
        return f"needs a head size that is a multiple of 8 up to 128, not {problem.dim}"
    return needs_order(problem)


# ======================================================================================================================
# Packed rows
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Cudnn(Implementation):
    """Each sample separately ("THD"), causally: no work for other samples or later keys, no mask in memory.

    JAX implements this underneath ``jax.nn.dot_product_attention``, in a private module. Keys and values are repeated
    for the query heads that share them, because that module counts offsets of keys in query heads.

    Attributes:
      samples: maximum per row; float32 [B * samples, Hq, S] is kept for the backward pass. Rows with more are computed
        by ``XlaBlocked``; the program decides this at run time.
    """

    name: ClassVar[str] = "attention/cudnn"

    samples: int = 64

    def unsupported(self, problem: Problem) -> str | None:
        if not is_hopper_or_later(problem.device):
            return f"packed rows need a Hopper or later GPU, not {problem.device}"
        return _unsupported(problem) or needs_causal_rows(problem) or _missing()

    @classmethod
    def here(cls) -> Self:
        if not is_hopper_or_later(device_key()):
            raise Unavailable(f"cuDNN's packed rows run only on Hopper and later GPUs, not on {device_key()}")
        return cls()

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {"samples": [32, 64, 128]}

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        output = _packed(self.samples, query, key, value, intervals.first, intervals.last)
        # Neighbours that see only themselves, as empty slots do, are one sample for cuDNN (``samples_of``); the output
        # of each is its own value.
        alone = (intervals.first == intervals.last)[..., None, None]
        return jnp.where(alone, _repeated(value, query), output)


def _repeated(array: jax.Array, query: jax.Array) -> jax.Array:
    """Keys or values [B, K, Hkv, D] for each query head."""
    return jnp.repeat(array, query.shape[2] // array.shape[2], axis=2)


class Samples(NamedTuple):
    """Samples of rows in the form that cuDNN takes.

    Attributes:
      count: int32 [B], samples of each row.
      starts: int32 [B, samples + 1], first slot of each; -1 after the last one.
      lengths: int32 [B, samples]; -1 after the last one.
    """

    count: jax.Array
    starts: jax.Array
    lengths: jax.Array


def samples_of(first: jax.Array, samples: int) -> Samples:
    """The samples of causal rows, at most ``samples`` per row; adjacent samples of one token are joined.

    Args:
      first: int32 [B, S], first key that each query sees.
      samples: maximum per row; further ones are left out.
    """
    slots = first.shape[1]
    index = jnp.arange(slots, dtype=jnp.int32)
    starts = first == index
    single = starts & jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    begins = starts & ~(single & jnp.pad(single[:, :-1], ((0, 0), (1, 0))))
    find = functools.partial(jnp.nonzero, size=samples + 1, fill_value=slots)
    found = jax.vmap(lambda row: find(row)[0])(begins).astype(jnp.int32)
    there = found < slots
    lengths = jnp.where(there[:, :-1], found[:, 1:] - found[:, :-1], -1)
    count = jnp.sum(begins, axis=1, dtype=jnp.int32)
    starts = jnp.where(there & (jnp.arange(samples + 1) < samples), found, -1)
    return Samples(count, starts, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(samples: int, query, key, value, first, last) -> jax.Array:
    return _packed_forward(samples, query, key, value, first, last)[0]


def _packed_forward(samples: int, query, key, value, first, last) -> tuple[jax.Array, Any]:
    found = samples_of(first, samples)

    def cudnn() -> tuple[jax.Array, jax.Array]:
        output, statistics = _library()._dot_product_attention_fwd_impl(
            *_operands(query, key, value, found), is_training=True, **_options(query)
        )
        return output, statistics

    def blocked() -> tuple[jax.Array, jax.Array]:
        batch, slots, heads = query.shape[:3]
        output = XlaBlocked()(query, key, value, Intervals(first, last))
        return output, jnp.zeros((batch * samples, heads, slots), jnp.float32)

    output, statistics = jax.lax.cond(jnp.all(found.count <= samples), cudnn, blocked)
    output, statistics = checkpoint_name(output, OUTPUT), checkpoint_name(statistics, LSE)
    return output, (query, key, value, first, last, output, statistics)


def _packed_backward(samples: int, residuals: Any, d_output: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, first, last, output, statistics = residuals
    found = samples_of(first, samples)

    def cudnn() -> tuple[jax.Array, ...]:
        operands = *_operands(query, key, value, found), statistics, output, d_output
        dquery, *rest = _library()._dot_product_attention_bwd_impl(*operands, **_options(query))[:3]
        # Query heads that share keys are adjacent.
        by_group = (a.reshape(*key.shape[:3], -1, key.shape[3]).astype(jnp.float32) for a in rest)
        return dquery, *(jnp.sum(a, axis=3).astype(key.dtype) for a in by_group)

    def blocked() -> tuple[jax.Array, ...]:
        intervals = Intervals(first, last)
        return jax.vjp(lambda *qkv: XlaBlocked()(*qkv, intervals), query, key, value)[1](d_output)

    return *jax.lax.cond(jnp.all(found.count <= samples), cudnn, blocked), None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _operands(query: jax.Array, key: jax.Array, value: jax.Array, found: Samples) -> tuple[jax.Array, ...]:
    """query, key, value (repeated), bias, lengths and starts of queries and keys, two page tables."""
    unused = jnp.zeros(0, query.dtype)
    places = (found.lengths, found.lengths, found.starts, found.starts)
    return query, _repeated(key, query), _repeated(value, query), unused, *places, unused, unused


def _options(query: jax.Array) -> dict[str, Any]:
    library = _library()
    return {
        "scale": query.shape[3] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": library.MaskType.PADDING_CAUSAL,
        "layout": library.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


def _library() -> ModuleType:
    from jax._src.cudnn import fused_attention_stablehlo  # private: there is no public API for packed rows

    return fused_attention_stablehlo


# The parameters that the two functions must have for the calls above to be correct.
_PLACES = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
_PAGES = ("page_table_k", "page_table_v")
_SETTINGS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
_SIGNATURES = {
    "_dot_product_attention_fwd_impl": (*_PLACES, *_PAGES, *_SETTINGS, "is_training"),
    "_dot_product_attention_bwd_impl": (*_PLACES, *_PAGES, "activation", "fwd_output", "grad_output", *_SETTINGS),
}


@functools.cache
def _missing() -> str | None:
    """Why this jax's private functions differ from those that were checked, or None."""
    for name, expected in _SIGNATURES.items():
        function = getattr(_library(), name, None)
        found = () if function is None else tuple(inspect.signature(function).parameters)
        if found != expected:
            return f"jax {jax.__version__}: the private {name} differs from that of jax 0.10 and 0.11"
    return None


# ======================================================================================================================
# A mask
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class CudnnMasked(Implementation):
    """A mask [B, 1, Q, K] for all heads in memory, and a gradient of the same size; nothing is skipped."""

    name: ClassVar[str] = "attention/cudnn_masked"

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.device.startswith("nvidia"):
            return f"needs an NVIDIA GPU, this is {problem.device}"
        return _unsupported(problem)

    @classmethod
    def here(cls) -> Self:
        if not device_key().startswith("nvidia"):
            raise Unavailable("cuDNN's kernels run on NVIDIA GPUs only")
        return cls()

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        shape = (query.shape[0], 1, query.shape[1], key.shape[1])
        log.warning("%s: a mask %s in memory, and all samples of a row are computed and masked", self.name, shape)
        mask = visible(intervals, key.shape[1])[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
