"""Archives that would harm a node, or are no environment: each refused in one sentence, before it travels."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from roles.environment import archive, members, tar
from roles.environment.archive import ArchiveProblem, describe, read, recalled, remember
from roles.environment.converge import unpack_options
from roles.environment.fit import Needs
from tests.unit.roles.environment.made import ARM, CONDA, VENV, Entry, add, below, elf, pack

Maker = Callable[[Path], Path | None]
"""Writes the archive at a path; may return another path, which is the archive then."""


def entries(*more: Entry) -> Maker:
    return lambda path: pack(path, [*CONDA, *more])


def member(
    change: Callable[[tarfile.TarInfo], None], content: bytes = b"", base: Iterable[Entry] = CONDA
) -> Maker:
    """An environment with one more member, changed."""

    def make(path: Path) -> None:
        pack(path, base)
        with tarfile.open(path, "a") as out:
            odd = tarfile.TarInfo("lib/odd")
            odd.size = len(content)
            change(odd)
            out.addfile(odd, io.BytesIO(content))

    return make


def _folder_x(odd: tarfile.TarInfo) -> None:
    odd.name, odd.type = "lib/x", tarfile.DIRTYPE


def kind(letter: bytes) -> Maker:
    return member(lambda odd: setattr(odd, "type", letter))


def pax(**keys: str) -> Maker:
    return member(
        lambda odd: setattr(odd, "pax_headers", {k.replace("__", "."): v for k, v in keys.items()})
    )


def header(start: int, value: bytes) -> Maker:
    """A conda environment whose last header has other bytes at a place, with a right checksum."""

    def make(path: Path) -> None:
        pack(path, [*CONDA, ("lib/odd", "x" * 10)])
        data = bytearray(path.read_bytes())
        at = data.rindex(b"lib/odd\0")
        data[at + start : at + start + len(value)] = value
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)

    return make


def changed(
    change: Callable[[bytes], bytes],
) -> Maker:
    """A conda environment's archive whose bytes are changed afterwards."""

    def made(path: Path) -> None:
        pack(path, CONDA)
        path.write_bytes(change(path.read_bytes()))

    return made


def holding(data: bytes) -> Maker:
    """A file that holds just this."""

    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def end_of(data: bytes) -> int:
    """Where the last member of a tar ends."""
    return len(data.rstrip(b"\0")) // 512 * 512 + 512


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def raw_headers(*blocks: tarfile.TarInfo) -> Maker:
    """Headers one after another, as no tar writes them, then a conda environment."""

    def make(path: Path) -> None:
        pack(path, CONDA)
        start = b"".join(block.tobuf(tarfile.GNU_FORMAT) for block in blocks)
        path.write_bytes(start + path.read_bytes())

    return make


def info(name: str, letter: bytes, size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size = letter, size
    return made


def long_name_in_extended(path: Path) -> None:
    """A path in a pax header, and another in a long name: programs differ in which of them counts."""
    pack(path, CONDA)
    extended = tarfile.TarInfo("lib/a")
    extended.pax_headers = {"path": "lib/b"}
    block = extended.tobuf(tarfile.PAX_FORMAT)
    name = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, 6).tobuf(tarfile.GNU_FORMAT)
    text = b"lib/c\0".ljust(512, b"\0")
    assert len(block) == 3 * 512
    path.write_bytes(block[:-512] + name + text + block[-512:] + path.read_bytes())


def sparse_by_program(path: Path) -> None:
    folder = path.parent / "sparse"
    (folder / "lib").mkdir(parents=True)
    with (folder / "lib/hole").open("wb") as file:
        file.truncate(1 << 40)
    subprocess.run(["tar", "-cSf", str(path), "-C", str(folder), "."], check=True)


