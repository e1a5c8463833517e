"""One look per node: every role's probe in a single command, kept until something changes the node.

pyinfra 3.10 keeps no facts and evaluates operations twice without ``-y``; this is the difference
between one round trip and a hundred. A look that failed is remembered too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from gevent.lock import RLock
from pyinfra.api.host import Host

from inventory.cluster import Cluster
from roles.core import session
from roles.core.role import Finding, Role, Target, Unreadable

MARK = "@@lockstep"
MAX_BYTES = 100_000
"""A command is one argument of ``sh -c``; Linux takes at most 131,072 bytes in one."""

AnyRole = Role[Any, Any]


def target_of(role: AnyRole, cluster: Cluster, name: str) -> Target[Any] | None:
    """The role's declaration for a node; None where the role does not apply or is unmanaged."""
    spec = cluster.sections.get(role.key, role.default)
    if spec is None or spec.manage == "unmanaged":
        return None
    return Target(cluster, cluster.nodes[name], spec)


def script(roles: Sequence[AnyRole], cluster: Cluster, name: str) -> str:
    """The look's shell text for one node: marked sections, each with its own time limit."""
    parts = []
    for role in roles:
        target = target_of(role, cluster, name)
        if target is not None:
            parts.append(
                f"echo '{MARK} {role.name}' >&2; echo '{MARK} {role.name}'\n"
                f"timeout -k 1 {role.seconds} sh /dev/fd/3 3<<'{MARK} end' </dev/null\n"
                f"{role.probe(target).rstrip()}\n"
                f"{MARK} end\n"
                f"printf '\\n{MARK} exit %s\\n' $?"
            )
    text = "\n".join([*parts, f"echo '{MARK} .end'"])
    # pyinfra cannot read bytes that are no UTF-8 (a comment in an old encoding); iconv leaves them
    # out, and complains by its exit code. The end mark proves the output whole.
    clean = "if command -v iconv >/dev/null; then iconv -c -f UTF-8 -t UTF-8; else cat; fi"
    return f"{{\n{text}\n}} | {{ {clean}; }} || :"


@dataclass(frozen=True)
class Section:
    """What one probe printed. code: its exit status; 124 means that its time limit ended it."""

    text: str
    code: int
    stderr: str = ""


def split(stdout: str, stderr: str) -> dict[str, Section]:
    """The sections of a look's output by role name.

    Raises NodeFailed when the end mark is missing: output may be cut although the exit code is 0.
    """
    lines = stdout.split("\n")
    if not lines or lines[-1] != f"{MARK} .end":
        raise session.NodeFailed("the look ended early")
    complaints: dict[str, list[str]] = {}
    current = ""
    for line in stderr.split("\n"):
        if line.startswith(f"{MARK} "):
            current = line[len(MARK) + 1 :]
        elif line:
            complaints.setdefault(current, []).append(line)
    found: dict[str, Section] = {}
    name = ""
    text: list[str] = []
    for line in lines:
        if line.startswith(f"{MARK} exit "):
            code = int(line.rsplit(" ", 1)[1])
            found[name] = Section(
                "\n".join(text).strip("\n"), code, "\n".join(complaints.get(name, []))
            )
        elif line.startswith(f"{MARK} "):
            name, text = line[len(MARK) + 1 :], []
        else:
            text.append(line)
    return found


@dataclass
class _Seen:
    lock: RLock = field(default_factory=RLock)
    states: dict[str, Any] | None = None  # role name -> state, or Unreadable
    error: str = ""
    executing: bool = False
    foreign: int = -1
    changes: int = 0
    own: set[str] = field(default_factory=set)


