"""A lab's directory decides its network and names; its commands exclude each other."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from deploy.lab import state
from deploy.lab.errors import LabError
from deploy.lab.progress import Progress
from deploy.lab.state import Paths, Record


def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path, tmp_path / "cache")


def test_the_default_lab_has_the_documented_addresses() -> None:
    record = Record(state.preferred_index(state.DEFAULT_STATE))
    assert record.bridge == "lockstep0"
    assert record.gateway == "10.77.0.1"
    assert [record.address(number) for number in (1, 2, 8)] == [
        "10.77.0.11",
        "10.77.0.12",
        "10.77.0.18",
    ]


def test_another_directory_gets_another_network_and_always_the_same() -> None:
    other = Path("/srv/my-lab")
    assert state.preferred_index(other) == state.preferred_index(other) != 0
    assert {state.preferred_index(Path(f"/srv/lab{n}")) for n in range(500)} <= set(range(1, 200))


def test_link_names_fit_the_kernel_s_fifteen_characters_and_differ() -> None:
    names = [Record(index).link(f"node{n}") for index in range(200) for n in range(1, 9)]
    assert max(map(len, names)) <= 15
    assert len(set(names)) == len(names)


def test_a_network_in_use_is_passed_over() -> None:
    assert state.choose_index(7, {7, 8}) == 9
    assert state.choose_index(199, {199}) == 0
    with pytest.raises(LabError, match="free one"):
        state.choose_index(0, set(range(200)))


@pytest.mark.parametrize(
    "given", ["lab", "/lab", "/", "/srv/a b", "/srv/a:b", "/srv/a,b", "/srv/../etc/x"]
)
def test_a_directory_that_a_mount_option_would_misread_is_refused(given: str) -> None:
    with pytest.raises(LabError, match="LOCKSTEP_LAB="):
        state.paths_from({"LOCKSTEP_LAB": given})
    with pytest.raises(LabError, match="LOCKSTEP_LAB_CACHE="):
        state.paths_from({"LOCKSTEP_LAB": "/srv/lab", "LOCKSTEP_LAB_CACHE": given})


def test_the_cache_is_the_given_one_else_where_the_nodes_lie_else_inside(tmp_path: Path) -> None:
    here = {"LOCKSTEP_LAB": str(tmp_path)}
    assert state.paths_from(here).cache == tmp_path / "cache"
    state.save_record(paths(tmp_path), Record(3, cache="/srv/shared/cache"))
    assert state.paths_from(here).cache == Path("/srv/shared/cache")
    assert state.paths_from({**here, "LOCKSTEP_LAB_CACHE": "/srv/c"}).cache == Path("/srv/c")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(
        5, "/srv/c", ("/a.yaml", "/b.yaml"), "/x.tar.zst", "/job.yaml", ("gcc",), "mixed"
    )
    state.save_record(paths(tmp_path), record)
    assert state.load_record(paths(tmp_path)) == record
    assert state.forget_cluster(record) == Record(5)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"index": "1"}'])
def test_a_broken_record_counts_as_no_lab(tmp_path: Path, text: str) -> None:
    (tmp_path / "lab.json").write_text(text)
    assert state.load_record(paths(tmp_path)) is None


def test_a_second_command_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    said = io.StringIO()
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with state.locked(tmp_path / "lock", Progress(io.StringIO())):
            inside.set()
            leave.wait(10)
            order.append("first ends")

    def second() -> None:
        with state.locked(tmp_path / "lock", Progress(said)):
            order.append("second begins")

    one = threading.Thread(target=first)
    one.start()
    assert inside.wait(10)
    two = threading.Thread(target=second)
    two.start()
    while "waiting" not in said.getvalue():
        assert two.is_alive()
    leave.set()
    one.join(10)
    two.join(10)
    assert order == ["first ends", "second begins"]
    assert "another lab command is running: waiting for it" in said.getvalue()


def test_who_waited_for_a_lock_that_was_purged_takes_the_new_one(tmp_path: Path) -> None:
    lock = tmp_path / "lab" / "lock"
    said = io.StringIO()
    there: list[bool] = []

    def waits() -> None:
        with state.locked(lock, Progress(said)):
            there.append(lock.exists())

    waiting = threading.Thread(target=waits)
    with state.locked(lock, Progress(io.StringIO())):
        waiting.start()
        while "waiting" not in said.getvalue():
            assert waiting.is_alive()
        lock.unlink()
        lock.parent.rmdir()
    waiting.join(10)
    assert there == [True]
