"""Curves of right answers over the levels of each change, and examples of the changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mono_jax.evaluation.robustness.changes import CHANGES
from mono_jax.runs.reporting.figures import plt, png


def curves(points: Mapping[str, Sequence[Mapping[str, Any]]], units: Mapping[str, str]) -> bytes:
    """PNG: one curve per change, over its levels."""
    columns = min(4, len(points))
    rows = -(-len(points) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axes in grid.flat[len(points) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, points.items()):
        scores = np.array([value["score"] for value in values])
        ends = np.array([[_end(value, "low"), _end(value, "high")] for value in values])
        axes.errorbar(range(len(values)), scores, np.abs(ends.T - scores), marker="o", capsize=3, color="#08519c")
        axes.axhline(scores[0], color="#888", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(values)), [f"{value['level']:g}" for value in values])
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel(units[name], fontsize=8)
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("right answers, %", fontsize=8)
    return png(figure)


def _end(point: Mapping[str, Any], which: str) -> float:
    """An end of the interval; the score itself if there is no interval."""
    return point["score"] if point[which] is None else point[which]


def examples(picture: Image.Image) -> bytes:
    """PNG: ``picture`` at every level of every change."""
    columns = max(len(change.levels) for change in CHANGES.values())
    figure, grid = plt.subplots(
        len(CHANGES), columns, figsize=(1.4 * columns, 1.5 * len(CHANGES)), layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (name, change) in zip(grid, CHANGES.items()):
        for axes, level in zip(row, change.levels):
            axes.imshow(change.apply(picture, level, np.random.default_rng(0)))
            axes.set_title(f"{name.replace('_', ' ')} {level:g}", fontsize=7)
    return png(figure)
