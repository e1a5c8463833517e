"""Clears the loader's way, then brings NCCL's packages to one version in one transaction; then pins and holds.

The pin changes after the transaction: at any end the version that is installed is fenced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.nccl.drift import Wanted, may_go, package_names, pin_text, strays, wanted
from roles.nccl.probe import DAMAGE, PIN, NcclState
from roles.nccl.spec import NcclSpec
from roles.packages.fences import closing, differing, exactly
from roles.packages.spec import PackagesSpec

REMOVED = "/var/lib/lockstep/removed"


def converge(
    target: Target[NcclSpec], state: NcclState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The libraries that are in the way, then the packages, then their fences."""
    want = wanted(target, state)
    if not isinstance(want, Wanted):
        return
    ids = {finding.id for finding in findings}
    names = package_names(target.spec, state)
    moving = [
        stray
        for stray in strays(state, want)
        if may_go(target, stray) and any(stray.real in finding.seen for finding in findings)
    ]
    # Before the packages: their installation runs ldconfig, which would choose among both.
    if moving:
        yield Shell(move_away([stray.real for stray in moving]))
    if want.package is None:
        return
    versions = dict.fromkeys(names, want.package)
    right = not differing(versions, state.packages)
    pin = write_file(PIN, pin_text(names, want.package), backup=False)
    if "nccl-damaged" in ids or (not right and ids & {"nccl-missing", "nccl-version-mismatch"}):
        yield exactly(
            target.cluster.section("packages", PackagesSpec) or PackagesSpec(),
            state.manager,
            versions,
            state.packages,
            state.locks,
            reinstall="nccl-damaged" in ids,
            then=[*([pin] if state.manager == "apt" else []), f"rm -f {DAMAGE}"],
        )
        return
    if "nccl-unheld" in ids:
        yield Shell(closing(state.manager, versions, state.locks))
    if "nccl-pin" in ids:
        yield Shell(pin)


def move_away(files: Sequence[str]) -> str:
    """Shell that moves libraries out of the loader's way, keeps them, and lets it look again.

    Links that led to them go; ldconfig makes the right one anew from what is left.
    """
    lines = ["umask 077"]
    for file in files:
        kept, folder = f"{REMOVED}{file}", str(PurePosixPath(file).parent)
        lines += [
            f"mkdir -p {quote(str(PurePosixPath(kept).parent))}",
            f"mv -f {quote(file)} {quote(kept)}",
            f"for l in {quote(folder)}/libnccl.so*; do "
            'if test -L "$l" && ! test -e "$l"; then rm -f "$l"; fi; done',
        ]
    return "\n".join([*lines, "umask 022", "PATH=$PATH:/usr/sbin:/sbin ldconfig"])
