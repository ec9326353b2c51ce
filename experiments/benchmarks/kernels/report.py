"""Tables, aims, break-even points and plots of kernel timings, and the README's section from the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.kernels import attention
from experiments.benchmarks.tables import RESULTS, fill

README = Path(__file__).parents[3] / "pallas_kernels" / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = (
    "Nothing has been measured yet, because no GPU has been available. The table appears here when\n"
    "`experiments/benchmarks/results/` holds a `kernels*.json` and\n"
    "`python -m experiments.benchmarks.kernels --readme` is run."
)
DIRECTIONS = {
    "forward": "forward",
    "both": "forward + backward, both experts trained",
    "visual": "forward + backward, visual expert trained",
}
OPERATIONS = {"ffn": "FFN", "qkv": "QKV projection"}
KERNELS = ("mosaic_gpu", "triton", "pallas_tpu")


class Time(NamedTuple):
    """One measured (or failed) row at one setting; ``us`` and ``ratio`` are None if missing."""

    row: str
    direction: str
    op: str
    shape: str
    rows: int
    share: int
    mixed: int
    us: float | None
    bound: float | None
    ratio: float | None
    wrong: bool

    @property
    def where(self) -> tuple:
        """The setting, which two rows must share to be compared."""
        return self.direction, self.op, self.shape, self.rows, self.share, self.mixed


def times(content: Mapping[str, Any]) -> list[Time]:
    """The latest record of every row and setting (a kernel is timed again after it has been tuned)."""
    found = {}
    for record in content["records"]:
        if record["kind"] != "time":
            continue
        about = record["about"]
        names = ("row", "direction", "op", "shape", "rows", "visual_share", "interleaving")
        measured = (record.get("median_us"), record.get("bound_us"), record.get("ratio"), record.get("wrong", False))
        time = Time(*(about[name] for name in names), *measured)
        found[time.row, *time.where] = time
    return list(found.values())


# ======================================================================================================================
# Tables
# ======================================================================================================================


class Axis(NamedTuple):
    """The axis of a table or plot: which times belong to it, and its column headings."""

    name: str
    label: str
    holds: Callable[[Time], bool]
    value: Callable[[Time], int]
    head: Callable[[int], str]


def axes(found: Iterable[Time]) -> list[Axis]:
    """N; and the visual share and the interleaving at each N that has several values."""
    found = list(found)
    result = [
        Axis("rows", "tokens N", lambda t: (t.share, t.mixed) == (50, 0), lambda t: t.rows, lambda n: f"N = {n:,}")
    ]
    for n in sorted({t.rows for t in found}):
        share = Axis(
            f"share_{n}",
            f"visual share, percent (N = {n:,})",
            lambda t, n=n: (t.rows, t.mixed) == (n, 0),
            lambda t: t.share,
            "{} % visual".format,
        )
        interleaving = Axis(
            f"interleaving_{n}",
            f"interleaving, percent (N = {n:,}, 50 % visual)",
            lambda t, n=n: (t.rows, t.share) == (n, 50),
            lambda t: t.mixed,
            "{} % mixed".format,
        )
        at_n = [t for t in found if t.rows == n]
        result += [axis for axis in (share, interleaving) if len({axis.value(t) for t in at_n}) > 1]
    return result


def _cell(time: Time | None) -> str:
    if time is None:
        return ""
    if time.us is None:
        return "failed"
    if time.wrong:
        return "wrong"
    return f"{time.us:.0f} µs" if time.ratio is None else f"{time.ratio:.2f}"


def _table(found: list[Time], axis: Axis) -> list[str]:
    """Markdown: a line per row, a column per value; ratios to the dense bound, whose own line is in microseconds."""
    found = [t for t in found if axis.holds(t)]
    columns = sorted({axis.value(t) for t in found})
    bounds = {axis.value(t): t.bound for t in found if t.bound is not None}
    cells = {(t.row, axis.value(t)): t for t in found}
    lines = ["| | " + " | ".join(map(axis.head, columns)) + " |", "|---|" + "---|" * len(columns)]
    lines.append("| dense | " + " | ".join(f"{bounds[c]:.0f} µs" if c in bounds else "" for c in columns) + " |")
    for row in dict.fromkeys(t.row for t in found):
        lines.append(f"| {row} | " + " | ".join(_cell(cells.get((row, c))) for c in columns) + " |")
    return lines


def _groups(found: Iterable[Time]) -> Iterator[tuple[tuple[str, str, str], list[Time]]]:
    """Times by (operation, shape, direction), in the order in which they were first measured."""
    groups: dict[tuple[str, str, str], list[Time]] = {}
    for time in found:
        groups.setdefault((time.op, time.shape, time.direction), []).append(time)
    order = list(DIRECTIONS)
    first = {group[:2]: i for i, group in reversed(list(enumerate(groups)))}
    yield from sorted(groups.items(), key=lambda g: (first[g[0][:2]], order.index(g[0][2])))


def _tables(found: list[Time], wanted: Callable[[Axis], bool]) -> list[str]:
    lines = []
    for (op, shape, direction), group in _groups(found):
        for axis in filter(wanted, axes(group)):
            if any(axis.holds(t) for t in group):
                title = f"**{OPERATIONS[op]}, {shape}, {DIRECTIONS[direction]}, over {axis.label}**"
                lines += ["", title, "", *_table(group, axis)]
    return lines


def _head(content: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    timers = sorted({r["timer"] for r in content["records"] if "timer" in r})
    lines = [f"{content['device']}, {content['date']}, {versions}; timer: {', '.join(timers) or 'none'}"]
    if content["dry_run"]:
        lines += ["", "**Rehearsal: tiny sizes, interpreted kernels; the figures mean nothing.**"]
    return lines


def full(content: Mapping[str, Any]) -> str:
    """Markdown: every table, the aims, the break-even points, and what failed."""
    found = times(content)
    checks = [r for r in content["records"] if r["kind"] == "check"]
    lines = [*_head(content), ""]
    for record in checks:
        outcome = record.get("failed") or ", ".join(f"{d} {e:.1e}" for d, e in record["errors"].items())
        lines.append(f"- check of {record['about']['row']}: {outcome or record['skipped']}")
    lines += [f"- not here: {name}: {reason}" for name, reason in content["unavailable"].items()]
    lines += [*_section("Aims", aims(found)), *_break_even_section(content, found)]
    lines += [*_tables(found, lambda axis: True), attention.tables(content)]
    return "\n".join(lines + _section("Failed", failures(content) + attention.failures(content)))


def _break_even_section(content: Mapping[str, Any], found: list[Time]) -> list[str]:
    return _section("Break-even", [*break_even(found), *attention.break_even(content)])


def _section(title: str, items: Iterable[str]) -> list[str]:
    items = [f"- {item}" for item in items]
    return ["", f"**{title}**", "", *items] if items else []


def failures(content: Mapping[str, Any]) -> list[str]:
    """One line per failed timing."""
    lines = []
    for record in content["records"]:
        if "failed" in record and record["kind"] in ("time", "bound"):
            about = record["about"]
            where = f"{about['op']} {about['shape']} N={about['rows']:,} {about['visual_share']} % visual"
            lines.append(f"{about['row']} {about['direction']}, {where}: {record['failed']}")
    return lines


# ======================================================================================================================
# Aims and break-even points
# ======================================================================================================================


def aims(found: Iterable[Time]) -> list[str]:
    """For each kernel on grouped rows: its target, its worst value, and whether the target is met."""
    good = {(t.row, *t.where): t for t in found if t.ratio is not None and not t.wrong}
    lines = []
    for kernel in KERNELS:
        own = [t for t in good.values() if t.row == kernel]
        large = [t for t in own if t.rows >= 4096]
        forward = [(t.ratio, t) for t in large if t.direction == "forward"]
        backward = [(t.ratio, t) for t in large if t.direction != "forward"]
        lines += _aim(f"{kernel}: forward at N >= 4,096 at most 1.05 times the dense bound", forward, max, 1.05)
        lines += _aim(f"{kernel}: forward + backward at N >= 4,096 at most 1.08 times", backward, max, 1.08)
        for other, least in (("dense_both", 1.9), ("ragged_dot", 1.0), ("tokamax", 1.0)):
            gains = [(good[other, *t.where].us / t.us, t) for t in own if (other, *t.where) in good]
            aim = f"at least {least:g} times as fast as" if least > 1 else "faster than"
            lines += _aim(f"{kernel}: {aim} {other}", gains, min, least)
    return lines


def _aim(
    aim: str, values: list[tuple[float, Time]], worst_of: Callable[..., tuple[float, Time]], limit: float
) -> list[str]:
    if not values:
        return []
    value, time = worst_of(values, key=lambda v: v[0])
    met = value <= limit if worst_of is max else value >= limit
    where = f"{OPERATIONS[time.op]} {time.shape}, {time.direction}, N={time.rows:,}, {time.share} % visual"
    return [f"{aim}: {value:.2f} at worst ({where}) of {len(values)}: **{'met' if met else 'not met'}**"]


def break_even(found: Iterable[Time]) -> list[str]:
    """The interleaving from which sorting pays off, and the N from which the kernel beats two launches."""
    good = [t for t in found if t.us is not None and not t.wrong]
    lines = []
    for (op, shape, direction), group in _groups(good):
        for kernel in KERNELS:
            what = f"{kernel}, {OPERATIONS[op]} {shape}, {direction}"
            for n in sorted({t.rows for t in group}):
                here = [t for t in group if (t.rows, t.share) == (n, 50)]
                curves = (_curve(here, f"{kernel} {form}", lambda t: t.mixed) for form in ("unsorted", "permuted"))
                if text := _crossing(*curves, "unsorted rows", "permuting them", "% interleaving"):
                    lines.append(f"{what}, N={n:,}: {text}")
            here = [t for t in group if (t.share, t.mixed) == (50, 0)]
            curves = (_curve(here, row, lambda t: t.rows) for row in ("xla_split", kernel))
            if text := _crossing(*curves, "two launches (xla_split)", "one grouped launch", "tokens"):
                lines.append(f"{what}: {text}")
    return lines


def _curve(found: Iterable[Time], row: str, value: Callable[[Time], int]) -> dict[int, float]:
    return {value(t): t.us for t in found if t.row == row}


def _crossing(one: dict[int, float], other: dict[int, float], name: str, other_name: str, unit: str) -> str | None:
    """Describes where the curve ``one`` rises above ``other``; None for fewer than two common points."""
    common = sorted(one.keys() & other.keys())
    if len(common) < 2:
        return None
    gaps = [one[x] - other[x] for x in common]
    if all(gap <= 0 for gap in gaps):
        return f"{name} as fast or faster throughout"
    if all(gap >= 0 for gap in gaps):
        return f"{other_name} as fast or faster throughout"
    crossings = [
        left + (right - left) * before / (before - after)
        for left, right, before, after in zip(common, common[1:], gaps, gaps[1:])
        if (before < 0) != (after < 0)
    ]
    order = (name, other_name) if gaps[0] < 0 else (other_name, name)
    return f"{order[0]} faster up to about {', '.join(f'{x:,.0f}' for x in crossings)} {unit}, then {order[1]}"


# ======================================================================================================================
# Plots
# ======================================================================================================================


def plot(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Ratio over N, over the visual share and over the interleaving: one figure per operation and shape.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [t for t in times(content) if t.ratio is not None and not t.wrong]
    written = []
    for op, shape in dict.fromkeys((t.op, t.shape) for t in good):
        here = [t for t in good if (t.op, t.shape) == (op, shape)]
        lines = axes(here)
        size = (6 * len(DIRECTIONS), 4 * len(lines))
        figure, panels = pyplot.subplots(len(lines), len(DIRECTIONS), figsize=size, squeeze=False, layout="constrained")
        for axis, of_axis in zip(lines, panels):
            for direction, panel in zip(DIRECTIONS, of_axis):
                _draw(panel, axis, [t for t in here if t.direction == direction and axis.holds(t)], direction)
        figure.suptitle(f"{OPERATIONS[op]}, {shape}, {content['device']}: time / dense bound")
        written.append(folder / f"ratio_{op}_{shape}.png")
        figure.savefig(written[-1], dpi=100)
        pyplot.close(figure)
    return written


def _draw(panel: Any, axis: Axis, found: list[Time], direction: str) -> None:
    """One panel: a line per row (forms of one kernel share a colour), the dense bound at 1."""
    colours: dict[str, str] = {}
    for row in sorted({t.row for t in found}):
        points = sorted((axis.value(t), t.ratio) for t in found if t.row == row)
        name, _, form = row.partition(" ")
        colour = colours.setdefault(name, f"C{len(colours)}")
        style = {"": "-", "permuted": "--", "unsorted": ":"}[form]
        panel.plot(*zip(*points), style, color=colour, marker="o", markersize=3, label=row)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xlabel=axis.label, title=DIRECTIONS[direction])
    panel.grid(alpha=0.3)
    if axis.name == "rows" and found:
        panel.set_xscale("log", base=2)
    if found:
        panel.legend(fontsize="x-small")


# ======================================================================================================================
# The README's section
# ======================================================================================================================


def readme_section() -> str:
    """The text between the README's markers: a summary of the committed results, or a note that there are none."""
    contents = [(file.name, json.loads(file.read_text())) for file in sorted(RESULTS.glob("kernels*.json"))]
    measured = [summary(content, name) for name, content in contents if not content["dry_run"]]
    return "\n\n".join(measured) if measured else NOTHING


def summary(content: Mapping[str, Any], name: str) -> str:
    """Markdown: aims, break-even points and the tables over N."""
    found = times(content)
    lines = [*_head(content), *_section("Aims", aims(found)), *_break_even_section(content, found)]
    lines += [*_tables(found, lambda axis: axis.name == "rows"), attention.tables(content)]
    return "\n".join([*lines, "", f"All of it: `experiments/benchmarks/results/{name}`."])


def write_readme() -> None:
    """Puts ``readme_section`` between the markers of pallas_kernels/README.md."""
    fill(README, BEGIN, END, readme_section())
