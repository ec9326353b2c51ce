"""Compiled programs kept on disk, so that a restarted run does not recompile its step.

JAX makes the keys (program, options, XLA and jaxlib, devices) and decides what is kept: programs that took a second or
more to compile (``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS``). JAX neither writes its own files atomically nor checks
them, so a killed process leaves half an entry forever, and a flipped bit is run as machine code. Here, an entry is
written atomically with a checksum, and a damaged one is a cache miss. A folder that the user gives to JAX itself is
left to JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache  # public are the functions that clear it only
from jax._src.compilation_cache_interface import CacheInterface

from data_pipelines.io import publish
from data_pipelines.io.digests import digest, with_checksum, without_checksum
from mono_jax.files import reason
from mono_jax.training.metrics import Say, duration

_FOUND = "/jax/compilation_cache/cache_hits"
_ADDED = "/jax/compilation_cache/cache_misses"  # JAX's name for a program that it keeps
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"


@dataclasses.dataclass
class Programs:
    """What the cache did for a process.

    Attributes:
      folder: None = no cache.
      found: programs found in the cache. added: programs that were compiled and added to it.
      saved: seconds that it once took to compile the programs found, minus the time to read them; JAX stores whole
        seconds.
    """

    folder: Path | None = None
    found: int = 0
    added: int = 0
    saved: float = 0.0

    def _event(self, name: str, **_: Any) -> None:
        self.found += name == _FOUND
        self.added += name == _ADDED

    def _duration(self, name: str, seconds: float, **_: Any) -> None:
        self.saved += max(seconds, 0.0) if name == _SAVED else 0.0

    def counts(self) -> dict[str, Any]:
        """For records; {} without a cache."""
        return (
            {} if self.folder is None else {"found": self.found, "added": self.added, "saved_s": round(self.saved, 1)}
        )

    @contextlib.contextmanager
    def explained(self, what: str, say: Say) -> Iterator[None]:
        """Reports where the program that is compiled within the context came from."""
        before = dataclasses.replace(self)
        yield
        if self.found > before.found:
            say(f"{what} was compiled before{_spared(self.saved - before.saved)}: {self.folder}")
        elif self.added > before.added:
            say(f"{what} was compiled and is kept in {self.folder}")

    def lines(self) -> list[str]:
        """Lines to print at the end of a run."""
        if not (self.found or self.added):
            return []
        return [f"compiled programs: {self.found} found{_spared(self.saved)}, {self.added} added"]


def _spared(seconds: float) -> str:
    return f", about {duration(seconds)} saved" if seconds >= 1 else ""


def folder_of(setting: bool | str, cache_dir: Path | str) -> Path | None:
    """Where ``config.compilation_cache`` keeps programs, below ``cache_dir`` by default; None = nowhere."""
    if setting is False:
        return None
    return Path(cache_dir) / "programs" if setting is True else Path(setting)


@contextlib.contextmanager
def kept_programs(folder: Path | None, say: Say, least_s: float | None = None) -> Iterator[Programs]:
    """Context in which JAX keeps compiled programs below ``folder``; None = nowhere.

    ``least_s``: compile time in seconds from which a program is kept; None = JAX's setting, one second.
    What the user told JAX itself takes precedence: its own folder, or no cache at all. Contexts may be nested.
    """
    before = jax.config.jax_compilation_cache_dir, compilation_cache._cache
    least_before = jax.config.jax_persistent_cache_min_compile_time_secs
    users = before[0] is not None and not isinstance(before[1], _Entries)
    own = None if users or folder is None else _Entries(folder / _machine(), say)
    if not users:
        _use(own and str(own._path), own)
    if least_s is not None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_s)
    enabled = jax.config.jax_enable_compilation_cache
    programs = Programs((Path(before[0]) if users else folder) if enabled else None)
    jax.monitoring.register_event_listener(programs._event)
    jax.monitoring.register_event_duration_secs_listener(programs._duration)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_listener(programs._event)
        jax.monitoring.unregister_event_duration_listener(programs._duration)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_before)
        if not users:
            _use(*before)


def _use(folder: str | None, cache: CacheInterface | None) -> None:
    """Makes JAX keep its entries in ``cache``; None = JAX's own behaviour."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    if cache is not None:
        compilation_cache._cache, compilation_cache._cache_initialized = cache, True


class _Entries(CacheInterface):
    """One file per entry, with a checksum; a failure costs a compilation, never the run."""

    def __init__(self, folder: Path, say: Say):
        self._path, self._say, self._warned = folder, say, False

    def get(self, key: str) -> bytes | None:
        file = self._path / f"{key}.program"
        try:
            return without_checksum(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            self._warn(f"{file}: damaged; compiled again")
            with contextlib.suppress(OSError):
                file.unlink()
        except OSError as error:
            self._warn(f"{file}: cannot be read ({reason(error)}); compiled again")
        return None

    def put(self, key: str, value: bytes) -> None:
        try:
            publish.write_bytes(self._path / f"{key}.program", with_checksum(value))
        except OSError as error:
            self._warn(f"{self._path}: compiled programs cannot be kept: {reason(error)}")

    def _warn(self, line: str) -> None:
        if not self._warned:
            self._say(line)
        self._warned = True


def _machine() -> str:
    """A folder name shared by hosts that can run the same machine code.

    A CPU program can crash on a host that lacks one of its instructions. JAX's keys contain the CPU's features only
    through a hash that an upgrade may change, and with several processes only those of the first.
    """
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    return f"cpu-{platform.machine()}-{digest(*_cpu_features())[:12]}"


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Vendor, model and instructions of this CPU, as Linux reports them; elsewhere the processor's name."""
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    try:
        first = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return [platform.processor()]
    pairs = (line.partition(":") for line in first.splitlines())
    return [f"{name.strip()}:{value.strip()}" for name, _, value in pairs if name.strip() in names]
