"""Nodes that want one file form a chain: who gives it to whom, what is tried when a node gives nothing, and what is said."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from pyinfra.api import Config, Inventory, State

from roles.core import chain, relay, session
from roles.core.chain import Chain, Member
from roles.core.progress import interval, progress
from roles.core.steps import Upload


class Transfers:
    """What is done in the place of real transfers: (node, from whom), in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
        self.done: list[tuple[str, str]] = []
        self.silent: set[str] = set()
        self.damaged = 0
        self.full: str | None = None
        self.step = Upload(source, "/place/file", "ab" * 32, relayed=True)
        self.chain = Chain(self.step, {})
        names = [f"node{number}" for number in range(1, 7)]
        self.nodes = list(State(Inventory((names, {})), Config()).inventory)
        self.said: list[str] = []
        monkeypatch.setattr(chain, "_from_here", self.from_here)
        monkeypatch.setattr(chain, "_take", self.take)
        monkeypatch.setattr(chain, "_settle", self.settle)
        monkeypatch.setattr(chain, "_full", lambda *_, **__: self.full)
        monkeypatch.setattr(session, "say", lambda node, line, *_: self.said.append(line))

    def from_here(self, step: Upload, chain: Chain, member: Member) -> None:
        self.done.append((member.node.name, "control"))
        if member.node.name in self.silent:
            raise session.NodeFailed("the node is silent")

    def take(self, step: Upload, chain: Chain, member: Member, giver: Member) -> None:
        self.done.append((member.node.name, giver.node.name))
        if giver.node.name in self.silent:
            raise relay.Refused("Permission denied (publickey).")

    def settle(self, node: Any, step: Upload) -> bool:
        self.damaged -= 1
        return self.damaged < 0

    def upload(self, number: int, step: Upload | None = None) -> None:
        step = step or self.step
        own = self.chain if step.relayed else Chain(step, {})
        chain.upload(self.nodes[number - 1], step, own)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Transfers:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 1000)
    return Transfers(monkeypatch, source)


def test_the_control_machine_sends_once_and_each_node_takes_it_from_the_one_before(
    transfers: Transfers,
) -> None:
    for number in (2, 1, 3):
        transfers.upload(number)
    assert transfers.done == [("node2", "control"), ("node1", "node2"), ("node3", "node1")]


def test_a_node_that_gives_nothing_is_named_and_passed_over(transfers: Transfers) -> None:
    transfers.upload(1)
    transfers.upload(2)
    transfers.silent = {"node2"}
    transfers.upload(3)
    assert transfers.done[2:] == [("node3", "node2"), ("node3", "node1")]
    (said,) = transfers.said
    assert said.startswith("node2 gives no more of file") and "Permission denied" in said


def test_a_node_whose_disk_is_full_fails_itself_and_blames_nobody(transfers: Transfers) -> None:
    transfers.upload(1)
    transfers.upload(2)
    transfers.silent, transfers.full = {"node2"}, "no room for file"
    with pytest.raises(session.NodeFailed, match="no room for file"):
        transfers.upload(3)
    assert transfers.done[2:] == [("node3", "node2")] and transfers.said == []


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("full", [None, "no room for file"])
def test_what_the_control_machine_cannot_write_is_looked_into_there(
    transfers: Transfers, monkeypatch: pytest.MonkeyPatch, writes: bool, full: str | None
) -> None:
    """A server may refuse a write, or say nothing of the last ones."""
    sftp = MagicMock()
    sftp.__enter__.return_value = sftp
    sftp.open.return_value.__enter__.return_value.write.side_effect = None if writes else OSError(4)
    sftp.stat.return_value.st_size = 999
    node = MagicMock()
    node.connector.client.open_sftp.return_value = sftp
    monkeypatch.undo()
    monkeypatch.setattr(session, "run", lambda *_, **__: session.Output("0", ""))
    monkeypatch.setattr(session, "say", lambda *_: None)
    monkeypatch.setattr(chain, "_full", lambda *_, **__: full)
    with pytest.raises(session.NodeFailed, match=full or "copying file broke off"):
        chain._from_here(transfers.step, transfers.chain, transfers.chain.join(node))


