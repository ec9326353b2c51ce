"""Writes the tables and pictures of docs/findings.md from docs/findings/*.csv and zero_shot.json.

python docs/make_findings.py
python docs/make_findings.py RESULTS.csv ...    # keeps what the page shows of sweeps' results.csv first

A table's first row is the group that the others are compared with.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.tables import fill
from mono_jax.runs.sweeping.gather import difference
from mono_jax.runs.sweeping.plots import metric_plots
from mono_jax.runs.sweeping.seeds import MeanOfSeeds
from mono_jax.training.metrics import is_finite

FOLDER = Path(__file__).parent / "findings"
PAGE = Path(__file__).parent / "findings.md"
KEPT = ("unit", "group", "seed", "s0/text_loss_after")
AFTER = ("text_loss_after", "captions", "questions", "easy_vqa", "heldout/captions")

Row = Mapping[str, str]
Values = Mapping[str, Mapping[int | None, float]]  # {group: {seed: value}}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column: its title, the value of a unit (None = not measured), decimals, whether the picture has it."""

    title: str
    value: Callable[[Row], float | None]
    decimals: int = 1
    drawn: bool = True


def column(name: str, factor: float = 1) -> Callable[[Row], float | None]:
    """The number of that name, times ``factor``."""
    return lambda row: float(row[name]) * factor if row.get(name) else None


def text_change(stage: str) -> Callable[[Row], float | None]:
    """By how many percent the loss on held-out text is above that of the base."""

    def change(row: Row) -> float | None:
        after, base = row.get(f"{stage}/text_loss_after"), row.get("s0/text_loss_after")
        return 100 * (float(after) / float(base) - 1) if after and base else None

    return change


def before_s2(value: Callable[[str], Callable[[Row], float | None]]) -> Callable[[Row], float | None]:
    """``value`` of the last stage before S2, for units without S1.3, which has columns of its own."""

    def of(row: Row) -> float | None:
        stages = [stage for stage in ("s1_1", "s1_2", "s1_3") if row.get(f"{stage}/text_loss_after")]
        return value(stages[-1])(row) if stages and stages[-1] != "s1_3" else None

    return of


METRICS = (
    Metric("answers, %", column("s2/questions", 100)),
    Metric("about another image, %", column("s2/questions/blind", 100), drawn=False),
    Metric("easy-VQA, %", column("s2/easy_vqa", 100), drawn=False),
    Metric("captions, %", column("s2/captions", 100), drawn=False),
    Metric("caption loss", column("s2/heldout/captions"), 3),
    Metric("text loss, % above base", text_change("s2")),
    Metric("after S1.3: caption loss", column("s1_3/heldout/captions"), 3),
    Metric("after S1.3: text loss, %", text_change("s1_3"), drawn=False),
    Metric("before S2: caption loss", before_s2(lambda stage: column(f"{stage}/heldout/captions")), 3),
    Metric("before S2: text loss, %", before_s2(text_change)),
)


