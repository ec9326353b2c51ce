"""Compares our transformer on a Hugging Face folder with the results of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.weights import readers
from mono_jax.weights.hf_config import read_config
from mono_jax.weights.writers import named_tensors

TOLERANCE = 2e-4


def packed(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of ``tokens`` [N, T] as the samples of one packed row."""
    count, length = tokens.shape
    return {
        "tokens": tokens.reshape(1, -1),
        "order": np.arange(count * length, dtype=np.int32)[None],
        "positions": np.tile(np.arange(length, dtype=np.int32), count)[None],
        "segments": np.repeat(np.arange(1, count + 1, dtype=np.int32), length)[None],
    }


def computed(config: Architecture, params: Mapping, tokens: np.ndarray, **execution) -> dict[str, np.ndarray]:
    """Logits, hidden states and gradients by checkpoint name, as ``tests.reference.make_families`` says."""
    model = Model(config, **execution)
    rows, length = tokens.shape

    def loss(params: Mapping) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        output = model(params, packed(tokens), jnp.float32, collect=("hidden",))
        logits = model.logits(params, output.hidden).reshape(rows, length, -1)
        hidden = output.collected["hidden"].reshape(-1, rows, length, config.hidden_size)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -chosen.mean(), (logits, hidden)

    (_, (logits, hidden)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    named = named_tensors(config, jax.device_get(gradients))
    found = {"logits": np.asarray(logits), "hidden": np.asarray(hidden)}
    return found | {f"gradients/{name}": values for name, values in named.items()}


def assert_equal(folder: Path, expected: Mapping[str, np.ndarray]) -> None:
    """The model in ``folder`` computes what is ``expected`` and continues with the same tokens."""
    config = read_config(folder)
    params = readers.load_params(folder, config)
    found = computed(config, params, expected["tokens"])
    assert found.keys() == expected.keys() - {"tokens", "greedy"}
    for name, values in found.items():
        wanted = expected[name]
        assert values.shape == wanted.shape, name
        np.testing.assert_allclose(values, wanted, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    sampling = Sampling(max_new_tokens=len(expected["greedy"]))
    [answer] = Generator(config, params, jnp.float32).generate([Prompt(expected["tokens"][0])], sampling)
    assert list(answer.tokens) == list(expected["greedy"])
