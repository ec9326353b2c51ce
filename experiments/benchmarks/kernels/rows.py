"""A program for each row of the kernel benchmark's tables."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.problems import Setting
from pallas_kernels.experts import api
from pallas_kernels.experts.backends import xla
from pallas_kernels.experts.block_map import BlockMap, group_rows, make_block_map, ungroup_rows
from pallas_kernels.experts.contract import FfnWeights, Implementation


@dataclasses.dataclass(frozen=True)
class Program:
    """One row's function with its arguments except x, for one setting.

    Attributes:
      function: (x, *rest) -> y.
      rest: weights, then whatever depends on the mask.
      trained: argument numbers that are differentiated, by direction; x is 0.
      arrange: [N, d] in sequence order -> the order that the function expects.
      restore: the inverse.
    """

    function: Callable[..., jax.Array]
    rest: tuple
    trained: Mapping[str, tuple[int, ...]]
    arrange: Callable[[jax.Array], jax.Array] = lambda x: x
    restore: Callable[[jax.Array], jax.Array] = lambda y: y


# (setting, text weights, visual weights) -> program. Functions that do not depend on the mask are built once per row,
# so that one compilation is shared by all settings of a size.
Maker = Callable[[Setting, Any, Any], Program]
EXPERTS = {"both": (0, 1, 2), "visual": (0, 2)}  # of (x, text, visual, ...)
STACKED = {"both": (0, 1), "visual": (0, 1)}  # of (x, both, ...): stacked experts cannot be trained separately


class Operation(NamedTuple):
    """The forms of one operation."""

    dense: Callable
    split: Callable
    grouped: Callable
    permuted: Callable
    unsorted: Callable
    ragged: Callable


def _ragged_ffn(dot: Callable, x: jax.Array, weights: FfnWeights) -> jax.Array:
    return dot(jax.nn.silu(dot(x, weights.gate)) * dot(x, weights.up), weights.down)


OPERATIONS = {
    "ffn": Operation(
        xla.dense_ffn, xla.split_ffn, api.modality_ffn, api.permuted_ffn, api.unsorted_ffn, ragged=_ragged_ffn
    ),
    "qkv": Operation(
        xla.dot,
        xla.split_matmul,
        api.modality_matmul,
        api.permuted_matmul,
        api.unsorted_matmul,
        lambda dot, x, kernels: dot(x, kernels),
    ),
}


def makers(op: str, kernels: Mapping[str, Implementation]) -> dict[str, Maker]:
    """Row name -> maker, for an operation and the kernels that run here."""
    forms = OPERATIONS[op]
    rows = {"xla_split": _xla_split(forms)}
    for name, kernel in kernels.items():
        rows[name] = _grouped(forms, kernel)
        rows[f"{name} permuted"] = _permuted(forms, kernel)
        rows[f"{name} unsorted"] = _unsorted(forms, kernel)
    rows["ragged_dot"] = _ragged(forms, jax.lax.ragged_dot)
    if tokamax_missing() is None:
        rows["tokamax"] = _ragged(forms, _tokamax().ragged_dot)
    return rows | {"dense_both": dense_both(op), "gather_scatter": _gather_scatter(forms)}


def tokamax_missing() -> str | None:
    """Why there is no tokamax row, or None."""
    return None if importlib.util.find_spec("tokamax") else "not installed (pip install tokamax)"


def _tokamax() -> Any:
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # otherwise tokamax parses the whole command line and rejects our options
    return tokamax


@functools.cache
def dense(op: str) -> Maker:
    """The bound: the visual expert over all tokens."""
    function = OPERATIONS[op].dense
    return lambda setting, text, visual: Program(function, (visual,), {"both": (0, 1), "visual": (0,)})


@functools.cache
def dense_both(op: str) -> Maker:
    """Both experts on all tokens, selected by mask: the reference for the other rows."""
    compute = OPERATIONS[op].dense

    def function(x, text, visual, mask):
        return jnp.where(mask[:, None], compute(x, visual), compute(x, text))

    return lambda setting, text, visual: Program(function, (text, visual, jnp.asarray(setting.mask())), EXPERTS)


def _sorted_order(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """The order with visual tokens first, and its inverse."""
    order = np.argsort(~setting.mask(), kind="stable")
    return order, np.argsort(order)


def _xla_split(forms: Operation) -> Maker:
    @functools.cache
    def at_boundary(visual: int) -> Callable[..., jax.Array]:
        return lambda x, text, visual_weights: forms.split(x, visual, text, visual_weights)

    def make(setting: Setting, text, visual) -> Program:
        order, back = _sorted_order(setting)
        function = at_boundary(setting.visual)
        return Program(function, (text, visual), EXPERTS, lambda v: v[order], lambda v: v[back])

    return make


def _gather_scatter(forms: Operation) -> Maker:
    def function(x, text, visual, text_rows, visual_rows):
        parts = [(rows, forms.dense(x[rows], w)) for rows, w in ((text_rows, text), (visual_rows, visual))]
        y = jnp.zeros((x.shape[0], parts[0][1].shape[1]), x.dtype)
        for rows, part in parts:
            y = y.at[rows].set(part, unique_indices=True)
        return y

    def make(setting: Setting, text, visual) -> Program:
        mask = setting.mask()
        rows = (jnp.asarray(np.flatnonzero(~mask)), jnp.asarray(np.flatnonzero(mask)))
        return Program(function, (text, visual, *rows), EXPERTS)

    return make


@functools.lru_cache(maxsize=1)
def _block_map(setting: Setting) -> BlockMap:
    return make_block_map(jnp.asarray(setting.mask()), block=setting.tile)


def _grouped(forms: Operation, implementation: Implementation) -> Maker:
    def function(x, text, visual, block_map):
        options = {"block": block_map.block, "implementation": implementation}
        return forms.grouped(x, block_map.block_expert, text, visual, **options)

    def make(setting: Setting, text, visual) -> Program:
        block_map = _block_map(setting)
        arrange, restore = (functools.partial(f, block_map=block_map) for f in (group_rows, ungroup_rows))
        return Program(function, (text, visual, block_map), EXPERTS, arrange, restore)

    return make


def _permuted(forms: Operation, implementation: Implementation) -> Maker:
    def function(x, text, visual, block_map):
        return forms.permuted(x, block_map, text, visual, implementation=implementation)

    return lambda setting, text, visual: Program(function, (text, visual, _block_map(setting)), EXPERTS)


def _unsorted(forms: Operation, implementation: Implementation) -> Maker:
    @functools.cache
    def of_block(block: int) -> Callable[..., jax.Array]:
        def function(x, text, visual, mask):
            return forms.unsorted(x, mask, text, visual, block=block, implementation=implementation)

        return function

    def make(setting: Setting, text, visual) -> Program:
        return Program(of_block(setting.tile), (text, visual, jnp.asarray(setting.mask())), EXPERTS)

    return make


def _ragged(forms: Operation, ragged_dot: Callable[..., jax.Array]) -> Maker:
    def function(x, stacked, group_sizes):
        return forms.ragged(functools.partial(ragged_dot, group_sizes=group_sizes), x, stacked)

    def make(setting: Setting, text, visual) -> Program:
        order, back = _sorted_order(setting)
        stacked = jax.tree.map(lambda v, t: jnp.stack([v, t]), visual, text)
        sizes = jnp.array([setting.visual, setting.rows - setting.visual], jnp.int32)
        return Program(function, (stacked, sizes), STACKED, lambda v: v[order], lambda v: v[back])

    return make
