"""The inside of a model: which modality attends to which, how far visual experts have moved, which units they use.

After figure 5 of Mono-InternVL, where the modalities hardly mix in shallow layers but do in deep ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.generation.prompts import Prompt, pack
from mono_jax.models.architecture import Architecture
from mono_jax.models.layers import FFNS, SwiGLU, product
from mono_jax.models.transformer import Model

DEAD = 0.01  # of the layer's root mean square: a unit whose largest activation is below this is dead
TOP = 0.1  # share of units that count as the most used

Measures = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Units:
    """How an expert's units were activated, over all tokens routed to it.

    Attributes:
      total, square: float64 [L, F], sums of |h| and h^2 of h = silu(gate) * up; largest: [L, F], of |h|.
      tokens: number of tokens.
    """

    total: np.ndarray
    square: np.ndarray
    largest: np.ndarray
    tokens: int

    def __add__(self, other: Units) -> Units:
        largest = np.maximum(self.largest, other.largest)
        return Units(self.total + other.total, self.square + other.square, largest, self.tokens + other.tokens)

    @property
    def rms(self) -> np.ndarray:
        """[L], root mean square of the activations."""
        return np.sqrt(self.square.sum(axis=1) / (max(self.tokens, 1) * self.square.shape[1]))

    @property
    def dead(self) -> np.ndarray:
        """[L], share of units that no token activates appreciably."""
        return (self.largest < DEAD * self.rms[:, None]).mean(axis=1)

    def overlap(self, other: Units) -> np.ndarray:
        """[L], share of the most used units that are also among the most used of ``other``; ``TOP`` is chance level."""
        count = max(1, round(TOP * self.total.shape[1]))
        mine, theirs = (np.argsort(-units.total, axis=1, kind="stable")[:, :count] for units in (self, other))
        return np.array([len(set(a) & set(b)) / count for a, b in zip(mine, theirs)])


class UnitsOfExperts(NamedTuple):
    """The units of the experts of both modalities, over the same prompts."""

    visual: Units
    text: Units


@dataclasses.dataclass(frozen=True)
class Sample:
    """The measurements on one prompt.

    Attributes:
      attention: "text_to_visual" (the visual share of what text attends to), "visual_to_visual", each float64 [L];
        "..._uniform": the same if all earlier tokens got equal attention; "visual_distance": tokens between a visual
        token and the visual tokens it attends to, and "visual_distance_uniform".
      gap: [L + 1], distance between the modalities' mean hidden states, relative to the mean norm.
      visual, text: units of the experts.
      maps: [L, N, N] of the whole sequence, mean over heads, if requested.
    """

    attention: Measures
    gap: np.ndarray
    visual: Units
    text: Units
    maps: np.ndarray | None = None


def look(model: Model, params: Mapping[str, Any], prompt: Prompt, maps: bool = False) -> Sample:
    """Runs ``prompt``, which must have an image, in float32."""
    batch, _ = pack(model.config, [prompt], np.zeros(1, np.int64), rows=1)
    found = jax.device_get(_measured(model, params, batch))
    tokens, visual = len(prompt.input_ids), len(prompt.patches)
    units = {
        name: Units(*(np.float64(found[name][key]) for key in ("total", "square", "largest")), count)
        for name, count in (("visual", visual), ("text", tokens - visual))
    }
    attention = {name: np.float64(values) for name, values in found["attention"].items()}
    whole = None
    if maps:
        order = batch["order"][0, :tokens]
        whole = np.asarray(_maps(model, params, batch))[:, order[:, None], order[None]]
    return Sample(attention, np.float64(found["gap"]), units["visual"], units["text"], whole)


@functools.partial(jax.jit, static_argnums=0)
def _maps(model: Model, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    output = model(params, batch, jnp.float32, collect=("attention",))
    return output.collected["attention"][:, 0].mean(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _measured(model: Model, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, Any]:
    collected = model(params, batch, jnp.float32, collect=("attention", "hidden", "ffn")).collected
    inverse = jnp.argsort(batch["order"][0])
    used = batch["segments"][0][inverse] > 0
    position = batch["positions"][0][inverse]
    is_visual = jnp.arange(len(used)) < batch["patch_cells"].shape[1]
    visual, text = used & is_visual, used & ~is_visual
    found: dict[str, Any] = {
        "attention": _attention(collected["attention"][:, 0], visual, text, used, position),
        "gap": _gap(collected["hidden"][:, 0], visual, text),
    }
    layers = params["layers"]
    experts = {"visual": layers.get("visual_feed_forward", layers["feed_forward"]), "text": layers["feed_forward"]}
    for name, tokens in (("visual", visual), ("text", text)):
        found[name] = _units(experts[name], FFNS[model.config.hidden_act], collected["ffn"][:, 0], tokens)
    return found


def _attention(
    weights: jax.Array, visual: jax.Array, text: jax.Array, used: jax.Array, position: jax.Array
) -> dict[str, jax.Array]:
    """Measures [L] from probabilities [L, H, S, S]."""
    sees = used[None] & (position[None] <= position[:, None])
    uniform = (sees / jnp.maximum(sees.sum(axis=1, keepdims=True), 1))[None, None]
    distance = jnp.abs(position[:, None] - position[None])
    found = {}
    for end, values in (("", weights), ("_uniform", jnp.broadcast_to(uniform, (weights.shape[0], *uniform.shape[1:])))):
        for name, queries in (("text", text), ("visual", visual)):
            share = (values * visual).sum(axis=-1)  # [L, H, S]
            found[f"{name}_to_visual{end}"] = _mean(share, queries)
        among = values * visual
        mean = (among * distance).sum(axis=-1) / jnp.maximum(among.sum(axis=-1), 1e-9)
        found[f"visual_distance{end}"] = _mean(mean, visual)
    return found


def _mean(values: jax.Array, queries: jax.Array) -> jax.Array:
    """[L] from values [L, H, S]: the mean over heads and the selected positions of S."""
    return (values.mean(axis=1) * queries).sum(axis=-1) / jnp.maximum(queries.sum(), 1)


def _gap(hidden: jax.Array, visual: jax.Array, text: jax.Array) -> jax.Array:
    """[L + 1] from hidden states [L + 1, S, d]."""
    means = [(hidden * who[:, None]).sum(axis=1) / jnp.maximum(who.sum(), 1) for who in (visual, text)]
    norms = jnp.linalg.norm(hidden, axis=-1)
    mean_norm = (norms * (visual | text)).sum(axis=1) / (visual | text).sum()
    return jnp.linalg.norm(means[0] - means[1], axis=-1) / mean_norm


def _units(expert: Mapping[str, Any], ffn: type[SwiGLU], x: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    """Sums [L, F] over ``tokens`` of the activations of stacked FFNs on x [L, S, d]."""

    def layer(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        gate, up = weights
        h = jnp.abs(ffn.gated(product(x, gate), product(x, up))) * tokens[:, None]
        return {"total": h.sum(axis=0), "square": (h * h).sum(axis=0), "largest": h.max(axis=0)}

    kernels = tuple(expert[name]["kernel"].astype(jnp.float32) for name in ("gate", "up"))
    return jax.lax.map(lambda each: layer(*each), (kernels, x))


class Seen(NamedTuple):
    """Results over all samples: means of the attention measures and gaps, and the experts' units over all tokens."""

    attention: Measures
    gap: np.ndarray
    visual: Units
    text: Units


