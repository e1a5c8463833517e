"""The service that resumes a job: what lies on the head for it, and when it resumes, waits, rests and gives up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from inventory.cluster import Cluster
from roles.core.role import Target
from roles.core.steps import Shell, UploadFolder
from roles.job import autostart, resume
from roles.job.autostart import Autostart
from roles.job.converge import converge
from roles.job.declared import _read_once
from roles.job.drift import drift
from roles.job.plan import Plan
from roles.job.probe import Attempt, ErrorRecord, JobState, parse
from roles.job.spec import JobSpec
from roles.storage.probe import Mark, Mount, StorageState
from roles.storage.spec import StorageSpec

from .conftest import JOB, PLAN, view

T = TypeVar("T")
DECLARED = {
    "cluster": "test",
    "nodes": {
        "node1": {"address": "10.0.0.1", "ssh": {"user": "secret"}},
        "node2": {"address": "10.0.0.2"},
    },
    "storage": {"kind": "existing", "path": "/shared"},
    "environments": {"main": {"archive": "environment.tar"}},
    "limits": {"shm": "256M"},
}


@pytest.fixture
def head(cluster: Cluster) -> Target[JobSpec]:
    """The head of a cluster whose job asks for it, with both files on the disk."""
    assert cluster.job is not None
    cluster.job.write_text(f"autostart: true\n{JOB}")
    cluster.path.write_text(yaml.safe_dump(DECLARED))
    _read_once.cache_clear()
    return Target(cluster, cluster.nodes["node1"], JobSpec())


def laid(want: autostart.Wanted, folder: Path) -> Path:
    """The folder as converging leaves it."""
    for name, (source, _) in want.files.items():
        place = folder / "code" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes())
    (folder / "declared.json").write_text(want.declared)
    return folder


def test_what_lies_on_the_head_runs_with_the_environments_own_packages_alone(
    head: Target[JobSpec], tmp_path: Path
) -> None:
    want = autostart.wanted(head)
    assert want is not None and "secret" not in want.declared
    folder = laid(want, tmp_path / "autostart")
    script = (
        "import sys\n"
        "for name in ('pyinfra', 'gevent', 'paramiko', 'elftools', 'packaging', 'virtualenv', 'hatchling'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path[:0] = [{str(folder / 'code')!r}]\n"
        "from pathlib import Path\n"
        "from roles.job import resume\n"
        f"cluster = resume.read(Path({str(folder)!r}))\n"
        "looks = resume.Looks(cluster)\n"
        "from roles.job.probe import probe\n"
        "print(resume.__file__, list(cluster.nodes), len(probe(looks.target('node2'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}/code/roles/job/resume.py ['node1', 'node2']")


def test_the_digest_is_the_one_that_the_probe_makes(head: Target[JobSpec], tmp_path: Path) -> None:
    want = autostart.wanted(head)
    assert want is not None
    folder = laid(want, tmp_path / "autostart")
    unit, note = tmp_path / "unit", tmp_path / "note.json"
    unit.write_text(want.unit)
    note.write_text('{"note": "waits for node2"}\n')
    script = autostart.SHOW
    for name, place in (
        (autostart.NOTE, note),
        (autostart.FOLDER, folder),
        (autostart.UNIT_FILE, unit),
    ):
        script = script.replace(name, str(place))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    word, digest, *_ = done.stdout.split()
    assert (word, digest) == ("autostart", want.digest)
    assert done.stdout.splitlines()[1] == 'note {"note": "waits for node2"}'


def test_a_job_file_may_have_any_name_and_its_variables_are_for_root_alone(
    head: Target[JobSpec],
) -> None:
    assert head.cluster.job is not None
    spaced = head.cluster.job.rename(head.cluster.job.with_name("my job (2).yaml"))
    renamed = replace(head, cluster=replace(head.cluster, job=spaced))
    step = next(autostart.converge(renamed))
    assert isinstance(step, UploadFolder) and step.mode == "0600"
    assert step.files["job/light.yaml"][0] == spaced
    assert not any(set(name) & set(" \t\n") for name in step.files)


def test_a_script_ends_where_it_runs_when_its_time_is_over(head: Target[JobSpec]) -> None:
    with pytest.raises(resume.Failed, match="did not end within 1 s"):
        resume.run(head.cluster, "node1", "sleep 30", 1)
    assert resume.run(head.cluster, "node1", "echo here", 5) == "here\n"
    with pytest.raises(resume.Failed, match="status 3"):
        resume.run(head.cluster, "node1", "exit 3", 5)


def test_it_is_put_on_the_head_alone_and_before_the_launch(head: Target[JobSpec]) -> None:
    (found,) = drift(head, view("node1"), {"node2": view("node2")})
    assert (found.id, found.seen) == ("autostart-missing", "none")
    steps = list(converge(head, view("node1"), {}, [found]))
    assert [type(step) for step in steps] == [UploadFolder, Shell]
    other = replace(head, node=head.cluster.nodes["node2"])
    assert drift(other, view("node2"), {"node1": view("node1")}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"digest": "x"}, "another version"),
        ({"enabled": False}, "not enabled"),
        ({"active": False}, "does not run"),
    ],
)
def test_one_that_is_right_is_left_alone(
    head: Target[JobSpec], change: Mapping[str, Any], words: str | None
) -> None:
    want = autostart.wanted(head)
    assert want is not None
    seen = replace(Autostart(want.digest, True, True), **change)
    found = drift(head, view("node1", autostart=seen), {"node2": view("node2")})
    assert [words in each.seen for each in found] == [True] if words else found == []


def test_without_autostart_it_is_removed_wherever_it_lies(
    target: Callable[..., Target[JobSpec]],
) -> None:
    _read_once.cache_clear()
    for name in ("node1", "node2"):
        state = view(name, autostart=Autostart("x", True, True))
        others = {other: view(other) for other in ("node1", "node2") if other != name}
        (found,) = drift(target(name), state, others)
        assert found.id == "autostart-left"
        (step,) = converge(target(name), state, {}, [found])
        assert isinstance(step, Shell) and "disable --now" in step.command


def test_the_probe_shows_it_and_a_drained_attempt() -> None:
    text = (
        "boot a\nnow 1\ncores 1\ngpus 0\nautostart abc enabled failed\n"
        'note {"tries": 0, "checkpoint": null, "note": "waits for node2 (silent)"}\n'
        f"attempts 2\nplan {json.dumps(PLAN.as_json())}\ndrained\nend"
    )
    state = parse(text)
    assert state.autostart == Autostart("abc", True, False, "waits for node2 (silent)")
    assert state.attempt is not None and state.attempt.drained


def test_half_a_note_of_the_service_hides_nothing_else_of_the_node() -> None:
    state = parse('boot a\nnow 1\ncores 1\ngpus 0\nautostart abc enabled active\nnote {"tri\nend')
    assert state.autostart == Autostart("abc", True, True, "")


SHARED = StorageState(
    access="yes",
    real="/shared",
    mount=Mount("/shared", "nfs4", "fs:/", ("rw", "hard")),
    writable=True,
    free=50_000,
    mark=Mark("s", "1", "1"),
    token="a" * 16,
    tokens={"node1": ("a" * 16,), "node2": ("a" * 16,)},
)


class Played(resume.Looks):
    """Nodes by their looks; a text is why one is silent."""

    def __init__(self, cluster: Cluster, **states: JobState | str) -> None:
        super().__init__(cluster)
        self.states = states
        self.shared: dict[str, StorageState | str] = dict.fromkeys(states, SHARED)

    def job(self, name: str) -> JobState:
        return _told(self.states, name)

    def storage(self, name: str, spec: object) -> StorageState:
        return _told(self.shared, name)


def _told(states: Mapping[str, T | str], name: str) -> T:
    state = states[name]
    if isinstance(state, str):
        raise resume.Failed(state)
    return state


def back(name: str, **changes: Any) -> JobState:
    """A node that was restarted while attempt 2 ran."""
    return view(name, boot_id=f"new-{name}", units=(), checkpoint="step-30", **changes)


FRESH = resume.Memory()


def note(looks: resume.Looks, memory: resume.Memory = FRESH, pause: int = 0) -> str:
    found = resume.turn(looks, memory, pause)
    assert found.seen is None
    return found.memory.note


def test_it_resumes_when_every_node_is_back_and_counts_it(head: Target[JobSpec]) -> None:
    looks = Played(head.cluster, node1=back("node1"), node2=back("node2"))
    found = resume.turn(looks, FRESH, 0)
    assert found.seen is not None and list(found.seen) == ["node1", "node2"]
    assert (found.memory.tries, found.memory.checkpoint) == (1, "step-30")
    assert note(looks, pause=12) == "resumes it in 12 s"


def test_it_waits_for_nodes_mounts_gpus_and_the_end_of_a_reboot(head: Target[JobSpec]) -> None:
    looks = Played(head.cluster, node1=back("node1"), node2="no route to host")
    assert note(looks) == "waits for node2 (no route to host)"
    looks = Played(head.cluster, node1=back("node1"), node2=back("node2"))
    looks.shared["node2"] = "no answer within 30 s"
    assert note(looks) == "waits for the storage of node2 (no answer within 30 s)"
    looks.shared["node2"] = StorageState("absent")
    assert "node2 (storage-missing" in note(looks)
    unseen = replace(back("node2"), attempts=0, attempt=None)
    assert "node2 to see the run" in note(Played(head.cluster, node1=back("node1"), node2=unseen))
    drained = back("node1", attempt=Attempt(PLAN, drained=True))
    looks = Played(head.cluster, node1=drained, node2=back("node2"))
    assert note(looks) == "waits for the end of lockstep reboot"


def test_it_waits_for_a_place_of_runs_that_is_not_mounted_on_any_node(
    head: Target[JobSpec],
) -> None:
    """Seen from there alone, the job would be one that never began."""
    _read_once.cache_clear()
    sections = {**head.cluster.sections, "runs": JobSpec(path="/big/runs")}
    bare = replace(SHARED, mount=Mount("/", "ext4", "/dev/sda1", ("rw",)), mark=None)
    states = {name: back(name, place=bare, attempts=0, attempt=None) for name in ("node1", "node2")}
    looks = Played(replace(head.cluster, sections=sections), **states)
    assert note(looks).startswith("waits for node1 (nfs-mount-wrong: want")


def test_it_waits_for_no_storage_that_is_left_alone(head: Target[JobSpec]) -> None:
    left = StorageSpec(kind="existing", path="/shared", manage="unmanaged")
    cluster = replace(head.cluster, sections={**head.cluster.sections, "storage": left})
    looks = Played(cluster, node1=back("node1"), node2=back("node2"))
    looks.shared = dict.fromkeys(looks.shared, StorageState("yes"))
    assert resume.turn(looks, FRESH, 0).seen is not None


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"complete": {"step": 9}}, "complete"),
        ({"attempt": Attempt(PLAN, stopped=True)}, "stopped"),
        ({"attempt": Attempt(PLAN, errors=(ErrorRecord("own", 0, "node1", "bad", 1),))}, "failed"),
        ({"attempt": None, "attempts": 0}, "absent"),
    ],
)
def test_it_rests_where_a_run_would_start_nothing_either_and_where_it_never_began(
    head: Target[JobSpec], change: Mapping[str, Any], state: str
) -> None:
    looks = Played(head.cluster, node1=back("node1", **change), node2=back("node2", **change))
    assert note(looks) == f"rests: the job is {state}"


def test_it_gives_up_after_resumes_without_a_checkpoint_and_begins_anew_after_one(
    head: Target[JobSpec],
) -> None:
    looks = Played(head.cluster, node1=back("node1"), node2=back("node2"))
    memory = resume.Memory(resume.MOST_TRIES, "step-30")
    assert note(looks, memory) == "gave up after 5 resumes without a new checkpoint"
    found = resume.turn(looks, resume.Memory(resume.MOST_TRIES, "step-20"), 0)
    assert found.seen is not None and found.memory.tries == 1


def test_its_memory_outlives_it_and_half_of_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "autostart.json"
    assert resume.recall(path) == FRESH
    memory = resume.Memory(3, "step-30", "waits")
    resume.keep(path, memory)
    assert resume.recall(path) == memory
    path.write_text('{"tries": 3')
    assert resume.recall(path) == FRESH


def test_the_steps_are_taken_together_and_one_failure_ends_them_everywhere(
    head: Target[JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str]] = []

    def run(cluster: Cluster, name: str, script: str, seconds: int) -> str:
        ran.append((name, script))
        if name == "node2" and "systemctl start" in script:
            raise resume.Failed("unit not found")
        return ""

    states = {name: back(name) for name in ("node1", "node2")}
    looks = Played(head.cluster, **states)
    monkeypatch.setattr(resume, "run", run)
    published = Plan(
        3, PLAN.nodes, {name: s.boot_id for name, s in states.items()}, "10.0.0.1", 29500, 2, 1, 1
    )
    looks.states["node1"] = replace(states["node1"], attempts=3, attempt=Attempt(published))
    failed = resume.resume(looks, states)
    assert failed == {
        "node2": "unit not found",
        "node1": "the other nodes did not reach the start",
    }
    own = [script for name, script in ran if name == "node1"]
    assert "plan.json" in own[0] or "plan.json" in own[1]
    assert any("systemctl start" in script for script in own)
    assert "kill -s KILL" in own[-1], "what it started is ended again"
