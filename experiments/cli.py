"""The commands of this folder: those of ``data_pipelines.command``, and the errors of ``mono_jax`` in one line too.

def main(argv=None):
    args = cli.parser(__doc__, "examples:\\n  ...").parse_args(argv)
    ...
    if args.json:
        cli.json_line(result)

if __name__ == "__main__":
    cli.run(main)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from data_pipelines import command
from data_pipelines.command import USER_ERROR, fail, json_line
from data_pipelines.command import make_parser as parser
from mono_jax.errors import MonoJaxError

__all__ = ["USER_ERROR", "fail", "json_line", "parser", "run"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """``data_pipelines.command.run`` that knows the errors of ``mono_jax``."""
    command.run(main, errors=(MonoJaxError,))
