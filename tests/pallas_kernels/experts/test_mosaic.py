"""Mosaic GPU kernels in the interpreter: values, poisoned outputs (memory starts as NaN), races, refusals.

The interpreter's clocks follow barriers, and since jax 0.11 commit_smem and wait_smem_to_gmem. It treats wgmma_wait as
a no-op, so what it cannot see is that one of these is missing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks.conformance import Case, errors, relative_error
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.backends.mosaic import (
    Config,
    MosaicGpu,
    grouped_matmul,
    grouped_swiglu,
    grouped_swiglu_backward,
    weight_gradient,
)
from pallas_kernels.experts.contract import Problem
from tests.pallas_kernels.kernel_suite import Conformance, assert_within

params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

EXPERTS = np.array([1, -1, 0], np.int32)  # visual, empty, text
ROUNDING = 2.0**-8  # of results stored in bfloat16
TINY = Config(block_n=128, stages=2)


@pytest.mark.slow  # the interpreter compiles every kernel anew for every call
class TestMosaicGpu(Conformance):
    implementation_class = MosaicGpu
    dtypes = ("bfloat16",)
    row_counts = (1, 129)


def test_ffn():
    case = Case.fitting(MosaicGpu, "padding_among_rows", "bfloat16")
    assert_within(errors(MosaicGpu.here(), case), "bfloat16")


def test_matmul():
    case = Case.fitting(MosaicGpu, "unaligned_runs", "bfloat16", rows=200)
    assert_within(errors(MosaicGpu.here(), case, "matmul"), "bfloat16")


@pytest.fixture
def interpreter():
    """With race detection; a race in the test's last kernel fails the test."""
    yield params.InterpretGPUParams(detect_races=True)
    assert not races_found()


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    return get_races().races_found


followed_since_0_11 = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="jax 0.11 follows these")


@pytest.mark.parametrize(
    "left_out",
    [
        None,
        "barrier_wait",
        pytest.param("commit_smem", marks=followed_since_0_11),
        pytest.param("wait_smem_to_gmem", marks=followed_since_0_11),
    ],
)
def test_the_interpreter_finds_what_is_left_out(left_out: str | None):
    """Without this the fixture above might not be able to fail: a kernel that lacks one synchronisation."""

    def unless_left_out(name: str, *arguments) -> None:
        if name != left_out:
            getattr(plgpu, name)(*arguments)

    def kernel(x, out, block, landed):
        plgpu.copy_gmem_to_smem(x, block, landed)
        unless_left_out("barrier_wait", landed)
        for _ in range(2):
            block[...] = jnp.zeros_like(block)
            unless_left_out("commit_smem")
            plgpu.copy_smem_to_gmem(block, out)
            unless_left_out("wait_smem_to_gmem", 0)
        # At the end nothing may be under way.
        if left_out == "barrier_wait":
            plgpu.barrier_wait(landed)
        plgpu.wait_smem_to_gmem(0)

    x = jnp.ones((8, 128))
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        grid=(1,),
        grid_names=("sm",),
        interpret=params.InterpretGPUParams(detect_races=True),
    )
    jax.block_until_ready(run(x))
    assert races_found() == (left_out is not None)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def pair(seed: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    return normal(seed, *shape), normal(seed + 1, *shape)


def expected_matmul(x, weights, block_expert=EXPERTS, block=128) -> np.ndarray:
    """Row blocks times the float64 weight of their expert, zeros for empty blocks."""
    x, weights = np.float64(x), [np.float64(w) for w in weights]
    blocks = x.reshape(-1, block, x.shape[1])
    y = [t @ weights[e] if e >= 0 else np.zeros((block, weights[0].shape[1])) for t, e in zip(blocks, block_expert)]
    return np.concatenate(y)


def poisoned(x: jax.Array) -> jax.Array:
    """NaN in the rows of the empty block."""
    return x.at[128:256].set(jnp.nan)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY, id="one_block"),
        pytest.param(Config(block_n=64, stages=3, group=2, num_sms=3), id="three_blocks"),
        pytest.param(Config(block_n=256, stages=2, rows_minor=False), id="columns_minor"),
    ],
)
def test_grouped_matmul(config: Config, interpreter):
    """Depth 192 takes three steps, so the ring wraps around; blocks of several blocks and orders cover the output."""
    x, weights = normal(0, 384, 192), pair(1, 192, 256)
    y = grouped_matmul([poisoned(x)], [weights], EXPERTS, config=config, interpret=interpreter)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, expected_matmul(x, weights)) < ROUNDING


