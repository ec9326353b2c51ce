"""A paged cache equals a contiguous one for rows of any lengths, in pages anywhere."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.generation.prompts import Prompt, check_prompt, pack
from mono_jax.models.execution import Execution
from mono_jax.models.paged_cache import PagedCache, reads_page_by_page
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from pallas_kernels.devices import targeting
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


@pytest.mark.parametrize("window", [None, 1, 11, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_page_by_page_is_attention_over_all_pages(window: int | None, dtype: Any) -> None:
    """Against float64 over each row's own keys: rows of one token, of full and of part pages, two that share a page.

    Where no row has a token, keys are NaN and values large; one row has no tokens.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([1, PAGE, 3 * PAGE - 1, 0, 2 * PAGE + 3])
    pages = rng.permutation(np.arange(1, 21)).reshape(5, 4)
    pages[4, 0] = pages[2, 0]
    keys, values = np.full((2, 21, PAGE, 2, 4), np.nan), np.full((2, 21, PAGE, 2, 4), 1e6)
    for row, length in enumerate(lengths):
        for place in range(length):
            at = (slice(None), pages[row, place // PAGE], place % PAGE)
            keys[at], values[at] = rng.normal(size=(2, 2, 2, 4))
    keys, values, query = (jnp.asarray(a, dtype) for a in (keys, values, rng.normal(size=(5, 1, 6, 4))))
    positions = jnp.maximum(jnp.asarray(lengths) - 1, 0)[:, None]
    cache = PagedCache.of_rows(
        keys.swapaxes(2, 3), values.swapaxes(2, 3), jnp.asarray(pages, jnp.int32), heads_first=True
    )
    cache = dataclasses.replace(cache, lengths=jnp.asarray(lengths, jnp.int32))
    got = jax.jit(cache.attend)(jnp.int32(1), query, positions, None if window is None else jnp.int32(window))
    assert got.dtype == dtype and jnp.isfinite(got).all()
    for row, length in enumerate(lengths):
        seen = range(max(0, length - (window or length)), length)
        own = [(pages[row, place // PAGE], place % PAGE) for place in seen]
        for head in range(6 if own else 0):
            key, value = (
                np.stack([np.asarray(a, np.float64)[1, p, o, head // 3] for p, o in own]) for a in (keys, values)
            )
            scores = key @ np.asarray(query, np.float64)[row, 0, head] / 2
            weights = np.exp(scores - scores.max())
            expected = weights @ value / weights.sum()
            np.testing.assert_allclose(got[row, 0, head], expected, atol=1e-5 if dtype == jnp.float32 else 3e-2)


def test_pages_with_heads_first_are_written_and_read_alike() -> None:
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.permutation(np.arange(1, 9)).reshape(2, 4), jnp.int32)
    places = jnp.asarray([[0, pages[0, 1] * PAGE + 3], [pages[1, 0] * PAGE, pages[1, 3] * PAGE + PAGE - 1]], jnp.int32)
    keys, values = (jnp.asarray(rng.normal(size=(2, 9, PAGE, 3, 4)), jnp.float32) for _ in range(2))
    new = [jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32) for _ in range(2)]
    read = []
    for first in (False, True):
        laid_out = (a.swapaxes(2, 3) if first else a for a in (keys, values))
        cache = dataclasses.replace(PagedCache.of_rows(*laid_out, pages, heads_first=first), places=places)
        read.append(cache.write(jnp.int32(1), *new).read(jnp.int32(1)))
    for one, other in zip(*read):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(read[0][0][0, PAGE + 3], new[0][0, 1])


def test_one_cpu_reads_page_by_page_and_nobody_else() -> None:
    """If heads come first, as on one CPU, a step does not copy all pages; on meshes and accelerators it does."""
    config = preset("tiny_mono")

    def gathers_all(heads_first: bool) -> bool:
        page = (config.num_key_value_heads, PAGE) if heads_first else (PAGE, config.num_key_value_heads)
        shape = (config.num_hidden_layers, 9, *page, config.head_dim)
        copied = f"2,4,{page[0]},{page[1]},{config.head_dim}]"

        def step(tokens: jax.Array) -> jax.Array:
            empty, pages = jnp.zeros(shape), jnp.ones((2, 4), jnp.int32)
            cache = PagedCache.of_rows(empty, empty, pages, heads_first=heads_first)
            ones = jnp.ones((2, 1), jnp.int32)
            batch = {"tokens": tokens, "order": 0 * ones, "positions": 9 * ones, "segments": ones, "lengths": 10 * ones}
            batch["patch_cells"] = jnp.zeros((2, 0), jnp.int32)
            return Model(config)(random_params(config), batch, jnp.float32, cache=cache).hidden

        return copied in str(jax.make_jaxpr(step)(jnp.ones((2, 1), jnp.int32)))

    assert not gathers_all(heads_first=True)
    assert gathers_all(heads_first=False)
    assert reads_page_by_page()
    with targeting("nvidia_h100"):
        assert not reads_page_by_page()
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    assert not on_mesh(reads_page_by_page, mesh)()
