from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mono_jax.hlo import module, shapes
from mono_jax.models import vision
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.vision import VisionTower
from pallas_kernels import absent
from pallas_kernels.devices import targeting
from pallas_kernels.errors import Unavailable


def test_tpus_do_not_pad_pixels_to_many_times_their_size():
    """Transposed as [V, 2, 2, 14, 14, 3], pixels took 49 times their size, more than everything else in a step."""
    try:
        place = SingleDeviceSharding(absent.tpus("v5e:2x2")[0])
    except Unavailable as reason:
        pytest.skip(str(reason))
    config = VisionConfig(hidden_size=1024, patch_size=14, image_size=448)
    structure, state = nnx.split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))

    def gradient(state: nnx.State, patches: jax.Array, cells: jax.Array) -> nnx.State:
        def loss(state: nnx.State) -> jax.Array:
            features = nnx.merge(structure, state)(patches, cells, jnp.bfloat16, lambda layer: layer)
            return jnp.square(features.astype(jnp.float32)).sum()

        return jax.grad(loss)(state)

    tokens = 7168
    patches = jax.ShapeDtypeStruct((1, tokens, 28, 28, 3), jnp.uint8)
    arguments = (state, patches, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)
    text = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
    instructions = module.read(text).entry.instructions
    arrays = [array for each in instructions for array in shapes.arrays(each.shape) if array.space == shapes.HBM]
    pixels = [array for array in arrays if array.dims[-1:] != (1024,) and array.size >= patches.size]
    assert pixels
    assert max(array.stored_bytes / array.bytes for array in pixels) < 4


def test_intern_vit_has_no_scores_in_memory_on_nvidia_gpus():
    """XLA's own attention would have 5 * 16 * 1025 * 1025 of them and make the modular model look too slow."""
    try:
        device = absent.gpus("h100", "1x1x1")[0]
    except Unavailable as reason:
        pytest.skip(str(reason))
    config = VisionConfig(kind="intern_vit", num_hidden_layers=2)
    structure, state = nnx.split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
    arguments = (state, jax.ShapeDtypeStruct((1, 1280, 28, 28, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 1280), "int32"))
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)

    def see(state: nnx.State, patches: jax.Array, cells: jax.Array) -> jax.Array:
        return nnx.merge(structure, state)(patches, cells, jnp.bfloat16, lambda layer: layer)

    with targeting(device):
        text = jax.jit(see).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text()
    assert "__cudnn$fmha" in text and "1025,1025" not in text


def test_gradients_of_fused_attention_are_those_of_xla():
    operands = (jax.random.normal(key, (2, 5, 4, 8)) for key in jax.random.split(jax.random.key(0), 4))
    query, key, value, dy = operands
    forms = vision._fused_attention, jax.nn.dot_product_attention
    fused, plain = (jax.vjp(form, query, key, value) for form in forms)
    jax.tree.map(np.testing.assert_array_equal, (fused[0], fused[1](dy)), (plain[0], plain[1](dy)))
