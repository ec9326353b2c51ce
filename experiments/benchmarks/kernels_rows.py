"""What the kernel benchmark measures: problems, the order in which they matter, and a program for every row."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import device_key
from pallas_kernels.experts import api
from pallas_kernels.experts.backends import xla
from pallas_kernels.experts.block_map import BlockMap, group_rows, make_block_map, num_blocks, ungroup_rows
from pallas_kernels.experts.contract import FfnWeights, Implementation, Problem

DIRECTIONS = ("forward", "both", "visual")  # both, visual: forward and backward with these experts trained


class Shape(NamedTuple):
    """Widths of one model: residual stream, hidden layer of the FFN, output of the QKV projection."""

    d: int
    ff: int
    qkv: int


SHAPES = {"2b": Shape(2048, 8192, 4096), "7b": Shape(4096, 14336, 6144), "tiny": Shape(128, 256, 256)}


# ======================================================================================================================
# Problems
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem.

    Attributes:
      op: "ffn" (SwiGLU of each token's expert) or "qkv" (projection of the visual attention experts).
      shape: key of SHAPES.
      rows: tokens N.
      visual_share: of the tokens, percent.
      interleaving: tokens that have left their run, percent (0: one visual run, then text).
      dtype: of tokens and weights.
      tile: rows per tile of the grouped forms.
    """

    op: str
    shape: str
    rows: int
    visual_share: int
    interleaving: int
    dtype: str
    tile: int

    @property
    def d(self) -> int:
        """Input width."""
        return SHAPES[self.shape].d

    @property
    def width(self) -> int:
        """Hidden width of the FFN, output width of the projection."""
        return SHAPES[self.shape].ff if self.op == "ffn" else SHAPES[self.shape].qkv

    @property
    def out(self) -> int:
        """Output width."""
        return self.d if self.op == "ffn" else self.width

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return round(self.rows * self.visual_share / 100)

    @property
    def kernel_op(self) -> str:
        """What `pallas_kernels` calls the operation."""
        return {"ffn": "ffn", "qkv": "matmul"}[self.op]

    @property
    def problem(self) -> Problem:
        """What implementations are asked whether they can serve, and tuning tables are searched for."""
        grouped = num_blocks(self.rows, self.tile) * self.tile
        return Problem(self.kernel_op, grouped, self.tile, self.d, self.width, self.dtype, device_key())

    def mask(self) -> np.ndarray:
        """bool [N], True = visual."""
        rng = np.random.default_rng(0)
        mask = np.arange(self.rows) < self.visual
        moved = rng.permutation(self.rows)[: round(self.rows * self.interleaving / 100)]
        mask[moved] = mask[rng.permutation(moved)]
        return mask

    def weight_shapes(self) -> Any:
        """Shapes of one expert's weights: an FfnWeights, or one shape."""
        d, width = self.d, self.width
        return FfnWeights((d, width), (d, width), (width, d)) if self.op == "ffn" else (d, width)


class Point(NamedTuple):
    """A setting, which rows of the table it asks for, and in which directions."""

    setting: Setting
    wanted: Callable[[str], bool]
    directions: tuple[str, ...] = DIRECTIONS


ALL_N = (1024, 2048, 4096, 8192, 16384, 32768)
MIXED = (0, 10, 50, 90, 100)


def _any_row(row: str) -> bool:
    return True


def _arranged(row: str) -> bool:
    """Rows whose tokens come arranged: their times do not depend on the order of the tokens."""
    return " " not in row and row != "gather_scatter"


def _as_they_come(row: str) -> bool:
    """Rows whose tokens come in sequence order."""
    return not _arranged(row)


