"""Every kind of model in the engine, in float32 and bfloat16, on one device and on a mesh: answers are Generator's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.errors import ConfigError
from mono_jax.generation.decode import Generation, Generator
from mono_jax.generation.sampling import Occurrences, choose, make_request, penalised
from mono_jax.models.architecture import Architecture, RopeScaling
from mono_jax.models.presets import preset
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.serving.contract import Request
from mono_jax.serving.engine import Engine
from mono_jax.weights.families.table import FAMILIES
from tests.mono_jax.helpers import random_params
from tests.mono_jax.serving.served import CONFIG, REQUESTS, Client, Letters, check_all, random_requests, run, served

WINDOW = {"sliding_window": 20, "sliding_layers": (0,)}
LLAMA3 = RopeScaling("llama3", 4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
# Changes by preset. The families' models have the vision part and both kinds of experts of Mono-InternVL-1.5.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm2": ("tiny_mono_1_5", {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 48}),
    "ffn_experts": ("tiny_mono", {}),
    "modular": ("tiny_modular", {}),
    "text": ("tiny_lm", {}),
    "images_seen_whole": ("tiny_mono", {"bidirectional_images": True}),
    "native": ("tiny_mono", {}),
    "llama": ("tiny_mono_1_5", {"family": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("tiny_mono_1_5", {"family": "mistral", "sliding_window": 20, "sliding_layers": (0, 1)}),
    "qwen2": ("tiny_mono_1_5", {"family": "qwen2"}),
    "qwen3": ("tiny_mono_1_5", {"family": "qwen3", "head_size": 24}),
    "gemma3": (
        "tiny_mono_1_5",
        {"family": "gemma3", "head_size": 8, "query_pre_attn_scalar": 16.0, "rope_local_theta": 1e4} | WINDOW,
    ),
}
GRIDS = ((5, 3), (2, 7), (4, 4))  # of images in native resolution
# Logits of a bfloat16 model, of which the largest are about 20 here, when sums are rounded in another order: other
# batches, chunks and caches. 8 bits of mantissa are steps of 2**-4 at 16.
BOUND = 0.5
CASES = [
    *((name, 1, "float32") for name in MODELS if name != "internlm2"),  # which test_engine.py serves
    *(("internlm2", devices, "float32") for devices in (2, 4)),  # two heads of keys: four devices share them unevenly
    *((name, 2, "float32") for name in ("native", "modular", "gemma3")),
    *((name, 4, "float32") for name in ("llama", "qwen3")),
    *(("internlm2", devices, "bfloat16") for devices in (1, 2, 4)),
    *((name, 1, "bfloat16") for name in ("ffn_experts", "native", "gemma3")),
    *((name, 2, "bfloat16") for name in ("modular", "qwen3")),
]


def model(name: str) -> Architecture:
    base, changes = MODELS[name]
    config = preset(base, **(changes | dict(FAMILIES[changes.get("family", "internlm2")].parts)))
    return config.replace(vision=dataclasses.replace(config.vision, native=True)) if name == "native" else config


def mesh_of(devices: int) -> Any:
    return None if devices == 1 else make_mesh(MeshConfig(data=1, fsdp=1, tensor=devices), jax.devices()[:devices])


FAST = ("internlm2", 2, "float32"), ("internlm2", 1, "bfloat16")


@pytest.mark.parametrize(
    ("name", "devices", "dtype"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_answers_are_those_of_generator(name: str, devices: int, dtype: str) -> None:
    """On the same mesh, in the same dtype; in bfloat16 until two tokens are nearly tied."""
    config = model(name)
    requests = random_requests(REQUESTS, 1, 0 if config.vision is None else 3, GRIDS if name == "native" else ())
    if dtype == "bfloat16":  # answers as long as they may be, which can be compared token by token
        requests = [
            dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, stop=(), stop_tokens=())) for r in requests
        ]
    tested = served(config, jnp.dtype(dtype), mesh_of(devices), requests)
    clients, _ = run(tested, seed=5, cancels=0.01)
    if dtype == "float32":
        check_all(tested, clients)
    else:
        pairs = zip(clients, tested.expected)
        equal = sum(agrees(config, client, expected) for client, expected in pairs)
        assert equal > REQUESTS / 2  # near ties are rare
    if devices == 2:  # as many as heads of keys
        assert not tested.programs._memory.keys.sharding.is_fully_replicated


def agrees(config: Architecture, client: Client, expected: Generation) -> bool:
    """Whether the answers are equal; AssertionError if they differ at a token that is not a near tie."""
    ours, theirs = client.tokens, expected.tokens
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    for one, token, logits in zip(client.logprobs[:same], ours, expected.logits):
        assert abs(one.logprob - (logits - np.logaddexp.reduce(logits))[token]) < BOUND
    if same < len(ours):
        assert is_near(config, client.request, expected, same, ours[same]), (same, ours, theirs)
        return False
    assert client.finish == "cancelled" or len(ours) == len(theirs)
    return True


def is_near(config: Architecture, request: Request, expected: Generation, place: int, token: int) -> bool:
    """Whether Generator would have chosen ``token`` at ``place`` had two of its logits been off by ``BOUND``."""
    logits = expected.logits[place].copy()
    logits[token] += BOUND
    logits[expected.tokens[place]] -= BOUND
    context, answer = np.zeros((1, config.vocab_size), bool), np.zeros((1, config.vocab_size), np.int32)
    context[0, request.prompt.input_ids] = True
    np.add.at(answer[0], expected.tokens[:place], 1)
    of_row = make_request(config, [request.sampling], 1)
    wanted = penalised(jnp.asarray(logits[None]), of_row, Occurrences(context, answer))
    position = np.array([len(request.prompt.input_ids) + place], np.int32)
    draws = request.sampling.temperature > 0
    return int(choose(wanted, position, of_row, draws=draws, filters=draws)[0]) == token


def test_rows_are_not_split() -> None:
    config = preset("tiny_lm")
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    with pytest.raises(ConfigError, match="not rows"):
        Engine(Generator(config, random_params(config), mesh=mesh), Letters(), CONFIG)
