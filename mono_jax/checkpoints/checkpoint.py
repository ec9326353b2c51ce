"""What is kept on disk: checkpoints of a run, its frozen base, and model folders. All through Orbax.

    CHECKPOINTS/300/            state/ (Orbax: step, trainables, optimizer), metadata/ (JSON), checksums.json
    BASE/<sha256>/              the frozen parameters, stored once per run and named by their content
    MODEL/                      model.json, params/ (Orbax), checksums.json, config.json and tokenizer files

A step is visible only when whole: Orbax writes into a temporary folder and renames it. Orbax has no checksum
over array values, so each step gets a list of SHA-256 sums once it is committed; reading checks them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (makes numpy know bfloat16)
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from mono_jax import tree
from mono_jax.errors import CheckpointError, ConfigError, WeightsError
from mono_jax.models.architecture import Architecture
from mono_jax.weights import hf

PyTree = Any
MODEL_FILE = "model.json"
PARAMS_FOLDER = "params"
CHECKSUMS_FILE = "checksums.json"
FORMAT = 1  # of model.json
CHUNK = 256 << 20  # bytes


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


# Orbax logs the traceback of every error that it also raises, several times over; here errors are one line.
logging.getLogger("absl").addFilter(_not_from_orbax)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------
# Checkpoints of a run
# ---------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run, newest ``keep`` of them.

    >>> with Checkpoints("runs/a/checkpoints") as checkpoints:
    ...     checkpoints.save(300, {"step": step, "trainable": params, "opt_state": opt_state}, {"config": ...})
    ...     state, metadata = checkpoints.restore(abstract_state)

    ``asynchronous``: ``save`` returns when the arrays are copied to the host and writes in the background;
    an error then shows at the next ``save`` or ``wait``. ``report`` gets one line for each damaged checkpoint.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 3,
        asynchronous: bool = True,
        report: Callable[[str], None] = _to_stderr,
    ):
        if keep < 1:
            raise ConfigError(f"keep is {keep}: at least one checkpoint must be kept")
        self.directory = Path(directory).absolute()
        self._keep, self._asynchronous, self._report = keep, asynchronous, report
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._saved: int | None = None
        self._sound: set[int] = set()  # steps whose files were found to be what was written
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=self._asynchronous,
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
            return ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {_reason(error)}") from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a save in flight and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Committed steps, oldest first; waits for a save in flight."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Saves ``state`` (arrays) and ``metadata`` (JSON) as ``step``; saving a step twice in a run does nothing.

        After ``restore(step=...)`` of an older step, the checkpoints behind it are deleted by the next save.
        Raises CheckpointError if this save, or the one before it in the background, failed (a full disk, say);
        checkpoints saved earlier stay.
        """
        self.wait()
        if step == self._saved:
            return
        self._check_space(step, state)
        for later in self.steps():
            if later >= step:  # the run went back to an older step: what followed it is no longer its history
                self._sound.discard(later)
                self._manager.delete(later)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(dict(metadata)))
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            self._manager = self._open()
            raise self._not_saved(step, error) from None
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def _check_space(self, step: int, state: PyTree) -> None:
        """Fails early where the disk cannot hold ``state``; with several processes only the writing tells."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
        free = shutil.disk_usage(self.directory).free
        if needed > free and jax.process_count() == 1:
            raise self._not_saved(
                step, OSError(f"it needs {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")
            )

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_checksums(self.directory / str(step))
            self._saved = step
        except Exception as error:
            self._error = self._not_saved(step, error)

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: step {step} was not saved: {_reason(error)}; "
            "earlier checkpoints are intact, make room and run again to resume from the newest"
        )

    def wait(self) -> None:
        """Blocks until the save in flight is on disk; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()  # removes what the failed save left behind
            raise error

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata of what ``restore`` would restore; damaged checkpoints are treated as there."""
        return self._first_sound(step, self._read_metadata)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """The state and metadata of ``step``, by default of the newest checkpoint that is sound.

        ``abstract_state``: arrays or jax.ShapeDtypeStruct in the structure wanted; their shardings say where
        each array goes, whatever mesh it was saved from. A damaged checkpoint is reported, renamed to
        ``damaged-STEP`` and passed over. Raises CheckpointError if there is no sound one, if ``step`` is
        damaged, or (listing all differences) if the checkpoint holds other arrays than ``abstract_state``.
        """
        return self._first_sound(step, lambda candidate: self._read(candidate, abstract_state))

    def _first_sound(self, step: int | None, read: Callable[[int], Any]) -> Any:
        damaged: dict[int, _Damaged] = {}
        for candidate in self._existing(step):
            try:
                result = read(candidate)
            except _Damaged as error:
                damaged[candidate] = error
                continue
            for other, error in damaged.items():
                if jax.process_index() == 0:
                    self._report(f"{error}; using step {candidate}")
                self._set_aside(other)
            return result
        listed = "; ".join(map(str, damaged.values()))
        if step is not None:
            raise CheckpointError(f"{listed}; choose another of the steps {self.steps()}")
        raise CheckpointError(f"{listed}; no other checkpoint is left: start in another workdir")

    def _existing(self, step: int | None) -> list[int]:
        steps = self.steps()[::-1]
        if not steps:
            raise CheckpointError(f"{self.directory}: no checkpoint in it")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}: there are {steps[::-1]}")
        return steps if step is None else [step]

    def _verified(self, step: int) -> bool:
        """Whether the step's files are known to be sound (False: nothing is known); raises _Damaged."""
        if step not in self._sound and _verify_on_first_process(self.directory / str(step)):
            self._sound.add(step)
        return step in self._sound

    def _read_metadata(self, step: int) -> dict[str, Any]:
        self._verified(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
        except Exception as error:
            raise _Damaged(f"{self.directory / str(step)}: damaged metadata: {_reason(error)}") from None

    def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        folder = self.directory / str(step)
        verified = self._verified(step)
        try:
            stored = self._manager.item_metadata(step)["state"]
            _check_fit(folder, _shapes(getattr(stored, "tree", stored)), _shapes(abstract_state))
            items = ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)
                ),
                metadata=ocp.args.JsonRestore(),
            )
            restored = self._manager.restore(step, args=items)
        except CheckpointError:
            raise
        except Exception as error:
            if verified:
                raise CheckpointError(f"{folder}: cannot be restored: {_reason(error)}") from error
            raise _Damaged(f"{folder}: damaged: {_reason(error)}") from None
        return restored["state"], restored["metadata"]

    def _set_aside(self, step: int) -> None:
        if step == self._saved:
            self._saved = None
        if jax.process_index() == 0:
            target = self.directory / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)
        _barrier("damaged checkpoint is set aside")
        self._manager.reload()