class Looks:
    """The looks of one run, for the nodes of one cluster.

    The key is pyinfra's Host object, never its ``host`` proxy, which is one object for all nodes.
    """

    def __init__(self, cluster: Cluster, roles: Sequence[AnyRole]) -> None:
        self.cluster = cluster
        self.roles = tuple(roles)
        self._seen: WeakKeyDictionary[Host, _Seen] = WeakKeyDictionary()

    def owns(self, node: Host, operation: str | None) -> None:
        """An operation of ours: it forgets the look itself when it changes something."""
        if operation:
            self._of(node).own.add(operation)

    def forget(self, node: Host) -> None:
        """Something on the node is about to change, or has just changed."""
        seen = self._of(node)
        seen.states, seen.error = None, ""
        seen.changes += 1

    def states(self, node: Host) -> Mapping[str, Any]:
        """Role name to state (or an Unreadable) on that node, looking only if something changed.

        Raises NodeFailed when the node as a whole could not be read.
        """
        seen = self._of(node)
        with seen.lock:  # several nodes may ask for the head's look at once
            executing, foreign = node.state.is_executing, self._foreign(node, seen)
            if (seen.executing, seen.foreign) != (executing, foreign):
                self.forget(node)
            if seen.error:
                raise session.NodeFailed(seen.error)
            if seen.states is not None:
                return seen.states
            seen.executing, seen.foreign = executing, foreign
            changes = -1
            while changes != seen.changes:  # the node may change while another looks at it
                changes = seen.changes
                try:
                    found = self._take(node)
                except session.NodeFailed as error:
                    seen.error = str(error)
                    raise
            seen.states = found
            return found

    def state(self, role: AnyRole, node: Host) -> Any:
        """One role's state on one node. Raises Unreadable or NodeFailed."""
        found = self.states(node)[role.name]
        if isinstance(found, Unreadable):
            raise found
        return found

    def drift(self, role: AnyRole, node: Host) -> list[Finding]:
        """What the role would change there; empty where it does not apply. Raises as ``state``."""
        target = target_of(role, self.cluster, node.name)
        if target is None:
            return []
        return role.drift(target, self.state(role, node), self.others(role, node))

    def others(self, role: AnyRole, node: Host) -> Others:
        """The same role's states on the other nodes."""
        return Others(self, role, node)

    def _of(self, node: Host) -> _Seen:
        return self._seen.setdefault(node, _Seen())

    @staticmethod
    def _foreign(node: Host, seen: _Seen) -> int:
        """How many operations that are not ours have run on the node: they may have changed it."""
        ops = node.state.ops.get(node, {})
        return sum(data.operation_meta.executed for key, data in ops.items() if key not in seen.own)

    def _take(self, node: Host) -> dict[str, Any]:
        text = script(self.roles, self.cluster, node.name)
        limit = sum(role.seconds for role in self.roles) + 10
        output = session.run(node, text, limit)
        sections = split(output.stdout, output.stderr)
        found: dict[str, Any] = {}
        for role in self.roles:
            if target_of(role, self.cluster, node.name) is not None:
                found[role.name] = _parsed(role, sections.get(role.name))
        return found


def _parsed(role: AnyRole, section: Section | None) -> Any:
    if section is None:
        return Unreadable("the look has no section of it")
    if section.code == 124 or section.code == 137:
        return Unreadable(f"its probe did not end within {role.seconds} s")
    if section.code:
        last = (section.stderr or section.text).split("\n")[-1]
        return Unreadable(f"its probe ended with status {section.code}: {last}".rstrip(": "))
    try:
        return role.parse(section.text)
    except Exception as error:  # whatever it is: a raise would end the run for all nodes
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, (Unreadable, ValueError)):
            reason = str(error)
        return Unreadable(f"its probe printed what cannot be read: {reason}")


class Others(Mapping[str, Any]):
    """State of one role on the other nodes, looked at only when asked; see ``role.Peers``."""

    def __init__(self, looks: Looks, role: AnyRole, node: Host) -> None:
        self._looks, self._role, self._node = looks, role, node

    def __getitem__(self, name: str) -> Any:
        host = self._node.state.inventory.get_host(name)
        if name == self._node.name or host in self._node.state.failed_hosts:
            raise KeyError(name)
        try:
            return self._looks.state(self._role, host)
        except (Unreadable, session.NodeFailed):
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (
            name for name in self._looks.cluster.nodes if name != self._node.name and name in self
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)
