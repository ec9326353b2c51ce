"""The conformance tests; one subclass per implementation sets ``implementation_class`` (and what it cannot do)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks.conformance import (
    FORMS,
    TOLERANCE,
    Case,
    errors,
    masks,
    oracle_ffn,
    relative_error,
)
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.api import modality_ffn
from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL
from pallas_kernels.experts.contract import Implementation

MASKS = tuple(masks(8, 4))


class Conformance:
    """Values and gradients against the float64 oracle.

    Attributes:
      implementation_class: what is tested; ``here()`` makes the instance.
      any_order: blocks of both experts and empty ones may come in any order.
      poisoned_blocks: experts of the blocks in the test of poison; the rows of empty ones hold NaN.
      visual_blocks: how many of them come before the boundary, where order matters.
      dtypes: what it can compute here; the first one is used where one will do.
      masks: masks of the main test; a slow interpreter takes fewer.
      row_counts: sizes before grouping.
    """

    implementation_class: ClassVar[type[Implementation]]
    any_order: ClassVar[bool] = True
    poisoned_blocks: ClassVar[tuple[int, ...]] = (TEXT, EMPTY, VISUAL, TEXT, EMPTY, VISUAL, EMPTY)
    visual_blocks: ClassVar[int] = 0
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    masks: ClassVar[tuple[str, ...]] = MASKS
    row_counts: ClassVar[tuple[int, ...]] = (1, 5, 16, 33)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in (("dtype", self.dtypes), ("mask_name", self.masks), ("rows", self.row_counts)):
            if argument in metafunc.fixturenames and not _has_values(metafunc, argument):
                metafunc.parametrize(argument, values)

    def implementation(self) -> Implementation:
        try:
            return self.implementation_class.here()
        except Unavailable as reason:
            pytest.skip(str(reason))

    def case(self, mask_name: str, dtype: str | None = None, **changes) -> tuple[Implementation, Case]:
        implementation = self.implementation()
        case = Case.fitting(self.implementation_class, mask_name, dtype or self.dtypes[0], **changes)
        assert implementation.at_boundary(0).unsupported(case.problem("ffn")) is None
        return implementation, case

    def test_ffn(self, mask_name: str, dtype: str):
        assert_within(errors(*self.case(mask_name, dtype)), dtype)

    @pytest.mark.parametrize("mask_name", ["interleaved_50", "empty"])
    def test_ffn_recomputes_gate_and_up(self, mask_name: str):
        assert_within(errors(*self.case(mask_name, save_gate_up=False)), self.dtypes[0])

    def test_row_counts(self, rows: int):
        assert_within(errors(*self.case("alternating", rows=rows)), self.dtypes[0])

    @pytest.mark.parametrize("mask_name", ["all_visual", "unaligned_runs", "empty", "padding_among_rows"])
    def test_matmul(self, mask_name: str):
        assert_within(errors(*self.case(mask_name), "matmul"), self.dtypes[0])

    @pytest.mark.parametrize("mask_name", ["all_text", "one_visual_row", "unaligned_runs", "alternating"])
    def test_unsorted_rows(self, mask_name: str):
        if not self.any_order:
            pytest.skip("needs its blocks in order")
        assert_within(errors(*self.case(mask_name), "unsorted"), self.dtypes[0])

    @pytest.mark.parametrize("mask_name", ["one_text_row", "unaligned_runs"])
    def test_unsorted_matmul(self, mask_name: str):
        if not self.any_order:
            pytest.skip("needs its blocks in order")
        assert_within(errors(*self.case(mask_name), "unsorted_matmul"), self.dtypes[0])

    def test_no_rows_at_all(self):
        """N = 0: one empty block, outputs without rows, weight gradients that are zero."""
        implementation, case = self.case("all_text", rows=0)
        for form in FORMS if self.any_order else ("ffn", "matmul"):
            assert max(errors(implementation, case, form).values()) == 0

    def test_blocks_in_any_order_and_poison_in_empty_ones(self):
        """NaN in rows of empty blocks reaches nothing; the empty blocks themselves come out as zeros."""
        implementation, case = self.case("all_text")
        block_expert = np.array(self.poisoned_blocks, np.int32)
        if not self.any_order:
            implementation = implementation.at_boundary(case.block * self.visual_blocks)
        expert = np.repeat(block_expert, case.block)
        inputs = dataclasses.replace(case, rows=len(expert)).inputs()
        poisoned = jnp.where(expert[:, None] == EMPTY, jnp.nan, inputs["x"])
        dy = jnp.where(expert[:, None] == EMPTY, jnp.nan, inputs["dy"])

        @jax.jit
        def run(x, block_expert, weights, dy):
            def forward(x, weights):
                return modality_ffn(x, block_expert, *weights, block=case.block, implementation=implementation)

            y, backward = jax.vjp(forward, x, weights)
            return y, *backward(dy)

        actual = run(poisoned, block_expert, inputs["weights"], dy)
        expected = oracle_ffn(inputs["x"], expert, inputs["weights"], inputs["dy"])
        found = jax.tree.map(relative_error, actual, expected)
        assert max(jax.tree.leaves(found)) < TOLERANCE[case.dtype], found


def _has_values(metafunc: pytest.Metafunc, argument: str) -> bool:
    return any(mark.args[0] == argument for mark in metafunc.definition.iter_markers("parametrize"))


def assert_within(found: dict[str, float], dtype: str) -> None:
    worst = max(found, key=found.get)
    assert found[worst] < TOLERANCE[dtype], f"{worst}: {found[worst]:.2e} of {found}"
