"""Brings NCCL's packages to one version in one transaction; then pins, holds, and clears the loader's way.

The pin and the lock list change after the transaction, and dpkg's holds, which a change takes off, are
put back when it fails: at any end the version that is installed is fenced as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from inventory.cluster import Cluster
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.nccl.drift import Wanted, lock_line, may_go, package_names, pin_text, strays, wanted
from roles.nccl.probe import DAMAGE, PIN, NcclState
from roles.nccl.spec import NcclSpec
from roles.packages.converge import installing
from roles.packages.managers import INSTALL_SECONDS, PATIENCE, apt, apt_ready
from roles.packages.spec import PackagesSpec

REMOVED = "/var/lib/lockstep/removed"


def converge(
    target: Target[NcclSpec], state: NcclState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Packages first, then their fences, then the libraries that are in the way."""
    want = wanted(target, state)
    if not isinstance(want, Wanted):
        return
    ids = {finding.id for finding in findings}
    names = package_names(target.spec, state)
    moving = [
        stray
        for stray in strays(state, want)
        if may_go(target.spec, stray) and any(stray.real in finding.seen for finding in findings)
    ]
    # Before the packages: their installation runs ldconfig, which would choose among both.
    if moving:
        yield Shell(move_away([stray.real for stray in moving]))
    if want.package is None:
        return
    right = all(
        [one.version for one in state.packages.get(name, ())] == [want.package] for name in names
    )
    if "nccl-damaged" in ids or (not right and ids & {"nccl-missing", "nccl-version-mismatch"}):
        again = "nccl-damaged" in ids
        if state.manager == "apt":
            change = apt_transaction(target.cluster, names, state, want.package, again)
        else:
            change = rpm_transaction(target.cluster, names, state, want.package, again)
        yield Shell(change, INSTALL_SECONDS)
        return
    if "nccl-unheld" in ids:
        yield Shell(
            f"apt-mark hold {' '.join(names)} >/dev/null"
            if state.manager == "apt"
            else write_locks(state, names, want.package)
        )
    if "nccl-pin" in ids:
        yield Shell(write_file(PIN, pin_text(names, want.package), backup=False))


def apt_transaction(
    cluster: Cluster, names: Sequence[str], state: NcclState, version: str, again: bool
) -> str:
    """Shell: all packages to this version at once, then the pin and the holds.

    When it fails the packages go back to the versions they had, as far as these can be had, and what
    was held is held. again: unpack them although they have this version.
    """
    packages = cluster.section("packages", PackagesSpec) or PackagesSpec()
    words = ["--no-install-recommends", "--no-remove", "--allow-downgrades"]
    words += ["--allow-change-held-packages", *(["--reinstall"] if again else []), "--"]
    install = apt(packages, "install", *words)
    before = {name: state.packages[name][0] for name in names if name in state.packages}
    held = " ".join(name for name, one in before.items() if one.held)
    old = " ".join(quote(f"{name}={one.version}") for name, one in before.items())
    present = f"dpkg-query -W -f '${{Package}}=${{Version}} ' {' '.join(before)}"
    undo = []
    if before:
        undo.append(f'set -- {old}; test "$({present})" = "$* " || {install} {old} || true')
    if held:
        undo.append(f"apt-mark hold {held} || true")
    new = " ".join(quote(f"{name}={version}") for name in names)
    return "\n".join(
        [
            PATIENCE.rstrip(),
            "undo() {",
            "code=$?; trap - EXIT",
            "test $code -ne 0 || return 0",
            "{",
            ":",
            *undo,
            "} >/dev/null 2>&1 </dev/null",
            "exit $code",
            "}",
            "trap undo EXIT",
            "trap 'exit 1' HUP INT TERM",
            *apt_ready(packages),
            f"{install} {new}",
            write_file(PIN, pin_text(names, version), backup=False),
            f"apt-mark hold {' '.join(names)} >/dev/null",
            f"rm -f {DAMAGE}",
        ]
    )


def rpm_transaction(
    cluster: Cluster, names: Sequence[str], state: NcclState, version: str, again: bool
) -> str:
    """Shell: all packages to this version at once with dnf or yum, then the lock list.

    The lock list is passed over for this one transaction and stays as it is when that fails.
    """
    packages = cluster.section("packages", PackagesSpec) or PackagesSpec()
    exact = dict.fromkeys(names, version)
    step = installing(packages, "rpm", [], versions=exact, reinstall=again, past_locks=True)
    locks = [write_locks(state, names, version)] if state.lock_list else []
    return "\n".join([step.command, *locks, f"rm -f {DAMAGE}"])


def write_locks(state: NcclState, names: Sequence[str], version: str) -> str:
    """Shell that replaces the lines about NCCL in the lock list, and no other line."""
    assert state.lock_list is not None
    path = quote(state.lock_list)
    fresh = quote(f"{state.lock_list}.lockstep-new")
    lines = " ".join(quote(lock_line(name, version)) for name in names)
    return (
        f"umask 022; test -e {path} || : > {path}\n"
        f"cp -p {path} {fresh}\n"
        f"{{ grep -v '^[^#]*libnccl' {path} || test $? -eq 1; printf '%s\\n' {lines}; }} > {fresh}\n"
        f"mv -f {fresh} {path}"
    )


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
