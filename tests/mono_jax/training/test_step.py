"""The training step: frozen parameters stay frozen, and results do not depend on how the work is split."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.training import optim, stages
from mono_jax.training import step as train
from mono_jax.training.groups import split
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state
from tests.mono_jax.helpers import SPEC, random_batch, stage_for, with_nan

F32 = jnp.float32
SETTINGS = OptimConfig(learning_rate=1e-2, warmup=0.0, weight_decay=0.1)


@cache
def weights(config: Architecture) -> tree.Tree:
    return Model(config).init(jax.random.key(0))


def prepare(
    config: Architecture, stage_name: str, dtype=F32, grad_accum_steps: int = 1, execution: Execution | None = None
):
    model, stage = Model(config, execution), stages.get_stage(stage_name)
    optimizer = optim.make_optimizer(stage, config, weights(config), 100, SETTINGS)
    state, frozen = init_state(stage, model, optimizer, weights(config), dtype)
    return model, train.make_train_step(model, optimizer, dtype=dtype, grad_accum_steps=grad_accum_steps), state, frozen


def run(config: Architecture, stage: str, steps: int = 3, dtype=F32, grad_accum_steps: int = 1, rows: int = 8):
    _, step, state, frozen = prepare(config, stage, dtype, grad_accum_steps)
    step = jax.jit(step)
    values = []
    for number in range(steps):
        state, metrics = step(state, frozen, random_batch(rows, seed=number))
        values.append(jax.device_get(metrics))
    return state, frozen, values


@pytest.mark.parametrize("name", ["tiny_mono", "tiny_mono_1_5"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("number", ["S1.1", "S1.3"])
def test_frozen_leaves_keep_their_bits_and_all_others_move(name: str, dtype, number: str):
    config = preset(name)
    stage = stage_for(config, number)
    state, frozen, values = run(config, stage, dtype=dtype)
    before = tree.flatten(weights(config))
    assert np.isfinite([v["loss"] for v in values]).all()
    for path, leaf in tree.flatten(frozen).items():
        assert leaf.dtype == dtype
        assert np.asarray(leaf).tobytes() == np.asarray(before[path].astype(dtype)).tobytes(), path
    for path, leaf in tree.flatten(state.trainable).items():
        assert leaf.dtype == jnp.float32
        assert not np.array_equal(leaf, before[path]), path
    assert set(tree.flatten(frozen)).isdisjoint(tree.flatten(state.trainable))


def frozen_matmuls(config: Architecture, stage: str) -> int:
    """Kernels that take part in a matmul and stay frozen (embeddings are looked up)."""
    _, frozen = split(stages.get_stage(stage), config, weights(config))
    return sum(path.endswith("kernel") for path in tree.flatten(frozen))


def compiled_dots(config: Architecture, stage: str, remat: str) -> int:
    _, step, state, frozen = prepare(config, stage, execution=Execution(remat=remat))
    return len(re.findall(r" dot\(", jax.jit(step).lower(state, frozen, random_batch(2)).compile().as_text()))


@pytest.mark.parametrize(
    ("name", "remat"),
    [("tiny_mono", "full"), ("tiny_mono_1_5", "none"), pytest.param("tiny_mono", "none", marks=pytest.mark.slow)],
)
def test_the_compiled_step_has_no_weight_gradient_of_a_frozen_kernel(name: str, remat: str):
    config = preset(name)
    everything = compiled_dots(config, "S2", remat)
    for number in ("S1.1", "S1.3"):
        stage = stage_for(config, number)
        idle = frozen_matmuls(config, stage)
        assert idle > 0
        assert everything - compiled_dots(config, stage, remat) == idle


def test_gradient_norm_sees_trainable_parameters_only():
    config = preset("tiny_mono")
    _, _, values = run(config, "S1.1", steps=1)
    model, batch = Model(config), random_batch(8)

    def loss(params):
        return train.loss_sum(model, params, {}, batch, F32) / batch["loss_weights"].sum()

    grads = jax.jit(jax.grad(loss))(weights(config))
    trainable, frozen = split(stages.get_stage("S1.1"), config, grads)
    norm = lambda t: float(np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(t))))  # noqa: E731
    assert values[0]["grad_norm"] == pytest.approx(norm(trainable), rel=1e-5)
    assert norm(frozen) > 0.1 * norm(trainable)  # so that the test can fail


def history(config: Architecture, stage: str, steps: int = 3) -> tuple[list[Any], Any, list[dict[str, Any]]]:
    """(states before each step and after the last, frozen, metrics) of ``steps`` steps.

    Options that must change nothing are compared step by step, from these states: over several steps, AdamW, whose
    first update of a weight is the sign of its gradient, turns a rounding error near zero into a different weight.
    """
    _, step, state, frozen = prepare(config, stage)
    step, states, values = jax.jit(step), [state], []
    for number in range(steps):
        state, metrics = step(state, frozen, random_batch(8, seed=number))
        states.append(state)
        values.append(jax.device_get(metrics))
    return states, frozen, values


def assert_same_step(
    one: Any, other: Any, values: dict[str, Any], others: dict[str, Any], rtol: float, loss_rel: float
) -> None:
    assert float(others["loss"]) == pytest.approx(float(values["loss"]), rel=loss_rel)
    assert float(others["grad_norm"]) == pytest.approx(float(values["grad_norm"]), rel=1e-4)
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_accumulation_changes_nothing():
    config = preset("tiny_mono")
    states, frozen, values = history(config, "S2")
    step = jax.jit(prepare(config, "S2", grad_accum_steps=4)[1])
    for number, one in enumerate(values):
        state, other = step(states[number], frozen, random_batch(8, seed=number))
        assert_same_step(states[number + 1], state, one, other, rtol=1e-3, loss_rel=1e-5)


def test_accumulation_must_divide_the_batch():
    with pytest.raises(Exception, match="does not divide the 8 rows"):
        run(preset("tiny_mono"), "S2", grad_accum_steps=3)


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    config = preset("tiny_mono")
    _, step, state, frozen = prepare(config, "S1.1")
    step = jax.jit(step)
    good = random_batch(2)
    state, _ = step(state, frozen, good)
    before = jax.device_get((state.trainable, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, frozen, with_nan(good))
        assert (int(metrics["nonfinite"]), int(metrics["nonfinite_steps"]), int(metrics["skipped"])) == (
            1,
            count,
            count,
        )
    after = jax.device_get((state.trainable, state.opt_state))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))
    state, metrics = step(state, frozen, good)
    assert (int(metrics["nonfinite"]), int(metrics["nonfinite_steps"]), int(metrics["skipped"])) == (0, 0, 2)
    assert int(state.step) == 4


def test_a_batch_without_a_trained_token_changes_nothing():
    config = preset("tiny_mono")
    _, step, state, frozen = prepare(config, "S1.1")
    batch = random_batch(2) | {"loss_weights": np.zeros((2, SPEC.text_tokens), np.float32)}
    before = jax.device_get((state.trainable, state.opt_state))
    state, metrics = jax.jit(step)(state, frozen, batch)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == float(metrics["weight"]) == 0.0
    assert int(metrics["nonfinite"]) == 0
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), before)
    assert SETTINGS.weight_decay > 0 and int(state.step) == 1


def test_each_step_reports_the_rate_it_was_done_at(monkeypatch: pytest.MonkeyPatch):
    """Warm-up from zero with a loss whose gradient is 1 everywhere, so that AdamW's updates equal the learning rates.

    The second and the fifth update are skipped, as not finite and without any trained token; the step count continues.
    """
    sums = lambda model, trainable, *_: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(trainable))  # noqa: E731
    monkeypatch.setattr(train, "slot_losses", sums)
    config, stage = preset("tiny_mono"), stages.get_stage("S1.3")
    settings = OptimConfig(learning_rate=1e-2, warmup_steps=4, schedule="linear", weight_decay=0.0)
    model = Model(config)
    optimizer = optim.make_optimizer(stage, config, weights(config), 10, settings)
    step = jax.jit(train.make_train_step(model, optimizer, dtype=F32))
    state, frozen = init_state(stage, model, optimizer, weights(config), F32)
    rates, moved, good = [], [], random_batch(2)
    untrained = good | {"loss_weights": np.zeros_like(good["loss_weights"])}
    for batch in (good, with_nan(good), good, good, untrained, good):
        before = state.trainable["layers"]["attention"]["wo"]["kernel"]
        state, metrics = step(state, frozen, batch)
        rates.append({name: float(value) for name, value in metrics.items() if name.startswith("lr/")})
        moved.append(float(jnp.max(before - state.trainable["layers"]["attention"]["wo"]["kernel"])))
    expected = [0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2 * 5 / 6]
    for found, rate in zip(rates, expected, strict=True):
        assert found == pytest.approx(dict.fromkeys((f"lr/{group}" for group in optimizer.schedules), rate))
    np.testing.assert_allclose(moved, [0, 0, *expected[2:4], 0, expected[5]], rtol=1e-3)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_losses_per_source_weighted_add_up_to_the_loss(grad_accum_steps: int):
    """Each source's sum is the remaining loss when the weights of the other sources are 0."""
    config, names = preset("tiny_mono"), ("one", "two", "absent")
    model, _, state, frozen = prepare(config, "S1.1")
    optimizer = optim.make_optimizer(stages.get_stage("S1.1"), config, weights(config), 100, SETTINGS)
    options = {"dtype": F32, "grad_accum_steps": grad_accum_steps}
    step = jax.jit(train.make_train_step(model, optimizer, sources=names, **options))
    plain = jax.jit(train.make_train_step(model, optimizer, **options))
    batch = random_batch(4)
    batch["loss_weights"] *= np.random.default_rng(0).random(batch["loss_weights"].shape, np.float32)
    batch["sources"] = np.repeat([[1] * 9 + [2] * 7], 4, axis=0).astype(np.int32)
    metrics = step(state, frozen, batch)[1]
    assert float(metrics["loss"]) == pytest.approx(float(plain(state, frozen, batch)[1]["loss"]), rel=1e-6)
    total = sum(float(metrics[f"loss_sum/{name}"]) for name in names)
    assert total / float(metrics["weight"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    for number, name in enumerate(names, 1):
        own = np.where(batch["sources"] == number, batch["loss_weights"], 0)
        assert float(metrics[f"weight/{name}"]) == pytest.approx(own.sum(), rel=1e-6)
        alone = plain(state, frozen, batch | {"loss_weights": own})[1]["loss"]
        assert float(metrics[f"loss_sum/{name}"]) == pytest.approx(float(alone) * own.sum(), rel=1e-5)


def test_a_step_without_sources_is_the_same_program():
    """A batch may contain the field; without names, nothing is computed from it."""
    _, step, state, frozen = prepare(preset("tiny_mono"), "S1.1")
    batch = random_batch(2)
    more = batch | {"sources": np.ones((2, SPEC.text_tokens), np.int32)}
    without, with_field = (str(jax.make_jaxpr(step)(state, frozen, b).eqns) for b in (batch, more))
    assert without.count("\n") == with_field.count("\n")


def test_training_overfits_one_batch():
    config = preset("tiny_mono")
    _, step, state, frozen = prepare(config, "S2")
    step, batch, losses = jax.jit(step), random_batch(2), []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4.0
    assert losses[-1] < 0.5


def test_bfloat16_is_close_to_float32():
    config = preset("tiny_mono")
    _, _, wide = run(config, "S1.1", steps=1)
    _, _, narrow = run(config, "S1.1", steps=1, dtype=jnp.bfloat16)
    assert float(narrow[0]["loss"]) == pytest.approx(float(wide[0]["loss"]), rel=2e-2)
    assert float(narrow[0]["grad_norm"]) == pytest.approx(float(wide[0]["grad_norm"]), rel=5e-2)
