"""What ``python -m pallas_kernels.check`` does: values against the oracle, then compilations for absent hardware."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.checks.aot_table import aot_checks
from pallas_kernels.checks.conformance import TOLERANCE, Case, errors, masks
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.contract import Implementation
from pallas_kernels.registry import implementation_class

QUICK_MASKS = ("padding_among_rows", "all_visual", "unaligned_runs", "alternating", "empty")  # most telling first
SECONDS = 60.0  # per implementation and dtype


def check(
    name: str, mask_names: tuple[str, ...] = QUICK_MASKS, *, seconds: float = SECONDS, compile_ahead: bool = True
) -> dict[str, Any]:
    """Everything this machine can find out about the implementation ``name``; the keys are in
    ``pallas_kernels.check``.
    """
    result = {"correct": False, "max_rel_error": None, "compiled_for": [], "skipped": None}
    result |= {"errors": {}, "cases": [], "not_compiled": {}, "failed": [], "compiled": {}}
    try:
        implementation = implementation_class(name)
    except Unavailable as reason:
        return result | {"skipped": str(reason)}
    _check_values(implementation, mask_names, seconds, result)
    if compile_ahead:
        _check_compilations(name, result)
    return result


def _check_values(
    implementation: type[Implementation], mask_names: tuple[str, ...], seconds: float, result: dict[str, Any]
) -> None:
    try:
        instance = implementation.here()
    except Unavailable as reason:
        result["skipped"] = str(reason)
        return
    refusals = {}
    for dtype in TOLERANCE:
        case = Case.fitting(implementation, mask_names[0], dtype)
        if reason := instance.at_boundary(0).unsupported(case.problem("ffn")):
            refusals[dtype] = reason
            continue
        try:
            result["errors"][dtype] = _largest_error(instance, mask_names, dtype, seconds, result["cases"])
        except Exception as error:  # a check reports what breaks, it does not break itself
            result["failed"].append(f"{dtype}: {_one_line(error)}")
            continue
        if not result["errors"][dtype] < TOLERANCE[dtype]:
            result["failed"].append(f"{dtype}: error {result['errors'][dtype]:.2e}, allowed {TOLERANCE[dtype]:.0e}")
    if not result["errors"] and not result["failed"]:
        result["skipped"] = "; ".join(f"{dtype}: {reason}" for dtype, reason in refusals.items())
    result["correct"] = bool(result["errors"]) and not result["failed"]
    result["max_rel_error"] = next(iter(result["errors"].values()), None)


def _largest_error(
    instance: Implementation, mask_names: tuple[str, ...], dtype: str, seconds: float, done: list[str]
) -> float:
    """Over the FFN, the matmul and the unsorted form; starts no case after ``seconds`` and appends to ``done`` what
    ran.
    """
    start, largest = time.monotonic(), 0.0
    cases = [("ffn", mask_names[0]), ("matmul", mask_names[0])]
    if instance.at_boundary(0) == instance:  # a static split cannot take rows as they come
        cases.append(("unsorted", mask_names[0]))
    cases += [("ffn", mask_name) for mask_name in mask_names[1:]]
    for number, (form, mask_name) in enumerate(cases):
        if number and time.monotonic() - start > seconds:
            break
        largest = max(largest, *errors(instance, Case.fitting(type(instance), mask_name, dtype), form).values())
        done.append(f"{form} {mask_name} {dtype}")
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
        except Exception as error:  # as above: the compilers raise all kinds
            failed_targets.add(target)
            result["failed"].append(f"{target}: {name}: {_one_line(error)}")
    compiled = dict.fromkeys(key.split(":")[0] for key in result["compiled"])
    result["compiled_for"] = [t for t in compiled if t not in failed_targets and t not in result["not_compiled"]]


def host_devices() -> dict[str, str]:
    """{"XLA_FLAGS": ...}: at least as many simulated devices as Mosaic GPU's interpreter needs (``MosaicGpu.here``)."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count=8".strip()
    return {"XLA_FLAGS": flags}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'implementation':<16}{'correct':<9}{'float32':<10}{'bfloat16':<10}compiled for"]
    for name, result in results.items():
        errors = [f"{result['errors'][d]:.1e}" if d in result["errors"] else "-" for d in ("float32", "bfloat16")]
        correct = "-" if result["skipped"] else "yes" if result["correct"] else "NO"
        compiled_for = ", ".join(result["compiled_for"]) or "-"
        lines.append(f"{name:<16}{correct:<9}{errors[0]:<10}{errors[1]:<10}{compiled_for}")
        notes = [f"skipped: {result['skipped']}"] if result["skipped"] else []
        notes += [f"not compiled for {target}: {reason}" for target, reason in result["not_compiled"].items()]
        notes += [f"FAILED: {failure}" for failure in result["failed"]]
        lines += [f"    {note}" for note in notes]
    return "\n".join(lines)


def run(names: Sequence[str], *, all_masks: bool, seconds: float, compile_ahead: bool, as_json: bool) -> int:
    """Checks the implementations, prints the table, and returns the exit status: 1 if anything failed."""
    os.environ |= host_devices()  # XLA reads this when the first array is made
    mask_names = tuple(masks(8, 4)) if all_masks else QUICK_MASKS
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = check(name, mask_names, seconds=seconds, compile_ahead=compile_ahead)
    print(_table(results))
    if as_json:
        print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))
