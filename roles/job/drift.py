"""What is to be done about the job: nothing, a start, a resume, or a sentence for the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inventory.job import Job
from roles.core.role import Finding, Peers, Target
from roles.fabric import adapters
from roles.job import autostart, place
from roles.job.decide import Decision, decide
from roles.job.declared import environment_prefix, job_of, members, resolved, run_directory
from roles.job.plan import Here, Launch, Plan, compose, free_port
from roles.job.probe import JobState
from roles.job.spec import JobSpec, is_own, no_place
from roles.limits.spec import LimitsSpec, unit_limits
from roles.network.interfaces import carrying
from roles.ops.place import variables

Remark = tuple[str, str | None]
"""A line and its colour."""


def views(target: Target[JobSpec], state: JobState, peers: Peers) -> dict[str, JobState]:
    """The looks of the job's nodes that could be read, by node name."""
    return {
        name: state if name == target.node.name else peers[name]
        for name in members(target.cluster)
        if name == target.node.name or name in peers
    }


def judge(target: Target[JobSpec], state: JobState, peers: Peers) -> Decision | None:
    """What has become of the job; None on a node that is none of its nodes."""
    job = job_of(target.cluster)
    if job is None or target.node.name not in members(target.cluster):
        return None
    return decide(job.name, views(target, state, peers))


def due(target: Target[JobSpec], decision: Decision) -> bool:
    """Whether the job is to be started or resumed."""
    again = target.cluster.options.get("retry") is True
    return decision.state in ("absent", "interrupted") or (
        again and decision.state in ("failed", "stopped")
    )


def drift(target: Target[JobSpec], state: JobState, peers: Peers) -> list[Finding]:
    """Findings: absent, starting, interrupted, unknown, changed; what makes a launch impossible here; a place of
    the runs that is not right, before all these; autostart."""
    service = autostart.drift(target, state.autostart)
    return [*service, *_findings(target, state, peers)]


def _findings(target: Target[JobSpec], state: JobState, peers: Peers) -> Iterator[Finding]:
    job = job_of(target.cluster)
    if job is None or target.node.name not in members(target.cluster):
        return
    run = run_directory(target)
    if run is None or (len(members(target.cluster)) > 1 and is_own(run, target.cluster)):
        there = "none" if run is None else f"{run}, which is each node's own"
        yield _for_user(
            "job-no-place", "a place for run directories", there, no_place(target.cluster)
        )
        return
    if wrong := place.drift(target, state.place, peers):
        yield from wrong  # no run is judged by what lies there
        return
    seen = views(target, state, peers)
    decision = decide(job.name, seen)
    changed = differences(job, seen)
    if changed:
        yield _for_user(
            "job-changed",
            f"job {job.name} as it was started",
            f"another {', '.join(changed)}",
            "give the job another name to start a new one, or restore the file",
        )
        return
    if decision.state == "unknown":
        yield _for_user(
            "job-unknown",
            f"job {job.name} runs",
            f"unknown, because {decision.reason}",
            "make that node reachable; nothing is started meanwhile",
        )
    if decision.starting:
        yield Finding(
            "job-starting",
            f"job {job.name} runs",
            f"attempt {decision.attempt} is being started",
            f"wait for it, at most {decision.starting} s",
        )
    if not due(target, decision):
        return
    obstacles = list(_obstacles(target, job, state))
    yield from obstacles
    if not obstacles:
        number = _number(seen) + 1
        start = next((view.checkpoint for view in seen.values() if view.checkpoint), None)
        yield Finding(
            "job-absent" if decision.state == "absent" else "job-interrupted",
            f"job {job.name} runs",
            f"{decision.state}: {decision.reason}{noted(seen)}",
            f"attempt {number} starts from {start or 'the beginning'}",
        )


def noted(seen: Mapping[str, JobState]) -> str:
    """What the service that resumes jobs says of itself, to go on after a sentence."""
    notes = [view.autostart.note for view in seen.values() if view.autostart]
    return f"; autostart {notes[0]}" if notes and notes[0] else ""


def _obstacles(target: Target[JobSpec], job: Job, state: JobState) -> Iterator[Finding]:
    """What on this node stands in the way of a launch."""
    node = target.node
    for unit in state.units:
        if unit.runs and unit.job != job.name:
            yield _for_user(
                "job-other",
                "no other job here",
                f"job {unit.job} runs",
                f"wait for it, or end it with lockstep stop {unit.job}",
            )
    if state.gpus < node.gpus:
        yield _for_user(
            "gpu-missing",
            f"{node.gpus} GPUs",
            str(state.gpus),
            "see nvidia-smi and dmesg on this node; or correct gpus in the cluster file",
        )
    if interface(target, state) is None:
        yield _for_user(
            "job-interface",
            f"an interface with {node.address}",
            "none",
            "correct the node's address, or name its interface in the cluster file",
        )
    counts = {
        name: job.processes(target.cluster.nodes[name].gpus) for name in members(target.cluster)
    }
    if len(set(counts.values())) > 1:
        yield _for_user(
            "job-processes",
            "as many processes on every node",
            ", ".join(f"{name} {count}" for name, count in counts.items()),
            "set processes_per_node in the job file: torchrun takes one number for all nodes",
        )
    first, last = job.port_range
    if is_first(target) and free_port(first, last, state.listening) is None:
        yield _for_user(
            "port-in-use",
            f"a free TCP port from {first} to {last}",
            "all are taken",
            "give the job file another port_range",
        )


