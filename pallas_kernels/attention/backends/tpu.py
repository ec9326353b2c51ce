"""Packed attention as Pallas TPU kernels that visit only the blocks in which some query sees a key.

The list of visits (``visits``) is in scalar memory; a grid step takes one pair of a query block and a key block, for
all query heads of one KV head, so that k and v are fetched once per group.

    grid (h, t)      h: KV heads      t: visits, as many as there are; row by row, ordered by queries, then by keys

Scores are kept transposed, [keys, queries]: bounds, maxima, sums and log-sum-exps are then rows of lanes (not columns
of 128 equal lanes), reductions run along sublanes, and only small blocks of the products' operands are transposed.

The forward kernel is flash attention (Dao et al., arXiv 2205.14135; 2307.08691) and keeps the log-sum-exp. The backward
kernel computes the scores once for all three gradients: dq is summed over the visits of a query block, dk and dv over
those of a row, in vector memory. Exponentials are powers of two: queries are scaled by log2(e) beforehand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.contract import LSE, OUTPUT, Implementation, Intervals, Problem, needs_order
from pallas_kernels.attention.visits import FIRST, LAST, ROW_FIRST, ROW_LAST, WHOLE, Grid, Visits, make_visits
from pallas_kernels.precision import product_precision

LANES = 128
MIB = 2**20
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a key that is not seen
_MOST_VISITS = 2**16  # two codes of 4 bytes each, in half of the scalar memory of a core


@dataclasses.dataclass(frozen=True)
class PallasTpu(Implementation):
    """Flash attention over lists of visited blocks.

    Attributes:
      block_q: maximum number of queries per block; the largest divisor of Q is used.
      block_k: maximum number of keys per block; likewise.
      part: queries, and keys, of the parts in which partly seen blocks are computed; larger if there would be too many
        parts to encode.
      vmem: bytes of vector memory that a kernel may take.
      interpret: run on any machine, as in ``pallas_call`` (True or ``pltpu.InterpretParams``).
    """

    name: ClassVar[str] = "attention/pallas_tpu"
    granularity: ClassVar[int] = LANES

    block_q: int = 512
    block_k: int = 512
    part: int = LANES
    vmem: int = 100 * MIB
    interpret: bool | pltpu.InterpretParams = False

    def unsupported(self, problem: Problem) -> str | None:
        if not (self.interpret or problem.device.startswith("tpu")):
            return f"needs a TPU, this is {problem.device} (tests pass PallasTpu(interpret=True))"
        if slots := [n for n in (problem.queries, problem.keys) if n % LANES]:
            return f"needs rows with a multiple of {LANES} slots, got {slots[0]}: change V or T"
        if problem.dim % 8:
            return f"needs a head size that is a multiple of 8, not {problem.dim}"
        if (most := self.grid(1, problem.queries, problem.keys).most) > _MOST_VISITS:
            return f"a row has up to {most} visits, but scalar memory holds only {_MOST_VISITS}"
        if (held := self.held(problem)) > self.vmem:
            return f"the backward pass needs {held} bytes of vector memory, but may take only {self.vmem}"
        return needs_order(problem)

    @classmethod
    def here(cls) -> Self:
        if jax.default_backend() == "tpu":
            return cls()
        return cls(block_q=LANES, block_k=LANES, interpret=True)  # several blocks in the rows of small cases

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {"block_q": [256, 512, 1024], "block_k": [256, 512, 1024], "part": [128, 256]}

    def grid(self, rows: int, queries: int, keys: int) -> Grid:
        """The blocks of a call."""
        block_q, block_k = _divisor(queries, self.block_q), _divisor(keys, self.block_k)
        both = math.gcd(block_q, block_k)
        parts = (p for p in range(min(self.part, both), both + 1, LANES) if both % p == 0)
        grids = (Grid(rows, queries // block_q, keys // block_k, block_q, block_k, part) for part in parts)
        return next(grid for grid in grids if grid.part == both or grid.part_bits <= 31)

    def held(self, problem: Problem) -> int:
        """Bytes of vector memory of the backward kernel: its blocks, twice if they are buffered, and its sums."""
        grid, itemsize = self.grid(1, problem.queries, problem.keys), jnp.dtype(problem.dtype).itemsize
        group, wide = problem.heads // problem.kv_heads, -(-problem.dim // LANES) * LANES
        queries = group * grid.block_q * wide
        blocks = 2 * itemsize * (3 * queries + 2 * grid.block_k * wide)
        sums = problem.keys * wide * 2 * (4 + itemsize) + 4 * queries
        return blocks + sums + 6 * 4 * grid.block_q * grid.block_k

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        batch, queries, heads, dim = query.shape
        keys, kv_heads = key.shape[1:3]
        rows = max(1, _MOST_VISITS // self.grid(1, queries, keys).most)
        if batch > rows:  # more visits than scalar memory holds: that many rows at a time
            whole = (query, key, value, Intervals(intervals.first, intervals.last))
            parts = [jax.tree.map(lambda a, i=i: a[i : i + rows], whole) for i in range(0, batch, rows)]
            return jnp.concatenate([self(*part) for part in parts])
        grid = self.grid(batch, queries, keys)
        call = Call(grid, kv_heads, heads // kv_heads, dim, self.vmem, self.interpret)
        # Heads first; heads that share a KV head are adjacent.
        query = query.reshape(batch, queries, kv_heads, call.group, dim).transpose(0, 2, 3, 1, 4)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        bounds = jnp.stack([intervals.first, intervals.last], axis=1)
        output = _attention(call, query, key, value, bounds, make_visits(intervals, grid))
        return output.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def _divisor(size: int, most: int) -> int:
    """The largest multiple of a lane row up to ``most`` that divides ``size``."""
    return next(block for block in range(min(most, size) // LANES * LANES, 0, -LANES) if size % block == 0)


def kernel_flops(call: Call, pairs: int, *, backward: bool) -> int:
    """FLOPs of the products of a kernel that computes that many query-key pairs (``visits.count_pairs``).

    Two products forward; five backward, including the recomputed scores.
    """
    return (5 if backward else 2) * 2 * pairs * call.dim * call.kv_heads * call.group


# ======================================================================================================================
# Forward and backward as one differentiable function
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Call:
    """The static sizes of one call, ``group`` query heads for each KV head, and how it is compiled."""

    grid: Grid
    kv_heads: int
    group: int
    dim: int
    vmem: int
    interpret: bool | pltpu.InterpretParams

    def specs(self) -> dict[str, pl.BlockSpec]:
        """Blocks of the arrays by kind; index maps get the grid's indices and the codes."""
        grid = self.grid
        of_queries, of_keys = (1, 1, self.group, grid.block_q), (1, 1, grid.block_k, self.dim)
        return {
            "queries": pl.BlockSpec(
                (*of_queries, self.dim), lambda h, t, codes, parts: (grid.row(codes[t]), h, 0, grid.query(codes[t]), 0)
            ),
            "statistics": pl.BlockSpec(
                (*of_queries[:3], 1, grid.block_q),
                lambda h, t, codes, parts: (grid.row(codes[t]), h, 0, 0, grid.query(codes[t])),
            ),
            "keys": pl.BlockSpec(of_keys, lambda h, t, codes, parts: (grid.row(codes[t]), h, grid.key(codes[t]), 0)),
            "bounds": pl.BlockSpec(
                (1, 2, grid.block_q), lambda h, t, codes, parts: (grid.row(codes[t]), 0, grid.query(codes[t]))
            ),
            "rows": pl.BlockSpec(
                (1, 1, grid.keys * grid.block_k, self.dim),
                lambda h, t, codes, parts: (grid.row(codes[t]), h, 0, 0),
                pipeline_mode=pl.Buffered(1),
            ),
        }

    def options(self, visits: Visits, *, backward: bool, itemsize: int) -> dict[str, Any]:
        """The arguments of ``pallas_call`` that both kernels share."""
        grid = self.grid
        causal = max(1, grid.most * (grid.keys + 1) // (2 * grid.keys))  # the actual number is not known beforehand
        pairs = causal * grid.block_q * grid.block_k
        fetched = itemsize * self.kv_heads * self.dim * 2 * grid.block_k * causal
        return {
            "cost_estimate": pl.CostEstimate(
                flops=kernel_flops(self, pairs, backward=backward),
                transcendentals=pairs * self.kv_heads * self.group,
                bytes_accessed=fetched,
            ),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.vmem
            ),
            "interpret": self.interpret,
            # For profilers and for plans, which read it in the compiled program.
            "metadata": {"xprof_metadata": json.dumps({n: getattr(grid, n) for n in ("block_q", "block_k", "part")})},
            "name": f"packed_attention_{'backward' if backward else 'forward'}",
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, query, key, value, bounds, visits: Visits) -> jax.Array:
    """query [B, Hkv, G, Q, D], key and value [B, Hkv, K, D], bounds int32 [B, 2, Q] -> like query."""
    return _forward(call, _scaled(call, query), key, value, bounds, visits)[0]


