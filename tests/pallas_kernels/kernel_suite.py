"""The conformance tests; one subclass per implementation sets `implementation_class` (and what it cannot do)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.api import modality_ffn
from pallas_kernels.base import Implementation, Unavailable
from pallas_kernels.conformance import (
    TOLERANCE,
    Case,
    ffn_errors,
    masks,
    matmul_errors,
    oracle_ffn,
    relative_error,
    unsorted_errors,
)
from pallas_kernels.layout import EMPTY, TEXT, VISUAL

MASKS = tuple(masks(8, 4))


class Conformance:
    """Values and gradients against the float64 oracle.

    Attributes:
      implementation_class: what is tested; `here()` makes the instance.
      any_order: tiles of both experts and empty ones may come in any order.
    """

    implementation_class: ClassVar[type[Implementation]]
    any_order: ClassVar[bool] = True

    def implementation(self) -> Implementation:
        try:
            return self.implementation_class.here()
        except Unavailable as reason:
            pytest.skip(str(reason))

    def case(self, mask_name: str, dtype: str, **changes) -> tuple[Implementation, Case]:
        implementation = self.implementation()
        case = Case.fitting(self.implementation_class, mask_name, dtype, **changes)
        if reason := implementation.at_boundary(0).unsupported(case.problem("ffn")):
            pytest.skip(reason)
        return implementation, case

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("mask_name", MASKS)
    def test_ffn(self, mask_name: str, dtype: str):
        implementation, case = self.case(mask_name, dtype)
        assert_within(ffn_errors(implementation, case), dtype)

    @pytest.mark.parametrize("mask_name", ["interleaved_50", "empty"])
    def test_ffn_recomputes_gate_and_up(self, mask_name: str):
        implementation, case = self.case(mask_name, "float32", save_gate_up=False)
        assert_within(ffn_errors(implementation, case), "float32")

    @pytest.mark.parametrize("rows", [1, 5, 16, 33])
    def test_row_counts(self, rows: int):
        implementation, case = self.case("alternating", "float32", rows=rows)
        assert_within(ffn_errors(implementation, case), "float32")

    @pytest.mark.parametrize("mask_name", ["all_visual", "unaligned_runs", "empty", "padding_among_rows"])
    def test_matmul(self, mask_name: str):
        implementation, case = self.case(mask_name, "float32")
        assert_within(matmul_errors(implementation, case), "float32")

    @pytest.mark.parametrize("mask_name", ["all_text", "one_visual_row", "unaligned_runs", "alternating"])
    def test_unsorted_rows(self, mask_name: str):
        if not self.any_order:
            pytest.skip("needs its tiles in order")
        implementation, case = self.case(mask_name, "float32")
        assert_within(unsorted_errors(implementation, case), "float32")

    def test_tiles_in_any_order_and_poison_in_empty_ones(self):
        """NaN in rows of empty tiles reaches nothing; the empty tiles themselves come out as zeros."""
        if not self.any_order:
            pytest.skip("needs its tiles in order")
        implementation, case = self.case("all_text", "float32")
        tile_expert = np.array([TEXT, EMPTY, VISUAL, TEXT, EMPTY, VISUAL, EMPTY], np.int32)
        expert = np.repeat(tile_expert, case.tile)
        inputs = Case.fitting(self.implementation_class, "all_text", "float32", rows=len(expert)).inputs()
        poisoned = jnp.where(expert[:, None] == EMPTY, jnp.nan, inputs["x"])
        dy = jnp.where(expert[:, None] == EMPTY, jnp.nan, inputs["dy"])

        @jax.jit
        def run(x, tile_expert, weights, dy):
            def forward(x, weights):
                return modality_ffn(x, tile_expert, *weights, tile=case.tile, implementation=implementation)

            y, backward = jax.vjp(forward, x, weights)
            return y, *backward(dy)

        actual = run(poisoned, tile_expert, inputs["weights"], dy)
        expected = oracle_ffn(inputs["x"], expert, inputs["weights"], inputs["dy"])
        errors = jax.tree.map(relative_error, actual, expected)
        assert max(jax.tree.leaves(errors)) < TOLERANCE["float32"], errors


def assert_within(errors: dict[str, float], dtype: str) -> None:
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE[dtype], f"{worst}: {errors[worst]:.2e} of {errors}"
