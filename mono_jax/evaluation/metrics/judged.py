"""MathVista (Lu et al. 2023) and MM-Vet (Yu et al. 2023): a judge reads or grades the answers.

The prompts are this project's own: scores are comparable with each other, and with published ones as far as the
judges agree. Prompts and replies are stored, so that each answer is judged only once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, MutableMapping, Sequence

from mono_jax.evaluation.judges import Judge, JudgeError
from mono_jax.evaluation.metrics.metric import Answered, Measure, Metric, mean_of, measure
from mono_jax.evaluation.metrics.short_answers import levenshtein

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")  # of MM-Vet, in its categories' names
_TRIES = 3  # attempts at a usable reply
_MARKS, _STOPS = "*_`'\"()[]{}", ".,:;!"  # around a grade, and after it
_LETTER = re.compile(r"\(([a-zA-Z])\)")

EXTRACT = """A question about an image was answered. Copy out the final answer from the reply, and nothing else.
{form}

Question: {question}
Reply: {answer}
Final answer:"""

GRADE = """Grade a reply to a question about an image against the right answer, from 0.0 (wrong) to 1.0 (fully right), \
in steps of 0.1. Where parts of the right answer are joined by <AND>, each part counts the same and all are needed; \
where they are joined by <OR>, one of them is enough. What the reply adds does not count, unless it contradicts.
Answer with the number alone.

Question: {question}
Right answer: {truth}
Reply: {answer}
Grade:"""


class Memory:
    """A judge that is asked each prompt only once. ``kept``: {prompt: reply}, which the caller may store."""

    def __init__(self, judge: Judge, kept: MutableMapping[str, str] | None = None):
        self.name, self._judge, self.kept = judge.name, judge, {} if kept is None else kept

    def usable(self, prompt: str, read: Callable[[str], float | None]) -> float:
        """The result of ``read`` for the first reply it can use. Raises JudgeError after a few tries."""
        for _ in range(_TRIES):
            reply = self.kept[prompt] if prompt in self.kept else self._judge(prompt)
            if (value := read(reply)) is not None:
                self.kept[prompt] = reply
                return value
            self.kept.pop(prompt, None)
        raise JudgeError(f"judge {self.name}: no grade in its reply {reply[:80]!r}")

    def reply(self, prompt: str) -> str:
        if prompt not in self.kept:
            self.kept[prompt] = self._judge(prompt)
        return self.kept[prompt]


def mm_vet(judge: Memory) -> Metric:
    """Mean grade, overall and by ability; ``category`` names an example's abilities: "ocr,math"."""

    def metric(examples: Sequence[Answered]) -> dict[str, Measure]:
        grades = {}
        for example in examples:
            truth = example.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            prompt = GRADE.format(question=example.field("question"), truth=truth, answer=example.answer)
            grades[example.id] = judge.usable(prompt, _grade)

        def mean(chosen: Sequence[Answered]) -> Measure:
            return measure((example.unit, (grades[example.id], 1)) for example in chosen)

        by_ability = {name: [example for example in examples if name in example.category] for name in ABILITIES}
        return {"grade": mean(examples)} | {name: mean(chosen) for name, chosen in by_ability.items() if chosen}

    return metric


def _grade(reply: str) -> float | None:
    """The number that the reply ends with, whatever marks are around it; None if it is no grade."""
    try:
        grade = float(reply.split()[-1].lstrip(_MARKS).rstrip(_MARKS + _STOPS))
    except (ValueError, IndexError):
        return None
    return grade if 0 <= grade <= 1 else None


def math_vista(judge: Memory) -> Metric:
    """Share of right answers, which a judge extracts from the replies unless they are nothing but an answer.

    ``truths``: the answer in the benchmark's wording (an option's text). Fields: "question", "question_type"
    (multi_choice, free_form), "answer_type" (text, integer, float, list), "precision" (decimals of a float; None =
    compared as numbers, as VLMEvalKit does, whose scorer reads no precision); ``options`` of a choice.
    """

    def right(example: Answered) -> float:
        answer = example.answer.strip()
        if not _is_bare(answer, example):
            form = f"It is a value of type {example.field('answer_type')}."
            if example.options:
                form = "It is one of: " + "; ".join(f"({key}) {text}" for key, text in example.options.items()) + "."
            question = example.field("question")
            answer = judge.reply(EXTRACT.format(form=form, question=question, answer=answer))
        return float(normal_answer(answer, example) == example.truth)

    return mean_of(right)


def _is_bare(answer: str, example: Answered) -> bool:
    """Whether a reply is nothing but the answer: an option or its letter, or a number."""
    if not answer:
        return True
    if example.options:
        return answer in example.options.values() or answer.strip("().") in example.options
    kind = {"integer": int, "float": float, "list": _list}.get(str(example.field("answer_type")))
    try:
        return kind is not None and kind(answer) is not None
    except (ValueError, RecursionError):
        return False


def _list(text: str) -> list:
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError
    return found


def normal_answer(extracted: str, example: Answered) -> str | None:
    """An extracted answer in the form of the truths: the nearest option's text, or a number of the right precision.

    None is right nowhere: no number, or nothing at all, to which MathVista's rule finds the shortest option nearest.
    """
    extracted = extracted.strip()
    if not extracted:
        return None
    if example.field("question_type") == "multi_choice":
        if letter := _LETTER.search(extracted):
            extracted = letter[1].upper()
        if extracted in example.options:
            return example.options[extracted]
        return min(example.options.values(), key=lambda text: levenshtein(extracted, text))
    kind = example.field("answer_type")
    if kind not in ("integer", "float"):
        return extracted
    try:
        number = float(extracted)
        return str(int(number)) if kind == "integer" else _rounded(number, example)
    except (ValueError, OverflowError):
        return None


def _rounded(number: float, example: Answered) -> str:
    if (precision := example.field("precision")) is not None:
        return str(round(number, int(precision)))
    return example.truth if number == float(example.truth) else str(number)


def misread(examples: Sequence[Answered]) -> list[Answered]:
    """The examples of MathVista whose right answer would be wrong whoever extracted it."""
    return [example for example in examples if normal_answer(example.truth, example) != example.truth]
