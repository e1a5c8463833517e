"""Says what an environment holds now, for a comparison with another node's; changes nothing.

Sent to the nodes and run by the environment's interpreter: the standard library alone, from Python 3.8
on. Prints one line of JSON.

    python -m roles.environment.describe PREFIX            interpreter, archive, distributions (name to
                                                           version), digests (name to that of its files)
    python -m roles.environment.describe PREFIX NAME...    name to its files (path to content)
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roles.environment import manifest
from roles.environment.prove import OWN, STAMP, earlier, metadata, normal


def by_distribution(prefix: Path) -> dict[str, manifest.Files]:
    """Every file, by the normal name of the distribution that it belongs to."""
    owners = manifest.owners(prefix)
    groups: dict[str, manifest.Files] = {}
    for path, file in manifest.read(prefix, manifest.load(prefix)).items():
        owner = owners.get(path)
        name = normal(owner.partition(" ")[0]) if owner else manifest.NOBODY
        groups.setdefault(name, {})[path] = file
    return groups


def versions(prefix: Path) -> dict[str, str]:
    """Normal name to version; to several of them where there is more metadata than one."""
    folders = [folder.rpartition(".")[0].partition("-") for folder in metadata(prefix)]
    labels = {f"{name} {version}" for name, _, version in folders}
    labels.update(manifest.owners(prefix).values())
    found: dict[str, set[str]] = {}
    for label in labels:
        name, _, version = label.partition(" ")
        found.setdefault(normal(name), set()).add(version)
    return {name: " and ".join(sorted(several)) for name, several in found.items() if name != OWN}


def summary(prefix: Path) -> dict[str, Any]:
    """What two nodes are compared by at first."""
    python = os.path.realpath(prefix / "bin" / "python")
    return {
        "interpreter": f"{platform.python_version()} at {python} on {platform.machine()}",
        "archive": earlier(prefix / STAMP).get("archive", "none"),
        "distributions": versions(prefix),
        "digests": {name: manifest.digest(each) for name, each in by_distribution(prefix).items()},
    }


def contents(prefix: Path, names: list[str]) -> Mapping[str, Mapping[str, str]]:
    """Name to the files of that distribution: path to content."""
    groups = by_distribution(prefix)
    return {
        name: {path: file.content for path, file in groups.get(name, {}).items()} for name in names
    }


if __name__ == "__main__":
    _prefix = Path(sys.argv[1])
    print(json.dumps(contents(_prefix, sys.argv[2:]) if sys.argv[2:] else summary(_prefix)))
