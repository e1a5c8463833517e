"""What one pass over an archive's members tells of the environment in it."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from roles.environment import mend, metadata
from roles.environment.fit import HEAD, TAIL, Needs, Reading, is_telling, newest
from roles.environment.members import Refused, Tree, shown
from roles.environment.tar import Members

PYTHON_OF_BIN = re.compile(r"(?P<root>.*?)/?bin/(?P<name>python[0-9.]*)")
SITE = re.compile(
    r"(?P<root>.*?)/?lib/python(?P<version>[0-9]+\.[0-9]+)/site-packages(/(?P<entry>[^/]+)(/(?P<rest>.+))?)?"
)
SCRIPT = re.compile(r"(?P<root>.*?)/?bin/[^/]+")
MARK = re.compile(r"(?P<root>.*?)/?(pyvenv\.cfg|conda-meta/history)")

METADATA_BYTES = 16 << 20
"""More than the longest RECORD has: that of torch has about two."""

BLOCK = 4096
BOMB_RATIO, BOMB_BYTES = 100, 64 << 20
"""An archive that holds a hundred times its own size, and more than these bytes, is no environment."""


@dataclass(frozen=True)
class Listed:
    """See the fields of the same names in ``archive.Archive``."""

    root: str
    python: str
    interpreter: str
    home: str | None
    distributions: tuple[str, ...]
    requires: Mapping[str, list[str]]
    editables: Mapping[str, str]
    unpacked: int
    entries: int
    needs: Needs
    imports: Mapping[str, Needs]
    strays: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()


class Listing:
    """What one pass over the members gathers."""

    def __init__(self) -> None:
        self.entries = 0
        self.unpacked = 0
        self._tree = Tree()
        self._reading = Reading()
        self._pythons: dict[
            str, dict[str, str]
        ] = {}  # root -> name in bin -> link target, or empty
        self._hard: dict[str, str] = {}  # an interpreter that is a hard link -> to what
        self._versions: dict[str, str] = {}  # root -> major.minor
        self._metadata: dict[str, set[str]] = {}  # root -> metadata folders
        self._marks: dict[str, str] = {}  # root -> text of pyvenv.cfg, empty for conda
        self._texts: dict[str, dict[str, dict[str, str]]] = {}  # root -> metadata.Texts
        self._prefixes: dict[str, set[bytes]] = {}  # root -> where the environment has lived

    def add(self, members: Members, member: tarfile.TarInfo, size: int) -> None:
        """Note a member. size: the archive's own bytes. Raises Refused."""
        self.entries += 1
        self.unpacked += BLOCK * (1 + member.size // BLOCK)
        if self.unpacked > max(BOMB_RATIO * size, BOMB_BYTES) and member.size > BLOCK:
            raise Refused(
                f"holds {self.unpacked >> 20} MiB up to {shown(member.name)}, "
                f"over {BOMB_RATIO} times its own size, as no environment does"
            )
        self._tree.add(member)
        name = member.name.rstrip("/")
        if member.isreg() and is_telling(name):
            self._reading.add(name, *members.ends_of(member, HEAD, TAIL), member.size)
        if match := PYTHON_OF_BIN.fullmatch(name):
            link = member.linkname if member.issym() else ""
            self._pythons.setdefault(match["root"], {})[match["name"]] = link
            if member.islnk():
                self._hard[name] = member.linkname
        elif match := SITE.fullmatch(name):
            self._versions.setdefault(match["root"], match["version"])
            entry = match["entry"] or ""
            if entry.endswith(metadata.ENDINGS):
                self._metadata.setdefault(match["root"], set()).add(entry)
            if metadata.is_told(entry, match["rest"] or ""):
                entries = self._texts.setdefault(match["root"], {})
                texts = entries.setdefault(entry, {})
                start = members.start_of(member, METADATA_BYTES)
                texts[match["rest"] or ""] = start.decode(errors="replace")
        elif match := MARK.fullmatch(name):
            text = b"" if name.endswith("history") else members.start_of(member, 65536)
            self._marks[match["root"]] = text.decode(errors="replace")
            self._lived(match["root"], mend.declared_prefixes(text, b""))
        elif match := SCRIPT.fullmatch(name):
            script = members.start_of(member, 65536)
            own = mend.interpreter_prefix(script)
            self._lived(match["root"], {own} if own else set())
            if name.endswith("/activate"):
                self._lived(match["root"], mend.declared_prefixes(b"", script))

    def _lived(self, root: str, prefixes: set[bytes]) -> None:
        self._prefixes.setdefault(root, set()).update(prefixes)

    def listed(self) -> Listed:
        """Put it together. Raises Refused when it is not one environment, or one that leads out of itself."""
        root = self._root()
        self._tree.check(root)
        version = self._versions[root]
        name, home = _interpreter(self._pythons[root])
        own = home is None
        folder = re.search(r"(?m)^home\s*=\s*(\S.*?)\s*$", self._marks.get(root, ""))
        if folder and own:
            home = f"{folder[1]}/python{version}"  # a venv with a copied interpreter
        program = f"bin/{name}"
        whole = f"{root}/{program}" if root else program
        whole = self._hard.get(whole, whole)
        if own and self._reading.programs.get(whole) is None:
            raise Refused(f"holds {shown(whole)}, which is no Python interpreter for Linux")
        texts = self._texts.get(root, {})
        needs = self._reading.needs(root, whole)
        modules: dict[str, list[Needs]] = {}
        for module, file in metadata.imported(texts, newer := self._reading.newer(root, needs)):
            modules.setdefault(module, []).append(newer[file])
        return Listed(
            root,
            version,
            program,
            home,
            tuple(sorted(self._metadata.get(root, ()))),
            metadata.requirements(texts),
            metadata.editables(texts, map(os.fsdecode, self._prefixes.get(root, ()))),
            self.unpacked,
            self.entries,
            needs,
            {module: newest(several) for module, several in sorted(modules.items())},
        )

    def doubtful(self, listed: Listed) -> set[str] | None:
        """Files in site-packages that several distributions claim, for ``judged``; None where none do."""
        texts = self._texts.get(listed.root, {})
        groups = metadata.doubtful(listed.distributions)
        records = (texts.get(folder, {}).get("RECORD", "") for group in groups for folder in group)
        return {file for text in records for file in metadata.recorded(text)} if groups else None

    def judged(self, listed: Listed, found: Mapping[str, str]) -> Listed:
        """The same, knowing whose the doubtful files are. found: their SHA-256, as ``hashes`` gives it."""
        groups = metadata.doubtful(listed.distributions)
        strays, overwritten, unclear = metadata.judge(
            groups, self._texts.get(listed.root, {}), found
        )
        lost = {*strays} - {*overwritten}
        own = tuple(folder for folder in listed.distributions if folder not in lost)
        return replace(
            listed, distributions=own, strays=strays, overwritten=overwritten, unclear=unclear
        )

    def _root(self) -> str:
        roots = [root for root in self._pythons if root in self._versions]
        roots = [root for root in roots if root in self._marks] or roots
        if not roots:
            raise Refused("holds no Python environment: there is no bin/python in it")
        outermost = min(roots, key=lambda root: len(PurePosixPath(root).parts))
        strangers = [
            root
            for root in roots
            if not PurePosixPath(root).is_relative_to(PurePosixPath(outermost))
        ]
        if strangers:
            raise Refused(
                f"holds several environments ({outermost}, {', '.join(strangers)}): pack one alone"
            )
        if "python" not in self._pythons[outermost]:
            raise Refused(f"has no bin/python in {outermost or 'it'}")
        return outermost


def hashes(members: Members, root: str, files: Collection[str]) -> dict[str, str]:
    """File in site-packages to its SHA-256 as RECORD spells it, for the given files."""
    found = {}
    for member in members:
        match = SITE.fullmatch(member.name)
        if not match or match["root"] != root or not match["entry"] or not member.isreg():
            continue
        file = "/".join(filter(None, (match["entry"], match["rest"])))
        if file in files:
            found[file] = metadata.spelt(members.digest_of(member))
    members.end()  # a program that decompresses waits until all is read
    return found


def _interpreter(names: Mapping[str, str]) -> tuple[str, str | None]:
    """What bin/python leads to: its name in bin, and where it leaves the environment, if it does.

    names: name in bin to the target of its link, empty for a file.
    """
    name, leaves = "python", None
    followed: set[str] = set()
    while (link := names.get(name)) and name not in followed:
        followed.add(name)
        if link.startswith("/"):
            leaves = name, link
        name = PurePosixPath(link).name
    if leaves is None or names.get(name) == "":  # also behind a link to where the environment was
        return name, None
    return leaves
