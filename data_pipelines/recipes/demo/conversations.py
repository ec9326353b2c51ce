"""Training conversations: without images (S0) and about pictures (S2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.recipes.conversations import Conversation, Turn
from data_pipelines.recipes.demo.build import DemoBuild
from data_pipelines.recipes.demo.questions import sample_questions
from data_pipelines.recipes.demo.scenes import article
from data_pipelines.recipes.easy_vqa import read_easy_vqa
from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.parts import Counts

Maker = Callable[[DemoBuild, np.random.Generator, str], Conversation]  # the string is the conversation's id


def write_s0(build: DemoBuild, folder: Path) -> Counts:
    """Conversations without images: half prose to be continued, half descriptions.

    A base language model already knows how people chat and describe things before it sees images; without these
    conversations the frozen text side could neither end an answer nor say "triangle".
    """
    makers: dict[str, Maker] = {"prose": _continuation, "descriptions": _description}
    count = build.sizes.s0_chat // len(makers)
    records = [record for name, make in makers.items() for record in _records(build, "s0", name, make, count, folder)]
    return {"chat": write_jsonl(folder / "chat.jsonl", records)}


def write_s2(build: DemoBuild, folder: Path) -> Counts:
    """Conversations of seven kinds, most of them about composed scenes."""
    makers: dict[str, tuple[float, Maker]] = {  # share of S2
        "scenes": (0.56, _about_scene),
        "captions": (0.12, _about_any),
        "easy_vqa": (0.15, _about_easy_vqa),
        "digits": (0.04, _about_digit),
        "photos": (0.03, _about_photo),
        "pairs": (0.05, _about_two_scenes),
        "text": (0.05, _continuation),
    }
    counts = {}
    for name, (share, make) in makers.items():
        records = _records(build, "s2", name, make, max(1, round(share * build.sizes.s2)), folder)
        counts[name] = write_jsonl(folder / f"{name}.jsonl", records)
    return counts


def _records(
    build: DemoBuild, stage: str, name: str, make: Maker, count: int, folder: Path
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        rng = build.rng(f"{stage}/{name}", index)
        yield make(build, rng, f"{name}_{index:05d}").save(folder / "images")


def _continuation(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    """Text-only: a sentence of the prose, to be continued."""
    words = build.paragraphs[int(rng.integers(len(build.paragraphs)))].split()[:24]
    half = len(words) // 2
    return Conversation(id, [], [(f"continue: {' '.join(words[:half])}", " ".join(words[half:]))])


def _description(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    """Text-only: the caption of a picture that is not shown."""
    return Conversation(id, [], [("describe a picture", build.painter.any(rng).caption)])


def _about_scene(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    picture, scene = build.painter.scene(rng)
    questions = sample_questions(scene, rng, 4)
    return Conversation(id, [picture.image], [(question.text, question.answer) for question in questions])


def _about_any(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    picture = build.painter.any(rng)
    return Conversation(id, [picture.image], [(CAPTION_PROMPT, picture.caption)])


def _about_easy_vqa(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    image, turns = sample_easy_vqa("train", build.edge, rng)
    order = rng.permutation(len(turns))[:4]
    return Conversation(id, [image], [turns[i] for i in order])


def _about_digit(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    picture = build.painter.digit(rng)
    return Conversation(id, [picture.image], [("which digit is this?", picture.caption.split()[-1])])


def _about_photo(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    picture = build.painter.photo(rng)
    answer = picture.caption.removeprefix("a photo of ")
    return Conversation(id, [picture.image], [("what is in the photo?", answer)])


def _about_two_scenes(build: DemoBuild, rng: np.random.Generator, id: str) -> Conversation:
    """Two images in the first turn, or one image in each of two turns."""
    (first, scene_1), (second, scene_2) = (build.painter.scene(rng, shapes=1) for _ in range(2))
    (shape_1,), (shape_2,) = scene_1.shapes, scene_2.shapes
    if rng.integers(2):
        questions = ("Image-1: <image>\nImage-2: <image>\nwhat is in image 1?", "and in image 2?")
    else:
        questions = ("<image>\nwhat is in the image?", "<image>\nand in this one?")
    turns: list[Turn] = [
        (questions[0], article(shape_1.label)),
        (questions[1], article(shape_2.label)),
        ("do both have the same color?", "yes" if shape_1.color == shape_2.color else "no"),
    ]
    return Conversation(id, [first.image, second.image], turns)


def sample_easy_vqa(split: str, edge: int, rng: np.random.Generator) -> tuple[Image.Image, list[Turn]]:
    """One RGB image of easy-vqa's split "train" or "test", ``edge`` pixels wide and high, and all its turns."""
    images = _easy_vqa(split)
    path, turns = images[int(rng.integers(len(images)))]
    image = Image.open(path).convert("RGB")
    return image if image.size == (edge, edge) else image.resize((edge, edge), Image.Resampling.BICUBIC), turns


@functools.cache
def _easy_vqa(split: str) -> list[tuple[Path, list[Turn]]]:
    import easy_vqa

    return read_easy_vqa(Path(easy_vqa.__file__).parents[1], split)
