"""Errors that users see: one line that names the file or key and the fix."""

from __future__ import annotations

from collections.abc import Iterable

from data_pipelines.errors import did_you_mean


class MonoJaxError(Exception):
    """An error of the user's input. Commands print its message on one line and exit non-zero.

    ``known_to_all``: of the processes of a run, which then end by themselves.
    """

    known_to_all = False


class ConfigError(MonoJaxError):
    """A configuration that cannot be used."""


class WeightsError(MonoJaxError):
    """Weights that are missing, unexpected, misshapen or unreadable."""


class CheckpointError(MonoJaxError):
    """A working directory or checkpoint that cannot be used."""


class ClusterError(MonoJaxError):
    """Processes that do not find each other, or are described by half."""


class PeerError(MonoJaxError):
    """An error of another process of the run, which ends this one too; the message names the process."""

    known_to_all = True


class GenerationError(MonoJaxError):
    """A generation request that cannot be served."""


def unknown_key(what: str, key: str, valid: Iterable[str]) -> ConfigError:
    """The error for a misspelt ``key`` of ``what``; names the nearest valid key."""
    return ConfigError(f"unknown {what} {key!r}: {did_you_mean(key, valid)}")
