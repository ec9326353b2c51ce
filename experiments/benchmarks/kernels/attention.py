"""Packed attention in the kernel benchmark: its points, what is timed, and the tables."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.timing import LEAST_INPUTS, REHEARSAL, Timer, compiled
from experiments.benchmarks.kernels.tuning import differences
from pallas_kernels.attention.api import SequenceOrder, attend
from pallas_kernels.attention.backends.xla_blocked import XlaBlocked
from pallas_kernels.attention.contract import Implementation, Problem
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.checks.attention import TOLERANCE
from pallas_kernels.checks.conformance import relative_error
from pallas_kernels.checks.run import check
from pallas_kernels.devices import device_key
from pallas_kernels.errors import Unavailable
from pallas_kernels.registry import IMPLEMENTATIONS, implementation_class, preferred, room, tuned_parameters

KIND = "attention"  # of the records
NAMES = [name for name in IMPLEMENTATIONS if room(name) == "attention"]
DIRECTIONS = ("forward", "both")  # both: forward and backward
LENGTHS = tuple(1024 * 2**i for i in range(8))  # up to 131,072
SAMPLE = 1408  # tokens of a sample in S1.1: 8 fill a row of 10,240 + 1,024
CHECK_S, TUNING_S = 15.0, 60.0  # per implementation
SLOW = 4.0  # times the fastest: such an implementation is not tuned, and not timed at greater lengths

# (kind, about, measure) -> the record, from an earlier run or made now; None if the budget is spent.
Attempt = Callable[[str, dict[str, Any], Callable[[], Mapping[str, Any]]], dict[str, Any] | None]


class Heads(NamedTuple):
    """Query heads, KV heads and head size of one model."""

    query: int
    kv: int
    dim: int


SHAPES = {"2b": Heads(16, 8, 128), "7b": Heads(32, 8, 128), "tiny": Heads(2, 1, 64)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One packed row.

    Attributes:
      shape: key of SHAPES.
      rows: slots of the row (results use this name for tokens).
      samples: number of samples that fill the row, of about equal lengths.
      dtype: of query, key and value.
      in_slots: arrays are gathered from slots in another order, and back, as training does in each layer.
    """

    shape: str
    rows: int
    samples: int
    dtype: str
    in_slots: bool = False

    @property
    def problem(self) -> Problem:
        """The problem for which implementations are asked whether they support it."""
        heads = SHAPES[self.shape]
        return Problem(1, self.rows, self.rows, *heads, self.dtype, device_key())

    def segments(self) -> np.ndarray:
        """int32 [1, rows]; boundaries are not aligned to blocks."""
        return (np.arange(self.rows) * self.samples // self.rows + 1)[None].astype(np.int32)

    def flops(self, direction: str) -> int:
        """FLOPs of the unmasked scores: two products forward, five backward."""
        lengths = np.bincount(self.segments()[0])[1:].astype(np.int64)
        heads = SHAPES[self.shape]
        pairs = int((lengths * (lengths + 1) // 2).sum())
        return {"forward": 2, "both": 7}[direction] * 2 * pairs * heads.query * heads.dim


def points(dtype: str) -> Iterator[Setting]:
    """All settings, most informative first: the row of S1.1, one sample, in slots, then all lengths of 2B and of 7B."""
    make = functools.partial(Setting, dtype=dtype)
    yield make("2b", 8 * SAMPLE, 8)
    yield make("2b", 16_384, 1)
    yield make("2b", 8 * SAMPLE, 8, in_slots=True)
    for shape in ("2b", "7b"):
        for n in LENGTHS:
            yield make(shape, n, max(1, n // SAMPLE))
        for n in LENGTHS:
            yield make(shape, n, 1)


def rehearsal(dtype: str) -> Iterator[Setting]:
    """Tiny rows that exercise everything once; two lengths, so that break-even points are reported."""
    yield Setting("tiny", 128, 2, dtype)
    yield Setting("tiny", 256, 2, dtype)
    yield Setting("tiny", 128, 2, dtype, in_slots=True)


# ======================================================================================================================
# Measuring
# ======================================================================================================================


@functools.cache
def program(implementation: Implementation, in_slots: bool) -> Callable[..., jax.Array]:
    """(query, key, value, intervals, sequence) -> output."""

    def function(query, key, value, intervals, sequence):
        order = sequence if in_slots else None
        return attend(query, key, value, intervals, order, implementation=implementation, causal=True)

    return function


def inputs(setting: Setting, seed: int) -> tuple[Any, ...]:
    """Cotangent, query, key, value, intervals, sequence."""
    heads = SHAPES[setting.shape]
    sizes = (heads.query, heads.query, heads.kv, heads.kv)
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    arrays = [jax.random.normal(k, (1, setting.rows, n, heads.dim), setting.dtype) for k, n in zip(keys, sizes)]
    inverse = np.random.default_rng(seed).permutation(setting.rows)[None].astype(np.int32)
    sequence = SequenceOrder(jnp.asarray(np.argsort(inverse, axis=1), jnp.int32), jnp.asarray(inverse))
    return *arrays, packed_intervals(jnp.asarray(setting.segments())), sequence


def measure(timer: Timer, implementation: Implementation, setting: Setting, direction: str) -> dict[str, Any]:
    """Times, TFLOP/s of useful work, and the largest relative error against ``XlaBlocked`` in the same dtype."""
    trained = None if direction == "forward" else (0, 1, 2)
    run = compiled(program(implementation, setting.in_slots), trained)
    count = 1 if timer.effort == REHEARSAL else LEAST_INPUTS
    arguments = [inputs(setting, seed) for seed in range(count)]
    reference = compiled(program(XlaBlocked(), setting.in_slots), trained)
    pairs = zip(jax.tree.leaves(run(*arguments[0])), jax.tree.leaves(reference(*arguments[0])))
    error = max(relative_error(found, np.asarray(expected, np.float64)) for found, expected in pairs)
    times = timer(run, arguments)
    return {
        "max_rel_error": error,
        "wrong": not error < 2 * TOLERANCE[setting.dtype],
        "tflops": setting.flops(direction) / times["median_us"] / 1e6,
        **times,
    }


def available(setting: Setting, rehearse: bool, wanted: Sequence[str]) -> tuple[dict[str, Implementation], dict]:
    """(implementations that run here, interpreted in a rehearsal, preferred ones first; why the others do not)."""
    found, missing = {}, {}
    order = [name for name in preferred(setting.problem) if name in NAMES]
    for name in dict.fromkeys([*order, *NAMES]):
        if wanted and name not in wanted:
            continue
        try:
            kind = implementation_class(name)
            kernel = kind.here() if rehearse else kind(**tuned_parameters(name, setting.problem))
            dtype = _dtype(kernel, setting, rehearse)
            if reason := kernel.unsupported(dataclasses.replace(setting.problem, dtype=dtype)):
                raise Unavailable(reason)
        except Unavailable as reason:
            missing[name] = str(reason)
        else:
            found[name] = kernel
    return found, missing


def _dtype(kernel: Implementation, setting: Setting, rehearse: bool) -> str:
    """The setting's dtype; in a rehearsal, the other one if an interpreter supports only that."""
    served = [d for d in TOLERANCE if kernel.unsupported(dataclasses.replace(setting.problem, dtype=d)) is None]
    return served[0] if rehearse and served and setting.dtype not in served else setting.dtype


def run(options: argparse.Namespace, attempt: Attempt, timer: Timer, most: int | None = None) -> dict[str, str]:
    """Checks, tunes at the first setting, and times the first ``most`` (default: all); returns why rows are missing."""
    settings = list((rehearsal if options.dry_run else points)(options.dtype))
    settings = [s for s in settings if s.shape in (*options.shapes, "tiny")]
    kernels, missing = available(settings[0], options.dry_run, options.rows)
    for name in kernels:
        attempt("check", {"row": name}, functools.partial(_check, name, options.dry_run))
    times, first = Times(attempt, timer, options.dry_run), settings[0]
    times.add(kernels, first)  # with default parameters, so that there is a result
    if not options.no_tune and not options.dry_run:
        for name in [name for name in kernels if not times.slow(name, first, "both")]:
            kernels[name] = _tuned(name, kernels[name], first, attempt, timer)
    for setting in settings[:most]:
        times.add(kernels, setting)
    return missing


@dataclasses.dataclass
class Times:
    """Times the settings, and leaves out implementations that were too slow on shorter rows."""

    attempt: Attempt
    timer: Timer
    rehearse: bool
    taken: dict[tuple[Setting, str], dict[str, float]] = dataclasses.field(default_factory=dict)

    def add(self, kernels: Mapping[str, Implementation], setting: Setting) -> None:
        """A record for each kernel and direction, made now or in an earlier run."""
        for direction, (name, kernel) in itertools.product(DIRECTIONS, kernels.items()):
            here = dataclasses.replace(setting, dtype=_dtype(kernel, setting, self.rehearse))
            if kernel.unsupported(here.problem) or self.slow(name, setting, direction):
                continue
            about = {"row": name, "direction": direction, **dataclasses.asdict(here)}
            if not self.rehearse:
                default = type(kernel)(**tuned_parameters(name, here.problem))
                about |= {"parameters": changed} if (changed := differences(kernel, default)) else {}
            record = self.attempt(KIND, about, functools.partial(measure, self.timer, kernel, here, direction))
            if record and "failed" not in record:
                self.taken.setdefault((setting, direction), {})[name] = record["median_us"]

    def slow(self, name: str, setting: Setting, direction: str) -> bool:
        """Whether it took more than ``SLOW`` times as long as the fastest on a similar row that is not longer."""
        if self.rehearse:
            return False
        alike = (
            times
            for (there, way), times in self.taken.items()
            if way == direction
            and (there.shape, there.samples > 1) == (setting.shape, setting.samples > 1)
            and there.rows <= setting.rows
        )
        return any(times.get(name, 0.0) > SLOW * min(times.values()) for times in alike)


def _check(name: str, rehearse: bool) -> dict[str, Any]:
    """Checks cases against the float64 oracle; in a rehearsal, one per dtype."""
    found = check(name, all_masks=not rehearse, seconds=0 if rehearse else CHECK_S, compile_ahead=False)
    record = {key: found[key] for key in ("correct", "errors", "cases", "skipped")}
    return record | ({"failed": "; ".join(found["failed"])} if found["failed"] else {})


def _tuned(name: str, kernel: Implementation, setting: Setting, attempt: Attempt, timer: Timer) -> Implementation:
    """For each field in turn, the value with which forward + backward is fastest."""
    deadline, best = time.monotonic() + TUNING_S, float("inf")
    trials = [{}, *({field: value} for field, values in type(kernel).tuning_space().items() for value in values)]
    for trial in trials:
        if time.monotonic() > deadline:
            break
        candidate = dataclasses.replace(kernel, **trial)
        about = {"row": name, "parameters": trial, **dataclasses.asdict(setting)}
        record = attempt("attention trial", about, functools.partial(measure, timer, candidate, setting, "both"))
        if record and "failed" not in record and not record["wrong"] and record["median_us"] < best:
            best, kernel = record["median_us"], candidate
    return kernel


# ======================================================================================================================
# Tables and break-even points
# ======================================================================================================================


def break_even(content: Mapping[str, Any]) -> list[str]:
    """Which implementation is fastest at which lengths, for packed rows and for rows of one sample."""
    good = [r for r in content["records"] if r["kind"] == KIND and "failed" not in r and not r["wrong"]]
    kinds = {
        "packed rows": lambda about: about["samples"] > 1 or about["rows"] < 2 * SAMPLE,
        "one sample": lambda about: about["samples"] == 1,
    }
    lines = []
    for group in dict.fromkeys(_group(r) for r in good):
        for kind, holds in kinds.items():
            best: dict[int, tuple[float, str]] = {}
            for record in (r for r in good if _group(r) == group and holds(r["about"])):
                rows, name = record["about"]["rows"], record["about"]["row"].split("/")[1]
                best[rows] = min(best.get(rows, (float("inf"), "")), (record["median_us"], name))
            if len(best) > 1:
                lines.append(f"Attention, {_title(*group)}, {kind}: {_winners(best)}")
    return lines


def _winners(best: Mapping[int, tuple[float, str]]) -> str:
    """ "xla_blocked at 1,024 to 4,096 slots, mosaic_gpu at 8,192 to 131,072"."""
    runs = itertools.groupby(sorted(best), lambda rows: best[rows][1])
    spans = [(name, list(lengths)) for name, lengths in runs]
    if len(spans) == 1:
        return f"{spans[0][0]} fastest throughout"
    parts = (f"{name} at {n[0]:,}" + (f" to {n[-1]:,}" if len(n) > 1 else "") for name, n in spans)
    return f"fastest by slots of the row: {', '.join(parts)}"


def _title(shape: str, direction: str, in_slots: bool) -> str:
    what = "forward + backward" if direction == "both" else direction
    return f"{shape}, {what}{', gathered from slots' if in_slots else ''}"


def failures(content: Mapping[str, Any]) -> list[str]:
    """One line per failed timing."""
    lines = []
    for record in content["records"]:
        if record["kind"] == KIND and "failed" in record:
            about = record["about"]
            where = f"{_title(*_group(record))}, {about['rows']:,} / {about['samples']}"
            lines.append(f"{about['row']}, {where}: {record['failed']}")
    return lines


def tables(content: Mapping[str, Any]) -> str:
    """Markdown: TFLOP/s of useful work by length, for packed rows and rows of one sample, if there are any."""
    records = [r for r in content["records"] if r["kind"] == KIND]
    lines: list[str] = []
    groups = {(r["about"]["shape"], r["about"]["direction"], r["about"]["in_slots"]): None for r in records}
    for shape, direction, in_slots in groups:
        chosen = [r for r in records if _group(r) == (shape, direction, in_slots)]
        columns = sorted({(r["about"]["rows"], r["about"]["samples"]) for r in chosen})
        lines += ["", f"**Attention, {_title(shape, direction, in_slots)}: TFLOP/s of useful work**", ""]
        lines.append("| | " + " | ".join(f"{rows:,} / {samples}" for rows, samples in columns) + " |")
        lines.append("|---|" + "---|" * len(columns))
        for name in dict.fromkeys(r["about"]["row"] for r in chosen):
            cells = {(r["about"]["rows"], r["about"]["samples"]): _cell(r) for r in chosen if r["about"]["row"] == name}
            lines.append(f"| {name.split('/')[1]} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
    return "\n".join([*lines, "", "Columns: slots of the row / samples in it."] if lines else [])


def _group(record: Mapping[str, Any]) -> tuple[str, str, bool]:
    about = record["about"]
    return about["shape"], about["direction"], about["in_slots"]


def _cell(record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return "failed"
    return "wrong" if record["wrong"] else f"{record['tflops']:.1f}"
