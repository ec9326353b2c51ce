"""The process that checks, tunes and times the kernels, point by point, until the budget is spent."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks.kernels import attention, rows
from experiments.benchmarks.kernels.problems import Point, Setting, points, rehearsal
from experiments.benchmarks.kernels.report import KERNELS
from experiments.benchmarks.kernels.results import Results, header
from experiments.benchmarks.kernels.timing import REHEARSAL, Bench, Effort, Timer
from experiments.benchmarks.kernels.tuning import differences
from mono_jax import cli
from pallas_kernels.checks.conformance import TOLERANCE
from pallas_kernels.checks.run import check
from pallas_kernels.errors import Unavailable, one_line
from pallas_kernels.experts.contract import Implementation
from pallas_kernels.registry import implementation_class, tuned_parameters

CHECK_S = 20.0  # per kernel and dtype
TUNING_SHARE = 0.3  # of the budget
RESTART = 75  # exit status of a worker whose device is no longer usable


class Worker:
    """Goes through the points in order until the budget is spent."""

    def __init__(self, options: argparse.Namespace, results: Results):
        self.options, self.results = options, results
        self.start = time.monotonic()
        self.bench = Bench(Timer(REHEARSAL if options.dry_run else Effort()))
        self.makers: dict[tuple, dict[str, rows.Maker]] = {}

    def run(self) -> None:
        """Measures every requested point that is still missing; the first few attention points come early."""
        if "attention" in self.options.ops:
            self.time_attention(most=3)
        if self.points():
            self.time_experts()
        if "attention" in self.options.ops:
            self.time_attention()

    def time_attention(self, most: int | None = None) -> None:
        """The settings of ``attention``, or the first ``most``."""
        missing = attention.run(self.options, self.attempt, self.bench.timer, most)
        self.results.content["unavailable"] |= missing

    def time_experts(self) -> None:
        """FFN and QKV projection."""
        kernels = self.available()
        for name in kernels:
            self.attempt("check", {"row": name}, lambda name=name: self.check(name))
        first = self.points()[0]
        self.time_point(first, kernels)  # with default parameters, so that there is a result
        tuned_for = set()
        for point in self.points():
            where = (point.setting.op, point.setting.shape)
            if where not in tuned_for and not self.options.no_tune:
                tuned_for.add(where)
                for name, kernel in kernels.items():
                    self.tune(name, kernel, point.setting)
            self.time_point(point, kernels)
            if self.out_of_time():
                return

    def points(self) -> list[Point]:
        """The points of the list that the options select."""
        every = (rehearsal if self.options.dry_run else points)(self.options.tile, self.options.dtype)
        options = self.options
        return [p for p in every if p.setting.op in options.ops and p.setting.shape in (*options.shapes, "tiny")]

    def out_of_time(self) -> bool:
        return time.monotonic() - self.start > self.options.budget_s

    def attempt(self, kind: str, about: dict[str, Any], do: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """The record of a point, from an earlier run or made now; None if the budget is spent."""
        if found := self.results.find(kind, about):
            return found
        if self.out_of_time():
            return None
        print(f"{kind} {' '.join(str(v) for v in about.values())}", file=sys.stderr, flush=True)
        self.results.begin(kind, about)
        if reason := self.died_before(kind, about):
            return self.results.end({"failed": reason})
        try:
            return self.results.end(do())
        except Exception as error:  # one failing point must not cost the others their time on the device
            print(f"  {one_line(error)}", file=sys.stderr, flush=True)
            record = self.results.end({"failed": one_line(error)})
        if not _device_works():
            raise SystemExit(RESTART)
        return record

    def died_before(self, kind: str, about: Mapping[str, Any]) -> str | None:
        """Why not to try the point: the row killed its process in a check, or in this direction at another size."""
        for record in self.results.content["records"]:
            there = record["about"]
            if not record.get("died") or there["row"].split()[0] != about["row"].split()[0]:
                continue
            if record["kind"] == "check":
                return f"not tried, its check died: {record['failed']}"
            same = ("row", "op", "direction")
            if record["kind"] == kind in ("time", attention.KIND) and all(there.get(k) == about.get(k) for k in same):
                return f"not tried, it died at N={there['rows']:,}: {record['failed']}"
        return None

    # ---- Kernels ----

    def available(self) -> dict[str, Implementation]:
        """Kernels that run here (interpreted in a rehearsal); the results record why the others do not."""
        missing = {"tokamax": reason} if (reason := rows.tokamax_missing()) else {}
        kernels = {}
        for name in KERNELS:
            try:
                kind = implementation_class(name)
                kernel = kind.here() if self.options.dry_run else kind()
                problem = self.points()[0].setting.problem
                if reason := kernel.unsupported(dataclasses.replace(problem, dtype=self.dtype_of(kernel))):
                    raise Unavailable(reason)
            except Unavailable as reason:
                missing[name] = str(reason)
            else:
                kernels[name] = kernel
        self.results.content["unavailable"] |= missing
        return {name: kernel for name, kernel in kernels.items() if self.wants(name)}

    def dtype_of(self, kernel: Implementation | None) -> str:
        """The requested dtype; in a rehearsal, the other one if an interpreter supports only that."""
        if kernel is None or not self.options.dry_run:
            return self.options.dtype
        problem = self.points()[0].setting.problem
        served = [d for d in TOLERANCE if kernel.unsupported(dataclasses.replace(problem, dtype=d)) is None]
        return self.options.dtype if self.options.dtype in served or not served else served[0]

    def wants(self, row: str) -> bool:
        return not self.options.rows or row.split()[0] in self.options.rows

    def check(self, name: str) -> dict[str, Any]:
        """``pallas_kernels.check`` without compilations; in a rehearsal, one case per dtype."""
        if self.options.dry_run:
            found = check(name, seconds=0, compile_ahead=False)
        else:
            found = check(name, all_masks=True, seconds=CHECK_S, compile_ahead=False)
        found = {key: found[key] for key in ("correct", "errors", "cases", "skipped", "failed")}
        failures = found.pop("failed")
        return found | ({"failed": "; ".join(failures)} if failures else {})

    # ---- Tuning ----

    def tune(self, name: str, kernel: Implementation, setting: Setting) -> None:
        """Finds for each field in turn the value with the fastest forward + backward; keeps only non-default values."""
        setting = dataclasses.replace(setting, dtype=self.dtype_of(kernel), interleaving=0)
        about = {"row": name, **dataclasses.asdict(setting)}
        budget = time.monotonic() + TUNING_SHARE * self.options.budget_s / len(KERNELS)

        def search() -> dict[str, Any]:
            parameters, best = {}, self.microseconds(name, kernel, {}, setting)
            for trial in self.trials(kernel, setting):
                if time.monotonic() > budget or best == float("inf"):
                    break
                candidate = parameters | trial
                if (took := self.microseconds(name, kernel, candidate, setting)) < best:
                    best, parameters = took, candidate
            return {"parameters": parameters, "median_us": best if best < float("inf") else None}

        if self.results.find("tuned", about) is None and not self.out_of_time():
            found = search()
            if not self.out_of_time():  # otherwise the next run resumes it
                self.attempt("tuned", about, lambda: found)

    def trials(self, kernel: Implementation, setting: Setting) -> Iterator[dict[str, Any]]:
        space = kernel.tuning_space(setting.kernel_op)
        for field, values in list(space.items())[: 1 if self.options.dry_run else None]:
            for value in values[: 1 if self.options.dry_run else None]:
                yield {field: value}

    def microseconds(self, name: str, kernel: Implementation, parameters: dict[str, Any], setting) -> float:
        """Time of forward + backward; infinite for a tiling that does not compile or fit, or gives wrong results."""

        def measure() -> dict[str, Any]:
            candidate = dataclasses.replace(kernel, **parameters)
            return self.bench.measure(rows.makers(setting.op, {name: candidate})[name], setting, "both")

        about = {"row": name, "parameters": parameters, **dataclasses.asdict(setting)}
        record = self.attempt("trial", about, measure)
        if record is None or "failed" in record or _is_wrong(record, setting.dtype):
            return float("inf")
        return record["median_us"]

    def tuned(self, name: str, kernel: Implementation, setting: Setting) -> Implementation:
        """The kernel with the tuned parameters for the operation and shape, from this run or the device's table."""
        for record in self.results.of_kind("tuned"):
            there = record["about"]
            if "failed" not in record and (there["row"], there["op"], there["shape"]) == (
                name,
                setting.op,
                setting.shape,
            ):
                return dataclasses.replace(kernel, **record["parameters"])
        return kernel if self.options.dry_run else type(kernel)(**tuned_parameters(name, setting.problem))

    # ---- Timing ----

    def rows_for(self, setting: Setting, kernels: Mapping[str, Implementation]) -> dict[str, rows.Maker]:
        tuned = {name: self.tuned(name, kernel, setting) for name, kernel in kernels.items()}
        key = (setting.op, tuple(tuned.items()))
        if key not in self.makers:
            self.makers[key] = rows.makers(setting.op, tuned)
        return {name: make for name, make in self.makers[key].items() if self.wants(name)}

    def time_point(self, point: Point, kernels: Mapping[str, Implementation]) -> None:
        """One record per row and direction; "ratio" is to the dense bound of the same direction."""
        for direction in point.directions:
            for name, make in self.rows_for(point.setting, kernels).items():
                if not point.wanted(name):
                    continue
                kernel = kernels.get(name.split()[0])
                setting = dataclasses.replace(point.setting, dtype=self.dtype_of(kernel))
                about = {"row": name, "direction": direction, **dataclasses.asdict(setting)}
                if kernel is not None:
                    about["parameters"] = differences(self.tuned(name.split()[0], kernel, setting), kernel)
                bound = self.bound(setting, direction)
                self.attempt("time", about, lambda a=(make, setting, direction, bound): self.measure(*a))

    def measure(
        self, make: rows.Maker, setting: Setting, direction: str, bound: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        found = self.bench.measure(make, setting, direction)
        if bound is not None:
            clock = "median_us" if found["timer"] == bound["timer"] else "wall_us"  # compare the same clocks only
            found |= {"bound_us": bound[clock], "ratio": found[clock] / bound[clock]}
        return found | {"wrong": _is_wrong(found, setting.dtype)}

    def bound(self, setting: Setting, direction: str) -> dict[str, Any] | None:
        """Times of one expert over all tokens; if one expert is trained, with its tokens' share of its gradients.

        The order and the kind of the tokens do not matter, so all settings of one size share the measured times.
        """
        alike = dataclasses.replace(setting, visual_share=100, interleaving=0, tile=1)

        def times(direction: str) -> dict[str, Any] | None:
            about = {"row": "dense", "direction": direction, **dataclasses.asdict(alike)}
            make = rows.dense(setting.op)
            return self.attempt("bound", about, lambda: self.bench.measure(make, alike, direction))

        wanted = [times(name) for name in (("visual", "both") if direction == "visual" else (direction,))]
        if any(found is None or "failed" in found for found in wanted):
            return None
        first, last, share = wanted[0], wanted[-1], setting.visual_share / 100
        clocks = {clock: first[clock] + share * (last[clock] - first[clock]) for clock in ("median_us", "wall_us")}
        return clocks | {"timer": first["timer"] if first["timer"] == last["timer"] else "mixed"}


def _is_wrong(found: Mapping[str, Any], dtype: str) -> bool:
    """Whether a row's results differ from ``dense_both``, given that both round to ``dtype``."""
    return found["max_rel_error"] > 2 * TOLERANCE[dtype]


def _device_works() -> bool:
    """False after errors that a CUDA context does not survive."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def work(options: argparse.Namespace) -> None:
    """The worker process."""
    found, here = Results.load(options.out), header(options.dry_run)
    if found is None:
        about = {"date": str(datetime.date.today()), "tile": options.tile, **here, "unavailable": {}, "records": []}
        found = Results(options.out, about)
    elif differing := [key for key, value in here.items() if found.content[key] != value]:
        there = ", ".join(f"{key} {found.content[key]}" for key in differing)
        cli.fail(f"{options.out}/kernels.json is from another run ({there}); give another --out")
    found.content.pop("running", None)
    if options.retry_failed:
        found.forget_failures()
    Worker(options, found).run()
    found.save()
