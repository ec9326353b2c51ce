"""Bidirectional images: off by default, and equal packed and unpacked, with every form and with a cache."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import ragged
from mono_jax.errors import ConfigError
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.slots import make_slots
from mono_jax.models.transformer import Model
from mono_jax.training.flops import count_tokens
from mono_jax.weights.hf_config import config_to_hf
from mono_jax.weights.model_folder import load_model, save_model
from tests.mono_jax.helpers import SPEC, random_batch, random_params

CAUSAL = preset("tiny_mono")
WHOLE = CAUSAL.replace(bidirectional_images=True)
PARAMS = random_params(CAUSAL)


def hidden(config, batch, **execution) -> np.ndarray:
    run = jax.jit(lambda p, b: Model(config, Execution(**execution))(p, b, jnp.float32).hidden)
    return np.asarray(run(PARAMS, batch))


def test_the_image_and_nothing_else_is_seen_whole():
    """A sample is one text token, the image, then text: only visual tokens see later ones, those of their image."""
    batch = random_batch(1)
    seen = make_slots(WHOLE, batch, SPEC.visual_tokens).intervals
    causal = make_slots(CAUSAL, batch, SPEC.visual_tokens).intervals
    image = slice(1, 1 + SPEC.visual_tokens)
    assert (seen.last[0, image] == SPEC.visual_tokens).all()
    elsewhere = np.delete(np.arange(SPEC.sequence), np.r_[image])
    np.testing.assert_array_equal(seen.last[0, elsewhere], causal.last[0, elsewhere])
    np.testing.assert_array_equal(seen.first, causal.first)


def test_a_later_pixel_reaches_an_earlier_visual_token():
    """Through the layers after the first and the text that sees both, the loss differs, too."""
    batch = random_batch(2)
    assert np.abs(hidden(WHOLE, batch) - hidden(CAUSAL, batch))[:, : SPEC.text_tokens // 2].max() > 1e-3
    changed = {**batch, "patches": batch["patches"].copy()}
    changed["patches"][:, SPEC.visual_tokens - 1] ^= 255
    for config, reached in ((CAUSAL, False), (WHOLE, True)):
        run = jax.jit(lambda b, config=config: Model(config)(PARAMS, b, jnp.float32, collect=("hidden",)).collected)
        first_visual = [np.asarray(run(b)["hidden"])[1, :, 0] for b in (batch, changed)]
        assert (np.abs(first_visual[0] - first_visual[1]).max() > 1e-4) == reached


@pytest.mark.parametrize("execution", [{"attention": "xla_chunked", "attention_chunk": 12}, {"experts": "grouped"}])
def test_forms_agree(execution: dict):
    """Also with ragged boundaries, where each row has its own number of visual slots."""
    batch = random_batch(2)
    other = ragged(batch, 32, 8) if "experts" in execution else batch
    options = execution | ({"experts_block": 8, "experts_kernel": "dense_both"} if "experts" in execution else {})
    real = SPEC.text_tokens - 2
    np.testing.assert_allclose(
        hidden(WHOLE, other, **options)[:, :real], hidden(WHOLE, batch, attention="xla")[:, :real], atol=2e-4
    )


def test_a_cache_gives_what_training_gives():
    """A prompt with its image, then token by token: the hidden states of the whole sample at once."""
    batch = random_batch(1)
    prompt_text = 4
    length = SPEC.visual_tokens + SPEC.text_tokens // 2  # of the first sample
    segments = np.where(np.arange(SPEC.sequence) < length, 1, 0)[None].astype(np.int32)
    whole = {**batch, "segments": segments}
    expected = hidden(WHOLE, whole)[0, : SPEC.text_tokens // 2]

    model = Model(WHOLE)
    prompt = {**whole, "segments": np.where(np.arange(SPEC.sequence) < SPEC.visual_tokens + prompt_text, segments, 0)}
    output = model(PARAMS, prompt, jnp.float32, collect=("cache",))
    np.testing.assert_allclose(output.hidden[0, :prompt_text], expected[:prompt_text], atol=2e-4)
    cache = output.cache.widened(SPEC.sequence + 8)
    for step in range(prompt_text, SPEC.text_tokens // 2):
        one = {
            "tokens": batch["tokens"][:, step : step + 1],
            "patch_cells": np.zeros((1, 0), np.int32),
            "order": np.zeros((1, 1), np.int32),
            "positions": np.full((1, 1), SPEC.visual_tokens + step, np.int32),
            "segments": np.ones((1, 1), np.int32),
        }
        output = model(PARAMS, one, jnp.float32, cache=cache)
        cache = output.cache
        np.testing.assert_allclose(output.hidden[0, 0], expected[step], atol=2e-4)


def test_a_prompt_behind_a_cache_sees_its_image_whole():
    """The second turn has the image: its tokens are cached in slot order, while the interval is in sample order."""
    batch = random_batch(1)
    length = SPEC.visual_tokens + SPEC.text_tokens // 2
    segments = np.where(np.arange(SPEC.sequence) < length, 1, 0)[None].astype(np.int32)
    expected = hidden(WHOLE, {**batch, "segments": segments})[0, : SPEC.text_tokens // 2]
    model = Model(WHOLE)
    first = {
        "tokens": batch["tokens"][:, :1],
        "patch_cells": np.zeros((1, 0), np.int32),
        "order": np.zeros((1, 1), np.int32),
        "positions": np.zeros((1, 1), np.int32),
        "segments": np.ones((1, 1), np.int32),
    }
    cache = model(PARAMS, first, jnp.float32, collect=("cache",)).cache.widened(SPEC.sequence + 8)
    second = dict(batch)
    second["order"] = np.roll(batch["order"], -1, axis=1)  # the first token is cached; its slot comes last, empty
    second["positions"] = np.arange(1, SPEC.sequence + 1, dtype=np.int32)[None] % SPEC.sequence
    second["segments"] = np.where(np.arange(SPEC.sequence) < length - 1, 1, 0)[None].astype(np.int32)
    found = model(PARAMS, second, jnp.float32, cache=cache).hidden
    np.testing.assert_allclose(found[0, 1 : SPEC.text_tokens // 2], expected[1:], atol=2e-4)


def test_pairs_of_images_are_counted():
    visual = SPEC.visual_tokens
    batch = random_batch(3)
    assert count_tokens(batch)["image_pairs"] == 3 * visual * (visual - 1) // 2
    slots = make_slots(WHOLE, batch, visual)
    real = batch["segments"] > 0
    seen = np.asarray(slots.intervals.last - slots.intervals.first + 1)[real].sum()
    counts = count_tokens(batch)
    assert seen == counts["pairs"] + counts["image_pairs"]


def test_the_switch_is_stored_only_where_it_is_on(tmp_path: Path):
    for config, stored in ((CAUSAL, False), (WHOLE, True)):
        folder = tmp_path / str(stored)
        save_model(folder, config, PARAMS)
        model = json.loads((folder / "model.json").read_text())["model"]
        assert ("bidirectional_images" in model) == stored
        assert load_model(folder)[0] == config


def test_it_has_no_published_layout():
    with pytest.raises(ConfigError, match="bidirectional_images has no published layout"):
        config_to_hf(WHOLE)
