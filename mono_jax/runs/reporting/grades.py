"""Shares of right answers compared with the score of a constant answer, and of answers about other images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_jax.evaluation.intervals import of_gain, of_share


def interval(grade: Mapping[str, Any]) -> tuple[float, float]:
    """The exact 95 % interval of the share of right answers."""
    return of_share(round(grade["accuracy"] * grade["questions"]), grade["questions"])


def with_interval(grade: Mapping[str, Any]) -> str:
    """The share of right answers with its interval, as text."""
    low, high = interval(grade)
    return f"{grade['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def verdict(grade: Mapping[str, Any]) -> str:
    """Whether the answers beat always giving the most common answer, beyond chance."""
    low, high = interval(grade)
    return "better" if low > grade["majority"] else "worse" if high < grade["majority"] else "no better"


def image_adds(grade: Mapping[str, Any]) -> tuple[float, float, float]:
    """What the right image adds to the share of right answers about another one, and its 95 % interval."""
    low, high = of_gain(grade["gained"], grade["lost"], grade["questions"])
    return grade["accuracy"] - grade["blind"], low, high


def not_seen(graded: Mapping[str, Any]) -> list[str]:
    """The kinds of question that the right image does not help to answer, beyond chance."""
    return [kind for kind, grade in graded["by_kind"].items() if not image_adds(grade)[1] > 0]


def not_better(graded: Mapping[str, Any]) -> list[str]:
    """The kinds of question whose answers are no better than a constant answer."""
    return [kind for kind, grade in graded["by_kind"].items() if verdict(grade) != "better"]
