"""Every family trains: with visual experts of both kinds, with the frozen and trained parts of the stage."""

from __future__ import annotations

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
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state
from mono_jax.training.step import make_train_step
from mono_jax.weights.families.table import FAMILIES
from tests.mono_jax.helpers import random_batch, random_params

NAMES = [name for name in FAMILIES if name != "internlm2"]
WINDOW = {"sliding_window": 7, "sliding_layers": (0,)}


def mono(name: str) -> Architecture:
    """A tiny Mono-InternVL-1.5 based on the family, with all its optional parts."""
    windows = WINDOW if name in ("mistral", "gemma3") else {}
    local = {"rope_local_theta": 1e4, "query_pre_attn_scalar": 24.0} if name == "gemma3" else {}
    return preset("tiny_mono_1_5", family=name, head_size=8, **FAMILIES[name].parts, **windows, **local)


def every_stage() -> list:
    later = [pytest.param(name, stage, marks=pytest.mark.slow) for name in NAMES for stage in ("S1.1++", "S2++")]
    return [(name, "S1.3++") for name in NAMES] + later


@pytest.mark.parametrize(("name", "stage"), every_stage())
def test_a_step_trains_what_the_stage_says(name: str, stage: str):
    config = mono(name)
    model, stage = Model(config), stages.get_stage(stage)
    params = jax.tree.map(jnp.asarray, random_params(config, size=0.05))
    settings = OptimConfig(learning_rate=1e-2, warmup=0.0)
    optimizer = optim.make_optimizer(stage, config, params, 10, settings)
    state, frozen = init_state(stage, model, optimizer, params, jnp.float32)
    state, metrics = jax.jit(make_train_step(model, optimizer, dtype=jnp.float32))(state, frozen, random_batch(8))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    before = tree.flatten(params)
    trained = tree.flatten(state.trainable)
    assert trained.keys() | tree.flatten(frozen).keys() == before.keys()
    assert {path for path, leaf in trained.items() if np.array_equal(leaf, before[path])} == set()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_experts_are_chosen_by_modality(name: str):
    """Compared with both experts on all tokens, selected by mask; and a packed row with its samples unpacked."""
    config, batch = mono(name), random_batch(1)
    params = random_params(config)

    def hidden(experts: str, batch: dict) -> np.ndarray:
        model = Model(config, Execution(experts=experts))
        return np.asarray(jax.jit(lambda params: model(params, batch, jnp.float32).hidden)(params))

    found = hidden("static", batch)
    real = batch["segments"][0][np.argsort(batch["order"][0])][16:] > 0
    np.testing.assert_allclose(found[0][real], hidden("dense_both", batch)[0][real], rtol=1e-4, atol=1e-4)
    alone = {**batch, "segments": np.where(batch["segments"] == 2, batch["segments"], 0)}
    second = alone["segments"][0][np.argsort(batch["order"][0])][16:] > 0
    assert second.any()
    np.testing.assert_allclose(found[0][second], hidden("static", alone)[0][second], rtol=1e-4, atol=1e-4)
