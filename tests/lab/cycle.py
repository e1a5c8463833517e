"""Break, find, repair, and find nothing more: the loop that every fault goes through.

Two faults are tried in one loop, of different roles and on different nodes, where neither can hide the
other; what verify finds is held against both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.lab import faults
from deploy.lab.faults import Fault
from deploy.lab.state import Family
from roles import registry
from roles.core.role import required
from tests.lab.site import JOB, NODES, Site


@dataclass(frozen=True)
class Case:
    """A fault on one node, of that family."""

    name: str
    fault: Fault
    node: str
    os: Family

    @property
    def role(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Row:
    """What a loop took. detect_s: verify's, with all proofs; repair_s: the one run's; seconds of wall clock.

    changes: operations that changed something on the second run.
    """

    fault: str
    os: Family
    node: str
    detect_s: float
    repair_s: float
    changes: int


def cases(nodes: Mapping[str, Family] = NODES) -> list[Case]:
    """Every fault once on each family that has a node where it can be injected. The head comes first."""
    found: list[Case] = []
    for name, fault in faults.read().items():
        for family in fault.os:
            fitting = [
                node
                for number, (node, os) in enumerate(nodes.items(), 1)
                if os == family and fault.fits(number)
            ]
            if fault.node == "all":  # in one loop for all families
                fitting = [node for node in fitting if node == next(iter(nodes))]
            if fitting:  # nodes of one family take turns, so that all are tried
                found.append(Case(name, fault, fitting[len(found) % len(fitting)], family))
    return found


def sample(every: Sequence[Case]) -> list[Case]:
    """One case for each role and family: the first fault of the role's file that fits."""
    return list({(case.role, case.os): case for case in reversed(every)}.values())[::-1]


def rest(every: Sequence[Case]) -> list[Case]:
    """The cases that the sample leaves out."""
    chosen = sample(every)
    return [case for case in every if case not in chosen]


def plan(every: Sequence[Case]) -> list[list[Case]]:
    """The cases in pairs that do not hide each other, or alone."""
    left, found = list(every), []
    while left:
        first = left.pop(0)
        second = next((case for case in left if _apart(first, case)), None)
        if second is not None:
            left.remove(second)
        found.append([first] if second is None else [first, second])
    return found


def label(broken: Sequence[Case]) -> str:
    """The name of a test of these cases."""
    return "+".join(f"{case.name}@{case.node}" for case in broken)


def _apart(one: Case, other: Case) -> bool:
    if "all" in (one.fault.node, other.fault.node) or one.node == other.node:
        return False
    return one.role != other.role and not (_reaches_over(one.role) and _reaches_over(other.role))


def _reaches_over(name: str) -> bool:
    """Whether the role is judged by proofs between nodes, or carries them."""
    crossing = [role for role in registry.ROLES if role.crossing]
    carried = {need for role in crossing for need in (*role.needs, *role.proof_needs)}
    return name in {role.name for role in crossing} | set(required(carried, registry.ROLES))


def cycle(site: Site, broken: Sequence[Case]) -> list[Row]:
    """Break, verify, converge once, verify, converge again; a row for each case.

    Raises AssertionError where a fault is not found under its id, a role that is not broken has a
    finding, one run does not repair, or the second run changes something.
    """
    for case in broken:
        done = site.lockstep("lab", "break", case.node, case.name)
        assert done.returncode == 0, done.stderr
    start = time.monotonic()
    report = site.verify()
    detect = time.monotonic() - start
    found = {(wrong["node"], wrong["role"], wrong["id"]) for wrong in report["findings"]}
    expected = {
        (node, case.role, case.fault.id)
        for case in broken
        for node in (NODES if case.fault.node == "all" else [case.node])
    }
    assert report["verdict"] == "drift", report
    assert expected <= found, f"not named: {sorted(expected - found)}, but {sorted(found)}"
    innocent = {wrong for wrong in found if wrong[1] not in {case.role for case in broken}}
    assert not innocent, f"named, but not broken: {sorted(innocent)}"
    start = time.monotonic()
    site.converge()
    repair = time.monotonic() - start
    site.finished(JOB["name"])
    report = site.verify()
    assert report["verdict"] == "ok", report
    changes = int(site.converge()["totals"]["success"])
    assert changes == 0, f"the second run changes {changes} more"
    return [
        Row(case.name, case.os, case.node, round(detect, 1), round(repair, 1), changes)
        for case in broken
    ]
