"""What all commands share: help that teaches, one-line errors, one JSON object as the last line.

def main(argv=None):
    args = cli.parser(__doc__, "examples:\\n  ...").parse_args(argv)
    ...
    if args.json:
        cli.json_line(result)

if __name__ == "__main__":
    cli.run(main)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from data_pipelines.errors import BadSample, DataError
from mono_jax.errors import MonoJaxError

USER_ERROR = 2  # exit code of every one-line error
INTERRUPTED = 130  # as shells report Ctrl-C


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


def parser(description: str | None, epilog: str = "", *, json: bool = True) -> argparse.ArgumentParser:
    """A parser that prints ``description`` and ``epilog`` (examples) as they are written.

    Flags cannot be abbreviated, so that a misspelt one is an error. ``json`` adds ``--json``.
    """
    result = _Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if json:
        result.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return result


def fail(message: object) -> NoReturn:
    """Ends the command: ``error: message`` on one line of stderr, exit code 2."""
    sys.stdout.flush()
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(USER_ERROR)


def describe(error: Exception) -> str:
    """``error`` on one line; of a failed file or disk, which file and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


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


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits; a user's mistake, or a file or disk that fails, ends in one line instead of a traceback.

    ``main`` returns the exit code (None = 0). MONO_JAX_TRACEBACK=1 shows tracebacks.
    """
    if os.environ.get("MONO_JAX_TRACEBACK"):
        raise SystemExit(main())
    try:
        raise SystemExit(main())
    except (MonoJaxError, DataError, BadSample) as error:
        fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on (`| head`)
        raise SystemExit(0) from None
    except OSError as error:
        fail(describe(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
