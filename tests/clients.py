"""The Python interpreter that has third-party packages, which need not be installed with this project.

MONO_JAX_CLIENTS_PYTHON=VENV/bin/python selects it; MONO_JAX_CLIENTS_PATH is its PYTHONPATH, for clones. Tests of
packages that it lacks are skipped.
"""

from __future__ import annotations

import os
import sys

PYTHON = os.environ.get("MONO_JAX_CLIENTS_PYTHON", sys.executable)


def environment() -> dict[str, str]:
    """The environment of a process without access to this project."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "proxy" not in name}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("MONO_JAX_CLIENTS_PATH", "")}
