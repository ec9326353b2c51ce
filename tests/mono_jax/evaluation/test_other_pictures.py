"""Questions about the wrong pictures."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mono_jax.evaluation import intervals
from mono_jax.evaluation.benchmarks.other_pictures import partners, with_other_pictures
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture
from mono_jax.evaluation.questions import Question, grade, with_other_images


@given(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=30))
def test_pictures_are_exchanged_one_to_one(pictures: list[tuple[int, ...]]):
    of: dict[tuple[int, ...], set[tuple[int, ...]]] = collections.defaultdict(set)
    for own, other in zip(pictures, partners(pictures), strict=True):
        if other is None:
            assert not own or {each for each in pictures if len(each) == len(own)} == {own}
        else:
            assert pictures[other] != own and len(pictures[other]) == len(own)
            of[own].add(pictures[other])
    assert all(len(others) == 1 for others in of.values()), "the same pictures get the same others"
    assert {next(iter(others)) for others in of.values()} == set(of), "each set of pictures is given once"


def test_only_the_pictures_of_an_example_change():
    def picture(name: str) -> Picture:
        return Picture(name, name, name)

    examples = [
        Example("a", (("human", "<image>?"),), (picture("1"),), ("yes",), group="g"),
        Example("b", (("human", "<image>!"),), (picture("1"),), ("no",), group="g"),
        Example("c", (("human", "<image>."),), (picture("2"),), ("no",)),
        Example("d", (("human", "text"),), (), ("no",)),
        Example("e", (("human", "<image><image>"),), (picture("1"), picture("2")), ("no",)),
    ]
    exchanged, notes = with_other_pictures({"some": examples, "text": examples[3:4]})
    found = exchanged["some"]
    assert list(exchanged) == ["some"] and found[3:] == examples[3:]
    assert ["2 of 5" in notes[0], "1 of 1" in notes[1], len(notes)] == [True, True, 2]
    assert [[p.name for p in each.pictures] for each in found[:3]] == [["2"], ["2"], ["1"]]
    for before, after in zip(examples, found):
        assert (before.id, before.turns, before.truths, before.group) == (
            after.id,
            after.turns,
            after.truths,
            after.group,
        )
    assert found[0].digest != examples[0].digest


def test_answers_about_other_images_are_counted_beside_the_right_ones():
    truths = ["yes", "no", "red", "blue", "blue"]
    asked = [
        Question(str(i), Path(f"{i}.png"), (("human", "?"),), truth, "ab"[i > 1]) for i, truth in enumerate(truths)
    ]
    others = with_other_images(asked)
    assert all(q.image != o.image and q.truth == o.truth for q, o in zip(asked, others))
    found = grade(asked, ["yes", "no", "red", "Blue ", "red"], ["yes", "yes", "blue", "red", "blue"])
    assert (found["accuracy"], found["blind"], found["gained"], found["lost"]) == (0.8, 0.4, 3, 1)
    assert {kind: (each["gained"], each["lost"]) for kind, each in found["by_kind"].items()} == {
        "a": (1, 0),
        "b": (2, 1),
    }
    assert "blind" not in grade(asked, truths)
    with pytest.raises(ValueError, match="5 questions have 4"):
        grade(asked, truths[:4])


@pytest.mark.parametrize(("gained", "lost", "number"), [(0, 0, 10), (30, 10, 100), (200, 200, 1000)])
def test_the_interval_of_a_gain_is_that_of_a_normal_distribution(gained: int, lost: int, number: int):
    """By the variance of a paired difference of shares."""
    low, high = intervals.of_gain(gained, lost, number)
    gain = (gained - lost) / number
    half = 1.96 * ((gained + lost) / number - gain**2) ** 0.5 / number**0.5
    assert low == pytest.approx(gain - half, abs=0.012) and high == pytest.approx(gain + half, abs=0.012)
