"""What has become of a job, judged from what its nodes show. Pure.

What counts is what lies in the run directory and the boot ids, in this order: the trainer's own
marker, the mark of ``stop``, a rank's own error, a restarted node, units. An exit code proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from roles.job.plan import Plan
from roles.job.probe import Attempt, ErrorRecord, Exit, JobState

STARTING_SECONDS = 90
"""So long after its plan an attempt may have nodes that do not run yet: somebody is starting it."""

State = Literal["absent", "running", "interrupted", "failed", "stopped", "complete", "unknown"]


@dataclass(frozen=True)
class Decision:
    """state: see ``decide``. reason: half a sentence, what it is judged by.

    attempt: the last one, 0 for none. survivors: nodes on which a part of it still runs.
    starting: for so many seconds more somebody may be starting it; 0 when all its units were seen.
    """

    state: State
    reason: str
    attempt: int = 0
    survivors: tuple[str, ...] = ()
    starting: int = 0


def decide(job: str, views: Mapping[str, JobState]) -> Decision:
    """The job's state from the looks of the nodes that could be read, by node name.

    absent: never started · running: its units are active on all its nodes, as planned · complete: the
    trainer's marker · stopped: by ``lockstep stop`` · failed: by an error of its own, or it ended badly
    by itself · interrupted: a node, a link or a unit was lost · unknown: a node that matters is silent,
    and no other node shows that the attempt is over.
    """
    if not views:
        return Decision("unknown", "no node of the job could be read")
    attempt = merged(views)
    survivors = tuple(
        name
        for name, view in views.items()
        if (unit := view.unit(job)) is not None and unit.active not in ("inactive", "failed")
    )
    number = attempt.plan.attempt if attempt else 0

    def judged(state: State, reason: str) -> Decision:
        return Decision(state, reason, number, survivors)

    if any(view.complete is not None for view in views.values()):
        return judged("complete", "the trainer says so")
    if attempt is None:
        return judged("absent", "it was never started")
    if attempt.stopped:
        return judged("stopped", "by lockstep stop")
    own = [error for error in attempt.errors if error.kind == "own"]
    if own:
        return judged("failed", told(attempt.plan, own[0]))
    restarted = [
        name
        for name, boot in attempt.plan.boot_ids.items()
        if name in views and views[name].boot_id != boot
    ]
    if restarted:
        return judged("interrupted", f"{_names(restarted)} restarted")
    silent = [name for name in attempt.plan.nodes if name not in views]
    if silent:
        # One lost rank ends an attempt for all: what a survivor left is enough to tell.
        if attempt.errors:
            reason = f"{told(attempt.plan, attempt.errors[0])}; {_names(silent)} cannot be read"
            return judged("interrupted", reason)
        if attempt.exits:
            reason = f"it ended on {_names(list(attempt.exits))}; {_names(silent)} cannot be read"
            return judged("interrupted", reason)
        return judged("unknown", f"{_names(silent)} cannot be read")
    active = [name for name in attempt.plan.nodes if _runs(views[name], job, number)]
    if len(active) == len(attempt.plan.nodes):
        return judged("running", "its units are active")
    left = STARTING_SECONDS - _age(attempt.plan, views)
    if not attempt.exits and not attempt.errors and left > 0:
        return replace(
            judged("running", "it is being started"), starting=min(left, STARTING_SECONDS)
        )
    for name, ended in attempt.exits.items():
        if ended.failed and name not in active and not _of_node(attempt, name):
            return judged("failed", f"on {name} {ended}, and no rank there says why")
    if _ended_well(attempt):
        return judged("failed", "it ended, and the trainer does not say that it is complete")
    if attempt.errors:
        return judged("interrupted", told(attempt.plan, attempt.errors[0]))
    gone = [name for name in attempt.plan.nodes if name not in active]
    return judged("interrupted", f"it no longer runs on {_names(gone)}")


def told(plan: Plan, error: ErrorRecord) -> str:
    """An error record in words, with the node's name as in the cluster file."""
    return f"{plan.node_of(error.rank)}, rank {error.rank}: {error.error}"


def merged(views: Mapping[str, JobState]) -> Attempt | None:
    """The last attempt from all views: network file systems show a new file to some nodes later."""
    found = [view.attempt for view in views.values() if view.attempt is not None]
    if not found:
        return None
    last = max(found, key=lambda attempt: attempt.plan.attempt)
    same = [attempt for attempt in found if attempt.plan.attempt == last.plan.attempt]
    exits: dict[str, Exit] = {}
    errors: dict[int, ErrorRecord] = {}
    for attempt in same:
        exits.update(attempt.exits)
        errors.update({error.rank: error for error in attempt.errors})
    return Attempt(
        last.plan,
        exits,
        tuple(sorted(errors.values(), key=lambda error: (error.time, error.rank))),
        any(attempt.stopped for attempt in same),
        any(attempt.drained for attempt in same),
    )


def _runs(view: JobState, job: str, attempt: int) -> bool:
    unit = view.unit(job)
    return unit is not None and unit.attempt == attempt and unit.runs


def _age(plan: Plan, views: Mapping[str, JobState]) -> int:
    """Seconds since the attempt was planned, by the clock that dated the plan if it can be asked."""
    clock = views.get(plan.nodes[0]) or next(iter(views.values()))
    return clock.now - plan.started


def _of_node(attempt: Attempt, node: str) -> bool:
    return any(attempt.plan.node_of(error.rank) == node for error in attempt.errors)


def _ended_well(attempt: Attempt) -> bool:
    """Every node's unit ended by itself with status 0."""
    return set(attempt.exits) >= set(attempt.plan.nodes) and not any(
        ended.failed or ended.asked for ended in attempt.exits.values()
    )


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
