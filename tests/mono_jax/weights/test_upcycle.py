"""Upcycling: a dense model with visual experts, and its new tokens."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.upcycle import add_tokens, upcycle

SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VISION = VisionConfig(hidden_size=32, image_size=56)


def test_tokens_of_internlm2_follow_the_release():
    """Without a tokenizer: the ids that the public release of Mono-InternVL has."""
    added, vocab_size = add_tokens({}, preset("internlm2_1_8b").vocab_size)
    assert vocab_size == preset("mono_internvl_2b").vocab_size == 92553
    assert [added[token] for token in SPECIAL] == [92543, 92542, 92544, 92545, 92546]
    assert added["</box>"] == 92552


def test_known_tokens_keep_their_ids(golden_dir):
    known = json.loads((golden_dir / "chat" / "added_tokens.json").read_text())
    added, vocab_size = add_tokens(known, 700)
    assert added == known
    assert vocab_size == 700


def test_experts_are_copies_that_share_no_memory():
    config = preset("tiny_lm")
    params = tree.unflatten(
        {path: np.array(leaf) for path, leaf in tree.flatten(Model(config).init(jax.random.key(0))).items()}
    )
    new_config, new = upcycle(config, params, vision=VISION, vocab_size=config.vocab_size + 2)
    assert tree.flatten(new).keys() == tree.flatten(Model(new_config).abstract_params()).keys()
    old, new = tree.flatten(params), tree.flatten(new)
    for name in ("gate", "up", "down"):
        text, visual = old[f"layers/feed_forward/{name}/kernel"], new[f"layers/visual_feed_forward/{name}/kernel"]
        np.testing.assert_array_equal(visual, text)
        assert not np.shares_memory(visual, text)
    np.testing.assert_allclose(new["embed/embedding"][-1], old["embed/embedding"].mean(0), rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_upcycled():
    config = preset("tiny_lm")
    params = Model(config).init(jax.random.key(0))
    with pytest.raises(ConfigError, match="the vocabulary cannot shrink"):
        upcycle(config, params, vision=VISION, vocab_size=config.vocab_size - 1)
    with pytest.raises(ConfigError, match="already has these visual experts"):
        upcycle(preset("tiny_mono_1_5"), params)
