"""The compiled step on 8 devices: simulated CPUs and absent v5e chips.

The model has two layers and small widths; all expected bytes are counted from its shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from data_pipelines.batch import BatchSpec
from mono_jax import tree
from mono_jax.hlo.facts import Facts, Transfer, facts
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import batch_spec, make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training import optim, stages
from mono_jax.training.state import abstract_state
from mono_jax.training.step import jit_train_step, make_train_step
from pallas_kernels import absent
from pallas_kernels.errors import Unavailable

VISION = VisionConfig(hidden_size=128, patch_size=4, image_size=32)
CONFIG = preset(
    "mono_internvl_2b",
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1101,
    vision=VISION,
)
SPEC = BatchSpec(visual_tokens=128, text_tokens=128, token_pixels=VISION.token_pixels)
COLUMNS = 1280  # of the head, padded
CHUNK = 32
FSDP, FSDP_TENSOR, DATA_FSDP = (1, 8, 1), (1, 4, 2), (2, 4, 1)
V5E = "v5e:2x4"


@cache
def text_of(
    target: str,
    axes: tuple[int, ...],
    stage_name: str,
    frozen_dtype: Any = None,
    spec: BatchSpec = SPEC,
    **changes: Any,
) -> str:
    """The compiled step's own text; float32 on CPUs, whose compiler has no bfloat16 collectives."""
    try:
        devices = jax.devices() if target == "cpu" else absent.tpus(target)
    except Unavailable as error:
        pytest.skip(str(error))
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    mesh = make_mesh(MeshConfig(*axes), devices)
    model = Model(CONFIG, Execution(**({"remat": "full", "attention": "xla", "loss_chunk": CHUNK} | changes)))
    stage = stages.get_stage(stage_name)
    optimizer = optim.make_optimizer(stage, CONFIG, model.abstract_params(), 100)
    state, frozen = abstract_state(stage, model, optimizer, mesh, frozen_dtype or dtype)
    batch = {
        name: jax.ShapeDtypeStruct((8, *shape), dtype, sharding=NamedSharding(mesh, batch_spec(name)))
        for name, (shape, dtype) in spec.fields().items()
    }
    step = jit_train_step(make_train_step(model, optimizer, dtype=dtype), model, state, frozen, mesh)
    lowered = step.trace(state, frozen, batch).lower(lowering_platforms=(devices[0].platform,))
    return lowered.compile().as_text()


@cache
def facts_of(target: str, axes: tuple[int, ...], stage_name: str, **options: Any) -> Facts:
    return facts(text_of(target, axes, stage_name, **options))


def sizes(*patterns: str) -> int:
    """Parameters whose paths match."""
    flat = tree.flatten(Model(CONFIG).abstract_params())
    return sum(leaf.size for path, leaf in flat.items() if any(re.search(p, path) for p in patterns))


def sent(found: Facts, kind: str, dtype: str) -> float:
    return found.by_kind().get(kind, {}).get(dtype, (0, 0.0))[1]


def shapes_of(transfers: Iterable[Transfer]) -> set[tuple[int, ...]]:
    """Of what is sent, without dimensions of 1."""
    return {tuple(d for d in dims if d > 1) for transfer in transfers for dims in transfer.dims}


KERNELS, HEAD, PROJECTOR = r"layers/.*kernel", "lm_head", "projector/.*kernel"
TRAINED = (r"visual_feed_forward/.*kernel", PROJECTOR)  # in S1.1
D, FFN = CONFIG.hidden_size, CONFIG.intermediate_size
TARGETS = [("cpu", "f32", 4), (V5E, "bf16", 2)]


@pytest.mark.parametrize(("target", "dtype", "size"), TARGETS)
@pytest.mark.parametrize(
    "axes", [pytest.param(FSDP, marks=pytest.mark.slow), FSDP_TENSOR, pytest.param(DATA_FSDP, marks=pytest.mark.slow)]
)
def test_weights_are_gathered_twice_and_in_one_dtype(target: str, dtype: str, size: int, axes: tuple[int, int, int]):
    """Forward, and again backward; each device receives (n - 1) / n of the weights that it computes with."""
    found = facts_of(target, axes, "S1.1")
    _, fsdp, tensor = axes
    whole = (2 * sizes(KERNELS) + sizes(PROJECTOR, HEAD)) / tensor * size
    assert 0.99 * whole < sent(found, "all-gather", dtype) * fsdp / (fsdp - 1) < 1.3 * whole
    vectors = shapes_of(t for t in found.transfers if t.kind == "all-gather" and t.dtype not in (dtype, "s32", "pred"))
    assert all(math.prod(dims) <= FFN for dims in vectors)


