"""Whole runs of toy roles through pyinfra's own operations, on nodes that are folders of this machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from paramiko import SSHException
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage
from pyinfra.context import ctx_host, ctx_state

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from inventory.local_connector import ThisMachine
from roles import converge as converging
from roles import registry
from roles.converge import Run
from roles.core import session
from roles.core.role import AGAIN, Fact, Finding, Peers, Role, Rule, Target, Unreadable
from roles.core.steps import Download, Shell, Step, Upload, UploadFolder
from roles.core.upload import upload_folder
from roles.verify import EXIT_CODES, Report, judge, report

NAMES = ("node1", "node2")


class Recorded(ThisMachine):
    """The control machine under a node's name; keeps the scripts, and breaks when asked to."""

    ran: dict[str, list[str]] = {}
    breaks: dict[str, Exception] = {}

    def run_shell_command(self, command: Any, *arguments: Any, **more: Any) -> Any:
        self.ran.setdefault(self.host.name, []).append(more.get("_stdin") or str(command))
        if broken := self.breaks.get(self.host.name):
            raise broken
        return super().run_shell_command(command, *arguments, **more)


@pytest.fixture(autouse=True)
def _connector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_all_connectors", "get_execution_connectors"):
        monkeypatch.setattr(f"pyinfra.api.inventory.{name}", lambda: {"ssh": Recorded})
    monkeypatch.setattr(Recorded, "ran", {})
    monkeypatch.setattr(Recorded, "breaks", {})


@dataclass
class Lab:
    """Nodes, the roles of a run, and what was said. Each node's folder holds its files."""

    folder: Path
    said: list[str]
    sections: dict[str, Spec] = field(default_factory=dict)
    names: Sequence[str] = NAMES

    def has(self, node: str, name: str) -> bool:
        return (self.folder / node / name).exists()

    def state(self, roles: Sequence[Role[Any, Any]], limit: Sequence[str] = ()) -> State:
        nodes = {
            name: Node(name=name, address=f"10.0.0.{number}")
            for number, name in enumerate(self.names, 1)
        }
        cluster = Cluster("toys", self.folder / "cluster.yaml", nodes, sections=self.sections)
        inventory = Inventory((list(self.names), {}))
        chosen = [inventory.get_host(name) for name in limit] or None
        state = State(inventory, Config(PARALLEL=9), initial_limit=chosen)
        Run._runs[state] = Run(cluster, roles)
        return state

    def run(
        self,
        *roles: Role[Any, Any],
        dry: bool = False,
        ask: bool = False,
        limit: Sequence[str] = (),
    ) -> State:
        """As ``pyinfra inventory.py deploy/cluster.py -y``; dry: ``--dry``; ask: without ``-y``."""
        state = self.state(roles, limit)
        state.check_for_changes = dry or ask
        state.set_stage(StateStage.Connect)
        connect_all(state)
        state.set_stage(StateStage.Prepare)
        for node in list(state.inventory.get_active_hosts()):
            with ctx_state.use(state), ctx_host.use(node):
                for role in roles:
                    converging.converge(role)
        if not dry:
            state.set_stage(StateStage.Execute)
            with suppress(PyinfraError):  # pyinfra's command prints it: no hosts remaining
                run_ops(state)
        return state


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    said: list[str] = []
    monkeypatch.setattr(
        session, "say", lambda node, line, colour=None: said.append(f"{node.name} {line}")
    )
    for name in NAMES:
        (tmp_path / name).mkdir()
    return Lab(tmp_path, said)


def toy(
    lab: Lab,
    name: str,
    steps: Callable[[str], list[Step]] | None = None,
    parse: Callable[[str], Any] = str.strip,
    findings: Callable[[Finding], list[Finding]] = lambda found: [found],
    **more: Any,
) -> Role[Any, Any]:
    """A role that wants a file of its name in the node's folder."""

    def drift(target: Target[Any], state: str, peers: Peers) -> list[Finding]:
        return [] if state == "yes" else findings(Finding(f"{name}-missing", "yes", state, "made"))

    def converge(target: Target[Any], *rest: Any) -> Any:
        path = f"{lab.folder}/{target.node.name}/{name}"
        yield from steps(target.node.name) if steps else [Shell(f"touch {path}")]

    return Role(
        name=name,
        spec=Spec,
        default=Spec(),
        probe=lambda target: (
            f"if test -e {lab.folder}/{target.node.name}/{name}; then echo yes; else echo no; fi"
        ),
        parse=parse,
        drift=drift,
        converge=converge,
        **more,
    )


def last(lab: Lab, **more: Any) -> Role[Any, Any]:
    """The role at the end of every run, which fails nodes that are not right; it wants nothing."""
    return replace(
        toy(lab, "last", together=lambda cluster: (), **more), drift=lambda *arguments: []
    )


def failed(state: State) -> list[str]:
    return sorted(node.name for node in state.failed_hosts)


