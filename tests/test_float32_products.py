"""Float32 is float32 on every device: products in the sources, and in the programs traced from them.

A CPU multiplies float32 in float32 whatever precision is requested, so values cannot show an error here; the requested
precision can.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params

from mono_jax.evaluation import inside, parity
from mono_jax.evaluation.heldout import HeldoutLoss, with_modalities
from mono_jax.evaluation.language import likelihood
from mono_jax.generation import decode
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.execution import Execution
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.models.vision import cell_embedding
from mono_jax.parallel.mesh import on_mesh
from mono_jax.training import optim, stages
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state
from mono_jax.training.step import make_train_step
from pallas_kernels.checks import conformance
from pallas_kernels.checks.attention import AttentionCase
from pallas_kernels.checks.run import SUITES
from pallas_kernels.precision import product_precision
from pallas_kernels.registry import IMPLEMENTATIONS, implementation_class, room
from tests.mono_jax.helpers import random_batch, random_params
from tests.mono_jax.training.test_meshes import mesh_of
from tests.test_architecture import ROOT, sources

# ======================================================================================================================
# Sources
# ======================================================================================================================

# Functions of JAX that multiply matrices.
PRODUCTS = {"dot", "vdot", "inner", "matmul", "einsum", "tensordot", "dot_general", "ragged_dot", "ragged_dot_general"}
PRODUCTS |= {"conv", "conv_general_dilated", "conv_transpose", "convolve", "multi_dot", "matvec", "vecdot"}
PRODUCTS |= {"dot_product_attention"}
NUMPY = ("pallas_kernels/checks/", "mono_jax/evaluation/intervals.py")  # which multiply in numpy, with @


def unsaid(source: str, numpy: bool = False) -> list[int]:
    """Lines of products without an explicit precision; ``numpy``: whether @ multiplies NumPy arrays."""
    module = ast.parse(source)
    blocks = [node for node in ast.walk(module) if isinstance(node, ast.With)]
    blocks = [block for block in blocks if "library_products" in ast.unparse(block.items[0])]
    inside = {id(node) for block in blocks for node in ast.walk(block)}
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if "precision" in options or options.get("implementation") == "'cudnn'":  # cuDNN's takes no float32
            inside.add(id(call.func))

    def multiplies(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp):
            return isinstance(node.op, ast.MatMult) and not numpy
        if not isinstance(node, ast.Attribute) or ast.unparse(node).split(".")[0] not in ("jnp", "lax", "jax"):
            return False
        return node.attr in PRODUCTS and id(node) not in inside

    return [node.lineno for node in ast.walk(module) if multiplies(node)]


@pytest.mark.parametrize("package", ["mono_jax", "pallas_kernels"])
def test_every_product_in_the_sources_says_its_precision(package: str):
    said = 0
    for file in sources(package):
        text, name = file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
        said += text.count("precision=") + text.count("float32_sums(")
        assert not unsaid(text, numpy=name.startswith(NUMPY)), f"{name}: see pallas_kernels/precision.py"
    assert said >= 5


@pytest.mark.parametrize(
    "line",
    [
        'y = jnp.einsum("nd,dv->nv", x, kernel, preferred_element_type=jnp.float32)',
        "y = x @ kernel",
        "y = jax.lax.dot_general(x, kernel, dimensions)",
        "multiply = jnp.matmul",
        "y = jax.vmap(jax.nn.dot_product_attention)(q, k, v)",
        "with library_products(x.dtype):\n    y = x\ny = jax.nn.dot_product_attention(q, k, v)",
    ],
)
def test_a_product_that_does_not_is_found(line: str):
    assert unsaid(line)


# ======================================================================================================================
# Programs
# ======================================================================================================================


class Product(NamedTuple):
    """One product of a program."""

    operands: tuple[str, str]
    precision: Any
    said: str

    @property
    def is_float32(self) -> bool:
        return self.operands == ("float32", "float32")

    @property
    def is_highest(self) -> bool:
        precision = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        return set(precision) == {jax.lax.Precision.HIGHEST}


def products(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Product]:
    """The products of a program, including the programs and kernels inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            dtypes = tuple(atom.aval.dtype.name for atom in equation.invars[:2])
            yield Product(dtypes, equation.params["precision"], f"{equation} {equation.source_info.traceback}")
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


