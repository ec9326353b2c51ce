"""Keys of a stage's config: those for all stages, and the stage's own in front of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def added(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``common`` with the keys of ``own`` in front; sections, which are mappings, are joined key by key, as copies."""
    values = {**common, **own}
    for key, value in values.items():
        if isinstance(value, Mapping):
            before = common.get(key)
            values[key] = {**(before if isinstance(before, Mapping) else {}), **value}
    return values