def test_roles_are_brought_right_and_a_second_run_sends_each_node_one_command(lab: Lab) -> None:
    roles = (toy(lab, "a"), toy(lab, "b"), last(lab))
    assert not failed(lab.run(*roles))
    assert all(lab.has(node, role) for node in NAMES for role in "ab")
    Recorded.ran.clear()
    assert not failed(lab.run(*roles))
    assert {node: len(ran) for node, ran in Recorded.ran.items()} == {"node1": 1, "node2": 1}


def test_the_deploy_file_is_found_among_the_modules_at_once(tmp_path: Path) -> None:
    """pyinfra has every frame looked up, at each operation."""
    deploy = tmp_path / "all.py"
    converging._found_as_module(str(deploy))
    frames: list[FrameType] = []
    exec(compile("take()", deploy, "exec"), {"take": lambda: frames.append(sys._getframe(1))})
    module = inspect.getmodule(frames[0])
    assert module is not None and module.__file__ == str(deploy)
    del sys.modules[module.__name__]


def test_every_node_registers_the_same_operations_in_the_same_order(lab: Lab) -> None:
    (lab.folder / "node1/a").touch()
    lab.sections = {"b": Spec(manage="unmanaged")}
    state = lab.run(toy(lab, "a"), toy(lab, "b"), toy(lab, "c", needs=("a",)), dry=True)
    first, second = (node.op_hash_order for node in state.inventory)
    assert len(first) == 3 and first == second


def test_a_dry_run_says_what_differs_and_sends_nothing_but_the_look(lab: Lab) -> None:
    lab.run(toy(lab, "a"), toy(lab, "b", needs=("a",)), dry=True)
    assert {node: len(ran) for node, ran in Recorded.ran.items()} == {"node1": 1, "node2": 1}
    assert not lab.has("node1", "a")
    assert "node1 a: a-missing: want yes, seen no; made" in lab.said


def test_what_is_looked_at_while_the_user_is_asked_is_looked_at_again(lab: Lab) -> None:
    unrepairable = [True]

    def for_user(found: Finding) -> list[Finding]:
        return [replace(found, repairable=not unrepairable.pop() if unrepairable else True)]

    roles = (toy(lab, "a", findings=for_user), toy(lab, "b", needs=("a",)), last(lab))
    lab.names = ("node1",)
    assert not failed(lab.run(*roles, ask=True))
    assert lab.has("node1", "a") and lab.has("node1", "b")


def test_a_dry_run_judges_nothing_that_an_earlier_role_may_mend(lab: Lab) -> None:
    def parse(text: str) -> Any:
        raise Unreadable("no such tool")

    b = toy(lab, "b", needs=("a",), findings=lambda found: [replace(found, repairable=False)])
    c, d = toy(lab, "c", needs=("b",)), toy(lab, "d", needs=("a",), parse=parse)
    dry = lab.run(toy(lab, "a"), b, c, d, dry=True)
    assert [change_of(dry, number) for number in range(4)] == [True] * 4
    assert "node1 b: b-missing: want yes, seen no; made" in lab.said
    assert not any("left alone" in line for line in lab.said)


def change_of(state: State, operation: int) -> bool:
    node = state.inventory.get_host("node1")
    meta = state.ops[node][node.op_hash_order[operation]].operation_meta
    return bool(meta._maybe_is_change)


def test_a_checked_role_is_reported_never_changed_and_fails_the_node_at_the_end(lab: Lab) -> None:
    lab.sections = {"a": Spec(manage="check")}
    roles = (toy(lab, "a"), toy(lab, "b", needs=("a",)), toy(lab, "c"), last(lab))
    dry = lab.run(*roles, dry=True)
    assert [change_of(dry, number) for number in range(3)] == [False, False, True]
    assert failed(lab.run(*roles)) == ["node1", "node2"]
    assert not lab.has("node1", "a") and not lab.has("node1", "b") and lab.has("node1", "c")
    assert "node1 a: a-missing: want yes, seen no (checked, not managed)" in lab.said
    assert "node1 b: left alone, because it needs a" in lab.said
    assert "node1 not right on this node: a, b (see above)" in lab.said


def test_what_only_the_user_can_mend_blocks_and_a_dry_run_counts_no_change(lab: Lab) -> None:
    a = toy(lab, "a", findings=lambda found: [replace(found, repairable=False, fix="do it")])
    assert not change_of(lab.run(a, dry=True), 0)
    assert failed(lab.run(a, last(lab))) == ["node1", "node2"]
    assert "node1 a: a-missing: want yes, seen no; do it" in lab.said
    assert failed(lab.run(a, last(lab), limit=["node2"])) == ["node2"]


def gate(lab: Lab, node: str) -> Role[Any, Any]:
    """A gate that is right on all nodes but this one, where only the user can help."""
    for name in lab.names:
        if name != node:
            (lab.folder / name / "gate").touch()
    return toy(
        lab,
        "gate",
        findings=lambda found: [replace(found, repairable=False, fix="get a newer one")],
        gate=True,
    )


