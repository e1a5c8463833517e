"""``lockstep reboot``: nodes restart one after the other, and what of them does not come back is told.

A job is never cut off: it is drained first, or the reboot is refused. Nothing but that is changed, and
what a node lacks afterwards, the next converging run mends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from deploy import jobs_cli as jobs
from deploy.lab.progress import Progress
from deploy.verify import columns, wrong_tables
from inventory.cluster import Cluster

if TYPE_CHECKING:
    from deploy.reach import Reached
    from roles.verify import Report, Verdict, Waiting, Wrong

LOOK_SECONDS = 20
BOOT_SECONDS = 900
"""From the order until the boot has ended; servers with much memory test it for minutes."""
SERVICES_SECONDS = 120
"""From the end of the boot until what was right before is right again; a clock takes its time."""
POLL_SECONDS = 2
TELL_SECONDS = 10
REFUSED = 2
MARK = "drained"
WAITING = ("job-interrupted", "job-starting")
"""What verify finds of a job that was drained; its ``autostart`` may be resuming it already."""

BOOT = r"""
IFS= read -r boot </proc/sys/kernel/random/boot_id
IFS= read -r stat </proc/1/stat
set -- ${stat##*) }
echo "$boot ${20}"
systemctl is-system-running || :
"""
"""A boot is named by its id and by when process 1 began: a container has its machine's boot id."""

ORDER = r"""
if ! said=$(systemctl --no-block reboot 2>&1); then printf '%s\n' "$said" | tail -n 1; fi
"""
"""Prints why systemd does not obey, or nothing; the connection may go before it has an answer."""

State = Literal["back", "incomplete", "lost", "untouched"]


class RebootError(Exception):
    """Nothing was rebooted; one sentence."""


@dataclass(frozen=True)
class Boot:
    """id: differs after a reboot. state: systemd's word for how far it is."""

    id: str
    state: str


@dataclass(frozen=True)
class Restart:
    """What became of one node.

    state: back, with all that was right before; incomplete: it answers, and lacks something; lost: it does
    not answer; untouched: it was not told to, because one before it is not back or a job began there meanwhile.
    seconds: from the order. reason: in words, empty when it is back.
    """

    node: str
    state: State
    seconds: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Drained:
    """A job that was ended for the reboot. run: its directory. checkpoint: the newest complete one.

    A mark in the attempt's directory holds it until the last node is back, also against its ``autostart``;
    it goes as well when the reboot is refused or broken off.
    """

    name: str
    run: str
    attempt: int
    checkpoint: str | None


@dataclass(frozen=True)
class Outcome:
    """restarts: in the order of the reboots. report: what verify finds of those nodes, see ``report_of``."""

    restarts: Sequence[Restart]
    drained: Sequence[Drained]
    report: Report

    @property
    def verdict(self) -> Verdict:
        """As verify's, but never ok where a node is not back."""
        if any(each.state == "lost" for each in self.restarts):
            return "unreadable"
        whole = all(each.state == "back" for each in self.restarts)
        return "drift" if not whole and self.report.verdict == "ok" else self.report.verdict

    def as_json(self) -> dict[str, Any]:
        """The stable form: verdict, nodes, drained, findings, waiting."""
        found = self.report.as_json()
        del found["verdict"], found["identity"]
        return {
            "verdict": self.verdict,
            "nodes": [asdict(each) for each in self.restarts],
            "drained": [asdict(each) for each in self.drained],
            **found,
        }


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "reboot",
        help="reboot nodes one after the other, and say what did not come back",
        description="Exit code as of verify, for these nodes: 0: all is back; 1: something is wrong there; 2: one "
        "could not be looked at, or nothing was rebooted.",
    )
    parser.add_argument(
        "nodes", nargs="*", metavar="NODE", help="a node's name in the cluster file"
    )
    parser.add_argument("--all", action="store_true", help="every node, the head last")
    parser.add_argument(
        "--drain", action="store_true", help="have the job there write a checkpoint and end first"
    )
    parser.add_argument(
        "--at-once", action="store_true", help="all at the same time, not one after the other"
    )
    parser.add_argument(
        "--wait",
        type=int,
        default=BOOT_SECONDS,
        metavar="SECONDS",
        help=f"how long a node's boot may take (default: {BOOT_SECONDS})",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the outcome as JSON on standard output"
    )
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    from deploy.reach import reach
    from roles.registry import declared
    from roles.verify import EXIT_CODES

    try:
        if arguments.wait < 1:
            raise RebootError(f"--wait {arguments.wait} is no time: give seconds, 1 or more")
        cluster = declared()
        names = chosen(cluster, arguments.nodes, arguments.all)
        with reach(cluster) as reached:
            wait, at_once = arguments.wait, arguments.at_once
            found = reboot(reached, names, arguments.drain, at_once, wait, Progress(sys.stderr))
    except RebootError as error:
        print(f"lockstep: {error}; nothing was rebooted", file=sys.stderr)
        return REFUSED
    print(json.dumps(found.as_json(), indent=2) if arguments.json else text(found))
    return EXIT_CODES[found.verdict]


