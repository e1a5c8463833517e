"""What the metadata in an archive's site-packages says of its distributions. Texts in, values out.

It is gathered while the archive is listed: what each distribution requires, which ones are editable
installs of a folder elsewhere, and, where two records claim the same files, whose the files are.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
from base64 import urlsafe_b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement

from roles.environment.spec import normal_name, of_metadata

ENDINGS = (".dist-info", ".egg-info")
TEXTS = {"METADATA", "PKG-INFO", "requires.txt", "direct_url.json", "RECORD", ""}
"""Files of a metadata folder that are read; the last is an egg-info that is itself a file."""

FAMILY = re.compile(r"nvidia-(?P<library>[a-z0-9-]+)-cu\d+")
"""NVIDIA's wheels for two versions of CUDA may write the same files."""

Texts = Mapping[str, Mapping[str, str]]
"""Entry of site-packages to the names and texts of its files; a file's own text is under the empty name."""


def is_told(entry: str, rest: str) -> bool:
    """Whether the file ``rest`` of the entry in site-packages says something that is read here."""
    if entry.endswith(ENDINGS):
        return rest in TEXTS
    return not rest and (entry.endswith(".egg-link") or entry.startswith("__editable__"))


class _Recorded(importlib.metadata.Distribution):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def read_text(self, filename: str) -> str | None:
        return self.texts.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return Path(path)


def requirements(texts: Texts) -> dict[str, list[str]]:
    """Metadata folder to what its distribution requires, as ``Requires-Dist`` spells it."""
    found = {}
    for entry in sorted(texts):
        if entry.endswith(ENDINGS) and (required := _Recorded(texts[entry]).requires):
            found[entry] = list(required)
    return found


def editables(texts: Texts, prefixes: Iterable[str]) -> dict[str, str]:
    """Normal name of each editable install to the folder that it points to.

    prefixes: where the environment has lived; a folder below one travels with it and is left out.
    """
    roots = [PurePosixPath(prefix) for prefix in prefixes]
    found: dict[str, str] = {}
    for name, path in _editables(texts):
        if path and not any(PurePosixPath(path).is_relative_to(root) for root in roots):
            found.setdefault(name, path)
    return found


def _editables(texts: Texts) -> Iterator[tuple[str, str]]:
    for entry, files in sorted(texts.items()):
        if "direct_url.json" in files:
            yield of_metadata(entry)[0], _editable_url(files["direct_url.json"])
    for entry, files in sorted(texts.items()):
        if entry.endswith(".egg-link"):
            first = files.get("", "").strip().partition("\n")[0]
            yield normal_name(entry.removesuffix(".egg-link")), first
        # __editable__.NAME-VERSION.pth and __editable___NAME_VERSION_finder.py, by setuptools
        elif match := re.fullmatch(r"__editable__\.(?P<name>[^-]+)-.*\.pth", entry):
            lines = [line for line in files.get("", "").splitlines() if line.startswith("/")]
            yield normal_name(match["name"]), lines[0] if lines else ""


def _editable_url(text: str) -> str:
    """The folder in a direct_url.json (PEP 610); empty where it is no editable install."""
    try:
        told = json.loads(text)
        folder, editable = urlsplit(str(told["url"])).path, told["dir_info"]["editable"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return unquote(folder) if editable is True else ""


# ---- records that claim the same files ------------------------------------------------------------


def doubtful(folders: Iterable[str]) -> list[list[str]]:
    """Groups of metadata folders of which one alone can own its files."""
    groups: dict[str, list[str]] = {}
    for folder in sorted(folders):
        groups.setdefault(family(of_metadata(folder)[0]), []).append(folder)
    return [group for group in groups.values() if len(group) > 1]


def recorded(record: str) -> dict[str, str]:
    """The files of a RECORD in site-packages with their SHA-256 as it is spelt there.

    Scripts are left out: whoever relocates an environment rewrites them. A broken record claims nothing.
    """
    found = {}
    try:
        rows = list(csv.reader(record.splitlines()))
    except csv.Error:
        return {}
    for row in rows:
        if len(row) >= 2 and row[1].startswith("sha256=") and not row[0].startswith(("../", "/")):
            found[row[0]] = row[1].removeprefix("sha256=")
    return found


def imported(texts: Texts, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a top-level module and one of these files, which comes with it: in its folder, or by the record
    of its distribution (of ``flash_attn`` the compiled part is a module beside it)."""
    modules: dict[str, set[str]] = {}  # file -> those of its distribution
    for entry, told in texts.items():
        if entry.endswith(ENDINGS):
            paths = recorded(told.get("RECORD", ""))
            tops = {_top(path) for path in paths if not path.startswith(entry)}
            for path in paths:
                modules.setdefault(path, set()).update(tops)
    for file in files:
        for module in sorted({_top(file), *modules.get(file, ())}):
            yield module, file


def _top(path: str) -> str:
    """The module that a path in site-packages begins with: of ``a/b.so`` and of ``a.cpython-311.so`` it is a."""
    return path.partition("/")[0].partition(".")[0]


def spelt(digest: bytes) -> str:
    """A hash as RECORD spells it."""
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


class Judged(NamedTuple):
    """strays: metadata folders whose files another one has replaced. overwritten: those of them that are
    required all the same. unclear: groups where that cannot be told."""

    strays: tuple[str, ...]
    overwritten: tuple[str, ...]
    unclear: tuple[str, ...]


def judge(groups: Iterable[list[str]], texts: Texts, hashes: Mapping[str, str]) -> Judged:
    """Whose the files are. hashes: file in site-packages to its SHA-256, of every file that a RECORD of the
    groups lists."""
    strays: list[str] = []
    overwritten: list[str] = []
    unclear: list[str] = []
    requires = requirements(texts)
    for group in groups:
        names = {of_metadata(folder)[0] for folder in group}
        whole = [folder for folder in group if _is_whole(texts.get(folder, {}), hashes)]
        if len(names) > 1 and len(whole) == len(group):
            continue  # of one family, but with files of different names
        needed = required_of(names, requires) if len(names) > 1 else set()
        wanted = [folder for folder in group if of_metadata(folder)[0] in needed or not needed]
        right = [folder for folder in wanted if folder in whole]
        if len(right) == 1 and len(needed) <= 1:
            strays += [folder for folder in group if folder not in right]
        elif needed and len(wanted) == 1:
            strays += group
            overwritten += wanted
        else:
            unclear.append(" and ".join(group))
    return Judged(tuple(strays), tuple(overwritten), tuple(unclear))


def required_of(names: Collection[str], requires: Mapping[str, Iterable[str]]) -> set[str]:
    """Those of the distributions that torch requires, or where it requires none, that others do.

    requires: metadata folder to what its distribution requires.
    """
    own = [texts for folder, texts in requires.items() if of_metadata(folder)[0] == "torch"]
    for group in (own, requires.values()):
        if found := {name for texts in group for name in _names(texts)}.intersection(names):
            return found
    return set()


def family(name: str) -> str:
    """What two distributions share of which one may write the other's files; its own name for most."""
    found = FAMILY.fullmatch(name)
    return f"nvidia {found['library']}" if found else name


def _is_whole(files: Mapping[str, str], hashes: Mapping[str, str]) -> bool:
    listed = recorded(files.get("RECORD", ""))
    own = {path: digest for path, digest in listed.items() if ".dist-info/" not in path}
    return bool(own) and all(hashes.get(path) == digest for path, digest in own.items())


def _names(requirements: Iterable[str]) -> Iterator[str]:
    for text in requirements:
        with suppress(InvalidRequirement):
            yield normal_name(Requirement(text).name)
