"""Paints the pictures of the demo: composed scenes, handwritten digits, cut-outs of photographs, rendered words."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import DataError
from data_pipelines.recipes.conversations import NUMBERS
from data_pipelines.recipes.demo import scenes

PHOTOS = {
    "astronaut.png": "an astronaut",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera",
    "cell.png": "a cell",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "old coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "stained tissue",
    "moon.png": "the moon",
    "motorcycle_left.png": "a motorcycle",
    "page.png": "a printed page",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with a careful (``caption``) and a careless (``alt``) description, its type and its origin."""

    image: Image.Image
    caption: str
    alt: str
    kind: str
    origin: str


class Painter:
    """Paints pictures; each depends only on the arguments of its call.

    Args:
      edge: edge of every picture in pixels.
      heldout: paint from the held-out side of the splits: other scenes, other handwritten digits, other parts of the
        photographs.
    """

    def __init__(self, edge: int, *, heldout: bool) -> None:
        self.edge = edge
        self.heldout = heldout

    def any(self, rng: np.random.Generator) -> Picture:
        """A scene in 7 of 10 cases, otherwise a digit or a photograph."""
        choice = rng.random()
        return self.scene(rng)[0] if choice < 0.7 else self.digit(rng) if choice < 0.85 else self.photo(rng)

    def scene(self, rng: np.random.Generator, shapes: int | None = None) -> tuple[Picture, scenes.Scene]:
        """A composed scene; ``shapes`` fixes the number of its shapes."""
        scene = scenes.sample_scene(rng, shapes=shapes, heldout=self.heldout)
        image = scenes.render(scene, self.edge, rng)
        return Picture(image, scenes.caption(scene), scenes.alt_text(scene, rng), "scene", "scenes"), scene

    def digit(self, rng: np.random.Generator) -> Picture:
        """A handwritten digit from scikit-learn in a random colour; every sixth digit of the set is held out."""
        images, labels = _digits()
        candidates = np.flatnonzero((np.arange(len(labels)) % 6 == 0) == self.heldout)
        index = int(candidates[rng.integers(len(candidates))])
        size = int(self.edge * rng.uniform(0.7, 1.0))
        ink = np.asarray(
            Image.fromarray(np.uint8(images[index] * (255 / 16))).resize((size, size), Image.Resampling.BICUBIC)
        )
        canvas = np.zeros((self.edge, self.edge), np.float32)
        y, x = (int(rng.integers(self.edge - size + 1)) for _ in range(2))
        canvas[y : y + size, x : x + size] = ink / 255.0
        color, paper = rng.integers(0, 90, size=3), np.asarray(scenes.BACKGROUNDS[int(rng.integers(4))])
        image = Image.fromarray(np.uint8(paper + (color - paper) * canvas[..., None]))
        word = NUMBERS[int(labels[index])]
        alt = (f"{word} handwritten", f"digit {labels[index]}", f"a handwritten {word}")[int(rng.integers(3))]
        return Picture(image, f"a handwritten {word}", alt, "digit", f"scikit-learn/digits/{index}")

    def photo(self, rng: np.random.Generator) -> Picture:
        """A square crop: for training from the left two thirds of a photograph, held-out from the rest."""
        name = list(PHOTOS)[int(rng.integers(len(PHOTOS)))]
        photo = _photo(name)
        width, height = photo.size
        border = width * 2 // 3
        left, right = (border, width) if self.heldout else (0, border)
        side = int(min(right - left, height) * rng.uniform(0.6, 1.0))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(height - side + 1))
        image = photo.resize((self.edge,) * 2, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        subject = PHOTOS[name]
        noun = subject.split(" ", 1)[-1]
        alt = (noun, f"{noun} photo {int(rng.integers(100, 1000))}", f"a photo of {subject}")[int(rng.integers(3))]
        return Picture(image, f"a photo of {subject}", alt, "photo", f"scikit-image/{name}")

    def word(self, rng: np.random.Generator, words: list[str]) -> Picture:
        """A number below 100 or one of the ``words``, in the largest letters that fit."""
        word = str(rng.integers(100)) if rng.random() < 0.4 else words[int(rng.integers(len(words)))]
        paper = scenes.BACKGROUNDS[int(rng.integers(4))]
        image = Image.new("RGB", (self.edge,) * 2, paper)
        draw = ImageDraw.Draw(image)
        for size in range(self.edge // 2, 5, -1):
            font = ImageFont.load_default(size)
            x0, y0, x1, y1 = draw.textbbox((0, 0), word, font=font)
            if x1 - x0 <= self.edge * 0.94:
                break
        x = int(rng.integers(int(self.edge - (x1 - x0)) + 1)) - x0
        y = int(rng.integers(int(self.edge - (y1 - y0)) + 1)) - y0
        draw.text((x, y), word, font=font, fill=tuple(int(v) for v in rng.integers(0, 110, size=3)))
        return Picture(image, word, word, "ocr", "rendered text")


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 8, 8] float64 in 0..16 and labels [n] of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


@functools.cache
def _photo(name: str) -> Image.Image:
    import skimage.data

    path = Path(skimage.data.__file__).parent / name
    if not path.is_file():
        raise DataError(f"{path}: scikit-image does not contain this photograph; install scikit-image 0.24 or later")
    return Image.open(path).convert("RGB")