def huge(path: Path) -> None:
    """A header that declares eight exabytes."""
    big = info("lib/big", tarfile.REGTYPE, 1 << 62)
    path.write_bytes(big.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(packer: Callable[[bytes], bytes]) -> Maker:
    """80 MiB that shrink to next to nothing."""

    def make(path: Path) -> None:
        pack(path, [*CONDA, ("lib/zeros", b"\0" * (80 << 20))])
        path.write_bytes(packer(path.read_bytes()))

    return make


CUT = r"is damaged or cut short"
DIFFERENTLY = r"with a header that programs read differently: pack the environment again"
OUTSIDE = r"outside of the environment: put the file itself in its place, and pack again"
NO_TAR = r"is no tar archive of an environment"

HOSTILE: dict[str, tuple[Maker, str]] = {
    # names
    "an absolute path": (entries(("/etc/cron.d/x", "x")), "holds /etc/cron.d/x, an absolute path"),
    "a path upwards": (entries(("../../etc/x", "x")), "holds ../../etc/x, which leads out"),
    "a path upwards in its middle": (entries(("lib/../../x", "x")), "holds lib/../../x, which"),
    "only upwards": (entries(("..", "x")), "holds .., which leads out"),
    "a line break in a name": (entries(("lib/a\nb", "x")), "name with control characters"),
    "an escape sequence in a name": (entries(("lib/\x1b[2J", "x")), "name with control characters"),
    "a delete in a name": (entries(("lib/\x7f", "x")), "name with control characters"),
    "a name that is no UTF-8": (header(0, b"lib/\xff\xfe\0"), "a name that is no UTF-8"),
    "a part of a name too long": (entries(("lib/" + "a" * 256, "x")), "longer than a file system"),
    "a name too long": (entries(("lib/" + "ab/" * 1100 + "x", "x")), "longer than a file system"),
    "an empty name": (header(0, b"\0" * 100), "a name with control characters"),
    "a zero byte in a name": (pax(path="lib/a\0b"), "a name with control characters"),
    # links
    "a link to a file of the system": (
        entries(("bin/torchrun", "-> /etc/shadow")),
        f"holds bin/torchrun, a link to /etc/shadow {OUTSIDE}",
    ),
    "a link upwards": (entries(("lib/x", "-> ../../x")), f"a link to ../../x {OUTSIDE}"),
    "a link to the folder above": (entries(("up", "-> ..")), OUTSIDE),
    "a link upwards through another link": (
        entries(("a/b/c/l", "-> ../../.."), ("m", "-> a/b/c/l/../x")),
        f"holds m, a link to a/b/c/l/../x {OUTSIDE}",
    ),
    "links in a circle": (entries(("a", "-> b"), ("b", "-> a")), OUTSIDE),
    "an interpreter by name alone": (entries(("bin/python3", "-> /bin/sh")), OUTSIDE),
    "an interpreter in another folder": (entries(("lib/python", "-> /usr/bin/python3")), OUTSIDE),
    "a link to a device": (entries(("lib/x", "-> /dev/sda")), OUTSIDE),
    "a link to where the system's like file is": (
        entries(("passwd", "x"), ("lib/x", "-> /etc/passwd")),
        OUTSIDE,
    ),
    "a link and a file through it": (
        entries(("lib/l", "-> ../bin"), ("lib/l/x", "x")),
        "holds lib/l as a link, and files below it",
    ),
    "a file and a link over its folder": (
        entries(("lib/l/x", "x"), ("lib/l", "-> ../bin")),
        "holds lib/l as a link, and files below it",
    ),
    "a file with files below it": (
        entries(("a", "x"), ("a/b/c", "x")),
        "holds a as a file, and files",
    ),
    "a hard link to the system": (entries(("lib/x", "=> /etc/shadow")), "/etc/shadow, an absolute"),
    "a hard link upwards": (entries(("lib/x", "=> ../x")), r"holds \.\./x, which leads out"),
    "a hard link to nothing": (
        entries(("lib/x", "=> lib/y")),
        "hard link to lib/y, which is no file",
    ),
    "a hard link to a link": (
        entries(("lib/y", "-> x"), ("lib/x", "=> lib/y")),
        "hard link to lib/y, which is no file",
    ),
    "a hard link to what is not unpacked": (
        lambda path: pack(path, [("other", "x"), *below("llm", CONDA), ("llm/x", "=> other")]),
        "holds llm/x, a hard link to other outside of the environment",
    ),
    # kinds
    "a character device": (kind(tarfile.CHRTYPE), "holds lib/odd, which is a device"),
    "a block device": (kind(tarfile.BLKTYPE), "holds lib/odd, which is a device"),
    "a pipe in it": (kind(tarfile.FIFOTYPE), "holds lib/odd, which is a pipe"),
    "a contiguous file": (kind(tarfile.CONTTYPE), "holds lib/odd, which is of the odd kind"),
    "a volume's label": (kind(b"V"), "holds lib/odd, which is of the odd kind"),
    "a folder of a dump": (kind(b"D"), "holds lib/odd, which is of the odd kind"),
    "a sparse file of a terabyte": (sparse_by_program, "as a sparse file: pack without --sparse"),
    "a sparse file by its keys": (pax(GNU__sparse__size="10"), "as a sparse file"),
    "a file twice": (entries(("bin/python3.10", elf())), "holds bin/python3.10 twice"),
    "a file twice, spelt otherwise": (
        entries(("./lib//x", ""), ("lib/x", "")),
        "holds lib/x twice",
    ),
    "a file and then a folder": (
        member(_folder_x, base=[*CONDA, ("lib/x", "")]),
        "holds lib/x twice",
    ),
    "two spellings of its folder": (
        lambda path: pack(path, [*below("./llm", CONDA), ("llm/x", "")]),
        "spells the same folder in two ways, ./llm and llm/x",
    ),
    # headers that programs read in different ways
    "a path and a long name": (long_name_in_extended, DIFFERENTLY),
    "an old header with a second half of a name": (
        header(257, b"ustar  \0" + b"\0" * 80 + b"etc\0"),
        DIFFERENTLY,
    ),
    "a size that only Python reads": (header(124, b"0o12\0"), DIFFERENTLY),
    "a size below zero": (header(124, b"\xff" * 12), DIFFERENTLY),
    "a link with content": (header(156, b"2bin\0"), DIFFERENTLY),
    "an unknown key": (pax(GNU__volume__label="x"), DIFFERENTLY),
    "another set of characters": (pax(hdrcharset="BINARY"), DIFFERENTLY),
    "an extended header of a gigabyte": (
        raw_headers(info("x", tarfile.XHDTYPE, 1 << 30)),
        DIFFERENTLY,
    ),
    "a long name of a long name": (
        raw_headers(info("x", tarfile.GNUTYPE_LONGNAME), info("x", tarfile.GNUTYPE_LONGNAME)),
        DIFFERENTLY,
    ),
    # bytes
    "a header changed": (
        changed(lambda data: data.replace(b"lib/python3.1\0", b"lib/pythonx.1\0")),
        CUT,
    ),
    "cut in a file": (changed(lambda data: data[: data.index(b"\x7fELF") + 100]), CUT),
    "cut in a header": (changed(lambda data: data[: data.index(b"conda-meta") + 100]), CUT),
    "cut between two files": (changed(lambda data: data[: data.index(b"conda-meta")]), CUT),
    "cut in gz": (changed(lambda data: gzip.compress(data)[:-100]), CUT),
    "cut in bz2": (changed(lambda data: bz2.compress(data)[:-20]), CUT),
    "cut in xz": (changed(lambda data: lzma.compress(data)[:-20]), CUT),
    "cut in zst": (changed(lambda data: zstd(data)[:-20]), CUT),
    "a wrong checksum in gz": (
        changed(lambda data: gzip.compress(data)[:-8] + b"\1\2\3\4" + gzip.compress(data)[-4:]),
        CUT,
    ),
    "rubbish after gz": (changed(lambda data: gzip.compress(data) + b"rubbish"), CUT),
    "rubbish after bz2": (changed(lambda data: bz2.compress(data) + b"rubbish"), CUT),
    "rubbish after xz": (changed(lambda data: lzma.compress(data) + b"rubbish"), CUT),
    "rubbish after zst": (changed(lambda data: zstd(data) + b"rubbish"), CUT),
    "rubbish after tar": (
        changed(lambda data: data + b"rubbish"),
        "goes on after the end of the tar: is it two archives in one file?",
    ),
    "two archives in one file": (
        changed(lambda data: data + data),
        "goes on after the end of the tar",
    ),
    "two archives in one gz": (
        changed(lambda data: gzip.compress(data) + gzip.compress(data)),
        "goes on after the end of the tar",
    ),
    "a file behind a lone block of zeros": (
        changed(lambda data: data[: end_of(data)] + b"\0" * 512 + data),
        "goes on after the end of the tar",
    ),
    "a bomb in gz": (
        zeros(gzip.compress),
        r"holds 80 MiB up to lib/zeros, over 100 times its own size",
    ),
    "a bomb in bz2": (zeros(bz2.compress), "over 100 times its own size"),
    "a bomb in zst": (zeros(zstd), "over 100 times its own size"),
    "a bomb by what it declares": (huge, "over 100 times its own size"),
    # no environment
    "empty": (holding(b""), NO_TAR),
    "nothing but zeros": (
        holding(b"\0" * 10240),
        "there is no bin/python",
    ),
    "a text": (holding(b"hello\n" * 500), NO_TAR),
    "a zip": (
        lambda path: Path(
            shutil.make_archive(str(path), "zip", Path(__file__).parent / "recorded")
        ),
        NO_TAR,
    ),
    "compressed twice": (changed(lambda data: gzip.compress(gzip.compress(data))), NO_TAR),
    "an archive in an archive": (
        lambda path: pack(path, [("llm.tar", pack(path, CONDA).read_bytes())]),
        "holds no Python environment: there is no bin/python in it",
    ),
    "a folder": (directory, "is not a file"),
    "a pipe": (pipe, "is not a file"),
    "nothing": (lambda path: None, "there is no archive"),
    "no Python": (lambda path: pack(path, [("README", "x")]), "there is no bin/python in it"),
    "an interpreter that is a script": (
        lambda path: pack(path, [("bin/python", "#!/bin/sh\n"), *CONDA[3:]]),
        "holds bin/python, which is no Python interpreter for Linux",
    ),
    "an interpreter for another system": (
        lambda path: pack(path, [("bin/python", b"\xcf\xfa\xed\xfe" + b"\0" * 99), *CONDA[3:]]),
        "holds bin/python, which is no Python interpreter for Linux",
    ),
    "an interpreter that is not there": (
        lambda path: pack(path, [CONDA[0], *CONDA[3:]]),
        "holds bin/python3.10, which is no Python interpreter",
    ),
    "two environments": (
        lambda path: pack(path, below("a", CONDA) + below("b", CONDA)),
        r"holds several environments \(a, b\): pack one alone",
    ),
}


def test_there_are_sixty_at_least() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_sentence_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setattr(archive, "state_directory", lambda: state)
    make, sentence = HOSTILE[name]
    path = tmp_path / "llm.tar"
    path = make(path) or path
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveProblem, match=sentence) as refused:
        describe(path)
    said = str(refused.value)
    assert said.isprintable() and said.isascii() and len(said) < 400
    assert str(path) in said
    assert sorted(tmp_path.rglob("*")) == before


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MOST_MEMBERS", 5)
    with pytest.raises(ArchiveProblem, match="holds more than 5 files, which no environment has"):
        read(pack(tmp_path / "a.tar", [*CONDA, ("x", "")]))


