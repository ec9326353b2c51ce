"""The architecture that a config asks for, and a check that the weights it starts from have it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.models.presets import PRESETS, preset
from mono_jax.runs.config import RunConfig
from mono_jax.weights.model_folder import model_config
from mono_jax.weights.names import first, param_shapes

# Keys that change how a weight is interpreted, even if its shape stays the same.
_MEANING = ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "visual_ffn_experts")
_MEANING += ("family", "head_size", "hidden_act", "unit_offset_norms", "scale_embeddings")
_MEANING += ("visual_attention_experts", "vision.kind", "vision.num_attention_heads", "vision.norm_type")

_ENCODER = (
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "norm_type",
    "qkv_bias",
    "qk_normalization",
)


def architecture_of(run: RunConfig, base: Architecture | None = None) -> Architecture:
    """The architecture of the weights to start from, or that of the preset, with the changes in ``run.model``.

    ``base``: that of the weights in ``init``, if it is known before there are any.

    Raises ConfigError that names the key and the fix if the weights' shapes differ from what the config asks for.
    """
    changes = dict(run.model)
    name = changes.pop("preset", None)
    if run.init:
        base = base or model_config(run.init)
        if isinstance(name, str):
            _check_preset(name, preset(name), base, changes, run.init)
    elif isinstance(name, str):
        base = preset(name)
    else:
        raise ConfigError(
            f"config.model.preset is {name!r}: name one of {', '.join(PRESETS)}, or give config.init (a model folder)"
        )
    config = _changed(base, changes)
    if run.init:
        _check_shapes(base, config, run.init)
    return config


def _changed(base: Architecture, changes: Mapping[str, Any]) -> Architecture:
    values = base.to_dict()
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if nested else value
    return Architecture.from_dict(values, "config.model")


def _differences(old: Architecture, new: Architecture) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of the keys that weights depend on and that differ."""
    before, after = _dotted(old), _dotted(new)
    keys = [key for key in sorted(after.keys() | before.keys()) if before.get(key) != after.get(key)]
    differ = param_shapes(old) != param_shapes(new)
    return [(key, before.get(key), after.get(key)) for key in keys if key in _MEANING or (differ and _shapes(key))]


def _shapes(key: str) -> bool:
    """Whether shapes of weights may depend on ``key``."""
    names = ("size", "num_hidden_layers", "bias", "vision", "num_channels", "downsample_ratio", "qk_normalization")
    return key != "vision.tile_size" and any(name in key.split(".")[-1] for name in names)


def _dotted(config: Architecture) -> dict[str, Any]:
    """Keys of ``config`` with dotted names; those of an encoder only if there is one."""
    values = config.to_dict()
    flat = {key: value for key, value in values.items() if key != "vision"}
    for key, value in (values.get("vision") or {}).items():
        if not config.is_monolithic or key not in _ENCODER:
            flat[f"vision.{key}"] = value
    return flat


def _check_preset(name: str, wanted: Architecture, base: Architecture, changes: Mapping[str, Any], init: str) -> None:
    """A preset given with ``init`` may only state what ``init`` is; the image token's id is up to the tokenizer."""
    with contextlib.suppress(ConfigError):  # the changes are meant for init's weights: compare the preset itself
        wanted = _changed(wanted, changes)
    here, there = _dotted(base), _dotted(wanted)
    said = changes.keys() | {"image_token_id"}
    found = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key) and key not in said]
    if found:
        listed = first([f"{key} is {there.get(key)} in the preset, {here.get(key)} in init" for key in found], 3)
        raise ConfigError(
            f"config.model.preset is {name!r}, but config.init ({init}) is another model ({listed}): leave out one of "
            "the two; other keys of config.model may change what the weights allow"
        )


def _check_shapes(base: Architecture, config: Architecture, init: str) -> None:
    found = _differences(base, config)
    if not found and param_shapes(base) == param_shapes(config):
        return
    key, old, new = next((diff for diff in found if diff[0] == "vocab_size"), found[0] if found else ("?", None, None))
    fix = "leave the key out"
    if key == "vocab_size" and len(found) == 1 and new > old:
        fix = f"grow it first: experiments/convert.py --grow_vocabulary={new} {init} DST, and start from DST"
    elif key.startswith("visual_") or (base.vision is None and config.vision is not None):
        fix = f"add them first: experiments/convert.py --embed_experts {init} DST, and start from DST"
    others = f" (and {first([diff[0] for diff in found if diff[0] != key], 3)} differ)" if len(found) > 1 else ""
    raise ConfigError(f"config.model.{key} is {new}, but the weights in {init} have {old}{others}: {fix}")
