"""The cost of the agreement of a step, run by several processes; the first prints one line of JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mono_jax.parallel import distributed
from mono_jax.parallel.totals import Totals

STEPS = 200
FACTS = {"failed": 0, "asked_to_stop": 0, "recent_samples": 2000, "recent_bad": 3, "visual": 1 << 20, "text": 1 << 18}


def milliseconds(function: Callable[[int], object]) -> float:
    """Median over ``STEPS`` calls."""
    times = []
    for step in range(STEPS):
        began = time.perf_counter()
        function(step)
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


def run() -> None:
    """Runs in each of the processes."""
    with distributed.joined(distributed.find()) as first:
        totals = Totals()
        found = {"started_ms": milliseconds(lambda step: totals.add(step, FACTS))}
        totals = Totals()

        def agree(step: int) -> None:
            totals.add(step, FACTS)
            totals.latest(step)

        found["started_and_read_ms"] = milliseconds(agree)
        values = np.array(list(FACTS.values()), np.int64)
        found["gathered_ms"] = milliseconds(lambda step: multihost_utils.process_allgather(values).sum(0))
        if first:
            print(json.dumps(found | {"processes": jax.process_count()}), flush=True)
