"""Removes drift: one pyinfra operation a role, registered on every node, always.

That shape alone gives the declared order, fresh drift, honest counts and a cheap run: whether a role
applies, what differs and what to do about it is decided inside the operation. Nothing here knows any
particular role.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import gevent
from gevent.lock import RLock
from pyinfra import host as host_proxy
from pyinfra.api import FunctionCommand, StringCommand, operation
from pyinfra.api.command import PyinfraCommand
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from inventory.job import check_job, load_job
from roles import registry
from roles.core import session
from roles.core.chain import Chain, upload
from roles.core.here import run_here
from roles.core.look import AnyRole, Looks, target_of
from roles.core.mirror import Spread, mirror
from roles.core.role import PROOF_SECONDS, Finding, Target, Unreadable, proved_wrong, required
from roles.core.steps import (
    ON_DISK,
    Download,
    Here,
    Meet,
    Mirror,
    NewLogin,
    Shell,
    Step,
    Upload,
    UploadFolder,
)
from roles.core.upload import download, upload_folder

ROUNDS = 2
"""A repair may uncover something else to repair: a start that nobody goes on with is a job to resume."""

FIRST_SECONDS = 3600
"""How long nodes wait for the one that makes what they take; an archive may be travelling."""


class Run:
    """What one pyinfra run knows: the looks, and which roles are blocked on which node."""

    _runs: WeakKeyDictionary[State, Run] = WeakKeyDictionary()

    def __init__(self, cluster: Cluster, roles: Sequence[AnyRole]) -> None:
        self.cluster = cluster
        self.roles = tuple(roles)
        self.looks = Looks(cluster, roles)
        self._blocked: WeakKeyDictionary[Host, dict[str, str]] = WeakKeyDictionary()
        self._executing: WeakSet[Host] = WeakSet()
        self._done: set[tuple[str, str]] = set()
        self._met: dict[tuple[str, str], set[str]] = {}
        self._obstacles: dict[str, list[str]] = {}
        self._chains: dict[Upload, Chain] = {}
        self._spreads: dict[Mirror, Spread] = {}
        self._judging = RLock()

    @classmethod
    def of(cls, state: State) -> Run:
        """The run that belongs to pyinfra's state; a new state (a test) has a new one."""
        if state not in cls._runs:
            cls._runs[state] = cls(asked(registry.declared(), state), registry.ROLES)
            _found_as_module(state.current_deploy_filename)
            for node in state.failed_hosts:
                session.say(
                    node,
                    "nothing is changed here: it could not be reached; if its host key changed and that "
                    f"is right, accept it with: lockstep trust {node.name}",
                    "red",
                )
        return cls._runs[state]

    def execute(self, node: Host) -> None:
        """What preparing found there is forgotten: the user may have mended it before he agreed."""
        if node not in self._executing:
            self._executing.add(node)
            self._blocked.pop(node, None)

    def blocked(self, node: Host) -> dict[str, str]:
        """Role name to the sentence that says why the role could not be brought right there."""
        return self._blocked.setdefault(node, {})

    def block(self, node: Host, role: str, sentence: str) -> None:
        """Leave this role, and those that need it, as they are on the node; the rest goes on."""
        self.blocked(node)[role] = sentence
        session.say(node, f"{role}: {sentence}", "red")

    def barred(self, role: AnyRole, node: Host) -> bool:
        """Whether a gate is not right there; the gate has said so, and this role says nothing."""
        return any(
            each.gate and each is not role and each.name in self.blocked(node)
            for each in self.roles
        )

    def busy(self, node: Host) -> str | None:
        """What runs on the node and must not be disturbed, in words; None when nothing does, or it is silent."""
        for role in self.roles:
            if role.busy and target_of(role, self.cluster, node.name) is not None:
                try:
                    if found := role.busy(self.looks.state(role, node)):
                        return found
                except (Unreadable, session.NodeFailed):
                    continue
        return None

    def disturbed(self, node: Host, findings: Iterable[Finding]) -> str | None:
        """What these repairs would disturb, and where it runs, in words; None where nothing."""
        disturbing = [found for found in findings if found.disturbs]
        if disturbing and (what := self.busy(node)):
            return f"{what} runs here"
        for name in self.cluster.nodes if any(found.shared for found in disturbing) else ():
            other = node.state.inventory.get_host(name)
            if other is not node and (what := self.busy(other)):
                return f"{what} runs on {name}"
        return None

    def work(
        self, role: AnyRole, node: Host, target: Target[Any]
    ) -> tuple[list[Finding], list[Finding]] | None:
        """Findings to repair now, and those that stay; None when the role is left alone there.

        Whatever stays is said. Raises NodeFailed when the node could not be read.
        """
        if self.barred(role, node):
            return None
        waiting = [need for need in role.needs if need in self.blocked(node)]
        if waiting:
            self.block(node, role.name, f"left alone, because it needs {', '.join(waiting)}")
            return None
        try:
            findings = self.looks.drift(role, node)
        except Unreadable as error:
            self.block(node, role.name, f"left alone, because {error}")
            return None
        return self._sorted(role, node, target, findings)

    def converge(self, role: AnyRole, node: Host, target: Target[Any]) -> Iterator[PyinfraCommand]:
        """The commands that bring one role right on one node; all checks come before the first.

        Raises Unreadable or NodeFailed when the node cannot be read, also after a change.
        """
        if name := self._first(role, node, target):
            self._wait_for(name, role, node)
        work = self.work(role, node, target)
        if work is None:
            return
        now, later = work
        if not now:
            self.remark(role, node, target, dry=False)
            return
        if role.together and (obstacles := self.obstacles(role, node.state)):
            first = next(each.name for each in self._present(role, node.state))
            if node.name != first:
                obstacles = [f"not every node is right: see {first}"]
            for obstacle in obstacles:
                self.block(node, role.name, f"not started, because {obstacle}")
            return
        disproved: list[str] = []
        for _ in range(ROUNDS):
            disproved.clear()
            yield from self._repair(role, node, target, now, disproved)
            tried = {found.id for found in now}
            now = [found for found in self.looks.drift(role, node) if found not in later]
            if not now and not disproved:
                return
            lasting = [found for found in now if not found.repairable or found.id in tried]
            if not now or lasting or self._forbidden(node, now):
                break  # what a repair, or its proof, only uncovers gets another round; what it did not mend does not
        left = "; ".join(map(str, now)) or "its proof failed"
        yield _refusal(f"{role.name}: still there after converging: {left}")

    def _repair(
        self,
        role: AnyRole,
        node: Host,
        target: Target[Any],
        findings: list[Finding],
        disproved: list[str],
    ) -> Iterator[PyinfraCommand]:
        """The role's steps for these findings, and its proof. disproved: gets what that finds wrong."""
        for finding in findings:
            session.say(node, f"{role.name}: {finding}")
        others = self.looks.others(role, node)
        changed = brought = False
        for step in role.converge(target, self.looks.state(role, node), others, findings):
            self.looks.forget(node)  # before the step: it may fail half way
            if isinstance(step, Meet):
                yield FunctionCommand(_meet, (role, step), {})
            else:
                yield FunctionCommand(_carry_out, (step,), {})
            self.looks.forget(node)  # and after it: a peer may have looked meanwhile
            changed, brought = True, brought or isinstance(step, Download)
        if changed:
            yield FunctionCommand(_carry_out, (ON_DISK,), {})
        if brought:  # what the nodes are asked may follow from what came here
            for name in self.cluster.nodes:
                self.looks.forget(node.state.inventory.get_host(name))
        if role.proof and not role.crossing:
            self.looks.forget(node)
            yield FunctionCommand(_prove, (role.name, role.proof(target), disproved), {})
            self.looks.forget(node)

    def _sorted(
        self, role: AnyRole, node: Host, target: Target[Any], findings: list[Finding]
    ) -> tuple[list[Finding], list[Finding]]:
        """Findings to repair now, and those that stay: checked only, for the user, or for later."""
        if findings and target.spec.manage == "check":
            self.block(
                node, role.name, "; ".join(f"{found} (checked, not managed)" for found in findings)
            )
            return [], findings
        for_user = [found for found in findings if not found.repairable]
        if for_user:
            self.block(node, role.name, "; ".join(f"{found}; {found.fix}" for found in for_user))
        later: list[Finding] = []
        for found in findings:
            if found.repairable and (what := self._forbidden(node, [found])):
                later.append(found)
                session.say(
                    node,
                    f"{role.name}: {found}; pending, because {what} (--data disturb=true repairs it now)",
                    "yellow",
                )
        now = [found for found in findings if found.repairable and found not in later]
        return now, [*for_user, *later]

    def _forbidden(self, node: Host, findings: Iterable[Finding]) -> str | None:
        """What these repairs must not disturb, in words; None where they may be made now."""
        return None if host_proxy.data.get("disturb") else self.disturbed(node, findings)

    def remark(self, role: AnyRole, node: Host, target: Target[Any], dry: bool) -> None:
        """Say what the role has to say beside its findings."""
        if role.remarks:
            state, others = self.looks.state(role, node), self.looks.others(role, node)
            for line, colour in role.remarks(target, state, others, dry):
                session.say(node, f"{role.name}: {line}", colour)

    def obstacles(self, role: AnyRole, state: State) -> list[str]:
        """Why a ``together`` role may change nothing now: a sentence a problem; empty if it may.

        Judged once a run, for all nodes: by the first that asks, when every earlier operation is over.
        """
        with self._judging:
            if role.name not in self._obstacles:
                names = role.together(self.cluster) if role.together else ()
                self._obstacles[role.name] = [
                    f"{name} {problem}"
                    for name in names
                    for problem in self._problems(role, state.inventory.get_host(name))
                ]
        return self._obstacles[role.name]

    def _present(self, role: AnyRole, state: State) -> Iterator[Host]:
        names = role.together(self.cluster) if role.together else ()
        hosts = (state.inventory.get_host(name) for name in names)
        return (host for host in hosts if absence(host) is None)

    def _problems(self, role: AnyRole, node: Host) -> Iterator[str]:
        away = absence(node)
        if away:
            yield away
            return
        for name, sentence in self.blocked(node).items():
            yield f"is not right in {name}: {sentence}"
        for other in self.roles:
            if other.name in self.blocked(node):
                continue
            try:
                found = self.looks.drift(other, node)
            except (Unreadable, session.NodeFailed) as error:
                yield f"could not be read ({other.name}): {error}"
                continue
            for each in found:
                pending = each.repairable and self.disturbed(node, [each])
                if not pending and not (other is role and each.repairable):
                    yield f"is not right in {other.name}: {each} (deploy/cluster.py converges it)"

    def meet(self, role: AnyRole, node: Host, step: Meet) -> str | None:
        """Wait for the others at a step; None when all came, else who did not, in words."""
        names = role.together(self.cluster) if role.together else ()
        came = self._met.setdefault((role.name, step.point), set())
        came.add(node.name)
        end = time.monotonic() + step.seconds
        while missing := [name for name in names if name not in came]:
            gone = [
                name
                for name in missing
                if absence(node.state.inventory.get_host(name)) or (role.name, name) in self._done
            ]
            if gone or time.monotonic() > end:
                return f"{', '.join(gone or missing)} did not reach {step.point}"
            gevent.sleep(0.02)
        return None

    def chain(self, step: Upload) -> Chain:
        """The nodes that get this file in this run; a step that is not relayed is alone."""
        fresh = Chain(step, self.cluster.nodes)
        return self._chains.setdefault(step, fresh) if step.relayed else fresh

    def spread(self, step: Mirror, state: State) -> Spread:
        """The nodes that get this directory in this run."""

        def present(name: str) -> bool:
            return absence(state.inventory.get_host(name)) is None

        return self._spreads.setdefault(step, Spread(step, self.cluster.nodes, present))

    def done(self, role: AnyRole, node: Host) -> None:
        """This role's operation has ended on the node, well or not."""
        self._done.add((role.name, node.name))

    def _first(self, role: AnyRole, node: Host, target: Target[Any]) -> str | None:
        """The node that makes what this one takes, if there is one."""
        if role.head_first and not target.is_head:
            return self.cluster.head.name
        if role.first and target.spec.manage == "managed":
            try:
                state = self.looks.state(role, node)
            except (Unreadable, session.NodeFailed):
                return None  # told where the role's work is found
            return role.first(target, state, self.looks.others(role, node))
        return None

    def _wait_for(self, name: str, role: AnyRole, node: Host) -> None:
        """Let that node make it. Bounded, and over at once when it takes no part."""
        maker = node.state.inventory.get_host(name)
        end = time.monotonic() + FIRST_SECONDS
        while (
            maker in node.state.active_hosts
            and maker not in node.state.failed_hosts
            and (role.name, name) not in self._done
            and time.monotonic() < end
        ):
            gevent.sleep(0.02)


