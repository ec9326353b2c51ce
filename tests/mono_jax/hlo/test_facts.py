"""Programs whose loops, FLOPs and collectives are known by hand, compiled for 8 simulated devices and absent v5e."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax.hlo.facts import Facts, facts
from pallas_kernels import absent
from pallas_kernels.errors import Unavailable

P = PartitionSpec
TARGETS = ("cpu", "v5e:2x4")


def devices(target: str) -> list[jax.Device]:
    if target == "cpu":
        return jax.devices()
    try:
        return absent.tpus(target)
    except Unavailable as error:
        pytest.skip(str(error))


def compiled(target: str, function: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> Facts:
    """Facts of ``function`` over replicated arrays on a mesh x=4, y=2."""
    found = devices(target)
    mesh = Mesh(np.array(found).reshape(4, 2), ("x", "y"))
    place = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(found[0].platform,))
    return facts(lowered.compile().as_text())


def scan_of_matmuls(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]


def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 5, lambda _, x: scan_of_matmuls(x, w), x)


def steps_of_two(x: jax.Array, w: jax.Array) -> jax.Array:
    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 2, jnp.tanh(carry[1] @ w[0])

    return jax.lax.while_loop(lambda carry: carry[0] < 7, body, (jnp.int32(0), x))[1]  # 0, 2, 4, 6


def downwards(x: jax.Array, w: jax.Array) -> jax.Array:
    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] - 3, jnp.tanh(carry[1] @ w[0])

    return jax.lax.while_loop(lambda carry: carry[0] >= 1, body, (jnp.int32(10), x))[1]  # 10, 7, 4, 1


def until_converged(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ w[0]), x)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("function", "matmuls", "trips"),
    [
        (scan_of_matmuls, 3, [3]),
        (nested, 15, [3, 5]),
        (steps_of_two, 4, [4]),
        (downwards, 4, [4]),
        (jax.grad(lambda x, w: scan_of_matmuls(x, w).sum(), argnums=1), 9, [3, 3]),
        (until_converged, 1, [None]),  # data-dependent: counted once, and reported
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_flops_times_trips(target: str, function: Callable[..., Any], matmuls: int, trips: list[int | None]):
    found = compiled(target, function, (64, 256), (3, 256, 256))
    assert found.flops == matmuls * (2 * 64 * 256 * 256)
    assert sorted(found.loops.values(), key=str) == sorted(trips, key=str)


def every_collective(a: jax.Array, b: jax.Array) -> Any:
    def on_device(a: jax.Array, b: jax.Array) -> Any:
        ring = [(i, (i + 1) % 4) for i in range(4)]
        return (
            jax.lax.psum(a, "x"),
            jax.lax.all_gather(b, "y"),
            jax.lax.psum_scatter(b, "x", tiled=True),
            jax.lax.all_to_all(a, "x", 0, 0, tiled=True),
            jax.lax.ppermute(a, "x", ring),
        )

    outputs = (P(), P(None, None), P("x"), P("x"), P("x"))
    return jax.shard_map(on_device, in_specs=(P(), P()), out_specs=outputs, check_vma=False)(a, b)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_on_the_wire(target: str):
    found = compiled(target, every_collective, (1024, 256), (2048, 128))
    size = 1024 * 256 * 4  # of either array
    assert found.by_kind() == {
        "all-reduce": {"f32": (1, 2 * size * 3 / 4)},
        "all-gather": {"f32": (1, size * 1)},
        "reduce-scatter": {"f32": (1, size * 3 / 4)},
        "all-to-all": {"f32": (1, size * 3 / 4)},
        "collective-permute": {"f32": (1, size * 1)},
    }
    assert {t.kind: t.devices for t in found.transfers} == {
        **dict.fromkeys(("all-reduce", "reduce-scatter", "all-to-all", "collective-permute"), 4),
        "all-gather": 2,
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_partitioner_s_gathers_in_a_loop_count_once_a_trip(target: str):
    """Weights sharded over 8 devices: each of the three layers is gathered once, whether asynchronously or not."""
    found = devices(target)
    mesh = Mesh(np.array(found), ("fsdp",))
    x = jax.ShapeDtypeStruct((8 * 256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((3, 256, 1024), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "fsdp")))

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            w = jax.lax.with_sharding_constraint(w.astype(x.dtype), NamedSharding(mesh, P()))
            return jnp.tanh(x @ w @ w.T), None

        return jax.lax.scan(layer, x, w)[0]

    lowered = jax.jit(function).trace(x, w).lower(lowering_platforms=(found[0].platform,))
    result = facts(lowered.compile().as_text())
    assert result.flops == 3 * 2 * (2 * 256 * 256 * 1024)
    (dtypes,) = result.by_kind().values()
    ((dtype, (times, size)),) = dtypes.items()
    gathered, width = ("f32", 4) if target == "cpu" else ("bf16", 2)  # XLA:CPU multiplies bfloat16 as float32
    assert (dtype, times, size) == (gathered, 3, 3 * 256 * 1024 * width * 7 / 8)
