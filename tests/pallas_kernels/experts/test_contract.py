"""What holds for every implementation: freezing, masters, meshes, the choice, errors."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from functools import partial
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels import devices, registry
from pallas_kernels.checks.conformance import TOLERANCE, Case, oracle_ffn, oracle_matmul, relative_error
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.api import FfnWeights, modality_ffn, modality_matmul, permuted_ffn, unsorted_ffn
from pallas_kernels.experts.backends.tpu import PallasTpu
from pallas_kernels.experts.backends.xla import XlaSplit
from pallas_kernels.experts.block_map import TEXT, VISUAL, make_block_map
from pallas_kernels.experts.contract import Problem
from pallas_kernels.experts.mesh import sharded_block_map, sharded_ffn, sharded_matmul

# ======================================================================================================================
# Freezing: XlaSplit makes 2 dots of a matmul over rows and 1 of a weight gradient, so one FFN has
#   forward 6 = (gate, up, down) x 2;  backward: dh 2, dx 4 = (gate, up) x 2, weights 6 = 3 per expert.
# ======================================================================================================================

CASE = Case("unaligned_runs", "float32", rows=32, block=8, d=16, ff=24)
LAYERS = 2


def one_layer(x, text, visual):
    block_expert = jnp.array([1, 1, 0, 0], jnp.int32)
    return modality_ffn(x, block_expert, text, visual, block=8, implementation=XlaSplit(visual_rows=16))


def scanned(x, text, visual, wrap=lambda body: body):
    stack = partial(jax.tree.map, lambda w: jnp.stack([w] * LAYERS))

    @wrap
    def body(x, weights):
        return x + one_layer(x, *weights), None

    return jax.lax.scan(body, x, (stack(text), stack(visual)))[0]


def mesh_of(data: int, tensor: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))


def on_mesh(x, text, visual):
    mask = jnp.arange(32) % 16 < 8
    # A shard has 16 rows: 8 visual, 8 text and the empty block of the map.
    options = {"rows": ("data",), "columns": "tensor", "implementation": XlaSplit(visual_rows=8)}
    return sharded_ffn(x, sharded_block_map(mask, rows=("data",), block=8), text, visual, **options)


def mesh_in_use(name: str):
    """What the form of ``FORMS`` runs in."""
    return jax.set_mesh(mesh_of(2, 2)) if name == "shard_map" else contextlib.nullcontext()


FORMS = {
    "plain": one_layer,
    "jit": jax.jit(one_layer),
    "checkpoint": jax.checkpoint(one_layer),
    "scan": scanned,
    "scan_of_checkpoint": partial(scanned, wrap=jax.checkpoint),
    "shard_map": on_mesh,
}


def dots_traced(jaxpr) -> int:
    """dot_generals of a jaxpr, inner ones included: what is traced, before any compiler throws dead code away."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        count += sum(dots_traced(sub) for sub in _jaxprs_in_params(equation.params))
    return count


