"""Rates per second, mostly of CPU time, measured in turns so that other work on the machine has little effect."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turns(
    actions: dict[str, Callable[[], Any]], count: int, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Items per second of each action, by ``clock``: the median over rounds, after one warm-up round.

    An action that returns a number has made that many items; any other action has made ``count``.
    """
    for action in actions.values():
        action()
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            started = clock()
            made = action()
            items = made if isinstance(made, int) else count
            rates[name].append(items / max(1e-9, clock() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def show(rates: dict[str, float]) -> dict[str, float]:
    for name, rate in rates.items():
        print(f"  {name:24} {rate:12,.0f} /s")
    return rates