def asked(cluster: Cluster, state: State) -> Cluster:
    """The cluster with what ``--data`` asks of this run: another job, and options that roles read.

    Raises DeployError, which pyinfra prints as one line, for a job file that is missing or wrong.
    """
    options = dict(state.inventory.get_override_data())
    job = cluster.job if "job" not in options else Path(str(options["job"])).expanduser().absolute()
    if job is not None and not job.is_file():
        raise DeployError(f"{job}: there is no such job file")
    cluster = replace(cluster, job=job, options=options)
    if job is not None:
        try:
            check_job(load_job(job), cluster)
        except InventoryProblem as problem:
            raise DeployError(str(problem)) from None
    return cluster


def absence(node: Host) -> str | None:
    """Why a node takes no part in this run, in words; None when it does."""
    if node in node.state.failed_hosts:
        return "cannot be reached, or failed"
    if not node.state.is_host_in_limit(node):
        return "is left out by --limit"
    return None if node in node.state.active_hosts else "cannot be reached"


def _meet(state: State, host: Host, role: AnyRole, step: Meet) -> bool:
    problem = Run.of(state).meet(role, host, step)
    if problem is None:
        return True
    session.say(host, f"{role.name}: {problem}", "red")
    if step.otherwise:
        _carry_out(state, host, Shell(step.otherwise, seconds=300))
    return False


