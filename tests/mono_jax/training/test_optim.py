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
