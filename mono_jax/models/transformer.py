"""The models: dense InternLM2, Mono-InternVL, Mono-InternVL-1.5 and the modular InternVL, from one set of layers.

Parameters are one plain nested dict; NNX modules give its structure and are bound to it when called.
All decoder layers are stacked on a leading axis and run by ``jax.lax.scan``.

    batch -> embed -> [B, S, d], slots modality-major (V visual, then T text)
          -> layers: x += attention(norm(x)); x += expert of the slot's modality(norm(x))
          -> final norm and LM head on the text slots alone, since no visual token predicts anything
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mono_jax.models.architecture import ModelConfig
from mono_jax.models.attention import SequenceOrder, Slots, attend, probabilities_and_output
from mono_jax.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from mono_jax.models.moe import Boundary, by_modality
from mono_jax.models.rope import rotary, rotate
from mono_jax.models.vision import Projector, VisionTower, ViTLayer

Params = dict[str, Any]


class Context(NamedTuple):
    """What every layer needs to know about the slots of x [B, S, d].

    Attributes:
      cosines, sines: float32 [B, S, head_dim / 2], RoPE angles of each slot.
      slots: positions and segments of the S slots.
      sequence: the slots' sequence order, None while decoding.
    """

    cosines: jax.Array
    sines: jax.Array
    slots: Slots
    sequence: SequenceOrder | None


class Cache(NamedTuple):
    """Keys and values of earlier slots.

    Attributes:
      keys, values: [L, B, C, Hkv, D].
      slots: positions and segments int32 [B, C] of the cached slots; segment 0 = empty.
      used: int32 scalar, slots written so far (the same for all rows; padding slots count).
    """

    keys: jax.Array
    values: jax.Array
    slots: Slots
    used: jax.Array


class LayerCache(NamedTuple):
    """One layer's view of the cache: ``keys`` and ``values`` of all layers, and which ``layer`` this is.

    All layers' arrays go through the scan as its carry and are written in place; as its inputs and
    outputs they would be copied whole for every decoded token.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    slots: Slots
    used: jax.Array

    def append(self, key: jax.Array, value: jax.Array) -> LayerCache:
        """With key and value [B, S, Hkv, D] of this layer written behind the slots in use."""
        start = (self.layer, 0, self.used, 0, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
            for old, new in ((self.keys, key), (self.values, value))
        )
        return self._replace(keys=keys, values=values)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, C, Hkv, D] of this layer."""
        return tuple(jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (self.keys, self.values))


class Output(NamedTuple):
    """``hidden`` [B, T, d]: text slots after the final norm. ``collected``: what was asked for, stacked over layers.

    "hidden": [L + 1, B, S, d], the embeddings and the output of each layer, the last after the final norm;
    "attention": float32 [L, B, Hq, S, S] in slot order. ``cache``: the updated cache, if one was given or asked for.
    """

    hidden: jax.Array
    collected: dict[str, jax.Array]
    cache: Cache | None = None


class Attention(nnx.Module):
    """Fused QKV projection and output projection; wqkv's outputs are laid out per KV head: (queries..., k, v)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.wqkv = Linear(config.hidden_size, config.qkv_dim, bias=config.bias, rngs=rngs)
        self.wo = Linear(config.hidden_size, config.hidden_size, bias=config.bias, rngs=rngs)


