"""Triton kernels in Triton's interpreter (float32: its bfloat16 products are wrong)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks.conformance import Case, errors
from pallas_kernels.experts.contract import Problem
from tests.pallas_kernels.kernel_suite import Conformance, assert_within

pytest.importorskip("triton")
pytest.importorskip("torch")

from pallas_kernels.experts.backends.triton import Blocks, Triton


class TestTriton(Conformance):
    implementation_class = Triton
    dtypes = ("float32",)


def test_blocks_smaller_than_the_operands():
    """Several blocks along every axis, two row blocks a block, groups that do not divide the row blocks."""
    blocks = Blocks(m=16, n=32, k=16, group=3)
    case = Case.fitting(Triton, "unaligned_runs", "float32", block=32, rows=70, d=48, ff=80)
    assert_within(errors(Triton(float32=blocks, interpret=True), case), "float32")


def test_gathered_rows_equal_permuted_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 24)), jnp.float32)
    weights = tuple(jnp.asarray(rng.standard_normal((24, 8)), jnp.float32) for _ in range(2))
    rows = jnp.asarray([*rng.permutation(40)[:30], 40, 40], jnp.int32)  # 40 = no row
    block_expert = jnp.asarray([1, 0], jnp.int32)
    y = Triton(interpret=True).matmul(x, block_expert, weights, block=16, rows=rows)
    grouped = jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
    np.testing.assert_array_equal(y, Triton(interpret=True).matmul(grouped, block_expert, weights, block=16))
    np.testing.assert_array_equal(y[30:], 0)


@pytest.mark.parametrize(
    ("implementation", "changes", "reason"),
    [
        (Triton(interpret=True), {"dtype": "bfloat16"}, "interpreter"),
        (Triton(interpret=True), {"block": 24}, "multiple of 16"),
        (Triton(), {}, "Hopper"),
    ],
)
def test_refusals(implementation: Triton, changes: dict, reason: str):
    problem = {"op": "ffn", "rows": 96, "block": 16, "d": 24, "ff": 48, "dtype": "float32", "device": "cpu"}
    assert reason in implementation.unsupported(Problem(**problem | changes))


def test_parameters_from_a_tuning_table():
    assert Triton(gate_up={"warps": 4}).gate_up == Blocks(n=128, warps=4)