def _carry_out(state: State, host: Host, step: Step) -> bool:
    """Carry one step out; False fails this node only, where a raise would end the run for all."""
    try:
        match step:
            case Shell():
                session.run(host, f"set -e\n{step.command}", step.seconds, step.show)
            case Upload():
                upload(host, step, Run.of(state).chain(step))
            case Download():
                download(host, step)
            case UploadFolder():
                upload_folder(host, step)
            case Mirror():
                mirror(host, step, Run.of(state).spread(step, state))
            case Here():
                run_here(step.command, partial(session.say, host))
            case NewLogin():
                session.new_login(host)
    except session.Told:
        return False
    except session.NodeFailed as error:
        session.say(host, str(error), "red")
        return False
    return True


def _prove(state: State, host: Host, role: str, script: str, disproved: list[str]) -> bool:
    """Say what the proof finds wrong; whether that can be repaired, the next look tells."""
    try:
        wrong = [
            f"{each.id}: {each.seen}" + ("" if each.repairable else f"; {each.fix}")
            for each in proved_wrong(session.run(host, script, PROOF_SECONDS).stdout)
        ]
    except session.NodeFailed as error:
        wrong = [f"the proof could not run: {error}"]
    for line in wrong:
        session.say(host, f"{role}: {line}", "red")
    disproved += wrong
    return True


