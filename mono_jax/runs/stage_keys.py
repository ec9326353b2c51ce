"""Keys of a stage's config: those for all stages, and the stage's own in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BY_STAGE = ("replay", "scores", "filters")  # keys of a sequence with an entry per stage


def added(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``common`` with the keys of ``own`` in front; sections, which are mappings, are joined key by key, as copies."""
    values = {**common, **own}
    for key, value in values.items():
        if isinstance(value, Mapping):
            before = common.get(key)
            values[key] = {**(before if isinstance(before, Mapping) else {}), **value}
    return values


def without_effect(
    common: Mapping[str, Any], data: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Dotted names of the keys of ``common`` and ``data`` that each of the stages replaces by its own."""
    with_data = [added({"data": data}, stage) for stage in stages]
    return [f"common.{name}" for name in _replaced(common, with_data)] + _replaced({"data": data}, stages)


def _replaced(values: Mapping[str, Any], by: Sequence[Mapping[str, Any]]) -> list[str]:
    names = []
    for key, value in values.items():
        own = [each[key] for each in by if key in each]
        if len(own) < len(by):
            continue
        if isinstance(value, Mapping) and all(isinstance(section, Mapping) for section in own):
            names += [f"{key}.{name}" for name in _replaced(value, own)]
        else:
            names.append(key)
    return names
