"""Are the nodes what the file says, and identical? The report that ``lockstep verify`` prints.

It looks with the probes that converge uses, judges with the same drift, and runs each role's proof.
It changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from inventory.cluster import Cluster
from roles.core import session
from roles.core.look import AnyRole, Looks, target_of
from roles.core.role import (
    DEEP_SECONDS,
    PROOF_SECONDS,
    Fact,
    Rule,
    Target,
    Unreadable,
    proved_wrong,
    required,
)

Verdict = Literal["ok", "drift", "unreadable"]
EXIT_CODES: Mapping[Verdict, int] = {"ok": 0, "drift": 1, "unreadable": 2}
UNREADABLE = "unreadable"
NODE = "node"
"""Stands for a role where the node as a whole could not be read."""


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong on one node."""

    node: str
    role: str
    id: str
    want: str
    seen: str
    fix: str


@dataclass(frozen=True)
class Waiting:
    """A role of one node that is not judged, because roles that it needs are wrong."""

    node: str
    role: str
    needs: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The stable form: node, role, for."""
        return {"node": self.node, "role": self.role, "for": list(self.needs)}


@dataclass(frozen=True)
class Identity:
    """One fact compared between nodes. values: node name to value; nodes without one are left out."""

    fact: str
    values: Mapping[str, str]
    rule: Rule
    ok: bool


@dataclass(frozen=True)
class Report:
    """What ``verify`` found: what is wrong, what cannot be judged before that is mended, and every fact.

    nodes: all nodes of the cluster, in the order of the file.
    """

    nodes: Sequence[str] = ()
    findings: Sequence[Wrong] = ()
    waiting: Sequence[Waiting] = ()
    identity: Sequence[Identity] = ()

    @property
    def verdict(self) -> Verdict:
        """unreadable when anything could not be looked at; else drift; else ok. What is not judged is not ok."""
        if any(found.id == UNREADABLE for found in self.findings):
            return "unreadable"
        if self.findings or self.waiting or not all(row.ok for row in self.identity):
            return "drift"
        return "ok"

    def as_json(self) -> dict[str, Any]:
        """The stable form: verdict, findings, waiting, identity."""
        return {
            "verdict": self.verdict,
            "findings": [asdict(found) for found in self.findings],
            "waiting": [each.as_json() for each in self.waiting],
            "identity": [asdict(row) for row in self.identity],
        }


Check = dict[str, list[Wrong]]
"""What is wrong on one node, by role; a node that could not be read has one entry, ``node``."""

Each = Callable[[Callable[[Any], Check]], Mapping[str, Check]]
"""Does something on every node, at the same time; the results by node name."""


def report(looks: Looks, nodes: Sequence[Any], each: Each, deep: bool = False) -> Report:
    """Look at all nodes, run the proofs, and keep of what is wrong the causes alone.

    deep: run the deep proofs too.
    """
    checks = each(lambda node: check_node(looks, node, deep))
    proved = each(lambda node: _prove_together(looks, node, checks))
    wrong = {name: {**check, **proved[name]} for name, check in checks.items()}
    findings: list[Wrong] = []
    waiting: list[Waiting] = []
    for name, check in wrong.items():
        findings += check.get(NODE, [])
        for role in looks.roles:
            target = target_of(role, looks.cluster, name)
            if NODE in check or target is None:
                continue
            needs = [
                *role.needs,
                *(role.proof_needs if role.proof and role.name not in checks[name] else ()),
            ]
            found, causes = check.get(role.name, []), _causes(looks, role, needs, check)
            causes += _elsewhere(role, target, wrong)
            if not causes:
                findings += found
            if causes and (found or role.proof):
                waiting.append(Waiting(name, role.name, causes))
    names = [node.name for node in nodes]
    return Report(names, findings, waiting, compare(looks, nodes))


def check_node(looks: Looks, node: Any, deep: bool = False) -> Check:
    """Everything that is wrong on one node, with the proofs that it can give alone."""
    name = node.name
    try:
        looks.states(node)
    except session.NodeFailed as error:
        return {NODE: [_unreadable(name, NODE, str(error))]}
    wrong: Check = {}
    for role in looks.roles:
        target = target_of(role, looks.cluster, name)
        if target is None:
            continue
        try:
            found = [
                Wrong(name, role.name, each.id, each.want, each.seen, each.fix)
                for each in looks.drift(role, node)
            ]
        except Unreadable as error:
            found = [_unreadable(name, role.name, str(error))]
        if _provable(looks, role, wrong):
            if role.proof and not role.crossing and not found:
                found = _proofs(looks, role, node, role.proof(target), PROOF_SECONDS)
            if role.deep and deep and not found:
                found = _proofs(looks, role, node, role.deep(target), DEEP_SECONDS)
        if found:
            wrong[role.name] = found
    return wrong


def _prove_together(looks: Looks, node: Any, checks: Mapping[str, Check]) -> Check:
    """The crossing proofs, between the nodes that are right so far: what is wrong is told already."""
    wrong: Check = {}
    for role in looks.roles:
        if not role.proof or not role.crossing:
            continue
        right = {
            name: declared
            for name, declared in looks.cluster.nodes.items()
            if role.name not in checks[name] and _provable(looks, role, checks[name])
        }
        if node.name not in right or looks.cluster.head.name not in right:
            continue
        target = target_of(role, replace(looks.cluster, nodes=right), node.name)
        if target and (found := _proofs(looks, role, node, role.proof(target), PROOF_SECONDS)):
            wrong[role.name] = found
    return wrong


def _provable(looks: Looks, role: AnyRole, check: Check) -> bool:
    return NODE not in check and not _causes(looks, role, [*role.needs, *role.proof_needs], check)


def _causes(looks: Looks, role: AnyRole, names: Iterable[str], check: Check) -> list[str]:
    """Which of these roles, and of those that they need in turn, are wrong; or which gate is."""
    gates = [] if role.gate else [each.name for each in looks.roles if each.gate]
    return [name for name in required([*gates, *names], looks.roles) if name in check]


def _elsewhere(role: AnyRole, target: Target[Any], checks: Mapping[str, Check]) -> list[str]:
    """What is wrong on another node, so that the role is not judged on this one."""
    place = role.elsewhere(target) if role.elsewhere else None
    if place is None:
        return []
    node, needed = place
    found = checks.get(node, {})
    return [f"{needed} on {node}"] if needed in found or NODE in found else []


def _proofs(looks: Looks, role: AnyRole, node: Any, script: str, seconds: int) -> list[Wrong]:
    try:
        found = proved_wrong(session.run(node, script, seconds).stdout)
    except session.NodeFailed as error:
        return [_unreadable(node.name, role.name, f"its proof could not run: {error}")]
    if found:
        looks.forget(
            node
        )  # a failed proof takes back what it had noted, and that is no fact any more
    return [Wrong(node.name, role.name, each.id, each.want, each.seen, each.fix) for each in found]


def _unreadable(node: str, role: str, reason: str) -> Wrong:
    return Wrong(
        node,
        role,
        UNREADABLE,
        "an answer",
        reason,
        f"make {node} reachable and readable; nothing is changed there meanwhile",
    )


def compare(looks: Looks, nodes: Iterable[Any]) -> list[Identity]:
    """Every role's facts, compared between the nodes that could be read."""
    nodes = list(nodes)
    rows: dict[str, tuple[Fact[Any], dict[str, str]]] = {}
    for role in looks.roles:
        for fact in role.facts:
            _, values = rows.get(fact.name, (fact, {}))
            own = {node.name: value for node in nodes if (value := _value(looks, role, fact, node))}
            rows[fact.name] = fact, values | own
    systems = {
        name: value
        for fact, values in rows.values()
        if fact.is_os
        for name, value in values.items()
    }
    return [judge(fact, values, looks.cluster, systems) for fact, values in rows.values()]


def _value(looks: Looks, role: AnyRole, fact: Fact[Any], node: Any) -> str | None:
    try:
        if target_of(role, looks.cluster, node.name) is None:
            return None
        return fact.read(looks.state(role, node))
    except (Unreadable, session.NodeFailed):
        return None


def judge(
    fact: Fact[Any], values: Mapping[str, str], cluster: Cluster, systems: Mapping[str, str]
) -> Identity:
    """Whether the values keep the fact's rule. systems: node name to its operating system."""
    groups: dict[Any, set[str]] = {}
    for name, value in values.items():
        group: Any = None
        if fact.rule == "equal per class":
            group = cluster.nodes[name].gpu_class
        elif fact.rule == "equal per class and os":
            group = cluster.nodes[name].gpu_class, systems.get(name)
        groups.setdefault(group, set()).add(value)
    if fact.rule == "any":
        ok = True
    elif fact.rule == "differs":
        ok = len(set(values.values())) == len(values)
    else:
        ok = all(len(group) == 1 for group in groups.values())
    return Identity(fact.name, dict(values), fact.rule, ok)
