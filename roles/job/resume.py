"""The service of ``autostart``: on the head, it resumes the job by itself once its nodes are back.

It decides by the looks and rules of the job role and carries out that role's own steps, here and on the
other nodes over the cluster's ssh. It starts nothing that was never started, stopped, or failed by an
error of its own, and gives up after a few resumes that brought no checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from inventory.cluster import Cluster, Node
from inventory.job import load_job
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import UNATTENDED_SSH, Meet, Shell
from roles.job import place
from roles.job.autostart import FOLDER, IDS, NOTE, SECTIONS
from roles.job.converge import DUE, converge
from roles.job.decide import decide
from roles.job.declared import members
from roles.job.drift import drift
from roles.job.probe import JobState, parse, probe
from roles.job.spec import JobSpec
from roles.limits.spec import LimitsSpec
from roles.storage.drift import drift as storage_drift
from roles.storage.probe import StorageState
from roles.storage.probe import parse as parse_storage
from roles.storage.probe import probe as probe_storage
from roles.storage.spec import StorageSpec, managed

T = TypeVar("T")

EVERY_SECONDS = 15
LOOK_SECONDS = 30
MOST_TRIES = 5
"""So many resumes in a row that brought no new checkpoint, and it gives up."""
FIRST_WAIT, LONGEST_WAIT = 30, 900
"""Seconds from a resume to the next one; twice as many each time."""


class Failed(Exception):
    """A command on a node failed; one sentence."""


def read(folder: Path) -> Cluster:
    """The cluster and the job that converging left here."""
    values = json.loads((folder / "declared.json").read_text())
    (job,) = (folder / "code" / "job").iterdir()
    return Cluster(
        name=values["cluster"],
        path=folder / "declared.json",
        nodes={
            name: Node.model_validate({"name": name, **entry})
            for name, entry in values["nodes"].items()
        },
        sections={"limits": LimitsSpec()}
        | {
            key: spec.model_validate(values["sections"][key])
            for key, spec in SECTIONS.items()
            if key in values["sections"]
        },
        job=job,
    )


def run(cluster: Cluster, name: str, script: str, seconds: int) -> str:
    """What a script prints, run as root on that node. Raises Failed."""
    # On the node itself, too: what hangs there, as on storage that is gone, outlives its ssh.
    command = ["timeout", "-k", "5", str(seconds), "sh", "-c", script]
    if name != cluster.head.name:
        flags = [word for option in UNATTENDED_SSH for word in ("-o", option)]
        command = ["ssh", *flags, name, shlex.join(command)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + 15,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer within {seconds} s") from None
    if done.returncode in (124, 137):
        raise Failed(f"it did not end within {seconds} s")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(said[-1].strip() if said else f"status {done.returncode}")
    return done.stdout


class Looks:
    """The nodes' states, each asked anew: what another node has just written must be seen."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.spec = cluster.section("runs", JobSpec) or JobSpec()

    def target(self, name: str) -> Target[JobSpec]:
        return Target(self.cluster, self.cluster.nodes[name], self.spec)

    def job(self, name: str) -> JobState:
        """Raises Failed or Unreadable."""
        text = run(self.cluster, name, probe(self.target(name)), LOOK_SECONDS)
        return parse(text.rstrip("\n"))

    def storage(self, name: str, spec: StorageSpec) -> StorageState:
        """Enters the path, so that an automount happens. Raises Failed or Unreadable."""
        script = probe_storage(Target(self.cluster, self.cluster.nodes[name], spec))
        return parse_storage(run(self.cluster, name, script, LOOK_SECONDS).rstrip("\n"))


class Others(Mapping[str, Any]):
    """The job's state on the other nodes, see ``roles.core.role.Peers``."""

    def __init__(self, looks: Looks, name: str) -> None:
        self._looks, self._name = looks, name

    def __getitem__(self, name: str) -> JobState:
        if name == self._name:
            raise KeyError(name)
        try:
            return self._looks.job(name)
        except (Failed, Unreadable):
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return name != self._name and name in self._looks.cluster.nodes

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._looks.cluster.nodes if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def obstacles(looks: Looks, seen: Mapping[str, JobState]) -> list[str]:
    """What is not as a launch needs it yet, in words: the storage, the run, what the job role finds.

    seen: every node of the job.
    """
    found = []
    storage = managed(looks.cluster)
    if storage is not None:
        states: dict[str, StorageState] = {}
        for name in seen:
            try:
                states[name] = looks.storage(name, storage)
            except (Failed, Unreadable) as error:
                found.append(f"the storage of {name} ({error})")
        for name, shared in states.items():
            target = Target(looks.cluster, looks.cluster.nodes[name], storage)
            wrong = storage_drift(target, shared, _but(states, name))
            found += [f"{name} ({each})" for each in wrong]
    last = max(state.attempts for state in seen.values())
    found += [f"{name} to see the run" for name, state in seen.items() if state.attempts < last]
    for name, state in seen.items():
        wrong = drift(looks.target(name), state, _but(seen, name))
        found += [
            f"{name} ({each})" for each in wrong if not each.repairable or each.id not in IDS | DUE
        ]
    return found


def _but(states: Mapping[str, T], name: str) -> dict[str, T]:
    """What the others show."""
    return {other: state for other, state in states.items() if other != name}


