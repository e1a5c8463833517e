"""Clocks: chrony alone keeps them, every node follows the head, and what is far off is found and set."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.packages import PackagesSpec
from roles.time import TimeSpec, TimeState, role
from roles.time.drift import config_text, offset, remarks
from roles.time.probe import Tracking, Unit, parse
from roles.time.proof import proof

RECORDED = Path(__file__).parent / "recorded"
NODES = {
    name: Node(name=name, address=f"10.77.56.1{number}")
    for number, name in enumerate(("node1", "node2"), 1)
}


def target(name: str = "node2", **declared: Any) -> Target[TimeSpec]:
    sections = {"packages": PackagesSpec(local="/srv/lockstep/packages")}
    cluster = Cluster("lab", Path("lab.yaml"), NODES, sections=sections)
    return Target(cluster, NODES[name], TimeSpec(**declared))


def recorded(name: str) -> TimeState:
    return parse((RECORDED / f"{name}.txt").read_text().rstrip("\n"))


HEAD, NODE = recorded("bookworm-node1"), recorded("bookworm-node2")
PEERS = {"node1": HEAD}


def found(
    state: TimeState, name: str = "node2", peers: Mapping[str, TimeState] = PEERS, **declared: Any
) -> list[Finding]:
    return role.drift(target(name, **declared), state, peers)


def ids(state: TimeState, name: str = "node2", **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, name, **declared)]


def steps(state: TimeState, name: str = "node2", **declared: Any) -> list[str]:
    todo = [finding for finding in found(state, name, **declared) if finding.repairable]
    done = list(role.converge(target(name, **declared), state, PEERS, todo))
    assert all(isinstance(step, Shell) for step in done)
    return [step.command for step in done if isinstance(step, Shell)]


def tracked(state: TimeState, **changes: Any) -> TimeState:
    assert state.tracking is not None
    return replace(state, tracking=replace(state.tracking, **changes))


def with_unit(state: TimeState, name: str, unit: Unit) -> TimeState:
    return replace(state, units={**state.units, name: unit})


def test_the_head_by_its_own_clock_and_a_node_that_follows_it_are_right() -> None:
    assert ids(HEAD, "node1") == [] and ids(NODE) == []
    assert NODE.tracking == Tracking("10.77.56.11", 1795226150.374525107, 0.000006818, "Normal")
    fact = role.facts[0]
    assert fact.read(HEAD) == fact.read(NODE) == "within 1 s"


def test_without_servers_the_head_keeps_the_time_and_serves_the_other_nodes_alone() -> None:
    text = config_text(target("node1")).splitlines()
    assert "local stratum 10" in text and "allow 10.77.56.12" in text
    assert not [line for line in text if line.startswith(("server", "pool", "allow all"))]


def test_servers_are_asked_by_the_head_and_the_nodes_still_follow_the_head() -> None:
    head = config_text(target("node1", servers=["ntp.example.com"])).splitlines()
    assert "server ntp.example.com iburst" in head and "local stratum 10" in head
    assert config_text(target(servers=["ntp.example.com"])) == config_text(target())


def test_timesyncd_gives_way_in_the_transaction_that_installs_chrony() -> None:
    state = recorded("bookworm-timesyncd")
    assert ids(state) == ["chrony-missing", "time-other-daemon"]
    install, start, wait = steps(state)
    last = install.splitlines()[-1]
    assert last.endswith('-- chrony "$@"') and "--no-remove" not in last
    assert " install --simulate " in install and "case ' systemd-timesyncd ' in" in install
    assert "disable --now systemd-timesyncd.service" in start
    assert "waitsync" in wait


def test_where_nothing_is_in_the_way_nothing_may_be_removed() -> None:
    (command, *_) = steps(replace(recorded("bookworm-timesyncd"), packages=()))
    assert "--no-remove" in command.splitlines()[-1]


def test_on_an_rpm_node_the_service_and_the_file_have_other_names() -> None:
    state = recorded("el9")
    assert ids(state) == ["time-config"]
    assert "/etc/chrony.conf" in found(state)[0].want
    start, wait, clock = steps(state)
    assert "systemctl restart chronyd.service" in start and "/etc/chrony.conf" in start
    assert "makestep" in clock
    missing = replace(state, installed=False, tracking=None, config=None)
    assert "install chrony" in steps(missing)[0] and "apt-get" not in steps(missing)[0]


def test_an_rpm_node_that_follows_the_head_is_right() -> None:
    state = recorded("rpm-node2")
    assert (state.manager, state.unit) == ("rpm", "chronyd.service")
    assert ids(state) == [] and role.facts[0].read(state) == "within 1 s"


def test_another_daemon_is_ended_only_after_chrony_is_installed() -> None:
    state = with_unit(NODE, "ntp.service", Unit("loaded", "active", "generated"))
    assert ids(state) == ["time-other-daemon"]
    start = steps(state)[0]
    assert start.index("disable --now ntp.service") < start.index("restart chrony.service")


@pytest.mark.parametrize(
    "unit", [Unit("masked", "inactive", "masked"), Unit("loaded", "inactive", "disabled")]
)
def test_a_daemon_that_never_runs_is_no_rival(unit: Unit) -> None:
    assert ids(with_unit(NODE, "ntpd.service", unit)) == []


def test_a_stopped_or_mute_or_outdated_chronyd_is_started_anew() -> None:
    down = with_unit(NODE, "chrony.service", Unit("loaded", "inactive", "enabled"))
    for state in (down, replace(NODE, tracking=None), replace(NODE, stale=True)):
        assert ids(state) == ["time-stopped"]
        assert "systemctl restart chrony.service" in steps(state)[0]


def test_ntpsec_which_answers_to_three_names_is_one_daemon_and_gives_way() -> None:
    state = recorded("bookworm-ntpsec")
    assert [finding.seen for finding in found(state)] == [
        "not installed",
        "ntpsec runs or starts at boot",
    ]
    install, start, _ = steps(state)
    assert "case ' ntpsec ' in" in install and "disable --now ntpsec.service" in start


def test_a_disabled_chronyd_would_not_survive_a_reboot() -> None:
    state = with_unit(NODE, "chrony.service", Unit("loaded", "active", "disabled"))
    assert ids(state) == ["time-not-enabled"]
    assert "systemctl enable chrony.service" in steps(state)[0]


def test_a_clock_that_runs_alone_or_follows_another_is_not_synchronised() -> None:
    alone = tracked(NODE, leap="Not synchronised", reference="00000000")
    assert ids(alone) == ["not-synchronised"]
    assert ids(tracked(NODE, reference="192.0.2.1")) == ["not-synchronised"]
    assert role.facts[0].read(alone) == "not synchronised"
    wait, *_ = steps(alone)
    assert wait.index("waitsync 8 ") < wait.index("systemctl restart")
    assert "UDP port 123" in wait


def test_the_offset_is_told_in_milliseconds_and_positive_where_the_clock_is_ahead() -> None:
    assert offset(tracked(NODE, offset=-0.0125)) == "+12.500 ms"
    assert offset(tracked(NODE, offset=17.3)) == "-17300.000 ms"
    assert offset(tracked(NODE, leap="Not synchronised")) is None
    assert offset(replace(NODE, tracking=None)) is None


def test_a_node_that_no_longer_hears_a_healthy_head_is_not_synchronised() -> None:
    deaf = replace(NODE, now=NODE.now + 7200)
    assert ids(deaf) == ["not-synchronised"]


@pytest.mark.parametrize("peers", [{}, {"node1": replace(HEAD, tracking=None)}])
def test_a_head_that_is_off_or_broken_changes_nothing_on_the_others(
    peers: Mapping[str, TimeState],
) -> None:
    assert found(replace(NODE, now=NODE.now + 7200), peers=peers) == []


def test_a_clock_beyond_the_bound_is_set_at_once_but_not_under_a_job() -> None:
    off = replace(tracked(NODE, offset=-17.3), may_set=True)
    (finding,) = found(off)
    assert finding.id == "rdzv-clock-skew" and finding.disturbs and finding.repairable
    assert finding.seen == "17.300 s off"
    assert role.facts[0].read(off) == "17.300 s off"
    assert "chronyc makestep" in steps(off)[-1]


def test_a_container_that_cannot_set_its_clock_says_where_to_do_it() -> None:
    (finding,) = found(tracked(NODE, offset=17.3))
    assert not finding.repairable and "machine that runs it" in finding.fix
    assert not NODE.may_set


def test_what_starts_chronyd_waits_for_a_job_unless_the_clock_is_known_to_be_right() -> None:
    assert not found(replace(NODE, config="pool x"))[0].disturbs
    assert found(replace(NODE, config="pool x", tracking=None))[0].disturbs
    assert found(recorded("bookworm-timesyncd"))[0].disturbs


def test_a_head_without_an_answer_from_its_servers_is_said_and_blocks_nothing() -> None:
    at = target("node1", servers=["192.0.2.1"])
    state = replace(HEAD, config=config_text(at))
    assert role.drift(at, state, {}) == []
    own = tracked(state, reference="7F7F0101")
    assert [line for line, _ in remarks(at, own, {}, False)] == [
        "none of 192.0.2.1 answers: the head keeps the time by its own clock"
    ]
    assert list(remarks(at, tracked(state, reference="192.0.2.1"), {}, False)) == []
    assert "time-no-server" in proof(at)


@pytest.mark.parametrize("offset", [-17.3, -0.1, 0.1, 17.3])
def test_the_step_sets_only_a_clock_beyond_the_bound(tmp_path: Path, offset: float) -> None:
    chronyc = tmp_path / "chronyc"
    line = f"0A4D380B,10.77.56.11,11,1795226150.37,{offset:.9f},0,0,0,0,0,0,0,16.2,Normal"
    chronyc.write_text(
        f"#!/bin/sh\necho \"$*\" >>{tmp_path}/calls\ncase $* in *tracking) echo '{line}';; esac\n"
    )
    chronyc.chmod(0o755)
    command = steps(replace(tracked(NODE, offset=20.0), may_set=True))[-1]
    subprocess.run(
        ["sh", "-ec", command], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True
    )
    assert ("makestep" in (tmp_path / "calls").read_text()) == (abs(offset) > 1)


def proved(tmp_path: Path, shift: str, delay: str = "0") -> str:
    """The head's proof, where the other node's clock is shifted and its answers are late (seconds)."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    ssh, date = binaries / "ssh", tmp_path / "far" / "date"
    date.parent.mkdir()
    date.write_text(f'#!/bin/sh\nsleep {delay}\nexec {Path("/bin/date")} -d "{shift} sec" "$@"\n')
    ssh.write_text(
        f'#!/bin/sh\nfor last; do :; done\nPATH={date.parent}:$PATH exec sh -c "$last"\n'
    )
    for each in (ssh, date):
        each.chmod(0o755)
    return subprocess.run(
        ["sh", "-c", proof(target("node1"))],
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(("shift", "word"), [("+20", "ahead of"), ("-20", "behind")])
def test_the_proof_measures_the_clocks_past_chrony(tmp_path: Path, shift: str, word: str) -> None:
    said = proved(tmp_path, shift)
    assert said.startswith("rdzv-clock-skew\t") and "node2" in said and word in said
    assert abs(float(said.split(" is ")[1].split()[0]) - 20) < 0.5
    assert "more than 1 s\twait two minutes" in said


def test_a_slow_way_is_not_taken_for_a_wrong_clock(tmp_path: Path) -> None:
    assert proved(tmp_path, "+1", delay="0.3") == ""


def test_the_proof_leaves_an_unreachable_node_to_the_ssh_role(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (binaries / "ssh").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", proof(target("node1"))],
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert proof(target("node2")) == "true"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Normal", "正常"),
        ("bound", "probleme\tja\nbound"),
        ("LoadState=masked\n", ""),
        ("manager\tapt", "manager\tpacman"),
        ("0.000006818", "fast"),
        ("capabilities\t", "capabilities\tx"),
        ("installed\tyes", "installed\tja"),
        ("config\tpresent", "config\tvorhanden"),
    ],
)
def test_what_is_not_understood_is_unreadable(old: str, new: str) -> None:
    text = (RECORDED / "bookworm-node2.txt").read_text()
    changed = text.replace(old, new, 1)
    assert changed != text
    with pytest.raises(Unreadable):
        parse(changed)


def test_a_head_or_a_bad_name_is_no_server() -> None:
    spec = TimeSpec(servers=["10.77.56.11", "ntp.example.com"])
    assert [path for path, _ in spec.problems(target().cluster)] == ["servers[0]"]
    for wrong in ("a b", "x\nallow all", "", "-x"):
        with pytest.raises(ValidationError):
            TimeSpec(servers=[wrong])
    with pytest.raises(ValidationError):
        TimeSpec(max_offset=15)
