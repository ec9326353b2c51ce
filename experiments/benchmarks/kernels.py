"""Correctness, tuning and timing of the modality-grouped kernels, in one go.

  python -m experiments.benchmarks.kernels --out=runs/kernels --dry_run        rehearsal on the CPU, minutes, no figures
  python -m experiments.benchmarks.kernels --out=runs/kernels --budget_s=540   on a GPU or TPU; say it again to go on
  python -m experiments.benchmarks.kernels --out=runs/kernels --report         tables and plots of what is there
  python -m experiments.benchmarks.kernels --readme                            the README's table from committed results

Operations: ffn (SwiGLU of each token's expert) and qkv (the projection of the visual attention experts), at the sizes
of the 2B and the 7B model. Rows of the table; every time is also given as a ratio to the dense bound's:

  dense                one expert over all tokens: the bound (with one expert trained, only its tokens' share of the
                       weight gradients is counted)
  xla_split            static boundary, two dense products: what training uses
  NAME                 modality_ffn, modality_matmul on rows grouped once per batch; mosaic_gpu, triton, pallas_tpu
  NAME permuted        the same with the permutation in every layer (gathered on load where NAME can)
  NAME unsorted        the form of the Mono-InternVL-1.5 paper: rows stay, tiles with both kinds are computed twice
  ragged_dot, tokamax  grouped matmuls of jax and tokamax on stacked weights, rows grouped
  dense_both           both experts on all tokens, chosen by mask
  gather_scatter       rows of each expert gathered, computed and scattered back in every layer, as serving engines do

Points that tell most come first, and each is written to kernels.json in --out as soon as it is there. A second run
with the same --out goes on where the first one stopped. The work is done in a process of its own: a point that raises
is recorded as failed; a process that dies, or makes no progress for --stall_s, costs the point it was at, and
another takes over; what died is not tried again at other sizes.

Also written: kernels.md (tables, aims, break-even points), plots, and a tuning table. To publish, copy kernels.json to
experiments/benchmarks/results/ under a name of its own, the tuning table to pallas_kernels/tuning/, run --readme.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import kernels_report as report
from experiments.benchmarks import kernels_rows as rows
from experiments.benchmarks.kernels_timing import REHEARSAL, Bench, Effort, Timer
from mono_jax import cli
from pallas_kernels.checks.conformance import TOLERANCE, masks
from pallas_kernels.checks.run import QUICK_MASKS, check, host_devices
from pallas_kernels.devices import device_key
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.contract import Implementation
from pallas_kernels.registry import implementation_class, tuned_parameters, tuning_table

KERNELS = report.KERNELS
CHECK_S = 40.0  # per kernel and dtype
TUNING_SHARE = 0.3  # of the budget
GRACE_S = 30.0  # after the budget is spent, the point in hand is given up so much later
RESTART = 75  # exit status of a worker whose device is no longer usable


# ======================================================================================================================
# Results: one record per point, written at once
# ======================================================================================================================


class Results:
    """kernels.json: what was run on (the header) and a list of records, one per point.

    A record has "kind" (check, bound, trial, tuned, time), what it is about, and either its findings or "failed".
    """

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder, self.content = folder, content
        self._by_point = {_point(record["about"], record["kind"]): record for record in content["records"]}

    @classmethod
    def load(cls, folder: Path) -> Results | None:
        """What --out holds, or None."""
        file = folder / "kernels.json"
        return cls(folder, json.loads(file.read_text())) if file.is_file() else None

    def save(self) -> None:
        """Writes what there is so far: a machine may be taken away at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "kernels.json.part"
        partial.write_text(json.dumps(self.content, indent=1))
        partial.replace(self.folder / "kernels.json")

    def find(self, kind: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a point, or None."""
        return self._by_point.get(_point(about, kind))

    def begin(self, kind: str, about: Mapping[str, Any]) -> None:
        """Notes the point in hand, so that it can be blamed if the process dies."""
        self.content["running"] = {"kind": kind, "about": dict(about)}
        self.save()

    def end(self, findings: Mapping[str, Any]) -> dict[str, Any]:
        """Files the findings of the point in hand."""
        running = self.content.pop("running")
        record = self._by_point[_point(running["about"], running["kind"])] = running | dict(findings)
        self.content["records"].append(record)
        self.save()
        return record

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind."""
        return [record for record in self.content["records"] if record["kind"] == kind]

    def forget_failures(self) -> None:
        """Failed points are tried again."""
        self.content["records"] = [record for record in self.content["records"] if "failed" not in record]
        self._by_point = {point: record for point, record in self._by_point.items() if "failed" not in record}


def _point(about: Mapping[str, Any], kind: str) -> str:
    return kind + json.dumps(about, sort_keys=True)


def header(dry_run: bool) -> dict[str, Any]:
    """What the figures depend on: a run goes on only where all of this is the same."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "triton", "jax-triton", "tokamax", "numpy")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0].device_kind
    return {"dry_run": dry_run, "device": device, "device_key": device_key(), "versions": versions}


# ======================================================================================================================
# The worker: checks, tunes and times
# ======================================================================================================================


class Worker:
    """Goes through the points in their order until the budget is spent."""

    def __init__(self, options: argparse.Namespace, results: Results):
        self.options, self.results = options, results
        self.start = time.monotonic()
        self.bench = Bench(Timer(REHEARSAL if options.dry_run else Effort()))
        self.makers: dict[tuple, dict[str, rows.Maker]] = {}

    def run(self) -> None:
        """Every point that is wanted and not there yet."""
        kernels = self.available()
        for name in kernels:
            self.attempt("check", {"row": name}, lambda name=name: self.check(name))
        first = self.points()[0]
        self.time_point(first, kernels)  # with default parameters, so that there is something
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

    def points(self) -> list[rows.Point]:
        """What the options leave of the list."""
        every = (rows.rehearsal if self.options.dry_run else rows.points)(self.options.tile, self.options.dtype)
        options = self.options
        return [p for p in every if p.setting.op in options.ops and p.setting.shape in (*options.shapes, "tiny")]

    def out_of_time(self) -> bool:
        return time.monotonic() - self.start > self.options.budget_s

    def attempt(self, kind: str, about: dict[str, Any], do: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """The record of a point, from before or made now; None where the budget is spent."""
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
        except Exception as error:  # one point that fails must not cost the others their time on the device
            print(f"  {_one_line(error)}", file=sys.stderr, flush=True)
            record = self.results.end({"failed": _one_line(error)})
        if not _device_works():
            raise SystemExit(RESTART)
        return record

    def died_before(self, kind: str, about: Mapping[str, Any]) -> str | None:
        """Why not to try: the row took its process along in a check, or in the same direction at another size."""
        for record in self.results.content["records"]:
            there = record["about"]
            if not record.get("died") or there["row"].split()[0] != about["row"].split()[0]:
                continue
            if record["kind"] == "check":
                return f"not tried, its check died: {record['failed']}"
            same = ("row", "op", "direction")
            if record["kind"] == kind == "time" and all(there[key] == about[key] for key in same):
                return f"not tried, it died at N={there['rows']:,}: {record['failed']}"
        return None

    # ---- Kernels ----

    def available(self) -> dict[str, Implementation]:
        """Kernels that serve here (interpreted in a rehearsal); why the others do not goes into the results."""
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
        self.results.content["unavailable"] = missing
        return {name: kernel for name, kernel in kernels.items() if self.wants(name)}

    def dtype_of(self, kernel: Implementation | None) -> str:
        """The dtype asked for; in a rehearsal the other one where an interpreter has only that."""
        if kernel is None or not self.options.dry_run:
            return self.options.dtype
        problem = self.points()[0].setting.problem
        served = [d for d in TOLERANCE if kernel.unsupported(dataclasses.replace(problem, dtype=d)) is None]
        return self.options.dtype if self.options.dtype in served or not served else served[0]

    def wants(self, row: str) -> bool:
        return not self.options.rows or row.split()[0] in self.options.rows

    def check(self, name: str) -> dict[str, Any]:
        """`pallas_kernels.check` without compilations; in a rehearsal one case per dtype."""
        if self.options.dry_run:
            found = check(name, QUICK_MASKS, seconds=0, compile_ahead=False)
        else:
            found = check(name, tuple(masks(8, 4)), seconds=CHECK_S, compile_ahead=False)
        found = {key: found[key] for key in ("correct", "errors", "cases", "skipped", "failed")}
        failures = found.pop("failed")
        return found | ({"failed": "; ".join(failures)} if failures else {})

    # ---- Tuning ----

    def tune(self, name: str, kernel: Implementation, setting: rows.Setting) -> None:
        """Field by field, the value with which forward + backward is fastest; only what differs from the default."""
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
            if not self.out_of_time():  # else the next run goes on with it
                self.attempt("tuned", about, lambda: found)

    def trials(self, kernel: Implementation, setting: rows.Setting) -> Iterator[dict[str, Any]]:
        space = kernel.tuning_space(setting.kernel_op)
        for field, values in list(space.items())[: 1 if self.options.dry_run else None]:
            for value in values[: 1 if self.options.dry_run else None]:
                yield {field: value}

    def microseconds(self, name: str, kernel: Implementation, parameters: dict[str, Any], setting) -> float:
        """Forward + backward; infinite for a tiling that does not compile, does not fit, or computes something else."""

        def measure() -> dict[str, Any]:
            candidate = dataclasses.replace(kernel, **parameters)
            return self.bench.measure(rows.makers(setting.op, {name: candidate})[name], setting, "both")

        about = {"row": name, "parameters": parameters, **dataclasses.asdict(setting)}
        record = self.attempt("trial", about, measure)
        if record is None or "failed" in record or _is_wrong(record, setting.dtype):
            return float("inf")
        return record["median_us"]

    def tuned(self, name: str, kernel: Implementation, setting: rows.Setting) -> Implementation:
        """The kernel with what was found for the operation and shape: here, or in the device's table."""
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

    def rows_for(self, setting: rows.Setting, kernels: Mapping[str, Implementation]) -> dict[str, rows.Maker]:
        tuned = {name: self.tuned(name, kernel, setting) for name, kernel in kernels.items()}
        key = (setting.op, tuple(tuned.items()))
        if key not in self.makers:
            self.makers[key] = rows.makers(setting.op, tuned)
        return {name: make for name, make in self.makers[key].items() if self.wants(name)}

    def time_point(self, point: rows.Point, kernels: Mapping[str, Implementation]) -> None:
        """One record per row and direction; "ratio" is to the dense bound of the same direction."""
        for direction in point.directions:
            for name, make in self.rows_for(point.setting, kernels).items():
                if not point.wanted(name):
                    continue
                kernel = kernels.get(name.split()[0])
                setting = dataclasses.replace(point.setting, dtype=self.dtype_of(kernel))
                about = {"row": name, "direction": direction, **dataclasses.asdict(setting)}
                if kernel is not None:
                    about["parameters"] = _differences(self.tuned(name.split()[0], kernel, setting), kernel)
                bound = self.bound(setting, direction)
                self.attempt("time", about, lambda a=(make, setting, direction, bound): self.measure(*a))

    def measure(
        self, make: rows.Maker, setting: rows.Setting, direction: str, bound: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        found = self.bench.measure(make, setting, direction)
        if bound is not None:
            clock = "median_us" if found["timer"] == bound["timer"] else "wall_us"  # only like is compared with like
            found |= {"bound_us": bound[clock], "ratio": found[clock] / bound[clock]}
        return found | {"wrong": _is_wrong(found, setting.dtype)}

    def bound(self, setting: rows.Setting, direction: str) -> dict[str, Any] | None:
        """Times of one expert over all tokens; with one expert trained, its tokens' share of its gradients.

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
    """Whether a row computes something else than `dense_both`, both with the rounding of `dtype`."""
    return found["max_rel_error"] > 2 * TOLERANCE[dtype]


def _differences(tuned: Implementation, default: Implementation) -> dict[str, Any]:
    """Fields that tuning has changed, as JSON has them."""
    changed = {f.name: getattr(tuned, f.name) for f in dataclasses.fields(tuned)}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in changed.items()}


def _device_works() -> bool:
    """False after errors that a CUDA context does not survive."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def work(options: argparse.Namespace) -> None:
    """The worker process."""
    found, here = Results.load(options.out), header(options.dry_run)
    if found is None:
        about = {"date": str(datetime.date.today()), "tile": options.tile, **here, "unavailable": {}, "records": []}
        found = Results(options.out, about)
    elif differing := [key for key, value in here.items() if found.content[key] != value]:
        there = ", ".join(f"{key} {found.content[key]}" for key in differing)
        cli.fail(f"{options.out}/kernels.json is of another run ({there}); give another --out")
    found.content.pop("running", None)
    if options.retry_failed:
        found.forget_failures()
    Worker(options, found).run()
    found.save()


# ======================================================================================================================
# The supervisor: keeps a worker going
# ======================================================================================================================


def supervise(options: argparse.Namespace, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs workers until one is through with the list or the budget is spent.

    Args:
      options: of the command line; `out`, `budget_s` and `stall_s` are used.
      command: starts a worker; its remaining budget and what else changes is appended.
      environment: of the worker.
    """
    start, retry, idle_deaths = time.monotonic(), options.retry_failed, 0
    while (left := options.budget_s - (time.monotonic() - start)) > 0:
        again = ["--retry_failed"] if retry else []
        status = _watch([*command, f"--budget_s={left}", *again], environment, options, left + GRACE_S)
        if status == 0 or status is None:
            return
        if status == cli.USER_ERROR:
            raise SystemExit(status)  # the worker has said why
        results = Results.load(options.out)
        if results and "running" in results.content:
            reason = status if isinstance(status, str) else f"its process died with status {status}"
            print(f"  {reason}", file=sys.stderr)
            results.end({"failed": reason, "died": True})
            idle_deaths = 0
        elif status != RESTART:
            idle_deaths += 1
            if idle_deaths == 2:
                cli.fail(f"the worker process ends with status {status} before its first point")
        retry = False


def _watch(
    command: Sequence[str], environment: Mapping[str, str], options: argparse.Namespace, limit_s: float
) -> int | str | None:
    """Exit status of a worker, or why it was ended; None where the budget ended it."""
    started = progress = time.time()
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(1.0, options.stall_s / 4))
            with contextlib.suppress(FileNotFoundError):
                progress = max(progress, (options.out / "kernels.json").stat().st_mtime)
            if time.time() - started > limit_s:
                return None
            if time.time() - progress > options.stall_s:
                return f"no progress for {options.stall_s:g} s"
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to a process that hangs in it
            process.wait(timeout=GRACE_S)


# ======================================================================================================================
# The command
# ======================================================================================================================


def tuning_json(results: Results) -> dict[str, Any]:
    """The device's tuning table with what was found: entries per size, and the order of preference by measured time."""
    device = results.content["device_key"]
    table = json.loads(json.dumps(tuning_table(device)))
    table |= {"device": device, "source": f"experiments/benchmarks/kernels.py, {results.content['date']}"}
    for record in results.of_kind("tuned"):
        about, of_name = record["about"], table["parameters"].setdefault(record["about"]["row"], {})
        setting = rows.Setting(**{f.name: about[f.name] for f in dataclasses.fields(rows.Setting)})
        entry = {"op": setting.kernel_op, "dtype": setting.dtype, "d": setting.d, "ff": setting.width}
        entry |= {"rows": setting.rows, "parameters": record["parameters"], "median_us": record["median_us"]}
        of_name["entries"] = [e for e in of_name.get("entries", []) if not _same_problem(e, entry)] + [entry]
    table["order"] = _by_speed(table["order"], results.of_kind("time"))
    return table


def _same_problem(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("op", "dtype", "d", "ff", "rows"))


def _by_speed(order: Sequence[str], timings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names in order of their first good time forward and backward; those without one behind."""
    times: dict[str, float] = {}
    names = {"ragged_dot": "ragged"}  # rows that are called differently as implementations
    for t in timings:
        if t["about"]["direction"] == "both" and t["about"]["op"] == "ffn" and not t.get("wrong", True):
            times.setdefault(names.get(t["about"]["row"], t["about"]["row"]), t["median_us"])
    measured = sorted((name for name in order if name in times), key=times.get)
    return measured + [name for name in order if name not in measured]


def write_report(results: Results) -> str:
    """Writes kernels.md, the plots and the tuning table next to kernels.json; returns the tables."""
    folder, content = results.folder, results.content
    table = tuning_json(results)
    (folder / f"tuning_{table['device']}.json").write_text(json.dumps(table, indent=1) + "\n")
    text = report.full(content)
    (folder / "kernels.md").write_text(text + "\n")
    try:
        report.plot(content, folder)
    except ImportError as error:
        print(f"no plots: {error}; --report makes them elsewhere from kernels.json", file=sys.stderr)
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results; a run goes on with what it holds")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, kernels interpreted: does the script run?")
    parser.add_argument("--ops", nargs="+", default=["ffn", "qkv"], choices=["ffn", "qkv"], help="default: both")
    parser.add_argument("--shapes", nargs="+", default=["2b", "7b"], choices=["2b", "7b"], help="default: both")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these rows (and the bound)")
    parser.add_argument("--tile", type=int, default=128, help="rows per tile (default: 128; 512 suits a TPU)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--budget_s", type=float, default=1e9, help="start no new point after so many seconds")
    parser.add_argument("--stall_s", type=float, default=240, help="give up a point after so many s (default: 240)")
    parser.add_argument("--no_tune", action="store_true", help="use the tuning tables as they are")
    parser.add_argument("--retry_failed", action="store_true", help="try failed points of an earlier run again")
    parser.add_argument("--report", action="store_true", help="only write tables and plots of what --out holds")
    parser.add_argument("--readme", action="store_true", help="write the README's table from results/ and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    if options.readme:
        report.write_readme()
        return 0
    if options.out is None:
        cli.fail("give --out=FOLDER for the results")
    if options.worker:
        if jax.default_backend() == "cpu" and not options.dry_run:
            cli.fail("no accelerator here: times would mean nothing; rehearse with --dry_run")
        work(options)
        return 0
    if not options.report:
        command = [sys.executable, "-m", "experiments.benchmarks.kernels", *arguments, "--worker"]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path} | (host_devices() if options.dry_run else {})
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the worker on the way
        try:
            supervise(options, command, environment)
        finally:
            signal.signal(signal.SIGTERM, before)
    return show(options)


def show(options: argparse.Namespace) -> int:
    """Prints the tables; the exit status is 1 where a kernel's check failed."""
    results = Results.load(options.out)
    if results is None:
        cli.fail(f"{options.out}/kernels.json is not there")
    print(write_report(results))
    wrong = [f"{r['about']['row']}: {r['failed']}" for r in results.of_kind("check") if "failed" in r]
    timings = results.of_kind("time")
    if options.json:
        failed = [r for r in results.content["records"] if "failed" in r]
        counts = {"timings": len(timings), "failed": len(failed), "failed_checks": wrong}
        cli.json_line({"out": str(options.out), **counts, "unavailable": results.content["unavailable"]})
    return int(bool(wrong))


if __name__ == "__main__":
    cli.run(main)
