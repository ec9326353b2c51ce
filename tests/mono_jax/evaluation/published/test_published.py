"""Metrics against published scorers on thousands of random cases: lmms-eval, VLMEvalKit, InternVL, pycocoevalcap.

The Python of tests/clients.py has one or more of them (for InternVL, the folder internvl_chat/eval): run once for each
such Python. Intended deviations of ours are named here, with the cases that they concern.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import string
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mono_jax.evaluation.metrics import boxes, choices, judged, mmmu, short_answers, vqa, yes_no
from mono_jax.evaluation.metrics.metric import Answered
from mono_jax.evaluation.metrics.registry import METRICS, find_metric
from tests.clients import PYTHON, environment
from tests.mono_jax.evaluation.published import cases

HERE = Path(__file__).parent


class Others:
    """The process of the other Python: many cases in, their scores out."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen(
            [PYTHON, HERE / "asked_of_others.py"],
            env=environment(),
            cwd=folder,  # some write files
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def scores(self, scorer: str, asked: Sequence[Sequence[Any]]) -> list[Any]:
        """Skips the test if the scorer's package is not installed."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"scorer": scorer, "cases": asked}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline() or '{"fault": "it has ended"}')
        if "missing" in reply:
            pytest.skip(f"{PYTHON}: {reply['missing']}: set MONO_JAX_CLIENTS_PYTHON, for a clone _PATH")
        assert "fault" not in reply, reply["fault"]
        return reply["scores"]

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Others]:
    running = Others(tmp_path_factory.mktemp("others"))
    yield running
    running.end()


def of_answered(score: Callable[[Answered], float]) -> Callable[..., float]:
    """(answer, truths or truth) -> score."""

    def scored(answer: str, truths: str | Sequence[str], *category: str) -> float:
        truths = (truths,) if isinstance(truths, str) else tuple(truths)
        return score(Answered("1", answer, truths, "".join(category)))

    return scored


def right_choice(answer: str, truth: str, options: Mapping[str, str]) -> float:
    return choices.right_choice(Answered("1", answer, (truth,), options=options))


def grounded(answer: str, box: Sequence[float], width: float, height: float) -> float:
    return boxes.grounded(Answered("1", answer, (), fields={"bbox": box, "width": width, "height": height}))


def scores(metric: str, examples: Sequence[Answered]) -> dict[str, float]:
    return {name: measure.score for name, measure in METRICS[metric](examples).items()}


def circular(groups: Sequence[Sequence[Any]]) -> dict[str, float]:
    return scores(
        "circular",
        [
            Answered(f"{question}/{order}", answer, (truth,), options=options, fields={"question": question})
            for question, orders in enumerate(groups)
            for order, (answer, truth, options) in enumerate(orders)
        ],
    )


def mme(rows: Sequence[Sequence[str]]) -> dict[str, float]:
    examples = [
        Answered(str(i), answer, (truth,), category, group=image)
        for i, (category, image, answer, truth) in enumerate(rows)
    ]
    found = scores("mme", examples)
    assert found.pop("total") == pytest.approx(sum(found.values()))
    return found


def pope(rows: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    examples = [Answered(str(i), answer, (truth,), category) for i, (category, answer, truth) in enumerate(rows)]
    of_category = collections.defaultdict(list)
    for example in examples:
        for category in example.category.split(","):
            of_category[category].append(dataclasses.replace(example, category=category))
    found = {category: scores("pope", chosen) for category, chosen in of_category.items()}
    average = sum(of_one["f1"] for of_one in found.values()) / len(found)
    assert scores("pope", examples)["f1"] == pytest.approx(average)
    return {name: {key: of_one[key] / 100 for key in ("f1", "accuracy")} for name, of_one in found.items()}


def hallusion(rows: Sequence[Sequence[str]]) -> dict[str, float]:
    examples = [
        Answered(
            str(i), answer, (truth,), category, fields={"set_id": of_set, "figure_id": figure, "question_id": question}
        )
        for i, (category, of_set, figure, question, answer, truth) in enumerate(rows)
    ]
    return scores("hallusion", examples)


def math_vista(extracted: str, truth: str, options: Mapping[str, str], kinds: Sequence[Any]) -> float:
    fields = dict(zip(("question_type", "answer_type", "precision"), kinds))
    return float(judged.normal_answer(extracted, Answered("1", "", (truth,), options=options, fields=fields)) == truth)


class Scripted:
    """A judge that gives the replies of the case, one example after another."""

    name = "scripted"

    def __init__(self, replies: Sequence[str]):
        self._left = iter(replies)

    def __call__(self, prompt: str) -> str:
        return next(self._left)


def mm_vet(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    examples = [
        Answered(str(i), "", ("",), category, fields={"question": str(i)}) for i, (category, _) in enumerate(rows)
    ]
    judge = judged.Memory(Scripted([reply for _, replies in rows for reply in replies]))
    return {name: measure.score for name, measure in find_metric("mm_vet", judge)(examples).items()}


def captions(corpora: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, float]]:
    return [
        scores("captions", [Answered(str(i), answer, tuple(truths)) for i, (answer, truths) in enumerate(corpus)])
        for corpus in corpora
    ]


# Intended deviations of ours: whether a case may have another score.


def without_evalai(answer: str, truths: Sequence[str]) -> bool:
    """VLMEvalKit leaves out EvalAI's first step, and keeps a full stop after a digit."""
    return any(re.search(r"[,?']|\d\.", text) or text.count(".") > 32 for text in (answer, *truths))


