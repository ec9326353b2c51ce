"""Times of the forms, measured side by side."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from experiments.benchmarks.step.forms import Form, build
from experiments.benchmarks.step.workloads import Workload, make_batch
from mono_jax import tree
from mono_jax.models.transformer import Model
from mono_jax.training import stages
from mono_jax.training.flops import count_tokens, peak_flops, step_flops
from mono_jax.training.groups import trained_groups


@dataclasses.dataclass
class Times:
    """Wall seconds and CPU seconds of each step after the first; ``loss`` is that of the first step."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    loss: float = float("nan")
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


def measure(forms: dict[str, Form], steps: int) -> dict[str, Times]:
    """One warm-up step per form, then ``steps`` steps per form, in turns."""
    times = {name: Times(loss=form.step(), facts=form.facts) for name, form in forms.items()}
    for _ in range(steps):
        for name, form in forms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            form.step()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def run_group(
    work: Workload, stage: stages.Stage, remat: str, names: Sequence[str], steps: int, seed: int
) -> list[dict[str, Any]]:
    """One result per form of a stage and remat policy."""
    batch = make_batch(work, seed)
    params = Model(work.config).init(jax.random.key(seed))
    together = jax.default_backend() == "cpu"
    times: dict[str, Times] = {}
    for group in [names] if together else [[name] for name in names]:
        forms = {name: build(name, work, params, stage, remat, batch) for name in group}
        if group[-1] == names[-1]:
            params = None  # in the last group, since an accelerator needs the memory
        times |= measure(forms, steps)
        del forms
        gc.collect()
    trained = trained_groups(stage, work.config)
    flops = step_flops(work.config, trained, count_tokens(batch))
    peak = peak_flops(jax.devices()[0].device_kind)
    results = []
    for name, measured in times.items():
        step_s = statistics.median(measured.wall)
        results.append(
            {
                "stage": stage.name,
                "remat": remat,
                "form": name,
                "step_s": step_s,
                "best_s": min(measured.wall),
                "cpu_s": statistics.median(measured.cpu),
                "tokens_per_s": work.tokens / step_s,
                "model_tflops_per_s": flops / step_s / 1e12,
                "mfu": flops / step_s / peak if peak else None,
                "loss": measured.loss,
                **measured.facts,
                "walls_s": measured.wall,
                "cpus_s": measured.cpu,
            }
        )
    return results


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster the static split is than each other form, by wall time and by CPU time.

    Each step is compared with that of the same turn, and the median over the turns is reported, so that other work on
    the machine affects both equally.
    """
    found = []
    for ours in (r for r in results if r["form"] == "static"):
        for other in results:
            same = (other["stage"], other["remat"]) == (ours["stage"], ours["remat"])
            if same and other["form"] != "static":
                found.append(
                    {
                        "stage": ours["stage"],
                        "remat": ours["remat"],
                        "static_over": other["form"],
                        "wall": _turn_by_turn(other["walls_s"], ours["walls_s"]),
                        "cpu": _turn_by_turn(other["cpus_s"], ours["cpus_s"]),
                        "turns": len(ours["walls_s"]),
                    }
                )
    return found


def _turn_by_turn(others: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def describe(work: Workload, chosen: Sequence[str]) -> dict[str, Any]:
    """What would run, from shapes only: parameters, and model FLOPs per step of each stage."""
    shapes = tree.flatten(Model(work.config).abstract_params())
    counts = count_tokens(make_batch(dataclasses.replace(work, rows=1)))
    counts = {name: count * work.rows for name, count in counts.items()}
    flops = {
        name: step_flops(work.config, trained_groups(stages.get_stage(name), work.config), counts) for name in chosen
    }
    return {
        "parameters": sum(leaf.size for leaf in shapes.values()),
        "rows": work.rows,
        "visual": work.visual,
        "text": work.text,
        "samples": work.samples,
        "dtype": work.dtype,
        "step_tflops": {name: value / 1e12 for name, value in flops.items()},
    }
