"""The program that makes a batch's tiles on the accelerator (``data.pixel_path="device"``) before each step."""

from __future__ import annotations

import jax

from data_pipelines.encoding.crops import Crops
from mono_jax.parallel.crops import tiles_program
from mono_jax.runs.planning.needs import Memory, memory_of
from mono_jax.runs.program import Program
from pallas_kernels.devices import compiled_for


def abstract_crops(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what a batch contains instead of patches; empty for other pixel paths."""
    data, geometry = program.run.data, program.model.config.geometry
    if data.pixel_path != "device" or not data.visual_tokens:
        return {}
    fields = Crops.fields(1, data.visual_tokens, data.crop_size, geometry)
    return program.abstract_fields({name: (array.shape[1:], array.dtype) for name, array in fields.items()})


def compile_tiles(program: Program) -> jax.stages.Compiled | None:
    """The executable, compiled ahead of time; None for other pixel paths. Raises what the compiler raises."""
    if not (crops := abstract_crops(program)):
        return None
    traced = tiles_program(program.mesh).trace(*crops.values(), program.abstract_batch()["patch_cells"])
    return compiled_for(program.mesh.devices.flat[0], traced)


def with_step(step: Memory, tiles: jax.stages.Compiled | None) -> Memory:
    """The memory of a step, during which the next batch's crops and patches are also in memory.

    The temporaries of the two programs never exist at the same time.
    """
    found = None if tiles is None else memory_of(tiles)
    if found is None:
        return step
    held = step.arguments + found.arguments
    return Memory(held, max(step.temporaries, found.temporaries), step.others + found.others)


def flops_of(program: Program) -> float:
    """FLOPs to make the tiles of a device's rows: two matmuls per tile, with three digits each."""
    if not (crops := abstract_crops(program)):
        return 0.0
    shape = crops["crop_pixels"].sharding.shard_shape(crops["crop_pixels"].shape)
    rows, tiles, size = shape[:3]
    tile = program.model.config.geometry.tile_size
    return 3 * rows * tiles * 2.0 * 3 * size * tile * (size + tile)
