"""Which layers have a sliding window, as listed in config.json."""

from __future__ import annotations

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.weights.hf_section import Section

SLIDING, FULL = "sliding_attention", "full_attention"


def sliding_layers(section: Section, layers: int) -> tuple[int, ...] | None:
    """Indices of the layers that ``layer_types`` calls sliding; None if there is no such key."""
    types = section.values.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {SLIDING, FULL}:
        raise ConfigError(
            f"{section.where}: layer_types is {types!r}: it must be a list of {layers} of {SLIDING!r} and {FULL!r}"
        )
    return tuple(n for n, kind in enumerate(types) if kind == SLIDING)


def layer_types(config: Architecture) -> list[str]:
    return [SLIDING if n in config.sliding_layers else FULL for n in range(config.num_hidden_layers)]
