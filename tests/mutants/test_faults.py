"""The faults that the mutation script plants, and the tests it chooses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import rooms
from tests.mutants.faults import faults
from tests.mutants.survivors import HARMLESS, Harmless

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("a < b", {"a <= b"}),
        ("a <= b < c", {"a < b < c", "a <= b <= c"}),
        ("a is not b", {"a is b"}),
        ("a in b", {"a not in b"}),
        ("(a) + (b)", {"(a) - (b)"}),
        ("a - 3", {"a + 3", "a - 4"}),
        ("a * b * c", {"a + b * c", "a * b + c"}),
        ("a and b or c", {"a or b or c", "a and b and c"}),
        ("not a", {"(a)"}),
        ("-a", {"(a)"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = True", {"x = False"}),
        ("f(a, b, c)", {"f(b, a, c)"}),
        ("f(a, a)", set()),
        ("jnp.max(a, axis=-1)", {"jnp.min(a, axis=-1)", "jnp.max(a, axis=0)"}),
        ("'é' + a", set()),
        ("f('é', b < c)", {"f(b < c, 'é')", "f('é', b <= c)"}),
        ("raise Error(a + b)", set()),
        ("print(f'{a + 1}')", set()),
        ("x: tuple[int, 3] = y", set()),
        ("_log.info(a, b + 1)", set()),
    ],
)
def test_faults_of_a_line(line: str, planted: set[str]):
    data = f"{line}\n".encode()
    found = faults("x.py", data)
    assert {" ".join(fault.planted(data).decode().split()) for fault in found} == planted
    assert len({fault.key for fault in found}) == len(found)


def test_every_fault_of_a_module_is_valid_and_another_program():
    data = (ROOT / "mono_jax/models/rope.py").read_bytes()
    found = faults("mono_jax/models/rope.py", data)
    assert len(found) > 20 and len({fault.key for fault in found}) == len(found)
    programs = {ast.dump(ast.parse(fault.planted(data))) for fault in found}
    assert len(programs) == len(found) and ast.dump(ast.parse(data)) not in programs


@pytest.mark.parametrize("known", HARMLESS, ids=lambda known: f"{known.file}: {known.change}")
def test_faults_that_do_no_harm_are_planted(known: Harmless):
    """An entry whose line has changed would excuse nothing, and say so to nobody."""
    found = faults(known.file, (ROOT / known.file).read_bytes())
    assert (known.source, known.change) in {(fault.source, fault.change) for fault in found}


def test_every_core_module_has_tests_and_further_ones_exist():
    found = rooms.modules(ROOT, rooms.CORE)
    assert len(found) > 50 and "mono_jax/models/rope.py" in found
    for module in found:
        assert all((ROOT / file).exists() for file in rooms.tests_of(ROOT, module)), module
    for module, files in rooms.FURTHER.items():
        assert (ROOT / f"{module}.py").is_file(), module
        assert all((ROOT / "tests" / file).is_file() for file in files), module
    assert rooms.modules(ROOT, ["mono_jax/models"]) == [m for m in found if m.startswith("mono_jax/models/")]
