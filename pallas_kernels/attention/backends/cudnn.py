"""Attention by cuDNN's fused kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import jax

from pallas_kernels.attention.contract import Implementation, Intervals, Problem, needs_order, visible
from pallas_kernels.errors import Unavailable


@dataclasses.dataclass(frozen=True)
class Cudnn(Implementation):
    """Flash attention with a mask [B, 1, Q, K] for all heads; it skips nothing."""

    name: ClassVar[str] = "attention/cudnn"

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.device.startswith("nvidia"):
            return f"needs an NVIDIA GPU, this is {problem.device}"
        if problem.dtype != "bfloat16":
            return f"needs bfloat16, not {problem.dtype}"
        if problem.dim % 8:
            return f"needs a head size of a multiple of 8, not {problem.dim}"
        return needs_order(problem)

    @classmethod
    def here(cls) -> Self:
        if jax.default_backend() != "gpu":
            raise Unavailable("cuDNN's kernels run on NVIDIA GPUs only")
        return cls()

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        mask = visible(intervals, key.shape[1])[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
