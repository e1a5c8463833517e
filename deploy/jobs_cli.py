"""``lockstep status`` and ``lockstep stop``: what a job does, and its end, asked of its nodes.

A job is named by its file or, once it was started, by its name alone: what the nodes need to know lies
in its run directory. Only the job's own probe travels, so that this is quick beside a busy training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inventory.cluster import Cluster
from inventory.errors import InventoryProblem, Problem
from inventory.job import load_job

if TYPE_CHECKING:
    from roles.job.decide import Decision
    from roles.job.probe import JobState, Unit

LOOK_SECONDS = 20
STOP_SECONDS = 420
"""The ranks' checkpoint (180 s), the launcher's own end, and a margin."""

EXIT_CODES = {"running": 0, "complete": 0, "unknown": 2}
"""All other states: 1."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-commands."""
    named = "a job file, or the name of a job that was started (default: the cluster file's job)"
    status = commands.add_parser(
        "status",
        help="what a job does: state, step, loss, tokens/s, time left, nodes, logs",
        description="Exit code 0: running or complete; 1: absent, interrupted, failed or stopped; 2: unknown.",
    )
    status.add_argument("job", nargs="?", metavar="JOB", help=named)
    status.add_argument("--json", action="store_true", help="print it as JSON on standard output")
    status.set_defaults(handler=_status)
    stop = commands.add_parser(
        "stop",
        help="end a job on all its nodes, with a checkpoint; it stays ended until it is asked for",
        description="Exit code 0: it does not run any more; 1: it did not end in time; 2: a node is silent.",
    )
    stop.add_argument("job", nargs="?", metavar="JOB", help=named)
    stop.set_defaults(handler=_stop)


@dataclass(frozen=True)
class Named:
    """A job as the command line names it. run: its run directory on the nodes."""

    name: str
    run: str


def named(argument: str | None, cluster: Cluster) -> Named:
    """The job meant. Raises InventoryProblem when none is, or when its file is wrong."""
    if argument is None and cluster.job is None:
        raise _problem(cluster.path, "names no job: give a job file or a job's name")
    path = cluster.job if argument is None else Path(argument).expanduser()
    assert path is not None
    if path.is_file():
        name = load_job(path).name
    elif argument is not None and "/" not in argument and "." not in argument:
        name = argument
    else:
        raise _problem(path, "there is no such job file")
    return started(name, cluster)


def started(name: str, cluster: Cluster) -> Named:
    """The job of that name. Raises InventoryProblem when the cluster has no place for jobs."""
    from roles.job.spec import JobSpec, no_place, runs_path

    runs = runs_path(cluster.section("runs", JobSpec) or JobSpec(), cluster)
    if runs is None:
        raise _problem(cluster.path, no_place(cluster))
    return Named(name, f"{runs}/{name}")


def _problem(path: Path, sentence: str) -> InventoryProblem:
    return InventoryProblem(Problem(str(path), None, "", sentence))


@dataclass(frozen=True)
class Seen:
    """The nodes that answered, and why the others did not."""

    states: Mapping[str, JobState]
    silent: Mapping[str, str]

    @property
    def checkpoint(self) -> str | None:
        """The newest complete one, as the first node that sees it has it."""
        return next((state.checkpoint for state in self.states.values() if state.checkpoint), None)


def look(reached: Any, job: Named) -> Seen:
    """Ask all nodes, at the same time, what they know of the job."""
    from roles.core import session
    from roles.core.role import Unreadable
    from roles.job.probe import parse, script

    def one(node: Any) -> JobState | str:
        try:
            return parse(session.run(node, script(job.run), LOOK_SECONDS).stdout)
        except (session.NodeFailed, Unreadable) as error:
            return str(error)

    found = reached.each(one)
    return Seen(
        {name: state for name, state in found.items() if not isinstance(state, str)},
        {name: state for name, state in found.items() if isinstance(state, str)},
    )


def mark(reached: Any, job: Named, seen: Seen, decision: Decision, word: str) -> str:
    """Leave a mark in the last attempt, by a node that sees it; why that failed, or nothing."""
    from roles.core import session
    from roles.core.steps import quote
    from roles.job.plan import attempt_directory

    path = f"{attempt_directory(job.run, decision.attempt)}/{word}"
    one = next(node for node in reached.nodes if node.name in _seeing(seen, decision))
    try:
        session.run(one, f"set -e; : >{quote(path)}", LOOK_SECONDS)
    except session.NodeFailed as error:
        return f"{one.name}: {path} cannot be written: {error}"
    return ""


def end(reached: Any, job: Named, names: Sequence[str]) -> str:
    """End the job's units on those nodes, with a checkpoint where it trains; why not, or nothing."""
    from roles.core import session
    from roles.core.steps import quote
    from roles.job.plan import unit_name

    unit = quote(unit_name(job.name))
    stop = f"systemctl stop {unit} && {{ systemctl reset-failed {unit} 2>/dev/null || :; }}"

    def one(node: Any) -> str:
        try:
            session.run(node, stop, STOP_SECONDS)
        except session.NodeFailed as error:
            return str(error)
        return ""

    chosen = [node for node in reached.nodes if node.name in names]
    return "; ".join(f"{name}: {why}" for name, why in reached.each(one, chosen).items() if why)


