"""The packed kernels for TPUs: interpreted on any machine, compiled by the real compiler for absent chips."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.api import choose
from pallas_kernels.attention.backends import tpu
from pallas_kernels.attention.backends.tpu import Call, PallasTpu, kernel_flops
from pallas_kernels.attention.contract import LSE, OUTPUT, Problem, visible
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.attention.visits import Grid, count_pairs, make_visits
from pallas_kernels.checks import aot
from pallas_kernels.checks import tpu as tpu_aot
from pallas_kernels.checks.aot import kernel_calls
from pallas_kernels.checks.attention import AttentionCase, errors, layouts
from pallas_kernels.errors import Unavailable
from tests.pallas_kernels.attention.suite import Conformance, assert_within

SMALL = {"heads": 2, "kv_heads": 1, "dim": 64}


class TestPallasTpu(Conformance):
    implementation_class = PallasTpu

    def case(self, **changes: Any) -> AttentionCase:
        return super().case(**(SMALL | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"layout": "one_sample", "images": True}, {"layout": "many_tiny_samples", "queries": tuple(range(128, 384))}],
)
def test_blocks_of_several_parts(changes: dict[str, Any]):
    """Rows of two blocks of two parts each."""
    implementation = PallasTpu(block_q=256, block_k=256, interpret=True)
    assert_within(errors(implementation, AttentionCase(length=512, **SMALL, **changes)))


def test_rows_beyond_scalar_memory_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "_MOST_VISITS", 5)
    case = AttentionCase(length=256, **SMALL)  # two rows of up to four visits
    implementation = PallasTpu(block_q=128, block_k=128, interpret=True)
    qkv, intervals, _, _ = case.inputs()
    program = str(jax.make_jaxpr(lambda *qkv: implementation(*qkv, intervals))(*qkv))
    assert program.count("name=packed_attention_forward") == 2
    assert_within(errors(implementation, case))


def test_races_and_unwritten_outputs():
    """The thorough interpreter: memory starts as NaN, so an unwritten output element shows, and copies are checked."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    case = AttentionCase(length=256, **SMALL)
    implementation = PallasTpu(block_q=128, block_k=128, interpret=interpret)
    assert_within(errors(implementation, case))
    assert not interpret_pallas_call.races.races_found


# ---- What is visited ----


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("layout", layouts(96))
@pytest.mark.parametrize(("block_q", "block_k", "part"), [(32, 32, 8), (48, 16, 16), (16, 48, 8)])
def test_all_that_is_seen_is_computed_and_little_else(layout: str, images: bool, block_q: int, block_k: int, part: int):
    case = AttentionCase(layout, length=96, images=images)
    _, intervals, _, _ = case.inputs()
    rows = len(intervals.first)
    grid = Grid(rows, 96 // block_q, 96 // block_k, block_q, block_k, part)
    computed = np.zeros((rows, 96, 96), bool)
    visits = jax.tree.map(np.asarray, make_visits(intervals, grid))
    for code, parts in zip(visits.codes[: visits.count], visits.parts[: visits.count]):
        row, query, key = (int(of(code)) for of in (grid.row, grid.query, grid.key))
        for i in range(grid.parts_q):
            first, count = (int(n) for n in grid.keys_of_part(parts, i))
            q = query * block_q + i * part
            k = key * block_k + first * part
            assert not computed[row, q : q + part, k : k + count * part].any(), "computed twice"
            computed[row, q : q + part, k : k + count * part] = True
    seen = np.asarray(visible(intervals, 96))
    assert computed[seen].all()
    by_part = computed.reshape(rows, 96 // part, part, 96 // part, part)[:, :, 0, :, 0]
    needed = seen.reshape(rows, 96 // part, part, 96 // part, part).any((2, 4))
    np.testing.assert_array_equal(by_part, needed)
    assert count_pairs(intervals, grid) == computed.sum()


def s11_row(seed: int | None) -> np.ndarray:
    """Segments of a row of 10,240 + 1,024 slots with eight samples, equal ones or as a seed has them."""
    lengths = np.full(8, 1408) if seed is None else 1408 + 64 * np.random.default_rng(seed).integers(-8, 9, 8)
    lengths[-1] += 11264 - lengths.sum()
    return np.repeat(np.arange(1, 9), lengths)[None].astype(np.int32)


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_the_work_is_little_more_than_the_useful_one(seed: int | None):
    """Rows of S1.1 with blocks of 512; causal kernels do eight times the useful work."""
    segments = s11_row(seed)
    intervals = packed_intervals(jnp.asarray(segments))
    useful = int((np.asarray(intervals.last) - np.asarray(intervals.first) + 1).sum())
    implementation = choose(Problem(1, 11264, 11264, 16, 8, 128, "bfloat16", "tpu_v5e"))
    grid = implementation.grid(1, 11264, 11264)
    assert (implementation.name, grid.block_q, grid.block_k) == ("attention/pallas_tpu", 512, 512)
    call = Call(grid, 8, 2, 128, implementation.vmem, False)
    for backward, products in ((False, 2), (True, 5)):
        ideal = products * 2 * useful * 128 * 16
        assert ideal < kernel_flops(call, count_pairs(intervals, grid), backward=backward) < 1.3 * ideal


# ---- The program ----


def compiled(queries: int, keys: int, **options: Any) -> jax.stages.Compiled:
    try:
        chip = tpu_aot.chips("v5e")[0]
        return aot.compile_attention(chip, "pallas_tpu", queries=queries, keys=keys, **SMALL, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("policy", "forward"), [(jax.checkpoint_policies.save_only_these_names(OUTPUT, LSE), 1), (None, 2)]
)
def test_the_forward_kernel_runs_once_where_its_results_are_kept(policy: Any, forward: int):
    program = compiled(512, 512, remat=partial(jax.checkpoint, policy=policy))
    assert kernel_calls(program) == forward + 1
    assert "512,512]" not in program.as_text()


def test_queries_of_a_part_of_the_row_compile_and_no_scores_are_in_memory():
    program = compiled(512, 1024)
    assert kernel_calls(program) == 2 and "512,1024]" not in program.as_text()


# ---- Refusals ----


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "needs a TPU"),
        ({"queries": 200}, "a multiple of 128 slots, got 200"),
        ({"keys": 1000}, "a multiple of 128 slots, got 1000"),
        ({"dim": 20}, "a head size that is a multiple of 8, not 20"),
        ({"queries": 2**18, "keys": 2**18}, "scalar memory holds only"),
        ({"device": "tpu_v4", "queries": 32768, "keys": 32768}, "vector memory"),
        ({"in_order": False}, "not in sequence order"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str):
    sizes = {"batch": 1, "queries": 512, "keys": 512, "heads": 16, "kv_heads": 8, "dim": 128}
    problem = Problem(**({"dtype": "bfloat16", "device": "tpu_v5e"} | sizes | changes))
    with pytest.raises(Unavailable, match=reason):
        choose(problem, "pallas_tpu")


def test_images_seen_whole_are_served():
    problem = Problem(1, 512, 512, 16, 8, 128, "bfloat16", "tpu_v5e", causal=False)
    assert choose(problem).name == "attention/pallas_tpu"
