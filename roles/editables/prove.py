"""Proves that editable distributions are what was installed: recorded for their source, and its files unedited.

Sent to the nodes as text and run by the environment's interpreter: the standard library alone, from
Python 3.8 on. Prints one line ``ID<TAB>what is wrong`` for each that is not.

    python prove.py PREFIX note NAME SOURCE   after an installation: leave the stamp and the list of files;
                                              SOURCE: SHA-256 of the packed source
    python prove.py PREFIX check NAME...      compare; what was edited goes into the stamp
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from urllib.parse import unquote, urlsplit


def normal(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def files_of(tree: Path) -> dict[str, str]:
    """The files below a folder with their SHA-256, byte code left out; of a link, where it leads."""
    found = {}
    for folder, folders, names in os.walk(tree):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for path in (Path(folder, name) for name in names if not name.endswith(".pyc")):
            value = f"-> {os.readlink(path)}" if path.is_symlink() else digest(path)  # noqa: PTH115
            found[str(path.relative_to(tree))] = value
    return found


def digest(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edits(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, in words. A new file counts when Python could import it: runs leave others behind."""
    words = [f"{name} is gone" for name in before if name not in now]
    words += [
        f"{name} is changed" for name in before if now.get(name, before[name]) != before[name]
    ]
    words += [f"{name} is new" for name in now if name not in before and name.endswith(".py")]
    return sorted(words)


def recorded(name: str, tree: Path) -> str:
    """The metadata folder of the distribution, if it is an editable install of the tree; else empty."""
    site = sysconfig.get_path("purelib")
    for dist in importlib.metadata.distributions(path=[site]):
        if normal(dist.metadata["Name"] or "") != name:
            continue
        try:
            told = json.loads(dist.read_text("direct_url.json") or "")
            path = unquote(urlsplit(told["url"]).path)
            editable = told["dir_info"]["editable"] is True
        except (ValueError, KeyError, TypeError):
            continue
        if editable and Path(path) == tree:
            [folder] = {
                str(file).split("/")[0] for file in dist.files or () if file.name == "RECORD"
            }
            return folder
    return ""


def write(path: Path, value: object) -> None:
    """One line of JSON, at once."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(value, sort_keys=True) + "\n")
    fresh.replace(path)


def note(sources: Path, name: str, source: str) -> list[tuple[str, str]]:
    """Leave the list of files and the stamp; returns what is wrong instead."""
    folder = recorded(name, sources / name)
    if not folder:
        return [
            ("editable-missing", f"pip did not record {name} as installed from {sources / name}")
        ]
    write(sources / f".{name}.files", files_of(sources / name))
    write(sources / f".{name}.json", {"source": source, "metadata": folder})
    return []


def check(sources: Path, name: str) -> list[tuple[str, str]]:
    """Compare with what was noted; what is edited goes into the stamp."""
    path = sources / f".{name}.json"
    try:
        stamp = json.loads(path.read_text())
        before = json.loads((sources / f".{name}.files").read_text())
    except (OSError, ValueError) as error:
        return [("editable-missing", f"{name} at {sources / name} cannot be compared: {error}")]
    found = edits(before, files_of(sources / name))
    if recorded(name, sources / name) != stamp["metadata"]:
        found.append(f"{stamp['metadata']} does not lead to it")
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    words = f"{', '.join(found[:3])}{more}"
    write(path, {**stamp, "edited": words})
    return [("editable-edited", f"{name} at {sources / name}: {words}")]


if __name__ == "__main__":
    where = Path(sys.argv[1]) / ".lockstep-src"
    if sys.argv[2] == "note":
        wrong = note(where, *sys.argv[3:])
    else:
        wrong = [each for one in sys.argv[3:] for each in check(where, one)]
    for problem in wrong:
        print(*problem, sep="\t")