def test_a_gate_that_is_not_right_leaves_everything_on_that_node_alone_in_one_sentence(
    lab: Lab,
) -> None:
    roles = (gate(lab, "node2"), toy(lab, "a"), toy(lab, "b", needs=("a",)), last(lab))
    assert failed(lab.run(*roles)) == ["node2"]
    assert lab.has("node1", "a") and lab.has("node1", "b")
    assert not lab.has("node2", "a") and not lab.has("node2", "b")
    assert [line for line in lab.said if line.startswith("node2")] == [
        "node2 gate: gate-missing: want yes, seen no; get a newer one",
        "node2 not right on this node: gate (see above)",
    ]


def test_a_dry_run_counts_no_change_behind_a_gate_that_is_not_right(lab: Lab) -> None:
    roles = (gate(lab, "node1"), toy(lab, "a"), toy(lab, "b", needs=("a",)))
    dry = lab.run(*roles, dry=True)
    assert [change_of(dry, number) for number in range(3)] == [False] * 3


def test_verify_says_of_a_node_before_its_gate_nothing_else(lab: Lab) -> None:
    report = report_of(lab, gate(lab, "node1"), toy(lab, "a"))
    assert {(found.node, found.id) for found in report.findings} == {
        ("node1", "gate-missing"),
        ("node2", "a-missing"),
    }


def test_an_unmanaged_gate_is_open(lab: Lab) -> None:
    lab.sections = {"gate": Spec(manage="unmanaged")}
    assert not failed(lab.run(gate(lab, "node2"), toy(lab, "a"), last(lab)))
    assert lab.has("node2", "a")


def test_a_repair_that_would_disturb_waits_and_is_no_failure(lab: Lab) -> None:
    a = toy(lab, "a", findings=lambda found: [replace(found, disturbs=True)])
    busy = replace(last(lab), busy=lambda state: "job light")
    assert not change_of(lab.run(a, busy, dry=True), 0)
    assert not failed(lab.run(a, busy))
    assert not lab.has("node1", "a")
    assert any(
        "a: a-missing" in line and "because job light runs here" in line for line in lab.said
    )


@pytest.mark.parametrize("shared", [True, False])
def test_what_other_nodes_use_waits_for_their_jobs_too(lab: Lab, shared: bool) -> None:
    a = toy(lab, "a", findings=lambda found: [replace(found, disturbs=True, shared=shared)])
    (lab.folder / "node2/b").touch()
    b = toy(lab, "b", busy=lambda state: "job light" if state == "yes" else None)
    b = replace(b, drift=lambda *arguments: [])
    assert not failed(lab.run(a, b, last(lab), limit=["node1"]))
    assert lab.has("node1", "a") is not shared
    if shared:
        assert any("pending, because job light runs on node2 (" in line for line in lab.said)


def test_unmanaged_everywhere_looks_at_nothing_of_it_and_changes_nothing(lab: Lab) -> None:
    lab.sections = {name: Spec(manage="unmanaged") for name in ("a", "b", "last")}
    assert not failed(lab.run(toy(lab, "a"), toy(lab, "b", needs=("a",)), last(lab)))
    assert Recorded.ran == {} and not lab.said


def test_what_a_role_changed_is_on_the_disk_before_the_next_one_begins(lab: Lab) -> None:
    """As a unit file that was just put there: it may be empty after a power cut."""

    def steps_and_syncs() -> list[str]:
        ran = [
            each
            for script in Recorded.ran["node1"]
            for each in ("touch", "sync -f / ")
            if each in script
        ]
        Recorded.ran.clear()
        return ran

    roles = [toy(lab, "a"), toy(lab, "b")]
    assert not failed(lab.run(*roles))
    assert steps_and_syncs() == ["touch", "sync -f / ", "touch", "sync -f / "]
    assert not failed(lab.run(*roles))
    assert steps_and_syncs() == []


def test_a_change_that_does_not_help_fails_the_node_and_says_what_is_left(lab: Lab) -> None:
    useless = toy(lab, "a", steps=lambda node: [Shell("true")])
    assert failed(lab.run(useless, toy(lab, "b"))) == ["node1", "node2"]
    assert "node1 a: still there after converging: a-missing: want yes, seen no" in lab.said
    assert not lab.has("node1", "b")


def test_what_a_repair_uncovers_is_repaired_in_the_same_run(lab: Lab) -> None:
    """As a start that nobody goes on with, which after its wait is a job to resume."""
    role = toy(lab, "a")

    def drift(target: Target[Any], state: str, peers: Peers) -> list[Finding]:
        if state == "yes":
            return []
        waited = lab.has(target.node.name, "waited")
        return [Finding("interrupted" if waited else "starting", "yes", state, "mended")]

    def converge(target: Target[Any], state: Any, peers: Any, findings: Sequence[Finding]) -> Any:
        made = "a" if findings[0].id == "interrupted" else "waited"
        yield Shell(f"touch {lab.folder}/{target.node.name}/{made}")

    assert not failed(lab.run(replace(role, drift=drift, converge=converge), last(lab)))
    assert all(lab.has(node, "a") for node in NAMES)


