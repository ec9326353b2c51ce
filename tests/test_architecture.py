"""The rules of the house that no single module can keep: imports go one way, commands teach."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mono_jax", "pallas_kernels", "data_pipelines", "experiments")
# What each package may import of the others.
ALLOWED = {
    "pallas_kernels": (),
    "data_pipelines": (),
    "mono_jax": ("pallas_kernels", "data_pipelines"),
    "experiments": ("mono_jax", "pallas_kernels", "data_pipelines"),
}
# The rooms of mono_jax that know nothing of how data is made, and the leaves of data_pipelines that they share with it.
CORE = ("models", "training", "parallel", "weights", "checkpoints")
SHARED = ("batch", "errors", "strict", "special_tokens", "io.publish")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str):
    assert sources(package)
    for file in sources(package):
        for name in imported(file):
            other = name.split(".")[0]
            if other in PACKAGES and other != package:
                assert other in ALLOWED[package], f"{file}: {name}"


def test_the_core_of_mono_jax_knows_no_data_pipeline():
    for room in CORE:
        assert sources(f"mono_jax/{room}")
        for file in sources(f"mono_jax/{room}"):
            for name in imported(file):
                if name.startswith("data_pipelines."):
                    inside = f"{name.removeprefix('data_pipelines.')}."
                    assert any(inside.startswith(f"{leaf}.") for leaf in SHARED), f"{file}: {name}"


def commands() -> list[Path]:
    found = [f for package in PACKAGES for f in sources(package) if '__name__ == "__main__"' in f.read_text()]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("file", commands(), ids=lambda f: str(f.relative_to(ROOT)))
def test_commands_explain_themselves(file: Path):
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert doc and len(doc.splitlines()) >= 2, "a command's docstring is its help"


def test_the_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    files = set(re.findall(r"(?:experiments|data_pipelines|pallas_kernels|mono_jax|tests)/[\w/.]+\w", text))
    missing = [file for file in files if not (ROOT / file).exists()]
    assert files and not missing
