"""The steps a role yields to change a node: a shell command, a file's text, files from here
or to here, a program here, a new login.

A step says what it does; ``converge`` carries it out. Steps hold no secrets: keys are made on the node.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

UNATTENDED_SSH = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
)
"""Options of an ssh between nodes that nobody watches: it asks nothing, and a dead peer ends it within 15 s."""


@dataclass(frozen=True)
class Shell:
    """Run this as root with ``sh -e``; a non-zero exit fails the node with the last line of stderr.

    seconds: the time limit. show: print each line of its output as it arrives.
    """

    command: str
    seconds: int = 60
    show: bool = False


@dataclass(frozen=True)
class Upload:
    """Copy a file of the control machine to a path on the node, whole or not at all.

    It arrives beside the destination, its SHA-256 is checked there, and it is renamed. One that broke
    off is continued by the next.

    relayed: nodes that carry out the same step at the same time pass it on from one to the next.
    """

    source: Path
    destination: str
    sha256: str
    mode: str = "0644"
    seconds: int = 3600
    relayed: bool = False

    @cached_property
    def size(self) -> int:
        """Of the file, in bytes. Raises OSError."""
        return self.source.stat().st_size

    @cached_property
    def part(self) -> PurePosixPath:
        """Where it grows on the node."""
        whole = PurePosixPath(self.destination)
        return whole.parent / f".{whole.name}.arriving" / self.sha256


@dataclass(frozen=True)
class Download:
    """Copy a file of the node to a path on the control machine, whole or not at all.

    It arrives beside the destination, its SHA-256 is checked, and it is renamed. One that broke off is
    continued by the next. seconds: for its SHA-256 on the node.
    """

    source: str
    destination: Path
    seconds: int = 3600


@dataclass(frozen=True)
class UploadFolder:
    """Have exactly these files of the control machine in a folder on the node, and nothing else in it.

    files: path below the folder to where it lies here and its SHA-256; paths hold no white space. What is
    there already with that digest does not travel again. All arrive beside the folder and are checked
    before the first is put in its place; they are put there in this order.
    """

    files: Mapping[str, tuple[Path, str]]
    destination: str
    mode: str = "0644"
    seconds: int = 3600


@dataclass(frozen=True)
class Mirror:
    """Have the files of a directory of the control machine, or of a node, in a directory of this node.

    Nodes that carry out the same step at the same time give it on: who has it all gives to one after the
    other. What broke off is continued. Paths are of nodes, but for ``manifest`` and a control machine's
    ``directory``.

    name: in words. giver: the node that has ``directory``; None is the control machine.
    place: where the files lie on every node that has them. landing: where they arrive, beside it.
    read: shell that makes the manifest there, as ``source`` on the giver. manifest: its copy here.
    wanted: where each node gets that manifest.
    survey: shell for the node that writes what it lacks to ``paths`` (each ended by a NUL), and prints
    how many bytes and files that is. settle: shell for the node that checks what arrived and puts it in place;
    it prints ``damaged NUMBER PATH``, or ``aside NUMBER FOLDER PATH`` for what it moved away, or nothing.
    doubt: shell for the origin, which notes that the hash of the file ``$path`` may be wrong in its manifest.
    whole: gives the names of nodes that have it all already.
    """

    name: str
    giver: str | None
    directory: str
    place: str
    landing: str
    manifest: Path
    source: str
    wanted: str
    paths: str
    read: str
    survey: str
    settle: str
    doubt: str
    whole: Callable[[], Iterable[str]] = field(default=tuple, compare=False)


@dataclass(frozen=True)
class NewLogin:
    """Log in again, so that what follows sees what a fresh login sees (limits, groups, PATH)."""


@dataclass(frozen=True)
class Meet:
    """Wait until every node of a ``together`` role is at this point, or fail when one cannot be.

    point: names it within the role, in words. otherwise: shell to run when the others do not come.
    seconds: the longest wait.
    """

    point: str
    otherwise: str = ""
    seconds: int = 180


@dataclass(frozen=True)
class Here:
    """Run a program on the control machine; what it prints on standard output is said, line by line.

    Where it ends with an error, the node fails with the last line of its standard error.
    """

    command: tuple[str, ...]


Step = Shell | Upload | UploadFolder | Download | Mirror | Here | NewLogin | Meet

Quoted = Callable[[str], str]
quote: Quoted = shlex.quote


def settled(words: str) -> str:
    """Shell that waits until all data of a file system is on the disk. words: a path on it, for the shell.

    ``sync`` of coreutils before 8.24 (release 7 of the RHEL family) knows no -f, and syncs everything.
    """
    return f"if sync --help | grep -q file-system; then sync -f {words}; else sync; fi"


ON_DISK = Shell(
    f"({settled('/ /etc /usr /var/lib')}) </dev/null >/dev/null 2>&1 & left=600\n"
    # Nothing ends a process that waits for a disk: it is left behind.
    "while kill -0 $! 2>/dev/null; do\n"
    "  left=$((left - 1)); test $left -gt 0 || exit 0; sleep 0.1\ndone\n"
    "wait $! || { echo 'what was changed did not reach the disk: see dmesg' >&2; exit 1; }",
    seconds=120,
)
"""What the steps before wrote on the node's own disks survives a power cut from now on.

