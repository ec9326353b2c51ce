"""The course of a run in one picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mono_jax.runs.reporting.figures import plt, png
from mono_jax.training.metrics import read_metrics

_DOTS, _LINE, _TEXT, _BAR = "#9ecae1", "#08519c", "#a63603", "#74a9cf"


def course(workdir: Path, stages: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG of all stages side by side over their steps: training loss, held-out text loss, and what trains.

    Dots are means between two records; the line is smoothed over a tenth of a stage.
    """
    figure, (losses, text, trains) = plt.subplots(
        3, 1, figsize=(13, 8), sharex=True, height_ratios=(3, 1.6, 1.6), layout="constrained"
    )
    starts = [0, *itertools.accumulate(max(1, summary["steps"]) for summary in stages.values())]
    for start, (folder, summary) in zip(starts, stages.items()):
        _losses(losses, start, workdir / folder)
        losses.annotate(
            f"{summary['stage']}\n{summary['title'].split(':')[0]}",
            (start + summary["steps"] / 2, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
        )
    losses.set_ylabel("training loss\n(nats per token)")
    _text_losses(text, starts, list(stages.values()))
    _what_trains(trains, starts, list(stages.values()))
    trains.set_xlabel("step")
    for axes in (losses, text, trains):
        axes.set_xlim(0, starts[-1])
        axes.grid(alpha=0.3)
        for border in starts[1:-1]:
            axes.axvline(border, color="#888", linewidth=1)
    return png(figure)


def _losses(axes: Axes, start: int, folder: Path) -> None:
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("loss_mean") is not None]
    steps, values = [start + r["step"] for r in records], [r["loss_mean"] for r in records]
    axes.plot(steps, values, ".", color=_DOTS, markersize=4)
    axes.plot(steps, _smooth(values, max(1, len(values) // 10)), color=_LINE)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def _text_losses(axes: Axes, starts: Sequence[int], stages: Sequence[Mapping[str, Any]]) -> None:
    points = []
    for start, end, summary in zip(starts, starts[1:], stages):
        points += [(start, summary["text_loss_before"]), (end, summary["text_loss_after"])]
    known = [(step, value) for step, value in points if value is not None]
    axes.plot([step for step, _ in known], [value for _, value in known], "o-", color=_TEXT, markersize=5)
    axes.set_ylabel("held-out text\n(nats per token)")


def _what_trains(axes: Axes, starts: Sequence[int], stages: Sequence[Mapping[str, Any]]) -> None:
    groups = list(dict.fromkeys(group for summary in stages for group in summary["groups"]))
    for place, group in enumerate(reversed(groups)):
        trained = [
            (start, end - start)
            for start, end, summary in zip(starts, starts[1:], stages)
            if summary["groups"].get(group, {}).get("trained")
        ]
        axes.broken_barh(trained, (place - 0.35, 0.7), color=_BAR)
    axes.set_yticks(range(len(groups)), [group.replace("_", " ") for group in reversed(groups)], fontsize=8)
    axes.set_ylabel("trains")
