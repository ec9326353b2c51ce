"""Measures of what happens inside a model, against loops over its attention and activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.errors import ConfigError
from mono_jax.evaluation.inside import Units, distances, look
from mono_jax.generation.prompts import Prompt, pack
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model, Params

IMAGE_TOKEN = 100


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(preset("tiny_mono"))


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    """A model whose experts differ."""
    values = model.init(jax.random.key(0))
    experts = values["layers"]["visual_feed_forward"]
    for name in ("gate", "up", "down"):
        kernel = values["layers"]["feed_forward"][name]["kernel"]
        experts[name]["kernel"] = 2 * kernel
    return values


@pytest.fixture(scope="module")
def prompt(model: Model) -> Prompt:
    vision = model.config.vision
    count = vision.tile_tokens
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, vision.token_pixels, vision.token_pixels, 3), np.uint8)
    ids = np.array([1, 5, *[IMAGE_TOKEN] * count, 7, 8, 9], np.int32)
    return Prompt(ids, pixels, np.arange(count, dtype=np.int32))


def test_attention_is_measured_as_loops_over_the_probabilities_do(model: Model, params: Params, prompt: Prompt):
    sample = look(model, params, prompt, maps=True)
    batch, _ = pack(model.config, [prompt], np.zeros(1, np.int64), 1)
    found = model(params, batch, jnp.float32, collect=("attention",)).collected["attention"]
    order, tokens = batch["order"][0], len(prompt.input_ids)
    weights = np.asarray(found)[:, 0][:, :, order][:, :, :, order][:, :, :tokens, :tokens]  # [L, H, N, N], in sequence
    np.testing.assert_allclose(sample.maps, weights.mean(1), atol=1e-6)
    visual = np.flatnonzero(prompt.input_ids == IMAGE_TOKEN)
    text = np.flatnonzero(prompt.input_ids != IMAGE_TOKEN)
    for layer, heads in enumerate(weights):
        for name, queries in (("text", text), ("visual", visual)):
            shares = [head[i, visual].sum() for head in heads for i in queries]
            assert sample.attention[f"{name}_to_visual"][layer] == pytest.approx(np.mean(shares), abs=1e-5)
        far = [(head[i, visual] * abs(i - visual)).sum() / head[i, visual].sum() for head in heads for i in visual]
        assert sample.attention["visual_distance"][layer] == pytest.approx(np.mean(far), rel=1e-4)
    for name, queries in (("text", text), ("visual", visual)):
        alike = [np.isin(visual, np.arange(i + 1)).sum() / (i + 1) for i in queries]
        assert sample.attention[f"{name}_to_visual_uniform"] == pytest.approx([np.mean(alike)] * 2)
    far = [np.mean([i - j for j in visual if j <= i]) for i in visual]
    assert sample.attention["visual_distance_uniform"] == pytest.approx([np.mean(far)] * 2)


def test_the_gap_is_measured_as_a_loop_over_the_hidden_states_does(model: Model, params: Params, prompt: Prompt):
    batch, _ = pack(model.config, [prompt], np.zeros(1, np.int64), 1)
    found = np.asarray(model(params, batch, jnp.float32, collect=("hidden",)).collected["hidden"], np.float64)[:, 0]
    expected = []
    for states in found[:, batch["order"][0, : len(prompt.input_ids)]]:  # in sequence
        is_visual = prompt.input_ids == IMAGE_TOKEN
        apart = states[is_visual].mean(0) - states[~is_visual].mean(0)
        expected.append(np.linalg.norm(apart) / np.mean([np.linalg.norm(state) for state in states]))
    assert len(set(np.round(expected, 3))) == model.config.num_hidden_layers + 1
    assert look(model, params, prompt).gap == pytest.approx(expected, rel=1e-4)


def test_units_are_those_of_the_expert_of_each_modality(model: Model, params: Params, prompt: Prompt):
    sample = look(model, params, prompt)
    batch, _ = pack(model.config, [prompt], np.zeros(1, np.int64), 1)
    given = np.asarray(model(params, batch, jnp.float32, collect=("ffn",)).collected["ffn"], np.float64)[:, 0]
    count, texts = len(prompt.patches), len(prompt.input_ids) - len(prompt.patches)
    slots = batch["patch_cells"].shape[1]
    for units, name, x in (
        (sample.visual, "visual_feed_forward", given[:, :count]),
        (sample.text, "feed_forward", given[:, slots : slots + texts]),
    ):
        gate, up = (np.float64(params["layers"][name][part]["kernel"]) for part in ("gate", "up"))
        before, beside = np.einsum("lsd,ldf->lsf", x, gate), np.einsum("lsd,ldf->lsf", x, up)
        h = before / (1 + np.exp(-before)) * beside
        np.testing.assert_allclose(units.total, np.abs(h).sum(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(units.largest, np.abs(h).max(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(units.rms, np.sqrt((h * h).mean((1, 2))), rtol=1e-3)
    assert (sample.visual.tokens, sample.text.tokens) == (count, texts)


def test_dead_and_shared_units():
    used = np.array([[1.0, 0.0, 2.0, *[0.5] * 17]])
    one = Units(used, used**2, used, 4)
    other = Units(used[:, ::-1], used[:, ::-1] ** 2, used[:, ::-1], 4)
    assert one.dead == pytest.approx([1 / 20])
    assert (one + other).dead == pytest.approx([0]) and (one + other).tokens == 8
    assert one.overlap(one) == pytest.approx([1]) and one.overlap(other) == pytest.approx([0])


def test_distances_of_experts(model: Model, params: Params):
    found = distances(model.config, params, params)
    assert set(found) == {"gate", "up", "down"}
    for measures in found.values():
        assert measures["apart"] == pytest.approx([1, 1]) and measures["visual"] == pytest.approx([1, 1])
        assert measures["text"] == pytest.approx([0, 0])
    plain = Model(preset("tiny_lm"))
    with pytest.raises(ConfigError, match="no visual experts"):
        distances(plain.config, plain.init(jax.random.key(0)))
