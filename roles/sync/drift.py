"""How a node's directories differ from what their origin has now."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.storage.spec import StorageSpec
from roles.sync.declared import Entry, entries
from roles.sync.probe import Given, Seen, SyncState, given_by


def drift(target: Target[StorageSpec], state: SyncState, peers: Peers) -> list[Finding]:
    """Findings of every directory, and of what carries them."""
    found = (finding for _, finding in pairs(target, state, peers))
    return [*_tools(target, state), *found]


def pairs(
    target: Target[StorageSpec], state: SyncState, peers: Peers
) -> Iterator[tuple[Entry, Finding]]:
    """Each directory that is not right, with what is wrong."""
    for entry in entries(target.cluster):
        seen = state.seen.get(entry.key, Seen("absent"))
        given = given_by(target, entry, seen, peers)
        finding = _finding(target, entry, seen, given)
        if finding is None:
            continue
        obstacle = _obstacle(target, entry, given) if finding.repairable else None
        yield entry, obstacle or finding


def right(entry: Entry, node: str, seen: Seen, given: Given | None) -> bool:
    """Whether a node has what the origin has now, and nothing else."""
    if given is None or not given.listing:
        return False
    if entry.is_given_by(node):
        return seen.read == given.listing
    return seen.listing == given.listing and not seen.wrongs and not seen.strays


def _tools(target: Target[StorageSpec], state: SyncState) -> Iterator[Finding]:
    if not state.rsync and entries(target.cluster):
        yield Finding("sync-rsync", "rsync installed", "not installed", "it is installed")


def _obstacle(target: Target[StorageSpec], entry: Entry, given: Given | None) -> Finding | None:
    """What must be mended by the user before it can be brought."""
    source = entry.origin
    if given is None:
        seen = f"{source.node} cannot be read"
        return _for_user("sync-source", f"{source}", seen, f"make {source.node} reachable")
    if not given.listing:
        return _for_user(
            "sync-source",
            f"{source}, to be given to every node",
            given.refused or "no such directory, or not to be entered",
            f"put the files there, or correct what storage.sync says of {entry.name}"
            if not given.refused
            else "mend that, and converge again",
        )
    if source.node is None and not shutil.which("rsync"):
        return _for_user(
            "sync-rsync",
            "rsync on this machine",
            "not installed",
            "install it: apt-get install rsync",
        )
    return None


def _for_user(id: str, want: str, seen: str, fix: str) -> Finding:
    return Finding(id, want, seen, fix, repairable=False)


def _finding(
    target: Target[StorageSpec], entry: Entry, seen: Seen, given: Given | None
) -> Finding | None:
    want = f"{entry.place} as {entry.origin}"
    fix = f"what it lacks comes from {entry.origin}, or from a node that has it"
    now = given.listing if given else ""
    if entry.is_given_by(target.node.name):
        if now and seen.read == now:
            return None
        there = "changed since it was read" if seen.read else "not read yet"
        return Finding(
            "sync-unread",
            f"{entry.place} read, for the other nodes",
            there,
            "every file is read once",
        )
    if seen.place == "foreign":
        return Finding(
            "sync-foreign",
            want,
            "files that were not brought there",
            "they are read: the same ones stay, and nothing is done where there are others",
        )
    if seen.place != "ours":
        return Finding("sync-missing", want, "not there", fix)
    if now and seen.listing != now:
        return Finding(
            "sync-other",
            want,
            "as it was earlier",
            f"{fix}; {_lost(entry, seen, given)}",
            disturbs=True,
        )
    if seen.wrongs:
        return Finding(
            "sync-damaged",
            f"the files of {entry.place} as they were brought",
            f"{_some(seen.wrong, seen.wrongs)} missing, cut or altered",
            fix,
            disturbs=True,
        )
    if seen.strays:
        return Finding(
            "sync-stray",
            f"what {entry.origin} has in {entry.place}, and nothing else",
            f"{_some(seen.stray, seen.strays)} too",
            f"it is moved to {entry.beside('strays')}",
            disturbs=True,
        )
    return None


def _lost(entry: Entry, seen: Seen, given: Given | None) -> str:
    """What becomes of the files that the origin has no more."""
    lost = "what"
    if given is not None and given.earlier == seen.listing:
        if not given.lost:
            return "no file is removed"
        lost = f"{given.lost} files that"
    return (
        f"{lost} {entry.origin} no longer has: removed, or moved to {entry.beside('strays')} where that is "
        "more than half of all files"
    )


def _some(paths: tuple[str, ...], number: int) -> str:
    rest = f" and {number - len(paths)} more" if number > len(paths) else ""
    return f"{', '.join(paths)}{rest}"


def contents(state: SyncState) -> str | None:
    """What each directory holds, by its files' hashes; None where nothing was brought."""
    words = [
        f"{key.partition('/')[2]} {seen.manifest[:12]}"
        for key, seen in sorted(state.seen.items())
        if seen.manifest
    ]
    return ", ".join(words) or None