Without it a file that was just written and renamed may be empty after one. A busy disk is waited for a minute.
"""

APPEAR_SECONDS = 90
"""How long a file that another node wrote may take to be seen here; NFS caches absences for a minute (acdirmax)."""


def appears(file: str, sentence: str) -> str:
    """Shell that waits until a file which another node wrote is seen here, and ends with the sentence where it is not.

    Both are words of the shell. To list the last folder of the path that is seen makes a client of NFS ask the
    server again; a path through one that is not seen yet asks nothing.
    """
    return (
        f"( left={APPEAR_SECONDS * 2}\nuntil test -e {file}; do\n"
        f'  d=$(dirname {file}); until test -d "$d"; do d=$(dirname "$d"); done\n'
        '  ls "$d" >/dev/null 2>&1 || :\n'
        f"  left=$((left - 1)); test $left -gt 0 || {{ echo {sentence} >&2; exit 1; }}; sleep 0.5\n"
        "done ) || exit 1\n"
    )


def any_of(words: Iterable[str]) -> str:
    """A pattern of the shell's ``case``: one of these words, or nothing at all."""
    return "|".join(map(quote, ("", *words)))


def relabel(path: str) -> str:
    """Shell that gives a path the context that SELinux's policy has for it, where SELinux is on.

    What is moved or made anew keeps the context of where it was made, and a service may not read it.
    """
    return f"if test -e /sys/fs/selinux/enforce; then restorecon {quote(path)} || :; fi"


def owned(words: str) -> str:
    """Shell that gives to root what root has made, or fails. words: its path, for the shell.

    Where the server of a storage takes root for another user (root_squash), nothing can be given away there: it
    is that user's already, as all that root makes, and stays so.
    """
    return (
        f"chown 0:0 {words} 2>/dev/null || (\n"
        f'  new=$(mktemp -d "$(dirname {words})/.lockstep-XXXXXX")\n'
        '  taken=$(stat -c %u "$new"); rmdir "$new"\n'
        f'  test "$taken" != 0 && test "$(stat -c %u {words})" = "$taken" ||\n'
        f'    {{ echo {words} "cannot be given to root, nor is it what root makes there" >&2; exit 1; }}\n'
        ")"
    )


def write_file(path: str, text: str, mode: str = "0644", backup: bool = True) -> str:
    """Shell that makes the file hold exactly this text, owned by root, at once or not at all.

    A first version that Lockstep did not write is kept once as ``PATH.before-lockstep``. A path
    that cannot be renamed over (a bind mount, as /etc/hosts in containers) is written in place.
    """
    encoded = base64.b64encode(text.encode()).decode()
    target, fresh, kept = (
        quote(path),
        quote(f"{path}.lockstep-new"),
        quote(f"{path}.before-lockstep"),
    )
    keep = (
        f"if test -e {target} && ! test -e {kept}; then cp -p {target} {kept}; fi\n"
        if backup
        else ""
    )
    return (
        f"mkdir -p {quote(str(Path(path).parent))}\n"
        f"{keep}"
        f"(umask 077; printf %s {encoded} | base64 -d > {fresh})\n"
        f"{owned(fresh)}\nchmod {mode} {fresh}\n"
        f"mv -f {fresh} {target} 2>/dev/null || {{ cat {fresh} > {target}; chmod {mode} {target}; rm -f {fresh}; }}\n"
        f"{relabel(path)}"
    )


def managed_block(text: str, name: str, lines: list[str]) -> str:
    """The text with Lockstep's block of that name replaced, or added at its end.

    The block lies between ``# lockstep NAME: begin`` and ``# lockstep NAME: end``. An empty list
    of lines takes the block out. Everything outside stays; a marker without its partner goes.
    """
    begin, end = f"# lockstep {name}: begin", f"# lockstep {name}: end"
    existing = text.splitlines()
    marks = [line.strip() for line in existing]
    place = len(existing)
    if begin in marks and end in marks[marks.index(begin) :]:
        place = marks.index(begin)
        last = marks.index(end, place)
        existing[place : last + 1] = []
    existing = (
        [line for line in existing[:place] if line.strip() not in (begin, end)]
        + ([begin, *lines, end] if lines else [])
        + [line for line in existing[place:] if line.strip() not in (begin, end)]
    )
    return "\n".join(existing) + "\n" if existing else ""


def block_lines(text: str, name: str) -> list[str] | None:
    """The lines inside Lockstep's block of that name, or None where there is no whole block."""
    begin, end = f"# lockstep {name}: begin", f"# lockstep {name}: end"
    found: list[str] | None = None
    inside: list[str] | None = None
    for line in text.splitlines():
        if line.strip() == begin:
            inside = []
        elif line.strip() == end and inside is not None:
            found, inside = inside, None
        elif inside is not None:
            inside.append(line)
    return found
