"""The archives role: what a node needs is on the shared storage, copied there once by the head."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.archives import taking
from roles.archives.converge import converge
from roles.archives.drift import drift, first
from roles.archives.probe import ArchivesState, parse, probe
from roles.core.role import Target, Unreadable
from roles.core.steps import Download, Shell, Upload
from roles.environment import archive
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.fit import Needs, Offer
from roles.environment.spec import Environments
from roles.storage.spec import StorageSpec, depot
from tests.unit.roles.environment.made import CONDA, pack

ARCHIVE = Archive("ab" * 32, 5000, "tar.zst", "", "3.11", "bin/python3", None)
PLACE = f"/shared/.lockstep/archives/{ARCHIVE.file_name}"
NOTES = "/shared/.lockstep/used/lab@10.0.0.1"
NODES = {f"node{n}": Node(name=f"node{n}", address=f"10.0.0.{n}") for n in (1, 2, 3)}
NODE = Offer("x86_64", "2.36")
HAVE = ArchivesState({"llm": frozenset({"00", ARCHIVE.sha256})}, frozenset(), NODE)
LACK = ArchivesState({}, frozenset(), NODE)
OLD = ArchivesState({"llm": frozenset({"00"})}, frozenset(), NODE)


@pytest.fixture(autouse=True)
def known_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["roles.environment.sources"], "describe", lambda path, called: ARCHIVE
    )


def target(
    name: str = "node1",
    shared: bool = True,
    way: str | None = None,
    path: str = "/shared",
    called: str = "lab",
) -> Target[Environments]:
    entry = {"archive": "/archives/llm.tar.zst", "distribute": way}
    section = Environments.model_validate({"llm": entry})
    sections: dict[str, Spec] = {"environments": section} | (
        {"storage": StorageSpec(kind="existing", path=path)} if shared else {}
    )
    cluster = Cluster(called, Path("lab.yaml"), NODES, sections=sections)
    return Target(cluster, NODES[name], section)


def test_the_head_publishes_what_some_node_needs_and_names_those_nodes() -> None:
    (finding,) = drift(target(), HAVE, {"node2": OLD, "node3": LACK})
    assert finding.id == "archive-unpublished" and "for node2, node3" in finding.want
    steps = list(converge(target(), HAVE, {"node2": OLD}, [finding]))
    note, upload = steps
    assert isinstance(note, Shell) and f"touch {NOTES}/{ARCHIVE.file_name}" in note.command
    assert "A=$(existing /shared/.lockstep/archives)" in note.command
    assert upload == Upload(Path("/archives/llm.tar.zst"), PLACE, ARCHIVE.sha256)


def test_nothing_is_published_that_nobody_needs_or_that_lies_there() -> None:
    assert drift(target(), HAVE, {"node2": HAVE}) == []
    there = ArchivesState({}, frozenset({PLACE}), NODE, noted=frozenset({ARCHIVE.file_name}))
    assert drift(target(), there, {"node2": LACK}) == []


@pytest.mark.parametrize("imports", [{}, {"torch": Needs("x86_64", "2.34", "x.so")}])
def test_an_archive_that_runs_on_no_node_that_lacks_it_is_not_published(
    monkeypatch: pytest.MonkeyPatch, imports: dict[str, Needs]
) -> None:
    needs = Needs("x86_64", "2.17" if imports else "2.34", "x.so")
    fitting = replace(ARCHIVE, needs=needs, imports=imports)
    monkeypatch.setattr(
        sys.modules["roles.environment.sources"], "describe", lambda path, called: fitting
    )
    old, new = (ArchivesState({}, frozenset(), Offer("x86_64", v)) for v in ("2.28", "2.36"))
    assert drift(target(), old, {"node2": old}) == []
    (finding,) = drift(target(), old, {"node2": old, "node3": new})
    assert "for node3" in finding.want


def test_a_node_that_cannot_be_read_asks_for_nothing() -> None:
    assert drift(target(), HAVE, {}) == []


def test_the_other_nodes_publish_nothing() -> None:
    assert drift(target("node2"), LACK, {"node1": LACK}) == []


@pytest.mark.parametrize(
    "where",
    [{"shared": False}, {"shared": True, "way": "nodes"}, {"shared": False, "way": "nodes"}],
)
def test_without_shared_storage_or_where_declared_each_node_passes_the_archive_on(
    where: dict[str, Any],
) -> None:
    for name in NODES:
        (finding,) = drift(target(name, **where), OLD, {})
        assert finding.id == "archive-undelivered"
        place = f"/var/lib/lockstep/archives/{ARCHIVE.file_name}"
        judge, step = converge(target(name, **where), OLD, {}, [finding])
        assert isinstance(judge, Shell) and "no room for" in judge.command
        assert step == Upload(Path("/archives/llm.tar.zst"), place, ARCHIVE.sha256, relayed=True)
        there = ArchivesState({}, frozenset({place}), NODE)
        assert drift(target(name, **where), there, {}) == []
        assert drift(target(name, **where), HAVE, {}) == []


def test_keys_of_past_transfers_are_taken_out() -> None:
    state = ArchivesState(HAVE.unpacked, frozenset(), NODE, frozenset({"lockstep-relay-12"}))
    (finding,) = drift(target("node2"), state, {})
    assert finding.id == "archive-relay-key" and finding.seen == "lockstep-relay-12"
    (step,) = converge(target("node2"), state, {}, [finding])
    assert isinstance(step, Shell) and "USER=root taker=10.0.0.1" in step.command


def test_an_unusable_archive_is_left_to_the_environment_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def describe(path: Path, called: str) -> Archive:
        raise ArchiveProblem("no")

    monkeypatch.setattr(sys.modules["roles.environment.sources"], "describe", describe)
    assert drift(target(), LACK, {}) == []
    assert "parcel" not in probe(target())


def test_what_the_probe_prints_is_read() -> None:
    text = (
        f'machine x86_64\nglibc 2.36\nstamp llm {{"archive": "{ARCHIVE.sha256}"}}\nstamp llm {{"archive": "00"}}\n'
        f"stamp other no json\nparcel {PLACE}\nnoted x.tar\nunused y.tar 12\nkey lockstep-relay-12\nend"
    )
    expected = ArchivesState(
        {"llm": frozenset({ARCHIVE.sha256, "00"}), "other": frozenset({""})},
        frozenset({PLACE}),
        NODE,
        frozenset({"lockstep-relay-12"}),
        noted=frozenset({"x.tar"}),
        unused={"y.tar": 12},
    )
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "stamp llm {}",
        "stamp llm {}\nend",
        "machine x86_64\nend",
        "machine x86_64\nglibc 2.36\nwhat\nend",
        "machine x86_64\nglibc 2.36\nkey of another\nend",
    ],
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


# --- what this cluster uses no more ---

DROPPED = f"{'cd' * 32}.tar"


def depot_of(storage: Path, called: str = "lab", way: str | None = None) -> Target[Environments]:
    return target(path=str(storage), called=called, way=way)


def head_sees(where: Target[Environments]) -> ArchivesState:
    """What its probe prints of the depot."""
    names = ("parcel ", "noted ", "unused ")
    lines = [line for line in sh(probe(where)).splitlines() if line.startswith(names)]
    return parse("\n".join(["machine x86_64", "glibc 2.36", *lines, "end"]))


def sh(script: str) -> str:
    done = subprocess.run(["dash", "-e"], input=script, capture_output=True, text=True, check=True)
    return done.stdout


def converged(where: Target[Environments]) -> list[str]:
    """Carry out what the head does about its depot; ids of the findings."""
    state = head_sees(where)
    found = drift(where, state, {})
    for step in converge(where, state, {}, found):
        if isinstance(step, Shell):
            sh(step.command)
    return [finding.id for finding in found if finding.id != "archive-unpublished"]


def used_before(where: Target[Environments], name: str, minutes: int = 90) -> None:
    """The archive lies in the depot, which the cluster's head noted so long ago."""
    lockstep = Path(str(depot(where.cluster)))
    note = lockstep / f"used/{where.cluster.name}@10.0.0.1/{name}"
    for path in (note, lockstep / "archives" / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("bytes")
        subprocess.run(["touch", "-d", f"-{minutes} min", path], check=True)


def test_an_archive_of_an_earlier_environment_leaves_the_shared_storage(tmp_path: Path) -> None:
    where, archives = depot_of(tmp_path), tmp_path / ".lockstep/archives"
    used_before(where, ARCHIVE.file_name)
    used_before(where, DROPPED)
    (archives / f".{DROPPED}.arriving").mkdir()
    subprocess.run(["touch", "-d", "-2 hours", archives / f".{DROPPED}.arriving"], check=True)
    (archives / f"{'ee' * 32}.tar").write_text("nobody noted whose it is")
    (archives / "own.txt").write_text("a user's")
    (finding,) = drift(where, head_sees(where), {})
    assert finding.id == "archive-unused" and finding.seen == f"{DROPPED} (0 MB)"
    assert converged(where) == ["archive-unused"] and converged(where) == []
    left = {path.name for path in archives.iterdir()}
    assert left == {ARCHIVE.file_name, f"{'ee' * 32}.tar", "own.txt"}


def test_an_archive_stays_that_another_cluster_of_the_storage_uses(tmp_path: Path) -> None:
    ours, theirs = depot_of(tmp_path), depot_of(tmp_path, "other")
    used_before(ours, ARCHIVE.file_name)
    assert converged(theirs) == ["archive-unnoted"] and converged(theirs) == []
    archive = tmp_path / ".lockstep/archives" / ARCHIVE.file_name
    by_nodes = depot_of(tmp_path, way="nodes")
    assert converged(by_nodes) == ["archive-undelivered", "archive-unused"]
    assert archive.exists() and not head_sees(by_nodes).unused


@pytest.mark.parametrize("grows", [True, False])
def test_what_may_still_be_on_its_way_or_was_noted_just_now_stays(
    tmp_path: Path, grows: bool
) -> None:
    where = depot_of(tmp_path)
    used_before(where, DROPPED, minutes=90 if grows else 5)
    if grows:
        arriving = tmp_path / f".lockstep/archives/.{DROPPED}.arriving/{'cd' * 32}"
        arriving.parent.mkdir()
        arriving.touch()
    assert converged(where) == [] and not head_sees(where).unused


def test_nothing_is_removed_while_it_is_not_known_what_an_environment_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = depot_of(tmp_path)
    used_before(where, DROPPED)
    assert head_sees(where).unused
    monkeypatch.setattr(sys.modules["roles.archives.drift"], "archive_of", lambda *_: None)
    assert drift(where, head_sees(where), {}) == []


def test_workers_leave_the_notes_alone(tmp_path: Path) -> None:
    used_before(depot_of(tmp_path), ARCHIVE.file_name)
    used_before(depot_of(tmp_path), DROPPED)
    worker = target("node2", path=str(tmp_path))
    assert not head_sees(worker).noted and drift(worker, head_sees(worker), {}) == []


# --- sources on the shared storage, which only the nodes see ---

UNSEEN = "/shared/nowhere/llm.tar"


@pytest.fixture
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control machine's state directory, in which nothing was read yet."""
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    return tmp_path


def of_shared(name: str = "node1", kind: str = "archive", **entry: Any) -> Target[Environments]:
    declared = target(name)
    section = Environments.model_validate({"llm": {kind: UNSEEN, **entry}})
    return replace(
        declared,
        cluster=replace(
            declared.cluster, sections={**declared.cluster.sections, "environments": section}
        ),
        spec=section,
    )


def seen(identity: str | None, *parcels: str) -> ArchivesState:
    noted = frozenset(parcel.rpartition("/")[2] for parcel in parcels)
    sources = {"llm": identity} if identity else {}
    return ArchivesState({}, frozenset(parcels), NODE, sources=sources, noted=noted)


def test_what_nobody_read_is_read_by_the_head_while_the_others_wait(unseen: Path) -> None:
    (finding,) = drift(of_shared(), seen("1-2-3"), {})
    assert (finding.id, finding.seen, finding.repairable) == (
        "archive-unread",
        "not read yet",
        True,
    )
    (others,) = drift(of_shared("node2"), seen(None), {"node1": seen("1-2-3")})
    assert others == finding
    assert list(converge(of_shared("node2"), seen(None), {}, [others])) == []
    assert first(of_shared("node2"), seen(None), {}) == "node1"
    assert first(of_shared("node1"), seen("1-2-3"), {}) is None
    (lost,) = drift(of_shared(), seen(None), {})
    assert not lost.repairable and "no such archive, neither on node1 nor" in lost.seen


def test_the_head_publishes_it_and_it_is_read_here_and_leaves_no_copy(unseen: Path) -> None:
    steps = converge(of_shared(), seen("1-2-3"), {}, drift(of_shared(), seen("1-2-3"), {}))
    publish = next(steps)
    taken = "/shared/.lockstep/archives/.lab.llm.taken"
    assert isinstance(publish, Shell) and f"S={UNSEEN} T={taken}" in publish.command
    brought = next(steps)
    assert isinstance(brought, Download) and brought.source == taken
    brought.destination.parent.mkdir(parents=True)
    pack(brought.destination, CONDA)
    digest = hashlib.sha256(brought.destination.read_bytes()).hexdigest()
    place = f"/shared/.lockstep/archives/{digest}.tar"
    (published,) = steps
    assert isinstance(published, Shell) and published.command.endswith(f"mv -f {taken} {place}")
    assert f"touch {NOTES}/{digest}.tar\n" in published.command
    assert not brought.destination.exists()

    assert drift(of_shared(), seen("1-2-3", place), {}) == []
    assert first(of_shared("node2"), seen(None), {}) is None
    assert f"for p in {place} " in probe(of_shared("node2"))
    (changed,) = drift(of_shared(), seen("9-9-9", place), {})
    assert (changed.id, changed.seen) == ("archive-unread", "changed since it was read")
    (again,) = drift(of_shared(), seen("1-2-3"), {})
    assert again.id == "archive-unpublished"
    assert next(converge(of_shared(), seen("1-2-3"), {}, [again])) == publish
    (gone,) = drift(of_shared(), seen(None), {})
    assert gone.id == "archive-unpublished" and not gone.repairable and UNSEEN in gone.fix


def test_nothing_is_removed_in_the_run_that_reads_what_an_environment_uses(unseen: Path) -> None:
    state = replace(seen("1-2-3"), unused={DROPPED: 5})
    found = drift(of_shared(), state, {})
    assert [finding.id for finding in found] == ["archive-unread"]
    steps = converge(of_shared(), state, {}, found)
    next(steps)
    brought = next(steps)
    assert isinstance(brought, Download)
    brought.destination.parent.mkdir(parents=True)
    pack(brought.destination, CONDA)
    (published,) = steps
    assert isinstance(published, Shell) and DROPPED not in published.command


def test_one_that_is_refused_is_not_published(unseen: Path) -> None:
    steps = converge(of_shared(), seen("1-2-3"), {}, drift(of_shared(), seen("1-2-3"), {}))
    next(steps)
    brought = next(steps)
    assert isinstance(brought, Download)
    brought.destination.parent.mkdir(parents=True)
    brought.destination.write_text("no archive")
    (end,) = steps
    assert isinstance(end, Shell) and end.command.endswith("exit 1")
    assert f"{UNSEEN} is no tar archive of an environment" in end.command
    assert not brought.destination.exists()


def identity(place: Path, kind: str) -> str:
    """What the head's probe prints of a source that lies there."""
    text = probe(of_shared(kind=kind)).replace(UNSEEN, quote(str(place)))
    printed = subprocess.run(["dash", "-e"], input=text, capture_output=True, text=True, check=True)
    (found,) = (line for line in printed.stdout.splitlines() if line.startswith("source "))
    return parse(f"machine x\nglibc 2.36\n{found}\nend").sources["llm"]


def test_a_directory_is_another_one_when_a_file_of_it_changes_and_not_with_its_caches(
    unseen: Path,
) -> None:
    place = unseen / "an env"
    (place / "lib").mkdir(parents=True)
    (place / "lib/x.py").write_text("x = 1\n")
    (place / "bin").symlink_to("lib")
    before = identity(place, "directory")
    (place / "lib/__pycache__").mkdir()
    (place / "lib/__pycache__/x.pyc").touch()
    assert identity(place, "directory") == before
    (place / "lib/x.py").write_text("x = 10\n")
    changed = identity(place, "directory")
    assert changed != before
    (place / "bin").unlink()
    (place / "bin").symlink_to("lib/.")
    assert identity(place, "directory") != changed


def test_a_directory_is_packed_whole_and_without_its_caches(unseen: Path) -> None:
    place, taken = unseen / "an env", unseen / "depot/.taken"
    for name, content in CONDA:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "lib/__pycache__").mkdir()
    command = ["dash", "-e", "-c", taking._pack(str(place), str(taken))]
    subprocess.run(command, check=True)
    found = archive.read(taken)
    assert found.python == "3.10" and not (taken.parent / ".taken.failed").exists()
    assert found.entries == sum(1 for _ in place.rglob("*")) - 1
    shutil.rmtree(place / "lib")
    (place / "lib").symlink_to("/nowhere")
    place.rename(unseen / "gone")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and not taken.exists()


