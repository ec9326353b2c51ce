"""Pictures of a sweep's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mono_jax.runs.reporting.figures import plt, png
from mono_jax.runs.sweeping.seeds import MeanOfSeeds

Groups = Mapping[str, Sequence[float]]


def metric_plot(metric: str, groups: Groups) -> bytes:
    """A PNG with a row per group: a dot per seed, and the mean with its 95 % interval."""
    return metric_plots({metric: groups})


def metric_plots(metrics: Mapping[str, Groups]) -> bytes:
    """A PNG with one panel per metric, side by side; the rows are the groups of the first metric."""
    names = list(next(iter(metrics.values())))
    width, height = 1.6 + (5.4 if len(metrics) == 1 else 2.6 * len(metrics)), 1.2 + 0.38 * len(names)
    figure, axes = plt.subplots(1, len(metrics), figsize=(width, height), sharey=True, squeeze=False)
    for axis, (metric, groups) in zip(axes[0], metrics.items()):
        for place, name in enumerate(names):
            if values := groups.get(name):
                _row(axis, place, values)
        axis.set_xlabel(metric, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.tight_layout()
    return png(figure)


def _row(axis: plt.Axes, place: int, values: Sequence[float]) -> None:
    estimate = MeanOfSeeds.of(values)
    axis.plot(values, [place] * len(values), "o", color="#9ecae1", markersize=5, zorder=1)
    axis.errorbar(estimate.mean, place, xerr=estimate.half, fmt="D", color="#08519c", markersize=5, capsize=3, zorder=2)
