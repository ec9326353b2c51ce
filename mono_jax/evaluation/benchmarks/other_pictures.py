"""Questions about the wrong pictures: what a model loses by the exchange is what it owes to the pictures.

A model may answer well without looking, because a question gives its most likely answer away. Its score on the same
questions with other pictures shows this; the difference is the multi-modal gain (Chen et al. 2024, arXiv 2403.20330,
which leaves the pictures out instead: a model trained with pictures is seldom asked that way).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

from mono_jax.evaluation.benchmarks.reading.example import Example


def partners(pictures: Sequence[tuple[Hashable, ...]]) -> list[int | None]:
    """For each question the number of the one whose pictures it gets; None if no other has as many pictures.

    Args:
      pictures: of each question; equal entries are the same picture.

    Questions about the same pictures all get the same other ones, so that pairs of questions and circular ones stay
    comparable. Partners are half of the list apart, since neighbours are often about similar pictures.
    """
    first: dict[tuple[Hashable, ...], int] = {}
    for number, key in enumerate(pictures):
        first.setdefault(key, number)
    by_count: dict[int, list[int]] = collections.defaultdict(list)
    for key, number in first.items():
        by_count[len(key)].append(number)
    other: dict[tuple[Hashable, ...], int] = {}
    for count, numbers in by_count.items():
        if count and len(numbers) > 1:
            for place, number in enumerate(numbers):
                other[pictures[number]] = numbers[(place + len(numbers) // 2) % len(numbers)]
    return [other.get(key) for key in pictures]


def with_other_pictures(tasks: Mapping[str, Sequence[Example]]) -> tuple[dict[str, list[Example]], list[str]]:
    """({task: its examples with the pictures of their partners}, notes, a line each).

    Examples without a partner are unchanged, and a task of only such examples is left out: the notes say so.
    """
    exchanged: dict[str, list[Example]] = {}
    notes = []
    for name, examples in tasks.items():
        others = partners([tuple(picture.same for picture in example.pictures) for example in examples])
        if unchanged := others.count(None):
            outcome = "they are asked unchanged" if unchanged < len(examples) else "there is no blind score"
            notes.append(
                f"{name}, blind: {unchanged} of {len(examples)} examples have no pictures, or no other example has as "
                f"many: {outcome}"
            )
        if unchanged < len(examples):
            exchanged[name] = [
                example if other is None else dataclasses.replace(example, pictures=examples[other].pictures)
                for example, other in zip(examples, others)
            ]
    return exchanged, notes
