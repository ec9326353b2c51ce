"""The progress of each unit of a sweep, determined only from its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mono_jax.files import stored_json
from mono_jax.runs.sweeping.chain import Plan
from mono_jax.runs.sweeping.places import FAILED, RESULT, is_trained, shared_folder, unit_folder
from mono_jax.runs.workdir import in_use
from mono_jax.training.metrics import read_metrics

FINISHED, FAILED_STATE, RUNNING, PARTLY, WAITING = "finished", "failed", "running", "partly", "waiting"


@dataclasses.dataclass(frozen=True)
class State:
    """The progress of one unit.

    Attributes:
      state: finished, failed, running, partly (some of it is done), waiting.
      stage: the first unfinished one; "" if all are finished.
      step, loss: from the newest record of that stage.
      note: why it failed.
    """

    name: str
    state: str
    stage: str = ""
    step: int | None = None
    loss: float | None = None
    note: str = ""


def result_of(workdir: Path, plan: Plan) -> dict[str, Any] | None:
    """The result of a unit that is finished according to its current plan."""
    found, decides = stored_json(unit_folder(workdir, plan.unit.name) / RESULT), plan.decides
    return found if {key: found.get(key) for key in decides} == decides else None


def state_of(workdir: Path, plan: Plan) -> State:
    """The progress of the unit."""
    folder, name = unit_folder(workdir, plan.unit.name), plan.unit.name
    if result_of(workdir, plan) is not None:
        return State(name, FINISHED)
    place = {"stage": "", "step": None, "loss": None}
    lacks = next((link for link in plan.stages if not is_trained(workdir, link)), None)
    if lacks is not None:
        records = read_metrics(shared_folder(workdir, lacks) / "metrics.jsonl")
        place["stage"] = lacks.folder
        if records:
            place |= {"step": records[-1]["step"], "loss": records[-1].get("loss")}
    if in_use(folder):
        return State(name, RUNNING, **place)
    if (failure := stored_json(folder / FAILED)) and "error" in failure:
        return State(name, FAILED_STATE, note=str(failure["error"]), **place)
    begun = place["step"] is not None or lacks != plan.stages[0]
    return State(name, PARTLY if begun else WAITING, **place)
