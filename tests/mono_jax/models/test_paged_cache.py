"""A paged cache is a cache: rows of any lengths, in pages anywhere, read what a contiguous one holds."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.generation.prompts import Prompt, check_prompt, pack
from mono_jax.models.execution import Execution
from mono_jax.models.paged_cache import PagedCache
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from tests.mono_jax.generation.test_decode import prompt
from tests.mono_jax.helpers import random_params

PAGE = 8


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        ("xla_blocked", {"bidirectional_images": True}),
        ("auto", {"sliding_window": 9, "sliding_layers": (1,)}),
    ],
    ids=str,
)
def test_chunks_over_pages_equal_the_whole_prompt(attention: Any, changes: dict[str, Any]) -> None:
    """Two rows, read in two chunks cut at different places; pages hold NaN where nothing was written."""
    config = preset("tiny_mono", **changes)
    model = Model(config, Execution(attention=attention))
    params = random_params(config)
    prompts = [
        check_prompt(config, prompt(pattern, seed), "") for seed, pattern in enumerate(("ttItttt", "tttIttIttt"))
    ]
    lengths = np.array([len(p.input_ids) for p in prompts])
    whole, _ = pack(config, prompts, np.zeros(2, np.int64), 2)
    expected = model(params, whole, jnp.float32).hidden

    pages = np.random.default_rng(0).permutation(np.arange(1, 17)).reshape(2, 8).astype(np.int32)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    keys = jnp.full((layers, 17, PAGE, heads, config.head_dim), jnp.nan)
    values = jnp.zeros(keys.shape)
    hidden: list[list[jax.Array]] = [[], []]
    cuts = [np.zeros(2, int), np.array([18, 20]), lengths]  # between images
    for start, stop in itertools.pairwise(cuts):
        parts = []
        for p, a, b in zip(prompts, start, stop):
            visual = np.cumsum(np.concatenate([[0], p.input_ids == config.image_token_id]))
            cells = slice(visual[a], visual[b])
            parts.append(Prompt(p.input_ids[a:b], p.patches[cells], p.patch_cells[cells]))
        batch, _ = pack(config, parts, start, 2)
        batch["lengths"] = np.broadcast_to(lengths[:, None], batch["lengths"].shape)
        output = model(params, batch, jnp.float32, cache=PagedCache.of_rows(keys, values, jnp.asarray(pages)))
        keys, values = output.cache.keys, output.cache.values
        for row, part in enumerate(parts):
            hidden[row].append(output.hidden[row, : len(part.input_ids) - len(part.patches)])
    for row in range(2):
        got = jnp.concatenate(hidden[row])
        np.testing.assert_allclose(got, expected[row, : len(got)], atol=2e-5)
    assert not jnp.isnan(keys[:, pages[0, : lengths[0] // PAGE]]).any()
