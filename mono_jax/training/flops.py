"""Useful work: tokens of a batch, FLOPs of a step on them, and the peak of a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import boundaries
from mono_jax.models.architecture import Architecture
from mono_jax.training.chips import chip_of

COUNTED = ("visual", "text", "pairs", "image_pairs")


def count_tokens(batch: Mapping[str, np.ndarray], counted: np.ndarray | None = None) -> dict[str, int]:
    """Real (not padding) work of a host batch: ``visual`` and ``text`` tokens, and ``pairs`` of attending tokens.

    Exact, since a token at position p of its sample attends to p + 1 tokens; ``image_pairs`` are pairs of visual tokens
    with later ones of their image, which a model with bidirectional images has in addition. ``counted``: bool [B], rows
    that count.
    """
    real = batch["segments"] > 0
    if counted is not None:
        real &= counted[:, None]
    visual = real & (batch["order"] < boundaries(batch)[:, None])
    pairs = (batch["positions"] + 1)[real].sum(dtype=np.int64)
    # Along a row, an image is a run of visual tokens of one sample; with its tokens numbered 0, 1, ..., the sum of all
    # numbers is the number of pairs.
    index = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    image = np.where(visual, batch["segments"], 0)
    starts = np.diff(image, axis=1, prepend=0) != 0
    later = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1))[visual].sum(dtype=np.int64)
    counts = (visual.sum(), real.sum() - visual.sum(), pairs, later)
    return dict(zip(COUNTED, map(int, counts)))


class Matmul(NamedTuple):
    """A product of tokens with a weight, in all layers that have one.

    Attributes:
      forward: FLOPs of the forward pass.
      group: parameter group of the weight.
      needed: whether the backward pass needs the result, which is then recomputed if it was not kept.
    """

    forward: float
    group: str
    needed: bool = True


def language_matmuls(config: Architecture, visual: float, text: float) -> Iterator[Matmul]:
    """The matmuls of the language model for these numbers of visual and text tokens."""
    d, ff, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    experts = "visual_experts" if config.visual_ffn_experts else "text_experts"
    qkv = "visual_attention" if config.visual_attention_experts else "attention"
    for tokens, expert, attention in ((visual, experts, qkv), (text, "text_experts", "attention")):
        yield Matmul(4 * d * ff * layers * tokens, expert)
        yield Matmul(2 * d * ff * layers * tokens, expert, needed=False)
        yield Matmul(2 * d * config.qkv_dim * layers * tokens, attention)
    yield Matmul(2 * d * config.query_dim * layers * (visual + text), "attention")
    yield Matmul(2 * d * config.vocab_size * text, "token_embeddings")


def step_flops(config: Architecture, trained: frozenset[str], counts: Mapping[str, float]) -> float:
    """Model FLOPs of one training step on the counted tokens.

    A matmul costs 2 FLOPs per multiply-add forward, the same again for its input's gradient, and once more for its
    weight's gradient, but only if its group trains. Recomputation and padding do not count.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    visual = counts["visual"]

    def cost(forward: float, group: str, *, input_gradient: bool = True) -> float:
        return forward * (1 + input_gradient + (group in trained))

    total = sum(cost(each.forward, each.group) for each in language_matmuls(config, visual, counts["text"]))
    pairs = counts["pairs"] + (counts["image_pairs"] if config.bidirectional_images else 0)
    total += 3 * 4 * config.query_dim * pairs * layers  # scores and their product with v: both operands are activations
    if config.vision is not None:
        vision = config.vision
        shuffled = vision.hidden_size * vision.shuffle**2
        pixels = vision.token_pixels**2 * vision.num_channels
        total += cost(2 * pixels * vision.hidden_size * visual, "visual_embedding", input_gradient=False)
        total += cost(2 * (shuffled * d + d * d) * visual, "visual_embedding")
        if vision.kind == "intern_vit":
            patches = visual * vision.shuffle**2
            width = vision.hidden_size
            per_patch = 2 * width * (4 * width + 2 * vision.intermediate_size)
            total += cost(per_patch * patches * vision.num_hidden_layers, "visual_encoder")
            total += 3 * 4 * width * patches * vision.tile_tokens * vision.shuffle**2 * vision.num_hidden_layers
    return float(total)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device of this kind; None if no data sheet is known, instead of a guess."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak
