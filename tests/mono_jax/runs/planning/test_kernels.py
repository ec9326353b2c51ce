from __future__ import annotations

import pytest

from mono_jax.runs.planning.kernels import visited_pairs
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
    assert visited_pairs(implementation, slots, samples) == pairs


@pytest.mark.parametrize("samples", [1, 3, 8, 12.5])
def test_whoever_skips_samples_computes_what_is_seen_and_a_little_more(samples: float):
    slots, length = 8192, 8192 / samples
    useful = slots * (length + 1) / 2
    names = [n for n in ("pallas_tpu", "mosaic_gpu", "cudnn", "xla_blocked") if f"attention/{n}" in IMPLEMENTATIONS]
    assert len(names) >= 3
    for name in names:
        implementation = implementation_class(f"attention/{name}")()
        assert useful <= visited_pairs(implementation, slots, samples) <= 1.7 * useful + slots * 128, name