def report(job: Named, decision: Decision, seen: Seen) -> dict[str, Any]:
    """What ``status`` tells, in the stable form of ``--json``. eta_s: seconds; loss: of the last step."""
    from roles.job.decide import merged

    attempt = merged(seen.states)
    view = next((state for state in seen.states.values() if state.metrics), None)
    metrics: Mapping[str, Any] = view.metrics if view and view.metrics else {}
    declared = (
        next((state.declared for state in seen.states.values() if state.declared), None) or {}
    )
    nodes = []
    for rank, name in enumerate(attempt.plan.nodes if attempt else ()):
        state = seen.states.get(name)
        unit = state.unit(job.name) if state else None
        nodes.append(
            {
                "name": name,
                "rank": rank,
                "unit": seen.silent.get(name, "silent") if state is None else _word(unit),
                "restarted": bool(
                    state and attempt and attempt.plan.boot_ids[name] != state.boot_id
                ),
            }
        )
    return {
        "job": job.name,
        "state": decision.state,
        "reason": decision.reason,
        "attempt": decision.attempt,
        "step": metrics.get("step"),
        "steps": declared.get("job", {}).get("trainer", {}).get("steps"),
        "loss": metrics.get("loss"),
        "tokens_per_s": metrics.get("tokens_per_s"),
        "eta_s": metrics.get("eta_s") if decision.state == "running" else None,
        "checkpoint": seen.checkpoint,
        "nodes": nodes,
        "autostart": next(
            (state.autostart.note for state in seen.states.values() if state.autostart), None
        ),
        "run": job.run,
        "logs": f"{job.run}/attempts/{decision.attempt}" if decision.attempt else None,
    }


def _word(unit: Unit | None) -> str:
    """systemd's ActiveState, but "ended" for all ways in which a unit is over."""
    return "ended" if unit is None or unit.active in ("inactive", "failed") else unit.active


def text(found: Mapping[str, Any]) -> str:
    """The report for a person."""
    rows = [("job", found["job"]), ("state", f"{found['state']} ({found['reason']})")]
    if found["attempt"]:
        rows.append(("attempt", str(found["attempt"])))
    if found["step"] is not None:
        of = f" of {found['steps']}" if found["steps"] else ""
        rows.append(("step", f"{found['step']}{of}"))
    if found["loss"] is not None:
        rows.append(("loss", f"{found['loss']:.4f}"))
    if found["tokens_per_s"] is not None:
        rows.append(("tokens/s", f"{found['tokens_per_s']:,.0f}"))
    if found["eta_s"] is not None:
        rows.append(("time left", _span(found["eta_s"])))
    if found["checkpoint"]:
        rows.append(("checkpoint", found["checkpoint"]))
    for node in found["nodes"]:
        restarted = ", restarted since" if node["restarted"] else ""
        rows.append((f"node {node['rank']}", f"{node['name']}: {node['unit']}{restarted}"))
    if found["autostart"] is not None:
        rows.append(("autostart", found["autostart"] or "has not looked yet"))
    rows.append(("run", found["run"]))
    if found["logs"]:
        rows.append(("logs", found["logs"]))
    return "\n".join(f"{key:<12}{value}" for key, value in rows)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def _status(arguments: argparse.Namespace) -> int:
    from deploy.reach import reach
    from roles.job.decide import decide
    from roles.registry import declared

    cluster = declared()
    job = named(arguments.job, cluster)
    with reach(cluster) as reached:
        seen = look(reached, job)
    decision = decide(job.name, seen.states)
    found = report(job, decision, seen)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else text(found))
    return EXIT_CODES.get(decision.state, 1)


def _stop(arguments: argparse.Namespace) -> int:
    from deploy.reach import reach
    from roles.job.decide import decide
    from roles.registry import declared

    cluster = declared()
    job = named(arguments.job, cluster)
    with reach(cluster) as reached:
        seen = look(reached, job)
        decision = decide(job.name, seen.states)
        if decision.state in ("absent", "complete") and not decision.survivors:
            print(f"job {job.name} does not run: {decision.state}")
            return 0
        if not seen.states:
            return _say(f"no node answers: {'; '.join(seen.silent.values())}", 2)
        # The mark first: whatever ends after it has been told to.
        goes_on = decision.state in ("running", "interrupted", "unknown") and decision.attempt
        if goes_on and (failed := mark(reached, job, seen, decision, "stopped")):
            return _say(failed, 1)
        begin = time.monotonic()
        print(f"stopping job {job.name} on {', '.join(decision.survivors) or 'no node'} …")
        if failed := end(reached, job, decision.survivors):
            return _say(failed, 1)
        seen = look(reached, job)
    after = decide(job.name, seen.states)
    kept = f"; its newest complete checkpoint is {seen.checkpoint}" if seen.checkpoint else ""
    print(f"job {job.name}: {after.state} after {time.monotonic() - begin:.0f} s{kept}")
    silent = [name for name in seen.silent if name in planned(seen)]
    if silent:
        return _say(f"{', '.join(silent)} did not answer, and may still run a part of it", 2)
    return 0


def _seeing(seen: Seen, decision: Decision) -> list[str]:
    """The nodes that see the run directory of the last attempt; after a reboot one may not."""
    return [
        name
        for name, state in seen.states.items()
        if state.attempt is not None and state.attempt.plan.attempt == decision.attempt
    ]


def planned(seen: Seen) -> Sequence[str]:
    """The nodes of its last attempt."""
    from roles.job.decide import merged

    attempt = merged(seen.states)
    return attempt.plan.nodes if attempt else ()


def _say(sentence: str, code: int) -> int:
    print(f"lockstep: {sentence}", file=sys.stderr)
    return code
