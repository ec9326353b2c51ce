"""The implementations that leave the matmuls to XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks.conformance import TOLERANCE, Case, errors, oracle_ffn, oracle_matmul, relative_error
from pallas_kernels.experts.backends.xla import DenseBoth, Ragged, XlaSplit, XlaTiled, split_ffn, split_matmul
from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL
from pallas_kernels.experts.contract import FfnWeights
from tests.pallas_kernels.kernel_suite import Conformance, assert_within


class TestDenseBoth(Conformance):
    implementation_class = DenseBoth


class TestXlaTiled(Conformance):
    implementation_class = XlaTiled


class TestRagged(Conformance):
    implementation_class = Ragged

    def test_blocks_already_in_order(self):
        case = Case.fitting(Ragged, "unaligned_runs", "float32")
        assert_within(errors(Ragged(in_order=True), case), "float32")


class TestXlaSplit(Conformance):
    implementation_class = XlaSplit
    any_order = False
    poisoned_blocks = (VISUAL, EMPTY, VISUAL, EMPTY, TEXT, EMPTY, TEXT, EMPTY)
    visual_blocks = 4


@pytest.mark.parametrize("visual_slots", [0, 5, 12])
def test_split_functions(visual_slots: int):
    """The plain functions of the training path, batch axes included, against the oracle."""
    case = Case.fitting(DenseBoth, "all_text", "float32", rows=24)
    inputs = case.inputs()
    x, dy, dz = (inputs[k].reshape(2, 12, -1) for k in ("x", "dy", "dz"))
    expert = np.tile(np.where(np.arange(12) < visual_slots, VISUAL, 0), 2)

    def worst(actual, expected) -> float:
        errors = jax.tree.map(lambda a, e: relative_error(a.reshape(e.shape), e), actual, expected)
        return max(jax.tree.leaves(errors))

    y, backward = jax.vjp(lambda x, weights: split_ffn(x, visual_slots, *weights), x, inputs["weights"])
    expected = oracle_ffn(inputs["x"], expert, inputs["weights"], inputs["dy"])
    assert worst((y, *backward(dy)), expected) < TOLERANCE["float32"]

    z, backward = jax.vjp(lambda x, kernels: split_matmul(x, visual_slots, *kernels), x, inputs["kernels"])
    expected = oracle_matmul(inputs["x"], expert, inputs["kernels"], inputs["dz"])
    assert worst((z, *backward(dz)), expected) < TOLERANCE["float32"]


def test_split_keeps_bfloat16():
    x = jnp.ones((4, 8), jnp.bfloat16)
    weights = FfnWeights(*(jnp.ones(s, jnp.float32) for s in ((8, 16), (8, 16), (16, 8))))
    assert split_ffn(x, 2, weights, weights).dtype == jnp.bfloat16
