"""What the commands of this package share: help that teaches, errors in one line, one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from data_pipelines.errors import DataError

USER_ERROR = 2  # exit code of every one-line error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see {self.prog} --help")


def parser(module: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser for ``python -m data_pipelines.MODULE`` with ``--json``; flags cannot be abbreviated."""
    result = _Parser(
        prog=f"python -m data_pipelines.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return result


def json_line(result: Mapping[str, Any]) -> None:
    print(json.dumps(result, allow_nan=False), flush=True)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs ``main`` and exits: 0, or 2 with the error in one line of stderr."""
    try:
        main()
    except DataError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on (`| head`)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _fail(message: str) -> NoReturn:
    sys.stdout.flush()
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(USER_ERROR)
