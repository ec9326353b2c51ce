"""The forms of attention agree; the fused kernels run on a mesh and compile for absent chips."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from data_pipelines.batch import BatchSpec
from mono_jax.errors import ConfigError
from mono_jax.models.attention import attend
from mono_jax.models.cache import Cache
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.slots import Slots, make_slots
from mono_jax.models.transformer import Model
from mono_jax.parallel import mesh as mesh_lib
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training import stages
from mono_jax.training import step as train
from mono_jax.training.optim import make_optimizer
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import abstract_state
from pallas_kernels.attention.backends import splash
from pallas_kernels.attention.contract import Intervals, Problem
from pallas_kernels.checks import cuda as cuda_aot
from pallas_kernels.checks import tpu as tpu_aot
from pallas_kernels.errors import Unavailable
from tests.mono_jax.helpers import random_batch

HEADS, KV_HEADS, DIM = 4, 2, 128
SPEC = BatchSpec(128, 128)
SMALL = BatchSpec(128, 128, preset("tiny_mono").vision.token_pixels)


def problem(rows: int) -> tuple[list[jax.Array], Slots]:
    """Random query, key and value, and the slots of packed rows."""
    batch = {name: jnp.asarray(array) for name, array in random_batch(rows, SPEC).items()}
    shapes = [(rows, SPEC.sequence, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    qkv = [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(shapes)]
    return qkv, make_slots(preset("tiny_mono"), batch, SPEC.visual_tokens)


def output_and_gradients(kind: str, rows: int) -> list[jax.Array]:
    qkv, slots = problem(rows)
    execution = Execution(attention=kind, attention_chunk=64)

    def mixed(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.where((slots.segments > 0)[..., None, None], attend(execution, *qkv, slots), 0)
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(mixed, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return [y, *gradients]


@functools.cache
def expected(rows: int) -> list[np.ndarray]:
    return jax.device_get(jax.jit(output_and_gradients, static_argnums=(0, 1))("xla", rows))


def assert_same(found: list[jax.Array], rows: int) -> None:
    for one, other in zip(found, expected(rows), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash by name runs in Pallas's interpreter."""
    monkeypatch.setattr(splash, "Splash", functools.partial(splash.Splash, interpret=True))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["xla_chunked", "splash"])
def test_forms_agree(kind: str):
    assert_same(jax.jit(output_and_gradients, static_argnums=(0, 1))(kind, 2), 2)


@pytest.mark.usefixtures("interpreted")
def test_fused_kernels_split_rows_and_heads_over_a_mesh():
    mesh = mesh_lib.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])

    run = mesh_lib.on_mesh(lambda: output_and_gradients("splash", 2), mesh)
    assert_same(jax.jit(run, out_shardings=NamedSharding(mesh, mesh_lib.BATCH))(), 2)


