"""The report of a sequence of stages: report.md, and report.html with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from mono_jax.training.metrics import duration, read_metrics
from mono_jax.training.stages import GROUPS

Rows = list[list[str]]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8884; padding: .3rem .7rem; text-align: left; vertical-align: top; }
img.curve { width: 100%; background: white; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #8884; border-radius: .5rem; padding: .8rem; }
.card img { width: 8rem; height: 8rem; image-rendering: pixelated; display: block; margin-bottom: .5rem; }
.right { color: #1a7f37; } .wrong { color: #cf222e; } .asked { opacity: .75; }
""".strip()


def write(workdir: Path, results: Mapping[str, Any]) -> list[Path]:
    """Writes report.md and report.html into ``workdir`` from what ``evip.Evip.run`` returned; returns their paths."""
    curves = workdir / "loss_curves.png"
    curves.write_bytes(loss_curves(workdir, results["stages"]))
    sections = list(_sections(results))
    markdown, page = workdir / "report.md", workdir / "report.html"
    markdown.write_text(_markdown(sections, curves.name), encoding="utf-8")
    page.write_text(_html(sections, curves.read_bytes()), encoding="utf-8")
    return [markdown, page]


def loss_curves(workdir: Path, summaries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG with the loss over the steps of each stage: dots are means between records, the line smooths a tenth."""
    columns = min(len(summaries), 3)
    rows = math.ceil(len(summaries) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(summaries) :]:
        axis.set_visible(False)
    for axis, (folder, summary) in zip(axes.flat, summaries.items()):
        records = [r for r in read_metrics(workdir / folder / "metrics.jsonl") if r.get("loss_mean") is not None]
        steps, losses = [r["step"] for r in records], [r["loss_mean"] for r in records]
        axis.plot(steps, losses, ".", color="#9ecae1", markersize=4)
        axis.plot(steps, _smooth(losses, max(1, len(losses) // 10)), color="#08519c")
        axis.set_title(f"{summary['stage']}: {summary['title']}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("loss (nats per token)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _smooth(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


# ------------------------------------------------------------------ content: (title, text, table, gallery) each


def _sections(results: Mapping[str, Any]) -> Iterable[tuple[str, str, Rows, list[dict[str, Any]]]]:
    stages = results["stages"]
    yield "What ran", f"Device: {results['device']}.", _stage_table(stages), []
    yield "Loss curves", "CURVES", [], []
    yield (
        "What trained and what stayed frozen",
        ("A frozen parameter has no gradient, no float32 master copy and no optimizer state."),
        _group_table(stages),
        [],
    )
    yield (
        "Language ability",
        (
            "Loss on held-out text (nats per token) before and after every stage. While attention and the text side "
            "are frozen it stays the same to the last bit."
        ),
        _text_table(stages),
        [],
    )
    grades = _grade_table(stages)
    if grades:
        yield (
            "Held-out questions",
            ("Share of answers equal to the truth, beside what always giving the commonest answer would score."),
            grades,
            [],
        )
    for summary in stages.values():
        for name, graded in summary.get("evaluation", {}).items():
            yield (
                f"{summary['stage']}: held-out {name.replace('_', ' ')}",
                (f"{graded['accuracy']:.1%} of {graded['questions']} equal the truth word for word."),
                [],
                _cards(graded["gallery"]),
            )
    yield "Data", "Samples and what was skipped, by stage.", _data_table(stages, results["manifest"]), []


def _stage_table(stages: Mapping[str, Any]) -> Rows:
    rows = [["stage", "", "steps", "time", "last loss", "trains", "updates skipped"]]
    for s in stages.values():
        trained = ", ".join(group.replace("_", " ") for group, g in s["groups"].items() if g["trained"])
        rows.append(
            [s["stage"], s["title"], str(s["steps"]), duration(s["seconds"]), f"{s['loss']:.3f}", trained,
             str(s["skipped_updates"])]
        )  # fmt: skip
    return rows


def _group_table(stages: Mapping[str, Any]) -> Rows:
    names = list(dict.fromkeys(group for s in stages.values() for group in s["groups"]))
    rows = [["group", "parameters", *(s["stage"] for s in stages.values())]]
    for name in names:
        size = max(s["groups"].get(name, {"parameters": 0})["parameters"] for s in stages.values())
        marks = [_mark(s["groups"].get(name)) for s in stages.values()]
        rows.append([GROUPS[name], f"{size:,}", *marks])
    for label, key in (
        ("trainable parameters", "trainable"),
        ("frozen parameters", "frozen"),
        ("bytes of optimizer state", "optimizer_bytes"),
        ("bytes of float32 masters", "master_bytes"),
        ("bytes of frozen parameters", "frozen_bytes"),
    ):
        rows.append([label, "", *(f"{s[key]:,}" for s in stages.values())])
    return rows


def _mark(group: Mapping[str, Any] | None) -> str:
    return "absent" if group is None else "trains" if group["trained"] else "frozen"


def _text_table(stages: Mapping[str, Any]) -> Rows:
    rows = [["stage", "before", "after", "change"]]
    for s in stages.values():
        before, after = s["text_loss_before"], s["text_loss_after"]
        if after is None:
            continue
        if before is None:
            rows.append([s["stage"], "random weights", repr(after), ""])
        else:
            change = "none: equal to the last bit" if before == after else f"{after - before:+.4f}"
            rows.append([s["stage"], repr(before), repr(after), change])
    return rows


def _grade_table(stages: Mapping[str, Any]) -> Rows:
    rows = [["stage", "questions", "kind", "number", "right", "commonest answer", "would score"]]
    for s in stages.values():
        for name, graded in s.get("evaluation", {}).items():
            if name == "captions":
                continue
            for kind, g in [("all", graded), *graded["by_kind"].items()]:
                rows.append(
                    [s["stage"], name.replace("_", " "), kind, str(g["questions"]), f"{g['accuracy']:.1%}",
                     g["majority_answer"], f"{g['majority']:.1%}"]
                )  # fmt: skip
    return rows if len(rows) > 1 else []


def _data_table(stages: Mapping[str, Any], manifest: Mapping[str, Any]) -> Rows:
    rows = [["stage", "samples in the sets", "trained on", "skipped"]]
    for folder, s in stages.items():
        sets = manifest["stages"].get(folder, {}).get("samples", "")
        skipped = ", ".join(f"{reason}: {count}" for reason, count in s["data"]["skipped"].items()) or "none"
        rows.append([s["stage"], str(sets), str(s["data"]["samples"]), skipped])
    return rows


def _cards(gallery: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**item, "right": item["truth"].strip().lower() == item["answer"].strip().lower()}
        for item in gallery
        if Path(item["image"]).is_file()
    ]


# ------------------------------------------------------------------ the two forms

_TITLE = "Mono-InternVL: report of a training run"


def _markdown(sections: Sequence[tuple[str, str, Rows, list[dict[str, Any]]]], curves: str) -> str:
    lines = [f"# {_TITLE}", ""]
    for title, text, table, gallery in sections:
        lines += [f"## {title}", "", f"![loss curves]({curves})" if text == "CURVES" else text, ""]
        rows = table or ([["asked", "truth", "answer", ""]] if gallery else [])
        rows = rows + [[c["asked"], c["truth"], c["answer"], "right" if c["right"] else "wrong"] for c in gallery]
        if rows:
            lines += [_markdown_row(rows[0]), "|" + "---|" * len(rows[0])]
            lines += [_markdown_row(row) for row in rows[1:]] + [""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _html(sections: Sequence[tuple[str, str, Rows, list[dict[str, Any]]]], curves: bytes) -> str:
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_TITLE}</title>",
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style><h1>{_TITLE}</h1>",
    ]
    for title, text, table, gallery in sections:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        if text == "CURVES":
            parts.append(f"<img class='curve' alt='loss over steps' src='{_data_url(curves, 'png')}'>")
        else:
            parts.append(f"<p>{html.escape(text)}</p>")
        if table:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table[0])
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table[1:])
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        if gallery:
            parts.append("<div class='gallery'>" + "".join(map(_card, gallery)) + "</div>")
    return "\n".join(parts) + "</html>\n"


def _card(item: Mapping[str, Any]) -> str:
    image = Path(item["image"])
    source = _data_url(image.read_bytes(), "jpeg" if image.suffix in (".jpg", ".jpeg") else image.suffix[1:])
    tone = "right" if item["right"] else "wrong"
    return (
        f"<div class='card'><img alt='' src='{source}'><div class='asked'>{html.escape(item['asked'])}</div>"
        f"<div>truth: {html.escape(item['truth'])}</div>"
        f"<div class='{tone}'>model: {html.escape(item['answer'])}</div></div>"
    )


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
