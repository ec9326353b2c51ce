"""Small sets for the demo, made from real input that pip alone can fetch.

``build_demo_sets`` writes a folder with everything that the stages of the demo train on and are graded by:

    text/train.txt, text/heldout.txt        prose (`prose.py`): a paragraph a line, a blank line behind a document
    s0/chat.jsonl                           conversations without images: prose to be continued, descriptions
    s1_1/00000.tar ...                      image-text pairs with noisy alt text, in the layout of img2dataset
    s1_2/00000.tar ..., s1_2/captions.jsonl pairs whose synthetic captions are joined by key
    s1_3/{caption,detection,ocr}/00000.tar  captions, boxes, rendered text
    s2/{scenes,captions,easy_vqa,...}.jsonl, s2/images/   conversations in the form of LLaVA
    heldout/{captions,questions,easy_vqa}.jsonl, heldout/images/      nothing of it is trained on
    tokenizer/tokenizer.model, tokenizer/added_tokens.json
    manifest.json                           written last

Sources: scikit-learn's handwritten digits, the easy-vqa package, the photographs bundled with scikit-image,
docstrings of installed packages, rendered text and composed scenes (`scenes.py`).

``build_demo_sets`` returns the manifest, whose form `sets.py` describes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines import cli as command
from data_pipelines.errors import DataError
from data_pipelines.recipes import shard_writer as shards
from data_pipelines.recipes.demo import prose, scenes
from data_pipelines.recipes.sets import (
    CAPTION_PROMPT,
    S1_3_SHARES,
    STAGES,
    Conversation,
    Counts,
    Progress,
    build_part,
    heldout_entry,
    load_manifest,
    train_tokenizer,
    write_documents,
    write_manifest,
)

VERSION = 1
DETECTION_PROMPT = "detect the shapes in the image"
OCR_PROMPT = "read the text in the image"
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
class DemoSizes:
    """Samples of each set; ``s1_3`` and ``s2`` are divided among their sources. ``text_bytes`` caps the prose."""

    text_bytes: int = 3_000_000
    s0_chat: int = 3000
    s1_1: int = 4000
    s1_2: int = 4000
    s1_3: int = 4000
    s2: int = 6000
    heldout_captions: int = 200
    heldout_questions: int = 400

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 20:
                raise DataError(f"demo set size {name}={value}: at least 20")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, what a careful (``caption``) and a careless writer (``alt``) say of it, and where it is from."""

    image: Image.Image
    caption: str
    alt: str
    kind: str
    origin: str


