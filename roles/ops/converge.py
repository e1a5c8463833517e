"""Removes locks of dead builds, and compiles operators once: the other nodes of that kind take them.

They travel by way of the control machine, which keeps them: a node that is installed anew compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from inventory.cluster import Node
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Download, Shell, Step, Upload, quote, settled
from roles.environment.converge import alone, here_script
from roles.environment.spec import Declared, Environments
from roles.ops.drift import REPAIRS, bundle, kept_for, of_environment, wanted
from roles.ops.place import HOME, folder, python
from roles.ops.probe import HELD, Lock, OpsState
from roles.ops.prove import PROOF, STAMP

HERE = Path(__file__).parent
COMPILE_SECONDS = 3600
UNPACK_SECONDS = 600


def converge(
    target: Target[Environments], state: OpsState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The locks, then each environment's operators. What is only unproved needs no step."""
    if state.locks:
        yield Shell(unlock(state.locks))
    for one in target.spec.each():
        found = [each for each in of_environment(target.node, state, one) if each in findings]
        if not any(each.id in REPAIRS for each in found):
            continue
        want, packed = wanted(one, target.node, state), f"{folder(one.name)}.tar.gz"
        if kept := kept_for(want, state.environments[one.name]):
            yield Upload(kept, packed, hashlib.sha256(kept.read_bytes()).hexdigest())
            yield Shell(alone(unpack(one), UNPACK_SECONDS), 2 * UNPACK_SECONDS)
        else:
            command = alone(compiling(one, target.node, want), COMPILE_SECONDS)
            yield Shell(command, 2 * COMPILE_SECONDS)
            yield Download(packed, bundle(want))
        yield Shell(f"rm -f {quote(packed)}")


def unlock(locks: Sequence[Lock]) -> str:
    """Shell that removes these locks, unless somebody builds under them by now.

    As the user whose home it is: in a folder of his, a path may lead root anywhere.
    """
    lines = [HELD.strip()]
    for lock in locks:
        remove = f"rm -f -- {quote(lock.path)}"
        if lock.user != "root":
            remove = f"runuser -u {quote(lock.user)} -- {remove}"
        lines.append(
            f"if [ -f {quote(lock.path)} ] && ! held {quote(lock.path)}; then {remove}; fi"
        )
    return "\n".join(lines)


def compiling(one: Declared, node: Node, want: dict[str, str]) -> str:
    """Shell that compiles the operators beside their place, packs them, and puts them in place.

    The archive has times in full: ninja compiles again what is a part of a second too old.
    """
    order = json.dumps({"ops": one.spec.ops, "for": want})
    return (
        f"umask 022\ncd /\n{_fresh(one)}"
        f'{python(one, node)} - "$N"/{STAMP} {quote(order)} {here_script("build.py", HERE)}'
        'tar --format=posix -C "$N" -czf "$D.tar.gz.new" .\n'
        'sync "$D.tar.gz.new"\nmv -f "$D.tar.gz.new" "$D.tar.gz"\n'
        f"{_SWITCH}"
    )


def unpack(one: Declared) -> str:
    """Shell that puts the operators in place that were compiled on another node."""
    return f'umask 022\n{_fresh(one)}tar -xzf "$D.tar.gz" -C "$N" --no-same-owner\n{_SWITCH}'


def _fresh(one: Declared) -> str:
    return (
        f'mkdir -p {HOME}\nD={quote(folder(one.name))}; N=$D.new\nrm -rf "$N"; mkdir -m 0755 "$N"\n'
    )


_ON_DISK = settled('"$N"')
_SWITCH = f"""{_ON_DISK}
rm -rf "$D.old"
if [ -e "$D" ]; then mv -T "$D" "$D.old"; fi
mv -T "$N" "$D"
rm -rf "$D.old"
"""


def proof(target: Target[Environments]) -> str:
    """Shell that proves the operators of every environment that has some.

    A damaged library, or one for another processor, may kill the process that loads it.
    """
    calls = (
        f"{python(one, target.node)} - {quote(folder(one.name))} {' '.join(one.spec.ops)} "
        f"{here_script('prove.py', HERE)}"
        f"c=$?; D={quote(folder(one.name))}\n"
        'if [ "$c" != 0 ]; then\n'
        '  printf \'ops-load\\t%s: loading them ended with status %s\\n\' "$D" "$c"\n'
        # SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV: of the code itself, and not of whoever ended it.
        '  case $c in 13[2456]|139) printf \'{"wrong": "loading them ended with status %s"}\\n\' "$c" '
        f'>"$D/{PROOF}";; esac\nfi\n'
        for one in target.spec.each()
        if one.spec.ops
    )
    return "set +e\ncd /\n" + "".join(calls)
