"""The forms of the mixture of experts agree, and elastic boundaries move slots without changing results."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import ragged
from mono_jax.errors import ConfigError
from mono_jax.models.execution import Execution
from mono_jax.models.layer_ranges import arranged
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training.step import loss_sum
from tests.mono_jax.helpers import SPEC, random_batch


def loss_and_gradients(config, batch, **execution):
    model = Model(config, Execution(**execution))
    params = jax.jit(model.init)(jax.random.key(0))
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss_sum(model, p, {}, batch, jnp.float32)))(params)
    return float(value), grads


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", [pytest.param("tiny_mono", marks=pytest.mark.slow), "tiny_mono_1_5"])
def test_static_and_dense_both_agree(name: str):
    batch = random_batch(2)
    assert_same(loss_and_gradients(preset(name), batch), loss_and_gradients(preset(name), batch, experts="dense_both"))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("tiny_mono", "dense_both"),
        ("tiny_mono_1_5", "ragged"),
        pytest.param("tiny_mono", "ragged", marks=pytest.mark.slow),
        pytest.param("tiny_mono_1_5", "dense_both", marks=pytest.mark.slow),
    ],
)
def test_grouped_kernels_with_elastic_boundaries_agree_with_the_static_split(name: str, kernel: str):
    """Rows with different visual shares, one without visual tokens, in the same number of slots."""
    batch = random_batch(3)
    is_visual = batch["order"][0] < SPEC.visual_tokens
    for row, kept in ((1, 5), (2, 0)):  # these rows lose the end of their image
        batch["segments"][row, np.flatnonzero(is_visual)[kept:]] = 0
        closed = np.argsort(batch["segments"][row] == 0, kind="stable")  # a sample's tokens follow one another
        for field in ("order", "positions", "segments"):
            batch[field][row] = batch[field][row, closed]
    config = preset(name)
    packed = ragged(batch, 32, 8)
    assert packed["visual_slots"].tolist() == [16, 8, 0]
    assert_same(
        loss_and_gradients(config, batch),
        loss_and_gradients(config, packed, experts="grouped", experts_kernel=kernel, experts_block=8),
    )


def test_grouped_kernels_serve_static_boundaries_and_biases():
    batch = random_batch(2)
    config = preset("tiny_mono_1_5", bias=True)
    grouped = loss_and_gradients(config, batch, experts="grouped", experts_kernel="ragged", experts_block=16)
    assert_same(loss_and_gradients(config, batch), grouped)


def test_grouped_kernels_serve_geglu():
    """On devices that share the columns of the FFN and so the sums of its last product."""
    batch = random_batch(4)
    config = preset("tiny_mono_1_5", family="gemma3", hidden_act="gelu_tanh")
    static = loss_and_gradients(config, batch)
    options = {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 8}
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
        assert_same(static, loss_and_gradients(config, batch, **options))


@pytest.mark.parametrize("changes", [{"bias": True}, {"family": "gemma3", "hidden_act": "gelu_tanh"}], ids=str)
def test_grouped_experts_with_transposed_kernels(changes):
    """They compute the same and reject no kernel."""
    config, batch = preset("tiny_mono_1_5", **changes), random_batch(2)
    params = Model(config).init(jax.random.key(0))
    expected = Model(config)(params, batch, jnp.float32).hidden
    model = Model(config, Execution(experts="grouped", experts_block=8))
    turned = arranged(params, "separate_transposed")
    np.testing.assert_allclose(model(turned, batch, jnp.float32).hidden, expected, atol=2e-5)
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(turned) if leaf.ndim == 3}
    program = str(jax.make_jaxpr(lambda p: model(p, batch, jnp.float32).hidden)(turned))
    results = {tuple(map(int, found.split(","))) for found in re.findall(r":f32\[([\d,]+)\] = transpose\[", program)}
    assert kernels and not {(b, a) for a, b in kernels} & {shape[-2:] for shape in results}


def test_what_cannot_be_served_says_why():
    batch = random_batch(2)
    with pytest.raises(ConfigError, match="use 'grouped'"):
        loss_and_gradients(preset("tiny_mono"), ragged(batch, 32, 8))
    for block in (128, 32):  # the row is no multiple of it; its visual slots are not
        with pytest.raises(ConfigError, match=f"experts_block {block}"):
            loss_and_gradients(preset("tiny_mono"), batch, experts="grouped", experts_block=block)
    with pytest.raises(ValueError, match="there are 24"):
        ragged(batch, 24, 8)
    with pytest.raises(ValueError, match="multiple of block"):
        ragged(batch, 30, 8)


def test_grouped_kernels_cast_weights_of_another_dtype_at_use():
    """Frozen experts may be stored in a wider dtype than the activations, or in another narrow one."""
    config, batch = preset("tiny_mono"), random_batch(2)
    execution = Execution(experts="grouped", experts_kernel="ragged", experts_block=16)
    model = Model(config, execution)
    params = model.init(jax.random.key(0))
    text = {
        name: {"kernel": part["kernel"].astype(jnp.float16)} for name, part in params["layers"]["feed_forward"].items()
    }
    mixed = params | {"layers": params["layers"] | {"feed_forward": text}}
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mixed)
    found, expected = (np.asarray(model(tree, batch, jnp.bfloat16).hidden, np.float32) for tree in (mixed, cast))
    np.testing.assert_array_equal(found, expected)
