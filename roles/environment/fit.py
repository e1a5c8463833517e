"""Which machine and which C library an environment needs, by its own programs, and whether a node has them.

Read from ELF files: the machine in their header, and the versions of glibc's symbols that they link to (section
.gnu.version_r), which is what the node's loader goes by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from tempfile import TemporaryFile
from typing import IO

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

HEAD, TAIL = 64 << 20, 1 << 20
"""Bytes that are read at the start and at the end of a file: there linkers put the tables that are read here."""

MOST = 1000
"""Entries of a version table that are read; a broken one may claim billions."""

MACHINES = {
    "EM_X86_64": "x86_64",
    "EM_AARCH64": "aarch64",
    "EM_PPC64": "ppc64le",
    "EM_S390": "s390x",
}
"""As ``uname -m`` names them."""

GLIBC = re.compile(rb"GLIBC_(\d{1,3}(?:\.\d{1,3}){1,2})")

OFFERED = re.compile(r"machine (?P<machine>\w+)\nglibc (?P<glibc>\d+(?:\.\d+)+)(?:\n|\Z)")

TELLING = re.compile(
    r"(?P<root>.*?)/?(?P<file>bin/(?P<program>python[0-9.]*)|lib/libpython[^/]*\.so[^/]*"
    r"|lib/python[0-9.]+/(?:lib-dynload/[^/]+\.so|site-packages/(?:torch|numpy|tokenizers|safetensors)/.*\.so[^/]*))"
)
"""What every training loads."""

COMPILED = re.compile(
    r"(?P<root>.*?)/?(?P<file>lib/python[0-9.]+/site-packages/(?P<path>.+\.so(\.[^/]*)?))"
)
"""What a distribution has compiled. It counts for those who import it: others may not have what it needs."""


@dataclass(frozen=True)
class Needs:
    """machine: as ``uname -m`` names it; None where the archive does not tell.

    glibc: the newest version that a file links to, as "2.28", and glibc_by: that file, below the environment's
    folder; empty where none does.
    """

    machine: str | None = None
    glibc: str = ""
    glibc_by: str = ""


PROBE = """
if ! read -r m 2>/dev/null </proc/sys/kernel/arch; then m=$(uname -m); fi
printf 'machine %s\\n' "$m"
g=$(getconf GNU_LIBC_VERSION) || exit 1
printf 'glibc %s\\n' "${g#glibc }"
"""
"""Prints what a node offers: ``machine NAME`` and ``glibc VERSION``. A node with another C library has failed the gate."""


@dataclass(frozen=True)
class Offer:
    """What a node has. machine: as ``uname -m`` names it; glibc: its version."""

    machine: str
    glibc: str


def offer(text: str) -> tuple[Offer, str]:
    """What PROBE printed at the start of a text, and the rest of it. Raises ValueError."""
    match = OFFERED.match(text)
    if match is None:
        raise ValueError("the answer does not tell the node's machine and glibc")
    return Offer(match["machine"], match["glibc"]), text[match.end() :]


def numbers(version: str) -> tuple[int, ...]:
    """A version of glibc, to compare."""
    return tuple(int(part) for part in version.split("."))


def is_telling(name: str) -> bool:
    """Whether a file of an archive says what its environment needs."""
    return bool(TELLING.fullmatch(name) or COMPILED.fullmatch(name))


def machine_of(file: IO[bytes]) -> str | None:
    """The machine that an ELF file is for; None for anything that is no ELF file."""
    try:
        name = str(ELFFile(file).header["e_machine"])
    except (ELFError, ConstructError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return MACHINES.get(name, name.removeprefix("EM_").lower())


def glibc_of(file: IO[bytes]) -> str:
    """The newest version of glibc's symbols that an ELF file links to; empty where it links to none."""
    try:
        found = list(_versions(file))
    except (ELFError, ConstructError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # a broken file is for the interpreter to refuse
    return max(found, key=numbers, default="")


def _versions(file: IO[bytes]) -> Iterator[str]:
    for section in islice(ELFFile(file).iter_sections(), MOST):
        if isinstance(section, GNUVerNeedSection):
            for _, versions in islice(section.iter_versions(), MOST):
                for version in islice(versions, MOST):
                    if match := GLIBC.fullmatch(version.name.encode()):
                        yield match[1].decode()


class Reading:
    """Gathers what the files of an archive need, while it is read. Several environments may be in it."""

    def __init__(self) -> None:
        self.programs: dict[str, str | None] = {}  # name of an interpreter -> its machine
        self._machines: dict[str, Counter[str]] = {}
        self._glibc: dict[tuple[str, str], tuple[str, str]] = {}  # by root and machine
        self._compiled: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}  # and by path

    def add(self, name: str, head: bytes, tail: bytes, size: int) -> None:
        """Take in a file that tells. head, tail: of its ``size`` bytes; the tail is empty where the head is all."""
        with _sparse(head, tail, size) as file:
            machine = machine_of(file)
            match = TELLING.fullmatch(name)
            if match and match["program"]:
                self.programs[name] = machine
            if machine is None:
                return
            told = match or COMPILED.fullmatch(name)
            assert told is not None
            root = told["root"]
            best, _ = self._glibc.get((root, machine), ("0", ""))
            newest = ""
            # To look for the name of a version is much faster than to read the tables of each file.
            named = {*GLIBC.findall(head), *GLIBC.findall(tail)}
            if any(numbers(one.decode()) > numbers(best) for one in named):
                newest = glibc_of(file)
        if newest and numbers(newest) > numbers(best):
            if match:
                self._glibc[root, machine] = newest, match["file"]
            else:
                self._compiled.setdefault((root, machine), {})[told["path"]] = newest, told["file"]
        if match:
            self._machines.setdefault(root, Counter())[machine] += 1

    def needs(self, root: str, interpreter: str) -> Needs:
        """What the environment at ``root`` needs. interpreter: its own one's name in the archive."""
        machines = self._machines.get(root, Counter())
        machine = self.programs.get(interpreter) or next(
            (name for name, _ in machines.most_common(1)), None
        )
        if machine is None:
            return Needs()
        return Needs(machine, *self._glibc.get((root, machine), ("", "")))

    def newer(self, root: str, needs: Needs) -> dict[str, Needs]:
        """Compiled files that need a newer glibc than that: path in site-packages to what they need."""
        machine = needs.machine or ""
        return {
            path: Needs(machine, *found)
            for path, found in self._compiled.get((root, machine), {}).items()
            if numbers(found[0]) > numbers(needs.glibc or "0")
        }


@contextmanager
def _sparse(head: bytes, tail: bytes, size: int) -> Iterator[IO[bytes]]:
    """A file of that size of which only its two ends are known."""
    if not tail:
        yield BytesIO(head)
        return
    with TemporaryFile() as file:
        file.write(head)
        file.seek(size - len(tail))
        file.write(tail)
        yield file


def newest(needs: Iterable[Needs]) -> Needs:
    """Of several on one machine, what covers all."""
    return max(needs, key=lambda one: numbers(one.glibc or "0"))


def misfit(needs: Needs, node: Offer) -> tuple[str, str, str] | None:
    """(id of the finding, what is wanted, what the node has) where the environment cannot run there."""
    if needs.machine and needs.machine != node.machine:
        return "environment-machine", needs.machine, node.machine
    if needs.glibc and numbers(node.glibc) < numbers(needs.glibc):
        wanted = f"glibc {needs.glibc} or newer, which {needs.glibc_by} needs"
        return "environment-glibc", wanted, f"glibc {node.glibc}"
    return None
