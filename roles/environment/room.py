"""Whether a node's disks have room for an environment and its archive, judged before a byte of them travels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from roles.core.steps import Upload, quote
from roles.environment.archive import Archive
from roles.environment.spec import Declared

SPARE_KIB, SPARE_INODES = 65536, 1000
"""What a disk must have beyond what comes to it."""

ROOM = r"""
free() { df -P "$1" "$2" | awk 'NR == 2 { print ($2 > 0 && $4 ~ /^[0-9]+$/) ? $4 : "any" }'; }
existing() { e=$1; until [ -d "$e" ]; do e=${e%/*}; e=${e:-/}; done; printf '%s\n' "$e"; }
room() {
  F=$(free -k "$1")
  if [ "$F" != any ] && [ "$F" -lt "$2" ]; then
    echo "no room for $3: $1 has $((F / 1024)) MiB free, $(($2 / 1024)) are needed" >&2; exit 1; fi
}
"""
"""Shell: ``room FOLDER KIB WHAT`` ends where its disk has less, ``existing PATH`` prints the lowest folder of the
path that there is. free: of a disk's second line the free column; a file system may count no inodes."""


def room(one: Declared, archive: Archive, coming: Sequence[Upload]) -> str:
    """Shell that ends with the sentence where the node cannot hold the environment.

    coming: what brings the archive to the node; none where it lies already.
    """
    kib, inodes = archive.unpacked // 1024 + SPARE_KIB, archive.entries + SPARE_INODES
    parent = str(PurePosixPath(one.prefix).parent)
    return (
        f"{ROOM}W={quote(one.name)} K={kib} D=$(existing {quote(parent)})\n"
        + "".join(
            f"{_arriving(each)}"
            'if [ "$(stat -c %d "$A")" = "$(stat -c %d "$D")" ]; then K=$((K + M)) W="$W and its archive"\n'
            'else room "$A" "$M" "the archive of $W"; fi\n'
            for each in coming
        )
        + 'room "$D" "$K" "$W"\n'
        'F=$(free -i "$D")\n'
        f'if [ "$F" != any ] && [ "$F" -lt {inodes} ]; then\n'
        f'  echo "no room for $W: $D takes $F more files, {inodes} are needed" >&2; exit 1; fi\n'
    )


def room_for_archive(one: Declared, coming: Upload) -> str:
    """Shell that ends with the sentence where the archive has no room at its destination."""
    return f'{ROOM}{_arriving(coming)}room "$A" "$M" {quote(f"the archive of {one.name}")}\n'


def _arriving(coming: Upload) -> str:
    """Shell: $A is a folder of the disk to which the archive comes, $M what that lacks of it, in KiB."""
    size = coming.size if coming.source.is_file() else 0  # its own step says that it is gone
    return (
        f"A=$(existing {quote(str(PurePosixPath(coming.destination).parent))})\n"
        f"H=$(stat -c %s {quote(str(coming.part))} 2>/dev/null) || H=0\n"
        f"M=$((({size} - H) / 1024 + {SPARE_KIB}))\n"
    )
