"""Reads a tar as strictly as it can be read, so that no other tar sees anything else in it.

Python's ``tarfile`` ends quietly at a broken header, and takes what GNU tar, which unpacks on the nodes, reads in
another way. Here that is an error. Decompressed by the very programs that the nodes use.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from roles.environment.members import Refused, shown

CHUNK = 1 << 20
LARGEST_HEADER = 1 << 20
"""Bytes of an extended header, which is read into memory."""

ENDINGS = {
    b"\x28\xb5\x2f\xfd": "tar.zst",
    b"\x1f\x8b": "tar.gz",
    b"BZh": "tar.bz2",
    b"\xfd7zXZ\x00": "tar.xz",
}
TOOLS = {"tar.zst": "zstd", "tar.gz": "gzip", "tar.bz2": "bzip2", "tar.xz": "xz"}
"""What unpacks it, here and on a node."""

PLAIN_KEYS = {"path", "linkpath", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname"}
HARMLESS = ("comment", "SCHILY.", "LIBARCHIVE.", "RHT.")
"""Keys of extended headers that every tar reads in the same way, and beginnings of those that change no file."""

SPARSE = "as a sparse file: pack without --sparse"
READ_DIFFERENTLY = "with a header that programs read differently: pack the environment again"

SIZE = re.compile(rb" *[0-7]*[ \0]*|\x80.*", re.DOTALL)
WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def ending_of(start: bytes) -> str:
    """tar, tar.gz, tar.bz2, tar.xz or tar.zst, by a file's first bytes."""
    return next((kind for magic, kind in ENDINGS.items() if start.startswith(magic)), "tar")


class Members:
    """The members of one archive, in order, each with its bytes at hand until the next is asked for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tar = tarfile.open(  # noqa: SIM115 - the stream is its owner's to close
            fileobj=stream,
            mode="r|",
            bufsize=CHUNK,
            tarinfo=_strict(),
            encoding="utf-8",
            errors="surrogateescape",
        )

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Raises Refused, and what ``tarfile`` raises for a damaged one."""
        while (member := self._tar.next()) is not None:
            self._tar.members = []  # type: ignore[attr-defined] # it would keep them all
            odd = [
                key
                for key in {**self._tar.pax_headers, **member.pax_headers}
                if key not in PLAIN_KEYS and not key.startswith(HARMLESS)
            ]
            if any(key.startswith("GNU.sparse") for key in odd):
                raise Refused(f"holds {shown(member.name)} {SPARSE}")
            if (
                odd
                or PLAIN_KEYS & set(self._tar.pax_headers)
                or (member.size and not member.isreg())
            ):
                raise Refused(f"holds {shown(member.name)} {READ_DIFFERENTLY}")
            yield member

    def start_of(self, member: tarfile.TarInfo, size: int) -> bytes:
        """The first bytes of the member that was given last; none of what is no file."""
        file = self._tar.extractfile(member) if member.isreg() else None
        return file.read(size) if file else b""

    def ends_of(self, member: tarfile.TarInfo, head: int, tail: int) -> tuple[bytes, bytes]:
        """The first and the last bytes of the file that was given last; no last ones where the first are all."""
        file = self._tar.extractfile(member)
        assert file is not None
        start, end = file.read(head), b""
        while chunk := file.read(CHUNK):
            end = (end + chunk)[-tail:]
        return start, end

    def digest_of(self, member: tarfile.TarInfo) -> bytes:
        """SHA-256 of the member that was given last."""
        digest = hashlib.sha256()
        file = self._tar.extractfile(member)
        while file and (chunk := file.read(CHUNK)):
            digest.update(chunk)
        return digest.digest()

    def end(self) -> None:
        """Read what follows the end mark, which must be nothing. Raises Refused."""
        file = self._tar.fileobj
        while chunk := file.read(CHUNK):
            if chunk.strip(b"\0"):
                raise Refused("goes on after the end of the tar: is it two archives in one file?")


def _strict() -> type[tarfile.TarInfo]:
    """A header that other programs read as ``tarfile`` does; its own class for each archive, for it has a memory."""
    before: list[bytes] = []  # kinds of the headers that belong to the next member

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
            is_end = len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0")
            try:
                found = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                if is_end and not before:
                    raise
                raise tarfile.ReadError(str(error)) from None
            kind = found.type
            if kind == tarfile.GNUTYPE_SPARSE:
                raise Refused(f"holds {shown(found.name)} {SPARSE}")
            if (
                not SIZE.fullmatch(buf[124:136])
                or (found.size and kind in WITHOUT_CONTENT)
                or (not buf[257:].startswith(b"ustar\0") and buf[345:500].strip(b"\0"))
            ):
                raise Refused(f"holds {shown(found.name)} {READ_DIFFERENTLY}")
            if kind in LONG_NAMES or kind in EXTENDED:
                mixed = kind in LONG_NAMES and any(one in EXTENDED for one in before)
                mixed |= kind in EXTENDED and any(one in LONG_NAMES for one in before)
                if kind in before or mixed or found.size > LARGEST_HEADER:
                    raise Refused(f"holds {shown(found.name)} {READ_DIFFERENTLY}")
                before.append(kind)
            else:
                before.clear()
            return found

    return Header


@contextmanager
def decompressed(path: Path, ending: str) -> Iterator[IO[bytes]]:
    """The tar's own bytes. Raises Refused where the program is missing or complains, OSError as reading does."""
    if ending not in TOOLS:
        with path.open("rb") as file:
            yield file
        return
    program = shutil.which(TOOLS[ending])
    if program is None:
        raise Refused(
            f"is compressed with {TOOLS[ending]}, which this machine lacks: install {TOOLS[ending]}"
        )
    with (
        path.open("rb") as file,
        subprocess.Popen(
            [program, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout and process.stderr
        early: tarfile.ReadError | None = None
        try:
            yield process.stdout
        except tarfile.ReadError as error:
            if process.stdout.read(1):
                process.kill()
                raise
            early = error  # of an archive that ends too early the program knows best why
        except BaseException:
            process.kill()
            raise
        complaint = process.stderr.read(4096).decode(errors="replace").strip()
    if process.returncode or complaint:
        last = complaint.splitlines()[-1] if complaint else f"exit status {process.returncode}"
        raise Refused(f"is damaged or cut short ({last})")
    if early:
        raise early
