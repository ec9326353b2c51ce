"""Intervals and paired tests against scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from data_pipelines.errors import DataError
from mono_jax.evaluation import intervals
from mono_jax.evaluation.metrics.captions.scores import captions
from mono_jax.evaluation.metrics.metric import Answered, Measure, measure
from mono_jax.evaluation.metrics.registry import METRICS
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


ANY = 1 - 0.025 ** (1 / np.arange(1, 100).astype(float))  # [n - 1]: upper limit of what none of n units does


@pytest.mark.parametrize("units", [2, 3, 20])
@pytest.mark.parametrize("worth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["examples", "pictures", "unequal pictures", "means"])
def test_units_that_all_score_the_same_leave_room_for_others(units: int, worth: float, kind: str):
    """At both ends it is Clopper-Pearson's interval of the units, whatever they consist of."""
    sizes = {"pictures": [2] * units, "unequal pictures": [2 + 2 * (i % 2) for i in range(units)]}.get(
        kind, [1] * units
    )
    right = [(f"u{i}", (worth, 1)) for i, size in enumerate(sizes) for _ in range(size)]
    if kind in ("pictures", "unequal pictures"):
        right = [(f"u{i}", (j < worth * size, 1)) for i, size in enumerate(sizes) for j in range(size)]
    found = intervals.estimate(measure(right, is_share=kind != "means" and worth != 0.5))
    assert found.method == ("exact" if kind == "examples" and worth != 0.5 else "units")
    others = ANY[units - 1]
    expected = (100 * worth * (1 - others), 100 * worth + 100 * (1 - worth) * others)
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(("right", "ends"), [(True, (400 * (1 - ANY[5]), 400)), (False, (0, 400 * ANY[5]))])
def test_points_of_units_in_strata_leave_room_for_others(right: bool, ends: tuple[float, float]):
    """Two categories of MME with 3 and 5 images: as for 2 x 3 of them."""
    said = {True: ("Yes", "No"), False: ("No", "Yes")}[right]
    images = [("color", i) for i in range(3)] + [("count", i) for i in range(5)]
    asked = [
        Answered(f"{name}{i}{j}", said[j], (("Yes", "No")[j],), category=name, group=f"{i}.png")
        for name, i in images
        for j in range(2)
    ]
    found = intervals.estimate(METRICS["mme"](asked)["total"])
    assert found.method == "units" and (found.low, found.high) == pytest.approx(ends)
    alone = intervals.estimate(METRICS["mme"]([a for a in asked if a.group == "0.png"])["total"])
    assert alone.low is alone.high is None, "no category has a second image"


def test_captions_that_all_fail_or_all_match_leave_room_for_others():
    truths = ("a red wall of bricks", "two dogs run on grass", "one cat sleeps in a box")
    for answers, score in ((truths, "BLEU-4"), (truths, "ROUGE-L"), (("x",) * 3, "CIDEr"), (("x",) * 3, "ROUGE-L")):
        of_all = captions([Answered(str(i), a, (t,)) for i, (a, t) in enumerate(zip(answers, truths))])
        found = intervals.estimate(of_all[score])
        assert found.method == "units" and found.high - found.low > 50


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("units", [2, 5, 6, 40])
def test_a_model_that_is_always_better_may_still_not_be(units: int, group: int):
    """The interval of a difference of shares excludes 0 from 6 units on, as does the exact test."""
    found = intervals.difference(of(np.ones(group * units, bool), group), of(np.zeros(group * units, bool), group))
    assert found.high == found.difference == 100 and found.low < 100
    if group == 1:
        assert (found.low > 0) == (found.p < 0.05) == (units >= 6)


@pytest.mark.parametrize("number", [1, 2, 5, 30, 200])
def test_a_gain_excludes_0_only_if_the_exact_test_does(number: int):
    for gained in range(min(number, 12) + 1):
        for lost in range(min(number - gained, 3) + 1):
            low, high = intervals.of_gain(gained, lost, number)
            assert -1 <= low <= (gained - lost) / number <= high <= 1
            p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1
            assert low <= 0 <= high or p < 0.05
            assert low < high or not gained + lost


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
