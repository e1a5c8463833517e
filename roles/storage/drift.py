"""How the shared path of a node differs from one directory that all nodes see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from roles.core.role import Finding, Peers, Target
from roles.storage.probe import Mark, StorageState
from roles.storage.spec import StorageSpec

LEAST_INODES = 1000
ON_DISK = frozenset(
    [
        "bcachefs",
        "btrfs",
        "devtmpfs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "jfs",
        "overlay",
        "ramfs",
        "reiserfs",
        "rootfs",
        "squashfs",
        "tmpfs",
        "vfat",
        "xfs",
        "zfs",
    ]
)
"""File systems of one machine: a directory somewhere inside such a mount is shared with nobody."""


def is_plain(state: StorageState) -> bool:
    """The path is an ordinary local directory: no mount of its own, and inside none that is shared."""
    mount = state.mount
    return (
        mount is None or mount.point == "/" or (mount.point != state.real and mount.kind in ON_DISK)
    )


def drift(target: Target[StorageSpec], state: StorageState, peers: Peers) -> list[Finding]:
    """Findings: what makes the path unusable; if nothing does, whether it is the head's directory."""
    unusable = list(_unusable(target, state))
    if unusable:
        return unusable
    full = list(_full(target, state))
    different = list(_different(target, state, peers))
    if any(not found.repairable for found in different):
        return [*full, *different]
    return [*full, *different, *_marks(target, state, peers)]


def _unusable(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    path = target.spec.path
    if state.access == "absent":
        yield Finding(
            "storage-missing",
            f"{path}, shared by all nodes",
            "no such directory",
            f"create {path} and mount the shared storage there",
            repairable=False,
        )
        return
    if state.access == "stale":
        yield Finding(
            "nfs-stale-handle",
            f"{path} can be entered",
            "stale file handle",
            f"run 'umount -l {path}' on this node and mount it again",
            repairable=False,
        )
        return
    plain = is_plain(state)
    if plain and len(target.cluster.nodes) > 1 and not state.exported:
        yield Finding(
            "nfs-mount-wrong",
            f"the shared storage mounted at {path}",
            f"a plain directory on {state.mount.source if state.mount else 'this disk'}",
            f"mount it (and add it to /etc/fstab with _netdev), or declare as storage.path a directory "
            f"that is mounted on every node; nothing is written into {path} meanwhile",
            repairable=False,
        )
        return
    if plain and state.mark is None and state.token is not None:
        yield Finding(
            "storage-lost",
            f"what Lockstep once wrote to {path}",
            "an empty directory",
            "mount what lies under it; if a new directory is meant, remove /var/lib/lockstep/storage-token",
            repairable=False,
        )
        return
    if state.mount is not None and "ro" in state.mount.options:
        yield Finding(
            "storage-read-only",
            f"{path} can be written",
            f"mounted read-only from {state.mount.source}",
            f"run 'mount -o remount,rw {state.mount.point}', and look into dmesg for the reason",
            repairable=False,
        )
    elif not state.writable:
        yield Finding(
            "nfs-root-squash",
            f"root can write to {path}",
            "permission denied",
            "export it with no_root_squash, or give the directory to the user that root is mapped to",
            repairable=False,
        )


def _full(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    path = target.spec.path
    if state.free < target.spec.free:
        yield Finding(
            "checkpoint-disk-full",
            f"{target.spec.free} MiB free at {path}",
            f"{state.free} MiB",
            "remove old checkpoints or archives, or make the storage larger",
            repairable=False,
        )
    if state.inodes is not None and state.inodes < LEAST_INODES:
        yield Finding(
            "checkpoint-disk-full",
            f"{LEAST_INODES} free inodes at {path}",
            str(state.inodes),
            "remove small files, or make the file system with more inodes",
            repairable=False,
        )


def _different(target: Target[StorageSpec], state: StorageState, peers: Peers) -> Iterator[Finding]:
    """Measured against the head, or against the first node that can be read when the head cannot."""
    marked = {
        node.name: peers[node.name]
        for node in target.others
        if node.name in peers and peers[node.name].mark is not None
    }
    want = f"{target.spec.path} is one directory for all nodes"
    if state.mark is None:
        if marked and (target.is_head or state.token is not None):
            # A worker's look may be older than what the head just wrote: converging looks again.
            yield Finding(
                "storage-different",
                want,
                f"what {next(iter(marked))} sees there is not seen here",
                "mount the same directory on every node",
                repairable=not target.is_head,
            )
        return
    if target.is_head:
        return
    for name, peer in list(marked.items())[:1]:
        seen = unlike(target.node.name, state, name, peer)
        if seen:
            yield Finding(
                "storage-different",
                want,
                f"{seen} than on {name}",
                f"mount the same directory as on {name}",
                repairable=False,
            )


def unlike(name: str, state: StorageState, other: str, peer: StorageState) -> str | None:
    """What tells the two nodes' directories apart, in words; None when they can be one.

    A copy has the same content, but neither inode number nor time of change of the original; some
    file systems give each client other inode numbers, and after a chown a client may remember the
    old time for a while, so only both together count. A token that one node does not see may have
    been written a moment ago; that neither sees the other's cannot happen on one storage, where each
    node looked after it wrote.
    """
    mine, theirs = state.mark, peer.mark
    if mine is None or theirs is None:
        return None
    if mine.id != theirs.id:
        return "another storage"
    if is_copy(mine, theirs):
        return "a copy, with another inode and time,"
    wrote = _sees(state, name, state) and _sees(peer, other, peer)
    if wrote and not _sees(state, other, peer) and not _sees(peer, name, state):
        return "other tokens"
    return None


def is_copy(mine: Mark, theirs: Mark) -> bool:
    """One of the two files was copied from the other."""
    return mine.inode != theirs.inode and mine.changed != theirs.changed


def _sees(state: StorageState, name: str, owner: StorageState) -> bool:
    return owner.token is not None and owner.token in state.tokens.get(name, ())


def _marks(target: Target[StorageSpec], state: StorageState, peers: Peers) -> Iterator[Finding]:
    head = peers.get(target.cluster.head.name)
    if state.mark is None and target.is_head:
        yield Finding(
            "storage-mark",
            "a mark by which every node knows the storage",
            "none",
            "the head writes one",
        )
    elif state.mark is None and (head is None or any(_unusable(_of_head(target), head))):
        return  # the head writes its mark first
    if state.token is None or state.tokens.get(target.node.name) != (state.token,):
        yield Finding(
            "storage-token",
            "this node's token on the storage",
            "none" if target.node.name not in state.tokens else "another",
            "it is written there, once this node sees the head's mark",
        )
    if left := sorted(name for name, _ in strays(target, state)):
        yield Finding(
            "storage-token-left",
            "tokens of the declared nodes alone",
            f"one of {', '.join(left)} too",
            "what a removed node left there is removed",
        )
    if state.open:
        yield Finding(
            "storage-modes",
            "directories that only root may change",
            f"{', '.join(state.open)} open to others",
            "group and others may no longer write there",
        )


def strays(target: Target[StorageSpec], state: StorageState) -> list[tuple[str, str]]:
    """(node, token) of each token whose node the cluster file no longer declares; the head sees to them."""
    if not target.is_head:
        return []
    return [
        (name, token)
        for name, tokens in state.tokens.items()
        for token in tokens
        if name not in target.cluster.nodes
    ]


def _of_head(target: Target[StorageSpec]) -> Target[StorageSpec]:
    return replace(target, node=target.cluster.head)
