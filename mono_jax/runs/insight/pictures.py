"""Pictures of what happens inside a model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage

from mono_jax.evaluation.inside import TOP, Measures, Units, UnitsOfExperts
from mono_jax.runs.reporting.figures import plt, png

_TEXT, _VISUAL, _GREY = "#a63603", "#08519c", "#888"
_MOST = f"{100 * TOP:.0f} %"
MOST_NUMBERS = 12  # most layers for which a table prints values in its cells
LEAST_DEAD = 10  # % of dead units at the end of a scale, so that a few do not look like many


def attention(measures: Measures, gap: np.ndarray) -> bytes:
    """PNG: which tokens attend to images, at what distance, and how far apart the modalities' hidden states are, by
    layer."""
    figure, (shares, distance, apart) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, label, color in (("text", "text", _TEXT), ("visual", "visual tokens", _VISUAL)):
        _by_layer(shares, measures[f"{name}_to_visual"], label, color)
        _by_layer(shares, measures[f"{name}_to_visual_uniform"], f"{label}, uniform", color, ":")
    shares.set_title("share of attention that goes to images", fontsize=10)
    _by_layer(distance, measures["visual_distance"], "visual tokens", _VISUAL)
    _by_layer(distance, measures["visual_distance_uniform"], "uniform", _VISUAL, ":")
    distance.set_title("tokens between a visual token and\nthe visual ones it attends to", fontsize=10)
    _by_layer(apart, gap, "", _GREY)
    apart.set_title("distance of the modalities' mean hidden\nstates (of the mean norm; 0 = embeddings)", fontsize=10)
    for axes, label in ((shares, "share"), (distance, "tokens"), (apart, "relative distance")):
        axes.set_ylabel(label, fontsize=8)
    for axes in (shares, distance):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    apart.set_ylim(bottom=0)
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
        axes.imshow(layers[layer] ** 0.5, cmap="magma", interpolation="nearest")  # the root shows small weights, too
        for border in borders:
            axes.axhline(border, color="white", linewidth=0.6)
            axes.axvline(border, color="white", linewidth=0.6)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
    return png(figure)


def moved(distances: Mapping[str, Measures]) -> bytes:
    """PNG: how far apart the experts are, and how far from the base if it is known, by layer and matrix."""
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


def units(visual: Units, text: Units) -> bytes:
    """PNG: sizes of activations, dead units, and how much the experts use the same units, by layer."""
    figure, (size, dead, same) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for label, expert, color in (("visual expert", visual, _VISUAL), ("text expert", text, _TEXT)):
        _by_layer(size, expert.rms, label, color)
        _by_layer(dead, 100 * expert.dead, label, color)
    _by_layer(same, 100 * visual.overlap(text), "visual and text", _GREY)
    same.axhline(100 * TOP, color=_GREY, linestyle=":", linewidth=1)
    titles = {
        size: "root mean square of the activations",
        dead: "dead units, %",
        same: f"most used {_MOST} of the units that\nboth experts use most, % (dotted: chance)",
    }
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
    size.set_ylim(bottom=0)
    dead.set_ylim(0, max(LEAST_DEAD, 105 * max(visual.dead.max(), text.dead.max())))
    for axes in (size, dead):
        axes.legend(fontsize=8)
    same.set_ylim(0, 100)
    return png(figure)


def units_by_group(groups: Sequence[Mapping[str, UnitsOfExperts]], whole: UnitsOfExperts) -> bytes:
    """PNG: for each expert, sizes of activations, shared units and dead units, by layer and by name within ``groups``.

    ``whole``: over all tokens; a group's most used units are compared with these.
    """
    names = [name for group in groups for name in group]
    found = [units for group in groups for units in group.values()]
    borders = np.cumsum([len(group) for group in groups])[:-1] - 0.5
    figure, grid = plt.subplots(
        2, 3, figsize=(13, 1.8 + 0.6 * len(names)), sharex=True, sharey=True, layout="constrained"
    )
    rms = [getattr(units, expert).rms for units in found for expert in ("visual", "text")]
    sizes = LogNorm(np.min(rms), np.max(rms))
    for row, expert in zip(grid, ("visual", "text")):
        of_group = [getattr(units, expert) for units in found]
        dead = 100 * np.array([units.dead for units in of_group])
        tables = (
            ("root mean square of the activations", np.array([units.rms for units in of_group]), "{:.3g}", sizes),
            (
                f"most used {_MOST} of its units that are\namong the most used of all images, %",
                100 * np.array([units.overlap(getattr(whole, expert)) for units in of_group]),
                "{:.0f}",
                Normalize(0, 100),
            ),
            ("dead units, %", dead, "{:.1f}", Normalize(0, max(LEAST_DEAD, dead.max()))),
        )
        for axes, (title, values, form, norm) in zip(row, tables):
            axes.set_title(f"{expert} expert: {title}", fontsize=10)
            shown = _table(axes, values, form, norm)
            if values.shape[1] > MOST_NUMBERS:
                figure.colorbar(shown, ax=axes)
            for border in borders:
                axes.axhline(border, color="white", linewidth=4)
        row[0].set_yticks(range(len(names)), names, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    return png(figure)


def _table(axes: Axes, values: np.ndarray, form: str, norm: Normalize) -> AxesImage:
    """Values [rows, L] as colors, and as numbers if there is room for them."""
    shown = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if values.shape[1] <= MOST_NUMBERS:
        for row, column in np.ndindex(values.shape):
            color = "black" if shown.norm(values[row, column]) > 0.6 else "white"
            text = form.format(values[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return shown


def _by_layer(axes: Axes, values: Sequence[float], label: str, color: str, style: str = "-") -> None:
    axes.plot(range(len(values)), values, style, marker="o", markersize=3, color=color, label=label)
    axes.set_xlabel("layer", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
