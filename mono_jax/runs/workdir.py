"""A working directory: whose it is, and that one run at a time uses it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.io.paths import is_remote
from mono_jax.errors import CheckpointError

NAMES = (
    "config.json", "config.initial.json", "checkpoints", "base", "cache", "model", "metrics.jsonl", "tensorboard",
    "timeline.jsonl", "profile", "data", "logs", "mono",
)  # fmt: skip
LOCK = ".lock"
CHECKPOINTED = ".checkpointed"  # made once the run has a whole checkpoint


def place_of(text: str) -> Path:
    """The folder that --workdir names. Raises CheckpointError for a URL."""
    if is_remote(text):
        raise CheckpointError(f"{text}: a workdir must be a folder: mount the bucket (gcsfuse, s3fs) and give its path")
    return Path(text)


def refuse_foreign(workdir: Path) -> None:
    """Raises CheckpointError if ``workdir`` holds files, but none that a run of this project writes."""
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")} if workdir.exists() else set()
    if names and not names & set(NAMES):
        raise CheckpointError(
            f"{workdir}: not a working directory of this project (it holds {min(names)}): choose another"
        )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps ``workdir`` to this process; the lock goes with the process, however it ends.

    Raises CheckpointError that names the process, host and time of the run that has it, or if nothing can be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{workdir}: cannot be used as a working directory: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{workdir}: in use by {_holder(workdir)}: wait for it, or use another workdir"
            ) from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(OSError):  # on a full disk the lock holds, without a name
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
            file.flush()
        yield


def _holder(workdir: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads((workdir / LOCK).read_text(encoding="utf-8"))
        return f"pid {found['pid']} on host {found['host']} since {found['since']}"
    return "another process"
