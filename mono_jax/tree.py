"""Nested dicts with '/'-joined paths: the one form of parameters in this project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mono_jax.errors import ConfigError

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a/b": leaf} of a nested dict, in sorted order; empty dicts vanish."""
    flat: dict[str, Any] = {}
    for name in sorted(tree):
        path = f"{prefix}{name}"
        if isinstance(tree[name], Mapping):
            flat |= flatten(tree[name], path + "/")
        else:
            flat[path] = tree[name]
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of ``flatten``."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def merge(*trees: Mapping[str, Any]) -> Tree:
    """The union of trees that share no leaf."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"two trees hold {path}")
            flat[path] = leaf
    return unflatten(flat)


def match(table: Sequence[tuple[str, Any]], paths: Iterable[str], what: str) -> dict[str, Any]:
    """Looks each path up in ``table`` of (regex for the whole path, value).

    Raises ConfigError unless every path matches exactly one pattern and every pattern matches a path.
    """
    found: dict[str, Any] = {}
    used: set[str] = set()
    for path in paths:
        hits = [(pattern, value) for pattern, value in table if re.fullmatch(pattern, path)]
        if len(hits) != 1:
            names = [pattern for pattern, _ in hits]
            raise ConfigError(f"{what}: parameter {path} matches {len(hits)} patterns {names}, expected exactly one")
        used.add(hits[0][0])
        found[path] = hits[0][1]
    if unused := [pattern for pattern, _ in table if pattern not in used]:
        raise ConfigError(f"{what}: patterns that match no parameter: {unused}")
    return found
