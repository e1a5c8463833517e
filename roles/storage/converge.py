"""Mounts the declared storage, and marks it.

Nothing is formatted, and no step changes owner or mode of what a mount holds, but of Lockstep's own folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core import fstab
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote
from roles.packages.converge import installing
from roles.packages.names import translated
from roles.packages.spec import PackagesSpec
from roles.storage import shutdown
from roles.storage.drift import has_own_line, lines_left
from roles.storage.marks import marking
from roles.storage.mount import Wanted, wanted
from roles.storage.probe import StorageState
from roles.storage.spec import StorageSpec

MOUNTING = {
    *("nfs-client-missing", "nfs-fstab", "nfs-mount-wrong", "nfs-mount-options"),
    *("nfs-server-silent", "nfs-refused", "nfs-stale-handle"),
}
"""Findings after whose repair the mount is tried."""

UNMOUNT_SECONDS = 60


def converge(
    target: Target[StorageSpec], state: StorageState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The head's mark first, then each node's token. No step writes where the mount is gone."""
    ids = {found.id for found in findings}
    if "nfs-client-missing" in ids:
        packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
        yield installing(packages, state.manager, client_packages(state))
    for line in lines_left(target, state) if "storage-left" in ids else ():
        yield Shell(f"{unmount(line.point)}{fstab.drop(line.point)}\nsystemctl daemon-reload")
    unit = shutdown.unit(target)
    if unit is not None and "nfs-shutdown" in ids:
        yield Shell(shutdown.put(unit))
    if unit is None and state.shutdown:
        yield Shell(shutdown.drop())
    mount = wanted(target)
    if mount is not None and ids & MOUNTING:
        anew = ids & {"nfs-mount-wrong", "nfs-mount-options", "nfs-stale-handle"}
        older = "nfs-fstab" in ids and has_own_line(mount, state)
        if state.live and (anew or older):
            # Before the line changes: by the old one, the next run knows what a run that was cut off began.
            yield Shell(unmount(mount.point), seconds=UNMOUNT_SECONDS)
        if "nfs-fstab" in ids:
            yield Shell(f"{fstab.put(mount.line)}\nsystemctl daemon-reload")
        yield Shell(attempt(target, mount), seconds=target.spec.timeout + UNMOUNT_SECONDS)
    yield from marking(target, state, findings)


def client_packages(state: StorageState) -> list[str]:
    """What mounts NFS, by the names of the node's family."""
    return list(translated(state.manager, "nfs-common"))


_THERE = (
    'there() { awk -v point="$point" \'$5 == point { for (i = 7; $i != "-"; i++); kind = $(i + 1) } '
    "END { print kind }' /proc/self/mountinfo; }\n"
)
"""Shell: ``there`` prints the kind of what is mounted last at $point, nothing where nothing is; no touch."""


def unmount(point: str) -> str:
    """Shell that takes a mount and systemd's automount off a directory, also where the server is gone.

    One in use stays, and is told; only a handle or a server that is dead is let go of at once (``-l``), which
    the bounded touch before decides: nothing could be written there any more.
    """
    busy = f"{point} could not be unmounted: end what uses it, which fuser -vm {point} names, and run this again"
    return (
        f"point={quote(point)}\n{_THERE}"
        'case $(there) in ""|autofs) ;; *)\n'
        '  lazily=-l; if timeout -s KILL 5 ls "$point/." >/dev/null 2>&1; then lazily=; fi\n'
        f'  timeout -s KILL 20 umount $lazily "$point" || {{ echo {quote(busy)} >&2; exit 1; }} ;;\n'
        "esac\n"
        'unit=$(systemd-escape -p --suffix=automount "$point")\n'
        'if systemctl is-active -q "$unit"; then systemctl stop "$unit"; fi\n'
        'case $(there) in "") ;; *) echo "$point is still mounted" >&2; exit 1 ;; esac\n'
    )


def attempt(target: Target[StorageSpec], mount: Wanted) -> str:
    """Shell that mounts what /etc/fstab says, within the declared time, or fails with the server's reason."""
    seconds = target.spec.timeout
    silent = f"{mount.source} is not mounted at {mount.point}: " + (
        f"no answer within {seconds} s; see that the server is up, and that TCP port 2049 there is open "
        "for this node"
        if mount.kind == "nfs"
        else f"see systemctl status {mount.point} on this node"
    )
    refused = f"{mount.source} cannot be had at {mount.point}:"
    start = "automount" if mount.kind == "nfs" else "mount"
    return (
        f"point={quote(mount.point)}\n{_THERE}"
        'mount=$(systemd-escape -p --suffix=mount "$point")\n'
        f'start=$(systemd-escape -p --suffix={start} "$point")\n'
        "since=$(date +%s)\n"
        'if test -z "$(there)"; then\n'
        '  mkdir -p "$point"\n'
        '  systemctl reset-failed "$mount" "$start" 2>/dev/null || :\n'
        '  systemctl start "$start" || :\n'
        "fi\n"
        f'said=$(timeout -s KILL {seconds + 5} ls "$point/." 2>&1 >/dev/null) &&\n'
        '  case $(there) in ""|autofs) ;; *) exit 0 ;; esac\n'
        'case $(there) in ""|autofs) said= ;; esac\n'  # what systemd says then tells no reason
        'logged=$(journalctl -q -u "$mount" --since "@$since" -o cat 2>/dev/null | grep "^mount" | tail -n 1) || :\n'
        "case $logged$said in\n"
        f'  "") echo {quote(silent)} >&2 ;;\n'
        f'  *) said=${{logged:-$said}}; echo {quote(refused)} "${{said##*: }}" >&2 ;;\n'
        "esac\n"
        "exit 1"
    )
