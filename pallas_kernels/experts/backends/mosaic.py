"""Grouped expert matmuls for Hopper GPUs in Pallas Mosaic GPU.

Rows are in blocks of 128, and ``block_expert`` [blocks] int32 says which expert a block belongs to: 0 text, 1 visual,
-1 empty. The two experts' weights remain two separate arrays, and the producer picks the one to load block by block, so
nothing is stacked and one launch serves both experts without the wave quantisation of two launches.

Every kernel is the same persistent, warp-specialised loop (``_persistent``): one warpgroup issues TMA copies into a
ring of shared-memory stages, and two warpgroups multiply them with wgmma, 64 rows of the output block each, with
float32 accumulation in registers:

    producer    [load k0][load k1][load k2]...[next block, k0]...          never waits for an epilogue
    consumer 0          [wgmma k0][wgmma k1]...[epilogue, rows  0.. 63][next block, k0]...
    consumer 1                    [wgmma k0][wgmma k1]...[epilogue, rows 64..127][next block, k0]...

Consumer 1 starts a few steps late and stays late, so the epilogue of one runs while the other keeps the tensor cores
busy. An empty block has no steps: the accumulators stay zero and the epilogue writes zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts.contract import Implementation, Pair, Problem
from pallas_kernels.mosaic import interpreted_here, interpreter_params, read_configs, refusal

BLOCK_ROWS = 128
_CONSUMERS = 2
_WG_ROWS = BLOCK_ROWS // _CONSUMERS
_HOPPER_SMS = 132  # H100 SXM and H200
# Registers per thread: 2 * 128 * 232 + 128 * 40 fill the 64 K registers of a multiprocessor.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Config:
    """How one grouped matmul is split into blocks.

    Attributes:
      block_n: output columns of a block, per accumulator.
      block_k: depth of one pipeline stage.
      stages: stages of the shared-memory ring.
      lead: steps by which the first consumer is ahead of the second; the ring allows at most ``stages`` - 1.
      group: blocks of the minor grid dimension that are processed together, so that their operands stay in L2.
      rows_minor: whether the grouped (minor) dimension is the rows or the columns.
      num_sms: persistent programs; None uses the device's number, and 1 in the interpreter.
    """

    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    lead: int = 2
    group: int = 8
    rows_minor: bool = True
    num_sms: int | None = None


class _Block(NamedTuple):
    """One output block."""

    expert: jax.Array
    row: jax.Array
    column: jax.Array


def _fit(config: Config, columns: int) -> Config:
    """The config with ``block_n`` halved until it divides the columns."""
    while columns % config.block_n:
        config = dataclasses.replace(config, block_n=config.block_n // 2)
    return config


def _num_sms(config: Config, interpret: Any) -> int:
    if config.num_sms is not None:
        return config.num_sms
    if interpret:
        return 1  # every program is a separate computation there
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else _HOPPER_SMS  # no GPU: compiling for an absent one


def _smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the 128-byte-swizzled (8 x 128 byte) blocks that TMA and wgmma share."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def _persistent(
    num_blocks: int,
    config: Config,
    *,
    full: Any,
    free: Any,
    ahead: Any,
    accumulators: Sequence[tuple[int, int]],
    plan: Callable[[jax.Array], tuple[Any, jax.Array]],
    load: Callable[[Any, jax.Array, jax.Array, Any], None],
    multiply: Callable[[Sequence[Any], jax.Array, jax.Array], None],
    finish: Callable[[Any, jax.Array, list[jax.Array]], None],
    start: Callable[[Any, jax.Array], None] | None = None,
) -> None:
    """The persistent loop over output blocks; runs inside a kernel with axes "sm" and "wg".

    Args:
      num_blocks: output blocks; program i takes blocks i, i + programs, ...
      config: stages of the ring and lead of the first consumer.
      full: barriers [stages], complete when every copy of a stage has landed.
      free: barriers [stages], complete when both consumers are done with a stage.
      ahead: barrier, complete when the first consumer is ahead.
      accumulators: shape of each float32 accumulator of one consumer.
      plan: linear block number -> (what the callbacks need to know about the block, number of steps).
      load: (block, step, stage, barrier) starts the copies of one step.
      multiply: (accumulators, stage, consumer) issues one wgmma per accumulator.
      finish: (block, consumer, accumulated values) writes the output.
      start: (block, consumer) called before the first product, to start loads for the epilogue.
    """
    consumer_index, stages = lax.axis_index("wg"), config.stages
    lead = min(config.lead, stages - 1)

    def produce() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        @plgpu.nd_loop((num_blocks,), collective_axes="sm", init_carry=jnp.int32(0))
        def total(info: Any, carry: jax.Array) -> jax.Array:
            block, steps = plan(info.index[0])

            def step(k: jax.Array, _: None) -> None:
                stage = lax.rem(carry + k, jnp.int32(stages))

                @pl.when(carry + k >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[stage])

                load(block, k, stage, full.at[stage])

            lax.fori_loop(0, steps, step, None)
            return carry + steps

        @pl.loop(lax.max(total - stages, 0), total)
        def _drain(step: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    def consume() -> None:
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")

        @pl.when(consumer_index == 1)
        def _() -> None:
            plgpu.barrier_wait(ahead)

        @plgpu.nd_loop((num_blocks,), collective_axes="sm", init_carry=jnp.int32(0))
        def total(info: Any, carry: jax.Array) -> jax.Array:
            block, steps = plan(info.index[0])
            if start is not None:
                start(block, consumer_index)

            def accumulate(*accs: Any) -> None:
                def step(k: jax.Array, _: None) -> None:
                    stage = lax.rem(carry + k, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[stage])
                    multiply(accs, stage, consumer_index)
                    plgpu.wgmma_wait(len(accs))  # the previous step's products are done, this step's continue

                    @pl.when((consumer_index == 0) & (carry + k == lead))
                    def _() -> None:
                        plgpu.barrier_arrive(ahead)

                    @pl.when(k > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[lax.rem(carry + k - 1, jnp.int32(stages))])

                lax.fori_loop(0, steps, step, None)
                values = [acc[...] for acc in accs]  # waits for the last products

                @pl.when(steps > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[lax.rem(carry + steps - 1, jnp.int32(stages))])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the memory that the previous block wrote from is free
                finish(block, consumer_index, values)

            pl.run_scoped(accumulate, *(plgpu.ACC(shape, jnp.float32) for shape in accumulators))
            return carry + steps

        @pl.when((consumer_index == 0) & (total <= lead))
        def _() -> None:
            plgpu.barrier_arrive(ahead)  # there were too few steps to get ahead

        plgpu.wait_smem_to_gmem(0)

    lax.cond(consumer_index < _CONSUMERS, consume, produce)


def _write(value: jax.Array, out: Any, staging: Any, row: jax.Array, column: jax.Array, first_slot: int = 0) -> int:
    """Writes ``value`` [64, columns] to ``out[row:, column:]`` through the two slots of ``staging``.

    Returns the next slot.
    """
    slot, width = first_slot, staging.shape[-1]
    for i in range(value.shape[1] // width):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        staging[slot] = value[:, i * width : (i + 1) * width].astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[slot], out.at[pl.ds(row, _WG_ROWS), pl.ds(column + i * width, width)])
        slot = 1 - slot
    return slot


def _staging(dtype: Any) -> Any:
    """Two slots of 64 rows x 128 bytes for each consumer."""
    return _smem((_CONSUMERS, 2, _WG_ROWS, 128 // jnp.dtype(dtype).itemsize), dtype)


def _flip(block: Any, scratch: Any, consumer: jax.Array) -> Any:
    """The transposed view of a shared-memory block. The interpreter has no such view, so there it is a copy."""
    if scratch is None:
        return block.transpose((1, 0))
    scratch[consumer] = block[...].T
    plgpu.commit_smem()  # wgmma and TMA do not see these accesses by themselves
    return scratch.at[consumer]


def _kernel(name: str, body: Callable, out_type: Any, config: Config, interpret: Any) -> Callable:
    body.__name__ = body.__qualname__ = name  # what profilers and compiler logs call the kernel
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(_num_sms(config, interpret),),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter_params() if interpret is True else interpret or None,
    )


# ======================================================================================================================
# Matmuls over grouped rows
# ======================================================================================================================


def _grouped(
    name: str,
    terms: Sequence[tuple[jax.Array, Sequence[Pair]]],
    block_expert: jax.Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    transpose: bool,
    block: int,
    config: Config,
    interpret: Any,
    scratch: Mapping[str, Any],
    finish: Callable[..., None],
    start: Callable[..., None] | None = None,
    extra: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """A kernel that accumulates ``acc_j[block] = sum_i x_i[block] @ w_ij[expert of the block]`` for ``finish``.

    Args:
      name: of the kernel.
      terms: (x_i [M, k], [(text, visual) weight of accumulator j]) for each i, all of the same depth k.
      block_expert: int32 [M / block].
      outputs: shapes and dtypes of the outputs.
      transpose: weights are [n, k] and transposed in the product.
      block: rows per entry of ``block_expert``, a multiple of 128.
      config: block sizes.
      interpret: run in the interpreter (True, or its parameters), on the CPU.
      scratch: shared memory and barriers for the callbacks.
      finish: (refs, block, consumer, values), see ``_persistent``; refs has the scratch by name, "outputs" and "extra".
      start: (refs, block, consumer), called before the first product of a block.
      extra: more inputs for the callbacks.
    """
    dtype, (rows, depth) = terms[0][0].dtype, terms[0][0].shape
    accumulators = len(terms[0][1])
    columns = terms[0][1][0][0].shape[0 if transpose else 1]
    block_n, block_k, stages = config.block_n, config.block_k, config.stages
    grid, steps = (rows // BLOCK_ROWS, columns // block_n), depth // block_k
    w_block = (block_n, block_k) if transpose else (block_k, block_n)

    def body(block_expert: Any, terms: Any, extra: Any, *outputs: Any) -> None:
        def plan(index: jax.Array) -> tuple[_Block, jax.Array]:
            row, column = plgpu.planar_snake(index, grid, 0 if config.rows_minor else 1, config.group)
            expert = block_expert[lax.div(row, jnp.int32(block // BLOCK_ROWS))]
            return _Block(expert, row * BLOCK_ROWS, column * block_n), lax.select(expert >= 0, len(terms) * steps, 0)

        def scoped(x_smem: Any, w_smem: Any, full: Any, free: Any, ahead: Any, flipped: Any, scratch: Any) -> None:
            refs = {**scratch, "outputs": outputs, "extra": extra}

            def load(at: _Block, k: jax.Array, stage: jax.Array, barrier: Any) -> None:
                for i, (x, weights) in enumerate(terms):

                    @pl.when((k >= i * steps) & (k < (i + 1) * steps))
                    def _(x: Any = x, weights: Any = weights, first: int = i * steps) -> None:
                        k_slice, n_slice = pl.ds((k - first) * block_k, block_k), pl.ds(at.column, block_n)
                        plgpu.copy_gmem_to_smem(x.at[pl.ds(at.row, BLOCK_ROWS), k_slice], x_smem.at[stage], barrier)
                        where = (n_slice, k_slice) if transpose else (k_slice, n_slice)
                        for j, pair in enumerate(weights):
                            _load_of_expert(at.expert, pair, where, w_smem.at[stage, j], barrier)

            def multiply(accs: Sequence[Any], stage: jax.Array, consumer: jax.Array) -> None:
                x = x_smem.at[stage, pl.ds(consumer * _WG_ROWS, _WG_ROWS)]
                for j, acc in enumerate(accs):
                    w = w_smem.at[stage, j]
                    plgpu.wgmma(acc, x, _flip(w, flipped, consumer) if transpose else w)

            _persistent(
                grid[0] * grid[1],
                config,
                full=full,
                free=free,
                ahead=ahead,
                accumulators=[(_WG_ROWS, block_n)] * accumulators,
                plan=plan,
                load=load,
                multiply=multiply,
                finish=functools.partial(finish, refs),
                start=None if start is None else functools.partial(start, refs),
            )

        pl.run_scoped(
            scoped,
            x_smem=_smem((stages, BLOCK_ROWS, block_k), dtype),
            w_smem=_smem((stages, accumulators, *w_block), dtype),
            full=plgpu.Barrier(num_arrivals=1 + accumulators, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            ahead=plgpu.Barrier(),
            flipped=plgpu.SMEM((_CONSUMERS, block_k, block_n), dtype) if interpret and transpose else None,
            scratch=dict(scratch),
            collective_axes="wg",
        )

    return _kernel(name, body, tuple(outputs), config, interpret)(block_expert, tuple(terms), tuple(extra))


def _load_of_expert(expert: jax.Array, pair: Any, where: tuple[Any, Any], target: Any, barrier: Any) -> None:
    """Copies one block of the expert's weight: exactly one of the two copies is issued."""
    for number, weight in enumerate(pair):

        @pl.when(expert == number)
        def _(weight: Any = weight) -> None:
            plgpu.copy_gmem_to_smem(weight.at[where], target, barrier)