@pytest.mark.parametrize("axes", [pytest.param(FSDP, marks=pytest.mark.slow), FSDP_TENSOR])
def test_frozen_weights_in_float32_are_sent_in_bfloat16(axes: tuple[int, int, int]):
    found = facts_of(V5E, axes, "S1.1", frozen_dtype=jnp.float32)
    moved = shapes_of(t for t in found.transfers if t.dtype == "f32" and t.kind != "all-reduce")
    assert all(math.prod(dims) <= FFN for dims in moved), moved


@pytest.mark.parametrize(
    "axes", [pytest.param(FSDP, marks=pytest.mark.slow), FSDP_TENSOR, pytest.param(DATA_FSDP, marks=pytest.mark.slow)]
)
def test_gradients_of_weights_are_scattered(axes: tuple[int, int, int]):
    """No device holds a whole sum; copies of the model (``data``) add up the parts that each keeps."""
    found = facts_of(V5E, axes, "S1.1")
    _, fsdp, tensor = axes
    whole = sizes(*TRAINED) / tensor * 2 * (fsdp - 1) / fsdp
    assert sent(found, "reduce-scatter", "bf16") == pytest.approx(whole, rel=0.02)
    added = shapes_of(t for t in found.transfers if t.kind == "all-reduce")
    assert not added & {(D, FFN // tensor), (FFN // tensor, D)}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [FSDP, DATA_FSDP])
def test_gradients_are_added_up_in_float32_if_asked(axes: tuple[int, int, int]):
    """All matrices; arrays gathered in float32 are not weights but at most gradients of embedded tokens."""
    narrow, wide = (facts_of(V5E, axes, "S2", grad_reduce_dtype=dtype) for dtype in ("compute", "float32"))
    whole = (sizes(KERNELS, PROJECTOR) + D * COLUMNS) * (axes[1] - 1) / axes[1]
    assert sent(narrow, "reduce-scatter", "bf16") == pytest.approx(2 * whole, rel=1e-3)
    assert sent(wide, "reduce-scatter", "f32") == pytest.approx(4 * whole, rel=1e-3)
    assert sent(narrow, "reduce-scatter", "f32") == sent(wide, "reduce-scatter", "bf16") == 0
    assert sent(wide, "all-gather", "bf16") <= sent(narrow, "all-gather", "bf16")
    assert sent(wide, "all-gather", "f32") <= 4 * 8 * SPEC.text_tokens * D


@pytest.mark.parametrize("target", ["cpu", V5E])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="compute"),
        pytest.param({"grad_reduce_dtype": "float32"}, id="float32", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_have_no_gradient(target: str, options: dict[str, Any]):
    """For one row of visual and text slots per device: one multiply-add for each slot and weight."""
    everything, some = (facts_of(target, FSDP, stage, **options).flops for stage in ("S2", "S1.1"))
    text, visual = SPEC.text_tokens, SPEC.visual_tokens
    idle = 2 * text * (sizes("layers/feed_forward/") + D * COLUMNS) + 2 * (text + visual) * sizes("layers/attention/")
    assert everything - some == pytest.approx(idle, rel=1e-3)


# Rows of 1,024 slots shared by four devices, so that arrays of slots by slots would show.
LONG, CONTEXT = BatchSpec(512, 512, VISION.token_pixels), (1, 2, 1, 4)
SHARED = {"spec": LONG, "attention": "pallas_tpu"}


@pytest.mark.slow
def test_devices_that_share_rows_send_each_other_keys_and_values():
    """Twice forward and backward (they are made again there), and their gradients once, each where it belongs."""
    found = facts_of(V5E, CONTEXT, "S1.1", **SHARED)
    among = [t for t in found.transfers if t.devices == CONTEXT[3] and t.kind != "all-to-all"]
    own = 4 * (LONG.sequence // 4) * 2 * CONFIG.num_key_value_heads * CONFIG.head_dim  # of one device's four rows
    expected = 3 * 2 * own * CONFIG.num_hidden_layers  # bytes to three others
    kinds = [(t.kind, t.dtype, t.times, t.bytes) for t in among]
    each = [(kind, "bf16", CONFIG.num_hidden_layers, expected) for kind in ("all-gather", "reduce-scatter")]
    assert sorted(kinds) == sorted(each[:1] * 2 + each[1:])
    exchanged = [t for t in found.transfers if t.kind == "all-to-all"]  # embeddings, to their owners
    assert sum(t.bytes for t in exchanged) <= 2 * (4 * LONG.text_tokens * D) * 3 / 4
    rest = [t for t in found.transfers if t not in among and t.kind == "all-gather" and t.dtype == "bf16"]
    whole = (2 * sizes(KERNELS) + sizes(PROJECTOR, HEAD)) * 2 * 7 / 8  # of eight shards
    assert 0.99 * whole < sum(t.bytes for t in rest) < 1.3 * whole
    scattered = sent(found, "reduce-scatter", "bf16") - expected
    assert scattered == pytest.approx(sizes(*TRAINED) * 2 * 7 / 8, rel=0.02)


@pytest.mark.slow
def test_devices_that_exchange_heads_send_each_other_queries_keys_values_and_outputs():
    """Each of them forward, again where the layer is recomputed, and its gradient; nothing is gathered."""
    axes = (1, 4, 1, 2)
    found = facts_of(V5E, axes, "S1.1", **SHARED, context_parallel="ulysses")
    among = [t for t in found.transfers if t.devices == axes[3] and t.dims[0][-1] == CONFIG.head_dim]
    assert {(t.kind, t.dtype, t.times) for t in among} == {("all-to-all", "bf16", CONFIG.num_hidden_layers)}
    slots = 2 * LONG.sequence // 2  # of one device: its half of two rows
    heads = 2 * (CONFIG.num_attention_heads + CONFIG.num_key_value_heads)
    expected = 3 * slots * heads * CONFIG.head_dim * 2 * CONFIG.num_hidden_layers  # bytes; half of them stay
    assert sum(t.bytes for t in among) == expected / 2
    gathered = [t for t in found.transfers if t.devices == axes[3] and t.kind == "all-gather"]
    assert not gathered


def test_devices_that_share_rows_hold_no_scores():
    """No array of a row's slots by slots, nor of one device's by all."""
    found = re.findall(r"[a-z]+\d+\[([\d,]+)\]", text_of(V5E, CONTEXT, "S1.1", **SHARED))
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    own, whole = LONG.sequence // 4, LONG.sequence
    assert not [s for s in shapes if s.count(whole) > 1 or {own, whole} <= set(s)]
    assert max(math.prod(s) for s in shapes) < 2 * 4 * own * whole  # of four rows; two of the four heads' scores


def arrays_of_logits(text: str, tensor: int) -> set[str]:
    """Arrays of all text slots of a row by all columns that a device holds."""
    columns = {CONFIG.vocab_size, COLUMNS // tensor}
    shapes = set(re.findall(r"[a-z]+\d*\[([\d,]+)\]", text))
    dims = {shape: set(map(int, shape.split(","))) for shape in shapes}
    return {shape for shape, found in dims.items() if found & columns and found & {SPEC.text_tokens, 8 * CHUNK * 4}}


@pytest.mark.parametrize("target", ["cpu", V5E])
@pytest.mark.parametrize("axes", [FSDP, FSDP_TENSOR])
def test_logits_are_never_whole(target: str, axes: tuple[int, int, int]):
    assert not arrays_of_logits(text_of(target, axes, "S1.1"), axes[2])


def test_logits_are_whole_without_chunks():
    """Shows that the test above can fail."""
    assert arrays_of_logits(text_of("cpu", FSDP, "S1.1", loss_chunk=0), 1)
