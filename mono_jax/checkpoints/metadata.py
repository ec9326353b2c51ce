"""What a checkpoint records about its run besides the config: package versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect numerical results."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
