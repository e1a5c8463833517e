"""Mounts the declared storage, and writes the marks by which the nodes know that they share one directory.

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
from roles.storage.drift import has_own_line, lines_left, strays
from roles.storage.mount import Wanted, wanted
from roles.storage.probe import TOKEN_FILE, StorageState, token_file
from roles.storage.spec import StorageSpec

MOUNTING = {
    *("nfs-client-missing", "nfs-fstab", "nfs-mount-wrong", "nfs-mount-options"),
    *("nfs-server-silent", "nfs-refused", "nfs-stale-handle"),
}
"""Findings after whose repair the mount is tried."""

UNMOUNT_SECONDS = 60

RANDOM = "od -An -N16 -tx1 /dev/urandom | tr -d ' \\n'"
SEEN_SECONDS = 15
"""How long an NFS client may take to see what another one wrote; listing directories makes it ask."""


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
    enter = _enter(target, state)
    if "storage-missing" in ids:
        yield Shell(f"umask 022; mkdir -p {quote(target.spec.path)}")
    if "storage-mark" in ids:
        yield Shell(
            f"{enter}umask 022; mkdir -p .lockstep\n"
            f"if ! test -s .lockstep/id; then {RANDOM} > .lockstep/.id.new; echo >> .lockstep/.id.new\n"
            "  mv -f .lockstep/.id.new .lockstep/id; fi"
        )
    if ids & {"storage-mark", "storage-different", "storage-token", "storage-missing"}:
        if state.mark is None and not target.is_head and target.spec.kind != "local":
            yield Shell(_see_the_mark(target, enter), seconds=SEEN_SECONDS + 60)
        yield Shell(_token(target, enter))
    if "storage-token-left" in ids:
        folder = f".lockstep/nodes/{target.cluster.name}"
        left = [quote(f"{folder}/{name}.{token}") for name, token in strays(target, state)]
        yield Shell(f"{enter}rm -f -- {' '.join(left)}")
    if "storage-modes" in ids:
        yield Shell(f"{enter}chmod go-w {' '.join(quote(path) for path in state.open)}")


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


def _enter(target: Target[StorageSpec], state: StorageState) -> str:
    """Shell that goes to the path, and fails where the mount of the look is no longer there."""
    path = quote(target.spec.path)
    point = state.mount.point if state.mount else "/"
    return (
        f"cd {path}\n"
        f"mountpoint -q {quote(point)} || {{ echo {quote(f'{point} is no longer mounted')} >&2; exit 1; }}\n"
    )


def _see_the_mark(target: Target[StorageSpec], enter: str) -> str:
    head = target.cluster.head.name
    sentence = f"{target.spec.path} is not the directory that {head} sees: mount the same one on every node"
    return (
        f"{enter}end=$(($(date +%s) + {SEEN_SECONDS}))\n"
        "while ls -a . .lockstep >/dev/null 2>&1; ! test -s .lockstep/id; do\n"
        f'  if test "$(date +%s)" -ge "$end"; then echo {quote(sentence)} >&2; exit 1; fi\n'
        "  sleep 1\n"
        "done"
    )


def _token(target: Target[StorageSpec], enter: str) -> str:
    """The token is made once, on the node's own disk; on the storage it is the name of an empty file."""
    own, name = quote(token_file(target.spec)), target.node.name
    folder = f".lockstep/nodes/{target.cluster.name}"
    return (
        f"umask 022; mkdir -p {TOKEN_FILE.rpartition('/')[0]}\n"
        f"token=; if test -s {own}; then read -r token < {own}; fi\n"
        "case $token in ????????????????*) ;; *) token= ;; esac\n"
        "case $token in ''|*[!0-9a-f]*)\n"
        f'  token=$({RANDOM}); (umask 077; echo "$token" > {own}.new); mv -f {own}.new {own} ;;\n'
        "esac\n"
        f"{enter}mkdir -p {quote(folder)}\n"
        f': > {quote(folder)}/{quote(name)}."$token"\n'
        f"for other in {quote(folder)}/{quote(name)}.*; do\n"
        '  case $other in *".$token") ;; *) rm -f "$other" ;; esac\n'
        "done"
    )
