"""The archives role: what a node needs is on the shared storage, copied there once by the head."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.archives.converge import converge
from roles.archives.drift import drift
from roles.archives.probe import ArchivesState, parse, probe
from roles.core.role import Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.fit import Needs, Offer
from roles.environment.spec import Environments
from roles.storage.spec import StorageSpec

ARCHIVE = Archive("ab" * 32, 5000, "tar.zst", "", "3.11", "bin/python3", None)
PLACE = f"/shared/.lockstep/archives/{ARCHIVE.file_name}"
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
    name: str = "node1", shared: bool = True, way: str | None = None
) -> Target[Environments]:
    entry = {"archive": "/archives/llm.tar.zst", "distribute": way}
    section = Environments.model_validate({"llm": entry})
    sections: dict[str, Spec] = {"environments": section} | (
        {"storage": StorageSpec(kind="existing", path="/shared")} if shared else {}
    )
    cluster = Cluster("lab", Path("lab.yaml"), NODES, sections=sections)
    return Target(cluster, NODES[name], section)


def test_the_head_publishes_what_some_node_needs_and_names_those_nodes() -> None:
    (finding,) = drift(target(), HAVE, {"node2": OLD, "node3": LACK})
    assert finding.id == "archive-unpublished" and "for node2, node3" in finding.want
    steps = list(converge(target(), HAVE, {"node2": OLD}, [finding]))
    assert steps == [Upload(Path("/archives/llm.tar.zst"), PLACE, ARCHIVE.sha256)]


def test_nothing_is_published_that_nobody_needs_or_that_lies_there() -> None:
    assert drift(target(), HAVE, {"node2": HAVE}) == []
    assert drift(target(), ArchivesState({}, frozenset({PLACE}), NODE), {"node2": LACK}) == []


def test_an_archive_that_runs_on_no_node_that_lacks_it_is_not_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitting = replace(ARCHIVE, needs=Needs("x86_64", "2.34", "x.so"))
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
        (step,) = converge(target(name, **where), OLD, {}, [finding])
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
        f"stamp other no json\nparcel {PLACE}\nkey lockstep-relay-12\nend"
    )
    expected = ArchivesState(
        {"llm": frozenset({ARCHIVE.sha256, "00"}), "other": frozenset({""})},
        frozenset({PLACE}),
        NODE,
        frozenset({"lockstep-relay-12"}),
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
