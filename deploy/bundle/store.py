"""The bundle's folder: what is in it and right stays, what is damaged is fetched again, what is foreign goes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from deploy.lab.errors import LabError
from deploy.lab.files import make_directory, partial_beside, write_whole
from roles.packages import bundle

BEFORE = ".manifest-before.json"
"""The manifest of the last whole bundle, while one is made: without it nothing takes the folder for whole."""

OWN = ("packages", "environments", "wheels", "sources", "models")
"""The folders in it, in which nothing else may lie."""


MIB = 1 << 20


class BundleError(LabError):
    """What cannot be had, or why; one sentence."""


class Store:
    """A bundle that is being made. Raises BundleError for a folder that is something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest, before = folder / bundle.MANIFEST, folder / BEFORE
        if folder.is_dir() and any(folder.iterdir()):
            ours = [manifest, before, *(folder / name for name in (*OWN, "wanted.json"))]
            if not any(path.exists() for path in ours):
                raise BundleError(
                    f"{folder} holds other things: name a new folder, or that of a bundle"
                )
        try:
            last = manifest if manifest.exists() else before
            self._known = bundle.Manifest.model_validate_json(last.read_bytes(), strict=False)
        except (OSError, ValueError):
            self._known = bundle.Manifest()
        self._files: dict[str, bundle.Entry] = {}

    def begin(self) -> None:
        """From now on the folder is no whole bundle, until ``close``."""
        for name in OWN:
            make_directory(self.folder / name)
        manifest = self.folder / bundle.MANIFEST
        if manifest.exists():
            manifest.replace(self.folder / BEFORE)

    def has(self, name: str, sha256: str | None = None) -> bool:
        """Whether that file is there as it must be, which also keeps it.

        sha256: None asks for the content that the last manifest named.
        """
        known = self._known.files.get(name)
        wanted = sha256 or (known.sha256 if known else None)
        path = self.folder / name
        if wanted is None or not path.is_file():
            return False
        if known and known.sha256 == wanted and known.size != path.stat().st_size:
            return False
        if digest(path) != wanted:
            return False
        self.keep(name, wanted)
        return True

    def keep(self, name: str, sha256: str | None = None) -> None:
        """That file belongs to the bundle as it is. sha256: where it is known already."""
        path = self.folder / name
        self._files[name] = bundle.Entry(sha256=sha256 or digest(path), size=path.stat().st_size)

    def holds(self, folder: str) -> bool:
        """Whether the bundle has a file there. folder: ends with a slash."""
        return any(name.startswith(folder) for name in self._files)

    def copy(self, source: Path, name: str) -> bool:
        """Have a copy of a file of this machine, whole or not at all; whether it had to be made.

        Raises BundleError.
        """
        path = self.folder / name
        try:
            if self.has(name, digest(source)):
                return False
            make_directory(path.parent)
            beside = partial_beside(path)
            try:
                shutil.copyfile(source, beside)
                beside.chmod(0o644)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise BundleError(f"{source} cannot be copied: {error.strerror or error}") from None
        self.keep(name)
        return True

    def write(self, name: str, text: str) -> None:
        """Have a file with that text."""
        write_whole(self.folder / name, text)
        self.keep(name)

    def close(self) -> int:
        """Take away what is not of this bundle and write the manifest; the size of all in bytes."""
        for top in OWN:
            for path in sorted((self.folder / top).rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif str(path.relative_to(self.folder)) not in self._files:
                    path.unlink()
        manifest = bundle.Manifest(files=dict(sorted(self._files.items())))
        write_whole(self.folder / bundle.MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        (self.folder / BEFORE).unlink(missing_ok=True)
        return sum(entry.size for entry in self._files.values())


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            found.update(chunk)
    return found.hexdigest()
