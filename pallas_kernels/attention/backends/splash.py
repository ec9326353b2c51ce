"""Attention with the Splash kernel that JAX ships for TPUs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from pallas_kernels.attention.contract import OUTPUT, Implementation, Intervals, Problem, needs_causal_rows, needs_order

LANES = 128  # rows must be a multiple of this many slots


@dataclasses.dataclass(frozen=True)
class Splash(Implementation):
    """Skips blocks above the diagonal; other samples of a row are computed and masked by segment ids.

    Attributes:
      block: maximum number of queries and keys per block; the largest divisor of the row's slots is used.
      interpret: run on any machine, slowly.
    """

    name: ClassVar[str] = "attention/splash"
    granularity: ClassVar[int] = LANES

    block: int = 1024
    interpret: bool = False

    def unsupported(self, problem: Problem) -> str | None:
        if not (self.interpret or problem.device.startswith("tpu")):
            return f"needs a TPU, this is {problem.device} (tests pass Splash(interpret=True))"
        if problem.queries % LANES:
            return f"needs rows with a multiple of {LANES} slots, got {problem.queries}: change V or T"
        if problem.dtype == "float32" and not self.interpret:
            return "multiplies float32 in bfloat16 passes: use pallas_tpu, xla_chunked or xla_blocked"
        return needs_order(problem) or needs_causal_rows(problem)

    @classmethod
    def here(cls) -> Self:
        return cls(interpret=jax.default_backend() != "tpu")

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {"block": [512, 1024, 2048]}

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        from jax.experimental.pallas.ops.tpu import splash_attention

        length, heads, dim = query.shape[1:]
        block = next(b for b in range(min(self.block, length), 0, -LANES) if length % b == 0)
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        sizes = splash_attention.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
        mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
        kernel = splash_attention.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=OUTPUT,
            interpret=self.interpret,
        )
        heads_first = (jnp.swapaxes(a, 1, 2) for a in (query * dim**-0.5, key, value))
        # The start of a token's sample identifies the sample.
        samples = splash_attention.SegmentIds(q=intervals.first, kv=intervals.first)
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first, samples), 1, 2)
