"""Plans as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mono_jax.runs.planning.needs import GIB

SHOWN = 12  # candidates of a search


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A readable summary of a plan, and of the search before it."""
    if "search" in result:
        yield from _ranking(result["search"])
    if "target" in result:
        yield from _plan(result)


def _ranking(search: Mapping[str, Any]) -> Iterator[str]:
    found = search["candidates"]
    fitting = sum(entry["fits"] for entry in found)
    yield (
        f"{len(found)} candidates by arithmetic in {search['seconds']} s, {fitting} of them fit; compiled values in "
        "brackets"
    )
    head = ("data", "fsdp", "tensor", "context", "microbatches", "remat", "row", "rows", "GiB", "step s", "MFU")
    yield "  ".join(f"{name:>12}" for name in head)
    for entry in found[:SHOWN]:
        real, mfu = entry.get("compiled_hbm_bytes"), entry.get("compiled_mfu")
        mesh = entry["mesh"]
        shared = f" {entry['context_parallel']}" if mesh["context"] > 1 else ""
        cells = [
            *(mesh[axis] for axis in ("data", "fsdp", "tensor")),
            f"{mesh['context']}{shared}",
            entry["grad_accum_steps"],
            entry["remat"],
            f"{entry['visual_tokens']}+{entry['text_tokens']}",
            entry["batch_size"],
            f"{entry['hbm_bytes_per_device'] / GIB:.2f}" + (f" ({real / GIB:.2f})" if real else ""),
            f"{entry['step_s']:.3f}",
            f"{entry['roofline_mfu']:.1%}" + (f" ({mfu:.1%})" if mfu else ""),
        ]
        yield "  ".join(f"{cell!s:>12}" for cell in cells)


def _plan(plan: Mapping[str, Any]) -> Iterator[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1 device"
    yield f"{plan['target']}, {plan['devices']} devices: {axes}; {plan['assumptions'][0]}"
    if plan["hbm_bytes_per_device"] is not None:
        limit = "" if plan["hbm_limit"] is None else f" of {plan['hbm_limit'] / GIB:.2f}"
        parts = [f"{plan[key] / GIB:.2f} {key.split('_')[0]}" for key in ("argument_bytes", "temp_bytes") if plan[key]]
        kinds = f" ({', '.join(parts)})" if parts else ""
        fits = "fits" if plan["fits"] else "does not fit"
        yield f"memory   {plan['hbm_bytes_per_device'] / GIB:.2f}{limit} GiB per device{kinds}: {fits}"
    if plan["needs"] is not None:
        yield f"runs     {plan['needs']}"
    if plan["reason"]:
        yield f"refused  {plan['reason']}"
    if plan["pixels_flops"] is not None:
        span = (
            "" if plan["pixels_s"] is None else f", at least {_span(plan['pixels_s'])}, which the time below includes"
        )
        yield f"pixels   tiles made before each step: {plan['pixels_flops'] / 1e12:.3g} TFLOP per device{span}"
    for kind, size in plan["collective_bytes"].items():
        yield f"network  {kind}: {size / 1e9:.3f} GB per device and step"
    if plan["step_s"] is not None:
        yield (
            f"time     at least {_span(plan['step_s'])} per step, bound by {plan['bound']}: compute "
            f"{_span(plan['compute_s'])}, memory {_span(plan['memory_s'])}, collectives {_span(plan['collective_s'])} "
            f"of which {_span(plan['exposed_collective_s'])} exposed"
        )
        days = "" if plan["days_for_stage"] is None else f"; {plan['steps']:,} steps: {plan['days_for_stage']:.1f} days"
        yield (
            f"bound    {plan['roofline_mfu']:.1%} MFU, {plan['tokens_per_step'] / plan['step_s']:,.0f} tokens/s, "
            f"{plan['samples_per_s']:,.0f} samples/s{days}"
        )
    for assumption in plan["assumptions"][1:]:
        yield f"assumed  {assumption}"
    yield f"compiled in {plan['compile_s']} s"


def _span(seconds: float) -> str:
    """0.615 s, 4.2 ms, 28 us."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if seconds >= 0.1 * s), ("us", 1e-6))
    return f"{seconds / size:.3f} s" if unit == "s" else f"{seconds / size:.3g} {unit}"
