"""The tile map and its permutation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.experts.tile_map import EMPTY, TEXT, VISUAL, group_rows, make_tile_map, num_tiles, ungroup_rows

TILE = 4
jitted_tile_map = jax.jit(lambda mask, valid: make_tile_map(mask, tile=TILE, valid=valid))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=12, max_size=12))
def test_every_row_lands_in_a_tile_of_its_expert(rows: list[tuple[bool, bool]]):
    mask, valid = (np.array(column) for column in zip(*rows))
    tile_map = jitted_tile_map(mask, valid)
    tile_expert, source, position = (np.asarray(v) for v in (tile_map.tile_expert, tile_map.source, tile_map.position))

    assert len(tile_expert) == num_tiles(len(mask), TILE) and len(source) == len(tile_expert) * TILE
    assert (position[~valid] == len(source)).all()
    assert (source[position[valid]] == np.flatnonzero(valid)).all()
    assert (tile_expert[position[valid] // TILE] == np.where(mask[valid], VISUAL, TEXT)).all()
    assert np.sum(source < len(mask)) == valid.sum()
    # Visual, then text, then empty; an empty tile has no rows, and every other has one.
    assert (np.diff(tile_expert) <= 0).all()
    filled = (source < len(mask)).reshape(-1, TILE).any(1)
    assert (filled == (tile_expert != EMPTY)).all()


def test_rows_keep_their_order_within_an_expert():
    tile_map = make_tile_map(jnp.array([0, 1, 1, 0, 1, 0, 0, 1], bool), tile=4)
    assert tile_map.source.tolist() == [1, 2, 4, 7, 0, 3, 5, 6, 8, 8, 8, 8]
    assert tile_map.tile_expert.tolist() == [VISUAL, TEXT, EMPTY]


def test_grouping_and_back_is_the_identity_and_its_own_transpose():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((21, 3)), jnp.float32)
    mask, valid = jnp.asarray(rng.random(21) < 0.4), jnp.asarray(rng.random(21) < 0.8)
    tile_map = make_tile_map(mask, tile=TILE, valid=valid)
    np.testing.assert_array_equal(ungroup_rows(group_rows(x, tile_map), tile_map), jnp.where(valid[:, None], x, 0))

    # <g, P x> = <P^T g, x>: the hand-written transposes are gathers, exact to the bit for a permutation.
    g = jnp.asarray(rng.standard_normal((tile_map.num_grouped_rows, 3)), jnp.float32)
    _, backward = jax.vjp(lambda x: group_rows(x, tile_map), x)
    expected = np.zeros_like(x)
    kept = np.asarray(tile_map.source) < 21
    expected[np.asarray(tile_map.source)[kept]] = np.asarray(g)[kept]
    np.testing.assert_array_equal(backward(g)[0], expected)
    _, backward = jax.vjp(lambda y: ungroup_rows(y, tile_map), g)
    np.testing.assert_array_equal(backward(x)[0], group_rows(x, tile_map))


def test_permutation_compiles_to_gathers():
    tile_map = make_tile_map(jnp.arange(20) % 3 == 0, tile=TILE)

    def loss(x):
        return jnp.sum(jnp.sin(ungroup_rows(jnp.cos(group_rows(x, tile_map)), tile_map)))

    assert " scatter(" not in jax.jit(jax.grad(loss)).lower(jnp.ones((20, 8))).compile().as_text()


def test_no_rows():
    tile_map = make_tile_map(jnp.zeros(0, bool), tile=TILE)
    assert tile_map.tile_expert.tolist() == [EMPTY]
    assert group_rows(jnp.ones((0, 3)), tile_map).shape == (TILE, 3)


def test_bad_input():
    mask = jnp.zeros(3, bool)
    with pytest.raises(ValueError, match="mask must be"):
        make_tile_map(jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="got mask int32"):
        make_tile_map(jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="tile >= 1"):
        make_tile_map(mask, tile=0)
    with pytest.raises(ValueError, match="valid must be bool"):
        make_tile_map(mask, valid=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="wants 3 rows, these are 5"):
        group_rows(jnp.ones((5, 2)), make_tile_map(mask, tile=TILE))
    with pytest.raises(ValueError, match="wants 8 rows, these are 3"):
        ungroup_rows(jnp.ones((3, 2)), make_tile_map(mask, tile=TILE))