class _Damaged(Exception):
    """A checkpoint whose files are not what was written."""


def _reason(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    if "No space left on device" in str(error):
        return "no space left on device"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def _shapes(state: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array by path. Named tuples and dicts give the same paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: hasattr(x, "dtype"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        for path, leaf in leaves
        if hasattr(leaf, "dtype")
    }


def _check_fit(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{path} is missing" for path in wanted if path not in stored]
    problems += [f"{path} is not part of the state" for path in stored if path not in wanted]
    problems += [
        f"{path} is {stored[path][1]}{list(stored[path][0])}, the state has {wanted[path][1]}{list(wanted[path][0])}"
        for path in wanted
        if path in stored and stored[path] != wanted[path]
    ]
    if problems:
        raise CheckpointError(f"{folder}: does not fit this run: {'; '.join(problems)}")


def diff_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference between two nested dicts; an absent key is None."""
    flat_old, flat_new = (
        {path.replace("/", "."): value for path, value in tree.flatten(values).items()} for values in (old, new)
    )
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [(key, flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ---------------------------------------------------------------------------------------------------
# Checksums
# ---------------------------------------------------------------------------------------------------


def write_checksums(folder: Path) -> None:
    """Writes ``checksums.json`` into ``folder``: size and SHA-256 of every file below it."""
    hf.write_json(folder / CHECKSUMS_FILE, {"sha256": _checksums(folder)})


def verify_checksums(folder: Path) -> bool:
    """True if the files are what was written, False if there is no list; raises _Damaged that names a bad file."""
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        raise _Damaged(f"{folder}: damaged: {CHECKSUMS_FILE} is unreadable") from None
    found = _checksums(folder)
    for name, sums in expected.items():
        if name not in found:
            raise _Damaged(f"{folder}: damaged: {name} is missing")
        if found[name] != sums:
            raise _Damaged(f"{folder}: damaged: {name} has changed since it was written")
    return True


def _verify_on_first_process(folder: Path) -> bool:
    """``verify_checksums`` by one process for all, so that the files are read once and all agree."""
    if jax.process_count() == 1:
        return verify_checksums(folder)
    unlisted, sound, damaged = range(3)
    verdict, problem = unlisted, _Damaged(f"{folder}: damaged")
    if jax.process_index() == 0:
        try:
            verdict = sound if verify_checksums(folder) else unlisted
        except _Damaged as error:
            verdict, problem = damaged, error
    verdict = int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))
    if verdict == damaged:
        raise problem
    return verdict == sound


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS_FILE)

    def digest(file: Path) -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((file.relative_to(folder).as_posix() for file in files), pool.map(digest, files)))


# ---------------------------------------------------------------------------------------------------
# The frozen base of a run
# ---------------------------------------------------------------------------------------------------


def tree_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a nested dict of arrays, one slice in memory at a time."""
    digest = hashlib.sha256()
    for path, leaf in tree.flatten(params).items():
        digest.update(f"{path} {np.dtype(leaf.dtype)} {tuple(leaf.shape)}\n".encode())
        for part in _slices(path, leaf):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _slices(path: str, leaf: Any) -> Iterator[np.ndarray]:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    if hf.is_stacked(path):
        for n in range(leaf.shape[0]):
            yield np.asarray(leaf[n])
    else:
        yield np.asarray(leaf)


def save_base(directory: str | Path, params: Mapping[str, Any]) -> str:
    """Stores frozen parameters under their content hash, once; returns the hash.

    Raises CheckpointError if they cannot be written.
    """
    content = tree_hash(params)
    folder = Path(directory).absolute() / content
    if not folder.exists():
        try:
            _save_arrays(folder, tree.unflatten(tree.flatten(params)))
        except Exception as error:
            raise CheckpointError(f"{folder}: the frozen base was not saved: {_reason(error)}") from None
    return content


def load_base(directory: str | Path, content: str, abstract: Mapping[str, Any]) -> tree.Tree:
    """The frozen parameters of hash ``content``, placed as the leaves of ``abstract`` say.

    Raises CheckpointError if they are missing, do not fit ``abstract`` or are not what was saved.
    """
    folder = Path(directory).absolute() / content
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the frozen base of this run is missing: restore it or start a new workdir")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata
            _check_fit(folder, _shapes(getattr(stored, "tree", stored)), _shapes(abstract))
            restored = checkpointer.restore(
                folder, item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: the frozen base is damaged: {_reason(error)}") from None
    if tree_hash(restored) != content:
        raise CheckpointError(f"{folder}: the frozen base is damaged: its content no longer has this hash")
    return restored


def _save_arrays(folder: Path, params: tree.Tree) -> None:
    """Arrays, wherever they live, as an Orbax checkpoint of plain zarr arrays, one chunk per layer."""

    def arguments(path: str, leaf: Any) -> ocp.SaveArgs:
        if not hf.is_stacked(path) or not leaf.size:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // leaf.shape[0], 1), shard_axes=(0,))

    save_args = tree.unflatten({path: arguments(path, leaf) for path, leaf in tree.flatten(params).items()})
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder, params, save_args=save_args)


# ---------------------------------------------------------------------------------------------------
# Model folders
# ---------------------------------------------------------------------------------------------------


def save_model(
    directory: str | Path,
    config: Architecture,
    params: Mapping[str, Any],
    *,
    extra_files: Iterable[str | Path] = (),
    names: hf.Names | None = None,
) -> None:
    """Writes a model folder; one already there is replaced.

    ``params``: arrays on any mesh (every process calls this), or ``hf.LazyArray`` leaves, which are streamed
    slice by slice. ``extra_files`` (tokenizer, config.json) are copied. ``names``: the name table the weights
    came with. ``model.json`` is written last: a folder without it is incomplete.
    Raises WeightsError if ``params`` do not fit ``config``, CheckpointError if they cannot be written.
    """
    directory = Path(directory).absolute()
    flat = tree.flatten(params)
    hf.check_params(config, flat)
    folder = directory / PARAMS_FOLDER
    try:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / MODEL_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        _barrier("model folder is empty")
        if any(isinstance(leaf, hf.LazyArray) for leaf in flat.values()):
            _stream_arrays(folder, flat)
        else:
            _save_arrays(folder, tree.unflatten(flat))
        if jax.process_index() == 0:
            for file in map(Path, extra_files):
                if file.resolve() != (directory / file.name).resolve():
                    shutil.copyfile(file, directory / file.name)
            write_checksums(folder)
            values = {"format": FORMAT, "model": config.to_dict(), "names": dict(names or {})}
            hf.write_json(directory / MODEL_FILE, values)
        _barrier("model folder is written")
    except (WeightsError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: the model was not saved: {_reason(error)}") from None


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _stream_arrays(folder: Path, flat: Mapping[str, Any]) -> None:
    """An Orbax checkpoint written slice by slice.

    Orbax takes whole arrays only. So it writes the checkpoint's frame around scalars, and each scalar is then
    replaced by a zarr array with one chunk per slice, as Orbax itself would lay it out. Uncompressed: weights
    hardly compress, and converting is bound by the disk.
    """
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder, tree.unflatten({path: np.zeros((), np.float32) for path in flat}))
    for path, leaf in flat.items():
        target = folder / path.replace("/", ".")
        shutil.rmtree(target)
        metadata = {"compressor": None, "chunks": _chunks(path, leaf), "dimension_separator": "."}
        # Without the last flag a chunk of negative zeros would count as empty and come back as zeros.
        spec = _array_spec(target) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        array = ts.open(spec, create=True, dtype=np.dtype(leaf.dtype), shape=leaf.shape).result()
        if hf.is_stacked(path):
            for n in range(leaf.shape[0]):
                array[n].write(np.asarray(leaf[n])).result()
        else:
            array.write(np.asarray(leaf)).result()


def _array_spec(folder: Path) -> dict[str, Any]:
    # Unsynced: a chunk lost in a power failure shows in the checksums, and syncing each one triples the time.
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder), "file_io_sync": False}}


