"""What ``experiments/robustness.py`` does: asks a model questions that get harder, and gives it broken files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from mono_jax.errors import GenerationError
from mono_jax.evaluation.benchmarks import running
from mono_jax.evaluation.questions import Question, read_questions
from mono_jax.evaluation.robustness.broken import BROKEN
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES
from mono_jax.generation.chat import Chat, Opened, model_flags, open_model
from mono_jax.generation.options import Sampling
from mono_jax.runs.console import say_now
from mono_jax.runs.reporting.page import page
from mono_jax.runs.reporting.section import Section
from mono_jax.runs.robustness import sets
from mono_jax.runs.robustness.pictures import curves, examples

ANSWERED = "answered"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {"curves": {name: [{"level", "score", "low", "high", "n"}]}, "broken": {name: what became of it}}.

    Writes OUT/robustness.json and OUT/robustness.html. Raises MonoJaxError or DataError.
    """
    out = Path(args.out)
    asked = read_questions(args.questions, args.images)[: args.limit]
    if not asked:
        raise DataError(f"{args.questions}: no question in it")
    broken = try_broken(open_model(args.model, None, **model_flags(args)), out / "broken", asked[0])
    files = sets.write(out / "sets", asked, args.changes)
    tasks = ",".join(f"{name}:questions={file}" for name, file in files.items())
    options = {"model": [args.model], "tasks": tasks, "data": str(args.images), "out": str(out / "answers"),
               "limit": None, "judge": None, "judge_model": None}  # fmt: skip
    scores = running.evaluate(argparse.Namespace(**{**vars(args), **options}))
    result = {"model": args.model, "questions": len(asked), "curves": _curves(scores), "broken": broken}
    publish.write_json(out / "robustness.json", result)
    publish.write_text(out / "robustness.html", page(f"Robustness of {args.model}", _sections(result, asked)))
    for name, points in result["curves"].items():
        shown = ", ".join(f"{point['level']:g}: {point['score']:.1f} %" for point in points)
        say_now(f"{name} ({_unit(name)}): {shown}")
    say_now(f"broken files: {sum(outcome == ANSWERED for outcome in broken.values())} of {len(broken)} answered")
    say_now(f"{out / 'robustness.html'}, {out / 'robustness.json'}")
    return result


def try_broken(model: Opened, folder: Path, question: Question) -> dict[str, str]:
    """{kind of file: "answered", or why it was refused}. Whatever else is raised is a fault, and comes through."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, outcomes = sets.opened(question), {}
    for number, (name, encode) in enumerate(BROKEN.items()):
        file = folder / f"{number}.bin"
        file.write_bytes(encode(picture))
        try:
            chat = Chat(model.generator, model.tokenizer, model.form, Sampling(max_new_tokens=8))
            chat.ask("what is in the image?", [str(file)])
            outcomes[name] = ANSWERED
        except (DataError, BadSample, GenerationError) as error:
            outcomes[name] = str(error).removeprefix(f"{file}: ")
    return outcomes


def _curves(scores: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for task, found in scores["tasks"].items():
        name, _, level = task.rpartition("@")
        [model] = found["models"].values()
        [headline, *_] = model["scores"].values()
        point = {key: headline[key] for key in ("score", "low", "high", "n")}
        curves.setdefault(name, []).append({"level": float(level), **point})
    return curves


def _unit(name: str) -> str:
    return {**CHANGES, **ARRANGEMENTS}[name].unit


def _sections(result: Mapping[str, Any], asked: Sequence[Question]) -> list[Section]:
    points = result["curves"]
    units = {name: _unit(name) for name in points}
    rows = [["file", "what became of it"], *([name, outcome] for name, outcome in result["broken"].items())]
    lines = [f"Right answers to {result['questions']} questions, %, with their 95 % intervals; left: unchanged."]
    return [
        Section("Harder and harder", lines, picture=curves(points, units), alt="right answers by level of each change"),
        Section("What the changes look like", picture=examples(sets.opened(asked[0])), alt="one picture at all levels"),
        Section("Broken and unusual files", ["Each must be answered or refused by name."], table=rows),
    ]
