"""XLA's forms of packed attention."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.backends.xla import Xla, XlaChunked, probabilities_and_output
from pallas_kernels.attention.backends.xla_blocked import XlaBlocked
from pallas_kernels.attention.contract import Implementation, Intervals, visible
from pallas_kernels.checks.attention import AttentionCase, oracle_attention
from tests.pallas_kernels.attention.suite import Conformance


class TestXla(Conformance):
    implementation_class = Xla


class TestXlaChunked(Conformance):
    implementation_class = XlaChunked

    def implementation(self) -> Implementation:
        return dataclasses.replace(super().implementation(), chunk=20)  # it divides no row


class TestXlaBlocked(Conformance):
    implementation_class = XlaBlocked

    def implementation(self) -> Implementation:
        return XlaBlocked(block_q=20, block_kv=28)  # they divide no row


def test_no_array_of_all_scores():
    """Neither forward nor backward: the largest array in the compiled program is one of the arguments."""
    (query, key, value), intervals, dy, _ = AttentionCase("one_sample", 2048, heads=2, kv_heads=1, dim=8).inputs()

    def loss(query, key, value):
        return jnp.sum(XlaBlocked()(query, key, value, intervals) * dy)

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value).compile().as_text()
    shapes = re.findall(r"[a-z]+[0-9]+\[([0-9,]+)\]", program)
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == query.size


def test_the_oracle_takes_each_sample_by_itself():
    """Its outputs and gradients do not depend on where in a row a sample lies."""
    case = AttentionCase(length=96)
    (query, key, value), intervals, dy, _ = case.inputs()
    y, gradients = oracle_attention(query, key, value, intervals, dy)
    places = np.flatnonzero(case.segments()[0] == 2)
    index = np.arange(len(places))[None]
    alone = [np.asarray(a)[:1, places] for a in (query, key, value, dy)]
    expected, expected_gradients = oracle_attention(*alone[:3], Intervals(0 * index, index), alone[3])
    for one, other in zip((y, *gradients), (expected, *expected_gradients)):
        np.testing.assert_allclose(one[:1, places], other, rtol=1e-9, atol=1e-12)


def test_probabilities():
    (query, key, value), intervals, _, _ = AttentionCase().inputs()
    probabilities, output = probabilities_and_output(query, key, value, intervals)
    assert probabilities.dtype == jnp.float32 and probabilities.shape == (2, 4, 128, 128)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    hidden = ~visible(intervals, 128)
    assert not np.asarray(probabilities)[np.broadcast_to(hidden[:, None], probabilities.shape)].any()
    np.testing.assert_array_equal(output, Xla()(query, key, value, intervals))
