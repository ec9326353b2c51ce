"""How a model is computed: results stay the same up to rounding, and none of this is stored with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError

Program = TypeVar("Program", bound=Callable[..., Any])

# "auto", or a name in pallas_kernels.registry without its prefix.
AttentionName = Literal[
    "auto", "xla", "xla_chunked", "xla_blocked", "pallas_tpu", "splash", "mosaic_gpu", "cudnn", "cudnn_masked"
]

# What remat policies may keep of a layer besides its attention's output, by the names given to `checkpoint_name`.
LAYER_INPUT, LAYER_MIDDLE = "layer_input", "layer_middle"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Trade-offs of memory against time, and choices of kernels."""

    remat: Literal["none", "dots", "dots_no_batch", "names", "offload", "full"] = field(
        "none",
        help='what is stored for the backward pass: "none" = everything (nothing is recomputed); "dots" = outputs of '
        'matmuls and of attention, "dots_no_batch" = of matmuls with weights and of attention; "names" = the layer\'s '
        'input, its output of attention and the input of its FFN (3 * d values a token); "offload" = the same in the '
        'host\'s memory; "full" = layer inputs only',
    )
    grad_reduce_dtype: Literal["compute", "float32"] = field(
        "compute",
        help="dtype in which devices sum gradients of matrices and embeddings: the activations' dtype, or float32 "
        '(twice the bytes); not with experts "grouped"',
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
    context_parallel: Literal["all_gather", "ulysses"] = field(
        "all_gather",
        help='how devices along mesh.context share the attention of a row: "all_gather" = each gathers the keys and '
        'values of the row for its own queries; "ulysses" = they exchange slots for heads, so that each has some heads '
        "of the whole row; mesh.context * mesh.tensor must divide the heads of keys then",
    )
    float32_matmul: Literal["float32", "fastest"] = field(
        "float32",
        help='with dtype "float32": how training and its held-out loss multiply matrices, forward and backward; '
        '"float32" = in float32 on every device; "fastest" = in TF32 (10 bits of mantissa) on NVIDIA GPUs, in one pass '
        "of bfloat16 (7 bits) on TPUs, in float32 on CPUs. Where the environment sets JAX_DEFAULT_MATMUL_PRECISION, "
        'that decides in place of "float32", and for every other command',
    )
    loss_chunk: int = field(0, ge=0, help="text slots of each row whose logits are in memory at once; 0 = all")

    def __post_init__(self) -> None:
        strict.check(self, "execution", ConfigError)
        if self.wide_gradients and self.experts == "grouped":
            raise ConfigError(
                "execution.grad_reduce_dtype 'float32' with execution.experts 'grouped': these kernels add up in the "
                "activations' dtype; use 'static' or 'compute'"
            )

    @property
    def exchanges_heads(self) -> bool:
        """Whether devices that share rows exchange slots for heads, so that each has whole rows in attention."""
        return self.context_parallel == "ulysses"

    @property
    def wide_gradients(self) -> bool:
        """Whether devices add up gradients of matrices in float32, whatever the dtype of the activations."""
        return self.grad_reduce_dtype == "float32"

    def with_products(self, program: Program) -> Program:
        """``program`` with products as ``float32_matmul`` says; with its backward pass, which is traced last."""
        import jax  # here, so that configs are read without it

        return jax.default_matmul_precision("default")(program) if self.float32_matmul == "fastest" else program

    def remat_scan(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a scan over layers, with what ``remat`` says recomputed in the backward pass."""
        import jax  # here, so that configs are read without it

        from pallas_kernels.attention.contract import LSE, OUTPUT

        keep = jax.checkpoint_policies
        attention = keep.save_only_these_names(OUTPUT, LSE)
        policies = {
            "full": None,
            "dots": keep.save_from_both_policies(keep.dots_saveable, attention),
            "dots_no_batch": keep.save_from_both_policies(keep.dots_with_no_batch_dims_saveable, attention),
            "names": keep.save_only_these_names(OUTPUT, LSE, LAYER_MIDDLE),
            "offload": keep.save_and_offload_only_these_names(
                names_which_can_be_saved=[LSE],
                names_which_can_be_offloaded=[LAYER_INPUT, OUTPUT, LAYER_MIDDLE],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        }
        if self.remat == "none":
            return body
        return jax.checkpoint(body, policy=policies[self.remat], prevent_cse=False)
