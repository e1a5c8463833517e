"""Makes an environment that was copied or unpacked belong to the prefix where it lives from now on.

Sent to the nodes as text and run by the environment's own interpreter before anything of it is
usable, so: the standard library alone, from Python 3.8 on.

    python mend.py ROOT PREFIX             mend the tree at ROOT so that it works when it lies at PREFIX
    python mend.py ROOT PREFIX leftovers   list what names an old prefix and stays as it is, and why, as JSON

The outcome depends on the tree as it first was and on PREFIX alone, not on the moves between: notes in
the tree keep what was replaced where, so that every move begins with the first bytes, and the way back
ends with them. Each file is first written beside its place; when one is refused, nothing has changed.

The functions from bytes to edits know no files. What they hold to:

- whole paths alone: ``/opt/env`` is not in ``/opt/env2``, ``/opt/env-old`` or ``/backup/opt/env``;
- only files that are known to name their prefix: scripts, those that conda or conda-pack recorded, and
  kinds such as pyvenv.cfg, .pth, direct_url.json, .pc, .la. Data that happens to name it is data;
- in binaries nothing moves: a path takes the place of its zero-terminated string and its padding.
"""

from __future__ import annotations

import binascii
import contextlib
import gc
import hashlib
import json
import os
import re
import stat
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

VERSION = 2
"""Raised when the mender learns something, so that environments mended before are mended again."""

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""A pipe among the files shall not hold us up."""

NOTES = ".lockstep-relocation.json"
"""In the tree's root: what was replaced where."""
FRESH = ".lockstep-mended"
"""Ends the name of a file that is not yet in its place."""

NOT_A_PREFIX = {b"", b"/usr", b"/usr/local"}

SHEBANG_BYTES = 127
"""Older kernels cut a shebang after these."""

SAME_IN_URL = re.compile(rb"[\w.~/-]*")
"""A path that an address spells alike (RFC 3986, unreserved characters)."""

SEARCHERS = 8
"""As many processes at most look for a name. Few cores are no reason for fewer: a disk serves several at once."""

# Where a path begins in a text: not in the middle of a longer path or name. -I/path and -isystem/path
# begin one, as do file:///path and the \n/path of a string in a program.
BEFORE = (
    rb"(?:(?<=://)|(?<=-[A-Z])(?<![\w./-]-[A-Z])|(?<=-isystem)|(?<=\\[nt])"
    rb"|(?<![\w.+~@%/\x80-\xff-]))"
)
# ... and where it ends: neither /path2 nor /path-old, /path.old, /path%20old.
AFTER = rb"(?![\w+~@%\x80-\xff-]|\.\w)"

# #!/home/u/envs/llm/bin/python3.11 -I
DIRECT = re.compile(
    rb"\A#![ \t]*(?P<prefix>/\S*?)?/bin/(?P<name>[^\s/]+)(?P<rest>[ \t][^\r\n]*)?(?=\r?\n|\Z)"
)
# #!/usr/bin/env python
BY_PATH = re.compile(
    rb"\A#![ \t]*/usr/bin/env[ \t]+(?:-S[ \t]+)?(?P<name>python[\w.]*)(?P<rest>[ \t][^\r\n]*)?(?=\r?\n|\Z)"
)
# The form for interpreters whose path is too long for a shebang or has blanks in it:
#   #!/bin/sh
#   '''exec' "/a long path/bin/python3.11" "$0" "$@"
LONG = re.compile(
    rb"\A#!/bin/sh\r?\n'''exec' (?P<quote>[\"']?)(?P<prefix>/[^\"\r\n]*?)/bin/(?P<name>python[\w.]*)(?P=quote)"
    rb"(?P<rest>[^\r\n]*) \"\$0\" \"\$@\"[^\r\n]*(?:\r?\n(?:' '''\r?\n)?|\Z)"
)


class Edit(NamedTuple):
    """At the offset ``at`` of the file as it first was, ``now`` takes the place of ``was``."""

    at: int
    was: bytes
    now: bytes


class NoRoom(ValueError):
    """A binary has no room for the new prefix. longest: bytes of a prefix that fits there."""

    def __init__(self, longest: int) -> None:
        super().__init__(f"no room for a prefix longer than {longest} bytes")
        self.longest = longest


# ---- bytes ----------------------------------------------------------------------------------------


def apply(data: bytes, edits: Iterable[Edit]) -> bytes:
    """The data with the edits made. edits: in the order of their offsets."""
    parts, end = [], 0
    for edit in edits:
        parts += [data[end : edit.at], edit.now]
        end = edit.at + len(edit.was)
    return b"".join([*parts, data[end:]])


