"""Held-out questions: a model's answers to LLaVA records, graded by exact match."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.encoding.tiling import patch_cells
from data_pipelines.errors import DataError
from data_pipelines.special_tokens import END_TOKENS
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.parallel.agreement import together

BATCH = 50  # questions answered at once, unless the caller says otherwise


@dataclasses.dataclass(frozen=True)
class Question:
    """``turns``: what was said before the answer, the last turn asks. ``truth``: the right answer."""

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
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{path}:{number}: not a LLaVA record with an image: {type(error).__name__} {error}"
            ) from None
    return questions


def to_prompt(builder: SampleBuilder, question: Question) -> Prompt:
    """Ids and pixels, made by the very code that makes training samples."""
    patches = image_patches(
        question.image.read_bytes(), builder.tiling, builder.limits, builder.config.pixel_path, None
    )
    ids, _ = builder.chat.conversation(question.turns, [len(patches)], answer=True)
    return Prompt(ids, patches, patch_cells(builder.geometry, len(patches)))


def answer(
    generator: Generator,
    builder: SampleBuilder,
    questions: Sequence[Question],
    max_new_tokens: int = 32,
    batch: int = BATCH,
) -> list[str]:
    """Greedy answers, in the order of the questions; ``batch`` of them at once."""
    tokenizer = builder.tokenizer
    stops = [*(tokenizer.id(name) for name in END_TOKENS), tokenizer.eos]
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_tokens=tuple(s for s in stops if s is not None))
    with together():
        prompts = [to_prompt(builder, question) for question in questions]
    # Prompts of similar length together: a batch is padded to its longest.
    order = np.argsort([len(prompt.input_ids) for prompt in prompts], kind="stable")
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        for index, result in zip(part, generator.generate([prompts[i] for i in part], sampling)):
            answers[index] = tokenizer.decode(result.tokens).strip()
    return answers


def grade(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Share of answers that equal the truth (case and outer spaces aside), in all and by kind.

    "majority": what always giving the commonest truth of all questions would score; "by_kind" has the same
    per kind, so that a kind with two possible answers cannot pass for skill.
    """

    def scores(pairs: list[tuple[str, str]]) -> dict[str, Any]:
        truths = collections.Counter(truth for truth, _ in pairs)
        right = sum(truth.strip().lower() == given.strip().lower() for truth, given in pairs)
        common, times = truths.most_common(1)[0]
        count = len(pairs)
        return {"accuracy": right / count, "majority": times / count, "majority_answer": common, "questions": count}

    by_kind: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for question, given in zip(questions, answers, strict=True):
        by_kind[question.kind].append((question.truth, given))
    pairs = [pair for group in by_kind.values() for pair in group]
    return scores(pairs) | {"by_kind": {kind: scores(group) for kind, group in sorted(by_kind.items())}}
