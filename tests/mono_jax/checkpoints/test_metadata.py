"""What a checkpoint records about its run: versions."""

from __future__ import annotations

from mono_jax.checkpoints.metadata import package_versions


def test_package_versions_name_what_numbers_depend_on():
    assert {"python", "jax", "jaxlib", "optax", "orbax-checkpoint"} <= package_versions().keys()
