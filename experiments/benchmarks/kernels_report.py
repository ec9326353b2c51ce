"""Tables and plots of kernel timings, and the README's table from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "pallas_kernels" / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = (
    "Nothing has been measured yet: no GPU has been at hand. The table appears here when\n"
    "`experiments/benchmarks/results/` holds a `kernels*.json` and `experiments/benchmarks/kernels.py --readme` is run."
)
DIRECTIONS = {
    "forward": "forward",
    "both": "forward + backward, both experts trained",
    "visual": "forward + backward, visual expert trained",
}

Timing = Mapping[str, Any]


def _row_names(timings: Iterable[Timing]) -> list[str]:
    return list(dict.fromkeys(t["row"] for t in timings))


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return ""
    if "error" in timing:
        return "failed"
    if timing["row"] == "dense":
        return f"{timing['median_us']:.0f} µs"
    return f"{timing['ratio']:.2f}"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: per direction one table, a line per row, a column per setting; ratios to the dense bound."""
    lines = [
        f"{result['device']}, {result['dtype']}, {result['date']}, timer {result['timer']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ("  \n**Rehearsal: tiny sizes, interpreted kernels; the figures mean nothing.**" if result["dry_run"] else "")
    ]
    timings = result["timings"]
    columns = list(dict.fromkeys((t["shape"], t["rows"], t["visual_share"], t["interleaving"]) for t in timings))
    for direction, title in DIRECTIONS.items():
        found = {
            (t["row"], t["shape"], t["rows"], t["visual_share"], t["interleaving"]): t
            for t in timings
            if t["direction"] == direction
        }
        heads = [
            f"{shape} N={n:,} {share} % visual" + (f", {mixed} % mixed" if mixed else "")
            for shape, n, share, mixed in columns
        ]
        lines += ["", f"**{title}**", "", "| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
        for row in _row_names(timings):
            lines.append(f"| {row} | " + " | ".join(_cell(found.get((row, *column))) for column in columns) + " |")
    missing = [f"{name}: {reason}" for name, reason in result["unavailable"].items()]
    return "\n".join(lines + (["", "Not there: " + "; ".join(missing)] if missing else []))


def plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Ratio over N and ratio over interleaving (where is the break-even point?), a picture per direction and axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for direction, title in DIRECTIONS.items():
        good = [
            t for t in result["timings"] if t["direction"] == direction and "ratio" in t and t["visual_share"] == 50
        ]
        for axis, label in (("rows", "tokens N"), ("interleaving", "interleaving, percent")):
            # Along one axis the other stands still: no interleaving, or the size that has all of them.
            fixed = [t for t in good if t["shape"] in ("2b", "tiny")]
            if axis == "rows":
                fixed = [t for t in fixed if t["interleaving"] == 0]
            elif fixed:
                rows = max((t["rows"] for t in fixed if t["interleaving"]), default=None)
                fixed = [t for t in fixed if t["rows"] == rows]
            if not fixed:
                continue
            figure, axes = pyplot.subplots(figsize=(8, 5))
            for name in _row_names(fixed):
                points = sorted((t[axis], t["ratio"]) for t in fixed if t["row"] == name)
                axes.plot(*zip(*points), marker="o", label=name)
            axes.set(xlabel=label, ylabel="time / dense bound", title=f"{title}, 50 % visual, {result['device']}")
            if axis == "rows":
                axes.set_xscale("log", base=2)
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
            written.append(folder / f"ratio_{direction}_{axis}.png")
            figure.savefig(written[-1], dpi=120, bbox_inches="tight")
            pyplot.close(figure)
    return written


def readme_section() -> str:
    """What stands between the README's markers: one table per committed result, or the sentence that there is none."""
    files = sorted(RESULTS.glob("kernels*.json"))
    results = [json.loads(file.read_text()) for file in files]
    measured = [result for result in results if not result["dry_run"]]
    return "\n\n".join(map(table, measured)) if measured else NOTHING


def write_readme() -> None:
    """Puts `readme_section` between the markers of pallas_kernels/README.md."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{readme_section()}\n{END}{after}")
