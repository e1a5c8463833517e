"""How the path of a node differs from one directory that all nodes see, or from one on its own disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from roles.core.role import Finding, Peers, Target
from roles.storage import shutdown
from roles.storage.mount import OWN, Wanted, is_server, wanted
from roles.storage.probe import TOUCH_SECONDS, Line, Mark, Mount, StorageState, token_file
from roles.storage.spec import StorageSpec, server_node

LEAST_INODES = 1000
NFS = ("nfs", "nfs4")
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
    left = [*_left(target, state), *_shutdown(target, state)]
    if target.spec.kind == "local":
        return [*left, *_own(target, state)]
    return [*left, *(list(_mounting(target, state)) or one_directory(target, state, peers))]


def one_directory(target: Target[StorageSpec], state: StorageState, peers: Peers) -> list[Finding]:
    """Findings about a path that is to be the same directory on every node, whoever mounts it."""
    unusable = list(_unusable(target, state))
    if unusable:
        return unusable
    full = list(_full(target, state))
    different = list(_different(target, state, peers))
    if any(not found.repairable for found in different):
        return [*full, *different]
    return [*full, *different, *_marks(target, state, peers)]


def lines_left(target: Target[StorageSpec], state: StorageState) -> list[Line]:
    """Lockstep's own lines of /etc/fstab for what is no longer declared."""
    mount = wanted(target)
    points = [mount.point] if mount else []
    return [line for line in state.fstab if is_own(line) and line.point not in points]


def is_own(line: Line) -> bool:
    """Lockstep wrote it."""
    return OWN in line.text.split(" ")[3].split(",")


def has_own_line(mount: Wanted, state: StorageState) -> bool:
    """Lockstep wrote a line for this mount point; what is mounted by an older one has its options."""
    return any(is_own(line) and line.point == mount.point for line in state.fstab)


