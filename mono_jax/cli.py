"""The commands of ``experiments``: those of ``data_pipelines.cli``, and the errors of ``mono_jax`` in one line too.

A command's ``main(argv=None)`` parses with ``parser(__doc__, EXAMPLES)``, imports what it works with, makes one call
and, with ``--json``, ends with ``json_line(result)``. ``run(main)`` runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from data_pipelines import cli as command
from data_pipelines.cli import USER_ERROR, fail, json_line
from data_pipelines.cli import make_parser as parser
from mono_jax.errors import MonoJaxError

__all__ = ["USER_ERROR", "byte_size", "fail", "json_line", "parser", "run"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """``data_pipelines.cli.run`` that knows the errors of ``mono_jax``."""
    command.run(main, errors=(MonoJaxError,))


def byte_size(text: str) -> int:
    """The type of an argument that is a number of bytes: 5GB, 500MB, 1e9."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return size
