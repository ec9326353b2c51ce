"""Small parameters travel in few arrays and arrive as they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.serving.bundles import SMALL, Bundles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_arrive_as_they_were(dtype: str):
    params = Model(preset("tiny_lm")).init(jax.random.key(0))
    flat = {f"{number}/{path}": leaf for number in range(2) for path, leaf in tree.flatten(params).items()}
    flat = {path: leaf.astype(dtype if "kernel" in path else "float32") for path, leaf in flat.items()}
    flat |= {"large": jnp.ones(SMALL), "alone": jnp.arange(5), "one": jnp.float32(3), "scales": jnp.ones((3, 0))}
    params = tree.unflatten(flat)
    bundles = Bundles(params)
    packed = bundles.packed(params)
    assert sorted(packed.small) == sorted({dtype, "float32"})
    assert all(leaf.nbytes > SMALL or path == "alone" for path, leaf in tree.flatten(packed.large).items())
    found = tree.flatten(jax.jit(bundles.unpacked)(packed))
    assert found.keys() == flat.keys()
    for path, leaf in flat.items():
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    shapes = bundles.packed(jax.eval_shape(lambda: params))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), packed) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


def test_nothing_is_joined_without_parameters():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    packed = Bundles({}).packed(params)
    assert packed.large == params and packed.small == {} and Bundles({}).unpacked(packed) == params
