"""The results of a sweep: every unit in results.csv; groups with means and intervals in summary.csv, summary.md and
plots.

Intervals are Student's t at 95 % over the seeds of a group; a group of one has none. Differences from the first group
are taken seed by seed (paired), since units with the same seed have more in common than others. Values that are not
finite, or were not measured although others of the group were, are left out and named.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.runs.sweeping.chain import Plan
from mono_jax.runs.sweeping.plots import metric_plot
from mono_jax.runs.sweeping.seeds import MeanOfSeeds
from mono_jax.runs.sweeping.status import result_of, state_of
from mono_jax.runs.sweeping.units import Sweep
from mono_jax.training.metrics import is_finite

Compared = tuple[MeanOfSeeds, MeanOfSeeds | None]  # a group's mean, and its difference from the first group


def gather(
    sweep: Sweep, plans: Sequence[Plan], workdir: Path, metrics: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Writes the results of the finished units.

    ``metrics``: names, or prefixes of names, of the metrics that summary and plots show; none = all that differ between
    units.
    Returns {"finished", "missing": {name: state}, "left_out": {metric: {name of a finished unit: why}}, "metrics",
    "files"}. Raises ConfigError if no unit is finished, or if a metric is unknown.
    """
    results = {plan.unit.name: found for plan in plans if (found := result_of(workdir, plan))}
    missing = {p.unit.name: state_of(workdir, p).state for p in plans if p.unit.name not in results}
    if not results:
        raise ConfigError(f"{workdir}: no unit of {sweep.file} is finished; see sweep.py status")
    shown = _chosen(results, metrics)
    table = {name: _by_group(sweep, results, name) for name in shown}
    files = [workdir / "results.csv", workdir / "summary.csv", workdir / "summary.md"]
    publish.write_text(files[0], _results_csv(results))
    compared = {name: _compared(groups, sweep.groups[0]) for name, groups in table.items()}
    publish.write_text(files[1], _summary_csv(compared))
    left_out = {name: found for name in shown if (found := _left_out(results, name, table[name]))}
    markdown = _markdown(sweep, compared, left_out, missing)
    publish.write_text(files[2], markdown)
    for name in (name for name in shown if table[name]):
        files.append(workdir / f"{name.replace('/', '.')}.png")
        publish.write_bytes(files[-1], metric_plot(name, {g: list(v.values()) for g, v in table[name].items()}))
    say(markdown)
    outcome = {"finished": len(results), "missing": missing, "left_out": left_out, "metrics": shown}
    return outcome | {"files": [str(file) for file in files]}


def _chosen(results: Mapping[str, Any], asked: Sequence[str]) -> list[str]:
    known = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    if not asked:
        values = {name: {result["metrics"].get(name) for result in results.values()} for name in known}
        return [name for name in known if len(values[name]) > 1 and not name.endswith("seconds")] or known
    for name in asked:
        if not any(full.startswith(name) for full in known):
            raise unknown_key("metric", name, known)
    return [full for full in known if full.startswith(tuple(asked))]


def _by_group(sweep: Sweep, results: Mapping[str, Any], metric: str) -> dict[str, dict[int | None, float]]:
    """{group: {seed: value}} of the finished units with a finite ``metric``, with groups in the order of the file."""
    table: dict[str, dict[int | None, float]] = {group: {} for group in sweep.groups}
    for unit in sweep.units:
        value = results.get(unit.name, {}).get("metrics", {}).get(metric)
        if is_finite(value):
            table[unit.group][unit.seed] = value
    return {group: values for group, values in table.items() if values}


def _left_out(
    results: Mapping[str, Any], metric: str, table: Mapping[str, Mapping[int | None, float]]
) -> dict[str, str]:
    """{unit: why} of the finished units that ``table`` lacks, in groups for which ``metric`` was measured."""
    measured = {name for name, result in results.items() if metric in result["metrics"]}
    groups = {results[name]["group"] for name in measured}
    return {
        name: "not finite" if name in measured else "not measured"
        for name, result in results.items()
        if result["group"] in groups and result["seed"] not in table.get(result["group"], {})
    }


def difference(table: Mapping[str, Mapping[int | None, float]], group: str, baseline: str) -> MeanOfSeeds | None:
    """``group`` minus ``baseline`` over the seeds that both have; None if there are none, or if it is the baseline."""
    if group == baseline or group not in table or baseline not in table:
        return None
    own, other = table[group], table[baseline]
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    return MeanOfSeeds.of(pairs) if pairs else None


def _compared(table: Mapping[str, Mapping[int | None, float]], baseline: str) -> dict[str, Compared]:
    return {
        group: (MeanOfSeeds.of(list(values.values())), difference(table, group, baseline))
        for group, values in table.items()
    }


def _results_csv(results: Mapping[str, Any]) -> str:
    changed = list(dict.fromkeys(key for result in results.values() for key in result["changes"]))
    measured = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    rows = [["unit", "group", "seed", *changed, *measured]]
    for result in results.values():
        changes = [result["changes"].get(key, "") for key in changed]
        values = ["nan" if (value := result["metrics"].get(name, "")) is None else value for name in measured]
        seed = "" if result["seed"] is None else result["seed"]
        rows.append([result["unit"], result["group"], seed, *changes, *values])
    return _csv(rows)


def _summary_csv(compared: Mapping[str, Mapping[str, Compared]]) -> str:
    rows = [["metric", "group", "n", "mean", "half_width_95", "difference", "difference_half_width_95"]]
    for metric, groups in compared.items():
        for group, (estimate, apart) in groups.items():
            numbers = [estimate.mean, estimate.half, apart and apart.mean, apart and apart.half]
            rows.append([metric, group, estimate.n, *("" if number is None else number for number in numbers)])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _markdown(
    sweep: Sweep,
    compared: Mapping[str, Mapping[str, Compared]],
    left_out: Mapping[str, Mapping[str, str]],
    missing: Mapping[str, str],
) -> str:
    baseline = sweep.groups[0]
    lines = [
        f"# {sweep.title}",
        "",
        f"Means with 95 % intervals over seeds; differences from {baseline}, seed by seed.",
        "",
    ]
    for metric, groups in compared.items():
        lines += [f"## {metric}", "", f"| group | n | mean | minus {baseline} |", "|---|---|---|---|"]
        for group, (estimate, apart) in groups.items():
            clear = " *" if apart and apart.is_clear else ""
            lines.append(f"| {group} | {estimate.n} | {estimate} | {apart or ''}{clear} |")
        lines.append("")
        if metric in left_out:
            lines += [f"Left out: {_listed(left_out[metric])}.", ""]
    lines += ["\\* the interval of the difference excludes 0.", ""]
    if missing:
        lines += [f"Missing: {_listed(missing)}.", ""]
    return "\n".join(lines)


def _listed(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
