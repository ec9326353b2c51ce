"""Implements ``plan.py``: what a run needs and how fast it can be at best, on hardware that need not be present.

No data is opened. The step is the run's own, compiled by the target's real compiler; times are lower bounds from its
operations (``mono_jax.hlo.roofline``), not predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.runs import config_file
from mono_jax.runs.config import RunConfig, one_of_several
from mono_jax.runs.planning import compiled, scaling, table
from mono_jax.runs.planning.search import search
from mono_jax.runs.planning.targets import target
from mono_jax.runs.planning.workload import workload
from mono_jax.runs.program import Program
from mono_jax.runs.sets import with_heldout
from mono_jax.runs.stage_keys import added


def show(values: Mapping[str, Any], name: str, **options: Any) -> dict[str, Any]:
    """``run``, printed for a person."""
    result = run(values, name, **options)
    print("\n".join(table.lines(result)))
    return result


def run(
    values: Mapping[str, Any],
    name: str,
    *,
    stage: str | None = None,
    samples_per_row: float | None = None,
    compile_best: int | None = None,
) -> dict[str, Any]:
    """The plan of a config for the target ``name``.

    Args:
      values: config of one stage, or of a sequence of stages.
      stage: which stage of a sequence; default: the first.
      samples_per_row: see ``workload``.
      compile_best: search first, and compile this many of the best candidates; None = plan the config as it is.

    Raises ConfigError for an invalid config or target; a step that does not compile or fit is a result.
    """
    config = run_config(values, stage)
    hardware = target(name)
    if compile_best is not None:
        result = search(config, hardware, samples_per_row, compile_best)
    else:
        program = Program.build(config, config.steps or 1, devices=hardware.devices)
        result = compiled.plan(program, hardware, workload(program, samples_per_row))
    if config.steps is None:
        result["days_for_stage"] = None
        result.setdefault("assumptions", []).append(
            "the config gives epochs: the stage's days are unknown without its data"
        )
    return result


def print_table(file: str, compile_rows: Sequence[str]) -> int:
    """Prints the table of docs/scaling.md from the configs FILE:STAGE, row by row as it is computed; see
    ``scaling``."""
    for line in scaling.table(
        lambda stage: config_file.values_of(config_file.load(f"{file}:{stage}"), file), compile_rows
    ):
        print(line, flush=True)
    return 0


def run_config(values: Mapping[str, Any], stage: str | None = None) -> RunConfig:
    """The config of one stage; for a sequence, that of ``stage`` (default: the first), with placeholders for its sets.

    Raises ConfigError or DataError that names the key.
    """
    if (found := one_of_several(values, stage)) is None:
        return RunConfig.from_dict(values)
    config, stage = found
    keys = added(config.shared(), config.stages[stage])
    model = {**next(iter(config.stages.values())).get("model", {}), **keys.get("model", {})}
    if config.stage_name(stage) != "S0" and not config.init:
        model = {"vision": config.vision, "visual_ffn_experts": True, **model}
        model["visual_attention_experts"] = config.attention_experts
    elif config.init:
        model.pop("preset", None)
    if not config.init and model.get("preset") is None:
        raise ConfigError(
            "config.init is empty, and no preset defines the model: give config.init (a model folder) or, for a plan, "
            "config.common.model.preset, such as mono_internvl_2b"
        )
    stand_ins = {"tokenizer": "of the sets", "sources": [{"spec": {"kind": "of the sets"}}]}
    values = {**keys, "init": config.init, "model": model, "data": {**stand_ins, **keys["data"]}}
    if "evaluation" in values:
        values["evaluation"] = with_heldout(values["evaluation"], None)
    return RunConfig.from_dict(values)