def test_two_terms_transposed_in_float32(interpreter):
    """dX of gate and up: one accumulation over both products."""
    xs, weights = pair(0, 384, 128), [pair(2, 128, 128), pair(4, 128, 128)]
    y = grouped_matmul(
        [poisoned(x) for x in xs],
        weights,
        EXPERTS,
        transpose=True,
        out_dtype=jnp.float32,
        config=TINY,
        interpret=interpreter,
    )
    expected = sum(expected_matmul(x, [w.T for w in ws]) for x, ws in zip(xs, weights))
    assert relative_error(y, expected) < 1e-6


def test_blocks_larger_than_128_rows(interpreter):
    x, weights = normal(0, 512, 64), pair(1, 64, 128)
    y = grouped_matmul([x], [weights], np.array([0, 1], np.int32), block=256, config=TINY, interpret=interpreter)
    assert relative_error(y, expected_matmul(x, weights, [0, 1], block=256)) < ROUNDING


@pytest.mark.parametrize("save", [False, True])
def test_swiglu(save: bool, interpreter):
    x, gates, ups = normal(0, 384, 128), pair(1, 128, 128), pair(3, 128, 128)
    h, gate, up = grouped_swiglu(poisoned(x), gates, ups, EXPERTS, save=save, config=TINY, interpret=interpreter)
    expected_gate, expected_up = expected_matmul(x, gates), expected_matmul(x, ups)
    expected = expected_gate / (1 + np.exp(-expected_gate)) * expected_up
    assert relative_error(h, expected) < ROUNDING
    if save:
        assert relative_error(gate, expected_gate) < ROUNDING
        assert relative_error(up, expected_up) < ROUNDING
    else:
        assert gate is None and up is None


def test_swiglu_backward(interpreter):
    """Four chunks a block: the two slots are filled, written from and filled again."""
    dy, downs, gate, up = normal(0, 384, 64), pair(1, 256, 64), normal(3, 384, 256), normal(4, 384, 256)
    outputs = grouped_swiglu_backward(
        poisoned(dy),
        downs,
        poisoned(gate),
        poisoned(up),
        EXPERTS,
        config=Config(block_n=256, stages=2),
        interpret=interpreter,
    )
    dh = expected_matmul(dy, [w.T for w in downs])
    live = np.repeat(EXPERTS >= 0, 128)[:, None]
    g, u = np.float64(gate) * live, np.float64(up) * live
    sigmoid = 1 / (1 + np.exp(-g))
    expected = (g * sigmoid * u, dh * u * sigmoid * (1 + g * (1 - sigmoid)), dh * g * sigmoid)
    for name, actual, value in zip(("h", "dgate", "dup"), outputs, expected):
        assert relative_error(actual, value) < ROUNDING, name


@pytest.mark.parametrize("expert", [0, 1])
def test_weight_gradient(expert: int, interpreter):
    x, dy = normal(0, 512, 128), normal(1, 512, 128)
    block_expert = np.array([1, 0, -1, 1], np.int32)
    ours = np.repeat(block_expert == expert, 128)
    others = ~ours[:, None]
    dw = weight_gradient(
        jnp.where(others, jnp.nan, x),
        jnp.where(others, jnp.nan, dy),
        block_expert,
        expert,
        config=TINY,
        interpret=interpreter,
    )
    assert dw.dtype == jnp.float32
    assert relative_error(dw, np.float64(x)[ours].T @ np.float64(dy)[ours]) < 1e-6


def test_weight_gradient_of_an_idle_expert_is_zero(interpreter):
    x = normal(0, 128, 128)
    dw = weight_gradient(x, x, np.zeros(1, np.int32), 1, out_dtype=jnp.bfloat16, config=TINY, interpret=interpreter)
    assert dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(dw), 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "tf32"),
        ({"block": 64}, "multiple of 128"),
        ({"d": 192}, "widths"),
        ({"device": "nvidia_a100"}, "Hopper"),
        ({}, None),
    ],
)
def test_refusals(changes: dict, reason: str | None):
    problem = {
        "op": "ffn",
        "rows": 256,
        "block": 128,
        "d": 128,
        "ff": 256,
        "dtype": "bfloat16",
        "device": "nvidia_h200",
    }
    refusal = MosaicGpu().unsupported(Problem(**problem | changes))
    assert refusal is None if reason is None else reason in refusal


def test_too_few_devices_for_the_interpreter(monkeypatch):
    """With one device it would wait for ever."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with pytest.raises(Unavailable, match=r"needs 3 CPU devices, but there are 1 .*device_count=8"):
        MosaicGpu.here()


def test_parameters_from_a_tuning_table():
    implementation = MosaicGpu(product={"stages": 3}, backward={"group": 4})
    assert implementation.product == Config(stages=3)
    assert implementation.backward == Config(stages=3, group=4)
    assert hash(implementation) == hash(MosaicGpu(product=Config(stages=3), backward=Config(stages=3, group=4)))
