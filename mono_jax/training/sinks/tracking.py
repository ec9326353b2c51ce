"""Experiment trackers, each fed by its own thread, so that problems of their network or disk do not affect the run.

WORKDIR/logs/NAME.json records what was sent, so that a resumed run continues with what is missing. Without that file,
the whole view is rebuilt from metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.io import publish
from mono_jax.files import reason
from mono_jax.training.appender import Say
from mono_jax.training.metrics import numbers
from mono_jax.training.sinks.mailbox import Mailbox

CLOSING_S = 15.0  # seconds that the end of a run waits for unsent records


class Tracker(Protocol):
    """The interface needed from a library; it may block and raise."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


# Opens the run ``id`` of a project under a name; the mapping is the run's config.
Open = Callable[[str, str, str, Mapping[str, Any], Path], Tracker]


class Tracking:
    """Sends records to a tracker in the background. A tracker that fails is reported and not used again until the next
    start.

    Attributes:
      thread: does the sending; it ends with the process, whatever it is doing.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Open,
        project: str,
        workdir: Path,
        config: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]],
        say: Say,
    ):
        self._name, self._open, self._say = name, open_tracker, say
        self._project, self._workdir, self._config = project, workdir, config
        self._state = workdir / "logs" / f"{name}.json"
        self._waiting: Mailbox[Mapping[str, Any]] = Mailbox(records)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if self.thread.is_alive():  # otherwise the next start sends it
            self._waiting.put(record)

    def close(self) -> None:
        """Waits a while for unsent records; metrics.jsonl has them anyway."""
        self._waiting.end()
        self.thread.join(CLOSING_S)
        if self.thread.is_alive():
            self._say(f"{self._name} does not respond: {len(self._waiting)} records are left for the next start")

    def _run(self) -> None:
        try:
            state = self._stored()
            tracker = self._open(self._project, state["id"], self._workdir.name, self._config, self._workdir / "logs")
            while (record := self._waiting.take()) is not None:
                if record["step"] > state["sent"]:
                    tracker.log(record["step"], numbers(record))
                    state["sent"] = record["step"]
                    publish.write_json(self._state, state)
            tracker.finish()
        except ImportError as error:
            self._say(f"{self._name}: not installed ({reason(error)}): pip install 'mono-jax[{self._name}]'")
        except BaseException as error:  # some libraries raise SystemExit
            self._say(f"{self._name}: {reason(error)}; the next start sends what is missing; training continues")
            logging.getLogger(__name__).debug("%s", self._name, exc_info=True)

    def _stored(self) -> dict[str, Any]:
        """{"id": id of the tracker's run, "sent": the last step sent to it}."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            return {"id": str(state["id"]), "sent": int(state["sent"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"id": uuid.uuid4().hex[:16], "sent": -1}


class WandB:
    """Weights & Biases. WANDB_MODE=offline writes only below WORKDIR/logs, for ``wandb sync``."""

    def __init__(self, project: str, id: str, name: str, config: Mapping[str, Any], folder: Path):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, init_timeout=60, finish_timeout=30)
        self._run = wandb.init(
            project=project, id=id, name=name, config=dict(config), dir=str(folder), resume="allow", settings=settings
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's Trackio, in its local store (located at TRACKIO_DIR)."""

    def __init__(self, project: str, id: str, name: str, config: Mapping[str, Any], folder: Path):
        import trackio

        self._run = trackio.init(
            project,
            name=f"{name}-{id}",
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Open] = {"wandb": WandB, "trackio": Trackio}
