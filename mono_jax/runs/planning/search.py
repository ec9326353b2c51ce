"""Ranks meshes, microbatches, remat policies and row lengths by arithmetic, and compiles the best few."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from mono_jax.errors import ConfigError
from mono_jax.models.execution import Execution
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.runs.config import RunConfig
from mono_jax.runs.planning import arithmetic, compiled
from mono_jax.runs.planning.targets import Target
from mono_jax.runs.planning.workload import workload
from mono_jax.runs.program import Program, key_heads_of_device

LENGTHS = (4096, 8192, 11_264, 16_384, 32_768)  # slots of a row, multiples of 1,024 as the kernels need
SHARED_FROM = 32_768  # smallest row, in slots, that several devices may share; shorter rows fit on one
LANES = 128  # each device gets a multiple of this number of shared slots, as the kernels need


def search(
    run: RunConfig,
    target: Target,
    samples_per_row: float | None,
    compile_best: int,
    batch_samples: float | None = None,
) -> dict[str, Any]:
    """The plan of the best candidate, with {"candidates", "compiled", "seconds"} under "search".

    Candidates have as many slots as the run's batch, as closely as whole rows allow; with ``batch_samples``, enough
    rows of the run's own length to hold this number of samples. Raises ConfigError if no candidate is possible.
    """
    if target.chip is None or target.chip.hbm_bandwidth is None:
        raise ConfigError(f"--search: the speed of {target.name} is unknown: name a TPU, an H100 or an H200")
    start = time.perf_counter()
    program = _program(run, target)
    sums = arithmetic.Arithmetic(program, target)
    samples = None if samples_per_row is None else samples_per_row / workload(program).slots
    sizes = list(_rows(program.run))
    if batch_samples is not None:
        visual, text, _ = sizes[0]
        sizes = [(visual, text, round(batch_samples / workload(program, samples_per_row).samples))]
    found = [_sized(sums, candidate, samples) for candidate in _candidates(program, target, sizes)]
    found.sort(key=_rank)
    if not found:
        raise ConfigError(
            f"--search: data.batch_size {program.run.data.batch_size} is not divisible by any mesh of {target.name}"
        )
    seconds = time.perf_counter() - start
    plans = []
    for entry in found[:compile_best]:
        chosen = _with(program, target, entry)
        plan = compiled.plan(chosen, target, workload(chosen, entry["samples_per_row"]))
        entry["compiled_hbm_bytes"], entry["compiled_mfu"] = plan["hbm_bytes_per_device"], plan["roofline_mfu"]
        plans.append(plan)
    good = [plan for plan in plans if plan["fits"]] or plans
    best = max(good, key=lambda plan: plan["roofline_mfu"] or 0.0) if good else {}
    return best | {"search": {"seconds": round(seconds, 1), "candidates": found, "compiled": plans}}


def _rank(entry: Mapping[str, Any]) -> tuple[bool, bool, float, int]:
    """The fastest candidate that fits comes first; among those that arithmetic rates equal, the one with the least
    memory.

    "offload" comes after the other fitting candidates, because the cost of its traffic with the host is not counted.
    """
    fits, speed = entry["fits"], round(entry["roofline_mfu"], 3)
    return not fits, entry["remat"] == "offload", -speed, entry["hbm_bytes_per_device"]


def _program(run: RunConfig, target: Target) -> Program:
    """``run``'s program, whether or not its own mesh and batch suit the target."""
    rows = dataclasses.replace(run.data, batch_size=len(target.devices))
    neutral = dataclasses.replace(run, data=rows, mesh=MeshConfig(), grad_accum_steps=1)
    return dataclasses.replace(Program.build(neutral, run.steps or 1, devices=target.devices), run=run)


