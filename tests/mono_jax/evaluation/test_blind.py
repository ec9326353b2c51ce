"""Images replaced: only the pixels change, to those of a wrong image or noise."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.batch import boundaries, ragged
from mono_jax.evaluation.blind import Blindness, blinded
from tests.mono_jax.evaluation.test_heldout import mixed_batch


def images(batch: dict[str, np.ndarray], row: int) -> dict[int, list[int]]:
    """{sample: its visual slots in reading order}."""
    found: dict[int, list[int]] = {}
    for slot, sample in zip(batch["order"][row], batch["segments"][row]):
        if sample and slot < boundaries(batch)[row]:
            found.setdefault(int(sample), []).append(int(slot))
    return found


@pytest.mark.parametrize("boundary", ["static", "ragged"])
@pytest.mark.parametrize("blindness", ["noise", "other"])
def test_only_pixels_of_images_change(blindness: Blindness, boundary: str):
    for seed in range(5):
        batch = mixed_batch(3, seed) if boundary == "static" else ragged(mixed_batch(3, seed), 32, 8)
        before = batch["patches"].copy()
        changed = blinded(batch, blindness)
        np.testing.assert_array_equal(batch["patches"], before)
        assert all(changed[key] is batch[key] for key in batch if key != "patches")
        for row in range(3):
            used = [slot for slots in images(batch, row).values() for slot in slots]
            unused = np.setdiff1d(np.arange(before.shape[1]), used)
            np.testing.assert_array_equal(changed["patches"][row, unused], before[row, unused])
            differs = (changed["patches"][row, used] != before[row, used]).any(axis=(1, 2, 3))
            assert differs.all(), "an image shows through"


def test_each_sample_gets_the_next_one_s_image():
    batch = mixed_batch(3, 1)
    changed = blinded(batch, "other")["patches"]
    for row in range(3):
        samples = list(images(batch, row).values())
        assert len(samples) > 1, "the case is not there"
        for own, others in zip(samples, samples[1:] + samples[:1]):
            for n, slot in enumerate(own):
                np.testing.assert_array_equal(changed[row, slot], batch["patches"][row, others[n % len(others)]])


def test_the_only_image_of_a_row_becomes_noise_and_no_image_stays_none():
    batch = mixed_batch(3, 1)
    visual = batch["order"] < boundaries(batch)[:, None]
    batch["segments"][0] = np.where(visual[0], 1, batch["segments"][0])
    batch["segments"][1] = np.where(visual[1], 0, batch["segments"][1])
    other, noise = (blinded(batch, kind)["patches"] for kind in ("other", "noise"))
    np.testing.assert_array_equal(other[0], noise[0])
    np.testing.assert_array_equal(other[1], batch["patches"][1])


def test_a_row_is_changed_the_same_wherever_it_is_made():
    batch = mixed_batch(3, 1)
    last = {key: value[2:] for key, value in batch.items()}
    for blindness in ("noise", "other"):
        np.testing.assert_array_equal(blinded(last, blindness)["patches"][0], blinded(batch, blindness)["patches"][2])
