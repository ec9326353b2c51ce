"""Positions of tokens: lengths of samples, angles by slot, and which slots are visual."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import ragged
from mono_jax.models.architecture import RopeScaling
from mono_jax.models.presets import preset
from mono_jax.models.slots import make_slots, sample_lengths
from mono_jax.parallel.mesh import make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.rows import reordered
from tests.mono_jax.helpers import SPEC, random_batch


def packed(*lengths: int, slots: int = 32) -> dict[str, np.ndarray]:
    """A row of text samples of these lengths."""
    batch = {name: np.zeros((1, slots), np.int32) for name in ("positions", "segments")}
    batch["order"] = np.arange(slots, dtype=np.int32)[None]
    start = 0
    for number, length in enumerate(lengths, 1):
        batch["positions"][0, start : start + length] = np.arange(length)
        batch["segments"][0, start : start + length] = number
        start += length
    return batch


def test_the_length_of_a_sample_is_the_number_of_its_tokens():
    batch = packed(1, 8, 3, 9)
    found = np.asarray(sample_lengths(batch["positions"], batch["segments"]))
    real = batch["segments"] > 0
    assert found[real].tolist() == [1] + [8] * 8 + [3] * 3 + [9] * 9
    two = {name: np.concatenate([batch[name], packed(2, 30)[name]]) for name in batch}
    found = np.asarray(sample_lengths(two["positions"], two["segments"]))
    assert found[1].tolist() == [2, 2] + [30] * 30 and found[0, :1].tolist() == [1], "rows do not mix"


def test_packed_samples_turn_as_they_do_alone():
    """With dynamic scaling from length 9 on, a neighbour of 9 tokens does not affect a sample of 8."""
    config = preset("tiny_mono", rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=8)
    row = make_slots(config, packed(8, 9, 12), 0)
    start = 0
    for length in (8, 9, 12):
        alone = make_slots(config, packed(length), 0)
        for name in ("cosines", "sines"):
            np.testing.assert_array_equal(
                getattr(row, name)[0, start : start + length], getattr(alone, name)[0, :length]
            )
        start += length
    plain = make_slots(config.replace(rope_scaling=None), packed(8, 9, 12), 0)
    same = np.isclose(row.cosines[0, :29], plain.cosines[0, :29], atol=1e-6).all(axis=-1)
    assert same[:8].all() and not same[9:17].any() and same[8] and same[17], "position 0 does not turn"


def test_slots_follow_the_order_and_given_lengths_take_precedence():
    config = preset("tiny_mono", rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=8)
    batch = packed(6, 5, slots=16)
    order = np.random.default_rng(0).permutation(16).astype(np.int32)
    mixed = make_slots(config, batch | {"order": order[None]}, 0)
    straight = make_slots(config, batch, 0)
    for name in ("positions", "segments", "cosines", "sines"):
        np.testing.assert_array_equal(getattr(mixed, name)[0, order], getattr(straight, name)[0])
    np.testing.assert_array_equal(mixed.inverse[0, order], np.arange(16))
    longer = make_slots(config, batch | {"lengths": np.full((1, 16), 20, np.int32)}, 0)
    assert not np.allclose(longer.cosines[0, 1:6], straight.cosines[0, 1:6])


def test_visual_slots_come_first():
    batch = random_batch(2)
    static = make_slots(preset("tiny_mono"), batch, SPEC.visual_tokens)
    assert static.is_visual().tolist() == [[True] * 16 + [False] * 16] and not static.all_text
    assert make_slots(preset("tiny_mono"), batch, 0).all_text
    batch["segments"][1, 6:17] = 0  # the second row keeps five visual tokens
    own = make_slots(preset("tiny_mono"), {k: jnp.asarray(v) for k, v in ragged(batch, 32, 8).items()}, 0)
    assert own.is_visual().tolist() == [[True] * 16 + [False] * 16, [True] * 8 + [False] * 24] and not own.all_text


@pytest.mark.parametrize("ways", [2, 4])
def test_tokens_stand_where_they_did_when_devices_share_the_row(ways: int):
    """Position, sample, angles, modality and what a token sees, read in sequence order."""
    scaling = {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 20}
    config, batch = preset("tiny_mono", bidirectional_images=True, **scaling), random_batch(3)
    whole = make_slots(config, batch, SPEC.visual_tokens)
    mesh = make_mesh(MeshConfig(context=ways), jax.devices()[:ways])
    run = jax.jit(on_mesh(lambda b: make_slots(config, b, SPEC.visual_tokens), mesh))
    shared = run(reordered(batch, ways))
    rows = np.arange(3)[:, None]

    def sequence(slots: Any, values: jax.Array) -> np.ndarray:
        return np.broadcast_to(values, (3, *values.shape[1:]))[rows, slots.order]

    for name in ("positions", "segments", "cosines", "sines"):
        expected, found = (sequence(slots, getattr(slots, name)) for slots in (whole, shared))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(sequence(shared, shared.is_visual()), sequence(whole, whole.is_visual()))
    places = np.sort(np.asarray(shared.inverse).reshape(3, ways, -1), axis=2).reshape(3, -1)  # of each part's queries
    for own, all_ in (
        (shared.own.intervals.first, whole.intervals.first),
        (shared.own.intervals.last, whole.intervals.last),
    ):
        np.testing.assert_array_equal(own, np.take_along_axis(np.asarray(all_), places, axis=1))
