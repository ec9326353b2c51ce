"""The one function of packed attention: orders, meshes, the choice of an implementation and its refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.attention import api
from pallas_kernels.attention.api import SequenceOrder, attend
from pallas_kernels.attention.backends.splash import Splash
from pallas_kernels.attention.backends.xla import Xla, XlaChunked
from pallas_kernels.attention.backends.xla_blocked import XlaBlocked
from pallas_kernels.attention.contract import Implementation, Intervals, Problem
from pallas_kernels.attention.order import permute
from pallas_kernels.checks.attention import TOLERANCE, AttentionCase, oracle_attention
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.devices import targeting
from pallas_kernels.errors import Unavailable


def shuffled(case: AttentionCase) -> tuple[tuple, Intervals, SequenceOrder, jax.Array]:
    """The case's arrays with the slots of each row in an order of their own."""
    qkv, intervals, dy, _ = case.inputs()
    rng = np.random.default_rng(3)
    inverse = np.stack([rng.permutation(case.length) for _ in range(len(dy))])
    order = np.argsort(inverse, axis=1)
    sequence = SequenceOrder(jnp.asarray(order), jnp.asarray(inverse))
    return tuple(in_slots(a, sequence) for a in qkv), intervals, sequence, in_slots(dy, sequence)


def in_slots(x: jax.Array, sequence: SequenceOrder) -> jax.Array:
    return permute(x, sequence.inverse, sequence.order)


def errors_in_slots(case: AttentionCase, implementation: Implementation | str, **options) -> list[float]:
    qkv, intervals, sequence, dy = shuffled(case)

    @jax.jit
    def run(qkv, intervals, sequence, dy):
        def mixed(*qkv):
            return attend(*qkv, intervals, sequence, implementation=implementation, causal=True, **options)

        y, backward = jax.vjp(mixed, *qkv)
        return y, *backward(dy)

    straight, _, dy_straight, there = case.inputs()
    y, gradients = oracle_attention(*straight, intervals, dy_straight)
    found = [np.asarray(permute(a, sequence.order, sequence.inverse)) for a in run(qkv, intervals, sequence, dy)]
    there = np.asarray(there)[..., None, None]
    found[0], y = np.where(there, found[0], 0), np.where(there, y, 0)
    return [relative_error(a, e) for a, e in zip(found, (y, *gradients))]


@pytest.mark.parametrize(
    "implementation", [Xla(), XlaChunked(48), XlaBlocked(32, 48), Splash(interpret=True)], ids=lambda i: i.name
)
def test_slots_in_an_order_of_their_own(implementation: Implementation):
    assert max(errors_in_slots(AttentionCase(), implementation)) < TOLERANCE["float32"]


def test_kernels_split_rows_and_heads_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        options = {"rows": ("data", "fsdp"), "heads": "tensor"}
        found = errors_in_slots(AttentionCase(heads=2, kv_heads=2), Splash(interpret=True), **options)
    assert max(found) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        (Xla(), {}),
        (XlaBlocked(32, 48), {}),
        (Xla(), {"ulysses": True}),
        (Splash(interpret=True), {"ulysses": True}),
    ],
    ids=lambda value: "ulysses" if value else getattr(value, "name", "gathered"),
)
def test_devices_that_share_rows_compute_what_one_does(implementation: Implementation, options: dict):
    """One form for slots in any order, one that wants them in sequence order; outputs and all gradients.

    Devices that exchange heads have whole rows, so that forms for causal rows serve them too.
    """
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "context", "tensor"))
    case = AttentionCase(heads=8, kv_heads=4) if options else AttentionCase()
    with jax.set_mesh(mesh):
        options |= {"rows": ("data", "fsdp"), "heads": "tensor", "context": "context"}
        found = errors_in_slots(case, implementation, **options)
    assert max(found) < TOLERANCE["float32"]


def test_heads_that_devices_cannot_exchange_are_refused():
    with jax.set_mesh(Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "context"))):
        options = {"rows": ("data", "fsdp"), "context": "context", "ulysses": True}
        with pytest.raises(Unavailable, match="2 KV heads cannot be split equally among 4 devices"):
            errors_in_slots(AttentionCase(), Xla(), **options)


