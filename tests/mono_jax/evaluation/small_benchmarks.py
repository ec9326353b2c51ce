"""Small files in the layouts of benchmarks whose scores depend on more than a right answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "white")
TASKS = ("pope", "mme", "mmbench_dev_en", "hallusionbench", "textvqa_val", "refcoco_val", "coco", "mmmu_val")


def png(colour: str) -> str:
    """Base64."""
    data = io.BytesIO()
    Image.new("RGB", (40, 24), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    file.write_text("".join("\t".join(line) + "\n" for line in lines))


def write(folder: Path) -> Path:
    """All of ``TASKS``, with four images each; no image has a name."""
    asked = [
        {"index": 2 * i + j, "image": png(colour), "question": f"is it {other}?", "answer": ("Yes", "No")[j]}
        | {"category": "color"}
        for i, colour in enumerate(COLOURS)
        for j, other in enumerate((colour, "black"))
    ]
    table(folder / "POPE.tsv", asked)
    table(folder / "MME.tsv", asked)
    sets = [
        {**row, "index": f"VD_color_0_{i // 4}_{i // 2}_{i % 2}", "answer": 1 - i % 2, "l2-category": "color"}
        for i, row in enumerate(asked)
    ]
    table(folder / "HallusionBench.tsv", sets)
    orders = [
        {"index": i + 1_000_000 * order, "image": png(colour), "question": "which?", "A": first, "B": second}
        | {"answer": "AB"[order]}
        for order in range(2)
        for i, colour in enumerate(COLOURS)
        for first, second in [(colour, "black")[:: 1 - 2 * order]]
    ]
    table(folder / "MMBench_DEV_EN.tsv", orders)
    several = [
        {"index": i, "image": [png(colour), png("black")], "question": "<image 1> and <image 2>?", "answer": "A"}
        | {"split": "validation", "A": colour, "B": "grey"}
        for i, colour in enumerate(COLOURS)
    ]
    table(folder / "MMMU_DEV_VAL.tsv", several)
    named(folder)
    return folder


def named(folder: Path) -> None:
    """The tasks whose images are files."""
    for below in ("textvqa", "refcoco", "coco/annotations"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 24), colour).save(folder / f"{number}.png")
    images = [{"image": f"{number}.png"} for number in range(len(COLOURS))]
    questions = [{**image, "question": "colour?", "question_id": number} for number, image in enumerate(images)]
    boxes = [{**image, "sent": "it", "bbox": [4, 4, 36, 20], "width": 40, "height": 24} for image in images]
    for file, rows in (("textvqa/textvqa_val.jsonl", questions), ("refcoco/refcoco_val.jsonl", boxes)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    people = [
        {"question_id": number, "answers": [{"answer": answer} for answer in [colour] * 8 + ["a wall"] * 2]}
        for number, colour in enumerate(COLOURS)
    ]
    (folder / "textvqa/textvqa_val_annotations.json").write_text(json.dumps({"annotations": people}))
    captions = [{**image, "caption": [f"a wall in {c}", f"all of it is {c}"]} for image, c in zip(images, COLOURS)]
    (folder / "coco/annotations/coco_karpathy_test.json").write_text(json.dumps(captions))
