"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + scale (x A) B for kernels W of decoder layers.

A [in, r] and B [r, out] are the parameters ``layers/.../lora_a/kernel`` and ``layers/.../lora_b/kernel`` next to the
kernel ``layers/.../kernel``, which stays frozen. B starts as zeros, so that the model starts unchanged. Model folders
contain no adapters: ``merged`` adds them to their kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mono_jax import tree

_NAMES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """``rank``: r above. ``modules``: the modules of a decoder layer that have adapters, e.g. "attention/wqkv"."""

    rank: int
    scale: float
    modules: frozenset[str]

    def attach(self, layer: nnx.Module, rngs: nnx.Rngs) -> None:
        """Gives the linear modules of a decoder layer their adapters."""
        for path in sorted(self.modules):
            functools.reduce(getattr, path.split("/"), layer).adapt(self.rank, self.scale, rngs=rngs)


def is_adapter(path: str) -> bool:
    """Whether the parameter at ``path`` is A or B."""
    return "/" in path and path.split("/")[-2] in _NAMES


def is_first(path: str) -> bool:
    """Whether the adapter at ``path`` is A."""
    return path.split("/")[-2] == _NAMES[0]


def kernel_of(path: str) -> str:
    """Path of the kernel that the adapter at ``path`` belongs to."""
    return f"{path.rsplit('/', 2)[0]}/kernel"


def pairs(params: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{path of a kernel: (A, B)} of all adapters in ``params``, which may also hold other parameters."""
    flat = tree.flatten(params)
    kernels = sorted({kernel_of(path) for path in flat if is_adapter(path)})
    return {kernel: tuple(flat[kernel.replace("/kernel", f"/{name}/kernel")] for name in _NAMES) for kernel in kernels}


def merged(params: Mapping[str, Any], scale: float) -> tree.Tree:
    """``params`` without adapters, which are added to their kernels; the kernels keep their dtypes."""
    flat = tree.flatten(params)
    plain = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, (a, b) in pairs(params).items():
        plain[path] = added(plain[path], a, b, scale).astype(plain[path].dtype)
    return tree.unflatten(plain)


@functools.partial(jax.jit, static_argnames="scale")
def added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B in float32, for kernels [in, out], or stacked ones [L, in, out]."""
    low, high = a.astype(jnp.float32), b.astype(jnp.float32)
    return kernel.astype(jnp.float32) + scale * jnp.matmul(low, high, precision="highest")
