"""Short answers: exact match, relaxed accuracy (ChartQA), ANLS (DocVQA, InfoVQA), containment (OCRBench)."""

from __future__ import annotations

from mono_jax.evaluation.metrics.metric import Answered

RELATIVE_CHANGE = 0.05  # from a right number that relaxed accuracy accepts
ANLS_THRESHOLD = 0.5  # a similarity below it counts as 0
FORMULAS = "Handwritten Mathematical Expression Recognition"  # OCRBench's category that is compared without spaces


def same(truth: str, answer: str) -> bool:
    """Whether two texts are equal, ignoring case and surrounding whitespace."""
    return truth.strip().lower() == answer.strip().lower()


def exact_match(example: Answered) -> float:
    """1 if the answer is one of the truths, ignoring case and surrounding whitespace."""
    return float(any(same(truth, example.answer) for truth in example.truths))


def gqa(example: Answered) -> float:
    """Exact match, ignoring a full stop at the end."""
    return float(example.answer.lower().strip().rstrip(".").strip() == example.truth.strip().lower())


def relaxed(example: Answered) -> float:
    """1 if the answer is within 5 % of a right number, or otherwise the same text (Masry et al. 2022, 5.1)."""
    answer = example.answer.strip()
    return float(any(_close(truth, answer) for truth in example.truths))


def _close(truth: str, answer: str) -> bool:
    right, given = _number(truth), _number(answer)
    if given is None or not right:  # a right 0 has no relative change: it is compared as text
        return truth.lower() == answer.lower()
    return abs(given - right) / abs(right) <= RELATIVE_CHANGE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(example: Answered) -> float:
    """Average normalised Levenshtein similarity to the nearest truth; a similarity of exactly 0.5 counts."""
    best = max((_similarity(truth, example.answer) for truth in example.truths), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(truth: str, answer: str) -> float:
    """The benchmark divides by the length before whitespace is folded, in upper case (where one letter can be two)."""
    length = max(len(truth.upper()), len(answer.upper()))
    return 1 - levenshtein(_folded(truth), _folded(answer)) / length if length else 1.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(first: str, second: str) -> int:
    """The minimum number of character insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def contains(example: Answered) -> float:
    """1 if the answer contains a truth, ignoring case and line breaks; in formulas spaces too, but not case."""

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if example.category == FORMULAS else text.lower()

    answer = plain(example.answer)
    return float(any(plain(truth) in answer for truth in example.truths))