def test_a_failing_step_fails_its_node_only(lab: Lab) -> None:
    def steps(node: str) -> list[Step]:
        broken = "echo no space left >&2; exit 1" if node == "node1" else "true"
        return [Shell(f"{broken}\ntouch {lab.folder}/{node}/a")]

    assert failed(lab.run(toy(lab, "a", steps=steps), toy(lab, "b"))) == ["node1"]
    assert "node1 no space left" in lab.said
    assert lab.has("node2", "b") and not lab.has("node1", "b")


@pytest.mark.parametrize(
    "error", [TypeError("odd"), AttributeError("odd"), KeyError("odd"), Unreadable("odd")]
)
def test_a_parser_that_fails_in_any_way_blocks_its_role_and_those_that_need_it(
    lab: Lab, error: Exception
) -> None:
    def parse(text: str) -> Any:
        raise error

    roles = (toy(lab, "a", parse=parse), toy(lab, "b", needs=("a",)), toy(lab, "c"), last(lab))
    assert failed(lab.run(*roles)) == ["node1", "node2"]
    assert not lab.has("node1", "a") and not lab.has("node1", "b") and lab.has("node1", "c")
    assert any(line.startswith("node1 a: left alone") and "odd" in line for line in lab.said)


def test_a_role_that_cannot_be_read_after_its_own_change_fails_the_node_not_the_run(
    lab: Lab,
) -> None:
    def parse(text: str) -> str:
        if text == "yes":
            raise ValueError("half a line")
        return text

    assert failed(lab.run(toy(lab, "a", parse=parse), toy(lab, "b"))) == ["node1", "node2"]
    assert any("half a line" in line for line in lab.said)


@pytest.mark.parametrize(
    "error", [EOFError(), OSError("reset"), TimeoutError(), SSHException("not active")]
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_node_whose_connection_breaks_is_looked_at_once_and_the_others_go_on(
    lab: Lab, error: Exception, dry: bool
) -> None:
    Recorded.breaks["node1"] = error
    assert failed(lab.run(toy(lab, "a"), toy(lab, "b"), dry=dry)) == ["node1"]
    assert len(Recorded.ran["node1"]) == 1
    assert lab.has("node2", "b") is not dry
    assert len([line for line in lab.said if line.startswith("node1 ")]) == 1


def test_the_head_goes_first_where_the_others_read_what_it_publishes(lab: Lab) -> None:
    def steps(node: str) -> list[Step]:
        path = f"{lab.folder}/node1/a"
        if node == "node1":
            return [Shell(f"sleep 0.3; touch {path}")]
        return [Shell(f"test -e {path}; touch {lab.folder}/{node}/a")]

    assert not failed(lab.run(toy(lab, "a", steps=steps, head_first=True)))
    (lab.folder / "node2/a").unlink()
    assert not failed(lab.run(toy(lab, "a", steps=steps, head_first=True), limit=["node2"]))
    assert lab.has("node2", "a")


def test_a_node_waits_for_the_one_that_makes_what_it_takes(lab: Lab) -> None:
    lab.names = ("node1", "node2", "node3")
    (lab.folder / "node3").mkdir()
    made = f"{lab.folder}/made"

    def steps(node: str) -> list[Step]:
        if node == "node2":
            return [Shell(f"sleep 0.3; touch {made} {lab.folder}/node2/a")]
        wait = f"test -e {made}; " if node == "node3" else f"! test -e {made}; "
        return [Shell(f"{wait}touch {lab.folder}/{node}/a")]

    def first(target: Target[Any], state: str, peers: Peers) -> str | None:
        lacks = target.node.name == "node3" and state == "no" and peers.get("node2") == "no"
        return "node2" if lacks else None

    assert not failed(lab.run(toy(lab, "a", steps=steps, first=first)))
    (lab.folder / "node3/a").unlink()
    (lab.folder / "node2/a").unlink()
    assert not failed(lab.run(toy(lab, "a", steps=steps, first=first), limit=["node3"]))


def test_a_file_of_a_node_arrives_here_whole_or_not_at_all_and_goes_on_after_a_break(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, here = lab.folder / "node1/made", lab.folder / "kept/deep/made"
    steps: list[Step] = [Download(str(made), here), Shell(f"touch {lab.folder}/node1/a")]
    lab.names = ("node1",)
    a = toy(lab, "a", steps=lambda node: steps)
    here.parent.mkdir(parents=True)
    here.write_bytes(b"old")
    data = os.urandom(1_000_000)
    made.write_bytes(data)
    whole, asked = session.stream, []

    def cut(node: Any, script: str, seconds: int) -> Iterator[bytes]:
        asked.append(script)
        yield next(whole(node, script, seconds))
        raise session.NodeFailed("the node is silent")

    with monkeypatch.context() as broken:
        broken.setattr(session, "stream", cut)
        assert failed(lab.run(a)) == ["node1"] and failed(lab.run(a)) == ["node1"]
    assert [f"tail -c +{at * session.CHUNK + 1} <{made}" for at in (0, 1)] == asked
    assert any("the node is silent; converging again goes on" in line for line in lab.said)
    assert here.read_bytes() == b"old"
    assert not failed(lab.run(a))
    assert here.read_bytes() == data and list(here.parent.iterdir()) == [here]


def test_a_file_of_a_node_that_is_damaged_on_its_way_here_does_not_count(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, here = lab.folder / "node1/made", lab.folder / "here/made"
    made.write_bytes(b"right")
    lab.names = ("node1",)
    a = toy(lab, "a", steps=lambda node: [Download(str(made), here)])
    monkeypatch.setattr(session, "stream", lambda *_: iter([b"wrong"]))
    assert failed(lab.run(a)) == ["node1"]
    assert any("arrived damaged" in line for line in lab.said) and not list(here.parent.iterdir())


def test_of_an_earlier_content_nothing_stays_here_but_what_another_run_still_brings(
    lab: Lab,
) -> None:
    made, here = lab.folder / "node1/made", lab.folder / "here/made"
    made.write_bytes(b"right")
    here.parent.mkdir()
    old, held = (here.with_name(f".made.{letter * 64}.arriving") for letter in "ab")
    old.touch()
    lab.names = ("node1",)
    a = toy(
        lab, "a", steps=lambda node: [Download(str(made), here), Shell(f"touch {made.parent}/a")]
    )
    with held.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not failed(lab.run(a))
    assert sorted(here.parent.iterdir()) == [held, here]


def test_a_disk_of_this_machine_that_is_full_is_named_and_gets_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, here = lab.folder / "node1/made", lab.folder / "here/made"
    made.write_bytes(b"x" * 5_000_000)
    lab.names = ("node1",)
    a = toy(lab, "a", steps=lambda node: [Download(str(made), here)])

    def fills(*_: Any) -> Iterator[bytes]:
        yield b"x" * 1_000_000
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3_000_000}))
        assert failed(lab.run(a)) == ["node1"]
    sentence = f"no room for {made} on this machine: {here.parent} has 3 MB free, 5 are needed"
    assert any(sentence in line for line in lab.said)
    monkeypatch.setattr(session, "stream", fills)
    assert failed(lab.run(a)) == ["node1"]
    sentence = f"{made} cannot be copied to {here} on this machine: No space left on device"
    assert any(sentence in line for line in lab.said) and not list(here.parent.iterdir())