def test_an_archive_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "a.tar", CONDA)

    def slow(self: tar.Members) -> None:
        pack(path, VENV)

    monkeypatch.setattr(tar.Members, "end", slow)
    with pytest.raises(ArchiveProblem, match="changed while it was read"):
        read(path)


def test_one_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "a.tar", CONDA)

    def denied(self: Path, *args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArchiveProblem, match=r"a\.tar cannot be read \(Permission denied\)"):
        read(path)


HARMLESS: list[Entry] = [
    ("lib/ünïcode 文", "x"),
    ("lib/a b", "x"),
    ("lib/inner", "-> ../bin/python"),
    ("lib/deep/er", "-> ../../conda-meta"),
    ("lib/dangling", "-> nothing"),
    ("lib/python3.11/site-packages/x/y", "-> ../../../../bin"),
    ("lib/old", "-> /home/liu/llm/bin/python3.10"),
    ("lib/hard", "=> bin/python3.10"),
    ("self", "-> ."),
]


@pytest.mark.parametrize("folder", ["", "llm", "./llm"])
def test_what_environments_have_is_not_refused(tmp_path: Path, folder: str) -> None:
    whole = [*CONDA, *HARMLESS]
    if folder:
        whole = [
            (a, b.replace("=> ", f"=> {folder}/") if isinstance(b, str) else b) for a, b in whole
        ]
        whole = below(folder, whole)
    assert read(pack(tmp_path / "a.tar", whole)).entries == len(CONDA) + len(HARMLESS)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_format_of_tar_is_read(tmp_path: Path, format: int) -> None:
    long = "lib/" + "/".join(["part" * 20] * (1 if format == tarfile.USTAR_FORMAT else 4)) + "/name"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as out:
        for name, content in [*CONDA, (long, "x")]:
            add(out, name, content)
    assert read(tmp_path / "a.tar").entries == len(CONDA) + 1


