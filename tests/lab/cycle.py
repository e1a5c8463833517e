"""Break, find, repair, and find nothing more: the loop that every fault goes through.

Up to six faults are tried in one loop, three a node, where none can hide another; what verify finds is
held against all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.lab import faults
from deploy.lab.faults import Fault
from deploy.lab.state import Family, Kind
from roles import registry
from roles.core.look import AnyRole
from roles.core.role import required
from tests.lab.site import JOB, MIRRORED, NODES, Site, nodes_of

A_NODE = 3
"""So many faults lie on one node at once."""


APART = ("sync",)
"""Roles whose faults need storage of another kind: another test tries them."""


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

    @property
    def slug(self) -> str:
        return self.name.partition("/")[2]

    @property
    def lies_on(self) -> frozenset[str]:
        """The nodes on which verify names it."""
        everywhere = frozenset(NODES)
        if self.fault.shows == "others":
            return everywhere - {self.node}
        return everywhere if self.fault.node == "all" else frozenset([self.node])


@dataclass(frozen=True)
class Row:
    """What the loop of a fault took, with all the faults that were tried together.

    detect_s: verify's, with all proofs; repair_s: the one run's; seconds of wall clock.
    changes: operations that changed something on the second run.
    """

    fault: str
    os: Family
    node: str
    detect_s: float
    repair_s: float
    changes: int


def rehearsed(kind: Kind = "container") -> dict[str, Fault]:
    """The faults, but those of APART. kind: "vm" for those that need machines, and "container" for all others."""
    return {
        name: each
        for name, each in faults.read().items()
        if each.least == kind and name.partition("/")[0] not in APART
    }


def cases(nodes: Mapping[str, Family] = NODES, kind: Kind = "container") -> list[Case]:
    """Every such fault once on each family that has a node where it can be injected. The head comes first."""
    found: list[Case] = []
    for name, fault in rehearsed(kind).items():
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


def untried(every: Sequence[Case], tried: Sequence[Case]) -> list[Case]:
    """The cases whose fault is not among those tried on a node of that family."""
    known = {(case.name, case.os) for case in tried}
    return [case for case in every if (case.name, case.os) not in known]


def shares() -> tuple[list[Case], list[Case], list[Case]]:
    """Every fault once on each of its families: the sample, the mirrored pair's, and what is left for the first.

    The mirrored pair takes all that it can: the first one has other tests as well.
    """
    first = cases()
    sampled = sample(first)
    mirrored = untried(cases(nodes_of(MIRRORED)), sampled)
    return sampled, mirrored, untried(first, [*sampled, *mirrored])


def plan(every: Sequence[Case]) -> list[list[Case]]:
    """The cases in loops, none of which has two that could hide each other."""
    # Of a role that crosses nodes a loop has but one; what a user must mend costs a run more, so it lies together.
    left = sorted(every, key=lambda case: (case.fault.mend is None, not _role(case).crossing))
    found: list[list[Case]] = []
    while left:
        row: list[Case] = []
        for case in left:
            lying = [node for other in row for node in other.lies_on]
            room = all(lying.count(node) < A_NODE for node in case.lies_on)
            if room and all(_apart(case, other) for other in row):
                row.append(case)
        left = [case for case in left if case not in row]
        found.append(row)
    return found


def label(broken: Sequence[Case]) -> str:
    """The name of a test of these cases."""
    return "+".join(f"{case.name}@{case.node}" for case in broken)


def _apart(one: Case, other: Case) -> bool:
    """Whether verify names both, and one run repairs both.

    Of a role lies the same fault on both nodes, or such as show beside each other; of what is proved between
    nodes, a role breaks on one alone.
    """
    if one.role == other.role:
        if other.slug in one.fault.beside or one.slug in other.fault.beside:
            return True
        return one.name == other.name and one.node != other.node and not _role(one).crossing
    return not _hides(one, other) and not _hides(other, one)


def _hides(cause: Case, case: Case) -> bool:
    """Whether a role is not judged for the other, or that node left out of what nodes prove together.

    What crosses nodes may show on any of them.
    """
    role = _role(case)
    met = role.crossing or _role(cause).crossing or bool(cause.lies_on & case.lies_on)
    return met and cause.role in required([*role.needs, *role.proof_needs], registry.ROLES)


def _role(case: Case) -> AnyRole:
    return next(role for role in registry.ROLES if role.name == case.role)


def cycle(site: Site, broken: Sequence[Case]) -> list[Row]:
    """Break, verify, converge once, verify, converge again; a row for each case.

    What the user must mend is mended before that run, after one that tells so.
    Raises AssertionError where a fault is not found under its id, a role has a finding where it is not
    broken, one run does not repair, or the second run changes something; the nodes are converged once more
    then, so that the next loop fails for causes of its own alone.
    """
    try:
        return _loop(site, broken)
    except AssertionError:
        site.pyinfra("deploy/cluster.py", "-y")
        raise


def _loop(site: Site, broken: Sequence[Case]) -> list[Row]:
    for case in broken:
        faults.inject(site.paths, case.node, case.name)
    start = time.monotonic()
    report = site.verify()
    detect = time.monotonic() - start
    found = {(wrong["node"], wrong["role"], wrong["id"]) for wrong in report["findings"]}
    expected = {(node, case.role, case.fault.id) for case in broken for node in case.lies_on}
    assert report["verdict"] == "drift", report
    assert expected <= found, f"not named: {sorted(expected - found)}, but {sorted(found)}"
    innocent = {wrong for wrong in found if not may_show(*wrong[:2], broken)}
    assert not innocent, f"named, but not broken: {sorted(innocent)}"
    _by_hand(site, broken)
    start = time.monotonic()
    site.converge()
    repair = time.monotonic() - start
    if "job" in site.declared():
        site.finished(JOB["name"])
    report = site.verify()
    assert report["verdict"] == "ok", report
    changes = int(site.converge()["totals"]["success"])
    assert changes == 0, f"the second run changes {changes} more"
    return [
        Row(case.name, case.os, case.node, round(detect, 1), round(repair, 1), changes)
        for case in broken
    ]


def _by_hand(site: Site, broken: Sequence[Case]) -> None:
    """Have a run refuse what it cannot repair, in a sentence, and do what the user is told to do."""
    left = [case for case in broken if case.fault.mend is not None]
    if not left:
        return
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-4000:]
    for case in left:
        assert case.fault.id in done.stderr, f"{case.fault.id}: {done.stderr[-4000:]}"
        site.shell(case.node, str(case.fault.mend))


def may_show(node: str, role: str, broken: Sequence[Case]) -> bool:
    """Whether one of the cases explains a finding; what crosses nodes may show on any of them."""
    judged = next((each for each in registry.ROLES if each.name == role), None)
    return judged is not None and any(
        case.role == role and (node in case.lies_on or judged.crossing) for case in broken
    )
