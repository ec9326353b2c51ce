"""Rotary embeddings in a Hugging Face config.json, in each of its spellings.

rope_theta, rope_scaling {type, factor}                    up to transformers 4
rope_theta, rope_scaling {rope_type, factor}               late releases of transformers 4
rope_parameters {rope_type, rope_theta, factor}            transformers 5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, RopeScaling
from mono_jax.weights.hf_section import Section

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_PARAMETERS = {  # of kinds with more parameters than a factor
    "llama3": {"original_max_position_embeddings": int, "low_freq_factor": float, "high_freq_factor": float},
    "yarn": {
        "original_max_position_embeddings": int,
        "beta_fast": float,
        "beta_slow": float,
        "attention_factor": float,
    },
}
_TYPE_KEYS = ("rope_type", "type")


def rope_from_hf(
    section: Section, *, kinds: Sequence[str], default: float, limit: int
) -> tuple[float, RopeScaling | None]:
    """Base of the angles and their scaling; raises ConfigError for an unknown kind or key.

    ``kinds`` are the kinds of scaling that the model's code supports, ``default`` is its base if no key gives one,
    ``limit`` its max_position_embeddings. Contradicting keys are refused too, because it depends on the release of
    transformers which of them is read.
    """
    section.get("partial_rotary_factor", float, 1.0, valid=(1.0,))
    found = {
        key: _parse(section, key, ("default", *kinds), limit)
        for key in ROPE_KEYS[1:]
        if section.values.get(key) is not None
    }
    thetas = {f"{key}.rope_theta": theta for key, (theta, _) in found.items() if theta is not None}
    if section.values.get("rope_theta") is not None:
        thetas["rope_theta"] = section.get("rope_theta", float)
    scalings = {key: scaling for key, (_, scaling) in found.items()}
    return _one(section, thetas, default), _one(section, scalings, None)


def _one(section: Section, values: Mapping[str, Any], default: Any) -> Any:
    first, *others = list(values) or [None]
    for other in others:
        if values[other] != values[first]:
            raise ConfigError(f"{section.where}: {first} and {other} differ: remove the wrong one")
    return values[first] if values else default


def _parse(section: Section, key: str, valid: tuple[str, ...], limit: int) -> tuple[float | None, RopeScaling | None]:
    part = Section(section.values[key], f"{section.where}: {key}")
    kinds = {name: part.get(name, str, valid=valid) for name in _TYPE_KEYS if part.values.get(name) is not None}
    kind = next(iter(kinds.values()), "default")
    parameters = _PARAMETERS.get(kind, {})
    neutral = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": limit, "truncate": True}
    for name, value in part.values.items():
        known = name in (*_TYPE_KEYS, "rope_theta", "factor", *parameters) or value is None
        if not known and not (name in neutral and value == neutral[name]):
            raise ConfigError(f"{part.where}: {name} is {value!r}: unknown to this project; remove it if you can")
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{part.where}: rope_type and type differ: remove the wrong one")
    theta = part.get("rope_theta", float) if part.values.get("rope_theta") is not None else None
    if not kinds and part.values.get("factor") is not None:
        part.get("rope_type", str)
    if kind == "default":
        return theta, None
    values = {name: part.get(name, type_) for name, type_ in parameters.items() if part.values.get(name) is not None}
    if "original_max_position_embeddings" in parameters:
        values.setdefault("original_max_position_embeddings", limit)
    try:
        return theta, RopeScaling(kind, part.get("factor", float), **values)
    except ConfigError as error:
        raise ConfigError(f"{section.where}: {error}") from None


def rope_to_hf(
    config: Architecture, original: Mapping[str, Any], *, kinds: Sequence[str], default: float
) -> dict[str, Any]:
    """The keys of ``config``, spelt as in the section ``original``; equivalent entries there are kept unchanged.

    ``kinds`` and ``default`` as for ``rope_from_hf``.
    """
    section = Section(original, "config.json")
    old = [key for key in ROPE_KEYS[1:] if isinstance(original.get(key), Mapping)]
    try:
        same = any(original.get(key) is not None for key in ROPE_KEYS)
        options = {"kinds": kinds, "default": default, "limit": config.max_position_embeddings}
        same = same and rope_from_hf(section, **options) == (config.rope_theta, config.rope_scaling)
    except ConfigError:
        same = False
    if same:
        return {key: original[key] for key in ROPE_KEYS if key in original}
    out = {key: _respelt(config, key, original[key]) for key in old}
    if "rope_parameters" not in old or "rope_theta" in original:
        out["rope_theta"] = config.rope_theta
    if not old:
        scaling = config.rope_scaling
        kind = "rope_type" if scaling and scaling.type in _PARAMETERS else "type"  # introduced with the newer kinds
        out["rope_scaling"] = {kind: scaling.type} | scaling.parameters() if scaling else None
    return out


def _respelt(config: Architecture, key: str, old: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None and key == "rope_scaling":
        return None
    names = [name for name in _TYPE_KEYS if name in old] or ["rope_type"]
    out = dict.fromkeys(names, scaling.type if scaling else "default")
    if scaling:
        out |= scaling.parameters()
    if key == "rope_parameters" or "rope_theta" in old:
        out["rope_theta"] = config.rope_theta
    return out
