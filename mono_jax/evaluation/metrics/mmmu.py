"""MMMU (Yue et al. 2023): multiple-choice and open questions, read from long answers by the benchmark's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mono_jax.evaluation.metrics.metric import Answered

_MARKS = ",.!?;:'"
_SHORTEST_SENTENCE = 5  # words; only longer answers are searched for the text of an option
_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e5
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.5
)


def right(example: Answered) -> float:
    """1 if the answer is right. The truth is a letter if there are options, otherwise any of the truths."""
    if example.options:
        return float(choice_of(example.answer, example.options) == example.truth)
    return float(is_right_text(example.answer, example.truths))


def choice_of(answer: str, options: Mapping[str, str]) -> str:
    """The option named last: as (A), else as A, else by its text; "" if none, where the benchmark's code guesses."""
    for mark in _MARKS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    bracketed = [letter for letter in options if f"({letter})" in answer]
    if bracketed:
        return max(bracketed, key=lambda letter: answer.rfind(f"({letter})"))
    if letters := [letter for letter in options if f" {letter} " in answer]:
        return max(letters, key=lambda letter: answer.rfind(f" {letter} "))
    if len(answer.split()) <= _SHORTEST_SENTENCE:
        return ""
    lower = answer.lower()
    texts = [letter for letter, text in options.items() if text.lower() in lower]
    return max(texts, key=lambda letter: lower.rfind(options[letter].lower()), default="")


def is_right_text(answer: str, truths: tuple[str, ...]) -> bool:
    """Whether a truth occurs in one of the key phrases of an answer, or equals one of their numbers."""
    right = {value for truth in truths for value in _normal(truth)}
    for given in {value for phrase in _phrases(answer) for value in _normal(phrase)}:
        if isinstance(given, float):
            if given in right:
                return True
        elif any(isinstance(text, str) and text in given for text in right):
            return True
    return False


def _phrases(answer: str) -> Iterator[str]:
    """For each line, the shortest text after a marker that an answer follows (the whole answer if no line has one)."""
    lines = answer.strip().strip(".").lower().split("\n")
    found = []
    for number, line in enumerate(lines):
        signs = (*_SIGNS, "=") if number == len(lines) - 1 else _SIGNS
        tails = [line.rsplit(sign, 1)[1].strip() for sign in signs if sign in line]
        # As in the benchmark: an empty tail is replaced by the next one, whatever its length.
        shortest = None
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(_MARKS):
            found.append(shortest)
    for phrase in found or ["\n".join(lines)]:
        yield phrase
        for pattern in _NUMBERS:
            yield from pattern.findall(phrase)


def _normal(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-case text; a single letter must be next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
