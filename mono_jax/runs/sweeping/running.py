"""Runs one unit: its stages one after another, reusing those that another unit has trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from data_pipelines.io import publish
from mono_jax.parallel.agreement import first_process_first
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.console import say_now
from mono_jax.runs.evaluating import MEASURED
from mono_jax.runs.evip import Evip, run_and_report
from mono_jax.runs.stage import run_stage
from mono_jax.runs.sweeping.chain import Plan
from mono_jax.runs.sweeping.places import FAILED, RESULT, alone_with, lay_out
from mono_jax.runs.workdir import Workdir, locked
from mono_jax.training.loop import Stopped
from mono_jax.training.metrics import Say, is_finite, read_metrics

Metrics = dict[str, float | None]  # None: not finite, as in metrics.jsonl


class SharingEvip(Evip):
    """``Evip`` that waits for stages, sets and bases that another unit of the sweep is making, and then uses them."""

    @classmethod
    def open(cls, config: EvipConfig, workdir: Path, say: Say = say_now) -> Self:
        with _alone_with((workdir / "data").resolve(), say):
            return super().open(config, workdir, say)

    def with_experts(self, init: str) -> str:
        with _alone_with(self.place("mono"), self.say):
            return super().with_experts(init)

    def scored(self, folder: str, sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        with _alone_with(self.cache() / "scores", self.say):
            return super().scored(folder, sources)

    def run_stage(self, folder: str, init: str) -> dict[str, Any]:
        with _alone_with(self.place(folder), self.say):
            return super().run_stage(folder, init)


def run_unit(plan: Plan, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates what is missing for the unit; writes and returns its result. All processes make this call.

    {"unit", "group", "seed", "changes", "stages": {folder: digest}, "asked": {key: value}, "seconds", "metrics": {name:
    number, or None if it is not finite}} Raises MonoJaxError or DataError, which are recorded in failed.json;
    ``stopping.Preempted`` after SIGTERM.
    """
    start, first = time.perf_counter(), jax.process_index() == 0
    with first_process_first():
        folder = lay_out(workdir, plan)
    with locked(folder) if first else contextlib.nullcontext():
        (folder / FAILED).unlink(missing_ok=True)
        try:
            metrics = _measured(plan, folder)
        except Stopped:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                write_failure(folder, f"{type(error).__name__}: {error}", None)
            raise
        unit = plan.unit
        result = {
            "unit": unit.name,
            "group": unit.group,
            "seed": unit.seed,
            "changes": dict(unit.changes),
            **plan.decides,
            "seconds": round(time.perf_counter() - start, 1),
            "metrics": metrics,
        }
        if first:
            publish.write_json(folder / RESULT, result)
    return result


def write_failure(folder: Path, line: str, code: int | None) -> None:
    """Records why the unit in ``folder`` failed: the last line of its error and its exit code."""
    publish.write_json(folder / FAILED, {"error": " ".join(line.split())[:300], "code": code, "time": time.time()})


def _alone_with(folder: Path, say: Say) -> contextlib.AbstractContextManager[None]:
    """``alone_with`` in the first process, for which the others wait."""
    return alone_with(folder, say) if jax.process_index() == 0 else contextlib.nullcontext()


def _measured(plan: Plan, folder: Path) -> Metrics:
    config = plan.config
    if isinstance(config, RunConfig):
        return _single(config, (folder / plan.stages[0].folder).resolve())
    results, _ = run_and_report(config, folder, SharingEvip)
    found: Metrics = {}
    for name, summary in results["stages"].items():
        found |= stage_metrics(summary, folder / name, f"{name}/")
    return found


def _single(run: RunConfig, place: Path) -> Metrics:
    with _alone_with(place, say_now):
        result = run_stage(run, place)
        if jax.process_index() == 0:
            publish.write_json(place / "summary.json", Workdir.of(place).portable(result))
    return stage_metrics({"loss": result["loss"]}, place, "")


def stage_metrics(summary: Mapping[str, Any], stage: Path, prefix: str) -> Metrics:
    """The numbers of a stage that are worth comparing: of its summary, and the newest of each kind that was measured on
    held-out samples during the stage in the folder ``stage``."""
    newest: Metrics = {}
    for record in read_metrics(stage / "metrics.jsonl"):
        newest |= {key: value for key, value in record.items() if key.startswith(MEASURED)}
    found = _of_summary(summary) | newest
    return {f"{prefix}{key}": value if is_finite(value) else None for key, value in found.items()}


def _of_summary(summary: Mapping[str, Any]) -> Metrics:
    keys = ("seconds", "text_loss_before", "text_loss_after", "trainable", "optimizer_bytes")
    found = {"loss": summary["loss"], **{key: summary[key] for key in keys if summary.get(key) is not None}}
    for name, graded in summary.get("evaluation", {}).items():
        found |= {name: graded["accuracy"], f"{name}/commonest": graded["majority"]}
        found |= {f"{name}/blind": graded["blind"]} if "blind" in graded else {}
        found |= {f"{name}/{kind}": kept["accuracy"] for kind, kept in graded.get("by_kind", {}).items()}
    return found
