"""Names and versions of Python distributions as file names spell them. Pure text; no file is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from roles.environment.spec import normal_name, of_metadata


def installed(folders: Iterable[str]) -> Mapping[str, list[str]]:
    """Normal name to its metadata folders; more than one is a broken installation."""
    found: dict[str, list[str]] = {}
    for folder in sorted(folders):
        found.setdefault(of_metadata(folder)[0], []).append(folder)
    return found


def of_wheel(file: str) -> tuple[str, str, str] | None:
    """(normal name, version, Python tags) of a wheel's file name; None for another file."""
    parts = file.removesuffix(".whl").split("-")
    if not file.endswith(".whl") or len(parts) not in (5, 6):
        return None
    return normal_name(parts[0]), parts[1], f"{parts[-3]}-{parts[-2]}"


def fits(tags: str, python: str) -> bool:
    """Whether wheels with these tags (``cp311-cp311``, ``py2.py3-none``, ``cp38-abi3``) run on it.

    python: major.minor. The platform is left to pip, which knows the node's.
    """
    wanted, _, abi = tags.partition("-")
    minor = int(python.split(".")[1])
    for tag in wanted.split("."):
        if tag in ("py3", f"py3{minor}", f"cp3{minor}"):
            return True
        older = re.fullmatch(r"cp3([0-9]+)", tag)
        if older and abi == "abi3" and int(older[1]) <= minor:
            return True
    return False
