"""What happens inside a model, layer by layer, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from mono_jax.evaluation.inside import TOP, Measures, Units
from mono_jax.runs.reporting.figures import plt, png

_TEXT, _VISUAL, _GREY = "#a63603", "#08519c", "#888"


def attention(measures: Measures, gap: np.ndarray) -> bytes:
    """PNG: who attends to images, how far, and how far the modalities' hidden states are apart, by layer."""
    figure, (shares, distance, apart) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, label, color in (("text", "text", _TEXT), ("visual", "visual tokens", _VISUAL)):
        _by_layer(shares, measures[f"{name}_to_visual"], label, color)
        _by_layer(shares, measures[f"{name}_to_visual_uniform"], f"{label}, all alike", color, ":")
    shares.set_title("share of attention that goes to images", fontsize=10)
    _by_layer(distance, measures["visual_distance"], "visual tokens", _VISUAL)
    _by_layer(distance, measures["visual_distance_uniform"], "all alike", _VISUAL, ":")
    distance.set_title("tokens between a visual token and\nthe visual ones it attends to", fontsize=10)
    _by_layer(apart, gap, "", _GREY)
    apart.set_title("distance of the modalities' mean hidden\nstates (of the mean norm; 0 = embeddings)", fontsize=10)
    for axes in (shares, distance):
        axes.legend(fontsize=8)
    return png(figure)


def maps(layers: np.ndarray, visual: np.ndarray) -> bytes:
    """PNG of attention maps [L, N, N] of up to eight layers; ``visual`` bool [N] marks the image's tokens."""
    count = min(8, len(layers))
    shown = np.unique(np.linspace(0, len(layers) - 1, count).round().astype(int))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    borders = np.flatnonzero(np.diff(visual.astype(int))) + 0.5
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, shown):
        axes.imshow(layers[layer] ** 0.5, cmap="magma", interpolation="nearest")  # the root shows small weights too
        for border in borders:
            axes.axhline(border, color="white", linewidth=0.6)
            axes.axvline(border, color="white", linewidth=0.6)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
    return png(figure)


def moved(distances: Mapping[str, Measures]) -> bytes:
    """PNG: how far the experts are apart, and from the base where it is known, by layer and matrix."""
    kinds = list(next(iter(distances.values())))
    titles = {
        "apart": "visual from text expert",
        "visual": "visual expert from the base",
        "text": "text expert from the base",
    }
    figure, grid = plt.subplots(
        1, len(kinds), figsize=(4.4 * len(kinds), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, kind in zip(grid.flat, kinds):
        for number, (name, measures) in enumerate(distances.items()):
            _by_layer(axes, measures[kind], name, f"C{number}")
        axes.set_title(titles[kind], fontsize=10)
        axes.legend(fontsize=8)
    highest = max(values.max() for measures in distances.values() for values in measures.values())
    grid.flat[0].set_ylim(0, 1.05 * max(highest, 0.01))
    grid.flat[0].set_ylabel("relative distance")
    return png(figure)


def units(visual: Units, text: Units, kinds: Mapping[str, Units]) -> bytes:
    """PNG: sizes of activations, dead units, and how far the experts use the same units, by layer and kind of image."""
    figure, (size, dead, same, by_kind) = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    for label, expert, color in (("visual expert", visual, _VISUAL), ("text expert", text, _TEXT)):
        _by_layer(size, expert.rms, label, color)
        _by_layer(dead, 100 * expert.dead, label, color)
    _by_layer(same, 100 * visual.overlap(text), "visual and text", _GREY)
    same.axhline(100 * TOP, color=_GREY, linestyle=":", linewidth=1)
    titles = {
        size: "root mean square of the activations",
        dead: "dead units, %",
        same: f"most used {TOP:.0%} of the units that\nboth experts use most, % (dotted: chance)",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
    for axes in (size, dead):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    by_kind.xaxis.get_major_locator().set_params(integer=True)
    same.set_ylim(0, 100)
    table = np.array([100 * of_kind.overlap(visual) for of_kind in kinds.values()])
    shown = by_kind.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    by_kind.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
    by_kind.set_xlabel("layer", fontsize=8)
    by_kind.set_title("the same for each kind of image\nand all images, %", fontsize=10)
    figure.colorbar(shown, ax=by_kind)
    return png(figure)


def _by_layer(axes: Axes, values: Sequence[float], label: str, color: str, style: str = "-") -> None:
    axes.plot(range(len(values)), values, style, marker="o", markersize=3, color=color, label=label)
    axes.set_xlabel("layer", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
