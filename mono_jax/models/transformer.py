"""The models: dense language models, Mono-InternVL, Mono-InternVL-1.5 and the modular InternVL, from one set of layers.

    batch -> embed -> [B, S, d], slots modality-major (V visual, then T text)
          -> layers: x += attention(norm(x)); x += expert of the slot's modality(norm(x))
          -> final norm and LM head on the text slots only, since visual tokens predict nothing

Parameters are one plain nested dict. ``Model`` holds the pure functions over it: it binds the embeddings and the head
once (``Ends``), and runs the decoder layers, which are stacked on a leading axis, in ``jax.lax.scan``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mono_jax import tree
from mono_jax.models.adapters import Adapters, is_adapter, merged
from mono_jax.models.architecture import Architecture
from mono_jax.models.attention import attend, attend_with_probabilities
from mono_jax.models.cache import Cache
from mono_jax.models.execution import LAYER_INPUT, LAYER_MIDDLE, Execution
from mono_jax.models.layer_ranges import segments
from mono_jax.models.layers import FFNS, Embedding, Kernel, Linear, RMSNorm, Structure, Transposed
from mono_jax.models.moe import by_modality
from mono_jax.models.paged_cache import AnyCache
from mono_jax.models.rope import rotate
from mono_jax.models.sharding import by_rows, from_columns
from mono_jax.models.slots import Slots, make_slots
from mono_jax.models.vision import Projector, VisionTower
from pallas_kernels.precision import float32_sums

Params = dict[str, Any]
Collected = dict[str, Any]


class Output(NamedTuple):
    """``hidden`` [B, T, d]: text slots after the final norm. ``collected``: what was requested, stacked over layers.

    "hidden": [L + 1, B, S, d], the embeddings and the output of each layer, the last one after the final norm;
    "attention": float32 [L, B, Hq, S, S] in slot order; "ffn": [L, B, S, d], the input of the experts. ``cache``: the
    updated cache, if one was given or requested.
    """

    hidden: jax.Array
    collected: Collected
    cache: AnyCache | None = None


class VisualAttention(nnx.Module):
    """The visual attention expert of Mono-InternVL-1.5: a QKV projection (and its norms) for visual tokens.

    Outputs of wqkv are grouped by KV head: (queries..., k, v).
    """

    def __init__(self, config: Architecture, wide: bool, *, rngs: nnx.Rngs):
        self.wqkv = Linear(config.hidden_size, config.qkv_dim, bias=config.has_qkv_bias, wide=wide, rngs=rngs)
        if config.qk_norm:
            self.q_norm, self.k_norm = (_norm(config, config.head_dim, rngs) for _ in range(2))


class Attention(VisualAttention):
    """Fused QKV projection and output projection."""

    def __init__(self, config: Architecture, wide: bool, *, rngs: nnx.Rngs):
        super().__init__(config, wide, rngs=rngs)
        self.wo = Linear(config.query_dim, config.hidden_size, bias=config.bias, wide=wide, rngs=rngs)


def _norm(config: Architecture, features: int, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(features, config.rms_norm_eps, offset=config.unit_offset_norms, rngs=rngs)


class DecoderLayer(nnx.Module):
    """One decoder layer with, if the config has them, visual experts beside the text experts."""

    def __init__(self, config: Architecture, execution: Execution, adapters: Adapters | None = None, *, rngs: nnx.Rngs):
        d, wide = config.hidden_size, execution.wide_gradients
        self.config, self.execution = config, execution
        ffn = FFNS[config.hidden_act]
        self.attention_norm = _norm(config, d, rngs)
        self.attention = Attention(config, wide, rngs=rngs)
        self.ffn_norm = _norm(config, d, rngs)
        self.feed_forward = ffn(d, config.intermediate_size, wide=wide, rngs=rngs)
        if config.sandwich_norms:
            self.attention_post_norm, self.ffn_post_norm = (_norm(config, d, rngs) for _ in range(2))
        if config.visual_attention_experts:
            self.visual_attention = VisualAttention(config, wide, rngs=rngs)
        if config.visual_ffn_experts:
            self.visual_feed_forward = ffn(d, config.intermediate_size, wide=wide, rngs=rngs)
        if adapters is not None:
            adapters.attach(self, rngs)

    def __call__(
        self, x: jax.Array, slots: Slots, layer: jax.Array, cache: AnyCache | None, collect: tuple[str, ...]
    ) -> tuple[jax.Array, AnyCache | None, Collected]:
        """Maps x [B, S, d] to x; ``layer`` is the index of this layer in ``cache``.

        Also returns the cache with this layer's keys and values, and this layer's part of what ``collect`` requests.
        """
        collected: Collected = {}
        if sliding := self.config.sliding_layers:
            slots = slots.of_layer(jnp.isin(layer, np.array(sliding)))
        query, key, value = self._qkv(self.attention_norm(x), slots)
        query, key = (rotate(a, slots.cosines, slots.sines) for a in (query, key))
        if (scalar := self.config.query_pre_attn_scalar) is not None:
            query = query * (self.config.head_dim / scalar) ** 0.5  # attention divides by sqrt(D)
        if cache is not None:
            cache = cache.write(layer, key, value)
        elif "cache" in collect:
            collected["cache"] = (key, value)
        if "attention" in collect:
            collected["attention"], mixed = attend_with_probabilities(query, key, value, slots, cache, layer)
        else:
            mixed = attend(self.execution, query, key, value, slots, cache, layer)
        mixed = self.attention.wo(mixed.reshape(*x.shape[:2], -1))
        if self.config.sandwich_norms:
            mixed = self.attention_post_norm(mixed)
        x = checkpoint_name(x + mixed, LAYER_MIDDLE)
        visual = self.visual_feed_forward if self.config.visual_ffn_experts else None
        normed = self.ffn_norm(x)
        if "ffn" in collect:
            collected["ffn"] = normed
        y = by_modality(self.feed_forward, visual, normed, slots, self.execution)
        return x + (self.ffn_post_norm(y) if self.config.sandwich_norms else y), cache, collected

    def _qkv(self, x: jax.Array, slots: Slots) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, Hq, D], keys and values [B, S, Hkv, D] of normed x [B, S, d], before RoPE."""
        config = self.config
        visual = self.visual_attention.wqkv if config.visual_attention_experts else None
        fused = by_modality(self.attention.wqkv, visual, x, slots, self.execution)
        b, s = x.shape[:2]
        group = config.num_attention_heads // config.num_key_value_heads
        fused = fused.reshape(b, s, config.num_key_value_heads, group + 2, config.head_dim)
        query = fused[:, :, :, :group].reshape(b, s, config.num_attention_heads, config.head_dim)
        key, value = fused[:, :, :, group], fused[:, :, :, group + 1]
        if config.qk_norm:
            query, key = self._normed("q_norm", query, slots), self._normed("k_norm", key, slots)
        return query, key, value

    def _normed(self, name: str, x: jax.Array, slots: Slots) -> jax.Array:
        """x [B, S, heads, D] after the norm ``name`` of each head; visual experts have separate scales."""
        norm = getattr(self.attention, name)
        if not self.config.visual_attention_experts or slots.all_text:
            return norm(x)
        visual = getattr(self.visual_attention, name).scale[...]
        return norm(x, jnp.where(slots.is_visual()[..., None, None], visual, norm.scale[...]))


