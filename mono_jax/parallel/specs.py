"""The table from parameter paths to PartitionSpecs, and the shardings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.axes import COLUMNS, SHARDS, TENSOR
from mono_jax.models.adapters import is_adapter, is_first, kernel_of
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import canonical

P = PartitionSpec


def spec_table(config: Architecture) -> list[tuple[str, PartitionSpec]]:
    """(pattern, PartitionSpec) for every parameter of ``config``'s model; stacked layers come first.

    fsdp and context, whose devices have different tokens, split rows of kernels, never columns, since TPUs pad the last
    dimension to 128 and reduce-scatter along the first. Embedding and LM head are split along their width over all
    axes, since a vocabulary size such as 92,553 has no suitable divisor; the loss lays out the head by columns
    (``training.loss``).
    """
    columns, rows = P(None, SHARDS, TENSOR), P(None, (TENSOR, *SHARDS))
    bias = r"|layers/attention/wo/bias" if config.bias else ""
    table = [
        (r"embed/embedding", P(None, COLUMNS)),
        (r"layers/(visual_)?(attention/wqkv|feed_forward/(gate|up))/kernel", columns),
        (r"layers/(attention/wo|(visual_)?feed_forward/down)/kernel", rows),
        (rf"(layers/.*_norm|final_norm)/scale{bias}", P()),
    ]
    if config.has_qkv_bias:
        table.append((r"layers/(visual_)?attention/wqkv/bias", P(None, TENSOR)))
    if not config.tie_word_embeddings:
        table.append((r"lm_head/kernel", P((*SHARDS, TENSOR))))
    if config.vision is not None:
        table += [
            (r"projector/fc1/kernel", P(SHARDS, TENSOR)),
            (r"projector/fc2/kernel", P((TENSOR, *SHARDS))),
            (r"vision/(patch_embedding/.*|.*_embedding)|projector/(.*/bias|norm/scale)", P()),
        ]
        if config.vision.kind == "intern_vit":
            table += [
                (r"vision/layers/(attn/qkv|mlp/fc1)/kernel", columns),
                (r"vision/layers/(attn/proj|mlp/fc2)/kernel", rows),
                (r"vision/layers/(.*/(scale|bias))", P()),
            ]
    return table


def param_shardings(config: Architecture, params: Mapping[str, Any], mesh: Mesh) -> tree.Tree:
    """NamedShardings in the shape of ``params`` (arrays or their shapes, including slices of stacked layers).

    An axis that does not divide a dimension, or what other axes leave of it, is dropped for that dimension. Adapters
    are sharded like the rows (A) and the columns (B) of their kernels.
    """
    flat = tree.flatten(params)
    own = {canonical(path) for path in flat if not is_adapter(path)}
    specs = tree.match(spec_table(config), own, "sharding table")
    for path in filter(is_adapter, map(canonical, flat)):
        rows, columns = (*specs[kernel_of(path)][1:], None, None)[:2]
        specs[path] = P(None, rows) if is_first(path) else P(None, None, columns)
    return tree.unflatten(
        {path: NamedSharding(mesh, _fit(specs[canonical(path)], leaf.shape, mesh)) for path, leaf in flat.items()}
    )


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    return P(*(_dividing(entry, size, mesh) for entry, size in zip(spec, shape)))


def _dividing(entry: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The axes of one dimension that are larger than 1 and divide it, one after the other."""
    kept: tuple[str, ...] = ()
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[other] for other in (*kept, axis)) == 0:
            kept += (axis,)
    return kept if len(kept) > 1 else kept[0] if kept else None


def like_params(target: Any, params: tree.Tree, shardings: tree.Tree, mesh: Mesh) -> Any:
    """Shardings for a tree such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its shape is sharded like it; everything else is
    replicated.
    """
    places, shapes = tree.flatten(shardings), {path: leaf.shape for path, leaf in tree.flatten(params).items()}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            name = "/".join(keys[start:])
            if name in places and leaf.shape == shapes[name]:
                return places[name]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, target)