class Meeting:
    """Where the nodes of a launch wait for each other, point by point."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._came: dict[str, set[str]] = {}
        self._gone: set[str] = set()
        self._changed = threading.Condition()

    def reach(self, name: str, step: Meet) -> bool:
        """Wait for the others there; False when one of them does not come."""
        with self._changed:
            came = self._came.setdefault(step.point, set())
            came.add(name)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: came == self._names or bool((self._names - came) & self._gone), step.seconds
            )
            return came == self._names

    def leave(self, name: str) -> None:
        """This node comes to no further point."""
        with self._changed:
            self._gone.add(name)
            self._changed.notify_all()


def resume(looks: Looks, seen: Mapping[str, JobState]) -> dict[str, str]:
    """Carry out the role's steps on all nodes of the job at once; why it failed, by node."""
    meeting, failed = Meeting(seen), dict[str, str]()

    def one(name: str, findings: list[Finding]) -> None:
        try:
            for step in converge(looks.target(name), seen[name], Others(looks, name), findings):
                if isinstance(step, Shell):
                    run(looks.cluster, name, f"set -e\n{step.command}", step.seconds)
                elif isinstance(step, Meet) and not meeting.reach(name, step):
                    if step.otherwise:
                        run(looks.cluster, name, step.otherwise, 300)
                    raise Failed(f"the other nodes did not reach {step.point}")
        except (Failed, Unreadable) as error:
            failed[name] = str(error)
        except KeyError as silent:
            failed[name] = f"{silent.args[0]} cannot be read any more"
        finally:
            meeting.leave(name)

    threads = []
    for name, state in seen.items():
        findings = [
            found
            for found in drift(looks.target(name), state, _but(seen, name))
            if found.id == "job-interrupted"
        ]
        threads.append(threading.Thread(target=one, args=(name, findings)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@dataclass(frozen=True)
class Memory:
    """What the service knows over its restarts: autostart.json.

    tries: resumes since the last new checkpoint. checkpoint: the newest one at the last resume.
    note: what it does or waits for, in words.
    """

    tries: int = 0
    checkpoint: str | None = None
    note: str = ""


def recall(path: Path) -> Memory:
    """The memory; an empty one where there is none, or where a power cut left half of it."""
    try:
        values = json.loads(path.read_text())
        return Memory(int(values["tries"]), values["checkpoint"], str(values["note"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Memory()


def keep(path: Path, memory: Memory) -> None:
    """Write it at once or not at all."""
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        json.dump(vars(memory), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


@dataclass(frozen=True)
class Turn:
    """What one look at the nodes leads to. seen: the nodes of a job that is to be resumed now, or nothing."""

    memory: Memory
    seen: Mapping[str, JobState] | None = None


def turn(looks: Looks, memory: Memory, pause: int) -> Turn:
    """Look at all nodes of the job, and judge. pause: seconds that are left until the next resume."""
    job = load_job(looks.cluster.job) if looks.cluster.job else None
    assert job is not None
    seen: dict[str, JobState] = {}
    waits: list[str] = []
    for name in members(looks.cluster):
        try:
            seen[name] = looks.job(name)
        except (Failed, Unreadable) as error:
            waits.append(f"{name} ({error})")
    decision = decide(job.name, seen)
    checkpoint = next((state.checkpoint for state in seen.values() if state.checkpoint), None)
    if checkpoint != memory.checkpoint and memory.tries:
        memory = Memory(note=memory.note)
    unseen = decision.state == "absent" and any(
        place.drift(looks.target(name), state.place, _but(seen, name))
        for name, state in seen.items()
    )
    if decision.state not in ("interrupted", "unknown") and not unseen:
        return Turn(replace(memory, note=f"rests: the job is {decision.state}"))
    waits = waits or obstacles(looks, seen)
    if not waits and any(state.attempt and state.attempt.drained for state in seen.values()):
        waits = ["the end of lockstep reboot"]
    if waits:
        return Turn(replace(memory, note=f"waits for {'; '.join(waits)}"))
    if memory.tries >= MOST_TRIES:
        sentence = f"gave up after {memory.tries} resumes without a new checkpoint"
        return Turn(replace(memory, note=sentence))
    if pause > 0:
        again = f", after {memory.tries} that brought no checkpoint" if memory.tries else ""
        return Turn(replace(memory, note=f"resumes it in {pause} s{again}"))
    note = f"resumes it, because {decision.reason}"
    return Turn(Memory(memory.tries + 1, checkpoint, note), seen)


def main() -> None:
    """Look, judge, and resume, for ever."""
    looks, place = Looks(read(Path(FOLDER))), Path(NOTE)
    memory = recall(place)
    # A person who converges at this moment comes first; what was seen once is looked at again.
    not_before = time.monotonic() + EVERY_SECONDS
    while True:
        found = turn(looks, memory, round(not_before - time.monotonic()))
        if found.memory != memory:
            memory = found.memory
            keep(place, memory)
            print(memory.note, flush=True)
        if found.seen:
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (memory.tries - 1))
            not_before = time.monotonic() + wait
            for name, reason in resume(looks, found.seen).items():
                print(f"{name}: {reason}", file=sys.stderr, flush=True)
        time.sleep(EVERY_SECONDS)


if __name__ == "__main__":
    main()