@pytest.mark.parametrize("options", [[], ["--format=posix"], ["--format=ustar"], ["--format=v7"]])
def test_what_gnu_tar_packs_is_read(tmp_path: Path, options: list[str]) -> None:
    with tarfile.open(pack(tmp_path / "a.tar", below("llm", CONDA))) as packed:
        packed.extractall(tmp_path)
    made = tmp_path / "b.tar"
    subprocess.run(["tar", *options, "-cf", str(made), "-C", str(tmp_path), "llm"], check=True)
    assert read(made).root == "llm"


def unpacked(path: Path, into: Path) -> list[str] | None:
    """The names that the node's tar unpacks, or None when it complains."""
    found = read(path)
    into.mkdir()
    command = f"umask 022; tar -x -f {path} -C {into} {unpack_options(found)}"
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    if done.returncode:
        return None
    return sorted(
        str(one.relative_to(into)) for one in into.rglob("*") if one.is_symlink() or one.is_file()
    )


def test_what_is_read_is_what_the_nodes_tar_unpacks(tmp_path: Path) -> None:
    """Archives with bytes changed at random: whatever is not refused unpacks to the names that were read."""
    chance = random.Random(4)
    whole = pack(tmp_path / "whole.tar", [*CONDA, *HARMLESS]).read_bytes()
    accepted = 0
    for number in range(120):
        data = bytearray(whole)
        at = chance.randrange(0, end_of(whole) // 512) * 512
        for _ in range(chance.choice([1, 1, 2, 3])):
            data[
                at
                + chance.choice([*range(12), *range(100, 165), *range(257, 265), *range(345, 360)])
            ] = chance.choice(b"\0\x01 0127/.aLKxgSV\x7f\x80\xff")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            read(path)
            seen = sorted(_names(path))
            names = unpacked(path, tmp_path / str(number))
        except ArchiveProblem:
            continue
        finally:
            path.unlink()
        accepted += 1
        assert names in (None, seen), number
    assert 10 < accepted < 110
    assert {path.name for path in tmp_path.iterdir()} <= {"whole.tar", *map(str, range(120))}


def _names(path: Path) -> list[str]:
    with tarfile.open(path) as found:
        return [str(Path(one.name)) for one in found if not one.isdir()]


def test_what_an_environment_needs_is_read_from_its_programs(tmp_path: Path) -> None:
    site = "lib/python3.10/site-packages"
    more: list[Entry] = [
        (f"{site}/torch/lib/libc10.so", elf(["2.2.5", "2.28", "2.14"])),
        (f"{site}/torch/lib/for_arm.so", elf(["2.39"], ARM)),
        (f"{site}/torch/version.txt", "GLIBC_2.99"),
        (f"{site}/torch/lib/broken.so", elf(["2.40"])[:150]),
        (f"{site}/torch/lib/text.so", b"GLIBC_2.41"),
        (f"{site}/obscure/x.so", elf(["2.38"])),
    ]
    needs = read(pack(tmp_path / "a.tar", below("llm", [*CONDA, *more]))).needs
    assert (needs.machine, needs.glibc) == ("x86_64", "2.28")
    assert needs.glibc_by == f"{site}/torch/lib/libc10.so"
    venv = read(
        pack(tmp_path / "b.tar", [*VENV, *((n.replace("3.10", "3.11"), c) for n, c in more[:1])])
    )
    assert (venv.needs.machine, venv.needs.glibc) == ("x86_64", "2.28")
    assert read(pack(tmp_path / "c.tar", VENV)).needs.machine is None
    arm: list[Entry] = [CONDA[0], ("bin/python3.10", elf(["2.17"], ARM)), *CONDA[2:]]
    assert read(pack(tmp_path / "d.tar", arm)).needs.machine == "aarch64"


def test_what_a_declared_import_needs_beyond_that_is_read_from_its_compiled_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its folder, or by its distribution's record: beside it. One that nobody imports does not count."""
    monkeypatch.setattr(sys.modules["roles.environment.listing"], "HEAD", 400)
    site, flash = "lib/python3.10/site-packages", "flash_attn_2_cuda.cpython-310.so"
    record = f"flash_attn/__init__.py,sha256=a,1\n{flash},sha256=a,1\n../../../bin/x,sha256=a,1\n"
    big = bytearray(elf(["2.35"]))
    (headers,) = struct.unpack("<Q", big[40:48])
    big[40:48] = struct.pack("<Q", headers + (3 << 20))
    big[headers:headers] = bytes(3 << 20)  # its section headers lie at its end
    more: list[Entry] = [
        (f"{site}/pyarrow/libarrow.so.1900", elf(["2.34"])),
        (f"{site}/pyarrow/_old.so", elf(["2.3"])),
        (f"{site}/flash_attn/__init__.py", ""),
        (f"{site}/{flash}", bytes(big)),
        (f"{site}/flash_attn-2.7.dist-info/RECORD", record),
        (f"{site}/numpy/core.so", elf(["2.27"])),
        (f"{site}/usual/x.so", elf(["2.27"])),
        (f"{site}/text/x.so", b"GLIBC_2.99"),
    ]
    found = read(pack(tmp_path / "a.tar", below("llm", [*CONDA, *more])))
    assert found.needs == Needs("x86_64", "2.27", f"{site}/numpy/core.so")

    def needed(*imports: str) -> tuple[str, str]:
        needs = found.needs_of(imports)
        return needs.glibc, needs.glibc_by.removeprefix(f"{site}/")

    assert needed("usual", "text", "nothing") == ("2.27", "numpy/core.so")
    assert needed("pyarrow.lib") == ("2.34", "pyarrow/libarrow.so.1900")
    assert needed("pyarrow", "flash_attn") == ("2.35", flash)
    assert set(found.imports) == {"pyarrow", "flash_attn", "flash_attn_2_cuda"}
    monkeypatch.setattr(archive, "state_directory", lambda: tmp_path / "state")
    remember("x", 1, found)
    assert recalled("x") == (1, found)


def test_what_a_large_file_needs_is_seen_where_its_tables_lie_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["roles.environment.listing"], "HEAD", 400)
    small, gap = bytearray(elf(["2.35"])), 3 << 20
    (headers,) = struct.unpack("<Q", small[40:48])
    for place in (40, *(headers + 64 * section + 24 for section in (1, 2, 3))):
        (offset,) = struct.unpack("<Q", small[place : place + 8])
        small[place : place + 8] = struct.pack("<Q", offset + gap)
    large = bytes(small[:64]) + bytes(gap) + bytes(small[64:])
    more = ("lib/python3.10/site-packages/torch/a.so", large)
    assert read(pack(tmp_path / "a.tar", [*CONDA, more])).needs.glibc == "2.35"


def test_a_version_table_that_claims_billions_of_entries_ends(tmp_path: Path) -> None:
    data = bytearray(elf(["2.28"]))
    at = data.index(b"GLIBC") + len(b"GLIBC_2.28\0")
    data[at + 8 : at + 12] = b"\x10\0\0\0"
    data[at + 12 : at + 16] = b"\0\0\0\0"  # the next entry is this one again
    data[-64 - 64 + 44 : -64 - 64 + 48] = b"\xff\xff\xff\x7f"
    more = ("lib/python3.10/site-packages/torch/a.so", bytes(data))
    assert read(pack(tmp_path / "a.tar", [*CONDA, more])).needs.glibc == "2.28"
