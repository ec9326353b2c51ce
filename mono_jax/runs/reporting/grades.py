"""Shares of right answers beside what a constant answer would score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy import stats

LEVEL = 0.95


def interval(share: float, number: int) -> tuple[float, float]:
    """The exact 95 % interval (Clopper and Pearson) of a share of ``number`` independent answers."""
    found = stats.binomtest(round(share * number), number).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def with_interval(grade: Mapping[str, Any]) -> str:
    """The share of right answers, in words."""
    low, high = interval(grade["accuracy"], grade["questions"])
    return f"{grade['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def verdict(grade: Mapping[str, Any]) -> str:
    """Whether the answers beat what always giving the commonest answer would score, beyond chance."""
    low, high = interval(grade["accuracy"], grade["questions"])
    return "better" if low > grade["majority"] else "worse" if high < grade["majority"] else "no better"


def not_better(graded: Mapping[str, Any]) -> list[str]:
    """The kinds of question whose answers do no better than a constant."""
    return [kind for kind, grade in graded["by_kind"].items() if verdict(grade) != "better"]
