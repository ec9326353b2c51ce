"""How a model is computed: results stay the same but for rounding, and nothing of it is stored with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Remat = Literal["none", "full", "dots", "dots_no_batch"]
Experts = Literal["static", "dense_both", "grouped"]
Attention = Literal["auto", "xla", "xla_chunked", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of memory against time, and of kernels.

    Attributes:
      remat: what the backward pass recomputes: "none" (keep all), "full" (keep layer inputs only), "dots" (keep matmul
        outputs), "dots_no_batch" (keep outputs of matmuls with weights).
      experts: "static" = the boundary between visual and text slots is static, each expert sees its own slots;
        "grouped" = the kernels of ``pallas_kernels``, which also serve ragged boundaries (each row its own);
        "dense_both" = both experts on all tokens, chosen by mask (the papers' naive form, the oracle of the tests).
      experts_kernel: with "grouped", the kernel's name in ``pallas_kernels.registry``; "auto" = chosen by device,
        dtype and shape.
      experts_block: with "grouped", slots that share an expert; boundaries are multiples of it.
      attention: "auto" (by device and length), "xla" (S x S scores; any device), "xla_chunked" (queries in chunks of
        ``attention_chunk``; memory linear in S), "cudnn" (Hopper), "splash" (TPU).
      attention_chunk: queries whose scores are in memory at once.
      loss_chunk: text slots whose logits are in memory at once; 0 = all.
    """

    remat: Remat = "none"
    experts: Experts = "static"
    experts_kernel: str = "auto"
    experts_block: int = 128
    attention: Attention = "auto"
    attention_chunk: int = 512
    loss_chunk: int = 0

    def replace(self, **changes: Any) -> Execution:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def remat_scan(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a scan over layers, with what ``remat`` says recomputed in the backward pass."""
        import jax  # here, so that configs are read without it

        policies = {
            "full": None,
            "dots": jax.checkpoint_policies.dots_saveable,
            "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }
        if self.remat == "none":
            return body
        return jax.checkpoint(body, policy=policies[self.remat], prevent_cse=False)