def has_outer_spaces(answer: str, *rest: Any) -> bool:
    """lmms-eval strips answers; DocVQA's evaluator counts spaces, MMMU's requires them around a letter."""
    return answer != answer.strip()


def has_several_truths(answer: str, truths: Sequence[str]) -> bool:
    """lmms-eval takes one."""
    return len(truths) > 1


def is_reduced(answer: str, truth: str) -> bool:
    """lmms-eval removes all ASCII punctuation, not only a final full stop; its lower-casing keeps the length."""
    both = answer + truth
    return bool(set(both) & set(string.punctuation)) or truth != truth.strip() or len(both.lower()) != len(both)


def ends_in_full_stop(answer: str, truth: str) -> bool:
    """VLMEvalKit keeps it."""
    return answer.strip().endswith(".")


def is_not_lower(answer: str, truth: str) -> bool:
    """InternVL passes GQA's evaluation a lower-case answer, and truths are lower case; spaces are kept."""
    return truth != truth.strip().lower() or re.search(r"^\s|\s\.*$", answer) is not None


def is_wide(answer: str, truths: Sequence[str], category: str) -> bool:
    """lmms-eval treats full-width letters as narrow ones."""
    return any("\uff01" <= letter <= "\uff5e" or letter == "\u3000" for letter in "".join((answer, *truths)))


def has_a_letter_in_a_word(answer: str, options: Mapping[str, str]) -> bool:
    """lmms-eval accepts a letter at the end of a word or before a full stop; MMMU's code requires spaces around it."""
    return re.search(r"[^ ][A-F]([^\w)]|$)|[A-F]\.+[^.]", answer) is not None


def is_more_than_a_letter(answer: str, truth: str, options: Mapping[str, str]) -> bool:
    """lmms-eval reads only the first letter; VLMEvalKit's rule finds an option in a sentence."""
    return not re.fullmatch(r"[A-F]\.?", answer.strip())


def is_no_word(answer: str) -> bool:
    """lmms-eval's MME drops outer spaces and full stops, and accepts y and n; MME's code takes four raw characters."""
    return answer != answer.strip() or "." in answer or answer.lower() in ("y", "n")