def chosen(cluster: Cluster, names: Sequence[str], every: bool) -> list[str]:
    """The nodes in the order in which they restart: the head last. Raises RebootError."""
    if every and names:
        raise RebootError("--all and names of nodes contradict each other: give one of them")
    if not every and not names:
        raise RebootError("no node is named: give nodes of the cluster file, or --all")
    for name in names:
        if name not in cluster.nodes:
            raise RebootError(cluster.no_node(name))
    wanted = [name for name in cluster.nodes if every or name in names]
    return sorted(wanted, key=lambda name: name == cluster.head.name)


def reboot(
    reached: Reached, names: Sequence[str], drain: bool, at_once: bool, wait: int, say: Progress
) -> Outcome:
    """Reboot those nodes in that order, and look at them. Raises RebootError before the first one.

    drain: end the jobs that run there; else one that runs is a reason to refuse. wait: seconds for a boot.
    """
    nodes = [node for name in names for node in reached.nodes if node.name == name]
    boots = _boots(reached, nodes)
    running = _running(reached, nodes)
    served = _running_beside(reached, names, say)
    for job in (running | served) if not drain else ():
        where = running.get(job) or served[job]
        over = "" if job in running else f", whose storage {server_of(reached.cluster)} serves"
        raise RebootError(
            f"job {job} runs on {', '.join(where)}{over}: add --drain, and it writes a checkpoint and ends first"
        )
    right = reached.each(lambda node: lacks(reached, node), nodes)

    def one(node: Any) -> Restart:
        if began := _began(reached, node, say):
            return Restart(node.name, "untouched", reason=began)
        return restart(reached, node, boots[node.name], right[node.name], wait, say)

    drained: list[Drained] = []
    restarts: list[Restart] = []
    try:
        for job in running | served:
            drained.append(_drain(reached, job, say))
        if at_once:
            restarts = list(reached.each(one, nodes).values())
        else:
            for node in nodes:
                restarts.append(one(node))
                if restarts[-1].state != "back":
                    break
    except BaseException:  # Ctrl-C too: nobody would take the marks away later
        _release(reached, drained, say)
        raise
    done = [each.node for each in restarts]
    why = "was not rebooted" if restarts[-1].state == "untouched" else "is not right yet"
    restarts += [
        Restart(name, "untouched", reason=f"{done[-1]} {why}") for name in names if name not in done
    ]
    if all(each.state == "back" for each in restarts):
        _release(reached, drained, say)
    say("looking at what is back")
    return Outcome(restarts, drained, report_of(reached, done, [each.name for each in drained]))


def _boots(reached: Reached, nodes: Sequence[Any]) -> Mapping[str, Boot]:
    """Every node's present boot. Raises RebootError for one that is silent, or is this machine itself."""
    from roles.core import session

    def one(node: Any) -> Boot | str:
        try:
            return boot_of(node)
        except session.NodeFailed as error:
            return str(error)

    found = reached.each(one, nodes)
    if silent := [f"{name}: {each}" for name, each in found.items() if isinstance(each, str)]:
        raise RebootError("; ".join(silent))
    boots = {name: each for name, each in found.items() if isinstance(each, Boot)}
    own = subprocess.run(["sh", "-c", BOOT], capture_output=True, text=True).stdout.split("\n")[0]
    for name, boot in boots.items():
        if boot.id == own:
            raise RebootError(
                f"{name} is the machine that this runs on, and would end it: name the other nodes, and "
                "reboot this one by hand"
            )
    return boots


def boot_of(node: Any) -> Boot:
    """The node's present boot. Raises NodeFailed."""
    from roles.core import session

    lines = session.run(node, BOOT, LOOK_SECONDS).stdout.split("\n")
    return Boot(lines[0], lines[-1])


