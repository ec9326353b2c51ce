from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines import strict
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.training import optim, stages
from mono_jax.training.groups import groups_of, split
from mono_jax.training.optim_config import GroupConfig, OptimConfig

CONFIG = preset("tiny_mono")


def make(stage: str = "S1.3", steps: int = 100, **settings) -> optim.Optimizer:
    params = Model(CONFIG).abstract_params()
    return optim.make_optimizer(stages.get_stage(stage), CONFIG, params, steps, OptimConfig(**settings))


def test_schedules_warm_up_and_decay():
    cosine = optim.make_schedule(1.0, "cosine", 10, 110, end=0.1)
    assert [float(cosine(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert float(cosine(60)) == pytest.approx(0.55)
    assert float(cosine(110)) == pytest.approx(0.1)
    constant = optim.make_schedule(2.0, "constant", 4, 100)
    assert [float(constant(step)) for step in (0, 2, 4, 1000)] == pytest.approx([0, 1, 2, 2])
    assert float(optim.make_schedule(3.0, "constant", 0, 1)(0)) == 3.0


def test_defaults_come_from_the_stage_and_settings_override_them():
    assert set(make().schedules) == {"visual_embedding", "visual_experts", "attention"}
    rate = make(warmup=0.0, schedule="constant").schedules["attention"](50)
    assert float(rate) == pytest.approx(stages.get_stage("S1.3").learning_rate)
    rates = make(
        warmup_steps=0, learning_rate=1.0, schedule="constant", groups={"attention": GroupConfig(learning_rate=0.5)}
    )
    assert float(rates.schedules["attention"](3)) == 0.5
    assert float(rates.schedules["visual_experts"](3)) == 1.0


def test_groups_and_keys_are_checked():
    with pytest.raises(ConfigError, match="does not train"):
        make("S1.1", groups={"attention": GroupConfig(learning_rate=1.0)})
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        make(groups={"atention": GroupConfig()})
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        strict.build(OptimConfig, {"learning_rat": 1.0}, "optim", ConfigError)
    with pytest.raises(ConfigError, match="at least 1"):
        make(steps=0)


def test_each_group_follows_its_own_adamw():
    """Group by group, the updates are those of a plain optax.adamw with the group's own settings."""
    params = Model(CONFIG).init(jax.random.key(0))
    stage = stages.get_stage("S1.3")
    trainable, _ = split(stage, CONFIG, params)
    settings = {"warmup": 0.0, "schedule": "constant", "learning_rate": 1e-2, "clip_norm": 0.0, "weight_decay": 0.1}
    optimizer = make(**settings, groups={"attention": GroupConfig(learning_rate=1e-3, weight_decay=0.0)})
    keys = iter(jax.random.split(jax.random.key(1), 100))
    grads = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), trainable)
    updates, _ = optimizer.transform.update(grads, optimizer.transform.init(trainable), trainable)
    flat, groups = tree.flatten(updates), groups_of(CONFIG, params)
    for path, update in flat.items():
        attention = groups[path] == "attention"
        decays = path.split("/")[-1] in optim.DECAYED and not attention
        plain = optax.adamw(1e-3 if attention else 1e-2, weight_decay=0.1 if decays else 0.0)
        leaf, grad = tree.flatten(trainable)[path], tree.flatten(grads)[path]
        expected, _ = plain.update(grad, plain.init(leaf), leaf)
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)


