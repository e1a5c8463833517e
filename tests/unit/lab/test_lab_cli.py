"""Every command of the lab ends in an exit code, and its errors in one sentence."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.lab import cli, commands, lab, network, requirements
from deploy.lab.__main__ import main
from deploy.lab.container import Container
from deploy.lab.errors import LabError
from deploy.lab.lab import NodeStatus, Status
from deploy.lab.node import Node, clean
from deploy.lab.state import ROOT, Paths, Record, save_record


@pytest.fixture
def as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checks pass; the lab's directory is the test's own."""
    monkeypatch.setattr(requirements, "check", lambda: None)
    monkeypatch.setenv("LOCKSTEP_LAB", str(tmp_path / "lab"))
    monkeypatch.delenv("LOCKSTEP_LAB_CACHE", raising=False)
    monkeypatch.delenv("LOCKSTEP_CLUSTER", raising=False)
    return tmp_path / "lab"


def test_the_commands_can_hang_below_any_parser() -> None:
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers())
    for words in (
        ["up", "--nodes", "3"],
        ["down"],
        ["status"],
        ["reboot", "node1"],
        ["cut", "node1"],
    ):
        assert callable(parser.parse_args(["lab", *words]).handler)


def test_who_is_not_root_is_told_so_in_one_sentence() -> None:
    with pytest.raises(LabError, match=r"needs root: run it with sudo$"):
        requirements.check(uid=1000, system="Linux")
    with pytest.raises(LabError, match="need Linux"):
        requirements.check(uid=0, system="Darwin")


def test_missing_programs_are_named_by_their_packages() -> None:
    absent = {"mmdebstrap", "systemd-nspawn", "ssh", "ssh-keygen"}
    assert requirements.missing_packages(
        requirements.TOOLS, lambda tool: None if tool in absent else tool
    ) == ["systemd-container", "mmdebstrap", "openssh-client"]


def test_what_the_set_up_installs_covers_every_program_that_a_minimal_host_lacks() -> None:
    lines = (ROOT / "deploy" / "debian-packages.txt").read_text().splitlines()
    installed = {line for line in lines if not line.startswith("#")}
    always_there = {"dpkg", "apt", "util-linux", "mount", "tar"}
    assert (
        set({**requirements.TOOLS, **requirements.MACHINE_TOOLS}.values()) - always_there
        <= installed
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["up", "--nodes", "0"], "--nodes 0: a lab has 1 to 8 nodes"),
        (["up", "--nodes", "9"], "--nodes 9: a lab has 1 to 8 nodes"),
        (["up", "--archive", "x", "--environment"], "give one of them"),
        (["up", "--trim"], "--trim says which archive --environment builds"),
        (["up", "--archive", "/absent.tar.zst"], "--archive /absent.tar.zst: no such file"),
        (["up", "--package", "a b"], "'a b' is no package name"),
        (["cut", "node1"], "the lab is not up, run `lab up` first"),
        (["shell", "node1"], "the lab is not up, run `lab up` first"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    as_root: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("lab: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_a_command_typed_in_a_shell_ends_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.lab", "status"],
        cwd=ROOT,
        env={"LOCKSTEP_LAB": "relative", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lab: LOCKSTEP_LAB='relative' cannot be")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(13, "Permission denied", "/var/x"),
            2,
            "/var/x cannot be read: run this with sudo",
        ),
        (OSError(28, "No space left on device", "/var/x"), 2, "/var/x: No space left on device"),
    ],
)
def test_what_the_system_refuses_is_told_plainly(
    as_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def down(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(lab, "down", down)
    assert main(["down"]) == code
    assert said in capsys.readouterr().err


def test_an_unknown_node_is_answered_with_those_there_are(as_root: Path) -> None:
    paths = Paths(as_root, as_root / "cache")
    for name in ("node1", "node2"):
        (paths.nodes / name).mkdir(parents=True)
        (paths.nodes / name / "node.json").write_text('{"base": "base-1"}')
    save_record(paths, Record(7))
    assert lab.find(paths, "node2").address == "10.77.7.12"
    with pytest.raises(LabError, match=r"no node 'node3' in this lab: it has node1, node2"):
        lab.find(paths, "node3")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["x=5; echo $x | tr 5 7"], "7\n"),
        (["echo", "$x | tr", "a=b"], "$x | tr a=b\n"),
    ],
)
def test_a_line_in_quotes_is_shell_and_several_words_are_taken_as_they_are(
    as_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    typed: list[str],
    said: str,
) -> None:
    class Here:
        def shell(self, command: list[str]) -> int:
            return subprocess.run(clean(command)).returncode

    monkeypatch.setattr(lab, "find", lambda paths, name: Here())
    assert main(["shell", "node1", "--", *typed]) == 0
    assert capfd.readouterr().out == said


