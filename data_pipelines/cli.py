"""What all commands share: help with examples, one-line errors, one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from data_pipelines.errors import BadSample, DataError, StorageError

USER_ERROR = 2  # exit code of every one-line error except storage errors
STORAGE_ERROR = 1
INTERRUPTED = 130  # as shells report Ctrl-C


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error of a command.

    ``--flag=~/file`` is a file in the home directory, as ``--flag ~/file`` is, which the shell expands.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_AT_HOME.sub(_at_home, each) for each in args], namespace)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


_AT_HOME = re.compile(r"(--[^=]+=)(~/.*)", re.S)


def _at_home(match: re.Match[str]) -> str:
    return match[1] + os.path.expanduser(match[2])


def make_parser(
    description: str | None, epilog: str = "", *, prog: str | None = None, json: bool = True
) -> argparse.ArgumentParser:
    """A parser that prints ``description`` and ``epilog`` (examples) as they are written.

    Flags cannot be abbreviated, so that a misspelt one is an error. ``json`` adds ``--json``.
    """
    result = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if json:
        result.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return result


def parser(module: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """The parser of ``python -m data_pipelines.MODULE``."""
    return make_parser(description, epilog, prog=f"python -m data_pipelines.{module}")


def fail(message: object, code: int = USER_ERROR) -> NoReturn:
    """Ends the command: ``error: message`` on one line of stderr, exit code ``code``."""
    sys.stdout.flush()
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def json_line(result: Mapping[str, Any]) -> None:
    """Prints ``result`` as one line of strict JSON (a NaN or an infinity becomes null)."""
    print(json.dumps(_strict(result), ensure_ascii=False, allow_nan=False), flush=True)


def _strict(value: Any) -> Any:
    """``value`` in JSON's own types; NumPy and JAX scalars and arrays included."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def run(main: Callable[[], int | None], *, errors: tuple[type[Exception], ...] = ()) -> NoReturn:
    """Runs ``main`` and exits; a user error or a failing file or disk gives a one-line message instead of a traceback.

    ``main`` returns the exit code (None = 0). ``errors``: further exceptions that count as user errors.
    MONO_JAX_TRACEBACK=1 shows tracebacks.
    """
    if os.environ.get("MONO_JAX_TRACEBACK"):
        raise SystemExit(main())
    try:
        raise SystemExit(main())
    except StorageError as error:
        fail(error, STORAGE_ERROR)
    except (DataError, BadSample, *errors) as error:
        fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe (``| head``)
        raise SystemExit(0) from None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
