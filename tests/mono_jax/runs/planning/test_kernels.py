from __future__ import annotations

import pytest

from mono_jax.hlo import module, work
from mono_jax.runs.planning.kernels import phase_of, visited_pairs
from pallas_kernels.registry import IMPLEMENTATIONS, implementation_class


@pytest.mark.parametrize(
    ("name", "slots", "samples", "pairs"),
    [
        ("xla", 1024, 4, 1024**2),
        ("xla_chunked", 1024, 4, 1024**2),
        ("splash", 4096, 8, 4096 * (4096 + 1024) / 2),  # causal, blocks of 1,024
        ("splash", 1152, 8, 1152 * (1152 + 384) / 2),  # the largest multiple of 128 that divides 1,152 is 1,152 / 3
    ],
)
def test_pairs_that_a_kernel_computes(name: str, slots: int, samples: float, pairs: float):
    implementation = implementation_class(f"attention/{name}")()
    assert visited_pairs(implementation, slots - 128, 128, samples) == pairs


@pytest.mark.parametrize("samples", [1, 3, 8, 12.5])
def test_whoever_skips_samples_computes_what_is_seen_and_a_little_more(samples: float):
    slots, length = 8192, 8192 / samples
    useful = slots * (length + 1) / 2
    names = [n for n in ("pallas_tpu", "mosaic_gpu", "cudnn", "xla_blocked") if f"attention/{n}" in IMPLEMENTATIONS]
    assert len(names) >= 3
    for name in names:
        implementation = implementation_class(f"attention/{name}")()
        assert useful <= visited_pairs(implementation, slots - 1024, 1024, samples) <= 1.7 * useful + slots * 128, name


# As named in compiled programs: instruction, target, end of the origin. Mosaic GPU's kernels share name and target.
KERNELS = [
    ("packed_attention_forward.2", "tpu_custom_call", "packed_attention_forward", "forward"),
    ("packed_attention_backward.3", "tpu_custom_call", "packed_attention_backward", "backward"),
    ("splash_mha_fwd_residuals.1", "tpu_custom_call", "", "forward"),
    ("splash_mha_dq_no_residuals.1", "tpu_custom_call", "", "dq"),
    ("splash_mha_dkv_no_residuals.1", "tpu_custom_call", "", "dkv"),
    ("mpmd_map.28", "mosaic_gpu_v2", "attention_forward/mpmd_map", "forward"),
    ("mpmd_map.26", "mosaic_gpu_v2", "attention_dq/mpmd_map", "dq"),
    ("mpmd_map.27", "mosaic_gpu_v2", "attention_dkv/mpmd_map", "dkv"),
    ("mpmd_map.29", "mosaic_gpu_v2", "swiglu/mpmd_map", None),
    ("dot_product_attention_fwd.10", "__cudnn$fmhaSoftmax", "cond/dot_product_attention_fwd", "forward"),
    ("dot_product_attention_bwd.4", "__cudnn$fmhaSoftmaxBackward", "cond/dot_product_attention_bwd", "backward"),
]
# The text of GPU programs contains machine code, with unbalanced brackets.
BLOB = r'backend_config={module = "ML\EFR\01%fusion.1 = {(\00"}'


@pytest.mark.parametrize(("name", "target", "origin", "phase"), KERNELS)
def test_kernels_are_found_by_their_names_and_origins(name: str, target: str, origin: str, phase: str | None):
    origin = f"jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/shard_map/{origin}"
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (p: s32[]) -> f32[] {{
  %p = s32[] parameter(0)
  ROOT %{name} = (bf16[1,512,4,64]{{3,2,1,0}}, f32[1,4,512]{{2,1,0}}) custom-call(%p), custom_call_target="{target}", \
metadata={{op_name="{origin}" stack_frame_id=96}}, {BLOB}
}}
"""
    kernel = module.read(text).entry.root
    assert work.is_kernel(kernel)
    assert phase_of(kernel) == phase


@pytest.mark.parametrize("samples", [1, 3, 8, 12.5])
def test_devices_that_share_a_row_have_about_the_same_to_compute(samples: float):
    """The device with the most work has little more than its share, even for a sample as long as the row."""
    implementation = implementation_class("attention/pallas_tpu")()
    whole, shared = (visited_pairs(implementation, 14_336, 2048, samples, ways) for ways in (1, 4))
    useful = 16_384 * (16_384 / samples + 1) / 2
    assert useful <= shared <= 1.3 * whole
