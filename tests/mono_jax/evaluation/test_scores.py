"""Metrics against the benchmarks' own scorers.

Expected values agree with the published code, which was run alongside ours: TextVQAAccuracyEvaluator (InternVL, from
M4C), the infographicsVQA evaluator, pix2struct's relaxed correctness, VLMEvalKit (can_infer, YOrN_Extraction,
Hallusion_rating, circular groups, OCRBench), MMMU's eval_utils, MME's calculation.py, LLaVA's eval_pope, InternVL's
evaluate_grounding, MathVista's calculate_score.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError
from mono_jax.evaluation.judges import JudgeError
from mono_jax.evaluation.metrics import boxes, choices, judged, mmmu, short_answers, vqa, yes_no
from mono_jax.evaluation.metrics.metric import Answered
from mono_jax.evaluation.metrics.registry import METRICS, find_metric

OPTIONS = {"A": "a cat", "B": "Two dogs", "C": "red bird", "D": "dog"}


def answered(answer: str, *truths: str, **rest: Any) -> Answered:
    return Answered(rest.pop("id", "1"), answer, truths, **rest)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog's bowl", "dog 's bowl"),
        ("two cats, and a dog", "2 cats and dog"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("It is 5.5 m.", "it is 5.5 m"),
        ("U.S.A.", "usa"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("1,000", "1000"),
        ("None", "0"),
        ("ten-pin bowling", "10 pin bowling"),
        ("what's up?", "what 's up"),
        ("line\nbreak\ttab", "line break tab"),
        ("An apple a day", "apple day"),
        ('"quoted"', "quoted"),
        ("." * 40, "." * 8),
    ],
)
def test_answers_are_normalised_as_evalai_does(answer: str, normal: str):
    assert vqa.normalize(answer) == normal


@pytest.mark.parametrize(
    ("answer", "truths", "accuracy"),
    [
        ("Two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("a dog", ["dog"] + ["cat"] * 9, 0.3),
        ("dog", ["dog"] * 2 + ["cat"] * 8, 0.6),
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("yes", ["Yes."] * 10, 1.0),
        ("bird", ["dog"] * 10, 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(answer: str, truths: list[str], accuracy: float):
    assert vqa.accuracy(answered(answer, *truths)) == pytest.approx(accuracy, abs=1e-12)


def test_vqa_accuracy_needs_several_people():
    with pytest.raises(DataError, match=r"example 1: VQA accuracy needs .* exact_match"):
        vqa.accuracy(answered("cat", "cat"))


@pytest.mark.parametrize(
    ("answer", "truths", "similarity"),
    [
        ("ab", ["abcd"], 0.5),  # at the threshold
        ("abc", ["abcdefg"], 0.0),  # 3/7 is below it
        ("Hello  World", ["hello world"], 1.0),
        ("hello word", ["nothing", "hello world"], 10 / 11),
        ("", [""], 1.0),
        ("ß", ["s"], 0.5),  # upper case has two letters
    ],
)
def test_anls(answer: str, truths: list[str], similarity: float):
    assert short_answers.anls(answered(answer, *truths)) == pytest.approx(similarity, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        *[("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-105", "100", 0)],
        *[("5%", "0.05", 1), ("5", "5%", 0), ("0", "0.0", 0), ("0", "0", 1), ("1,000", "1000", 0), ("1e3", "1000", 1)],
        *[("ABC", "abc", 1), ("abc.", "abc", 0), ("nan", "100", 0), ("2020", "2019", 1)],
    ],
)
def test_relaxed_accuracy(answer: str, truth: str, right: int):
    assert short_answers.relaxed(answered(answer, truth)) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("B", "B"), ("(B)", "B"), ("B. Two dogs", "B"), ("The answer is C.", "C"), ("the answer is d", "D")],
        ("The correct answer is **D**, since it barks a lot in A and B", "D"),
        *[("A or B", ""), ("it is two dogs", ""), ("It shows a cat", "A"), ("A cat sits here on the mat now", "A")],
        *[("dog", "D"), ("Z", "Z"), ("none", ""), ("red bird and a cat", ""), ("I can't process this file.", "Z")],
        ("Option A is what the picture seems to show us", ""),
    ],
)
def test_choices_are_read_as_vlmevalkit_does(answer: str, letter: str):
    assert choices.choice_of(answer, OPTIONS) == letter


def test_a_question_is_right_in_circular_evaluation_if_it_is_in_every_order():
    orders = [({"A": "cat", "B": "dog"}, "B"), ({"A": "dog", "B": "cat"}, "A")]

    def asked(question: int, answers: Sequence[str]) -> list[Answered]:
        return [
            answered(answer, truth, id=f"{question}-{i}", options=options, fields={"question": question})
            for i, (answer, (options, truth)) in enumerate(zip(answers, orders))
        ]

    scores = choices.circular([*asked(0, "BA"), *asked(1, "BB"), *asked(2, "AB")])
    assert scores["circular"].score == pytest.approx(100 / 3)
    assert scores["accuracy"].score == pytest.approx(50)
    assert scores["circular"].is_proportion and not scores["accuracy"].is_proportion


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("(A) or (B)", "B"), ("A or B.", "B"), ("I think that it may be two dogs", "D"), ("dog", ""), ("C", "C")],
        *[("the option (d)", ""), ("It must be a cat, no, a red bird I say", "C")],
    ],
)
def test_mmmu_takes_the_choice_named_last(answer: str, letter: str):
    assert mmmu.choice_of(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        *[("The answer is 5.0", "5", True), ("x = 1,234", "1234", True), ("It costs 12% in total", "12", True)],
        *[("so the result is b", "b", True), ("-3.141", "-3.14", True), ("about cats", "cat", True)],
        *[("1e3", "1000", True), ("thus 7\nfinal 8", "7", True), ("12,5", "12.5", False), ("abc", "b", False)],
    ],
)
def test_mmmu_reads_open_answers(answer: str, truth: str, right: bool):
    assert mmmu.right(answered(answer, truth)) == right


def test_mme_points():
    said = {"a.jpg": ("Yes", "No, it is not"), "b.jpg": ("yes", "Yes"), "c.jpg": ("I say yes", "Not at all")}
    examples = [
        answered(answer, truth, id=f"{image}{truth}", category="count", group=image)
        for image, answers in said.items()
        for answer, truth in zip(answers, ("Yes", "No"))
    ]
    scores = METRICS["mme"](examples)
    # 4 of 6 questions (the first four characters of "I say yes" hold no yes), and 1 of 3 images.
    assert scores["perception"].score == pytest.approx(100 * 4 / 6 + 100 / 3)
    assert "cognition" not in scores and scores["total"].score == scores["perception"].score
    with pytest.raises(DataError, match=r"MME count, image c.jpg: 1 questions"):
        METRICS["mme"](examples[:-1])


def test_hallusion_accuracies():
    rows = [
        ("0", "0", "0", "Yes", "1"),
        ("0", "0", "1", "no", "1"),
        ("0", "1", "0", "Yes.", "1"),
        ("1", "0", "0", "No", "0"),
    ]
    examples = [
        answered(
            answer, truth, id=f"{s}{f}{q}", category="table", fields={"set_id": s, "figure_id": f, "question_id": q}
        )
        for s, f, q, answer, truth in rows
    ]
    scores = {name: measure.score for name, measure in yes_no.hallusion(examples).items()}
    assert scores == pytest.approx({"aAcc": 75, "fAcc": 100 * 2 / 3, "qAcc": 100 * 2 / 3})


@pytest.mark.parametrize(
    ("answer", "hallusion", "pope"),
    [
        *[("Yes", "yes", "yes"), ("no way", "no", "no"), ("It is not. yes", "yes", "no"), ("yes. no", "", "yes")],
        *[("yes/no", "", "yes"), ("nope", "", "yes"), ("Yes, no", "", "no"), ("", "", "yes"), ("NO", "no", "yes")],
        *[("1,,000-yes", "yes", "yes"), ("1,000-yes", "", "yes")],  # with a thousands separator no mark becomes a space
    ],
)
def test_yes_and_no(answer: str, hallusion: str, pope: str):
    assert yes_no.only_word(answer) == hallusion and yes_no.pope_word(answer) == pope


def test_without_a_second_order_no_score_is_called_circular():
    examples = [answered("A", "A", id=f"{i}", options=OPTIONS, fields={"question": i}) for i in range(3)]
    assert list(choices.circular(examples)) == ["accuracy"]


@pytest.mark.parametrize("name", ["multiple_choice", "circular"])
def test_a_choice_needs_options(name: str):
    with pytest.raises(DataError, match=r"example 1: no options, which this metric needs: .* exact_match"):
        METRICS[name]([answered("A", "A", fields={"question": 1})])


def test_pope_f1_is_averaged_over_categories():
    rows = [("a", "yes", "yes"), ("a", "no", "yes"), ("b", "yes", "yes"), ("b", "yes", "no")]
    examples = [answered(said, truth, id=str(i), category=c) for i, (c, truth, said) in enumerate(rows)]
    scores = METRICS["pope"](examples)
    assert scores["f1"].score == pytest.approx(100 * 2 / 3) and scores["accuracy"].score == 50
    assert scores["yes"].score == 75


def test_pope_asks_a_question_once_for_several_categories():
    """As in VLMEvalKit's file: the same scores as if each category had a row of its own."""
    rows = [
        ("adversarial,popular,random", "yes", "yes"),
        ("adversarial, popular,random", "yes", "no"),
        ("adversarial", "no", "no"),
        ("popular,random", "no", "yes"),
        ("random", "no", "no"),
    ]
    joined = [
        answered(said, truth, id=str(i), category=c, group=f"{i // 2}") for i, (c, truth, said) in enumerate(rows)
    ]
    apart = [
        dataclasses.replace(example, id=f"{example.id}{name}", category=name.strip())
        for example in joined
        for name in example.category.split(",")
    ]
    found, expected = METRICS["pope"](joined), METRICS["pope"](apart)
    f1 = [2 / 3, 2 / 4, 2 / 4]  # a miss in each category, and a wrong yes in two
    assert found["f1"].score == pytest.approx(100 * sum(f1) / 3)
    assert found["accuracy"].score == pytest.approx(100 * 5 / 10) and found["yes"].score == pytest.approx(100 * 5 / 10)
    for name, measure in found.items():
        assert measure.units == expected[name].units and (measure.sums == expected[name].sums).all()
        assert measure.examples == 5 and not measure.is_proportion
    perfect = [dataclasses.replace(example, answer=example.truth) for example in joined]
    assert METRICS["pope"](perfect)["f1"].score == METRICS["pope"](perfect)["accuracy"].score == 100