def together(samples: Sequence[Sample]) -> Seen:
    names = samples[0].attention
    attention = {name: np.mean([sample.attention[name] for sample in samples], axis=0) for name in names}
    gap = np.mean([sample.gap for sample in samples], axis=0)
    return Seen(attention, gap, *units_of(samples))


def units_of(samples: Sequence[Sample]) -> UnitsOfExperts:
    """The units over all tokens of ``samples``, of which there must be at least one."""
    visual, text = ([getattr(sample, which) for sample in samples] for which in ("visual", "text"))
    return UnitsOfExperts(functools.reduce(Units.__add__, visual), functools.reduce(Units.__add__, text))


_PAIRS = {"visual_feed_forward": "feed_forward", "visual_attention": "attention"}


def distances(
    config: Architecture, params: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> dict[str, Measures]:
    """{matrix: {"apart": [L], ...}}: how far the experts are apart, as |visual - text| / |text| (Frobenius norms).

    With ``base``, the model before any training with images: also "visual" and "text", the distance of each from the
    text weights of the base, from which both start. Raises ConfigError if the models do not match.
    """
    own = tree.flatten(params["layers"])
    start = None if base is None else tree.flatten(base["layers"])
    found = {}
    for path, weights in own.items():
        module, _, rest = path.partition("/")
        if module not in _PAIRS or not rest.endswith("kernel"):
            continue
        twin = f"{_PAIRS[module]}/{rest}"
        measures = {"apart": _distance(weights, own[twin])}
        if start is not None:
            if start[twin].shape != own[twin].shape:
                raise ConfigError(f"the base has layers/{twin} of shape {start[twin].shape}, not {own[twin].shape}")
            measures |= {"visual": _distance(weights, start[twin]), "text": _distance(own[twin], start[twin])}
        found[rest.removesuffix("/kernel")] = measures
    if not found:
        raise ConfigError(f"a model with {config.num_hidden_layers} layers and no visual experts: nothing to compare")
    return found


def _distance(one: Any, other: Any) -> np.ndarray:
    """[L] from two arrays [L, ...], computed layer by layer so that a large model is never in memory as a whole."""
    found = []
    for layer in range(one.shape[0]):
        a, b = (np.asarray(weights[layer], np.float32) for weights in (one, other))
        found.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return np.array(found)
