"""Schemathesis over the app's OpenAPI document: made-up requests get answers that the document describes.

MONO_JAX_SCHEMATHESIS=VENV/bin/schemathesis names the program; otherwise the one on the PATH is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from tests.mono_jax.serving.api.running_server import Client

PROGRAM = os.environ.get("MONO_JAX_SCHEMATHESIS") or shutil.which("schemathesis")
# Not "positive_data_acceptance": a valid request may still ask for something impossible (no image, no turn).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="schemathesis is not installed")
def test_made_up_requests_get_what_the_document_says(client: Client, tmp_path: Path):
    command = [PROGRAM, "run", f"{client.url}/openapi.json", f"--checks={','.join(CHECKS)}", "--max-examples=200"]
    done = subprocess.run(
        [*command, "--seed=1", "--no-color"], cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
