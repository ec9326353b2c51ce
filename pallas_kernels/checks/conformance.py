"""The float64 oracle and the cases that every implementation of the experts has to pass.

The tests (tests/pallas_kernels/kernel_suite.py) and ``python -m pallas_kernels.check`` run them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import device_key
from pallas_kernels.experts.api import permuted_ffn, permuted_matmul, unsorted_ffn, unsorted_matmul
from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL, make_block_map
from pallas_kernels.experts.contract import FfnWeights, Implementation, Problem

QUICK_MASKS = ("padding_among_rows", "all_visual", "unaligned_runs", "alternating", "empty")  # most informative first
# Largest |difference| over largest |value|, per tensor. bfloat16 keeps 8 bits, and h, dgate and dup are rounded to it.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2}


# ======================================================================================================================
# Oracle
# ======================================================================================================================


def oracle_ffn(
    x: np.ndarray, expert: np.ndarray, weights: tuple[FfnWeights, FfnWeights], dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[FfnWeights, FfnWeights]]:
    """(y, dx, weight gradients) of the naive computation, every row by its own expert, in float64 numpy.

    Args:
      x: [N, d].
      expert: int [N]; 0 = text, 1 = visual, -1 = neither (zero).
      weights: (text, visual).
      dy: [N, d], cotangent of y.
    """
    x, dy = np.float64(x), np.float64(dy)
    y, dx, gradients = np.zeros_like(x), np.zeros_like(x), []
    for own in (TEXT, VISUAL):
        gate_kernel, up_kernel, down_kernel = (np.float64(w) for w in weights[own])
        rows = expert == own
        xe, dye = x[rows], dy[rows]
        gate, up = xe @ gate_kernel, xe @ up_kernel
        sigmoid = 1 / (1 + np.exp(-gate))
        h = gate * sigmoid * up
        dh = dye @ down_kernel.T
        dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = dh * gate * sigmoid
        y[rows], dx[rows] = h @ down_kernel, dgate @ gate_kernel.T + dup @ up_kernel.T
        gradients.append(FfnWeights(xe.T @ dgate, xe.T @ dup, h.T @ dye))
    return y, dx, tuple(gradients)


def oracle_matmul(
    x: np.ndarray, expert: np.ndarray, kernels: tuple[np.ndarray, np.ndarray], dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(y, dx, kernel gradients) of each row times its own kernel, in float64 numpy; arguments as in ``oracle_ffn``."""
    x, dy = np.float64(x), np.float64(dy)
    y, dx, gradients = np.zeros(dy.shape), np.zeros_like(x), []
    for own in (TEXT, VISUAL):
        kernel, rows = np.float64(kernels[own]), expert == own
        y[rows], dx[rows] = x[rows] @ kernel, dy[rows] @ kernel.T
        gradients.append(x[rows].T @ dy[rows])
    return y, dx, tuple(gradients)


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    """Largest |difference| over largest |expected|.

    Absolute if all of ``expected`` is zero; infinite if ``actual`` has a different shape or is not finite.
    """
    actual = np.asarray(actual, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = np.max(np.abs(actual - expected), initial=0.0)
    return float(difference / (np.max(np.abs(expected), initial=0.0) or 1.0))


# ======================================================================================================================
# Cases
# ======================================================================================================================


def masks(rows: int, block: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Named (mask, valid) pairs, bool [rows] each: the layouts that an implementation must handle."""
    index, rng = np.arange(rows), np.random.default_rng(0)
    runs = (index // max(block - 3, 1)) % 2 == 1

    def interleaved(share: float) -> np.ndarray:
        # Visual rows first, then `share` of all rows are shuffled.
        mask = index < rows // 2
        moved = rng.permutation(rows)[: round(share * rows)]
        mask[moved] = mask[rng.permutation(moved)]
        return mask

    everywhere = np.ones(rows, bool)
    cases = {
        "all_text": np.zeros(rows, bool),
        "all_visual": everywhere,
        "one_visual_row": index == rows // 3,
        "one_text_row": index != rows - 1,
        "unaligned_runs": runs,
        "alternating": index % 2 == 0,
        **{f"interleaved_{share}": interleaved(share / 100) for share in (0, 10, 50, 90, 100)},
    }
    named = {name: (mask, everywhere) for name, mask in cases.items()}
    named["empty"] = (runs, ~everywhere)
    named["padding_among_rows"] = (index % 3 == 0, index % 5 != 0)
    return named


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, with inputs generated from a seed.

    Attributes:
      mask_name: key of ``masks``.
      dtype: "float32" or "bfloat16".
      rows: N, before grouping.
      block: rows per block.
      d: input width.
      ff: hidden width.
      save_gate_up: as in ``modality_ffn``.
    """

    mask_name: str
    dtype: str
    rows: int
    block: int
    d: int
    ff: int
    save_gate_up: bool = True

    @classmethod
    def fitting(cls, implementation: type[Implementation], mask_name: str, dtype: str, **changes) -> Case:
        """A small case with the multiples of sizes that an implementation requires; rows are never whole blocks."""
        block_multiple, width_multiple = implementation.granularity
        block = -(-8 // block_multiple) * block_multiple
        width = -(-24 // width_multiple) * width_multiple
        sizes = {"rows": 3 * block - 3, "block": block, "d": width, "ff": 2 * width}
        return cls(mask_name, dtype, **(sizes | changes))

    def problem(self, op: str) -> Problem:
        """The argument of ``unsupported``."""
        rows = (-(-self.rows // self.block) + 1) * self.block
        return Problem(op, rows, self.block, self.d, self.ff, self.dtype, device_key())

    def inputs(self) -> dict:
        """x [N, d], mask and valid [N], weights per expert, kernels [d, ff] per expert, dy [N, d], dz [N, ff]."""
        rng = np.random.default_rng(1)

        def normal(*shape: int, scale: float = 1.0) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape) * scale, self.dtype)

        def expert() -> FfnWeights:
            inner, outer = self.d**-0.5, self.ff**-0.5
            gate, up = normal(self.d, self.ff, scale=inner), normal(self.d, self.ff, scale=inner)
            return FfnWeights(gate, up, normal(self.ff, self.d, scale=outer))

        mask, valid = masks(self.rows, self.block)[self.mask_name]
        weights = (expert(), expert())
        return {
            "x": normal(self.rows, self.d),
            "mask": jnp.asarray(mask),
            "valid": jnp.asarray(valid),
            "weights": weights,
            "kernels": (weights[TEXT].gate, weights[VISUAL].gate),
            "dy": normal(self.rows, self.d),
            "dz": normal(self.rows, self.ff),
        }


class Form(NamedTuple):
    """One public function under test.

    Attributes:
      function: (x, block map or mask, text, visual, **options) -> y.
      op: "ffn" or "matmul".
      unsorted: takes the mask and a block size instead of a block map, and no padding rows.
    """

    function: Callable[..., jax.Array]
    op: str
    unsorted: bool = False


FORMS = {
    "ffn": Form(permuted_ffn, "ffn"),
    "matmul": Form(permuted_matmul, "matmul"),
    "unsorted": Form(unsorted_ffn, "ffn", unsorted=True),
    "unsorted_matmul": Form(unsorted_matmul, "matmul", unsorted=True),
}


def errors(implementation: Implementation, case: Case, form: str = "ffn") -> dict[str, float]:
    """Relative errors of the output, dx and the weight gradients against the oracle, for a key of ``FORMS``."""
    inputs, unsorted, is_ffn = case.inputs(), FORMS[form].unsorted, FORMS[form].op == "ffn"
    x, mask, weights = inputs["x"], inputs["mask"], inputs["weights" if is_ffn else "kernels"]
    dy = inputs["dy" if is_ffn else "dz"]
    valid = jnp.ones_like(mask) if unsorted else inputs["valid"]
    if not unsorted:
        visual_blocks = -(-int(jnp.sum(mask & valid)) // case.block)
        implementation = implementation.at_boundary(visual_blocks * case.block)
    actual = _runner(form, implementation, case.block, case.save_gate_up)(x, mask, valid, weights, dy)
    oracle = oracle_ffn if is_ffn else oracle_matmul
    expert = np.where(valid, np.where(mask, VISUAL, TEXT), EMPTY)
    return _relative_errors(actual, oracle(*_numpy((x, expert, weights, dy))))


def _relative_errors(actual: tuple, expected: tuple) -> dict[str, float]:
    errors = jax.tree.map(relative_error, actual, expected)
    return {jax.tree_util.keystr(path): error for path, error in jax.tree_util.tree_leaves_with_path(errors)}


def _numpy(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


@functools.cache
def _runner(form: str, implementation: Implementation, block: int, save_gate_up: bool) -> Callable[..., tuple]:
    """(x, mask, valid, weights, dy) -> (y, dx, weight gradients); compiled once per size, masks are data."""
    function, op, unsorted = FORMS[form]
    options = {"implementation": implementation}
    options |= {"save_gate_up": save_gate_up} if op == "ffn" else {}
    options |= {"block": block} if unsorted else {}

    @jax.jit
    def run(x, mask, valid, weights, dy):
        routing = mask if unsorted else make_block_map(mask, block=block, valid=valid)
        y, backward = jax.vjp(lambda x, weights: function(x, routing, *weights, **options), x, weights)
        return (y, *backward(dy))

    return run


# ======================================================================================================================
# What ``python -m pallas_kernels.check`` computes
# ======================================================================================================================


def refusal(instance: Implementation, dtype: str) -> str | None:
    """Why the instance does not support ``dtype``, or None."""
    return instance.at_boundary(0).unsupported(Case.fitting(type(instance), QUICK_MASKS[0], dtype).problem("ffn"))


def runs(instance: Implementation, dtype: str, all_masks: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """(label, largest error) of the FFN, the matmul and the unsorted FFN, most informative first."""
    names = tuple(masks(8, 4)) if all_masks else QUICK_MASKS
    cases = [("ffn", names[0]), ("matmul", names[0])]
    if instance.at_boundary(0) == instance:  # a static split cannot take unsorted rows
        cases.append(("unsorted", names[0]))
    for form, name in [*cases, *(("ffn", name) for name in names[1:])]:
        case = Case.fitting(type(instance), name, dtype)
        yield f"{form} {name} {dtype}", lambda form=form, case=case: max(errors(instance, case, form).values())
