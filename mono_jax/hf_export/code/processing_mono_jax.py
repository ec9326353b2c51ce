"""Texts with images in the format on which mono-jax trains: tiles, placeholders and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

IMAGE, START, CONTEXT, END = "<image>", "<img>", "<IMG_CONTEXT>", "</img>"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS = "processor_config.json"
MOST_ACROSS = 256  # maximum rows or columns of tokens of an image in native resolution


class MonoJaxProcessor(ProcessorMixin):
    """Turns prompts and images into model inputs.

    >>> messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    >>> prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    >>> inputs = processor(text=prompt, images=[image], return_tensors="pt")
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        tile_size: int = 448,
        token_pixels: int = 28,
        min_tiles: int = 1,
        max_tiles: int = 6,
        thumbnail: bool = True,
        native: bool = False,
        chat_template: str | None = None,
    ):
        """``native``: no tiles; an image keeps its size, in whole tokens, up to the tokens of ``max_tiles`` tiles."""
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.tile_size, self.token_pixels = tile_size, token_pixels
        self.min_tiles, self.max_tiles, self.thumbnail, self.native = min_tiles, max_tiles, thumbnail, native

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> MonoJaxProcessor:
        """Releases of transformers read processors differently, some without the settings, so they are read here."""
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_options = {key: kwargs[key] for key in hub if kwargs.get(key) is not None}
        settings = json.loads(Path(cached_file(pretrained_model_name_or_path, SETTINGS, **hub_options)).read_text())
        settings = {key: value for key, value in settings.items() if key not in ("auto_map", "processor_class")}
        trust = kwargs.get("trust_remote_code", True)  # running this file already implies trust in the folder
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, trust_remote_code=trust, **hub_options)
        return cls(tokenizer, **settings)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> list[str]:
        """Saves the tokenizer, the settings and this file."""
        self.tokenizer.save_pretrained(save_directory)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        names = ("tile_size", "token_pixels", "min_tiles", "max_tiles", "thumbnail", "native")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"processor_class": type(self).__name__, "auto_map": {"AutoProcessor": CLASS}}
        file = Path(save_directory) / SETTINGS
        file.write_text(json.dumps(settings, indent=2))
        return [str(file)]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
    ) -> BatchFeature:
        """input_ids, attention_mask and, with images, pixel_values [tiles, 3, T, T].

        In native resolution pixel_values [tokens, 3, P, P] and pixel_cells [tokens, 4] (row, column, rows, columns).

        images: one, a list (for one text), or a list for each text. ``<image>`` in the text marks the place of each; if
        a text has none, its images come first. The images of a text share ``max_tiles``.
        """
        texts = [text] if isinstance(text, str) else list(text or [""])
        cut: list[tuple[np.ndarray, np.ndarray]] = []
        rows = []
        for one, group in zip(texts, self._groups(images, len(texts))):
            parts = [(self.native_tokens if self.native else self.tiles)(image, len(group)) for image in group]
            rows.append(self._ids(one, [len(pixels) for pixels, _ in parts]))
            cut += parts
        padding = padding if len(rows) > 1 else False
        inputs = dict(self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors))
        if cut:
            inputs["pixel_values"] = np.concatenate([pixels for pixels, _ in cut])
            if self.native:
                inputs["pixel_cells"] = np.concatenate([cells for _, cells in cut])
        return BatchFeature(inputs, tensor_type=return_tensors)

    @staticmethod
    def _groups(images: Any, texts: int) -> list[list[Any]]:
        if images is None:
            return [[] for _ in range(texts)]
        images = images if isinstance(images, (list, tuple)) else [images]
        nested = any(isinstance(each, (list, tuple)) for each in images)
        groups = [list(each) for each in images] if nested else [list(images)]
        if len(groups) != texts:
            raise ValueError(f"images for {len(groups)} texts, but {texts} texts: give a list of images for each text")
        return groups

    def _ids(self, text: str, counts: list[int]) -> list[int]:
        """Ids of a text, its images as placeholders; the text between images is encoded piece by piece."""
        if IMAGE not in text:
            text = f"{IMAGE}\n" * len(counts) + text
        parts = text.split(IMAGE)
        if len(parts) - 1 != len(counts):
            raise ValueError(f"{len(parts) - 1} {IMAGE} in the text, but {len(counts)} images")
        start, context, end = (self.tokenizer.convert_tokens_to_ids(name) for name in (START, CONTEXT, END))
        per_tile, ids = 1 if self.native else (self.tile_size // self.token_pixels) ** 2, []
        for number, part in enumerate(parts):
            ids += [start, *[context] * (counts[number - 1] * per_tile), end] if number else []
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        return ids

    def tiles(self, image: Any, images: int = 1) -> tuple[np.ndarray, None]:
        """float32 [tiles, 3, T, T], normalised: row by row, the thumbnail last. ``images`` share the most tiles."""
        picture, size = _rgb(image), self.tile_size
        columns, rows = self.grid(*picture.size, max(1, self.max_tiles // images))
        parts = _cut(picture, size, columns, rows)
        if self.thumbnail and len(parts) > 1:
            parts.append(picture.resize((size, size), Image.Resampling.BICUBIC))
        return _normalised(parts), None

    def native_tokens(self, image: Any, images: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """float32 [tokens, 3, P, P], normalised, row by row, and int64 [tokens, 4]: row, column, rows, columns."""
        picture, size = _rgb(image), self.token_pixels
        most = max(1, self.max_tiles // images) * (self.tile_size // size) ** 2
        columns, rows = self.native_grid(*picture.size, most)
        cells = [(row, column, rows, columns) for row in range(rows) for column in range(columns)]
        return _normalised(_cut(picture, size, columns, rows)), np.array(cells, np.int64)

    def native_grid(self, width: int, height: int, most: int) -> tuple[int, int]:
        """(columns, rows) of tokens nearest to the image's size, scaled down if there are more than ``most``."""
        size = np.array([width, height], np.float64) / self.token_pixels
        near, longest = np.round(size), MOST_ACROSS
        if near.prod() > most or near.max() > longest:
            near = np.floor(size * min(np.sqrt(most / size.prod()), longest / size.max(), 1.0) + 1e-9)
        columns, rows = np.minimum(np.maximum(near, 1), most).astype(int).tolist()
        return columns, rows

    def grid(self, width: int, height: int, most: int) -> tuple[int, int]:
        """(columns, rows) nearest in aspect ratio; among ties, the largest grid that the image more than half fills."""
        least = min(self.min_tiles, most)
        grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= least]
        grids.sort(key=lambda grid: grid[0] * grid[1])
        distances = [abs(width / height - c / r) for c, r in grids]
        nearest = [grid for grid, distance in zip(grids, distances) if distance == min(distances)]
        filled = [(c, r) for c, r in nearest if width * height > 0.5 * self.tile_size**2 * c * r]
        return filled[-1] if filled else nearest[0]

    def apply_chat_template(
        self, conversation: list, tokenize: bool = False, images: Any = None, **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """The prompt of a conversation (or of each of several); with ``tokenize``, the model inputs.

        Contents are texts, or lists of {"type": "text", "text": ...} and {"type": "image"}, optionally with an "image".
        """
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        found: list[list[Any]] = []
        prompts = []
        options = {key: value for key, value in kwargs.items() if key in ("add_generation_prompt", "chat_template")}
        for messages in conversation if several else [conversation]:
            held: list[Any] = []
            flat = [{**message, "content": _as_text(message["content"], held)} for message in messages]
            prompts.append(self.tokenizer.apply_chat_template(flat, tokenize=False, **options))
            found.append(held)
        if not tokenize:
            return prompts if several else prompts[0]
        if images is None:
            images = found if any(found) else None
        return self(images=images, text=prompts, return_tensors=kwargs.get("return_tensors", "pt"))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_cells"]


CLASS = f"{Path(__file__).stem}.{MonoJaxProcessor.__name__}"


def _as_text(content: Any, held: list[Any]) -> str:
    """The text of a message; images in it are appended to ``held``."""
    if isinstance(content, str):
        return content.strip()
    texts = []
    for part in content:
        if part["type"] == "image":
            texts.append(f"{IMAGE}\n")
            held += [part["image"]] if "image" in part else []
        else:
            texts.append(part["text"])
    return "".join(texts).strip()


def _cut(picture: Image.Image, size: int, columns: int, rows: int) -> list[Image.Image]:
    """The picture, resized and cut into columns x rows squares, row by row."""
    whole = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(x * size, y * size) for y in range(rows) for x in range(columns)]
    return [whole.crop((x, y, x + size, y + size)) for x, y in corners]


def _normalised(parts: list[Image.Image]) -> np.ndarray:
    """float32 [n, 3, size, size]."""
    pixels = np.stack([np.asarray(part, np.float32) for part in parts]) / 255.0
    normalised = (pixels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def _rgb(image: Any) -> Image.Image:
    """A PIL image, array or file as RGB: upright, on white if it is transparent."""
    if isinstance(image, (str, Path)):
        image = Image.open(image)
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
