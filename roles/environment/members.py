"""Which members an environment's archive may hold, so that a node's tar, run by root, unpacks a tree and nothing else.

Knows names, kinds and links; reads no bytes. What it refuses, it refuses in words that follow the archive's name.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from roles.environment.spec import SYSTEM_DIRECTORIES

MOST_MEMBERS = 1_000_000
LONGEST_NAME, LONGEST_PART = 3000, 255
"""Bytes; Linux takes 4095 in a path, of which the prefix needs some, and 255 in each part."""

MOST_LINKS = 40
"""How many links Linux follows in one path."""

PYTHON = re.compile(r"python[0-9.]*")


class Refused(Exception):
    """The archive cannot be used; the message goes on from its name, as in "holds a device"."""


def shown(name: str) -> str:
    """A name for a terminal: quoted where it has anything but plain characters, cut where it is long."""
    text = name if name.isascii() and name.isprintable() and " " not in name else ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def canonical(name: str) -> str:
    """The name without its "." parts, empty for the top folder. Raises Refused for one that leads elsewhere."""
    if name.startswith("/"):
        raise Refused(f"holds {shown(name)}, an absolute path: pack the environment's folder again")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused(f"holds {shown(name)}, which leads out of the environment")
    return "/".join(parts)


class Tree:
    """The members seen so far. Raises Refused for one that no environment has.

    kinds: canonical name to "file", "folder" or "link". links: link to where it leads.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self._hard: dict[str, str] = {}
        self._spelt: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        """Take one member in, in the archive's order."""
        name = _plain(member.name)
        path = canonical(name)
        if member.isdir():
            kind = "folder"
        elif member.issym():
            kind = "link"
            self.links[path] = _plain(member.linkname)
        elif member.islnk():
            kind = "file"
            self._hard[path] = target = canonical(_plain(member.linkname))
            if self.kinds.get(target) != "file":
                raise Refused(
                    f"holds {shown(name)}, a hard link to {shown(member.linkname)}, which is no file before it"
                )
        elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = "file"
        else:
            raise Refused(f"holds {shown(name)}, which is {_kind(member)} and no part of Python")
        if kind != "folder" and name.endswith("/"):
            raise Refused(f"holds {shown(name)}, a {kind} with the name of a folder")
        before = self.kinds.get(path)
        if before and (before, kind) != ("folder", "folder"):
            raise Refused(f"holds {shown(name)} twice: pack the environment again in one go")
        self.kinds[path] = kind
        self._spelt[path] = name
        if len(self.kinds) > MOST_MEMBERS:
            raise Refused(f"holds more than {MOST_MEMBERS} files, which no environment has")

    def check(self, root: str) -> None:
        """What only the whole tree shows. root: the environment's folder, as spelt in the archive."""
        top = canonical(root)
        for folder in {str(PurePosixPath(path).parent) for path in self.kinds}:
            for above in (folder, *map(str, PurePosixPath(folder).parents)):
                if self.kinds.get(above, "folder") != "folder":
                    raise Refused(
                        f"holds {shown(above)} as a {self.kinds[above]}, and files below it"
                    )
        for path in self._below(top, self.kinds):
            spelt = self._spelt[path]
            if root and spelt.rstrip("/") != root and not spelt.startswith(f"{root}/"):
                raise Refused(
                    f"spells the same folder in two ways, {shown(root)} and {shown(spelt)}: pack it again in one go"
                )
        for path in self._below(top, self._hard):
            if not _is_below(self._hard[path], top):
                raise Refused(
                    f"holds {shown(path)}, a hard link to {shown(self._hard[path])} outside of the environment"
                )
        for path in self._below(top, self.links):
            if not self._may_lead(top, path):
                raise Refused(
                    f"holds {shown(path)}, a link to {shown(self.links[path])} outside of the environment: "
                    "put the file itself in its place, and pack again"
                )

    @staticmethod
    def _below(top: str, paths: dict[str, str]) -> Iterator[str]:
        return (path for path in paths if _is_below(path, top))

    def _may_lead(self, top: str, path: str) -> bool:
        leads = self.links[path]
        if leads.startswith("/"):
            return self._of_python(top, path) or self._to_old_place(top, leads)
        return self._stays_inside(top, path)

    def _of_python(self, top: str, path: str) -> bool:
        """A venv's own link to the interpreter of the machine."""
        name, target = PurePosixPath(path), PurePosixPath(self.links[path])
        return (
            str(name.parent) == str(PurePosixPath(top, "bin"))
            and PYTHON.fullmatch(name.name) is not None
            and PYTHON.fullmatch(target.name) is not None
            and ".." not in target.parts
        )

    def _to_old_place(self, top: str, leads: str) -> bool:
        """A link to a file of this tree where the tree lay before; it is mended with the paths."""
        parts = PurePosixPath(leads).parts
        if ".." in parts:
            return False
        return any(
            str(PurePosixPath(top, *parts[count:])) in self.kinds
            and not SYSTEM_DIRECTORIES.fullmatch(str(PurePosixPath(*parts[:count])))
            for count in range(2, len(parts))
        )

    def _stays_inside(self, top: str, path: str) -> bool:
        """Whether a relative link stays below the top folder, through whatever other links it goes."""
        floor = PurePosixPath(top).parts
        at = list(PurePosixPath(path).parent.parts)
        left = self.links[path].split("/")
        followed = 0
        while left:
            part = left.pop(0)
            if part == "..":
                if len(at) <= len(floor):
                    return False
                at.pop()
            elif part not in ("", "."):
                at.append(part)
                over = self.links.get("/".join(at))
                if over is not None:
                    followed += 1
                    if over.startswith("/"):
                        return not left  # judged by itself
                    if followed > MOST_LINKS:
                        return False
                    at.pop()
                    left = over.split("/") + left
        return True


def _is_below(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}/")


def _plain(name: str) -> str:
    """The name. Raises Refused where no file system, or no one, could read it."""
    raw = name.encode(errors="surrogateescape")
    if not name or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise Refused(f"holds {shown(name)}, a name with control characters")
    if raw.decode(errors="replace") != name:
        raise Refused(f"holds {shown(name)}, a name that is no UTF-8")
    if len(raw) > LONGEST_NAME or any(len(part) > LONGEST_PART for part in raw.split(b"/")):
        raise Refused(f"holds {shown(name)}, a name longer than a file system takes")
    return name


def _kind(member: tarfile.TarInfo) -> str:
    if member.ischr() or member.isblk():
        return "a device"
    if member.isfifo():
        return "a pipe"
    return f"of the odd kind {member.type!a}"