def test_what_a_node_sends_here_is_told_of_now_and_then(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, here = lab.folder / "node1/made", lab.folder / "here/made"
    made.write_bytes(b"x" * 1_000_000)
    lab.names = ("node1",)
    a = toy(lab, "a", steps=lambda node: [Download(str(made), here)])
    monkeypatch.setattr("roles.core.progress.interval", lambda: 0.000001)
    lab.run(a)
    assert any("made: 1 of 1 MB (100 %)" in line for line in lab.said)


def test_a_failed_proof_fails_the_node_in_its_own_words(lab: Lab) -> None:
    a = toy(lab, "a", proof=lambda target: r"printf 'torch-import\tno module torch\n'")
    assert failed(lab.run(a)) == ["node1", "node2"]
    assert "node1 a: torch-import: no module torch" in lab.said


def test_a_line_of_a_proof_may_say_what_the_user_is_to_do(lab: Lab) -> None:
    lab.names = ("node1",)
    a = toy(lab, "a", proof=lambda target: r"printf 'a-far\tno answer\tplug it in\na-old\tcut\n'")
    assert failed(lab.run(a)) == ["node1"]
    assert lab.said[-3:-1] == ["node1 a: a-far: no answer; plug it in", "node1 a: a-old: cut"]
    assert [(each.seen, each.fix) for each in report_of(lab, a).findings] == [
        ("no answer", "plug it in"),
        ("cut", AGAIN),
    ]


@pytest.mark.parametrize("busy", [False, True])
def test_what_a_proof_uncovers_is_repaired_by_the_same_run_unless_that_disturbs(
    lab: Lab, busy: bool
) -> None:
    """A first repair makes ``a``; its proof finds damage, which only the second repair mends."""
    lab.names = ("node1",)
    here = lab.folder / "node1"

    def drift(target: Target[Any], state: str, peers: Peers) -> list[Finding]:
        damaged = Finding("a-damaged", "x", "damage", "mended", disturbs=True)
        return {"no": [Finding("a-missing", "x", "no", "y")], "bad": [damaged]}.get(state, [])

    def converge(target: Target[Any], state: str, *rest: Any) -> Any:
        made = "a" if state == "no" else "mended"
        yield Shell(f"rm -f {here}/bad; touch {here}/{made}")

    a = replace(
        toy(
            lab,
            "a",
            proof=lambda target: (
                f"cd {here}; test -e mended || {{ touch bad; printf 'a-damaged\\tbroken\\n'; }}"
            ),
        ),
        probe=lambda target: (
            f"cd {here}; if test -e bad; then echo bad; elif test -e a; then echo yes; else echo no; fi"
        ),
        drift=drift,
        converge=converge,
        busy=lambda state: "a job" if busy else None,
    )
    assert failed(lab.run(a)) == (["node1"] if busy else [])
    assert "node1 a: a-damaged: broken" in lab.said and lab.has("node1", "mended") is not busy
    if busy:
        assert lab.said[-1].startswith("node1 a: still there after converging: a-damaged")


def test_what_is_brought_here_may_decide_what_every_node_is_asked(lab: Lab) -> None:
    here = lab.folder / "brought"
    a = toy(
        lab,
        "a",
        steps=lambda node: [
            Shell(f"sleep 0.2; touch {lab.folder}/{node}/a"),
            *([Download(f"{lab.folder}/node1/a", here)] if node == "node1" else []),
        ],
    )
    (lab.folder / "node2/a").touch()
    b = replace(
        toy(lab, "b", needs=("a",)),
        probe=lambda target: f"echo {'yes' if here.exists() else 'no'}",
        converge=lambda *arguments: iter(()),
    )
    assert not failed(lab.run(a, b))


def test_bytes_that_are_no_utf_8_do_not_make_a_node_unreadable(lab: Lab) -> None:
    a = replace(
        toy(lab, "a"),
        probe=lambda target: r"printf 'caf\351 \344\275\240\n'",
        drift=lambda target, state, peers: [Finding("a", "x", state, "y", repairable=False)],
    )
    lab.run(a)
    assert "node1 a: a: want x, seen caf 你; y" in lab.said


def test_a_file_reaches_the_control_machine_as_a_node_of_a_user_with_sudo(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1234)
    monkeypatch.setattr(Recorded, "put_file", lambda *arguments, **more: False)
    node = lab.state(()).inventory.get_host("node1")
    node.connect()
    with pytest.raises(session.NodeFailed, match="could not be copied"):
        from roles.core.chain import Chain, upload

        step = Upload(Path(__file__), f"{lab.folder}/node1/file", "0" * 64)
        upload(node, step, Chain(step, {}))
    assert "chown 1234 " in Recorded.ran["node1"][0]


def report_of(lab: Lab, *roles: Role[Any, Any], deep: bool = False) -> Report:
    state = lab.state(roles)
    nodes = list(state.inventory)
    return report(
        Run.of(state).looks, nodes, lambda what: {node.name: what(node) for node in nodes}, deep
    )


def seen(report: Report) -> list[tuple[str, str, str]]:
    return [(wrong.node, wrong.role, wrong.id) for wrong in report.findings]


def test_verify_lists_only_what_is_wrong_and_runs_proofs_only_where_nothing_differs(
    lab: Lab,
) -> None:
    (lab.folder / "node1/a").touch()
    a = toy(lab, "a", proof=lambda target: r"printf 'a-broken\tit does not start\n'")
    report = report_of(lab, a)
    assert seen(report) == [("node1", "a", "a-broken"), ("node2", "a", "a-missing")]
    assert report.verdict == "drift" and EXIT_CODES[report.verdict] == 1
    assert lab.has("node1", "a") and not lab.has("node2", "a")


def waiting(report: Report) -> list[tuple[str, str, list[str]]]:
    return [(each.node, each.role, list(each.needs)) for each in report.waiting]


def touched(lab: Lab, mark: str) -> Callable[[Target[Any]], str]:
    """A proof that proves nothing wrong, and can be seen to have run."""
    return lambda target: f"touch {lab.folder}/{target.node.name}/{mark}"


def test_verify_names_the_cause_and_lists_what_waits_for_it(lab: Lab) -> None:
    for name in ("a", "b", "c", "d"):
        (lab.folder / "node2" / name).touch()
    (lab.folder / "node1/d").touch()
    roles = (
        toy(lab, "a"),
        toy(lab, "b", needs=("a",)),
        toy(lab, "c", needs=("b",)),
        toy(lab, "d", needs=("c",), proof=touched(lab, "proved")),
    )
    found = report_of(lab, *roles)
    assert seen(found) == [("node1", "a", "a-missing")]
    assert waiting(found) == [
        ("node1", "b", ["a"]),
        ("node1", "c", ["a", "b"]),
        ("node1", "d", ["a", "b", "c"]),
    ]
    assert not lab.has("node1", "proved") and lab.has("node2", "proved")
    assert found.as_json()["waiting"][0] == {"node": "node1", "role": "b", "for": ["a"]}


def test_a_deep_proof_runs_where_it_is_asked_for_and_nothing_else_is_wrong(lab: Lab) -> None:
    for node in NAMES:
        (lab.folder / node / "a").touch()
    deep = touched(lab, "deep")
    a = toy(lab, "a", proof=lambda target: f"test {target.node.name} = node1 || printf 'x\\tno\\n'")
    assert seen(report_of(lab, replace(a, deep=deep))) == [("node2", "a", "x")]
    assert not lab.has("node1", "deep")
    assert seen(report_of(lab, replace(a, deep=deep), deep=True)) == [("node2", "a", "x")]
    assert lab.has("node1", "deep") and not lab.has("node2", "deep")
    alone = replace(a, proof=None, deep=lambda target: r"printf 'a-spoilt\tby itself\n'")
    found = report_of(lab, alone, toy(lab, "b", needs=("a",)), deep=True)
    assert seen(found) == [("node1", "a", "a-spoilt"), ("node2", "a", "a-spoilt")]
    assert waiting(found) == [("node1", "b", ["a"]), ("node2", "b", ["a"])]


def test_a_dry_run_waits_for_the_same_roles_as_verify(lab: Lab) -> None:
    lab.names = ("node1",)
    (lab.folder / "node1/b").touch()
    c = toy(lab, "c", needs=("b",), findings=lambda found: [replace(found, repairable=False)])
    roles = (toy(lab, "a"), toy(lab, "b", needs=("a",)), c)
    assert waiting(report_of(lab, *roles)) == [("node1", "c", ["a"])]
    dry = lab.run(*roles, dry=True)
    assert change_of(dry, 2), "c is not judged yet: a may mend it"


def test_a_failed_proof_and_an_unreadable_role_are_causes_too(lab: Lab) -> None:
    def parse(text: str) -> Any:
        raise Unreadable("no such tool")

    lab.names = ("node1",)
    (lab.folder / "node1/a").touch()
    broken = toy(lab, "a", proof=lambda target: r"printf 'a-broken\tit does not start\n'")
    roles = (broken, toy(lab, "b", needs=("a",)), toy(lab, "c", parse=parse))
    found = report_of(lab, *roles, toy(lab, "d", needs=("c",)))
    assert seen(found) == [("node1", "a", "a-broken"), ("node1", "c", "unreadable")]
    assert waiting(found) == [("node1", "b", ["a"]), ("node1", "d", ["c"])]


def test_what_another_node_lacks_is_not_told_once_more_by_those_that_depend_on_it(lab: Lab) -> None:
    for name in ("a", "b"):
        (lab.folder / "node1" / name).touch()
    (lab.folder / "node2/a").touch()
    b = toy(
        lab, "b", elsewhere=lambda target: ("node1", "a") if target.node.name == "node2" else None
    )
    assert seen(report_of(lab, toy(lab, "a"), b)) == [("node2", "b", "b-missing")]
    (lab.folder / "node1/a").unlink()
    found = report_of(lab, toy(lab, "a"), b)
    assert seen(found) == [("node1", "a", "a-missing")]
    assert waiting(found) == [("node2", "b", ["a on node1"])]
    Recorded.breaks["node1"] = EOFError()
    found = report_of(lab, toy(lab, "a"), b)
    assert seen(found) == [("node1", "node", "unreadable")]
    assert waiting(found) == [("node2", "b", ["a on node1"])]


def naming(lab: Lab) -> Callable[[Target[Any]], str]:
    """A crossing proof that fails for each node that its target names."""
    return lambda target: (
        "\n".join(rf"printf 'x-far\t{name}\n'" for name in target.cluster.nodes)
        if target.is_head
        else "true"
    )


def test_nodes_prove_together_without_those_that_are_dead_or_wrong(lab: Lab) -> None:
    lab.names = ("node1", "node2", "node3")
    (lab.folder / "node3").mkdir()
    for name in lab.names:
        (lab.folder / name / "x").touch()
    (lab.folder / "node1/a").touch()
    (lab.folder / "node2/a").touch()
    Recorded.breaks["node2"] = EOFError()
    x = toy(lab, "x", proof=naming(lab), crossing=True, proof_needs=("a",))
    found = report_of(lab, toy(lab, "a"), x)
    assert [(wrong.node, wrong.id, wrong.seen) for wrong in found.findings] == [
        ("node1", "x-far", "node1"),
        ("node2", "unreadable", "the connection broke: EOFError"),
        ("node3", "a-missing", "no"),
    ]
    assert waiting(found) == [("node3", "x", ["a"])]


def test_what_one_proof_finds_together_holds_back_those_that_need_it(lab: Lab) -> None:
    for name in ("a", "x"):
        (lab.folder / "node1" / name).touch()
        (lab.folder / "node2" / name).touch()
    a = toy(lab, "a", proof=lambda target: r"printf 'a-cut\tnode2\n'", crossing=True)
    x = toy(lab, "x", proof=naming(lab), crossing=True, proof_needs=("a",))
    found = report_of(lab, a, x)
    assert {each.id for each in found.findings} == {"a-cut"}
    assert waiting(found)[0] == ("node1", "x", ["a"])


def test_what_nodes_prove_together_over_ssh_waits_for_ssh() -> None:
    over_ssh = [role for role in registry.ROLES if role.crossing and role.name != "ssh"]
    assert [role.name for role in over_ssh] == ["network", "time", "storage"]
    assert all({"hosts", "ssh"} <= {*role.proof_needs} for role in over_ssh)


def test_without_the_head_nothing_is_proved_together(lab: Lab) -> None:
    (lab.folder / "node2/x").touch()
    found = report_of(lab, toy(lab, "x", proof=lambda target: "echo x", crossing=True))
    assert seen(found) == [("node1", "x", "x-missing")] and not waiting(found)


def test_verify_of_right_nodes_is_ok_and_of_a_silent_one_unreadable(lab: Lab) -> None:
    for node in NAMES:
        (lab.folder / node / "a").touch()
    assert report_of(lab, toy(lab, "a")).as_json() == {
        "verdict": "ok",
        "findings": [],
        "waiting": [],
        "identity": [],
    }
    Recorded.breaks["node2"] = EOFError()
    report = report_of(lab, toy(lab, "a"))
    assert seen(report) == [("node2", "node", "unreadable")]
    assert report.verdict == "unreadable" and EXIT_CODES[report.verdict] == 2


CLASSES = {"node1": "a100", "node2": "a100", "node3": "h100"}
SYSTEMS = {"node1": "Debian 12", "node2": "Rocky 9.3", "node3": "Debian 12"}


@pytest.mark.parametrize(
    ("rule", "values", "ok"),
    [
        ("equal", ("1", "1", "1"), True),
        ("equal", ("1", "1", "2"), False),
        ("equal", ("1", None, "1"), True),
        ("equal per class", ("1", "1", "2"), True),
        ("equal per class", ("1", "2", "3"), False),
        ("equal per class and os", ("1", "2", "3"), True),
        ("differs", ("1", "2", "3"), True),
        ("differs", ("1", "2", "1"), False),
        ("any", ("1", "1", "2"), True),
    ],
)
def test_a_fact_is_judged_by_its_rule(rule: Rule, values: Sequence[str | None], ok: bool) -> None:
    nodes = {
        name: Node(name=name, address=f"10.0.0.{number}", gpu_class=gpu_class)
        for number, (name, gpu_class) in enumerate(CLASSES.items(), 1)
    }
    cluster = Cluster("toys", Path("cluster.yaml"), nodes)
    read = {name: value for name, value in zip(CLASSES, values, strict=True) if value}
    row = judge(Fact("x", rule, str), read, cluster, SYSTEMS)
    assert row.ok is ok and row.values == read and row.rule == rule


@pytest.mark.parametrize(("os", "ok"), [("Debian 12", False), ("Rocky 9.3", True)])
def test_the_system_by_which_nodes_are_grouped_is_itself_a_fact(
    lab: Lab, os: str, ok: bool
) -> None:
    def fact(name: str, rule: Rule, values: Sequence[str], **more: Any) -> Fact[Any]:
        left = list(values)
        return Fact(name, rule, lambda state: left.pop(0), **more)

    kernel = fact("kernel", "equal per class and os", ["6.1", "5.14"])
    system = fact("os", "any", ["Debian 12", os], is_os=True)
    report = report_of(lab, toy(lab, "a", facts=(kernel,)), toy(lab, "b", facts=(system,)))
    assert [row.ok for row in report.identity] == [ok, True]


def test_what_two_roles_know_is_one_row_with_the_later_roles_value(lab: Lab) -> None:
    def gcc(rule: Rule, **values: str) -> Fact[Any]:
        left = [values.get(name) for name in NAMES]
        return Fact("gcc", rule, lambda state: left.pop(0))

    system = gcc("any", node1="11.5", node2="12.2")
    login = gcc("equal", node1="12.2")
    roles = (toy(lab, "a", facts=(system,)), toy(lab, "b", facts=(login,)))
    (row,) = report_of(lab, *roles).identity
    assert row.values == {"node1": "12.2", "node2": "12.2"} and row.ok and row.rule == "equal"


def test_a_folder_on_a_node_has_exactly_the_declared_files_and_only_what_lacks_travels(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = lab.folder / "here", lab.folder / "node1/there"
    files = {}
    for name in ("a.deb", "sub/b+1.deb", "index"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"the file {name}")
        files[name] = (source / name, hashlib.sha256((source / name).read_bytes()).hexdigest())
    there.mkdir()
    (there / "a.deb").write_text("damaged")
    (there / "old.deb").write_text("of an earlier bundle")
    state = lab.state([])
    node = state.inventory.get_host("node1")
    step = UploadFolder(files, str(there))
    travelled: list[str] = []
    put = Recorded.put_file

    def put_file(self: Any, file: Any, *arguments: Any, **more: Any) -> Any:
        travelled.append(getattr(file, "name", file))
        if len(travelled) == 2:
            raise OSError("the cable was pulled")
        return put(self, file, *arguments, **more)

    monkeypatch.setattr(Recorded, "put_file", put_file)
    with pytest.raises(session.NodeFailed, match="copying b.1.deb broke off: the cable was pulled"):
        upload_folder(node, step)
    assert (there / "a.deb").read_text() == "damaged"  # nothing is half-done
    travelled[2:] = ["went on"]
    upload_folder(node, step)
    assert travelled[3:] == [str(source / "sub/b+1.deb"), str(source / "index"), travelled[-1]]
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == set(files) and (there / "a.deb").read_text() == "the file a.deb"
    assert {path.name for path in (lab.folder / "node1").iterdir()} == {"there"}
    files["a.deb"] = (source / "a.deb", "0" * 64)
    with pytest.raises(session.NodeFailed):
        upload_folder(node, UploadFolder(files, str(there)))
    assert (there / "a.deb").read_text() == "the file a.deb"
