"""Mosaic GPU attention in the interpreter: values, races, refusals. What the interpreter cannot see: see the experts'.

It knows no transposed operands and none in registers, so products are made by XLA there (``mosaic_loop``).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax._src.core import jaxprs_in_params

from pallas_kernels.attention.backends.mosaic import MosaicGpu
from pallas_kernels.attention.backends.mosaic_loop import Config
from pallas_kernels.attention.contract import LSE, OUTPUT, Problem
from pallas_kernels.checks.attention import AttentionCase, errors
from tests.pallas_kernels.attention.suite import Conformance, assert_within

params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.slow  # the interpreter compiles every kernel anew for every call
class TestMosaicGpu(Conformance):
    implementation_class = MosaicGpu
    dtypes = ("bfloat16",)


def racing(**changes) -> MosaicGpu:
    return dataclasses.replace(MosaicGpu(interpret=params.InterpretGPUParams(detect_races=True)), **changes)


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    return get_races().races_found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(AttentionCase("border_after_one_token", 200, heads=2, kv_heads=1), id="groups"),
        pytest.param(AttentionCase("padding", 300, (100, 100), heads=1, kv_heads=1, images=True), id="part"),
    ],
)
@pytest.mark.slow
def test_tiles_and_rings(case: AttentionCase):
    """Several tiles, rings that wrap around, blocks of other samples left out, rows that are no whole tiles."""
    small = Config(block=32, stages=2)
    kernels = racing(output=Config(block=64, stages=2), dquery=small, dkeys=small)
    assert_within(errors(kernels, dataclasses.replace(case, dtype="bfloat16")), "bfloat16")
    assert not races_found()


@pytest.mark.parametrize(("names", "runs"), [((OUTPUT, LSE), 1), ((), 2)])
def test_the_forward_kernel_runs_once_where_its_results_are_kept(names: tuple[str, ...], runs: int):
    (query, key, value), intervals, _, _ = AttentionCase(dtype="bfloat16").inputs()

    def loss(*qkv):
        return jnp.sum(jnp.square(MosaicGpu()(*qkv, intervals).astype(jnp.float32)))

    kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(*names))
    program = jax.make_jaxpr(jax.value_and_grad(kept, argnums=(0, 1, 2)))(query, key, value)
    assert kernels(program.jaxpr) == runs + 2


def kernels(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Kernels that the equations call, those of inner programs counted each time."""
    return sum(
        1
        if equation.primitive.name in ("mpmd_map", "core_map")
        else sum(map(kernels, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "tf32"),
        ({"dim": 256}, "up to 128, not 256"),
        ({"device": "nvidia_a100"}, "Hopper"),
        ({"device": "nvidia_b200"}, "Hopper"),
        ({"in_order": False}, "sequence order"),
        ({"causal": False}, None),
        ({"dim": 80}, None),
        ({}, None),
    ],
)
def test_refusals(changes: dict, reason: str | None):
    sizes = {"batch": 1, "queries": 200, "keys": 256, "heads": 4, "kv_heads": 2, "dim": 128}
    problem = Problem(**{**sizes, "dtype": "bfloat16", "device": "nvidia_h200", **changes})
    refusal = MosaicGpu().unsupported(problem)
    assert refusal is None if reason is None else reason in refusal


def test_parameters_from_a_tuning_table():
    implementation = MosaicGpu(dkeys={"stages": 3})
    assert implementation.dkeys == Config(block=64, stages=3)
    assert hash(implementation) == hash(MosaicGpu(dkeys=Config(block=64, stages=3)))