def test_status_of_no_lab_and_of_a_lab_that_is_off(
    as_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == 0
    assert "no node in" in capsys.readouterr().out
    paths = Paths(as_root, as_root / "cache")
    (paths.nodes / "node2").mkdir(parents=True)
    (paths.nodes / "node2/node.json").write_text('{"base": "base-1"}')
    save_record(paths, Record(7))
    assert main(["status", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["bridge"] == "lockstep7"
    assert value["nodes"] == [
        {
            "name": "node2",
            "address": "10.77.7.12",
            "state": "off",
            "user": "ops",
            "os": "debian",
            "kind": "container",
            "log": str(paths.nodes / "node2/console.log"),
            "boot_id": None,
            "uptime": None,
        }
    ]


def test_a_lab_that_is_up_does_not_change_its_system(
    as_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = Paths(as_root, as_root / "cache")
    (paths.nodes / "node2").mkdir(parents=True)
    (paths.nodes / "node2/node.json").write_text('{"base": "base-1"}')
    save_record(paths, Record(7, os="mixed"))
    monkeypatch.setattr(lab, "read_host", lambda: None)
    monkeypatch.setattr(network, "links", list)
    assert main(["up", "--os", "rpm", "--write", str(as_root / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert "this lab has --os mixed, and its nodes cannot become rpm: run `lab down`" in said
    assert said.count("\n") == 1


def test_the_table_shows_a_row_a_node() -> None:
    rows = (
        NodeStatus("node1", "10.77.0.11", "running", "root", "debian", "vm", "/l", "b0-01", 42.0),
        NodeStatus("node2", "10.77.0.12", "off", "ops", "rpm", "container", "/l"),
    )
    assert lab.table(Status("/srv/lab", "lockstep0", (), rows)).splitlines() == [
        "NODE   ADDRESS     KIND       OS      STATE    USER  UPTIME  BOOT ID",
        "node1  10.77.0.11  vm         debian  running  root  42 s    b0-01",
        "node2  10.77.0.12  container  rpm     off      ops   -       -",
    ]


def test_taking_down_what_was_never_up_is_fine(
    as_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["down"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_all_nodes_are_tried_before_an_error_is_told(tmp_path: Path) -> None:
    paths = Paths(tmp_path, tmp_path)
    chosen = [Container(paths, Record(7), number, "b") for number in (1, 2, 3)]
    tried: list[str] = []

    def act(node: Node) -> None:
        tried.append(node.name)
        if node.number == 1:
            raise LabError("node1 is broken")

    with pytest.raises(LabError, match="node1 is broken"):
        lab.each(act, chosen)
    assert sorted(tried) == ["node1", "node2", "node3"]


def test_a_failed_command_is_told_with_its_own_last_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabError, match=r"^`sh -c echo E: why >&2; exit 3` failed: E: why$"):
        commands.run(["sh", "-c", "echo E: why >&2; exit 3"])
    monkeypatch.setattr(commands, "BOUND", ())
    with pytest.raises(LabError, match=r"^building failed: E: no mirror \(all of it: .*/log\)$"):
        commands.run_logged(
            ["sh", "-c", "echo E: no mirror; echo bye; exit 1"], tmp_path / "log", "building"
        )
    assert commands.last_line("", 3) == "exit code 3"


def test_a_removed_variable_does_not_reach_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    changed = commands.environment({"PIP_TARGET": None, "NEW": "1"})
    assert "PIP_TARGET" not in changed
    assert changed["NEW"] == "1"
