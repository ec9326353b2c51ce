"""Shares of right answers beside what a constant answer would score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_jax.evaluation.intervals import of_share


def interval(grade: Mapping[str, Any]) -> tuple[float, float]:
    """The exact 95 % interval of the share of right answers."""
    return of_share(round(grade["accuracy"] * grade["questions"]), grade["questions"])


def with_interval(grade: Mapping[str, Any]) -> str:
    """The share of right answers, in words."""
    low, high = interval(grade)
    return f"{grade['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def verdict(grade: Mapping[str, Any]) -> str:
    """Whether the answers beat what always giving the commonest answer would score, beyond chance."""
    low, high = interval(grade)
    return "better" if low > grade["majority"] else "worse" if high < grade["majority"] else "no better"


def not_better(graded: Mapping[str, Any]) -> list[str]:
    """The kinds of question whose answers do no better than a constant."""
    return [kind for kind, grade in graded["by_kind"].items() if verdict(grade) != "better"]
