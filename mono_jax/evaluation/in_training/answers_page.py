"""Answers to some examples over the course of a run, as a log and as a page with their pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_pipelines.io import publish
from data_pipelines.io.html_pages import opening
from mono_jax.evaluation.benchmarks.page import small_copy
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.card { display: flex; gap: 1rem; border-top: 1px solid #8884; padding: 1rem 0; }
img { width: 10rem; height: 10rem; object-fit: contain; image-rendering: pixelated; }
td { padding: 0 .8rem 0 0; vertical-align: top; } .step { text-align: right; opacity: .6; }
""".strip()


Pictures = Mapping[tuple[str, str], Sequence[Picture]]  # {(task, id of the example): its pictures}
_TRUTHS = 6  # number of right answers shown


@dataclasses.dataclass(frozen=True)
class Shown:
    """The answer to one example at one step."""

    step: int
    task: str
    id: str
    asked: str
    truth: str
    answer: str


def shown(step: int, task: str, examples: Sequence[Example], answers: Sequence[str]) -> list[Shown]:
    """Pairs examples with their answers, up to the length of the shorter list."""
    return [
        Shown(step, task, each.id, each.asked, " | ".join(dict.fromkeys(each.truths[:_TRUTHS])), given)
        for each, given in zip(examples, answers)
    ]


def add(folder: Path, new: Sequence[Shown], pictures: Pictures) -> None:
    """Adds the answers of a step to FOLDER/answers.jsonl, and rebuilds FOLDER/answers.html from all of them.

    Existing answers of this step and later ones, from a run that was rolled back, are removed. Raises OSError.
    """
    file = folder / "answers.jsonl"
    known = [each for each in _read(file) if each.step < new[0].step] + list(new)
    publish.write_text(file, "".join(json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in known))
    publish.write_text(folder / "answers.html", page(known, pictures))


def _read(file: Path) -> Iterable[Shown]:
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # cut off by a kill
            yield Shown(**json.loads(line))


def page(answers: Iterable[Shown], pictures: Pictures) -> str:
    """A card for each example with its answers by step, and pictures for the examples that are still asked."""
    cards: dict[tuple[str, str], list[Shown]] = {}
    for each in answers:
        cards.setdefault((each.task, each.id), []).append(each)
    title = "Answers during training"
    parts = [f"{opening(title, _STYLE)}<h1>{title}</h1>"]
    task = None
    for (name, number), steps in cards.items():
        if name != task:
            task = name
            parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(_card(steps, pictures.get((name, number), ())))
    return "\n".join(parts) + "</html>\n"


def _card(steps: Sequence[Shown], pictures: Sequence[Picture]) -> str:
    first, images = steps[0], "".join(map(small_copy, pictures))
    rows = "".join(f"<tr><td class='step'>{s.step}</td><td>{html.escape(s.answer)}</td></tr>" for s in steps)
    return (
        f"<div class='card'>{images}<div>{html.escape(first.asked)}<br><b>{html.escape(first.truth)}</b>"
        f"<table>{rows}</table></div></div>"
    )
