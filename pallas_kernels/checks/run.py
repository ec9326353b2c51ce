"""The checks of ``python -m pallas_kernels.check``: values against the oracle, then compiling for absent hardware."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from pallas_kernels.checks import attention, conformance
from pallas_kernels.checks.aot_table import aot_checks
from pallas_kernels.errors import Unavailable, one_line
from pallas_kernels.registry import implementation_class, room

SECONDS = 60.0  # per implementation and dtype
SUITES = {"experts": conformance, "attention": attention}


def check(
    name: str, *, all_masks: bool = False, seconds: float = SECONDS, compile_ahead: bool = True
) -> dict[str, Any]:
    """Everything this machine can check about the implementation ``name``; keys: see ``pallas_kernels.check``."""
    result = {"correct": False, "max_rel_error": None, "compiled_for": [], "skipped": None}
    result |= {"errors": {}, "cases": [], "not_compiled": {}, "failed": [], "compiled": {}}
    try:
        implementation = implementation_class(name)
    except Unavailable as reason:
        return result | {"skipped": str(reason)}
    _check_values(implementation, SUITES[room(name)], all_masks, seconds, result)
    if compile_ahead:
        _check_compilations(name, result)
    return result


def _check_values(
    implementation: type[Any], suite: ModuleType, all_masks: bool, seconds: float, result: dict[str, Any]
) -> None:
    try:
        instance = implementation.here()
    except Unavailable as reason:
        result["skipped"] = str(reason)
        return
    refusals = {}
    for dtype, tolerance in suite.TOLERANCE.items():
        if reason := suite.refusal(instance, dtype):
            refusals[dtype] = reason
            continue
        try:
            cases = suite.runs(instance, dtype, all_masks)
            result["errors"][dtype] = _largest_error(cases, seconds, result["cases"])
        except Exception as error:  # a check reports failures instead of failing itself
            result["failed"].append(f"{dtype}: {one_line(error)}")
            continue
        if not result["errors"][dtype] < tolerance:
            result["failed"].append(f"{dtype}: error {result['errors'][dtype]:.2e}, allowed {tolerance:.0e}")
    if not result["errors"] and not result["failed"]:
        result["skipped"] = "; ".join(f"{dtype}: {reason}" for dtype, reason in refusals.items())
    result["correct"] = bool(result["errors"]) and not result["failed"]
    result["max_rel_error"] = next(iter(result["errors"].values()), None)


def _largest_error(cases: Iterable[tuple[str, Callable[[], float]]], seconds: float, done: list[str]) -> float:
    """Over the cases (label, error); starts no further one after ``seconds``; appends to ``done`` those that ran."""
    start, largest = time.monotonic(), 0.0
    for number, (label, error) in enumerate(cases):
        if number and time.monotonic() - start > seconds:
            break
        largest = max(largest, error())
        done.append(label)
    return largest


def _check_compilations(implementation: str, result: dict[str, Any]) -> None:
    failed_targets = set()
    for target, name, run in aot_checks(implementation):
        if target in result["not_compiled"]:
            continue
        try:
            result["compiled"][f"{target}: {name}"] = dict(run())
        except Unavailable as reason:
            result["not_compiled"][target] = str(reason)
        except Exception as error:  # as above; the compilers raise exceptions of many types
            failed_targets.add(target)
            result["failed"].append(f"{target}: {name}: {one_line(error)}")
    compiled = dict.fromkeys(key.split(":")[0] for key in result["compiled"])
    result["compiled_for"] = [t for t in compiled if t not in failed_targets and t not in result["not_compiled"]]


def host_devices() -> dict[str, str]:
    """{"XLA_FLAGS": ...} with enough simulated devices for Mosaic GPU's interpreter (``MosaicGpu.here``)."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count=8".strip()
    return {"XLA_FLAGS": flags}


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'implementation':<24}{'correct':<9}{'float32':<10}{'bfloat16':<10}compiled for"]
    for name, result in results.items():
        errors = [f"{result['errors'][d]:.1e}" if d in result["errors"] else "-" for d in ("float32", "bfloat16")]
        correct = "-" if result["skipped"] else "yes" if result["correct"] else "NO"
        compiled_for = ", ".join(result["compiled_for"]) or "-"
        lines.append(f"{name:<24}{correct:<9}{errors[0]:<10}{errors[1]:<10}{compiled_for}")
        notes = [f"skipped: {result['skipped']}"] if result["skipped"] else []
        notes += [f"not compiled for {target}: {reason}" for target, reason in result["not_compiled"].items()]
        notes += [f"FAILED: {failure}" for failure in result["failed"]]
        lines += [f"    {note}" for note in notes]
    return "\n".join(lines)


def run(names: Sequence[str], *, all_masks: bool, seconds: float, compile_ahead: bool, as_json: bool) -> int:
    """Checks the implementations, prints the table, and returns the exit status: 1 if anything failed."""
    os.environ |= host_devices()  # XLA reads this when the first array is created
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = check(name, all_masks=all_masks, seconds=seconds, compile_ahead=compile_ahead)
    print(_table(results))
    if as_json:
        print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))
