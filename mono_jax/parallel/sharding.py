"""The device mesh, and one table from parameter paths to PartitionSpecs.

Axes: ``data`` (batch), ``fsdp`` (batch and parameters), ``tensor`` (heads and FFN columns).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import ModelConfig
from pallas_kernels import devices

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
BATCH = P(ROWS)
_traced_for: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("traced_for", default=None)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 = all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """Raises ConfigError if the axes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config or MeshConfig(), axis) for axis in AXES]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known else 0
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        axes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        raise ConfigError(f"mesh {axes} does not fit {len(devices)} devices: change config.mesh")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec_table(config: ModelConfig) -> list[tuple[str, PartitionSpec]]:
    """(pattern, PartitionSpec) for every parameter of ``config``'s model; stacked layers come first."""
    columns, rows = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    bias = r"|layers/attention/wo/bias" if config.bias else ""
    table = [
        (r"embed/embedding", P("tensor", "fsdp")),
        (r"layers/(visual_)?(attention/wqkv|feed_forward/(gate|up))/kernel", columns),
        (r"layers/(attention/wo|(visual_)?feed_forward/down)/kernel", rows),
        (rf"(layers/.*_norm|final_norm)/scale{bias}", P()),
    ]
    if config.bias:
        table.append((r"layers/(visual_)?attention/wqkv/bias", P(None, "tensor")))
    if not config.tie_word_embeddings:
        table.append((r"lm_head/kernel", P("fsdp", "tensor")))
    if config.vision is not None:
        table += [
            (r"projector/fc1/kernel", P("fsdp", "tensor")),
            (r"projector/fc2/kernel", P("tensor", "fsdp")),
            (r"vision/(patch_embedding/.*|.*_embedding)|projector/(.*/bias|norm/scale)", P()),
        ]
        if config.vision.kind == "intern_vit":
            table += [
                (r"vision/layers/(attn/qkv|mlp/fc1)/kernel", columns),
                (r"vision/layers/(attn/proj|mlp/fc2)/kernel", rows),
                (r"vision/layers/(.*/(scale|bias))", P()),
            ]
    return table


def param_shardings(config: ModelConfig, params: Mapping[str, Any], mesh: Mesh) -> tree.Tree:
    """NamedShardings in the shape of ``params`` (arrays or their shapes).

    An axis that does not divide a dimension (a vocabulary of 92,553, say) is dropped there.
    """
    flat = tree.flatten(params)
    specs = tree.match(spec_table(config), flat, "sharding table")
    return tree.unflatten({path: NamedSharding(mesh, _fit(specs[path], flat[path].shape, mesh)) for path in flat})


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    kept = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)]
    return P(*kept)


def like_params(target: Any, shardings: tree.Tree, mesh: Mesh) -> Any:
    """Shardings for a tree such as an optimizer state: a leaf whose path ends in a parameter's path and that has
    more than no dimension is laid out like it; everything else is replicated."""
    flat = tree.flatten(shardings)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            if "/".join(keys[start:]) in flat and getattr(leaf, "ndim", 0):
                return flat["/".join(keys[start:])]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, target)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of the global batch, as global arrays sharded over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


@contextlib.contextmanager
def tracing_for(mesh: Mesh) -> Iterator[None]:
    """What is traced inside runs on ``mesh``, whose devices may be absent: see `per_device` and `platform`."""
    token = _traced_for.set(mesh)
    try:
        with devices.targeting(mesh.devices.flat[0]):
            yield
    finally:
        _traced_for.reset(token)


def platform() -> str:
    """What is traced runs on "cpu", "gpu" or "tpu"."""
    mesh = _traced_for.get()
    return jax.default_backend() if mesh is None else {"cuda": "gpu"}.get(name := mesh.devices.flat[0].platform, name)


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` run by each device on its own part (``jax.shard_map``), or as it is where there is no mesh.

    Kernels need this: the partitioner splits XLA's own operations alone.
    """
    mesh = _traced_for.get()
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def tensor_axis(size: int) -> str | None:
    """The axis that splits ``size`` heads or columns; None where it does not divide them: not split."""
    mesh = _traced_for.get()
    return "tensor" if mesh is not None and size % mesh.shape["tensor"] == 0 else None
