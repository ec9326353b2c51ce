"""The conformance tests of attention; one subclass per implementation sets ``implementation_class``."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.contract import Implementation, Intervals
from pallas_kernels.checks.attention import TOLERANCE, AttentionCase, errors, layouts
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.errors import Unavailable

LAYOUTS = tuple(layouts(96))
GROUPS = ((1, 1), (4, 4), (4, 2), (3, 1), (4, 1), (8, 1))  # query heads and KV heads


class Conformance:
    """Values and gradients against the float64 oracle.

    Attributes:
      implementation_class: what is tested; ``here()`` makes the instance.
      dtypes: what it can compute here; the first one is used where one will do.
      dims: head sizes that it serves.
      takes_images: serves rows where images are seen whole.
      takes_parts: serves fewer queries than keys.
    """

    implementation_class: ClassVar[type[Implementation]]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    dims: ClassVar[tuple[int, ...]] = (64, 80, 128)
    takes_images: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in (("dtype", self.dtypes), ("dim", self.dims)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    def implementation(self) -> Implementation:
        try:
            return self.implementation_class.here()
        except Unavailable as reason:
            pytest.skip(str(reason))

    def case(self, **changes: Any) -> AttentionCase:
        return AttentionCase.fitting(self.implementation_class, **({"dtype": self.dtypes[0]} | changes))

    def check(self, **changes: Any) -> None:
        implementation, case = self.implementation(), self.case(**changes)
        assert implementation.unsupported(case.problem) is None
        assert_within(errors(implementation, case), case.dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout: str, dtype: str):
        self.check(layout=layout, dtype=dtype)

    @pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
    def test_grouped_queries(self, heads: int, kv_heads: int):
        self.check(heads=heads, kv_heads=kv_heads)

    def test_head_sizes(self, dim: int):
        self.check(dim=dim, heads=2, kv_heads=1)

    @pytest.mark.parametrize("layout", ["padding", "one_sample", "an_empty_row"])
    def test_images_are_seen_whole(self, layout: str):
        if self.takes_images:
            self.check(layout=layout, images=True)
        else:
            self.refuses(self.case(images=True))

    @pytest.mark.parametrize("layout", ["padding", "one_sample", "many_tiny_samples"])
    def test_queries_of_a_part_of_the_row(self, layout: str):
        """Context parallelism: a third of the queries, one run of them or an early and a late one, and all keys."""
        length = self.case().length
        sixth = [tuple(range(start, start + length // 6)) for start in range(0, length, length // 6)]
        for runs in ((0, 1), (0, 5), (2, 3)):
            case = {"layout": layout, "queries": sixth[runs[0]] + sixth[runs[1]]}
            if self.takes_parts:
                self.check(**case)
            else:
                self.refuses(self.case(**case))

    def test_empty_slots_may_hold_anything_finite(self):
        self.check(poison=1e4)

    def test_samples_alone_give_what_they_give_packed(self):
        """Each sample by itself in a row, its first slots filled: the same outputs and gradients."""
        implementation, case = self.implementation(), self.case()
        qkv, intervals, dy, _ = case.inputs()
        packed = run(implementation, qkv, intervals, dy)
        row = 0
        for number in range(1, case.segments()[row].max() + 1):
            places = np.flatnonzero(case.segments()[row] == number)
            alone = [alone_in_a_row(a[row, places], case.length) for a in (*qkv, dy)]
            index = jnp.arange(case.length)[None]
            itself = Intervals(jnp.where(index < len(places), 0, index), index)
            found = run(implementation, tuple(alone[:3]), itself, alone[3])
            for one, other in zip(found, packed):
                expected = np.asarray(other[row, places], np.float64)
                assert relative_error(one[0, : len(places)], expected) < TOLERANCE[case.dtype]

    def refuses(self, case: AttentionCase) -> None:
        assert self.implementation().unsupported(case.problem)


def run(implementation: Implementation, qkv: tuple, intervals: Intervals, dy: jax.Array) -> tuple[jax.Array, ...]:
    """Output and gradients."""

    @jax.jit
    def both(qkv, intervals, dy):
        y, backward = jax.vjp(lambda *qkv: implementation(*qkv, intervals), *qkv)
        return y, *backward(dy)

    return both(qkv, intervals, dy)


def alone_in_a_row(sample: jax.Array, length: int) -> jax.Array:
    """[1, length, ...] with a sample's tokens in front and zeros after them."""
    return jnp.pad(sample, ((0, length - len(sample)), *[(0, 0)] * (sample.ndim - 1)))[None]


def assert_within(found: dict[str, float], dtype: str = "float32") -> None:
    worst = max(found, key=found.get)
    assert found[worst] < TOLERANCE[dtype], f"{worst}: {found[worst]:.2e} of {found}"
