"""Starts or resumes the job on all its nodes at once, and watches until its first step.

The nodes go step by step together: nothing new starts before the last survivor of an older attempt is
gone, and no node starts without the others. The first node plans; the others read its plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from uuid import uuid4

import yaml

from inventory.job import Job
from roles.core.role import Finding, Peers, Target
from roles.core.steps import APPEAR_SECONDS, Meet, Shell, Step, appears, quote, write_file
from roles.job import autostart, place
from roles.job.declared import job_of, members, resolved, run_directory
from roles.job.drift import is_first, judge, new_launch, new_plan
from roles.job.plan import Launch, Plan, attempt_directory, unit_name
from roles.job.probe import JobState
from roles.job.spec import JobSpec
from roles.job.unit import end, path, unit_file

DUE = {"job-absent", "job-starting", "job-interrupted"}
"""Findings that a launch, or waiting for one, removes."""

OWN_BEATS_PEER_SECONDS = 3
"""After the first sign of an end: time for the rank that caused it to say so."""


def converge(
    target: Target[JobSpec], state: JobState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """End survivors; plan; start; watch. What somebody else is starting is waited for instead."""
    ids = {found.id for found in findings}
    if ids & autostart.IDS:
        yield from autostart.converge(target)
    yield from place.converge(target, state.place, findings)
    if not ids & DUE:
        return
    job, run = job_of(target.cluster), run_directory(target)
    if job is None or run is None:
        return
    decision = judge(target, state, peers)
    if decision and "job-starting" in ids:
        directory = attempt_directory(run, decision.attempt)
        waiting = await_start(unit_name(job.name), directory, decision.starting)
        yield Shell(waiting, seconds=decision.starting + 30)
        yield Meet("the start that somebody else began")
        return
    name, first = target.node.name, members(target.cluster)[0]
    left = state.unit(job.name)
    if left is not None:
        yield Shell(end(job.name, run, left.attempt, name))
    yield Meet("an end of what an older attempt left")
    if is_first(target):
        try:
            plan: Plan | None = new_plan(target, state, peers)
        except KeyError as silent:
            yield _refusal(f"{silent.args[0]} cannot be read any more")
            return
        assert plan is not None
        yield Shell(publish(job, run, plan))
        yield Meet("the plan")
    else:
        yield Meet("the plan")
        plan = _published(peers, first, name, state)
    if plan is None:
        yield _refusal(f"{first} shows no new plan")
        return
    launch = new_launch(target, state, plan)
    yield Shell(start(launch), seconds=APPEAR_SECONDS + 60)
    yield Meet("the start", otherwise=end(job.name, run, launch.attempt, name))
    yield Shell(
        watch(launch, plan, job.first_step_seconds),
        seconds=job.first_step_seconds + 60,
        show=True,
    )


def _refusal(sentence: str) -> Shell:
    return Shell(f"echo {quote(f'{sentence}; run the same command again')} >&2; exit 1")


def _published(peers: Peers, first: str, name: str, state: JobState) -> Plan | None:
    attempt = peers[first].attempt if first in peers else None
    if attempt is None or attempt.plan.attempt <= state.attempts:
        return None
    plan: Plan = attempt.plan
    return plan if plan.boot_ids.get(name) == state.boot_id else None


def publish(job: Job, run: str, plan: Plan) -> str:
    """Shell that makes the attempt's directory appear, with the plan in it, or fails."""
    directory, fresh = attempt_directory(run, plan.attempt), f"{run}/attempts/.new-{uuid4().hex}"
    config = job.trainer.model_copy(update={"output": run}).model_dump(mode="json")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    started = json.dumps(
        {"fingerprint": job.fingerprint(), "job": resolved(job)}, ensure_ascii=False
    )
    taken = f"attempt {plan.attempt} of {job.name} was begun by somebody else; see lockstep status"
    return (
        f"{write_file(f'{fresh}/plan.json', json.dumps(plan.as_json()), backup=False)}\n"
        # A directory is never renamed over one that holds a plan: of two that start the job at the
        # same time, one gives way, before it has written anything that the other reads.
        f"mv -T {quote(fresh)} {quote(directory)} 2>/dev/null ||\n"
        f"{{ rm -rf {quote(fresh)}; echo {quote(taken)} >&2; exit 1; }}\n"
        f"{write_file(f'{run}/trainer.yaml', text, backup=False)}\n"
        f"if ! test -e {quote(f'{run}/job.json')}; then\n"
        # Not for everybody: the job's variables may hold a token.
        f"{write_file(f'{run}/job.json', started, mode='0600', backup=False)}\nfi"
    )


