"""Multiple choice: the option that an answer names, accuracy, and circular evaluation (MMBench, CCBench)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.metric import Answered, Measure, measure

REFUSED = "Z"  # VLMEvalKit's letter for "none of them"; no option has this letter
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SENTENCE = re.compile(r"answer\s+is\s+\**([A-D])\**", re.IGNORECASE)
_LAST_WORDS = 5  # a letter counts if it is among this many last words


def choice_of(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the only option that ``answer`` names by letter or text; "" if it names none or several.

    The rule is VLMEvalKit's without a judge. Where VLMEvalKit would then ask GPT or guess, the answer is wrong here.
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str:
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    said = _SENTENCE.search(answer)
    return said[1].upper() if said and said[1].upper() in options else ""


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    """An answer that is much longer than all options together says something else."""
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


def right_choice(example: Answered) -> float:
    """1 if the answer names the right option. The truth is a letter; needs no fields, only ``options``.

    Raises DataError for an example without options.
    """
    if not example.options:
        raise DataError(
            f"example {example.id}: no options, which this metric needs: give them as columns A, B, ... of a "
            "benchmark's file, or use the metric exact_match"
        )
    return float(choice_of(example.answer, example.options) == example.truth.strip())


def question_of(example: Answered) -> str:
    """The question of which an example is one order. Field: "question". MMBench numbers orders q, q + 1,000,000, ..."""
    return str(example.field("question"))


def circular(examples: Sequence[Answered]) -> dict[str, Measure]:
    """ "circular": a question is right if it is right in every order of its options; "accuracy": each order by itself.

    If no question occurs in two orders, "circular" would equal "accuracy", and is left out.
    Field: "question", see ``question_of``.
    """
    questions = {example.id: question_of(example) for example in examples}
    right = {example.id: right_choice(example) for example in examples}
    whole: dict[str, float] = {}
    for name, question in questions.items():
        whole[question] = min(whole.get(question, 1.0), right[name])
    each = measure(((questions[name], (hit, 1)) for name, hit in right.items()), is_share=True)
    if len(whole) == len(right):
        return {"accuracy": each}
    every = measure(((question, (hit, 1)) for question, hit in whole.items()), is_share=True)
    return {"circular": every, "accuracy": each}
