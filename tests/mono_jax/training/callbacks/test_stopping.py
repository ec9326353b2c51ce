"""What ends a run early."""

from __future__ import annotations

import collections

import pytest

from data_pipelines.loading.report import Report
from mono_jax.training.callbacks import stopping
from mono_jax.training.callbacks.stopping import BadSampleLimit, TooManyBadSamples
from mono_jax.training.loop import Progress


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (100, False), (101, True)])
def test_a_share_of_bad_samples_above_the_limit_ends_the_run(bad: int, stops: bool):
    report = Report(skipped=collections.Counter(no_image=3, too_long=5))
    report.recent = lambda: (1000, bad)
    limit, progress = BadSampleLimit(report, 0.1), Progress(None, {}, 0, 1, 7)
    progress.totals.add(1, limit.facts(progress))
    if not stops:
        return limit.step(progress)
    said = r"10\.1% of the last samples are bad, more than the limit of 10\.0% \(too_long 5, no_image 3 in all\)"
    with pytest.raises(TooManyBadSamples, match=said):
        limit.step(progress)


def test_the_exit_code_of_a_run_that_was_asked_to_stop():
    """Launchers rely on it: EX_TEMPFAIL of sysexits.h."""
    assert stopping.PREEMPTED == 75
