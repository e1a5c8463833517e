"""Sources that lie on the shared storage, where only the nodes see them: an archive, or a directory to pack.

The head publishes one under Lockstep's own folder there, and it is read here once, by the reader of all
archives. After that only its identity is compared, and the control machine keeps no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inventory.cluster import Cluster
from roles.core.role import Target
from roles.core.steps import Download, Shell, Step, quote
from roles.environment.archive import ArchiveProblem, read
from roles.environment.parcel import note
from roles.environment.probe import parcel_of
from roles.environment.room import ROOM, SPARE_KIB
from roles.environment.sources import CACHES, folder_of, note_read
from roles.environment.spec import Declared, on_shared
from roles.storage.spec import depot

TAKE_SECONDS = 3600
_LEFT_OUT = " -o ".join(f"-name {quote(name)}" for name in [*sorted(CACHES), ".lockstep-*"])


def probe(cluster: Cluster, one: Declared) -> str:
    """Shell that prints ``source NAME IDENTITY`` for what lies there; a directory's is made of all its files'
    names, kinds, sizes and times, but of no folder's time, which changes with its caches."""
    place = on_shared(cluster, one)
    if place is None:
        return ""
    if one.spec.archive is not None:
        look = (
            'if [ -f "$S" ]; then i=$(stat -L -c "%s-%Y-%i" "$S") || exit 1\n'
            f"  printf 'source %s %s\\n' {one.name} \"$i\"; fi\n"
        )
    else:
        look = (
            'if [ -d "$S" ]; then\n'
            f"  i=$(cd \"$S\" && find . \\( {_LEFT_OUT} \\) -prune -o -type d -exec stat -c '%n %f' {{}} + "
            "-o -exec stat -c '%N %f %s %Y' {} + | LC_ALL=C sort | sha256sum) || exit 1\n"
            f"  printf 'source %s %s\\n' {one.name} \"${{i%% *}}\"; fi\n"
        )
    return f"S={quote(place)}\n{look}"


def take(target: Target[Any], one: Declared, place: str, identity: str) -> Iterator[Step]:
    """The steps by which the head publishes the source and it is read. place, identity: of the source."""
    taken = f"{depot(target.cluster)}/archives/.{target.cluster.name}.{one.name}.taken"
    here = folder_of(target.cluster, one) / "taken"
    make = _link if one.spec.archive is not None else _pack
    yield Shell(make(place, taken), TAKE_SECONDS)
    yield Download(taken, here, TAKE_SECONDS)
    try:
        archive = read(here, called=place)
        note_read(target.cluster, place, identity, archive)
    except ArchiveProblem as problem:
        yield Shell(f"rm -f {quote(taken)}; echo {quote(str(problem))} >&2; exit 1")
        return
    finally:
        here.unlink(missing_ok=True)
    parcel = parcel_of(target.cluster, one, archive)
    published = quote(str(parcel.shared(target.cluster)))
    yield Shell(f"{note(target.cluster, parcel)}mv -f {quote(taken)} {published}")


def _link(place: str, taken: str) -> str:
    """Shell: the archive under another name, without its bytes twice where the file system can.

    All may read it there: root of a node may be nobody on the shared storage. So a private one is copied, and its
    own mode stays.
    """
    return (
        f'umask 022\nS={quote(place)} T={quote(taken)}\nmkdir -p "${{T%/*}}"\nrm -f "$T"\n'
        'case $(stat -L -c %A "$S") in ???????r*) ln -L "$S" "$T" 2>/dev/null && exit 0;; esac\n'
        f'{ROOM}room "${{T%/*}}" $(($(stat -L -c %s "$S") / 1024 + {SPARE_KIB})) "a copy of $S"\n'
        'cp "$S" "$T" && chmod 0644 "$T" || { rm -f "$T"; exit 1; }\n'
    )


def _pack(place: str, taken: str) -> str:
    """Shell: a tar of the directory, owned by root, compressed by zstd or else by gzip."""
    return (
        f'umask 022\nS={quote(place)} T={quote(taken)}\nmkdir -p "${{T%/*}}"\nrm -f "$T"\ncd "$S"\n'
        'trap \'rm -f "$T" "$T.failed"\' EXIT\n'
        "z='gzip -1 -n'; if command -v zstd >/dev/null; then z='zstd -1 -T0 -q'; fi\n"
        f"{{ find . \\( {_LEFT_OUT} \\) -prune -o ! -name . -print0 | LC_ALL=C sort -z |\n"
        "  tar -c --null --no-recursion -T - --owner=0 --group=0 --numeric-owner || "
        ': >"$T.failed"; } | $z >"$T" || {\n'
        "  f=$(df -P -k \"${T%/*}\" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')\n"
        '  echo "$S could not be packed into ${T%/*}${f:+, which has $f MiB free}" >&2; exit 1; }\n'
        'if [ -e "$T.failed" ]; then\n'
        '  echo "$S could not be packed: it changed, or cannot be read" >&2; exit 1; fi\ntrap - EXIT\n'
    )
