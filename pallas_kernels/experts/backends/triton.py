"""Grouped expert matmuls in Triton, called from JAX by jax-triton: gather on load, fused SwiGLU.

One kernel serves every product with row blocks on the left. A program owns a block of rows (all of one expert) and of
columns; the rows may be anywhere in x (``rows`` holds their indices), so no permuted copy of x is written. Epilogues
turn the float32 sums into outputs: none, SwiGLU, or SwiGLU's derivative. A second kernel computes weight gradients.

float32 inputs are multiplied in full float32 ("ieee"), not in tf32, and hence not on the tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.devices import device_key, is_hopper
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.contract import Implementation, Pair, Problem

# ======================================================================================================================
# Kernels (plain functions: they are compiled or interpreted)
# ======================================================================================================================


def grouped_kernel(
    x,
    x_second,
    rows,
    block_expert,
    text,
    visual,
    text_second,
    visual_second,
    gate_saved,
    up_saved,
    out,
    out_second,
    out_third,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SOURCE_ROWS: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    GATHER: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    SWIGLU: tl.constexpr,
    SAVE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [M, K] times the weight [K, N] ([N, K] with TRANSPOSE) of their expert.

    plain       out = x @ w
    TWO_TERMS   out = x @ w + x_second @ w_second
    SWIGLU      gate = x @ w, up = x @ w_second, out = silu(gate) * up; with SAVE also out_second = gate, out_third = up
    BACKWARD    dh = x @ w; out = h, out_second = dgate, out_third = dup from gate_saved and up_saved
    """
    # Programs process GROUP row blocks per column block, so that neighbouring programs share operands in L2.
    row_blocks: tl.constexpr = M // BLOCK_M
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    row = (first + program % (GROUP * column_blocks) % size) * BLOCK_M
    column = program % (GROUP * column_blocks) // size * BLOCK_N

    grouped_rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # 64-bit arithmetic is needed for the first element of a block; within a block 32 bits suffice.
    out_start = row.to(tl.int64) * N
    out_offsets = tl.arange(0, BLOCK_M)[:, None] * N + columns[None, :]
    if N % BLOCK_N == 0:
        out_mask = None
    else:
        out_mask = (columns < N)[None, :]

    expert = tl.load(block_expert + row // MAP_BLOCK)
    accumulator = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if expert < 0:
        zeros = accumulator.to(out.dtype.element_ty)
        tl.store(out + out_start + out_offsets, zeros, mask=out_mask)
        if SAVE or BACKWARD:
            tl.store(out_second + out_start + out_offsets, zeros, mask=out_mask)
            tl.store(out_third + out_start + out_offsets, zeros, mask=out_mask)
        return

    if GATHER:
        source = tl.load(rows + grouped_rows)
        live = source < SOURCE_ROWS
        source = tl.where(live, source, 0).to(tl.int64)
    else:
        source = grouped_rows.to(tl.int64)
        live = grouped_rows < M  # all of them
    x_offsets = source[:, None] * K + depth[None, :]
    # Weight blocks are loaded as [k, n], or as [n, k] if they are transposed after the load.
    if TRANSPOSE:
        w_offsets = columns.to(tl.int64)[:, None] * K + depth[None, :]
        w_step = 1
    else:
        w_offsets = depth.to(tl.int64)[:, None] * N + columns[None, :]
        w_step = N
    w = text if expert == 0 else visual
    w_second = text_second if expert == 0 else visual_second
    second = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    for k in range(0, K, BLOCK_K):
        in_depth = depth < K - k
        if K % BLOCK_K == 0 and not GATHER:
            x_block = tl.load(x + x_offsets + k)
        else:
            x_block = tl.load(x + x_offsets + k, mask=live[:, None] & in_depth[None, :], other=0.0)
        if K % BLOCK_K == 0 and N % BLOCK_N == 0:
            w_block = tl.load(w + w_offsets + k * w_step)
        elif TRANSPOSE:
            w_block = tl.load(w + w_offsets + k, mask=(columns < N)[:, None] & in_depth[None, :], other=0.0)
        else:
            w_block = tl.load(w + w_offsets + k * N, mask=in_depth[:, None] & (columns < N)[None, :], other=0.0)
        if TRANSPOSE:
            w_block = tl.trans(w_block)
        accumulator = tl.dot(x_block, w_block, accumulator, input_precision="ieee")
        if SWIGLU:
            if K % BLOCK_K == 0 and N % BLOCK_N == 0:
                w_block = tl.load(w_second + w_offsets + k * N)
            else:
                w_mask = in_depth[:, None] & (columns < N)[None, :]
                w_block = tl.load(w_second + w_offsets + k * N, mask=w_mask, other=0.0)
            second = tl.dot(x_block, w_block, second, input_precision="ieee")

    if TWO_TERMS:
        for k in range(0, K, BLOCK_K):
            in_depth = depth < K - k
            if K % BLOCK_K == 0:
                x_block = tl.load(x_second + x_offsets + k)
            else:
                x_block = tl.load(x_second + x_offsets + k, mask=live[:, None] & in_depth[None, :], other=0.0)
            if K % BLOCK_K == 0 and N % BLOCK_N == 0:
                w_block = tl.load(w_second + w_offsets + k * w_step)
            else:
                w_mask = (columns < N)[:, None] & in_depth[None, :]
                w_block = tl.load(w_second + w_offsets + k, mask=w_mask, other=0.0)
            accumulator = tl.dot(x_block, tl.trans(w_block), accumulator, input_precision="ieee")

    dtype = out.dtype.element_ty
    if SWIGLU:
        h = accumulator / (1.0 + tl.exp(-accumulator)) * second
        tl.store(out + out_start + out_offsets, h.to(dtype), mask=out_mask)
        if SAVE:
            tl.store(out_second + out_start + out_offsets, accumulator.to(dtype), mask=out_mask)
            tl.store(out_third + out_start + out_offsets, second.to(dtype), mask=out_mask)
    elif BACKWARD:
        # This order keeps few values live at a time.
        gate = tl.load(gate_saved + out_start + out_offsets, mask=out_mask).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        tl.store(out_third + out_start + out_offsets, (accumulator * silu).to(dtype), mask=out_mask)
        accumulator = accumulator * (sigmoid + silu * (1.0 - sigmoid))
        up = tl.load(up_saved + out_start + out_offsets, mask=out_mask).to(tl.float32)
        tl.store(out + out_start + out_offsets, (silu * up).to(dtype), mask=out_mask)
        tl.store(out_second + out_start + out_offsets, (accumulator * up).to(dtype), mask=out_mask)
    else:
        tl.store(out + out_start + out_offsets, accumulator.to(dtype), mask=out_mask)


def weight_gradient_kernel(
    x,
    dy,
    own_blocks,
    count,
    out,
    K: tl.constexpr,
    N: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [K, N] = sum of x[t].T @ dy[t] over the first ``count`` blocks of ``own_blocks``.

    BLOCK_M and BLOCK_N are rows and columns of ``out``; BLOCK_K rows of x and dy are multiplied at a time.
    """
    row_blocks: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    out_rows = (first + program % (GROUP * column_blocks) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % (GROUP * column_blocks) // size * BLOCK_N + tl.arange(0, BLOCK_N)

    accumulator = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    parts: tl.constexpr = MAP_BLOCK // BLOCK_K
    for step in range(tl.load(count) * parts):
        source = tl.load(own_blocks + step // parts) * MAP_BLOCK + step % parts * BLOCK_K + tl.arange(0, BLOCK_K)
        source = source.to(tl.int64)
        # x is read in its memory layout, [rows, K], and transposed after the load.
        x_block = tl.load(x + source[:, None] * K + out_rows[None, :], mask=(out_rows < K)[None, :], other=0.0)
        dy_block = tl.load(dy + source[:, None] * N + columns[None, :], mask=(columns < N)[None, :], other=0.0)
        accumulator = tl.dot(tl.trans(x_block), dy_block, accumulator, input_precision="ieee")

    mask = (out_rows < K)[:, None] & (columns < N)[None, :]
    tl.store(
        out + out_rows.to(tl.int64)[:, None] * N + columns[None, :], accumulator.to(out.dtype.element_ty), mask=mask
    )


# ======================================================================================================================
# Launching
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel is split into blocks.

    Attributes:
      m: rows of an output block.
      n: columns of an output block, per accumulator.
      k: depth of one step.
      group: row blocks that are processed together, so that their operands stay in L2.
      warps: warps of a program.
      stages: depth of the software pipeline.
    """

    m: int = 128
    n: int = 256
    k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3


# Without the tensor cores, products are limited by registers, not by loads.
FLOAT32_BLOCKS = Blocks(m=64, n=64, k=32, warps=4, stages=2)


def _covering(limit: int, size: int) -> int:
    """The smallest power of two that covers ``size``, between 16 (the minimum of a matrix product) and ``limit``."""
    return max(16, min(limit, 1 << (size - 1).bit_length()))


def _dividing(limit: int, size: int) -> int:
    """The largest power of two up to ``limit`` that divides ``size``."""
    return min(limit, size & -size)


class Launch(NamedTuple):
    """A kernel with everything but its inputs; hashable."""

    kernel: Callable[..., None]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    programs: int
    blocks: Blocks
    constants: tuple[tuple[str, int], ...]


def run(launch: Launch, inputs: Sequence[jax.Array], *, interpret: bool) -> tuple[jax.Array, ...]:
    """The outputs of a launch."""
    if interpret:
        return tuple(jax.pure_callback(functools.partial(_interpret, launch), launch.outputs, *inputs))
    return tuple(
        _jax_triton().triton_call(
            *inputs,
            kernel=compilable(launch.kernel),
            out_shape=launch.outputs,
            grid=(launch.programs,),
            num_warps=launch.blocks.warps,
            num_stages=launch.blocks.stages,
            compute_capability=90,
            **dict(launch.constants),
        )
    )


@functools.cache
def compilable(kernel: Callable[..., None]) -> triton.JITFunction:
    """The kernel in the form that Triton's compiler takes."""
    return triton.JITFunction(kernel)


@functools.cache
def _jax_triton() -> Any:
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # sets TRITON_CACHE_DIR to "", after which nothing else can call Triton's compiler
    except ImportError as error:  # importing it fails without jax's CUDA plugin
        raise Unavailable(f"jax-triton: {str(error).splitlines()[0]} (pip install jax-triton 'jax[cuda13]')") from error
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


_interpreter_lock = threading.Lock()  # Triton's interpreter patches `triton.language` while it runs


def _interpret(launch: Launch, *inputs: jax.Array) -> tuple[np.ndarray, ...]:
    """Runs the kernel on the CPU; outputs start as NaN, so that an element that is not written is visible."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    arguments = [torch.from_numpy(np.array(array)) for array in inputs]
    outputs = [torch.full(out.shape, float("nan"), dtype=torch.float32) for out in launch.outputs]
    with _interpreter_lock:
        InterpretedFunction(launch.kernel)[(launch.programs,)](*arguments, *outputs, **dict(launch.constants))
    return tuple(output.numpy() for output in outputs)


class Product(NamedTuple):
    """The operands of ``grouped_kernel``; those that a product does not use are None."""

    x: jax.Array
    weights: Pair
    x_second: jax.Array | None = None
    weights_second: Pair | None = None
    rows: jax.Array | None = None
    saved: tuple[jax.Array, jax.Array] | None = None


def grouped(
    product: Product,
    block_expert: jax.Array,
    out_dtype: jnp.dtype,
    *,
    block: int,
    blocks: Blocks,
    interpret: bool,
    transpose: bool = False,
    swiglu: bool = False,
    save: bool = False,
) -> tuple[jax.Array, ...]:
    """The outputs of ``grouped_kernel``, one or three; described there."""
    inputs = _inputs(product, block_expert)
    launch = plan(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), product),
        block_expert.shape[0] * block,
        out_dtype,
        block=block,
        blocks=blocks,
        transpose=transpose,
        swiglu=swiglu,
        save=save,
    )
    outputs = run(launch, inputs, interpret=interpret)
    return outputs if save or product.saved else outputs[:1]


def _inputs(product: Product, block_expert: jax.Array) -> list[jax.Array]:
    """Arguments of the kernel; missing ones are replaced by arrays that it never reads."""
    text, visual = product.weights
    text_second, visual_second = product.weights_second or product.weights
    gate, up = product.saved or (product.x, product.x)
    x_second = product.x if product.x_second is None else product.x_second
    rows = block_expert if product.rows is None else product.rows
    return [product.x, x_second, rows, block_expert, text, visual, text_second, visual_second, gate, up]


def plan(
    product: Product,
    rows: int,
    out_dtype: jnp.dtype,
    *,
    block: int,
    blocks: Blocks,
    transpose: bool = False,
    swiglu: bool = False,
    save: bool = False,
) -> Launch:
    """The launch of ``grouped_kernel`` for ``rows`` grouped rows; only shapes and dtypes of ``product`` matter."""
    depth, columns = product.weights[0].shape[::-1] if transpose else product.weights[0].shape
    blocks = dataclasses.replace(
        blocks, m=_dividing(blocks.m, block), n=_covering(blocks.n, columns), k=_covering(blocks.k, depth)
    )
    backward = product.saved is not None
    out = jax.ShapeDtypeStruct((rows, columns), out_dtype)
    unused = jax.ShapeDtypeStruct((1,), out_dtype)
    others = out if save or backward else unused
    constants = {
        "M": rows,
        "N": columns,
        "K": depth,
        "SOURCE_ROWS": product.x.shape[0],
        "MAP_BLOCK": block,
        "TRANSPOSE": transpose,
        "GATHER": product.rows is not None,
        "TWO_TERMS": product.x_second is not None,
        "SWIGLU": swiglu,
        "SAVE": save,
        "BACKWARD": backward,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "GROUP": blocks.group,
    }
    programs = rows // blocks.m * -(-columns // blocks.n)
    return Launch(grouped_kernel, (out, others, others), programs, blocks, tuple(constants.items()))


def plan_weight_gradient(height: int, columns: int, out_dtype: jnp.dtype, *, block: int, blocks: Blocks) -> Launch:
    """The launch of ``weight_gradient_kernel`` for a gradient [height, columns]."""
    blocks = dataclasses.replace(
        blocks, m=_covering(blocks.m, height), n=_covering(blocks.n, columns), k=_dividing(blocks.k, block)
    )
    constants = {
        "K": height,
        "N": columns,
        "MAP_BLOCK": block,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "GROUP": blocks.group,
    }
    programs = -(-height // blocks.m) * -(-columns // blocks.n)
    out = jax.ShapeDtypeStruct((height, columns), out_dtype)
    return Launch(weight_gradient_kernel, (out,), programs, blocks, tuple(constants.items()))


# ======================================================================================================================
# The implementation
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Triton(Implementation):
    """The kernels above as an implementation; fields are block sizes. ``Blocks`` may be given as a dict (from JSON).

    Attributes:
      product: block sizes of ``matmul`` and ``swiglu_dx`` in bfloat16.
      gate_up: block sizes of ``swiglu``; its ``n`` counts columns of gate, and as many of up.
      backward: block sizes of ``swiglu_backward``.
      gradient: block sizes of ``weight_gradient``; ``m`` and ``n`` refer to the gradient, ``k`` counts rows of x.
      float32: block sizes of everything in float32.
      interpret: run in Triton's interpreter, on any machine with torch.
    """

    name: ClassVar[str] = "triton"
    granularity: ClassVar[tuple[int, int]] = (16, 1)
    gathers_rows: ClassVar[bool] = True

    product: Blocks = Blocks()
    gate_up: Blocks = Blocks(n=128)
    backward: Blocks = Blocks(n=64, stages=4)  # wider ones spill: the epilogue holds four values per element
    gradient: Blocks = Blocks()
    float32: Blocks = FLOAT32_BLOCKS
    interpret: bool = False

    def __post_init__(self) -> None:
        for field in ("product", "gate_up", "backward", "gradient", "float32"):
            if isinstance(value := getattr(self, field), Mapping):
                object.__setattr__(self, field, dataclasses.replace(type(self).__dict__[field], **value))

    def unsupported(self, problem: Problem) -> str | None:
        if problem.block % 16:
            return f"blocks of {problem.block} rows: not a multiple of 16"
        if self.interpret:
            return "the interpreter's bfloat16 products are wrong" if problem.dtype == "bfloat16" else None
        if not is_hopper(problem.device):
            return f"needs a Hopper GPU (H100, H200, GH200), not {problem.device}"
        try:
            _jax_triton()
        except Unavailable as reason:
            return str(reason)
        return None

    @classmethod
    def here(cls) -> Self:
        if device_key().startswith("nvidia"):
            return cls()
        if importlib.util.find_spec("torch") is None:
            raise Unavailable("no NVIDIA GPU, and Triton's interpreter needs torch (pip install torch)")
        return cls(interpret=True)

    @classmethod
    def tuning_space(cls, op: str) -> dict[str, list[dict[str, Any]]]:
        common = [{"group": 4}, {"group": 16}, {"stages": 4}]
        space = {
            "gate_up": [*common, {"n": 64}, {"m": 64, "warps": 4}],
            "product": [*common, {"n": 128, "stages": 4}, {"m": 64}],
            "backward": [*common, {"m": 64, "n": 128}],
            "gradient": [*common, {"n": 128, "stages": 4}, {"k": 32, "stages": 5}],
        }
        return space if op == "ffn" else {field: space[field] for field in ("product", "gradient")}

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        product = Product(x, weights, rows=rows)
        (y,) = self._grouped(product, block_expert, block, self.product, out_dtype=out_dtype, transpose=transpose)
        return y

    def swiglu(self, x, block_expert, gates, ups, *, block, save, rows=None):
        product = Product(x, gates, weights_second=ups, rows=rows)
        outputs = self._grouped(product, block_expert, block, self.gate_up, swiglu=True, save=save)
        return outputs if save else (outputs[0], None, None)

    def swiglu_backward(self, dy, block_expert, downs, gate, up, *, block):
        product = Product(dy, downs, saved=(gate, up))
        return self._grouped(product, block_expert, block, self.backward, transpose=True)

    def swiglu_dx(self, dgate, dup, block_expert, gates, ups, *, block):
        product = Product(dgate, gates, x_second=dup, weights_second=ups)
        (dx,) = self._grouped(product, block_expert, block, self.product, transpose=True)
        return dx

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        blocks = self.float32 if x.dtype == jnp.float32 else self.gradient
        launch = plan_weight_gradient(x.shape[1], dy.shape[1], out_dtype, block=block, blocks=blocks)
        own = block_expert == expert
        own_blocks = jnp.argsort(~own, stable=True).astype(jnp.int32)  # the expert's blocks first
        count = jnp.sum(own, dtype=jnp.int32)[None]
        (dw,) = run(launch, [x, dy, own_blocks, count], interpret=self.interpret)
        return dw

    def _grouped(self, product, block_expert, block, blocks, *, out_dtype=None, **options):
        blocks = self.float32 if product.x.dtype == jnp.float32 else blocks
        dtype = jnp.dtype(out_dtype or product.x.dtype)
        return grouped(product, block_expert, dtype, block=block, blocks=blocks, interpret=self.interpret, **options)
