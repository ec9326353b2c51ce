"""Modality-grouped matmuls as Pallas TPU kernels.

One kernel serves every product with row blocks on the left: the block map is prefetched into scalar memory, each grid
step multiplies a block of rows by the block of its own expert's weights, and an epilogue (SwiGLU or its derivative)
turns the float32 sums into outputs. A second kernel sums x.T @ dy over the blocks of one expert.

    grid (n, m, k)      m: row blocks     n: output columns     k: contracted columns, innermost
    block_expert[m] =  1 -> visual block (k, n) is fetched, the text weights' index does not change: no copy
    block_expert[m] = -1 -> nothing is fetched or multiplied, zeros are written

The two experts' weights are separate operands (stacking them would copy them in every step); the one not in use keeps
its block index, and the pipeline copies a block only when its index changes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.block_map import TEXT, VISUAL
from pallas_kernels.experts.contract import (
    Implementation,
    Pair,
    Problem,
    swiglu_backward,
    swiglu_forward,
)
from pallas_kernels.precision import product_precision

LANES = 128
MIB = 2**20


class Product(NamedTuple):
    """accumulator[into] += lhs[left] @ weights[expert of the row block]."""

    left: int
    weights: Pair
    into: int = 0


class Blocks(NamedTuple):
    """Block sizes of one call: ``n`` output columns, ``k`` contracted columns."""

    n: int
    k: int


Epilogue = Callable[..., tuple[jax.Array, ...]]  # (float32 sums..., extra row blocks...) -> output blocks


@dataclasses.dataclass(frozen=True)
class PallasTpu(Implementation):
    """Grouped matmuls on the matrix unit of a TPU.

    Attributes:
      block_rows: rows of a grid step, a divisor of the block; None: the whole block.
      vmem: bytes of vector memory that the blocks of one call may take (including double buffers).
      block_n: output columns of a block; None: the sizes that move the fewest bytes within ``vmem``.
      block_k: contracted columns of a block; likewise.
      interpret: run on any machine, as in ``pallas_call`` (True or ``pltpu.InterpretParams``).
    """

    name: ClassVar[str] = "pallas_tpu"
    granularity: ClassVar[tuple[int, int]] = (16, LANES)

    block_rows: int | None = None
    vmem: int = 40 * MIB
    block_n: int | None = None
    block_k: int | None = None
    interpret: bool | pltpu.InterpretParams = False

    def unsupported(self, problem: Problem) -> str | None:
        if not (self.interpret or problem.device.startswith("tpu")):
            return f"needs a TPU, this is {problem.device} (tests pass PallasTpu(interpret=True))"
        if problem.d % LANES or problem.ff % LANES:
            return f"widths must be multiples of {LANES}, not {problem.d} and {problem.ff}"
        rows = self.block_rows or problem.block
        if problem.block % rows or rows % self.granularity[0]:
            return f"row block {rows} must divide block {problem.block} and be a multiple of {self.granularity[0]}"
        return None

    @classmethod
    def here(cls) -> Self:
        return cls(interpret=jax.default_backend() != "tpu")

    @classmethod
    def tuning_space(cls, op: str) -> dict[str, list[Any]]:
        del op
        return {"vmem": [24 * MIB, 40 * MIB, 64 * MIB, 96 * MIB], "block_rows": [128, 256, 512]}

    # ---- Primitives ----

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        (y,) = self._grouped(
            [x], [Product(0, weights)], block_expert, lambda y: (y,), [out_dtype or x.dtype], block, transpose
        )
        return y

    def swiglu(self, x, block_expert, gates, ups, *, block, save, rows=None):
        def epilogue(gate, up):
            h = swiglu_forward(gate, up, x.dtype)
            return (h, gate, up) if save else (h,)

        products = [Product(0, gates, into=0), Product(0, ups, into=1)]
        outputs = self._grouped([x], products, block_expert, epilogue, [x.dtype] * (3 if save else 1), block, False)
        return tuple(outputs) if save else (outputs[0], None, None)

    def swiglu_backward(self, dy, block_expert, downs, gate, up, *, block):
        return tuple(
            self._grouped(
                [dy],
                [Product(0, downs)],
                block_expert,
                swiglu_backward,
                [gate.dtype] * 3,
                block,
                transpose=True,
                extras=[gate, up],
            )
        )

    def swiglu_dx(self, dgate, dup, block_expert, gates, ups, *, block):
        products = [Product(0, gates), Product(1, ups)]
        (dx,) = self._grouped([dgate, dup], products, block_expert, lambda dx: (dx,), [dgate.dtype], block, True)
        return dx

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        rows = self.block_rows or block
        itemsize = x.dtype.itemsize

        def cost(b: Blocks) -> tuple[int, int]:
            moved = x.size * (dy.shape[1] // b.n) + dy.size * (x.shape[1] // b.k)
            held = 2 * rows * (b.n + b.k) * itemsize + b.n * b.k * (4 + 2 * jnp.dtype(out_dtype).itemsize)
            return moved, held

        blocks = self._blocks(dy.shape[1], x.shape[1], x.dtype, cost)
        return _weight_gradient(
            x, dy, jnp.repeat(block_expert, block // rows), expert, rows, blocks, out_dtype, self._compiler_options()
        )

    # ---- Sizes ----

    def _grouped(self, lhs, products, block_expert, epilogue, out_dtypes, block, transpose, extras=()):
        rows = self.block_rows or block
        weights = products[0].weights[0]
        n, k = weights.shape if transpose else weights.shape[::-1]
        itemsize, accumulators = lhs[0].dtype.itemsize, 1 + max(p.into for p in products)

        def cost(b: Blocks) -> tuple[int, int]:
            # A block that spans all of k stays resident while rows stream past.
            passes = 1 if b.k == k else block_expert.shape[0] * block // rows
            moved = len(lhs) * lhs[0].size * (n // b.n) + len(products) * weights.size * passes
            per_row = len(lhs) * b.k + (len(extras) + len(out_dtypes)) * b.n
            held = 2 * (rows * per_row + 2 * len(products) * b.n * b.k) * itemsize + accumulators * rows * b.n * 4
            return moved, held

        return _grouped(
            lhs,
            products,
            jnp.repeat(block_expert, block // rows),
            epilogue,
            out_dtypes,
            extras,
            rows,
            self._blocks(n, k, lhs[0].dtype, cost),
            transpose,
            self._compiler_options(),
        )

    def _blocks(self, n: int, k: int, dtype: jnp.dtype, cost: Callable[[Blocks], tuple[int, int]]) -> Blocks:
        """The blocks that move the fewest bytes between HBM and VMEM among those that fit."""
        # A block's matmul is unrolled, six-fold in float32: beyond these sizes only the compile time grows.
        most = 512 if dtype == jnp.float32 else 2048
        candidates = itertools.product(
            [self.block_n] if self.block_n else _divisors(n, most),
            [self.block_k] if self.block_k else _divisors(k, most),
        )
        costs = {blocks: cost(blocks) for blocks in itertools.starmap(Blocks, candidates)}
        fitting = {blocks: c for blocks, c in costs.items() if c[1] <= self.vmem}
        if not fitting:
            least = min(c[1] for c in costs.values())
            raise Unavailable(f"pallas_tpu: no blocks of [{k}, {n}] fit into {self.vmem} bytes, the least is {least}")
        return min(fitting, key=lambda blocks: (fitting[blocks][0], fitting[blocks][1]))

    def _compiler_options(self) -> dict:
        # Besides the blocks, the compiler needs room for values in flight.
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=self.vmem + 12 * MIB
        )
        return {"compiler_params": params, "interpret": self.interpret}


def _divisors(size: int, most: int) -> list[int]:
    """Multiples of a lane row up to ``most`` that divide ``size``."""
    return [b for b in range(LANES, min(size, most) + 1, LANES) if size % b == 0]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions, precision = (((contract[0],), (contract[1],)), ((), ())), product_precision(a, b)
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# ======================================================================================================================
# Rows times the weights of their expert
# ======================================================================================================================


def _grouped(
    lhs: Sequence[jax.Array],
    products: Sequence[Product],
    step_expert: jax.Array,
    epilogue: Epilogue,
    out_dtypes: Sequence[jnp.dtype],
    extras: Sequence[jax.Array],
    rows: int,
    blocks: Blocks,
    transpose: bool,
    options: dict,
) -> list[jax.Array]:
    """epilogue(sums of the products, extras) for every row block.

    Args:
      lhs: arrays [M, K].
      products: what to multiply and where to add it; weights [K, N], or [N, K] with ``transpose``.
      step_expert: int32 [M / rows].
      epilogue: from float32 [rows, n] sums and blocks of extras to one block per output.
      out_dtypes: of the outputs [M, N].
      extras: arrays [M, N] for the epilogue.
    """
    m = lhs[0].shape[0]
    weights = products[0].weights[0]
    n, k = weights.shape if transpose else weights.shape[::-1]
    grid = (n // blocks.n, m // rows, k // blocks.k)
    accumulators = 1 + max(p.into for p in products)
    operands = [*lhs, *(w for p in products for w in p.weights), *extras]

    def kernel(expert_ref, present_ref, *refs):
        del present_ref  # read by the index maps
        lhs_refs, refs = refs[: len(lhs)], refs[len(lhs) :]
        weight_refs, refs = refs[: 2 * len(products)], refs[2 * len(products) :]
        extra_refs, refs = refs[: len(extras)], refs[len(extras) :]
        out_refs, sums = refs[: len(out_dtypes)], refs[len(out_dtypes) :]
        expert, step = expert_ref[pl.program_id(1)], pl.program_id(2)

        @pl.when((step == 0) & (expert >= 0))
        def _():
            for total in sums:
                total[...] = jnp.zeros_like(total)

        for own in (TEXT, VISUAL):

            @pl.when(expert == own)
            def _(own=own):
                for i, product in enumerate(products):
                    w = weight_refs[2 * i + own][...]
                    sums[product.into][...] += _dot(lhs_refs[product.left][...], w, (1, 1 if transpose else 0))

        last = step == grid[2] - 1

        @pl.when(last & (expert >= 0))
        def _():
            values = epilogue(*(total[...] for total in sums), *(ref[...] for ref in extra_refs))
            for ref, value in zip(out_refs, values, strict=True):
                ref[...] = value.astype(ref.dtype)

        @pl.when(last & (expert < 0))
        def _():
            for ref in out_refs:
                ref[...] = jnp.zeros_like(ref)

    def left_index(j, i, s, expert_ref, present_ref):
        filled = expert_ref[i] >= 0
        return jnp.where(filled, i, 0), jnp.where(filled, s, 0)

    def weight_index(own: int):
        def index(j, i, s, expert_ref, present_ref):
            row = jnp.where(expert_ref[i] == own, s, 0)
            column = jnp.where(present_ref[own] > 0, j, 0)  # an expert without blocks is fetched once, not per column
            return (column, row) if transpose else (row, column)

        return index

    def row_index(j, i, s, expert_ref, present_ref):
        return i, j

    weight_block = (blocks.n, blocks.k) if transpose else (blocks.k, blocks.n)
    row_spec = pl.BlockSpec((rows, blocks.n), row_index)
    flops = 2 * m * n * k * len(products)
    present = jnp.stack([jnp.any(step_expert == e) for e in (TEXT, VISUAL)]).astype(jnp.int32)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, n), dtype) for dtype in out_dtypes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                *[pl.BlockSpec((rows, blocks.k), left_index) for _ in lhs],
                *[pl.BlockSpec(weight_block, weight_index(own)) for _ in products for own in (TEXT, VISUAL)],
                *[row_spec for _ in extras],
            ],
            out_specs=[row_spec for _ in out_dtypes],
            scratch_shapes=[pltpu.VMEM((rows, blocks.n), jnp.float32) for _ in range(accumulators)],
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=m * n if len(out_dtypes) + len(extras) > 1 else 0,
            bytes_accessed=sum(a.nbytes for a in operands) + sum(m * n * jnp.dtype(t).itemsize for t in out_dtypes),
        ),
        name=f"modality_grouped_{len(products)}",
        **options,
    )(step_expert.astype(jnp.int32), present, *operands)


# ======================================================================================================================
# Weight gradient of one expert
# ======================================================================================================================


def _weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    step_expert: jax.Array,
    expert: int,
    rows: int,
    blocks: Blocks,
    out_dtype: jnp.dtype,
    options: dict,
) -> jax.Array:
    """x.T @ dy over the row blocks of ``expert``: [M, K], [M, N] -> [K, N]."""
    m, k, n = x.shape[0], x.shape[1], dy.shape[1]
    grid = (n // blocks.n, k // blocks.k, m // rows)
    own = step_expert == expert
    # The expert's blocks first; after them the index does not change, so nothing is copied.
    count = jnp.sum(own, dtype=jnp.int32)
    order = jnp.argsort(~own).astype(jnp.int32)
    order = order[jnp.minimum(jnp.arange(m // rows), jnp.maximum(count - 1, 0))]

    def kernel(order_ref, count_ref, x_ref, dy_ref, out_ref, total):
        del order_ref
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(step < count_ref[0])
        def _():
            total[...] += _dot(x_ref[...], dy_ref[...], (0, 0))

        @pl.when(step == grid[2] - 1)
        def _():
            out_ref[...] = total[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((k, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, blocks.k), lambda j, i, s, order_ref, count_ref: (order_ref[s], i)),
                pl.BlockSpec((rows, blocks.n), lambda j, i, s, order_ref, count_ref: (order_ref[s], j)),
            ],
            out_specs=pl.BlockSpec((blocks.k, blocks.n), lambda j, i, s, order_ref, count_ref: (i, j)),
            scratch_shapes=[pltpu.VMEM((blocks.k, blocks.n), jnp.float32)],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            transcendentals=0,
            bytes_accessed=x.nbytes + dy.nbytes + k * n * jnp.dtype(out_dtype).itemsize,
        ),
        name="modality_weight_gradient",
        **options,
    )(order, count[None], x, dy)
