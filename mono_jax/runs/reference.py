"""All keys of the configs, read from their dataclasses, for ``docs/config.md`` and ``--help-config``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from data_pipelines import strict

WIDTH = 100  # characters of a line in the terminal
INTRODUCTION = """\
# Keys of the configs

A config is a Python file with `get_config()` that returns an `ml_collections.ConfigDict`; its keys are those below.
`--config.key.subkey=value` changes one of them on the command line, `--config.data.sources.NAME.weight=2` one in an
entry of a list. What is not given has its default. A key, a type or a value that does not fit ends the command with one
line that names it.

When a run resumes with another config, keys marked *free* may differ; another value of any other key stops it, unless
`allow_changes` is set.

This file is written by `python docs/make_config.py`; `--help-config` prints the same in the terminal.
"""


def stage_keys() -> str:
    """All keys of ``experiments/train.py``'s config, for the terminal."""
    from mono_jax.models.architecture import Architecture
    from mono_jax.runs.config import RunConfig  # here, so that commands can refer to this function before parsing

    return help_text(("config", RunConfig), ("config.model", Architecture))


def evip_keys() -> str:
    """All keys of ``experiments/evip.py``'s config, for the terminal."""
    from mono_jax.models.architecture import Architecture
    from mono_jax.runs.config import EvipConfig, RunConfig

    stage = "config.stages.NAME"
    return help_text(("config", EvipConfig), (stage, RunConfig), (f"{stage}.model", Architecture))


def document() -> str:
    """``docs/config.md``."""
    from mono_jax.models.architecture import Architecture
    from mono_jax.runs.config import EvipConfig, RunConfig

    return markdown(
        ("A stage: `experiments/train.py`", "", RunConfig),
        ("The model: changes of the preset or of `init`, whose values are the defaults", "model", Architecture),
        ("A sequence of stages: `experiments/evip.py`", "", EvipConfig),
    )


def help_text(*chapters: tuple[str, type]) -> str:
    """All keys for the terminal. ``chapters``: (dotted name in front, dataclass)."""
    rows = [row for prefix, cls in chapters for row in strict.reference(cls, prefix)]
    return "\n".join(f"{_heading(row)}\n{_indented(row.help)}" for row in rows)


def markdown(*chapters: tuple[str, str, type]) -> str:
    """``docs/config.md``. ``chapters``: (title, dotted name in front, dataclass)."""
    lines = [INTRODUCTION]
    for title, prefix, cls in chapters:
        lines += [f"## {title}", ""]
        lines += _tables(list(strict.reference(cls, prefix)), prefix)
    return "\n".join(lines).rstrip() + "\n"


def _heading(row: strict.Row) -> str:
    default = "" if row.default in ("", "required") else f"default {row.default}"
    resume = "free on resume" if row.on_resume == "free" else ""
    facts = (row.type, row.limits, "required" if row.default == "required" else default, resume)
    return f"{row.key}: {'; '.join(fact for fact in facts if fact)}"


def _indented(words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent="    ", subsequent_indent="    ")


def _tables(rows: list[strict.Row], prefix: str) -> Iterator[str]:
    """The rows of the section ``prefix`` as a table, then each subsection under its own heading."""
    own = [row for row in rows if row.key.rpartition(".")[0] == prefix]
    yield "| key | type | default | limits | on resume | meaning |"
    yield "|---|---|---|---|---|---|"
    for row in own:
        cells = (f"`{row.key}`", row.type, _code(row.default), row.limits, row.on_resume, row.help)
        yield f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"
    yield ""
    for row in own:
        if row.section:
            inside = next(other.key for other in rows[rows.index(row) + 1 :]).rpartition(".")[0]
            yield from (f"### `{inside}`", "", f"{row.help[:1].upper()}{row.help[1:]}.", "")
            yield from _tables(rows, inside)


def _code(default: str) -> str:
    return default if default in ("", "required") else f"`{default}`"
