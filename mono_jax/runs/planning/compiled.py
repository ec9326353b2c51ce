"""A run's own step compiled for a target, and what the compiled program says about memory, work and time."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import jax

from mono_jax.hlo import roofline
from mono_jax.hlo.roofline import Machine, Totals
from mono_jax.runs.planning import pixels
from mono_jax.runs.planning.kernels import AttentionWork
from mono_jax.runs.planning.needs import GIB, memory_of, needs
from mono_jax.runs.planning.targets import Target, collective_seconds
from mono_jax.runs.planning.workload import Workload
from mono_jax.runs.program import Program
from pallas_kernels.devices import device_key

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DAY = 86400.0


def plan(program: Program, target: Target, work: Workload) -> dict[str, Any]:
    """The plan of ``program`` on ``target``: what ``experiments/plan.py --json`` prints.

    A step that does not compile is also a result: ``fits`` is false and ``reason`` is the compiler's message.
    """
    start = time.perf_counter()
    try:
        compiled, tiles = program.compile_step(), pixels.compile_tiles(program)
    except jax.errors.JaxRuntimeError as error:
        return _frame(program, target, work) | _refused(str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, limit = memory_of(compiled), None if target.chip is None else target.chip.hbm_bytes
    result = _frame(program, target, work) | {"needs": needs(program, compiled)}
    result |= _time_of(program, target, work, compiled, tiles)
    if memory is not None:
        memory = pixels.with_step(memory, tiles)
        fits = limit is None or memory.total <= limit
        result |= {
            "fits": fits,
            "hbm_bytes_per_device": memory.total,
            "argument_bytes": memory.arguments,
            "temp_bytes": memory.temporaries,
            "reason": None if fits else f"{memory.total / GIB:.2f} GiB per device, {limit / GIB:.2f} available",
        }
    return result | {"compile_s": round(seconds, 1)}


def _frame(program: Program, target: Target, work: Workload) -> dict[str, Any]:
    """All keys of a plan, with what is known before anything is compiled."""
    return {
        "target": target.name,
        "devices": len(target.devices),
        "mesh": dict(program.mesh.shape),
        "fits": None,
        "hbm_bytes_per_device": None,
        "hbm_limit": None if target.chip is None else target.chip.hbm_bytes,
        "argument_bytes": None,
        "temp_bytes": None,
        "flops_per_step": work.flops,
        "collective_bytes": {},
        "compute_s": None,
        "memory_s": None,
        "collective_s": None,
        "exposed_collective_s": None,
        "bound": None,
        "roofline_mfu": None,
        "tokens_per_step": work.rows * work.slots,
        "samples_per_s": None,
        "days_for_stage": None,
        "compile_s": None,
        "reason": None,
        "needs": None,
        "step_s": None,
        "pixels_flops": None,
        "pixels_s": None,
        "steps": program.steps,
        "samples_per_row": work.samples,
        "assumptions": [work.assumption],
    }


def _refused(message: str, seconds: float) -> dict[str, Any]:
    """The keys for a step that the compiler rejects."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    needed = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT])", message)
    return {
        "fits": False,
        "reason": " ".join(lines[:2])[:400],
        "hbm_bytes_per_device": int(float(needed[1]) * _UNITS[needed[2]]) if needed else None,
        "compile_s": round(seconds, 1),
    }


def _time_of(
    program: Program,
    target: Target,
    work: Workload,
    compiled: jax.stages.Compiled,
    tiles: jax.stages.Compiled | None,
) -> dict[str, Any]:
    """``_time``, or why it is missing: a newer libtpu may write programs that an older jaxlib cannot read."""
    try:
        text, before = compiled.as_text(), None if tiles is None else tiles.as_text()
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0][:200]
        unread = f"traffic and times are unknown: this jaxlib cannot read the compiler's program ({why})"
        return {"assumptions": [work.assumption, unread]}
    return _time(program, target, work, text, before)


def _time(program: Program, target: Target, work: Workload, text: str, before: str | None) -> dict[str, Any]:
    """The keys derived from the compiled program's text: always traffic, and times if the chip is known.

    ``before``: the text of the program that makes the tiles before each step.
    """
    chip = target.chip
    known = chip is not None and chip.hbm_bandwidth is not None
    machine = Machine(
        chip.peak if known else float("inf"),
        chip.hbm_bandwidth if known else float("inf"),
        lambda collective: collective_seconds(target, program.mesh, collective),
        chip.products if known else 1.0,
    )
    kernels = AttentionWork.of(program, work, device_key(target.devices[0]))
    totals = roofline.totals(text, machine, functools.partial(kernels.kernels, program))
    making: dict[str, Any] = {}
    if before is not None:
        tiles = roofline.totals(before, machine)
        totals.add(tiles, 1)
        making = {"pixels_flops": tiles.flops, "pixels_s": tiles.seconds if known else None}
    traffic: dict[str, float] = {}
    for (kind, _), (_, size) in sorted(totals.collectives.items()):
        traffic[kind] = traffic.get(kind, 0.0) + size
    result = {"collective_bytes": traffic, "assumptions": [work.assumption, *_assumptions(totals)]} | making
    if not known or not totals.seconds:
        return result
    parts = {
        "compute": totals.compute_s,
        "memory": totals.memory_s,
        "collectives": totals.exposed_collective_s,
    }
    return result | {
        "compute_s": totals.compute_s,
        "memory_s": totals.memory_s,
        "collective_s": totals.collective_s,
        "exposed_collective_s": totals.exposed_collective_s,
        "bound": max(parts, key=parts.get),
        "roofline_mfu": work.flops / (totals.seconds * len(target.devices) * chip.peak),
        "step_s": totals.seconds,
        "samples_per_s": work.rows * work.samples / totals.seconds,
        "days_for_stage": program.steps * totals.seconds / DAY,
    }


def _assumptions(totals: Totals) -> list[str]:
    found = []
    if totals.unknown_loops:
        found.append(f"loops with data-dependent trip counts count once: {', '.join(totals.unknown_loops)}")
    if totals.silent_kernels:
        found.append(f"kernels whose work is unknown count as zero: {', '.join(totals.silent_kernels)}")
    return found
