"""Writes the marks by which the nodes know that they share one directory, or that a disk is their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Target
from roles.core.steps import APPEAR_SECONDS, Shell, Step, appears, quote
from roles.storage.drift import strays
from roles.storage.probe import TOKEN_FILE, StorageState, token_file
from roles.storage.spec import StorageSpec

RANDOM = "od -An -N16 -tx1 /dev/urandom | tr -d ' \\n'"


def marking(
    target: Target[StorageSpec], state: StorageState, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The head's mark first, then each node's token. No step writes where the mount is gone."""
    ids = {found.id for found in findings}
    enter = _enter(target, state)
    if "storage-missing" in ids:
        yield Shell(f"umask 022; mkdir -p {quote(target.spec.path)}")
    if ids & {"storage-mark", "storage-missing"} and target.spec.kind != "local":
        yield Shell(
            f"{enter}umask 022; mkdir -p .lockstep\n"
            f"if ! test -s .lockstep/id; then {RANDOM} > .lockstep/.id.new; echo >> .lockstep/.id.new\n"
            # What lies under a mount made later then bears an older token, and is not taken for it.
            f"  rm -f {quote(token_file(target))}; mv -f .lockstep/.id.new .lockstep/id; fi"
        )
    if ids & {"storage-mark", "storage-different", "storage-token", "storage-missing"}:
        if state.mark is None and not target.is_head and target.spec.kind != "local":
            yield Shell(_see_the_mark(target, enter), seconds=APPEAR_SECONDS + 60)
        yield Shell(_token(target, enter))
    if "storage-token-left" in ids:
        folder = f".lockstep/nodes/{target.cluster.name}"
        left = [quote(f"{folder}/{name}.{token}") for name, token in strays(target, state)]
        yield Shell(f"{enter}rm -f -- {' '.join(left)}")
    if "storage-modes" in ids:
        yield Shell(f"{enter}chmod go-w {' '.join(quote(path) for path in state.open)}")


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
    return f"{enter}{appears('.lockstep/id', quote(sentence))}"


def _token(target: Target[StorageSpec], enter: str) -> str:
    """The token is made once, on the node's own disk; on the storage it is the name of an empty file."""
    own, name = quote(token_file(target)), target.node.name
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