class Ends(nnx.Module):
    """Everything but the decoder layers: embeddings of both modalities, final norm, LM head."""

    def __init__(self, config: Architecture, execution: Execution, *, rngs: nnx.Rngs):
        d, vision, wide = config.hidden_size, config.vision, execution.wide_gradients
        self.config, self.execution = config, execution
        self.embed = Embedding(config.vocab_size, d, wide=wide, rngs=rngs)
        self.final_norm = _norm(config, d, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(d, config.vocab_size, rngs=rngs)
        if vision is not None:
            self.vision = VisionTower(vision, wide=wide, rngs=rngs)
            self.projector = Projector(vision.hidden_size * vision.shuffle**2, d, wide=wide, rngs=rngs)

    def embed_visual(self, patches: jax.Array, cells: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Visual tokens [B, V, d] of patches [B, V, P, P, 3] (uint8, or normalised floats) and cells int32 [B, V].

        For a modular model, V must consist of whole tiles (``vision.tile_tokens`` tokens each).
        """
        return by_rows(self.projector(self.vision(patches, cells, dtype, self.execution.remat_scan)))

    def embed_slots(
        self, batch: Mapping[str, jax.Array], dtype: jnp.dtype, visual: jax.Array | None
    ) -> tuple[jax.Array, Slots]:
        """x [B, S, d] in slot order, and its slots."""
        text = from_columns(self.embed(batch["tokens"], dtype))
        if self.config.scale_embeddings:
            text = text * jnp.asarray(self.config.hidden_size**0.5, dtype)
        if visual is None:
            if self.config.vision is None or batch["patch_cells"].shape[1] == 0:
                return text, dataclasses.replace(make_slots(self.config, batch, 0), boundaries=None)
            visual = self.embed_visual(_without_padding(batch), batch["patch_cells"], dtype)
        slots = make_slots(self.config, batch, visual.shape[1])
        x = slots.together(slots.in_parts(visual.astype(dtype)), slots.in_parts(text))
        if slots.boundaries is None:
            return x, slots
        # Row b has its first boundaries[b] visual tokens, then text, in S slots.
        slot = jnp.arange(slots.order.shape[1])[None]
        end = slots.boundaries[:, None]
        source = jnp.where(slot < end, slot, slot - end + visual.shape[1])
        # Slots after the text (source beyond the end) contain arbitrary padding.
        return jnp.take_along_axis(x, source[..., None], axis=1, mode="clip"), slots

    def output_kernel(self) -> Kernel:
        """[d, vocabulary]: the LM head's kernel, or the transposed embedding if they are tied."""
        return self.embed.embedding[...].T if self.config.tie_word_embeddings else self.lm_head.kernel[...]


class Model:
    """The pure functions of one architecture, computed as ``execution`` says; holds no arrays.

    ``adapters``: low-rank adapters of kernels of decoder layers, as extra parameters; None in a finished model.

    >>> model = Model(preset("tiny_mono"))
    >>> params = model.init(jax.random.key(0))
    >>> logits = model.logits(params, model(params, batch).hidden)
    """

    def __init__(self, config: Architecture, execution: Execution | None = None, adapters: Adapters | None = None):
        self.config, self.execution, self.adapters = config, execution or Execution(), adapters
        self._ends = Structure(lambda rngs: Ends(config, self.execution, rngs=rngs))
        self._layer = Structure(lambda rngs: DecoderLayer(config, self.execution, adapters, rngs=rngs))

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        ends, layers = jax.random.split(key)
        stacked = self._layer.init_stacked(layers, self.config.num_hidden_layers)
        return self._ends.init(ends) | {"layers": stacked}

    def init_adapters(self, key: jax.Array) -> Params:
        """The adapters from ``init``'s result."""
        return tree.unflatten({path: leaf for path, leaf in tree.flatten(self.init(key)).items() if is_adapter(path)})

    def plain(self, params: Mapping[str, Any]) -> Params:
        """``params`` of the same model without adapters, which are added to their kernels."""
        return params if self.adapters is None else merged(params, self.adapters.scale)

    def abstract_params(self) -> Params:
        """Shapes and dtypes of ``init``'s result; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def ends(self, params: Mapping[str, Any]) -> Ends:
        """Embeddings, final norm and head, bound to ``params``."""
        return self._ends.bind({name: value for name, value in params.items() if not name.startswith("layers")})

    def __call__(
        self,
        params: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        dtype: jnp.dtype = jnp.bfloat16,
        *,
        collect: tuple[str, ...] = (),
        cache: AnyCache | None = None,
        visual: jax.Array | None = None,
    ) -> Output:
        """Runs the model on a batch of packed rows.

        Args:
          params: nested dict as returned by ``init``.
          batch: fields of ``data_pipelines.batch.BatchSpec``. Optional additional field ``lengths`` int32 [B, S] in
            sequence order: current length of each token's sample, if it is not the length in the batch (dynamic RoPE
            scaling uses it). Optional field ``visual_slots`` int32 [B], multiples of ``execution.experts_block``:
            ragged boundaries. Row b then starts with its first visual_slots[b] visual tokens, followed by as much text
            as fits into S (the width of "order").
          dtype: of the activations.
          collect: any of "hidden", "attention", "ffn"; see ``Output``. "cache" (if none is given): a cache of
            capacity S that holds this call's slots, built without attending to empty ones.
          cache: keys and values of earlier slots; this call's S slots are appended. ``positions`` of the
            batch must then count from the sample's start, and ``segments`` must match the cache's.
          visual: visual tokens [B, V, d], if they are already embedded.
        """
        ends = self.ends(params)
        x, slots = ends.embed_slots(batch, dtype, visual)
        x = jnp.where((slots.segments > 0)[..., None], x, 0)  # the content of padding, even NaN, reaches no gradient
        cache = None if cache is None else cache.append(slots)
        x, cache, collected = self._run_layers(params, x, slots, cache, collect)
        if "hidden" in collect:
            collected["hidden"] = jnp.concatenate([collected["hidden"], ends.final_norm(x)[None]])
        hidden = by_rows(ends.final_norm(_text_slots(x, slots, batch["tokens"].shape[1])))
        return Output(hidden, collected, cache)

    def _run_layers(
        self,
        params: Mapping[str, Any],
        x: jax.Array,
        slots: Slots,
        cache: AnyCache | None,
        collect: tuple[str, ...],
    ) -> tuple[jax.Array, AnyCache | None, Collected]:
        def body(carry: tuple[jax.Array, AnyCache | None], xs: tuple[Params, jax.Array]) -> tuple[Any, Collected]:
            x, cache = carry
            params, layer = xs
            x = checkpoint_name(by_rows(x), LAYER_INPUT)
            y, cache, collected = self._layer.bind(params)(x, slots, layer, cache, collect)
            return (by_rows(y), cache), collected | ({"hidden": x} if "hidden" in collect else {})

        scanned = self.execution.remat_scan(body)
        runs = []
        for start, stop, layers in segments(params, self.config.num_hidden_layers):
            (x, cache), collected = jax.lax.scan(scanned, (x, cache), (layers, jnp.arange(start, stop)))
            runs.append(collected)
        collected = runs[0] if len(runs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *runs)
        if "cache" in collected:
            used = jnp.full((), x.shape[1], jnp.int32)
            cache = Cache(*collected.pop("cache"), slots.positions, slots.segments, used)
        return x, cache, collected

    def output_kernel(self, params: Mapping[str, Any]) -> Kernel:
        """[d, vocabulary]: the matrix from hidden states to logits."""
        return self.ends(params).output_kernel()

    def logits(self, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
        """float32 [..., vocabulary] from ``hidden`` [..., d]."""
        kernel = self.output_kernel(params).astype(hidden.dtype)
        if isinstance(kernel, Transposed):
            return kernel.times(hidden, jnp.float32)
        return float32_sums("...d,dv->...v", hidden, kernel)


def _without_padding(batch: Mapping[str, jax.Array]) -> jax.Array:
    """The patches; if floating, those of empty slots are set to 0, since a NaN there would reach weight gradients."""
    patches, count = batch["patches"], batch["patch_cells"].shape[1]
    if not jnp.issubdtype(patches.dtype, jnp.floating):
        return patches
    inverse = jnp.argsort(batch["order"], axis=1)[:, :count]
    used = jnp.take_along_axis(batch["segments"], inverse, axis=1) > 0
    if "visual_slots" in batch:
        used &= jnp.arange(count)[None] < batch["visual_slots"][:, None]
    return jnp.where(used[..., None, None, None], patches, 0)


def _text_slots(x: jax.Array, slots: Slots, text: int) -> jax.Array:
    """[B, text, d] of x [B, S, d]; with ragged boundaries, slots after the row's end repeat its last one."""
    if slots.boundaries is None:
        return slots.apart(x)[1].reshape(x.shape[0], text, -1)
    slot = jnp.minimum(slots.boundaries[:, None] + jnp.arange(text)[None], x.shape[1] - 1)
    return jnp.take_along_axis(x, slot[..., None], axis=1)
