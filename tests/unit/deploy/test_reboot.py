"""lockstep reboot, on nodes that are played: in which order they restart, what is waited for, and what refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import cli, jobs_cli, reboot
from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles import registry, verify
from roles.core import session
from roles.core.role import PROVED
from roles.job.plan import Plan
from roles.job.probe import Attempt, parse
from roles.storage.spec import StorageSpec
from roles.verify import Report, Waiting, Wrong


@dataclass
class Played:
    """A node by a script. boots: what it answers once it was told to reboot, a look each; None is silence."""

    name: str
    units: str = ""
    boots: list[tuple[str, str] | None] = field(default_factory=lambda: [("new", "running")])
    refusal: str = ""
    silent: bool = False
    told: bool = False


@dataclass
class Stage:
    """What the command sees. ordered: nodes as they were told to reboot. lacking: a look of each node a time."""

    nodes: dict[str, Played]
    ordered: list[str] = field(default_factory=list)
    lacking: dict[str, list[set[str]]] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    sections: dict[str, Spec] = field(default_factory=dict)
    now: float = 0


NAMES = ("main", "one", "two")
REPORT_OF = reboot.report_of
HEALTHY = "boot a\nnow 1\ncores 1\ngpus 0\n{}\nend"
UNIT = "Id=lockstep-long.service\nDescription=Lockstep job long, attempt 3\nActiveState=active\nResult=success\n"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """Three nodes that reboot at once and lack nothing; each test changes what it is about."""
    stage = Stage({name: Played(name) for name in NAMES})
    declared = {name: Node(name=name, address=f"10.0.0.{at}") for at, name in enumerate(NAMES, 1)}
    cluster = Cluster("test", tmp_path / "cluster.yaml", declared, sections=stage.sections)
    hosts = [SimpleNamespace(name=name) for name in NAMES]

    def run(host: Any, script: str, seconds: int) -> session.Output:
        node = stage.nodes[host.name]
        if node.silent:
            raise session.NodeFailed("cannot connect")
        if script == reboot.ORDER:
            stage.ordered.append(node.name)
            node.told = not node.refusal
            return session.Output(node.refusal, "")
        if script == reboot.BOOT:
            boot: tuple[str, str] | None = ("old", "running")
            if node.told:
                boot = node.boots.pop(0) if len(node.boots) > 1 else node.boots[0]
            if boot is None:
                raise session.NodeFailed("cannot connect")
            return session.Output("\n".join([f"{node.name} {boot[0]}", boot[1]]), "")
        return session.Output(HEALTHY.format(node.units), "")

    def each(what: Callable[[Any], Any], chosen: Sequence[Any] = hosts) -> dict[str, Any]:
        return {host.name: what(host) for host in chosen}

    @contextmanager
    def reach(_: Cluster) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(cluster=cluster, nodes=hosts, each=each)

    def lacks(_: Any, host: Any) -> frozenset[str]:
        looks = stage.lacking.get(host.name, [set()])
        return frozenset(looks.pop(0) if len(looks) > 1 else looks[0])

    def sleep(seconds: float) -> None:
        stage.now += seconds

    # Not the module itself: importing it patches this process's threads for gevent.
    monkeypatch.setitem(sys.modules, "deploy.reach", SimpleNamespace(reach=reach))
    monkeypatch.setattr(registry, "declared", lambda: cluster)
    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(session, "new_login", lambda host: None)
    monkeypatch.setattr(reboot, "lacks", lacks)
    monkeypatch.setattr(reboot, "report_of", lambda *_: stage.report)
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: stage.now)
    monkeypatch.setattr(reboot, "time", clock)
    return stage


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["reboot", "--json", *arguments])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def states(found: dict[str, Any]) -> dict[str, str]:
    return {each["node"]: each["state"] for each in found["nodes"]}


def test_all_restart_one_after_the_other_the_head_last(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = outcome(capsys, "--all")
    assert code == 0 and found["verdict"] == "ok"
    assert stage.ordered == ["one", "two", "main"]
    assert states(found) == {"one": "back", "two": "back", "main": "back"}


def test_a_node_counts_as_booted_when_its_boot_is_new_and_over(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.nodes["one"].boots = [
        *(("old", "stopping"), None, ("new", "starting"), ("new", "degraded"))
    ]
    assert outcome(capsys, "one")[1]["nodes"][0]["seconds"] == 3 * reboot.POLL_SECONDS


def test_one_that_does_not_come_back_is_named_in_time_and_the_rest_stays_untouched(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.nodes["two"].boots = [None]
    code, found = outcome(capsys, "--all", "--wait", "60")
    assert code == 2 and found["verdict"] == "unreadable"
    assert states(found) == {"one": "back", "two": "lost", "main": "untouched"}
    assert stage.ordered == ["one", "two"] and 60 <= stage.now < 70
    assert found["nodes"][1]["reason"] == "after 60 s still: cannot connect"


@pytest.mark.parametrize("more", [[], ["--at-once"]])
def test_one_that_comes_back_without_what_it_had_stops_the_rolling_only(
    stage: Stage, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    stage.lacking["one"] = [{"time: offset"}, {"driver: not-loaded", "time: offset"}]
    code, found = outcome(capsys, "--all", *more)
    assert code == 1 and found["verdict"] == "drift"
    assert found["nodes"][0]["reason"] == "it lacks driver: not-loaded"
    assert stage.ordered == (["one", "two", "main"] if more else ["one"])


def test_what_was_wrong_before_is_not_waited_for(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.lacking["one"] = [{"time: offset"}]
    wrong = Wrong("one", "time", "offset", "1", "2", "fix")
    stage.report = Report(findings=[wrong])
    code, found = outcome(capsys, "one")
    assert code == 1 and states(found) == {"one": "back"} and stage.now == 0


def test_a_node_some_role_of_which_is_not_judged_is_not_as_declared(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its storage may be gone: what it waits for is wrong on a node that was not rebooted."""
    stage.report = Report(waiting=[Waiting("one", "storage", ["exports on main"])])
    code, found = outcome(capsys, "one")
    assert code == 1 and found["verdict"] == "drift" and states(found) == {"one": "back"}
    stage.nodes["one"] = Played("one")
    assert cli.main(["reboot", "one"]) == 1
    said = capsys.readouterr().out
    assert "one   storage     exports on main" in said
    assert said.endswith(
        "one: rebooted, but not all of it can be judged; lockstep verify names the cause\n"
    )


