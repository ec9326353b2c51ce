"""Changed images and arrangements; files and placeholders that are answered or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample
from mono_jax.evaluation.questions import Question
from mono_jax.evaluation.robustness.broken import ANSWERED, BROKEN
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES
from mono_jax.evaluation.robustness.placeholders import ODD
from mono_jax.runs.robustness.sets import write


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST)


def apart(one: Image.Image, other: Image.Image) -> float:
    pixels = [np.asarray(image.resize((64, 48)), np.float64) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


@pytest.mark.parametrize("name", CHANGES)
def test_levels_of_a_change_go_further_and_further_from_the_picture(name: str, picture: Image.Image):
    change = CHANGES[name]
    changed = [change.apply(picture, level, np.random.default_rng(1)) for level in change.levels]
    assert all(image.mode == "RGB" and min(image.size) > 0 for image in changed)
    if name == "stretched":  # which only the size shows
        assert [image.width for image in changed] == [round(64 * level) for level in change.levels]
        return
    if name == "in_a_corner":
        assert all(apart(picture, image.crop((0, 0, 64, 48))) == 0 for image in changed)
        assert [image.size for image in changed] == [(round(64 * n), round(48 * n)) for n in change.levels]
        return
    far = [apart(picture, image) for image in changed]
    assert far[0] < (15 if name == "compressed" else 1e-9), "the first level leaves it as it is"
    assert far == sorted(far) and far[-1] > far[0] + 5
    again = change.apply(picture, change.levels[-1], np.random.default_rng(1))
    assert apart(changed[-1], again) == 0, "decided by the seed"


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_an_arrangement_keeps_the_question_and_has_a_mark_for_each_picture(name: str):
    arrangement = ARRANGEMENTS[name]
    for level in arrangement.levels:
        text, pictures = arrangement.apply("what is it?", ["own"], ["a", "b"], level)
        assert "what is it?" in text and text.count("<image>") == len(pictures) and pictures[-1] == "own"
    first, _ = arrangement.apply("what is it?", ["own"], ["a"], arrangement.levels[0])
    assert first == "<image>\nwhat is it?" or name == "interleaved"


def test_interleaving_moves_a_share_of_the_text_between_the_pictures():
    arrangement, seen = ARRANGEMENTS["interleaved"], {}
    for level in arrangement.levels:
        text, pictures = arrangement.apply("what is it?", ["own"], ["a", "b"], level)
        before, *between, after = text.split("<image>")
        assert pictures == ["a", "b", "a", "b", "own"] and after == "\nwhat is it?"
        words = [len(part.split()) for part in (before, *between)]
        assert sum(words) == 40, "the same text at every level"
        seen[level] = words
    assert [sum(words[1:]) / 40 * 100 for words in seen.values()] == list(arrangement.levels)
    assert seen[50] == [20, 0, 10, 0, 10] and seen[100] == [0, 10, 10, 10, 10]


def test_many_pictures_are_tiny_but_for_the_one_that_is_asked_about(tmp_path: Path, picture: Image.Image):
    questions = []
    for number in range(3):
        picture.save(tmp_path / f"{number}.png")
        questions.append(Question(str(number), tmp_path / f"{number}.png", (("human", "what?"),), "this", ""))
    files = write(tmp_path / "sets", questions, ["many_tiny"])
    assert list(files) == [f"many_tiny@{count}" for count in (1, 2, 4, 8, 16, 32, 64)]
    for count, file in zip((1, 2, 4, 8, 16, 32, 64), files.values()):
        record = json.loads(file.read_text().splitlines()[1])
        named = [record["image"]] if count == 1 else record["image"]
        assert [Image.open(name).size for name in named] == [(21, 16)] * (count - 1) + [(64, 48)]
        assert named[-1] == str(tmp_path / "1.png")


@pytest.mark.parametrize("name", ["noisy", "other_pictures", "many_tiny"])
@pytest.mark.parametrize(
    "change",
    [
        {"id": "coco/1"},
        {"id": "../1"},
        {"id": "x" * 300},
        {"turns": (("human", "how many?"),)},
        {"truth": "another"},
        {"kind": "count"},
        {"image": "other.png"},
        {"more": 2},
        {"more": -1},
        {"bytes": True},
    ],
)
def test_sets_of_an_earlier_call_are_those_that_a_first_call_makes(
    tmp_path: Path, picture: Image.Image, name: str, change: dict[str, Any]
):
    """Whatever has changed in the questions: their pictures, number, words or ids."""
    picture.save(tmp_path / "one.png")
    picture.rotate(90).save(tmp_path / "other.png")
    questions = [Question(str(n), tmp_path / "one.png", (("human", "what?"),), "this", "") for n in range(2)]
    write(tmp_path / "again", questions, [name])
    match change:
        case {"more": more}:
            questions = questions[: 2 + more] + [dataclasses.replace(questions[0], id=str(9 + n)) for n in range(more)]
        case {"bytes": True}:
            picture.rotate(180).save(tmp_path / "one.png")
        case {"image": file}:
            questions = [dataclasses.replace(question, image=tmp_path / file) for question in questions]
        case _:
            questions[0] = dataclasses.replace(questions[0], **change)
    again, first = (write(tmp_path / folder, questions, [name]) for folder in ("again", "first"))
    for label, file in again.items():
        records, expected = ([json.loads(line) for line in each.open()] for each in (file, first[label]))
        assert [record["id"] for record in records] == [question.id for question in questions]
        for record, other in zip(records, expected, strict=True):
            pictures, others = (
                [image] if isinstance(image := each.pop("image"), str) else image for each in (record, other)
            )
            assert record == other
            for mine, theirs in zip(pictures, others, strict=True):
                assert (file.parent / mine).read_bytes() == (first[label].parent / theirs).read_bytes()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("again/pictures/*/*")}
    write(tmp_path / "again", questions, [name])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("again/pictures/*/*")} == kept


def refused(name: str, picture: Image.Image) -> str:
    """ "answered", or the reason for which the file is refused."""
    try:
        patches = image_patches(BROKEN[name].encode(picture), Tiling(), ImageLimits())
    except BadSample as error:
        return error.reason
    assert len(patches) and patches.dtype == np.uint8
    return ANSWERED


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_read_or_refused_by_name(name: str, picture: Image.Image):
    outcome = refused(name, picture)
    assert outcome == (BROKEN[name].expected or outcome)


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_for_bombs() -> dict[str, int]:
    """{name: bytes by which reading it has raised the peak}; to be run in a separate process."""
    picture, grown = Image.new("RGB", (64, 48)), {}
    refused("png cut at 50 %", picture)
    for name in (name for name in BROKEN if name.startswith("bomb: ")):
        data = BROKEN[name].encode(picture)
        before = peak()
        with contextlib.suppress(BadSample):
            image_patches(data, Tiling(), ImageLimits())
        grown[name] = peak() - before
    return grown


def test_bombs_take_no_memory():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        grown = pool.submit(memory_for_bombs).result()
    assert len(grown) >= 8 and max(grown.values()) < 32 << 20, grown


@pytest.mark.parametrize("name", ODD)
def test_odd_placeholders_are_answered_or_refused_by_name(name: str, sets: dict[str, Any]):
    """Also, the ids to be answered have exactly one placeholder per visual token."""
    encoder = ChatEncoder(Tokenizer(sets["tokenizer"]), system_message="")
    odd = ODD[name]
    try:
        ids, _ = encoder.conversation(odd.turns, [4] * odd.pictures, answer=True)
    except BadSample as error:
        assert error.reason == odd.expected
    else:
        assert odd.expected == ANSWERED and np.count_nonzero(ids == encoder.image_token) == 4 * odd.pictures
        assert ids[-1] != encoder.image_token
