"""Freely chosen groups, parts of groups and ranges of layers: exactly these are trained."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.training import optim
from mono_jax.training.groups import split
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.stages import Stage, get_stage
from mono_jax.training.state import all_params, init_state
from mono_jax.training.step import loss_sum, make_train_step
from tests.mono_jax.helpers import random_batch

F32 = jnp.float32
CONFIG = preset("tiny_mono", num_hidden_layers=4)
SETTINGS = OptimConfig(learning_rate=1e-2, schedule="constant", warmup=0.0, weight_decay=0.1)
# Choices: {whole path: layers that train}, all others frozen.
ALL = (0, 4)
CHOICES: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {
    ("attention",): {"layers/attention/wqkv/kernel": ALL, "layers/attention/wo/kernel": ALL},
    ("text_experts/gate", "text_experts/up"): {
        "layers/feed_forward/gate/kernel": ALL,
        "layers/feed_forward/up/kernel": ALL,
    },
    ("visual_experts[2:4]",): {f"layers/visual_feed_forward/{name}/kernel": (2, 4) for name in ("gate", "up", "down")},
    ("attention/wqkv[:1]", "token_embeddings/lm_head"): {
        "layers/attention/wqkv/kernel": (0, 1),
        "lm_head/kernel": ALL,
    },
    ("attention[1:3]", "text_experts/down[0:2]"): {
        "layers/attention/wqkv/kernel": (1, 3),
        "layers/attention/wo/kernel": (1, 3),
        "layers/feed_forward/down/kernel": (0, 2),
    },
}


def stage_of(trains: tuple[str, ...]) -> Stage:
    return dataclasses.replace(get_stage("S2"), trains=trains)


def trained_after(trains: tuple[str, ...], steps: int = 3) -> tuple[dict, dict, list[float]]:
    """Parameters before and after ``steps`` updates, and the losses."""
    model, stage = Model(CONFIG), stage_of(trains)
    params = model.init(jax.random.key(0))
    optimizer = optim.make_optimizer(stage, CONFIG, params, 100, SETTINGS)
    state, frozen = init_state(stage, model, optimizer, params, F32)
    step = jax.jit(make_train_step(model, optimizer, dtype=F32))
    losses = []
    for number in range(steps):
        state, metrics = step(state, frozen, random_batch(4, seed=number))
        losses.append(float(metrics["loss"]))
    return tree.flatten(params), tree.flatten(all_params(state, frozen)), losses


@pytest.mark.parametrize("trains", CHOICES)
def test_exactly_what_was_chosen_trains_and_as_masked_adamw_would(trains: tuple[str, ...]) -> None:
    chosen = CHOICES[trains]
    before, after, losses = trained_after(trains)
    # The oracle: AdamW over all parameters, with gradients and updates of frozen parameters set to zero.
    model = Model(CONFIG)

    def mask(path: str, leaf: jax.Array) -> jax.Array:
        rows = jnp.arange(leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))
        start, stop = chosen.get(path, (0, 0))
        return ((rows >= start) & (rows < stop)) if path.startswith("layers/") else jnp.full(leaf.shape, path in chosen)

    masks = {path: mask(path, leaf) for path, leaf in before.items()}
    masked = lambda flat: {path: jnp.where(masks[path], leaf, 0) for path, leaf in flat.items()}  # noqa: E731
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    params, state = dict(before), adamw.init(dict(before))

    @jax.jit
    def update(params, state, batch):
        def loss(flat):
            return loss_sum(model, tree.unflatten(flat), {}, batch, F32) / batch["loss_weights"].sum()

        value, gradients = jax.value_and_grad(loss)(params)
        gradients = masked(gradients)
        scale = jnp.minimum(1.0, 1.0 / optax.tree.norm(gradients))
        updates, state = adamw.update({p: g * scale for p, g in gradients.items()}, state, params)
        return value, optax.apply_updates(params, masked(updates)), state

    for number, ours in enumerate(losses):
        value, params, state = update(params, state, random_batch(4, seed=number))
        assert ours == pytest.approx(float(value), rel=1e-5)
    for path, leaf in after.items():
        inside = np.asarray(masks[path])
        np.testing.assert_array_equal(np.where(inside, 0, leaf), np.where(inside, 0, before[path]), err_msg=path)
        np.testing.assert_allclose(leaf, params[path], atol=2e-4, err_msg=path)
        if inside.any():
            assert not np.array_equal(leaf, before[path]), path


def test_frozen_layers_have_no_state_and_no_weight_gradient() -> None:
    """For a range of layers, the compiled step has weight-gradient matmuls only in that run of the scan."""
    model = Model(CONFIG)
    params = model.abstract_params()
    sizes, dots = {}, {}
    for trains in (("visual_experts",), ("visual_experts[2:4]",)):
        stage = stage_of(trains)
        optimizer = optim.make_optimizer(stage, CONFIG, params, 100, SETTINGS)
        state, frozen = jax.eval_shape(lambda p, s=stage, o=optimizer: init_state(s, model, o, p, F32), params)
        sizes[trains] = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
        step = jax.jit(make_train_step(model, optimizer, dtype=F32))
        dots[trains] = step.lower(state, frozen, random_batch(2)).compile().as_text().count(" dot(")
    assert sizes["visual_experts[2:4]",] * 2 == sizes["visual_experts",]
    # Two runs have twice the dots of one, forward and input gradients; weight gradients come from the second only.
    stage = stage_of(("norms",))
    trainable, _ = split(stage, CONFIG, params)
    assert trainable and dots["visual_experts[2:4]",] < 2 * dots["visual_experts",]


@pytest.mark.parametrize(
    ("trains", "message"),
    [
        (("atention",), "did you mean 'attention'"),
        (("attention[3:9]",), "layers 0 to 3"),
        (("attention[2:1]",), "layers 0 to 3"),
        (("attention/w1",), "no parameter named 'w1'"),
        (("token_embeddings[0:2]",), "leave out the range"),
        (("attention[0:1]", "attention/wo[2:3]"), "give one range"),
        (("attention[",), "GROUP/NAME"),
        (("visual_attention",), "does not have"),
    ],
)
def test_choices_that_cannot_be_are_refused(trains: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(stage_of(trains), CONFIG, Model(CONFIG).abstract_params())