def _left(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    for line in lines_left(target, state):
        yield Finding(
            "storage-left",
            "no mounts of Lockstep's but the declared one",
            f"{line.source} at {line.point}",
            "it is unmounted, and its line is taken out of /etc/fstab",
            disturbs=True,
        )


def _shutdown(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    """Whether the node can shut down without the server."""
    unit = shutdown.unit(target)
    if unit is None:
        if state.shutdown:
            yield Finding(
                "storage-left",
                "no unit of Lockstep's for a mount that is not declared",
                shutdown.UNIT,
                "it is removed",
            )
        return
    wrong = (
        "none" if not state.shutdown
        else "another version of it" if state.shutdown != shutdown.digest(unit)
        else "it is not enabled, or does not wait for it" if not state.ready
        else ""
    )  # fmt: skip
    if wrong:
        yield Finding(
            "nfs-shutdown",
            f"{shutdown.UNIT}, without which a shutdown waits for minutes while the server is gone",
            wrong,
            "it is put there",
        )


def _mounting(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    """What keeps a mount that Lockstep makes from being there, for this boot and the next."""
    mount = wanted(target)
    if mount is None:
        return
    there = [each for each in state.live if each.kind != "autofs"]
    if foreign := _foreign(mount, state, there):
        yield Finding(
            "storage-two-volumes",
            f"{mount.source} alone at {mount.point}",
            foreign,
            f"take the other one off {mount.point}, and its line out of /etc/fstab, or declare another path",
            repairable=False,
        )
        return
    if state.real not in ("", mount.point):
        yield Finding(
            "storage-link",
            f"a directory at {mount.point}, to mount {mount.source} upon",
            f"a symbolic link, to {state.real}",
            f"declare {state.real} as storage.path, or make {mount.point} a directory: systemd mounts on no link",
            repairable=False,
        )
        return
    if not state.live and state.entry:
        yield Finding(
            "storage-hides",
            f"an empty directory at {mount.point}, to mount {mount.source} upon",
            f"{state.entry} in it, which the mount would hide",
            f"move what is in {mount.point} away (to the shared storage, where it belongs there), or declare "
            "another path",
            repairable=False,
        )
        return
    if mount.kind == "nfs" and not state.client:
        yield Finding(
            "nfs-client-missing", "what mounts NFS, installed", "not installed", "it is installed"
        )
    if [line.text for line in state.fstab if line.point == mount.point] != [mount.line]:
        yield Finding(
            "nfs-fstab",
            f"the line {mount.line!r} in /etc/fstab",
            "another one" if any(line.point == mount.point for line in state.fstab) else "none",
            "it is written, and what an older one of Lockstep's mounted is mounted again",
            disturbs=bool(there) and has_own_line(mount, state),
        )
    yield from _mounted(target, mount, state, there[-1] if there else None)


def _foreign(mount: Wanted, state: StorageState, there: Sequence[Mount]) -> str:
    """What else than the declared volume claims its place, in words; a mount of NFS gives way to another."""
    claims = [line for line in state.fstab if line.point == mount.point and not is_own(line)]
    for line in claims:
        if line.kind not in NFS:
            return f"{line.source} too, by /etc/fstab"
    if len(claims) > 1:
        return f"{' and '.join(line.source for line in claims)} too, by /etc/fstab"
    if len(there) > 1:
        return f"{len(there)} mounts over one another: {', '.join(each.source for each in there)}"
    if there and there[0].kind not in NFS and mount.kind == "nfs":
        return f"{there[0].source} ({there[0].kind}) is mounted there"
    if there and mount.kind != "nfs" and not state.same:
        return f"{there[0].source} ({there[0].kind}) is mounted there"
    return ""


def _mounted(
    target: Target[StorageSpec], mount: Wanted, state: StorageState, there: Mount | None
) -> Iterator[Finding]:
    want = f"{mount.source} mounted at {mount.point}"
    again = "it is unmounted, and mounted again"
    if there is not None and mount.kind == "nfs" and there.source != mount.source:
        yield Finding(
            "nfs-mount-wrong", want, f"{there.source} is mounted there", again, disturbs=True
        )
    elif state.access == "stale":
        yield Finding(
            "nfs-stale-handle",
            f"{mount.point} can be entered",
            "stale file handle",
            again,
            disturbs=True,
        )
    elif state.access == "silent":
        yield Finding(
            "nfs-server-silent",
            f"an answer of {mount.source} at {mount.point}",
            f"none within {TOUCH_SECONDS} s",
            f"it is tried again for {target.spec.timeout} s",
        )
    elif there is not None and state.access == "failed":
        yield Finding(
            "nfs-refused",
            f"access to {mount.source} at {mount.point}",
            state.failure,
            f"it is tried again for {target.spec.timeout} s",
        )
    elif there is None:
        seen = {"failed": state.failure, "absent": "no such directory"}.get(
            state.access, "nothing is mounted there"
        )
        yield Finding("nfs-mount-wrong", want, seen, "it is mounted")
    elif mount.kind == "nfs" and (seen := _otherwise(target.spec, there)):
        yield Finding(
            "nfs-mount-options",
            f"{mount.point} mounted with {mount.options[0]},hard",
            seen,
            again,
            disturbs=True,
        )


def _otherwise(spec: StorageSpec, there: Mount) -> str:
    """Of the options that the kernel shows, those that must be as declared and are not.

    What systemd and mount read themselves never reaches that table, and a server may lower sizes.
    """
    words = [
        word for word in there.options if word.startswith("vers=") or word in ("soft", "softerr")
    ]
    wrong = [
        word for word in words if word not in (f"vers={spec.version}", f"vers={spec.version}.0")
    ]
    return ",".join(dict.fromkeys(wrong))


def _own(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    """What is wrong with a directory on the node's own disk."""
    path, name, mount = target.spec.path, target.node.name, state.mount
    if state.access == "absent":
        if state.token is not None:
            yield _lost(path, token_file(target), "no such directory")
            return
        yield not_made_yet(path)
        return
    if state.access != "yes":
        yield from _unreachable(path, state)
        return
    if mount is not None and mount.kind not in ON_DISK:
        yield Finding(
            "storage-not-own",
            f"{path} on a disk of this node",
            f"{mount.source} ({mount.kind})",
            "say kind: existing where all nodes see that directory, or declare a path on each node's own disk",
            repairable=False,
        )
        return
    if there := sorted(set(state.tokens) & {node.name for node in target.others}):
        yield Finding(
            "storage-not-own",
            f"{path} for {name} alone",
            f"what {', '.join(there)} wrote there",
            f"say kind: existing where it is one directory; where it once was, remove {path}/.lockstep/nodes there",
            repairable=False,
        )
        return
    if state.token is not None and name not in state.tokens and not state.known:
        yield _lost(path, token_file(target), "nothing of it")
        return
    if unwritable := list(_unwritable(target, state)):
        yield from unwritable
        return
    yield from _full(target, state)
    if target.spec.manage != "check":
        yield from _token(target, state, "it is written there: by it the next look knows the disk")
    yield from _modes(state)


def not_made_yet(path: str) -> Finding:
    """A directory of this node alone is not there, and never was."""
    want = f"{path}, on this node's own disk"
    return Finding("storage-missing", want, "no such directory", "it is made")


def _lost(path: str, token: str, seen: str = "an empty directory") -> Finding:
    return Finding(
        "storage-lost",
        f"what Lockstep once wrote to {path}",
        seen,
        f"mount what lies under it; if a new directory is meant, remove {token}",
        repairable=False,
    )


def _unusable(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    path = target.spec.path
    alone, wrote = not target.others, token_file(target)
    if state.access == "absent":
        if alone and state.token is not None:
            yield _lost(path, wrote, "no such directory")
            return
        yield Finding(
            "storage-missing",
            f"{path}, shared by all nodes",
            "no such directory",
            f"create {path} and mount the shared storage there",
            repairable=False,
        )
        return
    if state.access != "yes":
        yield from _unreachable(path, state)
        return
    plain = is_plain(state)
    if plain and not alone and not state.exported:
        yield Finding(
            "nfs-mount-wrong",
            f"the shared storage mounted at {path}",
            f"a plain directory on {state.mount.source if state.mount else 'this disk'}",
            "mount it (and add it to /etc/fstab with _netdev), or declare a directory that is mounted on every "
            f"node; nothing is written into {path} meanwhile",
            repairable=False,
        )
        return
    lost = state.mark is None and (plain or (is_server(target) and not state.tokens))
    # What lies under a mount may bear a mark of the time before there was one, but not the latest token.
    other = plain and alone and not state.known
    if state.token is not None and (lost or other):
        yield _lost(path, wrote, "an empty directory" if lost else "another directory")
        return
    yield from _unwritable(target, state)


def _unreachable(path: str, state: StorageState) -> Iterator[Finding]:
    if state.access == "stale":
        yield Finding(
            "nfs-stale-handle",
            f"{path} can be entered",
            "stale file handle",
            f"run 'umount -l {path}' on this node and mount it again",
            repairable=False,
        )
        return
    if state.access == "silent":
        yield Finding(
            "nfs-server-silent",
            f"an answer at {path}",
            f"none within {TOUCH_SECONDS} s",
            f"see that the server of {path} runs and that this node reaches it",
            repairable=False,
        )
        return
    if state.access == "failed":
        yield Finding(
            "nfs-refused",
            f"access to {path}",
            state.failure,
            "see that its server still exports it to this node",
            repairable=False,
        )
        return


def _unwritable(target: Target[StorageSpec], state: StorageState) -> Iterator[Finding]:
    path, node = target.spec.path, server_node(target.spec, target.cluster)
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
            "export it with no_root_squash, or give the directory to the user that root is mapped to"
            if node is None
            else f"say root_squash: false, or give {path} and what is in it on {node.name} to nobody",
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
        checked = target.spec.manage == "check"
        if marked and (target.is_head or state.token is not None or checked):
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
    """Lockstep's own marks; what they prove is left out where the storage is only checked, and has none."""
    if target.spec.manage == "check":
        yield from _modes(state)
        return
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
    yield from _token(target, state, "it is written there, once this node sees the head's mark")
    if left := sorted(name for name, _ in strays(target, state)):
        yield Finding(
            "storage-token-left",
            "tokens of the declared nodes alone",
            f"one of {', '.join(left)} too",
            "what a removed node left there is removed",
        )
    yield from _modes(state)


def _token(target: Target[StorageSpec], state: StorageState, fix: str) -> Iterator[Finding]:
    if state.token is None or state.tokens.get(target.node.name) != (state.token,):
        yield Finding(
            "storage-token",
            "this node's token on the storage",
            "none" if target.node.name not in state.tokens else "another",
            fix,
        )


def _modes(state: StorageState) -> Iterator[Finding]:
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
