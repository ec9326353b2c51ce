"""The views of the records that a run's config asks for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mono_jax.training.appender import Say
from mono_jax.training.metrics import MakeSink, Record
from mono_jax.training.sinks.tensorboard import open_events
from mono_jax.training.sinks.tracking import TRACKERS, Tracking


def views(names: Sequence[str], workdir: Path, project: str, config: Mapping[str, Any], say: Say) -> list[MakeSink]:
    """For each of ``names``, a function that makes that view of a run in ``workdir``; ``config``: the run's, for
    trackers."""
    return [functools.partial(_view, name, workdir, project, config, say) for name in dict.fromkeys(names)]


def _view(
    name: str, workdir: Path, project: str, config: Mapping[str, Any], say: Say, records: Sequence[Record]
) -> Any:
    if name == "tensorboard":
        return open_events(workdir / "tensorboard", records, say)
    return Tracking(name, TRACKERS[name], project, workdir, config, records, say)