def test_ocrbench_looks_for_the_truth_in_the_answer():
    formulas = short_answers.FORMULAS
    table = [
        ("It says STOP", "stop", "x", 1),
        ("st op", "stop", "x", 0),
        ("x ^ 2 + 1", "x^2", formulas, 1),
        ("X^2", "x^2", formulas, 0),
    ]
    for answer, truth, category, right in table:
        assert short_answers.contains(answered(answer, truth, category=category)) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[
            ("<ref>dog</ref><box>[[100, 200, 300, 400]]</box>", 1),
            ("[0.1, 0.2, 0.3, 0.4]", 1),
            ("[100,200,200,400]", 1),
        ],
        *[("[100,200,199,400]", 0), ("[100,200,300]", 0), ("none", 0), ("[[300,400,100,200]]", 0)],
        ("[[100, 200, 300, 400], [500, 500, 600, 600]]", 1),
        *[("the [left] dog: [100, 200, 300, 400]", 1), ("[a, b, c, d] [100, 200, 300, 400]", 1)],
        *[("[100, 200], [100, 200, 300, 400]", 1), ("[500, 500, 600, 600], [100, 200, 300, 400]", 0)],
        *[("[100, 200, 300, 400, 500]", 0), ("[100,\n200, 300, 400]", 0), ("[100\n, 200, 300, 400]", 0)],
    ],
)
def test_boxes(answer: str, right: int):
    fields = {"bbox": [64, 96, 192, 192], "width": 640, "height": 480}
    assert boxes.grounded(answered(answer, fields=fields)) == right


