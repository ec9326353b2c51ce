"""What a compiled step runs and needs, on one line."""

from __future__ import annotations

import dataclasses

import jax

from mono_jax.axes import CONTEXT
from mono_jax.runs.program import Program
from mono_jax.training.chips import chip_of
from pallas_kernels.attention import api
from pallas_kernels.attention.contract import Implementation, Problem

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a step runs."""

    arguments: int
    temporaries: int
    others: int  # results that are not aliased to an argument, and the program itself

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.others


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """As planned by the compiler; None if the backend does not report it."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    others = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0) + found.generated_code_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, others)


def needs(program: Program, executable: jax.stages.Compiled) -> str:
    """``attention pallas_tpu 512, experts static, remat full, bfloat16, 2.9 of 15.8 GiB`` (of each device's memory)."""
    execution, slots = program.run.execution, attention_problem(program).queries
    parts = [
        f"attention {kernel(attention(program), slots)}",
        f"experts {execution.experts}",
        f"remat {execution.remat}",
    ]
    parts.append(program.run.dtype)
    memory, limit = memory_of(executable), _limit(program.mesh.devices.flat[0])
    if memory is not None:
        parts.append(f"{memory.total / GIB:.1f} {f'of {limit / GIB:.1f} ' if limit else ''}GiB")
    return ", ".join(parts)


def attention(program: Program) -> Implementation:
    """The implementation that computes the attention of the step's rows on the program's mesh."""
    execution = program.run.execution
    named = None if execution.attention == "auto" else execution.attention
    return api.choose(attention_problem(program), named).with_chunk(execution.attention_chunk)


def attention_problem(program: Program) -> Problem:
    """One call of attention in the step."""
    config, (rows, slots) = program.model.config, program.abstract_batch()["order"].shape
    rows //= program.run.grad_accum_steps
    query, key = (
        jax.ShapeDtypeStruct((rows, slots, heads, config.head_dim), program.dtype)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        return api.describe(query, key, causal=config.causal, ways=ways_of_queries(program))


def ways_of_queries(program: Program) -> int:
    """Number of devices that share the queries of a row; devices that exchange heads have all of them."""
    return 1 if program.run.execution.exchanges_heads else program.mesh.shape[CONTEXT]


def kernel(implementation: Implementation, slots: int) -> str:
    """Its name and, if it has blocks of queries, their size for rows of ``slots``."""
    size = next((getattr(implementation, n) for n in ("block", "block_q", "chunk") if hasattr(implementation, n)), None)
    return implementation.name.rpartition("/")[2] + ("" if size is None else f" {min(size, slots)}")


def _limit(device: jax.Device) -> int | None:
    """Bytes of a device's memory that a program may use, as reported by the device or from the data sheet."""
    try:
        stats = device.memory_stats() or {}
    except (AttributeError, jax.errors.JaxRuntimeError):  # an absent device
        stats = {}
    chip = chip_of(device.device_kind)
    return stats.get("bytes_limit") or (None if chip is None else chip.hbm_bytes)
