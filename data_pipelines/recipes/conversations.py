"""Conversations in LLaVA format, and the common wording of answers: numbers and boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.recipes.shard_writer import encode_image

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Turn = tuple[str, str]  # question, answer
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 on a scale of 0 to 1000


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Pictures and the turns about them, to be written to a JSONL file.

    Attributes:
      kind: the skill tested, or the type of picture (for held-out records).
    """

    id: str
    images: Sequence[Image.Image]
    turns: Sequence[Turn]
    kind: str | None = None

    def save(self, folder: Path, extension: str = "png") -> dict[str, Any]:
        """Writes the images into ``folder`` and returns the record that names them.

        Without a placeholder in any question, ``<image>`` is put before the first one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for number, image in enumerate(self.images):
            names.append(f"{self.id}.{extension}" if len(self.images) == 1 else f"{self.id}_{number}.{extension}")
            (folder / names[-1]).write_bytes(encode_image(image, extension))
        turns = list(self.turns)
        if names and not any("<image>" in question for question, _ in turns):
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        record: dict[str, Any] = {"id": self.id, "conversations": messages(turns)}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        if self.kind:
            record["kind"] = self.kind
        return record


def by_question(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record for each turn of ``record``, which has one image: no answer follows from an earlier turn then."""
    values = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
    return [
        {**record, "id": f"{record['id']}_{number:02d}", "conversations": messages([(f"<image>\n{asked}", answer)])}
        for number, (asked, answer) in enumerate(zip(values[::2], values[1::2]))
    ]


def messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """``[{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}, ...]``."""
    return [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]


def boxes_text(labels_and_boxes: Iterable[tuple[str, Box]]) -> str:
    """The answer to a detection prompt: ``<ref>red circle</ref><box>[[x1, y1, x2, y2]]</box>`` for each object."""
    return "".join(f"<ref>{label}</ref><box>[{list(box)}]</box>" for label, box in labels_and_boxes)
