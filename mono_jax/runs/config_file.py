"""Configs of the commands: a Python file with ``get_config()`` and overrides from the command line.

``--config=FILE[:arg]`` calls ``get_config(arg)`` of FILE, which returns an ``ml_collections.ConfigDict``;
``--config.key.subkey=value`` changes a value. Unlike ``ml_collections.config_flags``, this can also set keys that the
file leaves at their defaults, and values that are None. A list entry is addressed by its index or by its "name":
``--config.data.sources.laion.weight=2``. Keys keep the order in the file, which is the order of the stages; a
ConfigDict would sort them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from mono_jax.errors import ConfigError

PREFIX = "--config."


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    reference: Callable[[], str] | None = None,
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses ``argv`` with ``parser`` (which gets ``--config``) and returns its arguments and the config's values.

    ``reference``: the text that ``--help-config`` prints; see ``mono_jax.runs.reference``.
    Raises ConfigError that names the file or the key.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="Python file with get_config(arg); change a value with --config.key=value",
    )
    if reference is not None:
        parser.add_argument(
            "--help-config", action=_HelpConfig, reference=reference, help="print all keys of the config, and exit"
        )
    args, rest = parser.parse_known_args(argv)
    overrides = {}
    for item in rest:
        key, equals, value = item.removeprefix(PREFIX).partition("=")
        if not item.startswith(PREFIX) or not equals:
            parser.error(f"unrecognized argument {item!r}: overrides have the form {PREFIX}key=value")
        overrides[key] = value
    config = load(args.config)
    for key, value in overrides.items():
        override(config, key, value)
    return args, values_of(config, args.config)


def values_of(config: ConfigDict, file: str) -> dict[str, Any]:
    """``config`` as nested dicts, in the order of ``file``; raises ConfigError for a required value that is not set."""

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, FieldReference):
            try:
                return plain(value.get(), key)
            except RequiredValueError:
                raise ConfigError(f"{file}: config.{key} has no value: give {PREFIX}{key}=...") from None
        if isinstance(value, ConfigDict):
            return {name: plain(inner, f"{key}.{name}".lstrip(".")) for name, inner in value._fields.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(plain(inner, f"{key}.{place}") for place, inner in enumerate(value))
        return value

    return plain(config, "")


class _HelpConfig(argparse.Action):
    def __init__(self, *args: Any, reference: Callable[[], str], **options: Any):
        super().__init__(*args, nargs=0, default=argparse.SUPPRESS, **options)
        self.reference = reference

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(self.reference())
        parser.exit()


def load(file_and_arg: str) -> ConfigDict:
    """The config of ``FILE[:arg]``; raises ConfigError that names the file."""
    file, _, arg = file_and_arg.partition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such config file")
    if path.suffix != ".py":
        raise ConfigError(f"{file}: a config is a Python file (.py) with get_config()")
    try:
        module = module_of(path)
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return an ml_collections.ConfigDict, not {type(config).__name__}")
    return _own(config)


def module_of(file: Path) -> ModuleType:
    """The module that ``file`` defines, as it is now; raises whatever running it raises."""
    loader = _Uncached(file.stem, str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(file.stem, loader))
    loader.exec_module(module)
    return module


class _Uncached(SourceFileLoader):
    """Without bytecode files, which hide a change of the source within a second that keeps its length."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError


def _own(value: Any) -> Any:
    """A copy in which no mapping or list is shared between two places, where changing one would change both.

    Field references stay, because they are meant to be shared.
    """
    if isinstance(value, ConfigDict):
        own = ConfigDict()
        for name, inner in value._fields.items():  # in the order of the file
            own._fields[name] = _own(inner)
        return own
    if isinstance(value, dict):
        return {name: _own(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_own, value))
    return value


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets ``config``'s value at the dotted ``key`` from ``text``, a Python literal or otherwise a string.

    Raises ConfigError if a part of ``key`` holds a plain value, or does not name an entry of a list.
    """
    assign(config, key, lambda old: _value(old, text))


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """Sets ``config``'s value at the dotted ``key``; a function as ``value`` gets the old one, or None.

    Raises ConfigError as ``override`` does.
    """
    *parents, name = key.split(".")
    node: Any = config
    for place, parent in enumerate(parents):
        node = _child(node, parent, key)
        if not isinstance(node, (ConfigDict, dict, list)):
            raise ConfigError(f"{PREFIX}{key}: {'.'.join(parents[: place + 1])} holds a value, not further keys")
    entry: Any = _index(node, name, key) if isinstance(node, list) else name
    if callable(value):
        old = None
        with contextlib.suppress(RequiredValueError, KeyError):
            old = node[entry]
        value = value(old)
    with node.ignore_type() if isinstance(node, ConfigDict) else contextlib.nullcontext():
        node[entry] = value


def _child(node: ConfigDict | dict[str, Any] | list[Any], name: str, key: str) -> Any:
    """The entry ``name`` of ``node``: a tuple becomes a list; a missing key of a mapping becomes an empty mapping."""
    place = _index(node, name, key) if isinstance(node, list) else name
    child = node.get(name) if not isinstance(node, list) else node[place]
    if child is None:
        child = node[place] = ConfigDict() if isinstance(node, ConfigDict) else {}
    elif isinstance(child, tuple):
        child = list(child)
        if isinstance(node, ConfigDict):
            del node[place]  # it would keep the tuple's type
        node[place] = child
    return child


def _index(entries: list[Any], name: str, key: str) -> int:
    """The index of the entry with this "name" or number."""
    names = [entry.get("name") if isinstance(entry, (ConfigDict, dict)) else None for entry in entries]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(entries):
        return int(name)
    known = ", ".join(str(number) if known is None else str(known) for number, known in enumerate(names))
    raise ConfigError(f"{PREFIX}{key}: no entry {name!r}; the list has {known or 'no entries'}")


def _value(old: Any, text: str) -> Any:
    return text if isinstance(old, str) else _literal(text)


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