def test_an_example_that_lacks_a_field_is_named():
    with pytest.raises(DataError, match="example 1: no 'width'"):
        boxes.grounded(answered("[1,2,3,4]"))
    with pytest.raises(DataError, match="example 1: no right answer"):
        METRICS["gqa"]([answered("cat")])


class Scripted:
    """A judge that gives scripted replies and records its questions."""

    name = "scripted"

    def __init__(self, *replies: str):
        self.replies, self.asked = list(replies), []

    def __call__(self, prompt: str) -> str:
        self.asked.append(prompt)
        return self.replies.pop(0)


def test_mm_vet_is_the_judge_s_mean_grade_by_ability():
    judge = judged.Memory(Scripted("0.5", "good", "Grade: 1.0"))
    examples = [
        answered("x", "-1<AND>-5", id="1", category="ocr,math", fields={"question": "x?"}),
        answered("y", "meme", id="2", category="rec", fields={"question": "y?"}),
    ]
    for _ in range(2):  # the second time, nothing is asked
        scores = {name: measure.score for name, measure in find_metric("mm_vet", judge)(examples).items()}
        assert scores == pytest.approx({"grade": 75, "rec": 100, "ocr": 50, "math": 50})


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *[("0.5", 0.5), ("Grade: 0.5.", 0.5), ("**0.5**.", 0.5), ("so (0.5)", 0.5), ("`.5`", 0.5), ("Grade:\n1.\n", 1)],
        *[
            ("'0.0'!", 0),
            ("1", 1),
            ("1.5", None),
            ("-1", None),
            ("nan", None),
            ("good", None),
            ("", None),
            ("...", None),
        ],
        ("5/10", None),
    ],
)
def test_a_grade_is_the_number_at_the_end_of_a_reply(reply: str, grade: float | None):
    judge = judged.Memory(Scripted(*[reply] * 3))
    examples = [answered("x", "y", category="rec", fields={"question": "?"})]
    if grade is None:
        with pytest.raises(JudgeError, match="judge scripted: no grade in its reply"):
            find_metric("mm_vet", judge)(examples)
    else:
        assert find_metric("mm_vet", judge)(examples)["grade"].score == 100 * grade


