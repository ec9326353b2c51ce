"""Typed access to the parts of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_jax.errors import ConfigError


class Section:
    """Typed access to a part of config.json; every error names the file, the key and the fix."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: must be a JSON object, not {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None, valid: tuple = ()) -> Any:
        """``values[key]``, or ``default`` where absent or null; a default of None means required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: key {key!r} is missing; add it ({kind.__name__})")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {key} is {value!r}: it must be of type {kind.__name__}")
        if kind in (int, float) and key != "select_layer" and value <= 0:
            raise ConfigError(f"{self.where}: {key} is {value!r}: it must be greater than 0")
        if valid and value not in valid:
            raise ConfigError(f"{self.where}: {key} is {value!r}: use one of {', '.join(map(repr, valid))}")
        return value
