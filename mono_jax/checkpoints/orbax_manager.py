"""Checkpoints in a local folder: Orbax's CheckpointManager, as ``Checkpoints`` asks for it.

    CHECKPOINTS/300/    state/ (Orbax: step, trainables, optimizer), metadata/ (JSON), checksums.json

A step is visible only when whole: Orbax writes into a temporary folder and renames it. Orbax has no checksum over
array values, so each step gets a list of SHA-256 sums once it is committed.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mono_jax.checkpoints.integrity import list_checksums
from mono_jax.parallel.agreement import Meeting, together
from mono_jax.weights.orbax_arrays import orbax_processes

PyTree = Any


class OrbaxManager:
    """The steps of ``directory``, which is made if it is missing. Raises OSError if it cannot be used, PeerError."""

    def __init__(self, directory: Path, asynchronous: bool):
        self._directory, self._asynchronous = directory, asynchronous
        self._meeting: Meeting | None = None  # of the save in flight, with several processes
        self._manager = self._open()

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax waits by in a save: an error of one process is one of all at once, not after its timeout.

        Orbax waits in a ``finally`` too. Where an error ended the write, that is not one of the points that the others
        pass: to pass it would tell them that everything is written.
        """
        del key
        if (error := sys.exception()) is not None:
            self._meeting.fail(error)
        else:
            self._meeting.pass_on(timeout_ms)

    def _open(self) -> ocp.CheckpointManager:
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # ``Checkpoints`` removes old ones
            enable_async_checkpointing=self._asynchronous or several,
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=self._meet if several else None,
                create_directories_asynchronously=not several,  # Orbax waits 10 minutes for one that fails
            ),
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=orbax_processes(),
        )
        with together():
            self._directory.mkdir(parents=True, exist_ok=True)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self._directory, item_handlers=handlers, options=options)

    def recover(self) -> None:
        """After a save that failed: removes what it left behind."""
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def prepare(self, step: int, size: int) -> None:
        """Raises OSError where ``size`` bytes have no room, or, of several processes, where nothing can be written: the
        others would wait 5 minutes for one."""
        del step
        if jax.process_count() > 1:
            file = self._directory / f".probe-{jax.process_index()}"
            file.write_bytes(bytes(4096))
            file.unlink()
        elif size > (free := shutil.disk_usage(self._directory).free):
            raise OSError(f"it needs {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any], meeting: Meeting | None) -> None:
        """Copies the state to the host, and begins to write it."""
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(dict(metadata)))
        self._meeting = meeting
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            if meeting is not None:
                meeting.fail(error)
            raise

    def finish(self, step: int) -> None:
        """Blocks until the save of ``step`` is on disk and listed."""
        self._manager.wait_until_finished()
        list_checksums(self._directory / str(step))

    def delete(self, step: int) -> None:
        self._manager.delete(step)

    discard = delete

    def set_aside(self, step: int) -> None:
        """A damaged step no longer counts, and stays to be looked at."""
        with together():
            if jax.process_index() == 0:
                target = self._directory / f"damaged-{step}"
                shutil.rmtree(target, ignore_errors=True)
                (self._directory / str(step)).rename(target)
        self._manager.reload()

    def metadata(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def stored(self, step: int) -> Any:
        """Shapes and dtypes of the state's arrays, as ``integrity.check_fit`` reads them."""
        return self._manager.item_metadata(step)["state"]

    def state(self, step: int, abstract: PyTree) -> PyTree:
        """Arrays as ``abstract`` wants them."""
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=places))
        return self._manager.restore(step, args=items)["state"]

    def close(self) -> None:
        """Lets go of Orbax's threads."""
        self._manager.close()
