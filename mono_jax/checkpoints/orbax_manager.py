"""Checkpoints in a local folder: Orbax's CheckpointManager, with the interface that ``Checkpoints`` needs.

    CHECKPOINTS/300/    state/ (Orbax: step, trainables, optimizer), metadata/ (JSON), checksums.json

A step becomes visible only once it is complete: Orbax writes into a temporary folder and renames it. Orbax has no
checksums of array values, so each step gets a list of SHA-256 sums once it is committed.
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
    """The steps of ``directory``, which is created if it is missing. Raises PeerError, or OSError if it cannot be
    used."""

    def __init__(self, directory: Path, asynchronous: bool):
        self._directory, self._asynchronous = directory, asynchronous
        self._meeting: Meeting | None = None  # of the save in flight, with several processes
        self._manager = self._open()

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """The barrier that Orbax waits at in a save: an error in one process reaches all at once, not after a timeout.

        Orbax also waits in a ``finally``. If an error ended the write, this barrier must not be passed like the others'
        barriers: passing it would tell them that everything is written.
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
                create_directories_asynchronously=not several,  # otherwise Orbax waits 10 minutes for one that fails
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
        """Removes what a failed save left behind."""
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def prepare(self, step: int, size: int) -> None:
        """Raises OSError if there is no room for ``size`` bytes, or, with several processes, if this one cannot write:
        the others would wait 5 minutes for it."""
        del step
        if jax.process_count() > 1:
            file = self._directory / f".probe-{jax.process_index()}"
            file.write_bytes(bytes(4096))
            file.unlink()
        elif size > (free := shutil.disk_usage(self._directory).free):
            raise OSError(f"it needs {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any], meeting: Meeting | None) -> None:
        """Copies the state to the host, and starts writing it."""
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
        """Makes a damaged step no longer count, but keeps it for inspection."""
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
        """Arrays in the form of ``abstract``, which has all entries of the state or some."""
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=True))
        return self._manager.restore(step, args=items)["state"]

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()