class Painter:
    """Makes the pictures of the demo; what it paints depends on the arguments of a call alone.

    Args:
      edge: edge of every picture in pixels.
      heldout: paint from the held-out side of the splits: other scenes, other handwritten digits, other
        parts of the photographs.
    """

    def __init__(self, edge: int, *, heldout: bool) -> None:
        self.edge = edge
        self.heldout = heldout

    def any(self, rng: np.random.Generator) -> Picture:
        """7 in 10 scenes, the rest digits and photographs."""
        pick = rng.random()
        return self.scene(rng)[0] if pick < 0.7 else self.digit(rng) if pick < 0.85 else self.photo(rng)

    def scene(self, rng: np.random.Generator, shapes: int | None = None) -> tuple[Picture, scenes.Scene]:
        scene = scenes.sample_scene(rng, shapes=shapes, heldout=self.heldout)
        image = scenes.render(scene, self.edge, rng)
        return Picture(image, scenes.caption(scene), scenes.alt_text(scene, rng), "scene", "scenes"), scene

    def digit(self, rng: np.random.Generator) -> Picture:
        images, labels = _digits()
        chosen = np.flatnonzero((np.arange(len(labels)) % 6 == 0) == self.heldout)
        index = int(chosen[rng.integers(len(chosen))])
        size = int(self.edge * rng.uniform(0.7, 1.0))
        ink = np.asarray(
            Image.fromarray(np.uint8(images[index] * (255 / 16))).resize((size, size), Image.Resampling.BICUBIC)
        )
        canvas = np.zeros((self.edge, self.edge), np.float32)
        y, x = (int(rng.integers(self.edge - size + 1)) for _ in range(2))
        canvas[y : y + size, x : x + size] = ink / 255.0
        color, paper = rng.integers(0, 90, size=3), np.asarray(scenes.BACKGROUNDS[int(rng.integers(4))])
        image = Image.fromarray(np.uint8(paper + (color - paper) * canvas[..., None]))
        word = scenes.NUMBERS[int(labels[index])]
        alt = (f"{word} handwritten", f"digit {labels[index]}", f"a handwritten {word}")[int(rng.integers(3))]
        return Picture(image, f"a handwritten {word}", alt, "digit", f"scikit-learn/digits/{index}")

    def photo(self, rng: np.random.Generator) -> Picture:
        """A square cut-out: training from the left two thirds of a photograph, held-out from the right."""
        name = list(PHOTOS)[int(rng.integers(len(PHOTOS)))]
        photo = _photo(name)
        width, height = photo.size
        border = width * 2 // 3
        left, right = (border, width) if self.heldout else (0, border)
        side = int(min(right - left, height) * rng.uniform(0.6, 1.0))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(height - side + 1))
        image = photo.resize((self.edge,) * 2, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        what = PHOTOS[name]
        noun = what.split(" ", 1)[-1]
        alt = (noun, f"{noun} photo {int(rng.integers(100, 1000))}", f"a photo of {what}")[int(rng.integers(3))]
        return Picture(image, f"a photo of {what}", alt, "photo", f"scikit-image/{name}")

    def words(self, rng: np.random.Generator, vocabulary: list[str]) -> Picture:
        """A number below 100 or a word of the vocabulary, in the largest letters that fit."""
        word = str(rng.integers(100)) if rng.random() < 0.4 else vocabulary[int(rng.integers(len(vocabulary)))]
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
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


@functools.cache
def _photo(name: str) -> Image.Image:
    import skimage.data

    path = Path(skimage.data.__file__).parent / name
    if not path.is_file():
        raise DataError(f"{path}: scikit-image has no such photograph; install scikit-image 0.24 or later")
    return Image.open(path).convert("RGB")


@functools.cache
def _easy_vqa(split: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(image path, [(question, answer), ...]) of every image of easy-vqa's "train" or "test" split."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    turns: dict[int, list[tuple[str, str]]] = {image: [] for image in sorted(paths)}
    for question, answer, image in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        turns[image].append((question, answer))
    return [(paths[image], asked) for image, asked in turns.items() if asked]


class DemoSets:
    """The parts of the demo sets; each ``write_*`` fills the folder it is given."""

    def __init__(self, root: Path, seed: int, sizes: DemoSizes, edge: int, vocabulary: int) -> None:
        self.root, self.seed, self.sizes, self.vocabulary = root, seed, sizes, vocabulary
        self.painter = Painter(edge, heldout=False)
        self.examiner = Painter(edge, heldout=True)

    def rng(self, part: str, index: int = 0) -> np.random.Generator:
        """Generator of one sample: independent of the number and order of the others."""
        digest = hashlib.blake2b(part.encode(), digest_size=4).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest, "little"), index])

    # Text -------------------------------------------------------------------------------------------------------------

    def write_text(self, folder: Path) -> Counts:
        documents = list(prose.documents())
        order = self.rng("text").permutation(len(documents))
        train = [documents[i].paragraphs for i in order if not documents[i].heldout()]
        heldout = [documents[i].paragraphs for i in order if documents[i].heldout()]
        return {
            "train_bytes": write_documents(folder / "train.txt", train, self.sizes.text_bytes),
            "heldout_bytes": write_documents(folder / "heldout.txt", heldout, self.sizes.text_bytes // 20),
        }

    def paragraphs(self) -> list[str]:
        return [line for line in (self.root / "text/train.txt").read_text().splitlines() if line]

    def write_s0(self, folder: Path) -> dict[str, int]:
        """Conversations without images. A base language model knows how people chat and describe things, before it sees
        any; without these the frozen text side could neither end an answer nor say "triangle"."""
        talks = {"prose": self._talk_text, "descriptions": self._talk_description}
        records = [
            talk(self.rng(f"s0/{name}", index), f"{name}_{index:05d}").save(folder / "images")
            for name, talk in talks.items()
            for index in range(self.sizes.s0_chat // len(talks))
        ]
        return {"chat": shards.write_jsonl(folder / "chat.jsonl", records)}

    def _talk_description(self, rng: np.random.Generator, id: str) -> Conversation:
        """Text only: what a picture that nobody shows might be described as."""
        return Conversation(id, [], [("describe a picture", self.painter.any(rng).caption)])

    # Stage 1 ----------------------------------------------------------------------------------------------------------

    def write_s1_1(self, folder: Path) -> Counts:
        """Alt text as written; one in fifty belongs to another picture."""
        with shards.ShardWriter(folder, samples_per_shard=1000) as writer:
            for index in range(self.sizes.s1_1):
                rng = self.rng("s1_1", index)
                picture = self.painter.any(rng)
                _write_pair(writer, picture, self.painter.any(rng).alt if index % 50 == 49 else picture.alt)
        return {"pairs": writer.samples}

    def write_s1_2(self, folder: Path) -> Counts:
        captions = []
        with shards.ShardWriter(folder, samples_per_shard=1000) as writer:
            for index in range(self.sizes.s1_2):
                picture = self.painter.any(self.rng("s1_2", index))
                captions.append({"key": _write_pair(writer, picture, picture.alt), "caption": picture.caption})
        shards.write_jsonl(folder / "captions.jsonl", captions)
        return {"pairs": writer.samples}

    def write_s1_3(self, folder: Path) -> Counts:
        """Captions, detection and OCR in the shares of the paper."""
        words = self._common_words()
        painters: dict[str, Callable[[np.random.Generator], tuple[Picture, str]]] = {
            "caption": lambda rng: _with_caption(self.painter.any(rng)),
            "detection": self._detection,
            "ocr": lambda rng: _with_caption(self.painter.words(rng, words)),
        }
        counts = {}
        for name, paint in painters.items():
            with shards.ShardWriter(folder / name, samples_per_shard=1000) as writer:
                for index in range(round(S1_3_SHARES[name] * self.sizes.s1_3)):
                    _write_pair(writer, *paint(self.rng(f"s1_3/{name}", index)))
            counts[name] = writer.samples
        return counts

    def _detection(self, rng: np.random.Generator) -> tuple[Picture, str]:
        picture, scene = self.painter.scene(rng, shapes=int(rng.integers(1, 3)))
        return picture, scenes.boxes_text([(shape.label, shape.box()) for shape in scene.shapes])

    def _common_words(self, count: int = 80) -> list[str]:
        words = collections.Counter(word for line in self.paragraphs() for word in line.lower().split())
        usual = [word for word, _ in words.most_common(4000) if 3 <= len(word) <= 5 and word.isalpha()]
        return usual[:count]

    # Stage 2 ----------------------------------------------------------------------------------------------------------

    def write_s2(self, folder: Path) -> Counts:
        makers: dict[str, tuple[float, Callable[[np.random.Generator, str], Conversation]]] = {
            "scenes": (0.56, self._talk_scene),
            "captions": (0.12, self._talk_caption),
            "easy_vqa": (0.15, self._talk_easy_vqa),
            "digits": (0.04, self._talk_digit),
            "photos": (0.03, self._talk_photo),
            "pairs": (0.05, self._talk_pair),
            "text": (0.05, self._talk_text),
        }
        counts = {}
        for name, (share, talk) in makers.items():
            records = (
                talk(self.rng(f"s2/{name}", index), f"{name}_{index:05d}").save(folder / "images")
                for index in range(max(1, round(share * self.sizes.s2)))
            )
            counts[name] = shards.write_jsonl(folder / f"{name}.jsonl", records)
        return counts

    def _talk_scene(self, rng: np.random.Generator, id: str) -> Conversation:
        picture, scene = self.painter.scene(rng)
        asked = scenes.questions(scene, rng, 4)
        return Conversation(id, [picture.image], [(q.text, q.answer) for q in asked])

    def _talk_caption(self, rng: np.random.Generator, id: str) -> Conversation:
        picture = self.painter.any(rng)
        return Conversation(id, [picture.image], [(CAPTION_PROMPT, picture.caption)])

    def _talk_easy_vqa(self, rng: np.random.Generator, id: str) -> Conversation:
        images = _easy_vqa("train")
        path, turns = images[int(rng.integers(len(images)))]
        chosen = rng.permutation(len(turns))[:4]
        return Conversation(id, [_fitted(path, self.painter.edge)], [turns[i] for i in chosen])

    def _talk_digit(self, rng: np.random.Generator, id: str) -> Conversation:
        picture = self.painter.digit(rng)
        return Conversation(id, [picture.image], [("which digit is this?", picture.caption.split()[-1])])

    def _talk_photo(self, rng: np.random.Generator, id: str) -> Conversation:
        picture = self.painter.photo(rng)
        return Conversation(
            id, [picture.image], [("what is in the photo?", picture.caption.removeprefix("a photo of "))]
        )

    def _talk_pair(self, rng: np.random.Generator, id: str) -> Conversation:
        """Two images in the first turn, or one in each of two turns."""
        (first, a), (second, b) = (self.painter.scene(rng, shapes=1) for _ in range(2))
        labels = [scenes.article(s.shapes[0].label) for s in (a, b)]
        same = "yes" if a.shapes[0].color == b.shapes[0].color else "no"
        if rng.integers(2):
            turns = [
                ("Image-1: <image>\nImage-2: <image>\nwhat is in image 1?", labels[0]),
                ("and in image 2?", labels[1]),
            ]
        else:
            turns = [("<image>\nwhat is in the image?", labels[0]), ("<image>\nand in this one?", labels[1])]
        return Conversation(id, [first.image, second.image], [*turns, ("do both have the same color?", same)])

    def _talk_text(self, rng: np.random.Generator, id: str) -> Conversation:
        """Text only: a sentence of the prose to be continued."""
        paragraphs = self._prose
        words = paragraphs[int(rng.integers(len(paragraphs)))].split()[:24]
        half = len(words) // 2
        return Conversation(id, [], [(f"continue: {' '.join(words[:half])}", " ".join(words[half:]))])

    @functools.cached_property
    def _prose(self) -> list[str]:
        return self.paragraphs()

    # Held out ---------------------------------------------------------------------------------------------------------

    def write_heldout(self, folder: Path) -> Counts:
        asked = {
            "captions": (self.sizes.heldout_captions, self._exam_caption),
            "questions": (self.sizes.heldout_questions, self._exam_question),
            "easy_vqa": (self.sizes.heldout_questions // 2, self._exam_easy_vqa),
        }
        counts = {}
        for name, (count, exam) in asked.items():
            records = (exam(index, f"{name}_{index:05d}").save(folder / "images") for index in range(count))
            counts[name] = shards.write_jsonl(folder / f"{name}.jsonl", records)
        return counts

    def _exam_caption(self, index: int, id: str) -> Conversation:
        picture = self.examiner.any(self.rng("heldout/captions", index))
        return Conversation(id, [picture.image], [(CAPTION_PROMPT, picture.caption)], picture.kind)

    def _exam_question(self, index: int, id: str) -> Conversation:
        """Every kind of question equally often."""
        rng = self.rng("heldout/questions", index)
        kind = list(scenes.QUESTION_KINDS)[index % len(scenes.QUESTION_KINDS)]
        while True:
            picture, scene = self.examiner.scene(rng)
            asked = scenes.QUESTION_KINDS[kind](scene, rng)
            if asked is not None:
                return Conversation(id, [picture.image], [asked], kind)

    def _exam_easy_vqa(self, index: int, id: str) -> Conversation:
        rng = self.rng("heldout/easy_vqa", index)
        images = _easy_vqa("test")
        path, turns = images[int(rng.integers(len(images)))]
        return Conversation(id, [_fitted(path, self.examiner.edge)], [turns[int(rng.integers(len(turns)))]], "easy_vqa")

    # Tokenizer --------------------------------------------------------------------------------------------------------

    def write_tokenizer(self, folder: Path) -> Counts:
        return train_tokenizer(folder, self._sentences(), self.vocabulary)

    def _sentences(self) -> Iterator[str]:
        """The prose, and every caption, question and answer that is trained on."""
        yield from self.paragraphs()
        for path in sorted(self.root.glob("s1_*/**/*.parquet")):
            import pyarrow.parquet as pq

            yield from pq.read_table(path, columns=["caption"]).column("caption").to_pylist()
        yield from (record["caption"] for record in shards.read_jsonl(self.root / "s1_2/captions.jsonl"))
        for path in sorted(self.root.glob("s[02]/*.jsonl")):
            for record in shards.read_jsonl(path):
                yield from (turn["value"].rsplit("\n", 1)[-1] for turn in record["conversations"])
        yield from ["user", "assistant", "system", CAPTION_PROMPT, DETECTION_PROMPT, OCR_PROMPT] * 1000


def _write_pair(writer: shards.ShardWriter, picture: Picture, text: str) -> str:
    return writer.write(shards.encode_image(picture.image), text, size=picture.image.size, url=picture.origin)


def _with_caption(picture: Picture) -> tuple[Picture, str]:
    return picture, picture.caption


def _fitted(path: str, edge: int) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image if image.size == (edge, edge) else image.resize((edge, edge), Image.Resampling.BICUBIC)


def build_demo_sets(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    sizes: DemoSizes | None = None,
    edge: int = 64,
    token_pixels: int = 16,
    vocabulary: int = 1024,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds the demo sets, or what is missing of them, and returns the manifest with absolute paths.

    Args:
      out_dir: folder of the sets. Parts that an earlier call finished with the same arguments are kept; each
        part appears only when it is whole, so that an interrupted build goes on where it was.
      seed: decides every picture, text and split.
      sizes: samples of each set.
      edge: edge of the pictures in pixels: the tile size to train with.
      token_pixels: edge of the square that one visual token covers; divides ``edge``.
      vocabulary: pieces of the tokenizer, without the added tokens.
      progress: is told each step in one line.

    Raises:
      DataError: a package is missing, or an argument does not fit.
    """
    sizes = sizes or DemoSizes()
    if edge % token_pixels:
        raise DataError(
            f"edge={edge} is no multiple of token_pixels={token_pixels}: choose, say, edge=64, token_pixels=16"
        )
    root = Path(out_dir)
    settings = {
        "version": VERSION,
        "seed": seed,
        "sizes": dataclasses.asdict(sizes),
        "edge": edge,
        "vocabulary": vocabulary,
    }
    say = progress or (lambda line: None)
    sets = DemoSets(root, seed, sizes, edge, vocabulary)
    parts = {
        "text": sets.write_text,
        "s0": sets.write_s0,
        "s1_1": sets.write_s1_1,
        "s1_2": sets.write_s1_2,
        "s1_3": sets.write_s1_3,
        "s2": sets.write_s2,
        "heldout": sets.write_heldout,
        "tokenizer": sets.write_tokenizer,
    }
    try:
        counts = {name: build_part(root, name, settings, write, say) for name, write in parts.items()}
    except ImportError as error:
        raise DataError(f"the demo sets need the package {error.name}: pip install -r requirements.txt") from error
    manifest = _manifest(root, settings, token_pixels, counts)
    write_manifest(root, manifest)
    return load_manifest(root)


def _manifest(
    root: Path, settings: Mapping[str, Any], token_pixels: int, counts: Mapping[str, Counts]
) -> dict[str, Any]:
    def source(name: str, spec: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {"name": name, "spec": spec, **options}

    def tar(folder: str, **options: str) -> dict[str, Any]:
        return {"kind": "tar", "paths": [f"{folder}/*.tar"], **options}

    s1_3 = {"caption": CAPTION_PROMPT, "detection": DETECTION_PROMPT, "ocr": OCR_PROMPT}
    sources = {
        "s0": [
            source("prose", {"kind": "text", "paths": ["text/train.txt"]}),
            source("chat", {"kind": "jsonl", "paths": ["s0/chat.jsonl"]}),
        ],
        "s1_1": [source("alt_text", tar("s1_1"), prompts=[CAPTION_PROMPT])],
        "s1_2": [source("captions", tar("s1_2", captions="s1_2/captions.jsonl"), prompts=[CAPTION_PROMPT])],
        "s1_3": [
            source(name, tar(f"s1_3/{name}"), weight=S1_3_SHARES[name], prompts=[prompt])
            for name, prompt in s1_3.items()
        ],
        "s2": [
            source(name, {"kind": "jsonl", "paths": [f"s2/{name}.jsonl"], "image_root": "s2/images"})
            for name in counts["s2"]
        ],
    }
    samples = {"s0": len((root / "text/train.txt").read_text().split("\n\n")) - 1}
    samples |= {stage: sum(counts[stage].values()) for stage in STAGES[1:]}
    return {
        "version": settings["version"],
        "seed": settings["seed"],
        "tile_size": settings["edge"],
        "token_pixels": token_pixels,
        "tokenizer": "tokenizer",
        "stages": {stage: {"samples": samples[stage], "sources": sources[stage]} for stage in STAGES},
        "heldout": {
            "text": "text/heldout.txt",
            **{
                name: heldout_entry(root, f"heldout/{name}.jsonl", graded=name != "captions")
                for name in ("captions", "questions", "easy_vqa")
            },
        },
        "packages": {
            name: _version(name) for name in ("scikit-learn", "scikit-image", "easy-vqa", "pillow", "sentencepiece")
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(
        "demo_sets", __doc__, "example: python -m data_pipelines.demo_sets --out=runs/demo/data --s2=12000"
    )
    parser.add_argument("--out", required=True, help="folder of the sets, for example runs/demo/data")
    parser.add_argument("--seed", type=int, default=0, help="decides every picture, text and split (default 0)")
    for field in dataclasses.fields(DemoSizes):
        what = "bytes of prose" if field.name == "text_bytes" else f"samples of {field.name}"
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, metavar="N", help=f"{what} (default {field.default})"
        )
    options = parser.parse_args(arguments)
    sizes = DemoSizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(DemoSizes)})
    manifest = build_demo_sets(options.out, seed=options.seed, sizes=sizes, progress=print)
    if options.json:
        command.json_line(manifest)


if __name__ == "__main__":
    command.run(main)