def await_start(unit: str, directory: str, seconds: int) -> str:
    """Shell that waits until the unit that somebody else is starting runs here, or the time is over.

    Then the job counts as interrupted, and this run goes on with it.
    """
    return (
        f"left={seconds + 2}\n"
        f"until systemctl is-active -q {quote(unit)}; do\n"
        f"for each in {quote(directory)}/*.exit {quote(directory)}/rank-*.error.json; do\n"
        "if test -e \"$each\"; then echo 'it ended while it was being started; see lockstep status' >&2; exit 1; fi\n"
        "done\n"
        "left=$((left - 1)); test $left -gt 0 || exit 0\n"
        "sleep 1\n"
        "done"
    )


def start(launch: Launch) -> str:
    """Shell that waits for the plan to be seen here, and starts this node's unit."""
    directory = launch.attempt_directory
    plan, started = quote(f"{directory}/plan.json"), quote(f"{directory}/{launch.node}.started")
    unseen = f"{directory} is not seen on {launch.node}: do all nodes share that storage?"
    active = f"{launch.unit} is active already on {launch.node}: somebody else started it"
    return (
        f"{appears(plan, quote(unseen))}"
        f"if systemctl is-active -q {quote(launch.unit)}; then echo {quote(active)} >&2; exit 1; fi\n"
        f"{write_file(path(launch), unit_file(launch), mode='0600', backup=False)}\n"
        "systemctl daemon-reload\n"
        f"cat /proc/sys/kernel/random/boot_id >{started}\n"
        f"systemctl start {quote(launch.unit)}"
    )


FIRST_CAUSE = r"""
function out(    mine) {
    mine = kind == "\"own\""
    if (kind == "" || (best != "" && (own > mine || (own == mine && at <= time)))) return
    own = mine; at = time; split(nodes, name, " ")
    best = name[int(rank / processes) + 1] ", rank " rank ": " error
}
FNR == 1 { out(); kind = ""; rank = 0; error = ""; time = 0 }
/^ "(kind|rank|error|time)": / {
    key = $0; sub(/^ "/, "", key); sub(/".*/, "", key)
    sub(/^ "[a-z]*": /, ""); sub(/,$/, "")
    if (key == "kind") kind = $0
    if (key == "rank") rank = $0
    if (key == "time") time = $0 + 0
    if (key == "error") { gsub(/^"|"$/, ""); gsub(/\\"/, "\""); error = $0 }
}
END { out(); if (best != "") print best }
"""
"""awk over rank-*.error.json: the first own error, or else the first error, in words."""

WATCH = r"""
cd "$directory"
begin=$(date +%s)
said=0
while :; do
    passed=$(($(date +%s) - begin))
    if test -e ../../complete.json; then exit 0; fi
    if tail -n 100 ../../metrics.jsonl 2>/dev/null | grep -q "\"attempt\": *$attempt[,}]"; then
        if $first; then echo "the first step was made after $passed s"; fi
        exit 0
    fi
    for each in *.exit rank-*.error.json; do
        if test -e "$each"; then break 2; fi
    done
    systemctl is-active -q "$unit" || break
    if test -e "../$((attempt + 1))"; then
        echo "somebody else has begun attempt $((attempt + 1)); see lockstep status" >&2
        exit 1
    fi
    if test "$passed" -ge "$limit"; then
        echo "no first step within $limit s; the job goes on: see lockstep status, and $directory" >&2
        exit 1
    fi
    if $first && test "$passed" -ge "$said"; then
        echo "waiting for the first step: $passed s"
        said=$((passed + 5))
    fi
    sleep 0.5
done
sleep "$moment"
cause=
set -- rank-*.error.json
if test -e "$1"; then cause=$(awk -v nodes="$nodes" -v processes="$processes" "$first_cause" "$@"); fi
if test -z "$cause"; then
    for each in *.exit; do
        if test -e "$each" && ! test -e "${each%.exit}.asked"; then
            ended=${each%.exit}
            cause="$ended ended without a record of a rank; its log ends with: $(tail -n 1 "$ended.log")"
            break
        fi
    done
fi
eval "$end"
echo "${cause:-the unit ended on this node}; logs in $directory" >&2
exit 1
"""


def watch(launch: Launch, plan: Plan, limit: int) -> str:
    """Shell that ends with 0 at the attempt's first step, and with 1 at its first sign of an end.

    In that case it ends this node's part too: a job that has lost a rank waits for ever.
    limit: seconds until a job without a first step counts as one that needs a look.
    """
    directory = launch.attempt_directory
    settings = {
        "directory": directory,
        "attempt": str(plan.attempt),
        "unit": launch.unit,
        "limit": str(limit),
        "moment": str(OWN_BEATS_PEER_SECONDS),
        "nodes": " ".join(plan.nodes),
        "processes": str(plan.processes),
        "first": "true" if launch.node == plan.nodes[0] else "false",
        "first_cause": FIRST_CAUSE,
        "end": end(launch.job, launch.run, launch.attempt, launch.node),
    }
    return "\n".join(f"{key}={quote(value)}" for key, value in settings.items()) + WATCH