def interpreter_prefix(script: bytes) -> bytes | None:
    """The prefix whose Python runs the script.

    None for anything that is not a Python script; empty for one that takes the PATH's python.
    """
    if BY_PATH.match(script):
        return b""
    match = LONG.match(script) or DIRECT.match(script)
    if match is None or not match.group("name").startswith(b"python"):
        return None
    prefix: bytes | None = match.group("prefix")
    return None if prefix == b"/usr" else prefix


def shebang_edits(
    script: bytes, prefix: bytes, old: Iterable[bytes], programs: Iterable[bytes]
) -> list[Edit]:
    """The edit that has the interpreter of ``prefix`` run the script; none where that is no matter.

    It is one where a program below an ``old`` prefix ran it before, or the PATH's python.
    programs: names in the environment's bin.
    """
    match = BY_PATH.match(script) or LONG.match(script) or DIRECT.match(script)
    if match is None:
        return []
    if match.re is BY_PATH:
        if match.group("name") not in programs:
            return []
    elif match.group("prefix") not in old:
        return []
    name, rest = match.group("name"), (match.group("rest") or b"").rstrip()
    rest = apply(rest, text_edits(rest, prefix, old))
    line = b"#!" + prefix + b"/bin/" + name + rest
    if len(line) > SHEBANG_BYTES or re.search(rb"\s", prefix):
        if name.startswith(b"python"):
            path = re.sub(rb"([\"$`\\])", rb"\\\1", prefix) + b"/bin/" + name
            line = b"#!/bin/sh\n'''exec' \"" + path + b'"' + rest + b" \"$0\" \"$@\"\n' '''"
        else:
            line = b"#!/usr/bin/env " + (b"-S " if rest else b"") + name + rest
    if match.re is LONG:
        line += b"\n"
    return [Edit(0, match.group(0), line)]


@lru_cache(maxsize=None)  # noqa: UP033 - its short name came with 3.9
def as_url(path: bytes) -> bytes:
    """The path as an address spells it."""
    if SAME_IN_URL.fullmatch(path):
        return path
    from urllib.parse import quote_from_bytes  # slow to import, and seldom needed

    return quote_from_bytes(path).encode()


def path_pattern(
    prefix: bytes, old: Iterable[bytes], placeholder: bytes = b""
) -> re.Pattern[bytes]:
    """Matches paths of a text: those below an old prefix as a group, those below ``prefix`` as none.

    placeholder: what conda recorded; it counts wherever it stands, as conda has it.
    """
    paths = [
        re.escape(one) if one == prefix else b"(" + re.escape(one) + b")"
        for one in sorted({prefix, *spellings(old)}, key=len, reverse=True)
    ]
    pattern = BEFORE + b"(?:" + b"|".join(paths) + b")" + AFTER
    if placeholder:
        pattern += b"|(" + re.escape(placeholder) + b")"
    return re.compile(pattern)


def spellings(paths: Iterable[bytes]) -> list[bytes]:
    """The paths, also as addresses spell them."""
    return sorted({spelt for one in paths for spelt in (one, as_url(one))})


def text_edits(
    text: bytes, prefix: bytes, old: Iterable[bytes], placeholder: bytes = b"", begin: int = 0
) -> list[Edit]:
    """The edits that lead each whole path below an ``old`` prefix to ``prefix``, from ``begin`` on.

    Of nested prefixes the longest counts, so that what lies below ``prefix`` already stays.
    """
    here = [one for one in old if one in text or as_url(one) in text]
    if not here and not (placeholder and placeholder in text):
        return []
    edits = []
    for match in path_pattern(prefix, here, placeholder).finditer(text, begin):
        if match.lastindex:
            in_url = text[max(0, match.start() - 3) : match.start()] == b"://"
            now = as_url(prefix) if in_url else prefix
            edits.append(Edit(match.start(), match.group(0), now))
    return edits


def script_edits(
    script: bytes,
    prefix: bytes,
    old: Iterable[bytes],
    programs: Iterable[bytes],
    placeholder: bytes = b"",
) -> list[Edit]:
    """Those of a script's first line, and those of the text after it."""
    known = {*old, placeholder} - {b""}
    first = shebang_edits(script, prefix, known, programs)
    begin = len(first[0].was) if first else 0
    return first + text_edits(script, prefix, old, placeholder, begin)


