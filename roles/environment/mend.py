"""Makes an environment that was copied or unpacked belong to the prefix where it lives from now on.

Sent to the nodes as text and run by the environment's own interpreter before anything of it is
usable, so: the standard library alone, from Python 3.8 on. It may run any number of times; a file
is written only when it changes. The functions below ``bytes -> bytes`` know no files.

    python mend.py ROOT PREFIX    mend the tree at ROOT so that it works when it lies at PREFIX
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path

VERSION = 1
"""Raised when the mender learns something, so that environments mended before are mended again."""

NOT_A_PREFIX = {b"", b"/usr", b"/usr/local"}

# Where a path may begin and end in a text: not in the middle of a longer path or name.
BEFORE = rb"(?:(?<=://)|(?<=-[IL])|(?<![\w./~-]))"
AFTER = rb"(?![\w-]|\.\w)"

# #!/home/u/envs/llm/bin/python3.11 -I
DIRECT = re.compile(
    rb"\A#![ \t]*(?P<prefix>/[^\s]*?)?/bin/(?P<name>python[\w.]*)(?P<rest>[ \t][^\r\n]*)?(?=\r?\n|\Z)"
)
# #!/usr/bin/env python
BY_PATH = re.compile(
    rb"\A#![ \t]*/usr/bin/env[ \t]+(?:-S[ \t]+)?(?P<name>python[\w.]*)(?P<rest>[ \t][^\r\n]*)?(?=\r?\n|\Z)"
)
# The form for interpreters whose path is too long for a shebang or has blanks in it:
#   #!/bin/sh
#   '''exec' "/a long path/bin/python3.11" "$0" "$@"
LONG = re.compile(
    rb"\A#!/bin/sh\r?\n'''exec' (?P<quote>[\"']?)(?P<prefix>/[^\"'\r\n]*?)/bin/(?P<name>python[\w.]*)(?P=quote)"
    rb"(?P<rest>[^\r\n]*) \"\$0\" \"\$@\"[^\r\n]*(?:\r?\n(?:' '''\r?\n)?|\Z)"
)
SHEBANG_BYTES = 127
"""Older kernels cut a shebang after these."""


def interpreter_prefix(script: bytes) -> bytes | None:
    """The prefix whose interpreter runs the script.

    None for anything that is not a Python script; empty for one that takes the PATH's python.
    """
    match = LONG.match(script) or DIRECT.match(script)
    if match:
        prefix = match.group("prefix") or b""
        return None if prefix in (b"/usr", b"") else prefix
    return b"" if BY_PATH.match(script) else None


def mend_shebang(script: bytes, prefix: bytes, old: set[bytes]) -> bytes:
    """The script run by the interpreter of ``prefix``, if one of the ``old`` prefixes ran it before."""
    match = LONG.match(script) or DIRECT.match(script) or BY_PATH.match(script)
    if match is None:
        return script
    was = match.groupdict().get("prefix")
    if match.re is not BY_PATH and was not in old:
        return script
    interpreter = prefix + b"/bin/" + match.group("name")
    rest = (match.group("rest") or b"").rstrip()
    line = b"#!" + interpreter + rest
    body = script[match.end() :]
    if match.re is LONG:
        body = b"\n" + body
    if len(line) <= SHEBANG_BYTES and b" " not in prefix:
        return line + body
    long = b"#!/bin/sh\n'''exec' \"" + interpreter + b'"' + rest + b" \"$0\" \"$@\"\n' '''"
    return long + body


def mend_text(text: bytes, prefix: bytes, old: set[bytes]) -> bytes:
    """The text with each whole path below an ``old`` prefix led to ``prefix``.

    A path that already lies below ``prefix`` stays, even where an old prefix is a parent of it.
    """
    if not old:
        return text
    longest_first = sorted(old, key=len, reverse=True)
    pattern = (
        BEFORE
        + b"(?:"
        + re.escape(prefix)
        + b"|("
        + b"|".join(map(re.escape, longest_first))
        + b"))"
        + AFTER
    )
    return re.sub(pattern, lambda match: prefix if match.group(1) else match.group(0), text)


def mend_binary(data: bytes, prefix: bytes, old: bytes, room: int) -> bytes:
    """The same for zero-terminated strings in a binary, without moving a byte of what follows.

    room: by how many zero bytes each path was already padded when the package was installed.
    Raises ValueError when a string has no room for the new prefix.
    """

    def replaced(match: re.Match[bytes]) -> bytes:
        whole = match.group(0)
        string = whole.rstrip(b"\0")
        fresh = string.replace(old, prefix)
        spare = min(len(whole) - len(string) - 1, room * string.count(old))
        if len(fresh) > len(string) + spare:
            raise ValueError(f"no room for a prefix longer than {len(old) + room} bytes")
        return fresh + b"\0" * (len(whole) - len(fresh))

    return re.sub(re.escape(old) + b"(?=[/:;\\0])[^\\0]*\\0+", replaced, data)


def declared_prefixes(settings: bytes, activate: bytes) -> set[bytes]:
    """The prefixes that pyvenv.cfg and bin/activate name."""
    found = set()
    match = re.search(rb"(?m)^command\s*=.* -m venv (?:-\S+ )*(/[^\r\n]+?)\s*$", settings)
    if match:
        found.add(match.group(1))
    for match in re.finditer(rb"(?m)^\s*(?:export )?VIRTUAL_ENV=[\"']?(/[^\"'\r\n]+)", activate):
        found.add(match.group(1))
    return {one.rstrip(b"/") for one in found} - NOT_A_PREFIX


# ---- files ----------------------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """The file's bytes; none where there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def write(path: Path, data: bytes) -> None:
    """Replace the file at once; its mode stays."""
    fresh = path.with_name(path.name + ".lockstep-new")
    fresh.write_bytes(data)
    fresh.chmod(stat.S_IMODE(path.stat().st_mode))
    fresh.replace(path)


