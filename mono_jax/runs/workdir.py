"""A working directory, on disk or in a bucket: its layout and ownership, so that only one run at a time uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.errors import StorageError
from data_pipelines.io.digests import digest
from data_pipelines.io.paths import cache_dir
from mono_jax.errors import CheckpointError
from mono_jax.parallel.agreement import together
from mono_jax.runs.console import say_now
from mono_jax.storage.lease import Lease, held, holder, repeated, this_process
from mono_jax.storage.mirror import Mirror
from mono_jax.storage.places import Place, place_of
from mono_jax.training.metrics import Say

NAMES = (
    "config.json", "config.initial.json", "checkpoints", "base", "cache", "model", "metrics.jsonl", "tensorboard",
    "timeline.jsonl", "data_changes.jsonl", "profile", "data", "logs", "mono", "evaluation", "best",
)  # fmt: skip
HERE = "$WORKDIR"  # placeholder for the workdir in stored paths
LOCK = ".lock"
CHECKPOINTED = ".checkpointed"  # created once the run has a complete checkpoint
LARGE = ("base", "best", "cache", "checkpoints", "model", "mono")  # folders that a bucket's workdir does not mirror
STORE_EVERY = 60.0  # seconds between checks for small files that have changed


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where a run writes its files: a folder, or a folder in a bucket with a local one for its small files.

    Attributes:
      place: the workdir as named by the user; large files (``LARGE``) are written there directly.
      files: local folder of the small files: the workdir itself, or its local mirror.
      cache: local folder of files that can be regenerated.
      mirror: stores changes in ``files``; None for a workdir on disk.
      lease: the first process's lease on the workdir in the bucket.
      is_stage: whether it is one of several in a common folder, which are moved together.
    """

    place: Place
    files: Path
    cache: Path
    mirror: Mirror | None = None
    lease: Lease | None = None
    is_stage: bool = False

    @classmethod
    def of(cls, folder: Path | Workdir) -> Workdir:
        """The workdir of a local folder."""
        return folder if isinstance(folder, Workdir) else cls(folder, folder, folder / "cache")

    def stage(self, name: str) -> Workdir:
        """The workdir of one stage, within this workdir of several."""
        cache = self.files / name / "cache" if self.mirror is None else self.cache / name
        own = {"place": self.place / name, "files": self.files / name, "cache": cache}
        return dataclasses.replace(self, **own, lease=None, is_stage=True)

    def portable(self, value: Any) -> Any:
        """``value`` with the workdir (for a stage, the common folder) replaced by ``HERE`` in every path.

        Paths are stored this way because a workdir may be moved, mounted elsewhere, or mirrored on a machine with other
        folders.
        """
        roots = [self.files.absolute(), self.files.resolve(), self.place.absolute()]
        return _replaced(value, [(str(root.parent if self.is_stage else root), HERE) for root in roots])

    def found(self, value: Any) -> Any:
        """``value`` with ``HERE`` replaced by the local folder of the small files."""
        root = self.files.resolve()
        return _replaced(value, [(HERE, str(root.parent if self.is_stage else root))])

    def store(self) -> None:
        """Stores small files in the bucket. Raises CheckpointError if another run has taken over the workdir."""
        if self.mirror is not None:
            if self.lease is not None:
                self.lease.check()
            self.mirror.push()

    @contextlib.contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """Locks it for this run. Raises CheckpointError that names the current holder."""
        if isinstance(self.place, Path):
            with locked(self.place):
                yield
        elif self.lease is not None:
            yield
        else:
            with held(self.place / LOCK, say, _stop):
                yield


def _replaced(value: Any, roots: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, roots) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, roots) for inner in value]
    if isinstance(value, str):
        for old, new in roots:
            if value == old or value.startswith(f"{old}/"):
                return new + value.removeprefix(old)
    return value


@contextlib.contextmanager
def opened(text: str, stages: Sequence[str] = (), say: Say = say_now) -> Iterator[Workdir]:
    """The workdir that a path or URL names; ``stages``: folders in it that are also workdirs.

    In a bucket, it is locked for this run, its small files are fetched, and changes to them are stored every minute and
    at the end. Raises ConfigError, CheckpointError or StorageError if it cannot be used.
    """
    if isinstance(place := place_of(text), Path):
        yield Workdir.of(place)
        return
    home, large = cache_dir() / "workdirs" / digest(str(place))[:16], [*LARGE]
    large += [f"{stage}/{name}" for stage in stages for name in LARGE]
    mirror = Mirror(place, home / f"process-{jax.process_index()}", large)
    with contextlib.ExitStack() as entered:
        with together():
            lease = entered.enter_context(held(place / LOCK, say, _stop)) if jax.process_index() == 0 else None
        with together():
            _refuse_foreign(place, {name.partition("/")[0] for name in mirror.stored()} - set(stages))
            mirror.pull()
        workdir = Workdir(place, mirror.files, home / "cache", mirror, lease)
        try:
            with repeated(mirror.push, STORE_EVERY):
                yield workdir
        except BaseException:
            with contextlib.suppress(StorageError, CheckpointError):  # report what ends the run, not this
                workdir.store()
            raise
        workdir.store()


@contextlib.contextmanager
def looked_at(text: str) -> Iterator[Path]:
    """A local folder with the small files of a workdir whose run may still be going on: the workdir itself, or
    copies."""
    if isinstance(place := place_of(text), Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in place.objects(without=LARGE):
            if not {*LARGE} & {*name.split("/")}:  # these folders of a stage
                (place / name).fetch(Path(folder) / name)
        yield Path(folder)


def _stop() -> None:
    """Another run has the workdir: ends this one as if by SIGTERM, without a last checkpoint."""
    os.kill(os.getpid(), signal.SIGTERM)


def refuse_foreign(workdir: Path) -> None:
    """Raises CheckpointError if ``workdir`` contains files, but none that a run of this project writes."""
    if workdir.exists():
        _refuse_foreign(workdir, {path.name for path in workdir.iterdir() if not path.name.startswith(".")})


def _refuse_foreign(place: Place, names: Collection[str]) -> None:
    if names and not {*names} & {*NAMES}:
        raise CheckpointError(
            f"{place}: not a working directory of this project (it contains {min(names)}): choose another"
        )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks ``workdir`` for this process; the lock is released with the process, however it ends.

    Raises CheckpointError that names the process, host and time of the run that holds it, or if nothing can be written.
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
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, but without a name
            file.truncate(0)
            file.write(json.dumps(this_process()))
            file.flush()
        yield


def in_use(workdir: Path) -> bool:
    """Whether a process holds the lock of ``locked``."""
    try:
        with (workdir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _holder(workdir: Path) -> str:
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((workdir / LOCK).read_text(encoding="utf-8"))
    return holder(found)
