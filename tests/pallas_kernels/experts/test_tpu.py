"""The Pallas TPU kernels: interpreted on any machine, compiled by the real compiler for chips that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import tpu as tpu_aot
from pallas_kernels.checks.aot import KERNEL_CALLS, compile_ffn, kernel_calls
from pallas_kernels.checks.conformance import Case, errors
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.backends.tpu import PallasTpu
from pallas_kernels.experts.contract import Problem
from tests.pallas_kernels.kernel_suite import Conformance, assert_within


class TestPallasTpu(Conformance):
    implementation_class = PallasTpu


@pytest.mark.parametrize("blocks", [{}, {"block_n": 128, "block_k": 128, "block_rows": 16}])
def test_races_and_unwritten_outputs(blocks: dict):
    """The thorough interpreter: memory starts as NaN, so an unwritten output element shows, and copies are checked."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    case = Case.fitting(PallasTpu, "padding_among_rows", "float32", block=32, rows=70)
    assert_within(errors(PallasTpu(interpret=interpret, **blocks), case), "float32")
    assert not interpret_pallas_call.races.races_found


def test_the_interpreter_finds_a_race():
    """Without this the test above might not be able to fail: a copy in flight and a store to the same place."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    def kernel(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        out_ref[...] = jnp.zeros_like(out_ref)
        copy.wait()

    x = jnp.ones((8, 128))
    interpret = pltpu.InterpretParams(detect_races=True)
    pl.pallas_call(kernel, out_shape=x, scratch_shapes=[pltpu.SemaphoreType.DMA], interpret=interpret)(x)
    assert interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def test_refusals_say_why():
    problem = Problem("ffn", 256, 64, 256, 512, "float32", "cpu")
    assert "needs a TPU" in PallasTpu().unsupported(problem)
    assert "multiples of 128" in PallasTpu(interpret=True).unsupported(dataclasses.replace(problem, d=96))
    assert "must divide block" in PallasTpu(interpret=True, block_rows=48).unsupported(problem)
    assert PallasTpu().unsupported(dataclasses.replace(problem, device="tpu_v5e")) is None


def test_blocks_that_do_not_fit_are_refused():
    case = Case.fitting(PallasTpu, "all_text", "float32")
    with pytest.raises(Unavailable, match="no blocks of"):
        errors(PallasTpu(interpret=True, vmem=1000), case)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def compilation(check):
    slow = "mesh" in check.name and check.target != "v5e"
    return pytest.param(check, id=f"{check.target} {check.name}", marks=[pytest.mark.slow] * slow)


@needs_libtpu
@pytest.mark.parametrize("check", [compilation(c) for c in tpu_aot.tpu_checks()])
def test_compiles_for(check):
    """Machine code for v5e, v5p and v6e, with as many kernel calls as there are experts to train (asserted inside)."""
    assert check.run()["kernel_calls"] > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", tpu_aot.TOPOLOGIES)
def test_compiles_at_the_size_of_the_2b_model(target: str, dtype: str):
    """Vector memory must hold the blocks that the cost model picks: d 2048, ff 8192, 4,096 rows and blocks of 512."""
    sizes = {"rows": 4096 + 512, "d": 2048, "ff": 8192, "block": 512, "dtype": jnp.dtype(dtype)}
    compiled = compile_ffn(tpu_aot.chips(target)[:1], "pallas_tpu", trained="both", **sizes)
    assert kernel_calls(compiled) == KERNEL_CALLS["both"]