def _jaxprs_in_params(params):
    for value in jax.tree.leaves(params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def gradient_of(form, argnums):
    return jax.grad(lambda *arguments: jnp.sum(jnp.square(form(*arguments))), argnums)


def arguments():
    inputs = CASE.inputs()
    return inputs["x"], *inputs["weights"]


@pytest.mark.parametrize("name", FORMS)
def test_frozen_weight_gradients_are_never_traced(name: str):
    def count(*argnums: int) -> int:
        with mesh_in_use(name):
            return dots_traced(jax.make_jaxpr(gradient_of(FORMS[name], argnums))(*arguments()).jaxpr)

    both = count(0, 1, 2)
    assert count(0, 2) == both - 3, "the frozen text expert's weight gradients"
    assert count(0, 1) == both - 3, "the frozen visual expert's weight gradients"
    assert count(0) == both - 6
    if not name.startswith("scan"):  # in a scan the layers below hang on the layers above
        assert count(1, 2) == both - 4, "dx of an input that is not differentiated"


@pytest.mark.parametrize("name", ["jit", "scan_of_checkpoint", "shard_map"])
def test_frozen_weight_gradients_are_not_in_the_compiled_program(name: str):
    def count(*argnums: int) -> int:
        with mesh_in_use(name):
            program = jax.jit(gradient_of(FORMS[name], argnums)).lower(*arguments()).compile().as_text()
        return program.count(" dot(") + program.count("__onednn$matmul")

    assert count(0, 2) == count(0, 1, 2) - 3


def test_closed_over_weights_are_frozen():
    x, text, visual = arguments()
    by_closure = jax.grad(lambda visual: jnp.sum(jnp.square(one_layer(x, text, visual))))
    assert dots_traced(jax.make_jaxpr(by_closure)(visual).jaxpr) == 18 - 3 - 4


def test_one_matrix_of_an_expert_can_train_alone():
    x, text, visual = arguments()

    def loss(down):
        return jnp.sum(jnp.square(one_layer(x, text, visual._replace(down=down))))

    assert dots_traced(jax.make_jaxpr(jax.grad(loss))(visual.down).jaxpr) == 6 + 2 + 1
    full = gradient_of(one_layer, 2)(x, text, visual)
    np.testing.assert_array_equal(jax.grad(loss)(visual.down), full.down)


@pytest.mark.parametrize("save", [True, False])
def test_what_is_kept_for_the_backward_pass(save: bool):
    """gate and up, or nothing of size [M, ff]; x only if gate or up train or gate is computed again."""
    x, text, visual = arguments()
    ffn = partial(modality_ffn, block=8, implementation="dense_both", save_gate_up=save)
    block_expert = jnp.array([1, 0, 1, -1], jnp.int32)

    def kept(function, *primals) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, *primals)[1])]

    hidden, wide = (CASE.rows, CASE.ff), (CASE.rows, CASE.d)
    everything = kept(lambda x, text, visual: ffn(x, block_expert, text, visual), x, text, visual)
    assert everything.count(hidden) == (2 if save else 0)
    assert everything.count(wide) == 1
    nothing_trains = kept(lambda x: ffn(x, block_expert, text, visual), x)
    assert nothing_trains.count(wide) == (0 if save else 1)


# ======================================================================================================================
# Precision
# ======================================================================================================================


def test_float32_masters_get_gradients_that_were_never_rounded():
    """bfloat16 rows, float32 weights: the gradient is that of the rounded weights, straight from the float32 sums."""
    case = Case("unaligned_runs", "bfloat16", rows=512, block=8, d=16, ff=24)
    inputs = case.inputs()
    kernels = tuple(k.astype(jnp.float32) * 1.001 for k in inputs["kernels"])
    expert = np.where(inputs["mask"], VISUAL, TEXT)
    block_map = make_block_map(inputs["mask"], block=8)
    xg = inputs["x"][block_map.source.clip(max=511)] * (block_map.source < 512)[:, None]
    dzg = inputs["dz"][block_map.source.clip(max=511)] * (block_map.source < 512)[:, None]

    def forward(kernels):
        return modality_matmul(xg, block_map.block_expert, *kernels, block=8, implementation="dense_both")

    z, backward = jax.vjp(forward, kernels)
    (gradients,) = backward(dzg)
    assert z.dtype == jnp.bfloat16 and gradients[0].dtype == jnp.float32
    rounded = tuple(np.asarray(k.astype(jnp.bfloat16), np.float64) for k in kernels)
    x, dz = (np.asarray(inputs[k], np.float64) for k in ("x", "dz"))
    expected = oracle_matmul(x, expert, rounded, dz)[2]
    assert max(relative_error(g, e) for g, e in zip(gradients, expected)) < TOLERANCE["float32"]


# ======================================================================================================================
# Meshes: 8 simulated devices
# ======================================================================================================================


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("implementation", ["dense_both", "ragged"])
def test_sharded_ffn_is_the_unsharded_one(shape: tuple[int, int], implementation: str):
    check_sharded_ffn(shape, implementation, Case("interleaved_50", "float32", rows=48, block=4, d=16, ff=32))


def test_sharded_pallas_tpu():
    case = Case("interleaved_50", "float32", rows=64, block=16, d=128, ff=256)
    check_sharded_ffn((2, 2), PallasTpu(interpret=True), case)


def check_sharded_ffn(shape, implementation, case: Case):
    inputs = case.inputs()
    valid = np.arange(case.rows) % 7 != 0

    @jax.jit
    def run(x, mask, valid, weights, dy):
        block_map = sharded_block_map(mask, rows=("data",), block=case.block, valid=valid)
        options = {"rows": ("data",), "columns": "tensor", "implementation": implementation}
        y, backward = jax.vjp(lambda x, weights: sharded_ffn(x, block_map, *weights, **options), x, weights)
        return y, *backward(dy)

    with jax.set_mesh(mesh_of(*shape)):
        actual = run(inputs["x"], inputs["mask"], valid, inputs["weights"], inputs["dy"])
    expert = np.where(valid, np.where(inputs["mask"], VISUAL, TEXT), -1)
    expected = oracle_ffn(inputs["x"], expert, inputs["weights"], inputs["dy"])
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE["float32"], errors


