"""Services: what the file names runs now and after each boot; what cannot is told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.services import ServicesSpec, role
from roles.services.probe import ServicesState, Unit, parse, probe
from roles.time import TimeSpec

RECORDED = Path(__file__).parent / "recorded"
NODES = {"node1": Node(name="node1", address="10.77.56.11")}
RUNS = Unit("loaded", "enabled", "active", "running", "success", "simple")


def target(*running: str, **sections: Any) -> Target[ServicesSpec]:
    spec = ServicesSpec.model_validate({"running": list(running)})
    return Target(Cluster("lab", Path("lab.yaml"), NODES, sections=sections), NODES["node1"], spec)


def state(**changes: str) -> ServicesState:
    return ServicesState({"docker.service": Unit(**{**vars(RUNS), **changes})})


def found(seen: ServicesState, *running: str) -> list[Finding]:
    return role.drift(target(*(running or ("docker",))), seen, {})


def commands(seen: ServicesState) -> list[str]:
    steps = role.converge(target("docker"), seen, {}, found(seen))
    return [step.command for step in steps if isinstance(step, Shell)]


def test_what_systemd_says_is_read() -> None:
    seen = parse((RECORDED / "bookworm.txt").read_text().rstrip("\n"))
    right, *wrong = seen.units
    assert found(seen, right) == []
    ids = ["service-stopped", "service-masked", "service-missing"]
    assert [each.id for each in found(seen, *wrong)] == ids


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"active": "inactive", "sub": "dead"}, "inactive (dead), enabled"),
        ({"active": "failed", "sub": "failed", "result": "signal"}, "failed (failed), enabled, last result signal"),
        ({"active": "activating", "sub": "auto-restart"}, "activating (auto-restart), enabled"),
        ({"file": "disabled"}, "active (running), disabled"),
        ({"file": "enabled-runtime"}, "active (running), enabled-runtime"),
        ({"file": ""}, "active (running), without a file"),
        ({"active": "inactive", "sub": "dead", "kind": "oneshot", "result": "exit-code"}, "last result exit-code"),
    ],
)  # fmt: skip
def test_what_does_not_run_or_will_not_is_named_and_started(
    changes: dict[str, str], sentence: str
) -> None:
    (finding,) = found(state(**changes))
    assert finding.id == "service-stopped" and finding.repairable and sentence in finding.seen
    done = "\n".join(commands(state(**changes)))
    assert ("systemctl enable" in done) == ("file" in changes)
    assert ("systemctl start" in done) == ("active" in changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"file": "static"},
        {"kind": "oneshot", "sub": "exited"},
        {"kind": "oneshot", "active": "inactive", "sub": "dead"},
        {"kind": "", "sub": "waiting"},  # a timer
    ],
)
def test_what_runs_or_has_done_its_work_is_right(changes: dict[str, str]) -> None:
    assert found(state(**changes)) == []


@pytest.mark.parametrize("load", ["not-found", "masked", "bad-setting"])
def test_what_only_the_user_can_mend_is_told_and_nothing_is_started(load: str) -> None:
    (finding,) = found(state(load=load, active="inactive"))
    if load == "not-found":  # also what a first plan says, before the package is there
        assert finding.fix.startswith("it comes with its package where packages.install names that")
    assert not finding.repairable and commands(state(load=load, active="inactive")) == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["my service"], "is no name of a service"),
        (["-f"], "is no name of a service"),
        (["lockstep-rehearsal"], "is Lockstep's own"),
        (["autostart-lockstep.service"], "is Lockstep's own"),
        (["getty@"], "is a template: say which instance, as getty@tty1"),
        (["getty@.service"], "is a template: say which instance"),
        (["mnt-data.mount"], "only services, sockets and timers"),
        ([], "at least 1 item"),
    ],
)
def test_a_name_that_is_none_is_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        target(*names)


def test_an_instance_of_a_template_is_taken() -> None:
    assert target("getty@tty1", "a@b.socket").spec.running == ("getty@tty1.service", "a@b.socket")


def test_contradictions_are_told() -> None:
    clock = target("ntp", "docker", "docker.service", time=TimeSpec())
    told = dict(clock.spec.problems(clock.cluster))
    assert "the time role ends it" in told["running[0]"] and "twice" in told["running[2]"]
    assert list(clock.spec.problems(target("ntp").cluster))[:1] == [
        ("running[2]", "docker.service is named twice: leave one out")
    ]


def test_an_answer_without_the_service_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="what docker.service does"):
        found(ServicesState({}))
    with pytest.raises(Unreadable, match="what docker.service does"):
        parse("unit=docker.service\nLoadState=loaded\nend")


SYSTEMCTL = """#!/bin/sh
case $1 in
  show) cat "$STATE" ;;
  start) test "$2" = docker.service || exit 9; test -z "$STARTS" || echo "$STARTS" | tr ' ' '\\n' >"$STATE" ;;
esac
"""


@pytest.mark.parametrize(
    ("starts", "code"),
    [
        ("ActiveState=active Type=notify Result=success", 0),
        ("ActiveState=inactive Type=oneshot Result=success", 0),
        ("ActiveState=activating Type=simple Result=exit-code", 1),
        ("ActiveState=inactive Type=simple Result=success", 1),
        ("", 1),
    ],
)
def test_starting_ends_well_only_where_it_stays_up(tmp_path: Path, starts: str, code: int) -> None:
    says = "#!/bin/sh\necho no such address pool\n"
    for name, text in (("systemctl", SYSTEMCTL), ("journalctl", says), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("ActiveState=failed\nType=simple\nResult=exit-code\n")
    (command,) = commands(state(active="failed"))
    done = subprocess.run(
        ["sh", "-ec", command],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path / "state"), "STARTS": starts},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == code
    if code:
        assert done.stderr.strip().endswith("it said last: no such address pool")


def test_the_probe_asks_for_each_by_its_name_in_full() -> None:
    script = probe(target("docker", "fstrim.timer"))
    assert "for unit in docker.service fstrim.timer; do" in script


ASKED = """#!/bin/sh
case "$*" in
  is-enabled*) echo 'old.service is not a native service, redirecting'; echo "$ENABLED"; test "$ENABLED" = enabled ;;
  *UnitFileState*) echo UnitFileState=bad ;;
  *) printf 'Type=forking\\nResult=success\\nLoadState=loaded\\nActiveState=active\\nSubState=exited\\n' ;;
esac
"""


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize(("enabled", "ids"), [("enabled", []), ("disabled", ["service-stopped"])])
def test_of_an_init_script_it_is_known_whether_a_boot_starts_it(
    tmp_path: Path, shell: str, enabled: str, ids: list[str]
) -> None:
    (tmp_path / "systemctl").write_text(ASKED)
    (tmp_path / "systemctl").chmod(0o755)
    done = subprocess.run(
        [shell, "-c", probe(target("old"))],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "ENABLED": enabled},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = parse(done.stdout.rstrip("\n"))
    assert seen.unit("old.service").file == enabled
    assert [each.id for each in found(seen, "old")] == ids