class VisualAttention(nnx.Module):
    """The visual attention expert of Mono-InternVL-1.5: a QKV projection for visual tokens."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.wqkv = Linear(config.hidden_size, config.qkv_dim, bias=config.bias, rngs=rngs)


class DecoderLayer(nnx.Module):
    """One layer of InternLM2 with, where the config has them, visual experts beside the text ones."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.config = config
        self.attention_norm = RMSNorm(d, config.rms_norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps, rngs=rngs)
        self.feed_forward = SwiGLU(d, config.intermediate_size, rngs=rngs)
        if config.visual_attention_experts:
            self.visual_attention = VisualAttention(config, rngs=rngs)
        if config.visual_ffn_experts:
            self.visual_feed_forward = SwiGLU(d, config.intermediate_size, rngs=rngs)

    def qkv(self, x: jax.Array, boundary: Boundary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, Hq, D], keys and values [B, S, Hkv, D] of normed x [B, S, d], before RoPE."""
        config = self.config
        visual = self.visual_attention.wqkv if config.visual_attention_experts else None
        fused = by_modality(self.attention.wqkv, visual, x, boundary, config)
        b, s = x.shape[:2]
        group = config.num_attention_heads // config.num_key_value_heads
        fused = fused.reshape(b, s, config.num_key_value_heads, group + 2, config.head_dim)
        query = fused[:, :, :, :group].reshape(b, s, config.num_attention_heads, config.head_dim)
        return query, fused[:, :, :, group], fused[:, :, :, group + 1]

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        boundary: Boundary,
        cache: LayerCache | None = None,
        collect: tuple[str, ...] = (),
    ) -> tuple[jax.Array, LayerCache | None, dict[str, Any]]:
        """x [B, S, d] to x; also returns the updated cache and this layer's share of what ``collect`` asks for."""
        extra: dict[str, Any] = {}
        query, key, value = self.qkv(self.attention_norm(x), boundary)
        query, key = (rotate(a, context.cosines, context.sines) for a in (query, key))
        key_slots, sequence = context.slots, context.sequence
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.read()
            key_slots, sequence = cache.slots, None
        elif "cache" in collect:
            extra["cache"] = (key, value)
        if "attention" in collect:
            extra["attention"], output = probabilities_and_output(query, key, value, context.slots, key_slots)
        else:
            output = attend(self.config, query, key, value, context.slots, key_slots, sequence)
        x = x + self.attention.wo(output.reshape(x.shape))
        visual = self.visual_feed_forward if self.config.visual_ffn_experts else None
        return (
            x + by_modality(self.feed_forward, visual, self.ffn_norm(x), boundary, self.config),
            cache,
            extra,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of the model: its path, constructor and, for stacked layers, how many there are."""

    path: tuple[str, ...]
    build: Any
    stacked: int = 0


def _parts(config: ModelConfig) -> list[Part]:
    d, vision = config.hidden_size, config.vision
    parts = [
        Part(("embed",), lambda rngs: Embedding(config.vocab_size, d, rngs=rngs)),
        Part(("layers",), lambda rngs: DecoderLayer(config, rngs=rngs), config.num_hidden_layers),
        Part(("final_norm",), lambda rngs: RMSNorm(d, config.rms_norm_eps, rngs=rngs)),
    ]
    if not config.tie_word_embeddings:
        parts.append(Part(("lm_head",), lambda rngs: Linear(d, config.vocab_size, rngs=rngs)))
    if vision is not None:
        width = vision.hidden_size * vision.shuffle**2
        parts.append(Part(("vision",), lambda rngs: VisionTower(vision, rngs=rngs)))
        parts.append(Part(("projector",), lambda rngs: Projector(width, d, rngs=rngs)))
        if vision.kind == "intern_vit":
            parts.append(Part(("vision", "layers"), lambda rngs: ViTLayer(vision, rngs=rngs), vision.num_hidden_layers))
    return parts


class Model:
    """The pure functions of one architecture; it holds no arrays.

    >>> model = Model(preset("tiny_mono"))
    >>> params = model.init(jax.random.key(0))
    >>> logits = model.logits(params, model(params, batch).hidden)
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self._parts = _parts(config)
        self._graphs = {}
        for part in self._parts:
            abstract = nnx.eval_shape(lambda part=part: part.build(nnx.Rngs(0)))
            self._graphs[part.path] = nnx.graphdef(abstract)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""

        def pure(part: Part, key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(part.build(nnx.Rngs(params=key))))

        params: Params = {}
        for part, part_key in zip(self._parts, jax.random.split(key, len(self._parts))):
            if part.stacked:
                values = jax.vmap(lambda k, part=part: pure(part, k))(jax.random.split(part_key, part.stacked))
            else:
                values = pure(part, part_key)
            if len(part.path) == 1:
                params[part.path[0]] = values
            else:
                params[part.path[0]] = params[part.path[0]] | {part.path[1]: values}
        return params

    def abstract_params(self) -> Params:
        """Shapes and dtypes of ``init``'s result; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def _bind(self, params: Mapping[str, Any], *path: str) -> Any:
        values: Any = params
        for name in path:
            values = values[name]
        if path == ("vision",):
            values = {name: value for name, value in values.items() if name != "layers"}
        return nnx.merge(self._graphs[path], values)

    def embed_visual(self, params: Params, patches: jax.Array, cells: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Visual tokens [B, V, d] of patches [B, V, P, P, 3] (uint8, or normalised floats) and cells int32 [B, V].

        For a modular model V must be made of whole tiles (``vision.tile_tokens`` tokens each).
        """
        vision = self.config.vision
        b, v = cells.shape
        tower = self._bind(params, "vision")
        x = tower(patches, cells, dtype)
        if vision.kind == "intern_vit":
            x = x.reshape(-1, vision.tile_tokens * vision.shuffle**2, vision.hidden_size)
            token = jnp.broadcast_to(tower.class_token(dtype), (x.shape[0], 1, vision.hidden_size))
            x = self._run_vit(params, jnp.concatenate([token, x], axis=1))[:, 1:]
        return self._bind(params, "projector")(x.reshape(b, v, -1))

    def _run_vit(self, params: Params, x: jax.Array) -> jax.Array:
        vision = self.config.vision
        count = vision.select_layer + (vision.num_hidden_layers + 1 if vision.select_layer < 0 else 0)
        stacked = jax.tree.map(lambda a: a[:count], params["vision"]["layers"])

        def body(x: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
            return nnx.merge(self._graphs["vision", "layers"], layer_params)(x), None

        return jax.lax.scan(self._remat(body), x, stacked)[0]

    def embed(
        self, params: Params, batch: Mapping[str, jax.Array], dtype: jnp.dtype, visual: jax.Array | None = None
    ) -> tuple[jax.Array, Boundary]:
        """x [B, S, d] in slot order, and where the visual slots end."""
        text = self._bind(params, "embed")(batch["tokens"], dtype)
        if visual is None:
            if self.config.vision is None or batch["patch_cells"].shape[1] == 0:
                return text, Boundary(0)
            visual = self.embed_visual(params, batch["patches"], batch["patch_cells"], dtype)
        both = jnp.concatenate([visual.astype(dtype), text], axis=1)
        boundary = Boundary(visual.shape[1], batch.get("visual_slots"))
        if boundary.elastic is None:
            return both, boundary
        # Row b has its first visual_slots[b] visual tokens, then text, in S slots.
        slot = jnp.arange(batch["order"].shape[1])[None]
        end = boundary.elastic[:, None]
        source = jnp.where(slot < end, slot, slot - end + visual.shape[1])
        # Slots behind the text (source beyond the end) hold padding, whatever is there.
        return jnp.take_along_axis(both, source[..., None], axis=1, mode="clip"), boundary

    def __call__(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        dtype: jnp.dtype = jnp.bfloat16,
        *,
        collect: tuple[str, ...] = (),
        cache: Cache | None = None,
        visual: jax.Array | None = None,
    ) -> Output:
        """Runs the model on a batch of packed rows.

        Args:
          params: nested dict as made by ``init``.
          batch: fields of ``data_pipelines.batch.BatchSpec``. Optional further field ``lengths`` int32 [B, S]
            in sequence order: current length of each token's sample, if it is not the one the batch shows
            (dynamic RoPE scaling reads it). Optional field ``visual_slots`` int32 [B], multiples of ``mmoe_tile``:
            elastic boundaries. Row b then has its first visual_slots[b] visual tokens in front and as much text
            behind as S (the width of "order") leaves room for; see ``data_pipelines.batch.ragged``.
          dtype: of the activations.
          collect: of "hidden", "attention"; see ``Output``. "cache" (where none is given): a cache of
            capacity S that holds this call's slots, made without attending to empty ones.
          cache: keys and values of earlier slots; this call's S slots are appended. ``positions`` of the
            batch must then count from the sample's start, and ``segments`` agree with the cache's.
          visual: visual tokens [B, V, d], if they were embedded beforehand.
        """
        x, boundary = self.embed(params, batch, dtype, visual)
        context = self._context(batch)
        x, cache, collected = self._run_layers(params, x, context, boundary, cache, collect)
        norm = self._bind(params, "final_norm")
        if "hidden" in collect:
            collected["hidden"] = collected["hidden"].at[-1].set(norm(x))
        return Output(norm(_text_slots(x, boundary, batch["tokens"].shape[1])), collected, cache)

    def _context(self, batch: Mapping[str, jax.Array]) -> Context:
        order = batch["order"]
        inverse = jnp.argsort(order, axis=1)
        lengths = batch["lengths"] if "lengths" in batch else _sample_lengths(batch["positions"], batch["segments"])
        in_slots = [jnp.take_along_axis(a, inverse, axis=1) for a in (batch["positions"], batch["segments"], lengths)]
        positions, segments, lengths = in_slots
        cosines, sines = rotary(self.config, positions, lengths)
        return Context(cosines, sines, Slots(positions, segments), SequenceOrder(order, inverse))

    def _run_layers(self, params, x, context, boundary, cache, collect):
        graph = self._graphs[("layers",)]
        length = x.shape[1]
        stacked = None
        if cache is not None:
            written = [
                jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=1)
                for old, new in zip(cache.slots, context.slots)
            ]
            cache = cache._replace(slots=Slots(*written))
            stacked = (cache.keys, cache.values)

        def body(carry: Any, xs: Any) -> tuple[Any, dict[str, Any]]:
            x, stacked = carry
            layer_params, layer = xs
            mine = None if stacked is None else LayerCache(*stacked, layer, cache.slots, cache.used)
            before = x
            x, mine, extra = nnx.merge(graph, layer_params)(x, context, boundary, mine, collect)
            stacked = None if mine is None else (mine.keys, mine.values)
            return (x, stacked), extra | ({"hidden": before} if "hidden" in collect else {})

        xs = (params["layers"], jnp.arange(self.config.num_hidden_layers))
        (x, stacked), collected = jax.lax.scan(self._remat(body), (x, stacked), xs)
        if cache is not None:
            cache = Cache(*stacked, cache.slots, cache.used + length)
        elif "cache" in collect:
            cache = Cache(*collected.pop("cache"), context.slots, jnp.full((), length, jnp.int32))
        if "hidden" in collect:
            collected["hidden"] = jnp.concatenate([collected["hidden"], x[None]])
        return x, cache, collected

    def _remat(self, body: Any) -> Any:
        policies = {
            "full": None,
            "dots": jax.checkpoint_policies.dots_saveable,
            "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }
        if self.config.remat == "none":
            return body
        return jax.checkpoint(body, policy=policies[self.config.remat], prevent_cse=False)

    def output_kernel(self, params: Params) -> jax.Array:
        """[d, vocabulary]: the LM head's kernel, or the transposed embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return params["embed"]["embedding"].T
        return params["lm_head"]["kernel"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocabulary] of ``hidden`` [..., d]."""
        kernel = self.output_kernel(params).astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)

    def empty_cache(self, rows: int, capacity: int, dtype: jnp.dtype = jnp.bfloat16) -> Cache:
        """A cache of ``capacity`` slots for ``rows`` rows."""
        config = self.config
        shape = (config.num_hidden_layers, rows, capacity, config.num_key_value_heads, config.head_dim)
        slots = Slots(*(jnp.zeros((rows, capacity), jnp.int32) for _ in range(2)))
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, jnp.zeros((), jnp.int32))


def _text_slots(x: jax.Array, boundary: Boundary, text: int) -> jax.Array:
    """[B, text, d] of x [B, S, d]; with an elastic boundary, slots behind the row's end repeat its last one."""
    if boundary.elastic is None:
        return x[:, boundary.static :]
    slot = jnp.minimum(boundary.elastic[:, None] + jnp.arange(text)[None], x.shape[1] - 1)
    return jnp.take_along_axis(x, slot[..., None], axis=1)


def _sample_lengths(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """int32 [B, S]: tokens of each token's sample (its largest position + 1)."""
    rows, length = segments.shape
    longest = jnp.zeros((rows, length + 1), jnp.int32)
    longest = jax.vmap(lambda l, s, p: l.at[s].max(p + 1))(longest, segments, positions)
    return jnp.take_along_axis(longest, segments, axis=1)
