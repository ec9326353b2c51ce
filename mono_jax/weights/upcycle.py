"""Upcycling: adds visual experts to a dense language model, as Mono-InternVL starts from InternLM2.

Each visual FFN starts as a copy of the text FFN of its layer (arXiv 2410.08202); for Mono-InternVL-1.5 the
visual QKV starts as a copy of the text QKV (this project's choice, by the same principle). The patch embedding
and the projector are new and random.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.special_tokens import CHAT_TOKENS, IMAGE_TOKENS
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.transformer import Model
from mono_jax.weights.lazy import LazyArray

INTERNLM2_VOCABULARY = 92544
_ROWS = 4096  # rows of the embedding averaged at a time


def add_tokens(known: Mapping[str, int], vocab_size: int, chat: bool = True) -> tuple[dict[str, int], int]:
    """Ids of the added tokens of a tokenizer, including the image tokens, and the size of the new vocabulary.

    ``known``: added tokens that the tokenizer has. They keep their ids; new ones follow after ``vocab_size``, in the
    order of the public release, except InternLM2's chat tokens, which are unnamed rows of its own vocabulary.
    ``chat``: also add InternLM2's chat tokens, for a model without its own chat template.
    """
    tokens = dict(known)
    if chat and vocab_size == INTERNLM2_VOCABULARY:
        tokens = {name: number for name, number in CHAT_TOKENS.items() if name not in tokens} | tokens
    for name in (*(reversed(CHAT_TOKENS) if chat else ()), *IMAGE_TOKENS):
        if name not in tokens:
            tokens[name] = vocab_size
            vocab_size += 1
    return tokens, vocab_size


def upcycle(
    config: Architecture,
    params: Mapping[str, Any],
    *,
    vision: VisionConfig | None = None,
    ffn_experts: bool = True,
    attention_experts: bool = False,
    vocab_size: int | None = None,
    image_token_id: int | None = None,
    seed: int = 0,
) -> tuple[Architecture, tree.Tree]:
    """The monolithic multimodal model built from ``config`` and ``params``; existing parts are kept.

    Args:
      params: a nested dict of arrays or ``LazyArray``; lazy leaves stay lazy, others are copied.
      vision: patch embedding for a model that has none; default: that of Mono-InternVL.
      ffn_experts: a visual FFN per layer; if False, the dense model only gets vision (full tuning in table 5).
      attention_experts: also a visual QKV per layer (1.5).
      vocab_size: new size; added rows of the embedding and columns of the head are the mean of the old ones.
      image_token_id: id of <IMG_CONTEXT>.
      seed: of the patch embedding and the projector.

    Raises ConfigError for a modular model, a shrinking vocabulary, or a model that already has all experts.
    """
    new = upcycled(config, vision, ffn_experts, attention_experts).replace(
        vocab_size=vocab_size or config.vocab_size,
        image_token_id=config.image_token_id if image_token_id is None else image_token_id,
    )
    flat = tree.flatten(params)
    if new.vocab_size != config.vocab_size:
        flat |= _grow_vocabulary(flat, config.vocab_size, new.vocab_size)
    if new.visual_ffn_experts and not config.visual_ffn_experts:
        flat |= _copies(flat, "layers/feed_forward/", "layers/visual_feed_forward/")
    if new.visual_attention_experts and not config.visual_attention_experts:
        for name in ("wqkv", "q_norm", "k_norm"):
            flat |= _copies(flat, f"layers/attention/{name}/", f"layers/visual_attention/{name}/")
    if config.vision is None:
        flat |= _new_vision(new, np.dtype(flat["embed/embedding"].dtype), seed)
    return new, tree.unflatten(flat)


def upcycled(
    config: Architecture, vision: VisionConfig | None, ffn_experts: bool, attention_experts: bool
) -> Architecture:
    """The architecture of what ``upcycle`` makes of ``config``'s model, with its vocabulary; raises ConfigError."""
    if config.vision is not None and not config.is_monolithic:
        raise ConfigError("a modular model has a vision encoder: visual experts go into a dense or monolithic one")
    if has_experts(config, ffn_experts, attention_experts):
        raise ConfigError("the model already has these visual experts")
    return config.replace(
        vision=config.vision or vision or VisionConfig(),
        visual_ffn_experts=config.visual_ffn_experts or ffn_experts,
        visual_attention_experts=config.visual_attention_experts or attention_experts,
    )


def has_experts(config: Architecture, ffn_experts: bool, attention_experts: bool) -> bool:
    """Whether the model sees, and has these visual experts."""
    return (
        config.vision is not None
        and config.visual_ffn_experts >= ffn_experts
        and config.visual_attention_experts >= attention_experts
    )


def _copies(flat: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Copies, not references: a train step that donates its state cannot take the same buffer twice."""
    return {
        new + path.removeprefix(old): leaf if isinstance(leaf, LazyArray) else leaf.copy()
        for path, leaf in flat.items()
        if path.startswith(old)
    }


def grow_vocabulary(config: Architecture, params: Mapping[str, Any], size: int) -> tuple[Architecture, tree.Tree]:
    """The same model with ``size`` rows of embedding and columns of the head; new ones are the mean of the old ones.

    Raises ConfigError if the vocabulary would shrink.
    """
    flat = tree.flatten(params)
    return config.replace(vocab_size=size), tree.unflatten(flat | _grow_vocabulary(flat, config.vocab_size, size))


def _grow_vocabulary(flat: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    if new < old:
        raise ConfigError(f"the vocabulary cannot shrink from {old} to {new}")
    axes = {"embed/embedding": 0, "lm_head/kernel": 1}
    return {path: _grown(flat[path], new, axis) for path, axis in axes.items() if path in flat}


def _grown(leaf: Any, size: int, axis: int) -> Any:
    """``leaf`` [.., n, ..] with mean vectors appended along ``axis`` up to ``size``."""

    def grown(_: int | None = None) -> np.ndarray:
        old = np.asarray(leaf)
        rows = np.moveaxis(old, axis, 0)
        total = sum(rows[i : i + _ROWS].astype(np.float64).sum(0) for i in range(0, len(rows), _ROWS))
        mean = np.expand_dims((total / len(rows)).astype(old.dtype), axis)
        return np.concatenate([old, np.repeat(mean, size - len(rows), axis)], axis)

    if not isinstance(leaf, LazyArray):
        return grown()
    shape = tuple(size if i == axis else n for i, n in enumerate(leaf.shape))
    return LazyArray(shape, leaf.dtype, False, grown)


def _new_vision(config: Architecture, dtype: np.dtype, seed: int) -> dict[str, Any]:
    # The same initialisation as for a new model of this width; the unneeded language model is kept small.
    windows = {"sliding_window": None, "sliding_layers": ()}
    small = config.replace(vocab_size=1, intermediate_size=1, num_hidden_layers=1, **windows)
    new = tree.flatten(_init_vision(small, jax.random.key(seed)))
    return {path: np.asarray(leaf).astype(dtype) for path, leaf in new.items()}


@functools.partial(jax.jit, static_argnums=0)
def _init_vision(config: Architecture, key: jax.Array) -> tree.Tree:
    params = Model(config).init(key)
    return {name: params[name] for name in ("vision", "projector")}