def grouped_matmul(
    xs: Sequence[jax.Array],
    weights: Sequence[Pair],
    block_expert: jax.Array,
    *,
    transpose: bool = False,
    block: int = BLOCK_ROWS,
    out_dtype: jnp.dtype | None = None,
    config: Config = Config(),
    interpret: Any = False,
) -> jax.Array:
    """``y[block] = sum_i xs[i][block] @ weights[i][expert of the block]``: one x for a matmul, two for dX.

    Args:
      xs: [M, k] each, bfloat16.
      weights: (text, visual) for each x, [k, n], or [n, k] with ``transpose``.
      block_expert: int32 [M / block]; 0 text, 1 visual, -1 empty (zeros are written, x is not read).
      transpose: multiply by the transposed weights.
      block: rows per entry of ``block_expert``, a multiple of 128.
      out_dtype: dtype of the result, that of x by default.
      config: block sizes.
      interpret: run in the interpreter (True, or its parameters), on the CPU.

    Returns:
      [M, n].
    """
    out_dtype = jnp.dtype(out_dtype or xs[0].dtype)
    columns = weights[0][0].shape[0 if transpose else 1]

    def finish(refs: Mapping[str, Any], at: _Block, consumer: jax.Array, values: list[jax.Array]) -> None:
        _write(values[0], refs["outputs"][0], refs["staging"].at[consumer], at.row + consumer * _WG_ROWS, at.column)

    (y,) = _grouped(
        "grouped_matmul",
        [(x, [pair]) for x, pair in zip(xs, weights, strict=True)],
        block_expert,
        [jax.ShapeDtypeStruct((xs[0].shape[0], columns), out_dtype)],
        transpose=transpose,
        block=block,
        config=_fit(config, columns),
        interpret=interpret,
        scratch={"staging": _staging(out_dtype)},
        finish=finish,
    )
    return y


