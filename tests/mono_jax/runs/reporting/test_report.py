"""The report of a run: its headline, and that both forms are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mono_jax.runs.reporting import grades
from mono_jax.runs.reporting.report import write


def grade(right: int, number: int, majority: float, answer: str = "yes") -> dict[str, Any]:
    return {"accuracy": right / number, "questions": number, "majority": majority, "majority_answer": answer}


def summary(stage: str, before: float | None, after: float, trained: bool) -> dict[str, Any]:
    group = {"parameters": 1000, "trained": trained}
    sizes = {"trainable": 1000, "frozen": 0, "optimizer_bytes": 8_085_000, "master_bytes": 4000, "frozen_bytes": 0}
    data = {"samples": 7, "skipped": {"truncated_image": 2}}
    return {"stage": stage, "title": "learning", "steps": 4, "loss": 1.5, "seconds": 61.0, "skipped_updates": 0,
            "data": data, "text_loss_before": before, "text_loss_after": after, "groups": {"attention": group},
            **sizes}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    stages = {
        "s0": summary("S0", None, 4.435099168845393, True),
        "s1_3": summary("S1.3", 4.435099168845393, 4.435099168845393, False),
        "s2": summary("S2", 4.435099168845393, 4.878609, True),
    }
    for folder, answer in (("s1_3", "a <b>"), ("s2", "A circle")):
        item = {"id": "1", "image": str(tmp_path / "red.png"), "asked": "<image>\nwhat is it?", "truth": "a circle"}
        stages[folder]["evaluation"] = {
            "captions": {**grade(1, 4, 0.25), "by_kind": {}, "gallery": [item | {"answer": answer}]}
        }
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"step": step, "loss_mean": 3 / step}) for step in (1, 2, 3, 4)]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(lines))
    kinds = {"color": grade(40, 50, 0.26), "shape": grade(9, 50, 0.36), "exists": grade(28, 50, 0.58)}
    stages["s2"]["evaluation"]["questions"] = {**grade(77, 150, 0.2), "by_kind": kinds, "gallery": []}
    return {"stages": stages, "manifest": {"stages": {"s2": {"samples": 9}}}, "device": "1 x cpu"}


def test_the_headline_holds_answers_against_a_constant_and_names_the_kinds_that_are_no_better(
    results: dict[str, Any], tmp_path: Path
):
    text = write(tmp_path, results)[0].read_text()
    low, high = grades.interval(grade(77, 150, 0))
    assert f"S2 answers 51.3% ({low:.1%} to {high:.1%}) of 150 held-out questions right; always 'yes' would" in text
    assert "1 of 3 kinds of questions beat a constant answer; no better than a constant answer: shape, exists." in text
    assert "4.879 nats per token, 4.435 before the first picture (+10.0%)" in text
    assert "S1.3 25.0%, S2 25.0%" in text


def test_what_answers_owe_to_the_image_is_shown(results: dict[str, Any], tmp_path: Path):
    graded = results["stages"]["s2"]["evaluation"]["questions"]
    kinds = graded["by_kind"]
    kinds["color"] |= {"blind": 0.2, "gained": 32, "lost": 2}
    kinds["shape"] |= {"blind": 0.16, "gained": 4, "lost": 3}
    kinds["exists"] |= {"blind": 0.58, "gained": 5, "lost": 6}
    graded |= {"blind": 47 / 150, "gained": 41, "lost": 11}
    text = write(tmp_path, results)[0].read_text()
    assert "right, 31.3% when asked about another image; always" in text
    assert (
        "1 of 3 kinds of questions are answered by looking; no better than about another image: shape, exists." in text
    )
    assert re.search(r"color .*\| 20\.0% +\| \+60\.0% +\| 4\d\.0% to 7\d\.0%", text)


def test_both_forms_show_the_same_and_nobody_reads_sixteen_digits(results: dict[str, Any], tmp_path: Path):
    markdown, page = (file.read_text() for file in write(tmp_path, results))
    for shown in ("truncated_image: 2", "none, to the last bit", "random weights", "8.1", "jax ", "1 x cpu"):
        assert shown in markdown and shown in page
    assert not re.search(r"\d\.\d{5}", markdown)
    assert "a &lt;b&gt;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 1 + 1 + 2, (
        "the course, the picture through the stages, two galleries"
    )
    assert page.count("<details>") == 1, "the gallery of the stage before the last is folded"
    assert (tmp_path / "course.png").stat().st_size > 10_000 and "](course.png)" in markdown


def test_a_stage_whose_updates_were_all_skipped_has_a_report(results: dict[str, Any], tmp_path: Path):
    results["stages"]["s2"] |= {"loss": None, "skipped_updates": 4}
    assert re.search(r"S2 .*\| unknown .*\| 4 ", write(tmp_path, results)[0].read_text())


def test_a_run_without_images_or_held_out_sets_has_a_report(results: dict[str, Any], tmp_path: Path):
    only = {"s0": results["stages"]["s0"] | {"text_loss_after": None}}
    text = write(tmp_path, results | {"stages": only})[0].read_text()
    assert "## Stages" in text and "Held-out questions" not in text


@pytest.mark.parametrize(("right", "said"), [(0, "worse"), (20, "no better"), (26, "no better"), (50, "better")])
def test_what_chance_could_have_done_is_no_better(right: int, said: str):
    assert grades.verdict(grade(right, 50, 0.4)) == said