def _running(reached: Reached, nodes: Sequence[Any]) -> dict[str, list[str]]:
    """The jobs of which a part is on these nodes, and where. Raises RebootError where that cannot be told."""
    from roles.core import session
    from roles.core.role import Unreadable
    from roles.job.probe import parse, script

    def one(node: Any) -> list[str] | str:
        try:
            units = parse(session.run(node, script(None), LOOK_SECONDS).stdout).units
        except (session.NodeFailed, Unreadable) as error:
            return f"{node.name}: {error}"
        return [unit.job for unit in units if unit.active not in ("inactive", "failed")]

    jobs: dict[str, list[str]] = {}
    for name, found in reached.each(one, nodes).items():
        if isinstance(found, str):
            raise RebootError(found)
        for job in found:
            jobs.setdefault(job, []).append(name)
    return jobs


def server_of(cluster: Cluster) -> str | None:
    """The node that serves the others' storage; None where none does."""
    from roles.storage.spec import StorageSpec, server_node

    spec = cluster.section("storage", StorageSpec)
    node = server_node(spec, cluster) if spec else None
    return node.name if node else None


def _running_beside(reached: Reached, names: Sequence[str], say: Progress) -> dict[str, list[str]]:
    """The jobs on nodes that stay up and lose their storage with one of these, and where.

    A silent one holds nothing up: a job of several nodes shows on those that answer.
    """
    found: dict[str, list[str]] = {}
    if server_of(reached.cluster) not in names:
        return found
    for node in reached.nodes:
        if node.name not in names:
            try:
                for job in _running(reached, [node]):
                    found.setdefault(job, []).append(node.name)
            except RebootError as error:
                say(f"whether a job runs there is not known: {error}")
    return found


def _began(reached: Reached, node: Any, say: Progress) -> str:
    """Why the node must not restart now: somebody, or ``autostart``, started a job there meanwhile."""
    try:
        running = _running(reached, [node]) | _running_beside(reached, [node.name], say)
    except RebootError as error:
        return str(error)
    return f"job {', '.join(running)} was started meanwhile" if running else ""


def _drain(reached: Reached, name: str, say: Progress) -> Drained:
    """End that job on all its nodes, with a checkpoint. Raises RebootError when it does not end."""
    from roles.job.decide import decide

    job = jobs.started(name, reached.cluster)
    seen = jobs.look(reached, job)
    if silent := [each for each in seen.silent if each in jobs.planned(seen)]:
        raise RebootError(
            f"job {name} cannot write a checkpoint, because {', '.join(silent)} is silent: lockstep stop {name} "
            "ends it without one"
        )
    decision = decide(name, seen.states)
    if not decision.attempt:
        raise RebootError(
            f"job {name} runs, and no node finds it in {job.run}, where runs.path or storage.path has it: "
            f"lockstep stop {name} ends it"
        )
    say(f"job {name} writes a checkpoint and ends on {', '.join(decision.survivors)}")
    if failed := jobs.mark(reached, job, seen, decision, MARK):
        raise RebootError(failed)
    held = Drained(name, job.run, decision.attempt, None)
    try:
        if failed := jobs.end(reached, job, decision.survivors):
            raise RebootError(f"job {name} does not end: {failed}")
        held = replace(held, checkpoint=jobs.look(reached, job).checkpoint)
    except BaseException:
        _release(reached, [held], say)
        raise
    say(f"job {name} has ended; its newest complete checkpoint is {held.checkpoint or 'none'}")
    return held


def _release(reached: Reached, drained: Sequence[Drained], say: Progress) -> None:
    """Let the ``autostart`` of these jobs go on with them."""
    from roles.core import session
    from roles.core.steps import quote
    from roles.job.plan import attempt_directory

    for held in drained:
        path = f"{attempt_directory(held.run, held.attempt)}/{MARK}"
        try:
            session.run(reached.nodes[0], f"rm -f {quote(path)}", LOOK_SECONDS)
        except session.NodeFailed as error:
            say(f"{path} cannot be removed, so job {held.name} does not resume by itself: {error}")


def lacks(reached: Reached, node: Any) -> frozenset[str]:
    """What is wrong on a node by a fresh look, without proofs; the job's own part left out."""
    from roles import job
    from roles.core import session
    from roles.core.role import Unreadable

    looks, found = reached.run.looks, set()
    looks.forget(node)
    for role in looks.roles:
        if role is job.role:
            continue
        try:
            found |= {f"{role.name}: {each.id}" for each in looks.drift(role, node)}
        except Unreadable:
            found.add(f"{role.name}: unreadable")
        except session.NodeFailed:
            return frozenset({"unreadable"})
    return frozenset(found)