def test_systemd_that_does_not_obey_is_told_at_once(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.nodes["one"].refusal = "Failed to start reboot.target: masked"
    code, found = outcome(capsys, "one")
    assert code == 2 and stage.now == 0
    assert found["nodes"][0]["reason"].endswith("Failed to start reboot.target: masked")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["reboot", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("; nothing was rebooted\n")
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no node is named"),
        (["tow"], "declares no node 'tow': did you mean two?"),
        (["--all", "one"], "contradict each other"),
        (["one", "--wait", "0"], "--wait 0"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    stage: Stage, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refusal(capsys, *arguments)
    assert stage.ordered == []


def test_a_silent_node_and_this_machine_itself_are_refused_before_the_first_reboot(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.nodes["two"].silent = True
    assert "two: cannot connect" in refusal(capsys, "--all")
    stage.nodes["two"].silent = False
    own = subprocess.run(["sh", "-c", "echo two old"], capture_output=True, text=True)
    monkeypatch.setattr(reboot, "subprocess", SimpleNamespace(run=lambda *_, **__: own))
    assert "two is the machine that this runs on" in refusal(capsys, "--all")
    assert stage.ordered == []


def test_a_job_is_never_cut_off(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.nodes["two"].units = UNIT
    assert "job long runs on two: add --drain" in refusal(capsys, "--all")
    assert stage.ordered == []
    assert cli.main(["reboot", "one"]) == 0, "it does not run there"


def serve(stage: Stage) -> None:
    """main serves the storage of the others."""
    stage.sections["storage"] = StorageSpec(kind="nfs", path="/data", server="main")


def test_a_server_stays_up_while_a_job_runs_on_what_it_serves(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.nodes["two"].units = UNIT
    serve(stage)
    said = refusal(capsys, "main")
    assert "job long runs on two, whose storage main serves: add --drain" in said
    assert cli.main(["reboot", "one"]) == 0, "it serves nobody"
    stage.nodes["two"] = Played("two", silent=True)
    assert cli.main(["reboot", "main"]) == 0
    assert "whether a job runs there is not known: two: cannot" in capsys.readouterr().err


class Cut(BaseException):
    """What Ctrl-C raises ends pytest too."""


@dataclass
class Drain:
    """The job long as a reboot drains it. ends: why it does not end, or nothing. marked: the mark lies there."""

    seen: jobs_cli.Seen
    ends: str = ""
    marked: bool = False


@pytest.fixture
def drain(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Drain:
    """It runs on two, until it is told to end."""
    stage.nodes["two"].units = UNIT
    plan = Plan(3, ("two",), {"two": "a"}, "10.0.0.3", 29500, 1, 1, 1)
    state = replace(parse(HEALTHY.format(UNIT)), attempts=3, attempt=Attempt(plan))
    drain = Drain(jobs_cli.Seen({"two": state}, {}))

    def mark(*_: Any) -> str:
        drain.marked = True
        return ""

    def end(*_: Any) -> str:
        if not drain.ends:
            stage.nodes["two"].units = ""
        return drain.ends

    def release(_: Any, drained: Sequence[reboot.Drained], __: Any) -> None:
        if drained:
            drain.marked = False

    named = jobs_cli.Named("long", "/runs/long")
    monkeypatch.setattr(jobs_cli, "started", lambda *_: named)
    monkeypatch.setattr(jobs_cli, "look", lambda *_: drain.seen)
    monkeypatch.setattr(jobs_cli, "mark", mark)
    monkeypatch.setattr(jobs_cli, "end", end)
    monkeypatch.setattr(reboot, "_release", release)
    return drain


def test_a_drained_job_is_held_until_every_node_is_back(
    stage: Stage, drain: Drain, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.nodes["two"].boots = [None]
    assert outcome(capsys, "two", "--drain", "--wait", "9")[0] == 2 and drain.marked
    stage.nodes["two"] = Played("two", UNIT)
    code, found = outcome(capsys, "two", "--drain")
    assert code == 0 and not drain.marked
    assert [each["name"] for each in found["drained"]] == ["long"]


def test_a_job_on_what_a_server_serves_is_drained_with_it(
    stage: Stage, drain: Drain, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(stage)
    code, found = outcome(capsys, "main", "--drain")
    assert code == 0 and stage.ordered == ["main"] and stage.nodes["two"].units == ""
    assert [each["name"] for each in found["drained"]] == ["long"]


def test_a_job_that_does_not_end_keeps_every_node_up_and_is_not_held(
    stage: Stage, drain: Drain, capsys: pytest.CaptureFixture[str]
) -> None:
    drain.ends = "two: no answer within 420 s"
    assert "job long does not end: two: no answer" in refusal(capsys, "--all", "--drain")
    assert stage.ordered == [] and not drain.marked


def test_a_job_that_cannot_write_a_checkpoint_or_is_not_found_keeps_every_node_up(
    stage: Stage, drain: Drain, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = drain.seen
    drain.seen = jobs_cli.Seen({"one": whole.states["two"]}, {"two": "cannot connect"})
    assert "because two is silent: lockstep stop long" in refusal(capsys, "--all", "--drain")
    drain.seen = jobs_cli.Seen({"two": parse(HEALTHY.format(UNIT))}, {})
    assert "no node finds it in /runs/long" in refusal(capsys, "--all", "--drain")
    assert stage.ordered == [] and not drain.marked


def test_a_reboot_that_is_broken_off_holds_no_job(
    stage: Stage, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        assert drain.marked
        raise Cut

    monkeypatch.setattr(reboot, "restart", cut)
    with pytest.raises(Cut):
        cli.main(["reboot", "two", "--drain"])
    assert not drain.marked


@pytest.mark.parametrize("more", [[], ["--at-once"]])
def test_a_job_that_begins_meanwhile_is_not_cut_off_either(
    stage: Stage,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    def begins(*_: Any) -> frozenset[str]:
        stage.nodes["two"].units = UNIT
        return frozenset()

    monkeypatch.setattr(reboot, "lacks", begins)
    code, found = outcome(capsys, "--all", *more)
    assert code == 1 and "two" not in stage.ordered
    assert found["nodes"][1]["reason"] == "job long was started meanwhile"
    assert more or found["nodes"][2]["reason"] == "two was not rebooted"


def test_a_node_that_was_not_rebooted_is_not_said_to_lack_something(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reboot, "_began", lambda *_: "job long was started meanwhile")
    assert cli.main(["reboot", "two"]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("drift: two: not rebooted, see REASON; run lockstep reboot again")
    stage.report = Report(findings=[Wrong("two", "time", "offset", "1", "2", "fix")])
    assert cli.main(["reboot", "two"]) == 1
    assert "something did not come back" in capsys.readouterr().out


PROOFS = Report(
    findings=[
        Wrong("main", "network", "firewall-between-nodes", PROVED, "two does not reach one at 10.0.0.2, port 1: no answer", "fix"),
        Wrong("main", "time", "rdzv-clock-skew", PROVED, "the clock of one is 2 s behind that of main", "fix"),
        Wrong("main", "time", "offset", "one", "one", "fix"),
        Wrong("two", "storage", "nfs-stale-handle", "/data can be entered", "stale file handle", "fix"),
        Wrong("two", "driver", "gpu", PROVED, "one GPU is gone", "fix"),
    ],
    waiting=[Waiting("one", "storage", ["exports on main"]), Waiting("one", "nccl", ["driver"])],
)  # fmt: skip


def kept(stage: Stage, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The ids of PROOFS that are told after a reboot of these nodes, and the roles that wait."""
    looks = SimpleNamespace(roles=registry.ROLES, forget=lambda _: None)
    cluster = Cluster("test", Path("cluster.yaml"), {}, sections=stage.sections)
    reached: Any = SimpleNamespace(
        cluster=cluster, nodes=[], each=None, run=SimpleNamespace(looks=looks)
    )
    monkeypatch.setattr(verify, "report", lambda *_: PROOFS)
    found = REPORT_OF(reached, names, [])
    return [each.id for each in found.findings] + [each.role for each in found.waiting]


def test_what_a_proof_between_nodes_says_of_a_rebooted_one_counts_whoever_ran_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = ["firewall-between-nodes", "rdzv-clock-skew"]
    assert kept(stage, monkeypatch, "one") == [*between, "storage", "nccl"]
    assert kept(stage, monkeypatch, "two") == [between[0], "nfs-stale-handle", "gpu"]


def test_the_storage_of_every_node_counts_where_its_server_was_rebooted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nfs-stale-handle" not in kept(stage, monkeypatch, "main")
    monkeypatch.setattr(reboot, "server_of", lambda _: "main")
    assert kept(stage, monkeypatch, "main")[-2:] == ["nfs-stale-handle", "storage"]


def test_the_boot_is_read_with_any_shell(tmp_path: Path) -> None:
    for shell in ("dash", "bash"):
        done = subprocess.run([shell, "-c", reboot.BOOT], capture_output=True, text=True)
        boot, began = done.stdout.split("\n")[0].split(" ")
        assert len(boot) == 36 and began.isdigit(), shell