def _refuse(state: State, host: Host, sentence: str) -> bool:
    session.say(host, sentence, "red")
    return False


def _refusal(sentence: str) -> PyinfraCommand:
    return FunctionCommand(_refuse, (sentence,), {})


def _prepare(
    run: Run, role: AnyRole, node: Host, target: Target[Any], unsure: bool
) -> Iterator[PyinfraCommand]:
    """Say what would change; one placeholder counts as the change. Nothing is touched."""
    try:
        if unsure:  # nothing is judged yet: an earlier role may mend even what is for the user
            now = run.looks.drift(role, node)
        else:
            work = run.work(role, node, target)
            if work is None:
                return
            now, _ = work
    except Unreadable as error:
        needs = ", ".join(role.needs)
        session.say(node, f"{role.name}: may change, after {needs}; not to be read yet: {error}")
        yield StringCommand("true")
        return
    except session.NodeFailed as error:
        if node not in node.state.failed_hosts:
            session.say(node, f"not changed, because it could not be read: {error}", "red")
            node.state.fail_hosts({node})
        return
    for finding in now:
        session.say(node, f"{role.name}: {finding}; {finding.fix}")
    if unsure and not now:
        session.say(node, f"{role.name}: may change, after {', '.join(role.needs)}")
    run.remark(role, node, target, dry=True)
    if now and role.together:
        for name in role.together(run.cluster):
            if away := absence(node.state.inventory.get_host(name)):
                session.say(node, f"{role.name}: would not start, because {name} {away}", "red")
    if now or unsure:
        yield StringCommand("true")