def points(tile: int, dtype: str) -> Iterator[Point]:
    """All problems, those that tell most first; some come twice, with more rows the second time.

    A short loan of a device ends somewhere in the list. First the FFN of the 2B model at two sizes, then over the
    interleaving, over N, the projection, the visual share, the 7B model; at last whatever is left of the grid.
    """
    make = functools.partial(Setting, dtype=dtype, tile=tile)
    both_models = (("ffn", "2b"), ("qkv", "2b"), ("ffn", "7b"), ("qkv", "7b"))
    for n in (4096, 16384):
        yield Point(make("ffn", "2b", n, 50, 0), _arranged, ("forward", "both"))
    for mixed in MIXED:
        yield Point(make("ffn", "2b", 4096, 50, mixed), _as_they_come, ("forward", "both"))
    for n in (4096, 16384, 1024, 2048, 8192, 32768):
        yield Point(make("ffn", "2b", n, 50, 0), _arranged)
    for n in (4096, 16384):
        yield Point(make("qkv", "2b", n, 50, 0), _arranged)
    for n in (4096, 16384):
        for share in (90, 0, 100):
            yield Point(make("ffn", "2b", n, share, 0), _arranged)
    for op, shape in (("ffn", "7b"), ("qkv", "7b")):
        for n in (4096, 16384):
            yield Point(make(op, shape, n, 50, 0), _arranged, ("forward", "both"))
    for mixed in MIXED:
        yield Point(make("ffn", "2b", 16384, 50, mixed), _as_they_come, ("forward", "both"))
    for mixed in (1, 3):  # where the paper's form breaks even, if it does
        yield Point(make("ffn", "2b", 4096, 50, mixed), _as_they_come, ("forward", "both"))
    for op, shape in both_models:
        for n in ALL_N:
            for share in (50, 90, 0, 100):
                yield Point(make(op, shape, n, share, 0), _any_row)
        for mixed in MIXED:
            for n in (4096, 16384):
                yield Point(make(op, shape, n, 50, mixed), _any_row)


def rehearsal(tile: int, dtype: str) -> Iterator[Point]:
    """Tiny problems that go once through every row, both operations and all directions."""
    make = functools.partial(Setting, shape="tiny", dtype=dtype, tile=tile)
    for op in ("ffn", "qkv"):
        half = make(op, rows=2 * tile, visual_share=50, interleaving=0)
        yield Point(half, _arranged)
        yield Point(half, _as_they_come, ("both",))
    yield Point(make("ffn", rows=tile + 3, visual_share=100, interleaving=0), _arranged, ("forward",))
    yield Point(make("ffn", rows=2 * tile, visual_share=50, interleaving=100), _as_they_come, ("both",))


# ======================================================================================================================
# Rows
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Program:
    """One row's function with its arguments but x for one setting.

    Attributes:
      function: (x, *rest) -> y.
      rest: weights, then whatever follows from the mask.
      trained: argument numbers that are differentiated, by direction; x is 0.
      arrange: [N, d] in sequence order -> the order that the function wants.
      restore: the inverse.
    """

    function: Callable[..., jax.Array]
    rest: tuple
    trained: Mapping[str, tuple[int, ...]]
    arrange: Callable[[jax.Array], jax.Array] = lambda x: x
    restore: Callable[[jax.Array], jax.Array] = lambda y: y


# (setting, text weights, visual weights) -> program. Functions that do not depend on the mask are made
# once per row, so that one compilation serves all settings of a size.
Maker = Callable[[Setting, Any, Any], Program]
EXPERTS = {"both": (0, 1, 2), "visual": (0, 2)}  # of (x, text, visual, ...)
STACKED = {"both": (0, 1), "visual": (0, 1)}  # of (x, both, ...): stacked experts cannot be told apart


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


def _ragged_matmul(dot: Callable, x: jax.Array, kernels: jax.Array) -> jax.Array:
    return dot(x, kernels)


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
        lambda dot, *a: dot(*a),
    ),
}


def makers(op: str, kernels: Mapping[str, Implementation]) -> dict[str, Maker]:
    """Row name -> maker, for an operation and the kernels that serve here."""
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
        flags.FLAGS(sys.argv[:1])  # or tokamax parses the whole command line itself, and knows none of our options
    return tokamax


@functools.cache
def dense(op: str) -> Maker:
    """The bound: the visual expert over all tokens."""
    function = OPERATIONS[op].dense
    return lambda setting, text, visual: Program(function, (visual,), {"both": (0, 1), "visual": (0,)})


@functools.cache
def dense_both(op: str) -> Maker:
    """Both experts on all tokens, chosen by mask: what the others are compared with."""
    compute = OPERATIONS[op].dense

    def function(x, text, visual, mask):
        return jnp.where(mask[:, None], compute(x, visual), compute(x, text))

    return lambda setting, text, visual: Program(function, (text, visual, jnp.asarray(setting.mask())), EXPERTS)


def _sorted_order(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens first, and the way back."""
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
