"""Times the forms of a training step: see ``train_step.py``."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from experiments.benchmarks.step_forms import FORMS, WORKLOADS, Form, Workload, build, make_batch
from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.transformer import Model
from mono_jax.training import stages
from mono_jax.training.flops import count_tokens, peak_flops, step_flops
from mono_jax.training.groups import trained_groups


@dataclasses.dataclass
class Times:
    """Of each step after the first: wall seconds and processor seconds; ``loss`` is the first step's."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    loss: float = float("nan")


def measure(forms: dict[str, Form], steps: int) -> dict[str, Times]:
    """One warm-up step each, then ``steps`` steps each in turns."""
    times = {name: Times(loss=form.step()) for name, form in forms.items()}
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
            params = None  # the last group: an accelerator needs the memory
        times |= measure(forms, steps)
        del forms
        gc.collect()
    trained = trained_groups(stage, work.config)
    flops = step_flops(work.config, trained, count_tokens(batch))
    peak = peak_flops() if not together else None
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
            }
        )
    return results


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster the static split is than each other form, by wall and by processor time."""
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
                        "wall": other["step_s"] / ours["step_s"],
                        "cpu": other["cpu_s"] / ours["cpu_s"],
                    }
                )
    return found


def describe(work: Workload, chosen: Sequence[str]) -> dict[str, Any]:
    """What would run, from shapes alone: parameters, and model FLOPs of a step of each stage."""
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
        "dtype": work.dtype,
        "step_tflops": {name: value / 1e12 for name, value in flops.items()},
    }


def _workload(args: argparse.Namespace) -> Workload:
    if args.preset not in WORKLOADS:
        raise unknown_key("preset", args.preset, WORKLOADS)
    for form in args.forms:
        if form not in FORMS:
            raise unknown_key("form", form, FORMS)
    changes = {name: getattr(args, name) for name in ("rows", "visual", "text") if getattr(args, name) is not None}
    for name, value in {**changes, "steps": args.steps}.items():
        if value < 1:
            raise ConfigError(f"--{name}={value}: it must be at least 1")
    return dataclasses.replace(WORKLOADS[args.preset], **changes)


def _usable(forms: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The forms that can run here, and why the others cannot."""
    if "torch" not in forms:
        return list(forms), {}
    if importlib.util.find_spec("torch") is None:
        reason = "PyTorch is not installed (pip install torch)"
    elif jax.default_backend() != "cpu":
        reason = "compared on the CPU only"
    else:
        return list(forms), {}
    return [form for form in forms if form != "torch"], {"torch": reason}


def _print_row(r: dict[str, Any]) -> None:
    mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
    times = f"{r['step_s']:8.3f} {r['best_s']:8.3f} {r['cpu_s']:8.3f} {r['tokens_per_s']:9.0f}"
    print(f"{r['stage']:6} {r['remat']:6} {r['form']:11} {times} {mfu:>6} {r['loss']:9.5f}", flush=True)


def measure_all(work: Workload, args: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs every stage, remat policy and form; prints one row each, then the ratios."""
    titles = f"{'step s':>8} {'best s':>8} {'cpu s':>8} {'tokens/s':>9} {'MFU':>6} {'loss':>9}"
    print(f"{'stage':6} {'remat':6} {'form':11} {titles}")
    results: list[dict[str, Any]] = []
    for stage in args.stages:
        for remat in args.remat:
            group = run_group(work, stages.get_stage(stage), remat, names, args.steps, args.seed)
            results += group
            for result in group:
                _print_row(result)
    for r in ratios(results):
        print(
            f"{r['stage']} remat {r['remat']}: static {r['wall']:.2f}x {r['static_over']}, by CPU time {r['cpu']:.2f}x"
        )
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What the command prints and reports; ``args``: its arguments. Raises ConfigError for those that do not fit."""
    args.preset = args.preset or ("cpu_59m" if jax.default_backend() == "cpu" else "mono_internvl_2b")
    work = _workload(args)
    names, left_out = _usable(args.forms)
    report: dict[str, Any] = {
        "preset": args.preset,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}",
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
        **describe(work, args.stages),
        "left_out": left_out,
        "results": [],
    }
    size = (
        f"{report['parameters'] / 1e6:.1f} M parameters, {work.rows} rows of {work.visual} visual and {work.text} text"
    )
    print(f"{args.preset}: {size} tokens, {work.dtype}; {report['device']}, load {report['load_before']:.1f}")
    for name, tflops in report["step_tflops"].items():
        print(f"{name}: {tflops:.3f} model TFLOP a step")
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    if not args.dry_run:
        report["results"] = measure_all(work, args, names)
    report |= {"ratios": ratios(report["results"]), "load_after": os.getloadavg()[0]}
    return report
