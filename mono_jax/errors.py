"""Errors shown to users: one line that names the file or key and the fix."""

from __future__ import annotations

from collections.abc import Iterable

from data_pipelines.errors import did_you_mean


class MonoJaxError(Exception):
    """An error of the user's input. Commands print its message on one line and exit non-zero.

    ``known_to_all``: whether all processes of the run have the error, in which case each ends by itself.
    """

    known_to_all = False


class ConfigError(MonoJaxError):
    """A configuration that cannot be used."""


class WeightsError(MonoJaxError):
    """Weights that are missing, unexpected, misshapen or unreadable."""


class CheckpointError(MonoJaxError):
    """A working directory or checkpoint that cannot be used."""


class ClusterError(MonoJaxError):
    """Processes that do not find each other, or whose description is incomplete."""


class PeerError(MonoJaxError):
    """An error in another process of the run, which also ends this one; the message names the process."""

    known_to_all = True


class GenerationError(MonoJaxError):
    """A generation request that cannot be served."""


def unknown_key(what: str, key: str, valid: Iterable[str]) -> ConfigError:
    """The error for a misspelt ``key`` of ``what``; it names the closest valid key."""
    return ConfigError(f"unknown {what} {key!r}: {did_you_mean(key, valid)}")