class Traced(NamedTuple):
    """Products of programs, and the names of the programs that were to be compiled."""

    found: list[Product]
    programs: list[str]

    def program(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.found.extend(products(jax.make_jaxpr(function)(*arguments).jaxpr))

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Replaces ``jax.jit``: the program is traced and returns ones (so a prefill leaves rows to decode)."""
        real, statics = REAL_JIT(function, **options), {k: v for k, v in options.items() if k.startswith("static")}

        def call(*arguments: Any, **named: Any) -> Any:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, named))):
                return real(*arguments, **named)
            traced = REAL_JIT(function, **statics).trace(*arguments, **named)
            self.found.extend(products(traced.jaxpr.jaxpr))
            self.programs.append(function.__name__)
            unfinished = function.__name__ == "prefill"
            return jax.tree.map(
                lambda a: jnp.full(a.shape, not (unfinished and a.dtype == bool), a.dtype), traced.out_info
            )

        return call

    def all_are_float32(self) -> None:
        wrong = [product.said for product in self.found if product.is_float32 and not product.is_highest]
        assert not wrong, "\n".join(wrong)
        assert any(product.is_float32 for product in self.found)

    def none_is_asked_for(self) -> None:
        assert self.found
        wrong = [product.said for product in self.found if product.is_highest]
        assert not wrong, "\n".join(wrong)

    def none_is_mixed(self) -> None:
        """A float32 array times a bfloat16 array is a float32 product, at a fraction of the speed."""
        wrong = [product.said for product in self.found if len(set(product.operands)) == 2]
        assert not wrong, "\n".join(wrong)


REAL_JIT = jax.jit


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    """Replaces ``jax.jit`` so that programs are traced, not compiled."""
    caches = (decode._programs, likelihood._program, conformance._runner)
    found = Traced([], [])
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(jax, "jit", found.jit)
    yield found
    for cache in caches:
        cache.cache_clear()


# {name: (model, execution, other choices)}; together they cover all forms that a CPU can trace.
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "xla": ("tiny_mono", {"attention": "xla"}, {}),
    "chunks": ("tiny_mono_1_5", {"attention": "xla_chunked", "attention_chunk": 8, "loss_chunk": 4}, {}),
    "blocked": ("tiny_mono", {"attention": "xla_blocked", "grad_reduce_dtype": "float32", "remat": "dots"}, {}),
    "dense_both": ("tiny_mono_1_5", {"experts": "dense_both", "remat": "full"}, {"parts": 2}),
    "tiled": ("tiny_mono", {"experts": "grouped", "experts_kernel": "xla_tiled", "experts_block": 8}, {}),
    "ragged": ("tiny_mono_1_5", {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 8}, {}),
    "modular": ("tiny_modular", {}, {}),
    "muon": ("tiny_mono", {}, {"optimizer": "muon"}),
    "mesh": ("tiny_mono", {"loss_chunk": 4}, {"mesh": (2, 2, 2)}),
}


def trace_step(traced: Traced, name: str, dtype: Any, **execution: Any) -> None:
    """The training step and the held-out loss."""
    architecture, choices, others = STEPS[name]
    config = preset(architecture)
    model = Model(config, Execution(**choices, **execution))
    stage, params = stages.get_stage("full"), model.abstract_params()
    settings = OptimConfig(optimizer=others.get("optimizer", "adamw"))
    optimizer = optim.make_optimizer(stage, config, params, 10, settings)
    state, frozen = jax.eval_shape(lambda params: init_state(stage, model, optimizer, params, dtype), params)
    step = make_train_step(model, optimizer, dtype=dtype, grad_accum_steps=others.get("parts", 1), norms_every=2)
    batch = with_modalities(random_batch(8))
    mesh = mesh_of(*others["mesh"]) if "mesh" in others else None
    traced.program(step if mesh is None else on_mesh(step, mesh), state, frozen, batch)
    if mesh is None:
        HeldoutLoss(model, dtype)._sums(state.trainable, frozen, batch)


@pytest.mark.parametrize("name", STEPS)
def test_a_float32_step_multiplies_in_float32(traced: Traced, name: str):
    trace_step(traced, name, jnp.float32)
    traced.all_are_float32()


@pytest.mark.parametrize("name", STEPS)
def test_who_wants_the_fastest_product_gets_it(traced: Traced, name: str):
    trace_step(traced, name, jnp.float32, float32_matmul="fastest")
    traced.none_is_asked_for()


@pytest.mark.parametrize("name", STEPS)
def test_a_bfloat16_step_asks_for_nothing(traced: Traced, name: str):
    trace_step(traced, name, jnp.bfloat16)
    traced.none_is_asked_for()
    if name != "modular":  # whose attention is JAX's own
        traced.none_is_mixed()


def test_jax_s_own_setting_decides_where_it_is_made(traced: Traced):
    with jax.default_matmul_precision("tensorfloat32"):
        trace_step(traced, "xla", jnp.float32)
    assert {product.precision for product in traced.found} == {(jax.lax.Precision.HIGH,) * 2}


def prompt() -> Prompt:
    ids = np.array([1, 5, *[100] * 16, 7, 8], np.int32)
    return Prompt(ids, np.zeros((16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int32))


@pytest.mark.parametrize("name", ["tiny_mono_1_5", "tiny_modular"])
def test_generation_in_float32_multiplies_in_float32(traced: Traced, name: str):
    config = preset(name)
    session = decode.Generator(config, random_params(config), jnp.float32).session()
    for _ in range(2):  # the second turn reads the cache of the first
        session.turn([prompt()], Sampling(max_new_tokens=2))
    assert traced.programs == ["prefill", "decode", "compact", "prefill", "decode"]
    traced.all_are_float32()


def test_measures_of_the_inside_multiply_in_float32(traced: Traced):
    model = Model(preset("tiny_mono"))
    for program in (inside._measured, inside._maps):
        measure = traced.jit(program.__wrapped__, static_argnums=0)
        measure(model, random_params(model.config), decode.pack(model.config, [prompt()], np.zeros(1, np.int64), 1)[0])
    traced.all_are_float32()


def test_likelihoods_in_float32_multiply_in_float32(traced: Traced):
    config, batch = preset("tiny_mono"), random_batch(1)
    likelihood._program(config, jnp.float32, None)(random_params(config), batch, np.zeros((1, 4), np.int32))
    traced.all_are_float32()


@pytest.mark.parametrize(
    "case", ["mono_tiny/forward", "mono_tiny/generate", "mono_tiny/train_S1.1", "modular_tiny/forward"]
)
def test_parity_multiplies_in_float32(traced: Traced, golden_dir: Path, case: str):
    parity.run_case(golden_dir / case.split("/")[0], golden_dir / f"{case}.safetensors")
    traced.all_are_float32()


# Implementations that do not accept float32, each with its device; and one whose kernels are not JAX's.
WITHOUT_FLOAT32 = {
    "mosaic_gpu": "nvidia_h200",
    "attention/mosaic_gpu": "nvidia_h200",
    "attention/cudnn": "nvidia_h200",
    "attention/cudnn_masked": "nvidia_h200",
    "attention/splash": "tpu_v5e",
}
OTHER_LANGUAGES = ("triton",)


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n not in (*WITHOUT_FLOAT32, *OTHER_LANGUAGES)])
def test_kernels_multiply_float32_in_float32(traced: Traced, name: str):
    suite, instance = SUITES[room(name)], implementation_class(name).here()
    for _, error in suite.runs(instance, "float32", False):
        error()
    traced.all_are_float32()


@pytest.mark.parametrize(("name", "device"), WITHOUT_FLOAT32.items())
def test_other_kernels_take_none(name: str, device: str):
    kernel = implementation_class(name)
    if room(name) == "attention":
        problem = AttentionCase.fitting(kernel).problem
    else:
        problem = conformance.Case.fitting(kernel, "empty", "float32").problem("ffn")
    assert "float32" in kernel().unsupported(dataclasses.replace(problem, device=device))


def test_a_table_of_positions_is_interpolated_in_float32_whatever_the_rest_is(traced: Traced):
    vision = dataclasses.replace(preset("tiny_mono").vision, tile_size=48)
    traced.program(lambda table: cell_embedding(table, vision), jnp.ones((1 + vision.grid**2, 8), jnp.bfloat16))
    traced.all_are_float32()
    with jax.default_matmul_precision("default"):
        traced.program(lambda table: cell_embedding(table, vision), jnp.ones((1 + vision.grid**2, 8)))
    traced.all_are_float32()


def test_a_product_without_it_is_found(traced: Traced):
    a = jnp.ones((2, 2))
    traced.program(jax.grad(lambda a: jnp.matmul(a, a, precision=product_precision(a)).sum()), a)
    traced.all_are_float32()
    traced.program(jax.checkpoint(lambda a: jax.lax.map(lambda row: row @ a, a)), a)
    with pytest.raises(AssertionError, match="dot_general"):
        traced.all_are_float32()