def _scaled(call: Call, query: jax.Array) -> jax.Array:
    return (query.astype(jnp.float32) * (call.dim**-0.5 * math.log2(math.e))).astype(query.dtype)


def _attention_fwd(call: Call, query, key, value, bounds, visits):
    output, lse = _forward(call, _scaled(call, query), key, value, bounds, visits)
    output, lse = checkpoint_name(output, OUTPUT), checkpoint_name(lse, LSE)
    return output, (query, key, value, bounds, visits, output, lse)


def _attention_bwd(call: Call, saved, dout):
    query, key, value, bounds, visits, output, lse = saved
    delta = jnp.sum(output.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)[..., None, :]
    dq, dk, dv = _backward(call, _scaled(call, query), key, value, bounds, visits, dout, lse, delta)
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# ======================================================================================================================
# Kernels
# ======================================================================================================================


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions, precision = (((contract[0],), (contract[1],)), ((), ())), product_precision(a, b)
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _of_visit(grid: Grid, code: jax.Array, parts: jax.Array, run: Callable[[pl.Slice, pl.Slice, bool], None]) -> None:
    """``run(keys, queries, masked)`` for what a visit has to compute, as slices of its blocks.

    All at once if the whole block is seen. Otherwise one part of the queries at a time, with as many key parts as it
    sees: each possible number of key parts is compiled, so that every product has a static size.
    """
    whole = code & WHOLE != 0
    pl.when(whole)(lambda: run(pl.ds(0, grid.block_k), pl.ds(0, grid.block_q), False))
    for part in range(grid.parts_q):
        first, count = grid.keys_of_part(parts, part)
        for n in range(1, grid.parts_k + 1):

            @pl.when(jnp.logical_not(whole) & (count == n))
            def _(part=part, n=n, first=first):
                keys = pl.ds(pl.multiple_of(first * grid.part, grid.part), n * grid.part)
                run(keys, pl.ds(part * grid.part, grid.part), True)


