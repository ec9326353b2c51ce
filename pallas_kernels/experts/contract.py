"""What an implementation of the modality-grouped matmuls has to provide; ``api`` describes the contract."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

Pair = tuple[
    jax.Array, jax.Array
]  # one array per expert: (text, visual), index = the expert's number in `block_expert`


class FfnWeights(NamedTuple):
    """SwiGLU weights of one expert, [in, out]: gate [d, ff], up [d, ff], down [ff, d]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, as far as the choice of an implementation depends on it.

    Attributes:
      op: "ffn" or "matmul".
      rows: grouped rows M (a multiple of ``block``).
      block: rows per block.
      d: input width.
      ff: hidden width of the FFN, or output width of the matmul.
      dtype: name of the dtype of x ("bfloat16" or "float32").
      device: key of a tuning table, e.g. "cpu", "tpu_v5e", "nvidia_h200".
    """

    ROOM: ClassVar[str] = "experts"
    EXACT: ClassVar[tuple[str, ...]] = ("op", "dtype", "d", "ff")
    SIZE: ClassVar[str] = "rows"

    op: str
    rows: int
    block: int
    d: int
    ff: int
    dtype: str
    device: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Base of all implementations: a frozen (hashable) dataclass whose fields are its tuning parameters.

    ``x`` is [M, d] with M a multiple of ``block``; ``block_expert`` is int32 [M / block]; weights are pairs in the
    dtype of x. Sums are float32. Every element of every output is written: rows of blocks with expert -1 are zero.
    The inputs in such blocks must not affect any result, even if they are NaN. Blocks may be in any order.
    """

    name: ClassVar[str]
    # Multiples that the sizes in the conformance suite must have: (block, widths). (1, 1): no restriction.
    granularity: ClassVar[tuple[int, int]] = (1, 1)
    # True if `matmul` and `swiglu` accept `rows` (gather on load).
    gathers_rows: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot serve ``problem``, or None if it can. Never raises."""
        raise NotImplementedError

    @classmethod
    def here(cls) -> Self:
        """An instance that runs on this machine, interpreted if necessary; raises ``Unavailable`` with the reason."""
        return cls()

    def at_boundary(self, visual_rows: int) -> Self:
        """An instance for a layout whose first ``visual_rows`` rows are visual; only a static split needs this."""
        del visual_rows
        return self

    @classmethod
    def tuning_space(cls, op: str) -> dict[str, list[Any]]:
        """Values worth trying for each field that ``op`` ("ffn" or "matmul") uses, as in JSON."""
        del op
        return {}

    # ---- Primitives every implementation writes ----

    def matmul(
        self,
        x: jax.Array,
        block_expert: jax.Array,
        weights: Pair,
        *,
        block: int,
        transpose: bool = False,
        out_dtype: jnp.dtype | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """y = x @ w[expert of the block]: [M, k] x [k, n] -> [M, n] in ``out_dtype`` (default: the dtype of x).

        With ``transpose`` the weights are [n, k] and y = x @ w.T. With ``rows`` (only if ``gathers_rows``) x is [N, k]
        in any order and row m of the grouped input is x[rows[m]], or zero where rows[m] == N.
        """
        raise NotImplementedError

    def swiglu(
        self,
        x: jax.Array,
        block_expert: jax.Array,
        gates: Pair,
        ups: Pair,
        *,
        block: int,
        save: bool,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(h, gate, up) with gate = x @ gates[e], up = x @ ups[e], h = silu(gate) * up, all [M, ff] in the dtype of x.

        h is computed from the float32 sums. Without ``save``, gate and up are None and must not be written to memory.
        """
        raise NotImplementedError

    def weight_gradient(
        self, x: jax.Array, dy: jax.Array, block_expert: jax.Array, expert: int, *, block: int, out_dtype: jnp.dtype
    ) -> jax.Array:
        """Sum of x_t.T @ dy_t over the blocks t of ``expert``: [M, k], [M, n] -> [k, n]; zeros if it has no block."""
        raise NotImplementedError

    # ---- Primitives with a default; override to fuse ----

    def swiglu_backward(
        self, dy: jax.Array, block_expert: jax.Array, downs: Pair, gate: jax.Array, up: jax.Array, *, block: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(h, dgate, dup), all [M, ff], from dy [M, d] and the saved gate and up; downs are [ff, d]."""
        dh = self.matmul(dy, block_expert, downs, block=block, transpose=True, out_dtype=jnp.float32)
        return swiglu_backward(dh, gate, up)

    def swiglu_dx(
        self, dgate: jax.Array, dup: jax.Array, block_expert: jax.Array, gates: Pair, ups: Pair, *, block: int
    ) -> jax.Array:
        """dx = dgate @ gates[e].T + dup @ ups[e].T, [M, d] in the dtype of dgate (one GEMM over 2 * ff when fused)."""
        partial_dx = self.matmul(dgate, block_expert, gates, block=block, transpose=True, out_dtype=jnp.float32)
        rest = self.matmul(dup, block_expert, ups, block=block, transpose=True, out_dtype=jnp.float32)
        return (partial_dx + rest).astype(dgate.dtype)


def swiglu_forward(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu(gate) * up in float32, rounded once to ``dtype``."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)


def swiglu_backward(dh: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(h, dgate, dup) in the dtype of gate; arithmetic in float32. silu' = s * (1 + g * (1 - s)), s = sigmoid."""
    dtype = gate.dtype
    dh, gate, up = (v.astype(jnp.float32) for v in (dh, gate, up))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (silu * up).astype(dtype), dgate.astype(dtype), (dh * silu).astype(dtype)