def test_state_holds_two_moments_of_trainables_and_nothing_of_the_frozen():
    params = Model(CONFIG).abstract_params()
    trainable, _ = split(stages.get_stage("S1.1"), CONFIG, params)
    state = jax.eval_shape(make("S1.1").transform.init, trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_linear_and_wsd_schedules():
    linear = optim.make_schedule(1.0, "linear", 10, 110, end=0.2)
    assert [float(linear(step)) for step in (0, 10, 60, 110, 500)] == pytest.approx([0, 1, 0.6, 0.2, 0.2])
    wsd = optim.make_schedule(2.0, "wsd", 10, 100, end=0.1, decay=0.2)
    assert [float(wsd(step)) for step in (0, 5, 10, 79, 80, 90, 100)] == pytest.approx([0, 1, 2, 2, 2, 1.1, 0.2])
    short = optim.make_schedule(1.0, "wsd", 0, 4, decay=1.0)
    assert [float(short(step)) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_schedules_equal_those_of_optax():
    cosine = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 30, 1000, 3e-5)
    constant = optax.warmup_constant_schedule(0.0, 3e-4, 30)
    ours = optim.make_schedule(3e-4, "cosine", 30, 1000, end=0.1), optim.make_schedule(3e-4, "constant", 30, 1000)
    for step in (0, 1, 29, 30, 31, 500, 999, 1000):
        assert [float(schedule(step)) for schedule in ours] == [float(cosine(step)), float(constant(step))]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_each_optimizer_learns_and_leaves_frozen_parameters_out(name: str):
    params = Model(CONFIG).init(jax.random.key(0))
    trainable, _ = split(stages.get_stage("S1.1"), CONFIG, params)
    rate = {"lion": 5e-4, "muon": 3e-2}.get(name, 3e-3)
    optimizer = make("S1.1", optimizer=name, learning_rate=rate, warmup=0.0, schedule="constant", weight_decay=0.0)
    # Full rank: a constant gradient has only one direction, in which Muon moves ten times slower.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    target = jax.tree.map(lambda a: a + 0.05 * jax.random.rademacher(next(keys), a.shape), trainable)
    loss = lambda t: sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(t), jax.tree.leaves(target)))  # noqa: E731
    state, first = optimizer.transform.init(trainable), float(loss(trainable))

    @jax.jit
    def update(trainable, state):
        updates, state = optimizer.transform.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(60):
        trainable, state = update(trainable, state)
    assert float(loss(trainable)) < 0.5 * first


def one_update(name: str, params: dict, grads: dict, **settings) -> dict:
    stage = stages.get_stage("S2")
    full = Model(CONFIG).init(jax.random.key(0))
    values = {"warmup": 0.0, "schedule": "constant", "learning_rate": 0.02, "clip_norm": 0.0, "weight_decay": 0.0}
    optimizer = optim.make_optimizer(stage, CONFIG, full, 10, OptimConfig(optimizer=name, **(values | settings)))
    updates, _ = optimizer.transform.update(grads, optimizer.transform.init(params), params)
    return tree.flatten(updates)


def test_muon_of_stacked_layers_is_muon_of_each_layer():
    params = Model(CONFIG).init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    grads = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), params)
    updates = one_update("muon", params, grads)
    path = "layers/feed_forward/gate/kernel"
    plain = optax.contrib.muon(0.02, consistent_rms=0.2)
    for layer in range(CONFIG.num_hidden_layers):
        leaf, grad = (tree.flatten(t)[path][layer] for t in (params, grads))
        expected, _ = plain.update(grad, plain.init(leaf), leaf)
        np.testing.assert_allclose(updates[path][layer], expected, rtol=2e-4, atol=1e-7)
    rest = "lm_head/kernel"  # not a layer's kernel: AdamW
    leaf, grad = (tree.flatten(t)[rest] for t in (params, grads))
    adam = optax.adamw(0.02, weight_decay=0.0, nesterov=True)
    expected, _ = adam.update(grad, adam.init(leaf), leaf)
    np.testing.assert_allclose(updates[rest], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_weight_decay_is_decoupled_and_spares_scales_and_biases(name: str):
    params = Model(CONFIG).init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    grads = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), params)
    without, decayed = (one_update(name, params, grads, weight_decay=w) for w in (0.0, 0.5))
    for path, leaf in tree.flatten(params).items():
        share = 0.02 * 0.5 if path.split("/")[-1] in optim.DECAYED else 0.0
        np.testing.assert_allclose(decayed[path], without[path] - share * leaf, rtol=1e-4, atol=1e-6, err_msg=path)
