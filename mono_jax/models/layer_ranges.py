"""Ranges of decoder layers as separate parameters, so that some layers can train while others stay frozen.

Decoder layers are stacked: a parameter ``layers/...`` is [L, ...]. If only its layers a to b - 1 train, the training
state holds them under ``layers[a:b]/...`` and the rest under ``layers[0:a]/...`` and ``layers[b:L]/...``. No other code
sees such paths: ``joined`` puts the pieces together again.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.models.layers import Transposed

Layout = Literal["stacked", "separate", "separate_transposed"]

_LARGE = 1 << 24  # numbers in decoder layers
_PIECE = re.compile(r"layers\[(\d+):(\d+)\]")


def canonical(path: str) -> str:
    """The path of the whole parameter that ``path`` may be a piece of."""
    return _PIECE.sub("layers", path, count=1)


def cut(path: str, leaf: Any, start: int, stop: int) -> list[tuple[str, Any, bool]]:
    """(path, array, inside) of the pieces of ``leaf`` [L, ...] before, in and after the layers start to stop - 1.

    ``leaf`` may be an array or its shape (``jax.ShapeDtypeStruct``).
    """
    rest, count = path.removeprefix("layers/"), leaf.shape[0]
    pieces = ((0, start, False), (start, stop, True), (stop, count, False))
    if (start, stop) == (0, count):
        return [(path, leaf, True)]
    return [(f"layers[{a}:{b}]/{rest}", _rows(leaf, a, b), inside) for a, b, inside in pieces if a < b]


def _rows(leaf: Any, start: int, stop: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((stop - start, *leaf.shape[1:]), leaf.dtype)
    return leaf[start:stop]


def joined(params: Mapping[str, Any], concatenate: Callable[[list[Any]], Any]) -> tree.Tree:
    """``params`` with all pieces joined into whole parameters; ``concatenate`` joins arrays along axis 0.

    ``arranged`` parameters are restored to their original form.
    """
    whole: dict[str, Any] = {}
    pieces: dict[str, dict[int, Any]] = {}
    for path, leaf in tree.flatten(params).items():
        leaf = leaf.matrix if isinstance(leaf, Transposed) else leaf
        if piece := _PIECE.match(path):
            pieces.setdefault(canonical(path), {})[int(piece[1])] = leaf
        else:
            whole[path] = leaf
    whole |= {path: concatenate([leaf for _, leaf in sorted(parts.items())]) for path, parts in pieces.items()}
    return tree.unflatten(whole)


def arranged(params: Mapping[str, Any], layout: Layout) -> tree.Tree:
    """``params`` in the form that decodes fastest on some devices; ``preferred_layout`` says where.

    "separate": every decoder layer is a separate piece, ``layers[i:i + 1]/...``; ``segments`` then gives layers. With
    stacked matrices, XLA copies those of a layer out every time before it multiplies by them, which reads and writes
    all weights once more per token. "separate_transposed": their kernels and the LM head's are also ``Transposed``.

    Arrays that are cut or transposed are deleted at once, so that only one of them at a time is in memory twice.
    (Leaves may be shapes of arrays.) Parameters that are already arranged stay unchanged.
    """
    if layout == "stacked":
        return dict(params)
    flat: dict[str, Any] = {}
    for path, leaf in tree.flatten(params).items():
        turns = layout == "separate_transposed" and path.endswith("/kernel") and not isinstance(leaf, Transposed)
        if path.startswith("layers/"):
            rest = path.removeprefix("layers/")
            flat |= {f"layers[{i}:{i + 1}]/{rest}": layer for i, layer in enumerate(_layers(leaf, turns))}
        elif path == "lm_head/kernel" and turns:
            flat[path] = _transposed(leaf)
        else:
            flat[path] = leaf
    return tree.unflatten(flat)


def preferred_layout(
    mesh: Mesh | None, params: Mapping[str, Any], *, grouped: bool = False, platform: str | None = None
) -> Layout:
    """The form of parameters that decodes fastest; separate layers take longer to compile.

    Separate on one GPU; on one CPU for layers that exceed its caches; on one TPU only for grouped kernels with visual
    experts, into which stacked matrices would be copied. Stacked on a mesh.

    Args:
      grouped: experts are run by the grouped kernels (``Execution.experts``).
      platform: "cpu", "gpu" or "tpu"; None = the one in use.
    """
    if mesh is not None:
        return "stacked"
    platform, layers = platform or jax.default_backend(), params.get("layers", {})
    if platform == "cpu":
        is_large = sum(leaf.size for leaf in jax.tree.leaves(layers)) >= _LARGE
        return "separate_transposed" if is_large else "stacked"
    has_experts = any(name.startswith("visual_") for name in layers)
    return "separate" if platform == "gpu" or (grouped and has_experts) else "stacked"


def _layers(stacked: Any, turned: bool) -> list[Any]:
    """The layers [1, ...] of ``stacked`` [L, ...], which is deleted."""
    if isinstance(stacked, jax.ShapeDtypeStruct):
        layer = stacked.update(shape=(1, *stacked.shape[1:]))
        return [_transposed(layer) if turned else layer] * stacked.shape[0]
    layers = jax.block_until_ready(_split(stacked, turned))
    stacked.delete()
    return [Transposed(layer) for layer in layers] if turned else layers


@functools.partial(jax.jit, static_argnames="turned")
def _split(stacked: jax.Array, turned: bool) -> list[jax.Array]:
    return jnp.split(stacked.swapaxes(-1, -2) if turned else stacked, stacked.shape[0])


def _transposed(kernel: Any) -> Transposed:
    """``kernel`` [..., in, out], which is deleted, with its array transposed."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return Transposed(kernel.update(shape=(*kernel.shape[:-2], kernel.shape[-1], kernel.shape[-2])))
    turned = jax.block_until_ready(kernel.swapaxes(-1, -2))
    kernel.delete()
    return Transposed(turned)


def segments(params: Mapping[str, Any], count: int) -> list[tuple[int, int, tree.Tree]]:
    """(start, stop, layers): runs of decoder layers whose parameters, [stop - start, ...], each come from one piece.

    Without pieces, this is one run of all ``count`` layers. A run never mixes trainable and frozen layers of a
    parameter, so the backward pass computes no weight gradient of a frozen layer.
    """
    spans = {name: tuple(map(int, piece.groups())) for name in params if (piece := _PIECE.fullmatch(name))}
    if not spans:
        return [(0, count, params["layers"])]
    spans |= {"layers": (0, count)} if "layers" in params else {}
    borders = sorted({border for span in spans.values() for border in span})
    runs = []
    for start, stop in itertools.pairwise(borders):
        layers: dict[str, Any] = {}
        for name, (first, last) in spans.items():
            if first <= start and stop <= last:
                for path, leaf in tree.flatten(params[name]).items():
                    layers[path] = leaf[start - first : stop - first]
        runs.append((start, stop, tree.unflatten(layers)))
    return runs