@operation()  # type: ignore[untyped-decorator]
def _operation(role: AnyRole, unsure: bool) -> Iterator[PyinfraCommand]:
    node = ctx_host.get()
    run = Run.of(node.state)
    run.looks.owns(node, node.current_op_hash)
    target = target_of(role, run.cluster, node.name)
    if target is None:
        host_proxy.noop(f"{role.name} is not declared for this node")
    elif not node.state.is_executing:
        yield from _prepare(run, role, node, target, unsure)
    if not node.state.is_executing:
        return
    run.execute(node)
    try:
        if target is not None:
            yield from run.converge(role, node, target)
        if role.together and (blocked := run.blocked(node)):
            yield _refusal(f"not right on this node: {', '.join(blocked)} (see above)")
    except (Unreadable, session.NodeFailed) as error:
        yield _refusal(f"{role.name}: stopped here, because the node could not be read: {error}")
    finally:
        run.done(role, node)


def _may_follow(run: Run, role: AnyRole, node: Host) -> bool:
    """Whether a role that this one needs is about to change, so that this one cannot be judged yet."""
    if run.barred(role, node):
        return False
    names = required(role.needs, run.roles)
    needed = [known for known in run.roles if known.name in names]
    if any(known.name in run.blocked(node) for known in needed):
        return False
    try:
        return any(run.looks.drift(known, node) for known in needed)
    except (Unreadable, session.NodeFailed):
        return False  # the needed role's own operation reports it


def _found_as_module(deploy: str | None) -> None:
    """Give the deploy file, which pyinfra executes as text, an entry among the modules.

    For the order of operations pyinfra has ``inspect`` look at every frame, for each role and node. A file that
    is no module's is searched for among all modules each time, which is half of an operation's cost.
    """
    if deploy is not None:
        module = ModuleType(f"lockstep_{Path(deploy).stem}")
        module.__file__ = str(Path(deploy).absolute())
        sys.modules.setdefault(module.__name__, module)


def _always() -> bool:
    return True


def converge(role: AnyRole) -> None:
    """Register the role on the node that pyinfra prepares; ``deploy/cluster.py`` calls it once a role."""
    node = ctx_host.get()
    run = Run.of(node.state)
    target = target_of(role, run.cluster, node.name)
    managed = target is not None and target.spec.manage == "managed"
    unsure = managed and node.state.should_check_for_changes() and _may_follow(run, role, node)
    # In a dry run the plan lists what must wait for an earlier role under "Conditional Change".
    _operation(role, unsure, name=role.name, _if=[_always] if unsure else None)
