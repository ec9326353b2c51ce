"""Where a sweep keeps its files.

WORKDIR/units/NAME/      a unit: links to its stages, report.html, result.json or failed.json, log.txt
        shared/STAGE-DIGEST/, sets-DIGEST/, mono-DIGEST/    made once for all units that have it
               base/, cache/                                frozen parameters and packing plans of all
        results.csv, summary.csv, summary.md, *.png         of ``gather``

``shared`` may be a link to a folder that several sweeps use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mono_jax.errors import CheckpointError
from mono_jax.runs.sweeping.chain import Link, Plan

RESULT, FAILED, LOG = "result.json", "failed.json", "log.txt"


def unit_folder(workdir: Path, name: str) -> Path:
    """The folder of the unit called ``name``."""
    return workdir / "units" / name


def shared_folder(workdir: Path, link: Link) -> Path:
    """The folder of a stage, sets or base that all units with the same first stages use."""
    return workdir / "shared" / link.name


def share(workdir: Path, folder: Path) -> None:
    """Makes the sweep in ``workdir`` use ``folder``, which may hold stages of other sweeps, for what its units share.

    Raises CheckpointError if the sweep has already started without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    place = workdir / "shared"
    with contextlib.suppress(FileExistsError):
        place.symlink_to(_relative(folder, workdir))
    if not place.samefile(folder):
        raise CheckpointError(
            f"{place}: this sweep keeps its stages there: leave out --shared, or give --shared={place}"
        )


def is_trained(workdir: Path, link: Link) -> bool:
    """Whether a stage has been finished by any unit."""
    return (shared_folder(workdir, link) / "summary.json").is_file()


def lay_out(workdir: Path, plan: Plan) -> Path:
    """Makes the unit's folder, with links to what it shares; returns the folder."""
    folder = unit_folder(workdir, plan.unit.name)
    folder.mkdir(parents=True, exist_ok=True)
    links = {stage.folder: shared_folder(workdir, stage) for stage in plan.stages}
    links |= {name: workdir / "shared" / name for name in ("base", "cache")}
    for name, link in (("data", plan.sets), ("mono", plan.mono)):
        if link is not None:
            links[name] = shared_folder(workdir, link)
    for name, target in links.items():
        _link(folder / name, target)
    return folder


def _link(place: Path, target: Path) -> None:
    relative = _relative(target, place.parent)
    if place.is_symlink() and os.readlink(place) == relative:
        return
    with contextlib.suppress(FileNotFoundError):
        place.unlink()  # from the unit's previous config
    place.symlink_to(relative)


def _relative(target: Path, folder: Path) -> str:
    return os.path.relpath(target.absolute(), folder.absolute())


@contextlib.contextmanager
def alone_with(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other process is making the shared ``folder``; prints a line if it has to wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another unit, which is making {folder.name} ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
