"""The step on meshes of 8 simulated devices: results equal those of one device, whatever is split."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import Batch
from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.layers import product_with_wide_gradient
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.rows import LocalRows
from mono_jax.parallel.specs import param_shardings
from mono_jax.training import optim, stages
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state, state_shardings
from mono_jax.training.step import jit_train_step, loss_sum, make_train_step
from mono_jax.weights.families.table import FAMILIES
from tests.mono_jax.helpers import SPEC, random_batch, random_params

P = jax.sharding.PartitionSpec
GROUPED = {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 8}
DENSE_BOTH = {"experts": "dense_both"}
WIDE = {"grad_reduce_dtype": "float32"}
BLOCKED = {"attention": "xla_blocked"}
ULYSSES = {"context_parallel": "ulysses"}
CHUNKED = {"attention": "xla_chunked", "attention_chunk": 5}
# The whole model, and one with all options whose vocabulary and FFN are not divisible by any axis.
TINY = {name: preset(name) for name in ("tiny_mono", "tiny_mono_1_5", "tiny_modular")}
TINY["images"] = preset("tiny_mono_1_5", bidirectional_images=True)
_WINDOW = {"sliding_window": 7, "sliding_layers": (0,), "head_size": 8}
for _name, _local in (("mistral", {}), ("gemma3", {"rope_local_theta": 1e4, "query_pre_attn_scalar": 24.0})):
    TINY[_name] = preset("tiny_mono_1_5", family=_name, **FAMILIES[_name].parts, **_WINDOW, **_local)
TINY["odd"] = preset("tiny_mono_1_5", vocab_size=129, intermediate_size=98, bias=True, tie_word_embeddings=True)


def mesh_of(*axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])


def batch_of(config: Architecture) -> Batch:
    """Rows of as many whole tiles as four devices share, if the model sees tiles."""
    tiles = config.vision.kind == "intern_vit"
    return random_batch(8, dataclasses.replace(SPEC, visual_tokens=4 * config.vision.tile_tokens) if tiles else SPEC)


def loss_and_gradients(model: Model, dtype: Any, params: tree.Tree, batch: Any) -> tuple[jax.Array, tree.Tree]:
    weight = batch["loss_weights"].sum()
    return jax.value_and_grad(lambda p: loss_sum(model, p, {}, batch, dtype) / weight)(params)


@cache
def on_one_device(name: str, dtype: Any) -> tuple[float, dict[str, np.ndarray]]:
    model = Model(TINY[name], Execution(attention="xla"))
    run = jax.jit(lambda p, b: loss_and_gradients(model, dtype, p, b))
    loss, gradients = jax.device_get(run(random_params(TINY[name]), batch_of(TINY[name])))
    return loss, tree.flatten(gradients)


def on_devices(name: str, dtype: Any, axes: tuple[int, ...], changes: dict[str, Any]) -> Any:
    config, mesh = TINY[name], mesh_of(*axes)
    model = Model(config, Execution(**({"attention": "xla", "remat": "full", "loss_chunk": 5} | changes)))
    params = random_params(config)
    places = param_shardings(config, params, mesh)
    batch = LocalRows(mesh, 8).put(batch_of(config))
    run = jax.jit(on_mesh(lambda p, b: loss_and_gradients(model, dtype, p, b), mesh), out_shardings=(None, places))
    loss, gradients = jax.device_get(run(jax.device_put(params, places), batch))
    return loss, tree.flatten(gradients)


@pytest.mark.parametrize(
    ("name", "axes", "changes"),
    [
        pytest.param("tiny_mono", (8, 1, 1), {}, marks=pytest.mark.slow),
        ("tiny_mono", (1, 8, 1), WIDE),
        ("tiny_mono", (4, 2, 1), GROUPED),
        ("tiny_mono", (2, 1, 4), DENSE_BOTH),
        pytest.param("tiny_mono_1_5", (1, 4, 2), {}, marks=pytest.mark.slow),
        ("tiny_mono_1_5", (1, 2, 2, 2), GROUPED),
        pytest.param("tiny_modular", (2, 4, 1), {}, marks=pytest.mark.slow),
        ("tiny_modular", (1, 2, 2, 2), {"remat": "names"}),
        ("odd", (1, 4, 2), WIDE),
        ("odd", (1, 2, 3), {}),
        ("tiny_mono", (1, 2, 1, 4), BLOCKED | WIDE),
        ("tiny_mono", (1, 2, 1, 2), ULYSSES | GROUPED),
        ("images", (1, 1, 1, 2), ULYSSES | BLOCKED),
        ("images", (1, 2, 2, 2), DENSE_BOTH | CHUNKED),
        ("gemma3", (1, 2, 2, 2), {}),
        pytest.param("gemma3", (1, 8, 1), WIDE, marks=pytest.mark.slow),
        pytest.param("gemma3", (1, 1, 4), GROUPED, marks=pytest.mark.slow),
        pytest.param("gemma3", (2, 1, 1, 4), BLOCKED, marks=pytest.mark.slow),
        pytest.param("gemma3", (1, 1, 1, 8), DENSE_BOTH | CHUNKED, marks=pytest.mark.slow),
        pytest.param("gemma3", (1, 2, 1, 2), ULYSSES | BLOCKED, marks=pytest.mark.slow),
        pytest.param("mistral", (2, 2, 2), BLOCKED, marks=pytest.mark.slow),
        pytest.param("mistral", (1, 2, 1, 2), GROUPED | CHUNKED, marks=pytest.mark.slow),
        pytest.param("images", (1, 1, 1, 8), BLOCKED, marks=pytest.mark.slow),
        pytest.param("odd", (1, 2, 2, 2), {}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_one_device_s(name: str, axes: tuple[int, ...], changes: dict[str, Any]):
    expected, one = on_one_device(name, jnp.float32)
    loss, gradients = on_devices(name, jnp.float32, axes, changes)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == one.keys()
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, one[path], rtol=1e-5, atol=1e-5 * np.abs(one[path]).max(), err_msg=path)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))


@pytest.mark.parametrize(
    ("axes", "changes", "bound"),
    [((2, 2, 2), {}, 5e-3), ((2, 2, 2), WIDE, 5e-4), ((2, 1, 1, 4), {}, 1e-2)],
    ids=["compute", "float32", "context"],
)
def test_bfloat16_differs_by_the_rounding_of_sums_only(axes: tuple[int, ...], changes: dict[str, Any], bound: float):
    """Kernels of layers differ from those of one device by ``bound``, and no error against float32 is larger.

    For other gradients, devices add up more parts (vectors) or other parts (the head's chunks). With ``context``, they
    also add up those of keys and values.
    """
    _, exact = on_one_device("tiny_mono", jnp.float32)
    expected, one = on_one_device("tiny_mono", jnp.bfloat16)
    loss, gradients = on_devices("tiny_mono", jnp.bfloat16, axes, changes)
    assert loss == pytest.approx(expected, rel=1e-5)
    for path, gradient in gradients.items():
        assert distance(gradient, exact[path]) <= 1.1 * distance(one[path], exact[path]), path
        if path.startswith("layers") and path.endswith("kernel"):
            assert distance(gradient, one[path]) < bound, path


def test_devices_add_up_in_float32_if_asked():
    """The gradient of a kernel over rows of 8 devices: with float32 only its result is rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(64, n)), jnp.bfloat16) for n in (16, 24))
    kernel = jnp.zeros((16, 24), jnp.bfloat16)
    mesh = mesh_of(8, 1, 1)
    rows, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (P(("data",)), P()))

    def gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda k: product_with_wide_gradient(x, k), kernel)[1](dy)[0]

    found = jax.jit(gradient, in_shardings=(rows, whole, rows), out_shardings=whole)(x, kernel, dy)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


