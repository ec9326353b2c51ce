"""A whole run of the benchmark: what is compared, printed and reported."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax

from experiments.benchmarks.step.forms import FORMS
from experiments.benchmarks.step.measuring import describe, ratios, run_group
from experiments.benchmarks.step.workloads import WORKLOADS, Workload
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.training import stages


def _workload(args: Any) -> Workload:
    if args.preset not in WORKLOADS:
        raise unknown_key("preset", args.preset, WORKLOADS)
    for form in args.forms:
        if form not in FORMS:
            raise unknown_key("form", form, FORMS)
    changes = {
        name: getattr(args, name) for name in ("rows", "visual", "text", "samples") if getattr(args, name) is not None
    }
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
        reason = "it is compared only on a CPU"
    else:
        return list(forms), {}
    return [form for form in forms if form != "torch"], {"torch": reason}


def _print_row(r: dict[str, Any]) -> None:
    mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
    times = f"{r['step_s']:8.3f} {r['best_s']:8.3f} {r['cpu_s']:8.3f} {r['tokens_per_s']:9.0f}"
    print(f"{r['stage']:6} {r['remat']:6} {r['form']:11} {times} {mfu:>6} {r['loss']:9.5f}", flush=True)


def measure_all(work: Workload, args: Any, names: Sequence[str]) -> list[dict[str, Any]]:
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
            f"{r['stage']} remat {r['remat']}: static {r['wall']:.2f}x {r['static_over']}, by CPU time {r['cpu']:.2f}x "
            f"(median of {r['turns']} turns)"
        )
    return results


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the arguments of ``train_step.py`` ask for; returns what ``--json`` prints.

    Raises ConfigError for arguments that cannot be used.
    """
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
        print(f"{name}: {tflops:.3f} model TFLOP per step")
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    if not args.dry_run:
        report["results"] = measure_all(work, args, names)
    report |= {"ratios": ratios(report["results"]), "load_after": os.getloadavg()[0]}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report