def _chunks(path: str, leaf: Any) -> list[int]:
    """One chunk per layer; what has no layers is cut along its first axis into chunks of at most CHUNK bytes."""
    rows, *rest = leaf.shape
    if hf.is_stacked(path):
        return [1, *rest]
    pieces = math.ceil(rows * math.prod(rest) * np.dtype(leaf.dtype).itemsize / CHUNK)
    return [math.ceil(rows / pieces), *rest]  # of equal size: zarr stores a short last chunk at full length


def open_params(directory: str | Path, config: Architecture) -> tree.Tree:
    """The weights of a model folder as a nested dict of ``hf.LazyArray``: nothing is read yet.

    Raises WeightsError if they are damaged or (listing all) do not fit ``config``.
    """
    folder = Path(directory).absolute() / PARAMS_FOLDER
    try:
        verify_checksums(folder)
    except _Damaged as error:
        raise WeightsError(f"{error}: copy or convert the model again") from None
    flat = {}
    for file in sorted(folder.glob("*/.zarray")):
        path = file.parent.name.replace(".", "/")
        flat[path] = _open_array(file.parent, hf.is_stacked(path))
    if not flat:
        raise WeightsError(f"{folder}: no weights in it")
    try:
        hf.check_params(config, flat)
    except WeightsError as error:
        raise WeightsError(f"{directory}: {error}") from None
    return tree.unflatten(flat)


