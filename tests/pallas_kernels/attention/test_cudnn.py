"""cuDNN's kernels: on a GPU where there is one; how packed rows are handed to them everywhere, with a stand-in."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.backends import cudnn
from pallas_kernels.attention.backends.cudnn import Cudnn, CudnnMasked, samples_of
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.checks.attention import TOLERANCE, AttentionCase, oracle_attention
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.errors import Unavailable
from tests.pallas_kernels.attention.suite import Conformance, run
from tests.pallas_kernels.attention.test_api import problem


class TestCudnn(Conformance):
    implementation_class = Cudnn
    dtypes = ("bfloat16",)
    takes_images = False
    takes_parts = False


class TestCudnnMasked(Conformance):
    implementation_class = CudnnMasked
    dtypes = ("bfloat16",)


@pytest.mark.parametrize("samples", [12, 3])
def test_samples(samples: int):
    """Neighbours of one token are one sample: here 1 and the empty slots, not the last one behind a longer one."""
    #                    0  1  2  3  4  5  6  7  8  9 10
    segments = np.array([1, 2, 2, 2, 3, 3, 0, 0, 0, 4, 4])
    first = packed_intervals(jnp.asarray(np.stack([segments, segments * 0 + 1]), jnp.int32)).first
    count, starts, lengths = (np.asarray(a) for a in samples_of(first, samples))
    assert count.tolist() == [5, 1]

    def filled(values: list[int], size: int) -> list[int]:
        return (values + [-1] * size)[:size]

    for row, (expected_starts, expected_lengths) in enumerate([([0, 1, 4, 6, 9], [1, 3, 2, 3, 2]), ([0], [11])]):
        assert starts[row].tolist() == [*filled(expected_starts, samples), -1]
        assert lengths[row].tolist() == filled(expected_lengths, samples)


# ======================================================================================================================
# A stand-in that takes what cuDNN takes
# ======================================================================================================================


def thd_attention(query, key, value, lengths, starts, scale):
    """Causal attention of packed samples, NaN in slots of none; lengths and starts as jax's docstring has them."""
    assert query.shape == key.shape == value.shape
    index = jnp.arange(query.shape[1])
    starts, ends = starts[:, :-1], starts[:, :-1] + lengths
    inside = (starts[..., None] <= index) & (index < ends[..., None]) & (lengths > 0)[..., None]  # [B, samples, S]
    seen = jnp.any(inside[..., :, None] & inside[..., None, :], axis=1) & (index[None, :] <= index[:, None])
    scores = jnp.where(seen[:, None], jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def stand_in() -> SimpleNamespace:
    """cuDNN's two functions in XLA; the backward pass believes what the forward pass kept."""

    def forward(query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *pages, is_training, **settings):
        assert is_training and settings["mask_type"] == "packed"
        output = thd_attention(query, key, value, q_seqlen, q_offsets, settings["scale"])
        batch, slots, heads, _ = query.shape
        return [output, jnp.full((batch * q_seqlen.shape[1], heads, slots), 7.0)]

    def backward(query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *rest, **settings):
        *_, statistics, output, d_output = rest
        assert statistics.shape[0] == query.shape[0] * q_seqlen.shape[1] and output.shape == query.shape
        attention = lambda *qkv: thd_attention(*qkv, kv_seqlen, kv_offsets, settings["scale"])  # noqa: E731
        return list(jax.vjp(attention, query, key, value)[1](d_output))

    return SimpleNamespace(
        _dot_product_attention_fwd_impl=forward,
        _dot_product_attention_bwd_impl=backward,
        MaskType=SimpleNamespace(PADDING_CAUSAL="packed"),
        AttentionLayout=SimpleNamespace(BTNH=SimpleNamespace(value=0)),
    )


@pytest.mark.parametrize("layout", ["padding", "many_tiny_samples", "an_empty_row"])
@pytest.mark.parametrize(("samples", "kv_heads"), [(64, 2), (2, 1)])
def test_what_is_handed_to_cudnn(layout: str, samples: int, kv_heads: int, monkeypatch):
    """With 2 samples at most, some rows have more and are computed without cuDNN."""
    monkeypatch.setattr(cudnn, "_library", stand_in)
    qkv, intervals, dy, there = AttentionCase(layout, 96, kv_heads=kv_heads).inputs()
    y, *gradients = run(Cudnn(samples), qkv, intervals, dy)
    expected, expected_gradients = oracle_attention(*qkv, intervals, dy)
    assert jnp.isfinite(y).all()
    there = np.asarray(there)[..., None, None]
    assert relative_error(jnp.where(there, y, 0), np.where(there, expected, 0)) < TOLERANCE["float32"]
    for found, value in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found, value) < TOLERANCE["float32"]


def test_samples_of_one_token_that_are_neighbours(monkeypatch):
    """cuDNN is handed them as one sample, but each of them sees itself alone."""
    monkeypatch.setattr(cudnn, "_library", stand_in)
    qkv, _, dy, _ = AttentionCase("one_sample", 32).inputs()
    lengths = [1, 1, 1, 6, 1, 7, 1, 1, 13]
    intervals = packed_intervals(jnp.asarray(np.repeat(np.arange(1, 10), lengths)[None], jnp.int32))
    expected, expected_gradients = oracle_attention(*qkv, intervals, dy)
    for found, value in zip(run(Cudnn(8), qkv, intervals, dy), (expected, *expected_gradients), strict=True):
        assert relative_error(found, value) < TOLERANCE["float32"]


def test_the_private_functions_are_those_that_were_checked(monkeypatch):
    asked = problem("nvidia_h200", 256)
    assert Cudnn().unsupported(asked) is None

    def changed(query, key):
        """Another signature."""

    monkeypatch.setattr(cudnn._library(), "_dot_product_attention_bwd_impl", changed)
    cudnn._missing.cache_clear()
    with pytest.raises(Unavailable, match=r"private _dot_product_attention_bwd_impl differs from that of jax 0\.10"):
        api.choose(asked, "cudnn")
    monkeypatch.undo()
    cudnn._missing.cache_clear()
    assert Cudnn().unsupported(asked) is None


def test_the_masked_form_is_not_silent(caplog, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, *_, **options: query)
    qkv, intervals, _, _ = AttentionCase().inputs()
    with caplog.at_level(logging.WARNING):
        CudnnMasked()(*qkv, Intervals(*intervals[:2]))
    assert "a mask (2, 1, 128, 128) in memory" in caplog.text