def _candidates(program: Program, target: Target, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Program]:
    on_device = program.run.data.pixel_path == "device"  # only for rows that devices do not share
    for mesh in _meshes(len(target.devices), program):
        sharded = dataclasses.replace(program, mesh=make_mesh(mesh, list(target.devices)))
        for visual, text, rows in sizes:
            if mesh.context > 1 and (on_device or not _may_share(visual, text, mesh.context)):
                continue
            ways = mesh.data * mesh.fsdp
            rows = max(round(rows / ways), 1) * ways
            for parts in _divisors(rows // ways, most=64):
                for remat, shared in itertools.product(_policies(), _ways_to_share(program, mesh)):
                    yield _changed(sharded, mesh, visual, text, rows, parts, remat, shared)


def _changed(
    program: Program, mesh: MeshConfig, visual: int, text: int, rows: int, parts: int, remat: str, shared: str
) -> Program:
    """``program`` with another run; it keeps the old model, which the arithmetic does not use."""
    run = program.run
    data = dataclasses.replace(run.data, visual_tokens=visual, text_tokens=text, batch_size=rows)
    execution = dataclasses.replace(run.execution, remat=remat, context_parallel=shared)
    run = dataclasses.replace(run, data=data, execution=execution, mesh=mesh, grad_accum_steps=parts)
    return dataclasses.replace(program, run=run)


def _with(program: Program, target: Target, entry: dict[str, Any]) -> Program:
    """The complete program of a candidate."""
    mesh = MeshConfig(**entry["mesh"])
    sharded = dataclasses.replace(program, mesh=make_mesh(mesh, list(target.devices)))
    keys = ("visual_tokens", "text_tokens", "batch_size", "grad_accum_steps", "remat", "context_parallel")
    changed = _changed(sharded, mesh, *(entry[key] for key in keys))
    model = Model(program.model.config, changed.run.execution, program.model.adapters)
    return dataclasses.replace(changed, model=model)


def _meshes(devices: int, program: Program) -> Iterator[MeshConfig]:
    """data x fsdp x context x tensor; tensor divides the key heads, fsdp and context the width.

    These two leave each device at least 64 rows of the width: with fewer, XLA:TPU pads heavily and all-reduces
    gradients instead of reduce-scattering them.
    """
    config = program.model.config
    most = max(config.hidden_size // 64, 16)
    for tensor, context in itertools.product(_divisors(config.num_key_value_heads, most=8), (1, 2, 4, 8)):
        inner = tensor * context
        for fsdp in _divisors(devices // inner, most // context) if devices % inner == 0 else ():
            if config.hidden_size % (fsdp * context) == 0:
                yield MeshConfig(data=devices // inner // fsdp, fsdp=fsdp, tensor=tensor, context=context)


def _ways_to_share(program: Program, mesh: MeshConfig) -> Sequence[str]:
    """Values of ``execution.context_parallel``: the run's own if no row is shared, otherwise those that its heads
    allow."""
    if mesh.context == 1:
        return (program.run.execution.context_parallel,)
    divides = key_heads_of_device(program.model.config, mesh.tensor) % mesh.context == 0
    return ("all_gather", "ulysses") if divides else ("all_gather",)


def _may_share(visual: int, text: int, ways: int) -> bool:
    slots = visual + text
    return slots >= SHARED_FROM and not (visual % (2 * ways) or text % (2 * ways) or slots % (LANES * ways))


def _rows(run: RunConfig) -> Iterator[tuple[int, int, int]]:
    """(visual, text, rows): the config's own rows, and longer and shorter ones with the same number of slots per
    batch."""
    data = run.data
    slots = data.visual_tokens + data.text_tokens
    yield data.visual_tokens, data.text_tokens, data.batch_size
    if data.visual_tokens == 0 or data.boundary_block:
        return
    for length in LENGTHS:
        text = max(round(length * data.text_tokens / slots / 128) * 128, 128)
        rows = data.batch_size * slots / length
        if length != slots and rows >= 1 and length >= slots / 4:
            yield length - text, text, round(rows)


def _policies() -> list[str]:
    """Values of ``execution.remat``; two that keep the same values here count as one."""
    named = get_args(get_type_hints(Execution)["remat"])
    return [name for name in arithmetic.POLICIES if name in named and name != "dots_no_batch"]


def _divisors(number: int, most: int) -> Sequence[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _sized(sums: arithmetic.Arithmetic, program: Program, samples: float | None) -> dict[str, Any]:
    """One line of the ranking; ``samples``: per slot."""
    run, target = program.run, sums.target
    slots = run.data.visual_tokens + run.data.text_tokens
    work = workload(program, None if samples is None else samples * slots)
    found = sums.estimate(program, work)
    seconds = found.step_s
    return {
        "mesh": dataclasses.asdict(run.mesh),
        "grad_accum_steps": run.grad_accum_steps,
        "remat": run.execution.remat,
        "context_parallel": run.execution.context_parallel,
        "visual_tokens": run.data.visual_tokens,
        "text_tokens": run.data.text_tokens,
        "batch_size": run.data.batch_size,
        "samples_per_row": work.samples,
        "hbm_bytes_per_device": int(found.memory),
        "fits": found.memory <= target.chip.hbm_bytes,
        "step_s": seconds,
        "compute_s": found.compute_s,
        "memory_s": found.memory_s,
        "collective_s": found.collective_s,
        "roofline_mfu": work.flops / (seconds * len(target.devices) * target.chip.peak),
        "samples_per_s": work.rows * work.samples / seconds,
    }
