"""Pictures of a sweep's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mono_jax.runs.reporting.figures import plt, png
from mono_jax.runs.sweeping.estimate import Estimate


def metric_plot(metric: str, groups: Mapping[str, Sequence[float]]) -> bytes:
    """A PNG: a row for each group, with a dot per seed, and the mean with its 95 % interval."""
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.38 * len(groups)))
    for place, values in enumerate(groups.values()):
        estimate = Estimate.of(values)
        axis.plot(values, [place] * len(values), "o", color="#9ecae1", markersize=5, zorder=1)
        axis.errorbar(
            estimate.mean, place, xerr=estimate.half, fmt="D", color="#08519c", markersize=5, capsize=3, zorder=2
        )
    axis.set_yticks(range(len(groups)), list(groups), fontsize=9)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(metric, fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return png(figure)