def prepare(name: str, stage_name: str) -> tuple[Model, Any, Any, tree.Tree]:
    config, stage = TINY[name], stages.get_stage(stage_name)
    model, params = Model(config), random_params(config)
    optimizer = optim.make_optimizer(stage, config, params, 100, OptimConfig(learning_rate=1e-2, warmup=0.0))
    state, frozen = init_state(stage, model, optimizer, params, jnp.float32)
    return model, make_train_step(model, optimizer, dtype=jnp.float32), state, frozen


@pytest.mark.parametrize(("name", "stage", "axes"), [("tiny_mono", "S1.1", (8, 1, 1)), ("odd", "S2", (2, 2, 2))])
def test_the_step_is_one_device_s(name: str, stage: str, axes: tuple[int, int, int]):
    """From one state: AdamW's first update is a sign, which rounding near zero can flip."""
    model, step, state, frozen = prepare(name, stage)
    batch, mesh = random_batch(8), mesh_of(*axes)
    after, metrics = jax.device_get(jax.jit(step)(state, frozen, batch))
    places, frozen_places = state_shardings(model, state, frozen, mesh)
    on_mesh_step = jit_train_step(step, model, state, frozen, mesh)
    placed = jax.device_put((state, frozen), (places, frozen_places), may_alias=False)
    found, others = jax.device_get(on_mesh_step(*placed, LocalRows(mesh, 8).put(batch)))
    assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(others["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(found.opt_state), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_fsdp_and_tensor_axes_cut_the_state_into_pieces():
    model, _, state, frozen = prepare("tiny_mono", "S1.1")
    mesh = mesh_of(1, 4, 2)
    shardings, frozen_shardings = state_shardings(model, state, frozen, mesh)
    placed = jax.device_put(state, shardings)
    expert = placed.trainable["layers"]["visual_feed_forward"]["gate"]["kernel"]
    assert expert.addressable_shards[0].data.size * 8 == expert.size
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed.opt_state)
        if "visual_feed_forward" in str(path) and "gate" in str(path)
    ]
    assert len(moments) == 2
    assert all(leaf.sharding == expert.sharding for leaf in moments)
    assert len(jax.tree.leaves(frozen_shardings)) == len(jax.tree.leaves(frozen))
