"""What a checkpoint says of its run: config differences and versions."""

from __future__ import annotations

import json

from mono_jax.checkpoints.metadata import diff_config, package_versions


def test_diff_config():
    old = {"optim": {"lr": 1e-3, "clip": 1.0}, "stage": "S1.1", "data": [1, 2]}
    new = {"optim": {"lr": 2e-3, "clip": 1.0}, "stage": "S1.1", "data": [1, 3], "seed": 0}
    assert diff_config(old, new) == [("data", [1, 2], [1, 3]), ("optim.lr", 1e-3, 2e-3), ("seed", None, 0)]
    assert diff_config(old, json.loads(json.dumps(old))) == []


def test_package_versions_name_what_numbers_depend_on():
    assert {"python", "jax", "jaxlib", "optax", "orbax-checkpoint"} <= package_versions().keys()