def restart(
    reached: Reached, node: Any, before: Boot, lacked: frozenset[str], wait: int, say: Progress
) -> Restart:
    """Reboot one node, and wait until what was right before is right again.

    before: its boot. lacked: what was wrong there, and is not waited for. wait: seconds for its boot.
    """
    from roles.core import session

    begin, told = time.monotonic(), 0.0

    def passed() -> int:
        return round(time.monotonic() - begin)

    def tell(sentence: str) -> None:
        nonlocal told
        if time.monotonic() >= told:
            told = time.monotonic() + TELL_SECONDS
            say(f"{node.name}: {sentence}")

    say(f"{node.name}: reboots")
    try:
        if refusal := session.run(node, ORDER, LOOK_SECONDS).stdout:
            return Restart(node.name, "lost", passed(), f"it does not reboot: {refusal}")
    except session.NodeFailed:
        pass  # the connection ends with the boot; whether it does, is seen below
    told = time.monotonic() + TELL_SECONDS
    while reason := _not_up(node, before):
        if passed() >= wait:
            return Restart(node.name, "lost", passed(), f"after {passed()} s still: {reason}")
        tell(reason)
        time.sleep(POLL_SECONDS)
    booted = passed()
    say(f"{node.name}: booted after {booted} s")
    while new := sorted(lacks(reached, node) - lacked):
        if passed() >= booted + SERVICES_SECONDS:
            return Restart(node.name, "incomplete", passed(), f"it lacks {', '.join(new)}")
        tell(f"waits for {', '.join(new)}")
        time.sleep(POLL_SECONDS)
    say(f"{node.name}: back after {passed()} s")
    return Restart(node.name, "back", passed())


def _not_up(node: Any, before: Boot) -> str:
    """Why the node does not count as rebooted yet; nothing when it does."""
    from roles.core import session

    try:
        session.new_login(
            node
        )  # what is left of the old connection would only run into time limits
        boot = boot_of(node)
    except session.NodeFailed as error:
        return str(error)
    if boot.id == before.id:
        return "its old boot goes on"
    if boot.state in ("initializing", "starting"):
        return "its boot has not ended; systemctl list-jobs shows what it waits for"
    return ""


def report_of(reached: Reached, names: Sequence[str], drained: Sequence[str]) -> Report:
    """What verify finds of those nodes, with its proofs; not that a job that was drained stands still.

    Of those nodes is what is wrong on them, what the proofs between nodes say of them, which stands at the node
    that ran the proof, and the storage of every node where the one that serves it is among them.
    """
    from roles import job, storage
    from roles.core.role import PROVED
    from roles.job.declared import job_of
    from roles.verify import report

    looks = reached.run.looks
    for node in reached.nodes:
        looks.forget(node)
    found = report(looks, reached.nodes, reached.each)
    served = server_of(reached.cluster) in names
    crossing = [role.name for role in looks.roles if role.crossing]

    def there(each: Wrong | Waiting) -> bool:
        return each.node in names or (served and each.role == storage.role.name)

    def between(each: Wrong) -> bool:
        words = each.seen.split() if each.role in crossing and each.want == PROVED else []
        return not set(names).isdisjoint(words)

    declared = job_of(reached.cluster)
    waits = declared is not None and declared.name in drained
    return replace(
        found,
        findings=[
            each
            for each in found.findings
            if (there(each) or between(each))
            and not (waits and each.role == job.role.name and each.id in WAITING)
        ],
        waiting=[each for each in found.waiting if there(each)],
        identity=(),
    )


def text(found: Outcome) -> str:
    """The outcome for a person."""
    rows = [
        (each.node, each.state, f"{each.seconds} s" if each.seconds else "-", each.reason)
        for each in found.restarts
    ]
    parts = [columns(("NODE", "STATE", "AFTER", "REASON"), rows), *wrong_tables(found.report)]
    for job in found.drained:
        place = f"at {job.checkpoint}" if job.checkpoint else "without a checkpoint"
        parts.append(
            f"job {job.name} waits {place}: pyinfra inventory.py deploy/cluster.py resumes it"
        )
    done = [each.node for each in found.restarts if each.state != "untouched"]
    left = [each.node for each in found.restarts if each.state == "untouched"]
    lacking = found.report.findings or any(each.state == "incomplete" for each in found.restarts)
    parts.append(
        {
            "ok": f"ok: {', '.join(done)}: rebooted, and as declared",
            "drift": "drift: something did not come back; run pyinfra inventory.py deploy/cluster.py"
            if lacking
            else f"drift: {', '.join(left)}: not rebooted, see REASON; run lockstep reboot again once that is over"
            if left
            else f"drift: {', '.join(done)}: rebooted, but not all of it can be judged; lockstep verify names the cause",
            "unreadable": "unreadable: not everything is back, or could be looked at",
        }[found.verdict]
    )
    return "\n\n".join(parts)
