"""Sections as Markdown, and as one HTML file with embedded pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from data_pipelines.io.html_pages import data_url, kind_of, opening
from mono_jax.runs.reporting.section import Card, Rows, Section

_STYLE = """
:root { color-scheme: light dark; --right: #1a7f37; --wrong: #cf222e; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --right: #3fb950; --wrong: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
ul { padding-left: 1.2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td { font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
img.figure { width: 100%; background: white; }
summary { cursor: pointer; margin: 1rem 0; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-wrap: anywhere; }
.card img { width: 8rem; height: 8rem; object-fit: contain; image-rendering: pixelated; display: block; }
.card p { margin: .4rem 0 0; } .asked { opacity: .75; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
""".strip()


def markdown(title: str, sections: Sequence[Section], pictures: Sequence[str]) -> str:
    """``pictures``: paths of the sections' pictures, in their order."""
    lines, files = [f"# {title}", ""], iter(pictures)
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [f"* {line}" for line in section.lines] if len(section.lines) > 1 else section.lines
        lines += [""] if section.lines else []
        if section.picture is not None:
            lines += [f"![{section.alt}]({next(files)})", ""]
        rows = section.table or (_card_rows(section.cards) if section.cards else ())
        if rows:
            lines += [_markdown_row(rows[0]), "|" + "---|" * len(rows[0])]
            lines += [_markdown_row(row) for row in rows[1:]] + [""]
    return "\n".join(lines)


def _card_rows(cards: Sequence[Card]) -> Rows:
    labels = [label for label, _, _ in cards[0].answers]
    rows = [["asked", "truth", *labels]]
    for card in cards:
        rows.append([card.asked, card.truth, *(f"{text} ({_verdict(right)})" for _, text, right in card.answers)])
    return rows


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def page(title: str, sections: Sequence[Section]) -> str:
    """One self-contained HTML file."""
    parts = [f"{opening(title, _STYLE)}<h1>{html.escape(title)}</h1>"]
    for section in sections:
        heading = html.escape(section.title)
        if section.folded:
            parts.append(f"<details><summary>{heading}</summary>{_content(section)}</details>")
        else:
            parts.append(f"<h2>{heading}</h2>{_content(section)}")
    return "\n".join(parts) + "</html>\n"


def _content(section: Section) -> str:
    parts = []
    if len(section.lines) > 1:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.lines) + "</ul>")
    parts += [f"<p>{html.escape(line)}</p>" for line in section.lines] if len(section.lines) == 1 else []
    if section.picture is not None:
        alt, source = html.escape(section.alt, quote=True), data_url(section.picture, "png")
        parts.append(f'<img class="figure" alt="{alt}" src="{source}">')
    if section.table:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.table[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in section.table[1:]
        )
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    if section.cards:
        parts.append("<div class='cards'>" + "".join(map(_card, section.cards)) + "</div>")
    return "\n".join(parts)


def _card(card: Card) -> str:
    source = data_url(card.image.read_bytes(), kind_of(card.image))
    answers = "".join(
        f"<p class='{_verdict(right)}'>{html.escape(label)}: {html.escape(text)}</p>"
        for label, text, right in card.answers
    )
    return (
        f"<div class='card'><img alt='' src='{source}'><p class='asked'>{html.escape(card.asked)}</p>"
        f"<p>truth: {html.escape(card.truth)}</p>{answers}</div>"
    )
