"""Low-rank adapters: their results, their gradients, and that nothing else is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.adapters import is_adapter, pairs
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import on_mesh
from mono_jax.parallel.rows import LocalRows
from mono_jax.parallel.specs import param_shardings
from mono_jax.training import optim
from mono_jax.training.lora import LoraConfig, adapters_of
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.stages import Stage, get_stage
from mono_jax.training.state import init_state
from mono_jax.training.step import loss_sum, make_train_step
from mono_jax.weights.families.table import FAMILIES
from tests.mono_jax.helpers import random_batch, random_params
from tests.mono_jax.training.test_families import mono
from tests.mono_jax.training.test_meshes import mesh_of

F32 = jnp.float32
CONFIG = preset("tiny_mono_1_5")
LORA = LoraConfig(rank=3, alpha=1.5)
GROUPED = {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 8}


def stage_of(*trains: str) -> Stage:
    return dataclasses.replace(get_stage("S2"), trains=trains or ("lora",))


def adapted(config: Architecture, lora: LoraConfig = LORA, **execution: Any) -> Model:
    return Model(config, Execution(**({"attention": "xla"} | execution)), adapters_of(lora, stage_of(), config))


def with_adapters(model: Model, base: tree.Tree, *, zero: bool) -> tree.Tree:
    """``base`` with random A, and B either initial (zeros) or random."""
    new = tree.flatten(model.init_adapters(jax.random.key(1)))
    if not zero:
        rng = np.random.default_rng(2)
        new = {path: leaf if leaf.any() else np.float32(rng.normal(size=leaf.shape)) for path, leaf in new.items()}
    return tree.merge(base, tree.unflatten(new))


FEW = ("internlm2", "qwen2", "gemma3")  # the others differ by less


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in FEW)])
def test_a_model_begins_as_it_was_and_leaves_as_one_matrix(name: str):
    """With B = 0 no bit changes; for any adapters, the merged model computes the same up to rounding."""
    config = CONFIG if name == "internlm2" else mono(name)
    model, plain, batch = adapted(config), Model(config, Execution(attention="xla")), random_batch(2)
    hidden = jax.jit(lambda p: model(p, batch, F32).hidden)
    of_plain = jax.jit(lambda p: plain(p, batch, F32).hidden)
    base = random_params(config, size=0.1)
    np.testing.assert_array_equal(hidden(with_adapters(model, base, zero=True)), of_plain(base))
    params = with_adapters(model, base, zero=False)
    merged = model.plain(params)
    assert tree.flatten(merged).keys() == tree.flatten(base).keys()
    found, expected = hidden(params), of_plain(merged)
    assert np.abs(expected - of_plain(base)).max() > 0.1, "the adapters do nothing"
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("experts", [{}, GROUPED], ids=["static", "grouped"])
def test_gradients_are_those_of_the_dense_kernels(experts: dict[str, Any]):
    """For W + s A B: dA = s dW B^T and dB = s A^T dW, with dW from a model that has W + s A B as its kernel."""
    model, plain, batch = adapted(CONFIG, **experts), Model(CONFIG, Execution(attention="xla")), random_batch(2)
    params = with_adapters(model, random_params(CONFIG, size=0.1), zero=False)
    flat = tree.flatten(params)
    low = tree.unflatten({path: leaf for path, leaf in flat.items() if is_adapter(path)})
    rest = tree.unflatten({path: leaf for path, leaf in flat.items() if not is_adapter(path)})
    found = pairs(jax.jit(jax.grad(lambda p: loss_sum(model, p, rest, batch, F32)))(low))
    dense = jax.jit(jax.grad(lambda p: loss_sum(plain, p, {}, batch, F32)))(model.plain(params))
    dense, scale = tree.flatten(dense), model.adapters.scale
    assert len(found) == 9
    for path, (a, b) in pairs(low).items():
        expected = scale * dense[path] @ b.swapaxes(1, 2), scale * a.swapaxes(1, 2) @ dense[path]
        for ours, theirs in zip(found[path], expected):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), err_msg=path)


def test_adapters_alone_train_with_state_of_their_own_size():
    model, stage = adapted(CONFIG), stage_of("lora", "norms")
    params = with_adapters(model, jax.tree.map(jnp.asarray, random_params(CONFIG, size=0.1)), zero=True)
    optimizer = optim.make_optimizer(stage, CONFIG, params, 10, OptimConfig(learning_rate=1e-2, warmup=0.0))
    state, frozen = init_state(stage, model, optimizer, params, None)
    flat = tree.flatten(params)
    trains = {path for path in flat if is_adapter(path) or "norm" in path.split("/")[-2]}
    trains -= {path for path in trains if path.startswith("projector")}
    assert tree.flatten(state.trainable).keys() == trains and tree.flatten(frozen).keys() == flat.keys() - trains
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(sizes) == 2 * sum(flat[path].size for path in trains)
    step = jax.jit(make_train_step(model, optimizer, dtype=F32, norms_every=1))
    for number in range(2):  # B is zero before the first, so that A does not move in it
        state, metrics = step(state, frozen, random_batch(4, seed=number))
    assert metrics["grad_norm/lora"] > 0 and metrics["update_norm/lora"] > 0
    moved = {path for path, leaf in tree.flatten(state.trainable).items() if not np.array_equal(leaf, flat[path])}
    assert moved == trains


def test_a_mesh_computes_the_same():
    model, batch = adapted(CONFIG, remat="full"), random_batch(8)
    params = with_adapters(model, random_params(CONFIG, size=0.1), zero=False)
    run = lambda p, b: jax.value_and_grad(lambda p: loss_sum(model, p, {}, b, F32))(p)  # noqa: E731
    loss, gradients = jax.device_get(jax.jit(run)(params, batch))
    mesh = mesh_of(2, 2, 2)
    places = param_shardings(CONFIG, params, mesh)
    placed, rows = jax.device_put(params, places), LocalRows(mesh, 8).put(batch)
    found = jax.device_get(jax.jit(on_mesh(run, mesh), out_shardings=(None, places))(placed, rows))
    assert found[0] == pytest.approx(loss, rel=1e-6)
    expected = tree.flatten(gradients)
    for path, leaf in tree.flatten(found[1]).items():
        if is_adapter(path):
            np.testing.assert_allclose(leaf, expected[path], atol=2e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_adapters_lie_like_the_sides_of_their_kernels():
    model = adapted(CONFIG, LoraConfig(rank=4))
    places = tree.flatten(param_shardings(CONFIG, model.abstract_params(), mesh_of(1, 4, 2)))
    for name, rows, columns in (("wqkv", "fsdp", "tensor"), ("wo", ("tensor", "fsdp"), None)):
        kernel, low, high = (
            tuple(places[f"layers/attention/{name}{part}/kernel"].spec) + (None,) * 3
            for part in ("", "/lora_a", "/lora_b")
        )
        assert kernel[:3] == (None, rows, columns)
        assert low[:3] == (None, rows, None) and high[:3] == (None, None, columns)


@pytest.mark.parametrize(
    ("targets", "trains", "message"),
    [
        (("atention",), ("lora",), "lora.targets.*did you mean 'attention'"),
        (("text_experts/gat",), ("lora",), "kernel of lora.targets in text_experts 'gat'.*did you mean 'gate'"),
        (("attention[0:1]",), ("lora",), "leave out the range"),
        (
            ("token_embeddings",),
            ("lora",),
            "only attention, text_experts, visual_attention, visual_experts can have adapters",
        ),
        (("visual_attention",), ("lora",), "this model has no visual_attention: it has attention"),
        (("attention", "text_experts"), ("lora", "text_experts/up"), "layers/feed_forward/up/kernel is itself trained"),
        (None, ("lora", "attention", "text_experts", "visual_experts"), "every kernel .* is itself trained"),
        (None, ("lora[0:1]",), "lora.targets selects"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_are_refused(targets: tuple[str, ...] | None, trains: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        adapters_of(LoraConfig(targets=targets), stage_of(*trains), preset("tiny_mono"))


def test_targets_name_the_kernels():
    found = adapters_of(LoraConfig(targets=("attention/wo", "visual_experts/up")), stage_of(), CONFIG)
    assert found.modules == {"attention/wo", "visual_feed_forward/up"} and found.scale == 2.0
    left = adapters_of(LoraConfig(), stage_of("lora", "visual_experts[0:1]", "visual_attention"), CONFIG)
    assert left.modules == {f"feed_forward/{n}" for n in ("gate", "up", "down")} | {"attention/wqkv", "attention/wo"}
    assert adapters_of(LoraConfig(), stage_of("attention"), CONFIG) is None
