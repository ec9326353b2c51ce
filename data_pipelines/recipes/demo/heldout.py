"""Held-out captions and questions, on which the demo is evaluated; none of them is used in training."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.recipes.conversations import Conversation
from data_pipelines.recipes.demo.build import DemoBuild
from data_pipelines.recipes.demo.conversations import sample_easy_vqa
from data_pipelines.recipes.demo.questions import QUESTION_KINDS
from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.parts import Counts


def write_heldout(build: DemoBuild, folder: Path) -> Counts:
    """Captions of any picture, questions about scenes, and half as many questions from easy-vqa's test split."""
    makers = {
        "captions": (build.sizes.heldout_captions, _caption),
        "questions": (build.sizes.heldout_questions, _question),
        "easy_vqa": (build.sizes.heldout_questions // 2, _easy_vqa),
    }
    counts = {}
    for name, (count, make) in makers.items():
        records = (make(build, index, f"{name}_{index:05d}").save(folder / "images") for index in range(count))
        counts[name] = write_jsonl(folder / f"{name}.jsonl", records)
    return counts


def _caption(build: DemoBuild, index: int, id: str) -> Conversation:
    picture = build.heldout_painter.any(build.rng("heldout/captions", index))
    return Conversation(id, [picture.image], [(CAPTION_PROMPT, picture.caption)], picture.kind)


def _question(build: DemoBuild, index: int, id: str) -> Conversation:
    """Every kind of question equally often."""
    rng = build.rng("heldout/questions", index)
    kind = list(QUESTION_KINDS)[index % len(QUESTION_KINDS)]
    while True:
        picture, scene = build.heldout_painter.scene(rng)
        turn = QUESTION_KINDS[kind](scene, rng)
        if turn is not None:
            return Conversation(id, [picture.image], [turn], kind)


def _easy_vqa(build: DemoBuild, index: int, id: str) -> Conversation:
    rng = build.rng("heldout/easy_vqa", index)
    image, turns = sample_easy_vqa("test", build.edge, rng)
    return Conversation(id, [image], [turns[int(rng.integers(len(turns)))]], "easy_vqa")