def read(file: Path) -> dict[str, list[Row]]:
    """The units of a results.csv by group, in its order."""
    groups: dict[str, list[Row]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            groups.setdefault(row["group"], []).append(row)
    return groups


def keep(source: Path) -> None:
    """Copies the columns that the page shows, and answers by kind, of a sweep's results.csv in a folder of its name."""
    rows = [row for group in read(source).values() for row in group]
    stages = ("s1_1", "s1_2", "s1_3", "s2")
    wanted = {f"{stage}/{name}" for stage in stages for name in AFTER}
    names = [n for n in rows[0] if n in KEPT or n in wanted or (n.startswith("s2/questions/") and "common" not in n)]
    with (FOLDER / f"{source.resolve().parent.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: _short(row[n]) for n in names} for row in rows)


def _short(text: str) -> str:
    try:
        return f"{float(text):.5g}" if "." in text else text
    except ValueError:
        return text


def tables(groups: Mapping[str, Sequence[Row]]) -> dict[Metric, dict[str, dict[int | None, float]]]:
    """{metric: {group: {seed: value}}} of the metrics that the first group has, without values that are not finite."""
    found, first = {}, next(iter(groups))
    for metric in METRICS:
        values = {
            group: {int(row["seed"]): value for row in rows if is_finite(value := metric.value(row))}
            for group, rows in groups.items()
        }
        if values[first]:
            found[metric] = values
    return found


def left_out(groups: Mapping[str, Sequence[Row]], found: Mapping[Metric, Values]) -> dict[str, list[str]]:
    """{unit: titles of the metrics that it lacks, or that are not finite, though its group was measured}."""
    lacking: dict[str, list[str]] = {}
    for metric in found:
        for rows in groups.values():
            values = {row["unit"]: metric.value(row) for row in rows}
            if any(value is not None for value in values.values()):
                for unit in (unit for unit, value in values.items() if not is_finite(value)):
                    lacking.setdefault(unit, []).append(metric.title)
    return lacking


def table(groups: Mapping[str, Sequence[Row]], found: Mapping[Metric, Values]) -> list[str]:
    """Markdown: means and 95 % intervals; an arrow where the difference to the first group leaves out 0; the number of
    values if it is not that of the seeds, and which units lack one."""
    first = next(iter(groups))
    lines = ["| | seeds | " + " | ".join(metric.title for metric in found) + " |", "|---" * (len(found) + 2) + "|"]
    for group, rows in groups.items():
        cells = [_cell(metric, values, group, first, len(rows)) for metric, values in found.items()]
        lines.append(f"| {group} | {len(rows)} | {' | '.join(cells)} |")
    if lacking := left_out(groups, found):
        units = "; ".join(f"{unit} ({', '.join(titles)})" for unit, titles in lacking.items())
        lines += ["", f"Left out, since not finite or not measured: {units}."]
    return lines


def _cell(metric: Metric, values: Values, group: str, first: str, seeds: int) -> str:
    if not values[group]:
        return ""
    estimate, apart = MeanOfSeeds.of(list(values[group].values())), difference(values, group, first)
    text = f"{estimate.mean:.{metric.decimals}f}"
    text += "" if estimate.half is None else f" ± {estimate.half:.{metric.decimals}f}"
    text += "" if estimate.n == seeds else f" ({estimate.n} of {seeds})"
    return text + ("" if not apart or not apart.is_clear else " ↑" if apart.mean > 0 else " ↓")


def zero_shot(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown of zero_shot.json: scores of ``evaluate.py`` in %, a row for each seed and stage."""
    names = [name for name in rows[0] if name not in ("seed", "after")]
    lines = ["| after | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for stage in dict.fromkeys(row["after"] for row in rows):
        of_stage = [row for row in rows if row["after"] == stage]
        found = [MeanOfSeeds.of([row[name] for row in of_stage]) for name in names]
        lines.append(f"| {stage} | {len(of_stage)} | {' | '.join(f'{e.mean:.1f} ± {e.half:.1f}' for e in found)} |")
    return lines


def main(files: Sequence[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for file in files:
        keep(Path(file))
    rows = json.loads((FOLDER / "zero_shot.json").read_text(encoding="utf-8"))
    fill(PAGE, "<!-- zero_shot -->", "<!-- end of zero_shot -->", "\n".join(zero_shot(rows)))
    for file in sorted(FOLDER.glob("*.csv")):
        groups = read(file)
        found = tables(groups)
        drawn = {m.title: {g: list(v.values()) for g, v in values.items()} for m, values in found.items() if m.drawn}
        (FOLDER / f"{file.stem}.png").write_bytes(metric_plots(drawn))
        lines = [*table(groups, found), "", f"![{file.stem}](findings/{file.stem}.png)"]
        fill(PAGE, f"<!-- {file.stem} -->", f"<!-- end of {file.stem} -->", "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
