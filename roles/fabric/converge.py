"""Runs opensm on the declared node and nowhere else, and waits until it has configured the ports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote
from roles.fabric.drift import chosen, waiting
from roles.fabric.probe import FabricState
from roles.fabric.spec import FabricSpec

SECONDS = 60
"""opensm sweeps a fabric in a few seconds; the other nodes wait for it to be started, too."""


def converge(
    target: Target[FabricSpec], state: FabricState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The unit first, then the ports."""
    ids = {finding.id for finding in findings}
    unit = chosen(state)
    if "opensm-elsewhere" in ids:
        names = [quote(each.unit) for each in state.managers if each.active or each.enabled]
        yield Shell(f"systemctl disable -q --now {' '.join(names)}", seconds=60)
    if "opensm-stopped" in ids and unit is not None:
        yield Shell(
            f"systemctl enable -q {quote(unit.unit)}\nsystemctl start {quote(unit.unit)}",
            seconds=60,
        )
    if "ib-port-initializing" in ids:
        yield Shell(wait(target, state), seconds=SECONDS + 30)


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