def test_sharded_matmul():
    case = Case("interleaved_50", "float32", rows=48, block=4, d=16, ff=32)
    inputs = case.inputs()

    @jax.jit
    def run(x, mask, kernels, dz):
        block_map = sharded_block_map(mask, rows=("data",), block=case.block)
        options = {"rows": ("data",), "columns": "tensor", "implementation": "dense_both"}
        z, backward = jax.vjp(lambda x, kernels: sharded_matmul(x, block_map, *kernels, **options), x, kernels)
        return z, *backward(dz)

    with jax.set_mesh(mesh_of(4, 2)):
        actual = run(inputs["x"], inputs["mask"], inputs["kernels"], inputs["dz"])
    expert = np.where(inputs["mask"], VISUAL, TEXT)
    expected = oracle_matmul(inputs["x"], expert, inputs["kernels"], inputs["dz"])
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE["float32"], errors


@pytest.mark.parametrize("shape", [None, (2, 4), (1, 1)])
@pytest.mark.parametrize(("op", "split"), [("ffn", "columns"), ("matmul", "columns"), ("matmul", "sums")])
def test_grouped_rows_on_whatever_mesh_is_in_use(shape: tuple[int, int] | None, op: str, split: str):
    """Grouped rows of a batch, as the model has them; an axis that is not there, columns that do not divide."""
    case = Case("interleaved_50", "float32", rows=4 * 24, block=8, d=16, ff=30)
    inputs, block_expert = case.inputs(), np.random.default_rng(0).integers(-1, 2, (4, 3)).astype(np.int32)
    run = {"ffn": sharded_ffn, "matmul": sharded_matmul}[op]
    weights, dy = (inputs[k] for k in {"ffn": ("weights", "dy"), "matmul": ("kernels", "dz")}[op])

    @jax.jit
    def output_and_gradients(x, weights, dy):
        def forward(x, weights):
            y = run(x.reshape(4, 24, -1), block_expert, *weights, rows=("data", "fsdp"), block=8, **{split: "tensor"})
            return y.reshape(96, -1)

        y, backward = jax.vjp(forward, x, weights)
        return y, *backward(dy)

    with jax.set_mesh(mesh_of(*shape)) if shape else contextlib.nullcontext():
        actual = output_and_gradients(inputs["x"], weights, dy)
    oracle = {"ffn": oracle_ffn, "matmul": oracle_matmul}[op]
    expected = oracle(inputs["x"], np.repeat(block_expert.ravel(), 8), weights, dy)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))) < TOLERANCE["float32"]


# ======================================================================================================================
# The choice
# ======================================================================================================================


def test_the_choice_is_logged_once_with_the_refusals(caplog):
    problem = Problem("ffn", 77 * 8, 8, 24, 48, "float32", "nvidia_h200")
    with caplog.at_level(logging.INFO, "pallas_kernels.registry"):
        first, second = registry.choose(problem), registry.choose(problem)
    assert first == second
    assert len(caplog.records) == 1
    assert "mosaic_gpu: " in caplog.text and str(first) in caplog.text


def test_absent_devices_are_chosen_for_while_compiling_ahead_of_time():
    problem = partial(Problem, "ffn", 4096, 128, 2048, 8192, "bfloat16")
    with devices.targeting("tpu_v5e"):
        assert isinstance(registry.choose(problem(devices.device_key())), PallasTpu)
    assert devices.device_key() == "cpu"
    assert not isinstance(registry.choose(problem("cpu")), PallasTpu)


TABLES = sorted((f.parent.name, f.name) for f in (resources.files("pallas_kernels") / "tuning").glob("*/*.json"))


@pytest.mark.parametrize(("room", "file"), TABLES)
def test_tuning_tables_fit_the_implementations(room: str, file: str):
    table = json.loads((resources.files("pallas_kernels") / "tuning" / room / file).read_text())
    assert table["device"] == file.removesuffix(".json") and table["source"]
    names = {entry if isinstance(entry, str) else entry["name"] for entry in table["order"]} | set(table["parameters"])
    assert names <= {name for name in registry.IMPLEMENTATIONS if registry.room(name) == room}
    for name, parameters in table["parameters"].items():
        for values in [parameters.get("default", {}), *(e["parameters"] for e in parameters.get("entries", []))]:
            try:
                registry.implementation_class(name)(**values)
            except Unavailable as reason:
                pytest.skip(str(reason))