def binary_edits(
    data: bytes, prefix: bytes, old: Iterable[bytes], placeholder: bytes
) -> list[Edit]:
    """The same for zero-terminated strings in a binary, without moving a byte of what follows.

    placeholder: the path that the binary was built with. By as many bytes as it was longer than the
    old prefix, conda padded each string with zeros when it put that in. Raises NoRoom.
    """
    here = [one for one in {*old, placeholder} if one and one in data]
    if not here:
        return []
    pattern = path_pattern(prefix, [one for one in here if one != placeholder], placeholder)
    edits: list[Edit] = []
    end = 0
    for start in sorted(
        match.start() for one in here for match in re.finditer(re.escape(one), data)
    ):
        if start < end:
            continue
        end = data.find(b"\0", start)
        if end < 0:
            break  # not a zero-terminated string
        string, cut, parts, room = data[start:end], start, [], 0
        for match in pattern.finditer(data, start, end):
            if match.lastindex:
                parts += [data[cut : match.start()], prefix]
                cut = match.end()
                room += max(0, len(placeholder) - len(match.group(0)))
        fresh = b"".join([*parts, data[cut:end]])
        growth = len(fresh) - len(string)
        if growth > 0:
            padding = len(data[end:]) - len(data[end:].lstrip(b"\0")) - 1
            if growth > min(padding, room):
                raise NoRoom(max(len(placeholder), *map(len, here)))
            edits.append(Edit(start, data[start : end + growth], fresh))
        elif fresh != string:
            edits.append(Edit(start, string, fresh + b"\0" * -growth))
    return edits


def record_edits(
    record: bytes, mended: Callable[[bytes], bytes | None], prefix: bytes, old: Iterable[bytes]
) -> list[Edit]:
    """The edits of a distribution's RECORD by which hash and size of rewritten files are right again.

    mended: from a path, as RECORD spells it, to the new bytes of a rewritten file; None for others.
    Lines are ``path,algorithm=hash,size`` (the packaging guide's "Recording installed projects").
    """
    edits, at = text_edits(record, prefix, old), 0
    for line in record.splitlines(keepends=True):
        path, _, noted = line.partition(b",")
        if line.startswith(b'"'):
            path, _, noted = line[1:].partition(b'",')
            path = path.replace(b'""', b'"')
        data = mended(path)
        match = re.match(rb"(\w+)=[\w=-]+,\d*", noted) if data is not None else None
        if match and data is not None:
            digest = hashlib.new(match.group(1).decode(), data).digest()
            value = urlsafe_b64encode(digest).rstrip(b"=")
            now = match.group(1) + b"=" + value + b",%d" % len(data)
            edits.append(Edit(at + len(line) - len(noted), match.group(0), now))
        at += len(line)
    return sorted(edits)


def declared_prefixes(settings: bytes, activate: bytes, history: bytes = b"") -> set[bytes]:
    """The prefixes that pyvenv.cfg, bin/activate and conda-meta/history name."""
    found = set()
    match = re.search(rb"(?m)^command\s*=.* -m venv (?:-\S+ )*(/[^\r\n]+?)\s*$", settings)
    if match:
        found.add(match.group(1))
    for match in re.finditer(rb"(?m)^\s*(?:export )?VIRTUAL_ENV=[\"']?(/[^\"'\r\n]+)", activate):
        found.add(match.group(1))
    for line in re.findall(rb"(?m)^# cmd: .*$", history):
        for match in re.finditer(rb" (?:-p|--prefix)[ =](/\S+)", line):
            found.add(match.group(1))
        base = re.match(rb"# cmd: (/\S+?)/(?:bin|condabin|lib/python\S+)/\S* ", line)
        name = re.search(rb" (?:-n|--name)[ =]([^\s/]+)", line)
        if base and name and b" create " in line:
            found.add(base.group(1) + b"/envs/" + name.group(1))
    return {one.rstrip(b"/") for one in found} - NOT_A_PREFIX


def built_prefixes(text: bytes) -> set[bytes]:
    """The prefix that build data names: .pc, Makefile and _sysconfigdata."""
    found = re.findall(rb"(?m)^prefix ?= ?(/\S+)[ \t]*$", text)
    found += re.findall(rb"['\"]prefix['\"]: ?['\"](/[^'\"\n]+)['\"]", text)
    return {one.rstrip(b"/") for one in found} - NOT_A_PREFIX


# ---- what the tree says of itself -----------------------------------------------------------------


class Kind(NamedTuple):
    """How a file is mended. placeholder: what conda recorded for it, or empty."""

    binary: bool = False
    script: bool = False
    placeholder: bytes = b""


KNOWN = re.compile(
    r"pyvenv\.cfg"
    r"|s?bin/[^/]+"
    r"|lib(?:64)?/python3[^/]*/(?:"
    r"site-packages/(?:[^/]+\.(?:pth|egg-link)|[^/]*editable[^/]*\.py|[^/]+\.dist-info/direct_url\.json)"
    r"|_sysconfigdata[^/]*\.py|config-[^/]*/(?:Makefile|python-config\.py))"
    r"|etc/conda/(?:de)?activate\.d/[^/]+"
)
"""Text files that name their prefix, wherever they come from, beside .pc and .la."""
KNOWN_FOLDER = re.compile(
    r"|s?bin/|lib(?:64)?/python3[^/]*/(?:site-packages/(?:[^/]+\.dist-info/)?|config-[^/]*/)?"
    r"|etc/conda/(?:de)?activate\.d/"
)
"""Where those files lie, for there are many folders where none does."""