def is_unusual_box(answer: str, box: Sequence[float], width: float, height: float) -> bool:
    """InternVL takes the first four things in brackets, by thousandths unless they add up to less than 4.

    lmms-eval supports only fractions.
    """
    first = re.match(r"[^\[]*\[*\[(-?\d[\d.]*, ?){3}-?\d[\d.]*\]", answer)
    return not first or any(not 0 <= edge <= 1 for edge in numbers_of(answer))


def is_box_mended(answer: str, box: Sequence[float], width: float, height: float) -> bool:
    """VLMEvalKit accepts numbers without brackets or commas or on two lines, and pixels above 1000; it swaps corners.

    It clips boxes to the image.
    """
    found = numbers_of(answer)
    plain = re.match(r"[^\[\d]*\[*\[ *(-?[\d.]+ *, *){3}-?[\d.]+ *\]", answer)
    in_order = len(found) >= 4 and found[0] <= found[2] and found[1] <= found[3]
    scaled = all(0 <= edge <= 1 for edge in found[:4]) or (sum(found[:4]) >= 4 and 1.5 < max(found[:4]) <= 1000)
    return not plain or not in_order or not scaled or min(found[:4]) < 0


def numbers_of(answer: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", answer)]


def is_nothing(extracted: str, *rest: Any) -> bool:
    """MathVista's rule takes the shortest option for it."""
    return not extracted.strip()


def has_words_about_a_grade(rows: Sequence[Sequence[Any]]) -> bool:
    """VLMEvalKit requires a bare number; here, the last word of a reply is used."""
    return any(len(reply.split()) > 1 for _, replies in rows for reply in replies)


def has_one_ability(rows: Sequence[Sequence[Any]]) -> bool:
    """VLMEvalKit counts an example of one ability twice in its mean; lmms-eval counts it once."""
    return any("," not in category for category, _ in rows)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``ours`` against ``scorer`` of asked_of_others.py, on ``count`` cases; ``but``: the deviations."""

    scorer: str
    case: Callable[[Random], Sequence[Any]]
    ours: Callable[..., Any]
    count: int = 20_000
    but: Sequence[Callable[..., bool]] = ()
    within: float = 1e-9


def one(case: Callable[[Random], Sequence[Any]]) -> Callable[[Random], Sequence[Any]]:
    """Only its answer."""
    return lambda rng: case(rng)[:1]


VQA, ANLS = of_answered(vqa.accuracy), of_answered(short_answers.anls)
RELAXED, GQA = of_answered(short_answers.relaxed), of_answered(short_answers.gqa)
CONTAINS, MMMU = of_answered(short_answers.contains), of_answered(mmmu.right)
COMPARISONS = [
    Comparison("internvl_normal", one(cases.of_ten_people), vqa.normalize),
    Comparison("internvl_vqa", cases.of_ten_people, VQA, 5_000),
    Comparison("internvl_gqa", cases.answer_and_truth, GQA, 2_000, [is_not_lower]),
    Comparison("internvl_mmmu_choice", cases.choice, mmmu.choice_of, 60_000),
    Comparison("internvl_mmmu_open", cases.of_mmmu, MMMU),
    Comparison("internvl_mme_word", cases.yes_or_no, yes_no.mme_word, 60_000),
    Comparison("internvl_mme", cases.of_mme, mme, 20),
    Comparison("internvl_pope", cases.of_pope, pope, 500),
    Comparison("lmms_normal", one(cases.of_ten_people), vqa.normalize),
    Comparison("lmms_vqa", cases.of_ten_people, VQA, 5_000),
    Comparison("vlm_vqa", cases.of_ten_people, VQA, 5_000, [without_evalai]),
    Comparison("lmms_anls", cases.answer_and_truths, ANLS, but=[has_outer_spaces]),
    Comparison("vlm_anls", cases.answer_and_truths, ANLS),
    Comparison("lmms_relaxed", cases.of_a_chart, RELAXED, but=[has_several_truths]),
    Comparison("vlm_relaxed", cases.of_a_chart, RELAXED),
    Comparison("vlm_exact", cases.answer_and_truths, of_answered(short_answers.exact_match)),
    Comparison("lmms_gqa", cases.answer_and_truth, GQA, but=[is_reduced]),
    Comparison("vlm_gqa", cases.answer_and_truth, GQA, but=[ends_in_full_stop]),
    Comparison("lmms_contains", cases.of_ocrbench, CONTAINS, but=[is_wide]),
    Comparison("vlm_contains", cases.of_ocrbench, CONTAINS, 5_000),
    Comparison("vlm_choice", cases.choice, choices.choice_of, 60_000),
    Comparison("vlm_circular", cases.circular_groups, circular, 200),
    *(
        Comparison(f"lmms_{name}", cases.choice_and_truth, right_choice, but=[is_more_than_a_letter])
        for name in ("science", "seed", "ai2d")
    ),
    Comparison("lmms_mmmu_choice", cases.choice, mmmu.choice_of, 60_000, [has_a_letter_in_a_word, has_outer_spaces]),
    Comparison("lmms_mmmu_open", cases.of_mmmu, MMMU),
    Comparison("lmms_mme_word", cases.yes_or_no, yes_no.mme_word, 60_000, [is_no_word]),
    Comparison("lmms_mme", cases.of_mme, mme, 500),
    Comparison("vlm_mme", cases.of_mme, mme, 200),
    Comparison("vlm_word", cases.yes_or_no, yes_no.only_word, 60_000),
    Comparison("lmms_hallusion", cases.of_hallusion_plainly, hallusion, 500),
    Comparison("vlm_hallusion", cases.of_hallusion, hallusion, 200),
    Comparison("lmms_pope", cases.of_pope_plainly, pope, 500),
    Comparison("vlm_pope", cases.of_pope_in_sentences, pope, 200),
    Comparison("lmms_box", cases.of_refcoco, grounded, 40_000, [is_unusual_box]),
    Comparison("vlm_box", cases.of_refcoco, grounded, 40_000, [is_box_mended]),
    Comparison("lmms_math_vista", cases.of_math_vista, math_vista, but=[is_nothing]),
    Comparison("lmms_mm_vet", cases.of_mm_vet, mm_vet, 500, within=0.00501),  # it prints two decimals
    Comparison(
        "vlm_mm_vet",
        cases.of_mm_vet_with_unusable_replies,
        mm_vet,
        500,
        [has_words_about_a_grade, has_one_ability],
    ),
    Comparison("coco_captions", cases.corpora, captions, 4),
]


def same(ours: Any, theirs: Any, within: float) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name], within) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(same(*both, within) for both in zip(ours, theirs))
    return ours == theirs if isinstance(ours, str) else math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=within)


@pytest.mark.parametrize("of", COMPARISONS, ids=lambda of: of.scorer)
def test_scores_are_the_published_ones(of: Comparison, others: Others):
    others.scores(of.scorer, [])  # is it there?
    rng = Random(of.scorer)
    asked = [of.case(rng) for _ in range(of.count)]
    theirs = others.scores(of.scorer, asked)
    ours = [of.ours(*case) for case in asked]
    excused = [any(deviation(*case) for deviation in of.but) for case in asked]
    differ = [number for number in range(of.count) if not same(ours[number], theirs[number], of.within)]
    wrong = [number for number in differ if not excused[number]]
    assert not wrong, "\n".join(f"{asked[number]}: {ours[number]}, theirs {theirs[number]}" for number in wrong[:5])
    compared = {json.dumps(score) for score, out in zip(ours, excused) if not out}
    assert excused.count(False) > of.count / 10 and len(compared) > 1
    for deviation in of.but:
        assert any(deviation(*asked[number]) for number in differ), f"{deviation.__name__}: it is none"
