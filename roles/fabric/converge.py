"""Runs opensm on the declared node and nowhere else, and waits until it has configured the ports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote
from roles.fabric.drift import OPENSM, VERBS, chosen, waiting
from roles.fabric.probe import UNITS, FabricState
from roles.fabric.spec import FabricSpec
from roles.packages.converge import installing
from roles.packages.spec import PackagesSpec

SECONDS = 120
"""opensm sweeps a fabric in a few seconds; the other nodes wait for it to be installed and started, too."""


def installs(target: Target[FabricSpec], state: FabricState) -> list[str]:
    """The subnet manager on its node, and what NCCL needs to use adapters."""
    names = [OPENSM] if target.spec.subnet_manager == target.node.name else []
    return [*names, VERBS[state.packager]] if target.spec.rdma == "auto" and state.ports else names


def converge(
    target: Target[FabricSpec], state: FabricState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The packages, the unit, then the ports."""
    ids = {finding.id for finding in findings}
    unit = chosen(state)
    names = [OPENSM] if "opensm-missing" in ids else []
    names += [VERBS[state.packager]] if "ib-disabled-slow" in ids else []
    if names:
        packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
        yield installing(packages, state.packager, names)
    if "opensm-elsewhere" in ids:
        names = [quote(each.unit) for each in state.managers if each.active or each.enabled]
        yield Shell(f"systemctl disable -q --now {' '.join(names)}", seconds=60)
    if ids & {"opensm-missing", "opensm-stopped"}:
        yield Shell(start(unit.unit if unit else UNITS[0]), seconds=60)
    if "ib-port-initializing" in ids:
        yield Shell(wait(target, state), seconds=SECONDS + 30)


def start(unit: str) -> str:
    """Shell that enables and starts opensm; without ib_umad its unit would not even try.

    Debian's starts at boot only where something else waits for the network, so multi-user wants it too.
    """
    return (
        "if test -d /sys/class/infiniband && ! test -e /sys/class/infiniband_mad/abi_version; "
        "then modprobe -q ib_umad || true; fi\n"
        f"systemctl enable -q {quote(unit)}\n"
        f"systemctl add-wants -q multi-user.target {quote(unit)} || true\n"
        f"systemctl start {quote(unit)}\n"
        f"systemctl is-active --quiet {quote(unit)} || {{\n"
        f"  echo 'opensm does not run: see journalctl -u {unit} and /var/log/opensm.log' >&2; exit 1; }}"
    )


def wait(target: Target[FabricSpec], state: FabricState) -> str:
    """Shell that ends when every port that waited is ACTIVE, or says which is not."""
    files = " ".join(
        quote(f"{target.spec.sysfs}/class/infiniband/{port.adapter}/ports/{port.number}/state")
        for port in waiting(state)
    )
    manager = target.spec.subnet_manager
    sentence = (
        f"still not ACTIVE after {SECONDS} s: does opensm on {manager} manage another subnet? "
        f"see /var/log/opensm.log on {manager}"
    )
    return (
        f"end=$(($(date +%s) + {SECONDS}))\n"
        f"for file in {files}; do\n"
        '  until grep -q ACTIVE "$file"; do\n'
        f'    if test "$(date +%s)" -ge "$end"; then echo "$file:" {quote(sentence)} >&2; exit 1; fi\n'
        "    sleep 0.5\n  done\ndone"
    )
