"""What ``lockstep bundle`` gathered: its manifest, and the packages in it for a node's system.

A bundle is a folder on the control machine. ``packages/SYSTEM/`` in it is a repository with its index for
one operating system, as ``packages.local`` takes one; ``manifest.json`` names every file with its digest.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, ValidationError

from inventory.base import Strict

if TYPE_CHECKING:
    from roles.packages.managers import Manager

MANIFEST = "manifest.json"
HOME = "/var/lib/lockstep/packages"
"""Where a node keeps the bundle's packages for its system."""

INDEX: dict[Manager, str] = {"apt": "Packages", "rpm": "repodata/repomd.xml"}
"""What names all files of such a repository, with their digests."""

ONE_MAJOR = ("rhel", "centos", "rocky", "almalinux", "ol", "anolis")
"""Systems whose minor releases take the same packages."""

_WORD = r"[A-Za-z0-9][A-Za-z0-9._+%~^@-]*"
_NAME = r"(?!\.\.?(?:/|\Z))[^/\\\x00-\x1f\x7f]+"
FILE = re.compile(rf"(?!models/){_WORD}(/{_WORD})*|models(/{_NAME})+")
"""Names of packages and the like are plain; files of models and data are called as their makers like."""


class BadBundle(ValueError):
    """The folder is no bundle; one sentence."""


def _file(text: str) -> str:
    if not FILE.fullmatch(text):
        raise ValueError(f"{text!r} is no file of a bundle")
    return text


class Entry(Strict):
    """One file. sha256: in hexadecimal. size: bytes."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Manifest(Strict):
    """Every file of the bundle but this one, by its path below the bundle's folder."""

    files: dict[Annotated[str, AfterValidator(_file)], Entry] = {}


def system_of(id: str, release: str, machine: str) -> str:
    """The name of the folder for such a node, as ``debian-12-x86_64``."""
    if id in ONE_MAJOR:
        release = release.partition(".")[0]
    return "-".join(re.sub(r"[^a-z0-9._]+", "_", word.lower()) for word in (id, release, machine))


@functools.cache
def read(folder: Path) -> Manifest:
    """Read once, when the cluster file is. Raises BadBundle."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes(), strict=False)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadBundle(f"{folder / MANIFEST}: {reason}; make it with 'lockstep bundle'") from None
    except ValidationError:
        raise BadBundle(
            f"{folder / MANIFEST} is no manifest of a bundle: make it with 'lockstep bundle'"
        ) from None


def systems(folder: Path) -> list[str]:
    """The systems that it has packages for."""
    parts = (name.split("/") for name in read(folder).files)
    return sorted({words[1] for words in parts if words[0] == "packages" and len(words) > 2})


def packages_for(folder: Path, system: str, manager: Manager) -> dict[str, Entry]:
    """The files of one system's repository by their path in it, the index last; none where it has none."""
    begin = f"packages/{system}/"
    found = {
        name.removeprefix(begin): entry
        for name, entry in read(folder).files.items()
        if name.startswith(begin)
    }
    return dict(sorted(found.items(), key=lambda item: item[0] == INDEX[manager]))
