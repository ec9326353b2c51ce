"""Draws one packed row into row_layout.svg: python docs/figures/row_layout.py

The same script gives the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

VISUAL, TEXT = "v", "t"
VISUAL_SLOTS, TEXT_SLOTS = 10, 14
# Tokens of each sample as they are read: <img>, the visual tokens, </img>, question and answer; the last has no image.
SAMPLES = ("tvvvvttt", "ttvvvvttt", "tttt")
COLOURS = ("#4477aa", "#cc6633", "#338855")
EMPTY, INK, PALE = "#ffffff", "#222222", "#888888"
SEQUENCE_Y, SLOTS_Y, EXPERTS_Y, HEAD_Y = 7.2, 3.3, 1.35, 0.5
GAP = 0.8  # between visual and text slots


@dataclass(frozen=True)
class Token:
    """A token of the row: its sample (from 0), its position within it, its modality, and the slot that holds it."""

    sample: int
    position: int
    modality: str
    slot: int


def tokens_of(samples: Sequence[str]) -> Iterator[Token]:
    """The tokens in sequence order; each takes the next free slot of its modality."""
    free = {VISUAL: 0, TEXT: VISUAL_SLOTS}
    for sample, modalities in enumerate(samples):
        for position, modality in enumerate(modalities):
            yield Token(sample, position, modality, free[modality])
            free[modality] += 1


def slot_x(slot: int) -> float:
    return slot + (GAP if slot >= VISUAL_SLOTS else 0)


def sequence_x(place: int) -> float:
    return place + GAP / 2


def box(ax: Axes, x: float, y: float, token: Token | None) -> None:
    """A slot with its token, or an empty one."""
    colour = EMPTY if token is None else COLOURS[token.sample]
    edge = {"edgecolor": PALE, "linestyle": ":"} if token is None else {"edgecolor": "white"}
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, linewidth=1.2, **edge))
    if token is not None and token.modality == VISUAL:  # a little picture
        ax.add_patch(Rectangle((x + 0.24, y + 0.24), 0.52, 0.52, facecolor="white", alpha=0.85, linewidth=0))
        ax.plot([x + 0.28, x + 0.44, x + 0.54, x + 0.72], [y + 0.3, y + 0.58, y + 0.44, y + 0.6], color=colour, lw=1.4)
    elif token is not None:
        ax.text(x + 0.5, y + 0.47, "a", ha="center", va="center", color="white", fontsize=10, fontweight="bold")


def bracket(ax: Axes, left: float, right: float, y: float, label: str, colour: str, up: bool = True) -> None:
    tip = 0.16 if up else -0.16
    ax.plot([left + 0.06, left + 0.06, right - 0.06, right - 0.06], [y, y + tip, y + tip, y], color=colour, lw=1.3)
    place = {"va": "bottom" if up else "top", "ha": "center", "linespacing": 1.25}
    ax.text((left + right) / 2, y + 1.6 * tip, label, color=colour, fontsize=9, **place)


def expert(ax: Axes, left: float, right: float, y: float, label: str, colour: str) -> None:
    ax.add_patch(
        FancyBboxPatch((left + 0.1, y), right - left - 0.2, 0.62, "round,pad=0,rounding_size=0.12", fc=colour, lw=0)
    )
    ax.text((left + right) / 2, y + 0.3, label, ha="center", va="center", fontsize=9, color=INK)


def sequence(ax: Axes, tokens: Sequence[Token]) -> None:
    """The row as it is read, and the lines to the slots."""
    start = 0
    for sample, modalities in enumerate(SAMPLES):
        left, right = sequence_x(start), sequence_x(start + len(modalities))
        label = f"sample {sample + 1}: {'text, image, text' if VISUAL in modalities else 'text'}"
        bracket(ax, left, right, SEQUENCE_Y + 1.08, label, COLOURS[sample])
        start += len(modalities)
    end = VISUAL_SLOTS + TEXT_SLOTS
    bracket(ax, sequence_x(start), sequence_x(end), SEQUENCE_Y + 1.08, "padding", PALE)
    for place in range(end):
        token = tokens[place] if place < len(tokens) else None
        box(ax, sequence_x(place), SEQUENCE_Y, token)
        if token is not None:
            ends = [sequence_x(place) + 0.5, slot_x(token.slot) + 0.5], [SEQUENCE_Y - 0.06, SLOTS_Y + 1.06]
            ax.plot(*ends, color=COLOURS[token.sample], lw=1.3, alpha=0.55, zorder=0)


def slots(ax: Axes, tokens: Sequence[Token]) -> None:
    """The row as it lies in memory, and what works on it."""
    held = {token.slot: token for token in tokens}
    for slot in range(VISUAL_SLOTS + TEXT_SLOTS):
        box(ax, slot_x(slot), SLOTS_Y, held.get(slot))
    visual, text = (0, VISUAL_SLOTS), (slot_x(VISUAL_SLOTS), slot_x(VISUAL_SLOTS + TEXT_SLOTS))
    for (left, right), label in ((visual, "V visual slots (here 10)"), (text, "T text slots (here 14)")):
        bracket(ax, left, right, SLOTS_Y - 0.08, label, INK, up=False)
    expert(ax, *visual, EXPERTS_Y, "visual expert: these slots only", "#f2d9a0")
    expert(ax, *text, EXPERTS_Y, "text expert: these slots only", "#c9d8ea")
    expert(ax, *text, HEAD_Y, "LM head and loss: visual tokens predict nothing", "#e2e2e2")


def legend(ax: Axes) -> None:
    """What the signs mean."""
    signs = ((0.0, VISUAL, "visual token: a square of pixels"), (9.6, TEXT, "text token"), (15.0, None, "empty slot"))
    for x, modality, words in signs:
        box(ax, x, -0.95, None if modality is None else Token(0, 0, modality, 0))
        ax.text(x + 1.25, -0.47, words, ha="left", va="center", fontsize=9, color=INK)


def draw(target: Path) -> None:
    """Writes the figure; the format follows the file's name."""
    matplotlib.rcParams.update({"svg.hashsalt": "row_layout", "font.family": "DejaVu Sans"})
    figure, ax = plt.subplots(figsize=(12.5, 5.6))
    tokens = list(tokens_of(SAMPLES))
    sequence(ax, tokens)
    slots(ax, tokens)
    notes = (
        (SEQUENCE_Y + 0.5, "Sequence order", "attention is causal\nwithin each sample"),
        ((SEQUENCE_Y + SLOTS_Y + 1) / 2, "Field “order”", "the slot that each\nposition reads"),
        (SLOTS_Y + 0.5, "Slots in memory", "the residual stream\nstays like this"),
        ((EXPERTS_Y + HEAD_Y + 0.62) / 2, "Static routing", "the place of a slot\ndecides its expert"),
    )
    for y, title, words in notes:
        ax.text(-0.6, y + 0.3, title, ha="right", va="bottom", fontsize=10, color=INK, fontweight="bold")
        ax.text(-0.6, y + 0.24, words, ha="right", va="top", fontsize=9, color=INK, linespacing=1.3)
    legend(ax)
    ax.set_xlim(-5.4, VISUAL_SLOTS + TEXT_SLOTS + GAP + 0.2)
    ax.set_ylim(-1.05, SEQUENCE_Y + 2.2)
    ax.set_aspect("equal")
    ax.axis("off")
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, bbox_inches="tight", facecolor="white", metadata=metadata, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).with_suffix(".svg")
    parser.add_argument("--out", type=Path, default=here, help="file to write, .svg or .png (default: beside this one)")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
