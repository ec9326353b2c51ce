"""How a model is computed: results stay the same but for rounding, and nothing of it is stored with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError

# "auto", or a name in pallas_kernels.registry without its room.
AttentionName = Literal[
    "auto", "xla", "xla_chunked", "xla_blocked", "pallas_tpu", "splash", "mosaic_gpu", "cudnn", "cudnn_masked"
]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of memory against time, and of kernels."""

    remat: Literal["none", "full", "dots", "dots_no_batch"] = field(
        "none",
        help='what the backward pass recomputes: "none" (keep all), "full" (keep layer inputs only), "dots" (keep '
        'outputs of matmuls), "dots_no_batch" (keep outputs of matmuls with weights)',
    )
    experts: Literal["static", "grouped", "dense_both"] = field(
        "static",
        help='"static" = every row has the same boundary, each expert sees its own slots; "grouped" = the kernels of '
        'pallas_kernels, which also serve ragged boundaries; "dense_both" = both experts on all tokens, chosen by mask '
        "(the papers' naive form, the oracle of the tests)",
    )
    experts_kernel: str = field(
        "auto", help='with "grouped": name in pallas_kernels.registry; "auto" = by device, dtype and shape'
    )
    experts_block: int = field(
        128, ge=1, help='with "grouped": slots that share an expert; boundaries are its multiples'
    )
    attention: AttentionName = field(
        "auto",
        help='"auto" (by device, dtype and length), "xla" (S x S scores, any device), "xla_chunked" and "xla_blocked" '
        '(any device, memory linear in S; the latter skips other samples), "mosaic_gpu" (Hopper), "cudnn" (Hopper '
        'and later), "cudnn_masked" (NVIDIA, an S x S mask), "pallas_tpu" (TPU, skips other samples), "splash" (TPU, '
        "does not)",
    )
    attention_chunk: int = field(512, ge=1, help='with "xla_chunked": queries whose scores are in memory at once')
    loss_chunk: int = field(0, ge=0, help="text slots of each row whose logits are in memory at once; 0 = all")

    def __post_init__(self) -> None:
        strict.check(self, "execution", ConfigError)

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
