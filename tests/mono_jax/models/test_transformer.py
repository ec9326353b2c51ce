"""The model: its size, what attends to what, and that layout, packing and memory policies change nothing.

test_parity.py (experiments) compares the same model with the public release.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines.batch import BatchSpec, ragged
from mono_jax import tree
from mono_jax.evaluation import parity
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.presets import PRESETS, preset
from mono_jax.models.transformer import Model
from mono_jax.training import step as train
from mono_jax.weights import hf_config, names, readers
from pallas_kernels.attention.backends import cudnn, xla
from pallas_kernels.attention.contract import Intervals, Problem
from tests.mono_jax.helpers import SPEC, random_batch, random_params

F32 = jnp.float32
CONFIG = preset("tiny_mono_1_5", bias=True)
WIDTH = CONFIG.hidden_size


def loss_and_gradients(
    config: Architecture, params: tree.Tree, batch: dict[str, np.ndarray], **execution: Any
) -> tuple[float, tree.Tree]:
    """Sum of the weighted losses, and its gradient by path."""

    def loss(params: tree.Tree, batch: dict[str, jax.Array]) -> jax.Array:
        return train.loss_sum(Model(config, Execution(**execution)), params, {}, batch, F32)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    return float(value), {path: np.asarray(leaf) for path, leaf in tree.flatten(gradients).items()}


def hidden(config: Architecture, params: tree.Tree, batch: dict[str, np.ndarray], dtype: Any = F32) -> np.ndarray:
    """float32 [B, T, d], the text slots after the final norm."""
    return np.asarray(_hidden(config, dtype)(params, batch), np.float32)


def _hidden(config: Architecture, dtype: Any) -> Any:
    key = (config, jnp.dtype(dtype))
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(lambda params, batch: Model(config)(params, batch, dtype).hidden)
    return _COMPILED[key]


_COMPILED: dict[Any, Any] = {}


def assert_same(one: tuple[float, tree.Tree], other: tuple[float, tree.Tree]) -> None:
    """Losses and gradients agree to rounding, and no gradient is zero throughout."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for path, gradient in one[1].items():
        size = np.abs(gradient).max()
        assert size > 0 or path == "vision/class_embedding", path  # the monolithic model never reads the class slot
        np.testing.assert_allclose(other[1][path], gradient, atol=2e-5 * max(size, 1.0), err_msg=path)


@pytest.fixture(scope="module")
def params() -> tree.Tree:
    return random_params(CONFIG, size=0.1)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return random_batch(2)


@pytest.fixture(scope="module")
def plain(params: tree.Tree, batch: dict[str, np.ndarray]) -> tuple[float, tree.Tree]:
    """Static split, S x S attention, everything kept for the backward pass."""
    return loss_and_gradients(CONFIG, params, batch, attention="xla")


# ------------------------------------------------------------------ the real sizes, by eval_shape


def language_size(config: Architecture) -> int:
    """Parameters of InternLM2 with this config, from its dimensions."""
    d, ff, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    qkv = d * (config.num_attention_heads + 2 * config.num_key_value_heads) * d // config.num_attention_heads
    return 2 * vocabulary * d + d + config.num_hidden_layers * (qkv + d * d + 3 * d * ff + 2 * d)


