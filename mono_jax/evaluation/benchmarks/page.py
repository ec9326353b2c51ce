"""Scores as a table for the console, and as a page with examples of right and wrong answers."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from data_pipelines.encoding.chat import IMAGE
from data_pipelines.errors import DataError
from data_pipelines.io.html_pages import data_url, opening
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture

_PICTURE = 320  # pixels of the longer side on the page
_SHOWN = 4  # number of right examples, and of wrong ones
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8884; padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #8884; border-radius: .5rem; padding: .8rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; max-height: 10rem; min-height: 4rem; image-rendering: pixelated; display: block; }
.asked { white-space: pre-line; margin: .5rem 0; } .soft { opacity: .7; }
.right { color: #1a7f37; } .wrong { color: #cf222e; }
""".strip()


@dataclasses.dataclass(frozen=True)
class Shown:
    """Examples of a task: ``answers`` {model: {id: answer}}, ``right`` {model: {id: whether}}, {} if unknown."""

    examples: Sequence[Example]
    answers: Mapping[str, Mapping[str, str]]
    right: Mapping[str, Mapping[str, bool]]


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Task, model, score, value, 95 % interval, n, and the score of a constant answer."""
    yield ["task", "model", "score", "value", "95 % interval", "n", "constant answer"]
    for task, found in result["tasks"].items():
        for model, of_model in found["models"].items():
            if "submission" in of_model:
                yield [task, model, "hidden", "", of_model["submission"], str(found["examples"]), ""]
            for number, (name, score) in enumerate(of_model.get("scores", {}).items()):
                always = "" if number else _constant(of_model)
                yield [task, model, name, f"{score['score']:.2f}", _interval(score), str(score["n"]), always]


def _constant(scored: Mapping[str, Any]) -> str:
    constant = scored.get("constant")
    return f"{constant['score']:.2f} ({constant['answer'][:24]})" if constant else ""


def _in_brackets(score: Mapping[str, Any]) -> str:
    return f" ({found})" if (found := _interval(score)) else ""


def _interval(score: Mapping[str, Any]) -> str:
    return "" if score["low"] is None else f"{score['low']:z.2f} to {score['high']:z.2f}"


def difference_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Task, score, models, difference with its interval, numbers of better and worse units, p."""
    yield ["task", "score", "model", "against", "difference", "95 % interval", "better : worse", "p"]
    for task, found in result["tasks"].items():
        for each in found.get("differences", ()):
            counts = f"{each['better']} : {each['worse']}"
            yield [task, each["score"], each["model"], each["against"], f"{each['difference']:+z.2f}", _interval(each),
                   counts, f"{each['p']:.2g}"]  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """The text that the console shows."""
    parts = [_aligned(list(rows(result)))]
    if len(differing := list(difference_rows(result))) > 1:
        parts.append(_aligned(differing))
    return "\n\n".join(parts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def page(result: Mapping[str, Any], shown: Mapping[str, Shown]) -> str:
    """A self-contained HTML page."""
    title = "Evaluation of " + ", ".join(result["models"])
    parts = [
        f"{opening(title, _STYLE)}<h1>{html.escape(title)}</h1>",
        "<p>Shares in percent. Intervals: exact for independent right/wrong examples, otherwise bootstrapped, or, "
        "where all units score the same, by their number.</p>",
        _table(list(rows(result))),
    ]
    if len(differing := list(difference_rows(result))) > 1:
        parts += [
            "<h2>Differences</h2><p>Paired on the same examples; p is that of the exact sign test.</p>",
            _table(differing),
        ]
    for task, found in result["tasks"].items():
        parts.append(f"<h2>{html.escape(task)}</h2>")
        parts += [f"<p>{html.escape(note)}</p>" for note in found.get("notes", ())]
        parts += _categories(found)
        for model, right in shown[task].right.items():
            parts += _gallery(model, shown[task], right)
    return "\n".join(parts) + "</html>\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        number = text[:1].isdigit() or (text[:1] in "+-" and text[1:2].isdigit())
        return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in lines[0])
    return (
        f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines[1:]) + "</table>"
    )


def _categories(found: Mapping[str, Any]) -> Iterator[str]:
    of = {model: each.get("by_category", {}) for model, each in found["models"].items()}
    gains = [each for each in found.get("differences", ()) if each.get("by_category")]
    if any(of.values()):
        first = next(iter(of.values()))
        constants = ["constant answer"] if any("constant" in each for each in first.values()) else []
        lines = [["category", "n", *of, *constants, *(f"{each['model']} minus {each['against']}" for each in gains)]]
        for category, scored in first.items():
            values = [f"{each[category]['score']:.2f}{_in_brackets(each[category])}" for each in of.values()]
            values += [_constant(scored)] if constants else []
            paired = [each["by_category"][category] for each in gains]
            values += [f"{each['difference']:+z.2f}{_in_brackets(each)}" for each in paired]
            lines.append([category, str(scored["n"]), *values])
        yield _table(lines)


def _gallery(model: str, shown: Shown, right: Mapping[str, bool]) -> Iterator[str]:
    """Some examples with right answers and some with wrong ones; just the first ones if that is unknown."""
    for label, wanted in (("right", True), ("wrong", False)) if right else (("answers", None),):
        some = [each for each in shown.examples if wanted is None or right[each.id] == wanted][:_SHOWN]
        if some:
            yield f"<h3>{html.escape(model)}: {label}</h3><div class='gallery'>"
            yield from (_card(example, shown.answers[model][example.id], label) for example in some)
            yield "</div>"


def _card(example: Example, answer: str, tone: str) -> str:
    pictures = "".join(map(small_copy, example.pictures))
    truths = " | ".join(dict.fromkeys(example.truths[:6]))
    return (
        f"<div class='card'>{pictures}<div class='asked'>{html.escape(example.asked.replace(IMAGE, '').strip())}</div>"
        f"<div class='soft'>right: {html.escape(truths)}</div>"
        f"<div class='{tone}'>answer: {html.escape(answer) or '(nothing)'}</div></div>"
    )


def small_copy(picture: Picture) -> str:
    """An HTML element with a thumbnail of the picture; empty if the picture no longer exists."""
    with contextlib.suppress(DataError, OSError, ValueError, Image.DecompressionBombError):
        with Image.open(io.BytesIO(picture.read())) as image:
            small = image.convert("RGB")
        small.thumbnail((_PICTURE, _PICTURE))
        kind = "png" if max(small.size) < _PICTURE else "jpeg"
        data = io.BytesIO()
        small.save(data, kind)
        return f"<img alt='' src='{data_url(data.getvalue(), kind)}'>"
    return ""