def _for_user(id: str, want: str, seen: str, fix: str) -> Finding:
    return Finding(id, want, seen, fix, repairable=False)


def interface(target: Target[JobSpec], state: JobState) -> str | None:
    """The interface of this node that its peers reach."""
    return carrying(target.node, state.interfaces)


def is_first(target: Target[JobSpec]) -> bool:
    """Whether this node has rank 0 and the rendezvous."""
    return members(target.cluster)[:1] == (target.node.name,)


def _number(seen: Mapping[str, JobState]) -> int:
    return max(view.attempts for view in seen.values())


def new_plan(target: Target[JobSpec], state: JobState, peers: Peers) -> Plan:
    """The next attempt, as the first node plans it. Raises KeyError where a node is silent."""
    cluster, job = target.cluster, job_of(target.cluster)
    assert job is not None
    names = members(cluster)
    seen = views(target, state, peers)
    first = seen[names[0]]
    processes = job.processes(cluster.nodes[names[0]].gpus)
    low, high = job.port_range
    return Plan(
        attempt=_number(seen) + 1,
        nodes=names,
        boot_ids={name: seen[name].boot_id for name in names},
        master_address=cluster.nodes[names[0]].address,
        master_port=free_port(low, high, first.listening) or low,
        world_size=processes * len(names),
        processes=processes,
        started=first.now,
        infiniband=adapters.usable(cluster, (seen[name].adapters for name in names)),
    )


def new_launch(target: Target[JobSpec], state: JobState, plan: Plan) -> Launch:
    """This node's part of a plan."""
    job, run = job_of(target.cluster), run_directory(target)
    name = interface(target, state)
    assert job is not None and run is not None and name is not None
    limits = target.cluster.section("limits", LimitsSpec)
    return compose(
        plan,
        Here(target.node.name, name, state.cores, target.node.gpus),
        job=job.name,
        run=run,
        prefix=environment_prefix(target.cluster, job),
        operators=variables(target.cluster, job.environment or ""),
        extra=job.env,
        limits=tuple(unit_limits(limits)) if limits else (),
    )


def differences(job: Job, seen: Mapping[str, JobState]) -> list[str]:
    """The dotted keys in which the job file differs from the job that was started."""
    started = next((view.declared for view in seen.values() if view.declared), None)
    if started is None or started.get("fingerprint") == job.fingerprint():
        return []
    now, then = _flat(resolved(job)), _flat(started.get("job"))
    keys = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key)]
    return keys or ["fingerprint"]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def remarks(target: Target[JobSpec], state: JobState, peers: Peers, dry: bool) -> Iterator[Remark]:
    """What the user should know though nothing is changed; said once, by the job's first node.

    In a dry run every node shows its launch as well.
    """
    decision = judge(target, state, peers)
    job, run = job_of(target.cluster), run_directory(target)
    if decision is None or job is None or run is None:
        return
    if dry and due(target, decision) and any(f.repairable for f in drift(target, state, peers)):
        try:
            plan = new_plan(target, state, peers)
        except KeyError as missing:
            yield f"the launch cannot be shown, because {missing.args[0]} cannot be read", "yellow"
            return
        for line in new_launch(target, state, plan).lines():
            yield line, None
    elif is_first(target):
        yield from _outcome(job, run, decision, state)


def _outcome(job: Job, run: str, decision: Decision, state: JobState) -> Iterator[Remark]:
    match decision.state:
        case "running":
            step = f", step {state.metrics['step']}" if state.metrics else ""
            yield f"job {job.name} runs{step} (attempt {decision.attempt})", None
        case "complete":
            yield f"job {job.name} is complete: {run}", None
        case "failed" | "stopped":
            yield (
                f"job {job.name} {'failed' if decision.state == 'failed' else 'was stopped'}: "
                f"{decision.reason}; logs in {run}/attempts/{decision.attempt}; "
                "--data retry=true starts it again",
                "yellow",
            )
            if decision.survivors:
                yield (
                    f"a part of it still runs on {', '.join(decision.survivors)}: "
                    f"lockstep stop {job.name}",
                    "yellow",
                )
