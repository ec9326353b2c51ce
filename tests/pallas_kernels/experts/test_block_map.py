"""The block map and its permutation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL, group_rows, make_block_map, num_blocks, ungroup_rows

BLOCK = 4
jitted_block_map = jax.jit(lambda mask, valid: make_block_map(mask, block=BLOCK, valid=valid))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=12, max_size=12))
def test_every_row_lands_in_a_block_of_its_expert(rows: list[tuple[bool, bool]]):
    mask, valid = (np.array(column) for column in zip(*rows))
    block_map = jitted_block_map(mask, valid)
    block_expert, source, position = (
        np.asarray(v) for v in (block_map.block_expert, block_map.source, block_map.position)
    )

    assert len(block_expert) == num_blocks(len(mask), BLOCK) and len(source) == len(block_expert) * BLOCK
    assert (position[~valid] == len(source)).all()
    assert (source[position[valid]] == np.flatnonzero(valid)).all()
    assert (block_expert[position[valid] // BLOCK] == np.where(mask[valid], VISUAL, TEXT)).all()
    assert np.sum(source < len(mask)) == valid.sum()
    # Visual, then text, then empty; an empty block has no rows, and every other has one.
    assert (np.diff(block_expert) <= 0).all()
    filled = (source < len(mask)).reshape(-1, BLOCK).any(1)
    assert (filled == (block_expert != EMPTY)).all()


def test_rows_keep_their_order_within_an_expert():
    block_map = make_block_map(jnp.array([0, 1, 1, 0, 1, 0, 0, 1], bool), block=4)
    assert block_map.source.tolist() == [1, 2, 4, 7, 0, 3, 5, 6, 8, 8, 8, 8]
    assert block_map.block_expert.tolist() == [VISUAL, TEXT, EMPTY]


def test_grouping_and_back_is_the_identity_and_its_own_transpose():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((21, 3)), jnp.float32)
    mask, valid = jnp.asarray(rng.random(21) < 0.4), jnp.asarray(rng.random(21) < 0.8)
    block_map = make_block_map(mask, block=BLOCK, valid=valid)
    np.testing.assert_array_equal(ungroup_rows(group_rows(x, block_map), block_map), jnp.where(valid[:, None], x, 0))

    # <g, P x> = <P^T g, x>: the hand-written transposes are gathers, exact to the bit for a permutation.
    g = jnp.asarray(rng.standard_normal((block_map.num_grouped_rows, 3)), jnp.float32)
    _, backward = jax.vjp(lambda x: group_rows(x, block_map), x)
    expected = np.zeros_like(x)
    kept = np.asarray(block_map.source) < 21
    expected[np.asarray(block_map.source)[kept]] = np.asarray(g)[kept]
    np.testing.assert_array_equal(backward(g)[0], expected)
    _, backward = jax.vjp(lambda y: ungroup_rows(y, block_map), g)
    np.testing.assert_array_equal(backward(x)[0], group_rows(x, block_map))


def test_permutation_compiles_to_gathers():
    block_map = make_block_map(jnp.arange(20) % 3 == 0, block=BLOCK)

    def loss(x):
        return jnp.sum(jnp.sin(ungroup_rows(jnp.cos(group_rows(x, block_map)), block_map)))

    assert " scatter(" not in jax.jit(jax.grad(loss)).lower(jnp.ones((20, 8))).compile().as_text()


def test_no_rows():
    block_map = make_block_map(jnp.zeros(0, bool), block=BLOCK)
    assert block_map.block_expert.tolist() == [EMPTY]
    assert group_rows(jnp.ones((0, 3)), block_map).shape == (BLOCK, 3)


def test_bad_input():
    mask = jnp.zeros(3, bool)
    with pytest.raises(ValueError, match="mask must be"):
        make_block_map(jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="got mask int32"):
        make_block_map(jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="block >= 1"):
        make_block_map(mask, block=0)
    with pytest.raises(ValueError, match="valid must be bool"):
        make_block_map(mask, valid=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="expects 3 rows, got 5"):
        group_rows(jnp.ones((5, 2)), make_block_map(mask, block=BLOCK))
    with pytest.raises(ValueError, match="expects 8 rows, got 3"):
        ungroup_rows(jnp.ones((3, 2)), make_block_map(mask, block=BLOCK))
