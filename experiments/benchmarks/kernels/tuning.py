"""The device's tuning tables, one for each room of kernels, updated with the results of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.benchmarks.kernels.problems import Setting
from experiments.benchmarks.kernels.results import Results
from pallas_kernels.registry import tuning_table


def tuning_tables(results: Results) -> dict[str, dict[str, Any]]:
    """{room: the device's table with the parameters that were found, and the order of preference by measured time}."""
    tables = {"experts": _experts(results), "attention": _attention(results)}
    device, date = results.content["device_key"], results.content["date"]
    about = {"device": device, "source": f"python -m experiments.benchmarks.kernels, {date}"}
    return {room: about | {key: table[key] for key in ("order", "parameters")} for room, table in tables.items()}


def differences(tuned: Any, default: Any) -> dict[str, Any]:
    """Fields of an implementation that tuning has changed, in JSON form."""
    changed = {f.name: getattr(tuned, f.name) for f in dataclasses.fields(tuned)}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in changed.items()}


def _experts(results: Results) -> dict[str, Any]:
    """An entry for each size that was tuned."""
    table = _table("experts", results)
    for record in results.of_kind("tuned"):
        about, of_name = record["about"], table["parameters"].setdefault(record["about"]["row"], {})
        setting = Setting(**{f.name: about[f.name] for f in dataclasses.fields(Setting)})
        entry = {"op": setting.kernel_op, "dtype": setting.dtype, "d": setting.d, "ff": setting.width}
        entry |= {"rows": setting.rows, "parameters": record["parameters"], "median_us": record["median_us"]}
        of_name["entries"] = [e for e in of_name.get("entries", []) if not _same_problem(e, entry)] + [entry]
    names = {"ragged_dot": "ragged"}  # rows whose implementations have another name
    timed = ((names.get(t["about"]["row"], t["about"]["row"]), t) for t in results.of_kind("time"))
    return table | {"order": _by_speed(table["order"], ((n, t) for n, t in timed if t["about"]["op"] == "ffn"))}


def _attention(results: Results) -> dict[str, Any]:
    """Parameters tuned on a row of S1.1, used for all lengths."""
    table, records = _table("attention", results), results.of_kind("attention")
    for record in records:
        if (found := record["about"].get("parameters")) and not record.get("wrong", True):
            table["parameters"].setdefault(record["about"]["row"], {}).setdefault("default", {}).update(found)
    return table | {"order": _by_speed(table["order"], ((r["about"]["row"], r) for r in records))}


def _table(room: str, results: Results) -> dict[str, Any]:
    return json.loads(json.dumps(tuning_table(room, results.content["device_key"])))


def _same_problem(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("op", "dtype", "d", "ff", "rows"))


def _by_speed(order: Sequence[Any], timings: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Any]:
    """The entries, with the timed ones sorted by their first valid forward + backward time.

    They come before those that were not timed; entries for small sizes keep their places.
    """
    times: dict[str, float] = {}
    for name, record in timings:
        if record["about"]["direction"] == "both" and not record.get("wrong", True):
            times.setdefault(name, record["median_us"])
    plain = [entry for entry in order if isinstance(entry, str)]
    ranked = iter(sorted(plain, key=lambda name: times.get(name, float("inf"))))
    return [next(ranked) if isinstance(entry, str) else entry for entry in order]
