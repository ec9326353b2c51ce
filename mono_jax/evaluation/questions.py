"""Held-out questions: a model's answers to LLaVA records, graded by exact match."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.benchmarks.other_pictures import partners
from mono_jax.evaluation.metrics.short_answers import same
from mono_jax.generation.decode import Generator
from mono_jax.generation.prompts import Prompt
from mono_jax.parallel.agreement import together

BATCH = 50  # questions answered at a time by default


@dataclasses.dataclass(frozen=True)
class Question:
    """``turns``: the turns before the answer, of which the last one asks. ``truth``: the right answer."""

    id: str
    image: Path
    turns: tuple[tuple[str, str], ...]
    truth: str
    kind: str


def read_questions(path: str | Path, image_root: str | Path) -> list[Question]:
    """Questions of a JSONL file of LLaVA records with one image each; raises DataError that names the line."""
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            turns = tuple((turn["from"], turn["value"]) for turn in record["conversations"])
            image = Path(image_root) / record["image"]
            questions.append(Question(str(record["id"]), image, turns[:-1], turns[-1][1], str(record.get("kind", ""))))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: not a LLaVA record with an image: {type(error).__name__} {error}"
            ) from None
    return questions


def opened(question: Question) -> Image.Image:
    """Its picture in RGB. Raises DataError that names the file."""
    try:
        return Image.fromarray(decode(question.image.read_bytes(), ImageLimits()))
    except OSError as error:
        raise DataError(f"{question.image}: {error.strerror}") from None
    except BadSample as error:
        raise DataError(f"{question.image}: {error.reason} {error.detail}".rstrip()) from None


def to_prompt(builder: SampleBuilder, question: Question) -> Prompt:
    """Ids and pixels, built by the same code that builds training samples. Raises BadSample or OSError."""
    return _asker(None, builder).ask(question.turns, [(question.image.name, question.image.read_bytes())])


def answer(
    generator: Generator,
    builder: SampleBuilder,
    questions: Sequence[Question],
    max_new_tokens: int = 32,
    batch: int = BATCH,
) -> list[str]:
    """Greedy answers, in the order of the questions; ``batch`` of them at a time."""
    with together():
        prompts = [to_prompt(builder, question) for question in questions]
    answers = [""] * len(prompts)
    for part in _asker(generator, builder).generate(prompts, max_new_tokens, batch):
        for number, text in part:
            answers[number] = text
    return answers


def _asker(generator: Generator | None, builder: SampleBuilder) -> Asker:
    pixel_path = builder.config.pixel_path
    return Asker(generator, builder.tokenizer, builder.chat, builder.tiling, builder.limits, pixel_path)


def with_other_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions about the images of others; as they are if there is one image only."""
    others = partners([(question.image,) for question in questions])
    return [
        question if other is None else dataclasses.replace(question, image=questions[other].image)
        for question, other in zip(questions, others)
    ]


def grade(
    questions: Sequence[Question], answers: Sequence[str], blind_answers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Share of answers that equal the truth (ignoring case and surrounding whitespace), overall and by kind.

    "majority": the score of always giving the most common truth of all questions; "by_kind" has the same per kind, so
    that a kind with only two possible answers cannot pass for skill.

    ``blind_answers``: to the same questions about other images. They add "blind", their score, and "gained" and "lost",
    the numbers of questions answered correctly with the right image only, and with the other one only.
    """

    def scores(numbers: Sequence[int]) -> dict[str, Any]:
        truths, count = collections.Counter(questions[i].truth for i in numbers), len(numbers)
        right = {i for i in numbers if same(questions[i].truth, answers[i])}
        common, times = truths.most_common(1)[0]
        found = {"accuracy": len(right) / count, "majority": times / count, "majority_answer": common}
        if blind_answers is not None:
            blind = {i for i in numbers if same(questions[i].truth, blind_answers[i])}
            found |= {"blind": len(blind) / count, "gained": len(right - blind), "lost": len(blind - right)}
        return found | {"questions": count}

    if not len(questions) == len(answers) == len(answers if blind_answers is None else blind_answers):
        raise ValueError(f"{len(questions)} questions have {len(answers)} answers")
    by_kind: dict[str, list[int]] = collections.defaultdict(list)
    for number, question in enumerate(questions):
        by_kind[question.kind].append(number)
    kinds = {kind: scores(numbers) for kind, numbers in sorted(by_kind.items())}
    return scores(range(len(questions))) | {"by_kind": kinds}
