"""Comparison with the base: plain text, the same batches, measured once."""

from __future__ import annotations

from pathlib import Path

from mono_jax.evaluation.heldout import Loss
from mono_jax.evaluation.in_training.retention import Retention

TEXT = Loss({"text": 6.0, "image": 0.0}, {"text": 2.0, "image": 0.0})
WORSE = Loss({"text": 7.0, "image": 0.0}, {"text": 2.0, "image": 0.0})
CAPTIONS = Loss({"text": 1.0, "image": 6.0}, {"text": 1.0, "image": 2.0})
IDENTITIES = {"prose": "a", "captions": "b"}


def test_plain_text_is_compared_with_the_weights_that_the_run_began_with(tmp_path: Path):
    file = tmp_path / "evaluation/base.json"
    retention = Retention(file, None, IDENTITIES)
    assert retention.lost and not retention.values({"prose": TEXT})
    retention.measure_base({"prose": TEXT, "captions": CAPTIONS})
    for known in (retention, Retention(file, None, IDENTITIES)):
        assert known.values({"prose": WORSE, "captions": CAPTIONS}) == {
            "retention/prose/ratio": 3.5 / 3,
            "retention/prose/nats": 0.5,
        }
        assert not known.lost
    assert not Retention(file, None, {"prose": "other batches"}).values({"prose": WORSE})
    assert not Retention(tmp_path / "none.json", None, {}).lost  # random weights have no base


def test_an_earlier_base_counts_where_it_is_of_the_same_batches(tmp_path: Path):
    first, later = tmp_path / "first.json", tmp_path / "later.json"
    Retention(first, None, IDENTITIES).measure_base({"prose": TEXT})
    for identity, nats in (("a", 0.5), ("other batches", 0.0)):
        retention = Retention(later, first, {"prose": identity})
        retention.measure_base({"prose": WORSE})
        assert retention.values({"prose": WORSE})["retention/prose/nats"] == nats
    (tmp_path / "damaged.json").write_text("{")
    retention = Retention(tmp_path / "own.json", tmp_path / "damaged.json", IDENTITIES)
    retention.measure_base({"prose": TEXT})
    assert retention.values({"prose": WORSE})["retention/prose/nats"] == 0.5