def test_permutation_and_its_transpose_are_gathers():
    _, _, (order, inverse), dy = shuffled(AttentionCase())
    y, backward = jax.vjp(lambda x: permute(x, order, inverse), dy)
    np.testing.assert_array_equal(permute(y, inverse, order), dy)
    np.testing.assert_array_equal(backward(dy)[0], permute(dy, inverse, order))


def problem(device: str, queries: int, **changes) -> Problem:
    sizes = {"keys": queries, "heads": 16, "kv_heads": 8, "dim": 128, "dtype": "bfloat16"} | changes
    return Problem(1, queries, device=device, **sizes)


@pytest.mark.parametrize(
    ("device", "queries", "changes", "chosen"),
    [
        ("cpu", 256, {}, "xla"),
        ("cpu", 257, {}, "xla_blocked"),
        ("cpu", 2048, {"in_order": False}, "xla"),
        ("cpu", 2049, {"in_order": False}, "xla_chunked"),
        ("cpu", 1, {"keys": 9000, "in_order": False}, "xla"),
        ("tpu_v5e", 256, {}, "pallas_tpu"),
        ("tpu_v5e", 200, {}, "xla"),
        ("tpu_v6e", 200, {}, "xla"),
        ("tpu_v5e", 256, {"in_order": False}, "xla"),
        ("tpu_v5e", 4096, {"causal": False, "in_order": False}, "xla_chunked"),
        ("nvidia_h200", 200, {}, "mosaic_gpu"),
        ("nvidia_h100_80gb_hbm3", 16_384, {"causal": False, "keys": 32_768, "dim": 80}, "mosaic_gpu"),
        ("nvidia_h200", 4096, {"dim": 192}, "xla_blocked"),
        ("nvidia_h200", 200, {"dtype": "float32"}, "xla"),
        ("nvidia_h200", 4096, {"dtype": "float32"}, "xla_blocked"),
        ("nvidia_h200", 4096, {"dim": 20, "causal": False}, "mosaic_gpu"),
        ("nvidia_h200", 4096, {"in_order": False}, "xla_chunked"),
        ("nvidia_b200", 4096, {}, "cudnn"),
        ("nvidia_b200", 4096, {"causal": False}, "xla_blocked"),
        ("nvidia_a100_sxm4_40gb", 4096, {}, "xla_blocked"),
        ("tesla_t4", 4096, {}, "xla_blocked"),
        ("amd_instinct_mi300x", 4096, {}, "xla_blocked"),
    ],
)
def test_the_choice_follows_the_device(device: str, queries: int, changes: dict, chosen: str):
    assert api.choose(problem(device, queries, **changes)).name == f"attention/{chosen}"


def test_the_device_is_the_one_that_is_traced_for():
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    with targeting("tpu_v5e"):
        assert api.describe(shape, shape, causal=True).device == "tpu_v5e"
    assert api.describe(shape, shape, causal=True).device == "cpu"


def test_a_device_that_shares_rows_asks_for_its_own_queries_of_all_keys():
    """The last of them is not the row's last key: kernels for causal rows would see too much or too little."""
    query, key = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    asked = api.describe(query, key, causal=True, ways=2)
    assert (asked.queries, asked.keys, asked.causal) == (128, 256, False)


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("splash", problem("tpu_v5e", 96), "a multiple of 128 slots, got 96: change V or T"),
        ("splash", problem("cpu", 256), "needs a TPU, this is cpu"),
        ("splash", problem("tpu_v5e", 256, causal=False), "only causal rows"),
        ("splash", problem("tpu_v5e", 256, in_order=False), "not in sequence order"),
        ("splash", problem("tpu_v5e", 256, keys=512), "as many queries as keys, not 256 and 512"),
        ("cudnn", problem("nvidia_a100", 256), "need a Hopper or later GPU, not nvidia_a100"),
        ("cudnn", problem("nvidia_h200", 256, causal=False), "only causal rows"),
        ("cudnn", problem("nvidia_h200", 256, dtype="float32"), "needs bfloat16, not float32"),
        ("cudnn", problem("nvidia_h200", 256, dim=20), "a multiple of 8 up to 128, not 20"),
        ("cudnn_masked", problem("tpu_v5e", 256), "needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_serve_says_why(name: str, asked: Problem, reason: str):
    with pytest.raises(Unavailable, match=reason):
        api.choose(asked, name)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no implementation 'attention/flash'"):
        api.choose(problem("cpu", 8), "flash")
