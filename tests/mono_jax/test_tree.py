from __future__ import annotations

import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError


def test_flatten_and_unflatten_are_inverse():
    nested = {"b": {"y": 1, "x": {"z": 2}}, "a": 3}
    flat = tree.flatten(nested)
    assert flat == {"a": 3, "b/x/z": 2, "b/y": 1}
    assert list(flat) == sorted(flat)
    assert tree.unflatten(flat) == nested


def test_merge_joins_disjoint_trees_and_refuses_a_shared_leaf():
    assert tree.merge({"a": {"x": 1}}, {"a": {"y": 2}}, {}) == {"a": {"x": 1, "y": 2}}
    with pytest.raises(ValueError, match="a/x"):
        tree.merge({"a": {"x": 1}}, {"a": {"x": 2}})


def test_match_wants_each_path_once_and_each_pattern_used():
    assert tree.match([("a/.*", 1), ("b", 2)], ["a/x", "b"], "table") == {"a/x": 1, "b": 2}
    with pytest.raises(ConfigError, match="c matches 0 patterns"):
        tree.match([("a", 1)], ["a", "c"], "table")
    with pytest.raises(ConfigError, match="matches 2 patterns"):
        tree.match([("a", 1), (".", 2)], ["a"], "table")
    with pytest.raises(ConfigError, match="match no parameter"):
        tree.match([("a", 1), ("b", 2)], ["a"], "table")
