"""Nested dicts with '/'-joined paths, the form of all parameters in this project."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import traverse_util

from mono_jax.errors import ConfigError

Tree = dict[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """{"a/b": leaf} of a nested dict, sorted level by level; empty dicts are dropped."""
    flat = traverse_util.flatten_dict(tree)
    return {"/".join(path): flat[path] for path in sorted(flat)}


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of ``flatten``."""
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(*trees: Tree) -> Tree:
    """The union of trees that share no leaf."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"two trees hold {path}")
            flat[path] = leaf
    return unflatten(flat)


def leaves_by_path(state: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{"a/b": leaf} of any JAX pytree; named tuples and dicts give the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def match(table: Sequence[tuple[str, Any]], paths: Iterable[str], what: str) -> dict[str, Any]:
    """Looks up each path in ``table``, a list of (regex for the whole path, value).

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