def grouped_swiglu(
    x: jax.Array,
    gates: Pair,
    ups: Pair,
    block_expert: jax.Array,
    *,
    save: bool,
    block: int = BLOCK_ROWS,
    config: Config = Config(block_n=128),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(h, gate, up) of the SwiGLU of each row's expert, h = silu(gate) * up from the float32 sums, in one kernel.

    Args:
      x: [M, d] bfloat16.
      gates: (text, visual) [d, ff].
      ups: (text, visual) [d, ff].
      block_expert: int32 [M / block].
      save: write gate and up too; otherwise they are None.
      block: rows per entry of ``block_expert``, a multiple of 128.
      config: block sizes; ``block_n`` counts columns of gate, and as many of up.
      interpret: run in the interpreter (True, or its parameters), on the CPU.

    Returns:
      [M, ff] each, in the dtype of x.
    """
    columns = gates[0].shape[1]
    out = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)

    def finish(refs: Mapping[str, Any], at: _Block, consumer: jax.Array, values: list[jax.Array]) -> None:
        gate, up = values
        results = [gate * _sigmoid(gate) * up, gate, up]
        slot = 0
        for value, output in zip(results, refs["outputs"]):
            staging = refs["staging"].at[consumer]
            slot = _write(value, output, staging, at.row + consumer * _WG_ROWS, at.column, slot)

    outputs = _grouped(
        "grouped_swiglu",
        [(x, [gates, ups])],
        block_expert,
        [out] * (3 if save else 1),
        transpose=False,
        block=block,
        config=_fit(config, columns),
        interpret=interpret,
        scratch={"staging": _staging(x.dtype)},
        finish=finish,
    )
    return tuple(outputs) if save else (outputs[0], None, None)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def grouped_swiglu_backward(
    dy: jax.Array,
    downs: Pair,
    gate: jax.Array,
    up: jax.Array,
    block_expert: jax.Array,
    *,
    block: int = BLOCK_ROWS,
    config: Config = Config(stages=3),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(h, dgate, dup) in one kernel: dh = dy @ down.T stays in registers, gate and up are read by its epilogue.

    Args:
      dy: [M, d] bfloat16.
      downs: (text, visual) [ff, d].
      gate: [M, ff], as saved by ``grouped_swiglu``.
      up: [M, ff], likewise.
      block_expert: int32 [M / block].
      block: rows per entry of ``block_expert``, a multiple of 128.
      config: block sizes.
      interpret: run in the interpreter (True, or its parameters), on the CPU.

    Returns:
      [M, ff] each, in the dtype of gate. h is computed again rather than kept from the forward pass.
    """
    config = _fit(config, gate.shape[1])
    chunk = 128 // gate.dtype.itemsize
    chunks = config.block_n // chunk

    def window(array: Any, at: _Block, consumer: jax.Array, i: int) -> Any:
        return array.at[pl.ds(at.row + consumer * _WG_ROWS, _WG_ROWS), pl.ds(at.column + i * chunk, chunk)]

    def fetch(refs: Mapping[str, Any], at: _Block, consumer: jax.Array, i: int) -> None:
        for j, saved in enumerate(refs["extra"]):
            target, barrier = refs["slots"].at[consumer, i % 2, j], refs["fetched"].at[2 * consumer + i % 2]
            plgpu.copy_gmem_to_smem(window(saved, at, consumer, i), target, barrier)

    def start(refs: Mapping[str, Any], at: _Block, consumer: jax.Array) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the slots are free
        for i in range(min(2, chunks)):
            fetch(refs, at, consumer, i)

    def finish(refs: Mapping[str, Any], at: _Block, consumer: jax.Array, values: list[jax.Array]) -> None:
        h_out, dgate_out, dup_out = refs["outputs"]
        h_slot = refs["h"].at[consumer]
        for i in range(chunks):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if 1 <= i < chunks - 1:
                fetch(refs, at, consumer, i + 1)  # into the slot that chunk i - 1 was just written from
            gate_slot, up_slot = (refs["slots"].at[consumer, i % 2, j] for j in (0, 1))
            plgpu.barrier_wait(refs["fetched"].at[2 * consumer + i % 2])
            dh = values[0][:, i * chunk : (i + 1) * chunk]
            live = jnp.broadcast_to(at.expert >= 0, dh.shape)  # rows of empty blocks may hold anything, even NaN
            gate, up = (slot[...].astype(jnp.float32) for slot in (gate_slot, up_slot))
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            results = (silu * up, dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu)
            # Results leave through the slots in which their operands arrived.
            for value, slot in zip(results, (h_slot, gate_slot, up_slot)):
                slot[...] = lax.select(live, value, jnp.zeros_like(value)).astype(slot.dtype)
            plgpu.commit_smem()
            for slot, out in ((h_slot, h_out), (gate_slot, dgate_out), (up_slot, dup_out)):
                plgpu.copy_smem_to_gmem(slot, window(out, at, consumer, i))

    return _grouped(
        "grouped_swiglu_backward",
        [(dy, [downs])],
        block_expert,
        [jax.ShapeDtypeStruct(gate.shape, gate.dtype)] * 3,
        transpose=True,
        block=block,
        config=config,
        interpret=interpret,
        scratch={
            "slots": _smem((_CONSUMERS, 2, 2, _WG_ROWS, chunk), gate.dtype),
            "h": _smem((_CONSUMERS, _WG_ROWS, chunk), gate.dtype),
            "fetched": plgpu.Barrier(num_arrivals=2, num_barriers=2 * _CONSUMERS),
        },
        finish=finish,
        start=start,
        extra=(gate, up),
    )


# ======================================================================================================================
# Weight gradients
# ======================================================================================================================


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    block_expert: jax.Array,
    expert: int,
    *,
    block: int = BLOCK_ROWS,
    out_dtype: jnp.dtype = jnp.float32,
    config: Config = Config(),
    interpret: Any = False,
) -> jax.Array:
    """``sum_t x[t].T @ dy[t]`` over the blocks t of one expert; the other expert's blocks are never loaded.

    Args:
      x: [M, k] bfloat16.
      dy: [M, n] bfloat16.
      block_expert: int32 [M / block].
      expert: 0 text, 1 visual.
      block: rows per entry of ``block_expert``, a multiple of 128.
      out_dtype: dtype of the result; sums are float32.
      config: block sizes; ``block_k`` counts rows.
      interpret: run in the interpreter (True, or its parameters), on the CPU.

    Returns:
      [k, n]; zeros if the expert has no block.
    """
    (_, height), columns = x.shape, dy.shape[1]
    config = _fit(config, columns)
    block_n, block_k, stages = config.block_n, config.block_k, config.stages
    grid, parts = (height // BLOCK_ROWS, columns // block_n), block // block_k
    is_ours = block_expert == expert
    our_blocks = jnp.argsort(~is_ours, stable=True).astype(jnp.int32)  # the expert's blocks first
    count = jnp.sum(is_ours, dtype=jnp.int32)[None]

    def body(our_blocks: Any, count: Any, x: Any, dy: Any, out: Any) -> None:
        def plan(index: jax.Array) -> tuple[_Block, jax.Array]:
            row, column = plgpu.planar_snake(index, grid, 0 if config.rows_minor else 1, config.group)
            return _Block(expert, row * BLOCK_ROWS, column * block_n), count[0] * parts

        def scoped(x_smem: Any, dy_smem: Any, staging: Any, full: Any, free: Any, ahead: Any, flipped: Any) -> None:
            def load(at: _Block, k: jax.Array, stage: jax.Array, barrier: Any) -> None:
                first = our_blocks[lax.div(k, jnp.int32(parts))] * block + lax.rem(k, jnp.int32(parts)) * block_k
                k_slice = pl.ds(first, block_k)
                plgpu.copy_gmem_to_smem(x.at[k_slice, pl.ds(at.row, BLOCK_ROWS)], x_smem.at[stage], barrier)
                plgpu.copy_gmem_to_smem(dy.at[k_slice, pl.ds(at.column, block_n)], dy_smem.at[stage], barrier)

            def multiply(accs: Sequence[Any], stage: jax.Array, consumer: jax.Array) -> None:
                ours = x_smem.at[stage, :, pl.ds(consumer * _WG_ROWS, _WG_ROWS)]
                plgpu.wgmma(accs[0], _flip(ours, flipped, consumer), dy_smem.at[stage])

            def finish(at: _Block, consumer: jax.Array, values: list[jax.Array]) -> None:
                _write(values[0], out, staging.at[consumer], at.row + consumer * _WG_ROWS, at.column)

            _persistent(
                grid[0] * grid[1],
                config,
                full=full,
                free=free,
                ahead=ahead,
                accumulators=[(_WG_ROWS, block_n)],
                plan=plan,
                load=load,
                multiply=multiply,
                finish=finish,
            )

        pl.run_scoped(
            scoped,
            x_smem=_smem((stages, block_k, BLOCK_ROWS), x.dtype),
            dy_smem=_smem((stages, block_k, block_n), dy.dtype),
            staging=_staging(out.dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            ahead=plgpu.Barrier(),
            flipped=plgpu.SMEM((_CONSUMERS, _WG_ROWS, block_k), x.dtype) if interpret else None,
            collective_axes="wg",
        )

    out_type = jax.ShapeDtypeStruct((height, columns), out_dtype)
    return _kernel("weight_gradient", body, out_type, config, interpret)(our_blocks, count, x, dy)


# ======================================================================================================================
# The implementation
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class MosaicGpu(Implementation):
    """The kernels above as an implementation; fields are block sizes. A ``Config`` may be given as a dict (from JSON).

    Attributes:
      product: block sizes of ``matmul`` and ``swiglu_dx``.
      gate_up: block sizes of ``swiglu``; its ``block_n`` counts columns of gate, and as many of up.
      backward: block sizes of ``swiglu_backward``, whose epilogue needs the shared memory of a fourth stage.
      gradient: block sizes of ``weight_gradient``; ``block_k`` counts rows.
      interpret: run in the interpreter, on the CPU; True, or its parameters (race detection).
    """

    name: ClassVar[str] = "mosaic_gpu"
    granularity: ClassVar[tuple[int, int]] = (BLOCK_ROWS, 128)

    product: Config = Config()
    gate_up: Config = Config(block_n=128)
    backward: Config = Config(stages=3)
    gradient: Config = Config()
    interpret: Any = False

    def __post_init__(self) -> None:
        read_configs(self)

    def unsupported(self, problem: Problem) -> str | None:
        if reason := refusal(problem, self.interpret):
            return reason
        if problem.block % BLOCK_ROWS:
            return f"blocks of {problem.block} rows: not a multiple of {BLOCK_ROWS}"
        if problem.d % 128 or problem.ff % 128:
            return f"widths {problem.d} and {problem.ff} are not both multiples of 128"
        return None

    @classmethod
    def here(cls) -> Self:
        if not interpreted_here(_CONSUMERS + 1):
            return cls()
        small = Config(block_n=128, stages=2)
        return cls(small, small, small, small, interpret=True)

    @classmethod
    def tuning_space(cls, op: str) -> dict[str, list[dict[str, Any]]]:
        walks = [{"group": 4}, {"group": 16}, {"rows_minor": False}]
        leads = [{"lead": lead} for lead in (0, 1, 3)]
        # Narrower blocks write out fewer sums at a time and leave room for more stages.
        space = {
            "gate_up": [*walks, *leads, {"block_n": 64, "stages": 6}],
            "product": [*walks, *leads, {"block_n": 128, "stages": 6}],
            "backward": [*walks, {"lead": 0}, {"lead": 1}, {"block_n": 128, "stages": 4}],
            "gradient": [*walks, *leads, {"block_n": 128, "stages": 6}],
        }
        return space if op == "ffn" else {field: space[field] for field in ("product", "gradient")}

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        return grouped_matmul(
            [x],
            [weights],
            block_expert,
            transpose=transpose,
            block=block,
            out_dtype=out_dtype,
            config=self.product,
            interpret=self.interpret,
        )

    def swiglu(self, x, block_expert, gates, ups, *, block, save, rows=None):
        return grouped_swiglu(
            x, gates, ups, block_expert, save=save, block=block, config=self.gate_up, interpret=self.interpret
        )

    def swiglu_backward(self, dy, block_expert, downs, gate, up, *, block):
        return grouped_swiglu_backward(
            dy, downs, gate, up, block_expert, block=block, config=self.backward, interpret=self.interpret
        )

    def swiglu_dx(self, dgate, dup, block_expert, gates, ups, *, block):
        return grouped_matmul(
            [dgate, dup],
            [gates, ups],
            block_expert,
            transpose=True,
            block=block,
            config=self.product,
            interpret=self.interpret,
        )

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        return weight_gradient(
            x,
            dy,
            block_expert,
            expert,
            block=block,
            out_dtype=out_dtype,
            config=self.gradient,
            interpret=self.interpret,
        )
