"""Intervals and paired tests against scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from data_pipelines.errors import DataError
from mono_jax.evaluation import intervals
from mono_jax.evaluation.metrics.captions.scores import captions
from mono_jax.evaluation.metrics.metric import Answered, Measure, measure
from mono_jax.evaluation.metrics.yes_no import pope


def of(values: np.ndarray, group: int = 1) -> Measure:
    rows = ((f"u{i // group}", (value, 1)) for i, value in enumerate(values))
    return measure(rows, is_share=values.dtype == bool)


def test_shares_of_right_answers_have_the_exact_interval():
    found = intervals.estimate(of(np.arange(60) < 37))
    # Clopper-Pearson from the quantiles of the beta distribution.
    low, high = stats.beta.ppf(0.025, 37, 24), stats.beta.ppf(0.975, 38, 23)
    assert (found.method, found.n, found.units) == ("exact", 60, 60)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert intervals.estimate(of(np.ones(5, bool))).high == 100


def test_means_are_resampled():
    values = np.random.default_rng(0).random(400)
    found = intervals.estimate(of(values))
    expected = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1)
    assert found.method == "bootstrap" and found.score == pytest.approx(100 * values.mean())
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.4)
    assert found == intervals.estimate(of(values))


def test_questions_of_one_image_are_resampled_together():
    """Four equal answers per image tell no more than one: the interval is twice that of independent answers."""
    right = np.repeat(np.random.default_rng(0).random(300) < 0.5, 4)
    alone, grouped = intervals.estimate(of(right)), intervals.estimate(of(right, group=4))
    assert (grouped.n, grouped.units, grouped.method) == (1200, 300, "bootstrap")
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.1)


def test_strata_keep_their_sizes():
    """If only the strata differ, resampling within them has no variance."""
    strata = {f"u{i}": "a" if i < 3 else "b" for i in range(10)}
    rows = [(f"u{i}", (float(i < 3), 1)) for i in range(10)]
    found = intervals.estimate(measure(rows, lambda sums: 50 * sums[..., 0] / sums[..., 1], strata=strata))
    assert found.low == found.high == pytest.approx(15)


def test_one_unit_has_no_interval():
    assert intervals.estimate(of(np.array([0.5]))).low is None


def test_models_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    first = rng.random(500) < 0.6
    second = np.where(rng.random(500) < 0.1, rng.random(500) < 0.3, first)
    found = intervals.difference(of(first), of(second))
    better, worse = int((first & ~second).sum()), int((~first & second).sum())
    assert (found.better, found.worse, found.units) == (better, worse, 500)
    assert found.p == pytest.approx(min(1, 2 * stats.binom.cdf(min(better, worse), better + worse, 0.5)))
    assert found.difference == pytest.approx(100 * (first.mean() - second.mean()))
    # As wide as the paired standard error implies, far narrower than for two independent samples.
    error = 100 * (first.astype(float) - second).std() / np.sqrt(500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_only_what_both_answered_is_compared_in_any_order():
    first = measure((name, (value, 1)) for name, value in (("a", 1), ("b", 0), ("c", 1)))
    second = measure((name, (value, 1)) for name, value in (("c", 1), ("x", 1), ("a", 0)))
    found = intervals.difference(first, second)
    assert (found.units, found.better, found.worse, found.difference) == (2, 1, 0, 50)
    with pytest.raises(DataError, match="no example in common"):
        intervals.difference(first, measure([("z", (1, 1))]))


def captioned(*answers: str) -> dict[str, Measure]:
    truths = ("a red wall of bricks", "a blue wall of bricks")
    return captions([Answered(str(i), said, (truth,)) for i, (said, truth) in enumerate(zip(answers, truths))])


def test_captions_without_a_match_are_as_bad_as_each_other():
    """The smoothing of BLEU depends only on the length of a caption, so it makes no unit better or worse."""
    short, long = (
        captioned("dogs", "a blue wall of bricks"),
        captioned("many dogs run very fast", "a blue wall of bricks"),
    )
    for score in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"):
        found = intervals.difference(short[score], long[score])
        assert (found.better, found.worse, found.p) == (0, 0, 1)
    found = intervals.difference(long["BLEU-4"], captioned("dogs", "a blue wall")["BLEU-4"])
    assert (found.better, found.worse) == (1, 0)


def test_right_and_wrong_pictures_of_pope_are_counted_whatever_is_right():
    """A right "no" has no F1 by itself, but is better than a wrong "yes"."""

    def asked(*answers: str) -> Measure:
        return pope([Answered(str(i), said, (right,)) for i, (said, right) in enumerate(zip(answers, ("no", "yes")))])[
            "f1"
        ]

    found = intervals.difference(asked("no", "yes"), asked("yes", "yes"))
    assert (found.better, found.worse) == (1, 0)


def test_equal_models_do_not_differ():
    found = intervals.difference(of(np.arange(9) < 4), of(np.arange(9) < 4))
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
