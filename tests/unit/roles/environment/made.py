"""Archives and ELF files made for tests: small, and wrong in exactly the way that a test wants."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Entry = tuple[str, str | bytes]  # name, and content, or "-> target", or "=> target of a hard link"
TarMode = Literal["w", "w:gz", "w:bz2", "w:xz"]

X86, ARM = 62, 183


def elf(glibc: Iterable[str] = (), machine: int = X86) -> bytes:
    """A 64-bit ELF file that needs these versions of glibc's symbols: two sections, no code."""
    names = b"\0libc.so.6\0"
    needs = b""
    versions = list(glibc)
    for number, version in enumerate(versions):
        after = 16 if number + 1 < len(versions) else 0
        needs += struct.pack("<IHHII", 0, 0, 2 + number, len(names), after)
        names += f"GLIBC_{version}".encode() + b"\0"
    table = struct.pack("<HHIII", 1, len(versions), 1, 16, 0) + needs
    sections = b"\0.dynstr\0.gnu.version_r\0"
    parts = [names, table, sections]
    places = [64 + sum(map(len, parts[:count])) for count in range(4)]
    headers = b"".join(
        struct.pack("<IIQQQQIIQQ", *row)
        for row in (
            (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
            (1, 3, 0, 0, places[0], len(names), 0, 0, 1, 0),
            (9, 0x6FFFFFFE, 0, 0, places[1], len(table), 1, 1, 4, 0),
            (9, 3, 0, 0, places[2], len(sections), 0, 0, 1, 0),
        )
    )
    ident = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    head = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, places[3], 0, 64, 0, 0, 64, 4, 3)
    return ident + head + b"".join(parts) + headers


VENV: list[Entry] = [
    ("bin/python", "-> python3"),
    ("bin/python3", "-> /usr/bin/python3.11"),
    ("bin/python3.11", "-> python3"),
    ("lib/python3.11/site-packages/x.py", "1"),
    ("pyvenv.cfg", "home = /usr/bin\n"),
]
CONDA: list[Entry] = [
    ("bin/python", "-> python3.10"),
    ("bin/python3.10", elf(["2.17"])),
    ("lib/python3.1", "-> python3.10"),
    ("lib/python3.10/site-packages/x.py", "1"),
    ("conda-meta/history", ""),
]


def add(tar: tarfile.TarFile, name: str, content: str | bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    text = content.encode() if isinstance(content, str) else content
    if text.startswith(b"-> "):
        member.type, member.linkname = tarfile.SYMTYPE, text[3:].decode()
        tar.addfile(member)
    elif text.startswith(b"=> "):
        member.type, member.linkname = tarfile.LNKTYPE, text[3:].decode()
        tar.addfile(member)
    else:
        member.size, member.mode = len(text), 0o755
        tar.addfile(member, io.BytesIO(text))


def pack(path: Path, entries: Iterable[Entry], mode: TarMode = "w") -> Path:
    """A tar of the entries."""
    with tarfile.open(path, mode) as tar:
        for name, content in entries:
            add(tar, name, content)
    return path


def below(folder: str, entries: Iterable[Entry]) -> list[Entry]:
    """The entries in a folder."""
    return [(f"{folder}/{name}", content) for name, content in entries]


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by path from the root."""
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }
