"""States for tests of what is stored on disk: made, compared, damaged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mono_jax.storage.places import Place


def make_state(step: int, size: int = 64) -> dict[str, Any]:
    """Trainables in two dtypes and the optimizer state of a stage, including named tuples and masked nodes."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "layers": {"kernel": jax.random.normal(keys[0], (3, size, 8))},
        "projector": {"bias": jax.random.normal(keys[1], (size,), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"a": optax.adamw(optax.cosine_decay_schedule(1e-3, 10)), "frozen": optax.set_to_zero()},
            {"layers": "a", "projector": "frozen"},
        ),
    )
    return {"step": jnp.int32(step), "trainable": params, "opt_state": optimizer.init(params)}


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def largest_file(folder: Place) -> Place:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: len(file.read_bytes()))


def flip_a_bit(file: Place) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("x", "y"), devices=jax.devices()[: shape[0] * shape[1]])