def embedding_size(config: Architecture) -> int:
    """Patch embedding, positional table, class slot and projector."""
    vision, d = config.vision, config.hidden_size
    width = 4 * vision.hidden_size
    patches = 3 * vision.patch_size**2 * vision.hidden_size + vision.hidden_size
    table = ((vision.image_size // vision.patch_size) ** 2 + 2) * vision.hidden_size
    return patches + table + 2 * width + (width + 1) * d + (d + 1) * d


def sizes(name: str) -> dict[str, int]:
    return {path: math.prod(leaf.shape) for path, leaf in tree.flatten(Model(preset(name)).abstract_params()).items()}


@pytest.mark.parametrize(
    ("name", "total"),
    # As the published checkpoints count them.
    [("internlm2_1_8b", 1_889_110_016), ("internlm2_7b", 7_737_708_544), ("internlm2_20b", 19_861_149_696)],
)
def test_sizes_of_internlm2(name: str, total: int) -> None:
    assert sum(sizes(name).values()) == total == language_size(preset(name))


@pytest.mark.parametrize(
    "name",
    [
        "mono_internvl_2b",
        "mono_internvl_1_5_2b",
        "mono_internvl_7b",
        "mono_internvl_20b",
        "mono_internvl_2b_14px",
        "mono_internvl_2b_56px",
    ],
)
def test_sizes_of_mono_internvl(name: str) -> None:
    config, found = preset(name), sizes(name)
    ffn = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    qkv = config.num_hidden_layers * config.hidden_size * config.qkv_dim * config.visual_attention_experts
    assert sum(size for path, size in found.items() if "visual_feed_forward" in path) == ffn
    assert sum(size for path, size in found.items() if "visual_attention" in path) == qkv
    assert sum(found.values()) == language_size(config) + embedding_size(config) + ffn + qkv
    if name == "mono_internvl_2b":
        assert round(ffn / 1e9, 3) == 1.208
        assert round(sum(found.values()) / 1e9, 2) == 3.11
        shapes = names.param_shapes(config)
        assert sum(shape[0] if names.is_stacked(path) else 1 for path, shape in shapes.items()) == 253


def test_size_of_the_modular_model() -> None:
    config, found = preset("internvl_1_5_2b"), sizes("internvl_1_5_2b")
    width, ff = config.vision.hidden_size, config.vision.intermediate_size
    attention_size = 3 * width * width + 3 * width + width * width + width
    layer = attention_size + 2 * width * ff + ff + width + 6 * width  # two LayerNorms, two layer scales
    assert sum(found.values()) == language_size(config) + embedding_size(config) + 24 * layer
    assert round(sum(size for path, size in found.items() if path.startswith("vision/")) / 1e6) == 304


def test_shapes_of_the_real_forward_pass() -> None:
    """Logits are for text slots only; a cache holds keys and values of 8 heads in 24 layers."""
    config = preset("mono_internvl_2b")
    model, spec = Model(config), BatchSpec(1280, 256)
    empty = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in spec.fields().items()}
    params = model.abstract_params()
    output = jax.eval_shape(lambda p, b: model(p, b, jnp.bfloat16, collect=("cache", "hidden")), params, empty)
    assert (output.hidden.shape, output.hidden.dtype) == ((2, 256, 2048), jnp.bfloat16)
    assert output.collected["hidden"].shape == (25, 2, 1536, 2048)
    assert output.cache.keys.shape == output.cache.values.shape == (24, 2, 1536, 8, 128)
    logits = jax.eval_shape(model.logits, params, output.hidden)
    assert (logits.shape, logits.dtype) == ((2, 256, 92553), F32)


# ------------------------------------------------------------------ who sees whom


def change(batch: dict[str, np.ndarray], **fields: tuple[Any, Any]) -> dict[str, np.ndarray]:
    """A copy with ``batch[field][index] = value`` for every field=(index, value)."""
    batch = {name: array.copy() for name, array in batch.items()}
    for name, (index, value) in fields.items():
        batch[name][index] = value
    return batch


def touched(params: tree.Tree, batch: dict[str, np.ndarray], **fields: tuple[Any, Any]) -> np.ndarray:
    """bool [B, 14]: text slots (without padding) whose hidden state changes with the batch."""
    before, after = (hidden(CONFIG, params, one) for one in (batch, change(batch, **fields)))
    return (before != after).any(-1)[:, :14]


def test_attention_is_causal_and_stays_within_a_sample(params: tree.Tree, batch: dict[str, np.ndarray]) -> None:
    """Row: text 0, the image, texts 1..7 | texts 8..13 | padding 14, 15."""
    slot = np.arange(14)
    token = touched(params, batch, tokens=((0, 4), 77))
    assert np.array_equal(token[0], (slot >= 4) & (slot < 8)) and not token[1].any()
    second = touched(params, batch, tokens=((0, 10), 77))
    assert np.array_equal(second[0], slot >= 10) and not second[1].any()
    image = touched(params, batch, patches=((1, 3), 0))
    assert np.array_equal(image[1], (slot >= 1) & (slot < 8)) and not image[0].any()
    assert np.array_equal(touched(params, batch, patch_cells=((1, 15), 0)), image)


def test_padding_is_seen_by_nobody(params: tree.Tree, batch: dict[str, np.ndarray]) -> None:
    assert not touched(params, batch, tokens=((0, 15), 77)).any()


def test_each_modality_takes_its_own_experts(params: tree.Tree, batch: dict[str, np.ndarray]) -> None:
    """Text of a sample without an image never meets the visual experts; text after an image is affected by them."""
    before = hidden(CONFIG, params, batch)
    for expert in ("visual_feed_forward", "visual_attention"):
        layers = params["layers"] | {expert: jax.tree.map(lambda a: a * 1.5, params["layers"][expert])}
        moved = (before != hidden(CONFIG, params | {"layers": layers}, batch)).any(-1)[:, :14]
        expected = (np.arange(14) >= 1) & (np.arange(14) < 8)
        assert np.array_equal(moved, np.tile(expected, (2, 1))), expert


# ------------------------------------------------------------------ what must not matter


def test_packing_changes_nothing(
    params: tree.Tree, batch: dict[str, np.ndarray], plain: tuple[float, tree.Tree]
) -> None:
    """Each sample in its own row: the same hidden states, losses and gradients."""
    alone = SPEC.empty(4)
    for row in range(2):
        with_image, text = alone_rows = (row, 2 + row)
        for field in ("patches", "patch_cells"):
            alone[field][with_image] = batch[field][row]
        for sample, (target, texts) in enumerate(zip(alone_rows, (slice(0, 8), slice(8, 14)))):
            count = texts.stop - texts.start
            for field in ("tokens", "targets", "loss_weights"):
                alone[field][target, :count] = batch[field][row, texts]
            length = count + (16 if sample == 0 else 0)
            alone["positions"][target, :length] = np.arange(length)
            alone["segments"][target, :length] = 1
        alone["order"][with_image] = batch["order"][row]
        alone["order"][text] = np.roll(np.arange(32), 16)
    packed, unpacked = hidden(CONFIG, params, batch), hidden(CONFIG, params, alone)
    np.testing.assert_allclose(unpacked[:2, :8], packed[:, :8], atol=2e-4)
    np.testing.assert_allclose(unpacked[2:, :6], packed[:, 8:14], atol=2e-4)
    assert_same(plain, loss_and_gradients(CONFIG, params, alone))


def test_the_order_of_slots_changes_nothing(params: tree.Tree, batch: dict[str, np.ndarray]) -> None:
    """Slots of a modality may be in any order, as long as ``order`` gives the reading order."""
    rng = np.random.default_rng(5)
    visual, text = rng.permutation(16), rng.permutation(16)
    mixed = dict(batch)
    for field in ("patches", "patch_cells"):
        mixed[field] = batch[field][:, visual]
    mixed["tokens"] = batch["tokens"][:, text]
    new_slot = np.argsort(np.concatenate([visual, 16 + text]))
    mixed["order"] = new_slot[batch["order"]].astype(np.int32)
    before, after = hidden(CONFIG, params, batch)[:, text], hidden(CONFIG, params, mixed)
    real = text < 14
    np.testing.assert_allclose(after[:, real], before[:, real], atol=2e-4)
    unread = hidden(CONFIG, params, mixed | {"order": batch["order"]})
    assert np.abs(unread[:, real] - before[:, real]).max() > 0.1  # without the new order it is another text


VARIANTS = {
    "dense_both": {"experts": "dense_both"},
    "remat full": {"remat": "full"},
    "remat dots": {"remat": "dots"},
    "remat dots_no_batch": {"remat": "dots_no_batch"},
    "remat names": {"remat": "names"},
    "remat offload": {"remat": "offload"},
    "gradients in float32": {"grad_reduce_dtype": "float32"},
    "chunked attention, loss in pieces": {"attention": "xla_chunked", "attention_chunk": 12, "loss_chunk": 5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_the_same_loss_and_gradients(
    params: tree.Tree, batch: dict[str, np.ndarray], plain: tuple[float, tree.Tree], name: str
) -> None:
    """Chunks divide neither the 32 slots of a row nor the 16 text slots among them."""
    assert_same(plain, loss_and_gradients(CONFIG, params, batch, **({"attention": "xla"} | VARIANTS[name])))


POISONED = {
    "static": ("tiny_mono_1_5", {"attention": "xla"}),
    "dense_both, chunked, remat": (
        "tiny_mono_1_5",
        {"experts": "dense_both", "attention": "xla_chunked", "attention_chunk": 12, "loss_chunk": 5, "remat": "full"},
    ),
    "ragged": ("tiny_mono_1_5", {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 8}),
    "modular": ("tiny_modular", {"attention": "xla"}),
}


@pytest.mark.parametrize("name", POISONED)
def test_nan_in_empty_slots_reaches_no_gradient(name: str) -> None:
    """In the pixels of one row's unused visual slots, and in the embedding of the padding id."""
    model_name, execution = POISONED[name]
    config = preset(model_name)
    params, clean = random_params(config, size=0.1), random_batch(2)
    clean["patches"] = np.random.default_rng(3).normal(size=clean["patches"].shape).astype(np.float32)
    clean["tokens"][:, 14:] = 0
    visual = clean["order"][0] < SPEC.visual_tokens
    clean["segments"][1, visual] = 0  # a modular model has whole tiles: this one is unused
    if name == "ragged":
        clean = ragged(clean, 32, 8)
        assert clean["visual_slots"].tolist() == [16, 0]
    poisoned = change(clean, patches=((1, slice(None)), np.nan))
    embedding = np.array(params["embed"]["embedding"])
    embedding[0] = np.nan
    loss = jax.jit(
        jax.value_and_grad(lambda p, b: train.loss_sum(Model(config, Execution(**execution)), p, {}, b, F32))
    )
    expected, wanted = loss(params, clean)
    found, gradients = loss(params | {"embed": {"embedding": embedding}}, poisoned)
    assert float(found) == float(expected)
    for path, gradient in tree.flatten(gradients).items():
        np.testing.assert_array_equal(gradient, tree.flatten(wanted)[path], err_msg=path)


def test_fused_attention_is_put_into_sequence_order_and_back(
    params: tree.Tree, batch: dict[str, np.ndarray], plain: tuple[float, tree.Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the kernel that, like the kernel, counts keys by their position in the row."""
    intervals = []

    class Kernel(cudnn.Cudnn):
        def unsupported(self, problem: Problem) -> None:
            return None

        def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, seen: Intervals) -> jax.Array:
            intervals.append(seen)
            return xla.Xla()(query, key, value, seen)

    monkeypatch.setattr(cudnn, "Cudnn", Kernel)
    assert_same(plain, loss_and_gradients(CONFIG, params, batch, attention="cudnn"))
    assert intervals and all(seen.places is None for seen in intervals)


def test_dense_both_does_the_work_of_both_experts() -> None:
    """The oracle does what it claims: it adds about the FLOPs of a second expert on every slot."""
    config = preset("tiny_mono")
    abstract = Model(config).abstract_params()
    fields = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in SPEC.fields().items()}

    def flops(experts: str) -> float:
        model = Model(config, Execution(experts=experts, attention="xla"))
        lowered = jax.jit(lambda p, b: model(p, b, F32).hidden).lower(abstract, fields)
        return lowered.compile().cost_analysis()["flops"]

    expert = 6 * config.hidden_size * config.intermediate_size * 2 * SPEC.sequence
    extra = flops("dense_both") - flops("static")
    assert 0.9 * expert < extra < 1.3 * expert  # a scanned body is counted once


def test_twins_share_the_gradient_of_one_qkv(golden_dir: Path) -> None:
    """With visual QKV = text QKV, their two gradients add up to that of the golden model's only QKV."""
    folder = golden_dir / "mono_tiny"
    config = hf_config.read_config(folder, image_token_id=100)
    params = readers.load_params(folder, config, np.float32)
    params["layers"] |= {"visual_attention": {"wqkv": params["layers"]["attention"]["wqkv"]}}
    config = config.replace(visual_attention_experts=True)
    case = load_file(folder / "forward.safetensors")
    batch, _ = parity.to_batch(config, case)
    batch["loss_weights"] /= batch["loss_weights"].sum()  # the case's loss is a mean
    loss, gradients = loss_and_gradients(config, params, batch)
    assert loss == pytest.approx(float(case["loss"][0]), abs=1e-4)
    text, visual = (gradients[f"layers/{name}/wqkv/kernel"] for name in ("attention", "visual_attention"))
    for layer in range(config.num_hidden_layers):
        reference = case[f"grad.language_model.model.layers.{layer}.attention.wqkv.weight"].T
        distance = np.linalg.norm(text[layer] + visual[layer] - reference)
        assert distance <= 1e-3 * np.linalg.norm(reference)
        assert min(np.linalg.norm(text[layer]), np.linalg.norm(visual[layer])) > 1e-2 * np.linalg.norm(reference)


@pytest.mark.parametrize("name", ["tiny_mono_1_5", "tiny_modular"])
def test_bfloat16_is_close(name: str) -> None:
    config, batch = PRESETS[name], random_batch(2)
    params = random_params(config, size=0.1)
    exact, rounded = (hidden(config, params, batch, dtype)[:, :14] for dtype in (F32, jnp.bfloat16))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_tied_embeddings_are_the_head() -> None:
    config = preset("tiny_lm", tie_word_embeddings=True)
    model, params = Model(config), random_params(config)
    assert "lm_head" not in params
    states = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(model.logits(params, states), states @ params["embed"]["embedding"].T, rtol=1e-4)


def test_a_fresh_model_is_random_and_reproducible() -> None:
    init = jax.jit(Model(preset("tiny_mono", num_hidden_layers=3)).init)
    one, two, other = (tree.flatten(init(jax.random.key(seed))) for seed in (0, 0, 1))
    for path, leaf in one.items():
        assert jnp.array_equal(leaf, two[path]), path
        if leaf.std() > 0:
            assert not jnp.array_equal(leaf, other[path]), path
            if leaf.ndim == 3:
                assert not jnp.array_equal(leaf[0], leaf[1]), path  # layers differ
    assert {path.rsplit("/", 1)[1] for path, leaf in one.items() if leaf.std() == 0} <= {"scale", "bias"}
