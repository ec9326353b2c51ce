"""Log-likelihoods are those of the public release's logits, whatever the batch; greedy flags; rejected inputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mono_jax.errors import GenerationError
from mono_jax.evaluation.language.likelihood import Likelihoods
from mono_jax.generation.decode import Generator
from mono_jax.parallel.specs import param_shardings
from mono_jax.weights.hf_config import read_config
from mono_jax.weights.readers import load_params
from tests.mono_jax.training.test_meshes import mesh_of

GOLDEN = Path(__file__).parents[3] / "golden/mono_tiny"


@cache
def model() -> tuple[Any, Any]:
    config = read_config(GOLDEN, image_token_id=100)
    return config, load_params(GOLDEN, config, jnp.float32)


def golden_pairs() -> tuple[list[tuple[list[int], list[int]]], list[tuple[float, bool]]]:
    """Every cut of two texts into context and continuation, unchanged and with the likeliest last token.

    Expected: in float64 from the logits that PyTorch gave.
    """
    case = load_file(GOLDEN / "text_only.safetensors")
    pairs, expected = [], []
    for ids, logits, mask in zip(case["input_ids"], case["logits"].astype(np.float64), case["attention_mask"]):
        ids = ids[mask.astype(bool)]
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        likeliest = logits.argmax(axis=-1)
        for last in (ids[-1], likeliest[len(ids) - 2]):
            text = [*ids[:-1].tolist(), int(last)]
            for cut in range(1, len(text)):
                places = np.arange(cut, len(text))
                value = logs[places - 1, np.array(text)[places]].sum()
                pairs.append((text[:cut], text[cut:]))
                expected.append((float(value), bool((likeliest[places - 1] == np.array(text)[places]).all())))
    return pairs, expected


@pytest.mark.parametrize(("axes", "batch_size"), [(None, 5), ((1, 4, 2), 6)], ids=str)
def test_log_likelihoods_are_those_of_the_public_release(axes: tuple[int, ...] | None, batch_size: int):
    config, params = model()
    mesh = None if axes is None else mesh_of(*axes)
    params = params if mesh is None else jax.device_put(params, param_shardings(config, params, mesh))
    pairs, expected = golden_pairs()
    found = Likelihoods(Generator(config, params, jnp.float32, mesh=mesh), 64, batch_size)(pairs)
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert 1 < sum(greedy for _, greedy in found) < len(found)


def test_padding_and_parts_change_nothing():
    """A continuation longer than one chunk of the logits, in a batch with a short one, and by itself."""
    config, params = model()
    rng = np.random.default_rng(0)
    long, short = rng.integers(1, 90, 150).tolist(), rng.integers(1, 90, 9).tolist()
    pairs = [(long[:20], long[20:]), (short[:8], short[8:])]
    likelihoods = Likelihoods(Generator(config, params, jnp.float32), 256, 2)
    together = likelihoods(pairs)
    for pair, (value, _) in zip(pairs, together):
        assert likelihoods([pair])[0][0] == pytest.approx(value, abs=1e-4)
    one_by_one = [likelihoods([(long[:cut], [long[cut]])])[0][0] for cut in range(144, 150)]
    assert sum(one_by_one) == pytest.approx(likelihoods([(long[:144], long[144:])])[0][0], abs=1e-4)


def test_what_is_too_long_loses_its_beginning():
    config, params = model()
    likelihoods = Likelihoods(Generator(config, params, jnp.float32), 12, 2)
    context, continuation = list(range(1, 31)), [7, 8, 9]
    [(found, _)] = likelihoods([(context, continuation)])
    assert found == pytest.approx(likelihoods([(context[-10:], continuation)])[0][0], abs=1e-6)
    assert found != pytest.approx(likelihoods([(context[-9:], continuation)])[0][0], abs=1e-6)
    for bad in (([], [1]), ([1], []), ([1], [2] * 13), ([1], [10_000]), ([-1], [2])):
        with pytest.raises(GenerationError, match="pair 1"):
            likelihoods([([1], [2]), bad])
