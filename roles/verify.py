"""Are the nodes what the file says, and identical? The report that ``lockstep verify`` prints.

It looks with the probes that converge uses, judges with the same drift, and runs each role's proof.
It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from inventory.cluster import Cluster
from roles.core import session
from roles.core.look import AnyRole, Looks, target_of
from roles.core.role import PROOF_SECONDS, Fact, Rule, Unreadable

Verdict = Literal["ok", "drift", "unreadable"]
EXIT_CODES: Mapping[Verdict, int] = {"ok": 0, "drift": 1, "unreadable": 2}
UNREADABLE = "unreadable"


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
class Identity:
    """One fact compared between nodes. values: node name to value; nodes without one are left out."""

    fact: str
    values: Mapping[str, str]
    rule: Rule
    ok: bool


@dataclass(frozen=True)
class Report:
    """What ``verify`` found: only what is wrong, and every compared fact."""

    findings: Sequence[Wrong] = field(default_factory=list)
    identity: Sequence[Identity] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """unreadable when anything could not be looked at; else drift; else ok."""
        if any(found.id == UNREADABLE for found in self.findings):
            return "unreadable"
        if self.findings or not all(row.ok for row in self.identity):
            return "drift"
        return "ok"

    def as_json(self) -> dict[str, Any]:
        """The stable form: verdict, findings, identity."""
        return {
            "verdict": self.verdict,
            "findings": [asdict(found) for found in self.findings],
            "identity": [asdict(row) for row in self.identity],
        }


def check_node(looks: Looks, node: Any) -> list[Wrong]:
    """Everything that is wrong on one node, its proofs included."""
    name = node.name
    try:
        looks.states(node)
    except session.NodeFailed as error:
        return [_unreadable(name, "node", str(error))]
    found: list[Wrong] = []
    for role in looks.roles:
        target = target_of(role, looks.cluster, name)
        if target is None:
            continue
        try:
            differences = looks.drift(role, node)
        except Unreadable as error:
            found.append(_unreadable(name, role.name, str(error)))
            continue
        found += [
            Wrong(name, role.name, each.id, each.want, each.seen, each.fix) for each in differences
        ]
        if role.proof and not differences:
            found += _proofs(role, node, role.proof(target))
    return found


def _proofs(role: AnyRole, node: Any, script: str) -> Iterable[Wrong]:
    try:
        lines = session.run(node, script, PROOF_SECONDS).stdout.splitlines()
    except session.NodeFailed as error:
        return [_unreadable(node.name, role.name, f"its proof could not run: {error}")]
    pairs = [line.partition("\t") for line in lines if line.strip()]
    fix = "run pyinfra inventory.py deploy/cluster.py, then verify again"
    return [Wrong(node.name, role.name, key, "proved", sentence, fix) for key, _, sentence in pairs]


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
    rows = [
        (
            fact,
            {node.name: value for node in nodes if (value := _value(looks, role, fact, node))},
        )
        for role in looks.roles
        for fact in role.facts
    ]
    systems = {name: value for fact, values in rows if fact.is_os for name, value in values.items()}
    return [judge(fact, values, looks.cluster, systems) for fact, values in rows]


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
