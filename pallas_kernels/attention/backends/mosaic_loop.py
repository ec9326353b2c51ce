"""Packed attention for Hopper GPUs in Pallas Mosaic GPU: the forward pass and the two halves of the backward pass.

Each query sees the keys first .. last (``contract``), so a block of queries has to visit only a run of key blocks, and
a block of keys only a run of query blocks (``spans``). The three kernels share one loop (``tile_kernel``). A program
owns a tile of 128 rows, 64 for each of two consumer warpgroups, and iterates over its run; a producer warpgroup loads
the blocks by TMA, through rings of shared-memory stages:

    kernel       owns                 iterates over               products of a step
    forward      queries              keys                        s = q k', o += p v
    dq           queries              keys                        s = q k', dp = do v', dq += ds k
    dk and dv    keys of a KV head    queries of all its heads    s' = k q', dp' = v do', dv += p' do, dk += ds' q

    producer      [k0][v0][k1][v1]...                          waits only for a free stage
    consumer 0    [s][softmax][o]  [s][softmax][o]...          rows  0 ..  63 of the tile
    consumer 1       [s][softmax][o]  [s][softmax][o]...       rows 64 .. 127

Only the blocks at the ends of a run are masked. Sums are float32 and stay in registers; p and ds are rounded to the
dtype of the inputs. The gradients of all query heads that share a KV head are summed in order, without atomics, so
that results do not depend on scheduling. The cost is that scores are computed twice in the backward pass (7 products
instead of 5).

The algorithm is that of FlashAttention-2 (arXiv 2307.08691), the division of labour that of FlashAttention-3 (arXiv
2407.08608).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.spans import Spans
from pallas_kernels.mosaic import interpreter_params

_CONSUMERS = 2
WARPGROUPS = _CONSUMERS + 1
WG_ROWS = 64
TILE = _CONSUMERS * WG_ROWS  # rows that a program owns; queries and keys come in multiples of it
# Registers per thread: 2 * 128 * 232 + 128 * 40 fill the 64 K registers of a multiprocessor.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
LOG2E = math.log2(math.e)  # exponentials are powers of two: one instruction
NO_MAXIMUM = -1e30  # below all scores, and finite: a block without visible keys must not produce inf - inf


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel iterates: ``block`` rows per step (a divisor of 128), through a ring of ``stages`` stages."""

    block: int = 128
    stages: int = 2


class Walk(NamedTuple):
    """What the callbacks of a kernel know about the program and the consumer they run for.

    Attributes:
      own: shared memory of this consumer's own rows, by operand name.
      ring: shared memory of the blocks iterated over, [stages, ...] each.
      first_row: index of the consumer's first own row.
      wait: (group of the ring, slot): waits until its copies have landed.
      release: (group of the ring, slot): lets the producer fill it again.
    """

    own: Mapping[str, Any]
    ring: Mapping[str, Any]
    first_row: jax.Array
    wait: Callable[[int, jax.Array], None]
    release: Callable[[int, jax.Array], None]


def _window(ref: Any, b: jax.Array, rows: Any, head: jax.Array) -> Any:
    """Rows of one head, from [B, S, heads, D], [B, heads, S] or [B, S]."""
    return ref.at[{4: (b, rows, head), 3: (b, head, rows), 2: (b, rows)}[len(ref.shape)]]


def _smem(copies: int, rows: int, array: jax.ShapeDtypeStruct) -> Any:
    """Shared memory for ``copies`` windows; matrices in the swizzled blocks that TMA and wgmma share."""
    if array.ndim < 4:
        return plgpu.SMEM((copies, rows), array.dtype)
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((copies, rows, array.shape[-1]), array.dtype, transforms=transforms)