def test_a_directory_that_has_no_room_when_packed_leaves_nothing(
    unseen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, taken, tool = unseen / "env", unseen / "depot/.taken", unseen / "tools/zstd"
    for path in (place, tool.parent):
        path.mkdir()
    tool.write_text("#!/bin/sh\nhead -c 100\nexit 70\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        sh(taking._pack(str(place), str(taken)))
    sentence = f"{place} could not be packed into {taken.parent}"
    assert f"{sentence}, which has " in failed.value.stderr
    assert not list(taken.parent.iterdir())
    (tool.parent / "df").write_text("#!/bin/sh\nexit 1\n")
    (tool.parent / "df").chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        sh(taking._pack(str(place), str(taken)))
    assert failed.value.stderr.endswith(f"{sentence}\n")


def test_an_archive_is_published_without_its_bytes_twice(unseen: Path) -> None:
    (unseen / "own.tar").write_text("bytes")
    (unseen / "link.tar").symlink_to("own.tar")
    taken = unseen / "depot/.taken"
    subprocess.run(
        ["dash", "-e", "-c", taking._link(str(unseen / "link.tar"), str(taken))], check=True
    )
    assert taken.samefile(unseen / "own.tar") and not taken.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_private_archive_is_published_so_that_every_node_reads_it_and_stays_private(
    unseen: Path, mode: int
) -> None:
    own, taken = unseen / "own.tar", unseen / "depot/.taken"
    own.write_text("bytes")
    own.chmod(mode)
    sh(taking._link(str(own), str(taken)))
    assert taken.read_text() == "bytes" and taken.stat().st_mode & 0o777 == 0o644
    assert own.stat().st_mode & 0o777 == mode and not taken.samefile(own)
