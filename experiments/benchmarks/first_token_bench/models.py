"""The two models, their prompts, and the number of FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from mono_jax import tree
from mono_jax.errors import unknown_key
from mono_jax.generation.decode import Generator
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.layer_ranges import preferred_layout
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model, Params
from mono_jax.training.flops import language_matmuls

MONOLITHIC, MODULAR = "monolithic", "modular"
MODELS = (MONOLITHIC, MODULAR)
_EYES = ("vision/", "projector/")  # the parameters that the models do not share, apart from visual experts


@dataclasses.dataclass(frozen=True)
class Pair:
    """A monolithic and a modular model with the same language model."""

    monolithic: Architecture
    modular: Architecture
    dtype: str

    def architectures(self) -> dict[str, Architecture]:
        return {MONOLITHIC: self.monolithic, MODULAR: self.modular}


def _pair_over(base: Architecture, encoder: VisionConfig, dtype: str) -> Pair:
    """A pair whose monolithic model embeds patches of the same tiles instead of using ``encoder``."""
    eyes = dataclasses.replace(encoder, kind="patch_embed")
    return Pair(base.replace(vision=eyes, visual_ffn_experts=True), base.replace(vision=encoder), dtype)


# For CPUs: weights larger than any cache, tiles as in 2b, and about the same share of FLOPs in the encoder.
_SMALL = Architecture(
    vocab_size=4096,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=4,
    image_token_id=4000,
)
_SMALL_VISION = VisionConfig(
    kind="intern_vit", hidden_size=384, num_hidden_layers=5, num_attention_heads=6, intermediate_size=1536
)
PAIRS = {
    "2b": Pair(preset("mono_internvl_2b"), preset("internvl_1_5_2b"), "bfloat16"),
    "small": _pair_over(_SMALL, _SMALL_VISION, "float32"),
    "tiny": Pair(preset("tiny_mono"), preset("tiny_modular"), "float32"),
}


def pair(name: str) -> Pair:
    """The pair ``name``; raises ConfigError with the closest name."""
    if name not in PAIRS:
        raise unknown_key("preset", name, PAIRS)
    return PAIRS[name]


def generators(models: Pair, seed: int) -> dict[str, Generator]:
    """Both models with random weights, made on the device; they share the arrays of the language model."""
    keys = jax.random.split(jax.random.key(seed))
    params = _random(models.monolithic, keys[0], models.dtype)
    options = {"dtype": models.dtype, "layout": preferred_layout(None, params)}  # as generate.py
    mono = Generator(models.monolithic, params, **options)
    shared = {path: leaf for path, leaf in tree.flatten(mono.params).items() if not path.startswith(_EYES)}
    language = {path: leaf for path, leaf in shared.items() if "/visual_" not in path}
    params = tree.unflatten(language | _eyes(models.modular, keys[1]))
    return {MONOLITHIC: mono, MODULAR: Generator(models.modular, params, **options)}


def _random(config: Architecture, key: jax.Array, dtype: str) -> Params:
    """Parameters with matrices in ``dtype`` from the start: float32 would temporarily need twice the memory."""

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, Model(config).init(key))

    return jax.jit(init)(key)


def _eyes(config: Architecture, key: jax.Array) -> dict[str, jax.Array]:
    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in tree.flatten(Model(config).init(key)).items() if path.startswith(_EYES)}

    return jax.jit(init)(key)


def tiles_in_all(tiles: int) -> int:
    """Number of tiles including the thumbnail of an image with several tiles."""
    return tiles + (tiles > 1)


def make_prompt(config: Architecture, tiles: int, text: int, seed: int) -> Prompt:
    """A random image of ``tiles`` tiles with ``text`` random tokens around it: two before, like BOS and ``<img>``."""
    rng = np.random.default_rng(seed)
    visual = tiles_in_all(tiles) * config.vision.tile_tokens
    edge, channels = config.vision.token_pixels, config.vision.num_channels
    ids = rng.integers(3, config.image_token_id, visual + text)
    ids[2 : 2 + visual] = config.image_token_id
    return Prompt(ids, rng.integers(0, 256, (visual, edge, edge, channels), np.uint8))


def first_token_flops(config: Architecture, tiles: int, text: int) -> dict[str, float]:
    """FLOPs (two for each multiply-add) of the matrix products from pixels to the logits of the first token.

    {"vision": from pixels to visual tokens, "language": the rest}. Padding and pairs masked by causality do not count;
    InternViT's class tokens do.
    """
    tiles = tiles_in_all(tiles)
    visual, d = tiles * config.vision.tile_tokens, config.hidden_size
    tokens = visual + text
    head = 2 * d * config.vocab_size  # of the last token only
    layers = sum(m.forward for m in language_matmuls(config, visual, text) if m.group != "token_embeddings")
    scores = 4 * d * (tokens * (tokens + 1) // 2) * config.num_hidden_layers
    return {"vision": float(_vision_flops(config, tiles)), "language": float(layers + scores + head)}


def _vision_flops(config: Architecture, tiles: int) -> int:
    vision, d = config.vision, config.hidden_size
    visual = tiles * vision.tile_tokens
    patches, width = visual * vision.shuffle**2, vision.hidden_size
    embedding = 2 * vision.patch_size**2 * vision.num_channels * width * patches
    shuffled = width * vision.shuffle**2
    projector = 2 * (shuffled * d + d * d) * visual
    if vision.kind == "patch_embed":
        return embedding + projector
    length = patches // tiles + 1
    matrices = 2 * width * (4 * width + 2 * vision.intermediate_size) * length
    return embedding + projector + tiles * vision.num_hidden_layers * (matrices + 4 * width * length**2)


def bytes_of(params: Mapping[str, object]) -> int:
    """Bytes of all parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(dict(params)))
