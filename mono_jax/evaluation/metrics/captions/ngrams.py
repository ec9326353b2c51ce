"""BLEU, ROUGE-L and CIDEr-D of tokenized captions, with the same results as pycocoevalcap.

Papineni et al. 2002, Lin 2004, Vedantam et al. 2015 (CIDEr-D: clipped counts, length penalty).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mono_jax.evaluation.metrics.metric import ratio

N = 4  # longest n-grams
BETA = 1.2  # of ROUGE-L: weight of recall
SIGMA = 6.0  # tokens; of CIDEr-D's length penalty
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's, against division by 0

Tokens = Sequence[str]
Grams = Counter[tuple[str, ...]]


def grams_of(tokens: Tokens, n: int) -> Grams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu_counts(given: Tokens, references: Sequence[Tokens]) -> np.ndarray:
    """float64 [2 * N + 2]: number of right n-grams, number of n-grams, length, length of the nearest reference."""
    right, there = [], []
    for n in range(1, N + 1):
        most: Grams = Counter()
        for reference in references:
            most |= grams_of(reference, n)
        right.append((grams_of(given, n) & most).total())
        there.append(max(0, len(given) - n + 1))
    nearest = min((abs(len(reference) - len(given)), len(reference)) for reference in references)[1]
    return np.array([*right, *there, len(given), nearest], np.float64)


def bleu(sums: np.ndarray, n: int) -> np.ndarray:
    """100 * BLEU-n from sums [..., 2 * N + 2] of ``bleu_counts``."""
    right, there = sums[..., :n], sums[..., N : N + n]
    precision = np.prod((right + _TINY) / (there + _SMALL), axis=-1) ** (1 / n)
    of_length = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
    return 100 * precision * np.where(of_length < 1, np.exp(1 - 1 / of_length), 1)


def bleu_alone(sums: np.ndarray, n: int) -> np.ndarray:
    """``bleu``, but 0 if no n-gram of some length is right: what then keeps it above 0 says nothing about a caption."""
    return np.where((sums[..., :n] > 0).all(axis=-1), bleu(sums, n), 0)


def rouge_l(given: Tokens, references: Sequence[Tokens]) -> float:
    """F-measure of the longest common subsequence: best precision and best recall over the references."""
    common = [_common_subsequence(given, reference) for reference in references]
    # An empty caption counts as one token, the result of splitting it at spaces.
    precision = max(common) / max(1, len(given))
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references))
    return float(ratio(np.float64((1 + BETA**2) * precision * recall), np.float64(recall + BETA**2 * precision)))


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


class CiderD:
    """CIDEr-D of captions against the references of their images; all references determine how rare an n-gram is."""

    def __init__(self, references: Sequence[Sequence[Tokens]]):
        """``references``: of all images."""
        self._images_with: Grams = Counter()
        for of_image in references:
            self._images_with.update(
                {gram for tokens in of_image for n in range(1, N + 1) for gram in grams_of(tokens, n)}
            )
        self._log_images = math.log(len(references))

    def __call__(self, given: Tokens, references: Sequence[Tokens]) -> float:
        """0 to 10."""
        mine = self._vectors(given)
        total = 0.0
        for reference in references:
            theirs = self._vectors(reference)
            # Lengths are counted in 2-grams, as in the published code.
            apart = max(0, len(given) - 1) - max(0, len(reference) - 1)
            alike = [_clipped_cosine(a, b) for a, b in zip(mine, theirs)]
            total += sum(alike) / N * math.exp(-(apart**2) / (2 * SIGMA**2))
        return 10 * total / len(references)

    def _vectors(self, tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        """For each n, the weights of the n-grams."""
        return [
            {
                gram: count * (self._log_images - math.log(max(1, self._images_with[gram])))
                for gram, count in grams_of(tokens, n).items()
            }
            for n in range(1, N + 1)
        ]


def _clipped_cosine(given: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    dot = sum(min(weight, reference[gram]) * reference[gram] for gram, weight in given.items() if gram in reference)
    lengths = math.hypot(*given.values()) * math.hypot(*reference.values())
    return dot / lengths if lengths else 0.0
