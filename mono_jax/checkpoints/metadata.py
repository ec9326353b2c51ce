"""What a checkpoint says of its run beside the config: the versions that it ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
