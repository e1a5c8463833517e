"""Makes ssh pdsh's default and gives the way to its modules back to root, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.packages.converge import installing
from roles.packages.names import translated
from roles.pdsh.drift import default_file, insecure, manager_of, packages_for_repair
from roles.pdsh.probe import PdshState
from roles.pdsh.spec import PdshSpec


def converge(
    target: Target[PdshSpec], state: PdshState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Only the owner and the others' right to write change; group and other bits stay."""
    ids = {finding.id for finding in findings}
    if "pdsh-default" in ids:
        yield Shell(write_file(*default_file(target, state)))
    if "pdsh-owner" in ids:
        entries = insecure(state)
        strangers = [quote(entry.path) for entry in entries if entry.uid != 0]
        open_to_all = [quote(entry.path) for entry in entries if entry.mode & 0o002]
        lines = [f"chown 0 -- {' '.join(strangers)}"] if strangers else []
        lines += [f"chmod o-w -- {' '.join(open_to_all)}"] if open_to_all else []
        yield Shell("\n".join(lines))
    packages = packages_for_repair(target)
    if "pdsh-modules" in ids and packages is not None:
        yield installing(packages, manager_of(state), package(state), reinstall=True)


def package(state: PdshState) -> tuple[str, ...]:
    """What brings pdsh and its way over ssh."""
    return translated(manager_of(state), "pdsh")
