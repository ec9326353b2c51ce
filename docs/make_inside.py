"""Writes the tables of docs/findings/inside.md from the files in docs/findings/inside/.

python docs/make_inside.py
python docs/make_inside.py robustness=OUT/robustness.html inside=PAGE.html sizes=PAGE.html

keeps the pictures of pages of ``experiments/robustness.py`` and ``experiments/inspect_model.py`` first, and the figures
beside them: PAGE.json, what ``--json`` prints.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.benchmarks.tables import fill

PAGE = Path(__file__).parent / "findings/inside.md"
FOLDER = Path(__file__).parent / "findings/inside"
# Of each page, the titles of the sections whose pictures are kept, and what these are called.
KEPT = {
    "robustness": {"Harder and harder": "robustness"},
    "inside": {
        "Attention, layer by layer": "attention",
        "How far the experts have moved": "experts",
        "Units of the experts": "units",
    },
    "sizes": {"Units by kind and size of image": "sizes"},
}
_SECTION = re.compile(r'<h2>([^<]*)</h2>(?:(?!<h2>).)*?<img class="figure"[^>]*base64,([^"]+)"', re.S)
_COLORS = 64  # of a picture: a third of the bytes


def keep(name: str, page: Path) -> None:
    """Keeps the pictures of ``page`` and the figures beside it."""
    FOLDER.mkdir(exist_ok=True)
    for title, data in _SECTION.findall(page.read_text(encoding="utf-8")):
        if (kept := KEPT[name].get(title)) is not None:
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                picture.convert("RGB").quantize(_COLORS).save(FOLDER / f"{kept}.png", optimize=True)
    result = _short(json.loads(page.with_suffix(".json").read_text(encoding="utf-8")))
    result["model"] = "/".join(Path(result["model"]).parts[-2:])
    (FOLDER / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False) + "\n", "utf-8")


def _short(value: Any) -> Any:
    """With numbers of four digits."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Markdown: a row for each change, the score at each level."""
    longest = max(map(len, found.values()))
    lines = ["| | right answers, %, by level |" + " |" * (longest - 1), "|---" * (longest + 1) + "|"]
    for change, points in found.items():
        cells = [f"{point['level']:g}: {point['score']:.0f}" for point in points]
        lines.append(f"| {change} | {' | '.join(cells + [''] * (longest - len(cells)))} |")
    return lines


def outcomes(found: Mapping[str, str]) -> list[str]:
    """Markdown: what became of each."""
    rows = [f"| {_escaped(name)} | {_escaped(outcome)} |" for name, outcome in found.items()]
    return ["| given | |", "|---|---|", *rows]


def _escaped(text: str) -> str:
    return text.removesuffix(": give another image").replace("<", "\\<").replace("|", "\\|")


def main(pages: Sequence[str]) -> None:
    for page in pages:
        name, _, file = page.partition("=")
        keep(name, Path(file))
    result = json.loads((FOLDER / "robustness.json").read_text(encoding="utf-8"))
    tables = {
        "curves": curves(result["curves"]),
        "broken": outcomes(result["broken"]),
        "placeholders": outcomes(result["placeholders"]),
    }
    for name, lines in tables.items():
        fill(PAGE, f"<!-- {name} -->", f"<!-- end of {name} -->", "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