def files_of(folder: Path) -> list[Path]:
    """The regular files in a folder, links left out."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())


def is_text(data: bytes) -> bool:
    """Whether it looks like a text file, by its beginning."""
    return b"\0" not in data[:8192]


def texts(root: Path) -> list[Path]:
    """Files of the environment that may name its prefix in text."""
    found = files_of(root / "bin") + [root / "pyvenv.cfg"]
    for site in root.glob("lib/python3*/site-packages"):
        if not site.parent.is_symlink():
            found += [
                path
                for path in files_of(site)
                if path.suffix in (".pth", ".egg-link") or path.name.startswith("__editable__")
            ]
    return [path for path in found if path.is_file()]


def conda_records(root: Path) -> list[tuple[Path, bytes, bool]]:
    """(file, the placeholder that it was built with, whether it is binary) from conda's own records."""
    found = []
    for record in files_of(root / "conda-meta"):
        if record.suffix != ".json":
            continue
        try:
            paths = json.loads(record.read_text())["paths_data"]["paths"]
        except (ValueError, KeyError, TypeError):
            continue
        for entry in paths:
            if entry.get("prefix_placeholder"):
                binary = entry.get("file_mode") == "binary"
                found.append(
                    (root / entry["_path"], os.fsencode(entry["prefix_placeholder"]), binary)
                )
    return found


def mend(root: Path, prefix: bytes) -> list[str]:
    """Mend the whole tree. Returns sentences about what could not be mended."""
    scripts = {path: read(path) for path in texts(root)}
    settings = read(root / "pyvenv.cfg")
    old = {interpreter_prefix(data) or b"" for data in scripts.values()}
    old |= declared_prefixes(settings, read(root / "bin" / "activate"))
    home = re.search(rb"(?m)^home\s*=\s*(/.*?)/bin\s*$", settings)
    old -= NOT_A_PREFIX | {prefix} | ({home.group(1)} if home else set())

    for path, data in scripts.items():
        if is_text(data):
            own = mend_shebang(data, prefix, old) if path.parent.name == "bin" else data
            update(path, data, mend_text(own, prefix, old))
    for link in (root / "bin").iterdir():
        if link.is_symlink():
            mend_link(link, old)

    problems = []
    for path, placeholder, binary in conda_records(root):
        if path.is_symlink() or not path.is_file():
            continue
        data = fresh = read(path)
        if binary:
            try:
                for one in old | {placeholder}:
                    fresh = mend_binary(fresh, prefix, one, max(0, len(placeholder) - len(one)))
            except ValueError as error:
                problems.append(f"{path} has {error}: choose a shorter prefix")
                continue
        else:
            fresh = mend_text(data, prefix, old | {placeholder})
        update(path, data, fresh)
    return problems


def update(path: Path, data: bytes, fresh: bytes) -> None:
    """Write the file only when it changes."""
    if fresh != data:
        write(path, fresh)


def mend_link(link: Path, old: set[bytes]) -> None:
    """A link in bin that leads into an old prefix leads to the same file of this tree."""
    leads = os.fsencode(os.readlink(link))  # noqa: PTH115 - Path.readlink came with 3.9
    for one in old:
        if leads.startswith(one + b"/"):
            inside = os.path.relpath(os.fsdecode(leads[len(one) + 1 :]), "bin")
            fresh = link.with_name(link.name + ".lockstep-new")
            fresh.symlink_to(inside)
            fresh.replace(link)


if __name__ == "__main__":
    wrong = mend(Path(sys.argv[1]), os.fsencode(sys.argv[2]))
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        sys.exit(1)