def math_fields(question_type: str, answer_type: str, precision: Any = None) -> Mapping[str, Any]:
    return {"question": "?", "question_type": question_type, "answer_type": answer_type, "precision": precision}


def test_math_vista_asks_the_judge_only_for_answers_that_are_more_than_that():
    judge = Scripted("(B)", "3.14159")
    choice, number = math_fields("multi_choice", "text"), math_fields("free_form", "float", 2)
    examples = [
        answered("I think B", "dog", id="1", options={"A": "cat", "B": "dog"}, fields=choice),
        answered("A", "dog", id="2", options={"A": "cat", "B": "dog"}, fields=choice),
        answered("it is pi", "3.14", id="3", fields=number),
        answered("3.1429", "3.14", id="4", fields=number),
    ]
    assert find_metric("math_vista", judged.Memory(judge))(examples)["accuracy"].score == 75
    assert len(judge.asked) == 2 and "(A) cat; (B) dog" in judge.asked[0]


@pytest.mark.parametrize(
    ("extracted", "kind", "normal"),
    [
        *[("1e2", "integer", "100"), ("12", "float", "12.0"), ("1.256", "float", "1.26"), ("x", "integer", None)],
        *[("[1, 2]", "list", "[1, 2]"), ("inf", "integer", None)],
    ],
)
def test_math_vista_s_normal_answers(extracted: str, kind: str, normal: str | None):
    assert judged.normal_answer(extracted, answered("", fields=math_fields("free_form", kind, 2.0))) == normal


@pytest.mark.parametrize(
    ("extracted", "truth", "right"),
    [("3.14", "3.14", True), ("3.140", "3.14", True), ("3.1429", "3.14", False), ("x", "3.14", False), ("1", "x", 0)],
)
def test_without_a_precision_math_vista_compares_floats_as_numbers(extracted: str, truth: str, right: bool):
    example = answered(extracted, truth, fields=math_fields("free_form", "float"))
    assert (judged.normal_answer(extracted, example) == truth) == right


@pytest.mark.parametrize("answer", ["", "  \n"])
@pytest.mark.parametrize("truth", ["maybe", "no"])
def test_nothing_is_no_option_of_math_vista(answer: str, truth: str):
    """Neither as the answer, for which no judge is needed, nor as what the judge extracts."""
    example = answered(answer, truth, options={"A": "maybe", "B": "no"}, fields=math_fields("multi_choice", "text"))
    assert find_metric("math_vista")([example])["accuracy"].score == 0
    said = dataclasses.replace(example, answer="I do not know")
    assert find_metric("math_vista", judged.Memory(Scripted(answer)))([said])["accuracy"].score == 0


@pytest.mark.parametrize("metric", ["multiple_choice", "mmmu", "exact_match", "relaxed_accuracy", "gqa", "contains"])
def test_nothing_is_no_answer(metric: str):
    for options, truths in ((OPTIONS, "ABCD"), ({}, ("no", "1"))):
        for truth in truths if options or metric != "multiple_choice" else ():
            assert METRICS[metric]([answered("", truth, options=options)])["accuracy"].score == 0


def test_without_a_judge_its_tasks_are_refused():
    with pytest.raises(ConfigError, match="give --judge="):
        find_metric("mm_vet")([answered("x", "y", fields={"question": "?"})])


def test_unknown_metrics_are_named():
    with pytest.raises(ConfigError, match=r"unknown metric 'vqa_acuracy'.*vqa_accuracy"):
        find_metric("vqa_acuracy")


def test_answers_are_stored_as_json():
    """What a metric reads survives predictions.jsonl."""
    example = answered("a", "b", category="c", options=OPTIONS, fields={"bbox": [1, 2]})
    assert Answered(**json.loads(json.dumps(example.__dict__))) == Answered(**{**example.__dict__, "truths": ["b"]})
