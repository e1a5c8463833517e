"""Checks what ``pip check`` checks: whether what each distribution requires is there in the right version.

Sent to the nodes as text and run by the environment's interpreter, from Python 3.8 on; the control
machine computes the same from an archive's metadata. Prints one line ``ID<TAB>what is wrong`` for each
requirement that is not met and not known, and leaves the stamp that the everyday look reads.

    python prove.py PREFIX KNOWN PIP [WHEEL...]
        KNOWN: JSON list of [distribution, what it requires], that may stay unmet; PIP: pip's wheel, whose
        rules of versions hold; WHEEL: judge as if these were installed, and leave no stamp
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING or __name__ != "__main__":
    from packaging.requirements import Requirement
else:
    sys.path.insert(0, sys.argv[3])  # the environment's own pip may be an old one
    from pip._vendor.packaging.requirements import Requirement

STAMP = ".lockstep-environment.json"
CHECKED = ".lockstep-requirements.json"
OWN = "lockstep-trainer"


class Installed(NamedTuple):
    """A distribution: its version, and what it requires, as ``Requires-Dist`` spells it."""

    version: str
    requires: tuple[str, ...]


class Unmet(NamedTuple):
    """A requirement that is not met. have: the version that is there instead, or empty."""

    distribution: str
    version: str
    requirement: str
    required: str
    have: str

    def __str__(self) -> str:
        seen = f"{self.required} {self.have} is there" if self.have else "that is not there"
        return f"{self.distribution} {self.version} requires {self.requirement}, and {seen}"


def normal(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unmet(
    installed: Mapping[str, Installed], environment: Mapping[str, str] | None = None
) -> list[Unmet]:
    """The requirements that are not met, as ``pip check`` judges them: without any extras.

    installed: by normal name. environment: values of markers (PEP 508) that are not those of this
    interpreter. What cannot be read as a requirement is left out, as pip does.
    """
    found = []
    markers = tuple({**(environment or {}), "extra": ""}.items())
    for name, one in sorted(installed.items()):
        for text in one.requires:
            requirement = _asked(text, markers)
            if requirement is None:
                continue
            required = normal(requirement.name)
            there = installed.get(required)
            if there is None or not _meets(requirement, there.version):
                plain = f"{requirement.name}{requirement.specifier}"
                have = there.version if there else ""
                found.append(Unmet(name, one.version, plain, required, have))
    return found


@lru_cache(maxsize=None)  # noqa: UP033  (Python 3.8 has no cache)
def _asked(text: str, markers: tuple[tuple[str, str], ...]) -> Requirement | None:
    """What is required there, read once for a run; None where nothing is, or where it cannot be read."""
    try:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate(dict(markers))
    except ValueError:
        return None
    return requirement if applies else None


def _meets(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except ValueError:
        return False


def key(stamp: str, folders: Iterable[str]) -> str:
    """What a check stands on; one with another key is stale.

    stamp: text of the environment's stamp. folders: names of the metadata folders in site-packages.
    """
    others = sorted(name for name in folders if not normal(name).startswith(OWN))
    return hashlib.sha256(json.dumps([stamp.strip(), others]).encode()).hexdigest()


def present(paths: list[str]) -> dict[str, Installed]:
    """The distributions on these paths, the first of a name; without the trainer."""
    found: dict[str, Installed] = {}
    for dist in importlib.metadata.distributions(path=paths):
        name = normal(dist.metadata["Name"] or "")
        if name and name != OWN:
            found.setdefault(name, Installed(dist.version, tuple(dist.requires or ())))
    return found


def leave_stamp(prefix: Path, found: list[Unmet]) -> None:
    """Note what is not met in what lies there now."""
    site = Path(sysconfig.get_path("purelib")).iterdir()
    folders = [path.name for path in site if path.suffix in (".dist-info", ".egg-info")]
    stamp = {"key": key((prefix / STAMP).read_text(), folders), "unmet": found}
    fresh = prefix / f"{CHECKED}.new"
    fresh.write_text(json.dumps(stamp) + "\n")
    fresh.replace(prefix / CHECKED)


if __name__ == "__main__":
    where, known, wheels = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[4:]
    places = [path for path in sys.path if path not in ("", sys.argv[3])]
    try:
        all_unmet = unmet(present([*wheels, *places]))
        if not wheels:
            leave_stamp(where, all_unmet)
        for one in all_unmet:
            if [one.distribution, one.required] not in known:
                print("requirement-unmet", f"{where}: {one}", sep="\t")
    except OSError as error:
        print("requirements-unchecked", f"{where}: {error}", sep="\t")
