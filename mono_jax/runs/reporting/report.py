"""The report of a sequence of stages: report.md, and report.html with embedded pictures."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mono_jax
from data_pipelines.io import publish
from mono_jax.checkpoints.metadata import package_versions
from mono_jax.runs.reporting import grades
from mono_jax.runs.reporting.page import markdown, page
from mono_jax.runs.reporting.pictures import course
from mono_jax.runs.reporting.section import Card, Rows, Section
from mono_jax.training.metrics import decimal, duration
from mono_jax.training.stages import GROUPS

TITLE = "Mono-InternVL: report of a training run"
COURSE = "course.png"

Stages = Mapping[str, Mapping[str, Any]]


def write(workdir: Path, results: Mapping[str, Any]) -> list[Path]:
    """Writes report.md and report.html into ``workdir`` from what ``evip.Evip.run`` returned; returns their paths."""
    picture = course(workdir, results["stages"])
    sections = list(_sections(results, picture))
    files = [workdir / "report.md", workdir / "report.html"]
    (workdir / COURSE).write_bytes(picture)
    publish.write_text(files[0], markdown(TITLE, sections, [COURSE]))
    publish.write_text(files[1], page(TITLE, sections))
    return files


def _sections(results: Mapping[str, Any], picture: bytes) -> Iterator[Section]:
    stages: Stages = results["stages"]
    yield Section("What was learnt", _learnt(stages))
    yield Section("All stages", picture=picture, alt="training loss, held-out text loss and what trains, by step")
    if cards := _through_the_stages(stages):
        yield Section("The same pictures after every stage", cards=cards[:6])
    if (table := _grade_table(stages))[1:]:
        lines = [
            "Right answers with their exact 95 % interval, the score of always giving the most common answer, and what "
            "the image adds to the answers about another question's image."
        ]
        yield Section("Held-out questions", lines, table)
    yield Section("Language kept", [_TEXT_LINE], _text_table(stages))
    yield Section("Stages", (), _stage_table(stages))
    yield Section("What trained and what stayed frozen", [_FROZEN_LINE], _group_table(stages))
    yield Section("Data", ["Samples and what was skipped, by stage."], _data_table(stages, results["manifest"]))
    last = list(stages)[-1]
    for folder, summary in stages.items():
        for name, graded in summary.get("evaluation", {}).items():
            title = f"{summary['stage']}: held-out {name.replace('_', ' ')}"
            line = f"{graded['accuracy']:.1%} of {graded['questions']} match the truth word for word."
            yield Section(title, [line], cards=_cards(graded["gallery"]), folded=folder != last)
    yield Section("How this was made", _made(results))


_TEXT_LINE = (
    "Loss on held-out text, nats per token, before and after each stage. While attention and the text side are "
    "frozen, it stays the same to the last bit."
)
_FROZEN_LINE = "A frozen parameter has no gradient, no float32 master copy and no optimizer state."


def _learnt(stages: Stages) -> list[str]:
    """The headlines: the answers of the last stage that was asked, and how the language ability changed."""
    lines = []
    asked = [s for s in stages.values() if set(s.get("evaluation", {})) - {"captions"}]
    for name, graded in (asked[-1]["evaluation"] if asked else {}).items():
        if name == "captions":
            continue
        about_others = f", {graded['blind']:.1%} when asked about another image" if "blind" in graded else ""
        lines.append(
            f"{asked[-1]['stage']} answers {grades.with_interval(graded)} of {graded['questions']} held-out "
            f"{name.replace('_', ' ')} right{about_others}; always {graded['majority_answer']!r} would score "
            f"{graded['majority']:.1%}."
        )
        if (kinds := len(graded["by_kind"])) > 1:
            weak = grades.not_better(graded)
            rest = f"; no better than a constant answer: {', '.join(weak)}" if weak else ""
            lines.append(f"{kinds - len(weak)} of {kinds} kinds of {name} beat a constant answer{rest}.")
            if "blind" in graded:
                blind = grades.not_seen(graded)
                rest = f"; no better than about another image: {', '.join(blind)}" if blind else ""
                lines.append(f"{kinds - len(blind)} of {kinds} kinds of {name} are answered by looking{rest}.")
    described = [s for s in stages.values() if "captions" in s.get("evaluation", {})]
    if described:
        shares = [f"{s['stage']} {s['evaluation']['captions']['accuracy']:.1%}" for s in described]
        lines.append(f"Captions that match the truth word for word: {', '.join(shares)}.")
    return [*lines, *_language(stages)]


def _language(stages: Stages) -> list[str]:
    before = [s["text_loss_before"] for s in stages.values() if s["text_loss_before"] is not None]
    after = [s["text_loss_after"] for s in stages.values() if s["text_loss_after"] is not None]
    if not before or not after:
        return []
    change = after[-1] / before[0] - 1
    return [
        f"Language: the loss on held-out text is {after[-1]:.3f} nats per token, {before[0]:.3f} before the first "
        f"picture ({change:+z.1%})."
    ]


def _through_the_stages(stages: Stages) -> list[Card]:
    """The captions that every stage gave for the same pictures."""
    found = {s["stage"]: s["evaluation"]["captions"] for s in stages.values() if "captions" in s.get("evaluation", {})}
    if len(found) < 2:
        return []
    galleries = {name: {item["id"]: item for item in graded["gallery"]} for name, graded in found.items()}
    items = [item for item in next(iter(found.values()))["gallery"] if all(item["id"] in g for g in galleries.values())]
    return [
        Card(
            Path(item["image"]),
            _shown(item),
            item["truth"],
            [
                (name, answers[item["id"]]["answer"], _is_right(answers[item["id"]]))
                for name, answers in galleries.items()
            ],
        )
        for item in items
        if Path(item["image"]).is_file()
    ]


def _cards(gallery: list[Mapping[str, Any]]) -> list[Card]:
    return [
        Card(Path(item["image"]), _shown(item), item["truth"], [("model", item["answer"], _is_right(item))])
        for item in gallery
        if Path(item["image"]).is_file()
    ]


def _shown(item: Mapping[str, Any]) -> str:
    return item["asked"].replace("<image>", "").strip()


def _is_right(item: Mapping[str, Any]) -> bool:
    return item["truth"].strip().lower() == item["answer"].strip().lower()


def _grade_table(stages: Stages) -> Rows:
    rows = [
        ["stage", "questions", "kind", "number", "right", "95 % interval", "commonest", "would score", "the model is",
         "about another image", "the image adds", "95 % interval"]
    ]  # fmt: skip
    for s in stages.values():
        for name, graded in s.get("evaluation", {}).items():
            if name == "captions":
                continue
            kinds = graded["by_kind"] if len(graded["by_kind"]) > 1 else {}
            for kind, grade in [("all", graded), *kinds.items()]:
                low, high = grades.interval(grade)
                rows.append(
                    [s["stage"], name.replace("_", " "), kind, str(grade["questions"]), f"{grade['accuracy']:.1%}",
                     f"{low:.1%} to {high:.1%}", grade["majority_answer"], f"{grade['majority']:.1%}",
                     grades.verdict(grade), *_blind_cells(grade)]
                )  # fmt: skip
    return rows


def _blind_cells(grade: Mapping[str, Any]) -> list[str]:
    """Empty for a stage that an earlier version graded."""
    if "blind" not in grade:
        return ["", "", ""]
    gain, low, high = grades.image_adds(grade)
    return [f"{grade['blind']:.1%}", f"{gain:+z.1%}", f"{low:z.1%} to {high:z.1%}"]


def _text_table(stages: Stages) -> Rows:
    rows = [["stage", "before", "after", "change"]]
    for s in stages.values():
        before, after = s["text_loss_before"], s["text_loss_after"]
        if after is None:
            continue
        if before is None:
            rows.append([s["stage"], "random weights", f"{after:.4f}", ""])
        else:
            change = (
                "none, to the last bit" if before == after else f"{after - before:+z.4f} ({after / before - 1:+z.1%})"
            )
            rows.append([s["stage"], f"{before:.4f}", f"{after:.4f}", change])
    return rows


def _stage_table(stages: Stages) -> Rows:
    rows = [["stage", "", "steps", "time", "last loss", "trains", "updates skipped"]]
    for s in stages.values():
        trained = ", ".join(group.replace("_", " ") for group, g in s["groups"].items() if g["trained"])
        rows.append(
            [s["stage"], s["title"], str(s["steps"]), duration(s["seconds"]), decimal(s["loss"], 3), trained,
             str(s["skipped_updates"])]
        )  # fmt: skip
    return rows


def _group_table(stages: Stages) -> Rows:
    names = list(dict.fromkeys(group for s in stages.values() for group in s["groups"]))
    rows = [["group", "parameters", *(s["stage"] for s in stages.values())]]
    for name in names:
        size = max(s["groups"].get(name, {"parameters": 0})["parameters"] for s in stages.values())
        marks = [_mark(s["groups"].get(name)) for s in stages.values()]
        rows.append([GROUPS[name], f"{size:,}", *marks])
    for label, key in (("trainable parameters", "trainable"), ("frozen parameters", "frozen")):
        rows.append([label, "", *(f"{s[key]:,}" for s in stages.values())])
    for label, key in (
        ("optimizer state", "optimizer_bytes"),
        ("float32 masters", "master_bytes"),
        ("frozen parameters", "frozen_bytes"),
    ):
        rows.append([f"{label}, MB", "", *(f"{s[key] / 1e6:,.1f}" for s in stages.values())])
    return rows


def _mark(group: Mapping[str, Any] | None) -> str:
    return "absent" if group is None else "trains" if group["trained"] else "frozen"


def _data_table(stages: Stages, manifest: Mapping[str, Any]) -> Rows:
    rows = [["stage", "samples in the sets", "trained on", "skipped"]]
    for folder, s in stages.items():
        sets = manifest["stages"].get(folder, {}).get("samples", "")
        skipped = ", ".join(f"{reason}: {count}" for reason, count in s["data"]["skipped"].items()) or "none"
        rows.append([s["stage"], str(sets), str(s["data"]["samples"]), skipped])
    return rows


def _made(results: Mapping[str, Any]) -> list[str]:
    seconds = sum(s["seconds"] for s in results["stages"].values())
    now = datetime.datetime.now().astimezone()
    versions = {"mono-jax": mono_jax.__version__, **package_versions()}
    return [
        f"{now:%Y-%m-%d %H:%M %Z}, {results['device']}; training took {duration(seconds)}.",
        f"Command: {shlex.join(['python', *sys.argv])}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
