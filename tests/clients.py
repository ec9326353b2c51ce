"""The Python that has other people's packages, which need not be installed where this project is.

MONO_JAX_CLIENTS_PYTHON=VENV/bin/python names it; MONO_JAX_CLIENTS_PATH is its PYTHONPATH, for clones. Tests of packages
that it lacks are skipped.
"""

from __future__ import annotations

import os
import sys

PYTHON = os.environ.get("MONO_JAX_CLIENTS_PYTHON", sys.executable)


def environment() -> dict[str, str]:
    """Of a process that knows nothing of this project."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "proxy" not in name}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("MONO_JAX_CLIENTS_PATH", "")}
