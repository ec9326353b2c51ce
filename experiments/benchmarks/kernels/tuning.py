"""The device's tuning table with what a run has found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.benchmarks.kernels.problems import Setting
from experiments.benchmarks.kernels.results import Results
from pallas_kernels.registry import tuning_table


def tuning_json(results: Results) -> dict[str, Any]:
    """The device's tuning table with what was found: entries per size, and the order of preference by measured time."""
    device = results.content["device_key"]
    table = json.loads(json.dumps(tuning_table("experts", device)))
    table |= {"device": device, "source": f"python -m experiments.benchmarks.kernels, {results.content['date']}"}
    for record in results.of_kind("tuned"):
        about, of_name = record["about"], table["parameters"].setdefault(record["about"]["row"], {})
        setting = Setting(**{f.name: about[f.name] for f in dataclasses.fields(Setting)})
        entry = {"op": setting.kernel_op, "dtype": setting.dtype, "d": setting.d, "ff": setting.width}
        entry |= {"rows": setting.rows, "parameters": record["parameters"], "median_us": record["median_us"]}
        of_name["entries"] = [e for e in of_name.get("entries", []) if not _same_problem(e, entry)] + [entry]
    table["order"] = _by_speed(table["order"], results.of_kind("time"))
    return table


def _same_problem(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("op", "dtype", "d", "ff", "rows"))


def _by_speed(order: Sequence[str], timings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names in order of their first good time forward and backward; those without one come last."""
    times: dict[str, float] = {}
    names = {"ragged_dot": "ragged"}  # rows that are called differently as implementations
    for t in timings:
        if t["about"]["direction"] == "both" and t["about"]["op"] == "ffn" and not t.get("wrong", True):
            times.setdefault(names.get(t["about"]["row"], t["about"]["row"]), t["median_us"])
    measured = sorted((name for name in order if name in times), key=times.get)
    return measured + [name for name in order if name not in measured]
