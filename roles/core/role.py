"""What a role is: a declared spec, a probe, a typed state, and the pure difference between them.

Nothing here reaches a node. ``look`` fetches what probes print, ``converge`` removes drift, ``verify``
reports it; all three use the one ``drift`` that a role defines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Literal, TypeVar

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.core.steps import Step

S = TypeVar("S", bound=Spec)
T = TypeVar("T")


PROOF_SECONDS = 300
"""Time limit of a role's proof."""
DEEP_SECONDS = 3600
"""Time limit of a role's deep proof, which may read all of a slow disk."""


class Unreadable(Exception):
    """What a probe printed cannot be understood, so nothing may be changed on its account."""


END = "end"
"""The last line of what a probe prints."""


def whole(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser that takes whole output only: its last line is ``end``, which ``parse`` does not get.

    So a node whose answer was cut off is never taken for one that lacks something (or has nothing
    wrong). Whatever else ``parse`` stumbles over is raised as Unreadable too.
    """

    @wraps(parse)
    def read(text: str) -> T:
        body, _, last = text.rpartition("\n")
        if last != END:
            raise Unreadable("the answer is cut off")
        try:
            return parse(body.strip("\n"))
        except KeyError as error:
            raise Unreadable(f"the answer does not show {error}") from None
        except (ValueError, IndexError, TypeError) as error:
            raise Unreadable(str(error)) from None

    return read


@dataclass(frozen=True)
class Finding:
    """One difference between a node and its declaration.

    id: the key in the role's ``symptoms.yaml``; stable, lower case with hyphens.
    want, seen: the declared and the found value, in words a user can compare.
    fix: what removes the difference; what Lockstep does, or what the user must do.
    repairable: False when converging cannot remove it; the node then fails with ``fix``.
    disturbs: True when the repair would disturb a running job; it then waits until the job ended.
    shared: True when other nodes use what is repaired: then their jobs count too.
    """

    id: str
    want: str
    seen: str
    fix: str
    repairable: bool = True
    disturbs: bool = False
    shared: bool = False

    def __str__(self) -> str:
        return f"{self.id}: want {self.want}, seen {self.seen}"


AGAIN = "run pyinfra inventory.py deploy/cluster.py, then verify again"
"""What mends most of what a proof finds: a proof that fails takes back its stamp, and the next run sees that."""
PROVED = "proved"
"""What is wanted by each finding of a proof, and by no other."""


def proved_wrong(text: str) -> list[Finding]:
    """What a proof printed, as findings; a line without a fix of its own gets ``AGAIN``."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        id, sentence, fix, *_ = [*line.split("\t", 2), "", ""]
        found.append(Finding(id, PROVED, sentence, fix or AGAIN, repairable=not fix))
    return found


@dataclass(frozen=True)
class Target(Generic[S]):
    """The declared side of one role on one node."""

    cluster: Cluster
    node: Node
    spec: S

    @property
    def is_head(self) -> bool:
        """The head is the first node of the file, whatever ``--limit`` says."""
        return self.node.name == self.cluster.head.name

    @property
    def others(self) -> list[Node]:
        """All nodes of the cluster but this one, in the order of the file."""
        return [node for node in self.cluster.nodes.values() if node.name != self.node.name]


Peers = Mapping[str, Any]
"""State of the same role on the other nodes, by node name; a node that could not be read is absent."""

Rule = Literal["equal", "equal per class", "equal per class and os", "differs", "any"]


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A value of each node, compared between the nodes.

    name: of its row. Where two roles know the same, the later role's value and rule count.
    rule: "equal" on all nodes, "equal per class" within a ``gpu_class``, "equal per class and os"
    within a class among nodes of one operating system's release, "differs" on every node; "any" is
    shown and never judged.
    read: the value in a state; None where the node has none, which is never compared.
    is_os: its value is the operating system and release by which the rule above groups the nodes.
    """

    name: str
    rule: Rule
    read: Callable[[T], str | None]
    is_os: bool = False


@dataclass(frozen=True)
class Role(Generic[S, T]):
    """One concern of a node.

    section: the key in the cluster file. default: the spec when the file is silent; None means
    that the role applies only where the file declares it.
    probe(target): POSIX shell, read-only, run as root; what it prints on stdout, ``parse`` reads.
    A non-zero exit means "could not look". It must tell "absent" from "not permitted". Its last line is
    ``end``; ``whole`` makes the parser insist on it.
    drift(target, state, peers): pure.
    converge(target, state, peers, findings): the steps that remove the repairable findings.
    needs: roles that must be right on this node before this one may change it.
    elsewhere(target): another node and a role that must be right there before this one is judged here,
    where what that lacks would only show again; None where there is no such node.
    head_first: the head converges before the others (they read what it publishes).
    first(target, state, peers): the node that converges before this one, which takes what it makes; None
    where this one waits for nobody. Always an earlier node of the file.
    together: names of the nodes that change at the same time or not at all: nothing happens unless
    each of them takes part in this run and is right in every other role. Its steps may ``Meet``.
    proof(target): slow or crossing proof, shell; run by ``verify`` and after a change; leaves the
    stamp that the probe reads. Prints one line "ID<TAB>what is wrong" for each failed proof; where no run
    of converge mends that, "<TAB>what the user is to do" follows. ``proved_wrong`` reads them.
    deep(target): shell that answers as a proof does, and is too slow for every ``verify``: it runs after
    the proof where it is asked for.
    crossing: the proof needs the other nodes to be right too, so a node's own change does not run it;
    its target names the nodes that are.
    proof_needs: roles, beside ``needs``, without which the proof would only repeat their findings.
    busy(state): what of this role runs on the node now and must not be disturbed, in words, or None.
    remarks(target, state, peers, dry): lines (and their colours) for the user beside the findings,
    said once a run; dry: what would be done is to be shown exactly.
    seconds: time limit of the probe.
    installs(target, state): system packages that converging may install there, whether the node has them
    or not, as its manager takes them; an exact version with '*' where a part of it is not known. A bundle
    for nodes without sources gathers them.
    gate: every other role needs this one; where it is not right, it alone is said, and nothing is changed.
    """

    name: str
    spec: type[S]
    default: S | None
    probe: Callable[[Target[S]], str]
    parse: Callable[[str], T]
    drift: Callable[[Target[S], T, Peers], list[Finding]]
    converge: Callable[[Target[S], T, Peers, Sequence[Finding]], Iterator[Step]]
    section: str = ""
    facts: Sequence[Fact[T]] = ()
    needs: Sequence[str] = ()
    elsewhere: Callable[[Target[S]], tuple[str, str] | None] | None = None
    head_first: bool = False
    first: Callable[[Target[S], T, Peers], str | None] | None = None
    together: Callable[[Cluster], Sequence[str]] | None = None
    seconds: int = 10
    proof: Callable[[Target[S]], str] | None = None
    deep: Callable[[Target[S]], str] | None = None
    crossing: bool = False
    proof_needs: Sequence[str] = ()
    busy: Callable[[T], str | None] | None = None
    remarks: Callable[[Target[S], T, Peers, bool], Iterable[tuple[str, str | None]]] | None = None
    installs: Callable[[Target[S], T], Iterable[str]] | None = None
    gate: bool = False

    @property
    def key(self) -> str:
        """The section's key in the cluster file."""
        return self.section or self.name


def required(names: Iterable[str], roles: Iterable[Role[Any, Any]]) -> list[str]:
    """The named roles and all that these need in turn, in the order of ``roles``."""
    known = {role.name: role for role in roles}
    found: set[str] = set()
    left = [name for name in names if name in known]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += known[name].needs
    return [name for name in known if name in found]
