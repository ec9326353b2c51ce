"""Norms of gradients, updates and parameters by parameter group."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import canonical
from mono_jax.training.groups import groups_of

NOT_COMPUTED = -1.0  # not a possible norm

Norms = dict[str, jax.Array]


class GroupNorms:
    """Norms over the groups of ``params`` (arrays or their shapes), which are all parameters of a model."""

    def __init__(self, config: Architecture, params: tree.Tree):
        self._groups = groups_of(config, params)

    def __call__(self, values: tree.Tree) -> Norms:
        """{group: norm, float32 scalar} of a tree of some of the parameters, or of their gradients."""
        parts: dict[str, list[jax.Array]] = {}
        for path, leaf in tree.flatten(values).items():
            parts.setdefault(self._groups[canonical(path)], []).append(leaf)
        return {group: optax.tree.norm(parts[group]) for group in sorted(parts)}

    def of_step(self, old: tree.Tree, new: tree.Tree, wanted: jax.Array) -> dict[str, jax.Array]:
        """update_norm/GROUP and param_norm/GROUP of a step from ``old`` to ``new``; NOT_COMPUTED unless ``wanted``."""

        def norms() -> tuple[Norms, Norms]:
            return self(jax.tree.map(jnp.subtract, new, old)), self(new)

        nothing = jax.tree.map(lambda a: jnp.full(a.shape, NOT_COMPUTED, a.dtype), jax.eval_shape(norms))
        update, param = jax.lax.cond(wanted, norms, lambda: nothing)
        return named("update_norm", update) | named("param_norm", param)


def named(name: str, norms: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The norms as metrics, NAME/GROUP."""
    return {f"{name}/{group}": value for group, value in norms.items()}
