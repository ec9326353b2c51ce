"""Yes-or-no questions: MME, HallusionBench, POPE."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.metric import Answered, Measure, measure, ratio
from mono_jax.evaluation.metrics.vqa import without_punctuation

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]

_THOUSANDS = re.compile(r"\d,\d")  # VLMEvalKit's, unlike EvalAI's: a single comma


def mme_word(answer: str) -> str:
    """MME's own reading: whichever word the first four characters contain."""
    beginning = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "")


def only_word(answer: str) -> str:
    """HallusionBench as VLMEvalKit reads it: whichever of the two words the answer has, unless it has both."""
    words = without_punctuation(answer.lower(), _THOUSANDS).split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0] if len(found) == 1 else ""


def pope_word(answer: str) -> str:
    """POPE's own reading: "no" if the first sentence contains "no", "No" or "not", otherwise "yes"."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _truth(example: Answered) -> str:
    """ "yes" or "no"; HallusionBench writes 1 and 0. Raises DataError."""
    word = {"1": "yes", "0": "no"}.get(example.truth.strip(), example.truth.strip().lower())
    if word not in ("yes", "no"):
        raise DataError(f"example {example.id}: the right answer is {example.truth!r}: it must be yes or no")
    return word


def image_of(example: Answered) -> tuple[str, str]:
    """MME's category and image, for which there are two questions."""
    return example.category, example.unit


def set_of(example: Answered) -> str:
    """HallusionBench's set of figures, each of which is asked all of the set's questions. Field: "set_id"."""
    return f"{example.category}_{example.field('set_id')}"


def mme(examples: Sequence[Answered]) -> dict[str, Measure]:
    """Points: for each category accuracy + acc+ (both questions of an image right), 0 to 200.

    "perception" (10 categories, at most 2000), "cognition" (4, at most 800) and "total"; a group without examples is
    left out. A category that is not one of MME's counts only towards the total. ``group`` is the image.
    Raises DataError for an image without two questions.
    """
    images: dict[tuple[str, str], list[bool]] = {}
    for example in examples:
        hits = images.setdefault(image_of(example), [])
        hits.append(mme_word(example.answer) == _truth(example))
    for (category, image), hits in images.items():
        if len(hits) != 2:
            raise DataError(
                f"MME {category}, image {image}: {len(hits)} questions, and acc+ needs two of each image: "
                "is the file complete? Rows of one image have the same image, or image_path"
            )

    def points(names: Sequence[str]) -> Measure:
        chosen = {key: hits for key, hits in images.items() if key[0] in names}
        rows = []
        for (category, image), hits in chosen.items():
            for hit in hits:  # sums per category: [right questions, questions, images with both right, images]
                row = np.zeros((len(names), 4))
                row[names.index(category)] = hit, 1, all(hits) / 2, 1 / 2
                rows.append((f"{category}/{image}", row.ravel()))
        strata = {f"{category}/{image}": category for category, image in chosen}
        return measure(rows, _mme_points, strata=strata, unit_of_score="points", highest=200 * len(names))

    groups = {"perception": PERCEPTION, "cognition": COGNITION}
    groups["total"] = sorted({category for category, _ in images})
    order = ("total", "perception", "cognition")
    return {name: points(groups[name]) for name in order if any(category in groups[name] for category, _ in images)}


def _mme_points(sums: np.ndarray) -> np.ndarray:
    """[..., categories * 4] -> [...]."""
    sums = sums.reshape(*sums.shape[:-1], -1, 4)
    return 100 * (ratio(sums[..., 0], sums[..., 1]) + ratio(sums[..., 2], sums[..., 3])).sum(axis=-1)


def hallusion(examples: Sequence[Answered]) -> dict[str, Measure]:
    """aAcc (questions), fAcc (figures all of whose questions are right), qAcc (questions right for all figures).

    Fields: "set_id", "figure_id", "question_id"; ``category`` is the subcategory. The units are sets of figures.
    """
    right = {example.id: only_word(example.answer) == _truth(example) for example in examples}
    unit = {example.id: set_of(example) for example in examples}

    def whole(name: str) -> Measure:
        hits: dict[tuple[str, str], bool] = {}
        for example in examples:
            key = unit[example.id], str(example.field(name))
            hits[key] = hits.get(key, True) and right[example.id]
        return measure(((of, (hit, 1)) for (of, _), hit in hits.items()), is_share=True)

    every = measure(((unit[name], (hit, 1)) for name, hit in right.items()), is_share=True)
    return {"aAcc": every, "fAcc": whole("figure_id"), "qAcc": whole("question_id")}


def pope_categories(example: Answered) -> tuple[str, ...]:
    """Those of a question, which VLMEvalKit's file joins by commas where it is asked in several of them."""
    return tuple(dict.fromkeys(name.strip() for name in example.category.split(",")))


def pope(examples: Sequence[Answered]) -> dict[str, Measure]:
    """ "f1" of the answer yes (averaged over the categories, as in LLaVA and InternVL), "accuracy", "yes" (share).

    A question counts once in each of its categories, also in accuracy and share.
    """
    of = [pope_categories(example) for example in examples]
    categories = sorted({name for names in of for name in names})
    rows, hits, said_yes = [], [], []
    for example, names in zip(examples, of):
        said, truth = pope_word(example.answer), _truth(example)
        row = np.zeros((len(categories), 3))  # true positives, answered yes, truly yes
        row[[categories.index(name) for name in names]] = said == truth == "yes", said == "yes", truth == "yes"
        rows.append((example.unit, row.ravel()))
        hits.append((example.unit, ((said == truth) * len(names), len(names))))
        said_yes.append((example.unit, ((said == "yes") * len(names), len(names))))
    value = functools.partial(_mean_f1, categories=len(categories))
    return {
        "f1": measure(rows, value, alone=_fewest_errors),
        "accuracy": measure(hits, is_share=True),
        "yes": measure(said_yes, is_share=True),
    }


def _fewest_errors(sums: np.ndarray) -> np.ndarray:
    """Counts errors: a picture's F1 distinguishes a right "no" from a wrong "yes" only if the picture has both."""
    hits, said, are = (sums[..., i::3].sum(axis=-1) for i in range(3))
    return 2 * hits - said - are


def _mean_f1(sums: np.ndarray, categories: int) -> np.ndarray:
    sums = sums.reshape(*sums.shape[:-1], categories, 3)
    return 100 * ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2]).mean(axis=-1)
