"""Implements ``experiments/robustness.py``: questions that get harder, broken files, placeholders in odd places."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from mono_jax.errors import GenerationError
from mono_jax.evaluation.benchmarks import running
from mono_jax.evaluation.questions import Question, opened, read_questions
from mono_jax.evaluation.robustness.broken import ANSWERED, BROKEN, File
from mono_jax.evaluation.robustness.changes import ARRANGEMENTS, CHANGES
from mono_jax.evaluation.robustness.placeholders import ODD, Odd
from mono_jax.generation.chat import Chat, Opened, model_flags, open_model
from mono_jax.generation.options import Sampling
from mono_jax.runs.console import say_now
from mono_jax.runs.reporting.page import page
from mono_jax.runs.reporting.section import Section
from mono_jax.runs.robustness import sets
from mono_jax.runs.robustness.pictures import curves, examples

NEW_TOKENS = 8  # if it only matters whether there is an answer


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Asks everything; answers of an earlier call are kept.

    Returns {"model", "questions": their number, "curves": {name: [{"level", "score", "low", "high", "n"}]}, "broken"
    and "placeholders": {name: ``ANSWERED``, or why it was refused}, "unexpected": [names of these]}.

    Writes OUT/robustness.json and OUT/robustness.html. Raises MonoJaxError or DataError.
    """
    out = Path(args.out)
    asked = read_questions(args.questions, args.images)[: args.limit]
    if not asked:
        raise DataError(f"{args.questions}: contains no questions")
    model = open_model(args.model, None, **model_flags(args))
    broken, odd = try_broken(model, out / "broken", asked[0]), try_odd(model, asked[0])
    files = sets.write(out / "sets", asked, args.changes)
    tasks = ",".join(f"{name}:questions={file}" for name, file in files.items())
    options = {"model": [args.model], "tasks": tasks, "data": str(args.images), "out": str(out / "answers"),
               "limit": None, "judge": None, "judge_model": None, "blind": False}  # fmt: skip
    scores = running.evaluate(argparse.Namespace(**{**vars(args), **options}))
    result = {"model": args.model, "questions": len(asked), "curves": _curves(scores), "broken": broken,
              "placeholders": odd, "unexpected": unexpected(BROKEN, broken) + unexpected(ODD, odd)}  # fmt: skip
    publish.write_json(out / "robustness.json", result)
    publish.write_text(out / "robustness.html", page(f"Robustness of {args.model}", _sections(result, asked)))
    _say(result)
    say_now(f"{out / 'robustness.html'}, {out / 'robustness.json'}")
    return result


def try_broken(model: Opened, folder: Path, question: Question) -> dict[str, str]:
    """{kind of file: ``ANSWERED``, or why it was refused}. Any other error is a bug and is propagated."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, outcomes = opened(question), {}
    for number, (name, broken) in enumerate(BROKEN.items()):
        file = folder / f"{number}.bin"
        file.write_bytes(broken.encode(picture))
        chat = Chat(model.generator, model.tokenizer, model.form, Sampling(max_new_tokens=NEW_TOKENS))
        outcome = _outcome(lambda chat=chat, file=file: chat.ask("what is in the image?", [str(file)]))
        outcomes[name] = outcome.removeprefix(f"{file}: ")
    return outcomes


def try_odd(model: Opened, question: Question) -> dict[str, str]:
    """The same for each of ``ODD``, with the question's picture."""
    asker, picture = running.asker_of(model), (question.image.name, question.image.read_bytes())

    def ask(turns: Sequence[tuple[str, str]], pictures: int) -> None:
        list(asker.generate([asker.ask(turns, [picture] * pictures)], NEW_TOKENS, batch_size=1))

    return {name: _outcome(lambda odd=odd: ask(odd.turns, odd.pictures)) for name, odd in ODD.items()}


def _outcome(ask: Callable[[], object]) -> str:
    """``ANSWERED``, or the message of the error that rejects it."""
    try:
        ask()
    except (DataError, BadSample, GenerationError) as error:
        return str(error).removeprefix("sample: ")
    return ANSWERED


def unexpected(cases: Mapping[str, File | Odd], outcomes: Mapping[str, str]) -> list[str]:
    """The names of cases whose outcome is not the one that ``cases`` expects."""
    return [
        name
        for name, outcome in outcomes.items()
        if (expected := cases[name].expected) is not None and not outcome.startswith(expected)
    ]


def _say(result: Mapping[str, Any]) -> None:
    for name, points in result["curves"].items():
        shown = ", ".join(f"{point['level']:g}: {point['score']:.1f} %" for point in points)
        say_now(f"{name} ({_unit(name)}): {shown}")
    for name in ("broken", "placeholders"):
        outcomes = result[name].values()
        answered = sum(outcome == ANSWERED for outcome in outcomes)
        say_now(f"{name}: {answered} of {len(outcomes)} answered, the others refused with an error that names them")
    if result["unexpected"]:
        say_now(f"not as expected: {', '.join(result['unexpected'])}")


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
    lines = [
        f"Right answers to {result['questions']} questions, %, with their 95 % intervals; dotted: the value at the "
        "first level, which is the unchanged question except for interleaved ones."
    ]
    each = "Each must be answered, or refused with an error that names it."
    return [
        Section("Harder and harder", lines, picture=curves(points, units), alt="right answers by level of each change"),
        Section("What the changes look like", picture=examples(opened(asked[0])), alt="one picture at all levels"),
        Section("Broken and unusual files", [each], table=_table(BROKEN, result["broken"])),
        Section("Placeholders in odd places", [each], table=_table(ODD, result["placeholders"])),
    ]


def _table(cases: Mapping[str, File | Odd], outcomes: Mapping[str, str]) -> list[list[str]]:
    rows = [[name, cases[name].expected or "either", outcome] for name, outcome in outcomes.items()]
    return [["what was given", "expected", "outcome"], *rows]
