"""Lines of /etc/fstab: exactly one for a mount point, or none; every other line stays as it is."""

from __future__ import annotations

from roles.core.steps import quote

POINT = r"""
function point(word) { gsub(/\/+/, "/", word); if (word != "/") sub(/\/$/, "", word); return word }
"""
"""awk: a mount point as the kernel has it, which in the file may have more slashes."""


def put(line: str) -> str:
    """Shell that puts this line in the place of those for its mount point, or at the end."""
    return _changed(line.split()[1], line)


def drop(point: str) -> str:
    """Shell that takes the lines for this mount point out."""
    return _changed(point, "")


def _changed(point: str, line: str) -> str:
    """The first version that Lockstep found is kept once as /etc/fstab.before-lockstep."""
    return (
        "umask 022; test -e /etc/fstab || : > /etc/fstab\n"
        "test -e /etc/fstab.before-lockstep || cp -p /etc/fstab /etc/fstab.before-lockstep\n"
        "cp -p /etc/fstab /etc/fstab.lockstep-new\n"
        f"LOCKSTEP_POINT={quote(point)} LOCKSTEP_LINE={quote(line)} awk '\n"
        f"{POINT.strip()}\n"
        'BEGIN { line = ENVIRON["LOCKSTEP_LINE"]; done = line == "" }\n'
        '$0 !~ /^[ \\t]*#/ && point($2) == point(ENVIRON["LOCKSTEP_POINT"]) { if (!done++) print line; next }\n'
        "{ print }\n"
        "END { if (!done) print line }' /etc/fstab > /etc/fstab.lockstep-new\n"
        "mv -f /etc/fstab.lockstep-new /etc/fstab"
    )
