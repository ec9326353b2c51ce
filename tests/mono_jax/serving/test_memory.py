"""Requests and results as single arrays of integers: every value arrives as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.generation.options import Sampling
from mono_jax.generation.sampling import make_request
from mono_jax.models.presets import preset
from mono_jax.serving.memory import TOKENS_PER_TABLE, Chosen, logprobs_of, packed_request, unpacked_requests

OPTIONS = (
    Sampling(),
    Sampling(max_new_tokens=7, temperature=0.3, top_k=5, top_p=0.1, seed=2**32 - 1, logprobs=3),
    Sampling(seed=-1, repetition_penalty=1.3, presence_penalty=-0.7, frequency_penalty=-2.0, logprobs=0),
    Sampling(stop_tokens=tuple(range(TOKENS_PER_TABLE - 1)), banned_tokens=(9, 8, 7)),
)


@pytest.mark.parametrize("name", ["tiny_mono", "tiny_lm"])
def test_packed_requests_are_the_requests(name: str):
    config = preset(name)
    packed = np.stack([packed_request(config, sampling) for sampling in OPTIONS])
    wants_logprobs, found = jax.jit(unpacked_requests)(packed)
    assert wants_logprobs.tolist() == [False, True, True, False]
    expected = make_request(config, OPTIONS, len(OPTIONS), TOKENS_PER_TABLE)
    for field, of_found, of_expected in zip(expected._fields, found, expected):
        assert of_found.dtype == of_expected.dtype, field
        np.testing.assert_array_equal(of_found, of_expected, err_msg=field)


@pytest.mark.parametrize("vocabulary", [7, 300])
@pytest.mark.parametrize("has_logprobs", [False, True])
def test_packed_results_are_the_results(vocabulary: int, has_logprobs: bool):
    logits = jax.random.normal(jax.random.key(0), (5, vocabulary)).at[2, 1].set(jnp.nan).at[3].set(-jnp.inf)
    token = jnp.asarray([0, 6, 1, 2**31 - 1, 5], jnp.int32)
    logprobs = logprobs_of(logits, token % vocabulary) if has_logprobs else None
    expected = Chosen(token, jnp.arange(5) % 2 == 0, jnp.arange(5) > 2, logprobs)
    found = Chosen.of(np.asarray(jax.jit(Chosen.packed)(expected)))
    assert (found.logprobs is not None) == has_logprobs
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(expected), found)
    if has_logprobs:
        assert [array.dtype for array in found.logprobs] == [array.dtype for array in logprobs]
