"""Configs of the commands: a Python file with ``get_config()`` and overrides from the command line.

``--config=FILE[:arg]`` calls ``get_config(arg)`` of FILE, which returns an ``ml_collections.ConfigDict``;
``--config.key.subkey=value`` changes a value. Unlike ``ml_collections.config_flags`` this can also set
keys that the file leaves at their defaults, and values that are None.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mono_jax.errors import ConfigError

PREFIX = "--config."


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses ``argv`` with ``parser`` (which gets ``--config``) and returns its arguments and the config."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="Python file with get_config(arg); change a value with --config.key=value",
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
    return args, config


def load(file_and_arg: str) -> ConfigDict:
    """The config of ``FILE[:arg]``; raises ConfigError that names the file."""
    file, _, arg = file_and_arg.partition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such config file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: a config is a Python file (.py) with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return an ml_collections.ConfigDict, not {type(config).__name__}")
    return config.unlock()


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets ``config``'s value at the dotted ``key`` from ``text``, a Python literal or else a string."""
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        if parent not in node or node[parent] is None:
            node[parent] = ConfigDict()
        node = node[parent]
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"{PREFIX}{key}: {parent} holds a value, not further keys")
    old = node.get(name)
    with node.ignore_type():
        node[name] = text if isinstance(old, str) else _literal(text)


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
