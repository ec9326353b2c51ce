"""Small disks that fill up: in-memory file systems, mounted only for this process and its children."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

_ISOLATED = "MONO_JAX_FAULTS_ISOLATED"
_UNSHARE = ("unshare", "--map-root-user", "--mount")


def isolate() -> None:
    """Restarts this program in a mount namespace if possible; its mounts end with it."""
    if _ISOLATED in os.environ or shutil.which(_UNSHARE[0]) is None:
        return
    if subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "try", "/mnt"], capture_output=True).returncode == 0:
        os.environ[_ISOLATED] = "1"
        os.execvp(_UNSHARE[0], [*_UNSHARE, sys.executable, *sys.orig_argv[1:]])


def can_mount() -> bool:
    """Whether ``isolate`` succeeded."""
    return _ISOLATED in os.environ


class Disk:
    """A disk of ``size`` bytes at ``folder``."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        folder.mkdir()
        _call("mount", "-t", "tmpfs", "-o", f"size={size}", "disk", folder)

    def grow(self, size: int) -> None:
        _call("mount", "-o", f"remount,size={size}", self.folder)

    def fill(self) -> None:
        """Fills the remaining space."""
        with contextlib.suppress(OSError), (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        _call("umount", "--lazy", self.folder)


def _call(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
