"""Composed scenes: a few coloured shapes on a grid, with captions, boxes and answers that follow from the ``Scene``.

Scenes are split into training and held-out ones by their content (``Scene.is_heldout``), so that a right answer about a
held-out scene cannot have been memorised.

    scene (grid 2)            caption   "a red circle left of a blue square"
    +-----+-----+             boxes     red circle [60, 70, 430, 440], blue square [560, 80, 920, 440]
    |  o  |  #  |             question  "what color is the square?" -> "blue"
    +-----+-----+
    |     |     |
    +-----+-----+
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 45, 165),
    "orange": (245, 125, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ((255, 255, 255), (236, 236, 236), (214, 214, 214), (200, 214, 226))
_ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape. ``center`` and ``radius`` are fractions of the image's edge; ``cell`` is (row, column)."""

    color: str
    shape: str
    cell: tuple[int, int]
    center: tuple[float, float]
    radius: float

    @property
    def label(self) -> str:
        """For example "red circle"."""
        return f"{self.color} {self.shape}"

    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 on a scale of 0 to 1000, clipped to the image."""
        (x, y), r = self.center, self.radius
        return tuple(int(np.clip(round(1000 * v), 0, 1000)) for v in (x - r, y - r, x + r, y + r))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes in reading order on a ``grid`` x ``grid`` grid; no two have the same colour and shape."""

    grid: int
    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]

    def place(self, shape: Shape) -> str:
        """Where the shape is, for example "top left"."""
        row, column = _ROWS[self.grid][shape.cell[0]], _COLUMNS[self.grid][shape.cell[1]]
        return "center" if (row, column) == ("middle", "center") else f"{row} {column}"

    def is_heldout(self) -> bool:
        """True for a tenth of all scenes, chosen by which shape in which colour is in which cell."""
        content = repr([(s.color, s.shape, s.cell) for s in self.shapes])
        return hashlib.blake2b(content.encode(), digest_size=8).digest()[0] % 10 == 0


def sample_scene(
    rng: np.random.Generator, *, grid: int = 2, shapes: int | None = None, heldout: bool | None = None
) -> Scene:
    """A random scene of 1 to 3 shapes (``shapes`` fixes the number), from both sides or one side of the split."""
    if grid not in _ROWS:
        raise ValueError(f"grid={grid}: scenes have a grid of {sorted(_ROWS)} cells an edge")
    while True:
        scene = _sample(rng, grid, int(rng.integers(1, 4)) if shapes is None else shapes)
        if heldout is None or scene.is_heldout() == heldout:
            return scene


def _sample(rng: np.random.Generator, grid: int, count: int) -> Scene:
    cells = sorted(int(c) for c in rng.choice(grid * grid, size=count, replace=False))
    kinds = rng.choice(len(COLORS) * len(SHAPES), size=count, replace=False)
    shapes = []
    for cell, kind in zip(cells, kinds, strict=True):
        row, column = divmod(cell, grid)
        radius = float(rng.uniform(0.37, 0.46)) / grid
        slack = 0.5 / grid - radius
        dx, dy = rng.uniform(-slack, slack, size=2)
        center = ((column + 0.5) / grid + float(dx), (row + 0.5) / grid + float(dy))
        shapes.append(
            Shape(tuple(COLORS)[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)], (row, column), center, radius)
        )
    return Scene(grid, tuple(shapes), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def render(scene: Scene, edge: int, rng: np.random.Generator) -> Image.Image:
    """RGB image of ``edge`` x ``edge`` pixels; ``rng`` shifts the shades a little and adds faint noise."""
    size = edge * _SUPERSAMPLE
    image = Image.new("RGB", (size, size), scene.background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        shade = tuple(int(v) for v in np.clip(np.add(COLORS[shape.color], rng.integers(-10, 11, size=3)), 0, 255))
        _draw(draw, shape, size, shade)  # type: ignore[arg-type]
    pixels = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float32)
    pixels = pixels + rng.normal(0.0, 3.0, size=(edge, edge, 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, shape: Shape, size: int, fill: tuple[int, int, int]) -> None:
    (x, y), r = (v * size for v in shape.center), shape.radius * size
    if shape.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)


def article(noun: str) -> str:
    """The noun with "a" or "an" in front."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """A full description, as a captioning model would write it (stage S1.2)."""
    shapes = scene.shapes
    if len(shapes) == 2:
        (row_a, column_a), (row_b, column_b) = shapes[0].cell, shapes[1].cell
        if row_a == row_b or column_a == column_b:
            relation = "left of" if row_a == row_b else "above"
            return f"{article(shapes[0].label)} {relation} {article(shapes[1].label)}"
    parts = [f"{article(s.label)} at the {scene.place(s)}" for s in shapes]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """A short, careless text, as found on web pages (stage S1.1)."""
    names = [s.label for s in scene.shapes]
    form = int(rng.integers(5))
    if form == 0:
        return " ".join(names)
    if form == 1:
        return " &amp; ".join(names) + " clipart"
    if form == 2:
        return f"{names[int(rng.integers(len(names)))]} - free image {int(rng.integers(1000, 10000))}"
    return " and ".join(article(n) for n in names)