CONDA_UNPACK = "bin/conda-unpack"
RECORD = re.compile(r"(?P<site>lib(?:64)?/python3[^/]*/site-packages/)[^/]+\.dist-info/RECORD")


def walk(root: str) -> tuple[dict[str, list[str]], list[str]]:
    """The regular files by folder ("lib/"), and the links; all are paths from the root."""
    files: dict[str, list[str]] = {}
    links: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        here = files[folder] = []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    here.append(folder + entry.name)
                elif entry.is_symlink():
                    links.append(folder + entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(folder + entry.name + "/")
    return files, links


def open_to_read(path: str, folder: int | None = None) -> int:
    """A file opened without a new time of access, which in a tree just unpacked would go to the disk."""
    try:
        return os.open(path, READ | os.O_NOATIME, dir_fd=folder)
    except PermissionError:  # the file's owner may do so, and root
        return os.open(path, READ, dir_fd=folder)


def read(path: str) -> bytes:
    """The file's bytes; none where there is no file. In as few system calls as can be: it is all the time."""
    try:
        file = open_to_read(path)
    except FileNotFoundError:
        return b""
    try:
        parts = [os.read(file, 1 << 16)]
        while len(parts[-1]) == 1 << 16 or (len(parts) > 1 and parts[-1]):
            parts.append(os.read(file, 1 << 24))
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(file)


class Search:
    """Which of the files below the root hold one of the names. It begins at once; ``found`` waits for it.

    Where the files are many, other processes read them while this one goes on, and helps them in
    ``found``. Each takes the next share as soon as it is ready with one, through one buffer for all files.
    """

    def __init__(self, root: str, paths: list[str], names: list[bytes]) -> None:
        self.names = names
        # A name may begin in one part of a file and end in the next.
        self.kept = max(map(len, names), default=1) - 1
        self.buffer = bytearray(self.kept + (1 << 17))
        self.root = os.open(root, READ)
        paths = paths if names else []
        size = len(paths) // 250 + 1
        self.shares = [paths[at : at + size] for at in range(0, len(paths), size)]
        self.turns, give = os.pipe()
        os.write(give, bytes(range(len(self.shares))))
        os.close(give)
        processes = min(SEARCHERS, len(paths) // 1000)
        self.helpers = [self._helper() for _ in range(processes - 1)]

    def _helper(self) -> tuple[int, int]:
        """A process of its own, and the pipe that it answers by."""
        answer, given = os.pipe()
        child = os.fork()
        if child:
            os.close(given)
            return child, answer
        status = 1
        try:
            with os.fdopen(given, "wb") as pipe:
                pipe.write(b"\0".join(map(os.fsencode, self._take_turns())))
            status = 0
        finally:
            os._exit(status)

    def found(self) -> set[str]:
        """The files; among them are those that could not be read, as whoever reads them next will see."""
        found = set(self._take_turns())
        whole = True
        for child, answer in self.helpers:
            with os.fdopen(answer, "rb") as pipe:
                found.update(map(os.fsdecode, filter(None, pipe.read().split(b"\0"))))
            whole = os.waitpid(child, 0)[1] == 0 and whole
        if not whole:
            found = {path for share in self.shares for path in self._look(share)}
        os.close(self.turns)
        os.close(self.root)
        return found

    def _take_turns(self) -> list[str]:
        found: list[str] = []
        while True:
            turn = os.read(self.turns, 1)
            if not turn:
                return found
            found += self._look(self.shares[turn[0]])

    def _look(self, paths: list[str]) -> list[str]:
        found = []
        whole = memoryview(self.buffer)
        parts, room, find = [whole], len(whole), self.buffer.find
        for path in paths:
            try:
                file = open_to_read(path, self.root)
            except OSError:
                found.append(path)
                continue
            try:
                size = os.readv(file, parts)
                while True:
                    for name in self.names:
                        if find(name, 0, size) >= 0:
                            found.append(path)
                            size = 0
                            break
                    if size < room:
                        break
                    whole[: self.kept] = whole[room - self.kept :]
                    size = self.kept + os.readv(file, [whole[self.kept :]])
            except OSError:
                found.append(path)
            finally:
                os.close(file)
        return found


def is_text(data: bytes) -> bool:
    """Whether it looks like a text file, by its beginning."""
    return b"\0" not in data[:8192]


def conda_records(root: str) -> Iterator[tuple[str, bytes, bool]]:
    """(file, the placeholder that it was built with, whether it is binary) from conda's own records."""
    folder = os.path.join(root, "conda-meta")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        data = read(os.path.join(folder, name)) if name.endswith(".json") else b""
        if b'"prefix_placeholder"' not in data:
            continue
        try:
            entries = json.loads(data)["paths_data"]["paths"]
        except (ValueError, KeyError, TypeError):
            continue
        for entry in entries:
            placeholder = entry.get("prefix_placeholder")
            if placeholder:
                yield entry["_path"], os.fsencode(placeholder), entry.get("file_mode") == "binary"


def conda_unpack_records(script: bytes) -> dict[tuple[str, str], list[str]]:
    """The files by (placeholder, "text" or "binary"), from the script that conda-pack leaves in its archives.

    It lists every text that conda does not manage, with the prefix where the archive was packed: tens of
    thousands of lines ``('path', 'placeholder', 'mode'),`` that end alike.
    """
    begin = script.find(b"\n_prefix_records = [\n")
    table = script[begin : script.find(b"\n]", begin)].decode(errors="replace")
    plain = '"' not in table and "\\" not in table
    ends: dict[str, list[str]] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for line in table.split("\n")[2:]:
        if plain or ('"' not in line and "\\" not in line):
            path, _, end = line.partition("', '")
            try:
                ends[end].append(path[2:])
            except KeyError:
                ends[end] = [path[2:]]
            continue
        import ast  # slow to import, and seldom needed

        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            path, placeholder, mode = ast.literal_eval(line.rstrip(","))
            found.setdefault((placeholder, mode), []).append(path)
    for end, paths in ends.items():
        placeholder, between, mode = end.rstrip("),'").partition("', '")
        if between:
            found.setdefault((placeholder, mode), []).extend(paths)
    return found


# ---- notes ----------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A file as it was mended.

    checksum: CRC-32 of its bytes. places: offset in the file as it is, what was there first (as
    Latin-1), length of what is there.
    """

    checksum: int
    places: list[tuple[int, str, int]]

    def first(self, data: bytes) -> bytes:
        """The file's first bytes, from those that it has now."""
        edits = [
            Edit(at, data[at : at + length], was.encode("latin-1"))
            for at, was, length in self.places
        ]
        return apply(data, edits)


class Notes(NamedTuple):
    """What was replaced where.

    prefixes: those that the tree had, and has. files: by path, how they were written; two ways while a
    move goes on, for it may be cut off. links: by path, where one led first and where it was led.
    """

    prefixes: list[str]
    files: dict[str, list[Written]]
    links: dict[str, tuple[str, str]]

    def first(self, path: str, data: bytes) -> bytes:
        """The first bytes of a file; of one that changed since it was mended, what it holds now."""
        ways = self.files.get(path)
        if ways:
            checksum = binascii.crc32(data)
            for way in ways:
                if way.checksum == checksum:
                    return way.first(data)
        return data


def load_notes(root: str) -> Notes:
    """The tree's notes; empty ones where there are none."""
    try:
        found = json.loads(read(os.path.join(root, NOTES)))
        files = {
            path: [Written(way[0], [(a, b, c) for a, b, c in way[1]]) for way in ways]
            for path, ways in found["files"].items()
        }
        links = {path: (was, now) for path, (was, now) in found["links"].items()}
        return Notes(list(found["prefixes"]), files, links)
    except (ValueError, KeyError, TypeError, IndexError):
        return Notes([], {}, {})


# ---- the move -------------------------------------------------------------------------------------


class Move:
    """One tree on its way to a prefix: ``stage`` writes everything beside, ``commit`` puts it in place."""

    def __init__(self, root: str, prefix: bytes) -> None:
        self.root = root
        self.prefix = prefix
        self.notes = load_notes(root)
        self.kinds: dict[str, Kind] = {}
        self.problems: list[str] = []
        self.staged: dict[str, list[str]] = {}  # path -> all its names
        self.inodes: set[tuple[int, int]] = set()
        self.names: dict[tuple[int, int], list[str]] = {}
        self.led: dict[str, str] = {}  # link -> where it shall lead
        self.after = Notes([], {}, {})
        self._cache: dict[str, bytes] = {}
        self._look_about()

    def place(self, path: str) -> str:
        """Where a file of the tree lies."""
        return f"{self.root}/{path}"

    def data(self, path: str) -> bytes:
        """A file's bytes, read once."""
        found = self._cache.pop(path, None)
        return read(self.place(path)) if found is None else found

    def first(self, path: str) -> bytes:
        """The first bytes of a file that will be read again."""
        data = self._cache[path] = self.data(path)
        return self.notes.first(path, data)

    def _look_about(self) -> None:
        """Find which files are to be mended, and every prefix that they may name but ``prefix``.

        The records come first, for what they list is searched by other processes while this one walks.
        """
        recorded = {path: (was, binary) for path, was, binary in conda_records(self.root)}
        packed = conda_unpack_records(self.first(CONDA_UNPACK))
        texts, found = [], {os.fsencode(one) for one in self.notes.prefixes}
        others: dict[str, Kind] = {}
        for (was, mode), paths in packed.items():
            own = [path for path in paths if path not in recorded]
            if own:
                found.add(os.fsencode(was))
            if mode == "binary":
                others.update((path, Kind(True, False, os.fsencode(was))) for path in own)
            else:
                texts += own
        settings = self.first("pyvenv.cfg")
        history = read(self.place("conda-meta/history"))
        found |= declared_prefixes(settings, self.first("bin/activate"), history)
        home = re.search(rb"(?m)^home\s*=\s*(/.*?)/bin\s*$", settings)
        never = NOT_A_PREFIX | {self.prefix} | ({home.group(1)} if home else set())
        known = found - never
        search = Search(self.root, texts, spellings(known))
        folders, self.links = walk(self.root)
        self.files = {path for paths in folders.values() for path in paths}
        programs = folders.get("bin/", []) + [
            path for path in self.links if path.startswith("bin/")
        ]
        self.programs = {os.fsencode(path[4:]) for path in programs}
        self.records = [f"{folder}RECORD" for folder in folders if folder.endswith(".dist-info/")]
        self._find_kinds(folders, recorded, others)
        found |= self._prefixes_within(recorded) - never
        candidates = search.found()
        if found - never - known:
            candidates |= Search(self.root, texts, spellings(found - never - known)).found()
        for path in candidates & self.files:
            if not path.endswith("/RECORD"):
                self.kinds.setdefault(path, Kind())
        self.old = sorted(found - never)

    def _find_kinds(
        self,
        folders: dict[str, list[str]],
        recorded: dict[str, tuple[bytes, bool]],
        others: dict[str, Kind],
    ) -> None:
        """What is mended wherever it comes from, what the notes name, what is recorded."""
        kinds = self.kinds
        for folder, paths in folders.items():
            likely = KNOWN_FOLDER.fullmatch(folder)
            for path in paths:
                if path.endswith((".pc", ".la")) or (likely and KNOWN.fullmatch(path)):
                    kinds[path] = Kind(script=path.startswith(("bin/", "sbin/")))
        for path in self.notes.files:
            if path in self.files and not path.endswith("/RECORD"):
                kinds.setdefault(path, Kind())
        for path, (placeholder, binary) in recorded.items():
            if path in self.files:
                script = not binary and path.startswith(("bin/", "sbin/"))
                kinds[path] = Kind(binary, script, placeholder)
        for path, kind in others.items():
            if path in self.files and not path.endswith("/RECORD"):
                kinds.setdefault(path, kind)

    def _prefixes_within(self, recorded: Mapping[str, tuple[bytes, bool]]) -> set[bytes]:
        """The prefixes that scripts run in and that recorded build data names.

        Not what conda puts a prefix in place of: in a conda-pack archive it still stands in recorded files.
        """
        found = set()
        for path, kind in self.kinds.items():
            if kind.script:
                data = self.first(path)
                match = LONG.match(data) or DIRECT.match(data)
                if match and match.group("name") in self.programs:
                    found.add(match.group("prefix") or b"")
            elif path in recorded and (
                path.endswith((".pc", "/Makefile")) or "_sysconfigdata" in path
            ):
                found |= built_prefixes(self.first(path))
        return found - {placeholder for placeholder, _ in recorded.values()}

    def edits(self, path: str, kind: Kind, first: bytes) -> list[Edit]:
        """How a file changes. Raises NoRoom."""
        if kind.binary:
            return binary_edits(first, self.prefix, self.old, kind.placeholder)
        if path == CONDA_UNPACK:  # the paths in it are records
            return shebang_edits(first, self.prefix, self.old, self.programs)
        if kind.script:
            edits = script_edits(first, self.prefix, self.old, self.programs, kind.placeholder)
        else:
            edits = text_edits(first, self.prefix, self.old, kind.placeholder)
        return edits if is_text(first) else []

    def stage(self) -> None:
        """Write beside its place whatever changes. What is refused is in ``problems`` afterwards."""
        self._remove_staged()
        for path in sorted(self.kinds):
            data = self.data(path)
            first = self.notes.first(path, data)
            try:
                edits = self.edits(path, self.kinds[path], first)
                if edits or first is not data:
                    self._stage(path, data, first, edits)
            except NoRoom as error:
                name = os.path.join(os.fsdecode(self.prefix), path)
                self.problems.append(f"{name} has {error}: choose a shorter prefix")
        if not self.problems:
            self._stage_records()
            self._stage_links()
            self.after.prefixes[:] = sorted(map(os.fsdecode, {*self.old, self.prefix}))

    def _stage(self, path: str, data: bytes, first: bytes, edits: list[Edit]) -> None:
        fresh = apply(first, edits)
        if edits:
            places, shift = [], 0
            for at, was, now in edits:
                places.append((at + shift, was.decode("latin-1"), len(now)))
                shift += len(now) - len(was)
            self.after.files[path] = [Written(binascii.crc32(fresh), places)]
        if fresh == data or self.problems:
            return
        status = os.stat(self.place(path))
        names = [path]
        if status.st_nlink > 1:
            inode = (status.st_dev, status.st_ino)
            if inode in self.inodes:
                self.after.files.pop(path, None)
                return  # another name of what is staged already
            self.inodes.add(inode)
            names = self._names(inode)
        self.staged[path] = names
        write_like(self.place(path), self.place(path) + FRESH, fresh, status)

    def _names(self, inode: tuple[int, int]) -> list[str]:
        """All names in the tree of a file that has several."""
        if not self.names:
            for path in self.files:
                status = os.lstat(self.place(path))
                if status.st_nlink > 1:
                    self.names.setdefault((status.st_dev, status.st_ino), []).append(path)
        return self.names[inode]

    def _stage_records(self) -> None:
        """RECORD notes each file of a distribution with its hash: those of the rewritten ones change."""
        rewritten = sorted(self.after.files)
        spelt: dict[str, dict[bytes, str]] = {}  # for each site-packages
        for record in self.records:
            match = RECORD.fullmatch(record)
            if match and record in self.files:
                site = match.group("site")
                if site not in spelt:
                    names = [(os.path.relpath(path, site), path) for path in rewritten]
                    spelt[site] = {os.fsencode(name): path for name, path in names}
                data = self.data(record)
                first = self.notes.first(record, data)

                def mended(path: bytes, own: dict[bytes, str] = spelt[site]) -> bytes | None:
                    return self._mended(own[path]) if path in own else None

                self._stage(record, data, first, record_edits(first, mended, self.prefix, self.old))

    def _mended(self, path: str) -> bytes:
        """A file's bytes as they will be."""
        return read(self.place(path) + (FRESH if path in self.staged else ""))

    def _stage_links(self) -> None:
        """A link into an old prefix leads to the same file of this tree, by a path from its own folder."""
        for path in self.links:
            leads = os.readlink(self.place(path))
            was, now = self.notes.links.get(path, (leads, leads))
            first = was if leads == now else leads
            wanted = first
            target = os.fsencode(first)
            for one in sorted([*self.old, self.prefix], key=len, reverse=True):
                if target == one or target.startswith(one + b"/"):
                    if one != self.prefix:
                        inside = os.fsdecode(target[len(one) + 1 :]) or "."
                        wanted = os.path.relpath(inside, os.path.dirname(path) or ".")
                        self.after.links[path] = (first, wanted)
                    break
            if wanted != leads:
                self.led[path] = wanted

    def commit(self) -> None:
        """Put everything in its place."""
        for path, names in self.staged.items():
            for name in names:
                if name != path:
                    os.link(self.place(path) + FRESH, self.place(name) + FRESH)
            for name in names:
                os.replace(self.place(name) + FRESH, self.place(name))
                if name.endswith(".py"):
                    drop_byte_code(self.place(name))
        for path, leads in self.led.items():
            status = os.lstat(self.place(path))
            os.symlink(leads, self.place(path) + FRESH)
            os.lchown(self.place(path) + FRESH, status.st_uid, status.st_gid)
            os.replace(self.place(path) + FRESH, self.place(path))
        self._write_notes(self.after)

    def note_ahead(self) -> None:
        """Note every file as it is and as it will be: a move may be cut off at any moment."""
        files = {path: list(ways) for path, ways in self.notes.files.items()}
        for path, ways in self.after.files.items():
            files[path] = files.get(path, []) + [
                way for way in ways if way not in files.get(path, [])
            ]
        prefixes = sorted({*self.notes.prefixes, *self.after.prefixes})
        self._write_notes(Notes(prefixes, files, {**self.notes.links, **self.after.links}))

    def _write_notes(self, notes: Notes) -> None:
        """Notes of nothing are none, so that a tree back at its first prefix is as it was."""
        path = self.place(NOTES)
        if notes.files or notes.links:
            data = (
                json.dumps(notes._asdict(), sort_keys=True, separators=(",", ":")).encode() + b"\n"
            )
            if data != read(path):
                with open(path + FRESH, "wb") as file:
                    file.write(data)
                os.replace(path + FRESH, path)
        elif os.path.lexists(path):
            os.unlink(path)

    def _remove_staged(self) -> None:
        """What a move that was cut off left beside."""
        staged = [path for path in self.files if path.endswith(FRESH)]
        staged += [path for path in self.links if path.endswith(FRESH)]
        for path in staged:
            os.unlink(self.place(path))
            self.kinds.pop(path, None)
            self.files.discard(path)
        if staged:
            self.links = [path for path in self.links if path not in staged]

    def discard(self) -> None:
        """Leave the tree as it was."""
        for path in self.staged:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.place(path) + FRESH)


def write_like(like: str, path: str, data: bytes, status: os.stat_result) -> None:
    """Write a new file with the owner, mode, times and extended attributes of another.

    status: of the file ``like``. Its time stays too: to make and to Python it is the same file.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(file, status.st_uid, status.st_gid)
        os.fchmod(file, stat.S_IMODE(status.st_mode))
        with contextlib.suppress(OSError):  # a file system may know none
            for name in os.listxattr(like):
                os.setxattr(file, name, os.getxattr(like, name))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(file)


def settle(folder: str) -> None:
    """Wait until the data of the folder's file system is on the disk; Python itself can sync all of them."""
    with contextlib.suppress(OSError):  # an older sync knows no -f, and some system has none
        if os.spawnlp(os.P_WAIT, "sync", "sync", "-f", folder) == 0:
            return
    os.sync()


def drop_byte_code(source: str) -> None:
    """Remove what Python compiled from a source that changed: with time and size the same, it would stay."""
    folder, name = os.path.split(source)
    stem = name[: -len(".py")]
    cache = os.path.join(folder, "__pycache__")
    names = os.listdir(cache) if os.path.isdir(cache) else []
    compiled = [os.path.join(cache, one) for one in names if one.startswith(stem + ".")]
    for path in [*compiled, source + "c"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def mend(root: str | os.PathLike[str], prefix: bytes) -> list[str]:
    """Mend the whole tree. Returns sentences about what was refused; then nothing has changed."""
    move = Move(os.fspath(root), prefix)
    try:
        move.stage()
    except BaseException:
        move.discard()
        raise
    if move.problems:
        move.discard()
        return move.problems
    move.note_ahead()
    if os.path.realpath(root) == os.path.realpath(os.fsdecode(prefix)):
        settle(move.root)  # in use: after a power cut each file shall be the old or the new one
    move.commit()
    return []


# ---- what stays -----------------------------------------------------------------------------------


def leftovers(root: str | os.PathLike[str], prefix: bytes) -> list[tuple[str, str]]:
    """What in the tree still names an old prefix, with the reason; reads every file."""
    move = Move(os.fspath(root), prefix)
    found = []
    for path in move.links:
        if any(one in os.fsencode(os.readlink(move.place(path))) for one in move.old):
            found.append((path, "a link that leads elsewhere"))
    for path in move.files:
        data = read(move.place(path))
        here = [one for one in move.old if one in data]
        if here and any(one in data.replace(prefix, b"") for one in here):
            found.append((path, why_it_stays(path, data, prefix, here)))
    return sorted(found)


def why_it_stays(path: str, data: bytes, prefix: bytes, old: list[bytes]) -> str:
    """Why a file that names an old prefix was not mended."""
    if path == NOTES:
        return "notes of what was mended"
    if path.startswith("conda-meta/") or path == CONDA_UNPACK:
        return "records of conda: what was installed, and how"
    if path.endswith(".pyc"):
        return "byte code: on import Python puts in the path that the file has now"
    if not is_text(data):
        return "a binary that conda did not record: there is no room for another path"
    if not text_edits(data, prefix, old):
        return "part of a longer path or name"
    return "data: neither its kind nor a record says that this is a path of the environment"


def main(words: list[str]) -> int:
    """Exit status 1, with sentences on standard error, when nothing could be mended."""
    root, prefix = words[0], os.fsencode(words[1])
    gc.disable()  # nothing here refers to itself, and there is much to look through
    listed = words[2:] == ["leftovers"]
    try:
        if listed:
            print(json.dumps(leftovers(root, prefix)))
            return 0
        problems = mend(root, prefix)
    except OSError as error:
        done = "read" if listed else "mended"
        problems = [f"{error.filename or root} cannot be {done}: {error.strerror}"]
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
