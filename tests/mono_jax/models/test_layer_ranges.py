"""Ranges of layers as separate parameters: the same model, split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.models.layer_ranges import Layout, arranged, canonical, cut, joined, segments
from mono_jax.models.layers import Transposed
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from tests.mono_jax.helpers import random_batch, random_params

CONFIG = preset("tiny_mono_1_5", num_hidden_layers=5)


def pieces_of(params: tree.Tree, ranges: dict[str, tuple[int, int]]) -> tree.Tree:
    """``params`` with every layer parameter whose path contains a key of ``ranges`` split there."""
    flat = {}
    for path, leaf in tree.flatten(params).items():
        span = next((span for name, span in ranges.items() if name in path), None)
        for piece, array, _ in [(path, leaf, True)] if span is None else cut(path, leaf, *span):
            flat[piece] = array
    return tree.unflatten(flat)


RANGES = [
    {"layers/visual_feed_forward": (1, 3)},
    {"layers/": (0, 2)},
    {"layers/attention/": (2, 5), "layers/feed_forward/gate": (1, 4)},
    {"layers/attention/": (0, 5)},
]


@pytest.mark.parametrize("ranges", RANGES)
def test_pieces_join_to_the_whole(ranges: dict[str, tuple[int, int]]) -> None:
    params = random_params(CONFIG)
    pieces = pieces_of(params, ranges)
    assert {canonical(path) for path in tree.flatten(pieces)} == set(tree.flatten(params))
    whole = tree.flatten(joined(pieces, np.concatenate))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(whole[path], leaf)


@pytest.mark.parametrize("ranges", RANGES)
def test_segments_cover_every_layer_of_every_parameter_once(ranges: dict[str, tuple[int, int]]) -> None:
    params = random_params(CONFIG)
    runs = segments(pieces_of(params, ranges), CONFIG.num_hidden_layers)
    assert [start for start, _, _ in runs] == [0, *(stop for _, stop, _ in runs[:-1])]
    assert runs[-1][1] == CONFIG.num_hidden_layers
    for path, leaf in tree.flatten(params["layers"]).items():
        np.testing.assert_array_equal(np.concatenate([tree.flatten(layers)[path] for _, _, layers in runs]), leaf)


@pytest.mark.parametrize("layout", ["separate", "separate_transposed"])
def test_separated_layers_are_those_of_the_stack(layout: Layout) -> None:
    params = {name: jax.tree.map(jnp.asarray, value) for name, value in random_params(CONFIG).items()}
    expected = jax.tree.map(np.array, params)
    stacks = jax.tree.leaves(params["layers"])
    apart = arranged(params, layout)
    assert set(apart) - set(params) == {f"layers[{i}:{i + 1}]" for i in range(5)}
    jax.tree.map(np.testing.assert_array_equal, joined(apart, np.concatenate), expected)
    assert all(stack.is_deleted() for stack in stacks)
    kernel = tree.flatten(apart)["lm_head/kernel"]
    assert isinstance(kernel, Transposed) == (layout == "separate_transposed")
    once, twice = (jax.tree.leaves(each) for each in (apart, arranged(apart, layout)))
    assert all(one is other for one, other in zip(once, twice, strict=True))  # nothing is left to do


@pytest.mark.parametrize("ranges", RANGES[:3])
def test_a_model_in_pieces_computes_the_same(ranges: dict[str, tuple[int, int]]) -> None:
    params, batch = random_params(CONFIG, size=0.1), random_batch(2)
    model = Model(CONFIG)
    run = jax.jit(lambda p: model(p, batch, jnp.float32, collect=("hidden", "attention")))
    whole, pieces = run(params), run(pieces_of(params, ranges))
    np.testing.assert_allclose(pieces.hidden, whole.hidden, atol=1e-5)
    for name, value in whole.collected.items():
        np.testing.assert_allclose(pieces.collected[name], value, atol=1e-5, err_msg=name)