@pytest.mark.parametrize("wrong", ["No space left on device", "Disk quota exceeded", ""])
def test_what_arrived_on_a_disk_that_filled_up_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(9_000_000))
    step = Upload(source, str(tmp_path / "depot/file"), "ab" * 32)
    part = Path(step.part)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(4_000_000))
    tools(tmp_path, monkeypatch, dd=f"echo \"dd: error writing 'room': {wrong}\" >&2; exit 1")
    full = chain._full(None, step, root=True)
    if wrong:
        told = (
            f"the disk of {tmp_path}/depot was full when 4 of 9 MB had arrived, which are removed"
        )
        assert full == f"no room for source: {told}; make room there and converge again"
        assert not part.parent.exists()
    else:
        assert full is None and list(part.parent.iterdir()) == [part]


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Have what would run on a node run here, with stand-ins for these programs."""
    place = folder / "tools"
    place.mkdir()
    for name, script in scripts.items():
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)

    def run(node: Any, script: str, *_: Any, **__: Any) -> session.Output:
        words = ["env", f"PATH={place}:/usr/bin:/bin", "sh", "-c", script]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return session.Output(done.stdout, done.stderr)

    monkeypatch.setattr(session, "run", run)


def test_where_no_node_reaches_another_not_all_of_them_are_tried(transfers: Transfers) -> None:
    transfers.silent = {f"node{number}" for number in range(1, 6)}
    for number in range(1, 6):
        transfers.chain.join(transfers.nodes[number - 1])
    transfers.upload(6)
    assert [giver for _, giver in transfers.done] == ["node5", "node4", "node3", "control"]


def test_where_no_node_gives_it_the_control_machine_does(transfers: Transfers) -> None:
    transfers.upload(1)
    transfers.silent = {"node1"}
    transfers.upload(2)
    assert transfers.done[1:] == [("node2", "node1"), ("node2", "control")]


def test_a_node_that_failed_is_not_asked_and_one_that_asks_again_not_its_own_giver(
    transfers: Transfers,
) -> None:
    transfers.silent = {"node1"}
    with pytest.raises(session.NodeFailed, match="silent"):
        transfers.upload(1)
    transfers.upload(2)
    transfers.upload(2)
    assert transfers.done[1:] == [("node2", "control"), ("node2", "control")]


def test_what_arrived_damaged_begins_anew_once_from_the_control_machine(
    transfers: Transfers,
) -> None:
    transfers.upload(1)
    transfers.damaged = 1
    transfers.upload(2)
    assert transfers.done[1:] == [("node2", "node1"), ("node2", "control")]
    transfers.damaged = 2
    with pytest.raises(session.NodeFailed, match="arrived with another content"):
        transfers.upload(3)


def test_a_step_that_is_not_relayed_always_comes_from_the_control_machine(
    transfers: Transfers,
) -> None:
    alone = Upload(transfers.step.source, "/place/wheel", "cd" * 32)
    for number in (1, 2):
        transfers.upload(number, alone)
    assert transfers.done == [("node1", "control"), ("node2", "control")]


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A power cut would else leave an empty file under a name that says what is in it."""
    place, log = tmp_path / "file", tmp_path / "log"
    step = Upload(tmp_path / "source", str(place), hashlib.sha256(b"right").hexdigest())
    part = Path(step.part)
    part.parent.mkdir()
    part.write_bytes(b"right")
    tools(tmp_path, monkeypatch, sync=f'echo "$@" $(ls {place} 2>/dev/null) >>{log}')
    assert chain._settle(None, step)
    assert place.read_bytes() == b"right" and log.read_text() == f"{part}\n"


@pytest.mark.parametrize("taker_lives", [True, False])
def test_a_taker_that_dies_does_not_blame_its_giver(
    transfers: Transfers, monkeypatch: pytest.MonkeyPatch, taker_lives: bool
) -> None:
    @contextmanager
    def opened(*_: Any) -> Iterator[str]:
        yield "the taking"

    def run(node: Any, script: str, *_: Any, **__: Any) -> session.Output:
        if script != "the taking" and taker_lives:
            return session.Output("0", "")
        raise session.NodeFailed("Permission denied." if taker_lives else "the connection broke")

    monkeypatch.undo()
    monkeypatch.setattr(relay, "opened", opened)
    monkeypatch.setattr(session, "run", run)
    giver, taker = (transfers.chain.join(node) for node in transfers.nodes[:2])
    problem = relay.Refused if taker_lives else session.NodeFailed
    with pytest.raises(problem, match="Permission" if taker_lives else "connection broke"):
        chain._take(transfers.step, transfers.chain, taker, giver)


def test_a_source_that_is_gone_is_one_sentence(transfers: Transfers) -> None:
    transfers.step.source.unlink()
    with pytest.raises(session.NodeFailed, match="is not on this machine"):
        transfers.upload(1)


def test_progress_has_bytes_speed_and_what_is_left() -> None:
    line = progress("env.tar", 200_000_000, 110_000_000, 10_000_000, 10)
    assert line == "env.tar: 110 of 200 MB (55 %), 10.0 MB/s, 9 s left"
    assert progress("env.tar", 200_000_000, 5, 5, 10).endswith("0.0 MB/s, standing still")


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 3), (False, 10)])
def test_who_watches_is_told_more_often_than_a_log(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: int
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert interval() == seconds


def test_the_last_node_of_a_chain_is_told_of_now_and_then(
    transfers: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    first, last = (transfers.chain.join(node) for node in transfers.nodes[:2])
    for seconds in range(100, 131, 5):
        now[0] = seconds
        transfers.chain.note(first, 10 * (seconds - 100))
        transfers.chain.note(last, 8 * (seconds - 100))
    shares = [line[line.index("(") : line.index(")") + 1] for line in transfers.said]
    assert shares == ["(4 %)", "(12 %)", "(20 %)"]
