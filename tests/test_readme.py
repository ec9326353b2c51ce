"""The documents: their programs run, their configs build, their commands parse, their links and keys exist."""

from __future__ import annotations

import configparser
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import strict
from mono_jax.models.architecture import Architecture
from mono_jax.runs import config_file
from mono_jax.runs.config import EvipConfig, RunConfig
from tests.test_commands import Parsed, check_config, examples, module_of, own_configs, parse_only  # noqa: F401

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), ROOT / "pallas_kernels" / "README.md"]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(language: str) -> list[Any]:
    """The code blocks in one language of all documents."""
    return [
        pytest.param(code, id=f"{document.relative_to(ROOT)}-{number}")
        for document in DOCUMENTS
        for number, (found, code) in enumerate(BLOCK.findall(document.read_text(encoding="utf-8")))
        if found == language
    ]


def test_there_are_some():
    assert len(blocks("python")) >= 3
    assert len(blocks("sh")) >= 5


@pytest.mark.parametrize("code", blocks("python"))
def test_programs_run_and_configs_build(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if "def get_config(" not in code:
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "document", "exec"), {"__name__": "__main__"})
        return
    file = tmp_path / "my_config.py"
    file.write_text(code)
    config = config_file.load(str(file))
    (EvipConfig if "stages" in config else RunConfig).from_dict(config)


@pytest.mark.parametrize("code", blocks("sh"))
@pytest.mark.usefixtures("own_configs", "parse_only")
def test_commands_parse(code: str, capsys: pytest.CaptureFixture):
    found = examples(code)
    assert len(found) == len(re.findall(r"^\s*(?:\w+=\S+ )*python ", code, re.M)), "a python line that is no command"
    for file, arguments in found:
        line = f"{file} {shlex.join(arguments)}"
        try:
            module_of(file).main(arguments)
        except Parsed as parsed:
            check_config(parsed.args[0])
        except SystemExit as stop:
            assert not stop.code, f"{line}: {capsys.readouterr().err}"
        else:
            pytest.fail(f"{line}: the command did not parse")


@pytest.mark.parametrize("code", blocks("sh"))
def test_make_targets_and_extras_exist(code: str):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"^make (\w+)", code, re.M)) <= set(targets)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(re.findall(r"\.\[(\w+)\]", code)) <= set(setup["options.extras_require"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    places = [target.partition("#")[0] for target in targets if not target.startswith("http")]
    assert [place for place in places if place and not (document.parent / place).exists()] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "BUILD_NOTES.md"], ids=lambda d: str(d.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path):
    packages = "data_pipelines|experiments|mono_jax|pallas_kernels|tests|docs"
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(rf"\b((?:{packages})/[\w/.]*\w(?:\.py|\.md|\.json|\.txt|\.svg|/))(?![\w/.])", text))
    made_by_commands = {"experiments/benchmarks/results/"}
    assert sorted(name for name in named - made_by_commands if not (ROOT / name).exists()) == []


def known_keys() -> set[str]:
    chapters = (("", RunConfig), ("model", Architecture), ("", EvipConfig))
    return {row.key for prefix, cls in chapters for row in strict.reference(cls, prefix)}


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=lambda document: str(document.relative_to(ROOT))
)
def test_config_keys_exist(document: Path):
    known = known_keys()
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./])(?:config\.)?((?:data|optim|execution|mesh|model)\.[a-z_]\w*)\b(?![/(])", text))
    files = {"data.py", "model.json", "data.md"}
    assert sorted(name for name in named - files if name not in known) == []


def test_the_figure_is_drawn_alike_each_time(tmp_path: Path):
    script = ROOT / "docs" / "figures" / "row_layout.py"
    namespace = runpy.run_path(str(script))
    for name in ("a.svg", "b.svg"):
        namespace["draw"](tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