def _open_array(folder: Path, stacked: bool) -> hf.LazyArray:
    try:
        array = ts.open(_array_spec(folder), open=True, read=True).result()
    except Exception as error:
        raise WeightsError(f"{folder}: unreadable: {_reason(error)}") from None

    def read(n: int | None) -> np.ndarray:
        try:
            return array[... if n is None else n].read().result()
        except Exception as error:
            raise WeightsError(f"{folder}: unreadable: {_reason(error)}") from None

    return hf.LazyArray(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), stacked, read)


def open_model(
    directory: str | Path, *, image_token_id: int | None = None, names: hf.Names | None = None
) -> tuple[Architecture, tree.Tree, dict[str, str]]:
    """Config, weights as ``hf.LazyArray`` and name table of a model folder or Hugging Face folder.

    Raises WeightsError or ConfigError that say what is wrong with the folder.
    """
    directory = Path(directory)
    config = model_config(directory, image_token_id=image_token_id, names=names)
    if (directory / MODEL_FILE).is_file():
        stored = hf.read_json(directory / MODEL_FILE).get("names", {})
        return config, open_params(directory, config), stored | dict(names or {})
    return config, hf.open_params(directory, config, names=names), dict(names or {})


def model_config(
    directory: str | Path, *, image_token_id: int | None = None, names: hf.Names | None = None
) -> Architecture:
    """Architecture of a model folder or Hugging Face folder; raises WeightsError or ConfigError if it is neither."""
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder")
    file = directory / MODEL_FILE
    if not file.is_file():
        if (directory / "config.json").is_file() and not (directory / PARAMS_FOLDER).is_dir():
            return hf.read_config(directory, image_token_id_=image_token_id, names=names)
        raise WeightsError(
            f"{directory}: not a model folder: it has no {MODEL_FILE} (written by convert.py and train.py) "
            "and is no Hugging Face folder (config.json and safetensors)"
        )
    values = hf.read_json(file)
    if values.get("format") != FORMAT:
        raise ConfigError(f"{file}: format is {values.get('format')!r}, this version reads {FORMAT}: convert it again")
    try:
        config = Architecture.from_dict(values.get("model") or {})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config if image_token_id is None else config.replace(image_token_id=image_token_id)


def load_model(
    directory: str | Path, dtype: Any = None, shardings: PyTree = None, *, image_token_id: int | None = None
) -> tuple[Architecture, tree.Tree]:
    """Config and parameters (jax.Array) of a model folder or a Hugging Face folder.

    ``dtype`` None keeps what is stored. ``shardings``: one sharding, or a nested dict of them by path;
    None = the default device. Errors: see ``open_model``.
    """
    config, lazy, _ = open_model(directory, image_token_id=image_token_id)
    flat = tree.flatten(lazy)
    if isinstance(shardings, Mapping):
        placement = tree.flatten(shardings)
    else:
        placement = dict.fromkeys(flat, shardings)
    return config, tree.unflatten({path: _place(leaf, dtype, placement[path]) for path, leaf in flat.items()})


def _place(leaf: hf.LazyArray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    array = leaf.__array__(dtype)
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