@pytest.mark.parametrize(
    ("execution", "fields", "message"),
    [
        ({"attention": "splash"}, {}, r"as many queries as keys, not 128 and 256 \(mesh\.context is 2"),
        ({"experts": "grouped", "experts_block": 128}, {}, "rows of whole blocks: .* shared by mesh.context 2"),
        ({}, {"visual_slots": (2,)}, r"data\.boundary_block gives each row .* set mesh\.context to 1"),
        ({}, {"tokens": (2, 127), "order": (2, 255)}, "128 visual and 127 text slots cannot be shared by 2 devices"),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_what_cannot_be_shared_by_devices_is_refused(execution: dict[str, Any], fields: dict[str, Any], message: str):
    mesh = mesh_lib.make_mesh(MeshConfig(context=2), jax.devices()[:2])
    batch = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in SMALL.fields().items()}
    batch |= {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in fields.items()}
    model = Model(preset("tiny_mono"), Execution(**execution))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(mesh_lib.on_mesh(lambda p, b: model(p, b).hidden, mesh), model.abstract_params(), batch)


def test_keys_of_a_cache_are_not_shared_by_devices():
    def turn(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        cache = model(params, batch, collect=("cache",)).cache
        return model(params, batch, cache=cache.widened(512)).hidden

    mesh = mesh_lib.make_mesh(MeshConfig(context=2), jax.devices()[:2])
    batch = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in SMALL.fields().items()}
    model = Model(preset("tiny_mono"))
    with pytest.raises(ConfigError, match=r"mesh\.context is 2: keys of a cache"):
        jax.eval_shape(mesh_lib.on_mesh(turn, mesh), model.abstract_params(), batch)


def compiled_step(devices: list[jax.Device], platform: str, execution: Execution) -> str:
    """The program of a training step on four absent devices: rows split in two, heads in two."""
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 512}
    config = preset("tiny_mono", **sizes)
    mesh = mesh_lib.make_mesh(MeshConfig(1, 2, 2), devices)
    model, stage = Model(config, execution), stages.get_stage("S1.1")
    optimizer = make_optimizer(stage, config, model.abstract_params(), 10, OptimConfig())
    placed = abstract_state(stage, model, optimizer, mesh)
    spec = BatchSpec(128, 128, config.vision.token_pixels)
    batch = {
        name: jax.ShapeDtypeStruct((4, *shape), dtype, sharding=NamedSharding(mesh, mesh_lib.BATCH))
        for name, (shape, dtype) in spec.fields().items()
    }
    step = train.jit_train_step(train.make_train_step(model, optimizer), model, *placed, mesh)
    return step.trace(*placed, batch).lower(lowering_platforms=(platform,)).compile().as_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": "grouped", "experts_kernel": "pallas_tpu", "experts_block": 128},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_the_training_step_compiles_for_several_tpus(changes: dict[str, Any]):
    """With the kernels chosen there; XLA's partitioner cannot split them, so each device runs its own."""
    try:
        devices = tpu_aot.chips("v5e")
    except Unavailable as reason:
        pytest.skip(str(reason))
    program = compiled_step(devices, "tpu", Execution(**changes))
    assert "packed_attention_backward" in program and ("modality_grouped" in program) == bool(changes)


@pytest.mark.parametrize(("attention", "call"), [("auto", "mosaic_gpu"), ("cudnn", "__cudnn$fmha")])
def test_the_training_step_compiles_for_several_gpus(attention: str, call: str):
    """Forward and backward of the layers' scan: Mosaic GPU has three kernels, cuDNN two."""
    try:
        devices = cuda_aot.h200s(4)
    except Unavailable as reason:
        pytest.skip(str(reason))
    program = compiled_step(devices, "cuda", Execution(attention=attention))
    assert program.count(f'custom_call_target="{call}') == (3 if attention == "auto" else 2)


@pytest.mark.parametrize(
    ("sizes", "part"),
    [((1, 2, 2), (2, 2, 1)), ((2, 2, 1), (1, 4, 2)), ((1, 1, 4), (4, 4, 2)), ((2, 1, 2), (2, 2, 1))],
)
def test_each_device_has_its_own_rows_and_heads(monkeypatch: pytest.MonkeyPatch, sizes: tuple, part: tuple):
    """Rows, query heads and KV heads per device, for 4 rows; 2 KV heads do not split four ways, so none are split."""
    mesh = mesh_lib.make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    qkv, slots = problem(4)
    shapes = []

    class Kernel(splash.Splash):
        def unsupported(self, problem: Problem) -> None:
            return None

        def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
            shapes.append((query.shape, key.shape, value.shape, intervals.first.shape))
            return query

    monkeypatch.setattr(splash, "Splash", Kernel)
    attend_here = mesh_lib.on_mesh(lambda *qkv: attend(Execution(attention="splash"), *qkv, slots), mesh)
    jax.eval_shape(attend_here, *qkv)
    rows, heads, kv_heads = part
    length = SPEC.sequence
    kv = (rows, length, kv_heads, DIM)
    assert shapes[-1] == ((rows, length, heads, DIM), kv, kv, (rows, length))


@pytest.mark.parametrize("kind", ["auto", "xla", "xla_chunked", "cudnn", "splash"])
def test_a_cache_is_read_in_slot_order_whatever_serves_rows(kind: str):
    """The row's own keys, as if they had been cached: the same output, from one of XLA's forms."""
    (query, key, value), slots = problem(2)
    cache = Cache(key[None], value[None], slots.positions, slots.segments, jnp.int32(SPEC.sequence))
    found = attend(Execution(attention=kind, attention_chunk=64), query, key, value, slots, cache, jnp.int32(0))
    used = np.asarray(slots.segments > 0)
    np.testing.assert_allclose(np.asarray(found)[used], expected(2)[0][used], atol=2e-5)
