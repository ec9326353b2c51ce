"""Every form of packed attention against the float64 oracle, which takes each sample by itself."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.attention import api
from pallas_kernels.attention.contract import Slots, visible
from pallas_kernels.attention.order import permute
from pallas_kernels.attention.xla import probabilities_and_output
from pallas_kernels.checks.attention import AttentionCase, oracle_attention
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.devices import targeting
from pallas_kernels.errors import Unavailable

TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}
CASES = {
    "padding": AttentionCase(),
    "one_sample": AttentionCase(empty=(0,), samples=1),
    "an_empty_row": AttentionCase(empty=(128, 1)),
    "many_samples": AttentionCase(empty=(5,), samples=40),
    "one_head_each": AttentionCase(heads=2, kv_heads=2),
    "one_kv_head": AttentionCase(heads=4, kv_heads=1),
}


def errors(case: AttentionCase, **options) -> dict[str, float]:
    """Relative errors of the output (of slots that hold tokens) and of the three gradients."""
    qkv, slots, sequence, dy = case.inputs()

    @jax.jit
    def run(qkv, slots, sequence, dy):
        y, backward = jax.vjp(lambda *qkv: api.attend(*qkv, slots, slots, sequence, **options), *qkv)
        return y, backward(dy)

    y, gradients = run(qkv, slots, sequence, dy)
    assert y.dtype == qkv[0].dtype and np.isfinite(np.float32(y)).all()
    expected, expected_gradients = oracle_attention(*qkv, slots, slots, dy)
    there = (slots.segments > 0)[..., None, None]
    found = [relative_error(jnp.where(there, y, 0), expected)]
    found += [relative_error(a, e) for a, e in zip(gradients, expected_gradients)]
    return dict(zip(("y", "dquery", "dkey", "dvalue"), found))


def assert_within(found: dict[str, float], dtype: str = "float32") -> None:
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{"form": "xla"}, {"form": "xla_chunked", "chunk": 48}], ids=lambda o: o["form"])
def test_xla_forms(name: str, options: dict):
    assert_within(errors(CASES[name], **options))


@pytest.mark.parametrize("name", CASES)
def test_splash(name: str):
    """In Pallas's interpreter."""
    assert_within(errors(CASES[name], form="splash"))


@pytest.mark.parametrize("form", ["xla", "xla_chunked", "splash"])
def test_bfloat16(form: str):
    case = AttentionCase(empty=(17,), heads=2, kv_heads=1, dtype="bfloat16")
    assert_within(errors(case, form=form, chunk=32), "bfloat16")


def test_fused_forms_split_rows_and_heads_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        case = AttentionCase(heads=2, kv_heads=2)
        assert_within(errors(case, form="splash", rows=("data", "fsdp"), heads="tensor"))


def test_queries_of_a_cache():
    """Q < K: the last slots of a row ask, as in decoding."""
    (query, key, value), slots, _, dy = AttentionCase().inputs()
    last = Slots(*(a[:, -5:] for a in slots))
    expected, _ = oracle_attention(query[:, -5:], key, value, last, slots, dy[:, -5:])
    for form in ("xla", "xla_chunked", "splash"):  # without a sequence order a fused form is not taken
        y = api.attend(query[:, -5:], key, value, last, slots, form=form, chunk=2)
        assert relative_error(jnp.where((last.segments > 0)[..., None, None], y, 0), expected) < TOLERANCE["float32"]


def test_probabilities():
    (query, key, value), slots, _, _ = AttentionCase().inputs()
    probabilities, output = probabilities_and_output(query, key, value, slots, slots)
    assert probabilities.dtype == jnp.float32 and probabilities.shape == (2, 4, 128, 128)
    there = slots.segments > 0
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    hidden = ~visible(slots, slots) & there[:, :, None]
    assert not np.asarray(probabilities)[np.broadcast_to(hidden[:, None], probabilities.shape)].any()
    np.testing.assert_array_equal(output, api.attend(query, key, value, slots, slots, form="xla"))


def test_permutation_and_its_transpose_are_gathers():
    _, _, (order, inverse), dy = AttentionCase().inputs()
    y, backward = jax.vjp(lambda x: permute(x, order, inverse), dy)
    np.testing.assert_array_equal(permute(y, inverse, order), dy)
    np.testing.assert_array_equal(backward(dy)[0], permute(dy, inverse, order))


@pytest.mark.parametrize(
    ("device", "length", "chosen"),
    [
        ("cpu", 2048, "xla"),
        ("cpu", 2049, "xla_chunked"),
        ("tpu_v5e", 256, "splash"),
        ("tpu_v5e", 200, "xla"),
        ("nvidia_h200", 200, "cudnn"),
    ],
)
def test_auto_follows_the_device(device: str, length: int, chosen: str):
    _, _, sequence, _ = AttentionCase().inputs()
    with targeting(device):
        assert api._choose("auto", length, sequence, 512) == chosen
        assert api._choose("auto", 256, None, 512) == "xla"


def test_splash_says_why_it_cannot_serve():
    run = partial(errors, AttentionCase(length=96), form="splash")
    with pytest.raises(Unavailable, match="a multiple of 128 slots, got 96"):
        run()