def _over_heads(group: int, run: Callable[[Sequence[int | jax.Array]], None]) -> None:
    """``run(heads)`` for two heads of a group at a time: the compiled code does not grow with the group."""
    if group <= 2:
        run(range(group))
        return
    jax.lax.fori_loop(0, group // 2, lambda i, _: run((2 * i, 2 * i + 1)), None)
    if group % 2:
        run((group - 1,))


def _seen(grid: Grid, code: jax.Array, bounds_ref, keys: pl.Slice, queries: pl.Slice) -> jax.Array:
    """bool [keys, queries]."""
    shape = (keys.size, queries.size)
    key = grid.key(code) * grid.block_k + keys.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (bounds_ref[0, 0:1, queries] <= key) & (key <= bounds_ref[0, 1:2, queries])


def _forward(call: Call, query, key, value, bounds, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """(output like query, log2-sum-exp2 of the scaled scores float32 [B, Hkv, G, 1, Q])."""
    grid, group = call.grid, call.group

    def kernel(codes, parts, q_ref, k_ref, v_ref, bounds_ref, out_ref, lse_ref, largest, total, mixed):
        code = codes[pl.program_id(1)]

        @pl.when(code & FIRST != 0)
        def _():
            largest[...] = jnp.full_like(largest, _HIDDEN)
            total[...] = jnp.zeros_like(total)
            mixed[...] = jnp.zeros_like(mixed)

        def run(keys: pl.Slice, queries: pl.Slice, masked: bool) -> None:
            k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]
            seen = _seen(grid, code, bounds_ref, keys, queries) if masked else None

            def of_heads(heads: Sequence[int | jax.Array]) -> None:
                # Both heads' products first, so that the matrix unit works while the vector unit computes exponentials.
                every = [_dot(k, q_ref[0, 0, g, queries, :], (1, 1)) for g in heads]  # [keys, queries] each
                for g, scores in zip(heads, every):
                    scores = jnp.where(seen, scores, _HIDDEN) if masked else scores
                    before = largest[g, :, queries]
                    now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
                    # A query that has not seen a key yet sums ones here; its first real score multiplies them by zero.
                    p = jnp.exp2(scores - now)
                    shrink = jnp.exp2(before - now)
                    largest[g, :, queries] = now
                    total[g, :, queries] = shrink * total[g, :, queries] + jnp.sum(p, axis=0, keepdims=True)
                    mixed[g, :, queries] = mixed[g, :, queries] * shrink + _dot(v, p.astype(v.dtype), (0, 0))

            _over_heads(group, of_heads)

        _of_visit(grid, code, parts[pl.program_id(1)], run)

        @pl.when(code & LAST != 0)
        def _():
            lse_ref[0, 0] = largest[...] + jnp.log2(total[...])
            for g in range(group):
                out_ref[0, 0, g] = (mixed[g] / total[g]).T.astype(out_ref.dtype)

    specs, statistics = call.specs(), (*query.shape[:3], 1, query.shape[3])
    return pl.pallas_call(
        kernel,
        out_shape=[query, jax.ShapeDtypeStruct(statistics, jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(call.kv_heads, visits.count),
            in_specs=[specs["queries"], specs["keys"], specs["keys"], specs["bounds"]],
            out_specs=[specs["queries"], specs["statistics"]],
            scratch_shapes=[
                pltpu.VMEM((group, 1, grid.block_q), jnp.float32),
                pltpu.VMEM((group, 1, grid.block_q), jnp.float32),
                pltpu.VMEM((group, call.dim, grid.block_q), jnp.float32),
            ],
        ),
        **call.options(visits, backward=False, itemsize=key.dtype.itemsize),
    )(visits.codes, visits.parts, query, key, value, bounds)


def _backward(call: Call, query, key, value, bounds, visits: Visits, dout, lse, delta) -> tuple[jax.Array, ...]:
    """(dquery, dkey, dvalue); query is scaled, dquery is the gradient of the unscaled query."""
    grid, group = call.grid, call.group

    def kernel(codes, parts, q_ref, k_ref, v_ref, bounds_ref, do_ref, lse_ref, delta_ref, *refs):
        dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = refs
        code = codes[pl.program_id(1)]

        def over_keys(run):
            """``run`` for each key block of the row."""
            jax.lax.fori_loop(0, grid.keys, lambda i, _: run(pl.ds(i * grid.block_k, grid.block_k)), None)

        @pl.when(code & ROW_FIRST != 0)
        def _():
            @over_keys
            def _(block):
                dk_sum[block, :] = jnp.zeros((grid.block_k, call.dim), jnp.float32)
                dv_sum[block, :] = jnp.zeros((grid.block_k, call.dim), jnp.float32)

        @pl.when(code & FIRST != 0)
        def _():
            dq_sum[...] = jnp.zeros_like(dq_sum)

        def run(keys: pl.Slice, queries: pl.Slice, masked: bool) -> None:
            k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]
            at = pl.ds(pl.multiple_of(grid.key(code) * grid.block_k + keys.start, grid.part), keys.size)
            seen = _seen(grid, code, bounds_ref, keys, queries) if masked else None

            def of_heads(heads: Sequence[int | jax.Array]) -> None:
                for g in heads:
                    q, do = q_ref[0, 0, g, queries, :], do_ref[0, 0, g, queries, :]
                    p = jnp.exp2(_dot(k, q, (1, 1)) - lse_ref[0, 0, g, :, queries])
                    p = jnp.where(seen, p, 0.0) if masked else p
                    dv_sum[at, :] += _dot(p.astype(v.dtype), do, (1, 0))
                    ds = p * (_dot(v, do, (1, 1)) - delta_ref[0, 0, g, :, queries])
                    ds = ds.astype(k.dtype)
                    dk_sum[at, :] += _dot(ds, q, (1, 0))
                    dq_sum[g, :, queries] += _dot(k, ds, (0, 0))

            _over_heads(group, of_heads)

        _of_visit(grid, code, parts[pl.program_id(1)], run)

        @pl.when(code & LAST != 0)
        def _():
            for g in range(group):
                dq_ref[0, 0, g] = (dq_sum[g] * call.dim**-0.5).T.astype(dq_ref.dtype)

        @pl.when(code & ROW_LAST != 0)
        def _():
            @over_keys
            def _(block):
                dk_ref[0, 0, block, :] = (dk_sum[block, :] * math.log(2)).astype(dk_ref.dtype)
                dv_ref[0, 0, block, :] = dv_sum[block, :].astype(dv_ref.dtype)

    specs = call.specs()
    keys = (grid.keys * grid.block_k, call.dim)
    return pl.pallas_call(
        kernel,
        out_shape=[query, key, value],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(call.kv_heads, visits.count),
            in_specs=[specs[n] for n in ("queries", "keys", "keys", "bounds", "queries", "statistics", "statistics")],
            out_specs=[specs["queries"], specs["rows"], specs["rows"]],
            scratch_shapes=[
                pltpu.VMEM((group, call.dim, grid.block_q), jnp.float32),
                pltpu.VMEM(keys, jnp.float32),
                pltpu.VMEM(keys, jnp.float32),
            ],
        ),
        **call.options(visits, backward=True, itemsize=key.dtype.itemsize),
    )(visits.codes, visits.parts, query, key, value, bounds, dout, lse, delta)
