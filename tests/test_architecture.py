"""Repository rules that no single module can enforce: imports go one way, commands document themselves."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
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
# The rooms of mono_jax that are independent of how data is made, and the data_pipelines modules that they share.
CORE = ("models", "training", "parallel", "storage", "weights", "checkpoints")
SHARED = (
    *("batch", "errors", "strict", "special_tokens"),
    *("io.digests", "io.paths", "io.processes", "io.publish", "io.storage"),
)


def imported(file: Path) -> set[str]:
    """Dotted names of all imports of a file, including those inside functions, except those only for type checkers."""
    names = set()
    for node in _nodes_that_run(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # relative
            package = file.relative_to(ROOT).parts[: -node.level]
            start = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def _nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from _nodes_that_run(child)


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


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """For each module of the packages, the modules of the packages that it imports."""
    files = {module_name(file): file for package in PACKAGES for file in sources(package)}
    graph = {}
    for module, file in files.items():
        names = imported(file)
        modules = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (modules & files.keys()) - {module}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan's algorithm, without recursion)."""
    found, order, low, stack, on_stack = [], {}, {}, [], set()
    for root in graph:
        work = [(root, iter(sorted(graph[root])))] if root not in order else []
        while work:
            node, successors = work[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                on_stack.add(node)
            for successor in successors:
                if successor not in order:
                    work.append((successor, iter(sorted(graph[successor]))))
                    break
                if successor in on_stack:
                    low[node] = min(low[node], order[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = stack[stack.index(node) :]
                    del stack[-len(component) :]
                    on_stack -= set(component)
                    if len(component) > 1:
                        found.append(sorted(component))
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"e", "g"}, "g": {"f", "a"}}
    assert sorted(circles(graph)) == [["a", "b", "c"], ["f", "g"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_modules_import_in_no_circle():
    graph = import_graph()
    assert sum(map(len, graph.values())) > 300
    assert not circles(graph)


def rooms() -> list[str]:
    """The packages and their sub-packages, inside which modules and rooms are layered."""
    folders = {file.parent for package in PACKAGES for file in sources(package)}
    return sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


@pytest.mark.parametrize("room", rooms())
def test_rooms_are_stacked(room: str):
    """Inside a room, its modules and sub-rooms, each taken as one node, have no circular imports."""

    def part(module: str) -> str | None:
        inside = module.removeprefix(f"{room}.")
        return None if inside == module else inside.partition(".")[0]

    graph: dict[str, set[str]] = {}
    for module, names in import_graph().items():
        if (here := part(module)) is not None:
            graph.setdefault(here, set()).update(p for name in names if (p := part(name)) not in (None, here))
    assert not circles(graph)


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


def test_a_planted_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_nothing_imports_a_command():
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in commands()}
    graph = import_graph()
    found = {(module, name) for module, imports in graph.items() for name in imports if name in names}
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_files_have_one_subject(package: str):
    """At most about 400 lines per file and 60 per command; kernels are exempt."""
    limits = {file: 66 if file in commands() else 400 for file in sources(package)}
    long = {
        str(file.relative_to(ROOT)): lines
        for file, limit in limits.items()
        if "backends" not in file.parts and (lines := len(file.read_text().splitlines())) > limit
    }
    assert not long
