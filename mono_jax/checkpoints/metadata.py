"""What a checkpoint says of its run beside the arrays: the config it ran with and the versions it ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

from mono_jax import tree


def diff_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference between two nested dicts; an absent key is None."""
    flat_old, flat_new = (
        {path.replace("/", "."): value for path, value in tree.flatten(values).items()} for values in (old, new)
    )
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [(key, flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
