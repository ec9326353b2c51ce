"""An HTML page that shows packed rows as the model gets them: pixels, text and loss mask, segments, skipped samples."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from data_pipelines.batch import Batch, TileGeometry, of_native_cells
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io.html_pages import data_url, opening

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --soft: #666; --line: #ccc; --learnt: #c4e8b5 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #161a1d; --soft: #9aa3a9; --line: #444b50; --learnt: #2f5a2a }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 72em; padding: 0 1em;
  color: var(--text); background: var(--page) }
h2 { margin-top: 2em; font-size: 1.2em; border-bottom: 1px solid var(--line) }
.sample { border-left: 4px solid; margin: 1em 0; padding: 0 0 0 .8em }
.sample img { height: 112px; max-width: 100%; margin: 2px; border: 1px solid var(--line) }
.text { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text b, .legend b { font-weight: normal; background: var(--learnt); border-radius: 2px }
.text i, .legend i, .soft { font-style: normal; color: var(--soft) }
.bar { display: flex; height: 14px; border: 1px solid var(--line); max-width: 40em; margin: 2px 0 }
.bar span { height: 100% }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td { max-width: 40em; overflow-wrap: break-word }
.table { overflow-x: auto }
th { font-weight: 600; white-space: nowrap }
summary { cursor: pointer }
"""
_LISTED = 500  # skipped samples on a page
_COLOURS = ("#7fa8d1", "#e5a66a", "#8fc08f", "#c792c7", "#d9c25c", "#86c5c0", "#d98880", "#aaa")


def page(
    title: str,
    batches: Iterable[tuple[int, Batch]],
    geometry: TileGeometry,
    tokenizer: Tokenizer,
    facts: Sequence[tuple[str, str]] = (),
    skipped: Sequence[tuple[str, str, str]] = (),
    rows: int = 8,
) -> str:
    """A self-contained HTML page.

    Args:
      batches: (step, batch); the first ``rows`` rows of each are drawn.
      geometry: of the tiles.
      tokenizer: for the text.
      facts: (name, value) pairs of the table at the top.
      skipped: (key, reason, detail) of bad samples.
    """
    parts = [
        opening(title, _STYLE),
        f"<h1>{html.escape(title)}</h1>{_table(facts)}",
        "<p class='legend'><b>Green</b>: the model is trained to predict these tokens. <i>[image]</i>: position of"
        " the visual tokens of the tiles above the text. Bars: how the samples of a row share its slots; the empty part"
        " is padding.</p>",
    ]
    for step, batch in batches:
        for row in range(min(rows, len(batch["tokens"]))):
            parts.append(f"<h2>step {step}, row {row}</h2>")
            parts.append(_row({name: array[row] for name, array in batch.items()}, geometry, tokenizer))
    parts.append(_skipped(skipped))
    return "\n".join(parts)


def _skipped(skipped: Sequence[tuple[str, str, str]]) -> str:
    """How many samples were skipped for each reason, and which ones."""
    if not skipped:
        return "<h2>skipped: none</h2>"
    reasons = Counter(reason for _, reason, _ in skipped).most_common()
    which = f"the first {_LISTED}" if len(skipped) > _LISTED else "all of them"
    listed = _table(skipped[:_LISTED], ("key", "reason", "detail"))
    return (
        f"<h2>skipped: {len(skipped)}</h2>{_table(reasons)}<details open><summary>{which}</summary>{listed}</details>"
    )


def _table(lines: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows of cells; without ``head`` the first cell of each row is its name."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    rows = [f"<tr>{top}</tr>"] if head else []
    for line in lines:
        kinds = ["td" if head else "th", *["td"] * (len(line) - 1)]
        cells = "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for kind, cell in zip(kinds, line))
        rows.append(f"<tr>{cells}</tr>")
    return f"<div class='table'><table>{''.join(rows)}</table></div>"


def _row(row: dict[str, np.ndarray], geometry: TileGeometry, tokenizer: Tokenizer) -> str:
    segments = row["segments"]
    end = int(row.get("visual_slots", len(row["patch_cells"])))
    is_visual = row["order"] < end
    parts = [
        _bar("visual", segments[is_visual & (segments > 0)], end),
        _bar("text", segments[~is_visual & (segments > 0)], len(row["order"]) - end),
    ]
    for segment in np.unique(segments[segments > 0]):
        parts.append(_sample(row, row["order"][segments == segment], int(segment), end, geometry, tokenizer))
    return "".join(parts)


def _bar(name: str, segments: np.ndarray, slots: int) -> str:
    """How the samples share the slots of one kind."""
    if not slots:
        return ""
    numbers, counts = np.unique(segments, return_counts=True)
    spans = (
        f"<span title='sample {k}: {n}' style='width:{100 * n / slots:.2f}%;"
        f"background:{_COLOURS[k % len(_COLOURS)]}'></span>"
        for k, n in zip(numbers.tolist(), counts.tolist())
    )
    return f"<div>{name}: {len(segments)} of {slots} slots<div class='bar'>{''.join(spans)}</div></div>"


def _sample(
    row: dict[str, np.ndarray],
    slots: np.ndarray,
    segment: int,
    end: int,
    geometry: TileGeometry,
    tokenizer: Tokenizer,
) -> str:
    visual, text = slots[slots < end], slots[slots >= end] - end
    colour = _COLOURS[segment % len(_COLOURS)]
    head = f"<div class='sample' style='border-color:{colour}'>"
    head += f"<div class='soft'>sample {segment}: {len(visual)} visual, {len(text)} text tokens</div>"
    pictures = _pictures(row["patches"][visual], row["patch_cells"][visual], geometry)
    images = "".join(map(_image, pictures))
    # A token is trained on if the text token before it has a weight.
    trained = np.concatenate([[False], row["loss_weights"][text][:-1] > 0]) if len(text) else np.zeros(0, bool)
    return f"{head}{images}<div class='text'>{_text(row['tokens'][text], trained, tokenizer)}</div></div>"


def _pictures(patches: np.ndarray, cells: np.ndarray, geometry: TileGeometry) -> Iterator[np.ndarray]:
    """The tiles (in native resolution: the images) from which visual tokens were cut: uint8 [height, width, 3]."""
    size, start = geometry.token_pixels, 0
    while start < len(cells):
        if geometry.native:
            _, _, rows, columns = map(int, of_native_cells(cells[start]))
        else:
            rows = columns = geometry.edge
        own = slice(start, start + rows * columns)
        row, column = of_native_cells(cells[own])[:2] if geometry.native else np.divmod(cells[own], columns)
        picture = np.zeros((rows, columns, size, size, 3), np.uint8)
        picture[row, column] = patches[own]
        yield picture.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
        start = own.stop


def _image(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return f"<img alt='tile' src='{data_url(buffer.getvalue(), 'jpeg')}'>"


def _text(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> str:
    """Decoded run by run, so that characters that span several tokens stay whole."""
    parts, start = [], 0
    for end in [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]:
        words = html.escape(tokenizer.decode(ids[start:end]))
        words = words.replace("&lt;img&gt;&lt;/img&gt;", "<i>[image]</i>")
        parts.append(f"<b>{words}</b>" if len(ids) and trained[start : start + 1].any() else words)
        start = end
    return "".join(parts)