def tile_kernel(
    name: str,
    *,
    own: Mapping[str, jax.Array],
    ring: Sequence[Mapping[str, jax.Array]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, str]],
    spans: Spans,
    heads: int,
    own_head: Callable[[jax.Array], jax.Array],
    ring_head: Callable[[jax.Array, jax.Array], jax.Array],
    repeats: int,
    config: Config,
    init: Callable[[], Any],
    step: Callable[[Walk, jax.Array, jax.Array, Any, bool], Any],
    finish: Callable[[Walk, Any], None],
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The loop of all kernels; one program for each row of the batch, head and tile.

    Args:
      name: of the kernel.
      own: arrays of which a consumer keeps its 64 rows in shared memory.
      ring: arrays that are iterated over, in groups with separate barriers.
      outputs: (shape and dtype, name of the shared memory it is written from) of each output.
      spans: blocks that each tile iterates over, [B, tiles].
      heads: heads of the grid.
      own_head: head of the grid -> head of own arrays and outputs.
      ring_head: (head of the grid, repeat) -> head of the ring's arrays.
      repeats: number of passes over the run.
      config: rows and stages of the ring.
      init: -> the initial value of what is carried from step to step.
      step: (walk, block, slot of the ring, carried, whether to mask) -> carried.
      finish: (walk, carried) writes the results into the shared memory of the outputs.
      interpret: run in the interpreter: True, or its parameters.
    """
    block, stages, spans = config.block, config.stages, jnp.stack(spans, axis=-1)
    names, arrays = list(outputs), {n: a for group in ring for n, a in group.items()}
    private = {n: shape for n, (shape, source) in outputs.items() if source == n}

    def body(spans: Any, own_refs: Any, ring_refs: Any, *out_refs: Any) -> None:
        b, tile, head = (lax.axis_index(axis) for axis in ("batch", "tile", "heads"))
        start, full_start, full_stop, stop = (spans[b, tile, n] for n in range(4))
        steps = stop - start

        def slot_of(repeat: jax.Array, at: jax.Array) -> jax.Array:
            return lax.rem(repeat * steps + at - start, jnp.int32(stages))

        def scoped(own_smem: Any, ring_smem: Any, landed: Any, full: Any, free: Any) -> None:
            def produce() -> None:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

                @pl.loop(0, repeats * steps)
                def _(count: jax.Array) -> None:
                    repeat, slot = lax.div(count, steps), lax.rem(count, jnp.int32(stages))
                    rows = pl.ds((start + lax.rem(count, steps)) * block, block)
                    for group, barrier, freed in zip(ring, full, free):

                        @pl.when(count >= stages)
                        def _(freed: Any = freed) -> None:
                            plgpu.barrier_wait(freed.at[slot])

                        for n in group:
                            window = _window(ring_refs[n], b, rows, ring_head(head, repeat))
                            plgpu.copy_gmem_to_smem(window, ring_smem[n].at[slot], barrier.at[slot])

                @pl.loop(lax.max(repeats * steps - stages, 0), repeats * steps)
                def _drain(count: jax.Array) -> None:
                    for freed in free:
                        plgpu.barrier_wait(freed.at[lax.rem(count, jnp.int32(stages))])

            def consume() -> None:
                plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
                consumer = lax.axis_index("wg")
                walk = Walk(
                    {n: ref.at[consumer] for n, ref in own_smem.items()},
                    ring_smem,
                    tile * TILE + consumer * WG_ROWS,
                    lambda group, slot: plgpu.barrier_wait(full[group].at[slot]),
                    lambda group, slot: plgpu.barrier_arrive(free[group].at[slot]),
                )
                rows = pl.ds(walk.first_row, WG_ROWS)
                for n, ref in own_refs.items():
                    window = _window(ref, b, rows, own_head(head))
                    plgpu.copy_gmem_to_smem(window, walk.own[n], landed.at[consumer])
                plgpu.barrier_wait(landed.at[consumer])

                def once(repeat: jax.Array, carried: Any) -> Any:
                    def one(mask: bool, at: jax.Array, carried: Any) -> Any:
                        return step(walk, at, slot_of(repeat, at), carried, mask)

                    carried = lax.fori_loop(start, full_start, functools.partial(one, True), carried)
                    carried = lax.fori_loop(full_start, full_stop, functools.partial(one, False), carried)
                    return lax.fori_loop(full_stop, stop, functools.partial(one, True), carried)

                carried = init()
                finish(walk, once(jnp.int32(0), carried) if repeats == 1 else lax.fori_loop(0, repeats, once, carried))
                plgpu.commit_smem()
                for n, ref in zip(names, out_refs):
                    plgpu.copy_smem_to_gmem(walk.own[outputs[n][1]], _window(ref, b, rows, own_head(head)))
                plgpu.wait_smem_to_gmem(0)

            lax.cond(lax.axis_index("wg") < _CONSUMERS, consume, produce)

        pl.run_scoped(
            scoped,
            own_smem={n: _smem(_CONSUMERS, WG_ROWS, a) for n, a in {**own, **private}.items()},
            ring_smem={n: _smem(stages, block, a) for n, a in arrays.items()},
            landed=plgpu.Barrier(num_arrivals=len(own), num_barriers=_CONSUMERS),
            full=[plgpu.Barrier(num_arrivals=len(group), num_barriers=stages) for group in ring],
            free=[plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages) for _ in ring],
            collective_axes="wg",
        )

    body.__name__ = body.__qualname__ = name  # what profilers and compiler logs call the kernel
    batch, tiles = spans.shape[:2]
    return plgpu.kernel(
        body,
        out_type=tuple(shape for shape, _ in outputs.values()),
        grid=(heads, tiles, batch),
        grid_names=("heads", "tile", "batch"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter_params() if interpret is True else interpret or None,
    )(spans, dict(own), arrays)


# ======================================================================================================================
# Products and masks
# ======================================================================================================================


class Transposed(NamedTuple):
    """A matrix in shared memory that is transposed in the product."""

    ref: Any


def products(interpret: Any, *pairs: tuple[Any, Any]) -> list[jax.Array]:
    """a @ b in float32 for each pair; all are issued before the first is waited for."""
    if interpret:
        return [_interpreted(a, b) for a, b in pairs]
    pairs = [(a, _operand(b)) for a, b in pairs]

    def run(*accumulators: Any) -> list[jax.Array]:
        for accumulator, (a, b) in zip(accumulators, pairs):
            plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def accumulate(interpret: Any, total: jax.Array, a: Any, b: Any) -> jax.Array:
    """total + a @ b; a in registers."""
    if interpret:
        return total + _interpreted(a, b)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, _operand(b)))(plgpu.ACC.init(total))


def _operand(matrix: Any) -> Any:
    return matrix.ref.transpose((1, 0)) if isinstance(matrix, Transposed) else matrix


def _interpreted(a: Any, b: Any) -> jax.Array:
    """The interpreter supports neither transposed views nor operands in registers, so values are read first."""
    a = a if isinstance(a, jax.Array) else a[...]
    b = b.ref[...].T if isinstance(b, Transposed) else b[...]
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def visible(first: jax.Array, last: jax.Array, shape: tuple[int, int], *, keys_from: jax.Array, keys: int) -> jax.Array:
    """bool mask of the scores that count: ``keys`` is the axis of keys; ``first`` and ``last`` are along the other."""
    index = lax.broadcasted_iota(jnp.int32, shape, keys) + keys_from
    lower, upper = (lax.broadcast_in_dim(bound, shape, [1 - keys]) for bound in (first, last))
    return (index >= lower) & (index <= upper)


def along(vector: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [axis])