def test_tuned_parameters_take_the_entry_of_the_largest_size_below(monkeypatch):
    entry = {"op": "ffn", "dtype": "bfloat16", "d": 256, "ff": 512}
    entries = [{**entry, "rows": rows, "parameters": {"block_rows": rows}} for rows in (128, 1024)]
    table = {"parameters": {"pallas_tpu": {"default": {"vmem": 7, "block_rows": 1}, "entries": entries}}}
    monkeypatch.setattr(registry, "tuning_table", lambda room, device: table)

    def block_rows(rows: int, ff: int = 512) -> int:
        problem = Problem("ffn", rows, 64, 256, ff, "bfloat16", "tpu_v5e")
        return registry.tuned_parameters("pallas_tpu", problem)["block_rows"]

    assert [block_rows(64), block_rows(128), block_rows(1000), block_rows(4096)] == [1, 128, 128, 1024]
    assert block_rows(4096, ff=1024) == 1


def test_targets_are_found_in_the_mesh_in_use():
    for key in ("tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu_v4", "nvidia_h200", "cpu"):
        with devices.targeting(key):
            assert devices.device_key() == key
            assert devices.platform() == {"nvidia": "gpu"}.get(key.split("_")[0], key.split("_")[0])
            assert jax.jit(lambda: jnp.int32(devices.is_hopper(devices.device_key())))() == (key == "nvidia_h200")
    with jax.set_mesh(mesh_of(2, 2)):
        assert devices.device_key() == "cpu"


def test_device_names():
    class Chip:
        platform = "tpu"

        def __init__(self, kind):
            self.device_kind = kind

    kinds = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU v4", "NVIDIA H200")
    keys = [devices.device_key(Chip(kind)) for kind in kinds]
    assert keys == ["tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu_v4", "nvidia_h200"]


# ======================================================================================================================
# Errors and imports
# ======================================================================================================================


def test_errors_say_what_is_wrong():
    x, text, visual = arguments()
    block_expert = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="blocks \\* block"):
        modality_ffn(x, block_expert, text, visual, block=16)
    with pytest.raises(ValueError, match="visual gate is"):
        modality_ffn(x, block_expert, text, FfnWeights(visual.up[:, :3], visual.up, visual.down), block=8)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        modality_ffn(x.astype(jnp.float16), block_expert, text, visual, block=8)
    with pytest.raises(ValueError, match="no implementation 'ragedd'; there are xla_split"):
        modality_ffn(x, block_expert, text, visual, block=8, implementation="ragedd")
    with pytest.raises(Unavailable, match="static boundary"):
        modality_ffn(x, block_expert, text, visual, block=8, implementation="xla_split")
    with pytest.raises(Unavailable, match="needs a TPU, this is cpu"):
        modality_matmul(x, block_expert, text.gate, visual.gate, block=8, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="the block map has 16"):
        permuted_ffn(x, make_block_map(jnp.zeros(16, bool), block=8), text, visual)
    with pytest.raises(ValueError, match="mask must be bool"):
        unsorted_ffn(x, jnp.zeros(32, jnp.int32), text, visual, block=8)


def test_importing_the_package_pulls_in_no_accelerator_code():
    code = (
        "import sys, pallas_kernels.experts.api, pallas_kernels.experts.mesh, pallas_kernels.experts.backends.xla\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('triton', 'jax_triton', 'libtpu', 'torch')"
        " or m.startswith('jax.experimental.pallas')]\n"
        "print(','.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("implementation", [None, "ragged", PallasTpu(interpret=True)])
def test_no_blocks(implementation):
    """M = 0: no rows come out, and the weights' gradients are zeros."""
    case = Case("all_text", "float32", rows=0, block=16, d=128, ff=128)
    (x, (text, visual)), block_expert = (case.inputs()[k] for k in ("x", "weights")), jnp.zeros(0, jnp.int32)
    options = {"block": 16, "implementation": implementation}
    assert modality_matmul(x, block_expert, text.gate, visual.gate, **options).shape == (0, 128)
    gradient = jax.grad(lambda text: jnp.sum(modality_ffn(x, block_expert, text, visual, **options)))(text)
    np.testing.assert_array_equal(gradient.gate, jnp.zeros((128, 128)))


def test_zero_cotangent():
    """A loss that does not depend on y leaves zeros, not an error."""
    x, text, visual = arguments()
    gradient = jax.grad(lambda x: jnp.sum((one_layer(x, text, visual), x)[1]))(x)
    np.testing.assert_array_equal(gradient, jnp.ones_like(x))
